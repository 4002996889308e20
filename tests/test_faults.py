"""What went wrong once: each of these faults was in a version of the trainer."""

import dataclasses
import errno
import json
import os
import pdb
import resource
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from models import build, rows
from small import DISTILBERT, arguments, trainer_for
from transformers import Trainer

from perforated_trainer import DendriteArguments, PerforatedError, PerforatedTrainer, checkpoint, perforate, run_script
from perforated_trainer.arguments import compared_settings

ROOT = Path(__file__).parent.parent
STILL = {"learning_rate": 1e-9}  # the score stays where it is: a dendrite comes with the third evaluation


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def python(code, *paths, **environment):
    """Run a program in a process of its own; returns its status, output and errors."""
    found = os.pathsep.join([*map(str, paths), str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"PYTHONPATH": found} | environment
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Data(list):
    """Examples that a user's own code reads, which `at` looks at: it gets the number of examples read so far."""

    def __init__(self, examples, at):
        super().__init__(examples)
        self.at, self.read = at, 0

    def __getitem__(self, index):
        self.read += 1
        self.at(self.read)
        return super().__getitem__(index)


# ---------------------------------------------------------------------------------------------- a user's code in a run


def test_breakpoint_reaches_the_users_debugger(monkeypatch, capsys):
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


@pytest.mark.slow
def test_printed_text_is_not_kept():
    """A forward pass that prints 2 MB a step: with all of it kept, 80 MB would be in memory after 40 steps."""
    code = """
import resource
from small import *

class Loud(PerforatedTrainer):
    def compute_loss(self, *args, **kwargs):
        print("x" * 2_000_000)
        return super().compute_loss(*args, **kwargs)

trainer = trainer_for(arguments(max_steps=4, save_strategy="no", eval_steps=4), Loud)
trainer.train()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
trainer.args.output_dir, trainer.args.max_steps, trainer._was_free = "second", 40, True
trainer.train()
print("grown by", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, "MB")
"""
    status, output, error = python(code)
    assert status == 0, error
    assert output.count("x") >= 88_000_000
    assert int(output.rpartition("grown by ")[2].split()[0]) < 30


@pytest.mark.parametrize("number", [1, 100])
def test_a_users_own_error_of_the_disk_stays_what_it_is(number):
    """The first example that is read, and one in the middle of the training."""

    def at(read):
        if read == number:
            raise FileNotFoundError(errno.ENOENT, "No such file", "picture_of_the_user.png")

    trainer = trainer_for(train_dataset=Data(rows(DISTILBERT)[:32], at), args=arguments(max_steps=40))
    with pytest.raises(FileNotFoundError, match="picture_of_the_user") as caught:
        run_script(lambda argv: trainer.train())
    assert [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)][-1] == "at"


def test_the_same_where_examples_are_looked_at_before_a_checkpoint():
    """The trainer looks at the first example of the data to evaluate, when a checkpoint is written."""

    class Once(list):
        def __getitem__(self, index):
            raise PermissionError(errno.EACCES, "Permission denied", "of_the_user.png")

    trainer = trainer_for(arguments(eval_strategy="epoch", max_steps=2, save_steps=1))
    trainer.test_dataset = Once(rows(DISTILBERT)[:8])
    with pytest.raises(PermissionError, match="of_the_user"):
        trainer.train()


