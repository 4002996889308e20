"""The folder of a run: acquired by one run at a time, with its model in `final/` and its results.

The folder of a run has a `run.json`. Nothing outside the folder is written or deleted, no link is followed, and in the
folder only what a run wrote is deleted.
"""

import json
import os
import re
import shlex
import uuid
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from . import checkpoint
from .arguments import PerforatedError

RUN = "run.json"  # marks the folder of a run
FINAL = "final"
STAGING = f"{FINAL}.unfinished"
RESULTS = "results.json"
LIBRARY = "perforatedai"  # the save name of perforatedai, so the folder of its files
# A model has one or more of these, and does not load without: they are moved into `final/` last.
CONFIGS = ("config.json", "adapter_config.json", "dendrites.json")

_LIBRARY_FILE = (
    r"best_model\.(pt|safetensors|[0-9])[\w.]*|switch_[\w.-]+\.pt|perforatedai[\w. -]*\.(png|csv|json)"
    rf"|{checkpoint.TEMPORARY}"
)


def plot_path(folder: Path) -> Path:
    """The plot of a run."""
    return folder / f"{folder.resolve().name}.png"


def _holds_run(folder: Path, from_command_line: bool) -> PerforatedError:
    resume, overwrite = "trainer.train(resume_from_checkpoint=True)", "DendriteArguments(overwrite_run=True)"
    if from_command_line:
        resume, overwrite = "--resume_from_checkpoint true", "--overwrite_run"
    return PerforatedError(
        f"{folder} already holds a run: continue it, or load it if it is finished, with {resume}, replace it with "
        f"{overwrite}, or choose another {'--output_dir or --save_name' if from_command_line else 'output_dir'}"
    )


def check_free(
    folder: Path,
    overwrite: bool = False,
    resumed: bool = False,
    own: bool = False,
    control_of: str | None = None,
    from_command_line: bool = False,
) -> bool:
    """Check that a run may start in `folder`. Writes nothing.

    Args:
        folder (`Path`): The folder of the run. It need not exist.
        overwrite (`bool`): Whether a run in it may be replaced.
        resumed (`bool`): Whether the run in it is continued.
        own (`bool`): Whether what is in it was written by this process, such as scores before the training.
        control_of (`str`, *optional*): Folder of the run that this run is the baseline of. It is never replaced.
        from_command_line (`bool`): Whether messages name flags, or what to write in Python.

    Returns:
        `bool`: Whether there is a run in it.

    Raises:
        PerforatedError: If the run may not start there.
    """
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise PerforatedError(f"{folder} is not a folder: choose another output_dir")
    if control_of and os.path.realpath(control_of) == os.path.realpath(folder):
        raise PerforatedError(f"{folder} is the run to compare with, and is not replaced: choose another output_dir")
    _refuse_links(folder)
    try:
        is_empty = not os.path.isdir(folder) or not any(folder.iterdir())
    except OSError as error:
        raise PerforatedError(f"{folder} cannot be read: {error.strerror or error}") from None
    has_run = checkpoint.is_file(folder / RUN)
    if not (has_run or is_empty or own or (resumed and checkpoint.complete_checkpoints(folder))):
        place = "--output_dir or --save_name" if from_command_line else "output_dir"
        raise PerforatedError(f"{folder} is not empty and holds no run: choose another {place}")
    if has_run and not (resumed or overwrite):
        raise _holds_run(folder, from_command_line)
    if any(os.path.lexists(folder / FINAL / name) for name in {*CONFIGS} - {*_final_names(folder)}):
        # Said at the start, not when the model cannot be moved there at the end.
        raise PerforatedError(f"{folder / FINAL} is not of this run, or of an older version's: move it away")
    return has_run


def _refuse_links(folder: Path) -> None:
    """Raise PerforatedError if something that the run writes is a link."""
    for path in (folder / name for name in (RUN, FINAL, STAGING, LIBRARY)):
        if os.path.islink(path):
            raise PerforatedError(f"{path} is a link, the run writes there and follows none: move it away")


def release(folder: Path) -> None:
    """Give back the folder of a run that has ended before its first step, if nothing else is in it."""
    if PartialState().is_main_process and folder.is_dir() and [path.name for path in folder.iterdir()] == [RUN]:
        (folder / RUN).unlink()
        folder.rmdir()


