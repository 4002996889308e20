"""The folder of a run: acquired by one run at a time, with its model in `final/` and its results.

The folder of a run has a `run.json`. Nothing outside the folder is written or deleted, no link is followed, and in the
folder only what a run wrote is deleted.
"""

import json
import os
import re
import shlex
import uuid
from collections.abc import Iterator
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from . import checkpoint
from .arguments import PerforatedError

RUN = "run.json"  # marks the folder of a run
FINAL = "final"
STAGING = f"{FINAL}.unfinished"
RESULTS = "results.json"
LIBRARY = "perforatedai"  # the library's save name, so the folder of its files
# A model has one or more of these, and does not load without: they are moved into `final/` last.
CONFIGS = ("config.json", "adapter_config.json", "dendrites.json")

_LIBRARY_FILE = re.compile(
    r"best_model\.(pt|safetensors|[0-9])[\w.]*|switch_[\w.-]+\.pt|perforatedai[\w. -]*\.(png|csv|json)"
    rf"|{checkpoint.TEMPORARY}"
)
_TEMPORARY = re.compile(checkpoint.TEMPORARY)


def plot_path(folder: Path) -> Path:
    """The plot of a run."""
    return folder / f"{folder.resolve().name}.png"


# ----------------------------------------------------------------------------------------------------------- acquiring


def _has_run(folder: Path) -> bool:
    return checkpoint.is_file(folder / RUN)


def _place(from_command_line: bool) -> str:
    return "--output_dir or --save_name" if from_command_line else "output_dir"


def _holds_run(folder: Path, from_command_line: bool) -> PerforatedError:
    resume, overwrite = "trainer.train(resume_from_checkpoint=True)", "DendriteArguments(overwrite_run=True)"
    if from_command_line:
        resume, overwrite = "--resume_from_checkpoint true", "--overwrite_run"
    return PerforatedError(
        f"{folder} already holds a run: continue it, or load it if it is finished, with {resume}, replace it with "
        f"{overwrite}, or choose another {_place(from_command_line)}"
    )


def _refuse_links(folder: Path) -> None:
    """Raise PerforatedError if `folder` is no folder, or a link in it stands where the run writes."""
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise PerforatedError(f"{folder} is not a folder: choose another output_dir")
    for path in (folder / name for name in (RUN, FINAL, STAGING, LIBRARY)):
        if os.path.islink(path):
            raise PerforatedError(f"{path} is a link, the run writes there and follows none: move it away")


def _check_place(folder: Path, control_of: str | None) -> None:
    """Raise PerforatedError if nothing may be written in `folder`, whatever it holds."""
    _refuse_links(folder)
    if control_of and os.path.realpath(control_of) == os.path.realpath(folder):
        raise PerforatedError(f"{folder} is the run to compare with, and is not replaced: choose another output_dir")


def _is_empty(folder: Path) -> bool:
    try:
        return not os.path.isdir(folder) or not any(folder.iterdir())
    except OSError as error:
        raise PerforatedError(f"{folder} cannot be read: {error.strerror or error}") from None


def check_free(
    folder: Path,
    overwrite: bool = False,
    own: bool = False,
    control_of: str | None = None,
    from_command_line: bool = False,
) -> bool:
    """Check that `folder` is free for a new run. Writes nothing.

    Args:
        folder (`Path`): The folder of the run. It need not exist.
        overwrite (`bool`): Whether a run in it may be replaced.
        own (`bool`): Whether what is in it was written by this process, such as scores before the training.
        control_of (`str`, *optional*): Folder of the run that this run is the baseline of. It is never replaced.
        from_command_line (`bool`): Whether messages name flags, or what to write in Python.

    Returns:
        `bool`: Whether there is a run to be replaced.

    Raises:
        PerforatedError: If the folder is not free.
    """
    _check_place(folder, control_of)
    if _is_empty(folder):
        return False
    if not _has_run(folder):
        if own:
            return False
        raise PerforatedError(f"{folder} is not empty and holds no run: choose another {_place(from_command_line)}")
    if not overwrite:
        raise _holds_run(folder, from_command_line)
    _refuse_foreign_model(folder)
    return True


