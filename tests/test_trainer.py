"""`PerforatedTrainer` with callbacks, trackers, datasets and arguments of the Trainer: all see one training."""

import gc
import json
import math
import sys
import weakref
from collections import Counter
from pathlib import Path

import pytest
import torch
from models import build
from small import (
    DISTILBERT,
    EVAL,
    TRAIN,
    TWO_DENDRITES,
    arguments,
    compute_metrics,
    kept,
    losses,
    scripted,
    trainer_for,
)
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import (
    EarlyStoppingCallback,
    PreTrainedConfig,
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.modeling_outputs import ImageClassifierOutput

from perforated_trainer import DendriteArguments, PerforatedError, PerforatedTrainer, load_perforated_model, perforate
from perforated_trainer.arguments import check_direction, in_python


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def series(trainer, name):
    return [(entry["step"], entry[name]) for entry in trainer.state.log_history if name in entry]


# ---------------------------------------------------------------------------------------------- one training


class Told(TrainerCallback):
    """Counts the events of a training, and records step and epoch at each."""

    def __init__(self):
        self.events, self.at = Counter(), []

    def _note(self, name, state):
        self.events[name] += 1
        self.at.append((name, state.global_step, round(state.epoch or 0, 6)))


for (
    _name
) in "train_begin train_end epoch_begin epoch_end step_begin step_end pre_optimizer_step optimizer_step".split():
    setattr(Told, f"on_{_name}", lambda self, args, state, control, _name=_name, **kwargs: self._note(_name, state))


@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation_steps": 2}, {"per_device_train_batch_size": 3}])
def test_callbacks_receive_the_events_of_one_training(changes):
    told, stock = Told(), Told()
    trainer, _ = scripted(TWO_DENDRITES, more={"callbacks": [told]}, **changes)
    trainer.train()
    assert trainer.restarts == [6, 10, 14] and trainer.state.global_step == 18
    args = arguments(max_steps=18, eval_strategy="no", save_strategy="no", output_dir="stock", **changes)
    Trainer(build(DISTILBERT), args, train_dataset=TRAIN, callbacks=[stock]).train()
    assert told.at == stock.at and told.events["train_begin"] == told.events["train_end"] == 1


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """A run logged to TensorBoard and MLflow: its trainer, and the output of `train`."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("tracked")
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
        report = {"report_to": ["tensorboard", "mlflow"], "logging_steps": 1}
        trainer, _ = scripted(TWO_DENDRITES, run_name="texts", more={"test_dataset": EVAL}, **report)
        yield folder, trainer, trainer.train()


def expected(trainer):
    return {
        "loss": list(range(1, 19)),
        "eval_score": list(range(2, 19, 2)),
        "test_score": list(range(2, 19, 2)),
        "dendrites": [0] * 6 + [1] * 4 + [2] * 8,
    }


def test_mlflow_has_one_run_with_parameters_and_whole_series(tracked):
    from mlflow import MlflowClient

    folder, trainer, output = tracked
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (run,) = [run for e in client.search_experiments() for run in client.search_runs([e.experiment_id])]
    assert run.info.status == "FINISHED" and run.info.run_name == "texts"
    assert run.data.params["learning_rate"] == "0.001" and run.data.params["max_steps"] == "200"
    assert run.data.metrics["train_runtime"] == pytest.approx(output.metrics["train_runtime"])

    def history(name):
        return client.get_metric_history(run.info.run_id, name)

    right = expected(trainer)
    for name in ("loss", "eval_score", "test_score"):
        assert [metric.step for metric in history(name)] == right[name], name
    dendrites = {metric.step: metric.value for metric in reversed(history("dendrites"))}
    assert [dendrites[step] for step in right["loss"]] == right["dendrites"]


def test_tensorboard_has_one_run_and_whole_series(tracked):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, trainer, output = tracked
    (file,) = folder.rglob("events.out.*")
    events = EventAccumulator(str(file)).Reload()
    right = expected(trainer)
    for name, tag in (("loss", "train/loss"), ("eval_score", "eval/score"), ("test_score", "test/score")):
        assert [event.step for event in events.Scalars(tag)] == right[name], name
    first = {event.step: event.value for event in reversed(events.Scalars("train/dendrites"))}
    assert [first[step] for step in right["loss"]] == right["dendrites"]
    assert events.Scalars("train/train_runtime")[-1].value == pytest.approx(output.metrics["train_runtime"])


# ------------------------------------------------------------------------------------------------ callbacks that stop


class Stop(TrainerCallback):
    """Requests a stop once, in a hook at a step."""

    def __init__(self, hook, step):
        self.asked = False
        setattr(self, hook, self._ask)
        self.step = step

    def _ask(self, args, state, control, **kwargs):
        if state.global_step == self.step and not self.asked:
            self.asked = control.should_training_stop = True


@pytest.mark.parametrize("hook", ["on_step_end", "on_evaluate", "on_save", "on_log"])
@pytest.mark.parametrize(
    ("step", "mode"), [(2, "history"), (6, "history"), (10, "history"), (5, "fixed"), (10, "fixed")]
)
def test_stop_of_a_callback_ends_the_run(hook, step, mode):
    """In "history" mode, cycles end at steps 6 and 10, in "fixed" mode at steps 5 and 10."""
    stop, more = Stop(hook, step), {}
    if mode == "fixed":
        more = {"max_steps": 5, "eval_steps": 5}
    save = {"save_strategy": "steps", "save_steps": more.get("eval_steps", 2), "logging_steps": 1}
    scores = [0.1, 0.2, 0.3, 0.4] if mode == "fixed" else TWO_DENDRITES
    trainer, _ = scripted(scores, None, {"switch_mode": mode}, more={"callbacks": [stop]}, **save | more)
    trainer.train()
    assert stop.asked and trainer.state.global_step == step
    assert trainer.stopped_by == "callback" and trainer.save_results({})["stopped_by"] == "callback"


def test_early_stopping_has_its_full_patience_with_each_dendrite():
    """Three dendrites, each after two evaluations without improvement, exceed its patience in total."""
    early, more = EarlyStoppingCallback(3), {"max_dendrites": 3, "n_epochs_to_switch": 2, "max_dendrite_tries": 3}
    trainer, _ = scripted([0.5, 0.4, 0.4, 0.3, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2], None, more)
    trainer.add_callback(early)
    trainer.train()
    assert trainer.stopped_by == "tracker" and trainer.restarts == [6, 12, 18]


def test_early_stopping_that_comes_first_is_a_warning_at_the_start(capsys):
    trainer, _ = scripted([0.5] * 9, None, {"n_epochs_to_switch": 10}, more={"callbacks": [EarlyStoppingCallback(2)]})
    trainer.train()
    output = capsys.readouterr().out
    assert "EarlyStoppingCallback ends the training after 2 evaluations" in output
    assert trainer.stopped_by == "callback" and trainer.state.global_step == 6


def test_early_stopping_does_not_see_the_test_data(caplog, capsys):
    more = {"callbacks": [EarlyStoppingCallback(9)], "test_dataset": EVAL}
    trainer, _ = scripted([0.1, 0.2, 0.3], more=more, max_steps=6)
    trainer.train()
    assert "disabled" not in caplog.text + "".join(capsys.readouterr())


# ------------------------------------------------------------------------------------------------------------- the data


def test_test_data_changes_no_loss():
    """With dropout and three restarts."""
    ends = []
    for folder, more in (("without", {}), ("with", {"test_dataset": TRAIN})):
        trainer, _ = scripted(TWO_DENDRITES, more=more, output_dir=folder, logging_steps=1)
        trainer.train()
        ends.append((losses(trainer), series(trainer, "eval_loss"), trainer.restarts))
    assert ends[0] == ends[1] and len(ends[0][0]) == 18


def test_evaluation_before_the_first_step_is_no_result(capsys):
    """Its score, 0.9, belongs to no training step."""
    trainer, script = scripted([0.9, 0.1, 0.2, 0.2, 0.3, 0.3], None, {"max_dendrites": 1}, eval_on_start=True)
    trainer.train()
    assert [cycle["global_step"] for cycle in trainer.cycles()] == [4, 8]
    assert trainer.restarts == [6] and kept(trainer, script) == [0.3]
    assert trainer.save_results({})["cycles"][0]["best_validation"] == 0.2


def test_load_best_model_at_end_is_accepted():
    changes = {"load_best_model_at_end": True, "save_strategy": "steps"}
    trainer, script = scripted([0.1, 0.3, 0.2], None, {"max_dendrites": 0}, **changes)
    trainer.train()
    assert kept(trainer, script) == [0.3] and trainer.state.best_metric == 0.3


class Sums:
    """Metrics that are summed over batches, `batch_eval_metrics`."""

    def __init__(self):
        self.right = self.seen = 0

    def __call__(self, prediction, compute_result):
        found = prediction.predictions.argmax(-1) == prediction.label_ids
        self.right, self.seen = self.right + int(found.sum()), self.seen + len(found)
        if compute_result:
            share, self.right, self.seen = self.right / self.seen, 0, 0
            return {"accuracy": share}


@pytest.mark.parametrize("metric", ["accuracy", "a_accuracy"])
def test_metrics_of_sums_over_batches(metric):
    data = EVAL if metric == "accuracy" else {"a": EVAL, "b": TRAIN[:8]}
    args = arguments(metric_for_best_model=metric, batch_eval_metrics=True, per_device_eval_batch_size=3, max_steps=4)
    trainer = trainer_for(args, eval_dataset=data, test_dataset=TRAIN[:8], compute_metrics=Sums())
    trainer.train()
    final = trainer.save_results({})["final"]
    trainer.args.batch_eval_metrics, trainer.compute_metrics = False, compute_metrics
    assert final[f"validation_{metric}"] == trainer.evaluate(EVAL)["eval_accuracy"]
    assert final["test_accuracy"] == trainer.evaluate(TRAIN[:8])["eval_accuracy"]


class Keyed(Dataset):
    """Examples with names instead of indices."""

    def __init__(self, examples):
        self.examples = {f"example {number}": example for number, example in enumerate(examples)}

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, key):
        return self.examples[key]


class KeyedTrainer(PerforatedTrainer):
    def _loader(self, data):
        return self.accelerator.prepare(
            DataLoader(data, batch_size=8, sampler=list(data.examples), collate_fn=self.data_collator)
        )

    def get_train_dataloader(self):
        return self._loader(self.train_dataset)

    def get_eval_dataloader(self, eval_dataset=None):
        return self._loader(eval_dataset or self.eval_dataset)

    def get_test_dataloader(self, test_dataset):
        return self._loader(test_dataset)


def test_data_that_is_not_numbered_trains():
    data = {"train_dataset": Keyed(TRAIN), "eval_dataset": Keyed(EVAL), "test_dataset": Keyed(EVAL)}
    trainer, script = scripted(TWO_DENDRITES, cls=KeyedTrainer, more=data)
    trainer.train()
    assert trainer.num_dendrites == 2 and kept(trainer, script) == [0.4]
    assert trainer.save_results({})["settings"]["train_dataset"] == "32 examples"


def test_persistent_workers_do_not_give_the_test_data_the_loader_of_the_validation():
    args = arguments(
        metric_for_best_model="accuracy",
        dataloader_num_workers=1,
        dataloader_persistent_workers=True,
        learning_rate=0.0,
        max_steps=4,
    )
    model = build(DISTILBERT)
    model.classifier.bias.data[0] = 100.0  # always predicts 0
    validation, test = ([row | {"labels": label} for row in EVAL] for label in (1, 0))
    trainer = trainer_for(
        args, model=model, eval_dataset=validation, test_dataset=test, compute_metrics=compute_metrics
    )
    trainer.train()
    for name, score in (("eval_accuracy", 0.0), ("test_accuracy", 1.0)):
        assert {value for _, value in series(trainer, name)} == {score}


# ----------------------------------------------------------------------------------------------- metrics, arguments


@pytest.mark.parametrize("name", ["wer", "cer", "ter", "mse", "rmse", "mae", "mape", "perplexity", "ppl", "ce", "nll"])
def test_error_that_would_be_maximized_raises(name):
    for metric in (name, f"eval_{name}", name.upper()):
        with pytest.raises(PerforatedError, match="greater_is_better"):
            check_direction(arguments(metric_for_best_model=metric))
    assert check_direction(arguments(metric_for_best_model=name, greater_is_better=False)) is None


@pytest.mark.parametrize(
    ("name", "warns"),
    [("word_error", True), ("test_wer", True), ("error_rate", True), ("mean-mse", True), ("accuracy", False),
     ("f1", False), ("loss", False), ("b_loss", False), ("answer", False), ("power", False), ("terrain", False)],
)  # fmt: skip
def test_compound_of_an_error_that_would_be_maximized_is_a_warning(name, warns):
    assert bool(check_direction(arguments(metric_for_best_model=name))) == warns


@pytest.mark.parametrize(("greater", "word"), [(True, "higher"), (False, "lower")])
def test_direction_is_printed_at_the_start(greater, word, capsys):
    trainer, _ = scripted([0.5, 0.5], greater_is_better=greater, max_steps=1)
    trainer.train()
    assert f"eval_score: {word} is better\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("metric", "changes", "words"),
    [
        ("acc", {"compute_metrics": compute_metrics}, ["eval_acc", "eval_accuracy", "eval_loss"]),
        ("accuracy", {"eval_dataset": {"a": EVAL, "b": EVAL}, "compute_metrics": compute_metrics}, ["eval_a_accuracy"]),
        ("a_acc", {"eval_dataset": {"a": EVAL, "b": EVAL}}, ["eval_a_loss", "eval_b_loss"]),
        ("loss", {"eval_dataset": [{"input_ids": row["input_ids"]} for row in EVAL]}, ["label_names", "labels"]),
    ],
)
def test_metric_that_the_evaluation_does_not_return_raises_with_the_returned_ones(metric, changes, words):
    trainer = trainer_for(arguments(metric_for_best_model=metric), **changes)
    with pytest.raises(PerforatedError) as caught:
        trainer.train()
    assert all(word in str(caught.value) for word in words), caught.value
    assert Path("run").exists() == (metric == "loss"), "a run that ends before its first step leaves nothing"
    assert trainer.state.global_step == (2 if metric == "loss" else 0)  # of a loss, the first evaluation tells


@pytest.mark.parametrize("known", [True, False])
def test_metric_is_looked_for_in_an_evaluation_only_if_no_code_names_it(known, capsys):
    calls = []

    name = "same"

    def named(prediction):
        calls.append(len(prediction.predictions))
        return {"same": 0.5}

    def unnamed(prediction):
        calls.append(len(prediction.predictions))
        return {name: 0.5}

    class Quiet(TrainerCallback):
        def on_prediction_step(self, args, state, control, **kwargs):
            assert state.global_step > 0, "an evaluation before the first step"

    args = arguments(metric_for_best_model="same", max_steps=2, eval_steps=2)
    trainer = trainer_for(args, compute_metrics=named if known else unnamed, callbacks=[Quiet()])
    trainer.train()
    assert calls == [8] * (1 if known else 2)
    assert sum("eval_same" in entry for entry in trainer.state.log_history) == 1
    other = trainer_for(arguments(output_dir="other", max_steps=2, eval_steps=2))
    other.train()
    assert losses(other) == losses(trainer)  # random numbers are the same


def test_metric_of_one_of_several_data_sets():
    args = arguments(metric_for_best_model="b_loss", greater_is_better=False, max_steps=4)
    trainer = trainer_for(args, eval_dataset={"a": EVAL, "b": EVAL}, test_dataset=TRAIN[:8])
    trainer.train()
    results = trainer.save_results({})
    assert results["final"]["validation_b_loss"] == pytest.approx(results["cycles"][0]["best_validation"], abs=1e-6)


@pytest.mark.parametrize(
    ("name", "value"),
    [("history_lookback", 0), ("max_dendrites", -1), ("n_epochs_to_switch", -1), ("max_dendrite_tries", 0),
     ("dendrite_learning_rate_factor", 0.0), ("improvement_threshold", [-0.1]), ("improvement_threshold", []),
     ("improvement_threshold_raw", float("nan")), ("dendrite_rank", 0), ("max_parameters", 0), ("max_dendrites", 1.5),
     ("num_initial_dendrites", 9), ("switch_mode", "often"), ("dendrite_activation", "square"),
     ("n_epochs_to_switch", "3"), ("max_dendrites", True)],
)  # fmt: skip
def test_invalid_number_raises_one_line(name, value):
    with pytest.raises(PerforatedError, match=name) as caught:
        perforate(build(DISTILBERT), DendriteArguments(**{name: value}), arguments())
    assert "\n" not in str(caught.value)


def test_neftune_without_input_embeddings_raises_one_line():
    model = nn.Linear(2, 2)
    with pytest.raises(PerforatedError, match="neftune_noise_alpha: Linear has no input embeddings"):
        perforate(model, DendriteArguments(), arguments(neftune_noise_alpha=5.0))


def test_single_number_equals_a_list_of_one():
    trainer = trainer_for(arguments(max_steps=2), dendrite_args=DendriteArguments(improvement_threshold=0.001))
    trainer.train()
    assert trainer.dendrite_args.improvement_threshold == [0.001]


@pytest.mark.parametrize("given", ["optimizer", "scheduler"])
def test_optimizer_of_the_network_as_it_is_now_raises(given):
    model = build(DISTILBERT)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pair = (optimizer, None)
    if given == "scheduler":
        pair = (None, torch.optim.lr_scheduler.ConstantLR(optimizer))
    with pytest.raises(PerforatedError, match="optimizer_cls_and_kwargs"):
        trainer_for(model=model, optimizers=pair)


def test_optimizer_class_is_used_for_each_dendrite():
    trainer, _ = scripted(TWO_DENDRITES, more={"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})})
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, torch.optim.SGD) and trainer.num_dendrites == 2


def test_model_init_and_search_raise_with_an_alternative():
    with pytest.raises(PerforatedError, match=r"model_init: pass the model.*optuna_sweep"):
        PerforatedTrainer(model_init=lambda: build(DISTILBERT), args=arguments(), eval_dataset=EVAL)
    with pytest.raises(PerforatedError, match="optuna_sweep"):
        trainer_for().hyperparameter_search()


def test_results_before_a_training_raise_one_line():
    trainer = trainer_for()
    with pytest.raises(PerforatedError, match="call train"):
        trainer.save_results({"name": "texts"})
    assert not Path("run").exists() or not any(Path("run").iterdir())


def test_results_need_no_test_data_and_no_package_of_the_script(monkeypatch, capsys):
    trainer = trainer_for(arguments(max_steps=4, metric_for_best_model="accuracy"), compute_metrics=compute_metrics)
    trainer.train()
    for package in ("torchvision", "datasets"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    results = trainer.save_results()
    assert json.loads(Path("run/results.json").read_text()) == results
    assert set(results["final"]) == {"dendrites", "parameters", "validation_accuracy"}
    assert "transformers" in results["versions"] and not {"torchvision", "datasets"} & results["versions"].keys()
    assert f"validation_accuracy {results['final']['validation_accuracy']:.4f}" in capsys.readouterr().out


def test_schedule_that_waits_for_a_plateau_follows_the_metric():
    for greater, mode in ((True, "max"), (False, "min")):
        args = arguments(lr_scheduler_type="reduce_lr_on_plateau", greater_is_better=greater, max_steps=1)
        trainer = trainer_for(args, dendrite_args=DendriteArguments(overwrite_run=True))
        trainer.train()
        assert trainer.lr_scheduler.mode == mode


def test_secret_of_an_argument_is_in_no_file(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--hub_token", "hf_SECRET"])
    trainer, _ = scripted(TWO_DENDRITES, hub_token="hf_SECRET", max_steps=4)
    trainer.train()
    trainer.save_results({"name": "texts"})
    texts = [path.name for path in Path("run").rglob("*") if path.is_file() and b"hf_SECRET" in path.read_bytes()]
    assert set(texts) <= {"training_args.bin"}, "that one is the Trainer's own"


def test_any_name_of_a_metric_trains():
    for number, name in enumerate(("f1, macro", "\u0442\u043e\u0447\u043d\u043e\u0441\u0442\u044c", "a/b", "top 5 %")):
        args = arguments(metric_for_best_model=name, greater_is_better=True, output_dir=f"run{number}", max_steps=4)
        metrics = {name: 0.5}
        trainer = trainer_for(args, test_dataset=EVAL, compute_metrics=lambda p, metrics=metrics: metrics, plots=True)
        trainer.train()
        assert trainer.save_results({})["final"][f"test_{name}"] == 0.5


# ------------------------------------------------------------------------------------------------------- unusual models


class TwoNamesConfig(PreTrainedConfig):
    model_type = "two_names"


class TwoNames(PreTrainedModel):
    """A model that registers its body under a second name."""

    config_class = TwoNamesConfig
    base_model_prefix = "body"

    def __init__(self, config):
        super().__init__(config)
        self.body = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))
        self.base_model = self.body
        self.post_init()

    def forward(self, pixel_values, labels=None):
        logits = self.body(pixel_values)
        return ImageClassifierOutput(loss=torch.nn.functional.cross_entropy(logits, labels), logits=logits)


def test_second_name_of_the_body_is_trained_and_saved_once():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(40, 1, 28, 28, generator=generator)
    data = [{"pixel_values": image, "labels": index % 10} for index, image in enumerate(images)]
    settings = DendriteArguments(testing_dendrite_capacity=True)
    model, data = TwoNames(TwoNamesConfig()), {"train_dataset": data[:32], "eval_dataset": data[32:]}
    trainer = trainer_for(model=model, dendrite_args=settings, **data)
    assert trainer.num_parameters == 7850
    trainer.train()
    assert trainer.num_dendrites == 3 and trainer.stopped_by == "tracker"
    trainer.save_model("saved")
    reloaded = load_perforated_model(TwoNames, "saved")
    labels = torch.zeros(4, dtype=torch.int64)
    assert torch.equal(reloaded(images[:4], labels).logits, model.eval()(images[:4], labels).logits)


def test_base_model_that_is_a_property_is_unchanged():
    model = perforate(build(DISTILBERT), DendriteArguments(), arguments())
    assert model.base_model is model.distilbert


def test_steps_of_the_fork_are_off():
    seen = []

    class Fork(Trainer):
        def __init__(self, *args, using_perforatedai=True, **kwargs):
            seen.append(using_perforatedai)
            super().__init__(*args, **kwargs)

    class OnFork(PerforatedTrainer, Fork):
        """PerforatedTrainer based on the Trainer of the fork."""

    trainer_for(arguments(max_steps=2), OnFork).train()
    assert seen == [False]


def test_run_without_a_dendrite_is_a_run_of_the_stock_trainer():
    """Losses, evaluations and weights are bitwise equal; the run is too short for a dendrite."""
    ours = trainer_for(arguments(logging_steps=1), dendrite_args=DendriteArguments())
    ours.train()
    set_seed(0)
    data = {"train_dataset": TRAIN, "eval_dataset": EVAL}
    stock = Trainer(build(DISTILBERT), arguments(logging_steps=1, output_dir="stock"), **data)
    stock.train()
    assert losses(ours) == losses(stock) and series(ours, "eval_loss") == series(stock, "eval_loss")
    assert len(losses(ours)) == 8 and ours.cycles()[0]["global_step"] == 8, "the last evaluation was the best"
    for name, value in stock.model.state_dict().items():
        assert torch.equal(value, ours.model.state_dict()[name]), name


def test_trainer_and_model_are_freed_without_the_garbage_collector():
    """With a reference cycle, GPU memory and data loader processes would stay until the collector runs."""
    for mode in ("history", "fixed"):
        settings = DendriteArguments(n_epochs_to_switch=1, max_dendrites=1, switch_mode=mode)
        trainer = trainer_for(arguments(output_dir=mode), dendrite_args=settings, plots=True)
        trainer.train()
        left = weakref.ref(trainer), weakref.ref(trainer.model)
        gc.disable()
        try:
            del trainer
            assert [reference() for reference in left] == [None, None]
        finally:
            gc.enable()


# ---------------------------------------------------------------------- what belongs to one trainer, one run, one score


def test_other_folder_does_not_inherit_overwrite_run_from_the_model(capsys):
    first, _ = scripted([0.1], dendrites={"overwrite_run": True}, max_steps=2)
    first.train()
    other, _ = scripted([0.1], output_dir="other", max_steps=2)
    other.train()
    again = PerforatedTrainer(first.model, arguments(output_dir="other"), train_dataset=TRAIN, eval_dataset=EVAL)
    assert again.dendrite_args.n_epochs_to_switch == 1 and not again.dendrite_args.overwrite_run
    with pytest.raises(PerforatedError, match="other"):
        again.train()


def test_arguments_of_a_run_are_not_changed_by_its_baseline():
    args = arguments(max_steps=4, lr_scheduler_type="reduce_lr_on_plateau")
    first = trainer_for(args, dendrite_args=DendriteArguments(n_epochs_to_switch=1))
    first.train()
    first.save_results()
    trainer_for(args, dendrite_args=DendriteArguments(n_epochs_to_switch=1, control_of="run"))
    assert first.run_dir == Path("run") and not args.lr_scheduler_kwargs


@pytest.mark.parametrize("kind", ["reduce_lr_on_plateau", "greedy"])
@pytest.mark.parametrize("greater", [True, False])
def test_schedule_that_reads_the_score_has_its_direction(kind, greater):
    trainer, _ = scripted([0.1, 0.2], greater_is_better=greater, lr_scheduler_type=kind, max_steps=2)
    trainer.train()
    assert trainer.lr_scheduler.mode == ("max" if greater else "min")


def test_full_bf16_evaluation_does_not_convert_the_model_that_is_saved():
    trainer = trainer_for(arguments(bf16_full_eval=True, max_steps=2))
    trainer.train()
    trainer.save_results()
    assert trainer.model.dtype == torch.float32
    assert load_perforated_model(type(trainer.model), "run/final").dtype == torch.float32


@pytest.mark.parametrize("part", ["test", "eval"])
def test_loss_that_is_not_a_number_ends_a_run_only_in_training(part):
    class Undefined(PerforatedTrainer):
        def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            if metric_key_prefix == part:
                output.metrics[f"{part}_loss"] = math.nan
            output.metrics[f"{part}_class_loss"] = [1.0, 2.0]
            return output

    trainer, _ = scripted([0.1, 0.2], cls=Undefined, more={"test_dataset": EVAL}, max_steps=4)
    trainer.train()
    assert trainer.state.global_step == 4


def test_metric_that_evaluate_adds_is_reported():
    class Adding(PerforatedTrainer):
        def evaluate(self, *args, **kwargs):
            metrics = super().evaluate(*args, **kwargs)
            return metrics | {"eval_sum": metrics["eval_loss"] + 1}

    args = arguments(metric_for_best_model="sum", greater_is_better=False, max_steps=4)
    trainer = trainer_for(args, Adding)
    trainer.train()
    results = trainer.save_results()
    losses_of_run = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert results["cycles"][0]["best_validation"] == pytest.approx(min(losses_of_run) + 1)
    assert results["final"]["validation_sum"] == pytest.approx(min(losses_of_run) + 1, abs=1e-5)


def test_evaluation_of_a_callback_is_no_evaluation_of_the_run():
    class Evaluates(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                trainer.evaluate()

    trainer, _ = scripted([0.1, 0.9, 0.2], more={"callbacks": [Evaluates()]}, max_steps=4)
    trainer.train()
    assert [row["step"] for row in trainer.growth.evaluations] == [2, 4]
    assert trainer.cycles()[0]["best_validation"] == 0.2


def test_several_test_sets_are_reported_each():
    trainer = trainer_for(arguments(max_steps=2), test_dataset={"a": EVAL, "b": EVAL[:4]})
    trainer.train()
    results = trainer.save_results()
    assert {"test_a_loss", "test_b_loss"} <= results["final"].keys() & results["cycles"][0].keys()


def test_final_validation_scores_are_those_of_the_evaluation_data_loader():
    class Half(PerforatedTrainer):
        def get_eval_dataloader(self, eval_dataset=None):
            return super().get_eval_dataloader((eval_dataset or self.eval_dataset)[:4])

    trainer = trainer_for(arguments(max_steps=2), Half)
    trainer.train()
    logged = len(trainer.state.log_history)
    results = trainer.save_results()
    assert results["final"]["validation_loss"] == pytest.approx(trainer.evaluate(EVAL)["eval_loss"], abs=1e-6)
    assert len(trainer.state.log_history) == logged + 1, "scores for the record are not logged"


def test_metrics_of_any_kind_and_ignored_outputs_are_no_error_at_the_end():
    def metrics(prediction):
        assert not isinstance(prediction.predictions, tuple)
        return {"score": 0.5, "each": [0.1, 0.2], "note": "text", "none": None}

    class TwoOutputs(type(build(DISTILBERT))):
        def forward(self, input_ids, labels=None):
            output = super().forward(input_ids, labels=labels)
            output["more"] = output.logits + 1
            return output

    model = TwoOutputs(build(DISTILBERT).config)
    args = arguments(max_steps=2, metric_for_best_model="score", greater_is_better=True)
    trainer = trainer_for(args, model=model, compute_metrics=metrics)
    trainer.train(ignore_keys_for_eval=["more"])
    assert trainer.save_results()["final"]["validation_each"] == [0.1, 0.2]


@pytest.mark.parametrize("name", ["params", "model", "optimizer_dict"])
def test_optimizer_arguments_that_the_trainer_uses_once_raise(name):
    optimizer = (torch.optim.AdamW, {name: []})
    with pytest.raises(PerforatedError, match=f"'{name}' once.*override create_optimizer"):
        trainer_for(optimizer_cls_and_kwargs=optimizer)


def test_greedy_schedule_with_a_rate_factor_needs_min_lr():
    settings, kind = DendriteArguments(dendrite_learning_rate_factor=0.5), {"lr_scheduler_type": "greedy"}
    with pytest.raises(PerforatedError, match="set min_lr"):
        trainer_for(arguments(**kind), dendrite_args=settings)
    trainer_for(arguments(**kind, lr_scheduler_kwargs={"min_lr": 1e-5}), dendrite_args=settings)


def test_progress_callback_of_the_user_stays():
    class Mine(ProgressCallback):
        pass

    trainer = trainer_for(callbacks=[Mine])
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert Mine in kinds and ProgressCallback not in kinds and PrinterCallback not in kinds


def test_operations_and_parameters_are_counted_as_in_the_trainer():
    trainer, _ = scripted([0.1, 0.1, 0.0, 0.0, 0.0, 0.0], max_steps=8, dendrites={"max_dendrites": 1})
    stock = Trainer(build(DISTILBERT), arguments(max_steps=2, eval_steps=9), train_dataset=TRAIN, eval_dataset=EVAL)
    assert trainer.train().metrics.keys() - stock.train().metrics.keys() <= {"total_flos"}  # a stock printer drops it
    last = trainer.state.log_history[-1]
    assert last["parameters"] == trainer.num_parameters and last["dendrites"] == trainer.num_dendrites
    few = trainer_for(arguments(output_dir="few", max_steps=2, eval_steps=9))
    few.train()
    assert few.state.total_flos == stock.state.total_flos


def test_signal_in_the_last_step_can_be_resumed_in_the_same_process():
    class Interrupts(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                trainer.stop_signal.number = 2

    trainer, _ = scripted([0.1, 0.2, 0.3], more={"callbacks": [Interrupts()]}, max_steps=4, save_strategy="steps")
    with pytest.raises(PerforatedError, match="to resume"):
        trainer.train()
    assert trainer.train(resume_from_checkpoint=True).global_step == 4 and trainer.stopped_by == "max_steps"


def test_results_of_a_model_that_another_trainer_has_trained_since_raise():
    first, _ = scripted([0.1], max_steps=2)
    first.train()
    second, _ = scripted([0.1], first.model, output_dir="second", max_steps=2)
    second.train()
    with pytest.raises(PerforatedError, match="another trainer has trained this model since"):
        first.save_results()
    second.save_results()


def test_card_of_a_plain_module_has_the_scores_of_its_results_and_loads_it():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x, labels=None):
            logits = self.layer(x)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    data = [{"x": torch.randn(4), "labels": i % 2} for i in range(8)]
    trainer = trainer_for(arguments(max_steps=2), model=Plain(), train_dataset=data, eval_dataset=data)
    trainer.train()
    loss = trainer.save_results()["final"]["validation_loss"]
    card = Path("run/final/README.md").read_text()
    assert "# run\n" in card and f"{loss:.4f}" in card
    assert 'model = load_perforated_model(Plain(), "run/final")' in card


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("set --num_initial_dendrites 1 or --modules_to_train", "set num_initial_dendrites=1 or modules_to_train"),
        ("--history_lookback 0: it must", "history_lookback=0: it must"),
        ("a -- b --x", "a -- b --x"),
        ("--rank 8a and --lr 0.25,", "rank 8a and lr=0.25,"),
    ],
)
def test_hint_in_python_has_no_flags(message, expected):
    assert in_python(message) == expected


# ----------------------------------------------------------------------------------------------------------- streams


class Numbered(IterableDataset):
    def __iter__(self):
        for number in range(500):
            yield TRAIN[number % 32] | {"number": torch.tensor(number)}


class Watching(PerforatedTrainer):
    def training_step(self, model, inputs, *args, **kwargs):
        self.numbers = [*getattr(self, "numbers", []), *inputs.pop("number").tolist()]
        return super().training_step(model, inputs, *args, **kwargs)


def of_a_stream(scores, **changes):
    more = {"train_dataset": Numbered(), "dendrites": changes.pop("dendrites", {})}
    usual = {"per_device_train_batch_size": 2, "remove_unused_columns": False, "save_strategy": "steps"}
    settings = more.pop("dendrites")
    return scripted(scores, cls=Watching, dendrites=settings, more=more, **usual | changes)[0]


@pytest.mark.parametrize(("first", "then"), [(4, 8), (8, 12)])
def test_resumed_stream_continues_if_max_steps_is_another(first, then):
    rising = [0.1 * i for i in range(1, 9)]
    of_a_stream(rising, max_steps=first).train()
    resumed = of_a_stream(rising, max_steps=then)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.numbers == list(range(2 * first, 2 * then))


def test_stream_continues_in_the_next_cycle_of_fixed_length():
    trainer = of_a_stream([0.1, 0.2, 0.3, 0.4], dendrites={"switch_mode": "fixed", "max_dendrites": 1}, max_steps=4)
    trainer.train()
    assert trainer.restarts == [4] and trainer.numbers == list(range(2 * trainer.state.global_step))


def test_resume_with_own_data_loader_and_no_dataset_is_exact():
    class Mine(PerforatedTrainer):
        def get_train_dataloader(self):
            shuffled = torch.Generator().manual_seed(3)
            return self.accelerator.prepare(DataLoader(TRAIN, batch_size=8, shuffle=True, generator=shuffled))

    class Stop(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    def trained(folder, *callbacks, **kwargs):
        args = arguments(output_dir=folder, max_steps=-1, num_train_epochs=3, eval_strategy="epoch")
        settings, args.save_strategy = DendriteArguments(n_epochs_to_switch=9), "epoch"
        more = {"train_dataset": None, "callbacks": list(callbacks), "dendrite_args": settings}
        trainer = trainer_for(args, Mine, **more)
        trainer.train(**kwargs)
        return [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]

    trained("run", Stop())
    assert trained("run", resume_from_checkpoint=True) == trained("whole")
