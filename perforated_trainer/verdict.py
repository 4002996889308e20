"""The verdict on a run with dendrites: its scores beside those of its control, and what chance could do.

The interval is that of the test examples: it says how much the difference would move with other examples of the same
kind. One pair of runs says nothing of other seeds; for that, train several pairs and compare their means, as
`benchmarks/dendrites.py` does.
"""

import contextlib
import math
from pathlib import Path

import numpy as np
from transformers import EvalPrediction, Trainer
from transformers.utils import logging

from . import _compat, report

RESAMPLES = 500
SEED = 0  # of the resampling: a verdict can be repeated to the last digit


def verdict(trainer: Trainer, results: dict, final: dict, folder: Path) -> dict:
    """Compare the model of a control with that of its run.

    Args:
        trainer: of the control, after its training.
        results: what `results.json` of the run with dendrites holds.
        final: the scores of the control's model, as in `results.json`.
        folder: of the run with dendrites; its model is loaded from `final/`.

    Returns the entry `control` of `results.json`: control_of, metric, with_dendrites, without, difference (the first
    less the second), interval_95 (None where the score has no value for single examples), test_examples, verdict. The
    scores are those on the test data, or on the validation data where the run had no test data.
    """
    name, part, data = report.unit(trainer.score_name), "validation", None
    for candidate, candidate_data in (("test", trainer.test_dataset), ("validation", trainer.eval_dataset)):
        if f"{candidate}_{name}" in final and f"{candidate}_{name}" in results["final"]:
            part, data = candidate, candidate_data
            with_dendrites, without = results["final"][f"{part}_{name}"], final[f"{part}_{name}"]
            break
    else:  # the score stands in the log only
        with_dendrites, without = (
            report.best(cycles, "best_validation", trainer.args.greater_is_better)["best_validation"]
            for cycles in (results["cycles"], trainer.cycles())
        )
    interval, examples = _interval(trainer, name, part, data, folder)
    if examples is None and hasattr(data, "__len__"):
        examples = len(data)
    compared = {
        "control_of": str(folder),
        "metric": f"{part}_{name}",
        "with_dendrites": with_dendrites,
        "without": without,
        "difference": with_dendrites - without,
        "interval_95": interval,
        "test_examples": examples,
    }
    better = (compared["difference"] > 0) == bool(trainer.args.greater_is_better)
    return compared | {"verdict": sentence(compared, better, results["final"]["dendrites"])}


def sentence(compared: dict, better: bool, dendrites: int) -> str:
    """The comparison in words that need no statistics.

    Args:
        compared: the entry `control` of `results.json`.
        better: whether the score with dendrites is the better one.
        dendrites: how many the model with dendrites has.
    """
    part, name = compared["metric"].split("_", 1)
    values = compared["with_dendrites"], compared["without"]
    if name == "accuracy":
        theirs, ours = (f"{100 * (1 - value):.2f} %" for value in values)
        words = f"Dendrites: {theirs} {part} error, without them, trained the same way: {ours}."
    else:
        theirs, ours = (f"{value:.4f}" for value in values)
        words = f"Dendrites: {part} {name} {theirs}, without them, trained the same way: {ours}."
    interval = compared["interval_95"]
    if interval is None:
        words += " Chance cannot be judged: this score has no values for single examples."
    elif not interval[0] <= 0 <= interval[1]:
        words += " The difference is larger than chance." if better else " Dendrites were worse, by more than chance."
    else:
        words += f" The difference cannot be told from chance with {compared['test_examples']:,} {part} examples."
    if part == "validation":
        words += " These are validation scores, by which both models were chosen: there was no test data."
    return words if dendrites else f"That run kept no dendrite. {words}"


# -------------------------------------------------------------------------------------- two models, the same examples


def _interval(trainer, name: str, part: str, data, folder: Path) -> tuple[list[float] | None, int | None]:
    """The interval of the difference, and the number of examples. None where it cannot be known."""
    if data is None or isinstance(data, dict) or trainer.compute_metrics is None or trainer.args.batch_eval_metrics:
        return None, None
    ours = _predictions(trainer, data, part)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # of weights being loaded
    try:
        model = type(trainer.model).from_pretrained(folder / "final")
    except (OSError, ValueError, RuntimeError):  # of a class that needs more than its folder
        return None, _count(ours)
    finally:
        if bars:
            logging.enable_progress_bar()
    with _other_model(trainer, model):
        theirs = _predictions(trainer, data, part)

    def score(prediction):
        scores = trainer.compute_metrics(prediction)
        return float(scores[name] if name in scores else scores[f"{part}_{name}"])

    try:
        return _paired_interval(theirs, ours, name, score), _count(ours)
    except (KeyError, TypeError):  # a score that compute_metrics does not give, such as the loss
        return None, _count(ours)


