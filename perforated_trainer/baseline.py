"""The step-matched baseline of a run: the same network without dendrites, trained in the same way.

A run with dendrites trains longer than one without, and restarts its optimizer and scheduler with each dendrite. Both
help by themselves. The baseline has the same number of steps and the same restarts, each from its best weights so far;
the difference between the two is the effect of the dendrites.
"""

import dataclasses
from pathlib import Path

from torch import nn
from transformers import TrainerCallback

from . import run_dir
from .arguments import DendriteArguments, PerforatedError
from .growth import Growth
from .policy import Decision

_OWN = {"control_of", "doing_pai", "num_initial_dendrites"}  # arguments by which a baseline differs from its run


class StopWithRunCallback(TrainerCallback):
    """Ends the baseline at the step at which its run ended, after an evaluation if the run made one there."""

    def __init__(self, last_step: int, evaluates: bool = True):
        self.last_step, self.evaluates = last_step, evaluates

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= self.last_step:
            control.should_training_stop = True
            # With "epoch" the Trainer evaluates whenever an epoch ends or is cut.
            if args.eval_strategy == "steps" and self.evaluates:
                control.should_evaluate = True


class Baseline(Growth):
    """Takes the place of `Growth`: a restart when the run had one, without a change of the network.

    Args:
        model, args, others: As for `Growth`; `args.control_of` is the folder of the run.
        from_command_line (`bool`): Whether messages name flags.

    Attributes:
        results (`dict`): `results.json` of the run.
        same_network (`bool`): Whether a network with another number of parameters is refused.

    Raises:
        PerforatedError: If `control_of` is not a finished run with dendrites.
    """

    same_network = True

    def __init__(self, model: nn.Module, args: DendriteArguments, *others, from_command_line: bool = False):
        self.run_dir = Path(args.control_of)
        self.results = run_dir.results_of(self.run_dir, from_command_line)
        self.restarts, self.last_step = self.results["restarts"], self.results["global_step"]
        evaluates = self.results.get("last_evaluation", self.last_step) == self.last_step
        self.callback = StopWithRunCallback(self.last_step, evaluates)
        own = dataclasses.replace(args, doing_pai=False, switch_mode="fixed")  # its policy ends no cycle by itself
        super().__init__(model, own, *others)

    def _library(self):
        return None

    def check(self, settings: dict) -> None:
        """Raise PerforatedError, with the names, if `settings` are not those that the run was trained with."""
        then = self.results["settings"]
        different = [
            f"{name} ({then.get(name)} there, {settings.get(name)} here)"
            for name in sorted((then.keys() | settings.keys()) - _OWN)
            if then.get(name) != settings.get(name)
        ]
        if not self.results["cycles"]:
            raise PerforatedError(f"--control_of {self.run_dir}: no evaluation of this run had a finite score")
        without = self.results.get("parameters_without_dendrites") or self.results["cycles"][0]["parameters"]
        if self.same_network and without != self.num_parameters:
            different.append(f"parameters ({without:,} there, {self.num_parameters:,} here)")
        if different:
            raise PerforatedError(
                f"--control_of {self.run_dir}: a baseline is trained as its run was, but these differ: "
                f"{', '.join(different)}. The run was started by: {self.results['command']}"
            )

    def add_score(self, score: float, step: int, **kwargs) -> Decision:
        """Keep the weights if the score is the best so far; restart, or end, from the best when the run did.

        What else decides for a run has decided in this run already.
        """
        if self.policy.add_score(score).is_best:
            self._keep(step)
        if step < self.last_step and step not in self.restarts:
            return Decision.CONTINUE
        self.restore_best()
        self.policy.start_cycle()
        return Decision.ADD if step < self.last_step else Decision.COMPLETE
