"""Layers with dendrites, in plain PyTorch: how a layer gets, keeps and loses its dendrites. `formula` computes them.

A layer stays the layer that it is: its class becomes a subclass of what it was, in place, with more parameters. A copy
of this file is saved next to models as custom code.
"""

from __future__ import annotations

import copy
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from .formula import ACTIVATIONS, Recomputed, combine, second_factors, split_equally

# Above this many weights, by type of device, the dendrites of a layer are separate products: one large product saves
# nothing there and its gradient is one large copy more. Measured with benchmarks/gpu.py; other devices as a CPU.
FUSED_UP_TO = {"cpu": 2**16, "cuda": 2**20}
# Above this many values the only dendrite of a layer, if of low rank, is computed again in the backward pass. Below it
# autograd keeps it: these are fewer operations, and the time to start them counts more than memory there.
RECOMPUTED_ABOVE = {"cpu": 2**16, "cuda": 2**20}


# Class: dimension of the neurons in the output, counted from the end (a batch may be missing), and in the weight.
_AXES = {nn.Linear: (-1, 0), nn.Conv1d: (-2, 0), nn.Conv2d: (-3, 0), nn.Conv3d: (-4, 0), Conv1D: (-1, 1)}
_AFTER_THE_FIRST_FACTOR = "up", "bias", "to_dendrite", "to_output"
_CONVOLVE = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


def base_class(module: nn.Module) -> type:
    """The class of a module without its dendrites and parametrizations.

    It is read from the class itself, so that two copies of this file in one process agree.
    """
    cls = type(module)
    if parametrize.is_parametrized(module):
        cls = cls.__bases__[0]  # `Parametrized...` is made by torch for this one module
    return getattr(cls, "dendrite_base", cls)


def can_fuse(module: nn.Module) -> bool:
    """Whether all dendrites of a module are stacked into one weight, and computed as one product unless large.

    True for exact types only, because a subclass may compute something else.
    """
    return base_class(module) in _AXES and getattr(module, "padding_mode", "zeros") == "zeros"


def _product(layer, x, weight, bias):
    """The product of a layer's class, with another weight."""
    base = base_class(layer)
    if base is nn.Linear:
        return F.linear(x, weight, bias)
    if base is Conv1D:
        return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[1])
    return _CONVOLVE[base](x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)


# --------------------------------------------------------------------------------------------- classes with dendrites


class _Reduced:
    """Pickle and deepcopy for classes made here, which pickle cannot find by their name."""

    dendrite_base: type

    def __reduce_ex__(self, protocol):
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__  # Python 3.10 has none
        return _new, (self._dendrite_mixin, self.dendrite_base), state


def _new(mixin, base):
    return (cls := dendrite_class(mixin, base)).__new__(cls)


class _Layer(_Reduced):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        sums = self._sums(output, *args, **kwargs)
        activation = ACTIVATIONS[self.dendrite_activation]
        return combine(output, sums, self.dendrite_to_dendrite, self.dendrite_to_output, activation, self.dendrite_dim)

    def extra_repr(self):
        rank = getattr(self, "dendrite_rank", None)
        parts = [super().extra_repr(), f"num_dendrites={self.num_dendrites}", rank and f"dendrite_rank={rank}"]
        return ", ".join(filter(None, parts))


