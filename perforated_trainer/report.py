"""Run reports, as pure functions of the evaluations of a training and `results.json`.

`results.json` has these keys: stopped_by ("tracker", "max_steps" or "callback"), testing_dendrite_capacity, dataset,
metric, greater_is_better, seed, cycles (for each number of dendrites the best validation score and the other scores at
that step), final, global_step, restarts (the steps at which optimizer and scheduler were restarted), last_evaluation
(its step), initial_weights (a checksum of what is trained, before the training), frozen_weights (a checksum of the
base that `freeze_base` froze; null without it), train_seconds, steps_per_second, settings (what a step-matched baseline
must share), command, versions; of a baseline also `control`, see `comparison`.
"""

import bisect
import contextlib
import math
import re
import shlex
import statistics
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from numbers import Real
from pathlib import Path

from transformers import EarlyStoppingCallback, TrainingArguments

from .arguments import DendriteArguments

PACKAGES = ("torch", "torchvision", "transformers", "perforatedai", "accelerate", "datasets", "safetensors")


def count(number: int, noun: str) -> str:
    """A number with its noun: "1 dendrite", "2 dendrites"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def first_of(names: Sequence[str], most: int) -> str:
    """The first names of many, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def unit(name: str) -> str:
    """The metric without the part of the data: "accuracy" of "eval_accuracy"."""
    return name.split("_", 1)[-1]


def is_reported(name: str, score_name: str) -> bool:
    """Whether a metric is reported: no duration, and the loss only if it is the monitored metric."""
    timed = "loss|epoch|(.*_)?runtime|model_preparation_time|.*_per_second"
    return not re.fullmatch(timed, unit(name)) or unit(name) == unit(score_name)


def is_error_rate(name: str, *values: float) -> bool:
    """Whether scores are shown as an error rate in percent: accuracies from 0 to 1. What is left to gain says more."""
    return name == "accuracy" and all(0 <= value <= 1 for value in values)


