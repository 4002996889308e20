"""What happens beside the training, one class a job: progress, a loss not finite, pictures, a signal to stop."""

import contextlib
import math
import signal
import sys
import time
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from . import plot, report, shortcuts
from .arguments import PerforatedError, run_name
from .tracker import DendriteTracker


def say(line: str) -> None:
    """Print a line above the progress bar, in the first process only."""
    if PartialState().is_main_process:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()


class ProgressCallback(TrainerCallback):
    """A bar for the running cycle: steps, speed, and how long the score has not been better.

    Without a terminal: a plain line every 15 seconds at most. Replaces the Trainer's bar, which would count to the last
    of a million epochs.
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

    def show(self, args, state):
        """Show a validation that the tracker has heard of."""
        rows = report.scores(state.log_history, self.score_name)
        best = report.best(rows, self.score_name, self.greater_is_better)
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        since = DendriteTracker.current.scores_since_best
        shown = {"loss": f"{losses[-1]:.4f}"} if losses else {}
        shown |= {f"best {report.unit(self.score_name)}": f"{best[self.score_name]:.4f}"}
        words = [f"{name} {value}" for name, value in shown.items()]
        words.append(report.count(rows[-1]["dendrites"], "dendrite"))
        if self.patience is None:
            words.append(f"cycle ends at step {state.max_steps:,}")
        else:
            words.append(f"{since} of {self.patience} evaluations without a better score")
        self.bar.set_description_str(", ".join(words))
        if self.bar.disable and not args.disable_tqdm and time.monotonic() - self.last_line > 15:
            self.last_line = time.monotonic()
            say(f"step {state.global_step:,}: {', '.join(words)}")

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


class FiniteLossCallback(TrainerCallback):
    """Ends the run with PerforatedError where loss or gradient are no longer finite, before a checkpoint of that."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name, value in logs.items():
            # With fp16 the gradient scaler skips a step whose gradient is not finite, and goes on.
            watched = name.endswith("loss") or (name == "grad_norm" and not args.fp16)
            if watched and not math.isfinite(value):
                raise PerforatedError(
                    f"{name} became {value} at step {state.global_step}. The last checkpoint and the best model so far "
                    f"are kept in {args.output_dir}; try a lower --learning_rate",
                    exit_status=1,
                )


class PlotCallback(TrainerCallback):
    """Draws `<run>.png` and the library's own graphs: while training, which takes a hundredth of the time at most."""

    def __init__(self, score_name: str, greater_is_better: bool):
        self.score_name, self.greater_is_better = score_name, greater_is_better
        self.drawn, self.seconds = time.monotonic(), 0.2  # when, and what a picture costs

    def on_evaluate(self, args, state, control, **kwargs):
        if time.monotonic() - self.drawn > 100 * self.seconds:
            self.draw(args, state)

    def draw(self, args, state):
        """Draw now; the trainer does at the end of a run."""
        began = time.monotonic()
        if state.is_world_process_zero:
            path = Path(args.output_dir, f"{run_name(args)}.png")
            try:
                DendriteTracker.current.draw()
                plot.draw(state.log_history, self.score_name, self.greater_is_better, path)
            except OSError as error:  # a full disk, say; the training needs no picture
                say(f"warning: {path} cannot be drawn: {error}")
        self.drawn = time.monotonic()
        self.seconds = self.drawn - began


class ShortcutsCallback(TrainerCallback):
    """A cycle has its modules and parameters once it begins; the trainer takes the shortcuts away at its end."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        shortcuts.take(model)


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
            self._before = {number: signal.signal(number, self._heard) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error):
        while self._before:
            signal.signal(*self._before.popitem())

    def _heard(self, number, frame):
        if self.number:
            raise KeyboardInterrupt
        self.number = number
        say("stopping after the next checkpoint; press Ctrl-C again to stop at once")

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
    waits for the evaluation: a run that is resumed from there goes on with the next epoch.
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
