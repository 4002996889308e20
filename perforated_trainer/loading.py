"""Saving and loading of models with dendrites, with transformers' own `save_pretrained` and `from_pretrained`.

Importing this file makes transformers load dendrites: `from_pretrained` knows them as a "quantization method", whose
class receives a model before its weights are loaded. A copy of it is saved next to models as custom code.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import os
import re
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from .layers import (
    _Reduced,
    add_dendrites,
    can_fuse,
    compute_in_full,
    dendrite_class,
    has_dendrites,
    join,
    layers_with_dendrites,
    remove_dendrites,
    separate,
)
from .sharing import BASE, base_of, check_base, fingerprints, frozen_part, read_base, trained_part

METHOD = VARIANT = "dendrites"
FORMAT = 2  # of the saved model; raise it when a model saved now could not be loaded by older code
# Names that transformers does not look for by itself: without this file it must fail, not load a part of the weights.
WEIGHTS, INDEX = "model.dendrites.safetensors", "model.dendrites.safetensors.index.json"
STOCK_NAMES = "model.safetensors", "model.safetensors.index.json"
_VARIANT_INDEX = "model.safetensors.index.dendrites.json"  # what save_pretrained(variant="dendrites") calls the index
CODE = "dendrite_loading"  # name of the copy of this file in the folder of a model
# What is copied, and its name there.
CODE_FILES = {f"{name}.py": f"dendrite_{name}.py" for name in ("formula", "layers", "sharing", "loading")}


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


class DendriteQuantizer(HfQuantizer):
    """Gives a model its dendrites before `from_pretrained` loads the weights, and checks that they are complete."""

    requires_calibration = True  # a model without dendrites does not get them here

    def update_attn_implementation(self, config):
        """Name the file of the weights. In transformers 5.23 this is the hook that sees the config before files are
        looked for."""
        config.transformers_weights = self.quantization_config.weights
        self._architectures = config.architectures or []
        return config

    update_tp_plan = update_attn_implementation  # the same hook, as transformers 5.5 calls it

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        saved = self._leave_out_resized(model, read_shapes(checkpoint_files)) if checkpoint_files else None
        self._base = None
        if checkpoint_files and not getattr(self.quantization_config, "base", None) and read_base(checkpoint_files[0]):
            raise ValueError("config.json does not name the base of these dendrites: save them again")
        if base := getattr(self.quantization_config, "base", None):
            _check_loadable(base)
            self._base = _read_base(checkpoint_files[0]) if checkpoint_files else {}
        partial = bool(self._architectures) and type(model).__name__ not in self._architectures
        if partial and saved:
            self._check_renamed(model, saved)
        self.quantization_config.build(model, saved, partial)
        if self._base is not None:
            self._expect_base(model, saved or {})
        self._shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        if saved is not None:
            check_dendrites(model, saved, partial)

    def _check_renamed(self, model, saved):
        """Raise ValueError if a layer has another first name in the model than in the files, as with `key_mapping`:
        transformers would load its weights, and its dendrites would be left out."""
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        modules, held = {}, {name.removeprefix(prefix).rpartition(".")[0] for name in saved}
        for name, _ in model.named_modules():
            modules.setdefault(name.partition(".")[2], []).append(name)
        bare = {name.removeprefix(prefix) for names in modules.values() for name in names}
        for layer in self.quantization_config.layers:
            found = modules.get(layer.partition(".")[2], []) if "." in layer else []
            if layer.removeprefix(prefix) in bare or not found or held & {name.removeprefix(prefix) for name in found}:
                continue
            raise ValueError(
                f"the dendrites of {layer} have that name in the folder, and the layer is {found[0]} in a "
                f"{type(model).__name__}: key_mapping does not rename dendrites"
            )

    def _expect_base(self, model, saved):
        """Let transformers miss what neither the files nor the base hold, but not the base, which is loaded later."""
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        self._held = {key for name in (*self._base, *saved) for key in (name, name.removeprefix(prefix), prefix + name)}
        self._ignored = model._keys_to_ignore_on_load_missing
        model._keys_to_ignore_on_load_missing = {f"^({'|'.join(map(re.escape, self._held))})$"}

    def _check_held(self, model):
        """Raise ValueError if a tensor of the class that was saved is neither in the files nor in the base."""
        model._keys_to_ignore_on_load_missing = self._ignored
        state = model.state_dict()
        pointers = {value.data_ptr() for name, value in state.items() if name in self._held}  # a tied one has two names
        left = [n for n, value in state.items() if n not in self._held and value.data_ptr() not in pointers]
        if left and type(model).__name__ in self._architectures:
            raise ValueError(f"{left[0]} is missing: neither this folder nor the base of the dendrites holds it")

    def _leave_out_resized(self, model, saved):
        """Leave out the dendrites of layers of another size than in the files: transformers refuses them, or makes new
        ones with `ignore_mismatched_sizes=True`. Returns what the files hold without these dendrites."""
        prefix, config = f"{getattr(model, 'base_model_prefix', '')}.", self.quantization_config
        sizes = {name.removeprefix(prefix): tuple(value.shape) for name, value in model.state_dict().items()}
        shapes = {name.removeprefix(prefix): shape for name, shape in saved.items()}
        resized = [name for name in shapes.keys() & sizes.keys() if shapes[name] != sizes[name]]
        left = [n for n in config.layers if any(name.startswith(f"{n.removeprefix(prefix)}.") for name in resized)]
        config.layers = {name: value for name, value in config.layers.items() if name not in left}
        starts = tuple(f"{name.removeprefix(prefix)}.dendrite" for name in left)
        return {n: shape for n, shape in saved.items() if not n.removeprefix(prefix).startswith(starts)}

    def _process_model_after_weight_loading(self, model, **kwargs):
        # transformers 5.5 does not compare shapes where there is a quantizer.
        for name, value in model.state_dict().items():
            if tuple(value.shape) != self._shapes.get(name, tuple(value.shape)):
                raise ValueError(f"{name} was saved with shape {tuple(value.shape)}, {self._shapes[name]} is needed")
        if hasattr(model.config, "transformers_weights"):
            del model.config.transformers_weights  # this folder's alone, another one loaded with the config has its own
        _align(model)
        if self._base is not None:
            self._check_held(model)
            load_base(model, self.quantization_config, self._base)
        return make_dendritic(model)

    def is_serializable(self):
        return True

    @property
    def is_trainable(self):
        return True


def _is_of_dendrites(name):
    return any(part.startswith(("dendrite_", "dendrites")) for part in name.split("."))


def check_dendrites(model: nn.Module, saved: dict, partial: bool = False) -> None:
    """Raise ValueError unless the dendrites of a model and those in its files of weights are the same.

    transformers only warns of missing weights and makes random ones.

    Args:
        model (`nn.Module`): With its dendrites.
        saved (`dict`): Shape of each tensor in the files.
        partial (`bool`): The files may hold more, of layers that the model does not have.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    shapes = {name.removeprefix(prefix): tuple(value.shape) for name, value in model.state_dict().items()}
    layers = {name.removeprefix(prefix) for name in layers_with_dendrites(model)}
    expected = {
        name
        for name in shapes
        if _is_of_dendrites(name) and any(name.startswith(f"{layer}." if layer else "") for layer in layers)
    }
    saved = {name.removeprefix(prefix): shape for name, shape in saved.items()}
    wrong = [f"{name} is missing" for name in sorted(expected - saved.keys())]
    for name in sorted(saved):
        if name not in shapes and _is_of_dendrites(name) and not partial:
            wrong.append(f"{name} is not expected")
    for name in sorted(expected & saved.keys()):
        if saved[name] != shapes[name]:
            wrong.append(f"{name} has shape {saved[name]}, {shapes[name]} is needed")
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"The weights do not fit the dendrites in config.json: {', '.join(wrong[:3])}{more}")


