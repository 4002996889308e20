"""What is told of a run: pure functions of the Trainer's log history and of `results.json`.

`results.json` has these keys: stopped_by ("tracker", "max_steps" or "callback"), testing_dendrite_capacity, dataset,
metric, greater_is_better, seed, cycles (for each number of dendrites the best validation score and the other scores at
that step), final, global_step, train_seconds, steps_per_second, command, versions.
"""

import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "torchvision", "transformers", "perforatedai", "accelerate", "datasets", "safetensors")
TASKS = {  # the end of a model's class name, and the pipeline that it is for
    "ForImageClassification": "image-classification",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
}


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
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


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


def comparison(results: dict) -> str:
    """How much better the kept model is than the best one without dendrites, in one sentence."""
    first, kept = results["cycles"][0], results["final"]
    if not kept["dendrites"]:
        return "No dendrite was kept: the model without dendrites had the best validation score."
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
    return f"With {count(kept['dendrites'], 'dendrite')} instead of none: {', '.join(words)}."


def summary(results: dict, folder: Path) -> str:
    """The table of the cycles, what is better and by how much, the final scores, and where everything is."""
    lines = []
    if results["cycles"]:
        lines += ["", table(results["cycles"]), comparison(results)]
    final = dict(results["final"])
    line = f"final: {count(final.pop('dendrites'), 'dendrite')}, {final.pop('parameters'):,} parameters, "
    lines.append(line + ", ".join(f"{name} {value:.4f}" for name, value in final.items()))
    lines.append(
        f"data: {results['dataset'].get('name', 'not named')}; stopped by {results['stopped_by']} at step "
        f"{results['global_step']:,}"
    )
    plot = folder / f"{folder.resolve().name}.png"
    lines.append(f"model: {folder}/final   plot: {plot}   results: {folder}/results.json")
    if results["testing_dendrite_capacity"]:
        lines.append("This was a test of dendrite capacity, not a training run.")
    return "\n".join(lines)


def model_card(results: dict, name: str, model_class: str, processor: bool, custom_code: bool) -> str:
    """The README.md of the model: metadata with the scores, and the lines that load it, ready to copy.

    Args:
        results: what `results.json` holds.
        name: of the model on the Hub.
        model_class: the class of the model, such as "BertForMaskedLM".
        processor: whether an image processor or a tokenizer lies beside the model.
        custom_code: whether the model's class is not one of transformers'.
    """
    from huggingface_hub import EvalResult, ModelCardData

    task = next((task for end, task in TASKS.items() if model_class.endswith(end)), None)
    data, final = results["dataset"].get("name", "not named"), results["final"]
    scores = {key: value for key, value in final.items() if key not in ("dendrites", "parameters")}
    evaluations = [
        EvalResult(
            task_type=task or "other",
            dataset_type=re.sub(r"[^\w./-]+", "-", data),
            dataset_name=data,
            dataset_split=key.split("_")[0],
            metric_type=unit(key),
            metric_value=value,
            metric_name=key.replace("_", " "),
        )
        for key, value in scores.items()
    ]
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        tags=["perforated-ai", "dendrites"],
        model_name=name,
        eval_results=evaluations or None,
    )
    without = results["cycles"][0]["parameters"] if results["cycles"] else final["parameters"]
    code = "import perforated_trainer\n"
    trusted = ", trust_remote_code=True" if custom_code else ""
    if task and processor:
        code += f'from transformers import pipeline\n\nmodel = pipeline("{task}", model="."{trusted})'
    elif custom_code:
        auto = f"AutoModel{next((end for end in TASKS if model_class.endswith(end)), '')}"
        code += f'from transformers import {auto}\n\nmodel = {auto}.from_pretrained("."{trusted})'
    else:
        code += f'from transformers import {model_class}\n\nmodel = {model_class}.from_pretrained(".")'
    shown = "\n".join(f"| {key.replace('_', ' ')} | {value:.4f} |" for key, value in scores.items())
    return f"""---
{metadata.to_yaml()}
---
# {name}

A `{model_class}` with {count(final["dendrites"], "dendrite")} in each layer that can have some, trained with Perforated
AI's dendrites. {final["parameters"]:,} parameters; {without:,} without dendrites. Trained on: {data}.

| score | value |
| --- | --- |
{shown}

To use it from this folder (`"."` is its path, or its name on the Hub):

```python
{code}
```

Without `perforated_trainer`, the code in the folder does the same: leave out that import and give
`trust_remote_code=True`.
"""


