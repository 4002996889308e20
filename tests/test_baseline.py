"""The step-matched baseline of a run, `control_of`: the same training without dendrites, and their comparison."""

import json
import shutil

import kills
import numpy as np
import pytest
import torch
from models import build
from small import DISTILBERT, EVAL, arguments, compute_metrics, kill_at_step, losses, trainer_for
from transformers import TrainerCallback

from perforated_trainer import DendriteArguments, PerforatedError
from perforated_trainer.baseline import Baseline

KEYS = {"control_of", "metric", "with_dendrites", "without", "difference", "interval_95", "test_examples", "verdict"}


def results(folder, name="run-control"):
    return json.loads((folder / name / "results.json").read_text())


def history(run):
    """The log of a run, from its last checkpoint."""
    states = run.glob("checkpoint-*/trainer_state.json")
    return json.loads(max(states, key=lambda path: int(path.parent.name.split("-")[1])).read_text())["log_history"]


# ------------------------------------------------------------------------------------- of the script, on a command line


@pytest.fixture(scope="module")
def baseline(finished, tmp_path_factory):
    """Folder with a copy of the finished run, and its baseline."""
    folder = tmp_path_factory.mktemp("baseline")
    shutil.copytree(finished / "run", folder / "run")
    kills.run_to_end(folder, "--control_of", "run")  # with `--save_name run`, as the run itself was started
    return folder


def test_baseline_has_the_steps_and_restarts_of_the_run_and_no_dendrites(baseline):
    run, mine = results(baseline, "run"), results(baseline)
    assert len(run["restarts"]) >= 2 and mine["restarts"] == run["restarts"]
    assert mine["global_step"] == run["global_step"] and mine["stopped_by"] == "tracker"
    assert [(cycle["dendrites"], cycle["parameters"]) for cycle in mine["cycles"]] == [(0, 1610)]
    assert (mine["final"]["dendrites"], mine["final"]["parameters"]) == (0, 1610)
    assert mine["final"]["validation_accuracy"] == pytest.approx(mine["cycles"][0]["best_validation"], abs=1e-9)
    assert run["settings"] | {"doing_pai": False, "control_of": "run"} == mine["settings"] | {"doing_pai": False}


def test_baseline_is_the_run_until_its_first_dendrite(baseline):
    first = results(baseline)["restarts"][0]
    before = [
        [entry["loss"] for entry in history(baseline / name) if "loss" in entry and entry["step"] <= first]
        for name in ("run", "run-control")
    ]
    assert before[0] == before[1] and len(before[0]) >= first // 5
    rates = {entry["step"]: entry["learning_rate"] for entry in history(baseline / "run-control") if "loss" in entry}
    for restart in results(baseline)["restarts"]:
        assert rates[restart + 5] == rates[5], "optimizer and schedule start again"


def test_comparison_is_written_and_printed(baseline):
    run, mine = results(baseline, "run"), results(baseline)
    compared = mine["control"]
    assert set(compared) >= KEYS and "control" not in run
    assert compared["metric"] == "test_accuracy" and compared["test_examples"] == 200
    assert compared["with_dendrites"] == run["final"]["test_accuracy"]
    assert compared["without"] == mine["final"]["test_accuracy"]
    assert compared["difference"] == pytest.approx(compared["with_dendrites"] - compared["without"])
    low, high = compared["interval_95"]
    assert low < compared["difference"] < high < low + 0.3
    assert compared["verdict"] in (baseline / "log.txt").read_text()


def test_plots_of_run_and_baseline_are_drawn(baseline):
    from PIL import Image

    for name in ("run", "run-control"):
        with Image.open(baseline / name / f"{name}.png") as plot:
            assert plot.size == (1100, 450)
    # The plot of the run has one more line.
    assert (baseline / "run" / "run.png").stat().st_mtime > (baseline / "run" / "results.json").stat().st_mtime


