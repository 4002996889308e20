"""A control: the same network without dendrites, trained as a run with dendrites was, and the verdict on the two."""

import functools
import json
import re
import shutil
import signal

import kill_at
import kills
import numpy as np
import pytest
import torch
from transformers import EvalPrediction, TrainerCallback, TrainingArguments

from mnist_huggingface_perforatedai import MnistCnnConfig, MnistCnnForImageClassification, compute_metrics
from perforated_trainer import DendriteArguments, PerforatedError, PerforatedTrainer
from perforated_trainer.control import ControlTracker
from perforated_trainer.verdict import bootstrap, paired_proportions, sentence

KEYS = {"control_of", "metric", "with_dendrites", "without", "difference", "interval_95", "test_examples", "verdict"}
FLAGS = ["--control_of", "run"]  # with `--save_name run`, as the run itself was started


def results(folder, name="run-control"):
    return json.loads((folder / name / "results.json").read_text())


def outcome(folder):
    """The results but for times and the command, and the bytes of the final weights."""
    result = results(folder)
    for key in ("train_seconds", "steps_per_second", "command"):
        del result[key]
    return result, (folder / "run-control" / "final" / "model.safetensors").read_bytes()


def history(run):
    """The log of a run, from its last checkpoint."""
    states = run.glob("checkpoint-*/trainer_state.json")
    return json.loads(max(states, key=lambda path: int(path.parent.name.split("-")[1])).read_text())["log_history"]


@pytest.fixture(scope="module")
def control(finished, tmp_path_factory):
    """Folder with a copy of the finished run, and its control."""
    folder = tmp_path_factory.mktemp("control")
    shutil.copytree(finished / "run", folder / "run")
    kills.run_to_end(folder, *FLAGS)
    return folder


