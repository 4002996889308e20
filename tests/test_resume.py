"""A run survives kills, signals, full disks and damaged checkpoints, and ends as if nothing had happened."""

import builtins
import errno
import functools
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

RESUME = ["--resume_from_checkpoint", "true"]


@pytest.fixture
def begun(finished, tmp_path):
    """A copy of the finished run, cut back to what a kill after its fourth checkpoint leaves."""
    shutil.copytree(finished / "run", tmp_path / "run")
    for path in sorted_checkpoints(tmp_path)[4:]:
        shutil.rmtree(path)
    shutil.rmtree(tmp_path / "run" / "final")
    (tmp_path / "run" / "results.json").unlink()
    return tmp_path


def sorted_checkpoints(folder):
    return sorted((folder / "run").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def sign(checkpoint, name):
    """Make the manifest agree with a file that was changed."""
    manifest = json.loads((checkpoint / "perforated.json").read_text())
    manifest["files"][name] = hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()
    (checkpoint / "perforated.json").write_text(json.dumps(manifest))


# --------------------------------------------------------------------------------------------------- kills and signals


@pytest.mark.parametrize("point", [*kill_at.FILES, *kill_at.CALLS])
def test_killed_at_a_named_point(finished, tmp_path, point):
    count = 3 if "checkpoint" in point or "manifest" in point else 1
    process = kills.start(tmp_path, "--save_total_limit", "2", before=functools.partial(kill_at.arm, point, count))
    process.join()
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "log.txt").read_text()
    kills.run_to_end(tmp_path, *RESUME)
    assert kills.outcome(tmp_path) == kills.outcome(finished)


def test_killed_at_random_times(finished, tmp_path):
    kills.kill_and_resume(tmp_path, [3.0, 4.0, 2.0])
    assert kills.outcome(tmp_path) == kills.outcome(finished)


def test_resumed_while_a_dendrite_is_tried_anew(tmp_path):
    """One that did not help is given another start; a run may end in the middle of that."""
    flags = "--improvement_threshold 0.2 --n_epochs_to_switch 3 --save_steps 5".split()
    for name, turns in {"whole": [[]], "halves": [["--max_steps", "75"], RESUME]}.items():
        (tmp_path / name).mkdir()
        for turn in turns:
            kills.run_to_end(tmp_path / name, *flags, *turn)
    tried = re.search(r"step (\d+): dendrite 1 did not help", (tmp_path / "halves" / "log.txt").read_text())
    results = kills.outcome(tmp_path / "whole")
    assert int(tried[1]) < 75 < results[0]["global_step"]
    assert kills.outcome(tmp_path / "halves") == results


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_a_checkpoint_first(finished, tmp_path, number):
    process = kills.start(tmp_path, "--save_strategy", "no")
    log = tmp_path / "log.txt"
    deadline = time.monotonic() + 60
    while (not log.exists() or "evaluations without" not in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 128 + number
    assert "to go on: python" in log.read_text() and "--resume_from_checkpoint true" in log.read_text()
    assert len(sorted_checkpoints(tmp_path)) >= 1
    kills.run_to_end(tmp_path, *RESUME)
    assert kills.outcome(tmp_path) == kills.outcome(finished)


def test_a_second_ctrl_c_ends_at_once():
    from perforated_trainer.callbacks import StopSignalCallback

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), StopSignalCallback():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


# ----------------------------------------------------------------------------------------------------------- resuming


def test_the_run_folder_can_be_moved(finished, begun, tmp_path, script):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.rmtree(begun / "run" / "perforatedai")  # the library's own files are not part of a checkpoint
    (begun / "run").rename(elsewhere / "run")
    kills.run_to_end(elsewhere, *RESUME)
    assert kills.outcome(elsewhere) == kills.outcome(finished)


def test_resume_without_a_checkpoint_starts_from_the_beginning(script, small, tmp_path, capfd):
    assert script([*small, *RESUME, "--max_steps", "20"]) == 0
    assert "no complete checkpoint in run: starting from the beginning" in capfd.readouterr().out


def test_other_flags_are_named(script, small, begun, capfd):
    flags = ["--seed", "7", "--learning_rate", "0.001", "--max_dendrites", "4", "--validation_split", "0.2"]
    assert script([*small, *RESUME, *flags, "--max_steps", "35"]) == 0
    output = capfd.readouterr().out
    for name in ("seed was 42", "learning_rate was 0.005", "max_dendrites was 2", "train_dataset was 500 examples"):
        assert f"warning: {name}" in output
    assert "warning: n_epochs" not in output and "warning: save" not in output


