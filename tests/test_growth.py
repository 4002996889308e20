"""Which model a run keeps, when dendrites are added, and that trainers share no model, layers or settings."""

import copy
import json
import os
import pickle
from pathlib import Path

import kills
import pytest
import torch
import transformers
from models import build, rows
from small import DISTILBERT, EVAL, TWO_DENDRITES, arguments, kept, losses, scores_left, scripted, trainer_for
from torch import nn
from torch.nn.utils.prune import l1_unstructured as prune_weights
from transformers import TrainerCallback
from transformers.modeling_outputs import SequenceClassifierOutput

from perforated_trainer import DendriteArguments, PerforatedError, PerforatedTrainer
from perforated_trainer.layers import layers_with_dendrites


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.stack([row["input_ids"] for row in EVAL])).logits


def with_dendrites(trainer, name="score"):
    """The number of dendrites at each evaluation."""
    return [entry["dendrites"] for entry in trainer.state.log_history if f"eval_{name}" in entry]


# ----------------------------------------------------------------------------------------------- the model that is kept

KEPT = {
    "first": ([0.9, 0.8, 0.7], {"doing_pai": False}, [0.9], 0),
    "first, with dendrites that do not help": ([0.9, 0.8, 0.5, 0.5, 0.5, 0.5], {"max_dendrites": 1}, [0.9], 0),
    "zero": ([0.0, -0.1, -0.2], {"doing_pai": False}, [0.0], 0),
    "negative": ([-0.3, -0.1, -0.2, -0.2], {"doing_pai": False}, [-0.1], 0),
    "last of the second dendrite": (TWO_DENDRITES, {}, [0.4], 2),
    "in the first cycle": ([0.1, 0.9, 0.9, 0.3, 0.3, 0.2, 0.2], {"max_dendrites": 1}, [0.9], 0),
    "equal scores buy no dendrite": ([0.5] * 9, {"max_dendrites": 1, "improvement_threshold": 0.0}, [0.5], 0),
    "not a number": ([0.1, float("nan"), 0.3, 0.2, 0.1], {"doing_pai": False}, [0.3], 0),
    "patience of 2": ([0.1, 0.3, 0.2, 0.4, 0.4, 0.3], {"doing_pai": False, "n_epochs_to_switch": 2}, [0.4], 0),
    "no dendrite allowed": ([0.1, 0.2, 0.1], {"max_dendrites": 0}, [0.2], 0),
}


class At(TrainerCallback):
    """Calls a function with the model at the end of a step."""

    def __init__(self, step, function):
        self.step, self.function = step, function

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.function(model)


