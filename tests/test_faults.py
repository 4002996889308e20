"""Regression tests: each of these faults was in a version of the trainer."""

import dataclasses
import errno
import os
import pdb
import resource
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from models import rows
from small import DISTILBERT, arguments, trainer_for

from perforated_trainer import DendriteArguments, PerforatedTrainer, checkpoint, run_script
from perforated_trainer.arguments import compared_settings

ROOT = Path(__file__).parent.parent
STILL = {"learning_rate": 1e-9}  # the score is constant: the third evaluation adds a dendrite


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def python(code, *paths, **environment):
    """Run a program in a separate process; returns its status, output and errors."""
    found = os.pathsep.join([*map(str, paths), str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"PYTHONPATH": found} | environment
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Data(list):
    """Examples read by user code, which calls `at` with the number of examples read so far."""

    def __init__(self, examples, at):
        super().__init__(examples)
        self.at, self.read = at, 0

    def __getitem__(self, index):
        self.read += 1
        self.at(self.read)
        return super().__getitem__(index)


# ---------------------------------------------------------------------------------------------- a user's code in a run


def test_breakpoint_in_user_code_reaches_the_debugger_of_the_user(monkeypatch, capsys):
    stopped, original = [], pdb.set_trace
    monkeypatch.setattr(sys, "breakpointhook", lambda *args, **kwargs: stopped.append(pdb.set_trace))

    def at(number):
        print(f"example {number} is read")
        breakpoint()

    class Mine(PerforatedTrainer):
        def compute_loss(self, *args, **kwargs):
            print("a loss is computed")
            breakpoint()
            return super().compute_loss(*args, **kwargs)

    def scores(prediction):
        print("a score is computed")
        breakpoint()
        return {}

    data = Data(rows(DISTILBERT)[:8], at)
    trainer = trainer_for(arguments(max_steps=6, **STILL), Mine, train_dataset=data, compute_metrics=scores)
    trainer.train()
    output = capsys.readouterr().out
    words = ["is read", "a loss is computed", "a score is computed"]
    counts = [output.count(word) for word in words]
    assert min(counts) > 2 and sum(counts) == len(stopped)
    assert all(debugger is original for debugger in stopped), "pdb is the user's"


@pytest.mark.parametrize("number", [1, 100])
def test_disk_error_of_user_code_is_raised_unchanged(number):
    """The first example that is read, and one in the middle of the training."""

    def at(read):
        if read == number:
            raise FileNotFoundError(errno.ENOENT, "No such file", "picture_of_the_user.png")

    trainer = trainer_for(train_dataset=Data(rows(DISTILBERT)[:32], at), args=arguments(max_steps=40))
    with pytest.raises(FileNotFoundError, match="picture_of_the_user") as caught:
        run_script(lambda argv: trainer.train())
    assert [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)][-1] == "at"


def test_disk_error_of_test_data_is_raised_unchanged():
    """The trainer reads the first example of the evaluation data when a checkpoint is written."""

    class Once(list):
        def __getitem__(self, index):
            raise PermissionError(errno.EACCES, "Permission denied", "of_the_user.png")

    trainer = trainer_for(arguments(eval_strategy="epoch", max_steps=2, save_steps=1))
    trainer.test_dataset = Once(rows(DISTILBERT)[:8])
    with pytest.raises(PermissionError, match="of_the_user"):
        trainer.train()


