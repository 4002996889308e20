"""Reports: cycles, warnings before and after a run, sentences, the summary."""

import math
from pathlib import Path

import numpy as np
import pytest
from transformers import EarlyStoppingCallback, TrainingArguments

from perforated_trainer import DendriteArguments, report

NAMES = ["f1, macro", "точность", "100%", "{x}", "a_b_c", "$x$", "a|b", "n" * 300]


def history(scores_by_dendrites, name="score"):
    """The records of an evaluation every 2 steps."""
    entries, step = [], 0
    for dendrites, scores in scores_by_dendrites:
        for score in scores:
            step += 2
            metrics = {f"test_{name}": score / 2, f"eval_{name}": score, "eval_runtime": 1.0}
            entries.append(report.record(step, dendrites, 10 * (1 + dendrites), metrics))
    return entries


def arguments(**settings):
    return TrainingArguments("run", use_cpu=True, report_to="none", **{"eval_strategy": "steps"} | settings)


# ---------------------------------------------------------------------------------------------------- the log history


def test_cycles_hold_the_best_evaluation_per_number_of_dendrites():
    log = history([(0, [0.1, 0.3, 0.2]), (1, [0.2, 0.5, 0.5])])
    assert report.cycles(log, "eval_score", True) == [
        {"dendrites": 0, "parameters": 10, "global_step": 4, "best_validation": 0.3, "test_score": 0.15},
        {"dendrites": 1, "parameters": 20, "global_step": 10, "best_validation": 0.5, "test_score": 0.25},
    ]
    assert [c["best_validation"] for c in report.cycles(log, "eval_score", False)] == [0.1, 0.2]


def test_cycles_with_smoothed_scores_take_the_best_mean_of_a_cycle():
    log = history([(0, [0.1, 0.9, 0.1, 0.6, 0.6]), (1, [0.7, 0.2])])
    steps = [cycle["global_step"] for cycle in report.cycles(log, "eval_score", True, 2, [10])]
    assert steps == [10, 12], "the mean of 0.6 and 0.6; and the second cycle begins without the scores of the first"


def test_cycles_skip_scores_that_are_not_finite():
    log = history([(0, [float("nan"), 0.2, float("inf"), 0.1]), (1, [float("nan")])])
    assert [cycle["best_validation"] for cycle in report.cycles(log, "eval_score", True)] == [0.2]


def test_record_keeps_numbers_and_losses_and_no_durations():
    metrics = {"eval_score": np.float32(0.5), "eval_loss": 1, "eval_text": "no", "eval_matrix": [1.0], "epoch": 2.0}
    metrics |= {"eval_runtime": 1.0, "eval_a_samples_per_second": 3.0, "test_score": float("nan")}
    record = report.record(4, 1, 20, metrics)
    assert math.isnan(record.pop("test_score"))
    assert record == {"step": 4, "dendrites": 1, "parameters": 20, "eval_score": 0.5, "eval_loss": 1.0}


@pytest.mark.parametrize("name", NAMES)
def test_reports_work_with_any_name_of_a_metric(name):
    log = history([(0, [0.1, 0.2]), (1, [0.5])], name)
    cycles = report.cycles(log, f"eval_{name}", True)
    assert cycles[1]["best_validation"] == 0.5 and cycles[1][f"test_{name}"] == 0.25
    text = report.summary(results(cycles, name=name), Path("run"))
    assert f"validation {name} 0.2000 -> 0.5000 (150% higher)" in text and name in report.table(cycles).split("\n")[0]


@pytest.mark.parametrize(
    "name, monitored, reported",
    [
        ("eval_accuracy", "eval_accuracy", True),
        ("eval_loss", "eval_accuracy", False),
        ("test_loss", "eval_loss", True),
        ("eval_a_loss", "eval_loss", True),
        ("eval_runtime", "eval_loss", False),
        ("eval_a_steps_per_second", "eval_loss", False),
        ("epoch", "eval_loss", False),
    ],
)
def test_is_reported_leaves_out_durations_and_an_unused_loss(name, monitored, reported):
    assert report.is_reported(name, monitored) == reported


