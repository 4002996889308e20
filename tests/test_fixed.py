"""`switch_mode="fixed"`: each cycle is one ordinary training, with its whole learning rate schedule."""

import json
from pathlib import Path

import pytest
import torch
from models import build
from small import DISTILBERT, TRAIN, arguments, kept, kill_at_step, losses, scores_left, scripted
from transformers import Trainer, TrainerCallback

from perforated_trainer import PerforatedError
from perforated_trainer.layers import layers_with_dendrites

STEPS = 4  # of an epoch
CYCLE = 3 * STEPS
RISING = [0.1 * number for number in range(1, 40)]  # each evaluation is better than those before


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Rates(TrainerCallback):
    """The learning rate of the optimizer at each step."""

    def __init__(self):
        self.rates = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append(optimizer.param_groups[0]["lr"])


RECIPE = {  # the usual one of fine-tuning: three epochs, linear, warm-up
    "num_train_epochs": 3,
    "max_steps": -1,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.1,
    "learning_rate": 2e-3,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "logging_steps": 1,
}


def fixed(scores=RISING, dendrites=None, callbacks=(), more=None, **changes):
    settings = {"switch_mode": "fixed", "max_dendrites": 2, "improvement_threshold": 0.0} | (dendrites or {})
    more = {"callbacks": list(callbacks)} | (more or {})
    return scripted(scores, None, settings, more=more, **RECIPE | changes)


def stock_rates(**changes):
    """The rates of the same training by the Trainer of transformers."""
    rates = Rates()
    args = arguments(**RECIPE | {"eval_strategy": "no", "save_strategy": "no", "output_dir": "stock"} | changes)
    Trainer(build(DISTILBERT), args, train_dataset=TRAIN, callbacks=[rates]).train()
    return rates.rates


def evaluated(trainer):
    return [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]


def test_usual_fine_tuning_adds_dendrites_and_ends(capsys):
    rates = Rates()
    trainer, script = fixed(callbacks=[rates])
    output = trainer.train()
    assert trainer.stopped_by == "tracker" and trainer.restarts == [CYCLE, 2 * CYCLE]
    assert evaluated(trainer) == list(range(STEPS, 3 * CYCLE + 1, STEPS)), "once at the end of each epoch"
    assert kept(trainer, script) == [RISING[8]] and trainer.num_dendrites == 2
    assert rates.rates == 3 * stock_rates()
    assert trainer.args.max_steps == -1 and trainer.args.num_train_epochs == 3
    assert f"step {CYCLE}: 0 -> 1 dendrite" in capsys.readouterr().out
    # The output is that of all cycles: a script writes it with `save_metrics`.
    assert output.global_step == len(losses(trainer)) == 3 * CYCLE and output.metrics["epoch"] == 9
    assert output.training_loss == pytest.approx(sum(losses(trainer)) / 36)
    results = trainer.save_results({"name": "texts"})
    assert [cycle["dendrites"] for cycle in results["cycles"]] == [0, 1, 2]
    assert results["final"]["dendrites"] == 2 and results["global_step"] == 3 * CYCLE


SCHEDULES = {
    "linear": {},
    "cosine_with_restarts": {"lr_scheduler_kwargs": {"num_cycles": 2}},
    "polynomial": {"lr_scheduler_kwargs": {"lr_end": 1e-5}},
    "constant_with_warmup": {},
    "cosine_with_min_lr": {"lr_scheduler_kwargs": {"min_lr": 1e-4}},
    "warmup_stable_decay": {"lr_scheduler_kwargs": {"num_decay_steps": 2}},
}
RATES = ("lr_end", "min_lr")


@pytest.mark.parametrize("kind", SCHEDULES)
def test_rates_of_a_cycle_are_those_of_the_stock_trainer(kind):
    """With a factor of 0.25: of a stock training with a quarter of each rate."""
    changes = {"lr_scheduler_type": kind, "max_steps": 6, "save_strategy": "no", **SCHEDULES[kind]}
    rates = Rates()
    trainer, _ = fixed(RISING, {"max_dendrites": 1, "dendrite_learning_rate_factor": 0.25}, [rates], **changes)
    trainer.train()
    scaled = {name: value * 0.25 if name in RATES else value for name, value in
              changes.get("lr_scheduler_kwargs", {}).items()}  # fmt: skip
    quarter = changes | {"learning_rate": 0.25 * 2e-3} | ({"lr_scheduler_kwargs": scaled} if scaled else {})
    assert rates.rates[:6] == stock_rates(**changes)
    assert rates.rates[6:] == pytest.approx(stock_rates(**quarter)) and len(rates.rates) == 12
    assert evaluated(trainer) == [4, 6, 8, 12]


