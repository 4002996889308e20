"""perforatedai: makes each dendrite, receives each score, draws its graphs and reports that training is complete.

The only module that imports it. perforatedai keeps one tracker and one set of settings per process, which its compiled
code looks up in `globals_perforatedai` at each call; here each run has its own, installed for the time of a call. The
tracker watches a stand-in of one neuron: it receives the decisions of `policy.py`, and never the network.

Written for perforatedai 3.2.9. `tests/test_compat.py` fails when a name that is used here changes.
"""

import contextlib
import copy
import io
import math
import pdb
import re
import sys
import tempfile
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import PartialState
from torch import nn
from transformers.utils import logging

from . import layers
from ._compat import shared_tensors_ignored
from .arguments import DendriteArguments, PerforatedError
from .policy import Decision

# The paid package would change the training where it can be imported, and asks for an e-mail address.
PERFORATEDBP = "perforatedbp" not in sys.modules and find_spec("perforatedbp") is not None
sys.modules.setdefault("perforatedbp", None)

with contextlib.redirect_stdout(io.StringIO()):  # the package prints which variant it is when it is imported
    from perforatedai import globals_perforatedai as GPA
    from perforatedai import modules_perforatedai as MPA
    from perforatedai import utils_perforatedai as UPA

logger = logging.get_logger(__name__)

SAVE_NAME = "perforatedai"  # of perforatedai, so the name of its folder and the first part of its files' names
_ONE_AT_A_TIME = threading.RLock()  # perforatedai's settings, and the current folder, are those of the process
_NEVER = 10**9  # tries and dendrites: the limits of perforatedai are not used


def refuse_other_variant() -> None:
    """Raise PerforatedError if the paid package is installed."""
    if PERFORATEDBP:
        raise PerforatedError(
            "the package perforatedbp is installed: it would change the training and is not supported here; use an "
            "environment without it"
        )


def _stop(*args, **kwargs):
    raise SystemExit


