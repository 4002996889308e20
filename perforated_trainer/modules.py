"""Weights of any module in a folder: those of a plain module, and those of a network whose dendrites are there."""

import json
import re
from pathlib import Path, PurePosixPath

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from .layers import layers_with_dendrites
from .loading import check_dendrites, read_shapes
from .saving import INDEX, STOCK_NAMES, WEIGHTS, DendriteConfig, dendrite_config, distinct
from .sharing import check_base, read_base

MODULE = "dendrites.json"  # of a module that is not a PreTrainedModel: its `DendriteConfig`


def save_module(model: nn.Module, folder: Path, name: str = "model") -> None:
    """Save a module that is not a `PreTrainedModel`: `<name>.safetensors`, and `dendrites.json` if it has dendrites.

    Args:
        model (`nn.Module`): Any module.
        folder (`Path`): An existing folder.
        name (`str`): Of the file of weights.
    """
    save_file(distinct(model.state_dict()), folder / f"{name}.safetensors", metadata={"format": "pt"})
    (folder / MODULE).unlink(missing_ok=True)
    if layers_with_dendrites(model):
        config = dendrite_config(model, f"{name}.safetensors").to_dict()
        (folder / MODULE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_module(model: nn.Module, folder: str | Path) -> nn.Module:
    """Load what `save_module` wrote into a new module of the same class, with the dendrites.

    Args:
        model (`nn.Module`): Without dendrites, changed in place.
        folder (`str` or `Path`): `final/` of a run, for example.

    Returns:
        `nn.Module`: The same module, in evaluation mode.

    Raises:
        ValueError: If the weights or the dendrites do not fit the module.
        OSError: If there are no weights.
    """
    folder = Path(folder)
    if (folder / MODULE).is_file():
        values = json.loads((folder / MODULE).read_text(encoding="utf-8"))
        values.pop("quant_method", None)
        shapes = read_shapes([folder / values["weights"]])
        DendriteConfig(**values).build(model, shapes)
        check_dendrites(model, shapes)
    load_weights(model, folder)
    return model.eval()


def weight_files(folder: Path) -> list[Path]:
    """The files of weights in the folder of a model, by the index if there is one.

    Raises:
        OSError: If there are none.
    """
    for name in ("network.safetensors", INDEX, WEIGHTS, *reversed(STOCK_NAMES)):
        path = folder / name
        if not path.is_file():
            continue
        if path.suffix != ".json":
            return [path]
        names = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
        if any(name != PurePosixPath(name).name for name in names):
            raise ValueError(f"{path} names files outside of its folder")
        return [folder / name for name in sorted(names)]
    raise OSError(f"there is no file of weights in {folder}")


@torch.no_grad()
def load_weights(model: nn.Module, folder: Path) -> None:
    """Load what `save_pretrained` wrote of a network into it. Its dendrites must be there already.

    Args:
        model (`nn.Module`): Changed in place.
        folder (`Path`): A checkpoint, for example.

    Raises:
        ValueError: If names or shapes differ.
    """
    files = weight_files(folder)
    shapes, own = read_shapes(files), model.state_dict()
    base = read_base(files[0])  # a checkpoint of a training with a frozen base holds what is trained
    check_base(model, own, base, "it")
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_save", None) or ()]
    loaded = {value.data_ptr() for name, value in own.items() if name in shapes and value.numel()}
    missing = [
        name
        for name, value in own.items()
        if name not in shapes
        and name not in base
        and value.numel()
        and value.data_ptr() not in loaded  # a tied weight is written once
        and not any(pattern.search(name) for pattern in ignored)
    ]
    for problem, names in (("lacks", missing), ("has an unknown", sorted(shapes.keys() - own.keys()))):
        if names:
            raise ValueError(f"it {problem} {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}")
    for name, shape in shapes.items():
        if tuple(own[name].shape) != shape:
            raise ValueError(f"{name} has the shape {shape} there, {tuple(own[name].shape)} here")
    for file in files:
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                own[name].copy_(weights.get_tensor(name))