class _Fused(_Layer):
    """Dendrites of full rank, stacked along the dimension of the neurons."""

    def forward(self, *args, **kwargs):
        base = base_class(self)
        if base not in _CONVOLVE or not self._in_one_product():
            return super().forward(*args, **kwargs)
        # A convolution of few channels takes as long as one of some more, so its own channels are computed with those
        # of its dendrites, bitwise identical.
        x = args[0] if args else next(iter(kwargs.values()))
        bias = None if self.bias is None else torch.cat([self.bias, self.dendrite_bias])
        outputs = _product(self, x, torch.cat([self.weight, self.dendrite_weight]), bias)
        output, *sums = outputs.chunk(self.num_dendrites + 1, self.dendrite_dim)
        activation = ACTIVATIONS[self.dendrite_activation]
        return combine(output, sums, self.dendrite_to_dendrite, self.dendrite_to_output, activation, self.dendrite_dim)

    def _in_one_product(self):
        device = self.dendrite_weight.device.type
        limit = FUSED_UP_TO[device if device in FUSED_UP_TO else "cpu"]
        return getattr(self, "groups", 1) == 1 and self.dendrite_weight.numel() <= limit * self.num_dendrites

    def _sums(self, output, input):
        number, axis = self.num_dendrites, _AXES[base_class(self)][1]
        if self._in_one_product():
            sums = _product(self, input, self.dendrite_weight, getattr(self, "dendrite_bias", None))
            return sums.chunk(number, self.dendrite_dim)
        weights, biases = split_equally(self.dendrite_weight, number, axis), [None] * number
        if hasattr(self, "dendrite_bias"):
            biases = split_equally(self.dendrite_bias, number, 0)
        return [_product(self, input, weight, bias) for weight, bias in zip(weights, biases)]  # noqa: B905


class _LowRank(_Layer):
    """Dendrites of low rank: the first factors of all are one product, the second ones are n thin ones.

    The layer itself is called as it is, so it may be of another class, such as a quantized one.
    """

    def forward(self, *args, **kwargs):
        output = super(_Layer, self).forward(*args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()))
        if x.is_meta or not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.dendrite_down.dtype)
        activation, base = ACTIVATIONS[self.dendrite_activation], self._dendrite_kind
        up, bias, between, to_output = (getattr(self, f"dendrite_{name}") for name in _AFTER_THE_FIRST_FACTOR)
        if base not in _CONVOLVE and self._is_recomputed(x, output):
            # Transposed, (n r, rows): all products with thin matrices, those of the backward pass too, are then fast.
            hidden = torch.mm(self.dendrite_down, x.reshape(-1, x.shape[-1]).t())
            own = [value.to(output.dtype) for value in (up, bias, between, to_output)]
            try:
                return Recomputed.apply(activation, output, hidden, *own)
            except RuntimeError as error:  # under a transform of torch.func
                if "setup_context" not in str(error):
                    raise
        if base in _CONVOLVE:
            hidden = _CONVOLVE[base](x, self.dendrite_down, None, self.stride, self.padding, self.dilation)
        else:
            hidden = F.linear(x, self.dendrite_down)
        sums = second_factors(hidden, up, bias, output.dtype, self.dendrite_dim)
        return combine(output, sums, between, to_output, activation, self.dendrite_dim)

    def _is_recomputed(self, x, output):
        kind = output.device.type
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or output.is_meta:
            return False
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        limit = RECOMPUTED_ABOVE[kind if kind in RECOMPUTED_ABOVE else "cpu"]
        return dtype == output.dtype and (self.num_dendrites > 1 or output.numel() > limit)


class _Module(_Layer):
    """Dendrites of any other module: copies of it."""

    def _sums(self, output, *args, **kwargs):
        return [dendrite(*args, **kwargs) for dendrite in self.dendrites]


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

    def _sums(self, output, x):
        return super()._sums(output, x)


_FUSED = {
    cls.dendrite_base: cls for cls in (DendriteLinear, DendriteConv1d, DendriteConv2d, DendriteConv3d, DendriteConv1D)
}


@cache
def dendrite_class(mixin: type, base: type) -> type:
    """The one class that adds `mixin` (how it computes, or how it is saved) to `base`."""
    if mixin is _Fused:
        return _FUSED[base]
    names = {"dendrite_base": base, "_dendrite_mixin": mixin, "__module__": base.__module__, "__doc__": base.__doc__}
    if mixin is _LowRank:
        names["_dendrite_kind"] = _kind(base)
    if issubclass(mixin, _Layer):
        return type(f"Dendrite{base.__name__}", (mixin, base), names)
    return type(base.__name__, (mixin, base), names | {"__qualname__": base.__qualname__})