def _align(model):
    """The CPU rounds products by where their factors are: as torch allocates, not as they were in a mapped file."""
    for value in (*model.parameters(), *model.buffers()):
        is_plain = value.device.type == "cpu" and not hasattr(value, "__tensor_flatten__")
        if is_plain and value.data_ptr() % 64:
            value.data = value.data.clone()


_loading_base = False


def _check_loadable(base):
    if _loading_base:
        raise ValueError(f"the base of these dendrites is itself a folder with dendrites alone, for {base['name']}")
    if method := base.get("quantized"):
        raise ValueError(
            f"these dendrites are for {base['name']}, quantized ({method}): load that as it was, and then "
            "perforated_trainer.load_dendrites(base, folder)"
        )


def _read_base(file):
    if not (expected := read_base(file)):
        raise ValueError(f"{file} has lost its metadata, which says to which base the dendrites belong: save it again")
    return expected


def _unjoined(name, layers):
    """The name of a tensor in a model whose convolutions are not joined with their normalizations."""
    for layer, value in layers.items():
        if isinstance(value, dict) and "norm" in value:
            norm = ".".join(filter(None, (layer.rpartition(".")[0], value["norm"])))
            for part, own in ((f"{layer}.0.", layer), (f"{layer}.1.", norm)):
                if name.startswith(part):
                    return f"{own}.{name.removeprefix(part)}"
    return name