def peak_memory() -> str:
    """The largest memory in use so far: of the GPU if there is one, else of this process."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 2**20:,.0f} MiB of GPU memory"
    try:
        import resource
    except ImportError:  # not on Windows
        return "unknown on this system"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{peak / 2 ** (20 if sys.platform == 'darwin' else 10):,.0f} MiB"  # macOS counts in bytes, Linux in KiB


def installed_versions() -> dict[str, str]:
    """The versions of the packages that a result depends on, if they are installed."""
    versions = {}
    for package in PACKAGES:
        if find_spec(package):
            with contextlib.suppress(PackageNotFoundError):  # a folder of that name
                versions[package] = version(package)
    return versions


# ---------------------------------------------------------------------------------------------------- the log history


def _is_finite(value) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def record(step: int, dendrites: int, parameters: int, metrics: dict) -> dict:
    """The record of an evaluation, as JSON has it: its metrics are those that are numbers, without durations."""
    numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, Real)}
    kept = {name: value for name, value in numbers.items() if is_reported(name, "eval_loss")}
    return {"step": step, "dendrites": dendrites, "parameters": parameters} | kept


def scores(evaluations: list[dict], score_name: str) -> list[dict]:
    """The evaluations with a finite score, of `Growth.evaluations`."""
    return [row for row in evaluations if _is_finite(row.get(score_name))]


def train_loss(log_history: list[dict]) -> float:
    """The mean training loss over all steps that were logged, from a log history; 0 if none was."""
    total, before = 0.0, 0
    for entry in log_history:
        if "loss" in entry:
            total, before = total + entry["loss"] * (entry["step"] - before), entry["step"]
    return total / max(before, 1)


def best(rows: list[dict], name: str, greater_is_better: bool) -> dict:
    """The first row with the best value of `name`."""
    return (max if greater_is_better else min)(rows, key=lambda row: row[name])


def cycles(
    evaluations: list[dict],
    score_name: str,
    greater_is_better: bool,
    history_lookback: int = 1,
    restarts: Sequence[int] = (),
) -> list[dict]:
    """The best evaluation for each number of dendrites.

    Args:
        evaluations (`list[dict]`): `Growth.evaluations`.
        score_name (`str`): Name of the monitored metric, such as "eval_accuracy".
        greater_is_better (`bool`): Whether a higher score is better.
        history_lookback (`int`): Number of evaluations that scores are averaged over; the best mean counts.
        restarts (`Sequence[int]`): The steps at which a cycle ended and the next one began, for these means.

    Returns:
        `list[dict]`: For each number of dendrites dendrites, parameters, global_step, best_validation (the score at
        that step) and the other scores there.
    """
    groups, result, of_cycle = {}, [], {}
    for row in scores(evaluations, score_name):
        window = of_cycle.setdefault(bisect.bisect_left(restarts, row["step"]), [])
        window.append(float(row[score_name]))
        mean = float(statistics.mean(window[-history_lookback:]))
        groups.setdefault(row["dendrites"], []).append({"row": row, "mean": mean})
    for dendrites, candidates in groups.items():
        row = best(candidates, "mean", greater_is_better)["row"]
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


# ------------------------------------------------------------------------------------------------------- before a run


def direction(args: TrainingArguments) -> str:
    """The monitored metric and its direction, for the start of a run."""
    name = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
    return f"{name}: {'higher' if args.greater_is_better else 'lower'} is better"


def missing_metric(score_name: str, metrics: dict, label_names: Sequence[str] | None) -> str:
    """The error for an evaluation that does not return the monitored metric.

    Args:
        score_name (`str`): Name of the monitored metric, such as "eval_accuracy".
        metrics (`dict`): What the evaluation returned.
        label_names (`Sequence[str]`, *optional*): `trainer.label_names`.

    Returns:
        `str`: One line with the names that can be used instead, and with `label_names` if the loss is missing.
    """
    names = [name for name in metrics if name.startswith("eval_") and is_reported(name, "eval_loss")]
    line = f"metric_for_best_model: the evaluation does not return {score_name}. "
    line += f"It returns {', '.join(names)}" if names else "It returns no metric"
    if not names or (score_name.endswith("loss") and not any(name.endswith("loss") for name in names)):
        expected = ", ".join(label_names or []) or "none"
        line += (
            f". Loss and metrics need labels: set label_names of TrainingArguments to the inputs of the model that are "
            f"labels (now {expected})"
        )
    return line


def _size(dataset) -> int | None:
    """The number of examples. None if it is not known, as for a stream."""
    try:
        return len(dataset)
    except Exception:  # of the user's class; a warning is all that depends on it
        return None


def _num_evaluations(args: TrainingArguments, train_dataset) -> int | None:
    """The largest number of evaluations in one training of `max_steps` or `num_train_epochs`. None if not known."""
    size, steps, steps_in_epoch = _size(train_dataset), args.max_steps, None
    if size is not None:
        batches = size / (args.train_batch_size * args.world_size)
        batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
        steps_in_epoch = max(math.ceil(batches / args.gradient_accumulation_steps), 1)
        if steps <= 0:
            steps = math.ceil(steps_in_epoch * args.num_train_epochs)
    if args.eval_strategy == "steps" and steps > 0:
        every = args.eval_steps if args.eval_steps >= 1 else math.ceil(steps * args.eval_steps)
        before = math.ceil(max(args.eval_delay, 1) / every) - 1  # left out by eval_delay
        return max(math.ceil(steps / every) - before, 0)  # the last step is always evaluated
    if args.eval_strategy == "epoch":
        if args.max_steps <= 0:
            epochs = math.ceil(args.num_train_epochs)
        elif steps_in_epoch:
            epochs = math.ceil(steps / steps_in_epoch)
        else:
            return None
        return max(epochs - max(math.ceil(args.eval_delay) - 1, 0), 0)
    return None


def no_dendrite_can_come(
    dendrite_args: DendriteArguments,
    args: TrainingArguments,
    train_dataset,
    callbacks: Iterable = (),
    num_dendrites: int = 0,
) -> str | None:
    """A warning if settings end a run before a dendrite can be trained, a note if the model has as many as it can have.

    Args:
        dendrite_args (`DendriteArguments`): The settings of the dendrites.
        args (`TrainingArguments`): The settings of the training.
        train_dataset (`Dataset`): With its size, the number of evaluations is known. It need not have one.
        callbacks (`Iterable[TrainerCallback]`): The callbacks of the trainer, for `EarlyStoppingCallback`.
        num_dendrites (`int`): Number of dendrites that the model begins with.

    Returns:
        `str`: One line for each reason, or None.
    """
    if not dendrite_args.doing_pai or dendrite_args.control_of or dendrite_args.testing_dendrite_capacity:
        return None
    if num_dendrites >= (most := dendrite_args.max_dendrites):
        has = count(num_dendrites, "dendrite")
        return f"note: the model has {has}, and --max_dendrites is {most}: no more are added" if most else None
    fixed, patience, lines = dendrite_args.switch_mode == "fixed", dendrite_args.n_epochs_to_switch, []
    evaluations = _num_evaluations(args, train_dataset)
    needed = patience + 2  # the first one is the reference, and the last one is that of the trained dendrite
    if not fixed and evaluations is not None and evaluations < needed:
        lines.append(
            f"warning: no dendrite can be trained: this run has {count(evaluations, 'evaluation')}, and "
            f"n_epochs_to_switch={patience} needs {needed}. Train longer, evaluate more often (eval_steps) or lower "
            "n_epochs_to_switch"
        )
    stops = [c.early_stopping_patience for c in callbacks if isinstance(c, EarlyStoppingCallback)]
    if stops and not fixed and min(stops) <= patience:
        lines.append(
            f"warning: EarlyStoppingCallback ends the training after {count(min(stops), 'evaluation')} without "
            f"improvement, before a dendrite is added after {patience} (n_epochs_to_switch). Set its "
            "early_stopping_patience above n_epochs_to_switch, or remove it: training ends when dendrites stop helping"
        )
    elif stops and fixed and evaluations is not None and min(stops) < evaluations:
        lines.append(
            f"warning: EarlyStoppingCallback can end the training after {count(min(stops), 'evaluation')} without "
            f"improvement, before the end of a cycle of {evaluations} at which a dendrite is added. Set its "
            f"early_stopping_patience to {evaluations} or more, or remove it"
        )
    return "\n".join(lines) or None


# -------------------------------------------------------------------------------------------------------- after a run


def no_dendrite_came(
    dendrite_args: DendriteArguments, evaluations: list[dict], score_name: str, was_added: bool = False
) -> str | None:
    """A warning for a run that ended without a trained dendrite, with the reason.

    Args:
        dendrite_args (`DendriteArguments`): The settings of the dendrites.
        evaluations (`list[dict]`): `Growth.evaluations`.
        score_name (`str`): Name of the monitored metric.
        was_added (`bool`): Whether a dendrite was added, which then no evaluation has seen.
    """
    rows = scores(evaluations, score_name)
    if not dendrite_args.doing_pai or dendrite_args.control_of or any(row["dendrites"] for row in rows):
        return None
    patience = dendrite_args.n_epochs_to_switch
    reason = f"one is added after {patience} evaluations without improvement (n_epochs_to_switch)"
    if dendrite_args.switch_mode == "fixed":
        reason = "one is added at the end of a cycle"
    if was_added:
        return "warning: no dendrite was trained: the run ended before the first evaluation with one"
    if not dendrite_args.max_dendrites:
        reason = "max_dendrites is 0"
    return f"warning: this run added no dendrite: it had {count(len(rows), 'evaluation')}, and {reason}"


def number(value) -> str:
    """A value as text, whatever a metric returns."""
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def table(rows: list[dict]) -> str:
    """Rows of numbers as text, with a column for each key."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, *([number(row[name]) if name in row else "" for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in lines)


