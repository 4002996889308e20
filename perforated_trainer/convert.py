"""Which modules of a network get dendrites, and its conversion. Touches no disk."""

import re
from collections import Counter

import torch
from torch.nn import Conv1d, Conv2d, Conv3d
from transformers import PreTrainedModel, TrainingArguments
from transformers.utils import logging

from . import _compat
from .arguments import DendriteArguments, PerforatedError, check_arguments
from .tracker import DendriteTracker

logger = logging.get_logger(__name__)


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
    if not isinstance(model, PreTrainedModel) or _compat.has_adapters(model):
        raise PerforatedError(
            f"{type(model).__name__}: a PreTrainedModel is needed whose save_pretrained writes all of it. To train "
            "adapters, put them in with peft.inject_adapter_in_model, in the __init__ of a model class of your own"
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
    DendriteTracker(
        model,
        dendrite_args,
        module_ids=_ids_to_perforate(model, dendrite_args, training_args.process_index == 0),
        check_output=_check_and_name_dimensions if not dendrite_args.output_dimensions else _check_output,
        metric=training_args.metric_for_best_model,
        greater_is_better=bool(training_args.greater_is_better),
        device=training_args.device,
    )
    return model


def _delete_second_body(model: PreTrainedModel) -> None:
    """Delete a registered `base_model`: a second name by which the body would be trained, counted and saved twice.

    Where `base_model` is only the read-only property of transformers, nothing is registered and nothing is done.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if sum(module is modules.get("base_model") for module in modules.values()) > 1:
        del model.base_model


def _ids_to_perforate(model: PreTrainedModel, args: DendriteArguments, speak: bool) -> list[str]:
    """Names of the modules that get dendrites. One warning lists what has weights and gets none."""
    asked, tracked = (
        {name.strip(".") for name in ids} for ids in (args.module_ids_to_perforate, args.module_ids_to_track)
    )
    if unknown := (asked | tracked) - {name for name, _ in model.named_modules()}:
        raise PerforatedError(f"the model has no module {', '.join(sorted(unknown))}; see model.named_modules()")
    # Each dendrite of a tied layer, or of one that gives logits over a vocabulary, would copy its large matrix.
    names = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    logits, ids, left = model.get_output_embeddings(), [], {}
    for name, module in model.named_modules():
        path, kind = {name, *(name[:i] for i, letter in enumerate(name) if letter == ".")}, type(module).__name__
        if kind in args.module_names_to_track and name not in asked:
            tracked.add(name)
        if path & set(ids):
            continue
        safe = all(p.requires_grad and names[id(p)] == 1 for p in module.parameters()) and module is not logits
        if not path & tracked and (name in asked or (safe and kind in args.module_names_to_perforate)):
            ids.append(name)
        elif next(module.parameters(recurse=False), None) is not None:
            left.setdefault(kind, []).append(re.sub(r"\.\d+", ".*", name) or "the model itself")
    if left and speak:
        kinds = (f"{kind} ({', '.join(dict.fromkeys(without))})" for kind, without in left.items())
        logger.warning(f"No dendrites: {'; '.join(kinds)}")
    if not ids:
        raise PerforatedError("no module can get dendrites: weights tied, frozen or with two names, or no such type")
    return ids


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
        convolutions = (m for m in module.main_module.modules() if isinstance(m, (Conv1d, Conv2d, Conv3d)))
        dimensions = [-1] * output.ndim
        dimensions[1 if any(len(m.kernel_size) + 2 == output.ndim for m in convolutions) else -1] = 0
        module.set_this_output_dimensions(dimensions)