@pytest.fixture
def full_disk():
    """A function `full_disk(size)` that limits the size of files, so that writing fails as on a full disk."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("size", [300_000, 100_000, 1000])
@pytest.mark.parametrize("resumed", [False, True])
def test_full_disk_raises_one_line_and_the_run_resumes(size, resumed, full_disk, tmp_path, capsys):
    """The optimizer does not fit, then the model does not, then nothing does."""
    flags, first = {"lr_scheduler_type": "constant"}, tmp_path / "run" / "checkpoint-2"

    def at(number):
        if (first / "perforated.json").is_file():
            full_disk(size)

    data = rows(DISTILBERT)[:32]
    if resumed:
        trainer_for(arguments(max_steps=2, **flags), train_dataset=data).train()
    trainer = trainer_for(arguments(**flags), train_dataset=data if resumed else Data(data, at))
    if resumed:
        full_disk(size)
    capsys.readouterr()
    assert run_script(lambda argv: trainer.train(resume_from_checkpoint=resumed)) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and "cannot be written" in error[0] and "Earlier checkpoints are complete" in error[0]
    full_disk(resource.RLIM_INFINITY)
    trainer = trainer_for(arguments(max_steps=4, **flags), train_dataset=data)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4 and checkpoint.check(first)


# ------------------------------------------------------------------------------------------------------------- resuming


def named(first, second):
    """The settings that are listed if a run with the arguments `first` is resumed with `second`."""
    before, now = (compared_settings(DendriteArguments(), arguments(**changes)) for changes in (first, second))
    return {name for name in before.keys() | now.keys() if before.get(name) != now.get(name)}


def test_length_of_a_run_is_compared_if_the_schedule_ends_with_it():
    for schedule in ("linear", "cosine", "polynomial"):
        for change in ({"max_steps": 9}, {"num_train_epochs": 9}):
            kind = {"lr_scheduler_type": schedule}
            assert named(kind, kind | change) == set(change)
    for schedule in ("constant", "constant_with_warmup", "reduce_lr_on_plateau"):
        kind = {"lr_scheduler_type": schedule}
        assert not named(kind, kind | {"max_steps": 9, "num_train_epochs": 9})


def test_settings_of_the_training_are_compared_and_those_of_reports_are_not():
    changes = {"learning_rate": 1.0, "per_device_train_batch_size": 3, "seed": 5, "eval_steps": 3, "weight_decay": 0.5}
    assert named({}, changes) == set(changes)
    reported = {"logging_steps": 3, "save_steps": 4, "save_total_limit": 1, "output_dir": "else", "disable_tqdm": True}
    assert not named({}, reported | {"logging_first_step": True, "save_strategy": "epoch", "run_name": "other"})


def test_other_settings_are_named_on_resume(capsys):
    trainer_for(arguments(max_steps=2)).train()
    capsys.readouterr()
    args = arguments(max_steps=4, logging_steps=1, save_steps=4)
    trainer_for(args, train_dataset=rows(DISTILBERT)[:30]).train(resume_from_checkpoint=True)
    lines = [line for line in capsys.readouterr().out.splitlines() if " was " in line]
    assert [line.split()[1] for line in lines] == ["max_steps", "train_dataset"]
    assert "2 in checkpoint-2 and is now 4" in lines[0] and "30 examples" in lines[1]


# ------------------------------------------------------------------------------------------------------- no dendrite


def warnings_of(output):
    return [line for line in output.splitlines() if line.startswith("warning:")]


@pytest.mark.parametrize("length", [{"max_steps": 4}, {"max_steps": -1, "num_train_epochs": 1, "eval_steps": 2}])
def test_too_few_evaluations_are_a_warning_at_the_start_and_at_the_end(length, capsys):
    args = arguments(**STILL, save_strategy="no", **length)
    trainer = trainer_for(args, dendrite_args=DendriteArguments(n_epochs_to_switch=10))
    trainer.train()
    first, last = warnings_of(capsys.readouterr().out)
    assert "no dendrite can be trained: this run has 2 evaluations" in first and "n_epochs_to_switch=10 needs" in first
    assert "added no dendrite: it had 2 evaluations" in last and "n_epochs_to_switch" in last


@pytest.mark.parametrize(("evaluations", "dendrites"), [(2, 0), (4, 1)])
def test_warning_at_the_start_means_that_no_dendrite_comes(evaluations, dendrites, capsys):
    """With n_epochs_to_switch 2, the first evaluation and two that are not better."""
    trainer = trainer_for(
        arguments(eval_steps=1, save_strategy="no", max_steps=evaluations, metric_for_best_model="same"),
        dendrite_args=DendriteArguments(n_epochs_to_switch=2),
        compute_metrics=lambda prediction: {"same": 0.5},
    )
    trainer.train()
    output = capsys.readouterr().out
    assert ("no dendrite can be trained" in output) == (not dendrites)
    assert ("0 -> 1 dendrite" in output) == bool(dendrites)


def test_run_with_a_dendrite_or_without_doing_pai_has_no_warning(capsys):
    trainer_for(arguments(save_strategy="no", **STILL)).train()
    assert not warnings_of(capsys.readouterr().out), "a dendrite came"
    still = arguments(output_dir="second", save_strategy="no", **STILL)
    trainer_for(still, dendrite_args=DendriteArguments(doing_pai=False)).train()
    assert not warnings_of(capsys.readouterr().out), "none was asked for"


# ------------------------------------------------------------------------------------------------- what is printed


def test_perforatedbp_raises_before_anything_is_written(tmp_path):
    (tmp_path / "installed" / "perforatedbp").mkdir(parents=True)
    (tmp_path / "installed" / "perforatedbp" / "__init__.py").touch()
    code = """
from small import *
from perforated_trainer import run_script
print(run_script(lambda argv: trainer_for()))
"""
    status, output, error = python(code, tmp_path / "installed")
    assert (status, output) == (0, "2\n") and error.count("error: the package perforatedbp is installed") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["installed"]


def test_run_of_a_plain_script_prints_lines_of_the_trainer_only():
    """Nothing is hidden by `run_script`: what is printed is the lines of the trainer, and the table of layers."""
    code = """
from small import *
trainer = trainer_for(arguments(learning_rate=1e-9))
trainer.train()
trainer.save_model()
"""
    status, output, error = python(code)
    assert status == 0, error
    assert [line for line in error.splitlines() if "torch/utils/_pytree.py" not in line] == [], (
        "that one is torch's own"
    )
    first, rest = output.split("\nDendrites for", 1)
    table, steps = rest.split("\n0 ", 1)  # of what gets dendrites, and what the run then says
    assert "output_layer_norm" in table and first.endswith(
        "eval_loss: lower is better\nexamples: 32 train, 8 validation"
    )
    for line in steps.splitlines()[1:]:
        assert line.startswith(("step ", "warning: ", "note: ")) or line.split()[0].isdigit(), line


def test_new_argument_of_transformers_is_compared():
    """A new argument of transformers is compared until it is added to the list of harmless ones."""
    names = {field.name for field in dataclasses.fields(arguments())}
    compared = compared_settings(DendriteArguments(), arguments())
    assert {"learning_rate", "optim", "seed", "data_seed", "bf16", "max_grad_norm"} <= compared.keys() & names
    assert not {"push_to_hub", "hub_token", "logging_steps", "report_to", "output_dir"} & compared.keys()
