"""Saving and loading models with dendrites: each family, other heads, plain modules, folders of real runs."""

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import small_bert
import torch
import transformers
from models import CONFIGS, build, model_class, rows, tied
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageClassification, AutoModelForMaskedLM

from perforated_trainer import blocks, layers, load_perforated_model, modules, remote_code, saving
from perforated_trainer.layers import DendriteLinear, layers_with_dendrites

BERT, DISTILBERT, GPT2 = "BertForMaskedLM", "DistilBertForSequenceClassification", "GPT2LMHeadModel"
FAMILIES = [name for name in CONFIGS if name != "LoraDistilBert"]


@pytest.fixture(autouse=True)
def no_bars():
    transformers.utils.logging.disable_progress_bar()


def with_dendrites(model, count=2, activation="sigmoid", rank=None):
    """Dendrites of random values on the layers of a model, 1 to `count` of them."""
    torch.manual_seed(0)
    outputs = model.get_output_embeddings() if isinstance(model, transformers.PreTrainedModel) else None
    found = [m for m in model.modules() if layers.can_fuse(m) and m is not outputs]
    for i, module in enumerate(found):
        if rank is None or (getattr(module, "groups", 1) == 1 and rank < layers.rank_limit(module)):
            layers.add_dendrites(module, 1 + i % count, activation=activation, rank=rank)
    for name, parameter in model.named_parameters():
        if "dendrite" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def grown(name, count=2, activation="sigmoid", rank=None):
    torch.manual_seed(0)
    model = build(name)
    if "ResNet" in name and not rank:
        layers.add_dendrites(model.resnet.embedder, 2, dim=-3, neurons=16, activation=activation)
    return saving.make_dendritic(with_dendrites(model, count, activation, rank))


def batch_of(name, dtype=torch.float32):
    batch = {key: torch.stack([torch.as_tensor(row[key]) for row in rows(name)[:4]]) for key in rows(name)[0]}
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}


def logits(model, name):
    with torch.no_grad():
        return model.eval()(**batch_of(name, model.dtype)).logits


# ------------------------------------------------------------------------------------------------------------- families


@pytest.mark.parametrize("name", FAMILIES)
def test_family_saved_and_loaded_is_bitwise_equal(name, tmp_path):
    model = grown(name, activation="tanh")
    expected = logits(model, name)  # sets the problem type in the config, too
    model.save_pretrained(tmp_path / "a")
    assert not hasattr(model.config, "quantization_config")
    assert not (tmp_path / "a/model.safetensors").exists()
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert config["architectures"] == [name] and config["quantization_config"]["quant_method"] == "dendrites"
    loaded = model_class(name).from_pretrained(tmp_path / "a")
    assert isinstance(loaded, model_class(name)) and torch.equal(logits(loaded, name), expected)
    assert tied(loaded) == tied(model)
    assert not getattr(loaded, "is_quantized", False) and not hasattr(loaded, "quantization_method")
    assert not hasattr(loaded.config, "quantization_config") and not hasattr(loaded.config, "transformers_weights")
    for same in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert torch.equal(logits(same, name), expected)
    loaded.save_pretrained(tmp_path / "b")
    for file in sorted(path.name for path in (tmp_path / "a").iterdir()):
        assert (tmp_path / "b" / file).read_bytes() == (tmp_path / "a" / file).read_bytes(), file
    loaded.save_pretrained(tmp_path / "b", max_shard_size="30KB", variant="fp16")
    assert (tmp_path / "b" / saving.INDEX).exists() and not (tmp_path / "b" / saving.WEIGHTS).exists()
    sharded = model_class(name).from_pretrained(tmp_path / "b", device_map="auto")
    assert torch.equal(logits(sharded, name), expected)
    sharded.save_pretrained(tmp_path / "b")
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == sorted(p.name for p in (tmp_path / "a").iterdir())
    half = model_class(name).from_pretrained(tmp_path / "a", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} <= {torch.bfloat16}
    torch.testing.assert_close(logits(half, name).float(), expected, atol=0.5, rtol=0.2)


