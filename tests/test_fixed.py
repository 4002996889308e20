"""`--switch_mode fixed`: each cycle is one ordinary training, with its whole learning rate schedule."""

import json
import os
import signal
from pathlib import Path

import models
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging

from perforated_trainer import DendriteArguments, PerforatedError, PerforatedTrainer, checkpoint
from perforated_trainer.callbacks import PlotCallback

NAME = "DistilBertForSequenceClassification"
STEPS = 8  # of an epoch
CYCLE = 3 * STEPS


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logging.disable_progress_bar()
    set_seed(0)
    models.build(NAME).save_pretrained("pretrained")


def compute_metrics(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def arguments(**changes):
    """The usual recipe of fine-tuning: three epochs, linear, warm-up."""
    values = {
        "output_dir": "run",
        "use_cpu": True,
        "num_train_epochs": 3,
        "lr_scheduler_type": "linear",
        "warmup_ratio": 0.1,
        "learning_rate": 2e-3,
        "per_device_train_batch_size": 4,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "logging_steps": 1,
        "metric_for_best_model": "loss",
        "report_to": "none",
    }
    values |= changes
    if values["warmup_ratio"] is not None:  # its name before transformers 5, and the same number after
        values["warmup_steps"] = values["warmup_ratio"]
    del values["warmup_ratio"]
    return TrainingArguments(**values)


class Rates(TrainerCallback):
    """The learning rate of each step, as the optimizer has it when it takes the step."""

    def __init__(self):
        self.rates = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append(optimizer.param_groups[0]["lr"])


def trainer_for(args=None, callbacks=(), **settings):
    set_seed(0)
    settings = {"switch_mode": "fixed", "max_dendrites": 2, "improvement_threshold": [0.0]} | settings
    rows = models.rows(NAME)
    trainer = PerforatedTrainer(
        model=models.model_class(NAME).from_pretrained("pretrained"),
        args=args or arguments(),
        dendrite_args=DendriteArguments(**settings),
        train_dataset=rows[: 4 * STEPS],
        eval_dataset=rows[4 * STEPS :],
        compute_metrics=compute_metrics,
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PlotCallback)
    return trainer


def stock_rates(**changes):
    """The rates of the same training by the Trainer of transformers."""
    rates, rows = Rates(), models.rows(NAME)
    args = arguments(eval_strategy="no", save_strategy="no", output_dir="stock", **changes)
    model = models.model_class(NAME).from_pretrained("pretrained")
    Trainer(model, args, train_dataset=rows[: 4 * STEPS], callbacks=[rates]).train()
    return rates.rates


def evaluated(trainer):
    return [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]


def test_the_usual_recipe_adds_a_dendrite_and_ends_by_itself(capsys):
    trainer = trainer_for()
    trainer.train()
    assert trainer.stopped_by == "tracker"
    results = trainer.save_results({"name": "texts"})
    assert [cycle["dendrites"] for cycle in results["cycles"]][:2] == [0, 1]
    assert results["final"]["dendrites"] >= 1
    assert results["global_step"] % CYCLE == 0
    assert evaluated(trainer) == list(range(STEPS, results["global_step"] + 1, STEPS))  # once at the end of each epoch
    best = min(cycle["best_validation"] for cycle in results["cycles"])
    assert results["final"]["validation_loss"] == pytest.approx(best, abs=1e-6)
    assert trainer.args.max_steps == -1 and trainer.args.num_train_epochs == 3
    assert f"step {CYCLE}: 0 -> 1 dendrite" in capsys.readouterr().out


def test_the_output_is_that_of_all_cycles():
    """A script writes it with `save_metrics`."""
    trainer = trainer_for(arguments(num_train_epochs=1), max_dendrites=1)
    output = trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]  # of each step
    assert len(losses) == output.global_step >= 2 * STEPS
    metrics = output.metrics
    assert output.training_loss == metrics["train_loss"] == pytest.approx(sum(losses) / len(losses))
    assert metrics["train_runtime"] == pytest.approx(trainer.train_seconds, abs=1e-3)
    assert metrics["train_steps_per_second"] == pytest.approx(len(losses) / trainer.train_seconds, abs=1e-2)
    again = trainer_for(arguments(num_train_epochs=1), max_dendrites=1).train(resume_from_checkpoint=True)  # complete
    assert again.training_loss == output.training_loss


