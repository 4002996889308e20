"""`PerforatedTrainer`: the Trainer with dendrites, in one `Trainer.train()`.

A dendrite makes a different network, which needs a new optimizer, scheduler and wrapper. They are made again between
two steps, after the evaluation that decides; the data, the log, the callbacks and the step count continue.

Written for transformers 5.5 to 5.24.
"""

import contextlib
import copy
import dataclasses
import inspect
import math
import pickle
import secrets
import sys
import time
import weakref
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from transformers import EarlyStoppingCallback, PreTrainedModel, PrinterCallback, Seq2SeqTrainer, TrainerState
from transformers import ProgressCallback as StockProgressCallback
from transformers import trainer as stock_trainer
from transformers.trainer_utils import TrainOutput, has_length

from . import _compat, checkpoint, convert, report, run_dir, schedule, sharing
from .arguments import (
    DendriteArguments,
    PerforatedError,
    check_direction,
    from_command_line,
    in_python,
    is_resumed,
    plain_hints,
)
from .baseline import Baseline
from .callbacks import (
    DendriteProgressCallback,
    FiniteLossCallback,
    PlotCallback,
    SaveCallback,
    StopSignalCallback,
    say,
)
from .export import disk_errors
from .growth import Growth
from .pai import refuse_other_variant
from .policy import Decision
from .resuming import ResumingTrainer