@contextlib.contextmanager
def library(folder: Path) -> Iterator[None]:
    """Around calls into perforatedai, which writes below the current folder. If it prints an error and opens a debugger
    or exits, that becomes a PerforatedError."""
    output, set_trace = io.StringIO(), pdb.set_trace
    pdb.set_trace = _stop
    try:
        with (
            contextlib.chdir(folder),
            contextlib.redirect_stdout(output),
            shared_tensors_ignored(),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    except SystemExit:
        raise PerforatedError(
            f"perforatedai stopped: {output.getvalue()[-2000:].strip() or 'no reason given'}"
        ) from None
    finally:
        pdb.set_trace = set_trace
        logger.debug(output.getvalue())


class _Neuron(nn.Module):
    """What the tracker of perforatedai watches in place of the network."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)


def passes_zero(activation: str) -> bool:
    """Whether an activation is 0 at 0 and has a slope there: then a dendrite whose second factor is zero trains."""
    x = torch.zeros(1)
    with torch.enable_grad():
        value = layers.ACTIVATIONS[activation](x.requires_grad_())
        return value.item() == 0 and torch.autograd.grad(value, x)[0].item() > 0.1


def initial_scales(args: DendriteArguments) -> tuple[float, float]:
    """The standard deviation of the weights that perforatedai makes for a dendrite, and its weight in the output.

    A new dendrite leaves the output as it is, so one of the two is zero. With zeros in the second factor, a dendrite of
    low rank learns as fast as LoRA at the same learning rates; with zeros in the output it needs ten times higher ones
    (benchmarks/pretrained.py, docs/results/pretrained.md).
    """
    given = args.dendrite_init_scale
    if args.dendrite_rank and passes_zero(args.activation):
        return 0.0, 1.0 if given is None else given
    default = 0.1 if args.dendrite_rank else 0.01
    return default if given is None else given, 0.0


class PAITracker:
    """The tracker of perforatedai of one run, with its settings.

    Args:
        args (`DendriteArguments`): The settings of the dendrites.
        metric (`str`): Name of the monitored metric.
        greater_is_better (`bool`): Whether a higher score is better.

    Raises:
        PerforatedError: If perforatedai stops.
    """

    def __init__(self, args: DendriteArguments, metric: str, greater_is_better: bool):
        self._args, self._metric, self._greater = args, metric, greater_is_better
        self._start()

    def _start(self) -> None:
        self._records, self._last = [], time.monotonic()
        self._temporary = tempfile.TemporaryDirectory(prefix="perforatedai-")
        self._folder, self._settings, self._tracker = Path(self._temporary.name), type(GPA.pc)(), []
        pc, args = self._settings, self._args
        for name in "configuration_confirmed unwrapped_modules_confirmed weight_decay_accepted silent".split():
            getattr(pc, f"set_{name}")(True)  # never ask on standard input
        for name in (
            "verbose find_best_lr test_saves pai_saves retain_all_dendrites use_cuda testing_dendrite_capacity".split()
        ):
            getattr(pc, f"set_{name}")(False)
        threshold = args.improvement_threshold
        scale, self._to_output = initial_scales(args)
        settings = {
            "device": torch.device("cpu"),
            "n_epochs_to_switch": args.n_epochs_to_switch,
            "history_lookback": args.history_lookback,
            "improvement_threshold": threshold[0] if len(threshold) == 1 else list(threshold),
            "improvement_threshold_raw": args.improvement_threshold_raw,
            "library_validation_score": _plain(self._metric),
            "output_dimensions": [-1, 0, -1, -1],
            "module_ids_to_perforate": [".layer"],
            "module_names_to_perforate": [],
            "module_names_to_not_save": [],
            "initial_history_after_switches": -1,
            "pai_forward_function": layers.ACTIVATIONS[args.activation],
            "candidate_weight_initialization_multiplier": scale,
            "switch_mode": pc.DOING_NO_SWITCH,  # it adds a dendrite only with `force_switch`
            "max_dendrite_tries": _NEVER,
            "max_dendrites": _NEVER,
        }
        for name, value in settings.items():
            getattr(pc, f"set_{name}")(value)
        with self._installed(), torch.random.fork_rng(devices=[]):
            self._neuron = _Neuron()
            UPA.perforate_model(
                self._neuron,
                doing_pai=True,
                save_name=SAVE_NAME,
                making_graphs=False,  # drawn by `draw`, when it is worth the time
                maximizing_score=self._greater,
            )
            self._tracker = GPA.pai_tracker
            for module in UPA.get_pai_modules(self._neuron, 0):  # what it otherwise learns from a first gradient
                module.dendrite_module.dendrite_values[0].setup_arrays([1, 1, 1, 1])

    @contextlib.contextmanager
    def _installed(self) -> Iterator[None]:
        """This run's tracker and settings are those of perforatedai for a `with` block."""
        with _ONE_AT_A_TIME:
            before = GPA.pc, GPA.pai_tracker
            GPA.pc, GPA.pai_tracker = self._settings, self._tracker
            try:
                with library(self._folder):
                    yield
            finally:
                GPA.pc, GPA.pai_tracker = before

    # ----------------------------------------------------------------------------------------------------- dendrites

    def new_dendrite(self, layer: nn.Module) -> dict:
        """Initial values of a new dendrite of a layer, drawn from torch's random numbers.

        Args:
            layer (`nn.Module`): A layer with dendrites or without; with `dendrite_rank` in the arguments, of the rank.

        Returns:
            `dict`: What `layers.set_dendrite` takes as `weights` and `to_output`.
        """
        if rank := getattr(layer, "dendrite_rank", None):
            down = torch.empty(rank, *layer.dendrite_down.shape[1:])
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))  # as the A of LoRA in peft
            up = self._made_by_library(nn.Linear(rank, layer.dendrite_up.shape[2], bias=False))["weight"]
            weights = {"down": down, "up": up.t(), "bias": torch.zeros(up.shape[0])}
            return {"weights": weights, "to_output": torch.full((up.shape[0],), self._to_output)}
        return {"weights": self._made_by_library(stand_in(layer))}

    def _made_by_library(self, stand_in: nn.Module) -> dict[str, torch.Tensor]:
        with self._installed():
            module = MPA.PAINeuronModule(stand_in, ".layer")
            module.set_this_output_dimensions([-1, 0, -1, -1])
            module.dendrite_module.dendrite_values[0].setup_arrays([1, 1, 1, 1])
            UPA.simulate_cycles(module, 2, doing_pai=True)
            return module.dendrite_module.layers[0].state_dict()

    # ------------------------------------------------------------------------------------------- scores and decisions

    def add_score(
        self,
        score: float,
        decision: Decision,
        extra: dict[str, float] | None = None,
        test: dict[str, float] | None = None,
        learning_rate: float = 0.0,
        parameters: int = 0,
    ) -> bool:
        """Pass an evaluation and the decision about it to perforatedai.

        Args:
            score (`float`): Value of the monitored metric; finite.
            decision (`Decision`): What the policy decided.
            extra, test (`dict`, *optional*): Further values by name, for the graphs of perforatedai.
            learning_rate (`float`): At this evaluation, for the graphs.
            parameters (`int`): Of the network now, for the tables of perforatedai.

        Returns:
            `bool`: Whether perforatedai says that training is complete.
        """
        now = time.monotonic()
        record = [score, decision.name, extra or {}, test or {}, learning_rate, parameters, now - self._last]
        self._last = now
        self._records.append(record)
        return self._tell(record)

    def _tell(self, record: list) -> bool:
        score, decision, extra, test, learning_rate, parameters, seconds = record
        if not PartialState().is_main_process:  # its other processes read files that only the first one writes
            return decision == Decision.COMPLETE.name
        tracker, member, pc, decision = self._tracker, self._tracker.member_vars, self._settings, Decision[decision]
        with self._installed(), torch.random.fork_rng(devices=[]):
            parameter = nn.Parameter(torch.zeros(1))
            tracker.set_optimizer_instance(torch.optim.SGD([parameter], lr=learning_rate))
            tracker.saved_time = time.time() - seconds
            for name, value in extra.items():
                tracker.add_extra_score(value, _plain(name))
            for name, value in test.items():
                tracker.add_test_score(value, _plain(name))
            # What it would decide itself is overruled. 0 is "no score yet", so that any score is better; nothing is
            # better than infinity. A better score makes it write all that it knows to a file, which takes the longer
            # the more it knows; it reads that file at a dendrite addition, and only then needs it.
            member["switch_mode"] = pc.DOING_NO_SWITCH
            never = math.inf if self._greater else -math.inf
            member["current_best_validation_score"] = never if decision is Decision.CONTINUE else 0
            member["global_best_validation_score"] = 0
            complete = decision is Decision.COMPLETE
            pc.set_max_dendrites(member["num_dendrites_added"] if complete else _NEVER)
            known = len(member["param_counts"])
            _, _, complete = tracker.add_validation_score(
                score, self._neuron, force_switch=decision is not Decision.CONTINUE
            )
            counts = member["param_counts"]
            counts[known:] = [parameters] * (len(counts) - known)  # of the network, not of what perforatedai watches
            for path in (self._folder / SAVE_NAME).glob("switch_*.pt"):
                path.unlink()
        return bool(complete)

    # -------------------------------------------------------------------------------------------------------- graphs

    def draw(self) -> list[Path]:
        """Draw the graphs and tables of perforatedai. Returns their files; this object keeps their folder."""
        member = self._tracker.member_vars
        if not member["accuracies"]:
            return []
        improved = member["epoch_last_improved"]
        with self._installed():
            # Between a dendrite addition and the next score it points past the scores, where save_graphs of 3.2.9
            # fails.
            member["epoch_last_improved"] = min(improved, len(member["accuracies"]) - 1)
            self._tracker.making_graphs = True
            self._tracker.save_graphs("_tracker")
            self._tracker.making_graphs, member["epoch_last_improved"] = False, improved
        files = (self._folder / SAVE_NAME).iterdir()
        return sorted(path for path in files if path.suffix in (".png", ".csv"))

    # --------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> list:
        """The evaluations that perforatedai received, as JSON types."""
        return self._records

    def load_state_dict(self, records: list) -> None:
        """Pass what `state_dict` returned to a new tracker of perforatedai. ValueError if it is something else."""
        self._start()
        for record in records:
            if not _is_record(record):
                raise ValueError("a score that the tracker of perforatedai was told cannot be read")
            self._records.append(record)
            self._tell(record)
        self._last = time.monotonic()