SCHEDULES = {
    "linear": {},
    "cosine_with_restarts": {"lr_scheduler_kwargs": {"num_cycles": 2}},
    "polynomial": {"lr_scheduler_kwargs": {"lr_end": 1e-5}},
    "constant_with_warmup": {},
    "cosine_with_min_lr": {"lr_scheduler_kwargs": {"min_lr": 1e-4}},
    "warmup_stable_decay": {"lr_scheduler_kwargs": {"num_decay_steps": 4}},
}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_rates_of_a_cycle_are_those_of_the_stock_trainer(kind):
    changes = {"lr_scheduler_type": kind, "max_steps": 10, **SCHEDULES[kind]}
    rates = Rates()
    trainer = trainer_for(arguments(**changes), [rates], max_dendrites=1, dendrite_learning_rate_factor=0.25)
    trainer.train()
    assert rates.rates[:10] == stock_rates(**changes)
    assert rates.rates[10:20] == stock_rates(**changes, learning_rate=0.25 * 2e-3)
    assert trainer.state.global_step % 10 == 0 and evaluated(trainer)[:4] == [8, 10, 16, 20]


def test_evaluation_at_the_end_where_the_steps_do_not_divide():
    args = arguments(max_steps=7, eval_strategy="steps", eval_steps=3, save_strategy="steps", save_steps=7)
    trainer = trainer_for(args, max_dendrites=1)
    trainer.train()
    assert evaluated(trainer)[:6] == [3, 6, 7, 9, 12, 14]
    assert trainer.stopped_by == "tracker" and trainer.state.global_step % 7 == 0


def test_a_schedule_that_waits_for_a_plateau():
    args = arguments(lr_scheduler_type="reduce_lr_on_plateau", num_train_epochs=1, warmup_ratio=None)
    trainer = trainer_for(args, max_dendrites=1)
    trainer.train()
    assert trainer.stopped_by == "tracker" and trainer.state.global_step % STEPS == 0


