"""Saving of models with dendrites, with transformers' own `save_pretrained`.

Importing this file lets any model of transformers be saved with the dendrites that it has. A copy of it is saved
next to models as custom code.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from pathlib import Path, PurePosixPath, PureWindowsPath

import transformers
from safetensors.torch import save_file
from torch import nn
from transformers.utils.quantization_config import QuantizationConfigMixin

from .blocks import compute_in_full, join
from .layers import (
    _Reduced,
    add_dendrites,
    can_fuse,
    dendrite_class,
    has_dendrites,
    is_of_dendrite,
    layers_with_dendrites,
)
from .sharing import BASE, base_of, fingerprints, frozen_part, quantization, trained_part

METHOD = VARIANT = "dendrites"
FORMAT = 2  # of the saved model; raise it when a model saved now could not be loaded by older code
# Names that transformers does not look for by itself: without this file it must fail, not load a part of the weights.
WEIGHTS, INDEX = "model.dendrites.safetensors", "model.dendrites.safetensors.index.json"
STOCK_NAMES = "model.safetensors", "model.safetensors.index.json"
_VARIANT_INDEX = "model.safetensors.index.dendrites.json"  # what save_pretrained(variant="dendrites") calls the index
CODE = "dendrite_loading"  # name of the copy of loading.py in the folder of a model
# What is copied, and its name there.
CODE_FILES = {
    f"{name}.py": f"dendrite_{name}.py" for name in ("formula", "layers", "blocks", "sharing", "saving", "loading")
}


class DendriteConfig(QuantizationConfigMixin):
    """What config.json says about the dendrites, under "quantization_config".

    Args:
        layers (`dict`): Name of a module: its number of dendrites, or `{"dendrites": , "rank": }` for dendrites of low
            rank, or `{"dendrites": , "dim": , "neurons": }` for a module that is not `can_fuse`; with "norm" if the
            module was joined with the normalization of that name.
        activation (`str`): A name in `ACTIVATIONS`.
        weights (`str`): The file of the weights, or their index.
        format (`int`): Version of this layout.
        base (`dict`, *optional*): If the folder holds dendrites alone, the "name" of the base, its "revision" and
            "dtype", and the method by which it was "quantized".

    Raises:
        ValueError: If one is not understood.
    """

    dequantize = True  # transformers then takes the marks of quantization off the loaded model: Trainer trains it

    def __init__(self, layers=None, activation="sigmoid", weights=WEIGHTS, format=FORMAT, base=None, **unknown):
        if not isinstance(format, int) or format > FORMAT:
            raise ValueError(
                f"The dendrites were saved in format {format!r} by a newer version; this one knows up to {FORMAT}. "
                "Upgrade perforated_trainer"
            )
        plain = isinstance(weights, str) and weights == PurePosixPath(weights).name == PureWindowsPath(weights).name
        if not plain or not weights.endswith((".safetensors", ".safetensors.index.json")):
            raise ValueError(f"`weights` must name a safetensors file in the folder of the model, not {weights!r}")
        if not isinstance(layers, dict) or not (layers or base):
            raise ValueError(f"`layers` must name the modules with dendrites, got {layers!r}")
        if base is not None:
            if not isinstance(base, dict) or not all(isinstance(v, str) for v in (base.get("name"), *base.values())):
                raise ValueError(f"`base` must name the model that the dendrites are for, not {base!r}")
            self.base = base
        self.quant_method, self.format = METHOD, format
        self.layers, self.activation, self.weights = layers, activation, weights

    def arguments(self, name: str) -> dict:
        """Arguments of `add_dendrites` for a module."""
        value = self.layers[name]
        value = value if isinstance(value, dict) else {"dendrites": value}
        return {
            "num_dendrites": value.get("dendrites"),
            "dim": value.get("dim"),
            "neurons": value.get("neurons"),
            "rank": value.get("rank"),
            "activation": self.activation,
        }

    def build(self, model: nn.Module, shapes: dict | None = None, partial: bool = False) -> None:
        """Give a model the dendrites, with all values zero.

        Args:
            model (`nn.Module`): Changed in place.
            shapes (`dict`, *optional*): Shape of each tensor in the files of weights. A number of dendrites that does
                not fit them is refused before anything is allocated.
            partial (`bool`): Leave out layers that the model does not have, as their weights are: another head, or the
                body alone.

        Raises:
            ValueError: If a layer is missing, or its dendrites do not fit.
        """
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        for name in self.layers:
            modules = dict(model.named_modules())  # a block before may have brought copies of its layers
            # As transformers does with weights: the body of a model is found in the model and by itself.
            names = [n for n in (name, name.removeprefix(prefix), prefix + name) if n in modules]
            if not names:
                if partial:
                    continue
                raise ValueError(f"config.json gives dendrites to {name!r}, which {type(model).__name__} does not have")
            try:
                value, module, arguments = self.layers[name], modules[names[0]], self.arguments(name)
                if shapes is not None:
                    self._check_number(name, arguments["num_dendrites"], shapes, prefix)
                if isinstance(value, dict) and "norm" in value:
                    module = join(model, names[0], value["norm"])
                add_dendrites(module, **arguments)
            except ValueError as error:
                raise ValueError(f"config.json, dendrites of {name!r}: {error}") from None
        compute_in_full(model)

    @staticmethod
    def _check_number(name, number, shapes, prefix):
        for own in (name, name.removeprefix(prefix), prefix + name):
            shape = shapes.get(f"{own}.dendrite_to_output".lstrip("."))
            if shape and (len(shape) != 2 or shape[0] != number):
                raise ValueError(f"{number!r} dendrites, but the weights are of {shape[0]}")
            if shape:
                return
        raise ValueError("the weights of its dendrites are missing")


def distinct(tensors):
    """The tensors as safetensors writes them: a second name of one gets a copy."""
    seen, result = set(), {}
    for key, value in tensors.items():
        alias = value.numel() and value.data_ptr() in seen
        seen.add(value.data_ptr())
        result[key] = value.detach().clone() if alias else value.detach().contiguous()
    return result


def dendrite_config(model: nn.Module, weights: str = WEIGHTS, base: dict | None = None) -> DendriteConfig:
    """The `DendriteConfig` of a model with dendrites. ValueError if its dendrites have several activations."""
    layers, activations = {}, set()
    for name, module in layers_with_dendrites(model).items():
        count, neurons = module.dendrite_to_output.shape
        if rank := getattr(module, "dendrite_rank", None):
            layers[name] = {"dendrites": count, "rank": rank}
        elif can_fuse(module):
            layers[name] = count
        else:
            layers[name] = {"dendrites": count, "dim": module.dendrite_dim, "neurons": neurons}
            if (norm := getattr(module, "joined_norm", None)) is not None:
                layers[name]["norm"] = norm
        activations.add(module.dendrite_activation)
    if len(activations) > 1:
        raise ValueError(
            f"All dendrites of a model need one activation to be saved, not {', '.join(sorted(activations))}"
        )
    return DendriteConfig(layers, *(activations or {"sigmoid"}), weights, base=base)


class _Model(_Reduced):
    """A model whose `save_pretrained` writes what `loading` reads."""

    def train(self, mode=True):
        """As in the model's class; quick if all modules are in that mode, which the Trainer asks for at each step."""
        return self if all(module.training is mode for module in self.modules()) else super().train(mode)

    def resize_token_embeddings(self, new_num_tokens=None, *args, **kwargs):
        """As in transformers, which makes new embeddings. ValueError if these have dendrites."""
        for layer in (self.get_input_embeddings(), self.get_output_embeddings()):
            if new_num_tokens and has_dendrites(layer) and new_num_tokens != layer.dendrite_to_output.shape[1]:
                raise ValueError("the output layer has dendrites, which have its size: resize before these are added")
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)

    def save_pretrained(self, save_directory, *args, push_to_hub=False, variant=None, dendrites_only=False, **kwargs):
        """As in transformers. A model with dendrites is saved under one name only, so `variant` is not read.

        With `dendrites_only=True`, or a quantized base, what was trained is saved, and the name of the frozen base."""
        if not layers_with_dendrites(self) and not dendrites_only:
            return super().save_pretrained(save_directory, *args, push_to_hub=push_to_hub, variant=variant, **kwargs)
        names = "repo_id", "commit_message", "create_pr", "private", "revision", "token"
        hub = {name: kwargs.pop(name) for name in names if name in kwargs}
        folder, writes = Path(save_directory), kwargs.get("is_main_process", args[0] if args else True)
        dendrites_only = dendrites_only or quantization(self) is not None  # its base cannot be saved with dendrites
        if dendrites_only and push_to_hub:
            raise ValueError("dendrites_only: save_pretrained does not upload them; upload the folder that it writes")
        if dendrites_only:
            return save_dendrites(self, folder) if writes else None
        with _config_with(self, dendrite_config(self)):
            # The names in the file are those of the modules, so that they can be checked before they are loaded.
            kwargs |= {"variant": VARIANT, "save_original_format": False}
            super().save_pretrained(save_directory, *args, **kwargs)
            if writes and folder.is_dir():
                stale = {INDEX, *STOCK_NAMES}  # of another model, or of this one before it got dendrites
                if (folder / _VARIANT_INDEX).exists():
                    os.replace(folder / _VARIANT_INDEX, folder / INDEX)
                    self.config.quantization_config = dendrite_config(self, INDEX)
                    self.config.save_pretrained(save_directory)
                    stale = {WEIGHTS, *STOCK_NAMES}
                for name in stale:
                    (folder / name).unlink(missing_ok=True)
                if f"{CODE}." in str(getattr(self.config, "auto_map", "")):  # its own code goes with it
                    write_code(folder)
        if push_to_hub:  # only now are all files as they should be
            shards = {"max_shard_size": kwargs["max_shard_size"]} if "max_shard_size" in kwargs else {}
            self.push_to_hub(hub.pop("repo_id", folder.name), **shards, **hub)