@pytest.fixture
def full_disk():
    """A function `full_disk(size)`: from now on no file can be larger, so writing fails as on a full disk."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("size", [300_000, 100_000, 1000])
@pytest.mark.parametrize("resumed", [False, True])
def test_a_full_disk_is_one_line(size, resumed, full_disk, tmp_path, capsys):
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
    assert len(error) == 1 and "cannot be written" in error[0] and "Earlier checkpoints are still good" in error[0]
    full_disk(resource.RLIM_INFINITY)
    trainer = trainer_for(arguments(max_steps=4, **flags), train_dataset=data)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4 and checkpoint.check(first)
    assert not list((tmp_path / "run" / "perforatedai").glob("best_model.[0-9]*"))


# ------------------------------------------------------------------------------------------------------------- resuming


def named(first, second):
    """The settings that are named where a run with the arguments `second` goes on with one that had `first`."""
    before, now = (compared_settings(DendriteArguments(), arguments(**changes)) for changes in (first, second))
    return {name for name in before.keys() | now.keys() if before.get(name) != now.get(name)}


def test_the_length_of_a_run_is_named_where_the_schedule_ends_with_it():
    for schedule in ("linear", "cosine", "polynomial"):
        for change in ({"max_steps": 9}, {"num_train_epochs": 9}):
            kind = {"lr_scheduler_type": schedule}
            assert named(kind, kind | change) == set(change)
    for schedule in ("constant", "constant_with_warmup", "reduce_lr_on_plateau"):
        kind = {"lr_scheduler_type": schedule}
        assert not named(kind, kind | {"max_steps": 9, "num_train_epochs": 9})


def test_what_changes_the_training_is_named_and_what_reports_on_it_is_not():
    changes = {"learning_rate": 1.0, "per_device_train_batch_size": 3, "seed": 5, "eval_steps": 3, "weight_decay": 0.5}
    assert named({}, changes) == set(changes)
    reported = {"logging_steps": 3, "save_steps": 4, "save_total_limit": 1, "output_dir": "else", "disable_tqdm": True}
    assert not named({}, reported | {"logging_first_step": True, "save_strategy": "epoch", "run_name": "other"})


def test_other_settings_are_said_on_resume(capsys):
    trainer_for(arguments(max_steps=2)).train()
    capsys.readouterr()
    args = arguments(max_steps=4, logging_steps=1, save_steps=4)
    trainer_for(args, train_dataset=rows(DISTILBERT)[:30]).train(resume_from_checkpoint=True)
    lines = [line for line in capsys.readouterr().out.splitlines() if " was " in line]
    assert [line.split()[1] for line in lines] == ["max_steps", "train_dataset"]
    assert "2 in checkpoint-2 and is now 4" in lines[0] and "30 examples" in lines[1]


def test_a_checkpoint_of_the_first_format_is_refused(tmp_path):
    trainer_for(arguments(max_steps=2)).train()
    manifest = tmp_path / "run" / "checkpoint-2" / "perforated.json"
    old = json.loads(manifest.read_text())
    del old["format"]
    manifest.write_text(json.dumps(old))
    before = files(tmp_path / "run")
    for resume in (True, "run/checkpoint-2"):
        trainer = trainer_for(arguments(max_steps=4))
        with pytest.raises(PerforatedError, match=r"older version.*format 1") as caught:
            trainer.train(resume_from_checkpoint=resume)
        assert "\n" not in str(caught.value) and files(tmp_path / "run") == before


# ------------------------------------------------------------------------------------------------------- no dendrite


def warnings_of(output):
    return [line for line in output.splitlines() if line.startswith("warning:")]


@pytest.mark.parametrize("length", [{"max_steps": 4}, {"max_steps": -1, "num_train_epochs": 1, "eval_steps": 2}])
def test_too_few_evaluations_are_said_at_the_start_and_at_the_end(length, capsys):
    args = arguments(**STILL, save_strategy="no", **length)
    trainer = trainer_for(args, dendrite_args=DendriteArguments(n_epochs_to_switch=10))
    trainer.train()
    first, last = warnings_of(capsys.readouterr().out)
    assert "no dendrite can be added: 2 evaluations in all" in first and "10 needs 12" in first
    assert "ended without a single dendrite: 2 evaluations in all" in last and "--n_epochs_to_switch" in last


@pytest.mark.parametrize(("evaluations", "dendrites"), [(3, 0), (4, 1)])
def test_the_number_of_evaluations_that_is_needed(evaluations, dendrites, capsys):
    """`n_epochs_to_switch` 2 needs 4 evaluations: one less and it is said at the start, else a dendrite comes."""
    trainer = trainer_for(
        arguments(eval_steps=1, save_strategy="no", max_steps=evaluations, metric_for_best_model="same"),
        dendrite_args=DendriteArguments(n_epochs_to_switch=2),
        compute_metrics=lambda prediction: {"same": 0.5},
    )
    trainer.train()
    output = capsys.readouterr().out
    assert ("no dendrite can be added" in output) == (not dendrites)
    assert ("0 -> 1 dendrite" in output) == bool(dendrites)


def test_other_reasons_and_none(capsys):
    trainer_for(arguments(save_strategy="no", **STILL)).train()
    assert not warnings_of(capsys.readouterr().out), "a dendrite came"
    still = arguments(output_dir="second", save_strategy="no", **STILL)
    trainer_for(still, dendrite_args=DendriteArguments(doing_pai=False)).train()
    assert not warnings_of(capsys.readouterr().out), "none was asked for"


# ----------------------------------------------------------------------------------------------- what is on the screen


def test_the_paid_package_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "installed" / "perforatedbp").mkdir(parents=True)
    (tmp_path / "installed" / "perforatedbp" / "__init__.py").touch()
    code = """
from small import *
from perforated_trainer import perforate, run_script
print(run_script(lambda argv: trainer_for()))
print(run_script(lambda argv: perforate(build(DISTILBERT), DendriteArguments(), arguments())))
"""
    status, output, error = python(code, tmp_path / "installed")
    assert (status, output) == (0, "2\n2\n")
    assert error.count("\n") == error.count("error: the package perforatedbp is installed") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["installed"]


def test_a_run_of_the_plain_trainer_is_quiet():
    """No script around it that hides anything: what is on the screen is our own lines, and the list of layers."""
    code = """