@pytest.mark.parametrize("name", [DISTILBERT, GPT2, "ResNetForImageClassification", "ViTForImageClassification"])
def test_low_rank_saved_and_loaded_is_bitwise_equal(name, tmp_path):
    model = grown(name, rank=2)
    kinds = {type(layer).__name__ for layer in layers_with_dendrites(model).values()}
    assert kinds & {"DendriteLinear", "DendriteConv1D", "DendriteConv2d"} == kinds
    expected = logits(model, name)
    for folder, shards in (("a", {}), ("b", {"max_shard_size": "30KB"})):
        model.save_pretrained(tmp_path / folder, **shards)
        model = model_class(name).from_pretrained(tmp_path / folder)
        assert torch.equal(logits(model, name), expected)
        assert {layer.dendrite_rank for layer in layers_with_dendrites(model).values()} == {2}
    weights = load_file(next((tmp_path / "a").glob("*.safetensors")))
    assert sum(w.numel() for n, w in weights.items() if "dendrite" not in n) > 3 * sum(
        w.numel() for n, w in weights.items() if "dendrite_down" in n or "dendrite_up" in n
    )


SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
IDS = {"input_ids": torch.arange(3, 15)[None]}


def bert_to_bert():
    parts = transformers.BertConfig(**SMALL), transformers.BertConfig(**SMALL)
    return transformers.EncoderDecoderModel(transformers.EncoderDecoderConfig.from_encoder_decoder_configs(*parts))


def longformer():  # changes the output of layers in place
    config = transformers.LongformerConfig(**SMALL, attention_window=4, max_position_embeddings=40, pad_token_id=1)
    return transformers.LongformerForMaskedLM(config)


def wav2vec2():  # weight norm
    sizes = {"conv_dim": [16, 16], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_conv_pos_embeddings": 16}
    config = transformers.Wav2Vec2Config(**SMALL, num_feat_extract_layers=2, **sizes)
    return transformers.Wav2Vec2ForSequenceClassification(config)


def albert():  # each layer is used several times
    config = transformers.AlbertConfig(**SMALL | {"num_hidden_layers": 3}, embedding_size=8)
    return transformers.AlbertForMaskedLM(config)


def mixtral():
    config = transformers.MixtralConfig(**SMALL, num_key_value_heads=1, num_local_experts=2)
    return transformers.MixtralForCausalLM(config)


UNUSUAL = {
    bert_to_bert: IDS | {"decoder_input_ids": IDS["input_ids"]},
    longformer: IDS,
    wav2vec2: {"input_values": torch.linspace(-1, 1, 3200)[None]},
    albert: IDS,
    mixtral: IDS,
}


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("make", UNUSUAL, ids=lambda make: make.__name__)
def test_unusual_model_saved_and_loaded_is_bitwise_equal(make, rank, tmp_path):
    torch.manual_seed(0)
    model, batch = make().eval(), UNUSUAL[make]
    before = output(model, batch)
    expected = output(saving.make_dendritic(with_dendrites(model, rank=rank)), batch)
    assert not torch.equal(before, expected)
    torch.testing.assert_close(model(**batch).logits.detach(), expected, atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path)
    assert torch.equal(output(type(make()).from_pretrained(tmp_path), batch), expected)


def test_full_and_low_rank_in_one_model_are_saved_and_loaded(tmp_path):
    model = build(DISTILBERT)
    attention = model.distilbert.transformer.layer[0].attention
    layers.add_dendrites(attention.q_lin, 2, rank=3)
    layers.add_dendrites(attention.v_lin, 1, rank=1)
    layers.add_dendrites(attention, 1, dim=-1, neurons=32)  # a module whose dendrites hold dendrites
    layers.remove_dendrites(attention)
    layers.add_dendrites(model.classifier, 2)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter) if "dendrite" in name else None
    saving.make_dendritic(model).save_pretrained(tmp_path)
    loaded = model_class(DISTILBERT).from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, DISTILBERT), logits(model, DISTILBERT))


# ---------------------------------------------------------------------------------------- without package, two packages