def _check_resumable(folder: Path, own: bool, control_of: str | None) -> bool:
    """As `check_free`, for a run that is resumed in `folder`. Returns whether there is a record to keep."""
    _check_place(folder, control_of)
    if not (_has_run(folder) or own or _is_empty(folder) or checkpoint.complete_checkpoints(folder)):
        raise PerforatedError(f"{folder} is not empty and holds no run to resume: choose another output_dir")
    _refuse_foreign_model(folder)
    return _has_run(folder)


def _refuse_foreign_model(folder: Path) -> None:
    """Raise PerforatedError at the start of a run if its model could not be moved into `final/` at its end."""
    if any(os.path.lexists(folder / FINAL / name) for name in {*CONFIGS} - {*_final_names(folder)}):
        raise PerforatedError(f"{folder / FINAL} is not of this run, or of an older version's: move it away")


def acquire(
    folder: Path,
    command: str,
    overwrite: bool = False,
    resumed: bool = False,
    own: bool = False,
    control_of: str | None = None,
    from_command_line: bool = False,
) -> None:
    """Make `folder` the folder of this run. Every process calls this, and all raise if it fails in one.

    Args:
        folder (`Path`): The folder of the run. It is created if it does not exist.
        command (`str`): How the run was started, from `redact`, for the record.
        overwrite (`bool`): Whether a run in it may be replaced. It is deleted once all processes see the folder.
        resumed (`bool`): Whether the run in the folder is continued.
        own, control_of, from_command_line: As for `check_free`.

    Raises:
        PerforatedError: If the folder is not free, another run acquires it at the same time, or it is not the same
            folder for all processes.
    """
    process, error, before = PartialState(), None, None
    token = broadcast_object_list([uuid.uuid4().hex])[0]  # by which the other processes recognize the folder
    record = {"command": command, "token": token}
    if process.is_main_process:
        try:
            if resumed:
                is_there = _check_resumable(folder, own, control_of)
            else:
                is_there = check_free(folder, overwrite, own, control_of, from_command_line)
            folder.mkdir(parents=True, exist_ok=True)
            before = _record(folder) if is_there else None
            if not is_there:
                _create_record(folder, from_command_line)
            _write_record(folder, (before or {}) | record)
        except (PerforatedError, OSError) as caught:
            error = f"{caught}"
    if error := broadcast_object_list([error])[0]:  # a barrier, too
        raise PerforatedError(error)
    seen = _record(folder).get("token") == token
    is_first = broadcast_object_list([seen])[0]
    if not all(gather_object([seen])):
        if process.is_main_process and is_first:  # leave the folder as it was
            if before is None:
                (folder / RUN).unlink(missing_ok=True)
            else:
                _write_record(folder, before)
        if not is_first:
            raise PerforatedError(f"another run started in {folder} at the same time: choose another output_dir")
        raise PerforatedError(
            f"{folder} is not the same folder for all processes: on several machines, --output_dir must be on a disk "
            "that they share"
        )
    if process.is_main_process and before is not None and not resumed:
        try:
            _remove_run(folder)
            _write_record(folder, record)
        except (PerforatedError, OSError) as caught:
            error = f"the run in {folder} cannot be replaced: {caught}"
    if error := broadcast_object_list([error])[0]:
        raise PerforatedError(error)


def _create_record(folder: Path, from_command_line: bool) -> None:
    """Create `run.json`. Of several runs that start in one folder at the same time, one succeeds."""
    try:
        (folder / RUN).touch(exist_ok=False)
    except FileExistsError:
        raise _holds_run(folder, from_command_line) from None


def _record(folder: Path) -> dict:
    """What `run.json` says: how the run was started, and the files of its model in `final/`."""
    try:
        return checkpoint.read_json(folder / RUN)
    except PerforatedError:
        return {}