# ------------------------------------------------------------------------------------------------------- before a run


def test_direction_names_metric_and_direction():
    up = arguments(metric_for_best_model="accuracy", greater_is_better=True)
    down = arguments(metric_for_best_model="eval_wer", greater_is_better=False)
    assert report.direction(up) == "eval_accuracy: higher is better"
    assert report.direction(down) == "eval_wer: lower is better"


@pytest.mark.parametrize(
    "score, metrics, labels, expected, absent",
    [
        ("eval_loss", {"eval_runtime": 1.0, "epoch": 1}, ["labels"], ["eval_loss", "label_names", "labels"], "runtime"),
        ("eval_acc", {"eval_accuracy": 1.0, "eval_loss": 0.1}, [], ["eval_acc.", "eval_accuracy, eval_loss"], "label_"),
        ("eval_loss", {"eval_a_loss": 1.0, "eval_b_loss": 2.0}, [], ["eval_a_loss, eval_b_loss"], "label_names"),
        ("eval_loss", {"eval_accuracy": 1.0}, None, ["eval_accuracy", "label_names", "none"], "no metric"),
        ("eval_f1", {"eval_runtime": 1.0}, [], ["no metric", "label_names"], "runtime"),
    ],
)
def test_missing_metric_names_what_there_is_and_labels_if_they_are_missing(score, metrics, labels, expected, absent):
    line = report.missing_metric(score, metrics, labels)
    assert all(part in line for part in expected) and absent not in line and "\n" not in line


@pytest.mark.parametrize(
    "entries, expected",
    [
        ([], 0.0),
        ([(2, 1.0), (6, 4.0)], 3.0),  # of two steps and of four
        ([(2, 1.0), (2, None), (4, 3.0)], 2.0),
    ],
)
def test_train_loss_is_the_mean_over_steps(entries, expected):
    log = [{"step": step, "eval_loss": 9.0} | ({} if loss is None else {"loss": loss}) for step, loss in entries]
    assert report.train_loss(log) == expected


class NoSize:
    def __len__(self):
        raise TypeError("a stream")


@pytest.mark.parametrize(
    "patience, settings, data, needed",
    [
        (3, {"max_steps": 8, "eval_steps": 2}, None, 5),  # a dendrite comes with the last one, and is not trained
        (3, {"max_steps": 10, "eval_steps": 2}, None, None),
        (3, {"max_steps": 9, "eval_steps": 2}, None, None),  # the last step is evaluated, too
        (3, {"max_steps": 10, "eval_steps": 2, "eval_delay": 3}, None, 5),
        (0, {"max_steps": 4, "eval_steps": 2}, None, None),
        (0, {"max_steps": 2, "eval_steps": 2}, None, 2),
        (3, {"num_train_epochs": 4, "eval_strategy": "epoch"}, None, 5),
        (2, {"num_train_epochs": 4, "eval_strategy": "epoch"}, None, None),
        (3, {"num_train_epochs": 1, "eval_steps": 1, "per_device_train_batch_size": 4}, range(16), 5),
        (3, {"num_train_epochs": 1, "eval_steps": 1, "per_device_train_batch_size": 4}, range(17), None),
        (3, {"num_train_epochs": 1, "eval_steps": 1, "per_device_train_batch_size": 4, "dataloader_drop_last": True},
         range(19), 5),
        (2, {"num_train_epochs": 1, "eval_steps": 0.25}, range(80), None),
        (3, {"num_train_epochs": 1, "eval_steps": 0.25}, range(80), 5),
        (8, {"max_steps": 20, "eval_strategy": "epoch", "per_device_train_batch_size": 4}, range(8), None),
        (9, {"max_steps": 20, "eval_strategy": "epoch", "per_device_train_batch_size": 4}, range(8), 11),
        (3, {"num_train_epochs": 1, "eval_steps": 1}, NoSize(), None),
        (3, {"max_steps": 2, "eval_strategy": "epoch"}, iter([]), None),
        (3, {"max_steps": 4, "eval_steps": 2, "train_sampling_strategy": "group_by_length"}, NoSize(), 5),
    ],
)  # fmt: skip
def test_no_dendrite_can_come_by_the_number_of_evaluations(patience, settings, data, needed):
    line = report.no_dendrite_can_come(DendriteArguments(n_epochs_to_switch=patience), arguments(**settings), data)
    assert (f"n_epochs_to_switch={patience} needs {needed}" in line) if needed else line is None


