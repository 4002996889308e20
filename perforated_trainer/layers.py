"""Layers with dendrites in plain torch: the formula, the layers that are deployed, their saving and loading.

A neuron y = W x + b gets n dendrites d_i = s(W_i x + b_i + sum over j < i of c_ij d_j); its output becomes
y + sum over i of a_i d_i. The activation s is the sigmoid unless told otherwise; a and c hold one number a neuron.
Source: perforatedai's open source `clean_perforatedai.py`; arXiv:2501.18018 has the idea.

This file stands alone: a copy of it lies in folders of models as custom code. Its import makes transformers load
dendrites: `from_pretrained` knows them as a "quantization method", which gets a model before its weights are loaded.
"""

from __future__ import annotations

import copy
import os
from functools import cache
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

METHOD = VARIANT = "dendrites"
FORMAT = 1  # of the saved model; raise it when a model saved now could not be loaded by older code
# Names that transformers does not look for by itself: without this file it must fail, not load a part of the weights.
WEIGHTS, INDEX = "model.dendrites.safetensors", "model.dendrites.safetensors.index.json"
_STOCK_NAMES = "model.safetensors", "model.safetensors.index.json"
_VARIANT_INDEX = "model.safetensors.index.dendrites.json"  # what save_pretrained(variant="dendrites") calls the index
CODE = "dendrite_layers"  # name of the copy of this file in the folder of a model
ACTIVATIONS = {
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "silu": F.silu,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "selu": F.selu,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "mish": F.mish,
    "relu6": F.relu6,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "hardtanh": F.hardtanh,
    "logsigmoid": F.logsigmoid,
}

# ------------------------------------------------------------------------------------------------------- the formula

# Weights of a layer. To lay larger ones side by side costs more than one product saves; measured on a CPU.
FUSED_UP_TO = 2**16


def _linear(layer, x, weight, bias):
    return F.linear(x, weight, bias)


def _transposed(layer, x, weight, bias):
    return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[1])


def _convolution(function):
    def product(layer, x, weight, bias):
        return function(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)

    return product


# Class: product, dimension of the neurons in the output (from the end: a batch may be missing), and in the weight.
_PRODUCTS = {
    nn.Linear: (_linear, -1, 0),
    nn.Conv1d: (_convolution(F.conv1d), -2, 0),
    nn.Conv2d: (_convolution(F.conv2d), -3, 0),
    nn.Conv3d: (_convolution(F.conv3d), -4, 0),
    Conv1D: (_transposed, -1, 1),
}


def _base(module):
    """Class of a module, without its dendrites; read from the class, so that two copies of this file understand."""
    cls = type(module)
    return getattr(cls, "dendrite_base", cls)


def can_fuse(layer: nn.Module) -> bool:
    """Whether the layer and its dendrites are computed as one product: exact types, because a subclass may compute
    something else."""
    return _base(layer) in _PRODUCTS and getattr(layer, "padding_mode", "zeros") == "zeros"


def _is_large(layer):
    return layer.weight.numel() > FUSED_UP_TO


def _product(layer, x, count, weights, biases):
    """Outputs of `count` layers of one shape, computed as one where that pays, and the dimension of their neurons."""
    product, dim, axis = _PRODUCTS[_base(layer)]
    if _is_large(layer):
        return [product(layer, x, *part) for part in zip(weights, biases or [None] * count)], dim  # noqa: B905
    groups = getattr(layer, "groups", 1)
    if groups == 1:
        return product(layer, x, torch.cat(weights, axis), biases and torch.cat(biases)).chunk(count, dim), dim
    # A group reads its own inputs only, so each group gets the neurons and the dendrites that belong to it.
    weight = torch.cat([part.unflatten(0, (groups, -1)) for part in weights], 1).flatten(0, 1)
    bias = biases and torch.cat([part.view(groups, -1) for part in biases], 1).flatten()
    outputs = product(layer, x, weight, bias).unflatten(dim, (groups, count, -1)).unbind(dim - 1)
    return [output.flatten(dim - 1, dim) for output in outputs], dim


