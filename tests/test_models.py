"""The trainer on models of transformers and other libraries: it trains the network that was passed to it."""

import copy
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import models
import pytest
import torch
import transformers
from small import DISTILBERT, arguments, compute_metrics, scripted
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers import BertConfig, BertModel, BertPreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import logging

from perforated_trainer import (
    DendriteArguments,
    PerforatedError,
    PerforatedTrainer,
    layers,
    load_perforated_model,
    parameter_count,
)
from perforated_trainer import perforate as perforate_model
from perforated_trainer.convert import dimension_of_neurons, plan_dendrites, table
from perforated_trainer.layers import layers_with_dendrites

ROOT = Path(__file__).parent.parent
BERT, GPT2, RESNET = "BertForMaskedLM", "GPT2LMHeadModel", "ResNetForImageClassification"
peft = pytest.mark.skipif(not importlib.util.find_spec("peft"), reason="peft is not installed")
NAMES = [pytest.param(name, marks=peft if "Lora" in name else ()) for name in models.CONFIGS]
# With a patience of 1: a dendrite after the second and the fourth evaluation, the end after the sixth.
TWO = [0.1, 0.1, 0.2, 0.2, 0.3, 0.3]


@pytest.fixture(scope="module")
def process():
    """A separate process that loads saved models."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, str(ROOT / "tests/reload.py")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, text=True, **pipes) as process:
        yield process
        process.stdin.close()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logging.disable_progress_bar()


class TrainedOnce(TrainerCallback):
    """Checks at each step that the optimizer has each trainable parameter once, and that there are gradients."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        assert any(parameter.grad is not None for parameter in model.parameters())

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        trained = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
        assert sorted(trained) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def first(logits, labels):
    return logits[0] if isinstance(logits, tuple) else logits


def trainer_for(
    name, model=None, dendrites=None, callbacks=(), scores=TWO, cls=PerforatedTrainer, more=None, **changes
):
    """A trainer that adds two dendrites, evaluated at each of its six steps."""
    usual = {"eval_steps": 1, "save_strategy": "steps", "save_steps": 3, "logging_steps": 1, "learning_rate": 1e-2}
    more = {"name": name, "callbacks": [TrainedOnce(), *callbacks], "preprocess_logits_for_metrics": first} | (
        more or {}
    )
    model = models.build(name) if model is None else model
    return scripted(scores, model, dendrites, cls=cls, more=more, **usual | changes)[0]


