"""Every place where another library is bent, each with its version, its reason and when it can go.

`tests/test_compat.py` fails when one of the names used here changes.
"""

import contextlib
import sys
from collections.abc import Iterator
from importlib.util import find_spec

import safetensors.torch
import torch
from accelerate import Accelerator
from transformers import TrainingArguments

from .sharing import is_quantized


def ignore_shared_tensors() -> None:
    """Let safetensors write tensors that are whole aliases of one another, such as tied weights.

    Whole aliases have the same storage, offset, shape and strides: a copy of each on disk is harmless. Tensors that
    overlap in part still raise. `PerforatedTrainer` does this by itself for what perforatedai writes; call it for files
    that you write with safetensors yourself.

    Library: safetensors 0.8, `safetensors.torch._find_shared_tensors`. Why: it has no public switch, and perforatedai
    3.2.9 writes tied weights with `save_file`. Can go when perforatedai writes each tied weight once.
    """
    safetensors.torch._find_shared_tensors = _find_partly_shared_tensors


_find_shared_tensors = safetensors.torch._find_shared_tensors


def _find_partly_shared_tensors(state_dict):
    def view(tensor):
        return tensor.data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype

    groups = _find_shared_tensors(state_dict)
    return [names for names in groups if len({view(state_dict[name]) for name in names}) > 1]


@contextlib.contextmanager
def shared_tensors_ignored() -> Iterator[None]:
    """As `ignore_shared_tensors`, for the time of a `with` block."""
    before = safetensors.torch._find_shared_tensors
    ignore_shared_tensors()
    try:
        yield
    finally:
        safetensors.torch._find_shared_tensors = before


def _patch_search_for_lomo() -> None:
    """Spare each optimizer step a search of the disk (190 us of a step of 2.4 ms, `benchmarks/README.md`).

    Library: accelerate 1.15, `AcceleratedOptimizer.step` asks whether `lomo_optim` can be imported, each time. Can go
    when accelerate remembers the answer.
    """
    if "lomo_optim" not in sys.modules and find_spec("lomo_optim") is None:
        sys.modules["lomo_optim"] = None


def use_one_gpu(args: TrainingArguments) -> None:
    """Make the Trainer use one of several visible GPUs.

    Library: transformers 5.5 to 5.23, `TrainingArguments._n_gpu`. Why: without a launcher the Trainer wraps the model
    in `nn.DataParallel`, which perforatedai refuses; no public way asks for one GPU. Can go when there is one.
    """
    args._n_gpu = 1


def has_adapters(model: torch.nn.Module) -> bool:
    """Whether a model is a wrapper of peft, or `model.add_adapter` or `load_adapter` has put adapters in.

    Library: transformers 5.5 to 5.23, `PreTrainedModel._hf_peft_config_loaded`. Why: the public `active_adapters` needs
    peft and raises where there are none. Can go when there is a public way to ask.
    """
    is_wrapper = any(cls.__module__.partition(".")[0] == "peft" for cls in type(model).__mro__)
    return is_wrapper or getattr(model, "_hf_peft_config_loaded", False)


def is_new(parameter: torch.nn.Parameter) -> bool:
    """Whether `from_pretrained` found no value for a parameter, as for a new head.

    Library: transformers 5.5 to 5.24, `Parameter._is_hf_initialized`, which it sets on what it loads. Can go when a
    model says which of its parameters are new.
    """
    return not getattr(parameter, "_is_hf_initialized", False) and not is_quantized(parameter)


@contextlib.contextmanager
def quantized_base_accepted(model: torch.nn.Module | None) -> Iterator[None]:
    """For a `with` block in which a Trainer is made, a quantized model is one like any other.

    Library: transformers 5.5 to 5.24, `validate_quantization_for_training`. Why: it accepts adapters of peft on a
    quantized model and nothing else. Can go when it asks whether the parameters that are trained are quantized.
    """
    marked = vars(model).pop("is_quantized", None) if model is not None else None
    try:
        yield
    finally:
        if marked is not None:
            model.is_quantized = marked


def forget_preparation(model: torch.nn.Module) -> None:
    """Make accelerate wrap a model that it has seen before, for this precision and for several processes.

    Library: accelerate 1.15, `Accelerator.prepare_model` marks a model with `_is_accelerate_prepared`, also where it
    was only evaluated, and then leaves it as it is. With fp16 and bf16 it also sets a `forward` that autocasts, with
    which a second trainer of other precision would train. Can go when each `Trainer.train()` wraps its model.
    """
    model._is_accelerate_prepared = False
    if (forward := vars(model).pop("_original_forward", None)) is not None:
        vars(model).pop("forward", None)
        if forward != model.forward:  # it was set on the model, as `device_map` does, not by its class
            model.forward = forward


def forget_optimizer(accelerator: Accelerator) -> None:
    """Release the optimizers and schedulers that accelerate has prepared, and the models, which it prepares again.

    Library: accelerate 1.15, `Accelerator._optimizers`, `_schedulers` and `_models`. Why: old ones would be kept in
    memory and stepped with, and the public `free_memory` releases data loaders, too. Can go when one can be released.
    """
    for prepared in (accelerator._optimizers, accelerator._schedulers, accelerator._models):
        prepared.clear()


def forget_model(accelerator: Accelerator, model: torch.nn.Module) -> None:
    """Let go of a model that accelerate has prepared.

    Library: accelerate 1.15, `Accelerator._models`. Why: it would be kept in memory and written into checkpoints, and
    the public `free_memory` lets go of all models. Can go when one model can be let go of.
    """
    accelerator._models[:] = [kept for kept in accelerator._models if kept is not model]


_patch_search_for_lomo()