def _combine(outputs, to_dendrites, to_output, activation, dim):
    """The formula, from the sums W x + b of the neurons and of each dendrite on."""
    output, *sums = outputs
    ones = (1,) * (-1 - dim)

    def numbers(rows):  # one tensor a row, in the dtype of the outputs, which autocast may have chosen
        return rows.to(output.dtype).view(*rows.shape, *ones).unbind()

    dendrites = []
    for i, (total, factor) in enumerate(zip(sums, numbers(to_output))):  # noqa: B905 - torch.compile; equal lengths
        if i:
            for weight, dendrite in zip(numbers(to_dendrites[i]), dendrites):  # noqa: B905
                total = torch.addcmul(total, weight, dendrite)
        dendrites.append(activation(total))
        output = torch.addcmul(output, factor, dendrites[-1])
    return output


def forward_with_dendrites(
    layer, dendrites, to_dendrites, to_output, *args, activation=torch.sigmoid, dim=-1, **kwargs
) -> torch.Tensor:
    """Output of a layer and its dendrites, with the parameters wherever training keeps them.

    Args:
        layer (`nn.Module`): The neurons. Called with `args` and `kwargs`, where it is not computed as one product.
        dendrites (sequence of n `nn.Module`): Of the layer's class and shapes.
        to_dendrites (sequence of n tensors): c. Number i has shape (i, out); number 0 is not read.
        to_output (tensor (n, out)): a.
        activation (callable): s.
        dim (`int`): The dimension of the neurons in the output, counted from the end. Read for modules that are
            not `can_fuse` only.

    The formula is at the top of this file. Forward hooks of a layer that `can_fuse` do not run.
    """
    if can_fuse(layer) and all(type(dendrite) is type(layer) for dendrite in dendrites):
        x = args[0] if args else next(iter(kwargs.values()))
        weights = [layer.weight, *[dendrite.weight for dendrite in dendrites]]
        biases = None if layer.bias is None else [layer.bias, *[dendrite.bias for dendrite in dendrites]]
        outputs, dim = _product(layer, x, len(weights), weights, biases)
    else:
        outputs = [layer(*args, **kwargs), *[dendrite(*args, **kwargs) for dendrite in dendrites]]
    return _combine(outputs, to_dendrites, to_output, activation, dim)


def activation_name(function) -> str:
    """Name of an activation in `ACTIVATIONS`, found by its values. ValueError where none is equal."""
    x = torch.linspace(-10, 10, 101)
    for name, known in ACTIVATIONS.items():
        if torch.equal(function(x), known(x)):
            return name
    raise ValueError(
        f"A model with the dendrite activation {function} cannot be saved; use one of {', '.join(ACTIVATIONS)}"
    )


# ---------------------------------------------------------------------------------------- layers that stay the layer


def _new(mixin, base):
    return (cls := dendrite_class(mixin, base)).__new__(cls)


class _Reduced:
    """Pickle and deepcopy for classes made here, which pickle cannot find by their name."""

    dendrite_base: type

    def __reduce_ex__(self, protocol):
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__  # Python 3.10 has none
        return _new, (self._dendrite_mixin, self.dendrite_base), state


class _Layer(_Reduced):
    def _to_dendrites(self):
        return self.dendrite_to_dendrite.split(tuple(range(self.num_dendrites)))  # row i: the c_ij, j < i

    def extra_repr(self):
        return ", ".join(filter(None, [super().extra_repr(), f"num_dendrites={self.num_dendrites}"]))


def _parts(stacked, number, axis):
    """As `chunk`, whose operator in ONNX keeps weights from being constants, and so from int8."""
    size = stacked.shape[axis] // number
    return [stacked.narrow(axis, i * size, size) for i in range(number)] if number > 1 else [stacked]


class _Fused(_Layer):
    def forward(self, input):
        number = self.num_dendrites if _is_large(self) or getattr(self, "groups", 1) > 1 else 1
        weights = _parts(self.dendrite_weight, number, _PRODUCTS[_base(self)][2])
        biases = [] if self.bias is None else _parts(self.dendrite_bias, number, 0)
        if _is_large(self):  # laid out in memory as while training: else the last bits of a product may differ
            weights = [weight.clone(memory_format=torch.contiguous_format) for weight in weights]
            biases = [bias.clone() for bias in biases]
        weights, biases = [self.weight, *weights], None if self.bias is None else [self.bias, *biases]
        outputs, dim = _product(self, input, self.num_dendrites + 1, weights, biases)
        activation = ACTIVATIONS[self.dendrite_activation]
        return _combine(outputs, self._to_dendrites(), self.dendrite_to_output, activation, dim)


