"""A model's modules and parameters, looked up once a cycle: the Trainer visits all of them several times a step.

For a network this small the visits are a tenth of a step (`benchmarks/throughput.py`). Within a cycle modules and
parameters stay what they are, as the optimizer needs them to.
"""

import contextlib
import types
from collections.abc import Iterator

from torch import nn

_NAMES = ("parameters", "train", "known_parameters", "known_modules")


def _parameters(self, recurse=True):
    return iter(self.known_parameters) if recurse else type(self).parameters(self, recurse)


def _train(self, mode=True):
    """As the method of the model's class, which visits each module; that only where one is in the other mode."""
    return self if all(module.training is mode for module in self.known_modules) else type(self).train(self, mode)


def take(model: nn.Module) -> None:
    """Make `parameters()`, and so `zero_grad()` and clipping, and `train()` quick until `drop`."""
    drop(model)
    # Not by setattr, which would register them; methods bound to the model, so that a copy of it gets its own.
    model.__dict__.update(known_parameters=list(model.parameters()), known_modules=list(model.modules()))
    model.__dict__.update(parameters=types.MethodType(_parameters, model), train=types.MethodType(_train, model))


def drop(model: nn.Module) -> bool:
    """Give a model the methods of its class again; returns whether it had the quick ones."""
    had = "parameters" in model.__dict__
    for name in _NAMES:
        model.__dict__.pop(name, None)
    return had


@contextlib.contextmanager
def without(model: nn.Module) -> Iterator[None]:
    """For a `with` block in which the model is copied or gets other modules."""
    had = drop(model)
    try:
        yield
    finally:
        if had:
            take(model)
