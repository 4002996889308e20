"""Blocks that hold layers with dendrites: PyTorch's fast path around such layers, which would leave their dendrites
out, and a convolution that is joined with its normalization so that both get dendrites together.

A copy of this file is saved next to models as custom code.
"""

import torch
from torch import nn

from .layers import layers_with_dendrites


def compute_in_full(model: nn.Module) -> None:
    """Switch off PyTorch's fast path in encoder layers that hold dendrites, and on again if none remain.

    It reads weights and calls no layer. `nn.TransformerEncoderLayer` takes it in evaluation only, so training would not
    show that dendrites are left out.
    """
    for module in model.modules():
        is_off = "fast_path_before" in vars(module)
        if not isinstance(module, nn.TransformerEncoderLayer) or bool(layers_with_dendrites(module)) == is_off:
            continue
        if is_off:
            module.activation_relu_or_gelu = module.fast_path_before
            del module.fast_path_before
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key in [key for key, hook in hooks.items() if hook in (_to_padded, _to_nested)]:
                    del hooks[key]
        else:  # torch reads the attribute to choose the path; the other path does not read it
            module.fast_path_before, module.activation_relu_or_gelu = module.activation_relu_or_gelu, 0
            module.register_forward_pre_hook(_to_padded, with_kwargs=True)
            module.register_forward_hook(_to_nested, with_kwargs=True)


def _to_padded(module, args, kwargs):
    """nn.TransformerEncoder passes nested tensors in evaluation with a padding mask, which only the fast path takes."""
    if not (args and args[0].is_nested):
        return None
    padded, lengths = args[0].to_padded_tensor(0.0), [len(row) for row in args[0].unbind()]
    mask = (torch.arange(padded.shape[1]) >= torch.tensor(lengths).unsqueeze(1)).to(padded.device)
    mask.lengths = lengths
    return (padded, *args[1:]), kwargs | {"src_key_padding_mask": mask}


def _to_nested(module, args, kwargs, output):
    if not (lengths := getattr(kwargs.get("src_key_padding_mask"), "lengths", None)):
        return output
    return torch.nested.as_nested_tensor([row[:length] for row, length in zip(output, lengths)])  # noqa: B905


def join(model: nn.Module, name: str, norm: str) -> nn.Module:
    """Make one block, an `nn.Sequential`, of a module and the normalization that follows it, in place of the module.

    An `nn.Identity` takes the place of the normalization, so that the code of the model computes the same.

    Args:
        model (`nn.Module`): The model.
        name (`str`): Of the module.
        norm (`str`): Name of the normalization, without that of their common parent.

    Raises:
        ValueError: If there are no such modules.
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


def separate(model: nn.Module, name: str) -> None:
    """The reverse of `join`, for a block without dendrites."""
    parent, _, own = name.rpartition(".")
    parent, block = model.get_submodule(parent), model.get_submodule(name)
    setattr(parent, own, block[0])
    setattr(parent, block.joined_norm, block[1])