def _plain(name: str) -> str:
    """A name of a metric as perforatedai can store it: commas end a value in its files."""
    return re.sub(r"[^A-Za-z0-9 _.-]", "_", name) or "score"


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_record(record) -> bool:
    if not isinstance(record, list) or len(record) != 7:
        return False
    score, decision, extra, test, *numbers = record
    named = all(isinstance(part, dict) and all(map(_is_number, part.values())) for part in (extra, test))
    return named and all(map(_is_number, [score, *numbers])) and decision in Decision.__members__


def stand_in(layer: nn.Module) -> nn.Module:
    """A module of a layer's class and shapes on the CPU, for perforatedai to copy: no hooks, dendrites or values."""
    if not layers.can_fuse(layer):
        plain = layers.plain_copy(layer)
        return (layers.remove_dendrites(plain) if layers.has_dendrites(plain) else plain).to("cpu")
    base = layers.base_class(layer)
    module = base.__new__(base)
    hidden = "weight", "bias"  # a hook that computes a weight keeps it as an attribute
    module.__dict__.update({name: value for name, value in vars(layer).items() if name not in hidden})
    for name, value in vars(layer).items():
        if isinstance(value, OrderedDict) and "hooks" in name:
            module.__dict__[name] = OrderedDict()
    module.__dict__.update(_modules={}, _buffers={}, _parameters={})
    for name in hidden:
        value = getattr(layer, name)
        empty = None if value is None else nn.Parameter(torch.empty(value.shape, dtype=value.dtype))
        module._parameters[name] = empty
    return copy.copy(module)