# -------------------------------------------------------------------------------------------------------- as a picture


def draw(log_history: list[dict], score_name: str, greater_is_better: bool, path: Path, without: float | None = None):
    """Draw the scores while training, and by number of dendrites, as a PNG of 1100 x 400 pixels.

    Args:
        log_history, score_name, greater_is_better: as for `cycles`.
        path: of the PNG file.
        without: test score of a network trained the same way without dendrites, drawn as a line.
    """
    from matplotlib.figure import Figure

    rows, groups = scores(log_history, score_name), cycles(log_history, score_name, greater_is_better)
    if not rows:
        return
    kept = best(groups, "best_validation", greater_is_better)
    name = unit(score_name)
    shown = (lambda value: 100 * (1 - value)) if name == "accuracy" else (lambda value: value)
    label = "error (%)" if name == "accuracy" else name
    parts = {"validation": score_name} | ({f"test_{name}": f"test_{name}"} if f"test_{name}" in rows[0] else {})
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    values = []
    for key, style in zip(parts.values(), ("-", "--"), strict=False):
        points = [(row["step"], shown(row[key])) for row in rows if key in row]
        left.plot(*zip(*points, strict=True), style, label="test" if key.startswith("test_") else "validation")
        values.append([value for _, value in points])
    before = 0
    for cycle in groups[1:]:
        step = min(row["step"] for row in rows if row["dendrites"] == cycle["dendrites"])
        start = max((row["step"] for row in rows if row["step"] < step), default=step)
        left.axvline(start, color="0.6", linewidth=1)
        more = cycle["dendrites"] - before
        left.annotate(f" +{count(more, 'dendrite')}", (start, 0.95), xycoords=("data", "axes fraction"), fontsize=8)
        before = cycle["dendrites"]
    # Up to the ninth decile: the first steps would flatten the rest.
    everything = sorted(value for column in values for value in column)
    low, high = everything[0], max(sorted(column)[int(0.9 * (len(column) - 1))] for column in values)
    left.set(ylim=(low - 0.2 * (high - low) - 1e-6, high + 0.2 * (high - low) + 1e-6))
    left.set(xlabel="training steps", ylabel=label)
    both = "Validation and test" if len(parts) > 1 else "Validation"
    left.set_title(f"{both} {label.removesuffix(' (%)')} while training")
    left.plot(kept["global_step"], shown(kept["best_validation"]), "o", color="0.2", label="kept model", zorder=3)
    left.legend(loc="lower left", fontsize=8)
    key, part = (f"test_{name}", "Test") if len(parts) > 1 else ("best_validation", "Validation")
    bars = [shown(cycle[key]) for cycle in groups]
    colors = ["C0" if cycle is kept else "0.8" for cycle in groups]
    drawn = right.bar([str(cycle["dendrites"]) for cycle in groups], bars, color=colors, edgecolor="0.2")
    right.bar_label(
        drawn,
        [
            f"{value:.3g}" + (" kept" if cycle is kept else "") + f"\n{cycle['parameters']:,}"
            for value, cycle in zip(bars, groups, strict=True)
        ],
        fontsize=8,
    )
    if without is not None:
        right.axhline(shown(without), color="C3", linestyle="--", label="trained the same way, without dendrites")
        right.legend(loc="lower right", fontsize=8)
    right.margins(y=0.2)
    right.set(xlabel="dendrites in each layer (below each score: parameters)", ylabel=label)
    right.set_title(f"{part} {label.removesuffix(' (%)')} by number of dendrites")
    unfinished = path.with_name(f"unfinished.{path.name}")
    figure.savefig(unfinished, dpi=100)
    unfinished.replace(path)
