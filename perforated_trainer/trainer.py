"""`PerforatedTrainer`: the Trainer with dendrites. One `Trainer.train()` per dendrite cycle, on the Trainer's hooks.

A dendrite makes a different model, which needs a new optimizer, scheduler and wrapper. That is what `Trainer.train()`
sets up, so there is one such call per dendrite cycle. Each cycle begins with a checkpoint that holds no optimizer and
no scheduler. A run that was killed goes on through the same code path.

Written for transformers 5.5 to 5.23.
"""

import inspect
import json
import math
import pickle
import re
import shlex
import sys
import time
import zlib
from pathlib import Path

from accelerate.utils import broadcast_object_list
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Seq2SeqTrainer,
    TrainerState,
)
from transformers import ProgressCallback as StockProgressCallback
from transformers.trainer_utils import TrainOutput, speed_metrics

from . import _compat, checkpoint, report, run_folder, schedule, shortcuts
from .arguments import DendriteArguments, PerforatedError, check_arguments, compared_settings, is_resumed
from .callbacks import (
    FiniteLossCallback,
    PlotCallback,
    ProgressCallback,
    SaveCallback,
    ShortcutsCallback,
    StopSignalCallback,
    say,
)
from .convert import perforate
from .publishing import PublishingTrainer, in_one_line
from .scaffold import refuse_other_variant
from .tracker import Decision, DendriteTracker