def _final_names(folder: Path) -> list[str]:
    """Names of the files that the run wrote into `final/`. Others than safe names are left out."""
    names = _record(folder).get(FINAL)
    return [name for name in names if checkpoint.is_safe_name(name)] if isinstance(names, list) else []


def _write_record(folder: Path, record: dict) -> None:
    checkpoint.write_whole(folder / RUN, json.dumps(record) + "\n")


def _remove_run(folder: Path) -> None:
    """Delete what a run wrote into its folder, and nothing else. `run.json` stays until it is replaced."""
    _refuse_links(folder)
    for path in checkpoint.checkpoint_folders(folder):
        checkpoint.discard(path)
    _remove_staging(folder)
    _remove_final(folder)
    library = folder / LIBRARY
    if checkpoint.is_folder(library):
        checkpoint.remove(library, _files_named(library, _LIBRARY_FILE))
        checkpoint.remove_if_empty(library)
    checkpoint.remove(folder, [RESULTS, plot_path(folder).name, *_files_named(folder, _TEMPORARY)])


def _files_named(folder: Path, pattern: re.Pattern) -> Iterator[str]:
    return (path.name for path in folder.iterdir() if pattern.fullmatch(path.name) and checkpoint.is_file(path))


# ----------------------------------------------------------------------------------------------------------- the model


def _remove_final(folder: Path) -> None:
    """Delete the model in `final/`. Other files and folders in it stay."""
    if names := _final_names(folder):
        checkpoint.remove(folder / FINAL, names)
        checkpoint.remove_if_empty(folder / FINAL)


def _remove_staging(folder: Path) -> None:
    """Delete what a killed run left of a model that was being written."""
    staging = folder / STAGING
    if checkpoint.is_written_by_a_run(staging):
        checkpoint.remove(staging, ["README.md"])  # the card, which a checkpoint has not
        checkpoint.discard(staging)


def stage(folder: Path) -> Path:
    """Create the folder in which the model is written before `export` moves it into `final/`.

    Args:
        folder (`Path`): The folder of the run.

    Returns:
        `Path`: The new folder.

    Raises:
        PerforatedError: If it is a link or a file, or has files that no run wrote.
    """
    _remove_staging(folder)
    checkpoint.begin(folder / STAGING)
    return folder / STAGING


def export(staging: Path, folder: Path) -> None:
    """Move a model into `final/`, and delete the one that the run wrote there before. Other files there stay.

    Args:
        staging (`Path`): The folder of the model, from `stage`.
        folder (`Path`): The folder of the run.

    Raises:
        PerforatedError: If `final` is a link, or a file of the same name is there that the run did not write.
    """
    _refuse_links(folder)
    final, recorded = folder / FINAL, set(_final_names(folder))
    paths = sorted(checkpoint.files_of(staging), key=lambda path: path.name in CONFIGS)
    names = [path.relative_to(staging).as_posix() for path in paths]
    for name in names:
        path = checkpoint.locate(final, name)
        if path is None or (name not in recorded and os.path.lexists(path)):
            raise PerforatedError(f"{final / name} was not written by this run: move it away, the model goes there")
    _remove_final(folder)
    _write_record(folder, _record(folder) | {FINAL: names})  # first: a half moved model is known as the run's
    for path, name in zip(paths, names, strict=True):
        (final / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, final / name)
    checkpoint.remove(staging, names)  # folders that are now empty
    checkpoint.discard(staging)


# --------------------------------------------------------------------------------------------------------- the results


def _is_number(value) -> bool:
    return type(value) in (int, float)


def _is_cycle(value) -> bool:
    return (
        isinstance(value, dict)
        and all(checkpoint.is_count(value.get(name)) for name in ("dendrites", "parameters"))
        and _is_number(value.get("best_validation"))
    )


def _are_settings(value) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("control_of", 0), (str, type(None)))
        and isinstance(value.get("doing_pai"), bool)
    )


def _is_final(value) -> bool:
    return isinstance(value, dict) and all(checkpoint.is_count(value.get(name)) for name in ("dendrites", "parameters"))


