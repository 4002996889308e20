"""Tests for the oldest and the newest transformers: the script, dendrite additions, resume, save, load.

They run with the other tests on the pinned versions. `.ci/run` runs them again with the versions of `tests/oldest.txt`
and of `tests/newest.txt`.
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
from small import EVAL, TRAIN, TWO_DENDRITES, arguments, kept, scripted, trainer_for
from transformers import Trainer

import mnist_huggingface_perforatedai as mnist
from perforated_trainer import PerforatedTrainer

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder in which one small run has ended, with all its checkpoints."""
    folder = tmp_path_factory.mktemp("oldest")
    kills.run_to_end(folder, "--save_total_limit", "100")
    return folder


def results(folder):
    return json.loads((folder / "run" / "results.json").read_text())


def test_run_adds_dendrites_and_prints_no_warning(run):
    result = results(run)
    assert result["stopped_by"] == "tracker" and [cycle["dendrites"] for cycle in result["cycles"]] == [0, 1, 2]
    log = (run / "log.txt").read_text()
    assert "0 -> 1 dendrite" in log and "1 -> 2 dendrites" in log
    rest = log.replace("warning: ylecun/mnist cannot be reached", "")
    for noise in ("Warning", "warning", "deprecated", "Traceback", "it/s", "shards"):
        assert noise not in rest, log


def test_named_checkpoint_resumes_bitwise_equal(run, tmp_path):
    """The checkpoint has a dendrite and is between two evaluations."""
    first, second = results(run)["restarts"][:2]
    step = next(step for step in range(first + 1, second) if step % 7 == 0 and step % 5)
    shutil.copytree(run / "run", tmp_path / "run", ignore=shutil.ignore_patterns("final", "results.json"))
    kills.run_to_end(tmp_path, "--resume_from_checkpoint", f"run/checkpoint-{step}")
    assert kills.outcome(tmp_path) == kills.outcome(run)


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


def test_model_loads_in_a_new_process(run, tmp_path):
    """From `final/` and from the last checkpoint, with the code that is saved there and without perforatedai."""
    final = results(run)["final"]
    *_, test = mnist.load_data(mnist.DataArguments(max_eval_samples=200))
    torch.save(test.__getitems__(list(range(len(test)))), tmp_path / "batch.pt")
    last = max((run / "run").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    command = [sys.executable, "-c", LOAD, tmp_path / "batch.pt", tmp_path / "again", run / "run" / "final", last]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()[-2:]
    assert lines[0] == lines[1], "training was complete, so the last checkpoint holds the best model"
    parameters, accuracy = lines[0].split()
    assert int(parameters) == final["parameters"]
    assert float(accuracy) == pytest.approx(final["test_accuracy"], abs=1e-6)


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """A run of a model of transformers with a test set, an epoch schedule and two dendrites; its trainer and scores."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("small"))
        epochs = {"eval_strategy": "epoch", "save_strategy": "epoch"}
        trainer, script = scripted(TWO_DENDRITES, more={"test_dataset": EVAL[:4]}, **epochs)
        trainer.train()
        yield trainer, script


def test_model_of_transformers_is_trained_and_its_best_evaluation_kept(small_run):
    trainer, script = small_run
    assert trainer.num_dendrites == 2 and trainer.restarts == [12, 20, 28] and kept(trainer, script) == [0.4]


def test_model_of_transformers_saves_itself_and_loads_with_its_own_code(small_run, tmp_path):
    trainer, _ = small_run
    trainer.save_model(tmp_path / "trainer")
    trainer.model.save_pretrained(tmp_path / "model")
    loaded = [type(trainer.model).from_pretrained(tmp_path / name) for name in ("trainer", "model")]
    ids = torch.stack([row["input_ids"] for row in EVAL])
    logits = [model.eval()(input_ids=ids).logits for model in (trainer.model, *loaded)]
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


def test_fixed_cycles_and_a_stream_train(tmp_path, monkeypatch):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from TRAIN

    monkeypatch.chdir(tmp_path)
    for mode, steps in (("fixed", 10), ("history", 8)):
        changes = {"max_steps": 5 if mode == "fixed" else 8, "eval_steps": 5 if mode == "fixed" else 2}
        dendrites = {"switch_mode": mode, "max_dendrites": 1}
        more = {"train_dataset": Stream()}
        trainer, _ = scripted([0.1, 0.2, 0.2, 0.3], None, dendrites, more=more, output_dir=mode, **changes)
        trainer.train()
        assert trainer.state.global_step == steps and trainer.restarts


class ForkedTrainer(Trainer):
    """The additional argument of Perforated AI's fork of transformers."""

    def __init__(self, *args, using_perforatedai, **kwargs):
        super().__init__(*args, **kwargs)
        self.using_perforatedai = using_perforatedai


class ForkedPerforatedTrainer(PerforatedTrainer, ForkedTrainer):
    """`PerforatedTrainer` based on the Trainer of the fork."""


def test_fork_does_not_replace_the_training_of_this_package(tmp_path, monkeypatch):
    """`using_perforatedai`, the training with dendrites of the fork, stays off."""
    monkeypatch.chdir(tmp_path)
    trainer = trainer_for(arguments(max_steps=2), ForkedPerforatedTrainer)
    trainer.train()
    assert trainer.using_perforatedai is False and trainer.state.global_step == 2
