"""Evaluations of the validation and the test data: what the decisions are made from, and what is only reported."""

import contextlib
import math
import random
import re
from collections.abc import Iterator
from types import CodeType

import numpy as np
import torch
from torch.utils.data import Subset
from transformers import Seq2SeqTrainer, Trainer, TrainerCallback

from . import report
from .arguments import PerforatedError
from .export import ExportingTrainer

# Methods that other libraries override to evaluate in their own way. What these return is not known in advance.
_WAYS = ("evaluate", "evaluation_loop", "predict", "get_eval_dataloader")


@contextlib.contextmanager
def same_random_numbers() -> Iterator[None]:
    """Random numbers after a `with` block are those that they would be without it, also if it ends with an error."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_available() else []):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002


def _texts_in(function) -> set[str]:
    """The strings in the code of a function, or of an object that can be called."""
    function = getattr(function, "func", function)  # of functools.partial
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    found, codes = set(), [code] if code else []
    while codes:
        for constant in codes.pop().co_consts:
            if isinstance(constant, CodeType):
                codes.append(constant)
            parts = constant if isinstance(constant, tuple) else (constant,)
            found |= {part for part in parts if isinstance(part, str)}
    return found


class EvaluatingTrainer(ExportingTrainer):
    """The part of `PerforatedTrainer` that evaluates."""

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval", **kwargs):
        """As `Trainer.evaluate`; while training, the test data is evaluated afterwards, for the report."""
        metrics = self._last_metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix, **kwargs)
        if self.is_in_train and eval_dataset is None:
            self._ignored_keys = ignore_keys
            if self.test_dataset is not None:
                with same_random_numbers():
                    self.test_metrics = self._predicted(self.test_dataset, "test", **kwargs)
                self.log(dict(self.test_metrics))
        return metrics

    _ignored_keys = None  # of the outputs of the model, as `train` received them

    def _predicted(self, data, prefix: str, **kwargs) -> dict:
        """Metrics of the test data, which may be several data sets by name."""
        parts = {f"{prefix}_{name}": part for name, part in data.items()} if isinstance(data, dict) else {prefix: data}
        outputs = [self.predict(part, self._ignored_keys, name, **kwargs) for name, part in parts.items()]
        return {name: value for output in outputs for name, value in output.metrics.items()}

    def scores(self, data, part: str) -> dict:
        """Metrics of the model as it is now, evaluated as while training, for the record.

        Args:
            data (`Dataset` or `dict`): The data.
            part (`str`): "validation" or "test": the beginning of the names.
        """
        with self.unrecorded():
            if part == "test":
                return self._predicted(data, part)
            # With the usual prefix: an `evaluate` of the user's may read metrics by their names.
            metrics = self.evaluate(data, ignore_keys=self._ignored_keys)
            return {re.sub("^eval_", f"{part}_", name): value for name, value in metrics.items()}

    @contextlib.contextmanager
    def unrecorded(self) -> Iterator[None]:
        """In a `with` block, no evaluation is logged or received by a callback, and no weight changes its type.

        Outside of a training, `fp16_full_eval` and `bf16_full_eval` would convert the model itself.
        """
        handler, args = self.callback_handler, self.args
        before = handler.callbacks, handler.eval_dataloader, args.fp16_full_eval, args.bf16_full_eval
        handler.callbacks, args.fp16_full_eval, args.bf16_full_eval = [], False, False
        self.log = lambda *args, **kwargs: None
        try:
            yield
        finally:
            del self.log
            handler.callbacks, handler.eval_dataloader, args.fp16_full_eval, args.bf16_full_eval = before

    def get_test_dataloader(self, test_dataset):
        """As `Trainer.get_test_dataloader`; with persistent workers the loader of the test data is kept."""
        if test_dataset is not self.test_dataset or not self.args.dataloader_persistent_workers:
            return super().get_test_dataloader(test_dataset)
        if self._test_loader is None:
            self._test_loader = super().get_test_dataloader(test_dataset)
        return self._test_loader

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None, **kwargs):
        """As `Trainer.prediction_step`; the loss leaves out what fills up the last batch of several processes.

        accelerate repeats examples there. Their predictions are cut off when they are gathered, but the stock loss is a
        mean over them too and so depends on the number of processes.
        """
        output = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **kwargs)
        data = self.accelerator.gradient_state
        if self.args.world_size > 1 and data.end_of_dataloader and data.remainder > 0 and output[0] is not None:
            size = len(next(iter(inputs.values())))
            real = data.remainder - self.args.process_index * size
            if 0 < real < size:
                inputs = {name: value[:real] for name, value in inputs.items()}
                return super().prediction_step(model, inputs, True)[0], *output[1:]
        return output

    def refuse_metric(self, metrics: dict) -> None:
        """Raise `PerforatedError` because `metrics`, of an evaluation, do not have the monitored metric."""
        raise PerforatedError(report.missing_metric(self.score_name, metrics, self.label_names))

    def check_metric(self) -> None:
        """Find out before the first step that the evaluation returns the monitored metric, if that can be known.

        A metric that `compute_metrics` does not name in its code is looked for in an evaluation of two batches; if it
        is not there, in one of all validation data, because a metric may need a class that is not in two batches.
        Nothing is logged, no callback is called, and random numbers do not change.

        Raises:
            PerforatedError: If the metric is missing.
        """
        parts = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        prefixes = [f"eval_{name}_" if name else "eval_" for name in parts]
        if self.args.eval_on_start or self.args.dataloader_persistent_workers or self._evaluates_in_another_way():
            return
        names = {self.score_name.removeprefix(prefix) for prefix in prefixes if self.score_name.startswith(prefix)}
        metrics = {f"{prefix}loss": math.nan for prefix in prefixes}
        if self.compute_metrics is not None:
            if names & {"loss", *_texts_in(self.compute_metrics)}:
                return
            few = 2 * self.args.eval_batch_size * self.args.world_size
            try:
                metrics = self._metrics_of({n: Subset(data, range(min(few, len(data)))) for n, data in parts.items()})
                if names and self.score_name not in metrics:
                    metrics = self._metrics_of(parts)
            except Exception:  # a stream, or an error of the user's code, which the first evaluation will show
                return
        if self.score_name not in metrics:
            self.refuse_metric(metrics)

    def _evaluates_in_another_way(self) -> bool:
        """Whether a subclass, or a callback that changes the metrics, decides what an evaluation returns."""
        stock = (*EvaluatingTrainer.__mro__, Seq2SeqTrainer)
        others = [cls for cls in type(self).__mro__ if cls not in stock]
        known = "transformers.", __name__.partition(".")[0] + "."
        callbacks = [cls for cls in map(type, self.callback_handler.callbacks) if not cls.__module__.startswith(known)]
        changes = any(cls.on_evaluate is not TrainerCallback.on_evaluate for cls in callbacks)
        return changes or any(name in vars(cls) for cls in others for name in _WAYS)

    def _metrics_of(self, parts: dict) -> dict:
        """The metrics of data sets by name, without a trace."""
        metrics = {}
        with self.unrecorded(), same_random_numbers():
            for name, data in parts.items():
                prefix = f"eval_{name}" if name else "eval"
                loader = Trainer.get_eval_dataloader(self, data)
                metrics |= self.evaluation_loop(loader, "Evaluation", metric_key_prefix=prefix).metrics
        return metrics
