"""Which modules of a network get dendrites, and why others do not. Nothing on disk is touched."""

import itertools
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
from transformers import PreTrainedModel, TrainingArguments
from transformers.utils import logging

from . import _compat, layers, parameter_count, patterns, saving, sharing
from .arguments import LAYER_TYPES, DendriteArguments, PerforatedError, check_arguments
from .weight_reads import layers_read

logger = logging.get_logger(__name__)

_CONVOLUTIONS = Conv1d, Conv2d, Conv3d
_OF_CHANNELS = *_CONVOLUTIONS, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
_NORMS = tuple(
    getattr(torch.nn, name)
    for name in "BatchNorm1d BatchNorm2d BatchNorm3d SyncBatchNorm InstanceNorm1d InstanceNorm2d InstanceNorm3d "
    "GroupNorm".split()
)


@dataclass
class Plan:
    """Which layers of a model get dendrites.

    Attributes:
        names (`list[str]`): The layers.
        norms (`dict[str, str]`): For a convolution that is joined with its normalization, the name of that.
        excluded (`dict[str, list[str]]`): Names of modules with weights that get none, by reason.
        trained (`list[str]`): With `freeze_base`, the parameters of the model that are trained next to the dendrites.
    """

    names: list[str]
    norms: dict[str, str] = field(default_factory=dict)
    excluded: dict[str, list[str]] = field(default_factory=dict)
    trained: list[str] = field(default_factory=list)


def perforate(model: nn.Module, dendrite_args: DendriteArguments, training_args: TrainingArguments) -> nn.Module:
    """Prepare a model for dendrites, in place. `PerforatedTrainer` does this by itself.

    The model stays the object that it is, with the same names of modules and parameters; its class becomes a subclass
    of the same name, whose `save_pretrained` saves dendrites. A registered second `base_model` is deleted.

    Args:
        model (`nn.Module`): A `PreTrainedModel`, or a module that contains some, or any module whose forward returns
            what the Trainer accepts.
        dendrite_args (`DendriteArguments`): Which modules get dendrites, and when. `PerforatedTrainer` uses them if it
            receives none.
        training_args (`TrainingArguments`): Checked together with `dendrite_args`.

    Returns:
        `nn.Module`: The same model.

    Raises:
        PerforatedError: If something cannot work. The model is then unchanged.
    """
    second = _delete_second_body(model) if isinstance(model, nn.Module) else None
    try:
        plan = plan_dendrites(model, dendrite_args, training_args)
    except PerforatedError:
        if second is not None:
            model.base_model = second
        raise
    _freeze(model, plan, dendrite_args.freeze_base)
    for module in outermost_models(model):
        saving.make_dendritic(module)
    model.dendrite_args = dendrite_args
    return model


def _freeze(model: nn.Module, plan: Plan, freeze_base: bool) -> None:
    """Freeze what `freeze_base` freezes; without it, train again what an earlier trainer has frozen so."""
    frozen = set(vars(model).pop("frozen_by_freeze_base", ()))
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        if not freeze_base:
            parameter.requires_grad_(parameter.requires_grad or name in frozen)
            continue
        is_trained = (layers.is_of_dendrite(name) or name in plan.trained) and parameter.numel() > 0
        if parameter.requires_grad and not is_trained:
            frozen.add(name)
        parameter.requires_grad_(is_trained)
    if freeze_base:
        model.frozen_by_freeze_base = sorted(frozen)


def outermost_models(model: nn.Module) -> list[PreTrainedModel]:
    """The models of transformers in a module that are not a part of another one."""
    if isinstance(model, PreTrainedModel):
        return [model]
    return [found for child in model.children() for found in outermost_models(child)]