def acquire(folder: Path, command: str, overwrite: bool = False, resumed: bool = False, **how) -> None:
    """Make `folder` the folder of this run. Every process calls this, and all raise if it fails in one.

    Args:
        folder (`Path`): The folder of the run. It is created if it does not exist.
        command (`str`): How the run was started, from `redact`, for the record.
        overwrite, resumed, how: As for `check_free`. A run is only replaced once all processes see the folder.

    Raises:
        PerforatedError: Also if another run starts there, or if it is not the same folder for all processes.
    """
    main, error, before = PartialState().is_main_process, None, None
    record = {"command": command, "token": broadcast_object_list([uuid.uuid4().hex])[0]}  # other processes look for it
    if main:
        try:
            has_run = check_free(folder, overwrite, resumed, **how)
            folder.mkdir(parents=True, exist_ok=True)
            if not has_run:
                (folder / RUN).touch(exist_ok=False)  # of several runs that start here at the same time, one succeeds
            before = _record(folder) if has_run else None
            _write_record(folder, (before or {}) | record)
        except FileExistsError:
            error = str(_holds_run(folder, how.get("from_command_line", False)))
        except (PerforatedError, OSError) as caught:
            error = str(caught)
    _raise_in_all(error)
    seen = _record(folder).get("token") == record["token"]
    if not all(gather_object([seen])):
        if main and seen and before is not None:  # leave the folder as it was
            _write_record(folder, before)
        elif main and seen:
            (folder / RUN).unlink()
        raise PerforatedError(
            f"{folder} is not the same folder for all processes, or another run started there at the same time: on "
            "several machines, --output_dir must be on a disk that they share"
        )
    if main and before is not None and not resumed:
        try:
            _remove_run(folder)
            _write_record(folder, record)
        except (PerforatedError, OSError) as caught:
            error = f"the run in {folder} cannot be replaced: {caught}"
    _raise_in_all(error)


def _raise_in_all(error: str | None) -> None:
    """Wait for all processes, and raise the error of the first one in each."""
    if error := broadcast_object_list([error])[0]:
        raise PerforatedError(error)


def _record(folder: Path) -> dict:
    """What `run.json` says: how the run was started, and the files of its model in `final/`."""
    return checkpoint.read_record(folder / RUN)


def _write_record(folder: Path, record: dict) -> None:
    checkpoint.write_whole(folder / RUN, json.dumps(record) + "\n")


def _final_names(folder: Path) -> list:
    """Names of the files that the run wrote into `final/`, as `run.json` has them."""
    names = _record(folder).get(FINAL)
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _remove_run(folder: Path) -> None:
    """Delete what a run wrote into its folder, and nothing else. `run.json` stays until it is replaced."""
    for path in checkpoint.checkpoint_folders(folder):
        checkpoint.discard(path)
    _remove_staging(folder)
    checkpoint.remove(folder / FINAL, _final_names(folder))
    checkpoint.remove(folder / LIBRARY, _files_named(folder / LIBRARY, _LIBRARY_FILE))
    for name in (FINAL, LIBRARY):
        checkpoint.remove_if_empty(folder / name)
    checkpoint.remove(folder, [RESULTS, plot_path(folder).name, *_files_named(folder, checkpoint.TEMPORARY)])


def _files_named(folder: Path, pattern: str) -> list[str]:
    paths = folder.iterdir() if checkpoint.is_folder(folder) else ()
    return [path.name for path in paths if re.fullmatch(pattern, path.name) and checkpoint.is_file(path)]


def _remove_staging(folder: Path) -> None:
    """Delete what a killed run left of a model that was being written."""
    if checkpoint.is_written_by_a_run(folder / STAGING):
        checkpoint.remove(folder / STAGING, ["README.md"])  # the card, which a checkpoint has not
        checkpoint.discard(folder / STAGING)


def stage(folder: Path) -> Path:
    """Create the folder in which the model is written before `export` moves it into `final/`, and return it."""
    _remove_staging(folder)
    checkpoint.begin(folder / STAGING)
    return folder / STAGING


def export(staging: Path, folder: Path) -> None:
    """Move a model from `stage` into `final/`, and delete the one that the run wrote there before.

    Other files there stay. PerforatedError for a link, and for a file of the same name that the run did not write.
    """
    _refuse_links(folder)
    final, recorded = folder / FINAL, _final_names(folder)
    paths = sorted(checkpoint.files_of(staging), key=lambda path: path.name in CONFIGS)
    names = [path.relative_to(staging).as_posix() for path in paths]
    for name in names:
        path = checkpoint.locate(final, name)
        if path is None or (name not in recorded and os.path.lexists(path)):
            raise PerforatedError(f"{final / name} was not written by this run: move it away, the model goes there")
    checkpoint.remove(final, recorded)
    _write_record(folder, _record(folder) | {FINAL: names})  # first: a half moved model is known as the run's
    for path, name in zip(paths, names, strict=True):
        (final / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, final / name)
    checkpoint.remove(staging, names)  # folders that are now empty
    checkpoint.discard(staging)


