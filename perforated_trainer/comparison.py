"""Compare a run with its step-matched baseline, with a 95% confidence interval.

The interval is that of the test examples: how much the difference would vary with other examples of the same kind. A
pair of runs says nothing about other seeds; for that, train several pairs and compare their means, as
`benchmarks/dendrites.py` does.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from torch import nn
from transformers import EvalPrediction, Trainer
from transformers.utils import logging

from . import _compat, report

RESAMPLES = 500
SEED = 0  # of the resampling: the same predictions always give the same interval
MODEL = "final"  # the folder of a run's model, in the folder of the run


class _NoInterval(Exception):
    """Why there is no confidence interval."""


def compare(
    trainer: Trainer, results: dict, final: dict, folder: Path, load: Callable[[Path], nn.Module] | None = None
) -> dict:
    """Compare the model of a step-matched baseline with that of its run.

    Args:
        trainer (`PerforatedTrainer`): The trainer of the baseline, after its training. It keeps its model.
        results (`dict`): `results.json` of the run with dendrites.
        final (`dict`): The final scores of the baseline, as in its `results.json`.
        folder (`Path`): The folder of the run.
        load (`Callable[[Path], nn.Module]`, *optional*): Loads the run's model from its folder. By default
            `from_pretrained` of the baseline's class.

    Returns:
        `dict`: The entry `control` of `results.json`: control_of, metric, with_dendrites, without, difference (the
        first minus the second), interval_95 (None if it is not known), test_examples and `verdict` (a sentence). The
        scores are those on the test data, or on the validation data if the run had no test data.
    """
    name, part, data = report.unit(trainer.score_name), "validation", None
    for candidate, candidate_data in (("test", trainer.test_dataset), ("validation", trainer.eval_dataset)):
        if f"{candidate}_{name}" in final and f"{candidate}_{name}" in results["final"]:
            part, data = candidate, candidate_data
            with_dendrites, without = results["final"][f"{part}_{name}"], final[f"{part}_{name}"]
            break
    else:  # the score is in the log only
        with_dendrites, without = (
            report.best(cycles, "best_validation", trainer.args.greater_is_better)["best_validation"]
            for cycles in (results["cycles"], trainer.cycles())
        )
    examples, interval, reason = None, None, None
    with contextlib.suppress(Exception):  # the data may have no size
        examples = len(data) if not isinstance(data, dict) else None
    try:
        interval, examples = _interval(trainer, name, part, data, folder, load)
    except _NoInterval as error:
        reason = str(error)
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
    no_test = f"the test data has no {name}" if trainer.test_dataset is not None else "there was no test data"
    words = sentence(compared, better, results["final"]["dendrites"], reason, no_test)
    own = {"initial_weights": trainer.growth.initial_weights, "frozen_weights": trainer.growth.frozen_weights()}
    if trainer.growth.same_network and any(results.get(name, value) != value for name, value in own.items()):
        words += " The baseline did not begin with the weights with which the run began."
    return compared | {"verdict": words}


def sentence(
    compared: dict, better: bool, dendrites: int, reason: str | None = None, no_test: str = "there was no test data"
) -> str:
    """The comparison in words.

    Args:
        compared (`dict`): The entry `control` of `results.json`.
        better (`bool`): Whether the score with dendrites is the better one.
        dendrites (`int`): Number of dendrites of the run's model.
        reason (`str`, *optional*): Why there is no confidence interval.
        no_test (`str`): Why validation scores are compared, if they are.

    Returns:
        `str`: One to four sentences.
    """
    part, name = compared["metric"].split("_", 1)
    values, interval = (compared["with_dendrites"], compared["without"]), compared["interval_95"]
    what, shown = f"{part} {name}", [report.number(value) for value in values]
    if report.is_error_rate(name, *values):
        what, shown = f"{part} error", [f"{100 * (1 - value):.2f}%" for value in values]
    words = (
        f"Compared with a baseline trained for the same number of steps, the {what} is {shown[0]} with dendrites and "
        f"{shown[1]} without. "
    )
    if interval is None:
        words += f"There is no confidence interval: {reason or 'the metric has no values for single examples'}."
    else:
        low, high = interval
        bounds, zero = f"{low:+.4f} to {high:+.4f}", "includes 0" if low <= 0 <= high else "excludes 0"
        if what.endswith("error"):
            bounds = f"{-100 * high:+.2f} to {-100 * low:+.2f} percentage points"
        significant = f"With dendrites it is {'better' if better else 'worse'}, statistically significant"
        words += significant if zero == "excludes 0" else "The difference is not statistically significant"
        words += f" (95% CI {bounds}, {zero}; {compared['test_examples']:,} {part} examples)."
    if part == "validation":
        words += f" These are validation scores, by which both models were selected: {no_test}."
    return words if dendrites else f"The run kept no dendrite. {words}"


# ------------------------------------------------------------------------------------ two models on the same examples


def _interval(trainer, name, part, data, folder, load) -> tuple[list[float], int]:
    """The confidence interval of the difference, and the number of examples."""
    if isinstance(data, dict):
        raise _NoInterval(f"there are several {part} data sets")
    if data is None or trainer.compute_metrics is None:
        raise _NoInterval("the metric has no values for single examples")
    if trainer.args.batch_eval_metrics:
        raise _NoInterval("the metric is summed up over batches (batch_eval_metrics)")
    if not trainer.args.eval_do_concat_batches:
        raise _NoInterval("predictions are kept by batch (eval_do_concat_batches)")
    model = _load(load or (lambda path: type(trainer.model).from_pretrained(path)), folder)
    baseline = _predictions(trainer, data, part)
    try:
        with _other_model(trainer, model):
            candidate = _predictions(trainer, data, part)
    except Exception as error:  # out of memory, for example; the results of the baseline must not be lost
        raise _NoInterval(f"the model of the run cannot be evaluated ({_one_line(error)})") from None
    if baseline is None or candidate is None or _count(baseline) != _count(candidate):
        raise _NoInterval("the two models have no predictions to compare")

    def score(prediction):
        scores = trainer.compute_metrics(prediction)
        return float(scores[name] if name in scores else scores[f"{part}_{name}"])

    try:
        score(baseline)
    except (KeyError, TypeError):  # not from compute_metrics, such as the loss
        raise _NoInterval("the metric has no values for single examples") from None
    interval = _paired_interval(candidate, baseline, name, score)
    if interval is None:
        raise _NoInterval("the metric is undefined on more than half of the bootstrap resamples")
    return interval, _count(baseline)


def _load(load: Callable[[Path], nn.Module], folder: Path) -> nn.Module:
    """The model of a run."""
    if not (folder / MODEL).is_dir():
        raise _NoInterval(f"the model of the run is gone, {folder / MODEL} does not exist")
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # of weights being loaded
    try:
        return load(folder / MODEL)
    except Exception as error:  # of a custom class, too; the scores are known without it
        raise _NoInterval(f"the model of the run in {folder / MODEL} cannot be loaded ({_one_line(error)})") from None
    finally:
        if bars:
            logging.enable_progress_bar()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _predictions(trainer, data, part: str) -> EvalPrediction | None:
    """What `compute_metrics` receives for `data`: the Trainer gathers it, pads it and generates text."""
    seen, before = [], trainer.compute_metrics

    def keep(prediction):
        seen.append(prediction)
        return {}

    trainer.compute_metrics = keep
    try:
        trainer.scores(data, part)
    finally:
        trainer.compute_metrics = before
    return seen[-1] if seen else None


@contextlib.contextmanager
def _other_model(trainer, model) -> Iterator[None]:
    """Let the trainer evaluate another model, on its device and in its precision."""
    before = trainer.model, trainer.model_wrapped
    prepared = trainer.accelerator.prepare_model(model.to(trainer.args.device), evaluation_mode=True)
    trainer.model = trainer.model_wrapped = prepared
    try:
        yield
    finally:
        trainer.model, trainer.model_wrapped = before
        _compat.forget_model(trainer.accelerator, prepared)


# ------------------------------------------------------------------------------------------- the confidence interval


def _paired_interval(candidate: EvalPrediction, baseline: EvalPrediction, name: str, score) -> list[float] | None:
    """95% confidence interval of `score(candidate) - score(baseline)`, both of the same examples."""
    correct = [_correct(prediction) for prediction in (candidate, baseline)] if name == "accuracy" else [None]
    if all(
        right is not None and math.isclose(right.mean(), score(prediction), abs_tol=1e-6)
        for right, prediction in zip(correct, (candidate, baseline), strict=False)
    ):
        return paired_proportions(*correct)
    return bootstrap(candidate, baseline, score)


def _correct(prediction: EvalPrediction) -> np.ndarray | None:
    """For each example whether its label is predicted, if predictions are logits of one label each."""
    logits, labels = prediction.predictions, prediction.label_ids
    logits = logits[0] if isinstance(logits, tuple) else logits
    if not isinstance(labels, np.ndarray) or labels.ndim != 1 or np.ndim(logits) != 2 or not len(labels):
        return None
    return logits.argmax(-1) == labels


def paired_proportions(candidate: np.ndarray, baseline: np.ndarray) -> list[float]:
    """95% confidence interval of the difference of two proportions of the same examples.

    That of Agresti and Min (2005): the normal one after half an example is added to each cell of the two by two table.
    It has its coverage with few examples too, and if both models are right on the same ones.

    Args:
        candidate, baseline (`np.ndarray`): For each example whether a model is right.

    Returns:
        `list[float]`: The two bounds.
    """
    number = len(candidate) + 2
    only_candidate, only_baseline = np.sum(candidate & ~baseline) + 0.5, np.sum(baseline & ~candidate) + 0.5
    middle = (only_candidate - only_baseline) / number
    variance = (only_candidate + only_baseline) - (only_candidate - only_baseline) ** 2 / number
    half = 1.959964 * math.sqrt(variance) / number
    return [float(middle - half), float(middle + half)]


def bootstrap(
    candidate: EvalPrediction, baseline: EvalPrediction, score: Callable[[EvalPrediction], float]
) -> list[float] | None:
    """95% confidence interval of `score(candidate) - score(baseline)`, from resampled examples, the same for both.

    Args:
        candidate, baseline (`EvalPrediction`): The predictions of two models for the same examples.
        score (`Callable[[EvalPrediction], float]`): The metric.

    Returns:
        `list[float]`: The two bounds. None if the metric is undefined on more than half of the bootstrap resamples, or
        if predictions are not one row per example.
    """
    generator, number, differences = np.random.default_rng(SEED), _count(baseline), []
    for _ in range(RESAMPLES if number else 0):
        drawn = generator.integers(number, size=number)
        try:
            difference = score(_rows(candidate, drawn)) - score(_rows(baseline, drawn))
        except Exception:  # the user's metric on examples that it does not expect, such as without one of the classes
            continue
        if math.isfinite(difference):
            differences.append(difference)
    if not differences or len(differences) < RESAMPLES / 2:
        return None
    return [float(bound) for bound in np.quantile(differences, (0.025, 0.975))]


def _count(prediction: EvalPrediction) -> int:
    """Number of examples."""
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