def test_data_of_unknown_length():
    class Texts(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from models.rows(NAME)[: 4 * STEPS]

    trainer = trainer_for(arguments(max_steps=5, eval_strategy="steps", eval_steps=5), max_dendrites=1)
    trainer.train_dataset = Texts()
    trainer.train()
    assert trainer.stopped_by == "tracker" and trainer.state.global_step % 5 == 0


def test_a_dendrite_that_does_not_help_ends_the_training(capsys):
    """No gain is large enough."""
    settings = {"improvement_threshold": [0.0], "improvement_threshold_raw": 100.0, "max_dendrite_tries": 1}
    trainer = trainer_for(arguments(num_train_epochs=1), max_dendrites=5, **settings)
    trainer.train()
    assert trainer.stopped_by == "tracker" and trainer.state.global_step == 2 * STEPS and trainer.num_dendrites == 0


def test_without_dendrites_it_is_one_ordinary_training():
    trainer = trainer_for(doing_pai=False)
    trainer.train()
    assert trainer.stopped_by == "tracker" and trainer.state.global_step == CYCLE and trainer.num_dendrites == 0


def test_a_capacity_test_ends_with_three_dendrites():
    trainer = trainer_for(arguments(num_train_epochs=1), testing_dendrite_capacity=True)
    trainer.train()
    assert trainer.stopped_by == "tracker" and trainer.num_dendrites >= 2


def test_a_control_has_the_same_schedule():
    rates, changes = (Rates(), Rates()), {"max_steps": 5, "save_strategy": "no"}
    settings = {"max_dendrites": 1, "max_dendrite_tries": 1, "dendrite_learning_rate_factor": 0.25}
    trainer = trainer_for(arguments(**changes), [rates[0]], **settings)
    trainer.train()
    trainer.save_results({"name": "texts"})
    args = arguments(**changes, output_dir="control")
    control = trainer_for(args, [rates[1]], control_of="run", **settings)
    control.train()
    assert control.num_dendrites == 0 and control.state.global_step == trainer.state.global_step > 5
    assert rates[0].rates == rates[1].rates


# ------------------------------------------------------------------------------------------------- killed and resumed

FACTOR = {"dendrite_learning_rate_factor": 0.25, "max_dendrites": 1, "max_dendrite_tries": 1}


def outcome():
    results = json.loads(Path("run/results.json").read_text())
    for key in ("train_seconds", "steps_per_second", "command"):
        del results[key]
    weights = [path.read_bytes() for path in sorted(Path("run/final").glob("*.safetensors"))]
    return results, weights


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("changes", "kill"),
    [
        ({}, CYCLE + STEPS + 3),
        (
            {"save_strategy": "steps", "save_steps": 4},
            CYCLE + STEPS + 1,
        ),  # the last checkpoint is that of an epoch's end
        ({"num_train_epochs": 1.5, "save_strategy": "steps", "save_steps": 5}, 12 + 9),
        ({"lr_scheduler_type": "cosine", "max_steps": 10, "save_strategy": "steps", "save_steps": 3}, 19),
    ],
)
def test_killed_in_the_second_cycle_and_resumed(changes, kill):
    os.mkdir("whole")
    os.chdir("whole")
    os.symlink("../pretrained", "pretrained")
    trainer = trainer_for(arguments(**changes), **FACTOR)
    trainer.train()
    trainer.save_results({"name": "texts"})
    rates = {entry["step"]: entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry}
    expected = outcome()
    os.chdir("..")
    if (child := os.fork()) == 0:
        trainer_for(arguments(**changes), [KillAt(kill)], **FACTOR).train()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    newest = checkpoint.find(True, Path("run"), print)
    assert json.loads((newest / checkpoint.MANIFEST).read_text())["restarts"]
    trainer = trainer_for(arguments(**changes), **FACTOR)
    trainer.train(resume_from_checkpoint=True)
    trainer.save_results({"name": "texts"})
    assert outcome() == expected
    assert rates == {e["step"]: e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e}


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"num_train_epochs": 1_000_000}, {}, "one cycle would never end"),
        ({"num_train_epochs": 1_000_000}, {"switch_mode": "history"}, "linear .*would never decay.*switch_mode fixed"),
        (
            {"num_train_epochs": 1_000_000, "lr_scheduler_type": "constant_with_warmup"},
            {"switch_mode": "history"},
            "warm-up .* would never end",
        ),
        ({}, {"switch_mode": "often"}, "use history or fixed"),
        ({}, {"dendrite_learning_rate_factor": 0.0}, "above 0"),
        ({}, {"max_dendrite_tries": 0}, "1 or more"),
        ({}, {"dendrite_activation": "square"}, "use one of sigmoid, relu"),
    ],
)
def test_bad_input_is_refused(changes, settings, message):
    with pytest.raises(PerforatedError, match=message):
        trainer_for(arguments(**changes), **settings)


def test_a_schedule_with_an_end_is_explained_where_a_plateau_ends_a_cycle(capsys):
    trainer = trainer_for(arguments(num_train_epochs=1), switch_mode="history")
    trainer.train()
    assert "note: the schedule linear is made for the whole run" in capsys.readouterr().out


def test_the_fields_reach_the_library_and_the_saved_model():
    settings = {"dendrite_activation": "tanh", "dendrite_init_scale": 0.5, "max_dendrites": 1, "max_dendrite_tries": 1}
    trainer = trainer_for(arguments(num_train_epochs=1), [Scale()], **settings)
    trainer.train()
    assert 0.4 < Scale.scale < 0.6
    trainer.save_model("saved")
    config = json.loads(Path("saved/config.json").read_text())
    assert trainer.num_dendrites == 0 or config["quantization_config"]["activation"] == "tanh"
    manifest = json.loads((sorted(Path("run").glob("checkpoint-*"))[-1] / checkpoint.MANIFEST).read_text())
    assert manifest["settings"] | settings == manifest["settings"]


class Scale(TrainerCallback):
    scale = 0.0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        weights = [p for name, p in model.named_parameters() if "dendrite_module.layers.0.weight" in name]
        if weights:
            Scale.scale = float(torch.cat([w.detach().flatten() for w in weights]).std())
