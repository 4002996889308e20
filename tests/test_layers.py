"""Layers with dendrites: the formula, and the way of a model through a folder and back."""

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from models import CONFIGS, build, model_class, rows, tied
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from perforated_trainer import layers, remote_code

torch.set_num_threads(1)
LAYERS = {
    "linear": (lambda: nn.Linear(5, 6), (3, 4, 5), -1),
    "linear, no bias": (lambda: nn.Linear(5, 6, bias=False), (4, 5), -1),
    "Conv1D": (lambda: Conv1D(6, 5), (3, 4, 5), -1),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding="same"), (2, 4, 9), -2),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 9, 9), -3),
    "conv2d, no batch": (lambda: nn.Conv2d(4, 6, 3, bias=False), (4, 9, 9), -3),
    "conv2d, groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2), (2, 4, 9, 9), -3),
    "conv3d, groups": (lambda: nn.Conv3d(4, 6, 3, groups=2, bias=False), (2, 4, 5, 5, 5), -4),
    "conv2d, reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 9, 9), -3),
    "block": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), (2, 4, 9, 9), -3),
    "embedding": (lambda: nn.Embedding(7, 6), None, -1),
}
each_layer = pytest.mark.parametrize("kind", LAYERS)
families = pytest.mark.parametrize("name", [name for name in CONFIGS if name != "LoraDistilBert"])


def trained(kind, count):
    """Layer, dendrites, c, a, input, dim: as training has them."""
    make, shape, dim = LAYERS[kind]
    torch.manual_seed(0)
    layer, *dendrites = (make() for _ in range(count + 1))
    to_dendrites = [nn.Parameter(torch.randn(i, 6)) for i in range(count)]
    x = torch.randint(7, (3, 4)) if shape is None else torch.randn(shape)
    return layer, dendrites, to_dendrites, nn.Parameter(torch.randn(count, 6)), x, dim


def deployed(layer, dendrites, to_dendrites, to_output, x, dim, activation="sigmoid"):
    new = layers.add_dendrites(copy.deepcopy(layer), len(dendrites), dim=dim, neurons=6, activation=activation)
    layers.set_dendrites(new, dendrites, to_dendrites, to_output)
    return new


def naive(layer, dendrites, to_dendrites, to_output, x, dim):
    def broadcast(numbers, output):
        return numbers.view(-1, *[1] * (-1 - dim))

    output, values = layer(x), []
    for i, dendrite in enumerate(dendrites):
        total = dendrite(x)
        for j, value in enumerate(values):
            total = total + broadcast(to_dendrites[i][j], total) * value
        values.append(torch.sigmoid(total))
        output = output + broadcast(to_output[i], output) * values[-1]
    return output


# ------------------------------------------------------------------------------------------------------- the formula


@each_layer
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_training_and_deployed_layer_are_equal_to_the_bit_and_to_the_formula(kind, count):
    *parts, x, dim = trained(kind, count)
    for module in (parts[0], *parts[1]):
        module.eval()
    new = deployed(*parts, x, dim).eval()
    output = layers.forward_with_dendrites(*parts, x, dim=dim)
    assert torch.equal(output, new(x))
    torch.testing.assert_close(output, naive(*parts, x, dim), atol=1e-6, rtol=1e-5)
    assert isinstance(new, type(parts[0])) and new.num_dendrites == count and type(new).__name__.startswith("Dendrite")
    for same in (copy.deepcopy(new), pickle.loads(pickle.dumps(new))):
        assert type(same) is type(new) and torch.equal(same(x), output)
    dendrites, to_dendrites, to_output = layers.split_dendrites(new)
    assert {type(dendrite) for dendrite in dendrites} == {type(parts[0])}
    plain = layers.remove_dendrites(new)
    assert type(plain) is type(parts[0]) and plain.state_dict().keys() == parts[0].state_dict().keys()
    for dendrite in dendrites:
        dendrite.eval()
    assert torch.equal(layers.forward_with_dendrites(plain, dendrites, to_dendrites, to_output, x, dim=dim), output)


@each_layer
def test_gradients_are_those_of_the_formula(kind):
    *parts, x, dim = trained(kind, 3)
    parameters = [p for m in (parts[0], *parts[1]) for p in m.parameters()] + [*parts[2][1:], parts[3]]
    ours = torch.autograd.grad(layers.forward_with_dendrites(*parts, x, dim=dim).square().sum(), parameters)
    theirs = torch.autograd.grad(naive(*parts, x, dim).square().sum(), parameters)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "Conv1D", "conv2d, groups", "block"])