def plan_dendrites(model: nn.Module, dendrite_args: DendriteArguments, training_args: TrainingArguments) -> Plan:
    """Check everything that can be checked before a training, and choose the layers. Changes nothing.

    Raises:
        PerforatedError: For arguments that cannot work with this model.
    """
    args = dendrite_args
    if not isinstance(model, nn.Module):
        raise PerforatedError(f"dendrites are for a torch.nn.Module, not a {type(model).__name__}")
    if any(map(_compat.has_adapters, [model, *outermost_models(model)])):
        raise PerforatedError(
            f"{type(model).__name__}: save_pretrained would write the adapters of peft alone. Merge them before, model "
            "= model.merge_and_unload(), or give them dendrites too: insert them with peft.inject_adapter_in_model in "
            "the __init__ of a model class of your own (docs/fine_tuning.md)"
        )
    check_arguments(args, training_args)
    for name in ("activation_checkpointing", "gradient_checkpointing"):  # the new name came with transformers 5.21
        if getattr(training_args, name, False) and not getattr(model, "supports_gradient_checkpointing", True):
            raise PerforatedError(f"--{name}: {type(model).__name__} does not support it")
    if training_args.neftune_noise_alpha is not None:
        try:
            model.get_input_embeddings()
        except (AttributeError, NotImplementedError):
            raise PerforatedError(f"--neftune_noise_alpha: {type(model).__name__} has no input embeddings") from None
    if args.activation not in layers.ACTIVATIONS:
        known = ", ".join(layers.ACTIVATIONS)
        raise PerforatedError(f"--dendrite_activation {args.activation}: use one of {known}")
    if args.join_normalization and args.dendrite_rank:
        raise PerforatedError("--join_normalization does not go with --dendrite_rank: leave one of them out")
    if args.modules_to_train and not args.freeze_base:
        raise PerforatedError("--modules_to_train: without --freeze_base all modules are trained; leave one out")
    _check_quantization_mark(model)
    _check_state(model)
    for name, layer in layers.layers_with_dendrites(model).items():
        if layer.dendrite_activation != args.activation:
            raise PerforatedError(
                f"{name} has dendrites with another activation: set --dendrite_activation {layer.dendrite_activation}"
            )
        if (rank := getattr(layer, "dendrite_rank", None)) != args.dendrite_rank:
            needed = f"rank {rank}: set --dendrite_rank {rank}" if rank else "full rank: leave out --dendrite_rank"
            raise PerforatedError(f"{name} has dendrites of {needed}")
    _check_quantized(model, args)
    plan = _choose(model, args)
    for name in plan.names:
        layer = model.get_submodule(name)
        own = {"dendrite_to_output", "dendrite_down" if args.dendrite_rank else "dendrite_weight"}
        if layers.has_dendrites(layer) and not hasattr(layer, "dendrites") and not own <= layer._parameters.keys():
            raise PerforatedError(
                f"the dendrites of {name} are pruned or normalized and cannot be trained on: make that permanent "
                "before, as with torch.nn.utils.prune.remove"
            )
    initial = args.doing_pai and args.num_initial_dendrites and plan.names
    if initial and not args.dendrite_rank:
        _check_outputs_known(model, plan)
    if args.freeze_base:
        begins = initial or layers.layers_with_dendrites(model)
        if not plan.trained and (args.control_of or not begins):
            when = "without dendrites" if args.control_of else "before the first dendrite"
            instead = "" if args.control_of else "--num_initial_dendrites 1 or "
            raise PerforatedError(f"--freeze_base: nothing would be trained {when}: set {instead}--modules_to_train")
        if not plan.names and args.doing_pai and not args.control_of and args.max_dendrites:
            raise PerforatedError("--modules_to_train: no layer is left for dendrites, all are trained in full")
    sizes = planned_sizes(model, args, plan)
    parameter_count.check_fits(sizes, args, args.num_initial_dendrites - num_dendrites_of(model))
    return plan


def _check_outputs_known(model: nn.Module, plan: Plan) -> None:
    """Refuse initial dendrites for a block: its neurons are known from its first output alone."""
    for name in plan.names:
        module = model.get_submodule(name)
        is_layer = layers.kind_of_low_rank(module) or isinstance(module, (*_OF_CHANNELS, nn.Embedding))
        if not (is_layer or name in plan.norms or layers.has_dendrites(module)):
            raise PerforatedError(
                f"--num_initial_dendrites: the neurons of {name}, a {kind_of(module)}, are not known before its first "
                "output: start without dendrites, or leave it out"
            )


def _check_state(model: nn.Module) -> None:
    """Refuse modules whose state a run could not tell from dendrites, or not bring back with the best weights."""
    grown = layers.layers_with_dendrites(model)
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise PerforatedError(
                f"{name} has a state that is no tensor (get_extra_state), which would not come back with the best "
                "weights: keep it in a buffer"
            )
    for name, _ in model.named_parameters(remove_duplicate=False):
        path = name.split(".")
        start = next((i for i, part in enumerate(path) if layers.is_of_dendrite(part)), None)
        if start is not None and ".".join(path[:start]) not in grown:
            raise PerforatedError(f'{name}: names that begin with "dendrite" are those of dendrites, use another one')


