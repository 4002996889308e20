"""The plot of a run: what is drawn, for any metric, and how it is written."""

import math
import warnings

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from perforated_trainer import plot


def history(name="accuracy", dendrites=3, evaluations=6, test=True, scale=1.0):
    log, step = [], 0
    for number in range(dendrites + 1):
        for i in range(evaluations):
            step += 100
            score = scale * (1 - (0.05 * math.exp(-i / 3) + 0.02) / (1 + number))
            row = {"step": step, "dendrites": number, "parameters": 1610 * (1 + number)}
            log.append(row | {f"eval_{name}": score} | ({f"test_{name}": score - 0.01} if test else {}))
    return log


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws a plot; returns the figure and the path."""
    figures, save = [], Figure.savefig

    def keep(figure, *args, **kwargs):
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)

    def draw(log, score_name="eval_accuracy", greater_is_better=True, **kwargs):
        path = tmp_path / "run.png"
        plot.draw(log, score_name, greater_is_better, path, **kwargs)
        return figures[-1], path

    return draw


def texts(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_plot_has_one_legend_below_the_axes(drawn):
    figure, path = drawn(history(), without=0.97, wider=0.99, kept_dendrites=2)
    assert texts(figure) == [
        "validation", "test", "dendrite added", "same steps, no dendrites", "wider, no dendrites", "kept model",
    ]  # fmt: skip
    assert len(figure.legends) == 1
    box = figure.legends[0].get_window_extent()
    assert all(axes.get_legend() is None for axes in figure.axes)
    assert all(not box.overlaps(axes.get_tightbbox()) for axes in figure.axes)
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width, "the legend fits"
    with Image.open(path) as image:
        assert image.size == (1100, 450) and image.format == "PNG"


def test_plot_baselines_are_lines_at_their_error(drawn):
    figure, _ = drawn(history(), without=0.97, wider=0.99)
    lines = {line.get_label(): line for line in figure.axes[1].lines}
    assert lines["same steps, no dendrites"].get_ydata()[0] == pytest.approx(3)
    assert lines["wider, no dendrites"].get_ydata()[0] == pytest.approx(1)
    styles = [lines[text].get_linestyle() for text in ("same steps, no dendrites", "wider, no dendrites")]
    assert len(set(map(str, styles))) == 2, "they can be told apart without colors"
    assert "kept model" not in texts(figure)


def test_plot_marks_the_kept_model_without_colors(drawn):
    figure, _ = drawn(history(), kept_dendrites=1)
    assert [bool(bar.get_hatch()) for bar in figure.axes[1].patches] == [False, True, False, False]


@pytest.mark.parametrize("scale, kwargs", [(1.0, {}), (-3.0, {"without": -2.5}), (1e6, {"wider": 2e6}), (0.0, {})])
def test_plot_bars_start_at_zero_within_the_axes(drawn, scale, kwargs):
    figure, _ = drawn(history("f1", scale=scale), "eval_f1", **kwargs)
    axes = figure.axes[1]
    low, high = axes.get_ylim()
    values = [line.get_ydata()[0] for line in axes.lines]
    assert low <= 0 <= high and all(low <= bar.get_height() <= high for bar in axes.patches)
    assert all(low <= value <= high for value in values) and len(values) == 1 + len(kwargs)


@pytest.mark.parametrize("greater_is_better", [True, False])
def test_plot_shows_the_best_scores_of_the_training(drawn, greater_is_better):
    sign = 1 if greater_is_better else -1
    figure, _ = drawn(history("f1", scale=sign), "eval_f1", greater_is_better, kept_dendrites=3)
    low, high = figure.axes[0].get_ylim()
    values = figure.axes[0].lines[0].get_ydata()
    assert low < sign * max(sign * np.array(values)) < high


@pytest.mark.parametrize("name", ["$x$ $y_2$", "$", "_", "точность", "準確率", "{}%s", "\\frac", "a\nb", "n" * 300])
def test_plot_works_with_any_name_of_a_metric(drawn, name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure, path = drawn(history(name), f"eval_{name}")
    label = figure.axes[0].get_ylabel()
    assert label == " ".join(name.split()) or (len(label) <= 25 and label.endswith("…"))
    assert figure.axes[0].yaxis.label.get_parse_math() is False
    with Image.open(path) as image:
        assert image.size == (1100, 450)


@pytest.mark.parametrize(
    "log",
    [
        history(dendrites=0, evaluations=1, test=False),
        history(dendrites=0, evaluations=1),
        history(dendrites=1, evaluations=1, test=False),
        history(dendrites=9, evaluations=2),
    ],
)
def test_plot_works_with_few_and_many_evaluations(drawn, log):
    figure, path = drawn(log, without=0.98)
    assert path.stat().st_size > 5000 and ("test" in texts(figure)) == any("test_accuracy" in row for row in log)


def test_plot_skips_scores_that_are_not_finite(drawn):
    log = history()
    log[0]["eval_accuracy"] = log[3]["test_accuracy"] = float("nan")
    log[-2]["eval_accuracy"] = float("inf")
    figure, _ = drawn(log, without=float("nan"))
    assert all(np.isfinite(line.get_ydata()).all() for line in figure.axes[0].lines)
    assert "same steps, no dendrites" not in texts(figure)
    for row in log:
        row.pop("test_accuracy", None)
    assert "Validation" in drawn(log)[0].axes[1].get_title()


def test_plot_without_an_evaluation_is_not_written(tmp_path):
    plot.draw([], "eval_accuracy", True, tmp_path / "run.png")
    assert not list(tmp_path.iterdir())


def test_plot_accuracies_in_percent_are_no_errors(drawn):
    figure, _ = drawn(history(scale=100.0))
    assert figure.axes[0].get_ylabel() == "accuracy"


def test_plot_ignores_and_keeps_the_settings_of_the_user(drawn):
    with matplotlib.rc_context({"font.size": 40, "axes.facecolor": "black"}):
        figure, _ = drawn(history())
        assert figure.axes[0].get_facecolor()[:3] == (1, 1, 1) and matplotlib.rcParams["font.size"] == 40


def test_plot_replaces_a_link_and_leaves_its_target(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "run.png").symlink_to(tmp_path / "precious")
    plot.draw(history(), "eval_accuracy", True, tmp_path / "run.png")
    assert (tmp_path / "precious").read_text() == "mine" and not (tmp_path / "run.png").is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"precious", "run.png"}


@pytest.mark.parametrize(
    "number, text",
    [(10, "10"), (9999, "9,999"), (16_100, "16.1k"), (999_900, "1,000k"), (108_310_272, "108M"), (2 * 10**9, "2B")],
)
def test_parameters_in_few_characters(number, text):
    assert plot._compact(number) == text
