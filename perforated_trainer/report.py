"""What is told of a run: pure functions of the Trainer's log history and of `results.json`.

`results.json` has these keys: stopped_by ("tracker", "max_steps" or "callback"), testing_dendrite_capacity, dataset,
metric, greater_is_better, seed, cycles (for each number of dendrites the best validation score and the other scores at
that step), final, global_step, restarts (the steps at which optimizer and schedule started anew), train_seconds,
steps_per_second, settings (what a control must share), command, versions; of a control also `control`, see `verdict`.
"""

import math
import re
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from transformers import TrainingArguments

from .arguments import DendriteArguments

PACKAGES = ("torch", "torchvision", "transformers", "perforatedai", "accelerate", "datasets", "safetensors")


def count(number: int, noun: str) -> str:
    """ "1 dendrite", "2 dendrites"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def unit(name: str) -> str:
    """The metric without the part of the data: "accuracy" of "eval_accuracy"."""
    return name.split("_", 1)[-1]


def is_reported(name: str, score_name: str) -> bool:
    """Whether a metric is one to report: no time, and the loss only where it decides."""
    return not re.fullmatch("loss|epoch|.*time|.*per_second", unit(name)) or unit(name) == unit(score_name)


def peak_memory() -> str:
    """The largest memory in use so far: the GPU's where there is one, else this process's."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 2**20:,.0f} MiB of the GPU's"
    try:
        import resource
    except ImportError:  # not on Windows
        return "unknown on this system"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{peak / 2 ** (20 if sys.platform == 'darwin' else 10):,.0f} MiB"  # macOS counts in bytes, Linux in KiB


def installed_versions() -> dict[str, str]:
    """The versions of the packages that a result depends on, of those that are installed."""
    return {package: version(package) for package in PACKAGES if find_spec(package)}


# ---------------------------------------------------------------------------------------------------- the log history


def scores(log_history: list[dict], score_name: str) -> list[dict]:
    """The evaluations so far, one dict each: step, dendrites, parameters, validation (`eval_*`) and test scores.

    Args:
        log_history: `trainer.state.log_history`.
        score_name: the metric that decides, such as "eval_accuracy".
    """
    rows = {}
    for entry in log_history:
        if "dendrites" in entry:
            row = rows.setdefault((entry["step"], entry["dendrites"]), {})
            for name, value in entry.items():
                row.setdefault(name, value)
    return [row for _, row in sorted(rows.items()) if score_name in row]


def mean_loss(log_history: list[dict]) -> float:
    """The mean training loss of the steps: each entry holds the mean of those since the entry before."""
    total, last = 0.0, 0
    for entry in log_history:
        if "loss" in entry:
            total, last = total + entry["loss"] * (entry["step"] - last), entry["step"]
    return total / max(last, 1)


def best(rows: list[dict], name: str, greater_is_better: bool) -> dict:
    """The first row with the best value of `name`."""
    return (max if greater_is_better else min)(rows, key=lambda row: row[name])


def cycles(log_history: list[dict], score_name: str, greater_is_better: bool) -> list[dict]:
    """For each number of dendrites: parameters, the best validation score, its step and the other scores there."""
    groups, result = {}, []
    for row in scores(log_history, score_name):
        groups.setdefault(row["dendrites"], []).append(row)
    for dendrites, rows in groups.items():
        row = best(rows, score_name, greater_is_better)
        cycle = {
            "dendrites": dendrites,
            "parameters": row["parameters"],
            "global_step": row["step"],
            "best_validation": row[score_name],
        }
        for part, name_here in (("eval_", "validation_"), ("test_", "test_")):
            for name, value in row.items():
                if name.startswith(part) and name != score_name and is_reported(name, score_name):
                    cycle[name_here + name.removeprefix(part)] = value
        result.append(cycle)
    return result


# ----------------------------------------------------------------------------------------------------------- in words