AUTO = {
    BERT: "AutoModelForMaskedLM",
    GPT2: "AutoModelForCausalLM",
    "ResNetForImageClassification": "AutoModelForImageClassification",
    "T5ForConditionalGeneration": "AutoModelForSeq2SeqLM",
}
# Code for users who have neither perforated_trainer nor perforatedai.
LOAD = f"""
import json, sys
from pathlib import Path
sys.modules["perforatedai"] = None
try:
    import perforated_trainer
    raise SystemExit("perforated_trainer can be imported here")
except ImportError:
    pass
import torch, transformers
autos = {AUTO!r}
for folder in map(Path, sys.argv[1:]):
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    auto = getattr(transformers, autos[name])
    if name == "BertForMaskedLM":
        try:
            auto.from_pretrained(folder)
            raise SystemExit("stock code loads it, with random weights")
        except OSError as error:
            assert "no file named model.safetensors" in str(error), error
    batch, expected = torch.load(folder / "expected.pt")
    for source in folder, folder / "again":
        model = auto.from_pretrained(source, trust_remote_code=True)
        with torch.no_grad():
            assert torch.equal(model(**batch).logits, expected), (name, source)
        if source == folder:
            model.save_pretrained(folder / "again")
print("equal")
"""


def test_new_process_loads_with_the_code_from_the_folder_and_stock_code_fails(tmp_path):
    for name in AUTO:
        model = grown(name)
        model.save_pretrained(tmp_path / name)
        assert remote_code.save_code(model, tmp_path / name)
        assert {path.name for path in (tmp_path / name).glob("*.py")} == set(saving.code_of_dendrites())
        torch.save((batch_of(name), logits(model, name)), tmp_path / name / "expected.pt")
    (tmp_path / "elsewhere").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *[str(tmp_path / name) for name in AUTO]],
        cwd=tmp_path / "elsewhere",
        env=os.environ | {"HF_HOME": str(tmp_path), "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.stdout.endswith("equal\n"), done.stderr[-3000:]


def test_two_copies_of_the_code_in_one_process_agree(tmp_path):
    model = grown(GPT2)
    model.save_pretrained(tmp_path)
    remote_code.save_code(model, tmp_path)
    copied = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(copied).__module__.endswith("dendrite_loading")
    saving.make_dendritic(copied)
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(copied, GPT2), logits(stock, GPT2)) and torch.equal(
        logits(stock, GPT2), logits(model, GPT2)
    )
    for one in (copied, stock):
        one.save_pretrained(tmp_path / "again")
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
        assert torch.equal(logits(again, GPT2), logits(model, GPT2))
    assert transformers.GPT2LMHeadModel._auto_class is None


def test_stock_trainer_trains_a_loaded_model(tmp_path):
    grown(DISTILBERT).save_pretrained(tmp_path / "a")
    loaded = {"attn_implementation": "eager", "id2label": {0: "no", 1: "yes"}}
    model = model_class(DISTILBERT).from_pretrained(tmp_path / "a", **loaded)
    assert model.config._attn_implementation == "eager" and model.config.id2label == {0: "no", 1: "yes"}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    arguments = transformers.TrainingArguments(
        tmp_path / "run", max_steps=2, learning_rate=0.1, report_to="none", use_cpu=True, save_strategy="no"
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=rows(DISTILBERT)[:16])
    trainer.train()
    for own in ("dendrite_weight", "dendrite_bias", "dendrite_to_output", "weight"):
        assert not torch.equal(before[f"classifier.{own}"], model.state_dict()[f"classifier.{own}"])
    trainer.save_model(tmp_path / "b")
    again = model_class(DISTILBERT).from_pretrained(tmp_path / "b", attn_implementation="eager")
    assert torch.equal(logits(again, DISTILBERT), logits(model, DISTILBERT))


# ------------------------------------------------------------------------------------ other heads, bodies, bare configs


def test_model_without_dendrites_is_saved_as_a_stock_model(tmp_path):
    model = saving.make_dendritic(build(GPT2))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    assert type(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)) is transformers.GPT2LMHeadModel
    expected = ["config.json", "generation_config.json", "model.dendrites.safetensors"]
    grown(GPT2).save_pretrained(tmp_path)  # the older weights do not stay next to the new ones
    assert sorted(path.name for path in tmp_path.iterdir()) == expected


BODIES = {  # a model, what else loads from its folder, and what they share
    BERT: (["BertModel", "BertForSequenceClassification", "BertForTokenClassification"], "bert"),
    GPT2: (["GPT2Model", "GPT2ForSequenceClassification"], "transformer"),
    "ResNetForImageClassification": (["ResNetModel"], "resnet"),
    "T5ForConditionalGeneration": (["T5EncoderModel", "T5Model"], "encoder"),
    DISTILBERT: (["DistilBertModel", "DistilBertForMaskedLM", "DistilBertForQuestionAnswering"], "distilbert"),
}


