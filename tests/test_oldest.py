"""What must work with every transformers that is promised: the script, a restructure, resume, save, load.

Runs with the other tests on the pinned versions. `.ci/run` runs it once more on the oldest transformers, which
`tests/oldest.txt` names.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import kills
import pytest
import torch
from transformers import Trainer, TrainingArguments

import mnist_huggingface_perforatedai as mnist
from perforated_trainer import DendriteArguments, PerforatedTrainer

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder in which one small run has ended, with all its checkpoints."""
    folder = tmp_path_factory.mktemp("oldest")
    kills.run_to_end(folder, "--save_total_limit", "100")
    return folder


def results(folder):
    result = json.loads((folder / "run" / "results.json").read_text())
    return {key: value for key, value in result.items() if not key.startswith(("train_sec", "steps_per", "command"))}


def weights(folder):
    return [path.read_bytes() for path in sorted((folder / "run" / "final").glob("*.safetensors"))]


def test_a_run_adds_dendrites_and_says_little(run):
    result = results(run)
    assert result["stopped_by"] == "tracker" and [cycle["dendrites"] for cycle in result["cycles"]] == [0, 1, 2]
    log = (run / "log.txt").read_text()
    assert "0 -> 1 dendrite" in log and "1 -> 2 dendrites" in log
    for noise in ("Warning", "warning", "deprecated", "Traceback", "it/s", "shards"):
        assert noise not in log, log


def test_a_run_goes_on_from_a_named_checkpoint(run, tmp_path):
    """The checkpoint lies in the cycle with one dendrite, and holds an optimizer."""
    step = results(run)["cycles"][1]["global_step"] // 7 * 7
    shutil.copytree(run / "run", tmp_path / "run", ignore=shutil.ignore_patterns("final", "results.json"))
    kills.run_to_end(tmp_path, "--resume_from_checkpoint", f"run/checkpoint-{step}")
    assert results(tmp_path) == results(run)
    assert weights(tmp_path) == weights(run) and weights(run)


LOAD = """
import sys
sys.modules["perforatedai"] = None  # loading needs none
import torch
from transformers import AutoModelForImageClassification
import perforated_trainer

batch, again, *folders = sys.argv[1:]
batch = torch.load(batch)
for folder in folders:
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
    logits = model(batch["pixel_values"]).logits
    model.save_pretrained(again)
    same = AutoModelForImageClassification.from_pretrained(again, trust_remote_code=True).eval()
    assert torch.equal(same(batch["pixel_values"]).logits, logits)
    print(model.num_parameters(), float((logits.argmax(-1) == batch["labels"]).float().mean()))
"""


def test_the_model_loads_in_a_new_process(run, tmp_path):
    """From `final/` and from the last checkpoint, with the code that lies there and without perforatedai."""
    final = results(run)["final"]
    *_, test = mnist.load_data(mnist.DataArguments(max_eval_samples=200))
    torch.save(test.__getitems__(list(range(len(test)))), tmp_path / "batch.pt")
    last = max((run / "run").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    command = [sys.executable, "-c", LOAD, tmp_path / "batch.pt", tmp_path / "again", run / "run" / "final", last]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()[-2:]
    assert lines[0] == lines[1], "the tracker ended the run, so its last checkpoint holds the best model"
    parameters, accuracy = lines[0].split()
    assert int(parameters) == final["parameters"]
    assert float(accuracy) == pytest.approx(final["test_accuracy"], abs=1e-6)


class ForkedTrainer(Trainer):
    """What Perforated AI's fork of transformers has: one argument more."""

    def __init__(self, *args, using_perforatedai, **kwargs):
        super().__init__(*args, **kwargs)
        self.using_perforatedai = using_perforatedai


class ForkedPerforatedTrainer(PerforatedTrainer, ForkedTrainer):
    """`PerforatedTrainer` as it is with the fork."""


@pytest.mark.parametrize("trainer_class", [PerforatedTrainer, ForkedPerforatedTrainer])
def test_the_trainer_is_made(tmp_path, trainer_class):
    """The fork's own way of training, with `using_perforatedai`, stays off."""
    args = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        use_cpu=True,
        eval_strategy="steps",
        metric_for_best_model="accuracy",
        report_to="none",
    )
    model = mnist.MnistCnnForImageClassification(mnist.MnistCnnConfig())
    data = [{"pixel_values": [[[0.0]]], "labels": 0}]
    trainer = trainer_class(model=model, args=args, eval_dataset=data, dendrite_args=DendriteArguments())
    assert not getattr(trainer, "using_perforatedai", False)
