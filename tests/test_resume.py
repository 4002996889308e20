"""Resuming after kills, signals, full disks and damaged checkpoints gives the result of an uninterrupted run."""

import builtins
import errno
import hashlib
import io
import itertools
import json
import os
import pickle
import re
import shutil
import signal
import time
from pathlib import Path

import kill_at
import kills
import pytest
import safetensors.torch
import torch
from small import (
    EVAL,
    TWO_DENDRITES,
    SignalAt,
    arguments,
    kept,
    kill_at_step,
    killed,
    losses,
    scores_left,
    scripted,
    trainer_for,
)
from torch.utils.data import IterableDataset

from perforated_trainer import DendriteArguments, PerforatedError, PerforatedTrainer, checkpoint
from perforated_trainer.callbacks import StopSignalCallback

RESUME = ["--resume_from_checkpoint", "true"]


@pytest.fixture
def begun(finished, tmp_path):
    """A copy of the finished run, in the state of a kill after its fourth checkpoint."""
    shutil.copytree(finished / "run", tmp_path / "run")
    for path in sorted_checkpoints(tmp_path)[4:]:
        shutil.rmtree(path)
    shutil.rmtree(tmp_path / "run" / "final")
    (tmp_path / "run" / "results.json").unlink()
    return tmp_path


def sorted_checkpoints(folder):
    return checkpoint.checkpoint_folders(folder / "run")