@pytest.mark.parametrize("first", [True, False])
def test_kept_model_is_restored_if_layers_are_frozen_or_trained_later(first):
    model = build(DISTILBERT)
    model.distilbert.requires_grad_(first)
    later = At(3, lambda model: model.distilbert.requires_grad_(not first))
    scores = [0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    settings = {"doing_pai": False, "n_epochs_to_switch": 3, "module_ids_to_perforate": ["classifier"]}
    trainer, script = scripted(scores, model, settings, more={"callbacks": [later]}, learning_rate=1e-2)
    trainer.train()
    assert kept(trainer, script) == [0.6]


def test_kept_model_has_the_masks_and_counters_of_its_evaluation():
    model = build(DISTILBERT)
    model.register_buffer("mask", torch.ones(4, dtype=torch.bool))
    model.register_buffer("count", torch.zeros(2, dtype=torch.long))

    def change(model):
        model.mask[0], model.count[0] = False, 5

    settings = {"doing_pai": False, "n_epochs_to_switch": 2}
    trainer, _ = scripted([0.6, 0.5, 0.4], model, settings, more={"callbacks": [At(3, change)]})
    trainer.train()
    assert model.mask.all() and not model.count.any()


def test_pruning_during_a_training_raises_one_line():
    prune = At(3, lambda model: prune_weights(model.classifier, "weight", 0.5))
    trainer, _ = scripted([0.6, 0.5, 0.4, 0.3], more={"callbacks": [prune]})
    with pytest.raises(PerforatedError, match=r"classifier\.weight is gone: pruning .* before the training"):
        trainer.train()


@pytest.mark.parametrize("frozen", [{}, {"freeze_base": True, "dendrite_rank": 2, "modules_to_train": ["classifier"]}])
@pytest.mark.parametrize("initial", [0, 1])
def test_layer_that_no_step_uses_ends_without_dendrites(frozen, initial, capsys):
    class Unread(transformers.BertForSequenceClassification):
        def forward(self, input_ids, labels=None):
            logits = self.classifier(self.bert(input_ids)[0][:, 0])
            return SequenceClassifierOutput(loss=nn.functional.cross_entropy(logits, labels), logits=logits)

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = Unread(transformers.BertConfig(**sizes, vocab_size=1000))
    settings = {"num_initial_dendrites": initial} | frozen
    trainer, _ = scripted([0.1 * i for i in (1, 1, 2, 2, 3, 3, 3, 3, 3)], model, settings, learning_rate=1e-2)
    trainer.train()
    numbers = {name: layer.num_dendrites for name, layer in layers_with_dendrites(model).items()}
    assert max(numbers.values()) == 2 and "bert.pooler.dense" not in numbers
    assert "no training step has used bert.pooler.dense" in capsys.readouterr().out


@pytest.mark.parametrize("name", KEPT)
def test_kept_model_is_the_evaluation_with_the_best_score(name):
    scores, dendrites, best, number = KEPT[name]
    trainer, script = scripted(scores, dendrites=dendrites)
    trainer.train()
    assert trainer.stopped_by == "tracker" and trainer.num_dendrites == number
    assert kept(trainer, script)[:1] == best
    assert len(script.seen) <= len(scores), "the last score of the list was given again"


def test_smoothed_scores_that_improve_all_the_time_add_no_dendrite():
    falling = [2.0 - 0.1 * i for i in range(12)]
    trainer, script = scripted(falling, None, {"history_lookback": 3}, greater_is_better=False, max_steps=24)
    trainer.train()
    assert trainer.restarts == [] and kept(trainer, script) == [min(falling)]


def test_score_and_its_negative_train_alike():
    ends, lookback = [], 2
    for sign in (1, -1):
        scores = [sign * s for s in (0.1, 0.3, 0.5, 0.5, 0.5, 0.4, 0.6, 0.6, 0.5, 0.5, 0.5, 0.5)]
        dendrites = {"history_lookback": lookback, "max_dendrites": 1}
        trainer, _ = scripted(scores, None, dendrites, sign > 0, output_dir=f"run{sign}")
        trainer.train()
        ends.append((trainer.restarts, trainer.state.global_step, trainer.num_dendrites, losses(trainer)))
    assert ends[0] == ends[1] and ends[0][0]


def test_each_dendrite_gets_all_its_tries():
    scores = [0.3, 0.3, 0.2, 0.2, 0.5, 0.5, 0.2, 0.2, 0.2, 0.2]
    trainer, script = scripted(scores, None, {"max_dendrites": 5, "max_dendrite_tries": 2})
    trainer.train()
    assert with_dendrites(trainer) == [0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert trainer.restarts == [4, 8, 12, 16] and trainer.num_dendrites == 1 and kept(trainer, script) == [0.5]


SKIPPED = [("nan", 6), ("inf", 8)]


def test_score_that_is_not_a_number_is_skipped_with_a_warning(capsys):
    scores = [0.1, 0.2, float("nan"), float("inf"), 0.3, 0.3, 0.3, 0.3, 0.3, 0.3]
    trainer, _ = scripted(scores, None, {"max_dendrites": 1})
    trainer.train()
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: eval_score")]
    assert trainer.restarts[0] == 12
    assert warnings == [
        f"warning: eval_score is {v} at step {s}: this evaluation is skipped" for v, s in (("nan", 6), ("inf", 8))
    ]


def test_dendrite_above_max_parameters_is_not_added(capsys):
    """58,114 parameters, with one dendrite 67,910, with two 77,964."""
    trainer, script = scripted(TWO_DENDRITES, None, {"max_parameters": 70_000})
    trainer.train()
    assert trainer.num_dendrites == 1 and trainer.num_parameters == 67_910 and kept(trainer, script) == [0.3]
    assert "one more dendrite would make 77,964 parameters, --max_parameters is 70,000" in capsys.readouterr().out


# --------------------------------------------------------------------------------------- independence of runs


def fold(number):
    scores = [TWO_DENDRITES, [0.5, 0.4, 0.6, 0.6, 0.7, 0.7]][number]
    dendrites = [{}, {"dendrite_activation": "tanh", "dendrite_rank": 2}][number]
    return scripted(scores, None, dendrites, output_dir=f"fold{number}", logging_steps=1)[0]


def outcome(trainer):
    weights = {name: value.tolist() for name, value in trainer.model.state_dict().items()}
    return json.loads(json.dumps([losses(trainer), trainer.restarts, trainer.num_dendrites, weights]))


def train_fold(folder, number):
    folder.mkdir()
    os.chdir(folder)
    trainer = fold(number)
    transformers.set_seed(0)
    trainer.train()
    Path("outcome.json").write_text(json.dumps(outcome(trainer)))


def test_folds_in_one_process_equal_folds_in_separate_processes(tmp_path):
    """Both trainers are created before the first one trains."""
    folds = [fold(0), fold(1)]
    made = []
    for trainer in folds:
        transformers.set_seed(0)
        trainer.train()
        made.append(outcome(trainer))
    assert [trainer.num_dendrites for trainer in folds] == [2, 2]
    for number in (0, 1):
        alone = kills.processes.Process(target=train_fold, args=(tmp_path / f"alone{number}", number))
        alone.start()
        alone.join()
        assert json.loads((tmp_path / f"alone{number}" / "outcome.json").read_text()) == made[number]


def test_second_trainer_continues_from_the_dendrites_with_its_own_settings():
    first, _ = scripted(TWO_DENDRITES, None, {"max_dendrites": 1}, output_dir="first")
    first.train()
    before = logits(first.model)
    settings = {"n_epochs_to_switch": 2, "max_dendrites": 3}
    second, script = scripted([3, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1], first.model, settings, False, output_dir="second")
    assert second.model is first.model and second.num_dendrites == 1 and torch.equal(logits(second.model), before)
    second.train()
    assert second.dendrite_args.n_epochs_to_switch == 2
    assert with_dendrites(second) == [1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3, 3][: len(script.seen)]
    assert second.num_dendrites == 2 and kept(second, script) == [1], "max_dendrites counts those that were there"
    assert [cycle["dendrites"] for cycle in second.cycles()] == [1, 2, 3]


def test_loaded_model_and_the_trained_one_continue_alike():
    first, _ = scripted(TWO_DENDRITES, None, {"max_dendrites": 1}, output_dir="first")
    first.train()
    first.save_model("saved")
    ends = []
    for folder, model in {"loaded": type(first.model).from_pretrained("saved"), "trained": first.model}.items():
        trainer, _ = scripted([0.3, 0.2, 0.1, 0.1, 0.1, 0.1], model, output_dir=folder, logging_steps=1)
        trainer.train()
        ends.append((losses(trainer), trainer.restarts, with_dendrites(trainer)))
    assert ends[0] == ends[1] and ends[0][2][:3] == [1, 1, 2]


def test_earlier_trainer_saves_and_evaluates_its_own_model():
    first, script = scripted(TWO_DENDRITES, output_dir="first")
    first.train()
    before = logits(first.model)
    tanh = {"dendrite_activation": "tanh"}
    second, _ = scripted(TWO_DENDRITES[::-1], None, tanh, greater_is_better=False, output_dir="second")
    second.train()
    first.save_model("saved")
    assert torch.equal(logits(type(first.model).from_pretrained("saved")), before)
    assert first.num_dendrites == 2 and kept(first, script) == [0.4]
    assert first.save_results({"name": "texts"})["final"]["dendrites"] == 2


def test_training_the_same_trainer_again_continues_from_its_model():
    trainer, _ = scripted([0.3, 0.3, 0.5, 0.5], None, {"max_dendrites": 1}, output_dir="first")
    trainer.train()
    trainer.args.output_dir = "second"
    trainer.train()
    assert trainer.num_dendrites == 1 and trainer.restarts == [] and trainer.stopped_by == "tracker"


def test_invalid_settings_leave_the_model_unchanged():
    trainer, _ = scripted(TWO_DENDRITES, output_dir="first")
    trainer.train()
    before, names = logits(trainer.model), list(trainer.model.state_dict())
    for wrong in ({"module_ids_to_track": ["typo"]}, {"n_epochs_to_switch": -1}, {"dendrite_activation": "square"}):
        with pytest.raises(PerforatedError):
            scripted(TWO_DENDRITES, trainer.model, wrong, output_dir="second")
    assert torch.equal(logits(trainer.model), before) and list(trainer.model.state_dict()) == names


# ---------------------------------------------------------------------------------------------- one network, its layers


class Copies(TrainerCallback):
    """Copies the model at each evaluation in several ways."""

    def __init__(self):
        self.copies = []

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        torch.save(model, "whole.pt")
        same = [copy.deepcopy(model), torch.load("whole.pt", weights_only=False), pickle.loads(pickle.dumps(model))]
        model.save_pretrained("own")
        same.append(type(model).from_pretrained("own"))
        training = model.training
        self.copies.append([torch.equal(logits(one), logits(model)) for one in same])
        model.train(training)


def test_model_stays_the_object_that_was_given():
    model = build(DISTILBERT)
    names, cls, calls = {name for name, _ in model.named_parameters()}, type(model), []
    model.classifier.register_forward_hook(lambda *_: calls.append("forward"))
    model.classifier.register_forward_pre_hook(lambda *_: calls.append("pre"))
    model.classifier.register_full_backward_hook(lambda *_: calls.append("backward"))
    trainer, script = scripted(TWO_DENDRITES, model)
    trainer.train()
    assert trainer.model is model and trainer.num_dendrites == 2
    assert isinstance(model, cls) and type(model).__name__ == cls.__name__
    assert names <= {name for name, _ in model.named_parameters()}
    calls.clear()
    model(**{name: value[None] for name, value in EVAL[0].items() if name == "input_ids"}).logits.sum().backward()
    assert calls == ["pre", "forward", "backward"]
    trainer.model.save_pretrained("own")
    assert torch.equal(logits(cls.from_pretrained("own")), logits(model))
    assert kept(trainer, script) == [0.4]


def test_copies_of_a_callback_are_the_model():
    callback = Copies()
    trainer, _ = scripted(TWO_DENDRITES, more={"callbacks": [callback]})
    trainer.train()
    assert len(callback.copies) == 9 and all(map(all, callback.copies)), callback.copies
    assert trainer.num_dendrites == 2


class Config(transformers.PreTrainedConfig):
    model_type = "of_a_layer"


class Model(transformers.PreTrainedModel):
    """An embedding, the layer under test, and a head."""

    config_class = Config
    make = nn.Identity

    def __init__(self, config):
        super().__init__(config)
        self.embedding, self.body, self.head = nn.Embedding(1000, 16), type(self).make(), nn.Linear(16, 2)
        self.post_init()

    def _init_weights(self, module):
        pass

    def forward(self, input_ids, labels=None):
        logits = self.head(self.body(self.embedding(input_ids)).mean(1))
        loss = nn.functional.cross_entropy(logits, labels) if labels is not None else None
        return SequenceClassifierOutput(loss=loss, logits=logits)


def model_of(make):
    torch.manual_seed(0)
    return type("ModelOfLayer", (Model,), {"make": staticmethod(make)})(Config())


def encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)


def test_transformer_encoder_is_evaluated_with_its_dendrites():
    model = model_of(encoder)
    trainer, _ = scripted(TWO_DENDRITES, model, {"dendrite_init_scale": 1.0}, learning_rate=5e-2)
    trainer.train()
    assert any(name.startswith("body.layers.0.linear") for name in layers_with_dendrites(model))
    model.eval()
    ids = torch.stack([row["input_ids"] for row in EVAL])
    assert torch.allclose(model(input_ids=ids).logits.detach(), logits(model), atol=1e-5)


class Moves(TrainerCallback):
    """Whether a parameter changed in each step."""

    def __init__(self, suffix):
        self.suffix, self.before, self.moved = suffix, None, []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        (now,) = [p.detach().clone() for name, p in model.named_parameters() if name.endswith(self.suffix)]
        self.moved.append(self.before is None or not torch.equal(self.before, now))
        self.before = now


@pytest.mark.parametrize(
    ("normalize", "suffix"),
    [
        (nn.utils.spectral_norm, "weight_orig"),
        (nn.utils.weight_norm, "weight_v"),
        (nn.utils.parametrizations.spectral_norm, "weight.original"),
        (nn.utils.parametrizations.weight_norm, "weight.original1"),
    ],
)
def test_normalized_weight_trains_or_raises(normalize, suffix):
    moves = Moves(suffix)
    try:
        trainer, script = scripted(
            TWO_DENDRITES,
            model_of(lambda: normalize(nn.Linear(16, 16))),
            more={"callbacks": [moves]},
            learning_rate=1e-2,
        )
    except PerforatedError as error:
        assert "body" in str(error)
        return
    trainer.train()
    assert len(moves.moved) == 18 and all(moves.moved) and kept(trainer, script)[0] == 0.4


class FloatHead(transformers.DistilBertForSequenceClassification):
    def forward(self, input_ids, labels=None):
        logits = self.classifier(self.distilbert(input_ids)[0][:, 0].float())
        loss = nn.functional.cross_entropy(logits, labels) if labels is not None else None
        return SequenceClassifierOutput(loss=loss, logits=logits)


def test_dendrite_has_the_dtype_of_its_layer():
    model = FloatHead(build(DISTILBERT).config).to(torch.bfloat16)
    model.classifier.float()
    trainer, _ = scripted(TWO_DENDRITES, model)
    trainer.train()
    wrong = {
        name: value.dtype
        for name, value in model.named_parameters()
        if value.dtype != (torch.float32 if name.startswith("classifier") else torch.bfloat16)
    }
    assert trainer.num_dendrites == 2 and not wrong


def test_layers_that_steps_leave_out_end_no_run():
    """LayerDrop skips layers at random."""
    config = transformers.OPTConfig(
        vocab_size=1000, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, ffn_dim=32, layerdrop=0.7,
        max_position_embeddings=32, word_embed_proj_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    texts = rows("GPT2LMHeadModel")
    dendrites = DendriteArguments(n_epochs_to_switch=1, max_dendrites=1)
    args = arguments(eval_steps=1, save_strategy="no", max_steps=12, learning_rate=0.0)
    data = {"train_dataset": texts[:32], "eval_dataset": texts[32:]}
    trainer = trainer_for(args, model=transformers.OPTForCausalLM(config), dendrite_args=dendrites, **data)
    trainer.train()
    assert trainer.restarts


def test_layer_that_no_step_has_used_gets_no_dendrite_and_a_note(capsys):
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return self.used(x)

    model = model_of(Spare)
    trainer, script = scripted(TWO_DENDRITES, model)
    trainer.train()
    assert set(layers_with_dendrites(model)) == {"body.used", "head"} and kept(trainer, script) == [0.4]
    assert "no training step has used body.spare: no dendrites there" in capsys.readouterr().out
    trainer.save_model("saved")
    assert torch.equal(logits(type(model).from_pretrained("saved")), logits(model))


def test_body_with_dendrites_loads_under_another_head():
    trainer, _ = scripted(TWO_DENDRITES)
    trainer.train()
    trainer.save_model("saved")
    body = transformers.DistilBertModel.from_pretrained("saved")
    assert layers_with_dendrites(body).keys() == {
        name.removeprefix("distilbert.")
        for name in layers_with_dendrites(trainer.model)
        if name.startswith("distilbert.")
    }


# -------------------------------------------------------------------------------------------------------- the optimizer


class SGDTrainer(PerforatedTrainer):
    """Creates its optimizer, as documented, from parameters that it selects by name."""

    def create_optimizer(self):
        named = self.model.named_parameters()
        self.optimizer = torch.optim.SGD([{"params": [p for n, p in named if n.startswith(self.prefix)], "lr": 0.1}])
        return self.optimizer


@pytest.mark.parametrize("prefix", ["", "classifier"])
def test_parameters_that_no_group_of_the_optimizer_trains_are_named(prefix, capsys):
    cls = type("Mine", (SGDTrainer,), {"prefix": prefix})
    trainer, _ = scripted(TWO_DENDRITES, None, {"dendrite_learning_rate_factor": 0.5}, cls=cls)
    trainer.train()
    output = capsys.readouterr().out
    assert trainer.optimizer.param_groups[0]["lr"] == 0.05
    groups = trainer.optimizer.param_groups
    assert trainer.num_dendrites == 2 and len(groups) == 1
    assert ("warning: no group of the optimizer trains distilbert.embeddings" in output) == bool(prefix), output
    if not prefix:
        assert {id(p) for p in groups[0]["params"]} >= {
            id(p) for n, p in trainer.model.named_parameters() if "dendrite" in n
        }


def test_learning_rate_factor_scales_the_rates_of_the_scheduler():
    changes = {"logging_steps": 1, "lr_scheduler_type": "cosine_with_min_lr", "max_steps": 18, "learning_rate": 1e-3}
    dendrites = {"dendrite_learning_rate_factor": 0.25}
    trainer, _ = scripted(TWO_DENDRITES, None, dendrites, lr_scheduler_kwargs={"min_lr": 1e-4}, **changes)
    trainer.train()
    rates = {entry["step"]: entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry}
    assert trainer.restarts == [6, 10, 14]
    for restart in trainer.restarts:
        assert rates[restart + 1] == pytest.approx(0.25 * rates[1]) and rates[restart + 2] == pytest.approx(
            0.25 * rates[2]
        )


# --------------------------------------------------------------------------------------- a model that has dendrites


@pytest.mark.parametrize("scores, best", [(TWO_DENDRITES, 0.3), ([0.9, *[0.1] * 8], 0.9)])
def test_dendrites_that_were_there_stay_in_layers_that_are_not_trained(scores, best):
    trainer, _ = scripted(TWO_DENDRITES, dendrites={"dendrite_init_scale": 1.0}, learning_rate=5e-2)
    trainer.train()
    model = trainer.model
    model.distilbert.requires_grad_(False)
    before = {name: layer.num_dendrites for name, layer in layers_with_dendrites(model.distilbert).items()}
    ids = torch.stack([row["input_ids"] for row in EVAL])
    expected = model.distilbert.eval()(ids)[0]
    settings = {"max_dendrites": 3, "module_ids_to_track": ["pre_classifier"]}
    trainer, script = scripted(scores, model, settings, output_dir="second", save_strategy="steps")
    trainer.train()
    assert {name: layer.num_dendrites for name, layer in layers_with_dendrites(model.distilbert).items()} == before
    assert torch.equal(model.distilbert.eval()(ids)[0], expected) and kept(trainer, script) == [best]
    # The layer that is left out has dendrites too: the run can be resumed.
    again, _ = scripted(scores, model, settings, output_dir="second", save_strategy="steps")
    again.train(resume_from_checkpoint="second/checkpoint-4")


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 7:
            raise KeyError("of the user")


@pytest.mark.parametrize("same_trainer", [True, False])
def test_run_resumed_on_the_same_model_adds_as_many_dendrites(same_trainer):
    expected, _ = scripted(TWO_DENDRITES)
    expected.train()
    trainer, script = scripted(TWO_DENDRITES, more={"callbacks": [Stop]}, save_strategy="steps", output_dir="stopped")
    with pytest.raises(KeyError, match="of the user"):
        trainer.train()
    script.seen.pop() if len(script.seen) > 3 else None
    left = scores_left(TWO_DENDRITES, trainer)
    if same_trainer:
        trainer.remove_callback(Stop)
        script.scores, script.seen = left, []
    else:
        trainer, _ = scripted(left, trainer.model, save_strategy="steps", output_dir="stopped")
    trainer.train(resume_from_checkpoint=True)
    assert trainer.restarts == expected.restarts and trainer.num_dendrites == expected.num_dendrites == 2


def test_callbacks_of_the_run_can_be_removed():
    trainer, script = scripted([0.9, 0.3, 0.2, 0.1], dendrites={"doing_pai": False}, learning_rate=1e-2)
    trainer.remove_callback(trainer.progress)
    trainer.train()
    assert kept(trainer, script) == [0.9]


def test_learning_rate_that_is_a_tensor_is_recorded():
    trainer, _ = scripted(TWO_DENDRITES, max_steps=4, save_strategy="steps", optim="adamw_torch_8bit")
    trainer.train()
    assert json.loads(Path("run/checkpoint-4/dendrite_state.json").read_text())["scores"][0][4] == pytest.approx(1e-3)


class Copying(PerforatedTrainer):
    def compute_loss(self, model, *args, **kwargs):
        if not hasattr(self, "reference"):
            self.reference = copy.deepcopy(self.model)
        return super().compute_loss(model, *args, **kwargs)


def test_copy_made_in_the_first_step_has_the_layers_own_classes():
    trainer, _ = scripted(TWO_DENDRITES, cls=Copying)
    trainer.train()
    assert type(trainer.reference.classifier) is nn.Linear
    pickle.loads(pickle.dumps(trainer.reference))


class Unpacked(nn.Module):
    def __init__(self):
        super().__init__()
        self.read, self.called = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return self.called(torch.tanh(nn.functional.linear(x, *self.read.parameters())))


def test_layer_whose_parameters_are_unpacked_gets_no_dendrites(capsys):
    trainer, _ = scripted(TWO_DENDRITES, model := model_of(Unpacked))
    trainer.train()
    assert not any("read" in name for name in layers_with_dendrites(model))
    assert "the model reads the weights of body.read instead of calling it" in capsys.readouterr().out


class Counting(nn.Linear):
    def get_extra_state(self):
        return {"count": 1}

    def set_extra_state(self, state):
        pass


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.dendrite_encoder = nn.Linear(16, 16)

    def forward(self, x):
        return self.dendrite_encoder(x)


@pytest.mark.parametrize(
    "make, settings, message",
    [
        (lambda: model_of(lambda: Counting(16, 16)), {}, "body has a state that is no tensor"),
        (lambda: model_of(Named), {}, "body.dendrite_encoder.weight: names that begin with"),
        (lambda: build(DISTILBERT), {"module_names_to_perforate": ["Dropout"]}, "a Dropout, has no weights"),
    ],
)
def test_modules_that_cannot_work_raise_at_the_start(make, settings, message):
    with pytest.raises(PerforatedError, match=message):
        scripted(TWO_DENDRITES, make(), settings)


def test_pruned_dendrites_raise_at_the_start():
    trainer, _ = scripted(TWO_DENDRITES)
    trainer.train()
    prune_weights(trainer.model.classifier, "dendrite_weight", 0.5)
    with pytest.raises(PerforatedError, match="dendrites of classifier are pruned or normalized"):
        scripted(TWO_DENDRITES, trainer.model, output_dir="second")