def test_save_total_limit_keeps_the_last(script, small, begun):
    assert script([*small, *RESUME, "--save_total_limit", "2", "--max_steps", "36"]) == 0
    assert [path.name for path in sorted_checkpoints(begun)] == ["checkpoint-35", "checkpoint-36"]


# --------------------------------------------------------------------------------------------------------- bad files


@pytest.mark.parametrize("name", ["training.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"])
def test_a_damaged_checkpoint_is_refused_or_skipped(script, small, begun, capfd, name):
    newest = sorted_checkpoints(begun)[-1]
    content = bytearray((newest / name).read_bytes())
    content[len(content) // 2] ^= 1
    (newest / name).write_bytes(content)
    assert script([*small, "--resume_from_checkpoint", f"run/{newest.name}"]) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert "is damaged" in error and name in error
    assert script([*small, *RESUME, "--max_steps", "30"]) == 0
    assert f"skipped: run/{newest.name} is damaged" in capfd.readouterr().out


def test_an_unfinished_or_foreign_checkpoint_is_refused(script, small, begun, tmp_path, capfd):
    newest = sorted_checkpoints(begun)[-1]
    (newest / "perforated.json").rename(newest / "perforated.json.unfinished")
    assert script([*small, "--resume_from_checkpoint", f"run/{newest.name}"]) == 2
    assert "is unfinished, or no checkpoint of a run with dendrites" in capfd.readouterr().err
    assert script([*small, *RESUME, "--max_steps", "30"]) == 0
    assert f"skipped: run/{newest.name} is unfinished" in capfd.readouterr().out


def test_a_checkpoint_of_another_network_is_refused(script, small, begun, capfd, monkeypatch):
    import mnist_huggingface_perforatedai as module

    config = module.MnistCnnConfig
    monkeypatch.setattr(module, "MnistCnnConfig", lambda **kwargs: config(widths=(5, 8, 16), **kwargs))
    assert script([*small, *RESUME]) == 2
    assert "does not fit this network" in capfd.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_malicious_pickle_does_not_run(script, small, begun, capfd, name):
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


FILES = "training.pt best_model.safetensors config.json model.safetensors optimizer.pt".split()
FILES += ["scheduler.pt", "rng_state.pth", "trainer_state.json", "perforated.json.unfinished"]


@pytest.mark.parametrize(("name", "code"), [*zip(FILES, itertools.cycle([errno.ENOSPC, errno.EACCES]), strict=False)])
def test_a_write_that_fails(script, small, begun, capfd, monkeypatch, name, code):
    """Every way in which a checkpoint is written raises, as the operating system would, for one file of the next."""

    def failing(original, place):
        def write(*args, **kwargs):
            path, reading = str(args[place]), place == 0 and [*args, "r"][1][0] == "r"
            if path.endswith(name) and "checkpoint-" in path and not reading:
                raise OSError(code, "injected", path)
            return original(*args, **kwargs)

        return write

    before = sorted_checkpoints(begun)
    monkeypatch.setattr(builtins, "open", failing(open, 0))
    monkeypatch.setattr(io, "open", failing(io.open, 0))
    monkeypatch.setattr(torch, "save", failing(torch.save, 1))
    monkeypatch.setattr(safetensors.torch, "serialize_file", failing(safetensors.torch.serialize_file, 1))
    assert script([*small, *RESUME]) == 1
    monkeypatch.undo()
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert "injected" in error and name in error and "still good" in error
    from perforated_trainer import PerforatedError
    from perforated_trainer.checkpoint import check

    assert check(before[-1])
    for folder in set(sorted_checkpoints(begun)) - set(before):
        with pytest.raises(PerforatedError, match="unfinished"):
            check(folder)


def test_after_a_write_failed_the_run_goes_on_as_if_it_had_not(finished, begun, small, script):
    unfinished = begun / "run" / "checkpoint-35"
    unfinished.mkdir()
    (unfinished / "perforated.json.unfinished").touch()
    (unfinished / "training.safetensors").write_bytes(b"half")
    kills.run_to_end(begun, *RESUME)
    assert kills.outcome(begun) == kills.outcome(finished)
