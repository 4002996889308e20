"""A learning rate schedule for each cycle, `--switch_mode fixed`: one cycle is one ordinary training.

The global step, the epoch and the log go on over the cycles, as they do when a training is resumed. Only the schedule
begins anew: it is made for the steps of one cycle, and its first step is the first one of the cycle.
"""

import math
import sys

import torch
from transformers import TrainerCallback, TrainingArguments

from .arguments import DendriteArguments, has_an_end


def of_one_cycle(values: tuple, start: int) -> tuple:
    """What `Trainer.set_initial_training_values` says, for a cycle that begins at the step `start`.

    Args:
        values: number of epochs, steps in an epoch, examples, samples, batch size, batches in an epoch, and of steps,
            for one ordinary training.
        start: the global step at which the cycle begins.
    """
    epochs, steps_in_epoch, *others, steps = values
    if epochs < sys.maxsize:  # else the length of the data is not known, and the epochs are not counted
        epochs = math.ceil((start + steps) / steps_in_epoch)
    return epochs, steps_in_epoch, *others, start + steps


def scale(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Multiply the learning rate of a new optimizer, before its schedule is made."""
    for rates in (*optimizer.param_groups, optimizer.defaults):  # some schedules read the rate in defaults
        if rates.get("lr") is not None:
            rates["lr"] = rates["lr"] * factor


def explanation(dendrite_args: DendriteArguments, args: TrainingArguments) -> str | None:
    """What a schedule with an end does where a plateau ends a cycle, or None where it does what it says."""
    if dendrite_args.switch_mode == "fixed" or not dendrite_args.doing_pai or not has_an_end(args):
        return None
    kind = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    return (
        f"note: the schedule {kind} is made for the whole run and begins anew with each dendrite, so it does not reach "
        "its end; --switch_mode fixed gives each cycle a whole one"
    )


class CycleEndCallback(TrainerCallback):
    """An evaluation at the last step of each cycle, and not a second one where an epoch ends there.

    It comes before the checkpoint of that step, which holds what the tracker decided.
    """

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            control.should_evaluate = True
            # The Trainer's own stop, at its last step. What comes after it, such as a signal, asks for a stop again.
            control.should_training_stop = False

    def on_epoch_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = False
