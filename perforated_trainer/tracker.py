"""The tracker of perforatedai: settings and scores go in, a decision comes out, networks are kept and deployed.

The library has one tracker per process, so there is one `DendriteTracker` at a time. Its files lie in the folder
`perforatedai` of the run. Between its calls, what only a restructure needs is not registered in the network: optimizer,
wrappers and each step then see the layers and their dendrites alone.

Written for perforatedai 3.2.9. `tests/test_compat.py` fails when a private name that is used here changes.
"""

import contextlib
import copy
import enum
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from . import layers, price, shortcuts
from .arguments import DendriteArguments, PerforatedError
from .run_folder import LIBRARY
from .scaffold import GPA, UPA, close_layers, dendrites_of, grow, library, open_layers

logger = logging.get_logger(__name__)

SYSTEM = "training.safetensors"  # in a checkpoint: the network with all that a restructure needs, and the tracker
BEST = "best_model.safetensors"  # in a checkpoint: the best network so far, as the library keeps it


class Decision(enum.Enum):
    """What the tracker decided after a score."""

    CONTINUE = "train on"
    RESTRUCTURED = "the network is another one: make optimizer, scheduler and wrapper anew"
    COMPLETE = "training is complete; the network is the best one"


class DendriteTracker:
    """Perforated AI's tracker and the network that it changes.

    Args:
        model: is converted in place.
        args: the settings of the dendrites.
        module_ids: names of the modules that get dendrites.
        check_output: called once for each of these, as `check_output(module, output)`, after its first forward pass.
        grown: dendrites that the model has already, by the name of their layer, as `layers.split_dendrites` gives them.
        metric: name of the score that decides.
        greater_is_better: whether a higher score is better.
        device: of the training.

    Attributes:
        folder: the run folder, absolute; set when a run begins, before that nothing is written.
        table: what gets dendrites and what they cost, in words.

    Raises PerforatedError where the library stops.
    """

    current: "DendriteTracker | None" = None  # the library keeps one per process
    callbacks = ()  # that the trainer needs with this tracker
    decides_everywhere = False  # the first process decides, for all

    def __init__(
        self,
        model: PreTrainedModel,
        args: DendriteArguments,
        module_ids: list[str],
        check_output,
        grown: dict[str, tuple],
        metric: str,
        greater_is_better: bool,
        device: torch.device,
    ):
        self.model, self.args, self.folder, self.table = model, args, None, ""
        threshold, fixed = args.improvement_threshold, args.switch_mode == "fixed"
        for setting in "configuration_confirmed unwrapped_modules_confirmed weight_decay_accepted silent".split():
            getattr(GPA.pc, f"set_{setting}")(True)  # never ask on standard input
        for setting in "verbose find_best_lr test_saves pai_saves retain_all_dendrites".split():
            getattr(GPA.pc, f"set_{setting}")(False)  # the Trainer owns schedule and checkpoints; best_model.pt stays
        settings = {
            "device": device,
            "use_cuda": device.type == "cuda",
            "d_type": model.dtype,
            "testing_dendrite_capacity": args.testing_dendrite_capacity,
            "max_dendrites": args.max_dendrites,
            "n_epochs_to_switch": args.n_epochs_to_switch,
            "history_lookback": args.history_lookback,
            "improvement_threshold": threshold[0] if len(threshold) == 1 else list(threshold),
            "library_validation_score": metric,
            "output_dimensions": args.output_dimensions or [-1, 0, -1, -1],
            "module_ids_to_perforate": [f".{name}" for name in module_ids],
            "module_names_to_perforate": [],  # all are named one by one
            "module_names_to_not_save": [],
            # With 0 the library takes the very first score for no best one; a cycle may have no other.
            "initial_history_after_switches": -1 if fixed else 0,
            "improvement_threshold_raw": args.improvement_threshold_raw,
            "pai_forward_function": layers.ACTIVATIONS[args.dendrite_activation],
            "candidate_weight_initialization_multiplier": args.dendrite_init_scale,
            # A capacity test changes these two, and retain_all_dendrites: a later call here must not inherit them.
            "switch_mode": GPA.pc.DOING_NO_SWITCH if fixed else GPA.pc.DOING_HISTORY,
            "max_dendrite_tries": args.max_dendrite_tries,
        }
        for setting, value in settings.items():
            getattr(GPA.pc, f"set_{setting}")(value)
        # The library writes its settings, and would take those that a file of an older run there holds.
        with tempfile.TemporaryDirectory() as empty, library(Path(empty)):
            UPA.perforate_model(
                model,
                doing_pai=args.doing_pai,
                save_name=LIBRARY,
                making_graphs=False,  # drawn by `draw`, when it is worth the time
                maximizing_score=greater_is_better,
            )
        GPA.pc.set_module_names_to_not_save([])  # the library adds second names of modules, which loading then misses
        for module in UPA.get_pai_modules(model, 0):
            module.__dict__["check_output"] = check_output
            if module.name[1:] in grown:
                grow(module, *grown[module.name[1:]])
        # The library counts the dendrites that it adds itself.
        self._num_dendrites_before = max((len(dendrites) for dendrites, *_ in grown.values()), default=0)
        model.to(device)
        self._close()
        DendriteTracker.current = self

    # ----------------------------------------------------------------------------------------- open and closed network

    def _close(self) -> None:
        """Leave in the network what a training step needs."""
        self._layers = UPA.get_pai_modules(self.model, 0)
        close_layers(self._layers, self.args.fused)

    @contextlib.contextmanager
    def _open(self) -> Iterator[None]:
        """The network as the library made it, for calls into the library, in the run folder."""
        with shortcuts.without(self.model):
            open_layers(self._layers)
            buffer = self.model.tracker_string
            try:
                with library(self.folder):
                    yield
            finally:
                # The tracker is saved through a buffer of rank 0's model; DDP needs buffers of one size on all ranks.
                self.model.tracker_string = buffer
                self._close()

    @contextlib.contextmanager
    def forward(self, fused: bool) -> Iterator[None]:
        """For a `with` block, compute layers by our formula or by the library's own forward."""
        before, self.args.fused = self.args.fused, fused
        self._close()
        try:
            yield
        finally:
            self.args.fused = before
            self._close()

    # ----------------------------------------------------------------------------------------------------- what is now

    @property
    def num_dendrites(self) -> int:
        """Number of dendrites that each layer has now."""
        return self._num_dendrites_before + GPA.pai_tracker.member_vars["num_dendrites_added"]

    @property
    def num_parameters(self) -> int:
        """Number of distinct parameters of the network as it would be deployed, without training scaffolding."""
        old = {id(p) for m in self._layers for p in list(m.dendrites_to_top)[:-1]}  # the last one is used
        return sum(p.numel() for p in self.model.parameters() if id(p) not in old)

    @property
    def scores_since_best(self) -> int:
        """Number of scores since the last better one."""
        member = GPA.pai_tracker.member_vars
        return member["num_epochs_run"] - member["epoch_last_improved"]

    # --------------------------------------------------------------------------------------- scores in, a decision out

    def set_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Tell the library of a new optimizer, which it needs at the next restructure."""
        GPA.pai_tracker.set_optimizer_instance(optimizer)

    def idle_modules(self) -> list[str]:
        """Names of layers with dendrites that no gradient has reached yet: the library could not restructure them."""
        modules = self._layers  # in each, the first gradient sets out_channels
        return [m.name[1:] for m in modules if m.dendrite_module.dendrite_values[0].out_channels == -1]

    def size_with_one_more(self) -> int:
        """Number of parameters of the network with one dendrite more on each layer, after a training step."""
        parts = [(m.main_module, m.dendrite_module.dendrite_values[0].out_channels) for m in self._layers]
        prices = [(sum(p.numel() for p in layer.parameters()), neurons) for layer, neurons in parts]
        return price.sizes(self.num_parameters, prices, self.num_dendrites, 1)[-1]

    def add_score(
        self, score: float, extra: dict[str, float], test: dict[str, float], step: int, end_of_cycle: bool = False
    ) -> Decision:
        """Give a validation score to the library, which may restructure the network.

        Args:
            score: of the metric that decides.
            extra, test: further values by name, for the library's graphs.
            step: at which the score was measured; only a control decides by it.
            end_of_cycle: end the cycle whatever the score.
        """
        tracker = GPA.pai_tracker
        tracker.member_vars["switch_mode"] = GPA.pc.get_switch_mode()  # a network that is loaded brings its own
        if self.args.switch_mode == "fixed" and not tracker.member_vars["running_accuracy"]:
            tracker.member_vars["running_accuracy"] = score  # else the first mean of a cycle is one with 0
        if self.args.max_parameters:
            fits = self.size_with_one_more() <= self.args.max_parameters
            added = tracker.member_vars["num_dendrites_added"]
            GPA.pc.set_max_dendrites(self.args.max_dendrites if fits else min(self.args.max_dendrites, added))
        with self._open():
            for name, value in extra.items():
                tracker.add_extra_score(value, name)
            for name, value in test.items():
                tracker.add_test_score(value, name)
            _, restructured, complete = tracker.add_validation_score(score, self.model, force_switch=end_of_cycle)
        if complete:
            return Decision.COMPLETE
        return Decision.RESTRUCTURED if restructured else Decision.CONTINUE

    def restore_best(self) -> None:
        """Bring back the best network so far, where the library keeps one."""
        if (self.folder / LIBRARY / "best_model.pt").is_file():
            with self._open():
                UPA.load_system(self.model, LIBRARY, "best_model", switch_call=True)

    def draw(self) -> None:
        """Write the library's own graphs and tables into its folder."""
        member = GPA.pai_tracker.member_vars
        improved = member["epoch_last_improved"]
        if not member["accuracies"]:
            return
        with self._open():
            # Between a restructure and the next score it points past the scores, where save_graphs of 3.2.9 fails.
            member["epoch_last_improved"] = min(improved, len(member["accuracies"]) - 1)
            GPA.pai_tracker.making_graphs = True
            GPA.pai_tracker.save_graphs("_tracker")
            GPA.pai_tracker.making_graphs, member["epoch_last_improved"] = False, improved

    # ------------------------------------------------------------------------------------------ kept, loaded, deployed

    def save(self, folder: Path) -> None:
        """Write network, dendrites, tracker and the best network so far into a checkpoint."""
        folder = folder.resolve()
        with self._open():
            UPA.save_system(self.model, str(folder), "training")
        (folder / "training.pt").replace(folder / SYSTEM)
        if (best := self.folder / LIBRARY / "best_model.pt").is_file():
            shutil.copyfile(best, folder / BEST)

    def load(self, folder: Path) -> None:
        """Bring network, dendrites and tracker to where `save` found them. PerforatedError for another network."""
        if not (folder / SYSTEM).is_file():
            raise PerforatedError(f"{folder} holds no network for dendrites; of a control, give its --control_of too")
        if (folder / BEST).is_file():
            (self.folder / LIBRARY).mkdir(parents=True, exist_ok=True)
            # Several processes may do this at once, each with the same file.
            temporary = self.folder / LIBRARY / f"best_model.{time.monotonic_ns()}"
            try:
                shutil.copyfile(folder / BEST, temporary)
                temporary.replace(self.folder / LIBRARY / "best_model.pt")
            finally:
                temporary.unlink(missing_ok=True)  # where the disk is full
        try:
            weights = safetensors.torch.load_file(folder / SYSTEM)
            with self._open():
                # What UPA.load_system does, except that it forgets the best score and the evaluations since.
                for module in UPA.get_pai_modules(self.model, 0):
                    module.set_this_output_dimensions(weights[f"{module.name[1:]}.this_output_dimensions"])
                UPA.load_net_from_dict(self.model, weights)
                self.model.load_state_dict(weights)  # the library passes over tensors of another shape
                GPA.pai_tracker.reset_module_vector(self.model, False)
                GPA.pai_tracker.from_string(UPA.string_from_tensor(self.model.tracker_string))
                GPA.pai_tracker.saved_time = time.time()
                GPA.pai_tracker.loaded = True
        except (KeyError, RuntimeError) as error:
            raise PerforatedError(f"{folder} does not fit this network: {str(error)[:400]}") from error

    def deployed_model(self) -> PreTrainedModel:
        """A copy of the network without training scaffolding: layers of `layers.py`, same logits to the last bit."""
        memo, activation = {}, layers.activation_name(GPA.pc.get_pai_forward_function())
        for module in self._layers:
            layer = copy.deepcopy(module.main_module, memo)
            if module.dendrite_modules_added:
                dimensions = module.this_output_dimensions.tolist()
                dendrites, to_dendrites, to_output = dendrites_of(module)
                dim, neurons = dimensions.index(0) - len(dimensions), to_output.shape[1]
                layers.add_dendrites(layer, len(dendrites), dim, activation, neurons)
                layers.set_dendrites(layer, dendrites, to_dendrites, to_output)
            memo[id(module)] = layer
        for module in UPA.get_tracked_modules(self.model, 0):
            memo[id(module)] = copy.deepcopy(module.main_module, memo)
        model = copy.deepcopy(self.model, memo)
        for module in self._layers:
            if hasattr(module.main_module, "joined_norm") and not module.dendrite_modules_added:
                layers.separate(model, module.name[1:])  # its weights then have the names of a stock model
        del model.tracker_string
        return layers.make_dendritic(model)
