"""The network as the library makes it: its layers while they are trained, opened for a restructure and closed again.

Written for perforatedai 3.2.9. `tests/test_compat.py` fails when a private name that is used here changes.
"""

import contextlib
import io
import pdb
import sys
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers.utils import logging

from . import layers
from ._compat import shared_tensors_ignored
from .arguments import PerforatedError

# The paid package would change the training unseen where it can be imported, and asks for an e-mail address.
PERFORATEDBP = "perforatedbp" not in sys.modules and find_spec("perforatedbp") is not None
sys.modules.setdefault("perforatedbp", None)

with contextlib.redirect_stdout(io.StringIO()):  # the package prints which variant it is when it is imported
    from perforatedai import globals_perforatedai as GPA
    from perforatedai import modules_perforatedai as MPA
    from perforatedai import utils_perforatedai as UPA

logger = logging.get_logger(__name__)


def _stop(*args, **kwargs):
    raise SystemExit


def refuse_other_variant() -> None:
    """Raise PerforatedError where the paid package is installed."""
    if PERFORATEDBP:
        raise PerforatedError(
            "the package perforatedbp is installed: it would change the training and is not supported here; use an "
            "environment without it"
        )


@contextlib.contextmanager
def library(folder: Path) -> Iterator[None]:
    """Around calls into perforatedai, which writes below the current folder. Where it prints an error and opens a
    debugger or exits, that becomes a PerforatedError."""
    heard, set_trace = io.StringIO(), pdb.set_trace
    pdb.set_trace = _stop
    try:
        with contextlib.chdir(folder), contextlib.redirect_stdout(heard), shared_tensors_ignored():
            yield
    except SystemExit:
        raise PerforatedError(
            f"perforatedai stopped: {heard.getvalue()[-2000:].strip() or 'no reason given'}"
        ) from None
    finally:
        pdb.set_trace = set_trace
        logger.debug(heard.getvalue())


# ----------------------------------------------------------------------------------------- a layer while it is trained

_librarys_forward = MPA.PAINeuronModule.forward


def _forward(self, *args, **kwargs):
    """The library's layer with dendrites, by our formula where `layers` can do what it does, else by the library's."""
    if (parts := self.__dict__.get("parts")) is None:
        output = _librarys_forward(self, *args, **kwargs)
    else:
        main, dendrites, to_dendrites, to_output, how = parts
        if dendrites:
            output = layers.forward_with_dendrites(main, dendrites, to_dendrites, to_output, *args, **how, **kwargs)
        else:
            output = main(*args, **kwargs)
        if not self._fb_init_done and isinstance(output, torch.Tensor) and output.requires_grad:
            self._fb_hook_handle = output.register_hook(partial(_first_gradient, self))
    if (check := self.__dict__.get("check_output")) is not None:
        del self.__dict__["check_output"]
        check(self, output)
    return output


def _first_gradient(module, gradient):
    """The library learns the number of neurons from the first gradient of a layer."""
    _filter_backward(gradient, module.dendrite_module.dendrite_values, module)


def _filter_backward(gradient, values, module=None):
    with library(Path.cwd()):
        _librarys_filter_backward(gradient, values, module)


_librarys_filter_backward = MPA.filter_backward
MPA.filter_backward = _filter_backward
MPA.PAINeuronModule.forward = _forward

# What is not needed while training: of a layer, and of its dendrites.
_ORDER = ("main_module", "dendrites_to_top", "candidate_to_top", "dendrite_module")
_DENDRITE_ORDER = ("layers", "parent_module", "dendrites_to_candidates", "dendrites_to_dendrites", "dendrite_values")
_WITHOUT_DENDRITES = ("dendrites_to_top", "candidate_to_top", "dendrite_module")
_WITH_DENDRITES = ("candidate_to_top",)
_OF_DENDRITES = ("parent_module", "dendrites_to_candidates", "dendrite_values")


def dendrites_of(module) -> tuple[list, list, torch.Tensor | None]:
    """The dendrites of a layer, the weights between them (a row for each but the first) and those to its output."""
    number = module.dendrite_modules_added
    if not number:
        return [], [], None
    between = list(module.dendrite_module.dendrites_to_dendrites)[1:]
    return list(module.dendrite_module.layers), [None, *between], module.dendrites_to_top[number - 1]


def grow(module, dendrites: list, to_dendrites: list, to_output: torch.Tensor) -> None:
    """Give a layer of the library dendrites that were trained before."""
    shape = [1] * len(module.this_output_dimensions)
    shape[int(module.this_node_index)] = to_output.shape[1]
    module.dendrite_module.dendrite_values[0].setup_arrays(shape)
    UPA.simulate_cycles(module, 2 * len(dendrites), doing_pai=True)
    own, own_to_dendrites, own_to_output = dendrites_of(module)
    with torch.no_grad():
        for mine, theirs in zip(own, dendrites, strict=True):
            mine.load_state_dict(theirs.state_dict())
        for mine, theirs in zip(own_to_dendrites[1:], to_dendrites[1:], strict=True):
            mine.copy_(theirs)
        own_to_output.copy_(to_output)


def _unregister(module: torch.nn.Module, names: tuple[str, ...]) -> None:
    for name in names:
        if name in module._modules:
            module.__dict__[name] = module._modules.pop(name)


def _register(module: torch.nn.Module, order: tuple[str, ...]) -> None:
    for name in order:
        if name in module.__dict__:
            module._modules[name] = module.__dict__.pop(name)
    for name in order:  # in the library's order, which is that of the parameters
        if name in module._modules:
            module._modules[name] = module._modules.pop(name)


def close_layers(modules: list, fused: bool) -> None:
    """Leave in layers of the library what a training step needs; by our formula, where `fused`."""
    activation = GPA.pc.get_pai_forward_function()
    for module in modules:
        dendrites, number = module.dendrite_module, module.dendrite_modules_added
        module.__dict__["parts"] = None
        # A template for new dendrites, whose numbers are drawn anew: it needs no memory of its own.
        for template, own in zip(dendrites.parent_module.parameters(), module.main_module.parameters(), strict=True):
            template.data = own.data
        if fused and module.processor is None and not dendrites.processors:
            dimensions = module.this_output_dimensions.tolist()
            how = {"dim": dimensions.index(0) - len(dimensions), "activation": activation}
            module.__dict__["parts"] = (module.main_module, *dendrites_of(module), how)
        for empty in (p for p in module.parameters() if not p.numel()):
            empty.requires_grad_(False)  # no gradient reaches it, and DistributedDataParallel would wait for one
        _unregister(dendrites, _OF_DENDRITES)
        _unregister(module, _WITH_DENDRITES if number else _WITHOUT_DENDRITES)


def open_layers(modules: list) -> None:
    """Make layers of the library again as it made them, for calls into it."""
    for module in modules:
        _register(module, _ORDER)
        _register(module.dendrite_module, _DENDRITE_ORDER)
        module.__dict__.pop("parts", None)