class PerforatedTrainer(ResumingTrainer):
    """A Trainer that adds dendrites until they no longer improve the monitored metric.

    Args:
        dendrite_args (`DendriteArguments`, *optional*): Which layers get dendrites, and when. Those that `perforate`
            received by default.
        test_dataset (`Dataset`, *optional*): Evaluated whenever the validation set is; reported only, never used for
            decisions.
        args, kwargs: Those of `Trainer`. `args.output_dir` is the folder of the run.

    After `train()` the model is the best one, and `stopped_by` is "tracker", "max_steps" or "callback". A subclass of
    another Trainer works: `class Mine(PerforatedTrainer, SFTTrainer)`.

    Raises:
        PerforatedError: For arguments that cannot work.
    """

    @plain_hints
    def __init__(self, *args, dendrite_args: DendriteArguments | None = None, test_dataset=None, **kwargs):
        if "using_perforatedai" in inspect.signature(super().__init__).parameters:  # Perforated AI's fork
            kwargs["using_perforatedai"] = False
        refuse_other_variant()
        if kwargs.get("model_init") is not None:
            raise PerforatedError("model_init: pass the model; for a search, examples/optuna_sweep.py runs each trial")
        with _compat.quantized_base_accepted(kwargs.get("model", args[0] if args else None)):
            super().__init__(*args, **kwargs)
        if self.optimizer is not None or self.lr_scheduler is not None:
            raise PerforatedError(
                "optimizers=(optimizer, scheduler): each dendrite needs new ones; pass optimizer_cls_and_kwargs and "
                "lr_scheduler_type, or override create_optimizer and create_scheduler"
            )
        self.dendrite_args = dendrite_args or self._arguments_of_model() or DendriteArguments()
        schedule.check(self.dendrite_args, self.args, self.optimizer_cls_and_kwargs)
        convert.perforate(self.model, self.dendrite_args, self.args)
        self.model.dendrite_args_used_in = self.args.output_dir
        if self.args.n_gpu > 1:
            _compat.use_one_gpu(self.args)
            self._train_batch_size = self.args.train_batch_size
            say("note: several GPUs are visible, one is used. All of them: torchrun --nproc_per_node N <script>")
        if (run := self.dendrite_args.control_of) and self.run_dir.resolve() == Path(run).resolve():
            self.args = copy.copy(self.args)  # the trainer of the run may have the same object
            self.args.output_dir = f"{Path(run) if Path(run).name else Path(run).resolve()}-control"
            say(f"note: the baseline is written to {self.args.output_dir}")
        self.args.logging_nan_inf_filter = False  # a loss that is not finite must be seen
        if self.args.device.type == "cpu":
            self.args.dataloader_pin_memory = False  # else PyTorch warns that there is no accelerator
        self.test_dataset = test_dataset
        self.score_name = "eval_" + self.args.metric_for_best_model.removeprefix("eval_")
        self.stopped_by, self.train_seconds, self.restarts = None, 0.0, []
        self._fixed = self.dendrite_args.switch_mode == "fixed"
        self._new_growth()
        self.code = self.read_code()  # what is saved with the model, as it is now
        # What comes into an empty folder before the training, such as scores of the model as it was, is of this run.
        self._was_free = not self.run_dir.is_dir() or not any(self.run_dir.iterdir())
        self.test_metrics, self._last_metrics, self._test_loader = {}, {}, None
        self.decision, self._began, self._unwatched = Decision.CONTINUE, time.monotonic(), set()
        self.stop_signal = StopSignalCallback()
        for callback in self._callbacks().copy():
            # Not a subclass, which is the user's. In a notebook, the stock one is a third class.
            if type(callback) in (StockProgressCallback, PrinterCallback, stock_trainer.DEFAULT_PROGRESS_CALLBACK):
                self.remove_callback(callback)
        is_planned = self._fixed or self.dendrite_args.control_of  # when a cycle ends
        patience = None if is_planned else self.dendrite_args.n_epochs_to_switch
        self.progress = DendriteProgressCallback(self.score_name, self.args.greater_is_better, patience)
        own = weakref.proxy(self)  # without a cycle of references, "del trainer" frees the model and the data loaders
        self.plot = PlotCallback(own)
        callbacks = [self.stop_signal, SaveCallback(), FiniteLossCallback(), self.progress]
        if self._fixed:
            callbacks.insert(0, schedule.CycleEndCallback(lambda step: own._ends_cycle(step)))
        if isinstance(self.growth, Baseline):
            callbacks.append(self.growth.callback)
        for callback in (*callbacks, self.plot):
            self.add_callback(callback)

    def _arguments_of_model(self) -> DendriteArguments | None:
        """What `perforate` received. A trainer of another folder does not inherit what is about one run."""
        args = getattr(self.model, "dendrite_args", None)
        if args and getattr(self.model, "dendrite_args_used_in", self.args.output_dir) != self.args.output_dir:
            return dataclasses.replace(args, overwrite_run=False, control_of=None, save_name=None)
        return args

    def _new_growth(self, began: dict[str, int] | None = None) -> None:
        plan = convert.plan_dendrites(self.model, self.dendrite_args, self.args)
        self.plan_table = convert.table(self.model, self.dendrite_args, plan)
        kind = Baseline if self.dendrite_args.control_of else Growth
        more = {"from_command_line": from_command_line(self.args)} if kind is Baseline else {}
        metric, greater = self.args.metric_for_best_model, bool(self.args.greater_is_better)
        with disk_errors("the temporary files of perforatedai", self.run_dir):
            self.growth = kind(self.model, self.dendrite_args, plan, metric, greater, began, **more)

    @property
    def run_dir(self) -> Path:
        """The folder of the run, `args.output_dir`."""
        return Path(self.args.output_dir)

    @property
    def num_dendrites(self) -> int:
        """Number of dendrites that a layer has now, the largest."""
        return self.growth.num_dendrites

    @property
    def num_parameters(self) -> int:
        """Number of distinct parameters of the model."""
        return self.growth.num_parameters

    # ------------------------------------------------------------------------------------------------------ training

    @plain_hints
    def train(self, resume_from_checkpoint=None, *args, **kwargs) -> TrainOutput:
        """Train until the tracker says that training is complete, or `max_steps`, a callback or a signal stops it.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): Folder of a checkpoint; True or "true" for the newest
                complete one of this run.
            args, kwargs: As for `Trainer.train`.

        Returns:
            `TrainOutput`: What `Trainer.train` returns.

        Raises:
            PerforatedError: For a folder that is not free, a checkpoint that cannot be used, a loss that is not finite,
                a full disk, and after a signal.
        """
        resumed = is_resumed(resume_from_checkpoint)
        start = self._find_checkpoint(resume_from_checkpoint) if resumed else None
        self._new_growth(None if self.state.global_step else self.growth.began)
        if isinstance(self.growth, Baseline):
            self.growth.check(self.settings())
        run_dir.acquire(
            self.run_dir,
            run_dir.redact(sys.argv),
            self.dendrite_args.overwrite_run,
            resumed,
            own=self._was_free,
            control_of=self.dendrite_args.control_of,
            from_command_line=from_command_line(self.args),
        )
        self._was_free = False
        self.restarts, self.train_seconds, self.stopped_by, self.results = [], 0.0, None, None
        self.decision, self.stop_signal.number = Decision.CONTINUE, None
        facts = checkpoint.check(start, content=False) if start else None  # `find` has read all of it
        for model in {self.model, *convert.outermost_models(self.model)}:  # one may be in a plain module
            sharing.note_not_of_base(model)
        if facts:
            self._name_other_settings(facts["settings"], start.name)
            self.train_seconds, self.restarts = facts["train_seconds"], facts["restarts"]
        else:
            self._print_start()
            self.growth.note_initial_weights()
        over = facts and 0 < self._max_steps_of_arguments <= facts["step"]
        if facts and (facts["complete"] or over):
            self._load_from_checkpoint(str(start))
            self.state = TrainerState.load_from_json(str(start / "trainer_state.json"))
            self.growth.restore_best()
            if facts["complete"]:
                self.decision = Decision.COMPLETE
            loss = report.train_loss(self.state.log_history)
            metrics = {"train_runtime": self.train_seconds, "train_loss": loss}
            output = TrainOutput(self.state.global_step, loss, metrics)
        else:
            try:
                output = self._train(start, *args, **kwargs)
            except PerforatedError:
                if not facts and not self.state.global_step:
                    run_dir.release(self.run_dir)
                raise
        if self.stop_signal.number and self.decision is not Decision.COMPLETE:
            raise PerforatedError(self._how_to_resume(), 128 + self.stop_signal.number)
        at_end = 0 < self.state.max_steps <= self.state.global_step or over
        self.stopped_by = "tracker" if self.decision is Decision.COMPLETE else "max_steps" if at_end else "callback"
        if warning := report.no_dendrite_came(
            self.dendrite_args, self.growth.evaluations, self.score_name, was_added=bool(self.restarts)
        ):
            say(warning)
        return output

    def _train(self, start: Path | None, *args, **kwargs) -> TrainOutput:
        self.optimizer = self.lr_scheduler = None
        self.model_wrapped = self.model
        self.training_id = self.model.training_id = secrets.token_hex(4)
        _compat.forget_preparation(self.model)
        self._began = time.monotonic()
        self._unwatched = set() if self.args.torch_compile else {"training", "evaluation"}
        hooks = self.growth.watch_outputs()
        try:
            with self.stop_signal:
                return super().train(str(start) if start else None, *args, **kwargs)
        except pickle.UnpicklingError as error:  # torch.load under weights_only, in the Trainer
            if not start:
                raise
            raise PerforatedError(f"{start} holds a file that is not plain data: {error}") from error
        finally:
            self._unwatched = set()
            for hook in hooks:
                hook.remove()

    def _print_start(self) -> None:
        """Print what is known before the training: layers, direction of the metric, settings that cannot work."""
        args = self.args
        known = self.train_dataset, self._callbacks(), self.num_dendrites
        lines = [report.no_dendrite_can_come(self.dendrite_args, args, *known)]
        lines += [schedule.explanation(self.dendrite_args, args), check_direction(args), report.direction(args)]
        sizes = ", ".join(f"{size:,} {part}" for part, size in self.dataset_sizes.items())
        lines.append(sizes and f"examples: {sizes}")
        if self.dendrite_args.doing_pai and not self.dendrite_args.control_of:
            lines.append(self.plan_table)
        for line in filter(None, lines):
            say(line if from_command_line(args) else in_python(line))

    def _callbacks(self) -> list:
        return self.callback_handler.callbacks

    # -------------------------------------------------------------------------------------------- decisions, restarts

    def _decide(self, metrics: dict[str, float]) -> None:
        """Give an evaluation to the policy, and restart with what it decides. All processes decide alike."""
        score, lr = metrics[self.score_name], float(self.optimizer.param_groups[0]["lr"])
        score, self.growth.unused = broadcast_object_list([float(score), self.growth.unused])
        if not math.isfinite(score):
            say(f"warning: {self.score_name} is {score} at step {self.state.global_step:,}: this evaluation is skipped")
        losses = [entry["loss"] for entry in self.state.log_history[-9:] if "loss" in entry]
        extra = {"train loss": losses[-1]} if losses and math.isfinite(losses[-1]) else {}
        name = f"test_{report.unit(self.score_name)}"
        test = {name.replace("_", " ", 1): v for n, v in self.test_metrics.items() if n == name and math.isfinite(v)}
        step, before, fits = self.state.global_step, self.num_dendrites, self.growth.fits
        metrics = self.test_metrics | metrics | {self.score_name: score}
        self.growth.evaluations.append(report.record(step, before, self._counted, metrics))
        with disk_errors("the graphs of perforatedai", self.run_dir):
            self.decision = self.growth.add_score(
                score, step=step, end_of_cycle=self._ends_cycle(step), extra=extra, test=test, learning_rate=lr
            )
        self._print_notes()
        if self.decision is Decision.COMPLETE and not fits:
            size, limit = self.growth.size_with_one_more(), self.dendrite_args.max_parameters
            say(f"one more dendrite would make {size:,} parameters, --max_parameters is {limit:,}: none is added")
        if self.decision in (Decision.ADD, Decision.RETRY):
            self._restart(before)
        if self.decision is not Decision.CONTINUE:
            self.control.should_save = True
        if self.decision is Decision.COMPLETE:
            self.control.should_training_stop = True

    def _restart(self, before: int) -> None:
        """Make optimizer, scheduler and wrapper again, for the network as it is now."""
        step, best = self.state.global_step, self.growth.policy.best_score
        self.restarts.append(step)
        self.optimizer = self.lr_scheduler = None
        self.model_wrapped = self.model
        _compat.forget_optimizer(self.accelerator)
        if self.args.world_size > 1:
            _compat.forget_preparation(self.model)
        if self.args.torch_compile:
            torch.compiler.reset()
        loader = self.callback_handler.train_dataloader
        self._prepare_for_training(self._steps_of_schedule, loader, None)
        self._counted = self.num_parameters
        for callback in self._callbacks():
            if isinstance(callback, EarlyStoppingCallback):
                callback.early_stopping_patience_counter = -1  # the full patience after the first score with a dendrite
        change = f"{before} -> {report.count(self.num_dendrites, 'dendrite')}"
        if self.decision is Decision.RETRY:
            change = f"dendrite {before} did not improve the score; retrying with new weights"
        if isinstance(self.growth, Baseline):
            change = "optimizer and scheduler restart, as in the run"
        unit = report.unit(self.score_name)
        say(f"step {step:,}: {change}, {self._counted:,} parameters, best {unit} so far {best:.4f}")

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        """As in `Trainer`; the schedule is made for one cycle, the optimizer for what it held in the checkpoint."""
        self._counted = self._counted_for_flos = self.num_parameters
        if isinstance(self.model, PreTrainedModel):
            self._counted_for_flos = self.model.num_parameters(exclude_embeddings=True)
        with self._trained_as_in(resume_from_checkpoint):
            prepared = super()._prepare_for_training(self._steps_of_schedule, train_dataloader, resume_from_checkpoint)
        if not self.restarts and not resume_from_checkpoint:
            self.check_metric()
        return prepared

    def training_step(self, model, *args, **kwargs):
        """As in `Trainer`, with the wrapper of the network as it is now."""
        loss = self._training_step(model, *args, **kwargs)
        self.growth.changed()  # by the step of the optimizer that follows
        self.growth.watch_gradients()
        return loss

    def _training_step(self, model, *args, **kwargs):
        if model is self.model_wrapped and "training" not in self._unwatched:
            return super().training_step(model, *args, **kwargs)
        with contextlib.ExitStack() as stack:
            if "training" in self._unwatched:
                stack.enter_context(self._watch("training"))
            if model is not self.model_wrapped and not self.args.torch_compile:
                model = self.model_wrapped
                if not self.accelerator.sync_gradients:  # the Trainer has done this for the wrapper of before
                    stack.enter_context(self.accelerator.no_sync(model))
            return super().training_step(model, *args, **kwargs)

    @property
    def _max_steps_of_arguments(self) -> int:
        """After how many steps a run ends in any case; 0 or less if only the tracker ends it."""
        return -1 if self._fixed else self.args.max_steps

    @property
    def _cycle_start(self) -> int:
        """The global step at which the running cycle began."""
        return self.restarts[-1] if self.restarts else 0

    def _ends_cycle(self, step: int) -> bool:
        """Whether a cycle of `switch_mode="fixed"` ends with a step."""
        return self._fixed and step - self._cycle_start >= self._steps_of_schedule

    def set_initial_training_values(self, *args, **kwargs):
        """As in `Trainer`; with `switch_mode="fixed"` for as many cycles as there can be."""
        values = super().set_initial_training_values(*args, **kwargs)
        self._is_stream = not has_length([*args, *kwargs.values()][1])  # the data loader
        self._steps_of_schedule = values[-1]
        most = 1 + max(self.dendrite_args.max_dendrites, 3) * self.dendrite_args.max_dendrite_tries
        return schedule.of_all_cycles(values, most) if self._fixed else values

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, *args, **kwargs):
        """As in `Trainer`; evaluations are counted in a cycle, and a stream continues where it was."""
        epochs, batches = super()._init_training_state(max_steps, num_update_steps_per_epoch, *args, **kwargs)
        resumed = self.state.global_step > 0
        if resumed:  # only now all of the checkpoint is loaded
            step = self.state.global_step
            self._together(lambda: checkpoint.discard_after(self.run_dir, step, say), main_only=True)
        if self._fixed and not resumed:
            self.state.compute_steps(self.args, self._steps_of_schedule)
        if resumed and self._is_stream and not self.args.ignore_data_skip:
            # The Trainer takes all steps for one epoch, and the run that wrote the checkpoint may have had others. The
            # epoch says how often the stream began again.
            epochs = math.ceil(self.state.epoch) - 1
            batches = round((self.state.epoch - epochs) * self._steps_of_checkpoint)
            batches *= self.args.gradient_accumulation_steps
        return epochs, batches

    def _finalize_training(self, *args, **kwargs):
        """As in `Trainer`; first the best model comes back, so that callbacks see it at the end."""
        if isinstance(self.growth, Baseline) and self.state.global_step >= self.growth.last_step:
            self.decision = Decision.COMPLETE  # also where the run made no evaluation at its end
        if not self.dendrite_args.testing_dendrite_capacity or self.decision is not Decision.COMPLETE:
            self.growth.restore_best()
        self._counted = self.num_parameters
        self.train_seconds += time.monotonic() - self._began
        if self.plot in self._callbacks():  # a caller may have removed it
            self.plot.draw(self.args, self.state, kept_dendrites=self.num_dendrites)
        self.accelerator.wait_for_everyone()
        return super()._finalize_training(*args, **kwargs)

    def hyperparameter_search(self, *args, **kwargs):
        """Raises `PerforatedError`: each trial needs a run of its own."""
        raise PerforatedError("hyperparameter_search: examples/optuna_sweep.py runs each trial in a process of its own")

    def _load_best_model(self):
        """Nothing: the best model is there already, with or without `load_best_model_at_end`."""

    def _wrap_model(self, model, training=True, *args, **kwargs):
        """As in `Trainer`, which calls it with a new optimizer, whoever made that; `dendrite_learning_rate_factor`."""
        if training and self.optimizer is not None:
            if self._is_scaled:
                schedule.scale_optimizer(self.optimizer, self.dendrite_args.dendrite_learning_rate_factor)
            claimed = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
            left = [n for n, p in self.model.named_parameters() if p.requires_grad and id(p) not in claimed]
            if left:
                say(f"warning: no group of the optimizer trains {report.first_of(left, 3)}")
        return super()._wrap_model(model, training, *args, **kwargs)

    @property
    def _is_scaled(self) -> bool:
        return bool(self.restarts)

    def create_scheduler(self, num_training_steps, *args, **kwargs):
        """As in `Trainer`; learning rates in `lr_scheduler_kwargs` are scaled as that of the optimizer."""
        given, factor = self.args.lr_scheduler_kwargs, self.dendrite_args.dendrite_learning_rate_factor
        if self._is_scaled and factor != 1:
            self.args.lr_scheduler_kwargs = schedule.scale_arguments(given, factor)
        if self.args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):  # lower is better for both by default
            mode = {"mode": "max" if self.args.greater_is_better else "min"}
            self.args.lr_scheduler_kwargs = mode | (self.args.lr_scheduler_kwargs or {})
        try:
            return super().create_scheduler(num_training_steps, *args, **kwargs)
        finally:
            self.args.lr_scheduler_kwargs = given

    def floating_point_ops(self, inputs):
        """As `Trainer.floating_point_ops`, but the parameters are counted once per cycle."""
        data = inputs.get(getattr(self.model, "main_input_name", "input_ids")) if hasattr(inputs, "get") else None
        return 0 if data is None or not hasattr(data, "numel") else 6 * data.numel() * self._counted_for_flos

    def log(self, logs, *args, **kwargs):
        """As `Trainer.log`; dendrites and parameters become series in TensorBoard, wandb and the log history."""
        more = {"dendrites": self.num_dendrites, "parameters": self._counted} if self.is_in_train else {}
        every = logs | more
        super().log(every, *args, **kwargs)
        logs.update({name: value for name, value in every.items() if name not in more})  # as the Trainer changes them

    def prediction_step(self, *args, **kwargs):
        """As in `EvaluatingTrainer`."""
        if "evaluation" not in self._unwatched:
            return super().prediction_step(*args, **kwargs)
        with self._watch("evaluation"):
            return super().prediction_step(*args, **kwargs)

    @contextlib.contextmanager
    def _watch(self, mode: str):
        """The first pass in training and in evaluation shows layers that the model reads without calling them."""
        self._unwatched.discard(mode)
        with self.growth.watch_reads():
            yield
        self._print_notes()

    def _print_notes(self) -> None:
        for note in self.growth.notes:
            say(note)
        self.growth.notes.clear()

    def _evaluate(self, trial, ignore_keys_for_eval, skip_scheduler=False):
        """As `Trainer._evaluate`, the evaluations while training; then the policy decides."""
        try:
            metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        except KeyError as error:  # the Trainer's words for a metric that evaluation does not produce
            if "metric_for_best_model" in str(error):
                self.refuse_metric(self._last_metrics)
            raise
        if self.score_name not in metrics:
            self.refuse_metric(metrics)
        if not skip_scheduler:  # not on an evaluation before the first step, --eval_on_start
            self._decide(metrics)
            if self.progress in self._callbacks():  # a caller may have removed it
                self.progress.show(self.args, self.state, self.growth.policy, self.num_dendrites)
        return metrics

    def _determine_best_metric(self, metrics, trial):
        """As in `Trainer`, for callbacks that read `state.best_metric`; an evaluation that is not finite is skipped."""
        return math.isfinite(metrics[self.score_name]) and super()._determine_best_metric(metrics, trial)


class PerforatedSeq2SeqTrainer(PerforatedTrainer, Seq2SeqTrainer):
    """`PerforatedTrainer` for models that are evaluated by what they generate, `predict_with_generate`."""
