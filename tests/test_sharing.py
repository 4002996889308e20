"""Dendrites with a frozen base: saved without the base, loaded onto it, on a quantized base, and resumed."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import models
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import (
    AutoModel,
    DistilBertForSequenceClassification,
    DistilBertModel,
    TorchAoConfig,
    TrainingArguments,
)

import perforated_trainer
from perforated_trainer import DendriteArguments, PerforatedError, PerforatedTrainer, layers, load_dendrites, sharing

NAME = "DistilBertForSequenceClassification"
ROWS = models.rows(NAME)
INPUTS = {"input_ids": torch.stack([row["input_ids"] for row in ROWS[:8]])}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    DistilBertModel(models.build(NAME).config).save_pretrained("body")


def base(name="body", **kwargs):
    torch.manual_seed(1)
    return DistilBertForSequenceClassification.from_pretrained(name, **kwargs)


def quantized():
    model = base()
    quantize_(model, Int8WeightOnlyConfig(), lambda m, name: isinstance(m, nn.Linear) and "classifier" not in name)
    return model


def quantized_by_transformers():
    config = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=["classifier", "pre_classifier"])
    return base(quantization_config=config)


def trainer(model, steps=8, **changes):
    args = TrainingArguments(
        output_dir="run",
        use_cpu=True,
        max_steps=steps,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        metric_for_best_model="loss",
        learning_rate=1e-2,
        report_to="none",
        disable_tqdm=True,
    )
    settings = {"dendrite_rank": 2, "num_initial_dendrites": 1, "freeze_base": True, "max_dendrites": 3}
    settings |= {"n_epochs_to_switch": 1, "improvement_threshold": 0.5}
    return PerforatedTrainer(
        model=model,
        args=args,
        dendrite_args=DendriteArguments(**settings | changes),
        train_dataset=ROWS[:32],
        eval_dataset=ROWS[32:],
    )


def trained(model=None, **changes):
    found = trainer(model or base(), **changes)
    found.train()
    return found


@torch.no_grad()
def logits(model):
    return model.eval()(**INPUTS).logits


def same_values(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    return all(sharing.fingerprint(first[name]) == sharing.fingerprint(second[name]) for name in first)


def test_dendrites_only_loads_bitwise_equal_in_three_ways(capsys):
    run = trained()
    run.save_model("only", dendrites_only=True)
    assert "the base was loaded from the local path body" in capsys.readouterr().out
    size = sum(path.stat().st_size for path in Path("only").glob("*.safetensors"))
    numbers = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    assert run.num_dendrites == 2 and size < 4 * numbers + 12_000
    for loaded in (
        load_dendrites(base(), "only"),
        DistilBertForSequenceClassification.from_pretrained("only"),
        perforated_trainer.load_perforated_model(DistilBertForSequenceClassification, "only"),
    ):
        assert same_values(loaded, run.model) and torch.equal(logits(loaded), logits(run.model))
        needed = {name for name, p in run.model.named_parameters() if p.requires_grad}
        assert {name for name, p in loaded.named_parameters() if p.requires_grad} == needed


def test_new_process_without_training_packages_loads_equal_logits():
    run = trained()
    run.save_model("only", dendrites_only=True)
    torch.save(logits(run.model), "logits.pt")
    code = f"""
import sys
sys.modules["perforatedai"] = None
import torch
from perforated_trainer import load_dendrites
from transformers import DistilBertForSequenceClassification as Model
inputs = {{"input_ids": torch.tensor({INPUTS["input_ids"].tolist()})}}
for model in (Model.from_pretrained("only"), load_dendrites(Model.from_pretrained("body"), "only")):
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, torch.load("logits.pt"))
assert "perforated_trainer.trainer" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr[-2000:]


def test_body_of_another_class_gets_its_part():
    run = trained()
    run.save_model("only", dendrites_only=True)
    body = AutoModel.from_pretrained("only").eval()
    with torch.no_grad():
        assert torch.equal(body(**INPUTS)[0], run.model.distilbert.eval()(**INPUTS)[0])