@pytest.fixture
def run(finished, tmp_path, monkeypatch):
    """A copy of the finished run, in the current folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished / "run", tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
    return tmp_path / "run"


# ------------------------------------------------------------------------------------------------- a whole control


def test_the_same_steps_and_fresh_starts_without_dendrites(control):
    run, mine = results(control, "run"), results(control)
    assert len(run["restarts"]) >= 2 and mine["restarts"] == run["restarts"]
    assert mine["global_step"] == run["global_step"] and mine["stopped_by"] == "tracker"
    assert [(cycle["dendrites"], cycle["parameters"]) for cycle in mine["cycles"]] == [(0, 1610)]
    assert (mine["final"]["dendrites"], mine["final"]["parameters"]) == (0, 1610)
    assert mine["final"]["validation_accuracy"] == pytest.approx(mine["cycles"][0]["best_validation"], abs=1e-9)
    assert run["settings"] | {"doing_pai": False, "control_of": "run"} == mine["settings"]


def test_until_the_first_dendrite_both_are_the_same_training(control):
    first = results(control)["restarts"][0]
    losses = [
        [entry["loss"] for entry in history(control / name) if "loss" in entry and entry["step"] <= first]
        for name in ("run", "run-control")
    ]
    assert losses[0] == losses[1] and len(losses[0]) >= first // 5
    rates = {entry["step"]: entry["learning_rate"] for entry in history(control / "run-control") if "loss" in entry}
    for restart in results(control)["restarts"]:
        assert rates[restart + 5] == rates[5], "optimizer and schedule start anew"


def test_the_verdict(control):
    run, mine = results(control, "run"), results(control)
    verdict = mine["control"]
    assert set(verdict) == KEYS
    assert verdict["control_of"] == "run" and verdict["metric"] == "test_accuracy" and verdict["test_examples"] == 200
    assert verdict["with_dendrites"] == run["final"]["test_accuracy"]
    assert verdict["without"] == mine["final"]["test_accuracy"]
    assert verdict["difference"] == pytest.approx(verdict["with_dendrites"] - verdict["without"])
    low, high = verdict["interval_95"]
    assert low < verdict["difference"] < high < low + 0.3
    errors = [f"{100 * (1 - verdict[key]):.2f} %" for key in ("with_dendrites", "without")]
    begin = f"Dendrites: {errors[0]} test error, without them, trained the same way: {errors[1]}. "
    assert verdict["verdict"].startswith(begin)
    assert ("cannot be told from chance with 200 test examples" in verdict["verdict"]) == (low <= 0 <= high)
    assert verdict["verdict"] in (control / "log.txt").read_text()
    assert "control" not in run


def test_the_pictures_are_drawn(control):
    from PIL import Image

    for name in ("run", "run-control"):
        with Image.open(control / name / f"{name}.png") as picture:
            assert picture.size == (1100, 400)
    # The run's has a line more.
    assert (control / "run" / "run.png").stat().st_mtime > (control / "run" / "results.json").stat().st_mtime


@pytest.mark.parametrize(
    "point, count", [("before the manifest", 4), ("in a checkpoint", 11), ("in the final model", 1)]
)
def test_killed_and_resumed_to_the_same_bits(control, run, tmp_path, point, count):
    process = kills.start(tmp_path, *FLAGS, before=functools.partial(kill_at.arm, point, count))
    process.join()
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "log.txt").read_text()
    kills.run_to_end(tmp_path, *FLAGS, "--resume_from_checkpoint", "true")
    assert outcome(tmp_path) == outcome(control)


# ------------------------------------------------------------------------------------------------------- bad input


def change(run, **values):
    """Change `results.json` of a run; what is no key of it is a setting."""
    results = json.loads((run / "results.json").read_text())
    for name, value in values.items():
        (results if name in results else results["settings"])[name] = value
    (run / "results.json").write_text(json.dumps(results))


@pytest.mark.parametrize(
    "break_it, message",
    [
        (lambda run: shutil.rmtree(run), "there is no run in this folder"),
        (lambda run: (run / "run.json").unlink(), "there is no run in this folder"),
        (lambda run: (run / "results.json").unlink(), "not complete"),
        (lambda run: shutil.rmtree(run / "final"), "not complete"),
        (lambda run: (run / "results.json").write_text("{}"), "has no settings and restarts"),
        (lambda run: change(run, control_of="other"), "itself a control, of other"),
        (lambda run: change(run, doing_pai=False), "not trained with dendrites"),
        (lambda run: change(run, testing_dendrite_capacity=True), "not trained with dendrites"),
        (lambda run: change(run, learning_rate=0.25, seed=7), "learning_rate (0.25 there, 0.005 here)"),
        (lambda run: change(run, train_dataset="another"), "train_dataset (another there, 500 examples"),
        (lambda run: change(run, cycles=[{"parameters": 99}]), "parameters (99 there, 1,610 here)"),
    ],
)
def test_bad_input(script, small, run, capfd, break_it, message):
    break_it(run)
    assert script([*small, *FLAGS]) == 2
    (error,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert message in error and "--control_of run" in error
    assert not list(run.parent.glob("run-control/*"))


def test_what_differs_is_named_with_the_command(script, small, run, capfd):
    assert script([*small, *FLAGS, "--seed", "1", "--weight_decay", "0.1"]) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert "seed (42 there, 1 here)" in error and "weight_decay (0.0 there, 0.1 here)" in error
    assert error.count(" there, ") == 2 and results(run.parent, "run")["command"] in error


# ---------------------------------------------------------------------------------------------- any model, any score


def rows(count):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 1, 28, 28, generator=generator)
    return [{"pixel_values": image, "labels": index % 10} for index, image in enumerate(images)]


def recall(prediction):
    """The mean over the classes of the share that is found."""
    found = prediction.predictions.argmax(-1) == prediction.label_ids
    return {"recall": float(np.mean([found[prediction.label_ids == label].mean() for label in range(2)]))}


def train(folder, metrics, steps=7, control_of=None, widths=(4, 8, 16), callbacks=(), **settings):
    """Train the script's network in this process, to step 7, which is not one at which it is evaluated."""
    args = TrainingArguments(
        output_dir=folder,
        use_cpu=True,
        eval_strategy="steps",
        eval_steps=2,
        logging_steps=2,
        max_steps=steps,
        num_train_epochs=100,
        lr_scheduler_type="constant",
        learning_rate=1e-2,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
        **settings,
    )
    torch.manual_seed(0)
    trainer = PerforatedTrainer(
        model=MnistCnnForImageClassification(MnistCnnConfig(widths=widths)),
        args=args,
        callbacks=list(callbacks),
        dendrite_args=DendriteArguments(n_epochs_to_switch=1, control_of=control_of),
        train_dataset=rows(64),
        eval_dataset=rows(40),
        compute_metrics=metrics,
    )
    trainer.train()
    return trainer.save_results({"name": "noise"})


@pytest.mark.parametrize("score", ["accuracy", "recall", "loss"])
def test_any_score(tmp_path, monkeypatch, score):
    monkeypatch.chdir(tmp_path)
    metrics = {"accuracy": compute_metrics, "recall": recall, "loss": None}[score]
    run = train("run", metrics, metric_for_best_model=score)
    control = train("control", metrics, steps=-1, control_of="run", metric_for_best_model=score)
    assert run["stopped_by"] == "max_steps" and control["stopped_by"] == "tracker"
    assert control["global_step"] == run["global_step"] == 7 and control["restarts"] == run["restarts"]
    verdict = control["control"]
    assert set(verdict) == KEYS and verdict["metric"] == f"validation_{score}" and verdict["test_examples"] == 40
    assert "these are validation scores" in verdict["verdict"].lower()
    if score == "loss":
        assert verdict["interval_95"] is None and "Chance cannot be judged" in verdict["verdict"]
    else:
        low, high = verdict["interval_95"]
        assert low <= verdict["difference"] <= high


