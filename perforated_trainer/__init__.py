"""Artificial dendrites of Perforated AI for Hugging Face models, on the stock Trainer.

Importing it lets `from_pretrained` load models with dendrites, which needs no perforatedai. The names for training are
imported when they are first used.
"""

import sys
from importlib import import_module

from . import loading as loading  # its import makes transformers load models with dendrites
from .loading import load_dendrites as load_dendrites
from .modules import load_module

__version__ = "0.2.0"

_NAMES = {
    "arguments": ["DendriteArguments", "PerforatedError"],
    "convert": ["perforate"],
    "trainer": ["PerforatedSeq2SeqTrainer", "PerforatedTrainer"],
    "_compat": ["ignore_shared_tensors"],
    "cli": ["already_finished", "main_process", "parse_arguments", "run_script"],
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}
__all__ = sorted([*_MODULE_OF, "load_dendrites", "load_perforated_model"])


def load_perforated_model(model, folder):
    """Load a model with dendrites.

    Args:
        model: A class of models or an Auto class, for `model.from_pretrained(folder)`; or a new `torch.nn.Module`
            without dendrites, for one that is not a `PreTrainedModel`.
        folder (`str` or `Path`): `final/` of a run, any of its checkpoints, or what `save_model` wrote.

    Returns:
        The model, in evaluation mode.
    """
    return model.from_pretrained(folder) if isinstance(model, type) else load_module(model, folder)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    except ModuleNotFoundError as error:
        if error.name != "perforatedai":
            raise
        raise ImportError(
            f"{name} needs perforatedai, which is for Python 3.11 and 3.12 on Linux; this is Python "
            f"{sys.version.split()[0]}. Loading a model with dendrites does not need it"
        ) from None


def __dir__():
    return [*__all__, "__version__", "loading"]