@pytest.mark.parametrize(
    "dendrites",
    [
        {"doing_pai": False},
        {"max_dendrites": 0},
        {"testing_dendrite_capacity": True},
        {"switch_mode": "fixed"},
    ],
)
def test_no_dendrite_can_come_is_silent_if_patience_does_not_count(dendrites):
    args = arguments(max_steps=4, eval_steps=2)
    assert report.no_dendrite_can_come(DendriteArguments(n_epochs_to_switch=9), args, None) is not None
    assert report.no_dendrite_can_come(DendriteArguments(n_epochs_to_switch=9, **dendrites), args, None) is None


@pytest.mark.parametrize("patience, stops, said", [(10, 2, True), (10, 10, True), (10, 11, False), (0, 1, False)])
def test_early_stopping_on_a_plateau_before_the_first_dendrite_is_a_warning(patience, stops, said):
    settings = DendriteArguments(n_epochs_to_switch=patience)
    line = report.no_dendrite_can_come(
        settings, arguments(max_steps=900, eval_steps=2), None, [EarlyStoppingCallback(stops)]
    )
    assert bool(line) == said and ("EarlyStopping" in (line or "")) == said


@pytest.mark.parametrize("stops, said", [(1, True), (4, True), (5, False), (9, False)])
def test_early_stopping_within_a_fixed_cycle_is_a_warning(stops, said):
    args, settings = arguments(max_steps=10, eval_steps=2), DendriteArguments(switch_mode="fixed")
    line = report.no_dendrite_can_come(settings, args, None, [EarlyStoppingCallback(stops)])
    assert ("EarlyStopping" in (line or "")) == said
    args = arguments(num_train_epochs=1, eval_steps=2)  # of a stream: the length of a cycle is not known
    assert report.no_dendrite_can_come(settings, args, iter([]), [EarlyStoppingCallback(1)]) is None


def test_no_dendrite_can_come_gives_both_reasons():
    lines = report.no_dendrite_can_come(
        DendriteArguments(), arguments(max_steps=4, eval_steps=2), None, [EarlyStoppingCallback(1)]
    )
    assert len(lines.splitlines()) == 2 and all(line.startswith("warning: ") for line in lines.splitlines())


@pytest.mark.parametrize(
    "settings, words",
    [
        ({}, "after 10 evaluations without improvement (n_epochs_to_switch)"),
        ({"switch_mode": "fixed"}, "at the end of a cycle"),
        ({"max_dendrites": 0}, "max_dendrites is 0"),
    ],
)
def test_no_dendrite_came_gives_the_reason(settings, words):
    log = history([(0, [0.1, 0.2])])
    line = report.no_dendrite_came(DendriteArguments(**settings), log, "eval_score")
    assert words in line and "2 evaluations" in line
    assert report.no_dendrite_came(DendriteArguments(doing_pai=False), log, "eval_score") is None
    assert report.no_dendrite_came(DendriteArguments(control_of="run"), log, "eval_score") is None
    assert "ended before the first evaluation with one" in report.no_dendrite_came(
        DendriteArguments(), log, "eval_score", was_added=True
    )
    assert report.no_dendrite_came(DendriteArguments(), history([(0, [0.1]), (1, [0.2])]), "eval_score") is None


# -------------------------------------------------------------------------------------------------------- after a run


def results(cycles, name="accuracy", final=None, **more):
    last = cycles[-1]
    kept = {"dendrites": last["dendrites"], "parameters": last["parameters"]}
    kept |= {f"validation_{name}": last["best_validation"]}
    kept |= {key: value for key, value in last.items() if key.startswith("test_")}
    return {
        "stopped_by": "tracker",
        "testing_dendrite_capacity": False,
        "dataset": {},
        "metric": f"eval_{name}",
        "cycles": cycles,
        "final": final or kept,
        "global_step": 1200,
    } | more


