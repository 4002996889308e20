"""Several processes without a GPU, and several machines: they train, or exit with one line before they write a file."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import kills
import pytest
import torch

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "mnist_huggingface_perforatedai.py"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.accelerator.is_available(), reason="is about machines without a GPU"),
]
PLAIN = """
from transformers import TrainingArguments
import mnist_huggingface_perforatedai as mnist
from perforated_trainer import DendriteArguments, PerforatedTrainer, run_script

def run(argv):
    args = TrainingArguments(
        output_dir="run", eval_strategy="steps", metric_for_best_model="accuracy", report_to="none"
    )
    model = mnist.MnistCnnForImageClassification(mnist.MnistCnnConfig())
    PerforatedTrainer(model=model, args=args, eval_dataset=[0], dendrite_args=DendriteArguments())
    raise AssertionError("this must not be reached")

raise SystemExit(run_script(run))
"""


@pytest.fixture
def start():
    """Start commands; those that are still running at the end of the test are killed."""
    started = []

    def start(command, folder, **environment):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"} | environment
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def torchrun(*command):
    return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *command]


def errors(text):
    """Error lines of this package. If a process fails, torch's launcher prints a traceback, too."""
    return [line for line in text.splitlines() if line.startswith("error: ")]


def test_script_with_two_processes_trains_on_gloo_without_a_flag(start, tmp_path):
    """Without `--use_cpu`, which the command line sets."""
    process = start(torchrun(SCRIPT, *kills.FLAGS, "--max_steps", "10"), tmp_path)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    assert out.count("final: ") == 1, "one run, not two"
    assert (tmp_path / "run" / "results.json").is_file()
    assert "Traceback" not in err and "process group" not in err


def test_trainer_with_two_processes_without_use_cpu_raises_before_it_writes(start, tmp_path):
    """The Trainer treats the processes as separate runs, which would race for one folder."""
    (tmp_path / "plain.py").write_text(PLAIN)
    process = start(torchrun("plain.py"), tmp_path)
    _, err = process.communicate(timeout=400)
    assert process.returncode != 0
    (line,) = errors(err)
    assert "use_cpu is needed" in line
    assert "must not be reached" not in err
    assert not (tmp_path / "run" / "run.json").exists() and not any(tmp_path.glob("run/*"))


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "over a run"])
def test_machines_without_a_shared_disk_exit_with_one_line_each(overwrite, tmp_path, finished):
    """They are simulated by two processes with different current folders, as output_dir is relative."""
    flags = [*kills.FLAGS, *(["--overwrite_run"] if overwrite else [])]
    if overwrite:
        shutil.copytree(finished / "run", tmp_path / "0" / "run")
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir(exist_ok=True)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    ranks = kills.start_ranks(tmp_path, SCRIPT, *flags, machines=True)
    codes, outputs = kills.statuses(ranks), [tmp_path / "0.txt", tmp_path / "1.txt"]
    texts = [output.read_text() for output in outputs]
    assert codes == [2, 2], texts
    for text in texts:
        (line,) = errors(text)
        assert "not the same folder for all processes" in line
        assert "Traceback" not in text
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path not in outputs}
    assert after == before, "the folder is free for the next try, or holds the run that it held"