def test_autocast_export_checkpointing_and_meta(kind):
    *parts, x, dim = trained(kind, 2)
    new = deployed(*parts, x, dim).eval()
    for module in (parts[0], *parts[1]):
        module.eval()
    with torch.autocast("cpu", torch.bfloat16):
        output = new(x)
        assert output.dtype == parts[0](x).dtype
        assert torch.equal(output, layers.forward_with_dendrites(*parts, x, dim=dim))
    torch.testing.assert_close(torch.export.export(new, (x,)).module()(x), new(x))
    x.requires_grad_()
    torch.utils.checkpoint.checkpoint(new, x, use_reentrant=False).sum().backward()
    assert all(parameter.grad is not None for parameter in new.parameters())
    with torch.device("meta"):
        empty = layers.add_dendrites(LAYERS[kind][0](), 2, dim=dim, neurons=6)
    assert {p.device.type for p in empty.parameters()} == {"meta"} and empty(x.to("meta")).device.type == "meta"


def test_dynamo_traces_a_layer_as_one_graph():
    *parts, x, dim = trained("linear", 2)
    new = deployed(*parts, x, dim)
    torch.testing.assert_close(torch.compile(new, fullgraph=True, backend="eager")(x), new(x))


def test_frozen_activation_and_wrong_arguments():
    linear = nn.Linear(3, 4).requires_grad_(False)
    assert not any(p.requires_grad for p in layers.add_dendrites(linear, 2).parameters())
    assert (
        layers.activation_name(torch.nn.functional.leaky_relu) == layers.activation_name(nn.LeakyReLU()) == "leaky_relu"
    )
    assert len({layers.activation_name(function) for function in layers.ACTIVATIONS.values()}) == len(
        layers.ACTIVATIONS
    )
    with pytest.raises(ValueError, match="cannot be saved"):
        layers.activation_name(torch.cos)
    with pytest.raises(ValueError, match="already"):
        layers.add_dendrites(linear, 1)
    with pytest.raises(ValueError, match="Unknown dendrite activation"):
        layers.add_dendrites(nn.Linear(3, 4), 1, activation="os.system")
    with pytest.raises(ValueError, match="`dim`"):
        layers.add_dendrites(nn.Embedding(3, 4), 1)
    with pytest.raises(ValueError, match="shape"):
        layers.set_dendrites(linear, [nn.Linear(3, 4)] * 2, [None, torch.ones(1, 4)], torch.ones(1, 4))
    assert type(layers.add_dendrites(nn.Linear(3, 4), 0)) is nn.Linear


# ------------------------------------------------------------------------------------------------ saving and loading


def fusible(model):
    return {
        name: module
        for name, module in model.named_modules()
        if layers.can_fuse(module) and not name.endswith(("lm_head", "decoder"))
    }


def grown(name, count=2, activation="sigmoid"):
    """A model with dendrites of random numbers on its layers."""
    torch.manual_seed(0)
    model = build(name)
    for i, module in enumerate(fusible(model).values()):
        layers.add_dendrites(module, 1 + i % count, activation=activation)
    if "ResNet" in name:
        block = model.resnet.embedder
        layers.add_dendrites(block, 2, dim=-3, neurons=16, activation=activation)
    for parameter_name, parameter in model.named_parameters():
        if "dendrite" in parameter_name:
            nn.init.normal_(parameter, std=0.3)
    return layers.make_dendritic(model).eval()


def logits(model, name):
    batch = {key: torch.stack([torch.as_tensor(row[key]) for row in rows(name, 4)]) for key in rows(name, 4)[0]}
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
    with torch.no_grad():
        return model.eval()(**batch).logits


@families
def test_a_family_through_a_folder(name, tmp_path):
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
    assert (tmp_path / "b" / layers.INDEX).exists() and not (tmp_path / "b" / layers.WEIGHTS).exists()
    sharded = model_class(name).from_pretrained(tmp_path / "b", device_map="auto")
    assert torch.equal(logits(sharded, name), expected)
    sharded.save_pretrained(tmp_path / "b")
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == sorted(p.name for p in (tmp_path / "a").iterdir())
    half = model_class(name).from_pretrained(tmp_path / "a", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} <= {torch.bfloat16}
    torch.testing.assert_close(logits(half, name).float(), expected, atol=0.5, rtol=0.2)


AUTO = {
    "BertForMaskedLM": "AutoModelForMaskedLM",
    "GPT2LMHeadModel": "AutoModelForCausalLM",
    "MnistCnnForImageClassification": "AutoModelForImageClassification",
    "ResNetForImageClassification": "AutoModelForImageClassification",
    "T5ForConditionalGeneration": "AutoModelForSeq2SeqLM",
}
# What people do who have neither perforated_trainer nor perforatedai.
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
# The end of a script that defines a model.
MAIN = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from perforated_trainer import layers, remote_code
torch.manual_seed(0)
model = MnistCnnForImageClassification(MnistCnnConfig())
for module in (model.features[0], model.features[2], model.classifier[0]):
    layers.add_dendrites(module, 2)
