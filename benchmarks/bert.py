"""The BERT example with dendrites, and beside it one without dendrites of as many parameters.

    OMP_NUM_THREADS=1 python benchmarks/bert.py --jobs 2

Same data, learning rate and stopping rule; validation decides on dendrites and when to stop, test only reports. Every
run is a line of `results/bert.jsonl`; what is there already is not run again. Prints a Markdown table.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "bert.jsonl"
# For each number of dendrites kept: the hidden and intermediate sizes of as many parameters, within 0.1 %
WIDER = {1: "hidden_size=40,intermediate_size=132", 2: "hidden_size=44,intermediate_size=218"}


def recorded() -> dict[tuple[str, int], dict]:
    lines = RESULTS.read_text().splitlines() if RESULTS.is_file() else []
    return {(run["variant"], run["seed"]): run for run in map(json.loads, lines)}


def train(variant: str, seed: int, flags: list[str]) -> dict:
    """Train, unless it is recorded, and return the record."""
    if (variant, seed) not in recorded():
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(ROOT / "examples" / "bert_language_modeling_perforatedai.py"), *flags]
            command += ["--save_name", "run", "--seed", str(seed)]
            subprocess.run(command, cwd=folder, check=True, stdout=sys.stderr)
            run = json.loads(Path(folder, "run", "results.json").read_text())
        run = {
            "variant": variant,
            "seed": seed,
            "flags": flags,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        } | run
        del run["command"]
        with RESULTS.open("a") as file:
            file.write(json.dumps(run) + "\n")
    return recorded()[variant, seed]


def train_seed(seed: int) -> None:
    kept = train("dendrites", seed, [])["final"]["dendrites"]
    if kept:
        train("wider", seed, ["--doing_pai", "false", "--config_overrides", WIDER[kept]])


def row(name: str, runs: list[dict], steps: list[int]) -> str:
    """One line of the table: means over the seeds, and standard deviations."""

    def mean(values):
        return f"{statistics.mean(values):.2f} ± {statistics.stdev(values) if len(values) > 1 else math.nan:.2f}"

    perplexities = [mean([math.exp(run[f"{part}_loss"]) for run in runs]) for part in ("validation", "test")]
    parameters = statistics.mean(run["parameters"] for run in runs)
    return f"| {name} | {len(runs)} | {parameters:,.0f} | {statistics.mean(steps):,.0f} | {' | '.join(perplexities)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    args = parser.parse_args()
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(train_seed, args.seeds))
    runs = [run for run in recorded().values() if run["seed"] in args.seeds]
    print("| BERT | seeds | parameters | steps | validation perplexity | test perplexity |\n" + "| --- " * 6 + "|")
    cycles = [(cycle, run) for run in runs if run["variant"] == "dendrites" for cycle in run["cycles"]]
    for count in sorted({cycle["dendrites"] for cycle, _ in cycles}):
        some = [cycle for cycle, _ in cycles if cycle["dendrites"] == count]
        print(row(f"{count} dendrites", some, [cycle["global_step"] for cycle in some]))
    for variant, name in (("dendrites", "with dendrites, as kept"), ("wider", "wider, no dendrites")):
        some = [run for run in runs if run["variant"] == variant]
        print(row(name, [run["final"] for run in some], [run["global_step"] for run in some]))


if __name__ == "__main__":
    main()