def _predictions(trainer, data, part: str) -> EvalPrediction | None:
    """What `compute_metrics` gets for `data`: the Trainer gathers it, pads it and generates text."""
    seen, compute_metrics = [], trainer.compute_metrics

    def keep(prediction):
        seen.append(prediction)
        return compute_metrics(prediction)

    trainer.compute_metrics = keep
    try:
        trainer.predict(data, metric_key_prefix=part)
    finally:
        trainer.compute_metrics = compute_metrics
    return seen[-1] if seen else None


@contextlib.contextmanager
def _other_model(trainer, model):
    """Let the trainer evaluate another model, on its device and in its precision."""
    before = trainer.model, trainer.model_wrapped
    prepared = trainer.accelerator.prepare_model(model.to(trainer.args.device), evaluation_mode=True)
    trainer.model = trainer.model_wrapped = prepared
    try:
        yield
    finally:
        trainer.model, trainer.model_wrapped = before
        _compat.forget_model(trainer.accelerator, prepared)


# --------------------------------------------------------------------------------------------------------- the interval


def _paired_interval(theirs: EvalPrediction, ours: EvalPrediction, name: str, score) -> list[float] | None:
    """95 % interval of `score(theirs) - score(ours)`, both of the same examples."""
    if theirs is None or ours is None:
        return None
    correct = [_correct(prediction) for prediction in (theirs, ours)] if name == "accuracy" else [None]
    if all(
        right is not None and math.isclose(right.mean(), score(prediction), abs_tol=1e-6)
        for right, prediction in zip(correct, (theirs, ours), strict=False)
    ):
        return paired_proportions(*correct)
    return bootstrap(theirs, ours, score)


def _correct(prediction: EvalPrediction) -> np.ndarray | None:
    """For each example whether its label is predicted, where that is what the predictions are."""
    logits, labels = prediction.predictions, prediction.label_ids
    logits = logits[0] if isinstance(logits, tuple) else logits
    if not isinstance(labels, np.ndarray) or labels.ndim != 1 or np.ndim(logits) != 2:
        return None
    return logits.argmax(-1) == labels


def paired_proportions(theirs: np.ndarray, ours: np.ndarray) -> list[float]:
    """95 % interval of the difference of two shares of the same examples.

    That of Agresti and Min (2005): the normal one after half an example is added to each cell of the two by two table.
    It holds what it says with few examples too, and where both models are right on the same ones.
    """
    number = len(theirs) + 2
    only_theirs, only_ours = np.sum(theirs & ~ours) + 0.5, np.sum(ours & ~theirs) + 0.5
    middle = (only_theirs - only_ours) / number
    half = 1.959964 * math.sqrt((only_theirs + only_ours) - (only_theirs - only_ours) ** 2 / number) / number
    return [float(middle - half), float(middle + half)]


def bootstrap(theirs: EvalPrediction, ours: EvalPrediction, score) -> list[float] | None:
    """95 % interval of `score(theirs) - score(ours)` over examples drawn with replacement, the same ones for both.

    None where the predictions are not one row an example, or the score cannot be had of most draws.
    """
    generator, number, differences = np.random.default_rng(SEED), _count(ours), []
    for _ in range(RESAMPLES):
        drawn = generator.integers(number, size=number)
        try:
            difference = score(_rows(theirs, drawn)) - score(_rows(ours, drawn))
        except (ValueError, ZeroDivisionError):  # such as a draw without one of the classes
            continue
        if math.isfinite(difference):
            differences.append(difference)
    if len(differences) < RESAMPLES / 2:
        return None
    return [float(bound) for bound in np.quantile(differences, (0.025, 0.975))]


def _count(prediction: EvalPrediction | None) -> int | None:
    """Number of examples."""
    if prediction is None:
        return None
    value = prediction.predictions if prediction.label_ids is None else prediction.label_ids
    while isinstance(value, (tuple, list, dict)) and len(value):
        value = next(iter(value.values())) if isinstance(value, dict) else value[0]
    return len(value)


def _rows(prediction: EvalPrediction, rows: np.ndarray) -> EvalPrediction:
    """Some of the examples of a prediction, in this order."""
    number = _count(prediction)

    def take(value):
        if value is None:
            return None
        if isinstance(value, (tuple, list)):
            return type(value)(take(part) for part in value)
        if isinstance(value, dict):
            return {name: take(part) for name, part in value.items()}
        if len(value) != number:
            raise ValueError(f"{len(value)} rows for {number} examples")
        return value[rows]

    return EvalPrediction(*(take(getattr(prediction, of)) for of in ("predictions", "label_ids", "inputs", "losses")))
