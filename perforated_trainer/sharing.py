"""The frozen base of a model with dendrites: which part was trained next to it, its name, and how it is recognized.

A file of dendrites alone has the fingerprint of each tensor of its base in its metadata. A copy of this file is saved
next to models as custom code, so it imports nothing of the package.
"""

from __future__ import annotations

import json
import os
import weakref
import zlib
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

BASE = "base"  # the entry of the metadata
_known = weakref.WeakKeyDictionary()  # fingerprints by model and name: between checkpoints a frozen tensor is read once


def base_of(model: nn.Module) -> dict | None:
    """Name of the model that `from_pretrained` loaded, a folder or one on the Hub with its revision; None if unknown.

    A model that was loaded with its dendrites has the name of their base.
    """
    if "dendrites_base" in vars(model):
        known = {name: value for name, value in model.dendrites_base.items() if name != "trained"}
        return known | {"dtype": str(model.dtype).removeprefix("torch.")}
    config = getattr(model, "config", None)
    if not (name := getattr(config, "_name_or_path", None)):
        return None
    revision = None if os.path.isdir(name) else getattr(config, "_commit_hash", None)
    method = quantization(model)
    own = {"name": name, "revision": revision, "quantized": method, "dtype": str(model.dtype).removeprefix("torch.")}
    return {name: value for name, value in own.items() if value}


def note_not_of_base(model: nn.Module) -> None:
    """Note in a model, before a training, which parameters its base does not hold as they will be saved: those that
    are trained, and resized embeddings, which have random new rows."""
    resized = {id(parameter) for parameter in _resized_embeddings(model)}
    found = {name for name, p in model.named_parameters() if p.requires_grad or id(p) in resized}
    model.not_of_base = sorted({*vars(model).get("not_of_base", ()), *found})


def _resized_embeddings(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of input and output embeddings, if the vocabulary has another size than that of the base."""
    is_model = hasattr(model, "get_input_embeddings")
    if not is_model or all(p.requires_grad for p in model.parameters()) or not (base := base_of(model)):
        return []
    revision = base.get("revision") or "main"
    try:
        of_base = type(model.config).from_pretrained(base["name"], revision=revision, local_files_only=True)
    except (OSError, ValueError):  # of a name that is no place, nothing is known
        return []
    before, now = (getattr(config.get_text_config(), "vocab_size", None) for config in (of_base, model.config))
    if before == now:
        return []
    found = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]
    return [parameter for layer in found for parameter in layer.parameters()]


def is_quantized(tensor: torch.Tensor) -> bool:
    """Whether a tensor stands for values that it does not hold as they are."""
    return hasattr(tensor, "__tensor_flatten__") or not (tensor.is_floating_point() or tensor.is_complex())


def quantization(model: nn.Module) -> str | None:
    """The method by which weights of a model are quantized, or their type; None if they are not."""
    weight = next((p for p in model.parameters() if is_quantized(p)), None)
    if weight is None:
        return None
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    return str(getattr(method, "value", method) or type(weight).__name__)


def trained_part(model: nn.Module, frozen: bool = False) -> dict[str, torch.Tensor]:
    """What a training changes: the parameters that are trained, and the buffers that are saved, such as running means.

    In a quantized model, buffers that hold many integers are weights.

    Args:
        model (`nn.Module`): The model.
        frozen (`bool`): Whether frozen parameters belong to it: they may be trained later.
    """
    saved = model.state_dict()
    # Also if it is frozen now: what was trained before the model was loaded, or since, and what its base does not hold.
    known = {*vars(model).get("dendrites_base", {}).get("trained", ()), *vars(model).get("not_of_base", ())}
    # Empty ones, of a single dendrite, have no gradient.
    trained = {
        name: p for name, p in model.named_parameters() if frozen or p.requires_grad or not p.numel() or name in known
    }
    weights = _has_quantized_layers(model)
    buffers = {n: b for n, b in model.named_buffers() if n in saved and not (weights and is_quantized(b) and b.ndim)}
    return trained | buffers


def _has_quantized_layers(model: nn.Module) -> bool:
    return quantization(model) is not None or bool(getattr(model, "is_quantized", False))


def frozen_part(model: nn.Module) -> dict[str, torch.Tensor]:
    """All that is saved of a model but its trained part."""
    trained = trained_part(model)
    own = {tensor.data_ptr() for tensor in trained.values() if tensor.numel()}  # a tied weight has a second name
    saved = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
    return {name: tensor for name, tensor in saved.items() if name not in trained and _pointer(tensor) not in own}


def _pointer(tensor: torch.Tensor) -> int | None:
    return None if hasattr(tensor, "__tensor_flatten__") else tensor.data_ptr()


def _stored(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that hold the values of a tensor: itself, or the parts of a quantized one."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in _stored(getattr(tensor, name))]


def fingerprint(tensor: torch.Tensor) -> str:
    """Type, shape and a checksum of a tensor's values."""
    checksum = 0
    for part in _stored(tensor.detach()):
        values = part.to("cpu").contiguous().reshape(-1).view(torch.uint8)
        checksum = zlib.crc32(values.numpy(), checksum)
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} {checksum:08x}"


def fingerprints(model: nn.Module, tensors: dict[str, torch.Tensor], fresh: bool = True) -> dict[str, str]:
    """The fingerprint of each of a model's tensors, by name; those that are known unless `fresh`, which changes through
    `.data` need."""
    if fresh:
        _known.pop(model, None)
    known, result = _known.setdefault(model, {}), {}
    for name, tensor in tensors.items():
        version = [(part.data_ptr(), part._version, part.dtype) for part in _stored(tensor)]  # changes with its values
        if name not in known or known[name][0] != version:
            known[name] = version, fingerprint(tensor)
        result[name] = known[name][1]
    return result


def check_base(model: nn.Module, tensors: dict[str, torch.Tensor], expected: dict[str, str], what: str) -> None:
    """Raise ValueError, with names, unless a model has the base that dendrites were trained on.

    Args:
        model (`nn.Module`): The model.
        tensors (`dict`): Its tensors, by the names of `expected`.
        expected (`dict`): Fingerprint of each tensor of the base.
        what (`str`): What is loaded, for the message.
    """
    missing = sorted(expected.keys() - tensors.keys())
    own = fingerprints(model, {name: tensors[name] for name in expected if name in tensors})
    wrong = [f"{name} is missing" for name in missing]
    for name, found in own.items():
        (*kind, _), (*needed, _) = found.split(" "), expected[name].split(" ")
        if kind != needed:
            wrong.append(f"{name} is {' '.join(kind)}, {' '.join(needed)} is needed")
        elif found != expected[name]:
            wrong.append(f"{name} has other values")
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"{what} was trained on another base: {', '.join(wrong[:3])}{more}")


def read_base(file: str | Path) -> dict[str, str]:
    """The fingerprints in a file of dendrites alone; empty for a file of a whole model."""
    with safe_open(file, framework="pt") as weights:
        return json.loads((weights.metadata() or {}).get(BASE, "{}"))
