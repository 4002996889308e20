"""The search over settings, on validation scores only: the best dendrite run wins, the test set is not looked at.

    python benchmarks/search.py --data_dir DIR

Each trial is a run of the network with dendrites, one seed, two dendrites at most, on one core. It is recorded in
benchmarks/results/search.jsonl and not repeated; the table of all is printed, the best first.
"""

import argparse
import os
from pathlib import Path

from dendrites import RESULTS
from jobs import in_processes, recorded

# Flags of the script; others under "flags".
BASE = {"learning_rate": 5e-3, "plateau": [0.3, 1], "n_epochs_to_switch": 6, "improvement_threshold": 1e-4}
BASE |= {"init": 0.01, "forward": "sigmoid", "max_dendrites": 2}
TRIALS = [
    {},
    {"init": 0.1},
    {"init": 0.3, "plateau": [0.1, 2]},
    {"learning_rate": 1e-2, "plateau": [0.1, 2]},
    {"n_epochs_to_switch": 4, "max_dendrites": 4},
    {"flags": ["--per_device_train_batch_size", "128"]},
    {"improvement_threshold": 1e-3},
    {"flags": ["--module_names_to_perforate", "Linear"]},
    {"forward": "relu"},
    {"plateau": [0.3, 2], "n_epochs_to_switch": 10},
]


def job(trial: dict, flags: list[str]) -> dict:
    """The arguments of dendrites.run for a trial."""
    factor, patience = trial["plateau"]
    plateau = f'{{"factor": {factor}, "patience": {patience}}}'
    flags = ["--lr_scheduler_kwargs", plateau, *trial.get("flags", []), *flags]
    for name in ("learning_rate", "n_epochs_to_switch", "improvement_threshold", "max_dendrites"):
        flags = [f"--{name}", str(trial[name]), *flags]
    flags += ["--dendrite_init_scale", str(trial["init"]), "--dendrite_activation", trial["forward"]]
    return {"seed": trial.get("seed", 42), "flags": flags}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, help="folder with MNIST's IDX files; else what the script finds")
    parser.add_argument("--results", type=Path, default=RESULTS.with_name("search.jsonl"))
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--trials", type=int, default=len(TRIALS), help="only so many")
    parser.add_argument("--table", action="store_true", help="run nothing")
    args, flags = parser.parse_known_args()  # what it does not know goes to the script
    if args.data_dir:
        flags += ["--data_dir", str(args.data_dir.resolve())]
    trials = [BASE | trial for trial in TRIALS[: args.trials]]
    known = [record["trial"] for record in recorded(args.results)]
    todo = [({"trial": trial}, job(trial, flags), args.results) for trial in trials if trial not in known]
    if not args.table:
        in_processes(lambda: todo.pop(0) if todo else None, args.processes)
    print("\n| other than the defaults | commit | steps | CPU s | validation error with 0, 1 ... dendrites, % |")
    print("| --- | --- | --- | --- | --- |")
    defaults = BASE
    for record in sorted(recorded(args.results), key=lambda record: record["validation_error"]):
        other = {name: value for name, value in record["trial"].items() if value != defaults.get(name)}
        words = (" ".join(value) if name == "flags" else f"{name} {value}" for name, value in other.items())
        cycles = ", ".join(f"{100 * (1 - cycle['best_validation']):.2f}" for cycle in record["cycles"])
        cells = [", ".join(words) or "nothing", record["commit"], f"{record['steps']:,}"]
        print("|", " | ".join([*cells, f"{record['cpu_seconds']:.0f}", cycles]), "|")


if __name__ == "__main__":
    main()
