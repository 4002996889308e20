"""Artificial dendrites of Perforated AI for any Hugging Face model, on the stock Trainer.

Importing it lets `from_pretrained` load models with dendrites, which needs no perforatedai. The names for training are
imported when they are first asked for.
"""

import sys
from importlib import import_module

from . import layers as layers  # its import teaches transformers to load models with dendrites

__version__ = "0.1.0"

_ROOMS = {
    "arguments": ["DendriteArguments", "PerforatedError"],
    "convert": ["perforate"],
    "trainer": ["PerforatedSeq2SeqTrainer", "PerforatedTrainer"],
    "_compat": ["ignore_shared_tensors"],
    "cli": ["already_finished", "main_process", "parse_arguments", "run_script"],
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names}
__all__ = sorted([*_HOME, "load_perforated_model"])


def load_perforated_model(model_class, folder):
    """Load a model with dendrites: another name for `model_class.from_pretrained(folder)`.

    Args:
        model_class: a class of models, or an Auto class such as `AutoModelForImageClassification`.
        folder: `final/` of a run, any of its checkpoints, or what `save_model` wrote.
    """
    return model_class.from_pretrained(folder)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    except ModuleNotFoundError as error:
        if error.name != "perforatedai":
            raise
        raise ImportError(
            f"{name} needs perforatedai, which is for Python 3.11 and 3.12 on Linux; this is Python "
            f"{sys.version.split()[0]}. Loading a model with dendrites does not need it"
        ) from None


def __dir__():
    return [*__all__, "__version__", "layers"]