@contextlib.contextmanager
def _config_with(model: nn.Module, mark: DendriteConfig | None):
    """For a `with` block, the config of a model has this `quantization_config`, or none."""
    values = vars(model.config)  # several models may share it
    before = values.pop("quantization_config", None)
    if mark is not None:
        values["quantization_config"] = mark
    try:
        yield
    finally:
        values.pop("quantization_config", None)
        if before is not None:
            values["quantization_config"] = before


def _patch_save_pretrained():
    """Let any model of transformers be saved with the dendrites that it has.

    Library: transformers 5.5 to 5.24, `PreTrainedModel.save_pretrained`. Why: the body of a model with dendrites may be
    saved by itself; and `from_config` makes a model without dendrites from the config of a folder with dendrites, which
    must not be saved with it. Can go when models are built by what a config says of their layers.
    """
    stock = transformers.PreTrainedModel.save_pretrained
    if getattr(stock, "knows_dendrites", False):
        return

    @functools.wraps(stock)
    def save_pretrained(self, *args, **kwargs):
        has_dendrites = bool(layers_with_dendrites(self))
        if not has_dendrites and kwargs.pop("dendrites_only", False):
            raise ValueError(f"dendrites_only: this {type(self).__name__} has no dendrites")
        if has_dendrites and not hasattr(type(self), "dendrite_base"):
            return make_dendritic(self).save_pretrained(*args, **kwargs)
        mark = getattr(self.config, "quantization_config", None)
        method = mark.get("quant_method") if isinstance(mark, dict) else getattr(mark, "quant_method", None)
        is_stale = method == METHOD and not has_dendrites
        with _config_with(self, None) if is_stale else contextlib.nullcontext():
            return stock(self, *args, **kwargs)

    save_pretrained.knows_dendrites = True
    transformers.PreTrainedModel.save_pretrained = save_pretrained