def same_parameters(one, other):
    expected = dict(other.named_parameters())
    found = {name: value for name, value in one.named_parameters() if name in expected}
    dendrites = {name for name in found if "dendrite" in name}
    assert dendrites == {name for name in expected if "dendrite" in name} and dendrites
    return all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.parametrize("name", BODIES)
def test_other_heads_and_bodies_load_from_the_folder_of_a_model_and_back(name, tmp_path):
    others, body = BODIES[name]
    model = grown(name)
    model.save_pretrained(tmp_path / "whole")
    own = getattr(model, body)
    for other in others:
        loaded = getattr(transformers, other).from_pretrained(tmp_path / "whole")
        part = getattr(loaded, body, loaded)
        skipped = {"pooler"} & {child for child, _ in part.named_children()}  # not in a BertForMaskedLM
        for child, module in part.named_children():
            if child not in skipped and layers_with_dendrites(module):
                assert same_parameters(module, own.get_submodule(child))
        loaded.save_pretrained(tmp_path / other)  # as itself, and it loads again
        again = getattr(transformers, other).from_pretrained(tmp_path / other)
        assert same_parameters(again, loaded)
        if name != "T5ForConditionalGeneration":
            back = model_class(name).from_pretrained(tmp_path / other)
            assert same_parameters(getattr(back, body), own)


@pytest.mark.parametrize("name", [BERT, DISTILBERT, GPT2])
def test_body_of_a_model_saves_itself_with_its_dendrites(name, tmp_path):
    model = grown(name)
    body = model.base_model
    body.save_pretrained(tmp_path)
    assert (tmp_path / saving.WEIGHTS).is_file()
    loaded = transformers.AutoModel.from_pretrained(tmp_path)
    x = torch.arange(2, 8)[None]
    with torch.no_grad():
        assert torch.equal(loaded(x).last_hidden_state, body(x).last_hidden_state)
    model.save_pretrained(tmp_path / "whole")
    assert torch.equal(logits(model_class(name).from_pretrained(tmp_path / "whole"), name), logits(model, name))


def test_head_with_dendrites_is_replaced_by_another_head(tmp_path):
    model = grown(DISTILBERT)
    assert layers.has_dendrites(model.classifier)
    model.save_pretrained(tmp_path)
    more = model_class(DISTILBERT).from_pretrained(tmp_path, num_labels=2)
    assert layers.has_dendrites(more.classifier)
    body = transformers.DistilBertModel.from_pretrained(tmp_path)
    assert not [name for name in layers_with_dendrites(body) if "classifier" in name]


@pytest.mark.filterwarnings("ignore")
def test_head_of_another_size_is_new_and_has_no_dendrites(tmp_path):
    model, cls = grown(DISTILBERT), model_class(DISTILBERT)
    model.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert type(loaded.classifier) is nn.Linear and loaded.classifier.out_features == 5
    assert same_parameters(loaded.distilbert, model.distilbert) and layers.has_dendrites(loaded.pre_classifier)
    with pytest.raises((RuntimeError, ValueError), match=r"ignore_mismatched_sizes|was saved with shape"):
        cls.from_pretrained(tmp_path, num_labels=5)


def test_resize_of_an_output_layer_with_dendrites_raises():
    model = build(BERT)
    model.resize_token_embeddings(1001)
    layers.add_dendrites(model.get_output_embeddings(), 1)
    saving.make_dendritic(model).resize_token_embeddings(1001)
    with pytest.raises(ValueError, match="output layer has dendrites"):
        model.resize_token_embeddings(1002)


def test_from_config_of_a_folder_with_dendrites_saves_models_that_load(tmp_path):
    grown(BERT).save_pretrained(tmp_path / "a")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "a")
    makers = [
        transformers.AutoModelForMaskedLM.from_config,
        transformers.AutoModel.from_config,
        transformers.AutoModelForSequenceClassification.from_config,
        transformers.BertForMaskedLM,
        transformers.BertForQuestionAnswering,
    ]
    for number, make in enumerate(makers):
        model, folder = make(config), tmp_path / str(number)
        assert not layers_with_dendrites(model)
        model.save_pretrained(folder)
        assert "quantization_config" not in (folder / "config.json").read_text()
        for cls in (type(model), transformers.AutoModel):
            loaded = cls.from_pretrained(folder)
            assert not layers_with_dendrites(loaded)
        again = type(model).from_pretrained(folder)
        assert all(map(torch.equal, model.parameters(), again.parameters()))
        with_dendrites(again).save_pretrained(folder)  # and it can get new dendrites
        assert same_parameters(type(model).from_pretrained(folder), again)
    kept = AutoModelForMaskedLM.from_pretrained(tmp_path / "a", config=config)  # the config object is as it was
    assert layers_with_dendrites(kept)


