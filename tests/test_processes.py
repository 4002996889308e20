"""Several processes, mixed precision, and other flags of the Trainer through dendrite additions."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import kills
import pytest
import torch

ROOT = Path(__file__).parent.parent
RESUME = ["--resume_from_checkpoint", "true"]


def torchrun(folder, script, *flags):
    """Start `script` with torch's launcher on the CPU; output to log.txt."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    with open(folder / "log.txt", "a") as log:
        return subprocess.Popen(
            [*command, str(script), *flags], cwd=folder, stdout=log, stderr=log, env=environment, start_new_session=True
        )


FLAGS = [*kills.FLAGS, "--use_cpu", "--per_device_train_batch_size", "16"]


@pytest.fixture(scope="session")
def two(tmp_path_factory):
    """Folder of a complete small run of the script with two processes."""
    folder = tmp_path_factory.mktemp("two")
    assert torchrun(folder, ROOT / "tests" / "hashing.py", *FLAGS).wait(120) == 0, (folder / "log.txt").read_text()
    return folder


def test_two_processes_add_dendrites(two):
    result, _ = kills.outcome(two)
    assert result["stopped_by"] == "tracker" and [cycle["dendrites"] for cycle in result["cycles"]] == [0, 1, 2]


def test_one_process_prints_and_all_end_cleanly(two):
    log = (two / "log.txt").read_text()
    assert log.count("0 -> 1 dendrite,") == log.count("final: ") == log.count("cannot be reached") == 1
    lines = [line for line in log.splitlines() if "cannot be reached" not in line]
    noise = [line for line in lines if re.search("Warning|warning|Traceback|process group|NCCL", line)]
    assert not [line for line in noise if "torch/utils/_pytree.py" not in line], log


def test_parameters_are_equal_in_all_processes_at_every_step(two):
    hashes = [json.loads((two / f"hashes-{rank}.json").read_text()) for rank in (0, 1)]
    steps = kills.outcome(two)[0]["global_step"]
    assert hashes[0] == hashes[1]
    assert len(hashes[0]) == 1 + steps + steps // 5 + 1, "the start, each step and evaluation, and the end"


def test_two_processes_killed_with_a_dendrite_resume_bitwise_equal(two, tmp_path):
    script, log = ROOT / "mnist_huggingface_perforatedai.py", tmp_path / "log.txt"
    log.touch()
    ranks = kills.start_ranks(tmp_path, script, *FLAGS)
    deadline = time.monotonic() + 120
    while "0 -> 1 dendrite," not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    for rank in ranks:
        rank.kill()
    assert kills.statuses(ranks) == [-signal.SIGKILL] * 2
    assert kills.statuses(kills.start_ranks(tmp_path, script, *FLAGS, *RESUME)) == [0, 0], log.read_text()
    assert kills.outcome(tmp_path) == kills.outcome(two)


def test_process_that_dies_ends_the_other(tmp_path):
    process = torchrun(tmp_path, ROOT / "tests" / "hashing.py", *FLAGS, "--run_name", "rank 1 dies")
    assert process.wait(120) != 0


def test_signal_to_the_launcher_saves_a_checkpoint(tmp_path):
    process = torchrun(tmp_path, ROOT / "mnist_huggingface_perforatedai.py", *FLAGS, "--n_epochs_to_switch", "1000")
    deadline = time.monotonic() + 120
    while "evaluations without" not in (tmp_path / "log.txt").read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    process.wait(60)
    assert "with a checkpoint; to resume" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("samples", [101, 150])
def test_scores_do_not_depend_on_the_number_of_processes(tmp_path, samples):
    scores = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        script = ROOT / "tests" / "scores.py"
        ranks = kills.start_ranks(folder, script, str(samples), str(64 // processes), number=processes)
        assert kills.statuses(ranks) == [0] * processes, (folder / "log.txt").read_text()
        scores.append(json.loads((folder / "scores.json").read_text()))
    for name in ("eval_loss", "eval_accuracy"):
        assert scores[0][name] == pytest.approx(scores[1][name], abs=1e-5), name
    assert scores[0]["losses"] == pytest.approx(scores[1]["losses"], abs=1e-5)


@pytest.mark.parametrize(
    "flags",
    [
        "--gradient_accumulation_steps 2",
        "--bf16 --use_cpu",
        "--torch_compile",
        "--dataloader_num_workers 2",
        "--lr_scheduler_type linear --max_steps 90",
        "--eval_on_start",
        "--optim adafactor",
    ],
)
def test_flag_works_through_a_dendrite_addition(script, small, tmp_path, flags):
    assert script([*small, "--n_epochs_to_switch", "1", "--max_dendrites", "1", *flags.split()]) == 0
    result = json.loads((tmp_path / "run" / "results.json").read_text())
    assert 1 in [cycle["dendrites"] for cycle in result["cycles"]]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--fp16 --use_cpu", "--fp16 needs a GPU"),
        ("--activation_checkpointing", "does not support it"),
        ("--gradient_checkpointing", "does not support it"),
        ("--fsdp", "DistributedDataParallel"),
        ("--deepspeed x.json", "DistributedDataParallel"),
    ],
)
def test_flag_that_does_not_work_exits_with_one_line(script, small, capfd, flags, message):
    assert script([*small, *flags.split()]) == 2
    error = [line for line in capfd.readouterr().err.splitlines() if "cannot be reached" not in line]
    assert len(error) == 1 and message in error[0], error


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("flags", ["--bf16", "--fp16", "--torch_compile", ""])
def test_flag_works_on_a_gpu(script, small, tmp_path, flags):
    assert script([*small, *flags.split()]) == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text())["stopped_by"] == "tracker"
