"""Kill the running script when it reaches a named point for the COUNT-th time."""

import os
import re
import signal
import sys

from perforated_trainer import growth, pai, trainer

# Files that are about to be opened for writing, replaced or removed, as Python's audit events name them.
FILES = {
    "in a checkpoint": ("open", r"checkpoint-\d+/trainer_state.json"),
    "before the manifest": ("os.rename", r"checkpoint-\d+/perforated.json"),
    "removing an old checkpoint": ("os.remove", r"checkpoint-\d+/rng_state.pth"),
    "in the final model": ("open", r"final.unfinished/config.json"),
    "before the results": ("os.rename", r"results.json"),
}
# Calls that are about to begin.
CALLS = {
    "making a dendrite": (pai.UPA, "simulate_cycles"),
    "in a restart": (trainer.PerforatedTrainer, "_restart"),
    "restoring the best model": (growth.Growth, "restore_best"),
    "after the last evaluation": (trainer.PerforatedTrainer, "save_results"),
}
LOADING = {"loading a checkpoint": (growth.Growth, "load")}  # if the run is resumed


def arm(point: str, count: int) -> None:
    """SIGKILL this process at the count-th following event or call of that name."""
    seen = 0

    def reached():
        nonlocal seen
        seen += 1
        if seen == count:
            os.kill(os.getpid(), signal.SIGKILL)

    if point in FILES:
        event, pattern = FILES[point]

        def hook(name, arguments):
            if name != event:
                return
            target = arguments[1] if name == "os.rename" else arguments[0]
            writing = name != "open" or (isinstance(arguments[1], str) and "w" in arguments[1])
            if writing and re.search(pattern + "$", str(target)):
                reached()

        sys.addaudithook(hook)
    else:
        owner, name = (CALLS | LOADING)[point]
        original = getattr(owner, name)

        def call(*args, **kwargs):
            reached()
            return original(*args, **kwargs)

        setattr(owner, name, call)
