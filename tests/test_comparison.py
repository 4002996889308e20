"""Comparison of a run with its step-matched baseline: the statistics, the sentence, and two models on the same data."""

import json
import logging
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import EarlyStoppingCallback, EvalPrediction, TrainerCallback, TrainingArguments

from perforated_trainer.comparison import bootstrap, compare, paired_proportions, sentence
from perforated_trainer.evaluation import EvaluatingTrainer

KEYS = {"control_of", "metric", "with_dendrites", "without", "difference", "interval_95", "test_examples", "verdict"}
SIZE = 60

# ------------------------------------------------------------------------------------------------------ the statistics


def test_paired_proportions_covers_the_true_difference():
    """Simulated pairs of models: 95% of the intervals contain the true difference, also if errors are rare."""
    generator, inside, repeats = np.random.default_rng(0), 0, 2000
    for _ in range(repeats):
        hard, own = generator.random(300) < 0.02, generator.random((2, 300)) < [[0.01], [0.03]]
        candidate, baseline = ~(hard | own[0]), ~(hard | own[1])
        low, high = paired_proportions(candidate, baseline)
        inside += low <= 0.02 * 0.98 <= high
    assert 0.94 <= inside / repeats <= 0.985


def test_paired_proportions_of_equal_models_includes_other_examples():
    low, high = paired_proportions(np.ones(100, bool), np.ones(100, bool))
    assert low == -high and 0 < high < 0.03, "models that agree on all of 100 examples could differ on others"


def predictions(shares, number=1000):
    """Predictions of two models that are wrong on these fractions of the examples."""
    generator, labels = np.random.default_rng(1), np.arange(number) % 10
    logits = np.eye(10)[labels]
    wrong = [np.where(generator.random((number, 1)) < share, 0.0, logits) for share in shares]
    return [EvalPrediction(predictions=(logits,), label_ids=labels) for logits in wrong]


def accuracy(prediction):
    return float((prediction.predictions[0].argmax(-1) == prediction.label_ids).mean())


def test_bootstrap_agrees_with_paired_proportions_and_is_repeatable():
    candidate, baseline = predictions((0.1, 0.2))
    interval = bootstrap(candidate, baseline, accuracy)
    right = [p.predictions[0].argmax(-1) == p.label_ids for p in (candidate, baseline)]
    assert interval == pytest.approx(paired_proportions(*right), abs=0.006)
    assert interval == bootstrap(candidate, baseline, accuracy)


@pytest.mark.parametrize("defined, is_known", [(1.0, True), (0.9, True), (0.3, False), (0.0, False)])
def test_bootstrap_is_none_if_the_metric_is_undefined_on_most_resamples(defined, is_known):
    generator, errors = np.random.default_rng(0), iter([ValueError, IndexError, ZeroDivisionError, RuntimeError] * 999)

    def score(prediction):
        if generator.random() > defined**0.5:  # it is called twice for each resample
            if generator.random() > 0.5:
                return float("nan")
            raise next(errors)
        return accuracy(prediction)

    assert (bootstrap(*predictions((0.1, 0.2), 50), score) is not None) == is_known


def test_bootstrap_of_other_predictions_than_one_row_per_example_is_none():
    wrong = EvalPrediction(predictions=np.zeros((7, 2)), label_ids=np.zeros(9, int))
    assert bootstrap(wrong, wrong, lambda prediction: 1.0) is None
    empty = EvalPrediction(predictions=np.zeros((0, 2)), label_ids=np.zeros(0, int))
    assert bootstrap(empty, empty, lambda prediction: 1.0) is None


# -------------------------------------------------------------------------------------------------------- the sentence


