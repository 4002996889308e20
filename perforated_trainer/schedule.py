"""Learning rate and schedule of each cycle. A cycle is the training between two changes of the network."""

import math

import torch
from transformers import TrainerCallback, TrainingArguments

from .arguments import DendriteArguments, PerforatedError, has_an_end

_ABSOLUTE = "min_lr", "lr_end", "max_lr"  # arguments of schedulers that are learning rates; others are relative


def scale_optimizer(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Multiply the learning rate of a new optimizer, before its scheduler is made."""
    for rates in (*optimizer.param_groups, optimizer.defaults):  # some schedulers read the rate in defaults
        if rates.get("lr") is not None:
            rates["lr"] = rates["lr"] * factor


def scale_arguments(lr_scheduler_kwargs: dict | None, factor: float) -> dict | None:
    """`lr_scheduler_kwargs` with the learning rates in them multiplied, so that none is above the first one."""
    if not isinstance(lr_scheduler_kwargs, dict):
        return lr_scheduler_kwargs
    return {
        name: [v * factor for v in value]
        if name in _ABSOLUTE and isinstance(value, (list, tuple))
        else value * factor
        if name in _ABSOLUTE and value is not None
        else value
        for name, value in lr_scheduler_kwargs.items()
    }


def check(dendrite_args: DendriteArguments, args: TrainingArguments, optimizer_cls_and_kwargs: tuple | None) -> None:
    """Raise PerforatedError if optimizer or schedule could not be made again for a new cycle as they were."""
    once = {"params", "model", "optimizer_dict"} & set(optimizer_cls_and_kwargs[1] if optimizer_cls_and_kwargs else ())
    if once:
        raise PerforatedError(
            f"optimizer_cls_and_kwargs: the Trainer uses {min(once)!r} once, and each dendrite needs a new optimizer: "
            "override create_optimizer"
        )
    greedy = args.lr_scheduler_type == "greedy" and "min_lr" not in (args.lr_scheduler_kwargs or {})
    if greedy and dendrite_args.dendrite_learning_rate_factor != 1:
        raise PerforatedError(
            "--dendrite_learning_rate_factor with --lr_scheduler_type greedy, which has a smallest rate of 1e-3: set "
            "min_lr in lr_scheduler_kwargs"
        )


def of_all_cycles(values: tuple, num_cycles: int) -> tuple:
    """What `Trainer.set_initial_training_values` returns, for as many cycles as there can be.

    Args:
        values (`tuple`): Number of epochs, update steps in an epoch, examples, samples, batch size, batches in an
            epoch, and steps, for one cycle.
        num_cycles (`int`): The largest number of cycles.
    """
    epochs, steps_in_epoch, examples, samples, batch, batches, steps = values
    if steps_in_epoch == steps and epochs > steps:  # the length of the data is not known: one epoch counts all steps
        total = steps * num_cycles  # in one epoch, so that the stream continues in the next cycle
        return epochs, total, examples, samples * num_cycles, batch, batches * num_cycles, total
    total = steps * num_cycles
    return math.ceil(total / steps_in_epoch), steps_in_epoch, examples, samples * num_cycles, batch, batches, total


def explanation(dendrite_args: DendriteArguments, args: TrainingArguments) -> str | None:
    """A note on a schedule with an end if a plateau ends a cycle before that; None if it does what it says."""
    if dendrite_args.switch_mode == "fixed" or not dendrite_args.doing_pai or not has_an_end(args):
        return None
    kind = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    return (
        f"note: the schedule {kind} is made for the whole run and restarts with each dendrite, so it does not reach "
        "its end; --switch_mode fixed gives each cycle a whole one"
    )


class CycleEndCallback(TrainerCallback):
    """With `switch_mode="fixed"`: an evaluation at the last step of each cycle, and no second one if an epoch ends too.

    Args:
        ends (`Callable[[int], bool]`): Whether a cycle ends with a step.
    """

    def __init__(self, ends):
        self._ends, self._last = ends, None

    def on_step_end(self, args, state, control, **kwargs):
        if self._ends(state.global_step):
            control.should_evaluate, self._last = True, state.global_step

    def on_epoch_end(self, args, state, control, **kwargs):
        if state.global_step == self._last:
            control.should_evaluate = control.should_save = False
