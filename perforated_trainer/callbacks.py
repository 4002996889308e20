"""Callbacks of the trainer: progress bar, non-finite loss check, plots, signal handling."""

import contextlib
import math
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from . import checkpoint, plot, report
from .arguments import PerforatedError, run_name

PERFORATEDAI = "perforatedai"  # folder of the graphs and tables of perforatedai


def say(line: str) -> None:
    """Print a line above the progress bar, in the first process only."""
    if PartialState().is_main_process:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()


class DendriteProgressCallback(TrainerCallback):
    """A progress bar: steps, speed, and evaluations since the last improvement.

    Without a terminal: a plain line every 15 seconds at most. Replaces the Trainer's bar, which would count to the last
    of a million epochs.

    Args:
        score_name (`str`): The monitored metric.
        greater_is_better (`bool`): Whether a higher score is better.
        patience (`int`, *optional*): Evaluations without improvement before a dendrite is added.
    """

    def __init__(self, score_name: str, greater_is_better: bool, patience: int | None):
        self.score_name, self.greater_is_better, self.patience = score_name, greater_is_better, patience
        self.bar, self.last_line = None, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        hidden = args.disable_tqdm or not state.is_world_process_zero or None  # None: without a terminal
        self.bar = tqdm(
            leave=False,
            disable=hidden,
            initial=state.global_step,
            unit=" steps",
            dynamic_ncols=True,
            bar_format="step {n:,} | {rate_fmt} | {elapsed} | {desc}",
        )

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()

    def show(self, args, state, policy, num_dendrites: int) -> None:
        """Show an evaluation that the policy has decided about.

        Args:
            args, state: Of the Trainer.
            policy (`Policy`): Best score and evaluations since the last improvement.
            num_dendrites (`int`): Of the network now.
        """
        losses = [entry["loss"] for entry in state.log_history[-9:] if "loss" in entry]
        words = [f"loss {losses[-1]:.4f}"] if losses else []
        if policy.best_score is not None:
            words.append(f"best {report.unit(self.score_name)} {policy.best_score:.4f}")
        words.append(report.count(num_dendrites, "dendrite"))
        if self.patience is not None:
            words.append(f"{policy.evaluations_since_improvement} of {self.patience} evaluations without improvement")
        self.bar.set_description_str(", ".join(words))
        if self.bar.disable and not args.disable_tqdm and time.monotonic() - self.last_line > 15:
            self.last_line = time.monotonic()
            say(f"step {state.global_step:,}: {', '.join(words)}")

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


class FiniteLossCallback(TrainerCallback):
    """Ends the run with PerforatedError if the training loss or the gradient is not finite, before a checkpoint."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        # With fp16 the gradient scaler skips a step whose gradient is not finite, and continues.
        for name in ("loss", "train_loss") if args.fp16 else ("loss", "train_loss", "grad_norm"):
            value = logs.get(name)
            if isinstance(value, (int, float)) and not math.isfinite(value):
                raise PerforatedError(
                    f"{name} became {value} at step {state.global_step}. The last checkpoint and the best model so far "
                    f"are kept in {args.output_dir}; try a lower --learning_rate",
                    exit_status=1,
                )


class PlotCallback(TrainerCallback):
    """Draws `<run>.png` and the graphs of perforatedai while training, in at most a hundredth of the time.

    Args:
        trainer (`PerforatedTrainer`): The metric and the graphs are taken from it.
    """

    def __init__(self, trainer):
        self._trainer = trainer
        self.drawn, self.seconds = time.monotonic(), 0.2  # when, and how long a plot takes

    def on_evaluate(self, args, state, control, **kwargs):
        if time.monotonic() - self.drawn > 100 * self.seconds:
            self.draw(args, state)

    def draw(self, args, state, kept_dendrites: int | None = None) -> None:
        """Draw now; the trainer does at the end of a run, with the number of dendrites of the kept model."""
        began, trainer = time.monotonic(), self._trainer
        if state.is_world_process_zero:
            folder = Path(args.output_dir)
            path = folder / f"{run_name(args)}.png"
            try:
                for file in trainer.growth.library.draw() if trainer.growth.library else ():
                    (folder / PERFORATEDAI).mkdir(exist_ok=True)
                    with checkpoint.replacing(folder / PERFORATEDAI / file.name) as temporary:
                        shutil.copyfile(file, temporary)
                greater, cycles = args.greater_is_better, trainer.cycles()
                plot.draw(
                    trainer.growth.evaluations,
                    trainer.score_name,
                    greater,
                    path,
                    kept_dendrites=kept_dendrites,
                    cycles=cycles,
                )
            except Exception as error:  # a full disk, for example; the training needs no plot
                say(f"warning: {path} cannot be drawn: {error}")
        self.drawn = time.monotonic()
        self.seconds = self.drawn - began


class StopSignalCallback(TrainerCallback):
    """Ctrl-C and SIGTERM end the run after a checkpoint; a second one at once. In force in its `with` block.

    The Trainer's just-in-time checkpoint saves in the middle of a step, after dropout has drawn its random numbers and
    before the weights have changed: a run resumed from there would not repeat an uninterrupted one.
    """

    def __init__(self):
        self.number, self._before = None, {}

    def __enter__(self):
        self.number = None
        with contextlib.suppress(ValueError):  # signals can be caught in the main thread only
            self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error):
        while self._before:
            signal.signal(*self._before.popitem())

    def _receive(self, number, frame):
        if self.number:
            raise KeyboardInterrupt
        self.number = number
        say("stopping after the next checkpoint; press Ctrl-C again to stop at once")

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.number and state.epoch != int(state.epoch):
            # The epoch is cut short: an uninterrupted run has no evaluation here.
            control.should_evaluate = control.should_save = control.should_log = False

    def on_step_end(self, args, state, control, **kwargs):
        if args.world_size > 1:  # several processes agree every ten steps, so that all stop at the same one
            if state.global_step % 10:
                return
            flag = torch.tensor(self.number or 0, device=args.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            self.number = int(flag) or None
        if self.number:
            control.should_save = control.should_training_stop = True


class SaveCallback(TrainerCallback):
    """Before a checkpoint, the running loss is logged, which it does not hold; and an evaluation that is due is made.

    So a resumed run reports the same losses. With `eval_strategy="epoch"` a checkpoint of the last step of an epoch
    waits for the evaluation: a run that is resumed from there continues with the next epoch.
    """

    def __init__(self):
        self.waits = False

    def on_step_end(self, args, state, control, **kwargs):
        at_epoch_end = args.eval_strategy == IntervalStrategy.EPOCH and state.epoch == int(state.epoch)
        if control.should_save and at_epoch_end:
            self.waits, control.should_save = True, False
        if control.should_evaluate or control.should_save:
            control.should_log = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.waits:
            self.waits, control.should_save, control.should_log = False, True, True