def trained(name, model=None, resume=None, **settings):
    trainer = trainer_for(name, model, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def batch_for(trainer, name):
    return trainer.data_collator([dict(row) for row in models.rows(name)[:4]])


def logits(model, batch):
    with torch.no_grad():
        return first(model.eval()(**copy.deepcopy(batch)).logits, None)


def check_reloaded(name, trainer, process, tied):
    """Save, load in a separate process, compare: bitwise equal logits, ties, number and size of parameters."""
    trainer.save_model("final")
    batch = batch_for(trainer, name)
    torch.save(batch, "batch.pt")
    last = max(Path("run").glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    for part in ("final", last):
        process.stdin.write(f"{name} {Path.cwd()} {part}\n")
        process.stdin.flush()
        answer = json.loads(process.stdout.readline())
        assert torch.equal(logits(trainer.model, batch), torch.load("reloaded.pt"))
        assert answer["tied"] == tied
        assert answer["parameters"] == trainer.num_parameters
    size = sum(file.stat().st_size for file in Path("final").glob("*.safetensors"))
    buffers = sum(b.numel() * b.element_size() for b in trainer.model.buffers())
    assert size < 1.05 * (trainer.num_parameters * trainer.model.dtype.itemsize + buffers) + 12_000  # names


# ------------------------------------------------------------------------------------------------------------- families


@pytest.mark.parametrize("name", NAMES)
def test_family_trains_reloads_and_resumes_bitwise_equal(name, process):
    model = models.build(name)
    tied, names, kind = models.tied(model), {n for n, _ in model.named_parameters()}, type(model).__name__
    assert bool(tied) == (name in {"BertForMaskedLM", "RobertaForMaskedLM", "GPT2LMHeadModel"} or "T5" in name)
    trainer = trained(name, model)
    assert trainer.num_dendrites == 2 and trainer.restarts == [2, 4] and trainer.stopped_by == "tracker"
    assert trainer.model is model and type(model).__name__ == kind and models.tied(model) == tied
    assert names <= {n for n, _ in model.named_parameters()}
    weights = {key: value.clone() for key, value in model.state_dict().items()}

    check_reloaded(name, trainer, process, tied)

    # A step trains each parameter of the model, except frozen ones.
    model.train().zero_grad()
    model(**trainer.data_collator(models.rows(name)[:8])).loss.backward()
    used = sum(p.numel() for p in model.parameters() if p.grad is not None)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert (frozen > 0) == ("Lora" in name) and used == trainer.num_parameters - frozen

    # Resumed from the middle of the second cycle with another initialization: the same final weights.
    torch.manual_seed(1)
    resumed = trained(name, models.build(name), resume="run/checkpoint-3", scores=TWO[3:])
    assert models.tied(resumed.model) == tied and resumed.num_dendrites == 2
    for key, value in weights.items():
        assert torch.equal(resumed.model.state_dict()[key], value), key


@pytest.mark.parametrize("name", [DISTILBERT, GPT2, RESNET])
def test_low_rank_trains_reloads_and_resumes_bitwise_equal(name, process):
    low = {"dendrites": {"dendrite_rank": 2}}
    trainer = trained(name, **low)
    found = layers_with_dendrites(trainer.model).values()
    assert {(layer.num_dendrites, layer.dendrite_rank) for layer in found} == {(2, 2)}
    weights = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    check_reloaded(name, trainer, process, models.tied(models.build(name)))
    resumed = trained(name, resume="run/checkpoint-3", scores=TWO[3:], **low)
    assert all(torch.equal(resumed.model.state_dict()[key], value) for key, value in weights.items())


@pytest.mark.parametrize("name", [BERT, RESNET])
def test_loaded_model_is_trained_on_and_max_dendrites_counts_all(name):
    trained(name).save_model("first")
    loaded = models.model_class(name).from_pretrained("first")
    assert loaded.num_parameters() > models.build(name).num_parameters()

    # With the stock Trainer, without changes.
    args = TrainingArguments("stock", max_steps=2, use_cpu=True, report_to="none", save_strategy="no")
    stock = Trainer(model=models.model_class(name).from_pretrained("first"), args=args, train_dataset=models.rows(name))
    before = {key: value.clone() for key, value in stock.model.state_dict().items() if "dendrite" in key}
    stock.train()
    assert any(not torch.equal(value, stock.model.state_dict()[key]) for key, value in before.items())
    stock.save_model("second")
    again = models.model_class(name).from_pretrained("second")
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in stock.model.state_dict().items())

    # With PerforatedTrainer, which adds one more; stopped and resumed, the result is bitwise equal.
    weights = []
    for run, resume, changes in (("more", None, {}), ("halves", None, {"max_steps": 3}), ("halves", True, {})):
        model = models.model_class(name).from_pretrained("first")
        scores = TWO[3:] if resume else TWO
        trainer = trainer_for(name, model, {"max_dendrites": 3}, scores=scores, output_dir=run, **changes)
        batch = batch_for(trainer, name)
        assert trainer.num_dendrites == 2 and trainer.num_parameters == loaded.num_parameters()
        assert torch.equal(logits(trainer.model, batch), logits(loaded, batch))
        trainer.train(resume_from_checkpoint=resume)
        weights.append(trainer.model.state_dict())
    assert trainer.num_dendrites == 3 and trainer.stopped_by == "tracker" and trainer.restarts == [2]
    assert weights[0].keys() == weights[2].keys()
    assert all(torch.equal(value, weights[2][key]) for key, value in weights[0].items())

    # With the maximum number of dendrites, it is trained and gets no more.
    model = models.model_class(name).from_pretrained("first")
    trainer = trained(name, model, dendrites={"max_dendrites": 2}, output_dir="none")
    assert trainer.num_dendrites == 2 and trainer.restarts == []


@pytest.mark.parametrize("name", [BERT, GPT2])
def test_tied_layer_that_is_named_gets_dendrites_and_stays_tied(name, process):
    layer = "cls.predictions.decoder" if "Bert" in name else "lm_head"
    tied = models.tied(models.build(name))
    settings = {"module_ids_to_perforate": [layer], "module_names_to_perforate": []}
    trainer = trained(name, dendrites=settings)
    assert trainer.num_parameters > 2 * models.HIDDEN * models.WORDS  # its dendrites have separate weights
    assert models.tied(trainer.model) == tied
    check_reloaded(name, trainer, process, tied)


# ----------------------------------------------------------------------------- one network: hooks, names, copies, norms


class Normed(transformers.DistilBertForSequenceClassification):
    """A model with the old and the new weight norm, pruned weights, and a frozen layer."""

    def __init__(self, config):
        super().__init__(config)
        attention, ffn = (getattr(self.distilbert.transformer.layer[0], name) for name in ("attention", "ffn"))
        nn.utils.spectral_norm(attention.k_lin)
        parametrizations.weight_norm(attention.v_lin)
        parametrizations.spectral_norm(attention.out_lin)
        prune.random_unstructured(ffn.lin1, "weight", 0.5)
        ffn.lin2.requires_grad_(False)


class ByName(PerforatedTrainer):
    """A trainer whose optimizer has groups by name, as in many scripts."""

    def create_optimizer(self, model=None):
        head, body = [], []
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                (head if "classifier" in name else body).append(parameter)
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW([{"params": head, "lr": 1e-2}, {"params": body, "lr": 1e-3}])
        return self.optimizer


class Watch(TrainerCallback):
    """A callback that records names, classes and calls of hooks, and saves and copies the model."""

    def __init__(self, model):
        self.model, self.calls, self.seen, self.copies = model, [], [], []
        model.classifier.register_forward_hook(lambda *_: self.calls.append("forward"))
        model.pre_classifier.register_forward_pre_hook(lambda *_: self.calls.append("before"))
        model.pre_classifier.register_full_backward_hook(lambda *_: self.calls.append("backward"))
        attention = model.distilbert.transformer.layer[0].attention
        attention.q_lin.register_full_backward_pre_hook(lambda *_: self.calls.append("before backward"))
        attention.k_lin.register_forward_hook(lambda *_: self.calls.append("normed"))

    def names(self):
        modules = {name for name, _ in self.model.named_modules()}
        parameters = {n for n, p in self.model.named_parameters() if p.requires_grad}
        return modules, {n for n in parameters if "dendrite" not in n}, list(map(id, self.model.modules()))

    def on_step_begin(self, args, state, control, **kwargs):
        self.calls.clear()

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        sizes = [sum(p.numel() for p in group["params"]) for group in optimizer.param_groups]
        number = max((layer.num_dendrites for layer in layers_with_dendrites(model).values()), default=0)
        weights = {n: p.detach().clone() for n, p in model.named_parameters()}
        same = model is self.model and type(model).__name__ == "Normed" and isinstance(model, Normed)
        self.seen.append(SimpleNamespace(**locals(), names=self.names(), calls=list(self.calls), rates=[
            group["lr"] for group in optimizer.param_groups]))  # fmt: skip

    def on_save(self, args, state, control, model=None, **kwargs):
        was, folder = model.training, f"own-{state.global_step}"
        batch = {"input_ids": torch.stack([row["input_ids"] for row in models.rows(DISTILBERT)[:4]])}
        expected = logits(model, batch)
        model.save_pretrained(folder)
        torch.save(model.state_dict(), f"{folder}/state.pt")
        with torch.random.fork_rng():  # a new model draws numbers
            saved = [Normed.from_pretrained(folder), copy.deepcopy(model)]
        self.copies.append((state.global_step, expected, [logits(one, batch) for one in saved], saved[1]))
        model.train(was)


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """One training with two dendrites of a model with hooks, norms, pruned and frozen weights, and groups by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("watched"))
        transformers.set_seed(0)
        model = Normed(Normed.config_class(**models.CONFIGS[DISTILBERT]))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        watch = Watch(model)
        names = watch.names()
        trainer = trainer_for(DISTILBERT, model, callbacks=[watch], cls=ByName, save_steps=1, warmup_steps=0)
        trainer.train()
        trainer.save_model("final")
        batch = batch_for(trainer, DISTILBERT)
        yield SimpleNamespace(
            **{"trainer": trainer, "model": model, "watch": watch, "names": names, "batch": batch, "before": before},
            folder=Path.cwd(),
        )


def test_model_keeps_object_class_and_names_through_a_training(watched):
    assert [seen.number for seen in watched.watch.seen] == [0, 0, 1, 1, 2, 2]
    for seen in watched.watch.seen:
        assert seen.same and seen.names == watched.names
    assert watched.trainer.model is watched.model and watched.watch.names() == watched.names


def test_hooks_fire_at_each_step_as_before(watched):
    first, *others = [sorted(seen.calls) for seen in watched.watch.seen]
    assert set(first) == {"forward", "before", "backward", "before backward", "normed"}
    assert all(calls == first for calls in others)


def test_norms_pruned_and_frozen_weights_are_trained_as_they_should_be(watched):
    frozen = {"distilbert.transformer.layer.0.ffn.lin2.weight", "distilbert.transformer.layer.0.ffn.lin2.bias"}
    last, before = watched.watch.seen[-1].weights, watched.watch.seen[-2].weights
    moved = {name for name, value in last.items() if not torch.equal(value, before[name])}
    assert last.keys() - moved == frozen
    assert all(torch.equal(watched.model.state_dict()[name], watched.before[name]) for name in frozen)
    assert not layers.has_dendrites(watched.model.distilbert.transformer.layer[0].ffn.lin2)
    pruned = watched.model.distilbert.transformer.layer[0].ffn.lin1
    assert pruned.num_dendrites == 2 and torch.equal(pruned.weight == 0, pruned.weight_mask == 0)
    assert 0.4 < pruned.weight_mask.mean() < 0.6
    for name in ("k_lin", "v_lin", "out_lin"):
        assert getattr(watched.model.distilbert.transformer.layer[0].attention, name).num_dendrites == 2


def test_groups_by_name_hold_the_dendrites_of_their_layers(watched):
    sizes = {seen.number: seen.sizes for seen in watched.watch.seen}
    assert all(sizes[i + 1][g] > sizes[i][g] for i in (0, 1) for g in (0, 1))
    total = sum(p.numel() for p in watched.model.parameters() if p.requires_grad)
    assert sum(sizes[2]) == total and watched.watch.seen[-1].rates[0] == 10 * watched.watch.seen[-1].rates[1]


def test_model_saved_and_copied_in_a_callback_is_the_model_there(watched):
    assert [step for step, *_ in watched.watch.copies] == [1, 2, 3, 4, 5, 6]
    for step, expected, outputs, duplicate in watched.watch.copies:
        for output in outputs:
            assert torch.equal(output, expected), step
        state = torch.load(watched.folder / f"own-{step}/state.pt")
        duplicate.load_state_dict(state)
        assert torch.equal(logits(duplicate, {"input_ids": watched.batch["input_ids"]}), expected)
    loaded = Normed.from_pretrained(watched.folder / "final")
    assert torch.equal(logits(loaded, watched.batch), logits(watched.model, watched.batch))


def test_resumed_training_of_normed_and_pruned_layers_is_bitwise_equal(watched):
    transformers.set_seed(7)
    model = Normed(Normed.config_class(**models.CONFIGS[DISTILBERT]))
    same = {"cls": ByName, "save_steps": 1, "warmup_steps": 0, "output_dir": str(watched.folder / "run")}
    # With the same hooks, because a backward hook changes the order in which gradients are added.
    trainer = trainer_for(DISTILBERT, model, callbacks=[Watch(model)], scores=TWO[3:], **same)
    trainer.train(resume_from_checkpoint=str(watched.folder / "run/checkpoint-3"))
    expected = watched.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_whole_model_is_saved_by_torch_and_trained_again(watched):
    trainer = trained(DISTILBERT)
    torch.save(trainer.model, "model.pt")
    loaded = torch.load("model.pt", weights_only=False)
    batch = batch_for(trainer, DISTILBERT)
    assert type(loaded).__name__ == DISTILBERT and torch.equal(logits(loaded, batch), logits(trainer.model, batch))
    loaded.save_pretrained("again")
    again = trained(DISTILBERT, loaded, dendrites={"max_dendrites": 3}, output_dir="more")
    assert again.num_dendrites == 3
    assert torch.equal(
        logits(models.model_class(DISTILBERT).from_pretrained("again"), batch), logits(trainer.model, batch)
    )


@pytest.mark.filterwarnings("ignore")
def test_old_weight_norm_is_trained_and_computes_with_its_factors():
    class Old(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = transformers.DistilBertModel(transformers.DistilBertConfig(**models.CONFIGS[DISTILBERT]))
            self.head = nn.utils.weight_norm(nn.Linear(32, 2))

        def forward(self, input_ids, labels=None):
            logits = self.head(self.body(input_ids).last_hidden_state[:, 0])
            loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
            return SequenceClassifierOutput(loss=loss, logits=logits)

    trainer = trained(DISTILBERT, Old())
    head = trainer.model.head
    assert head.num_dendrites == 2 and {"weight_g", "weight_v"} <= dict(head.named_parameters()).keys()
    trainer.save_model("saved")
    loaded, batch = load_perforated_model(Old(), "saved"), batch_for(trainer, DISTILBERT)
    assert torch.equal(logits(loaded, batch), logits(trainer.model, batch))
    resumed = trained(DISTILBERT, Old(), resume="run/checkpoint-3", scores=TWO[3:])
    assert torch.equal(logits(resumed.model, batch), logits(trainer.model, batch))


def test_pruning_and_freezing_between_two_trainings_hold_in_the_second():
    trainer = trained(DISTILBERT)
    model = trainer.model
    prune.l1_unstructured(model.classifier, "weight", 0.5)
    prune.l1_unstructured(model.pre_classifier, "dendrite_weight", 0.5)
    model.distilbert.transformer.layer[0].ffn.lin1.requires_grad_(False)
    frozen = model.distilbert.transformer.layer[0].ffn.lin1.dendrite_weight.clone()
    mask = model.pre_classifier.dendrite_weight_mask.clone()
    settings = {"max_dendrites": 3, "module_ids_to_track": ["pre_classifier", "lin1"]}
    second = trained(DISTILBERT, model, dendrites=settings, output_dir="second")
    assert second.num_dendrites == 3 and model.classifier.num_dendrites == 3
    assert torch.equal(model.classifier.weight == 0, model.classifier.weight_mask == 0)
    assert torch.equal(model.pre_classifier.dendrite_weight_mask, mask) and mask.mean() == 0.5
    assert torch.equal(model.pre_classifier.dendrite_weight == 0, mask == 0)
    assert torch.equal(model.distilbert.transformer.layer[0].ffn.lin1.dendrite_weight, frozen)


# ----------------------------------------------------------------------------------------------- custom models


class OwnConfig(transformers.PreTrainedConfig):
    model_type = "own-layer"


class Own(transformers.PreTrainedModel):
    """An embedding, a body that a test passes, and a head."""

    config_class, body_of = OwnConfig, staticmethod(lambda: nn.Linear(16, 16))

    def __init__(self, config):
        super().__init__(config)
        self.embedding, self.body, self.head = nn.Embedding(models.WORDS, 16), self.body_of(), nn.Linear(16, 2)
        self.post_init()

    def _init_weights(self, module):
        pass

    def forward(self, input_ids, labels=None, attention_mask=None):
        hidden = self.embedding(input_ids)
        hidden = (
            self.body(hidden) if attention_mask is None else self.body(hidden, src_key_padding_mask=~attention_mask)
        )
        logits = self.head(hidden.mean(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def own(body, kind=Own):
    cls = type("Own", (kind,), {"body_of": staticmethod(body)})
    torch.manual_seed(0)
    return cls(OwnConfig())


def check_saved(trainer, **batch):
    """Check that the saved model and the last checkpoint load bitwise equal."""
    batch = batch or {"input_ids": batch_for(trainer, DISTILBERT)["input_ids"]}
    trainer.save_model("saved")
    loaded = type(trainer.model).from_pretrained("saved")
    assert torch.equal(logits(loaded, batch), logits(trainer.model, batch))
    return loaded


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(16, 16)
        self.b = self.a

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


@pytest.mark.parametrize("asked", ["body.a", "body.b"])
def test_module_under_two_names_stays_one_with_its_dendrites(asked):
    settings = {"module_ids_to_perforate": [asked], "dendrite_init_scale": 1.0}
    if asked == "body.b":  # a second name is not looked for
        with pytest.raises(PerforatedError, match=r"no module body\.b"):
            trainer_for(DISTILBERT, own(Twice), settings)
        return
    trainer = trained(DISTILBERT, own(Twice), dendrites=settings)
    assert trainer.model.body.a is trainer.model.body.b and trainer.model.body.a.num_dendrites == 2
    loaded = check_saved(trainer)
    assert loaded.body.a is loaded.body.b
    unasked = plan_dendrites(own(Twice), DendriteArguments(), arguments())
    assert unasked.names == ["head"] and unasked.excluded["weights are tied"] == ["body.a"]


def test_dendrites_of_each_layer_have_its_dtype():
    class Mixed(Own):
        def forward(self, input_ids, labels=None):
            logits = self.head(self.body(self.embedding(input_ids)).mean(1).float())
            loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
            return SequenceClassifierOutput(loss=loss, logits=logits)

    model = own(lambda: nn.Linear(16, 16), Mixed).to(torch.bfloat16)
    model.head.float()
    trainer = trained(DISTILBERT, model)
    kinds = {name.split(".")[0]: set() for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        kinds[name.split(".")[0]].add(parameter.dtype)
    assert kinds == {"embedding": {torch.bfloat16}, "body": {torch.bfloat16}, "head": {torch.float32}}
    assert model.body.num_dendrites == model.head.num_dendrites == 2
    trainer.save_model("saved")
    resumed = own(lambda: nn.Linear(16, 16), Mixed).to(torch.bfloat16)
    resumed.head.float()
    trained(DISTILBERT, resumed, resume="run/checkpoint-3", scores=TWO[3:])
    assert all(map(torch.equal, resumed.parameters(), model.parameters()))


def test_model_in_bfloat16_trains_and_reloads_bitwise_equal():
    name = "RobertaForMaskedLM"
    trainer = trained(name, models.build(name).to(torch.bfloat16))
    assert trainer.num_dendrites == 2
    loaded = check_saved(trainer, **batch_for(trainer, name))
    assert loaded.dtype == torch.bfloat16 and {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_transformer_encoder_is_evaluated_and_loaded_with_its_dendrites(nested, masked):
    def body():
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)

    mask = torch.ones(models.LENGTH, dtype=torch.bool)
    mask[-4:] = False
    data = [row | ({"attention_mask": mask} if masked else {}) for row in models.rows(DISTILBERT)]
    more = {"train_dataset": data[:32], "eval_dataset": data[32:]}
    trainer = trained(DISTILBERT, own(body), dendrites={"dendrite_init_scale": 1.0}, more=more)
    batch = trainer.data_collator(data[:4])
    for model in (trainer.model, check_saved(trainer, **batch), copy.deepcopy(trainer.model)):
        assert model.body.layers[1].linear2.num_dendrites == 2
        without = logits(model, batch)
        with_gradient = model.eval()(**batch).logits.detach()
        if not (nested and masked):  # torch then sets padded positions to 0 where there is no gradient
            torch.testing.assert_close(with_gradient, without, atol=1e-5, rtol=1e-4)
    for layer in layers_with_dendrites(trainer.model.body).values():
        layers.remove_dendrites(layer)
    assert not torch.allclose(logits(trainer.model, batch), without, atol=1e-3)


class OwnHead(BertPreTrainedModel):
    """A usual classifier, with an unused pooler in the body."""

    def __init__(self, config):
        super().__init__(config)
        self.bert, self.head = BertModel(config), torch.nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(self, input_ids, labels=None):
        logits = self.head(self.bert(input_ids).last_hidden_state[:, 0])
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss, logits)


class TwoNames(OwnHead):
    def __init__(self, config):
        super().__init__(config)
        self.body = self.bert


def test_layer_that_no_step_uses_gets_no_dendrites_with_a_note(capsys):
    trainer = trained(DISTILBERT, OwnHead(BertConfig(**models.CONFIGS[BERT])))
    assert "no training step has used bert.pooler.dense: no dendrites there" in capsys.readouterr().out
    assert not layers.has_dendrites(trainer.model.bert.pooler.dense) and trainer.model.head.num_dendrites == 2
    check_saved(trainer)


def test_layers_with_two_names_get_no_dendrites_and_stay_shared():
    trainer = trained(DISTILBERT, TwoNames(BertConfig(**models.CONFIGS[BERT])))
    assert list(layers_with_dendrites(trainer.model)) == ["head"]
    loaded = check_saved(trainer)
    assert loaded.body is loaded.bert and loaded.head.num_dendrites == 2


def test_plain_module_trains_resumes_and_loads_bitwise_equal():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.body = nn.Embedding(models.WORDS, 16), nn.Sequential(nn.Linear(16, 16), nn.Tanh())
            self.head = nn.Linear(16, 2)

        def forward(self, input_ids, labels=None):
            logits = self.head(self.body(self.embedding(input_ids)).mean(1))
            loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
            return {"loss": loss, "logits": logits}

    trainer = trained(DISTILBERT, Plain())
    trainer.save_results({"name": "texts"})
    ids = batch_for(trainer, DISTILBERT)["input_ids"]
    expected = trainer.model.eval()(ids)["logits"]
    last = max(Path("run").glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    for folder in ("run/final", last):
        loaded = load_perforated_model(Plain(), folder)
        assert loaded.head.num_dendrites == 2 and torch.equal(loaded(ids)["logits"], expected)
    resumed = trained(DISTILBERT, Plain(), resume="run/checkpoint-3", scores=TWO[3:])
    assert torch.equal(resumed.model.eval()(ids)["logits"], expected)
    more = trained(DISTILBERT, loaded, dendrites={"max_dendrites": 3}, output_dir="more")
    assert more.num_dendrites == 3


def test_model_of_timm_trains_resumes_and_loads_bitwise_equal():
    pytest.importorskip("timm")
    config = transformers.TimmWrapperConfig(architecture="test_resnet", num_labels=10)
    build = transformers.TimmWrapperForImageClassification
    torch.manual_seed(0)
    trainer = trained(RESNET, build(copy.deepcopy(config)))
    assert trainer.num_dendrites == 2
    batch = batch_for(trainer, RESNET)
    expected = logits(trainer.model, batch)
    trainer.model.save_pretrained("own")
    trainer.save_model("saved")
    last = max(Path("run").glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    for folder in ("own", "saved", last):
        assert torch.equal(logits(build.from_pretrained(folder), batch), expected), folder
    auto = transformers.AutoModelForImageClassification.from_pretrained("saved")
    assert torch.equal(logits(auto, batch), expected)
    resumed = trained(RESNET, build(copy.deepcopy(config)), resume="run/checkpoint-3", scores=TWO[3:])
    assert torch.equal(logits(resumed.model, batch), expected)


# -------------------------------------------------------------------------------------------- which layers, and why not


def plan_of(model, **settings):
    args = DendriteArguments(**settings)
    plan = plan_dendrites(model, args, arguments())
    return plan, table(model, args, plan)


def test_table_names_layers_without_dendrites_and_the_reason_once():
    settings = {"module_names_to_track": ["FFN"], "module_ids_to_track": [".classifier"]}
    plan, text = plan_of(models.build(DISTILBERT), **settings)
    ends = ["attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", "pre_classifier"]
    assert set(plan.names) == {end if "." not in end else f"distilbert.transformer.layer.0.{end}" for end in ends}
    (excluded,) = [line for line in text.splitlines() if line.startswith("No dendrites (excluded)")]
    for name in ("distilbert.transformer.layer.*.ffn.lin1", "distilbert.transformer.layer.*.ffn.lin2", "classifier"):
        assert excluded.count(name) == 1
    (other,) = [line for line in text.splitlines() if line.startswith("No dendrites (other type of layer)")]
    assert "distilbert.embeddings.word_embeddings" in other and "q_lin" not in other


def mamba():
    return transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4)
    )


def recurrent_gemma():
    config = transformers.RecurrentGemmaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, intermediate_size=32, num_attention_heads=2, lru_width=16
    )
    return transformers.RecurrentGemmaForCausalLM(config)


def wavlm():
    sizes = {"conv_dim": [16, 16], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_conv_pos_embeddings": 16}
    config = transformers.WavLMConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, **sizes
    )
    return transformers.WavLMForSequenceClassification(config)


class Reading(nn.Module):
    def __init__(self):
        super().__init__()
        self.read, self.called = nn.Linear(16, 16), nn.Linear(16, 16)
        self.rows = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
        self.positions = nn.Embedding(4, 16)  # could get no dendrites in any case

    def forward(self, x):
        device = self.called.weight.device  # says nothing of the values
        x = x + self.positions.weight[0]
        x = nn.functional.linear(x.to(device), self.read.weight, self.read.bias)
        return self.called(x) + self.rows[1](x) @ self.rows[0].weight


def reading_in_a_function():
    class Local(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixed, self.called = nn.Conv1d(16, 16, 1), nn.Linear(16, 16)

        def mix(self, x):
            return x @ self.mixed.weight.squeeze(-1)

        def forward(self, x):
            return self.called(self.mix(x) if x.shape[1] == 1 else self.mixed(x.mT).mT)

    return own(Local)


def encoder_layer():
    return own(lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True))


def reading():
    return own(Reading)


class Rescaled(nn.Module):
    """Changes weights of a row of layers in place, as RWKV does in evaluation."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"out": nn.Linear(16, 16)}) for _ in range(2))
        self.rows = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
        self.called = nn.Linear(16, 16)
        self.init_called()

    def init_called(self):
        nn.init.zeros_(self.called.bias)

    def forward(self, x):
        for i, block in enumerate(self.blocks):
            block.out.weight.div_(2**i)
        return self.called(x @ self.rows[len(x) % 2].weight)


def rescaled():
    return own(Rescaled)


READS = {
    mamba: ["conv1d", "dt_proj"],
    recurrent_gemma: ["conv_1d"],
    wavlm: ["q_proj", "k_proj", "v_proj", "out_proj"],
    reading: ["read", "rows.0"],
    reading_in_a_function: ["mixed"],
    rescaled: ["blocks.0.out", "blocks.1.out", "rows.0", "rows.1"],
    encoder_layer: ["self_attn.out_proj"],  # the other layers are called, as `compute_in_full` sees to
}


@pytest.mark.parametrize("build", READS, ids=lambda build: build.__name__)
def test_layers_whose_weights_are_read_get_no_dendrites_and_a_row_with_the_reason(build):
    plan, text = plan_of(build())
    reasons = {name: reason for reason, names in plan.excluded.items() for name in names}
    for end in READS[build]:
        found = [name for name in reasons if name.endswith(f".{end}")]
        assert found and all("weights are read by" in reasons[name] for name in found), end
        assert not [name for name in plan.names if name.endswith(f".{end}")]
    assert all(reason == "other type of layer" for name, reason in reasons.items() if name.endswith("positions"))
    expected = {reason for reason in plan.excluded if reason.startswith("weights are read")}
    assert all(f"No dendrites ({reason})" in text for reason in expected) and bool(expected) == bool(READS[build])
    assert plan.names and (build is not encoder_layer or {"body.linear1", "body.linear2"} <= set(plan.names))
    if read := [name for name in reasons if "read by" in reasons[name]]:  # naming it does not help
        asked = plan_of(build(), module_ids_to_perforate=read[:1])[0]
        assert read[0] not in asked.names


def test_layer_whose_forward_was_replaced_gets_no_dendrites():
    model = models.build(DISTILBERT)
    stock = model.classifier.forward
    model.classifier.forward = lambda x: stock(x)
    plan, text = plan_of(model)
    assert plan.excluded["its forward was replaced"] == ["classifier"] and "pre_classifier" in plan.names
    assert "No dendrites (its forward was replaced): classifier" in text


def test_model_without_usual_layers_is_refused_with_the_types_that_it_has():
    config = transformers.FalconConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(PerforatedError, match=r"weights are .*FalconLinear.*module_names_to_perforate"):
        plan_of(transformers.FalconForSequenceClassification(config), module_ids_to_track=["score"])


@pytest.mark.parametrize("make", [lambda: nn.LSTM(16, 16), lambda: nn.Sequential(nn.Linear(16, 16), nn.ReLU())])
def test_initial_dendrites_on_a_block_whose_neurons_are_not_known_raise(make):
    settings = {"module_ids_to_perforate": [".body"], "module_names_to_perforate": []}
    with pytest.raises(PerforatedError, match=r"neurons of body, a .*, are not known before its first output"):
        plan_of(own(make), num_initial_dendrites=1, **settings)
    assert plan_of(own(make), **settings)[0].names == ["body"]


@pytest.mark.parametrize(
    "module, shape",
    [
        (nn.ConvTranspose2d(1, 3, 2), (1, 1, 4, 5)),
        (nn.Conv1d(1, 3, 2), (1, 1, 4)),
        (nn.BatchNorm2d(3), (2, 3, 4, 5)),
        (nn.BatchNorm1d(3), (2, 3)),
        (nn.GroupNorm(1, 3), (2, 3, 4)),
        (nn.LayerNorm(3), (2, 5, 3)),
    ],
)
def test_dimension_of_neurons_is_that_of_the_channels(module, shape):
    output = module(torch.randn(shape))
    assert output.shape[dimension_of_neurons(module, output.ndim)] == 3 == parameter_count.neurons_of(module)


def test_second_name_of_a_body_stays_in_a_module_that_is_not_of_transformers():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.head = nn.Linear(8, 8), nn.Linear(8, 2)
            self.base_model = self.encoder

    net = perforate_model(Net(), DendriteArguments(), arguments())
    assert net.base_model is net.encoder


def test_block_gets_dendrites_in_the_dimensions_of_its_output():
    trainer = trained(
        RESNET, dendrites={"module_ids_to_perforate": ["resnet.embedder"], "module_names_to_perforate": []}
    )
    block = trainer.model.resnet.embedder
    assert block.num_dendrites == 2 and (block.dendrite_dim, block.dendrite_to_output.shape[1]) == (-3, 16)
    given = trained(
        DISTILBERT,
        own(lambda: nn.Sequential(nn.Linear(16, 16), nn.ReLU())),
        dendrites={"module_ids_to_perforate": [".body"], "output_dimensions": [-1, -1, 0]},
        output_dir="given",
    )
    assert given.model.body.dendrite_dim == -1 and given.model.body.num_dendrites == 2


def test_module_with_several_outputs_is_named_with_what_to_set():
    trainer = trainer_for(BERT, dendrites={"module_names_to_perforate": ["BertAttention"]})
    with pytest.raises(PerforatedError, match=r"attention returns a tuple.*module_ids_to_track bert\.encoder"):
        trainer.train()


# --------------------------------------------------------------------------------- an error leaves the model unchanged

REFUSED = {
    "typo in module_ids_to_track": {"module_ids_to_track": ["typo"]},
    "typo in module_ids_to_perforate": {"module_ids_to_perforate": ["typo"]},
    "typo in modules_to_train": {"modules_to_train": ["typo"], "freeze_base": True},
    "no regular expression": {"module_ids_to_track": ["(a"]},
    "blocks": {"perforate_last_blocks": 99},
    "unknown activation": {"dendrite_activation": "eval"},
    "other activation": {"dendrite_activation": "tanh"},
    "other rank": {"dendrite_rank": 2},
    "rank": {"dendrite_rank": 10_000},
    "too large": {"max_parameters": 1},
    "lookback": {"history_lookback": 0},
    "negative": {"max_dendrites": -1},
    "not finite": {"improvement_threshold": [float("nan")]},
    "initial": {"num_initial_dendrites": 9, "max_dendrites": 1},
    "mode": {"switch_mode": "sometimes"},
    "name": {"save_name": "a/b"},
}
REFUSED_ARGUMENTS = {
    "metric": {"metric_for_best_model": "wer", "greater_is_better": True},
    "no evaluation": {"eval_strategy": "no"},
    "best": {"save_strategy": "best"},
    "batch size": {"auto_find_batch_size": True},
}


def snapshot(model):
    return {
        "class": type(model),
        "classes": {name: type(module) for name, module in model.named_modules()},
        "attributes": {name: set(vars(module)) for name, module in model.named_modules()},
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "trained": {name: p.requires_grad for name, p in model.named_parameters()},
        "config": model.config.to_dict(),
    }


def equal(one, other):
    weights = one["weights"], other["weights"]
    same = weights[0].keys() == weights[1].keys() and all(torch.equal(v, weights[1][n]) for n, v in weights[0].items())
    return same and all(one[part] == other[part] for part in one if part != "weights")


@pytest.fixture(scope="module")
def refused_models(tmp_path_factory):
    """A stock model, one that was loaded with dendrites, and one with a second registered name of its body."""
    model = models.build(DISTILBERT)
    model.config.problem_type = "single_label_classification"
    for layer in [m for m in model.modules() if layers.can_fuse(m)]:
        layers.add_dendrites(layer, 1)
    loading_folder = tmp_path_factory.mktemp("refused")
    model.save_pretrained(loading_folder)
    named_twice = models.build(DISTILBERT)
    named_twice._modules["base_model"] = named_twice.distilbert
    return [models.build(DISTILBERT), models.model_class(DISTILBERT).from_pretrained(loading_folder), named_twice]


@pytest.mark.parametrize("why", [*REFUSED, *REFUSED_ARGUMENTS])
def test_perforate_that_raises_leaves_the_model_unchanged(why, refused_models):
    training, settings, count = REFUSED_ARGUMENTS.get(why, {}), REFUSED.get(why, {}), 0
    for model in refused_models:
        before = snapshot(model)
        if why in ("other activation", "other rank") and not layers_with_dendrites(model):
            continue  # a model without dendrites takes any
        with pytest.raises(PerforatedError) as caught:
            perforate_model(model, DendriteArguments(**settings), arguments(**training))
        assert len(str(caught.value).splitlines()) == 1
        assert equal(snapshot(model), before), why
        count += 1
    assert count


def test_trainer_that_raises_leaves_the_model_unchanged(refused_models):
    model = refused_models[1]
    before, batch = snapshot(model), {"input_ids": torch.arange(2, 18)[None]}
    expected = logits(model, batch)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    data = {"train_dataset": models.rows(DISTILBERT), "eval_dataset": models.rows(DISTILBERT)}
    for more in (
        {"optimizers": (optimizer, None)},
        {"dendrite_args": DendriteArguments(module_ids_to_track=["typo"])},
        {"args": arguments(metric_for_best_model="wer", greater_is_better=True), "compute_metrics": compute_metrics},
    ):
        with pytest.raises(PerforatedError):
            PerforatedTrainer(**{"model": model, "args": arguments(), **data} | more)
        after = snapshot(model)
        assert after["class"] is before["class"] and after["classes"] == before["classes"]
        assert torch.equal(logits(model, batch), expected)


@peft
def test_model_that_saves_adapters_alone_raises():
    import peft

    model = models.build(DISTILBERT)
    model.add_adapter(peft.LoraConfig(target_modules=["q_lin"]))
    for adapted in (model, peft.PeftModel(models.build(BERT), peft.LoraConfig(target_modules=["query"]))):
        with pytest.raises(PerforatedError, match="inject_adapter_in_model"):
            perforate_model(adapted, DendriteArguments(), arguments())


def test_something_that_is_no_module_raises():
    with pytest.raises(PerforatedError, match=r"not a str"):
        perforate_model("bert-base-uncased", DendriteArguments(), arguments())
