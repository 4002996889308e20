"""The picture of a run, drawn from the Trainer's log history."""

from pathlib import Path

from .report import best, count, cycles, scores, unit


def draw(log_history: list[dict], score_name: str, greater_is_better: bool, path: Path, without: float | None = None):
    """Draw the scores while training, and by number of dendrites, as a PNG of 1100 x 400 pixels.

    Args:
        log_history, score_name, greater_is_better: as for `cycles`.
        path: of the PNG file.
        without: test score of a network trained the same way without dendrites, drawn as a line.
    """
    from matplotlib.figure import Figure  # half a second, which a start need not wait for

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
