"""The command line of a training script: its flags, and errors that a user can cause as one line and a status."""

import gc
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.utils import logging

from . import checkpoint, report, run_dir
from .arguments import PerforatedError, is_resumed, refuse_arguments


def main_process() -> bool:
    """Whether this is the only process or the first of several, known before any of them is set up."""
    return os.environ.get("RANK", "0") == "0"


def run_script(run: Callable[[list[str] | None], int], argv: list[str] | None = None) -> int:
    """Return what `run(argv)` does, without the warnings of libraries.

    A PerforatedError becomes one line on standard error and its exit status; another error keeps its traceback.
    `SystemExit` with status 0 (a run that is finished, `--help`) becomes 0.
    """
    warnings.simplefilter("ignore")
    logging.disable_progress_bar()  # of files being written: the only bar is the one of the training
    gc.freeze()  # the Trainer collects garbage before each cycle: a third of a second in what was imported
    try:
        return run(argv)
    except SystemExit as ended:
        if ended.code:
            raise
        return 0
    except PerforatedError as error:
        message, status = str(error), error.exit_status
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    finally:
        gc.unfreeze()  # else native libraries report leaks when Python ends
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if os.environ.get("LOCAL_RANK", "0") == "0":  # one line for each machine
        print(f"{'' if status > 128 else 'error: '}{message}", file=sys.stderr)
    return status


def parse_arguments(
    kinds: Sequence[type], argv: list[str] | None = None, training: dict | None = None, **defaults
) -> tuple:
    """Parse a command line into dataclasses. If the run to be resumed is finished, print its results and exit.

    The folder of the run is `--output_dir`, else `--save_name`; that of a baseline is `<run>-control`.

    Args:
        kinds (`Sequence[type]`): Dataclasses, the last two `DendriteArguments` and `TrainingArguments`. The docstring
            of the first one's module is printed by `--help`.
        argv (`list[str]`, *optional*): The flags; those of the process by default.
        training (`dict`, *optional*): Default values of TrainingArguments. `lr_scheduler_kwargs` is for the default
            `lr_scheduler_type` only.
        defaults: Default values of the other arguments.

    Returns:
        `tuple`: An instance of each of `kinds`.

    Raises:
        PerforatedError: For a flag that is unknown, has no such value or does not go with dendrites, and for a run
            folder that is not free.
        SystemExit: With status 0, if the run to be resumed was ended by its tracker.
    """

    def error(message):
        raise PerforatedError(message)  # one line, not the page of flags

    parser = HfArgumentParser(kinds, description=sys.modules[kinds[0].__module__].__doc__)
    parser.error = error
    parser.set_defaults(output_dir=None, remove_unused_columns=False, **(training or {}), **defaults)
    values = vars(parser.parse_args(argv))
    if values["control_of"]:
        run = Path(values["control_of"])
        if main_process():
            run_dir.results_of(run, from_command_line=True)  # before any data is read
        given = None if values["save_name"] is parser.get_default("save_name") else values["save_name"]
        given = values["output_dir"] or given
        if given is None or Path(given).resolve() == run.resolve():
            values["output_dir"], values["save_name"] = f"{run if run.name else run.resolve()}-control", None
    # "is": a value that was given is a new object, so that also the default's value can be asked for.
    if values["output_dir"] and values["save_name"] is parser.get_default("save_name"):
        values["save_name"] = None
    if values["save_name"] is not None and not re.fullmatch(r"[\w.-]*\w[\w.-]*", values["save_name"]):
        error(f"--save_name {values['save_name']!r}: use letters, digits, '_', '-' and '.', no path separator")
    values["output_dir"] = values["output_dir"] or values["save_name"] or "PAI"
    if values["testing_dendrite_capacity"] and values["eval_steps"] is parser.get_default("eval_steps"):
        values["eval_steps"] = 10
    other_schedule = values["lr_scheduler_type"] != parser.get_default("lr_scheduler_type")
    if other_schedule and values["lr_scheduler_kwargs"] is parser.get_default("lr_scheduler_kwargs"):
        values["lr_scheduler_kwargs"] = None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
        values["use_cpu"] = True  # else the Trainer would take the processes for separate runs
    refuse_arguments(values)  # before TrainingArguments finds other words for it
    if not is_resumed(values["resume_from_checkpoint"]) and main_process():
        folder, run = Path(values["output_dir"]), values["control_of"]
        run_dir.check_free(folder, values["overwrite_run"], control_of=run, from_command_line=True)
    try:
        parsed = parser.parse_dict(values)
    except (ValueError, ImportError, TypeError) as refused:
        error(str(refused).splitlines()[0])
    parsed[-1].from_command_line = True
    if parsed[-1].log_level == "debug":
        warnings.simplefilter("default")
        logging.set_verbosity_debug()
    if already_finished(parsed[-1]):
        raise SystemExit(0)
    return parsed


def already_finished(training_args: TrainingArguments) -> bool:
    """Whether the run that is to be resumed was ended by its tracker; its results are then printed once more."""
    folder = Path(training_args.output_dir)
    if not is_resumed(training_args.resume_from_checkpoint) or not checkpoint.is_file(folder / run_dir.RESULTS):
        return False
    results = checkpoint.read_json(folder / run_dir.RESULTS)
    if results.get("stopped_by") not in ("tracker", "max_steps", "callback"):
        raise PerforatedError(f"{folder / run_dir.RESULTS} is damaged: it has no valid entry 'stopped_by'")
    if results["stopped_by"] == "tracker" and main_process():
        print(f"the run in {folder} is complete")
        print(report.summary(results, folder, from_command_line=True))
    return results["stopped_by"] == "tracker"