@pytest.mark.parametrize(
    "metric, values, interval, dendrites, words",
    [
        ("test_accuracy", (0.986, 0.976), [0.004, 0.016], 2,
         "Compared with a baseline trained for the same number of steps, the test error is 1.40% with dendrites and "
         "2.40% without. With dendrites it is better, statistically significant (95% CI -1.60 to -0.40 "),
        ("test_accuracy", (0.976, 0.986), [-0.016, -0.004], 1, "it is worse, statistically significant (95% CI"),
        ("test_accuracy", (0.986, 0.984), [-0.004, 0.008], 1,
         "significant (95% CI -0.80 to +0.40 percentage points, includes 0; 1,000 test examples)."),
        ("test_loss", (0.5, 0.4), [-0.1, 0.3], 1, "(95% CI -0.1000 to +0.3000, includes 0; 1,000 test examples)."),
        ("test_accuracy", (0.984, 0.984), [-0.004, 0.004], 0, "The run kept no dendrite. Compared with"),
        ("test_accuracy", (93.0, 91.0), [1.0, 3.0], 1, "test accuracy is 93.0000 with dendrites and 91.0000 without."),
        ("validation_f1_macro", (0.5, 0.4), None, 1, "These are validation scores, by which both models were selected"),
    ],
)  # fmt: skip
def test_sentence_says_what_differs_and_whether_it_is_significant(metric, values, interval, dendrites, words):
    compared = {"metric": metric, "interval_95": interval, "test_examples": 1000}
    compared |= dict(zip(("with_dendrites", "without"), values, strict=True))
    assert words in sentence(compared, values[0] > values[1], dendrites)


# ------------------------------------------------------------------------------------- two models on the same examples


class Linear(torch.nn.Module):
    """A model that is right on the first `right` examples of each class."""

    def __init__(self, right=SIZE):
        super().__init__()
        self.right = torch.nn.Parameter(torch.tensor(float(right)))

    def forward(self, row, labels=None):
        logits = torch.nn.functional.one_hot(torch.where(row < self.right, labels, 1 - labels), 2).float()
        return {"loss": logits.mean() * self.right.sign(), "logits": logits}


class Hears(TrainerCallback):
    def __init__(self):
        self.events = []

    def on_evaluate(self, *args, **kwargs):
        self.events.append("evaluate")

    def on_predict(self, *args, **kwargs):
        self.events.append("predict")

    def on_prediction_step(self, *args, **kwargs):
        self.events.append("prediction step")


class MineTrainer(EvaluatingTrainer):
    """The part of a baseline's trainer that a comparison uses."""

    score_name, test_dataset = "eval_accuracy", None
    growth = SimpleNamespace(initial_weights="a", frozen_weights=lambda: "b", same_network=True)

    def cycles(self):
        return [{"best_validation": 0.5}]


def compute_metrics(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A baseline that is right on 40 of 60 examples, and the folder of its run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "final").mkdir(parents=True)
    rows, hears = [{"row": i, "labels": i % 2} for i in range(SIZE)], Hears()
    args = TrainingArguments("baseline", use_cpu=True, report_to="none", disable_tqdm=True, greater_is_better=True)
    args.metric_for_best_model = "accuracy"
    trainer = MineTrainer(
        Linear(40), args, eval_dataset=rows, compute_metrics=compute_metrics, callbacks=[hears, EarlyStoppingCallback()]
    )
    trainer.test_dataset = rows
    return SimpleNamespace(trainer=trainer, hears=hears, run=tmp_path / "run", rows=rows)


def go(world, load=lambda folder: Linear(58), final=None, results=None, **kwargs):
    final = {"test_accuracy": 40 / SIZE, "validation_accuracy": 0.1} if final is None else final
    results = results or {"final": {"dendrites": 1, "test_accuracy": 58 / SIZE}, "cycles": [{"best_validation": 0.8}]}
    return compare(world.trainer, results, final, world.run, load, **kwargs)


def test_compare_gives_scores_and_interval_of_the_test_data(world):
    compared = go(world)
    assert set(compared) == KEYS and compared["control_of"] == str(world.run)
    assert (compared["metric"], compared["test_examples"]) == ("test_accuracy", SIZE)
    assert compared["with_dendrites"] == 58 / SIZE and compared["without"] == 40 / SIZE
    right = [np.arange(SIZE) < limit for limit in (58, 40)]
    assert compared["interval_95"] == paired_proportions(*right)
    assert "it is better, statistically significant" in compared["verdict"]
    assert json.loads(json.dumps(compared)) == compared


def test_compare_loads_the_model_of_the_run_once(world):
    folders = []
    go(world, load=lambda folder: folders.append(folder) or Linear(58))
    assert folders == [world.run / "final"]


