"""Search dendrite settings with Optuna, for any script that accepts the flags of this package.

    pip install optuna
    python examples/optuna_sweep.py mnist_huggingface_perforatedai.py --num_trials 20 -- --seed 1

Flags after -- are passed to the script. Each trial runs in a separate process and run folder, `sweep/trial-0` and so
on. Its value is the best validation score in the `results.json` that `trainer.save_results` writes. The study is stored
in `sweep/study.db`. To resume a sweep that was stopped, even in the middle of a trial, rerun the same command. A trial
that fails is printed and recorded as failed.

`search_space` returns the settings and their ranges. A setting that is passed after -- is not varied.
"""

import argparse
import fcntl
import json
import signal
import subprocess
import sys
from pathlib import Path

try:
    import optuna
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
    from optuna.trial import TrialState
except ImportError:
    optuna = None


def search_space() -> dict:
    """A distribution for each flag that is searched."""
    return {
        "improvement_threshold": FloatDistribution(1e-5, 1e-2, log=True),
        "dendrite_init_scale": FloatDistribution(0.01, 0.3, log=True),
        "dendrite_activation": CategoricalDistribution(["sigmoid", "tanh", "relu"]),
        "n_epochs_to_switch": IntDistribution(2, 10),
        "dendrite_learning_rate_factor": FloatDistribution(0.1, 1.0, log=True),
    }


class SweepError(Exception):
    """An error that the user can fix. The message is one line."""


def lock_folder(folder: Path):
    """Create the folder of a sweep and lock it.

    Args:
        folder (`Path`): Folder of the sweep.

    Returns:
        `TextIO`: The open lock file.

    Raises:
        SweepError: If the folder contains something else, or a sweep that is running.
    """
    file = folder / "sweep.lock"
    if folder.exists() and not file.is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise SweepError(f"{folder} exists and holds no sweep: choose another --sweep_dir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(file, "w")  # noqa: SIM115, held until the process ends
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SweepError(f"the sweep in {folder}, or its last trial, is still running") from None
    except OSError as error:
        raise SweepError(f"--sweep_dir: {error}") from error
    return lock


def open_study(file: Path, facts: dict):
    """Open the study in a file. Creates it if it does not exist.

    Args:
        file (`Path`): SQLite database of the study.
        facts (`dict`): Settings that all trials share, including the direction.

    Returns:
        `optuna.Study`: The study.

    Raises:
        SweepError: If the file cannot be read, or if its study has other settings.
    """
    try:
        storage = optuna.storages.RDBStorage(f"sqlite:///{file}")
    except Exception as error:
        raise SweepError(f"{file} cannot be read by Optuna: {str(error).splitlines()[0]}") from error
    study = optuna.create_study(storage=storage, study_name="sweep", direction=facts["direction"], load_if_exists=True)
    if not study.user_attrs and not study.trials:
        study.set_user_attr("facts", facts)
    then = study.user_attrs.get("facts", {})
    for name in facts:
        if facts[name] != then.get(name):
            there = f"{name} {then.get(name)} there, {facts[name]} here"
            raise SweepError(f"{file.parent} holds another sweep ({there}): choose another --sweep_dir")
    return study


def next_trial(study, space: dict) -> tuple[int, dict]:
    """Return number and settings of the next trial: one that was interrupted, or a new one."""
    for trial in study.get_trials(states=[TrialState.RUNNING]):
        if trial.params.keys() == space.keys():
            return trial.number, trial.params
        study.tell(trial.number, state=TrialState.FAIL)  # interrupted before all settings were drawn
    # One seed per trial: a resumed sweep draws the same settings.
    study.sampler = optuna.samplers.TPESampler(seed=len(study.trials))
    trial = study.ask(space)
    return trial.number, trial.params


def run_trial(command: list[str], folder: Path, lock) -> tuple[float | None, str]:
    """Run one trial in a separate process.

    Args:
        command (`list[str]`): Command of the script, without the folder.
        folder (`Path`): Run folder of the trial.
        lock (`TextIO`): Lock file of the sweep.

    Returns:
        `tuple`: The score, or None if the trial failed, and a message.
    """
    log = folder.with_suffix(".log")
    command = [*command, "--output_dir", str(folder), "--resume_from_checkpoint", "true", "--disable_tqdm", "true"]
    with open(log, "a") as output:
        # The trial inherits the lock: a sweep cannot resume while a trial of it is still running.
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, pass_fds=[lock.fileno()])
        with process:  # Ctrl-C reaches the trial, too: it saves a checkpoint and ends
            status = process.wait()
    if status in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        raise KeyboardInterrupt  # the trial was stopped and has saved a checkpoint
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if status:
        return None, lines[-1] if status > 0 and lines else f"exit status {status}"
    if not (folder / "results.json").is_file():
        return None, "no results.json: the script must call trainer.save_results"
    results = json.loads((folder / "results.json").read_text())
    scores = [cycle["best_validation"] for cycle in results["cycles"]]
    return (max if results["greater_is_better"] else min)(scores), f"dendrites: {results['final']['dendrites']}"