def _by_name(tensors, names, layers, prefix):
    """The tensors of a base by the names that they have with the dendrites; the body is found in a model and alone."""
    found = {}
    for name in names:
        own = _unjoined(name, layers)
        for key in (own, own.removeprefix(prefix), prefix + own):
            if key in tensors:
                found[name] = tensors[key]
                break
    return found


@torch.no_grad()
def load_base(model: nn.Module, config: DendriteConfig, expected: dict[str, str]) -> None:
    """Load the base of a model whose dendrites are loaded.

    Args:
        model (`PreTrainedModel`): With its dendrites, and random weights for its base.
        config (`DendriteConfig`): Its `base` names the base.
        expected (`dict`): Fingerprint of each tensor of the base.

    Raises:
        ValueError: If it is not the base that the dendrites were trained on.
        OSError: If there is no model of that name.
    """
    global _loading_base
    base, kept, level = config.base, copy.deepcopy(model.config), transformers.utils.logging.get_verbosity()
    vars(kept).pop("quantization_config", None)
    _loading_base = True
    transformers.utils.logging.set_verbosity_error()  # a head of its own that it lacks is not missed
    try:
        revision = base.get("revision") or "main"
        own, _ = type(kept).get_config_dict(base["name"], revision=revision)
        if mark := own.get("quantization_config"):  # of a base with dendrites of its own
            kept.quantization_config = mark
        with torch.random.fork_rng(devices=[]):
            loaded = type(model).from_pretrained(
                base["name"],
                config=kept,
                revision=revision,
                dtype=getattr(torch, base.get("dtype", ""), None),
                ignore_mismatched_sizes=True,
            )
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise OSError(
            f"these dendrites are for the model {base['name']!r}, which cannot be loaded ({reason}): load it "
            "yourself, and then perforated_trainer.load_dendrites(base, folder)"
        ) from None
    finally:
        _loading_base = False
        transformers.utils.logging.set_verbosity(level)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    own = _by_name(model.state_dict(), expected, {}, prefix)  # of another class, the model may lack some
    values = _by_name(loaded.state_dict(), own, config.layers, prefix)
    check_base(loaded, values, {name: expected[name] for name in own}, "the model in this folder")
    for name, value in values.items():
        own[name].copy_(value)
    _remember_base(model, base, expected)


def _remember_base(model, base, expected):
    """A model with the dendrites of a folder knows what was trained there, for a further training."""
    names = [name for name, _ in model.named_parameters() if name not in expected]
    for name, parameter in model.named_parameters():
        if name in expected and parameter.is_floating_point():
            parameter.requires_grad_(False)
    model.dendrites_base = base | {"trained": names}