def _check_quantization_mark(model: nn.Module) -> None:
    """Refuse a config that says that the model is quantized if its weights are not."""
    for part in outermost_models(model):
        mark = getattr(part.config, "quantization_config", None)
        if (
            mark is not None
            and getattr(part, "hf_quantizer", None) is None
            and not getattr(part, "is_quantized", False)
        ):
            method = mark.get("quant_method") if isinstance(mark, dict) else getattr(mark, "quant_method", None)
            if method == saving.METHOD:  # of a config that was loaded from a folder with dendrites; it is not saved
                continue
            raise PerforatedError(
                f"the config of {type(part).__name__} has a quantization_config ({method}), but its weights are not "
                "quantized, and what is saved would not load: del model.config.quantization_config"
            )


def _check_quantized(model: nn.Module, args: DendriteArguments) -> None:
    """Refuse a quantized model that would not be frozen, or could not be saved."""
    if method := sharing.quantization(model):
        if not args.freeze_base or not args.dendrite_rank:
            raise PerforatedError(
                f"the weights of {type(model).__name__} are quantized ({method}) and cannot be trained: set "
                "--freeze_base and --dendrite_rank"
            )
        if not all(map(sharing.base_of, outermost_models(model))):
            raise PerforatedError(
                f"{type(model).__name__} is quantized and has no name by which it can be loaded again, so its "
                "dendrites could not be saved: load it with from_pretrained"
            )


def _delete_second_body(model: nn.Module) -> nn.Module | None:
    """Delete and return a registered `base_model`: a second name by which the body would be counted and saved twice.

    Only in a model of transformers, in which the property of that name hides it: no code can reach it there.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    second = modules.get("base_model") if isinstance(model, PreTrainedModel) else None
    if second is None or sum(module is second for module in modules.values()) < 2:
        return None
    del model.base_model
    return second


def _normalizations(model: nn.Module) -> dict[str, str]:
    """For each convolution that a normalization of its channels follows in its parent: the name of that."""
    pairs = {}
    for parent, module in model.named_modules():
        for (name, layer), (norm, follower) in itertools.pairwise(module.named_children()):
            channels = getattr(follower, "num_features", getattr(follower, "num_channels", None))
            if isinstance(layer, _CONVOLUTIONS) and isinstance(follower, _NORMS) and channels == layer.out_channels:
                pairs[f"{parent}.{name}".strip(".")] = norm
    return pairs


def kind_of(module: nn.Module) -> str:
    """The name of a module's class without its dendrites; of a convolution joined with its normalization, of that."""
    return layers.base_class(module[0] if hasattr(module, "joined_norm") else module).__name__


def _asked(model: nn.Module, args: DendriteArguments) -> set[str]:
    """Names of the modules in `module_ids_to_perforate`.

    A regular expression such as `.*attention.*` matches containers, dropout and norms as well: it means layers of the
    usual types, or what it matches if none of these is of a usual type.
    """
    kinds, asked = {name: kind_of(module) for name, module in model.named_modules()}, set()
    usual = set(LAYER_TYPES) | set(args.module_names_to_perforate)
    for pattern, names in patterns.find(args.module_ids_to_perforate, list(kinds)).items():
        layers_in_it = [name for name in names if kinds[name] in usual] if patterns.is_expression(pattern) else []
        asked.update(layers_in_it or names)
    return asked