def test_end_of_a_cycle_is_evaluated_if_the_steps_do_not_divide():
    changes = {"max_steps": 7, "eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 7}
    trainer, _ = fixed(RISING, {"max_dendrites": 1}, **changes)
    trainer.train()
    assert evaluated(trainer) == [3, 6, 7, 9, 12, 14] and trainer.stopped_by == "tracker"


@pytest.mark.parametrize("epochs", [0.5, 1.5, 2])
def test_cycles_of_part_of_an_epoch(epochs):
    trainer, _ = fixed(RISING, {"max_dendrites": 1}, num_train_epochs=epochs)
    trainer.train()
    cycle = int(epochs * STEPS)
    assert trainer.restarts == [cycle] and trainer.state.global_step == 2 * cycle
    assert trainer.num_dendrites == 1


def test_schedule_that_waits_for_a_plateau_trains():
    trainer, _ = fixed(RISING, {"max_dendrites": 1}, lr_scheduler_type="reduce_lr_on_plateau", warmup_steps=0)
    trainer.train()
    assert trainer.stopped_by == "tracker" and trainer.state.global_step == 2 * CYCLE


def test_data_of_unknown_length_trains():
    class Texts(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from TRAIN

    changes = {"max_steps": 5, "eval_strategy": "steps", "eval_steps": 5, "save_strategy": "no"}
    trainer, _ = fixed(RISING, {"max_dendrites": 1}, more={"train_dataset": Texts()}, **changes)
    trainer.train()
    assert trainer.stopped_by == "tracker" and trainer.restarts == [5] and trainer.state.global_step == 10


@pytest.mark.parametrize(
    ("dendrites", "steps", "number"),
    [
        ({"improvement_threshold_raw": 100.0, "max_dendrite_tries": 1, "max_dendrites": 5}, 2, 0),  # no gain is enough
        ({"improvement_threshold_raw": 100.0, "max_dendrite_tries": 3}, 4, 0),
        ({"doing_pai": False}, 1, 0),
        ({"max_dendrites": 0}, 1, 0),
        ({"num_initial_dendrites": 1}, 2, 2),
    ],
)
def test_number_of_cycles(dendrites, steps, number):
    trainer, _ = fixed(RISING, dendrites, num_train_epochs=1)
    trainer.train()
    assert trainer.stopped_by == "tracker"
    assert (trainer.state.global_step, trainer.num_dendrites) == (steps * STEPS, number)


def test_capacity_test_ends_with_three_dendrites():
    trainer, _ = fixed(RISING, {"testing_dendrite_capacity": True}, num_train_epochs=1)
    trainer.train()
    assert trainer.stopped_by == "tracker" and trainer.num_dendrites == 3


@pytest.mark.parametrize("epochs", [3, 1.5])
def test_run_killed_in_the_second_cycle_resumes_bitwise_equal(epochs):
    """Also with a learning rate factor; a cycle may end in the middle of an epoch."""

    def make(folder, scores=RISING):
        dendrites = {"dendrite_learning_rate_factor": 0.25, "max_dendrites": 1}
        return fixed(scores, dendrites, num_train_epochs=epochs, output_dir=folder)[0]

    whole = make("whole")
    whole.train()
    cycle = int(epochs * STEPS)
    kill_at_step(cycle + 3, lambda: make("run"))
    done = json.loads(Path(f"run/checkpoint-{cycle}/perforated.json").read_text())
    assert done["restarts"] == [cycle]
    resumed = make("run")
    resumed.compute_metrics.scores = scores_left(RISING, resumed)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole) and resumed.restarts == whole.restarts
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_baseline_has_the_same_schedule():
    rates, changes = (Rates(), Rates()), {"max_steps": 5, "save_strategy": "no"}
    settings = {"max_dendrites": 1, "dendrite_learning_rate_factor": 0.25}
    trainer, _ = fixed(RISING, settings, [rates[0]], **changes)
    trainer.train()
    trainer.save_results({"name": "texts"})
    baseline, _ = fixed(RISING, settings | {"control_of": "run"}, [rates[1]], **changes, output_dir="baseline")
    baseline.train()
    assert baseline.num_dendrites == 0 and baseline.state.global_step == trainer.state.global_step == 10
    assert rates[0].rates == rates[1].rates


@pytest.mark.parametrize(
    ("changes", "mode", "message"),
    [
        ({"num_train_epochs": 1_000_000}, "fixed", "one cycle would never end"),
        ({"num_train_epochs": 1_000_000}, "history", "linear .*would never decay.*switch_mode fixed"),
        (
            {"num_train_epochs": 1_000_000, "lr_scheduler_type": "constant_with_warmup"},
            "history",
            "warm-up .* would never end",
        ),
    ],
)
def test_schedule_that_would_never_end_raises(changes, mode, message):
    with pytest.raises(PerforatedError, match=message):
        fixed(RISING, {"switch_mode": mode}, **changes)


def test_schedule_with_an_end_is_explained_if_a_plateau_ends_a_cycle(capsys):
    trainer, _ = fixed([0.5] * 9, {"switch_mode": "history", "n_epochs_to_switch": 1}, num_train_epochs=1)
    trainer.train()
    assert "note: the schedule linear is made for the whole run" in capsys.readouterr().out


class Added(TrainerCallback):
    """The standard deviation of the weights of the first dendrites before their first step."""

    scale = None

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        grown = layers_with_dendrites(model)
        if grown and self.scale is None:
            self.scale = float(torch.cat([layer.dendrite_weight.detach().flatten() for layer in grown.values()]).std())


def test_activation_and_scale_reach_the_dendrites_and_the_saved_model():
    added = Added()
    settings = {"dendrite_activation": "tanh", "dendrite_init_scale": 0.5, "max_dendrites": 1}
    trainer, _ = fixed(RISING, settings, [added], num_train_epochs=1)
    trainer.train()
    trainer.save_model("saved")
    assert 0.45 < added.scale < 0.55
    assert json.loads(Path("saved/config.json").read_text())["quantization_config"]["activation"] == "tanh"
    manifest = json.loads(Path(f"run/checkpoint-{STEPS}/perforated.json").read_text())
    assert manifest["settings"] | settings == manifest["settings"]