class PerforatedTrainer(PublishingTrainer):
    """A Trainer that adds dendrites, cycle after cycle, until the tracker says that training is complete.

    Args:
        dendrite_args (`DendriteArguments`): used to convert a model that `perforate` has not converted.
        test_dataset: is evaluated beside every validation and only reported.
        others: those of `Trainer`. `args.output_dir` is the folder of the run.

    After `train()` the model is the tracker's best one, and `stopped_by` is "tracker", "max_steps" or "callback".
    `save_model(folder)` writes the model without training scaffolding, as `from_pretrained` loads it. A subclass that
    has another Trainer beside this one works: `class Mine(PerforatedTrainer, SFTTrainer)`.

    Raises PerforatedError for settings that cannot work.
    """

    def __init__(self, *args, dendrite_args: DendriteArguments | None = None, test_dataset=None, **kwargs):
        if "using_perforatedai" in inspect.signature(super().__init__).parameters:  # Perforated AI's fork
            kwargs["using_perforatedai"] = False
        refuse_other_variant()
        super().__init__(*args, **kwargs)
        if self.optimizer is not None or self.model_init is not None:
            raise PerforatedError("each dendrite needs a new optimizer: pass optimizer_cls_and_kwargs, no model_init")
        tracker = DendriteTracker.current
        if tracker is None or tracker.model is not self.model:
            perforate(self.model, dendrite_args or DendriteArguments(), self.args)
        else:
            check_arguments(tracker.args, self.args)
        self.tracker = DendriteTracker.current
        self.dendrite_args = self.tracker.args
        self.test_dataset = test_dataset
        self.score_name = "eval_" + self.args.metric_for_best_model.removeprefix("eval_")
        self.stopped_by, self.train_seconds, self.decision = None, 0.0, Decision.CONTINUE
        # What comes into an empty folder before the training, such as scores of the model as it was, is of this run.
        self._was_free = not self.run_folder.is_dir() or not any(self.run_folder.iterdir())
        self._stop_was_asked = False
        self._fixed = self.dendrite_args.switch_mode == "fixed"
        self.test_metrics, self.restarts, self._data, self._test_loader = {}, [], None, None
        self.stop_signal = StopSignalCallback()
        for callback in (StockProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        greater = self.args.greater_is_better
        patience = None if self._fixed else self.dendrite_args.n_epochs_to_switch
        self.progress = ProgressCallback(self.score_name, greater, patience)
        self.plot = PlotCallback(self.score_name, greater)
        if self._fixed:
            self.add_callback(schedule.CycleEndCallback())
        for callback in (
            self.stop_signal,
            SaveCallback(),
            FiniteLossCallback(),
            self.progress,
            ShortcutsCallback(),
            self.plot,
            *self.tracker.callbacks,
        ):
            self.add_callback(callback)

    @property
    def run_folder(self) -> Path:
        """The folder of the run, `args.output_dir`."""
        return Path(self.args.output_dir)

    @property
    def num_dendrites(self) -> int:
        """Number of dendrites that each layer has now."""
        return self.tracker.num_dendrites

    @property
    def num_parameters(self) -> int:
        """Number of distinct parameters of the model as it would be deployed."""
        return self.tracker.num_parameters

    def deployed_model(self) -> PreTrainedModel:
        """A copy of the model without training scaffolding; same logits to the last bit."""
        with shortcuts.without(self.model):
            return self.tracker.deployed_model()

    # ---------------------------------------------------------------- training, one Trainer.train() per dendrite cycle

    def train(self, resume_from_checkpoint=None, *args, **kwargs) -> TrainOutput:
        """Train until the tracker says that training is complete, or `max_steps`, a callback or a signal stops it.

        Args:
            resume_from_checkpoint: a checkpoint's folder; True or "true" for the newest complete checkpoint.
            others: as `Trainer.train`.

        Returns what `Trainer.train` does, for all cycles together.

        Raises PerforatedError for a folder that is not free, a checkpoint that cannot be used, a loss that is not
        finite, a disk that is full, and after a signal.
        """
        resumed, start, output, self.restarts = is_resumed(resume_from_checkpoint), None, None, []
        if resumed:
            start = checkpoint.find(resume_from_checkpoint, self.run_folder, say)
        if self.dendrite_args.control_of:
            self.tracker.check(self.settings())
        overwrite, command = self.dendrite_args.overwrite_run, shlex.join(sys.argv)
        run_folder.claim(self.run_folder, command, overwrite, resumed, own=self._was_free)
        self.tracker.folder = self.run_folder.resolve()
        if not start and (warning := report.no_dendrite_can_come(self.dendrite_args, self.args, self.train_dataset)):
            say(warning)
        if not start and (explanation := schedule.explanation(self.dendrite_args, self.args)):
            say(explanation)
        if self.dendrite_args.doing_pai:
            say(self.tracker.table)
        try:
            with self.stop_signal:
                while True:
                    self.decision, complete, self._stop_was_asked = Decision.CONTINUE, False, False
                    if start:
                        manifest = json.loads((start / checkpoint.MANIFEST).read_text(encoding="utf-8"))
                        self._name_other_settings(manifest["settings"], start.name)
                        self.train_seconds, complete = manifest["train_seconds"], manifest["complete"]
                        self.restarts = manifest["restarts"]
                    over = start and not self._fixed and 0 < self.args.max_steps <= checkpoint.step_of(start)
                    if complete or over:
                        self._load_from_checkpoint(str(start))
                        self.state = TrainerState.load_from_json(str(start / "trainer_state.json"))
                        break
                    self.optimizer = self.lr_scheduler = None
                    self.model_wrapped = self.model
                    _compat.forget_preparation(self.model)
                    self._began = time.monotonic()
                    try:
                        output = super().train(str(start) if start else None, *args, **kwargs)
                    finally:
                        shortcuts.drop(self.model)
                    self.train_seconds += time.monotonic() - self._began
                    stopped = self._stop_was_asked and self.decision is Decision.RESTRUCTURED
                    if stopped or self.decision is Decision.CONTINUE:
                        break
                    start = self._checkpoint_folder()  # also when training is complete: all processes load the best
        except KeyError as error:  # the Trainer's words for a metric that evaluation does not produce
            raise PerforatedError(error.args[0]) if "metric_for_best_model" in str(error) else error from None
        except pickle.UnpicklingError as error:  # torch.load under weights_only, in the Trainer
            if not start:
                raise
            raise PerforatedError(f"{start} holds a file that is not plain data: {error}") from error
        if self.plot in self.callback_handler.callbacks:  # a caller may have removed it
            self.plot.draw(self.args, self.state)
        self.accelerator.wait_for_everyone()
        if self.stop_signal.number and not complete:
            command = shlex.join(["python", *sys.argv, "--resume_from_checkpoint", "true"])
            stopped = f"stopped at step {self.state.global_step:,} with a checkpoint; to go on: {command}"
            raise PerforatedError(stopped, 128 + self.stop_signal.number)
        at_end = 0 < self.state.max_steps <= self.state.global_step
        self.stopped_by = "tracker" if complete else "max_steps" if at_end else "callback"
        if not complete:
            self.tracker.restore_best()
        if warning := report.no_dendrite_came(self.dendrite_args, self.state.log_history, self.score_name):
            say(warning)
        return self._of_all_cycles(output or TrainOutput(self.state.global_step, 0.0, {}))

    def _of_all_cycles(self, output: TrainOutput) -> TrainOutput:
        """The output of the last cycle's `Trainer.train()`, with time, speed and loss of the whole training."""
        if not self.restarts or not self.train_seconds:
            return output
        steps, args = self.state.global_step, self.args
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        metrics = speed_metrics("train", time.time() - self.train_seconds, steps * batch, steps)
        loss = report.mean_loss(self.state.log_history)
        return TrainOutput(steps, loss, output.metrics | metrics | {"train_loss": loss})

    def _decide(self, metrics: dict[str, float]) -> Decision:
        """Give an evaluation to the tracker. Rank 0 alone does, and tells the others what it decided."""
        score = metrics[self.score_name]
        if not math.isfinite(score):
            raise PerforatedError(f"{self.score_name} is {score}: it cannot decide", exit_status=1)
        if idle := self.tracker.idle_modules():
            raise PerforatedError(f"no training reached {', '.join(idle)}: set --module_ids_to_track {' '.join(idle)}")
        decision = Decision.CONTINUE
        if self.is_world_process_zero() or self.tracker.decides_everywhere:
            before, unit = self.num_dendrites, report.unit(self.score_name)
            losses = [entry["loss"] for entry in self.state.log_history[-9:] if "loss" in entry]
            extra = {"train loss": losses[-1]} if losses and math.isfinite(losses[-1]) else {}
            test = {f"test {name}": value for name, value in self.test_metrics.items() if name == f"test_{unit}"}
            step = self.state.global_step
            ends = self._fixed and step >= self.state.max_steps
            limit = self.dendrite_args.doing_pai and self.dendrite_args.max_parameters
            size = self.tracker.size_with_one_more() if limit else 0
            with in_one_line("the best model so far"):
                decision = self.tracker.add_score(score, extra, test, step, end_of_cycle=ends)
            if decision is Decision.COMPLETE and limit and size > limit:
                say(f"one dendrite more would make {size:,} parameters, --max_parameters is {limit:,}: none is added")
            if decision is Decision.RESTRUCTURED:
                rows = report.scores(self.state.log_history, self.score_name)
                best = report.best(rows, self.score_name, self.args.greater_is_better)[self.score_name]
                grown = f"{before} -> {report.count(self.num_dendrites, 'dendrite')}"
                if before == self.num_dendrites:
                    grown = f"dendrite {before} did not help and is tried anew"
                if self.dendrite_args.control_of:
                    grown = "optimizer and schedule start anew, as in the run"
                say(
                    f"step {self.state.global_step:,}: {grown}, {self.num_parameters:,} parameters, "
                    f"best {unit} so far {best:.4f}"
                )
        return broadcast_object_list([decision])[0]

    def _name_other_settings(self, then: dict, name: str) -> None:
        now = self.settings()
        for setting in sorted(now.keys() | then.keys()):
            if now.get(setting) != then.get(setting):
                say(f"warning: {setting} was {then.get(setting)} in {name} and is now {now.get(setting)}")

    def settings(self) -> dict:
        """What a resumed run should share with the run that wrote the checkpoint."""
        settings = compared_settings(self.dendrite_args, self.args)
        if self._data is None:  # looked at once: an example may be made with random numbers
            self._data = {}
            for name in ("train_dataset", "eval_dataset", "test_dataset"):
                data = getattr(self, name)
                if hasattr(data, "__len__") and hasattr(data, "__getitem__") and not isinstance(data, dict):
                    first, again = (re.sub("0x[0-9a-f]+", "", repr(data[0])) for _ in range(2))
                    mark = f", first {zlib.crc32(first.encode()):08x}" if first == again else ""
                    self._data[name] = f"{len(data)} examples{mark}"
        return settings | self._data

    # ------------------------------------------------------------------------------------- the Trainer's hooks: a step

    def create_optimizer(self, *args, **kwargs):
        """As `Trainer.create_optimizer`; the library is told of the new optimizer."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if is_new and (self.num_dendrites or self.restarts):  # a control has no dendrites
            schedule.scale(optimizer, self.dendrite_args.dendrite_learning_rate_factor)
        self.tracker.set_optimizer(optimizer)
        return optimizer

    @property
    def _cycle_start(self) -> int:
        """The global step at which the running cycle began."""
        return self.restarts[-1] if self.restarts else 0

    def set_initial_training_values(self, *args, **kwargs):
        """As in `Trainer`; with `--switch_mode fixed` the numbers are those of the running cycle."""
        values = super().set_initial_training_values(*args, **kwargs)
        return schedule.of_one_cycle(values, self._cycle_start) if self._fixed else values

    def create_scheduler(self, num_training_steps, *args, **kwargs):
        """As in `Trainer`; with `--switch_mode fixed` it is a schedule for one cycle."""
        return super().create_scheduler(num_training_steps - self._fixed * self._cycle_start, *args, **kwargs)

    def floating_point_ops(self, inputs):
        """As `Trainer.floating_point_ops`, but without counting the parameters anew at each step."""
        data = inputs.get(self.model.main_input_name)
        return 0 if data is None else 6 * data.numel() * self._num_parameters_of(self.num_dendrites)

    def _num_parameters_of(self, dendrites: int) -> int:
        counted = self.__dict__.setdefault("_counted", {})
        if dendrites not in counted:  # the number of dendrites determines the structure
            counted[dendrites] = self.num_parameters
        return counted[dendrites]

    def log(self, logs, *args, **kwargs):
        """As `Trainer.log`; dendrites and parameters become series in TensorBoard, wandb and the log history."""
        if self.is_in_train:
            logs |= {"dendrites": self.num_dendrites, "parameters": self._num_parameters_of(self.num_dendrites)}
        super().log(logs, *args, **kwargs)

    # ------------------------------------------------------------------------------ the Trainer's hooks: an evaluation

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval", **kwargs):
        """As `Trainer.evaluate`; while training, the test data first, for the report."""
        if self.is_in_train and eval_dataset is None and self.test_dataset is not None:
            self.test_metrics = super().evaluate(self.test_dataset, ignore_keys, "test", **kwargs)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix, **kwargs)

    def get_eval_dataloader(self, eval_dataset=None):
        """As `Trainer.get_eval_dataloader`; the test data has a loader of its own.

        With `dataloader_persistent_workers` the Trainer keeps one loader, and would give it for any other data, too.
        """
        if eval_dataset is None or eval_dataset is not self.test_dataset:
            return super().get_eval_dataloader(eval_dataset)
        if self._test_loader is None or not self.args.dataloader_persistent_workers:
            self._test_loader = self.get_test_dataloader(eval_dataset)
        return self._test_loader

    def _evaluate(self, trial, ignore_keys_for_eval, skip_scheduler=False):
        """As `Trainer._evaluate`, the evaluations while training; then the tracker decides how to go on."""
        metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        if not skip_scheduler:  # not on an evaluation before the first step, --eval_on_start
            self._stop_was_asked = self.control.should_training_stop  # by a callback; a new cycle would not hear of it
            self.decision = self._decide(metrics)
            if self.decision is Decision.RESTRUCTURED:
                self.restarts.append(self.state.global_step)
            self.progress.show(self.args, self.state)
            if self.decision is not Decision.CONTINUE:
                self.control.should_save = self.control.should_training_stop = True
        return metrics

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

    # ------------------------------------------------------------------------------- the Trainer's hooks: a checkpoint

    def _checkpoint_folder(self) -> Path:
        return self.run_folder / f"checkpoint-{self.state.global_step}"

    def _save_checkpoint(self, model, trial):
        """As `Trainer._save_checkpoint`; the checkpoint counts once all of it is there, and only then old ones go."""
        folder, limit, settings = self._checkpoint_folder(), self.args.save_total_limit, self.settings()
        self.state.best_global_step = None  # the tracker keeps the best model, the Trainer need not
        self.args.save_total_limit = None  # the Trainer would delete an old checkpoint before the new one is sealed
        try:
            with in_one_line(folder):
                if self.is_world_process_zero():
                    checkpoint.begin(folder)
                self.accelerator.wait_for_everyone()  # before other processes write their random state there
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.is_world_process_zero():
                    self.tracker.save(folder)
                    facts = {
                        "complete": self.decision is Decision.COMPLETE,
                        "train_seconds": self.train_seconds + time.monotonic() - self._began,
                        "settings": settings,
                        "restarts": self.restarts,
                    }
                    checkpoint.seal(folder, facts)
                    checkpoint.rotate(self.run_folder, limit)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()

    def _save_optimizer_and_scheduler(self, output_dir):
        """As in `Trainer`; nothing where the structure has just changed: they belong to the network before that."""
        if self.decision is Decision.CONTINUE:
            super()._save_optimizer_and_scheduler(output_dir)

    def _save_scaler(self, output_dir):
        if self.decision is Decision.CONTINUE:
            super()._save_scaler(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """The only place where model, dendrites and tracker are loaded; `Trainer` does the rest."""
        with in_one_line("the best model so far"):
            self.tracker.load(Path(resume_from_checkpoint))
        self.accelerator.wait_for_everyone()


class PerforatedSeq2SeqTrainer(PerforatedTrainer, Seq2SeqTrainer):
    """`PerforatedTrainer` for models that are evaluated by what they generate, `predict_with_generate`."""