def _choose(model: nn.Module, args: DendriteArguments) -> Plan:
    """Choose the layers that get dendrites, with the reason for each module with weights that gets none."""
    grown = layers.layers_with_dendrites(model)
    asked, norms = _asked(model, args), _normalizations(model) if args.join_normalization else {}
    every = [name for name, _ in model.named_modules()]
    tracked = {name for names in patterns.find(args.module_ids_to_track, every).values() for name in names}
    last = None if args.perforate_last_blocks is None else set(patterns.last_blocks(model, args.perforate_last_blocks))
    # Each dendrite of a tied layer, or of an output embedding, would copy its large matrix.
    names = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    twice = {
        module
        for module, count in Counter(m for _, m in model.named_modules(remove_duplicate=False)).items()
        if count > 1
    }
    outputs = {part.get_output_embeddings() for part in outermost_models(model)} - {None}
    reads, plan, joined, saved = layers_read(model), Plan([]), set(), None
    if hasattr(model, "save_pretrained") and not isinstance(model, PreTrainedModel):  # a model of another library
        parts = outermost_models(model)
        saved = {name for name, module in model.named_modules() if module in parts}
    if args.freeze_base:
        plan.trained = _trained_next_to_dendrites(model, args)
    trained = {id(model.get_parameter(name)) for name in plan.trained}
    for name, module in model.named_modules():
        path, kind = {name, *(name[:i] for i, letter in enumerate(name) if letter == ".")}, kind_of(module)
        if path & set(plan.names) or name in joined or _is_part_of_dendrites(path, grown):
            continue
        own = list(module.parameters())
        if kind in args.module_names_to_track and name not in asked:
            tracked.add(name)
        kinds = {kind, args.dendrite_rank and layers.kind_of_low_rank(module)}
        other = name not in asked and not kinds & set(args.module_names_to_perforate)
        frozen = not args.freeze_base and any(not p.requires_grad for p in own)
        reason = None
        if path & tracked:
            reason = "excluded"
        elif name in grown:
            if not args.freeze_base and not any(p.requires_grad for p in own):
                reason = "frozen"
        elif name in reads and not (other and layers.kind_of_low_rank(module) is None):
            reason = f"weights are read by {reads[name]}"
        elif saved is not None and not path & saved:
            reason = f"{type(model).__name__} could not load them"
        elif other:
            reason = "other type of layer"
        elif layers.forward_is_replaced(module):
            reason = "its forward was replaced"
        elif name not in asked:
            if last is not None and not path & last:
                reason = f"not in the last {args.perforate_last_blocks} blocks"
            elif module in outputs:
                reason = "output embedding"
            elif any(names[id(p)] > 1 for p in own) or module in twice:
                reason = "weights are tied"
            elif frozen:
                reason = "frozen"
            elif own and all(id(p) in trained for p in own):
                reason = "trained in full"
        if reason is None and args.dendrite_rank and name not in grown:
            reason = _no_low_rank(module, args.dendrite_rank)
            if reason and name in asked:
                raise PerforatedError(f"--dendrite_rank {args.dendrite_rank}: {name} {reason}")
        if reason is None and not own:
            raise PerforatedError(f"--module_names_to_perforate: {name}, a {kind}, has no weights")
        if reason is None:
            plan.names.append(name)
            if name in norms and name not in grown:
                plan.norms[name] = norms[name]
                parent = name.rpartition(".")[0]
                joined.add(f"{parent}.{norms[name]}".strip("."))
        elif next(module.parameters(recurse=False), None) is not None:
            plan.excluded.setdefault(reason, []).append(name or "the model itself")
    if not plan.names and not (args.freeze_base and args.modules_to_train):
        if args.dendrite_rank and any("rank" in reason for reason in plan.excluded):
            raise PerforatedError(
                f"--dendrite_rank {args.dendrite_rank} is not below the smaller side of any layer that could get "
                "dendrites"
            )
        types = sorted({kind_of(m) for m in model.modules() if next(m.parameters(recurse=False), None) is not None})
        raise PerforatedError(
            "no module can get dendrites: weights tied, frozen or with two names, or no such type; the types with "
            f"weights are {', '.join(types[:20])} (--module_names_to_perforate)"
        )
    return plan


def _is_part_of_dendrites(path: set[str], grown: dict) -> bool:
    """Whether a module is a dendrite, or in a layer that has some."""
    return any(name in grown for name in path if name not in (max(path, key=len),))


def _no_low_rank(module: nn.Module, rank: int) -> str | None:
    try:
        smallest = layers.rank_limit(module)
    except ValueError:
        return "cannot have dendrites of low rank"
    return None if rank < smallest else f"has a smaller side of {smallest}, not above the rank"