def table(rows: list[dict]) -> str:
    """Rows of numbers as text, a column for each key of the first."""

    def cell(value):
        return f"{value:.4f}" if isinstance(value, float) else f"{value:,}"

    names = list(rows[0])
    lines = [names, *([cell(row[name]) if name in row else "" for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in lines)


def no_dendrite_can_come(dendrite_args: DendriteArguments, args: TrainingArguments, train_dataset) -> str | None:
    """A warning for settings by which a run is sure to end without a dendrite, where the sizes are known."""
    steps = args.max_steps
    if not dendrite_args.doing_pai or dendrite_args.testing_dendrite_capacity or dendrite_args.switch_mode == "fixed":
        return None
    if steps <= 0 and hasattr(train_dataset, "__len__"):
        batches = math.ceil(len(train_dataset) / (args.train_batch_size * args.world_size))
        steps = math.ceil(math.ceil(batches / args.gradient_accumulation_steps) * args.num_train_epochs)
    if args.eval_strategy == "steps" and steps > 0:
        evaluations = int(steps / args.eval_steps if args.eval_steps >= 1 else 1 / args.eval_steps)
    elif args.eval_strategy == "epoch" and args.max_steps <= 0:
        evaluations = math.ceil(args.num_train_epochs)
    else:
        return None
    patience = dendrite_args.n_epochs_to_switch
    needed = patience + 2 if patience else 1  # the first score is the best, and the library waits for one more
    if evaluations >= needed:
        return None
    return (
        f"warning: no dendrite can be added: {count(evaluations, 'evaluation')} in all, and --n_epochs_to_switch "
        f"{patience} needs {needed}. Train longer, evaluate more often (--eval_steps) or lower it"
    )


def no_dendrite_came(dendrite_args: DendriteArguments, log_history: list[dict], score_name: str) -> str | None:
    """A warning for a run that ended without a single dendrite, with the reason."""
    rows = scores(log_history, score_name)
    if not dendrite_args.doing_pai or any(row["dendrites"] for row in rows):
        return None
    reason = f"one is added after {dendrite_args.n_epochs_to_switch} without a better score (--n_epochs_to_switch)"
    if dendrite_args.switch_mode == "fixed":
        reason = "one is added at the end of a cycle"
    if not dendrite_args.max_dendrites:
        reason = "--max_dendrites is 0"
    return f"warning: this run ended without a single dendrite: {count(len(rows), 'evaluation')} in all, and {reason}"


def comparison(results: dict) -> str:
    """How much better the kept model is than the best one without dendrites, in one sentence."""
    first, kept = results["cycles"][0], results["final"]
    if kept["dendrites"] == first["dendrites"]:
        return "No new dendrite was kept: the model without it had the best validation score."
    name = unit(results["metric"])
    parts = [part for part in ("validation", "test") if f"{part}_{name}" in kept]
    with_dendrites = {part: kept[f"{part}_{name}"] for part in parts}
    without = {"validation": first["best_validation"], "test": first.get(f"test_{name}")}
    words = []
    for part in parts:
        before, after = without[part], with_dendrites[part]
        if before is None:
            continue
        what, shown = f"{part} {name}", "{:.4f}".format
        if name == "accuracy":  # what is left to gain says more
            before, after, what, shown = 100 * (1 - before), 100 * (1 - after), f"{part} error", "{:.2f} %".format
        change = f" ({abs(before - after) / abs(before):.0%} {'less' if after < before else 'more'})" if before else ""
        words.append(f"{what} {shown(before)} -> {shown(after)}{change}")
    before = first["dendrites"] or "none"
    return f"With {count(kept['dendrites'], 'dendrite')} instead of {before}: {', '.join(words)}."


def summary(results: dict, folder: Path) -> str:
    """The table of the cycles, what is better and by how much, the final scores, and where everything is."""
    lines = []
    if results["cycles"]:
        told = results["control"]["verdict"] if "control" in results else comparison(results)
        lines += ["", table(results["cycles"]), told]
    final = dict(results["final"])
    line = f"final: {count(final.pop('dendrites'), 'dendrite')}, {final.pop('parameters'):,} parameters, "
    lines.append(line + ", ".join(f"{name} {value:.4f}" for name, value in final.items()))
    lines.append(
        f"data: {results['dataset'].get('name', 'not named')}; stopped by {results['stopped_by']} at step "
        f"{results['global_step']:,}"
    )
    plot = folder / f"{folder.resolve().name}.png"
    lines.append(f"model: {folder}/final   plot: {plot}   results: {folder}/results.json")
    if results["cycles"] and results["final"]["dendrites"] > results["cycles"][0]["dendrites"]:
        lines.append(f"Dendrites, or only longer training? The same command with --control_of {folder} tells.")
    if results["testing_dendrite_capacity"]:
        lines.append("This was a test of dendrite capacity, not a training run.")
    return "\n".join(lines)