def _kind(base):
    """The class in `_AXES` that a class is or is made from: quantized layers are subclasses of nn.Linear."""
    return next((kind for kind in _AXES if issubclass(base, kind)), None)


def kind_of_low_rank(module: nn.Module) -> str | None:
    """Name of the class of which a module computes the product, perhaps quantized; None if it has no low rank."""
    base, weight = base_class(module), getattr(module, "weight", None)
    kind = _kind(base)
    # A subclass with another `forward` may compute something else, unless it is there because its weight is quantized.
    is_same = kind and (base.forward is kind.forward or base.__name__ == "FalconLinear")  # that rounds elsewhere
    is_plain = type(weight) in (torch.Tensor, nn.Parameter) and weight.is_floating_point() and weight.itemsize > 1
    return kind.__name__ if is_same or (kind and not is_plain) else None


def _set_class(module, mixin):
    base = type(module)
    if not parametrize.is_parametrized(module):
        module.__class__ = dendrite_class(mixin, base)
        return rebind_forward(module)
    # torch expects the class below its own one to be what it parametrizes.
    below = dendrite_class(mixin, base.__bases__[0])
    names = {name: value for name, value in vars(base).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(base.__name__, (below,), names)
    rebind_forward(module)


def rebind_forward(module: nn.Module) -> None:
    """After a change of a module's class, let a hook of accelerate, as `device_map` adds it, call the new `forward`."""
    if "_old_forward" in vars(module):
        module._old_forward = type(module).forward.__get__(module)


def forward_is_replaced(module: nn.Module) -> bool:
    """Whether a module has a `forward` of its own, which would not call that of its class with dendrites."""
    old = getattr(vars(module).get("_old_forward"), "__func__", None)  # where accelerate keeps the replaced one
    return "forward" in vars(module) and old is not type(module).forward


# ------------------------------------------------------------------------------------------ dendrites come and go


def has_dendrites(module: nn.Module) -> bool:
    """Whether a module is a layer with dendrites."""
    return isinstance(getattr(type(module), "dendrite_base", None), type) and "num_dendrites" in vars(module)


def is_of_dendrite(name: str) -> bool:
    """Whether a module or parameter of that name belongs to a dendrite. `perforate` refuses other such names."""
    return any(part.startswith("dendrite") for part in name.split("."))


def layers_with_dendrites(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model that have dendrites, by name."""
    return {name: module for name, module in model.named_modules() if has_dendrites(module)}


def rank_limit(module: nn.Module) -> int:
    """The smaller side of a layer's weight as a matrix, inputs of a neuron by neurons: a rank must be below it.

    Raises:
        ValueError: For a module that cannot have dendrites of low rank.
    """
    kind = kind_of_low_rank(module) and _kind(base_class(module))
    if kind is nn.Linear:
        sizes = module.in_features, module.out_features
    elif kind is Conv1D:
        sizes = module.nx, module.nf
    elif kind in _CONVOLVE and module.groups == 1 and module.padding_mode == "zeros":
        inputs = module.in_channels
        for size in module.kernel_size:
            inputs *= size
        sizes = inputs, module.out_channels
    else:
        raise ValueError(f"a {type(module).__name__} cannot have dendrites of low rank")
    return min(sizes)


def _shapes(module, number, neurons, rank):
    """For each parameter of `number` dendrites: its shape, and the axis along which dendrites are stacked."""
    shapes = {
        "dendrite_to_dendrite": ((number * (number - 1) // 2, neurons), 0),
        "dendrite_to_output": ((number, neurons), 0),
    }
    base = base_class(module)
    if rank:
        kind = _kind(base)
        if kind in _CONVOLVE:
            inputs = (module.in_channels, *module.kernel_size)
        else:
            inputs = (module.nx,) if kind is Conv1D else (module.in_features,)
        shapes["dendrite_down"] = (number * rank, *inputs), 0
        shapes["dendrite_up"] = (number, rank, neurons), 0
        shapes["dendrite_bias"] = (number, neurons), 0
    elif can_fuse(module):
        axis, shape = _AXES[base][1], list(module.weight.shape)
        shape[axis] *= number
        shapes["dendrite_weight"] = shape, axis
        if module.bias is not None:
            shapes["dendrite_bias"] = (number * neurons,), 0
    return shapes


def add_dendrites(
    module: nn.Module,
    num_dendrites: int,
    dim: int | None = None,
    activation: str = "sigmoid",
    neurons: int | None = None,
    rank: int | None = None,
) -> nn.Module:
    """Give a module its first dendrites, all values zero, in place: its class becomes a subclass of what it was.

    Args:
        module (`nn.Module`): Its own parameters keep their names. With `rank` it gets `dendrite_down` (the A of all),
            `dendrite_up` (n, rank, neurons) and `dendrite_bias` (n, neurons); else, if `can_fuse`, `dendrite_weight`
            and `dendrite_bias`, those of all dendrites along the dimension of the neurons; else `dendrites`, copies of
            it. All get `dendrite_to_dendrite` (n (n - 1) / 2, neurons), the c_ij row by row, and `dendrite_to_output`
            (n, neurons).
        num_dendrites (`int`): 0 leaves the module as it is.
        dim, neurons (`int`): Dimension of the neurons in the output, counted from the end, and how many there are.
            Read only if the module is not `can_fuse`.
        activation (`str`): A name in `ACTIVATIONS`.
        rank (`int`, *optional*): Of the dendrites' weights. Full rank by default.

    Raises:
        ValueError: If an argument is missing or wrong, or the module has dendrites already.
    """
    base, kind = base_class(module), _kind(base_class(module))
    if activation not in ACTIVATIONS:
        raise ValueError(f"Unknown dendrite activation {activation!r}; known are {', '.join(ACTIVATIONS)}")
    for name, value, least in (("num_dendrites", num_dendrites, 0), ("rank", 1 if rank is None else rank, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")
    if has_dendrites(module):
        raise ValueError(f"This {base.__name__} has dendrites already")
    if not num_dendrites:
        return module
    mixin = _Fused
    if rank:
        smallest = rank_limit(module)
        if rank >= smallest:
            raise ValueError(f"rank {rank} is not below the smaller side of the layer, {smallest}")
        mixin, dim = _LowRank, _AXES[kind][0]
        neurons = module.nf if kind is Conv1D else getattr(module, "out_features", getattr(module, "out_channels", 0))
    elif can_fuse(module):
        dim, axis = _AXES[base]
        neurons = module.weight.shape[axis]
    else:
        if not (isinstance(dim, int) and dim < 0 and isinstance(neurons, int) and neurons > 0):
            raise ValueError(f"A {base.__name__} needs `dim`, negative, and `neurons`; got {dim!r} and {neurons!r}")
        if hasattr(module, "dendrites"):
            raise ValueError(f"This {base.__name__} has an attribute `dendrites` of its own")
        mixin = _Sequence if issubclass(base, nn.Sequential) else _Module
        copies = nn.ModuleList(_trained_copy(module) for _ in range(num_dendrites))
        module.dendrites = copies
    like = next((p for p in module.parameters() if p.is_floating_point()), None)
    if like is None:  # quantized: as it computes
        device = next((p.device for p in module.parameters()), None)
        like = torch.empty(0, dtype=getattr(module, "compute_dtype", None), device=device)
    for name, (shape, _) in _shapes(module, num_dendrites, neurons, rank).items():
        value = torch.zeros(shape, dtype=like.dtype, device=like.device)
        # An empty one gets no gradient, which DistributedDataParallel would wait for.
        module.register_parameter(name, nn.Parameter(value, requires_grad=0 not in shape))
    module.num_dendrites, module.dendrite_dim, module.dendrite_activation = num_dendrites, dim, activation
    if rank:
        module.dendrite_rank = rank
    _set_class(module, mixin)
    return module


def plain_copy(module: nn.Module) -> nn.Module:
    """A copy of a module without a user's hooks; those by which torch computes a weight stay."""
    # A weight that an old hook of torch has computed is no leaf, which deepcopy refuses.
    computed = (value for part in module.modules() for value in vars(part).values() if isinstance(value, torch.Tensor))
    duplicate = copy.deepcopy(module, {id(value): value.detach().clone() for value in computed if not value.is_leaf})
    for part in duplicate.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks):
            for key, hook in list(hooks.items()):
                if not type(hook).__module__.startswith("torch.nn.utils"):
                    del hooks[key]
    return duplicate


def _trained_copy(module):
    """A copy of a block that is trained also if the block is frozen."""
    duplicate = plain_copy(module)
    for parameter in duplicate.parameters():
        parameter.requires_grad_(parameter.is_floating_point() and parameter.numel() > 0)
    return duplicate


def resize_dendrites(module: nn.Module, num_dendrites: int) -> None:
    """Give a layer with dendrites more or fewer, in place: the first ones keep their values, new ones are zero."""
    if not num_dendrites:
        remove_dendrites(module)
        return
    before, neurons = module.num_dendrites, module.dendrite_to_output.shape[1]
    shapes = _shapes(module, num_dendrites, neurons, getattr(module, "dendrite_rank", None))
    for name, (shape, axis) in shapes.items():
        old = getattr(module, name)
        new = torch.zeros(shape, dtype=old.dtype, device=old.device)
        size = min(old.shape[axis], new.shape[axis])
        new.narrow(axis, 0, size).copy_(old.detach().narrow(axis, 0, size))
        trained = old.requires_grad if old.numel() else module.dendrite_to_output.requires_grad
        setattr(module, name, nn.Parameter(new, requires_grad=trained and 0 not in shape))
    if hasattr(module, "dendrites"):
        kept = list(module.dendrites)[:num_dendrites]
        kept += [_trained_copy(kept[0]) for _ in range(num_dendrites - before)]
        module.dendrites = nn.ModuleList(kept)
    module.num_dendrites = num_dendrites


@torch.no_grad()
def set_dendrite(module: nn.Module, index: int, weights: dict, to_dendrite=None, to_output=None) -> None:
    """Set the values of one dendrite of a layer.

    Args:
        module (`nn.Module`): A layer with dendrites.
        index (`int`): Of the dendrite.
        weights (`dict`): The dendrite's own parameters: those of a layer of this class (`weight`, `bias`); of one with
            a rank `down`, `up` and `bias`; of another module its state dict.
        to_dendrite (tensor (index, neurons), *optional*): Its c, the weights of the dendrites before it.
        to_output (tensor (neurons,), *optional*): Its a.
    """
    if hasattr(module, "dendrites"):
        module.dendrites[index].load_state_dict(weights)
    else:
        for name, value in weights.items():
            target = getattr(module, f"dendrite_{name}")
            axis = _AXES[base_class(module)][1] if name == "weight" else 0
            if name in ("up", "bias") and hasattr(module, "dendrite_up"):
                target[index].copy_(value)
            else:
                split_equally(target, module.num_dendrites, axis)[index].copy_(value)
    if to_dendrite is not None and index:
        start = index * (index - 1) // 2
        module.dendrite_to_dendrite[start : start + index].copy_(to_dendrite)
    if to_output is not None:
        module.dendrite_to_output[index].copy_(to_output)


def remove_dendrites(module: nn.Module) -> nn.Module:
    """Take the dendrites off a module, in place; what stays is the module as it was before `add_dendrites`."""
    for name in ("weight", "bias", "down", "up", "to_dendrite", "to_output"):
        if hasattr(module, f"dendrite_{name}"):
            delattr(module, f"dendrite_{name}")
    for name in ("dendrites", "num_dendrites", "dendrite_dim", "dendrite_activation", "dendrite_rank"):
        if hasattr(module, name):
            delattr(module, name)
    if parametrize.is_parametrized(module):
        cls, below = type(module), base_class(module)
        names = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
        module.__class__ = type(cls.__name__, (below,), names)
    else:
        module.__class__ = base_class(module)
    rebind_forward(module)
    return module
