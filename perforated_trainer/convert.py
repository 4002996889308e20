"""Which modules of a network get dendrites, and its conversion. Touches no disk."""

import itertools
import re
from collections import Counter

import torch
from torch.nn import Conv1d, Conv2d, Conv3d
from transformers import PreTrainedModel, TrainingArguments
from transformers.utils import logging

from . import _compat, layers, patterns, price
from .arguments import LAYER_TYPES, DendriteArguments, PerforatedError, check_arguments
from .control import ControlTracker
from .tracker import DendriteTracker, refuse_other_variant

logger = logging.get_logger(__name__)

_CONVOLUTIONS = Conv1d, Conv2d, Conv3d
_NORMS = tuple(
    getattr(torch.nn, name)
    for name in "BatchNorm1d BatchNorm2d BatchNorm3d SyncBatchNorm InstanceNorm1d InstanceNorm2d InstanceNorm3d "
    "GroupNorm".split()
)


def perforate(
    model: PreTrainedModel, dendrite_args: DendriteArguments, training_args: TrainingArguments
) -> PreTrainedModel:
    """Convert `model` in place so that dendrites can be added to it, and return it.

    The library keeps one tracker per process: a second call replaces the first one's. `PerforatedTrainer` does this by
    itself for a model that is not converted.

    Args:
        model: any PreTrainedModel whose `save_pretrained` writes all of it.
        dendrite_args: which modules get dendrites, and when.
        training_args: metric, device and direction are taken from it; the mode of a plateau schedule is set in it.

    Raises PerforatedError for settings that cannot work.
    """
    refuse_other_variant()
    if not isinstance(model, PreTrainedModel) or _compat.has_adapters(model):
        raise PerforatedError(
            f"{type(model).__name__}: a PreTrainedModel is needed whose save_pretrained writes all of it. Adapters of "
            "peft: merge them before, model = model.merge_and_unload(), or give them dendrites too: put them in with "
            "peft.inject_adapter_in_model, in the __init__ of a model class of your own (docs/adapters.md)"
        )
    check_arguments(dendrite_args, training_args)
    for name in ("activation_checkpointing", "gradient_checkpointing"):  # the new name came with transformers 5.21
        if getattr(training_args, name, False) and not model.supports_gradient_checkpointing:
            raise PerforatedError(f"--{name}: {type(model).__name__} does not support it")
    if training_args.lr_scheduler_type == "reduce_lr_on_plateau":  # PyTorch takes lower as better for any metric
        mode = {"mode": "max" if training_args.greater_is_better else "min"}
        training_args.lr_scheduler_kwargs = mode | (training_args.lr_scheduler_kwargs or {})
    if training_args.n_gpu > 1:
        _compat.use_one_gpu(training_args)
        logger.warning("Several GPUs are visible, one is used. All of them: torchrun --nproc_per_node N <script>")
    _delete_second_body(model)
    if dendrite_args.control_of:
        ControlTracker(model, dendrite_args, bool(training_args.greater_is_better), training_args.device)
        return model
    grown = {name: layers.split_dendrites(layer) for name, layer in layers.layers_with_dendrites(model).items()}
    for name, layer in layers.layers_with_dendrites(model).items():
        if layer.dendrite_activation != dendrite_args.dendrite_activation:
            raise PerforatedError(
                f"{name} has dendrites with --dendrite_activation {layer.dendrite_activation}: set it"
            )
    now = sum(p.numel() for p in model.parameters())
    for name in grown:  # of a model that was trained with dendrites before, and gets more
        layers.remove_dendrites(model.get_submodule(name))
    if dendrite_args.dendrite_activation not in layers.ACTIVATIONS:
        known = ", ".join(layers.ACTIVATIONS)
        raise PerforatedError(f"--dendrite_activation {dendrite_args.dendrite_activation}: use one of {known}")
    joined = _join_normalization(model) if dendrite_args.join_normalization else []
    ids, left = _ids_to_perforate(model, dendrite_args, set(grown))
    for name in joined:
        if name not in ids:
            layers.separate(model, name)
    table = _price(model, dendrite_args, ids, left, grown, now)
    tracker = DendriteTracker(
        model,
        dendrite_args,
        module_ids=ids,
        grown=grown,
        check_output=_check_and_name_dimensions if not dendrite_args.output_dimensions else _check_output,
        metric=training_args.metric_for_best_model,
        greater_is_better=bool(training_args.greater_is_better),
        device=training_args.device,
    )
    tracker.table = table
    return model


