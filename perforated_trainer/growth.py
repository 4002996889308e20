"""The dendrites of one training: the network grows, shrinks and keeps its best weights. A training owns its state.

The network is changed in place. Between two evaluations it is the network that is saved, and nothing here is in it.
"""

import contextlib
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from . import blocks, convert, layers, modules, parameter_count, report, sharing
from .arguments import DendriteArguments, PerforatedError
from .checkpoint import read_json, write_whole
from .pai import PAITracker
from .policy import CAPACITY_TEST_DENDRITES, Decision, Policy
from .weight_reads import watch_reads

STATE = "dendrite_state.json"  # in a checkpoint: everything but weights
BEST = "best_model.safetensors"  # in a checkpoint: the weights of the best model so far, unless the network has them


class Growth:
    """The dendrites of a network during a training.

    Args:
        model (`nn.Module`): The network.
        args (`DendriteArguments`): The arguments of dendrites.
        plan (`convert.Plan`): Which layers get dendrites.
        metric (`str`): Name of the monitored metric.
        greater_is_better (`bool`): Whether a higher score is better.
        began (`dict[str, int]`, *optional*): Number of dendrites that each layer had before those of this run; those
            of now by default.

    Attributes:
        policy (`Policy`): Decides.
        library (`PAITracker`, *optional*): Makes each dendrite; None for a baseline.
        notes (`list[str]`): Messages since they were last read.
        evaluations (`list[dict]`): For each score that the policy has received step, dendrites, parameters and the
            metrics of that evaluation.
        initial_weights (`str`): A checksum of what is trained, without dendrites, as it was before the training.
        unused (`set[str]`): Layers that no training step has used so far.
    """

    def __init__(
        self,
        model: nn.Module,
        args: DendriteArguments,
        plan: convert.Plan,
        metric: str,
        greater_is_better: bool,
        began: dict[str, int] | None = None,
    ):
        self.model, self.args, self.plan = model, args, plan
        self._metric, self._greater_is_better = metric, greater_is_better
        self._dimensions: dict[str, list[int]] = {}
        self.began = self._numbers() if began is None else began  # this run has not added them and does not remove them
        self.library, self.unused = self._library(), set()
        for _ in range(args.num_initial_dendrites - self.num_dendrites if args.doing_pai else 0):
            self._add_to(plan.names)
        self.policy = self._new_policy()
        self.notes: list[str] = []
        self.evaluations: list[dict] = []
        self.initial_weights = ""
        self._best: dict[str, torch.Tensor] = {}  # on the CPU
        self._best_numbers: dict[str, int] = {}
        self._best_step: int | None = None
        self._best_is_here = False  # whether the network has the best weights now
        self._base_size = 0  # trained parameters that are no dendrites, of the best weights
        # Layers that no training step has used so far. One that is frozen has no gradient that tells, its dendrites do.
        self.unused = {name for name in plan.names if self._parameters(name)}

    def _new_policy(self) -> Policy:
        args = self.args
        at_start = max(args.num_initial_dendrites if args.doing_pai else 0, *self.began.values(), 0)
        return Policy(
            greater_is_better=self._greater_is_better,
            n_epochs_to_switch=args.n_epochs_to_switch,
            max_dendrites=max(args.max_dendrites - at_start, 0),
            max_dendrite_tries=args.max_dendrite_tries,
            history_lookback=args.history_lookback,
            improvement_threshold=args.improvement_threshold,
            improvement_threshold_raw=args.improvement_threshold_raw,
            fixed=args.switch_mode == "fixed",
            doing_pai=args.doing_pai,
            capacity_test=args.testing_dendrite_capacity,
        )

    def _library(self) -> PAITracker | None:
        return PAITracker(self.args, self._metric, self._greater_is_better)

    def note_initial_weights(self) -> None:
        """Set `initial_weights`, before the training."""
        weights = self._weights()
        found = sorted(sharing.fingerprint(weights[name]) for name in self._base_of(weights))  # a joined one is renamed
        self.initial_weights = f"{zlib.crc32(''.join(found).encode()):08x}"

    def frozen_weights(self) -> str | None:
        """A checksum of what `freeze_base` has frozen, without dendrites; None without it."""
        if not self.args.freeze_base:
            return None
        frozen = {n: value for n, value in sharing.frozen_part(self.model).items() if not layers.is_of_dendrite(n)}
        found = sorted(sharing.fingerprints(self.model, frozen, fresh=False).values())
        return f"{zlib.crc32(''.join(found).encode()):08x}"

    # ------------------------------------------------------------------------------------------------ what is now

    @property
    def num_dendrites(self) -> int:
        """Number of dendrites that a layer has now, the largest."""
        return convert.num_dendrites_of(self.model)

    @property
    def num_parameters(self) -> int:
        """Number of distinct parameters of the network."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def _parameters(self, name: str) -> list[nn.Parameter]:
        return [p for p in self.model.get_submodule(name).parameters() if p.requires_grad]

    def watch_gradients(self) -> None:
        """Note which layers the last backward pass reached. Cheap: only layers that none has reached are looked at."""
        for name in list(self.unused):
            if any(parameter.grad is not None for parameter in self._parameters(name)):
                self.unused.discard(name)

    @contextlib.contextmanager
    def watch_reads(self) -> Iterator[None]:
        """Around a first step or a first evaluation: leave out layers whose weights are read and that nothing calls.

        Raises:
            PerforatedError: If such a layer has dendrites already.
        """
        with watch_reads(self.model, self.plan.names) as reads:
            yield
        for name in [name for name, called in reads.items() if not called]:
            if self._number(name):
                raise PerforatedError(
                    f"{name} has dendrites, and the model reads its weights instead of calling it, so that they are "
                    f"left out: --module_ids_to_track {name}"
                )
            self.plan.names.remove(name)
            self.unused.discard(name)
            self.notes.append(f"note: the model reads the weights of {name} instead of calling it: no dendrites there")

    def watch_outputs(self) -> list:
        """Hooks that look at the first output of each layer whose class does not say what its neurons are.

        Returns:
            `list`: The handles of the hooks.
        """
        handles = []
        for name in self.plan.names:
            module = self.model.get_submodule(name)
            if self._is_block(name) and not layers.has_dendrites(module) and name not in self._dimensions:
                handles.append(module.register_forward_hook(self._look_at_output(name)))
        return handles

    def _is_block(self, name: str) -> bool:
        """Whether the dendrites of a layer are whole copies of it."""
        return not self.args.dendrite_rank and (
            name in self.plan.norms or not layers.can_fuse(self.model.get_submodule(name))
        )

    def _look_at_output(self, name: str):
        def hook(module, inputs, output):
            if not isinstance(output, torch.Tensor):
                raise PerforatedError(
                    f"{name} returns a {type(output).__name__}, and dendrites need one tensor: give them to modules in "
                    f"it, with --module_ids_to_perforate, or to nothing in it, with --module_ids_to_track {name}"
                )
            if given := self.args.output_dimensions:
                dim = given.index(0) - len(given)
            else:
                dim = convert.dimension_of_neurons(module, output.ndim)
            self._dimensions[name] = [dim, output.shape[dim]]

        return hook

    # ----------------------------------------------------------------------------------------- scores and decisions

    def size_with_one_more(self) -> int:
        """Number of parameters of the network with one more dendrite on each layer."""
        sizes = [convert.dendrite_size(self.model, name, self.plan, self.args) for name in self.plan.names]
        return parameter_count.sizes(self.num_parameters, sizes, self.num_dendrites, 1)[-1]

    @property
    def fits(self) -> bool:
        """Whether one more dendrite on each layer is within `max_parameters`."""
        limit = self.args.max_parameters
        return not limit or self.size_with_one_more() <= limit

    def add_score(
        self,
        score: float,
        step: int,
        end_of_cycle: bool = False,
        extra: dict[str, float] | None = None,
        test: dict[str, float] | None = None,
        learning_rate: float = 0.0,
    ) -> Decision:
        """Add the score of an evaluation, decide, and change the network.

        Args:
            score (`float`): Value of the monitored metric.
            step (`int`): The training step of the evaluation.
            end_of_cycle (`bool`): Whether a cycle of `switch_mode="fixed"` ends here.
            extra, test (`dict`, *optional*): Further values by name, for the graphs of perforatedai.
            learning_rate (`float`): For the same graphs.

        Returns:
            `Decision`: Optimizer and scheduler must be made again unless it is `CONTINUE`.
        """
        outcome = self.policy.add_score(score, end_of_cycle, may_add=self.fits)
        if outcome.is_best:
            self._keep(step)
        decision = outcome.decision
        if decision is Decision.COMPLETE and not self.args.testing_dendrite_capacity:
            self.restore_best()
        if self.library and (math.isfinite(score) or decision is not Decision.CONTINUE):
            known = score if math.isfinite(score) else self.policy.best_score
            if known is not None:
                arguments = known, decision, extra, test, learning_rate, self.num_parameters
                if self.library.add_score(*arguments) != (decision is Decision.COMPLETE):
                    raise RuntimeError(f"perforatedai and the policy disagree about {decision}")
        if decision in (Decision.ADD, Decision.RETRY):
            self._grow()
        return decision

    def _grow(self) -> None:
        """Add a dendrite to the best network so far."""
        if not self.args.testing_dendrite_capacity:
            self.restore_best()
        unknown = {name for name in self.plan.names if self._lacks_dimensions(name)}
        names = [name for name in self.plan.names if name not in self.unused | unknown]
        if left := [name for name in self.plan.names if name not in names]:
            self.notes.append(f"note: no training step has used {report.first_of(left, 5)}: no dendrites there")
        if not names:
            raise PerforatedError(
                f"no training step has used {', '.join(self.plan.names[:5])}: give dendrites to other layers, "
                "--module_ids_to_perforate, --module_names_to_perforate"
            )
        self._add_to(names)

    def _lacks_dimensions(self, name: str) -> bool:
        has = layers.has_dendrites(self.model.get_submodule(name))
        return self._is_block(name) and name not in self._dimensions and not has

    def _add_to(self, names: list[str]) -> None:
        training = self.model.training
        frozen = {name for name in names if not self._parameters(name)}
        for name in names:
            layer = self._resize(name, self._number(name) + 1)
            layers.set_dendrite(layer, layer.num_dendrites - 1, **self.library.new_dendrite(layer))
            layer.train(training)
        blocks.compute_in_full(self.model)
        self._best_is_here = False
        self.unused |= frozen

    def _number(self, name: str) -> int:
        return getattr(self.model.get_submodule(name), "num_dendrites", 0)

    def _resize(self, name: str, number: int) -> nn.Module:
        """Give a layer a number of dendrites: the first ones keep their values, new ones are zero."""
        layer = self.model.get_submodule(name)
        if layers.has_dendrites(layer):
            joined = hasattr(layer, "joined_norm")
            layers.resize_dendrites(layer, number)
            if not number and joined:
                blocks.separate(self.model, name)
        elif number:
            dim, neurons = self._dimensions.get(name, (None, None))
            if self._is_block(name) and dim is None:  # initial dendrites, before a first output
                dim, neurons = convert.dimension_of_neurons(layer), parameter_count.neurons_of(layer)
            if norm := self.plan.norms.get(name):
                layer = blocks.join(self.model, name, norm)
            activation, rank = self.args.activation, self.args.dendrite_rank
            layers.add_dendrites(layer, number, dim, activation, neurons, rank)
        return layer

    # ---------------------------------------------------------------------------------------------- the best weights

    def _weights(self) -> dict[str, torch.Tensor]:
        """What a training can change. Without `freeze_base`, a callback may freeze layers and train them later."""
        return sharing.trained_part(self.model, frozen=not self.args.freeze_base)

    def _keep(self, step: int) -> None:
        weights, base = self._weights(), dict(self.model.named_parameters())
        size = sum(weights[name].numel() for name in self._base_of(weights) & base.keys())
        if size > self._base_size != 0:
            raise PerforatedError("a layer that --freeze_base has frozen is trained now: name it in --modules_to_train")
        self._base_size = size
        self._best = {name: value.detach().to("cpu", copy=True) for name, value in weights.items()}
        self._best_numbers = self._numbers()
        self._best_step, self._best_is_here = step, True

    @staticmethod
    def _base_of(weights: dict) -> set[str]:
        return {name for name in weights if not layers.is_of_dendrite(name)}

    def _numbers(self) -> dict[str, int]:
        return {name: layer.num_dendrites for name, layer in layers.layers_with_dendrites(self.model).items()}

    def _set_numbers(self, numbers: dict[str, int]) -> None:
        for name in dict.fromkeys([*self._numbers(), *numbers]):
            if self._number(name) != numbers.get(name, 0):
                self._resize(name, numbers.get(name, 0))
        blocks.compute_in_full(self.model)

    @torch.no_grad()
    def restore_best(self) -> None:
        """Bring back the best network so far, if an evaluation had a score; without dendrites that no step has used."""
        if self._best_step is not None and not self._best_is_here:
            self._set_numbers(self._best_numbers)
            weights = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
            if gone := self._best.keys() - weights.keys():
                raise PerforatedError(
                    f"{min(gone)} is gone: pruning and normalization of weights must be set up before the training"
                )
            for name, value in self._best.items():
                weights[name].copy_(value)
            self._best_is_here = True
        self._drop_unused()

    def _drop_unused(self) -> None:
        """Remove dendrites that this run added to layers that no training step has used, such as an unread pooler."""
        dropped = [
            name
            for name in self.plan.names
            if name in self.unused and self._number(name) > self.began.get(name, 0) and name not in self.plan.norms
        ]
        for name in dropped:
            number = self.began.get(name, 0)
            self._resize(name, number)
            self._best_numbers.pop(name, None)
            self._best_numbers |= {name: number} if number and self._best_step is not None else {}
            self._best = {key: value for key, value in self._best.items() if not key.startswith(f"{name}.dendrite")}
        if dropped:
            if self._best:
                weights = self._weights()
                self._best |= {name: weights[name].detach().cpu() for name in weights.keys() - self._best.keys()}
            self.notes.append(
                f"note: no training step has used {report.first_of(dropped, 5)}: the new dendrites are removed"
            )

    def changed(self) -> None:
        """A training step has changed the network."""
        self._best_is_here = False

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict:
        """Everything but weights, as JSON has it."""
        return {
            "policy": self.policy.state_dict(),
            "evaluations": self.evaluations,
            "initial_weights": self.initial_weights,
            "scores": self.library.state_dict() if self.library else [],
            "activation": self.args.activation,
            "began": self.began,
            "dendrites": self._numbers(),
            "best_dendrites": self._best_numbers,
            "best_step": self._best_step,
            "best_is_here": self._best_is_here,
            "unused": sorted(self.unused),
            "dimensions": self._dimensions,
        }

    def save(self, folder: Path) -> None:
        """Write the state and the best weights into a checkpoint; the network itself is there already."""
        if self._best and not self._best_is_here:
            tensors = {name: value.contiguous() for name, value in self._best.items()}
            safetensors.torch.save_file(tensors, folder / BEST, metadata={"format": "pt"})
        write_whole(folder / STATE, json.dumps(self.state_dict()) + "\n")

    def load(self, folder: Path) -> None:
        """Bring network and state to where `save` found them.

        Raises:
            PerforatedError: If the checkpoint does not fit this network.
        """
        state = read_json(folder / STATE, limit=2**28)
        try:
            self._check_state(state)
            self._dimensions = {name: list(map(int, value)) for name, value in state["dimensions"].items()}
            self.began = {str(name): int(number) for name, number in state["began"].items()}
            self._set_numbers(state["dendrites"])
            modules.load_weights(self.model, folder)
            self._load_best(folder, state)
            self.policy = self._new_policy()
            self.policy.load_state_dict(state["policy"])
            self.evaluations, self.initial_weights = state["evaluations"], str(state["initial_weights"])
            if self.library:
                self.library.load_state_dict(state["scores"])
        except (KeyError, TypeError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
            if isinstance(error, PerforatedError):
                raise
            raise PerforatedError(f"{folder} does not fit this network: {str(error)[:400]}") from error
        self.unused = set(state["unused"]) & set(self.plan.names)
        self.notes.clear()

    def _check_state(self, state: dict) -> None:
        """Raise ValueError for a state that this network cannot have."""
        most = max(self.args.max_dendrites, CAPACITY_TEST_DENDRITES, self.num_dendrites, *self._numbers().values(), 0)
        if (then := state["activation"]) != self.args.activation and (state["dendrites"] or state["best_dendrites"]):
            raise ValueError(f"its dendrites have another activation: set --dendrite_activation {then}")
        for entry in ("dendrites", "best_dendrites"):
            for name, number in state[entry].items():
                if name not in self.plan.names and number != self._number(name):
                    raise ValueError(f"{name!r} has dendrites there, and gets none here")
                if type(number) is not int or not 0 < number <= most:
                    raise ValueError(f"{name!r} has {number!r} dendrites there, --max_dendrites is {most}")
        for name, value in state["dimensions"].items():
            if name not in self.plan.names or len(value) != 2:
                raise ValueError(f"the dimensions of {name!r} cannot be read")
        if not (state["best_step"] is None or type(state["best_step"]) is int) or not isinstance(state["unused"], list):
            raise ValueError(f"{STATE} cannot be read")
        for row in state["evaluations"]:
            if not all(type(row[name]) is int for name in ("step", "dendrites", "parameters")):
                raise ValueError(f"the evaluations in {STATE} cannot be read")

    def _load_best(self, folder: Path, state: dict) -> None:
        self._best_step, self._best_numbers = state["best_step"], dict(state["best_dendrites"])
        self._best_is_here = bool(state["best_is_here"])
        if self._best_step is None:
            self._best = {}
        elif self._best_is_here:
            self._keep(self._best_step)
        else:
            self._best = safetensors.torch.load_file(folder / BEST)
            now = self._numbers()
            self._set_numbers(self._best_numbers)  # to compare names and shapes
            expected = {name: value.shape for name, value in self._weights().items()}
            if {name: value.shape for name, value in self._best.items()} != expected:
                raise ValueError(f"{BEST} holds other weights than this network has")
            self._set_numbers(now)
            modules.load_weights(self.model, folder)