from small import *
trainer = trainer_for(arguments(learning_rate=1e-9))
trainer.train()
trainer.save_model()
"""
    status, output, error = python(code)
    assert status == 0
    assert error == ""
    table, steps = output.split("\n0 ", 1)  # of what gets dendrites, and what the run then says
    assert "output_layer_norm" in table and "No dendrites: Embedding" in table
    for line in steps.splitlines()[1:]:
        assert line.startswith(("step ", "warning: ")) or line.split()[0].isdigit(), line


# -------------------------------------------------------------------------------- nothing goes that a run did not write


MINE = ["notes.txt", "final/notes.txt", "checkpoint-x/notes.txt", "checkpoint-7/model.bin", "perforatedai/notes.txt"]


def put(folder):
    for name in MINE:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("of the user")


def kept(folder):
    return [name for name in MINE if (folder / name).is_file() and (folder / name).read_text() == "of the user"]


def test_a_run_that_replaces_another_leaves_what_is_not_a_runs(tmp_path):
    run, flags = tmp_path / "run", DendriteArguments(n_epochs_to_switch=1, overwrite_run=True)
    trainer = trainer_for(arguments(max_steps=4))
    trainer.train()
    trainer.save_results({"name": "texts"})
    (run / "checkpoint-2" / "perforated.json").replace(run / "checkpoint-2" / "perforated.json.unfinished")
    (run / "checkpoint-9").mkdir()  # a run that was killed as it made this
    put(run)
    before = set(files(run))
    trainer = trainer_for(arguments(max_steps=2, save_steps=1), dendrite_args=flags)
    trainer.train()
    assert kept(run) == MINE
    assert {path.name for path in run.glob("checkpoint-*")} == {f"checkpoint-{name}" for name in "127x"}
    assert not (run / "results.json").exists() and not (run / "final" / "config.json").exists()
    trainer.save_results({"name": "texts"})
    trainer.save_results({"name": "texts"})
    assert kept(run) == MINE and {name for name in before if name.startswith("final/")} == {
        name for name in files(run) if name.startswith("final/")
    }


def test_a_checkpoint_is_not_written_over_a_folder_of_the_user(tmp_path):
    trainer = trainer_for(arguments(max_steps=4, save_steps=4))

    def at(number):
        (tmp_path / "run" / "checkpoint-4").mkdir(exist_ok=True)
        (tmp_path / "run" / "checkpoint-4" / "notes.txt").write_text("of the user")

    trainer.train_dataset = Data(rows(DISTILBERT)[:32], at)
    with pytest.raises(PerforatedError, match="checkpoint-4 was not written by a run: move it away"):
        trainer.train()
    assert files(tmp_path / "run" / "checkpoint-4") == {"notes.txt": b"of the user"}


def test_a_model_is_not_written_over_a_file_of_the_user(tmp_path):
    trainer = trainer_for(arguments(max_steps=2))
    trainer.train()
    (tmp_path / "run" / "final").mkdir()
    (tmp_path / "run" / "final" / "config.json").write_text("of the user")
    with pytest.raises(PerforatedError, match=r"final/config.json was not written by this run: move it away"):
        trainer.save_results({"name": "texts"})
    assert files(tmp_path / "run" / "final") == {"config.json": b"of the user"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_not_empty_is_refused(overwrite, tmp_path):
    (tmp_path / "run").mkdir()
    put(tmp_path / "run")
    before = files(tmp_path / "run")
    trainer = trainer_for(dendrite_args=DendriteArguments(overwrite_run=overwrite))
    with pytest.raises(PerforatedError, match="not empty and holds no run"):
        trainer.train()
    assert files(tmp_path / "run") == before


def test_a_run_whose_record_cannot_be_read_is_replaced_as_a_whole(tmp_path):
    trainer = trainer_for(arguments(max_steps=4))
    trainer.train()
    (tmp_path / "run" / "run.json").write_text("{")
    assert (tmp_path / "run" / "checkpoint-4").is_dir()
    trainer_for(arguments(max_steps=2), dendrite_args=DendriteArguments(overwrite_run=True)).train()
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]


def test_an_older_versions_model_is_not_deleted(tmp_path):
    trainer = trainer_for(arguments(max_steps=2))
    trainer.train()
    trainer.save_results({"name": "texts"})
    (tmp_path / "run" / "run.json").write_text('{"command": "python old.py"}')  # without the names of final's files
    trainer = trainer_for(dendrite_args=DendriteArguments(overwrite_run=True))
    before = files(tmp_path / "run")
    with pytest.raises(PerforatedError, match="final is not of this run, or of an older version's: move it away"):
        trainer.train()
    assert files(tmp_path / "run") == before


def test_the_stock_trainers_arguments_are_all_known_to_the_comparison():
    """A new argument of transformers is compared until someone says that it is harmless."""
    names = {field.name for field in dataclasses.fields(arguments())}
    compared = compared_settings(DendriteArguments(), arguments())
    assert {"learning_rate", "optim", "seed", "data_seed", "bf16", "max_grad_norm"} <= compared.keys() & names
    assert not {"push_to_hub", "hub_token", "logging_steps", "report_to", "output_dir"} & compared.keys()


def test_a_second_conversion_in_one_process_is_the_one_in_force():
    args = arguments(max_steps=2)
    perforate(build(DISTILBERT), DendriteArguments(), args)
    trainer = trainer_for(args)
    assert isinstance(trainer, Trainer) and trainer.tracker.model is trainer.model
    trainer.train()