for name, parameter in model.named_parameters():
    if "dendrite" in name:
        nn.init.normal_(parameter)
layers.make_dendritic(model).eval().save_pretrained(sys.argv[1])
assert remote_code.save_code(model, sys.argv[1])
batch = {"pixel_values": torch.randn(3, 1, 28, 28)}
torch.save((batch, model(**batch).logits.detach()), sys.argv[1] + "/expected.pt")
"""


def script_model(folder):
    """The network of this repository, defined in a `__main__` whose other imports the folder must not need."""
    root = Path(remote_code.__file__).parents[1]
    script = (root / "mnist_huggingface_perforatedai.py").read_text()
    script = script[: script.index('if __name__ == "__main__"')]
    start, end = script.index("from perforated_trainer import"), script.index("logger = logging.get_logger")
    (folder.parent / "script.py").write_text(script[:start] + script[end:] + MAIN)
    done = subprocess.run(
        [sys.executable, folder.parent / "script.py", root, folder], capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr[-3000:]
    code = (folder / "modeling_mnist_cnn.py").read_text()
    assert not [word for word in ("mlxtend", "torchvision", "register", "HfArg", "TrainingArguments") if word in code]
    assert json.loads((folder / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "modeling_mnist_cnn.MnistCnnConfig",
        "AutoModelForImageClassification": "modeling_mnist_cnn.MnistCnnForImageClassification",
    }


def test_new_process_loads_with_the_code_from_the_folder_and_stock_code_fails(tmp_path):
    for name in AUTO:
        if name == "MnistCnnForImageClassification":
            script_model(tmp_path / name)
            continue
        model = grown(name)
        model.save_pretrained(tmp_path / name)
        assert remote_code.save_code(model, tmp_path / name)
        batch = {key: torch.stack([torch.as_tensor(row[key]) for row in rows(name, 4)]) for key in rows(name, 4)[0]}
        torch.save((batch, logits(model, name)), tmp_path / name / "expected.pt")
    (tmp_path / "elsewhere").mkdir()
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if "dendrite" not in path]
    paths = [path for path in paths if path and not Path(path, "perforated_trainer").exists()]
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *[str(tmp_path / name) for name in AUTO]],
        cwd=tmp_path / "elsewhere",
        env=os.environ | {"HF_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.endswith("equal\n"), done.stderr[-3000:]


EXTRACTED = """
from __future__ import annotations
import sys, os.path
import transformers as hf
from torch import nn as layers_of_torch, optim
if len(sys.argv) > 99:
    sys.exit()
try:
    import nowhere
except ImportError:
    nowhere = None
WIDTHS: dict[str, int] = {}
WIDTHS["a"] = 3
UNUSED = 4
def unused(): return os
def twice(function):
    return function
@twice
def width(name: layers_of_torch.Module) -> int:
    model = WIDTHS[name]  # a local variable, not the model below
    return [model for model in (model,)][0]
class SmallConfig(hf.PreTrainedConfig):
    model_type = "small-one"
class Small(hf.PreTrainedModel):
    config_class = SmallConfig
    def __init__(self, config):
        super().__init__(config)
        self.layer = layers_of_torch.Linear(width("a"), width("a"))
        self.there = nowhere is not None
        self.post_init()
    def forward(self, x):
        return self.layer(x)