_VALID = {
    "settings": _are_settings,
    "restarts": lambda value: isinstance(value, list) and all(map(checkpoint.is_count, value)),
    "global_step": checkpoint.is_count,
    "cycles": lambda value: isinstance(value, list) and all(map(_is_cycle, value)),
    "final": _is_final,
    "metric": lambda value: isinstance(value, str),
    "command": lambda value: isinstance(value, str),
    "testing_dendrite_capacity": lambda value: isinstance(value, bool),
}


def results_of(folder: Path, from_command_line: bool = False) -> dict:
    """Read the results of a finished run with dendrites, to train its baseline.

    Args:
        folder (`Path`): The folder of the run.
        from_command_line (`bool`): Whether messages name flags, or what to write in Python.

    Returns:
        `dict`: What `results.json` holds. What a baseline needs of it is validated.

    Raises:
        PerforatedError: If `folder` is something else, or its results are damaged.
    """
    flag = f"--control_of {folder}" if from_command_line else f"control_of={str(folder)!r}"
    if not _has_run(folder):
        raise PerforatedError(f"{flag}: there is no run in this folder")
    names = _final_names(folder)
    if not (os.path.lexists(folder / RESULTS) and names and all((folder / FINAL / name).is_file() for name in names)):
        resume = "--resume_from_checkpoint true" if from_command_line else "trainer.train(resume_from_checkpoint=True)"
        raise PerforatedError(f"{flag}: this run is not complete; continue it first with {resume}")
    results = checkpoint.read_json(folder / RESULTS)
    for name, is_valid in _VALID.items():
        if not is_valid(results.get(name)):
            raise PerforatedError(f"{flag}: its {RESULTS} is damaged, it has no valid entry {name!r}")
    unit = results["metric"].removeprefix("eval_")
    for name in (f"test_{unit}", f"validation_{unit}"):
        if name in results["final"] and not _is_number(results["final"][name]):
            raise PerforatedError(f"{flag}: its {RESULTS} is damaged, {name!r} is not a number")
    settings = results["settings"]
    if settings["control_of"]:
        raise PerforatedError(f"{flag}: this is itself a control, of {settings['control_of']}: name that run")
    if not settings["doing_pai"] or results["testing_dendrite_capacity"]:
        raise PerforatedError(f"{flag}: this run was not trained with dendrites, there is nothing to compare")
    return results


# --------------------------------------------------------------------------------------------------------- the command

_SECRETS = {"token", "key", "password", "secret", "credential", "credentials"}
_FLAG = re.compile(r"--?[A-Za-z]")
_ASSIGNMENT = re.compile(r"[+~]*[\w.-]+")  # the left side of name=value


def _is_secret(name: str) -> bool:
    """Whether a flag, or the start of one that stands for it, has a value that is secret."""
    name = name.lstrip("-+~").lower().replace("-", "_")
    is_short = len(name) >= len("hub_t") and "hub_token".startswith(name)  # argparse accepts unique beginnings
    return is_short or bool(_SECRETS & set(re.split("[_.]", name)))


def redact(argv: list[str]) -> str:
    """Return a command line without its secrets, for records and messages.

    Args:
        argv (`list[str]`): The command and its arguments.

    Returns:
        `str`: The command, quoted for a shell. `***` replaces the values of flags such as `--hub_token` and
        `--api_key`, tokens of the Hub, and names and passwords in addresses.
    """
    hidden, redacted = False, []
    for argument in argv:
        name, equals, _ = argument.partition("=")
        if _FLAG.match(argument) or (equals and not hidden and _ASSIGNMENT.fullmatch(name)):
            hidden = _is_secret(name)
            if hidden and equals:
                argument, hidden = f"{name}=***", False
        elif hidden:
            argument = "***"
        argument = re.sub(r"hf_[A-Za-z0-9]{20,}", "***", argument)
        redacted.append(re.sub(r"(?<=://)[^/@\s]+@", "***@", argument))
    return shlex.join(redacted)