def test_final_is_self_contained_and_checkpoints_hold_the_trained_part():
    run = trained()
    run.save_results()
    Path("body").rename("elsewhere")
    assert torch.equal(logits(DistilBertForSequenceClassification.from_pretrained("run/final")), logits(run.model))
    checkpoint = Path("run/checkpoint-8/model.dendrites.safetensors")
    assert checkpoint.stat().st_size < Path("run/final/model.dendrites.safetensors").stat().st_size / 5
    with pytest.raises(OSError, match="these dendrites are for the model 'body', which cannot be loaded"):
        DistilBertForSequenceClassification.from_pretrained("run/checkpoint-8")
    Path("elsewhere").rename("body")
    loaded = DistilBertForSequenceClassification.from_pretrained("run/checkpoint-8")
    assert set(loaded.state_dict()) >= set(run.model.state_dict())


@pytest.mark.parametrize("make", [base, quantized])
def test_resume_with_frozen_base_is_bitwise_equal(make):
    whole = trained(make())
    for step in (6, 8):
        Path(f"run/checkpoint-{step}").rename(f"later-{step}")
    again = trainer(make())
    again.train(resume_from_checkpoint=True)
    assert whole.restarts == again.restarts and same_values(whole.model, again.model)


def test_resume_on_another_base_raises_with_its_names():
    trained()
    model = base()
    with torch.no_grad():
        model.distilbert.transformer.layer[0].ffn.lin1.bias[0] += 1e-6
    with pytest.raises(PerforatedError, match=r"another base: distilbert\.transformer\.layer\.0\.ffn\.lin1\.bias has"):
        trainer(model).train(resume_from_checkpoint=True)


def test_training_continues_from_loaded_dendrites_with_their_base():
    trained().save_model("only", dendrites_only=True)
    model = DistilBertForSequenceClassification.from_pretrained("only")
    body = {name: value.clone() for name, value in model.distilbert.state_dict().items() if "dendrite" not in name}
    head = model.classifier.weight.clone()
    again = trained(model, max_dendrites=3, overwrite_run=True, num_initial_dendrites=0)
    assert not torch.equal(model.classifier.weight, head)
    assert all(torch.equal(model.distilbert.state_dict()[name], value) for name, value in body.items())
    again.save_model("again", dendrites_only=True)
    assert json.loads(Path("again/config.json").read_text())["quantization_config"]["base"]["name"] == "body"
    assert same_values(load_dendrites(base(), "again"), again.model)


@pytest.mark.parametrize("make", [quantized, quantized_by_transformers])
def test_quantized_base_trains_saves_and_loads_bitwise_equal(make):
    run = trained(make())
    assert run.num_dendrites == 2
    run.save_results()  # `final/` cannot hold a base that no file has
    card = Path("run/final/README.md").read_text()
    assert "quantized" in card and "load_dendrites(base" in card
    run.save_model("only", dendrites_only=True)
    for name in ("only", "run/final"):
        loaded = load_dendrites(make(), name)
        assert same_values(loaded, run.model) and torch.equal(logits(loaded), logits(run.model))
    with pytest.raises(ValueError, match=r"for body, quantized \(.*load_dendrites"):
        DistilBertForSequenceClassification.from_pretrained("only")
    with pytest.raises(ValueError, match=r"another base: .*q_lin\.weight has other values"):
        load_dendrites(base(), "only")


@pytest.mark.parametrize("changes", [{"freeze_base": False}, {"dendrite_rank": None}])
def test_quantized_base_without_rank_or_freeze_raises_one_line(changes):
    with pytest.raises(PerforatedError, match=r"quantized .* cannot be trained: set (--)?freeze_base and"):
        trainer(quantized(), **changes)


def test_quantized_layer_of_another_class_is_called_unchanged():
    class Int8Linear(nn.Linear):
        """A layer as in bitsandbytes: a subclass whose weights are not trainable."""

        def __init__(self, linear):
            super().__init__(linear.in_features, linear.out_features)
            scale = linear.weight.abs().amax() / 127
            weight = (linear.weight / scale).round().to(torch.int8)
            self.weight = nn.Parameter(weight, requires_grad=False)
            self.bias, self.scale, self.compute_dtype = None, scale.detach(), torch.bfloat16

        def forward(self, x):
            return nn.functional.linear(x, (self.weight * self.scale).to(x.dtype))

    layer, x = Int8Linear(nn.Linear(8, 6)), torch.randn(4, 8, dtype=torch.bfloat16)
    expected = layer(x)
    perforated_trainer.layers.add_dendrites(layer, 1, rank=2)
    assert layer.dendrite_down.dtype == torch.bfloat16 and torch.equal(layer(x), expected)
    nn.init.ones_(layer.dendrite_to_output)
    layer(x).sum().backward()
    assert layer.dendrite_up.grad is not None and layer.weight.grad is None