def sign(folder, name):
    """Update the manifest for a file that was changed."""
    manifest = json.loads((folder / "perforated.json").read_text())
    manifest["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "perforated.json").write_text(json.dumps(manifest))


# --------------------------------------------------------------------------------------------------- kills and signals


def test_run_killed_at_random_times_resumes_bitwise_equal(finished, tmp_path):
    kills.kill_and_resume(tmp_path, [1.5, 2.5, 1.0])
    assert kills.outcome(tmp_path) == kills.outcome(finished)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_a_checkpoint_and_names_the_command_to_resume(finished, tmp_path, number):
    process = kills.start(tmp_path, "--save_strategy", "no")
    log = tmp_path / "log.txt"
    deadline = time.monotonic() + 60
    while (not log.exists() or "evaluations without" not in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 128 + number
    assert "to resume: python" in log.read_text() and "--resume_from_checkpoint true" in log.read_text()
    assert len(sorted_checkpoints(tmp_path)) >= 1
    kills.run_to_end(tmp_path, *RESUME)
    assert kills.outcome(tmp_path) == kills.outcome(finished)


def test_second_ctrl_c_ends_at_once():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), StopSignalCallback():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


# Runs in this process with scores of a list: what is tested is the state between two evaluations.
SHAPES = {
    "between evaluations": ({"save_steps": 3}, {}, 5),
    "in the middle of an epoch": ({"eval_strategy": "epoch", "save_strategy": "epoch"}, {}, 14),
    "at the end of an epoch": ({"eval_strategy": "epoch", "save_strategy": "epoch"}, {}, 8),
    "with a dendrite": ({"save_steps": 3}, {}, 8),
    "in a retry": ({"save_steps": 3}, {}, 15),
    "at a restart": ({"save_steps": 2}, {}, 6),
    "smoothed": ({"save_steps": 3}, {"history_lookback": 3}, 7),
    "low rank": ({"save_steps": 3}, {"dendrite_rank": 2}, 11),
    "accumulated gradients": ({"save_steps": 3, "gradient_accumulation_steps": 2}, {}, 5),
    "schedule": ({"save_steps": 3, "lr_scheduler_type": "cosine", "max_steps": 60}, {}, 13),
    "initial dendrites": ({"save_steps": 3}, {"num_initial_dendrites": 1}, 5),
    "fixed cycles": ({"save_steps": 2, "max_steps": 5, "eval_steps": 5}, {"switch_mode": "fixed"}, 8),
    "fixed epochs": (
        {"eval_strategy": "epoch", "save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2},
        {"switch_mode": "fixed"},
        13,
    ),
}


def shaped(shape, folder, scores=TWO_DENDRITES):
    changes, dendrites, _ = SHAPES[shape]
    strategy = {"save_strategy": "steps", "logging_steps": 1}
    return scripted(scores, None, dendrites, **strategy | changes, output_dir=folder)[0]


def outcome(trainer):
    scores = [(entry["eval_score"], entry["eval_loss"]) for entry in trainer.state.log_history if "eval_loss" in entry]
    state = trainer.growth.state_dict()
    del state["scores"]  # with seconds
    weights = {name: value.tolist() for name, value in trainer.model.state_dict().items()}
    return losses(trainer), scores, trainer.restarts, trainer.state.global_step, state, weights


STOPPED = ["between evaluations", "in the middle of an epoch", "fixed cycles"]


@pytest.mark.parametrize(("shape", "how"), [*((s, "killed") for s in SHAPES), *((s, "stopped") for s in STOPPED)])
def test_run_that_ends_anywhere_resumes_bitwise_equal(shape, how, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = shaped(shape, "whole")
    whole.train()
    assert whole.restarts
    step = SHAPES[shape][2]
    if how == "killed":
        kill_at_step(step, lambda: shaped(shape, "run"))
    else:
        stopped = shaped(shape, "run")
        stopped.add_callback(SignalAt(step, signal.SIGTERM))
        with pytest.raises(PerforatedError, match=r"stopped at step \d+ .*train\(resume_from_checkpoint=True\)"):
            stopped.train()
    resumed = shaped(shape, "run")
    resumed.compute_metrics.scores = scores_left(TWO_DENDRITES, resumed)
    resumed.train(resume_from_checkpoint=True)
    assert outcome(resumed) == outcome(whole)


def whole_run(folder, resume=False):
    """Train, and write the results; two checkpoints are kept."""
    trainer, _ = scripted(TWO_DENDRITES, save_strategy="steps", save_steps=3, save_total_limit=2, output_dir=folder)
    if resume:
        trainer.compute_metrics.scores = scores_left(TWO_DENDRITES, trainer)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_results({"name": "texts"})


POINTS = {"in a checkpoint": 3, "before the manifest": 4, "making a dendrite": 12, "in a restart": 2}


@pytest.mark.parametrize("point", [*kill_at.FILES, *kill_at.CALLS])
def test_run_killed_at_a_named_point_resumes_bitwise_equal(point, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole_run("whole")
    killed(lambda: (kill_at.arm(point, POINTS.get(point, 1)), whole_run("run")))
    if point == "in a restart":  # a second kill, while the resumed run loads
        killed(lambda: (kill_at.arm(*kill_at.LOADING, 1), whole_run("run", resume=True)))
    whole_run("run", resume=True)
    assert kills.outcome(tmp_path) == kills.outcome(tmp_path, "whole")
    left = [[path.name for path in checkpoint.complete_checkpoints(Path(run))] for run in ("run", "whole")]
    assert left[0] == left[1] == ["checkpoint-15", "checkpoint-18"]


class Stream(IterableDataset):
    """The examples in order, `count` of them in each pass."""

    def __init__(self, count=20):
        self.count = count

    def __iter__(self):
        for number in range(self.count):
            yield EVAL[number % 8] | {"row": number}


class Watching(PerforatedTrainer):
    """Records the rows of each step."""

    def training_step(self, model, inputs, *args, **kwargs):
        self.rows = [*getattr(self, "rows", []), inputs.pop("row").tolist()]
        return super().training_step(model, inputs, *args, **kwargs)


def streamed(folder, count=20, scores=TWO_DENDRITES, **changes):
    changes = {"per_device_train_batch_size": 2, "max_steps": 30, "remove_unused_columns": False} | changes
    more = {"train_dataset": Stream(count)}
    dendrites = {"max_dendrites": 5}
    save = {"save_strategy": "steps", "save_steps": 3}
    return scripted(scores, None, dendrites, cls=Watching, more=more, output_dir=folder, **save | changes)[0]


@pytest.mark.parametrize(("count", "accumulated"), [(20, 1), (7, 1), (1000, 1), (20, 2), (7, 2)])
def test_rows_of_a_stream_continue_modulo_its_length(count, accumulated, tmp_path, monkeypatch):
    """With dendrite additions and a kill."""
    monkeypatch.chdir(tmp_path)
    changes = {"gradient_accumulation_steps": accumulated, "max_steps": 16}  # of 18 until the tracker ends it
    whole = streamed("whole", count, **changes)
    whole.train()
    assert whole.restarts
    flat = [row for batch in whole.rows for row in batch]
    assert flat == [number % count for number in range(len(flat))] and len(whole.rows) == 16 * accumulated
    kill_at_step(11, lambda: streamed("run", count, **changes))
    resumed = streamed("run", count, **changes)
    resumed.compute_metrics.scores = scores_left(TWO_DENDRITES, resumed)
    done = checkpoint.step_of(checkpoint.find(True, Path("run"), print))
    resumed.train(resume_from_checkpoint=True)
    assert resumed.rows == whole.rows[done * accumulated :]
    assert resumed.restarts == whole.restarts and losses(resumed) == losses(whole)


# ----------------------------------------------------------------------------------------------------------- resuming


def test_moved_run_folder_resumes(finished, begun, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.rmtree(begun / "run" / "perforatedai", ignore_errors=True)  # graphs, not part of a checkpoint
    (begun / "run").rename(elsewhere / "run")
    kills.run_to_end(elsewhere, *RESUME)
    assert kills.outcome(elsewhere) == kills.outcome(finished)
    assert re.search(
        r"resuming at step 2\d: \d dendrites?, best accuracy so far 0", (elsewhere / "log.txt").read_text()
    )


def test_resume_without_a_checkpoint_starts_from_the_beginning(script, small, tmp_path, capfd):
    assert script([*small, *RESUME, "--max_steps", "20"]) == 0
    assert "no complete checkpoint in run: starting from the beginning" in capfd.readouterr().out


def test_other_flags_are_named_on_resume(script, small, begun, capfd):
    flags = ["--seed", "7", "--learning_rate", "0.001", "--max_dendrites", "4", "--max_train_samples", "480"]
    assert script([*small, *RESUME, *flags, "--max_steps", "29"]) == 0
    output = capfd.readouterr().out
    for name in ("seed was 42", "learning_rate was 0.005", "max_dendrites was 2", "train_dataset was 500 examples"):
        assert f"warning: {name}" in output
    assert "warning: n_epochs" not in output and "warning: save" not in output


def test_checkpoint_of_another_run_resumes_in_its_own_folder_or_an_empty_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def make(folder, scores=TWO_DENDRITES):
        return scripted(scores, None, {"max_dendrites": 1}, save_strategy="steps", output_dir=folder)

    for folder in ("a", "b"):
        make(folder)[0].train()
    before = {path: path.read_bytes() for path in Path("b").rglob("*") if path.is_file()}
    with pytest.raises(PerforatedError, match="checkpoint of another run"):
        make("b")[0].train(resume_from_checkpoint="a/checkpoint-4")
    assert {path: path.read_bytes() for path in Path("b").rglob("*") if path.is_file()} == before
    for folder in ("a", "empty", "a/../a"):
        trainer, script = make(folder, TWO_DENDRITES[2:])
        trainer.train(resume_from_checkpoint="a/checkpoint-4")
        assert trainer.restarts == [6] and kept(trainer, script) == [0.3]


def test_finished_run_is_loaded_and_not_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    first, script = scripted(TWO_DENDRITES, save_strategy="steps")
    first.train()
    again, script = scripted(TWO_DENDRITES, save_strategy="steps")
    output = again.train(resume_from_checkpoint=True)
    assert again.stopped_by == "tracker" and script.seen == [] and output.global_step == 18
    assert 0 < output.training_loss == output.metrics["train_loss"] and output.metrics["train_runtime"] > 0
    assert outcome(again)[2:4] == outcome(first)[2:4] and again.num_dendrites == 2
    for name, value in first.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


# --------------------------------------------------------------------------------------------------------- bad files


def test_checkpoint_of_another_network_raises(script, small, begun, capfd, monkeypatch):
    import mnist_huggingface_perforatedai as module

    config = module.MnistCnnConfig
    monkeypatch.setattr(module, "MnistCnnConfig", lambda **kwargs: config(widths=(5, 8, 16), **kwargs))
    assert script([*small, *RESUME]) == 2
    assert "does not fit this network" in capfd.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_malicious_pickle_does_not_run(script, small, begun, capfd, name):
    class Malicious:
        def __reduce__(self):
            return Path.touch, (begun / "it-ran",)

    newest = sorted_checkpoints(begun)[-1]
    torch.save(Malicious(), newest / name)
    sign(newest, name)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(newest / name, weights_only=True)
    assert script([*small, *RESUME, "--max_steps", "30"]) == 2
    assert "is not plain data" in capfd.readouterr().err
    assert not (begun / "it-ran").exists()


FILES = "dendrite_state.json config.json model.safetensors best_model.safetensors optimizer.pt".split()
FILES += ["scheduler.pt", "rng_state.pth", "trainer_state.json", "perforated.json.unfinished"]


@pytest.mark.parametrize(("name", "code"), [*zip(FILES, itertools.cycle([errno.ENOSPC, errno.EACCES]), strict=False)])
def test_write_that_fails_raises_one_line_and_leaves_the_other_checkpoints(name, code, tmp_path, monkeypatch):
    """Each function that writes a file of a checkpoint raises, as the operating system would, in the second one."""
    monkeypatch.chdir(tmp_path)

    def failing(original, place):
        def write(*args, **kwargs):
            path, reading = str(args[place]), place == 0 and [*args, "r"][1][0] == "r"
            if "checkpoint-3" in path and not reading and (path.endswith(name) or name in str(pending)):
                raise OSError(code, "injected", path)
            return original(*args, **kwargs)

        return write

    pending, replacing = [], checkpoint.replacing

    def watched(path):
        pending[:] = [Path(path).name]  # it is written under another name first
        return replacing(path)

    monkeypatch.setattr(checkpoint, "replacing", watched)
    monkeypatch.setattr(builtins, "open", failing(open, 0))
    monkeypatch.setattr(io, "open", failing(io.open, 0))
    monkeypatch.setattr(torch, "save", failing(torch.save, 1))
    monkeypatch.setattr(safetensors.torch, "serialize_file", failing(safetensors.torch.serialize_file, 1))
    trainer, _ = scripted([0.1, 0.3, 0.2, 0.2, 0.2], save_strategy="steps", save_steps=1, max_steps=6, eval_steps=2)
    with pytest.raises(PerforatedError, match="injected") as caught:
        trainer.train()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert "run/checkpoint-3" in str(caught.value) and "Earlier checkpoints are complete" in str(caught.value)
    assert caught.value.exit_status == 1
    assert checkpoint.check(Path("run/checkpoint-2"))
    with pytest.raises(PerforatedError, match=r"unfinished|no such"):
        checkpoint.check(Path("run/checkpoint-3"))
    again, _ = scripted([0.3, 0.2, 0.2, 0.2], save_strategy="steps", save_steps=1, max_steps=6, eval_steps=2)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6 and checkpoint.check(Path("run/checkpoint-3"))


def test_run_resumed_with_more_steps_equals_the_longer_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ends = []
    for folder, turns in (("whole", [8]), ("halves", [4, 8])):
        for steps in turns:
            args = arguments(output_dir=folder, max_steps=steps, lr_scheduler_type="constant", logging_steps=1)
            trainer = trainer_for(args, dendrite_args=DendriteArguments(n_epochs_to_switch=9))
            trainer.train(resume_from_checkpoint=steps != turns[0])
        ends.append(losses(trainer))
    assert ends[0] == ends[1] and len(ends[0]) == 8