hf.AutoConfig.register("small-one", SmallConfig)
model = Small(SmallConfig())
"""


def test_extracted_code_holds_what_is_needed_and_nothing_else(tmp_path, monkeypatch, caplog):
    (tmp_path / "small_models.py").write_text(EXTRACTED)
    monkeypatch.syspath_prepend(tmp_path)
    import small_models

    code = remote_code.extract(small_models.Small, small_models.SmallConfig)
    for needed in ("import nowhere", 'WIDTHS["a"]', "@twice", "def twice", "import nn as layers_of_torch"):
        assert needed in code
    for other in ("sys", "import os", "UNUSED", "unused", "optim", "register", "model = Small"):
        assert other not in code.replace(f"from .{layers.CODE} import", ""), other
    namespace = {}
    exec(code.replace(f"from .{layers.CODE} import", "from perforated_trainer.layers import"), namespace)
    assert namespace["Small"](namespace["SmallConfig"]()).layer.in_features == 3

    class Local(transformers.BertForMaskedLM):
        pass

    model = Local(transformers.BertConfig(**CONFIGS["BertForMaskedLM"]))
    model.save_pretrained(tmp_path)
    assert not remote_code.save_code(model, tmp_path)
    assert "auto_map" not in (tmp_path / "config.json").read_text()


def test_two_copies_of_the_file_in_one_process(tmp_path):
    model = grown("GPT2LMHeadModel")
    model.save_pretrained(tmp_path)
    remote_code.save_code(model, tmp_path)
    model = layers.make_dendritic(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)  # from the copy
    )
    assert type(model).__module__.endswith("dendrite_layers")
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(model, "GPT2LMHeadModel"), logits(stock, "GPT2LMHeadModel"))
    assert transformers.GPT2LMHeadModel._auto_class is None


def test_stock_trainer_trains_a_loaded_model(tmp_path):
    name = "DistilBertForSequenceClassification"
    grown(name).save_pretrained(tmp_path / "a")
    model = model_class(name).from_pretrained(tmp_path / "a", attn_implementation="eager", id2label={0: "no", 1: "yes"})
    assert model.config._attn_implementation == "eager" and model.config.id2label == {0: "no", 1: "yes"}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    arguments = transformers.TrainingArguments(
        tmp_path / "run", max_steps=2, learning_rate=0.1, report_to="none", use_cpu=True, save_strategy="no"
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=rows(name, 16))
    trainer.train()
    for own in ("dendrite_weight", "dendrite_bias", "dendrite_to_output", "weight"):
        assert not torch.equal(before[f"classifier.{own}"], model.state_dict()[f"classifier.{own}"])
    trainer.save_model(tmp_path / "b")
    again = model_class(name).from_pretrained(tmp_path / "b", attn_implementation="eager")
    assert torch.equal(logits(again, name), logits(model, name))


def test_model_without_dendrites_is_a_stock_model(tmp_path):
    model = layers.make_dendritic(build("GPT2LMHeadModel"))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists() and "quantization_config" not in (
        tmp_path / "config.json"
    ).read_text()
    assert type(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)) is transformers.GPT2LMHeadModel
    grown("GPT2LMHeadModel").save_pretrained(tmp_path)  # the older weights do not stay beside the new ones
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.dendrites.safetensors",
    ]


def test_the_body_of_a_model_loads_on_its_own(tmp_path):
    model = build("GPT2LMHeadModel")
    layers.add_dendrites(model.transformer.h[0].mlp.c_fc, 2)
    nn.init.normal_(model.transformer.h[0].mlp.c_fc.dendrite_to_output)
    layers.make_dendritic(model).save_pretrained(tmp_path)
    body, x = transformers.AutoModel.from_pretrained(tmp_path), torch.arange(5)[None]
    assert torch.equal(body(x).last_hidden_state, model.eval().transformer(x).last_hidden_state)


def break_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


def break_weights(folder, change):
    weights = load_file(folder / layers.WEIGHTS)
    change(weights)
    save_file(weights, folder / layers.WEIGHTS, {"format": "pt"})


BIAS, OUTPUT = "classifier.dendrite_bias", "classifier.dendrite_to_output"
BAD = {
    "no file of weights model.dendrites.safetensors": lambda f: (f / layers.WEIGHTS).unlink(),
    "damaged": lambda f: os.truncate(f / layers.WEIGHTS, 1000),
    "are damaged": lambda f: (f / layers.WEIGHTS).write_bytes(b"version https://git-lfs.github.com/spec/v1"),
    f"{BIAS} is missing": lambda f: break_weights(f, lambda w: w.pop(BIAS)),
    "dendrite_to_output is not expected": lambda f: break_weights(
        f, lambda w: w.update({f"a.{OUTPUT}": torch.ones(1)})
    ),
    f"{OUTPUT} has shape": lambda f: break_weights(f, lambda w: w.update({OUTPUT: w[OUTPUT][:, :1].clone()})),
    "(?s)(size|shape|mismatch)": lambda f: break_weights(f, lambda w: w.update({"classifier.bias": torch.ones(5)})),
    "'nowhere', which Distil": lambda f: break_config(f, layers={"nowhere": 1}),
    "number of dendrites must be": lambda f: break_config(f, layers={"classifier": "2"}),
    "is not expected": lambda f: break_config(f, layers={"classifier": 1}),
    "newer version": lambda f: break_config(f, format=2, something="new"),
    "not '../model.safetensors'": lambda f: break_config(f, weights="../model.safetensors"),
    "a safetensors file": lambda f: break_config(f, weights=r"C:\model.safetensors"),
    "Unknown dendrite activation 'eval'": lambda f: break_config(f, activation="eval"),
}


@pytest.fixture(scope="session")
def good_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    grown("DistilBertForSequenceClassification").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_clear_error(message, tmp_path, good_folder):
    shutil.copytree(good_folder, tmp_path / "model")
    BAD[message](tmp_path / "model")
    with pytest.raises((ValueError, OSError, RuntimeError), match=message):
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
