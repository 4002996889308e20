"""The search with Optuna: killed in the middle of a trial, resumed, and its errors."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import kills
import optuna
import pytest
from optuna.trial import TrialState

ROOT = Path(__file__).parent.parent
SWEEP = [sys.executable, str(ROOT / "examples" / "optuna_sweep.py")]
SMALL = kills.FLAGS[:-2]  # without the name of the run; n_epochs_to_switch is given, so it is not varied
VARIED = {
    "improvement_threshold",
    "dendrite_init_scale",
    "dendrite_activation",
    "dendrite_learning_rate_factor",
}

# A script that only writes what the sweep reads. Its loss equals its patience, and its first run fails.
SCRIPT = """
import json, sys
from pathlib import Path
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = Path(flags["--output_dir"])
if folder.name == "trial-0":
    sys.exit("more output\\nerror: the first run fails")
folder.mkdir()
better = flags["--greater_is_better"] == "True"
cycles = [{"best_validation": float(flags["--n_epochs_to_switch"]) + more} for more in (1, 0, 2)]
results = {"cycles": cycles, "greater_is_better": better, "final": {"dendrites": 2}}
(folder / "results.json").write_text(json.dumps(results))
"""


def call(folder, *flags):
    return subprocess.run([*SWEEP, *flags], cwd=folder, capture_output=True, text=True)


def study(folder):
    return optuna.load_study(study_name="sweep", storage=f"sqlite:///{folder}/sweep/study.db")


def test_sweep_that_is_killed_continues(tmp_path):
    command = [str(ROOT / "mnist_huggingface_perforatedai.py"), "--num_trials", "2", "--", *SMALL]
    killed = subprocess.Popen([*SWEEP, *command], cwd=tmp_path, start_new_session=True)
    while not list(tmp_path.glob("sweep/trial-1/checkpoint-*/perforated.json")):
        assert killed.poll() is None
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    before = study(tmp_path).trials
    assert [trial.state for trial in before] == [TrialState.COMPLETE, TrialState.RUNNING]
    done = call(tmp_path, *command)
    assert done.returncode == 0, done.stderr
    after = study(tmp_path)
    assert [trial.state for trial in after.trials] == 2 * [TrialState.COMPLETE]
    assert [trial.params for trial in after.trials] == [trial.params for trial in before]
    assert after.trials[1].params.keys() == VARIED and before[0] == after.trials[0]
    log = (tmp_path / "sweep" / "trial-1.log").read_text()
    assert log.count("starting from the beginning") == log.count("resuming at step") == 1
    assert f"accuracy so far {after.trials[1].value:.4f}" in log or f"  {after.trials[1].value:.4f}  " in log
    lines = done.stdout.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        f"trial 1: accuracy {after.trials[1].value:.4f}",
        f"best: trial {after.best_trial.number}",
    ]


def test_trial_that_fails_does_not_end_the_sweep(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    first = call(tmp_path, "script.py", "--num_trials", "1", "--metric", "loss")
    assert first.returncode == 2 and first.stderr == "error: all trials failed; see sweep/trial-*.log\n"
    assert first.stdout.startswith("trial 0: failed") and first.stdout.endswith("; error: the first run fails\n")
    done = call(tmp_path, "script.py", "--num_trials", "4", "--metric", "loss")
    assert done.returncode == 0 and [line[:9] for line in done.stdout.splitlines()[:-1]] == [
        f"trial {number}: " for number in (1, 2, 3)
    ]
    failed, *complete = study(tmp_path).trials
    assert failed.state is TrialState.FAIL and study(tmp_path).direction.name == "MINIMIZE"
    assert [trial.value for trial in complete] == [trial.params["n_epochs_to_switch"] for trial in complete]
    assert f"loss {min(trial.value for trial in complete):.4f}" in done.stdout.splitlines()[-1]
    # another metric, other flags: another sweep
    for flags in (["--metric", "accuracy"], ["--metric", "loss", "--", "--seed", "2"]):
        refused = call(tmp_path, "script.py", "--num_trials", "5", *flags)
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1
        assert "sweep holds another sweep" in refused.stderr
    with open(tmp_path / "sweep" / "sweep.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused = call(tmp_path, "script.py", "--num_trials", "5", "--metric", "loss")
    assert refused.returncode == 2 and "still running" in refused.stderr
    assert len(study(tmp_path).trials) == 4


def test_trial_that_is_stopped_stops_the_sweep(tmp_path):
    """A trial that receives SIGTERM saves a checkpoint and is not recorded as failed."""
    (tmp_path / "script.py").write_text("raise SystemExit(143)")
    done = call(tmp_path, "script.py")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped; rerun the same command to resume\n")
    assert [trial.state for trial in study(tmp_path).trials] == [TrialState.RUNNING]


def foreign_study(folder):
    folder.mkdir()
    optuna.create_study(study_name="sweep", storage=f"sqlite:///{folder}/study.db")


def study_made_by_hand(folder):
    foreign_study(folder)
    (folder / "sweep.lock").touch()
    optuna.load_study(study_name="sweep", storage=f"sqlite:///{folder}/study.db").ask()


def damaged_file(folder):
    folder.mkdir()
    (folder / "sweep.lock").touch()
    (folder / "study.db").write_text("no data base")


@pytest.mark.parametrize(
    ("before", "flags", "message"),
    [
        (foreign_study, ["script.py"], "holds no sweep"),
        (study_made_by_hand, ["script.py"], "holds another sweep"),
        (damaged_file, ["script.py"], "cannot be read by Optuna"),
        (Path.touch, ["script.py"], "holds no sweep"),
        (Path.mkdir, ["script.py", "--sweep_dir", "script.py/sweep"], "Not a directory"),
        (None, ["missing.py"], "missing.py: no such script"),
        (None, [], "required: script"),
        (None, ["script.py", "--num_trials", "0"], "at least 1"),
        (None, ["script.py", "--num_trials", "many"], "invalid int"),
    ],
)
def test_bad_input_exits_with_one_line(tmp_path, before, flags, message):
    (tmp_path / "script.py").write_text(SCRIPT)
    if before:
        before(tmp_path / "sweep")
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    done = call(tmp_path, *flags)
    assert done.returncode == 2 and done.stdout == "" and message in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


def test_without_optuna_exits_with_one_line(tmp_path):
    """The interpreter is started without site-packages."""
    done = subprocess.run([sys.executable, "-S", *SWEEP[1:], "script.py"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: Optuna is missing: pip install optuna\n")
