"""Loading of models with dendrites, with transformers' own `from_pretrained`.

Importing this file makes transformers load dendrites: `from_pretrained` knows them as a "quantization method", whose
class receives a model before its weights are loaded. A copy of it is saved next to models as custom code.
"""

from __future__ import annotations

import copy
import json
import os
import re
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from .blocks import compute_in_full, separate
from .layers import has_dendrites, is_of_dendrite, layers_with_dendrites, remove_dendrites
from .saving import FORMAT, METHOD, DendriteConfig, make_dendritic
from .sharing import check_base, read_base


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
        if is_of_dendrite(name) and any(name.startswith(f"{layer}." if layer else "") for layer in layers)
    }
    saved = {name.removeprefix(prefix): shape for name, shape in saved.items()}
    wrong = [f"{name} is missing" for name in sorted(expected - saved.keys())]
    for name in sorted(saved):
        if name not in shapes and is_of_dendrite(name) and not partial:
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
    if not isinstance(base_model, transformers.PreTrainedModel):
        raise ValueError(f"base_model must be a loaded model, not {type(base_model).__name__}: use from_pretrained")
    settings = _read_settings(folder)
    mark = settings.pop("quantization_config", None) or {}
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
        if not is_of_dendrite(name) and (own_name not in own or tuple(own[own_name].shape) != shape):
            found = tuple(own[own_name].shape) if own_name in own else "missing"
            raise ValueError(f"{what} was trained on another base: {own_name} is {found} here, {shape} there")
    check_base(base_model, _by_name(own, expected, config.layers, ""), expected, what)
    for name in config.layers:
        try:
            config._check_number(name, config.arguments(name)["num_dendrites"], shapes, "")
        except ValueError as error:
            raise ValueError(f"{folder / 'config.json'}, dendrites of {name!r}: {error}") from None
    taken = _settings_to_take(base_model.config, settings, what)
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
    own = dict(base_model.named_parameters(remove_duplicate=False)) | dict(base_model.named_buffers())
    with safe_open(file, framework="pt") as weights:
        for name in weights.keys():  # noqa: SIM118
            value = weights.get_tensor(name)
            if own[name].dtype != value.dtype:  # a head in float32 on a base in bfloat16
                own[name].data = own[name].to(value.dtype)
            own[name].copy_(value)
    for name, value in taken.items():
        setattr(base_model.config, name, value)
    if (folder / "generation_config.json").is_file() and base_model.can_generate():
        base_model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    _align(base_model)
    _remember_base(base_model, config.base, expected)
    return make_dendritic(base_model).eval()


def _read_settings(folder):
    file = folder / "config.json"
    if not file.is_file():
        raise OSError(f"there is no config.json in {folder}")
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{file} is damaged: it holds no settings")
    return settings


# Settings of a config that change no output of a loaded model, or say how a user wants to use it.
_OWN_SETTINGS = re.compile(
    r"transformers_version|architectures|(torch_)?dtype|auto_map|use_cache|output_\w+|return_dict|torchscript"
    r"|gradient_checkpointing|tokenizer_class|initializer_\w+|\w*drop\w*|_\w+"
)
# Settings that a task brings: they are taken from the folder.
_TASK_SETTINGS = re.compile(r"id2label|label2id|problem_type|\w+_token_id|task_specific_params|finetuning_task")


def _settings_to_take(config, settings, what):
    """The settings of a task in which a folder differs from the config of its base.

    Raises:
        ValueError: If they differ in another setting: the network would compute something else.
    """
    own, saved = config.to_dict(), type(config).from_dict(settings).to_dict()
    names = [name for name in own.keys() & saved.keys() if own[name] != saved[name]]
    taken = {name: saved[name] for name in names if _TASK_SETTINGS.fullmatch(name)}
    for name in sorted(names):
        if name not in taken and not _OWN_SETTINGS.fullmatch(name) and not _same_but_own(own[name], saved[name]):
            raise ValueError(f"{what} was trained on another base: {name} is {own[name]} here, {saved[name]} there")
    return taken


def _same_but_own(one, other):
    """Whether nested settings differ only in those that change no output."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return one == other
    names = [name for name in one.keys() & other.keys() if not _OWN_SETTINGS.fullmatch(name)]
    return all(_same_but_own(one[name], other[name]) for name in names)


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