def _delete_second_body(model: PreTrainedModel) -> None:
    """Delete a registered `base_model`: a second name by which the body would be trained, counted and saved twice.

    Where `base_model` is only the read-only property of transformers, nothing is registered and nothing is done.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if sum(module is modules.get("base_model") for module in modules.values()) > 1:
        del model.base_model


def _join_normalization(model: PreTrainedModel) -> list[str]:
    """Make one block of each convolution and the normalization that its parent registers right after it."""
    pairs = []
    for parent, module in model.named_modules():
        children = list(module.named_children())
        for (name, layer), (norm, follower) in itertools.pairwise(children):
            channels = getattr(follower, "num_features", getattr(follower, "num_channels", None))
            if isinstance(layer, _CONVOLUTIONS) and isinstance(follower, _NORMS) and channels == layer.out_channels:
                pairs.append((f"{parent}.{name}".strip("."), norm))
    for name, norm in pairs:
        layers.join(model, name, norm)
    return [name for name, _ in pairs]


def _kind(module: torch.nn.Module) -> str:
    """The type of a module; of a convolution joined with its normalization, that of the convolution."""
    return type(module[0] if hasattr(module, "joined_norm") else module).__name__


def _price(
    model: PreTrainedModel, args: DendriteArguments, ids: list[str], left: dict, grown: dict[str, tuple], now: int
) -> str:
    """The table of what dendrites cost. Raises PerforatedError where not one fits `max_parameters`."""
    modules, found = dict(model.named_modules()), {}
    for name in ids:
        number = sum(p.numel() for p in modules[name].parameters())
        found[name] = _kind(modules[name]), number, price.neurons_of(modules[name])
    before = max((len(dendrites) for dendrites, *_ in grown.values()), default=0)
    most = 3 if args.testing_dendrite_capacity else args.max_dendrites if args.doing_pai else 0
    sizes = price.sizes(now, [layer for _, *layer in found.values()], before, most)
    price.check_fits(sizes, args)
    return price.table(found, left, sizes, before, args.max_parameters)


def _asked(model: PreTrainedModel, args: DendriteArguments) -> set[str]:
    """Names of the modules in `module_ids_to_perforate`.

    A regular expression such as `.*attention.*` matches containers, dropout and norms as well: it means layers of the
    usual types, and where it matches none of these, what it matches.
    """
    kinds, asked = {name: _kind(module) for name, module in model.named_modules()}, set()
    usual = set(LAYER_TYPES) | set(args.module_names_to_perforate)
    for pattern, names in patterns.find(args.module_ids_to_perforate, list(kinds)).items():
        layers_in_it = [name for name in names if kinds[name] in usual] if patterns.is_expression(pattern) else []
        asked.update(layers_in_it or names)
    return asked


def _ids_to_perforate(
    model: PreTrainedModel, args: DendriteArguments, grown: set[str]
) -> tuple[list[str], dict[str, list[str]]]:
    """Names of the modules that get dendrites, and of those that have weights and get none, by type."""
    asked = _asked(model, args) | grown
    every = [name for name, _ in model.named_modules()]
    tracked = {name for names in patterns.find(args.module_ids_to_track, every).values() for name in names}
    last = None if args.perforate_last_blocks is None else set(patterns.last_blocks(model, args.perforate_last_blocks))
    # Each dendrite of a tied layer, or of one that gives logits over a vocabulary, would copy its large matrix.
    names = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    logits, ids, left = model.get_output_embeddings(), [], {}
    for name, module in model.named_modules():
        path, kind = {name, *(name[:i] for i, letter in enumerate(name) if letter == ".")}, _kind(module)
        if kind in args.module_names_to_track and name not in asked:
            tracked.add(name)
        if path & set(ids):
            continue
        safe = all(p.requires_grad and names[id(p)] == 1 for p in module.parameters()) and module is not logits
        by_type = safe and kind in args.module_names_to_perforate and (last is None or path & last)
        if not path & tracked and (name in asked or by_type):
            ids.append(name)
        elif next(module.parameters(recurse=False), None) is not None:
            left.setdefault(kind, []).append(re.sub(r"\.\d+", ".*", name) or "the model itself")
    if not ids:
        raise PerforatedError("no module can get dendrites: weights tied, frozen or with two names, or no such type")
    return ids, left


def _check_output(module: torch.nn.Module, output) -> None:
    """Raise PerforatedError where a layer that gets dendrites gives something else than one tensor."""
    if module.processor is None and not isinstance(output, torch.Tensor):  # else the user told how to make one of it
        name = module.name[1:]
        raise PerforatedError(
            f"{name} returns a {type(output).__name__}, and dendrites need one tensor: give them to modules in it, "
            f"with --module_ids_to_perforate, or to nothing in it, with --module_ids_to_track {name}"
        )


def _check_and_name_dimensions(module: torch.nn.Module, output) -> None:
    """Also tell the library which dimension is the neurons': the second of a convolution, the last of anything else."""
    _check_output(module, output)
    if module.processor is None:
        convolutions = (m for m in module.main_module.modules() if isinstance(m, _CONVOLUTIONS))
        dimensions = [-1] * output.ndim
        dimensions[1 if any(len(m.kernel_size) + 2 == output.ndim for m in convolutions) else -1] = 0
        module.set_this_output_dimensions(dimensions)