@torch.no_grad()
def load_dendrites(base_model: nn.Module, folder: str | Path) -> nn.Module:
    """Put what `save_model(folder, dendrites_only=True)` wrote into the model that it was trained on.

    Args:
        base_model (`PreTrainedModel`): The base, as it was before its training: of the same class, dtype and
            quantization. Changed in place; unchanged if it is refused.
        folder (`str` or `Path`): Of dendrites alone.

    Returns:
        `PreTrainedModel`: The same model, in evaluation mode. Its base is frozen.

    Raises:
        ValueError: If the folder holds something else, or dendrites for another base, which names what differs.
        OSError: If a file is missing.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise OSError(f"there is no config.json in {folder}")
    mark = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config") or {}
    if mark.get("quant_method") != METHOD or not mark.get("base"):
        raise ValueError(f"{folder} does not hold dendrites alone: load what it holds with from_pretrained")
    config = DendriteConfig(**{name: value for name, value in mark.items() if name != "quant_method"})
    if layers_with_dendrites(base_model):
        raise ValueError(f"this {type(base_model).__name__} has dendrites already: load its base again")
    what = f"what is in {folder}"
    file, modules = folder / config.weights, dict(base_model.named_modules())
    shapes, expected, own = read_shapes([file]), _read_base(file), base_model.state_dict()
    if lacking := [name for name in config.layers if name not in modules]:
        raise ValueError(f"{what} was trained on another base: this {type(base_model).__name__} has no {lacking[0]}")
    for name, shape in shapes.items():
        own_name = _unjoined(name, config.layers)
        if not _is_of_dendrites(name) and (own_name not in own or tuple(own[own_name].shape) != shape):
            found = tuple(own[own_name].shape) if own_name in own else "missing"
            raise ValueError(f"{what} was trained on another base: {own_name} is {found} here, {shape} there")
    check_base(base_model, _by_name(own, expected, config.layers, ""), expected, what)
    for name, value in config.layers.items():
        config._check_number(name, value.get("dendrites") if isinstance(value, dict) else value, shapes, "")
    held = {own[name].data_ptr() for name in (*expected, *(_unjoined(n, config.layers) for n in shapes)) if name in own}
    if left := [name for name, value in own.items() if value.data_ptr() not in held and value.numel()]:
        raise ValueError(f"{left[0]} is missing: {what} does not hold it, and it was not in the base there")
    try:
        config.build(base_model, shapes)
        check_dendrites(base_model, shapes)
    except ValueError:
        for name, layer in list(base_model.named_modules()):
            if has_dendrites(layer):
                remove_dendrites(layer)
            if hasattr(layer, "joined_norm"):
                separate(base_model, name)
        compute_in_full(base_model)
        raise
    own = base_model.state_dict()
    with safe_open(file, framework="pt") as weights:
        for name in weights.keys():  # noqa: SIM118
            own[name].copy_(weights.get_tensor(name))
    _align(base_model)
    _remember_base(base_model, config.base, expected)
    return make_dendritic(base_model).eval()


def read_shapes(files) -> dict[str, tuple]:
    """Shape of each tensor in files of weights. OSError if one is missing, ValueError if one is damaged."""
    shapes = {}
    for file in files:
        if not os.path.isfile(file):
            raise OSError(f"There is no file of weights {os.path.basename(file)} in {os.path.dirname(file)}")
        try:
            with safe_open(file, framework="pt") as weights:
                shapes |= {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"The weights in {file} are damaged: {error}") from None
    return shapes


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
    """A model whose `save_pretrained` writes what `from_pretrained` above reads."""

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

        With `dendrites_only=True` what was trained is saved, and the name of the frozen base."""
        if not layers_with_dendrites(self) and not dendrites_only:
            return super().save_pretrained(save_directory, *args, push_to_hub=push_to_hub, variant=variant, **kwargs)
        names = "repo_id", "commit_message", "create_pr", "private", "revision", "token"
        hub = {name: kwargs.pop(name) for name in names if name in kwargs}
        folder, writes = Path(save_directory), kwargs.get("is_main_process", args[0] if args else True)
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


def check_savable(model: nn.Module) -> None:
    """Raise ValueError unless dendrites alone can be saved of a model: the base has a name, and something is frozen."""
    if not base_of(model):
        raise ValueError(
            f"dendrites_only: this {type(model).__name__} does not know the name of its base; load it with "
            "from_pretrained, or set model.config._name_or_path"
        )
    trained = trained_part(model)
    if frozen := [n for n, p in model.named_parameters() if _is_of_dendrites(n) and n not in trained]:
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
        ValueError: If the base has no name, or nothing is frozen.
    """
    check_savable(model)
    base, trained, frozen = base_of(model), trained_part(model), frozen_part(model)
    folder.mkdir(parents=True, exist_ok=True)
    with _config_with(model, dendrite_config(model, base=base)):
        model.config.architectures = [type(model).__name__]
        model.config.dtype = str(model.dtype).removeprefix("torch.")
        model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    for name in (INDEX, *STOCK_NAMES):
        (folder / name).unlink(missing_ok=True)
    fresh = not folder.name.startswith("checkpoint-")
    metadata = {"format": "pt", BASE: json.dumps(fingerprints(model, frozen, fresh))}
    save_file(distinct(trained), folder / WEIGHTS, metadata=metadata)
    if f"{CODE}." in str(getattr(model.config, "auto_map", "")):
        write_code(folder)


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


def __getattr__(name):
    """The models of transformers, for the custom code of a folder: a subclass, since the Auto classes mark the class
    that they load as custom code."""
    base = None if name.startswith("_") else getattr(transformers, name, None)
    if not (isinstance(base, type) and issubclass(base, transformers.PreTrainedModel)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = type(name, (base,), {"__module__": __name__, "__doc__": base.__doc__})
    return globals()[name]


def _register():
    """A copy of this file may be in the process already: the newer format stays."""
    known = AUTO_QUANTIZER_MAPPING.get(METHOD)
    if known is None or getattr(known, "format", 0) < FORMAT:
        AUTO_QUANTIZATION_CONFIG_MAPPING.pop(METHOD, None)
        AUTO_QUANTIZER_MAPPING.pop(METHOD, None)
        register_quantization_config(METHOD)(DendriteConfig)
        register_quantizer(METHOD)(DendriteQuantizer)


DendriteQuantizer.format = FORMAT
_register()
_patch_save_pretrained()