class _Module(_Layer):
    def forward(self, *args, **kwargs):
        outputs = [super().forward(*args, **kwargs), *[dendrite(*args, **kwargs) for dendrite in self.dendrites]]
        activation = ACTIVATIONS[self.dendrite_activation]
        return _combine(outputs, self._to_dendrites(), self.dendrite_to_output, activation, self.dendrite_dim)


class _Sequence(_Module):
    """nn.Sequential runs what it iterates over, and the dendrites are not the last step of it."""

    def __iter__(self):
        return (module for name, module in self.named_children() if name != "dendrites")

    def __len__(self):
        return sum(1 for _ in self)


class DendriteLinear(_Fused, nn.Linear):
    dendrite_base, _dendrite_mixin = nn.Linear, _Fused


class DendriteConv1d(_Fused, nn.Conv1d):
    dendrite_base, _dendrite_mixin = nn.Conv1d, _Fused


class DendriteConv2d(_Fused, nn.Conv2d):
    dendrite_base, _dendrite_mixin = nn.Conv2d, _Fused


class DendriteConv3d(_Fused, nn.Conv3d):
    dendrite_base, _dendrite_mixin = nn.Conv3d, _Fused


class DendriteConv1D(_Fused, Conv1D):
    dendrite_base, _dendrite_mixin = Conv1D, _Fused

    def forward(self, x):
        return super().forward(x)


_FUSED = {
    cls.dendrite_base: cls for cls in (DendriteLinear, DendriteConv1d, DendriteConv2d, DendriteConv3d, DendriteConv1D)
}


@cache
def dendrite_class(mixin, base):
    """The one class that adds `mixin` (how it computes, or how it is saved) to `base`."""
    if mixin is _Fused:
        return _FUSED[base]
    names = {"dendrite_base": base, "_dendrite_mixin": mixin, "__module__": base.__module__, "__doc__": base.__doc__}
    if issubclass(mixin, _Layer):
        return type(f"Dendrite{base.__name__}", (mixin, base), names)
    return type(base.__name__, (mixin, base), names | {"__qualname__": base.__qualname__})