def check_savable(model: nn.Module, folder: Path) -> None:
    """Raise ValueError unless dendrites alone can be saved of a model: the base has a name, which is not that of the
    folder, and something is frozen."""
    if not (base := base_of(model)):
        raise ValueError(
            f"dendrites_only: this {type(model).__name__} does not know the name of its base; load it with "
            "from_pretrained, or set model.config._name_or_path"
        )
    if os.path.isdir(base["name"]) and folder.is_dir() and os.path.samefile(base["name"], folder):
        raise ValueError(f"dendrites_only: {folder} holds the base, which they need; choose another folder")
    trained = trained_part(model)
    if frozen := [n for n, p in model.named_parameters() if is_of_dendrite(n) and n not in trained]:
        raise ValueError(
            f"dendrites_only: {frozen[0]} is frozen, and what is frozen is not saved: save before freezing"
        )
    if all(name in trained for name, _ in model.named_parameters()):
        raise ValueError("dendrites_only: nothing of this model is frozen, all of it was trained; use freeze_base")


def save_dendrites(model: nn.Module, folder: Path) -> None:
    """Save what was trained of a model, with the name and the fingerprints of its frozen base.

    Args:
        model (`PreTrainedModel`): Some of its parameters are frozen.
        folder (`Path`): Made if it is not there.

    Raises:
        ValueError: If the base has no name or is in that folder, or nothing is frozen.
    """
    check_savable(model, folder)
    base, trained, frozen = base_of(model), trained_part(model), frozen_part(model)
    folder.mkdir(parents=True, exist_ok=True)
    with _config_with(model, dendrite_config(model, base=base)):
        model.config.architectures = [type(model).__name__]
        model.config.dtype = str(model.dtype).removeprefix("torch.")
        model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    for name in (INDEX, *STOCK_NAMES, *_shards(folder)):  # of an earlier save of the complete model
        (folder / name).unlink(missing_ok=True)
    fresh = not folder.name.startswith("checkpoint-")
    metadata = {"format": "pt", BASE: json.dumps(fingerprints(model, frozen, fresh))}
    save_file(distinct(trained), folder / WEIGHTS, metadata=metadata)
    if f"{CODE}." in str(getattr(model.config, "auto_map", "")):
        write_code(folder)