def _has(*names, **kinds):
    """A test whether a value is a dictionary with counts of these names, and entries of these kinds."""
    return lambda value: (
        isinstance(value, dict)
        and (
            all(checkpoint.is_count(value.get(name)) for name in names)
            and all(type(value.get(name, ())) in kind for name, kind in kinds.items())
        )
    )


_is_cycle = _has("dendrites", "parameters", best_validation=(int, float))
_VALID = {
    "settings": _has(control_of=(str, type(None)), doing_pai=(bool,)),
    "restarts": lambda value: isinstance(value, list) and all(map(checkpoint.is_count, value)),
    "global_step": checkpoint.is_count,
    "cycles": lambda value: isinstance(value, list) and all(map(_is_cycle, value)),
    "final": _has("dendrites", "parameters"),
    "metric": lambda value: isinstance(value, str),
    "command": lambda value: isinstance(value, str),
    "testing_dendrite_capacity": lambda value: isinstance(value, bool),
}


def results_of(folder: Path, from_command_line: bool = False) -> dict:
    """The results of a finished run with dendrites, to train its baseline. What that needs of them is validated.

    Args:
        folder (`Path`): The folder of the run.
        from_command_line (`bool`): Whether messages name flags, or what to write in Python.

    Raises:
        PerforatedError: If `folder` is something else, or its results are damaged.
    """
    flag = f"--control_of {folder}" if from_command_line else f"control_of={str(folder)!r}"
    if not checkpoint.is_file(folder / RUN):
        raise PerforatedError(f"{flag}: there is no run in this folder")
    paths = [checkpoint.locate(folder / FINAL, name) for name in _final_names(folder)]
    if not (paths and all(path and path.is_file() for path in paths) and os.path.lexists(folder / RESULTS)):
        resume = "--resume_from_checkpoint true" if from_command_line else "trainer.train(resume_from_checkpoint=True)"
        raise PerforatedError(
            f"{flag}: this run has no {RESULTS} or no model in {FINAL}/: continue it first with {resume}; then its "
            "script or you call trainer.save_results()"
        )
    results = checkpoint.read_json(folder / RESULTS)
    for name, is_valid in _VALID.items():
        if not is_valid(results.get(name)):
            raise PerforatedError(f"{flag}: its {RESULTS} is damaged, it has no valid entry {name!r}")
    unit = results["metric"].removeprefix("eval_")
    for name in (f"test_{unit}", f"validation_{unit}"):
        if type(results["final"].get(name, 0)) not in (int, float):
            raise PerforatedError(f"{flag}: its {RESULTS} is damaged, {name!r} is not a number")
    settings = results["settings"]
    if settings["control_of"]:
        raise PerforatedError(f"{flag}: this is itself a control, of {settings['control_of']}: name that run")
    if not settings["doing_pai"] or results["testing_dendrite_capacity"]:
        raise PerforatedError(f"{flag}: this run was not trained with dendrites, there is nothing to compare")
    return results


_SECRETS = {"token", "key", "password", "secret", "credential", "credentials"}


def _is_secret(name: str) -> bool:
    """Whether a flag, or the start of one that stands for it, has a value that is secret."""
    name = name.lstrip("-+~").lower().replace("-", "_")
    is_short = len(name) >= len("hub_t") and "hub_token".startswith(name)  # argparse accepts unique beginnings
    return is_short or bool(_SECRETS & set(re.split("[_.]", name)))


def redact(argv: list[str]) -> str:
    """A command line for records and messages, quoted for a shell, without its secrets.

    `***` replaces the values of flags such as `--hub_token` and `--api_key`, tokens of the Hub, and names and passwords
    in addresses.
    """
    hidden, redacted = False, []
    for argument in argv:
        name, equals, _ = argument.partition("=")
        if re.match(r"--?[A-Za-z]", argument) or (equals and not hidden and re.fullmatch(r"[+~]*[\w.-]+", name)):
            hidden = _is_secret(name)
            if hidden and equals:
                argument, hidden = f"{name}=***", False
        elif hidden:
            argument = "***"
        argument = re.sub(r"hf_[A-Za-z0-9]{20,}", "***", argument)
        redacted.append(re.sub(r"(?<=://)[^/@\s]+@", "***@", argument))
    return shlex.join(redacted)