class Freeze(transformers.TrainerCallback):
    """Freezes the head after the second step."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step >= 2:
            model.classifier.requires_grad_(False)


def test_what_a_callback_has_frozen_stays_in_checkpoints_and_in_dendrites_only(capsys):
    def run(**kwargs):
        found = trainer(base())
        found.add_callback(Freeze())
        found.train(**kwargs)
        return found

    whole = run()
    whole.save_model("only", dendrites_only=True)
    assert not whole.model.classifier.weight.requires_grad
    assert torch.equal(logits(load_dendrites(base(), "only")), logits(whole.model))
    last = DistilBertForSequenceClassification.from_pretrained("run/checkpoint-8")
    assert not torch.equal(last.classifier.weight, base().classifier.weight)
    for step in (6, 8):
        Path(f"run/checkpoint-{step}").rename(f"later-{step}")
    assert same_values(run(resume_from_checkpoint=True).model, whole.model)
    assert "note: classifier.bias, classifier.weight: frozen, as in checkpoint-4" in capsys.readouterr().out


class Plain(nn.Module):
    """No model of transformers: it has a pretrained body, whose config it shares."""

    def __init__(self):
        super().__init__()
        self.body = DistilBertModel.from_pretrained("body")
        self.config = self.body.config
        torch.manual_seed(1)
        self.classifier = nn.Linear(self.config.dim, 2)

    def forward(self, input_ids, labels, attention_mask=None):
        logits = self.classifier(self.body(input_ids, attention_mask)[0].mean(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_plain_module_with_a_head_that_a_callback_has_frozen_resumes_bitwise_equal():
    def run(**kwargs):
        found = trainer(Plain(), modules_to_train=["classifier"])
        found.add_callback(Freeze())
        found.train(**kwargs)
        return found.model

    whole = run()
    for step in (6, 8):
        Path(f"run/checkpoint-{step}").rename(f"later-{step}")
    assert same_values(run(resume_from_checkpoint=True), whole)


def test_resized_embeddings_are_saved_with_the_dendrites():
    """Their new rows are random, and not in the base."""

    def resized(seed):
        model = base()
        torch.manual_seed(seed)
        model.resize_token_embeddings(model.config.vocab_size + 3)
        return model

    whole = trained(resized(2))
    whole.save_model("only", dendrites_only=True)
    for loaded in (load_dendrites(resized(3), "only"), DistilBertForSequenceClassification.from_pretrained("only")):
        assert torch.equal(logits(loaded), logits(whole.model)) and same_values(loaded, whole.model)
    for step in (6, 8):
        Path(f"run/checkpoint-{step}").rename(f"later-{step}")
    again = trainer(resized(4))
    again.train(resume_from_checkpoint=True)
    assert same_values(again.model, whole.model)


def test_checkpoints_hold_a_base_that_was_not_loaded():
    """A model made from a config has the name of that config, and other weights than the model of that name."""
    torch.manual_seed(3)
    config = transformers.AutoConfig.from_pretrained("body")
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    body = model.distilbert.embeddings.word_embeddings.weight.clone()
    trained(model, modules_to_train=["classifier"])
    loaded = DistilBertForSequenceClassification.from_pretrained("run/checkpoint-8")
    assert model.config._name_or_path == "body"
    assert torch.equal(loaded.distilbert.embeddings.word_embeddings.weight, body)


def test_load_dendrites_takes_the_settings_of_the_task_and_refuses_others():
    labels = {
        "id2label": {0: "no", 1: "yes"},
        "label2id": {"no": 0, "yes": 1},
        "problem_type": "single_label_classification",
    }
    run = trained(base(**labels, pad_token_id=4))
    run.save_model("only", dendrites_only=True)
    loaded = load_dendrites(base(output_attentions=False, dropout=0.3), "only")
    assert loaded.config.id2label == {0: "no", 1: "yes"} and loaded.config.problem_type == labels["problem_type"]
    assert loaded.config.pad_token_id == 4 and loaded.config.dropout == 0.3
    other = base(activation="relu")
    with pytest.raises(ValueError, match="another base: activation is relu here, gelu there"):
        load_dendrites(other, "only")
    assert not layers.layers_with_dendrites(other) and other.config.id2label[0] == "LABEL_0"


def test_head_in_another_dtype_than_the_base_keeps_it():
    def mixed():
        model = base(dtype=torch.bfloat16)
        model.classifier.float().register_forward_pre_hook(lambda module, args: (args[0].float(),))
        return model

    run = trained(mixed())
    run.save_model("only", dendrites_only=True)
    loaded = load_dendrites(base(dtype=torch.bfloat16), "only")
    assert loaded.classifier.weight.dtype == torch.float32 and same_values(loaded, run.model)


def test_save_pretrained_of_a_quantized_base_saves_dendrites_alone():
    run = trained(quantized_by_transformers())
    run.model.save_pretrained("saved")
    assert torch.equal(logits(load_dendrites(quantized_by_transformers(), "saved")), logits(run.model))
    with pytest.raises(ValueError, match="load that as it was"):
        DistilBertForSequenceClassification.from_pretrained("saved")


def test_dendrites_only_into_the_folder_of_the_base_raises_one_line():
    run, before = trained(), Path("body/model.safetensors").read_bytes()
    with pytest.raises(PerforatedError, match="body holds the base, which they need"):
        run.save_model(str(Path("body").resolve()), dendrites_only=True)
    with pytest.raises(ValueError, match="body holds the base"):
        run.model.save_pretrained("body", dendrites_only=True)
    assert Path("body/model.safetensors").read_bytes() == before


def test_dendrites_only_leaves_no_part_of_the_complete_model():
    run = trained()
    run.model.save_pretrained("only", max_shard_size="10KB")
    assert len(list(Path("only").glob("model.dendrites-*"))) > 1
    run.save_model("only", dendrites_only=True)
    assert [path.name for path in Path("only").glob("*.safetensors*")] == ["model.dendrites.safetensors"]


def test_trainer_without_freeze_base_trains_what_an_earlier_one_has_frozen():
    model = base()
    model.distilbert.embeddings.requires_grad_(False)  # by the user: it stays frozen
    trained(model)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad and p.numel()]
    assert len(frozen) > len(list(model.distilbert.embeddings.parameters()))
    trainer(model, freeze_base=False, overwrite_run=True)
    left = [name for name, p in model.named_parameters() if not p.requires_grad and p.numel()]
    assert left == [f"distilbert.embeddings.{name}" for name, _ in model.distilbert.embeddings.named_parameters()]


def test_baseline_on_another_frozen_base_says_so():
    run = trained()
    run.save_results()
    _other_base(None)
    for name, same in (("body", True), ("other", False)):
        baseline = trainer(base(name), control_of="run", overwrite_run=True)
        baseline.train()
        assert ("did not begin with the weights" not in baseline.save_results()["control"]["verdict"]) == same


# ------------------------------------------------------------------------------------------------------------ errors


def test_dendrites_only_without_name_of_the_base_raises_one_line():
    model = base()
    run = trainer(model, modules_to_train=["classifier"])
    model.config._name_or_path = ""
    with pytest.raises(PerforatedError, match="does not know the name of its base"):
        run.save_model("only", dendrites_only=True)
    assert not Path("only").exists()


def test_dendrites_only_of_a_model_that_is_not_frozen_raises_one_line():
    run = trainer(base(), freeze_base=False)
    with pytest.raises(PerforatedError, match="nothing of this model is frozen"):
        run.save_model("only", dendrites_only=True)


def _other_base(config):
    torch.manual_seed(5)
    DistilBertModel(models.build(NAME).config).save_pretrained("other")
    return base("other")


def _fewer_layers(config):
    return models.build(NAME, n_layers=0)


def _newer(config):
    config["quantization_config"]["format"] = 99
    return base()


def _complete(config):
    del config["quantization_config"]["base"]
    return base()


def _unknown_layer(config):
    config["quantization_config"]["layers"]["distilbert.nowhere"] = 1
    return base()


def _more_dendrites(config):
    config["quantization_config"]["layers"]["distilbert.transformer.layer.0.ffn.lin1"]["dendrites"] = 3
    return base()


def _other_dtype(config):
    return base(dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "change, message",
    [
        (_other_base, "trained on another base: .*word_embeddings.weight has other values, .* and 5 more"),
        (_fewer_layers, "trained on another base: this DistilBertForSequenceClassification has no distilbert"),
        (_newer, "saved in format 99 by a newer version"),
        (_complete, "does not hold dendrites alone"),
        (_unknown_layer, "has no distilbert.nowhere"),
        (_more_dendrites, "3 dendrites, but the weights are of 1"),
        (_other_dtype, "word_embeddings.weight is bfloat16 .*, float32 .* is needed"),
    ],
)
def test_load_dendrites_bad_folder_raises_one_line_and_changes_nothing(change, message):
    run = trainer(base())
    run.save_model("only", dendrites_only=True)
    config = json.loads(Path("only/config.json").read_text())
    model = change(config)
    Path("only/config.json").write_text(json.dumps(config))
    before = {name: sharing.fingerprint(value) for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as error:
        load_dendrites(model, "only")
    assert "\n" not in str(error.value)
    assert {name: sharing.fingerprint(value) for name, value in model.state_dict().items()} == before


def test_load_dendrites_without_a_folder_or_a_model_raises_one_line():
    with pytest.raises(OSError, match=r"there is no config\.json in nowhere"):
        load_dendrites(base(), "nowhere")
    with pytest.raises(ValueError, match="base_model must be a loaded model, not str"):
        load_dendrites("body", "nowhere")


@pytest.mark.parametrize("text", ["", '{"model_type": "disti', "[]"])
def test_load_dendrites_with_a_damaged_config_names_the_file(text):
    trainer(base()).save_model("only", dendrites_only=True)
    Path("only/config.json").write_text(text)
    with pytest.raises(ValueError, match=r"only/config\.json is damaged: "):
        load_dendrites(base(), "only")


def test_base_that_is_dendrites_only_raises():
    run = trainer(base())
    run.save_model("only", dendrites_only=True)
    config = json.loads(Path("only/config.json").read_text())
    config["quantization_config"]["base"]["name"] = "only"
    Path("only/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is itself a folder with dendrites alone"):
        DistilBertForSequenceClassification.from_pretrained("only")


def test_fingerprint_changes_with_values_shape_and_type():
    tensor = torch.arange(4.0)
    others = [tensor + 1, tensor.view(2, 2), tensor.double(), tensor.to(torch.bfloat16)]
    assert len({sharing.fingerprint(value) for value in (tensor, *others)}) == 5
    assert sharing.fingerprint(tensor.clone()) == sharing.fingerprint(tensor)


def test_fingerprints_are_read_again_after_a_change_in_place():
    model = nn.Linear(2, 2)
    first = sharing.fingerprints(model, model.state_dict())
    with torch.no_grad():
        model.weight += 1
    second = sharing.fingerprints(model, model.state_dict())
    assert first["weight"] != second["weight"] and first["bias"] == second["bias"]


def test_what_was_trained_is_saved_also_if_it_is_frozen_now():
    run = trained()
    run.save_model("only", dendrites_only=True)
    loaded = load_dendrites(base(), "only").requires_grad_(False)
    loaded.save_pretrained("again", dendrites_only=True)
    assert torch.equal(logits(load_dendrites(base(), "again")), logits(run.model))
    run.model.requires_grad_(False)
    with pytest.raises(PerforatedError, match="is frozen, and what is frozen is not saved"):
        run.save_model("frozen", dendrites_only=True)
    with pytest.raises(ValueError, match="this DistilBertForSequenceClassification has no dendrites"):
        base().save_pretrained("none", dendrites_only=True)
    with pytest.raises(ValueError, match="does not upload them"):
        loaded.save_pretrained("pushed", dendrites_only=True, push_to_hub=True)
    loaded.save_pretrained("other process", dendrites_only=True, is_main_process=False)
    assert not Path("other process").exists()


def test_base_that_was_changed_through_data_is_not_taken_for_the_old_one():
    run = trained()
    run.save_model("first", dendrites_only=True)
    run.model.distilbert.embeddings.word_embeddings.weight.data.mul_(3)
    run.save_model("second", dendrites_only=True)
    with pytest.raises(ValueError, match=r"word_embeddings\.weight has other values"):
        load_dendrites(base(), "second")


def test_dendrites_in_another_dtype_name_that_dtype():
    trained().save_model("only", dendrites_only=True)
    half = DistilBertForSequenceClassification.from_pretrained("only", dtype=torch.bfloat16)
    half.save_pretrained("half", dendrites_only=True)
    loaded = DistilBertForSequenceClassification.from_pretrained("half")
    assert loaded.dtype == torch.bfloat16 and torch.equal(logits(loaded), logits(half))


def test_head_that_dendrites_do_not_hold_is_reported_as_missing():
    trained().save_model("only", dendrites_only=True)
    loaded, info = transformers.DistilBertForQuestionAnswering.from_pretrained("only", output_loading_info=True)
    assert info["missing_keys"] == {"qa_outputs.weight", "qa_outputs.bias"}
    assert {
        name for name, p in loaded.named_parameters() if name not in info["missing_keys"] and p.isnan().any()
    } == set()


@pytest.mark.parametrize("left", [{"score": "classifier.weight"}, {"metadata": None}, {"base": None}])
def test_dendrites_that_lost_a_part_are_refused(left):
    trained().save_model("only", dendrites_only=True)
    file, expected = Path("only/model.dendrites.safetensors"), {"score": "classifier.weight is missing"}
    with safe_open(file, framework="pt") as weights:
        metadata, tensors = weights.metadata(), {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
    if "score" in left:
        del tensors[left["score"]]
    save_file(tensors, file, None if "metadata" in left else metadata)
    if "base" in left:
        config = json.loads(Path("only/config.json").read_text())
        del config["quantization_config"]["base"]
        Path("only/config.json").write_text(json.dumps(config))
    expected |= {"metadata": "has lost its metadata", "base": "does not name the base"}
    with pytest.raises(ValueError, match=expected[next(iter(left))]):
        DistilBertForSequenceClassification.from_pretrained("only")
    if "base" not in left:
        model = base()
        with pytest.raises(ValueError, match=expected[next(iter(left))]):
            load_dendrites(model, "only")
        assert not layers.layers_with_dendrites(model)


def test_refused_dendrites_leave_the_base_as_it_was():
    trained().save_model("only", dendrites_only=True)
    file = Path("only/model.dendrites.safetensors")
    with safe_open(file, framework="pt") as weights:
        metadata, tensors = weights.metadata(), {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
    del tensors["distilbert.transformer.layer.0.ffn.lin2.dendrite_up"]
    save_file(tensors, file, metadata)
    model = base()
    before = logits(model)
    with pytest.raises(ValueError, match=r"lin2\.dendrite_up is missing"):
        load_dendrites(model, "only")
    assert not layers.layers_with_dendrites(model) and torch.equal(logits(model), before)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dendrite_activation": "sigmoid"}, "its dendrites have another activation: set dendrite_activation tanh"),
        ({"dendrite_rank": 3}, "has the shape"),
        ({"freeze_base": False}, "written with freeze_base True, which says what the optimizer holds"),
        ({"modules_to_train": ["pre_classifier"]}, r"written with modules_to_train \[\]"),
    ],
)
def test_refused_resume_keeps_the_later_checkpoints(changes, message):
    trained()
    before = sorted(Path("run").iterdir())
    with pytest.raises(PerforatedError, match=message):
        trainer(base(), **changes).train(resume_from_checkpoint="run/checkpoint-6")
    assert sorted(Path("run").iterdir()) == before


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"modules_to_train": [".*"]}, "modules_to_train: no layer is left for dendrites"),
        ({"modules_to_train": ["clasifier"], "freeze_base": False}, "without freeze_base all modules are trained"),
        ({"join_normalization": True}, "join_normalization does not go with dendrite_rank"),
        ({"num_initial_dendrites": 3, "max_parameters": 10_000}, "with 3 dendrites more, which does not fit"),
        ({"dendrite_init_scale": 0.0}, "it must be a number above 0"),
    ],
)
def test_arguments_that_cannot_work_raise_before_a_step(changes, message):
    model = base()
    with pytest.raises(PerforatedError, match=message):
        trainer(model, **changes)
    assert not layers.layers_with_dendrites(model)


def test_default_activation_follows_the_rank():
    changed = dataclasses.replace(DendriteArguments(), dendrite_rank=2.0)
    assert changed.activation == "tanh" and DendriteArguments().activation == "sigmoid"
    assert dataclasses.replace(changed, dendrite_rank=None).activation == "sigmoid"
    run = trainer(base(), dendrite_rank=2.0, max_dendrites=2.0)
    assert run.settings()["dendrite_activation"] == "tanh" and run.dendrite_args.max_dendrites == 2