def _trained_next_to_dendrites(model: nn.Module, args: DendriteArguments) -> list[str]:
    """With `freeze_base`, the names of the model's own parameters that are trained."""
    every, chosen = [name for name, _ in model.named_modules(remove_duplicate=False)], set()
    for pattern, names in patterns.find(args.modules_to_train, every).items():
        found = {
            id(p)
            for name, p in model.named_parameters(remove_duplicate=False)  # a tied weight has several names
            if not sharing.is_quantized(p) and any(name.startswith(f"{module}.") for module in names)
        }
        if not found:
            raise PerforatedError(f"--modules_to_train {pattern}: no weights that can be trained are in {names[0]}")
        chosen |= found
    parameters = dict(model.named_parameters())
    if "dendrites_base" in vars(model):  # loaded with its dendrites: what was trained there
        new = set(model.dendrites_base["trained"])
    elif all(_compat.is_new(p) or sharing.is_quantized(p) for p in parameters.values()):
        new = set()  # not from `from_pretrained`: nothing says what is new
    else:
        new = {name for name, parameter in parameters.items() if _compat.is_new(parameter)}
    trained = [
        name
        for name, parameter in parameters.items()
        if not layers.is_of_dendrite(name) and (name in new or id(parameter) in chosen)
    ]
    return trained


# ------------------------------------------------------------------------------------------------- number of parameters


def planned_sizes(model: nn.Module, args: DendriteArguments, plan: Plan) -> list[int]:
    """Number of parameters of the network now and with each further dendrite."""
    before = num_dendrites_of(model)
    most = 3 if args.testing_dendrite_capacity else max(args.max_dendrites - before, 0) if args.doing_pai else 0
    now = sum(p.numel() for p in model.parameters())
    found = [(*dendrite_size(model, name, plan, args), before) for name in plan.names]
    return parameter_count.sizes(now, [size[:2] for size in found], before, most)


def num_dendrites_of(model: nn.Module) -> int:
    """The largest number of dendrites that a layer of the model has."""
    return max((layer.num_dendrites for layer in layers.layers_with_dendrites(model).values()), default=0)


def dendrite_size(model: nn.Module, name: str, plan: Plan, args: DendriteArguments) -> tuple[int, int]:
    """Parameters of a dendrite of a layer, without its weights to other neurons; and the number of neurons."""
    module = model.get_submodule(name)
    neurons = parameter_count.neurons_of(module)
    if args.dendrite_rank:
        return parameter_count.of_low_rank(module, args.dendrite_rank, neurons), neurons
    if layers.can_fuse(module) and name not in plan.norms:
        return parameter_count.of_full_rank(module, neurons), neurons
    own = sum(p.numel() for n, p in module.named_parameters() if not layers.is_of_dendrite(n))
    if norm := plan.norms.get(name):
        parent = model.get_submodule(name.rpartition(".")[0])
        own += sum(p.numel() for p in getattr(parent, norm).parameters())
    return own, neurons


def table(model: nn.Module, args: DendriteArguments, plan: Plan) -> str:
    """The table of what gets dendrites, what does not and why, and the number of parameters with each dendrite."""
    found = {}
    for name in plan.names:
        module = model.get_submodule(name)
        found[name] = kind_of(module), *dendrite_size(model, name, plan, args)
    every = [name for name, module in model.named_modules()]
    sizes, before = planned_sizes(model, args, plan), num_dendrites_of(model)
    lines = [parameter_count.table(found, plan.excluded, every, sizes, before, args.max_parameters)]
    if args.freeze_base:
        modules = list(dict.fromkeys(name.rpartition(".")[0] or name for name in plan.trained))
        shown = list(dict.fromkeys(parameter_count.collapse(modules, every).values()))
        number = sum(model.get_parameter(name).numel() for name in plan.trained)
        more = f"{', '.join(shown[:8])} ({number:,} parameters)" if shown else "nothing else"
        lines.append(f"The base is frozen. Trained in addition to the dendrites: {more}")
    return "\n".join(lines)


def dimension_of_neurons(module: nn.Module, ndim: int | None = None) -> int:
    """Dimension of the neurons in the output, from the end: after the batch for a convolution or a normalization of
    channels, the last for all else.

    Args:
        module (`nn.Module`): A layer or a block.
        ndim (`int`, *optional*): Number of dimensions of its output, if known.
    """
    if isinstance(module, _NORMS) and ndim:
        return 1 - ndim
    for part in module.modules():
        if isinstance(part, _OF_CHANNELS) and ndim in (None, len(part.kernel_size) + 2):
            return -1 - len(part.kernel_size)
    return -1