def test_push_to_hub_uploads_the_finished_folder(tmp_path, monkeypatch):
    pushed = []

    def push(self, repo_id, **kwargs):
        pushed.append((repo_id, sorted(p.name for p in (tmp_path / "mine").iterdir()), kwargs))

    monkeypatch.setattr(transformers.PreTrainedModel, "push_to_hub", push)
    model = grown(DISTILBERT)
    model.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="me/mine", private=True, max_shard_size="30KB")
    ((repo, files, kwargs),) = pushed
    assert repo == "me/mine" and kwargs == {"private": True, "max_shard_size": "30KB"}
    assert saving.INDEX in files and "model.safetensors" not in files
    model.save_pretrained(tmp_path / "mine", push_to_hub=True)
    assert pushed[1][0] == "mine" and saving.WEIGHTS in pushed[1][1] and saving.INDEX not in pushed[1][1]


# -------------------------------------------------------------------------------------------------- plain torch modules


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.head, self.scale = nn.Linear(4, 3), nn.Parameter(torch.ones(1))
        self.alias = self.head
        self.register_buffer("shift", torch.randn(3), persistent=False)

    def forward(self, x):
        return self.scale * self.alias(self.features(x).mean((2, 3)))


@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("joined", [False, True])
def test_plain_module_saved_and_loaded_is_bitwise_equal(rank, joined, tmp_path):
    torch.manual_seed(0)
    model, x = Plain(), torch.randn(5, 1, 8, 8)
    if joined and not rank:
        layers.add_dendrites(blocks.join(model, "features.0", "1"), 2, dim=-3, neurons=4)
    with_dendrites(model, rank=rank)
    modules.save_module(model, tmp_path)
    loaded = load_perforated_model(Plain(), tmp_path)
    assert loaded.alias is loaded.head and loaded.head.num_dendrites == model.head.num_dendrites
    assert torch.equal(loaded(x), model(x)) and not loaded.training
    modules.save_module(loaded, tmp_path)
    assert torch.equal(load_perforated_model(Plain(), tmp_path)(x), model(x))
    for module in list(layers_with_dendrites(loaded).values()):
        layers.remove_dendrites(module)
    modules.save_module(loaded, tmp_path)
    assert not (tmp_path / modules.MODULE).exists()


def test_plain_module_that_does_not_fit_is_one_clear_error(tmp_path):
    modules.save_module(with_dendrites(Plain()), tmp_path)
    with pytest.raises(ValueError, match=r"gives dendrites to 'features\.0', which Linear does not have"):
        modules.load_module(nn.Linear(4, 3), tmp_path)
    values = json.loads((tmp_path / modules.MODULE).read_text())
    values["layers"]["head"] = 10_000_000
    (tmp_path / modules.MODULE).write_text(json.dumps(values))
    with pytest.raises(ValueError, match="'head': 10000000 dendrites, but the weights are of"):
        modules.load_module(Plain(), tmp_path)
    with pytest.raises(OSError, match="no file of weights"):
        modules.load_module(Plain(), tmp_path / "nowhere")


# ------------------------------------------------------------------------------------------------------------ bad input


def break_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


def break_weights(folder, change):
    weights = load_file(folder / saving.WEIGHTS)
    change(weights)
    save_file(weights, folder / saving.WEIGHTS, {"format": "pt"})