def improvement(results: dict) -> str:
    """The kept model compared with the best one before the first dendrite of the same run, in one sentence."""
    first, kept = results["cycles"][0], results["final"]
    if len(results["cycles"]) == 1:
        return "This run added no dendrite."
    if kept["dendrites"] == first["dendrites"]:
        return f"No dendrite was kept: none improved {results['metric']} by more than the improvement thresholds."
    name, words = unit(results["metric"]), []
    for part, before in (("validation", first["best_validation"]), ("test", first.get(f"test_{name}"))):
        after = kept.get(f"{part}_{name}")
        if not _is_finite(before) or not _is_finite(after):
            continue
        what, shown = f"{part} {name}", number
        if is_error_rate(name, before, after):
            before, after, what, shown = 100 * (1 - before), 100 * (1 - after), f"{part} error", "{:.2f}%".format
        word = "lower" if after < before else "higher"
        change = f" ({abs(after - before) / abs(before):.0%} {word})" if before and after != before else ""
        words.append(f"{what} {shown(before)} -> {shown(after)}{change}")
    before, which = first["dendrites"] or "none", "its next" if first["dendrites"] else "its first"
    return (
        f"{count(kept['dendrites'], 'dendrite')} instead of {before}: {', '.join(words)}. This compares the model with "
        f"the same run before {which} dendrite and includes the effect of longer training."
    )


def summary(results: dict, folder: Path, from_command_line: bool = False) -> str:
    """The table of cycles, the comparison, the final scores and the paths of all files.

    Args:
        results (`dict`): What `results.json` holds.
        folder (`Path`): The folder of the run.
        from_command_line (`bool`): Whether hints name flags, or what to write in Python.

    Returns:
        `str`: Several lines.
    """
    lines, final = [], dict(results["final"])
    if results["cycles"]:
        compared = results["control"]["verdict"] if "control" in results else improvement(results)
        lines += ["", table(results["cycles"]), compared]
    words = [count(final.pop("dendrites"), "dendrite"), count(final.pop("parameters"), "parameter")]
    lines.append(f"final: {', '.join(words + [f'{name} {number(value)}' for name, value in final.items()])}")
    data = results["dataset"].get("name", "not named")
    lines.append(f"data: {data}; stopped by {results['stopped_by']} at step {results['global_step']:,}")
    plot = folder / f"{folder.resolve().name}.png"
    lines.append(f"model: {folder}/final   plot: {plot}   results: {folder}/results.json")
    if results["cycles"] and results["final"]["dendrites"] > results["cycles"][0]["dendrites"]:
        how = f"DendriteArguments(control_of={str(folder)!r})"
        if from_command_line:
            how = f"--control_of {shlex.quote(str(folder))}"
        lines.append(f"To see what dendrites add to longer training, run the same training again with {how}")
    if results["testing_dendrite_capacity"]:
        lines.append("This was a test of dendrite capacity, not a training run.")
    return "\n".join(lines)