def test_settings_that_differ_are_named_with_the_command(script, small, baseline, tmp_path, capfd):
    shutil.copytree(baseline / "run", tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
    assert script([*small, "--control_of", "run", "--seed", "1", "--weight_decay", "0.1"]) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert "seed (42 there, 1 here)" in error and "weight_decay (0.0 there, 0.1 here)" in error
    assert error.count(" there, ") == 2 and results(tmp_path, "run")["command"] in error
    assert not list(tmp_path.glob("run-control/*"))


# ------------------------------------------------------------------------------------------------ from code, any metric


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recall(prediction):
    """Mean recall over the classes."""
    found = prediction.predictions.argmax(-1) == prediction.label_ids
    return {
        "recall": float(np.mean([found[prediction.label_ids == label].mean() for label in set(prediction.label_ids)]))
    }


METRICS = {"accuracy": compute_metrics, "recall": recall, "loss": None}


def make(output_dir="run", score="accuracy", steps=15, callbacks=(), model=None, dendrites=None, **changes):
    """A trainer that improves enough for dendrites; it ends at step 15 with a last evaluation."""
    usual = {"max_steps": steps, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "logging_steps": 1}
    args = arguments(output_dir=output_dir, metric_for_best_model=score, **usual | changes)
    settings = DendriteArguments(**{"n_epochs_to_switch": 1} | (dendrites or {}))
    more = {"compute_metrics": METRICS[score], "callbacks": list(callbacks)}
    return trainer_for(args, model=model, dendrite_args=settings, eval_dataset=EVAL, **more)


def train(*args, **kwargs):
    trainer = make(*args, **kwargs)
    trainer.train()
    return trainer, trainer.save_results({"name": "texts"})


OF_RUN = {"control_of": "run"}


@pytest.mark.parametrize("score", METRICS)
def test_baseline_of_any_metric_from_code_goes_to_its_own_folder(score, folder):
    """The same arguments and one more, also the same `output_dir`: the run is not replaced."""
    changes = {"score": score, "learning_rate": 3e-2}
    _, run = train(**changes)
    before = (folder / "run" / "results.json").read_bytes()
    trainer, mine = train(**changes, dendrites=OF_RUN)
    assert trainer.args.output_dir == "run-control" and (folder / "run-control" / "results.json").is_file()
    assert (folder / "run" / "results.json").read_bytes() == before and run["restarts"]
    assert mine["stopped_by"] == "tracker" and mine["final"]["dendrites"] == 0
    assert mine["global_step"] == run["global_step"] and mine["restarts"] == run["restarts"]
    compared = mine["control"]
    assert compared["metric"] == f"validation_{score}" and compared["test_examples"] == 8
    assert "validation" in compared["verdict"]
    assert (compared["interval_95"] is None) == (score == "loss")


def test_baseline_with_overwrite_run_does_not_replace_its_run(folder):
    train()
    _, first = train(dendrites=OF_RUN)
    _, again = train(dendrites=OF_RUN | {"overwrite_run": True})
    assert (folder / "run" / "final").is_dir()
    del first["train_seconds"], first["steps_per_second"], again["train_seconds"], again["steps_per_second"]
    assert first | {"settings": 0} == again | {"settings": 0}, "not bitwise identical"
    with pytest.raises(PerforatedError, match="already holds a run"):
        make(dendrites=OF_RUN).train()


def test_baseline_of_a_run_without_a_finite_score_raises_one_line(folder, monkeypatch):
    monkeypatch.setitem(METRICS, "accuracy", lambda prediction: {"accuracy": float("nan")})
    train(steps=2)
    with pytest.raises(PerforatedError, match="no evaluation of this run had a finite score"):
        make(steps=2, dendrites=OF_RUN).train()


def test_baseline_of_a_deleted_run_raises_one_line(folder):
    train()
    shutil.rmtree("run/final")
    with pytest.raises(PerforatedError, match=r"no results\.json or no model in final/.*trainer\.save_results\(\)"):
        make(dendrites=OF_RUN)
    shutil.rmtree("run")
    with pytest.raises(PerforatedError, match="there is no run"):
        make(dendrites=OF_RUN)


def test_comparison_without_the_model_of_the_run_gives_the_reason(folder):
    """The run was deleted while its baseline trained."""
    train()
    trainer = make(dendrites=OF_RUN)
    trainer.train()
    shutil.rmtree("run/final")
    compared = trainer.save_results({"name": "texts"})["control"]
    assert compared["interval_95"] is None and "run/final" in compared["verdict"]


class Starts(TrainerCallback):
    """Records the weights at the start of each cycle and at each evaluation."""

    def __init__(self):
        self.starts, self.evaluated, self.optimizer = [], {}, None

    def on_step_begin(self, args, state, control, model, optimizer, **kwargs):
        if optimizer is not self.optimizer:  # created again
            self.optimizer, weights = optimizer, {name: value.clone() for name, value in model.state_dict().items()}
            self.starts.append((weights, len(optimizer.state), optimizer.param_groups[0]["lr"], state.global_step))

    def on_evaluate(self, args, state, control, model, metrics, **kwargs):
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        self.evaluated[state.global_step] = metrics["eval_loss"], weights


def test_wider_baseline_starts_from_its_best_weights_each_time(folder, monkeypatch):
    monkeypatch.setattr(Baseline, "same_network", False)
    changes = {"score": "loss", "learning_rate": 3e-2, "steps": 20}  # too high to improve at each step
    train(**changes)
    starts = Starts()
    wider = build(DISTILBERT, hidden_dim=96)
    _, mine = train(**changes, dendrites=OF_RUN, callbacks=[starts], model=wider)
    assert [step for *_, step in starts.starts] == [0, *mine["restarts"]] and len(starts.starts) > 2
    moved_back = 0
    for weights, moments, rate, restart in starts.starts[1:]:
        best = min((step for step in starts.evaluated if step <= restart), key=lambda step: starts.evaluated[step][0])
        assert moments == 0 and rate == 3e-2
        assert all(torch.equal(value, starts.evaluated[best][1][name]) for name, value in weights.items())
        moved_back += best < restart
    assert moved_back


def test_network_of_another_size_raises(folder):
    train()
    with pytest.raises(PerforatedError, match=r"parameters \(58,114 there, 6\d,\d+ here\)"):
        make(dendrites=OF_RUN, model=build(DISTILBERT, hidden_dim=96)).train()


def test_baseline_that_ends_before_its_run_has_no_comparison(folder, capsys):
    train()
    capsys.readouterr()
    _, mine = train(steps=4, dendrites=OF_RUN)
    assert mine["global_step"] == 4 and "control" not in mine
    output = capsys.readouterr().out
    assert "no comparison: this baseline ended at step 4, its run at" in output and "warning:" not in output


@pytest.mark.parametrize("same", [True, False])
def test_baseline_that_begins_with_other_weights_is_named_in_the_comparison(same, folder):
    model = build(DISTILBERT)
    train(model=None if same else model)
    _, mine = train(dendrites=OF_RUN, model=None if same else train("other", model=model)[0].model, steps=15)
    assert ("did not begin with the weights" in mine["control"]["verdict"]) != same


def test_baseline_of_a_run_that_ended_between_evaluations_makes_as_many(folder):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 9

    changes = {"eval_steps": 4, "callbacks": [Stop()]}
    run, _ = train(**changes)
    baseline, mine = train(**changes, dendrites=OF_RUN)
    steps = [[row["step"] for row in trainer.growth.evaluations] for trainer in (run, baseline)]
    assert steps[0] == steps[1] == [4, 8] and mine["stopped_by"] == "tracker" and "control" in mine


@pytest.mark.parametrize(("step", "scheduler"), [(3, "constant"), (9, "reduce_lr_on_plateau"), (14, "cosine")])
def test_baseline_killed_anywhere_resumes_bitwise_equal(step, scheduler, folder):
    changes = {"lr_scheduler_type": scheduler, "score": "loss", "learning_rate": 3e-2}
    train(**changes)
    whole, mine = train("whole", **changes, dendrites=OF_RUN)
    assert mine["restarts"] and len(losses(whole)) == 15
    kill_at_step(step, lambda: make("killed", **changes, dendrites=OF_RUN))
    resumed = make("killed", **changes, dendrites=OF_RUN)
    resumed.train(resume_from_checkpoint=True)
    resumed.save_results({"name": "texts"})
    assert kills.outcome(folder, "killed") == kills.outcome(folder, "whole")
    assert losses(resumed) == losses(whole)


def test_settings_that_only_report_may_differ(folder):
    train(dendrites={"max_dendrites": 1})
    trainer = make(dendrites=OF_RUN | {"max_dendrites": 1}, save_steps=4, logging_steps=3, save_total_limit=1)
    trainer.train()
    assert trainer.stopped_by == "tracker"