BIAS, OUTPUT = "classifier.dendrite_bias", "classifier.dendrite_to_output"
MANY = 10_000_000
BAD = {
    "no file of weights model.dendrites.safetensors": lambda f: (f / saving.WEIGHTS).unlink(),
    "damaged": lambda f: os.truncate(f / saving.WEIGHTS, 1000),
    "are damaged": lambda f: (f / saving.WEIGHTS).write_bytes(b"version https://git-lfs.github.com/spec/v1"),
    f"{BIAS} is missing": lambda f: break_weights(f, lambda w: w.pop(BIAS)),
    "the weights of its dendrites are missing": lambda f: break_weights(f, lambda w: w.pop(OUTPUT)),
    "dendrite_to_output is not expected": lambda f: break_weights(
        f, lambda w: w.update({f"a.{OUTPUT}": torch.ones(1)})
    ),
    f"{OUTPUT} has shape": lambda f: break_weights(f, lambda w: w.update({OUTPUT: w[OUTPUT][:, :1].clone()})),
    "(?s)(size|shape|mismatch)": lambda f: break_weights(f, lambda w: w.update({"classifier.bias": torch.ones(5)})),
    "'nowhere', which Distil": lambda f: break_config(f, layers={"nowhere": 1}),
    "num_dendrites must be|dendrites, but": lambda f: break_config(f, layers={"classifier": "2"}),
    "-1 dendrites, but the weights are of": lambda f: break_config(f, layers={"classifier": -1}),
    "True|dendrites, but": lambda f: break_config(f, layers={"classifier": {"dendrites": "2", "rank": 1}}),
    "is not expected": lambda f: break_config(f, layers={"pre_classifier": 1}),
    "'classifier': 10000000 dendrites, but the weights are of": lambda f: break_config(f, layers={"classifier": MANY}),
    "is missing|has shape|not below": lambda f: break_config(f, layers={"classifier": {"dendrites": 2, "rank": MANY}}),
    "newer version": lambda f: break_config(f, format=saving.FORMAT + 1, something="new"),
    "not '../model.safetensors'": lambda f: break_config(f, weights="../model.safetensors"),
    "a safetensors file": lambda f: break_config(f, weights=r"C:\model.safetensors"),
    "Unknown dendrite activation 'eval'": lambda f: break_config(f, activation="eval"),
    "`layers` must name": lambda f: break_config(f, layers=["classifier"]),
}


@pytest.fixture(scope="module")
def good_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    grown(DISTILBERT).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("message", BAD)
def test_bad_folder_is_one_clear_error(message, tmp_path, good_folder):
    shutil.copytree(good_folder, tmp_path / "model")
    BAD[message](tmp_path / "model")
    with pytest.raises((ValueError, OSError, RuntimeError), match=message):
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    "layer", [MANY, {"dendrites": MANY, "dim": -3, "neurons": 16}, {"dendrites": 2, "dim": -3, "neurons": 10**12}]
)
def test_numbers_that_do_not_fit_raise_before_anything_is_allocated(layer, tmp_path):
    name = "ResNetForImageClassification"
    grown(name).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for own in ("resnet.embedder", "resnet.encoder.stages.0.layers.0.layer.0.convolution"):
        if own in config["quantization_config"]["layers"] and (isinstance(layer, dict) == own.endswith("embedder")):
            break_config(tmp_path, layers=config["quantization_config"]["layers"] | {own: layer})
            with pytest.raises(ValueError, match="dendrites"):
                model_class(name).from_pretrained(tmp_path)
            return
    pytest.fail("no layer was changed")


# ------------------------------------------------------------------------------------------------- folders of real runs


@pytest.fixture(scope="module")
def runs(finished, tmp_path_factory):
    """Folder, loading function, batch, and logits of the trained model of each of the two runs."""
    folder = tmp_path_factory.mktemp("loading")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        trainer = small_bert.train("bert")
    batch = trainer.data_collator([dict(row) for row in rows(BERT)[:4]])
    with torch.no_grad():
        expected = trainer.model.eval()(**batch).logits
    images = {"pixel_values": torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))}
    mnist = load_mnist(finished / "run/final")
    with torch.no_grad():
        return {
            "mnist": (finished / "run", load_mnist, images, mnist(**images).logits),
            "bert": (folder / "bert", AutoModelForMaskedLM.from_pretrained, batch, expected),
        }


def load_mnist(folder, **kwargs):
    return AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True, **kwargs)