def flags_of(settings: dict) -> list[str]:
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def sweep(args: argparse.Namespace, flags: list[str]) -> None:
    """Run trials until the sweep has `args.num_trials`. Raises SweepError."""
    if optuna is None:
        raise SweepError("Optuna is missing: pip install optuna")
    if not args.script.is_file():
        raise SweepError(f"{args.script}: no such script")
    if args.num_trials < 1:
        raise SweepError(f"--num_trials {args.num_trials}: at least 1 is needed")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {name: values for name, values in search_space().items() if f"--{name}" not in flags}
    ranges = {name: str(values) for name, values in space.items()}
    facts = {"script": args.script.name, "metric": args.metric, "direction": args.direction, "flags": flags}
    if args.direction is None:  # as TrainingArguments has it
        facts["direction"] = "minimize" if args.metric.endswith("loss") else "maximize"
    lock = lock_folder(args.sweep_dir)
    study = open_study(args.sweep_dir / "study.db", facts | {"search_space": ranges})
    command = [sys.executable, str(args.script), *flags, "--metric_for_best_model", args.metric]
    command += ["--greater_is_better", str(facts["direction"] == "maximize")]
    while len(study.get_trials(states=[TrialState.COMPLETE, TrialState.FAIL])) < args.num_trials:
        number, settings = next_trial(study, space)
        score, message = run_trial([*command, *flags_of(settings)], args.sweep_dir / f"trial-{number}", lock)
        study.tell(number, score, state=TrialState.FAIL if score is None else TrialState.COMPLETE)
        outcome = "failed" if score is None else f"{args.metric} {score:.4f}"
        print(f"trial {number}: {outcome}, {' '.join(flags_of(settings))}; {message}", flush=True)
    if not study.get_trials(states=[TrialState.COMPLETE]):
        raise SweepError(f"all trials failed; see {args.sweep_dir}/trial-*.log")
    best = study.best_trial
    print(f"best: trial {best.number}, {args.metric} {best.value:.4f}, {' '.join(flags_of(best.params))}")


def main() -> int:
    """Run the command line. Returns the exit status."""

    def raise_error(message):
        raise SweepError(message)  # one line, without the usage

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = raise_error
    parser.add_argument("script", type=Path)
    parser.add_argument("--num_trials", type=int, default=20, help="total number of trials, including recorded ones")
    parser.add_argument("--sweep_dir", type=Path, default=Path("sweep"), help="folder of the study and its runs")
    parser.add_argument("--metric", default="accuracy", help="the script's --metric_for_best_model")
    parser.add_argument("--direction", choices=["minimize", "maximize"], help="default: minimize a loss, else maximize")
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    try:
        sweep(parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :])
    except SweepError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; rerun the same command to resume", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