def add_dendrites(module, num_dendrites, dim=None, activation="sigmoid", neurons=None) -> nn.Module:
    """Give a module dendrites whose numbers are all zero, in place: its class becomes a subclass of what it was.

    Args:
        module (`nn.Module`): Its own parameters keep their names. It gets `dendrite_weight`, `dendrite_bias` (those
            of all dendrites along the dimension of the neurons) or, where it is not `can_fuse`, `dendrites` (copies
            of it); `dendrite_to_dendrite` (n (n - 1) / 2, out), the c_ij row by row; `dendrite_to_output` (n, out).
        num_dendrites (`int`): 0 leaves the module as it is.
        dim, neurons (`int`): Dimension of the neurons in the output, counted from the end, and how many there are.
            Read for modules that are not `can_fuse` only.
        activation (`str`): A name in `ACTIVATIONS`.

    ValueError where an argument is missing or wrong, or the module has dendrites already.
    """
    base, fused = type(module), can_fuse(module)
    if activation not in ACTIVATIONS:
        raise ValueError(f"Unknown dendrite activation {activation!r}; known are {', '.join(ACTIVATIONS)}")
    if isinstance(num_dendrites, bool) or not isinstance(num_dendrites, int) or num_dendrites < 0:
        raise ValueError(f"The number of dendrites must be a whole number from 0 on, not {num_dendrites!r}")
    if hasattr(base, "dendrite_base"):
        raise ValueError(f"This {base.__name__} has dendrites already")
    if not num_dendrites:
        return module
    if fused:
        _, dim, axis = _PRODUCTS[base]
        neurons = module.weight.shape[axis]
        shape = list(module.weight.shape)
        shape[axis] *= num_dendrites
        shapes = {"dendrite_weight": shape}
        if module.bias is not None:
            shapes["dendrite_bias"] = (num_dendrites * neurons,)
        mixin = _Fused
    else:
        if not (isinstance(dim, int) and dim < 0 and isinstance(neurons, int) and neurons > 0):
            raise ValueError(f"A {base.__name__} needs `dim`, negative, and `neurons`; got {dim!r} and {neurons!r}")
        if hasattr(module, "dendrites"):
            raise ValueError(f"This {base.__name__} has an attribute `dendrites` of its own")
        shapes, copies = {}, nn.ModuleList(copy.deepcopy(module) for _ in range(num_dendrites))
        mixin = _Sequence if issubclass(base, nn.Sequential) else _Module
    shapes["dendrite_to_dendrite"] = (num_dendrites * (num_dendrites - 1) // 2, neurons)
    shapes["dendrite_to_output"] = (num_dendrites, neurons)
    like = next(module.parameters(), torch.empty(0, requires_grad=True))
    for name, shape in shapes.items():
        zeros = torch.zeros(shape, dtype=like.dtype, device=like.device)
        module.register_parameter(name, nn.Parameter(zeros, requires_grad=like.requires_grad))
    if not fused:
        module.dendrites = copies
    module.num_dendrites, module.dendrite_dim, module.dendrite_activation = num_dendrites, dim, activation
    module.__class__ = dendrite_class(mixin, base)
    return module


def set_dendrites(module, dendrites, to_dendrites, to_output) -> None:
    """Copy the values of trained dendrites into a module that `add_dendrites` gave as many.

    The arguments are those of `forward_with_dendrites`. ValueError where a number or a shape does not fit.
    """
    if len(dendrites) != module.num_dendrites or len(to_dendrites) != module.num_dendrites:
        raise ValueError(f"{len(dendrites)} dendrites do not fit a layer of {module.num_dendrites}")
    values = {"dendrite_to_dendrite": to_dendrites[1:], "dendrite_to_output": [to_output]}
    if can_fuse(module):
        values["dendrite_weight"] = [dendrite.weight for dendrite in dendrites]
        if module.bias is not None:
            values["dendrite_bias"] = [dendrite.bias for dendrite in dendrites]
    else:
        for own, dendrite in zip(module.dendrites, dendrites, strict=True):
            own.load_state_dict(dendrite.state_dict())
    with torch.no_grad():
        for name, parts in values.items():
            target = getattr(module, name)
            value = torch.cat(list(parts), _weight_axis(module, name)) if parts else target
            if value.shape != target.shape:
                raise ValueError(f"{name} has shape {tuple(value.shape)}, {tuple(target.shape)} is needed")
            target.copy_(value)


def _weight_axis(module, name):
    return _PRODUCTS[_base(module)][2] if name == "dendrite_weight" else 0


def remove_dendrites(module) -> nn.Module:
    """Take the dendrites off a module, in place; what stays is the module as it was before `add_dendrites`."""
    base = _base(module)
    for name in ("dendrite_weight", "dendrite_bias", "dendrite_to_dendrite", "dendrite_to_output", "dendrites"):
        if hasattr(module, name):
            delattr(module, name)
    del module.num_dendrites, module.dendrite_dim, module.dendrite_activation
    module.__class__ = base
    return module


def split_dendrites(layer) -> tuple[list[nn.Module], list[torch.Tensor], torch.Tensor]:
    """Copies of the dendrites as modules of the layer's own class, of c and of a: the reverse of `set_dendrites`."""
    count = layer.num_dendrites
    to_output = layer.dendrite_to_output.detach().clone()
    rows = layer.dendrite_to_dendrite.detach().clone().split(tuple(range(count)))
    if not can_fuse(layer):
        return [copy.deepcopy(dendrite) for dendrite in layer.dendrites], list(rows), to_output
    plain, dendrites = remove_dendrites(copy.deepcopy(layer)), []
    for i in range(count):
        dendrite = copy.deepcopy(plain)
        for name in ("weight", "bias"):
            if (own := getattr(dendrite, name)) is not None:
                part = getattr(layer, f"dendrite_{name}").detach().chunk(count, _weight_axis(layer, f"dendrite_{name}"))
                setattr(dendrite, name, nn.Parameter(part[i].clone(), requires_grad=own.requires_grad))
        dendrites.append(dendrite)
    return dendrites, list(rows), to_output


def join(model, name, norm) -> nn.Module:
    """Make one block, an `nn.Sequential`, of a module and the normalisation that follows it, in place of the module.

    An `nn.Identity` takes the place of the normalisation, so that the code of the model computes the same.

    Args:
        name (`str`): Of the module.
        norm (`str`): Name of the normalisation, without that of their common parent.

    ValueError where there are no such modules.
    """
    parent, _, own = name.rpartition(".")
    parent = model.get_submodule(parent)
    children = dict(parent.named_children())
    if own not in children or norm not in children or own == norm:
        raise ValueError(f"There are no modules {own!r} and {norm!r} to join")
    block = nn.Sequential(children[own], children[norm])
    block.joined_norm = norm
    setattr(parent, own, block)
    setattr(parent, norm, nn.Identity())
    return block


def separate(model, name) -> None:
    """The reverse of `join`, for a block without dendrites."""
    parent, _, own = name.rpartition(".")
    parent, block = model.get_submodule(parent), model.get_submodule(name)
    setattr(parent, own, block[0])
    setattr(parent, block.joined_norm, block[1])


# ------------------------------------------------------------------------------------------------ saving and loading


class DendriteConfig(QuantizationConfigMixin):
    """What config.json says of the dendrites, under "quantization_config".

    Args:
        layers (`dict`): Name of a module: its number of dendrites, or `{"dendrites": , "dim": , "neurons": }` for a
            module that is not `can_fuse`; "norm" too where the module was joined with the normalisation of that name.
        activation (`str`): A name in `ACTIVATIONS`.
        weights (`str`): The file of the weights, or their index.
        format (`int`): Version of this layout.

    ValueError where one is not understood.
    """

    dequantize = True  # transformers then takes the marks of quantisation off the loaded model: Trainer trains it

    def __init__(self, layers=None, activation="sigmoid", weights=WEIGHTS, format=FORMAT, **unknown):
        if not isinstance(format, int) or format > FORMAT:
            raise ValueError(
                f"The dendrites were saved in format {format!r} by a newer version; this one knows up to {FORMAT}. "
                "Upgrade perforated_trainer"
            )
        plain = isinstance(weights, str) and weights == PurePosixPath(weights).name == PureWindowsPath(weights).name
        if not plain or not weights.endswith((".safetensors", ".safetensors.index.json")):
            raise ValueError(f"`weights` must name a safetensors file in the folder of the model, not {weights!r}")
        if not isinstance(layers, dict) or not layers:
            raise ValueError(f"`layers` must name the modules with dendrites, got {layers!r}")
        self.quant_method, self.format = METHOD, format
        self.layers, self.activation, self.weights = layers, activation, weights

    def arguments(self, name) -> dict:
        """Arguments of `add_dendrites` for a module."""
        value = self.layers[name]
        value = value if isinstance(value, dict) else {"dendrites": value}
        return {
            "num_dendrites": value.get("dendrites"),
            "dim": value.get("dim"),
            "neurons": value.get("neurons"),
            "activation": self.activation,
        }


class DendriteQuantizer(HfQuantizer):
    """Gives a model its dendrites before `from_pretrained` loads the weights, and checks that they are complete."""

    requires_calibration = True  # a model without dendrites does not get them here

    def update_attn_implementation(self, config):
        """Name the file of the weights. In transformers 5.23 this is the hook that sees the config before files are
        looked for."""
        config.transformers_weights = self.quantization_config.weights
        return config

    update_tp_plan = update_attn_implementation  # the same hook, as transformers 5.5 calls it

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        prefix = f"{model.base_model_prefix}."
        for name in self.quantization_config.layers:
            modules = dict(model.named_modules())  # a block before may have brought copies of its layers
            # As transformers does with weights: the body of a model is found in the model and on its own.
            names = [n for n in (name, name.removeprefix(prefix), prefix + name) if n in modules]
            if not names:
                raise ValueError(f"config.json gives dendrites to {name!r}, which {type(model).__name__} does not have")
            try:
                value, module = self.quantization_config.layers[name], modules[names[0]]
                if isinstance(value, dict) and "norm" in value:
                    module = join(model, names[0], value["norm"])
                add_dendrites(module, **self.quantization_config.arguments(name))
            except ValueError as error:
                raise ValueError(f"config.json, dendrites of {name!r}: {error}") from None
        self._shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        if checkpoint_files:
            self._check(model, _read_shapes(checkpoint_files), prefix)

    def _check(self, model, saved, prefix):
        """transformers only warns of missing weights and makes random ones."""
        expected = set(_dendrite_names(model))
        known = {name.removeprefix(prefix) for name in self._shapes}
        saved = {name.removeprefix(prefix): shape for name, shape in saved.items()}
        wrong = [f"{name} is missing" for name in sorted(expected) if name.removeprefix(prefix) not in saved]
        for name in sorted(saved):
            if name not in known and any(part.startswith(("dendrite_", "dendrites")) for part in name.split(".")):
                wrong.append(f"{name} is not expected")
        for name in sorted(expected):
            shape = saved.get(name.removeprefix(prefix), self._shapes[name])
            if shape != self._shapes[name]:
                wrong.append(f"{name} has shape {shape}, {self._shapes[name]} is needed")
        if wrong:
            more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise ValueError(f"The weights do not fit the dendrites in config.json: {', '.join(wrong[:3])}{more}")

    def _process_model_after_weight_loading(self, model, **kwargs):
        # transformers 5.5 does not compare shapes where there is a quantizer.
        for name, value in model.state_dict().items():
            if tuple(value.shape) != self._shapes.get(name, tuple(value.shape)):
                raise ValueError(f"{name} was saved with shape {tuple(value.shape)}, {self._shapes[name]} is needed")
        if hasattr(model.config, "transformers_weights"):
            del model.config.transformers_weights  # this folder's alone, another one loaded with the config has its own
        return make_dendritic(model)

    def is_serializable(self):
        return True

    @property
    def is_trainable(self):
        return True


def _read_shapes(files):
    """Shape of each tensor in files of weights. OSError where one is missing, ValueError where one is damaged."""
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


def layers_with_dendrites(model) -> dict[str, nn.Module]:
    """The modules of a model that have dendrites, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(type(module), "dendrite_base") and hasattr(module, "num_dendrites")
    }


def _dendrite_names(model):
    for name, module in layers_with_dendrites(model).items():
        for own in module.state_dict():
            if own.startswith(("dendrite_", "dendrites.")):
                yield f"{name}.{own}" if name else own


def _config(model, weights=WEIGHTS):
    layers, activations = {}, set()
    for name, module in layers_with_dendrites(model).items():
        count, neurons = module.dendrite_to_output.shape
        layers[name] = (
            count if can_fuse(module) else {"dendrites": count, "dim": module.dendrite_dim, "neurons": neurons}
        )
        if (norm := getattr(module, "joined_norm", None)) is not None:
            layers[name]["norm"] = norm
        activations.add(module.dendrite_activation)
    if len(activations) > 1:
        raise ValueError(
            f"All dendrites of a model need one activation to be saved, not {', '.join(sorted(activations))}"
        )
    return DendriteConfig(layers, activations.pop(), weights)


class _Model(_Reduced):
    """A model whose `save_pretrained` writes what `from_pretrained` above reads."""

    def save_pretrained(self, save_directory, *args, push_to_hub=False, variant=None, **kwargs):
        """As in transformers. A model with dendrites is saved under one name only, so `variant` is not read."""
        if not layers_with_dendrites(self):
            return super().save_pretrained(save_directory, *args, push_to_hub=push_to_hub, variant=variant, **kwargs)
        names = "repo_id", "commit_message", "create_pr", "private", "revision", "token"
        hub = {name: kwargs.pop(name) for name in names if name in kwargs}
        folder, writes = Path(save_directory), kwargs.get("is_main_process", args[0] if args else True)
        self.config.quantization_config = _config(self)
        try:
            # The names in the file are those of the modules, so that they can be checked before they are loaded.
            kwargs |= {"variant": VARIANT, "save_original_format": False}
            super().save_pretrained(save_directory, *args, **kwargs)
            if writes and folder.is_dir():
                stale = {INDEX, *_STOCK_NAMES}  # of another model, or of this one before it got dendrites
                if (folder / _VARIANT_INDEX).exists():
                    os.replace(folder / _VARIANT_INDEX, folder / INDEX)
                    self.config.quantization_config = _config(self, INDEX)
                    self.config.save_pretrained(save_directory)
                    stale = {WEIGHTS, *_STOCK_NAMES}
                for name in stale:
                    (folder / name).unlink(missing_ok=True)
                if f"{CODE}." in str(
                    getattr(self.config, "auto_map", "")
                ):  # code that came with the model goes with it
                    (folder / f"{CODE}.py").write_bytes(Path(__file__).read_bytes())
        finally:
            del self.config.quantization_config
        if push_to_hub:  # only now are all files as they should be
            shards = {"max_shard_size": kwargs["max_shard_size"]} if "max_shard_size" in kwargs else {}
            self.push_to_hub(hub.pop("repo_id", folder.name), **shards, **hub)


def make_dendritic(model) -> nn.Module:
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