def cycle(dendrites, validation, **more):
    return {"dendrites": dendrites, "parameters": 10 * (1 + dendrites), "best_validation": validation} | more


@pytest.mark.parametrize(
    "name, cycles, words",
    [
        ("accuracy", [cycle(0, 0.96, test_accuracy=0.95), cycle(2, 0.974, test_accuracy=0.96)],
         "2 dendrites instead of none: validation error 4.00% -> 2.60% (35% lower), test error 5.00% -> 4.00% (20% "),
        ("accuracy", [cycle(1, 0.9), cycle(2, 0.95)], "instead of 1: validation error 10.00% -> 5.00% (50%"),
        ("loss", [cycle(0, -2.0), cycle(1, -1.0)], "instead of none: validation loss -2.0000 -> -1.0000 (50% higher)"),
        ("f1", [cycle(0, 0.0), cycle(1, 0.5)], "validation f1 0.0000 -> 0.5000."),
        ("accuracy", [cycle(0, 93.0), cycle(1, 94.86)], "validation accuracy 93.0000 -> 94.8600 (2% higher)"),
        ("f1", [cycle(0, 0.4, test_f1=float("nan")), cycle(1, 0.5, test_f1=0.5)], "0.4000 -> 0.5000 (25% higher)."),
    ],
)  # fmt: skip
def test_improvement_is_compared_with_the_time_before_the_first_dendrite(name, cycles, words):
    sentence = report.improvement(results(cycles, name))
    assert words in sentence
    assert "the same run before its" in sentence and "includes the effect of longer training" in sentence


def test_improvement_without_a_kept_dendrite_is_not_reported():
    final = {"dendrites": 0, "parameters": 10, "validation_accuracy": 0.9}
    assert "No dendrite was kept" in report.improvement(results([cycle(0, 0.9), cycle(1, 0.8)], final=final))
    assert report.improvement(results([cycle(0, 0.9)])) == "This run added no dendrite."


def test_summary_names_a_flag_to_a_command_line_and_a_call_to_python():
    grown = results([cycle(0, 0.9), cycle(1, 0.95)])
    python = report.summary(grown, Path("my run"))
    command = report.summary(grown, Path("my run"), from_command_line=True)
    assert "DendriteArguments(control_of='my run')" in python and "--" not in python.replace("--control", "--")
    assert "--control_of 'my run'" in command and "DendriteArguments" not in command


def test_summary_holds_table_scores_and_paths():
    final = {"dendrites": 1, "parameters": 20, "validation_accuracy": 0.95, "test_note": None, "test_count": 3}
    text = report.summary(results([cycle(0, 0.9), cycle(1, 0.95)], final=final), Path("run"))
    assert "final: 1 dendrite, 20 parameters, validation_accuracy 0.9500, test_note None, test_count 3" in text
    assert "data: not named; stopped by tracker at step 1,200" in text
    assert "run/final" in text and "run/run.png" in text and "run/results.json" in text


def test_summary_of_a_baseline_holds_the_comparison():
    text = report.summary(results([cycle(0, 0.9)], control={"verdict": "Compared with a baseline."}), Path("run"))
    assert "Compared with a baseline." in text and "This run added no dendrite" not in text


def test_table_has_a_column_for_each_key_of_any_row():
    lines = report.table([{"a": 1}, {"a": 2000, "b": math.pi}]).split("\n")
    assert [line.split() for line in lines] == [["a", "b"], ["1"], ["2,000", "3.1416"]]


@pytest.mark.parametrize(
    "name, reported",
    [
        ("eval_survival_time", True),
        ("eval_a_runtime", False),
        ("eval_runtime", False),
        ("test_steps_per_second", False),
    ],
)
def test_durations_are_not_reported_and_metrics_of_times_are(name, reported):
    assert report.is_reported(name, "eval_accuracy") is reported