def test_compare_leaves_the_trainer_as_it_was(world, caplog):
    trainer = world.trainer
    names = "model", "model_wrapped", "compute_metrics", "callback_handler", "control", "state"
    before = [getattr(trainer, name) for name in names]
    with caplog.at_level(logging.WARNING):
        go(world)
    assert all(getattr(trainer, name) is value for name, value in zip(names, before, strict=True))
    assert world.hears.events == [] and not caplog.records
    assert not trainer.control.should_training_stop
    assert trainer.predict(world.rows).metrics["test_accuracy"] == 40 / SIZE, "its own model"


def test_compare_with_an_error_in_the_other_model_leaves_the_trainer_as_it_was(world):
    broken = Linear(1)
    broken.forward = lambda **inputs: 1 / 0
    model, handler = world.trainer.model, world.trainer.callback_handler
    assert "cannot be evaluated (division by zero)" in go(world, load=lambda folder: broken)["verdict"]
    assert world.trainer.model is model and world.trainer.callback_handler is handler
    assert world.trainer.compute_metrics is compute_metrics


def test_compare_another_metric_uses_the_bootstrap(world):
    world.trainer.score_name = "eval_recall"
    world.trainer.compute_metrics = lambda p: {"recall": compute_metrics(p)["accuracy"]}
    results = {"final": {"dendrites": 1, "validation_recall": 0.96}, "cycles": []}
    compared = go(world, final={"validation_recall": 0.66}, results=results)
    low, high = compared["interval_95"]
    assert compared["metric"] == "validation_recall" and low < compared["difference"] < high
    assert "These are validation scores" in compared["verdict"]


def break_load(folder):
    raise OSError("no file named\nmodel.safetensors")


@pytest.mark.parametrize(
    "change, load, words",
    [
        (lambda w: (w.run / "final").rmdir(), None, "the model of the run is gone"),
        (lambda w: None, break_load, r"the model of the run in .*final cannot be loaded \(no file named model"),
        (lambda w: None, None, r"cannot be loaded \(.*from_pretrained"),  # a plain nn.Module
        (lambda w: setattr(w.trainer.args, "batch_eval_metrics", True), None, r"summed up over batches \(batch_eval"),
        (lambda w: setattr(w.trainer, "test_dataset", {"a": w.rows}), None, "there are several test data sets"),
        (lambda w: setattr(w.trainer, "compute_metrics", None), None, "no values for single examples"),
    ],
)  # fmt: skip
def test_compare_without_interval_gives_the_reason(world, change, load, words):
    change(world)
    compared = go(world, load=load)
    assert set(compared) == KEYS and compared["interval_95"] is None
    assert re.search(f"There is no confidence interval: .*{words}", compared["verdict"])
    assert "\n" not in compared["verdict"] and compared["difference"] == pytest.approx(0.3)


def test_compare_a_metric_that_is_rarely_defined_gives_the_reason(world):
    calls = []

    def rare(prediction):
        calls.append(1)
        return {"f1": 0.5 if len(calls) < 3 else float("nan")}

    world.trainer.score_name, world.trainer.compute_metrics = "eval_f1", rare
    compared = go(world, final={"test_f1": 0.5}, results={"final": {"dendrites": 1, "test_f1": 0.6}, "cycles": []})
    assert "undefined on more than half of the bootstrap resamples" in compared["verdict"]


def test_compare_the_loss_has_no_interval(world):
    world.trainer.score_name, world.trainer.args.greater_is_better = "eval_loss", False
    compared = go(world, final={"test_loss": 0.4}, results={"final": {"dendrites": 1, "test_loss": 0.3}, "cycles": []})
    assert compared["interval_95"] is None and compared["test_examples"] == SIZE
    assert "no values for single examples" in compared["verdict"] and "0.3000 with dendrites" in compared["verdict"]


def test_compare_scores_of_the_log_if_there_are_no_final_ones(world):
    compared = go(world, final={})
    assert (compared["metric"], compared["with_dendrites"], compared["without"]) == ("validation_accuracy", 0.8, 0.5)
    assert compared["interval_95"] is None and compared["test_examples"] is None


def test_compare_a_metric_is_not_called_for_half_an_evaluation(world):
    """A `compute_metrics` with a state sees the predictions of whole models, or resamples."""
    sizes = []
    world.trainer.compute_metrics = lambda p: sizes.append(len(p.label_ids)) or compute_metrics(p)
    go(world)
    assert set(sizes) == {SIZE}