def output(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def last_checkpoint(run):
    return max(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


@pytest.fixture(params=["mnist", pytest.param("bert")])
def trained(request, runs):
    return runs[request.param]


@pytest.mark.slow
def test_final_checkpoints_and_the_output_folder_of_a_run_load(trained):
    run, load, batch, expected = trained
    assert torch.equal(output(load(run / "final"), batch), expected)
    # A run ends with the best model, and the last checkpoint contains it.
    assert torch.equal(output(load(last_checkpoint(run)), batch), expected)
    if (run / "config.json").exists():  # written by `save_model()`
        assert torch.equal(output(load(run), batch), expected)
    numbers = set()
    for folder in run.glob("checkpoint-*"):
        numbers |= {layer.num_dendrites for layer in layers_with_dendrites(load(folder)).values()} or {0}
    assert len(numbers) >= 3, numbers


@pytest.mark.slow
def test_run_loads_by_load_perforated_model_and_by_the_class_itself(runs):
    run, load, batch, expected = runs["bert"]
    model = load_perforated_model(AutoModelForMaskedLM, run / "final")
    assert torch.equal(output(model, batch), expected)
    same = type(load(run / "final")).from_pretrained(run / "final")
    assert torch.equal(output(same, batch), expected)
    assert any(isinstance(layer, DendriteLinear) for layer in same.modules())


@pytest.mark.slow
def test_model_of_a_run_saved_again_is_the_same(trained, tmp_path):
    run, load, batch, expected = trained
    model, folder = load(run / "final"), run / "final"
    for number in range(2):
        model.save_pretrained(tmp_path / str(number))
        weights = "model.dendrites.safetensors"
        assert (tmp_path / str(number) / weights).read_bytes() == (folder / weights).read_bytes()
        model = load(tmp_path / str(number))
        assert torch.equal(output(model, batch), expected)
    again = json.loads((tmp_path / "1/config.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    assert again["quantization_config"] == config["quantization_config"]


@pytest.mark.slow
def test_shards_of_a_run_load_and_a_missing_one_is_named(trained, tmp_path):
    run, load, batch, expected = trained
    load(run / "final").save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(output(load(tmp_path), batch), expected)
    next(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(OSError, match="no file"):
        load(tmp_path)


@pytest.mark.slow
def test_run_loads_with_dtype_and_device_map(trained):
    run, load, batch, expected = trained
    model = load(run / "final", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    half = {name: value.bfloat16() if value.is_floating_point() else value for name, value in batch.items()}
    assert (output(model, half).float() - expected).abs().max() < 0.1 * expected.abs().max()
    assert torch.equal(output(load(run / "final", device_map="auto"), batch), expected)


@pytest.mark.slow
def test_tied_weights_of_a_run_stay_tied(runs):
    run, load, *_ = runs["bert"]
    model = load(run / "final")
    assert [names for names in tied(model) if any("embeddings" in name for name in names)] == [
        ["bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"]
    ]
    with safetensors.safe_open(run / "final/model.dendrites.safetensors", "pt") as file:
        assert "cls.predictions.decoder.weight" not in file.keys()  # noqa: SIM118 - no dict


@pytest.mark.slow
def test_file_of_a_run_holds_each_parameter_once(trained):
    run, load, *_ = trained
    model = load(run / "final")
    parameters = json.loads((run / "results.json").read_text())["final"]["parameters"]
    assert model.num_parameters() == parameters
    assert (run / "final/model.dendrites.safetensors").stat().st_size < 4 * parameters + 10_000


def one_dendrite_more(folder):
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    name = next(iter(config["layers"]))
    break_config(folder, layers=config["layers"] | {name: config["layers"][name] + 1})


def drop_a_dendrite(folder):
    break_weights(folder, lambda w: w.pop(next(name for name in w if name.endswith("dendrite_to_output"))))


DAMAGES = {
    "no file": lambda folder: (folder / saving.WEIGHTS).unlink(),
    "damaged": lambda folder: os.truncate(folder / saving.WEIGHTS, 1000),
    "the weights of its dendrites are missing": drop_a_dendrite,
    "dendrites, but the weights are of": one_dendrite_more,
    "newer version": lambda folder: break_config(folder, format=99),
}


@pytest.mark.slow
@pytest.mark.parametrize("message", DAMAGES)
def test_damaged_final_folder_is_one_clear_line(trained, tmp_path, message):
    run, load, *_ = trained
    folder = tmp_path / "final"
    shutil.copytree(run / "final", folder)
    DAMAGES[message](folder)
    with pytest.raises((OSError, ValueError), match=message) as caught:
        load(folder)
    assert len(str(caught.value).strip().splitlines()) == 1
