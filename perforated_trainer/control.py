"""The control of a run with dendrites: the same network without them, trained the same way.

A run with dendrites trains longer than one without, and its optimizer and schedule start anew with each dendrite. Both
help by themselves. The control has the same number of steps and the same fresh starts, each from the best weights so
far; what is left between the two is the dendrites' own share.
"""

import copy
import dataclasses
from pathlib import Path

import torch
from transformers import PreTrainedModel, TrainerCallback

from . import layers, run_folder
from .arguments import DendriteArguments, PerforatedError
from .tracker import Decision, DendriteTracker

CONTROL = "control.pt"  # in a checkpoint: the network as it is trained, the best one so far, and its score
_OWN = {"control_of", "doing_pai"}  # settings by which a control differs from its run


class StopWithRunCallback(TrainerCallback):
    """Ends the control at the step at which its run ended, after an evaluation."""

    def __init__(self, last_step: int):
        self.last_step = last_step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= self.last_step:
            control.should_training_stop = True
            if args.eval_strategy == "steps":  # with "epoch" the Trainer evaluates whenever an epoch ends or is cut
                control.should_evaluate = True


class ControlTracker:
    """Takes the place of a `DendriteTracker`: a fresh start where its run had one, without a change of the network.

    Args:
        model: the network; it is not converted.
        args: the settings of the run, with `control_of`.
        greater_is_better: whether a higher score is better.
        device: of the training.

    Attributes:
        results: what `results.json` of the run holds.
        same_network: whether a network with another number of parameters is refused.

    Raises PerforatedError where `control_of` is no finished run with dendrites.
    """

    same_network = True
    decides_everywhere = True  # each process keeps the best weights; they see the same scores

    def __init__(self, model: PreTrainedModel, args: DendriteArguments, greater_is_better: bool, device: torch.device):
        self.run_folder = Path(args.control_of)
        self.results = run_folder.results_of(self.run_folder)
        self.model, self.folder = model.to(device), None
        self.args = dataclasses.replace(args, doing_pai=False)
        self.greater_is_better = greater_is_better
        self.restarts, self.last_step = self.results["restarts"], self.results["global_step"]
        self.callbacks = (StopWithRunCallback(self.last_step),)
        self.best, self.best_score, self.scores_since_best = None, None, 0
        DendriteTracker.current = self

    def check(self, settings: dict) -> None:
        """Raise PerforatedError, with the names, where `settings` are not those that the run was trained with."""
        then = self.results["settings"]
        different = [
            f"{name} ({then.get(name)} there, {settings.get(name)} here)"
            for name in sorted((then.keys() | settings.keys()) - _OWN)
            if then.get(name) != settings.get(name)
        ]
        cycles = self.results["cycles"]
        if self.same_network and cycles and cycles[0]["parameters"] != self.num_parameters:
            different.append(f"parameters ({cycles[0]['parameters']:,} there, {self.num_parameters:,} here)")
        if different:
            raise PerforatedError(
                f"--control_of {self.run_folder}: a control is trained as its run was, but these differ: "
                f"{', '.join(different)}. The run was started by: {self.results['command']}"
            )

    # ----------------------------------------------------------------------------------------------------- what is now

    @property
    def num_dendrites(self) -> int:
        """Number of dendrites that each layer had before the training."""
        dendrites = (layers.split_dendrites(layer)[0] for layer in layers.layers_with_dendrites(self.model).values())
        return max(map(len, dendrites), default=0)

    @property
    def num_parameters(self) -> int:
        """Number of distinct parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def idle_modules(self) -> list[str]:
        """None: nothing is restructured."""
        return []

    def set_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Nothing to do."""

    def draw(self) -> None:
        """Nothing: the graphs are the library's."""

    # --------------------------------------------------------------------------------------- scores in, a decision out

    def add_score(self, score: float, extra: dict[str, float], test: dict[str, float], step: int, **kwargs) -> Decision:
        """Keep the weights where the score is the best so far; start anew, or end, from the best where the run did.

        What else a `DendriteTracker` decides by, the run has decided.
        """
        self.scores_since_best += 1
        if self.best is None or (score > self.best_score if self.greater_is_better else score < self.best_score):
            self.best_score, self.scores_since_best = score, 0
            self.best = {name: value.detach().to("cpu", copy=True) for name, value in self.model.state_dict().items()}
        if step < self.last_step and step not in self.restarts:
            return Decision.CONTINUE
        self.restore_best()
        return Decision.RESTRUCTURED if step < self.last_step else Decision.COMPLETE

    def restore_best(self) -> None:
        """Bring back the best weights so far."""
        if self.best is not None:
            self.model.load_state_dict(self.best)

    # ------------------------------------------------------------------------------------------ kept, loaded, deployed

    def save(self, folder: Path) -> None:
        """Write the network, the best weights so far and their score into a checkpoint."""
        kept = {name: getattr(self, name) for name in ("best", "best_score", "scores_since_best")}
        torch.save(kept | {"model": self.model.state_dict()}, folder / CONTROL)

    def load(self, folder: Path) -> None:
        """Bring everything to where `save` found it. PerforatedError for another network."""
        if not (folder / CONTROL).is_file():
            raise PerforatedError(f"{folder} is no checkpoint of a control: leave out --control_of")
        kept = torch.load(folder / CONTROL, map_location="cpu", weights_only=True)
        try:
            self.model.load_state_dict(kept.pop("model"))
        except RuntimeError as error:
            raise PerforatedError(f"{folder} does not fit this network: {str(error)[:400]}") from error
        vars(self).update(kept)

    def deployed_model(self) -> PreTrainedModel:
        """A copy of the network."""
        return copy.deepcopy(self.model)