class Starts(TrainerCallback):
    """Keeps what each cycle begins with, and each weights that were the best."""

    def __init__(self):
        self.seen, self.best = [], {}

    def on_train_begin(self, args, state, control, model, optimizer, **kwargs):
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        self.seen.append((weights, len(optimizer.state), optimizer.param_groups[0]["lr"], state.global_step))

    def on_evaluate(self, args, state, control, model, metrics, **kwargs):
        if "eval_accuracy" in metrics:  # not for the results at the end
            weights = {name: value.clone() for name, value in model.state_dict().items()}
            self.best.setdefault(metrics["eval_accuracy"], (weights, state.global_step))


def test_a_wider_control_starts_from_its_best_weights_each_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ControlTracker, "same_network", False)
    train("run", compute_metrics, steps=30, metric_for_best_model="accuracy")
    starts = Starts()
    settings = {"control_of": "run", "widths": (6, 12, 24), "metric_for_best_model": "accuracy"}
    control = train("control", compute_metrics, steps=-1, callbacks=[starts], **settings)
    assert [step for *_, step in starts.seen] == [0, *control["restarts"]] and len(starts.seen) > 1
    moved_back = 0
    for weights, moments, rate, restart in starts.seen[1:]:
        best, step = starts.best[max(score for score, (_, step) in starts.best.items() if step <= restart)]
        assert moments == 0 and rate == 1e-2
        assert all(torch.equal(value, best[name]) for name, value in weights.items())
        moved_back += step < restart
    assert moved_back


def test_a_control_that_was_cut_short_has_no_verdict(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train("run", compute_metrics, metric_for_best_model="accuracy")
    control = train("control", compute_metrics, steps=4, control_of="run", metric_for_best_model="accuracy")
    assert control["global_step"] == 4 and "control" not in control


def test_a_network_of_another_size_is_refused_unless_asked_for(run):
    args = DendriteArguments(control_of="run")
    wider = MnistCnnForImageClassification(MnistCnnConfig(widths=(6, 12, 24)))
    tracker = ControlTracker(wider, args, True, torch.device("cpu"))
    settings = results(run.parent, "run")["settings"]
    with pytest.raises(PerforatedError, match=r"parameters \(1,610 there, 3,"):
        tracker.check(settings)
    tracker.same_network = False
    tracker.check(settings)


# --------------------------------------------------------------------------------------------------- the statistics


def test_the_interval_of_paired_shares_holds_what_it_says():
    """Simulated pairs of models: the true difference lies in 95 % of the intervals, with rare errors too."""
    generator, inside, repeats = np.random.default_rng(0), 0, 2000
    for _ in range(repeats):
        hard, own = generator.random(300) < 0.02, generator.random((2, 300)) < [[0.01], [0.03]]
        theirs, ours = ~(hard | own[0]), ~(hard | own[1])
        low, high = paired_proportions(theirs, ours)
        inside += low <= 0.02 * 0.98 <= high
    assert 0.94 <= inside / repeats <= 0.985
    low, high = paired_proportions(np.ones(100, bool), np.ones(100, bool))
    assert low == -high and 0 < high < 0.03, "models that agree on all of 100 examples could differ on others"


def test_the_bootstrap_agrees_with_the_shares_and_repeats_itself():
    generator = np.random.default_rng(1)
    labels = np.arange(1000) % 10
    logits = np.eye(10)[labels]
    other = [np.where(generator.random((1000, 1)) < share, 0.0, logits) for share in (0.1, 0.2)]
    theirs, ours = (EvalPrediction(predictions=(logits,), label_ids=labels) for logits in other)

    def score(prediction):
        return float((prediction.predictions[0].argmax(-1) == prediction.label_ids).mean())

    drawn = bootstrap(theirs, ours, score)
    right = [prediction.predictions[0].argmax(-1) == labels for prediction in (theirs, ours)]
    assert drawn == pytest.approx(paired_proportions(*right), abs=0.006)
    assert drawn == bootstrap(theirs, ours, score)


@pytest.mark.parametrize(
    "values, interval, dendrites, words",
    [
        ((0.986, 0.976), [0.004, 0.016], 2, "Dendrites: 1.40 % test error, without them, trained the same way: 2.40 %. "
         "The difference is larger than chance."),
        ((0.976, 0.986), [-0.016, -0.004], 1, "Dendrites were worse, by more than chance."),
        ((0.986, 0.984), [-0.004, 0.008], 1, "cannot be told from chance with 1,000 test examples."),
        ((0.984, 0.984), [-0.004, 0.004], 0, "That run kept no dendrite. Dendrites: 1.60 %"),
    ],
)  # fmt: skip
def test_the_sentence(values, interval, dendrites, words):
    compared = {"metric": "test_accuracy", "interval_95": interval, "test_examples": 1000}
    compared |= dict(zip(("with_dendrites", "without"), values, strict=True))
    assert re.search(re.escape(words), sentence(compared, values[0] > values[1], dendrites))