def _shards(folder: Path) -> list[str]:
    """The parts of the weights that a folder holds, of a model with dendrites in several files."""
    return [file.name for file in folder.glob(WEIGHTS.replace(".safetensors", "-*-of-*.safetensors"))]


def code_of_dendrites() -> dict[str, str]:
    """The text of each file that loads dendrites from the folder of a model alone, by its name there."""
    texts = {}
    for own, name in CODE_FILES.items():
        here = Path(__file__).parent
        text = (here / own if (here / own).is_file() else here / name).read_text(encoding="utf-8")
        for module, copied in CODE_FILES.items():
            text = text.replace(f"from .{Path(module).stem} import", f"from .{Path(copied).stem} import")
        texts[name] = text
    return texts


def write_code(folder: Path) -> None:
    """Write the files that load dendrites into the folder of a model. A link there is replaced, not followed."""
    for name, text in code_of_dendrites().items():
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def make_dendritic(model: nn.Module) -> nn.Module:
    """Let `model.save_pretrained` save the dendrites of the model's layers, in place.

    Args:
        model (`PreTrainedModel`): Its class becomes a subclass of the same name. Without dendrites it is still saved
            as an ordinary model.
    """
    if not hasattr(type(model), "dendrite_base"):
        model.__class__ = dendrite_class(_Model, type(model))
    return model


_patch_save_pretrained()
