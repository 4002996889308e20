"""The plot of a run, drawn from its evaluations."""

import math
import warnings
from itertools import pairwise
from pathlib import Path

from .checkpoint import replacing
from .report import cycles as best_of_cycles
from .report import is_error_rate, scores, unit

_STYLE = {  # whatever the user has set: the file is read at 600 pixels, too, and names of metrics are no formulas
    "text.usetex": False,
    "text.parse_math": False,
    "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": True,
    "font.size": 13,
    "hatch.linewidth": 1.0,
}
_ON_WHITE = {"fontsize": 12, "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.85}}


def draw(
    evaluations: list[dict],
    score_name: str,
    greater_is_better: bool,
    path: Path,
    without: float | None = None,
    wider: float | None = None,
    kept_dendrites: int | None = None,
    cycles: list[dict] | None = None,
) -> None:
    """Draw the scores during training and by number of dendrites, as a PNG of 1100 x 450 pixels.

    Args:
        evaluations (`list[dict]`), score_name (`str`), greater_is_better (`bool`): As for `report.cycles`.
        path (`Path`): The PNG file. It is written completely or not at all.
        without (`float`, *optional*): Score of the step-matched baseline, drawn as a line.
        wider (`float`, *optional*): Score of a baseline that is wider instead, drawn as a line.
        kept_dendrites (`int`, *optional*): Number of dendrites of the kept model, which is marked.
        cycles (`list[dict]`, *optional*): A value of `report.cycles`. By default that of `evaluations`.
    """
    from matplotlib import rc_context, style  # takes half a second, which a start need not wait for

    rows = scores(evaluations, score_name)
    if not rows:
        return
    cycles = cycles or best_of_cycles(evaluations, score_name, greater_is_better)
    with style.context("default"), rc_context(_STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a font without the characters of a metric's name
        figure = _figure(rows, cycles, score_name, greater_is_better, without, wider, kept_dendrites)
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=100, format="png")


def _figure(rows, cycles, score_name, greater_is_better, without, wider, kept_dendrites):
    from matplotlib.figure import Figure
    from matplotlib.legend_handler import HandlerTuple

    name = unit(score_name)
    test = f"test_{name}"
    baselines = [value for value in (without, wider) if _is_finite(value)]
    values = [row[key] for row in rows for key in (score_name, test) if _is_finite(row.get(key))]
    is_error = is_error_rate(name, *values, *baselines)
    label = "error (%)" if is_error else _shorten(name)
    lower_is_better = is_error or not greater_is_better

    def shown(value):
        return 100 * (1 - value) if is_error else value

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    handles = _draw_training(left, rows, {"validation": score_name, "test": test}, shown, lower_is_better)
    left.set(title="During training", xlabel="training steps", ylabel=label)
    part = "test" if all(_is_finite(cycle.get(test)) for cycle in cycles) else "validation"
    kept = next((i for i, cycle in enumerate(cycles) if cycle["dendrites"] == kept_dendrites), None)
    heights = [shown(cycle[test if part == "test" else "best_validation"]) for cycle in cycles]
    handles += _draw_cycles(right, cycles, heights, kept, [v if v is None else shown(v) for v in (without, wider)])
    right.set(title=f"{part.capitalize()} {label}", xlabel="dendrites per layer, parameters")
    texts = [handle.get_label() for handle in handles]
    if kept is not None:
        cycle = cycles[kept]
        (point,) = left.plot(cycle["global_step"], shown(cycle["best_validation"]), "o", color="0.15", zorder=3)
        handles.append((point, right.patches[kept]))
        texts.append("kept model")
    figure.legend(
        handles,
        texts,
        loc="outside lower center",
        ncols=len(handles),
        fontsize=12,
        frameon=False,
        columnspacing=1.0,
        handlelength=1.8,
        handletextpad=0.5,
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0.5)},
    )
    return figure


def _draw_training(axes, rows, keys, shown, lower_is_better) -> list:
    """Draw the scores of all evaluations. Returns the handles for the legend."""
    handles, lines = [], []
    for (text, key), line, color in zip(keys.items(), ("-", "--"), ("C0", "C1"), strict=True):
        points = [(row["step"], shown(row[key])) for row in rows if _is_finite(row.get(key))]
        if points:
            lines.append(sorted(value for _, value in points))
            marker = "." if len(points) == 1 else None
            handles += axes.plot(*zip(*points, strict=True), linestyle=line, color=color, marker=marker, label=text)
    added = [(a["step"], b["dendrites"]) for a, b in pairwise(rows) if b["dendrites"] > a["dendrites"]]
    for step, dendrites in added:
        line = axes.axvline(step, color="0.4", linewidth=1.2, linestyle=":", label="dendrite added")
        axes.annotate(
            f"{dendrites}", (step, 0.99), **_ON_WHITE, xycoords=("data", "axes fraction"), va="top", ha="center"
        )
    handles += [line] if added else []
    # Without the worst tenth: the first steps would flatten the others.
    lines = lines if lower_is_better else [[-value for value in reversed(line)] for line in lines]
    low, high = min(line[0] for line in lines), max(line[int(0.9 * (len(line) - 1))] for line in lines)
    margin = 0.15 * (high - low) or 0.05 * abs(high) or 1e-6
    limits = low - margin, high + margin
    axes.set(ylim=limits if lower_is_better else (-limits[1], -limits[0]))
    return handles


def _draw_cycles(axes, cycles, heights, kept, baselines) -> list:
    """Draw a bar for each number of dendrites, and lines for baselines. Returns the handles for the legend."""
    places, size = range(len(heights)), min(12, 75 / len(heights))
    bars = axes.bar(places, heights, color="0.88", edgecolor="0.2")
    if kept is not None:
        bars[kept].set(facecolor="C0", hatch="///", edgecolor="white")
    texts = axes.bar_label(bars, [f"{height:.3g}" for height in heights], padding=3, **_ON_WHITE | {"fontsize": size})
    axes.set_xticks(places, [f"{c['dendrites']}\n{_compact(c['parameters'])}" for c in cycles], fontsize=size)
    names = "same steps, no dendrites", "wider, no dendrites"
    styles = {"linestyle": "-.", "color": "C3"}, {"linestyle": (0, (1, 1)), "color": "C2"}
    handles = [
        axes.axhline(value, label=text, linewidth=2, **style)
        for value, text, style in zip(baselines, names, styles, strict=True)
        if _is_finite(value)
    ]
    for text in texts:
        text.set_zorder(4)  # above the lines
    axes.axhline(0, color="0.2", linewidth=0.8)
    heights = [0, *heights, *filter(_is_finite, baselines)]
    low, high = min(heights), max(heights)
    margin = 0.15 * (high - low) or 1e-6
    axes.set(xlim=(-0.7, len(cycles) - 0.3), ylim=(low - margin * (low < 0), high + margin * (high > 0 or low == 0)))
    return handles


def _shorten(name: str) -> str:
    """A name of a metric that fits next to an axis and above one."""
    name = " ".join(name.split())
    return name if len(name) <= 25 else f"{name[:24]}…"


def _is_finite(value) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _compact(number: int) -> str:
    """A number of parameters in few characters: "1,610", "16.1k", "108M"."""
    for size, suffix in ((10**9, "B"), (10**6, "M"), (10**4, "k")):
        if number >= size:
            scale = 1000 if suffix == "k" else size
            return f"{number / scale:.3g}{suffix}" if number / scale < 999.5 else f"{number / scale:,.0f}{suffix}"
    return f"{number:,}"
