"""The BERT example with dendrites, compared with a wider BERT without dendrites of equal parameter count.

    OMP_NUM_THREADS=1 python benchmarks/bert.py --jobs 2

Both have the same data, learning rate and stopping rule. The validation loss decides when a dendrite is added and when
training ends; the test loss is only reported. Appends one JSON line per run to benchmarks/results/bert.jsonl; recorded
runs are skipped. Prints a Markdown table.
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

from jobs import recorded

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = str(ROOT / "examples" / "bert_language_modeling_perforatedai.py")
RESULTS = ROOT / "benchmarks" / "results" / "bert.jsonl"
WIDER = "hidden_size=40,intermediate_size=136"  # equal parameter count to one dendrite, within 0.1%
VARIANTS = {"dendrites": [], "wider": ["--doing_pai", "false", "--config_overrides", WIDER]}


def train(variant: str, seed: int) -> None:
    """Train a variant with a seed and record the run, unless it is recorded already."""
    if any((run["variant"], run["seed"]) == (variant, seed) for run in recorded(RESULTS)):
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, EXAMPLE, "--save_name", "run", "--seed", str(seed), *VARIANTS[variant]]
        subprocess.run(command, cwd=folder, check=True, stdout=sys.stderr)
        run = json.loads(Path(folder, "run", "results.json").read_text())
    del run["command"], run["steps_per_second"]
    machine = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "python": platform.python_version()}
    run = {"variant": variant, "flags": VARIANTS[variant]} | run | machine
    with RESULTS.open("a") as file:
        file.write(json.dumps(run) + "\n")


def row(name: str, results: list[dict]) -> str:
    """One row of the table.

    Args:
        name (`str`): Name of the row.
        results (`list[dict]`): Results of the runs, one per seed.

    Returns:
        `str`: Means over the seeds, with standard deviations of the perplexities.
    """

    def mean(values):
        return f"{statistics.mean(values):.2f} ± {statistics.stdev(values) if len(values) > 1 else math.nan:.2f}"

    perplexities = [mean([math.exp(result[f"{part}_loss"]) for result in results]) for part in ("validation", "test")]
    parameters, steps = (statistics.mean(result[key] for result in results) for key in ("parameters", "global_step"))
    return f"| {name} | {len(results)} | {parameters:,.0f} | {steps:,.0f} | {' | '.join(perplexities)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--jobs", type=int, default=1, help="number of parallel runs")
    args = parser.parse_args()
    jobs = [(variant, seed) for seed in args.seeds for variant in VARIANTS]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(train, *zip(*jobs, strict=True)))
    runs = [run for run in recorded(RESULTS) if run["seed"] in args.seeds]
    print("| BERT | seeds | parameters | steps | validation perplexity | test perplexity |\n" + "| --- " * 6 + "|")
    found = [run for run in runs if run["variant"] == "dendrites"]
    cycles = [cycle | {"validation_loss": cycle["best_validation"]} for run in found for cycle in run["cycles"]]
    for count in sorted({cycle["dendrites"] for cycle in cycles}):
        print(row(f"{count} dendrite{'s' * (count != 1)}", [cycle for cycle in cycles if cycle["dendrites"] == count]))
    for variant, name in (("dendrites", "as saved, with dendrites"), ("wider", "wider, without dendrites")):
        found = [run["final"] | {"global_step": run["global_step"]} for run in runs if run["variant"] == variant]
        print(row(name, found))


if __name__ == "__main__":
    main()
