"""The folder of a run: claimed by one run at a time, and the place of its model and results.

A run folder holds `run.json`. Nothing here deletes what a run did not write.
"""

import json
import uuid
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from . import checkpoint
from .arguments import PerforatedError

RUN = "run.json"  # marks the folder of a run
FINAL = "final"
RESULTS = "results.json"
LIBRARY = "perforatedai"  # the library's save name, so the folder of its files


def check_free(folder: Path, overwrite: bool, own: bool = False) -> None:
    """Raise PerforatedError where `folder` is not free for a new run. Writes nothing.

    Args:
        folder: the run folder; it need not exist.
        overwrite: whether a run that is there may be replaced.
        own: whether what lies there was written by this process, such as scores before the training.
    """
    if own and not (folder / RUN).is_file():
        return
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / RUN).is_file():
        raise PerforatedError(f"{folder} is not empty and holds no run: choose another --output_dir or --save_name")
    if not overwrite:
        raise PerforatedError(
            f"{folder} already holds a run: --resume_from_checkpoint true goes on with it, --overwrite_run replaces "
            "it, another --output_dir or --save_name keeps both"
        )
    if FINAL not in _record(folder) and (folder / FINAL).is_dir() and any((folder / FINAL).iterdir()):
        raise PerforatedError(f"{folder / FINAL} is not of this run, or of an older version's: move it away")


def claim(folder: Path, command: str, overwrite: bool = False, resumed: bool = False, own: bool = False) -> None:
    """Make `folder` the folder of this run. Each of several processes calls this; all see whether it went well.

    Args:
        folder: the run folder; made where it is not there.
        command: how the run was started, for the record.
        overwrite: whether the run that the folder holds may be replaced. It goes once all processes see the folder.
        resumed: go on with the run that the folder holds.
        own: as for `check_free`.

    Raises PerforatedError where the folder is not free, or is not the same one for all processes.
    """
    process, error, before = PartialState(), None, None
    token = broadcast_object_list([uuid.uuid4().hex])[0]  # by it the others know the folder
    if process.is_main_process:
        try:
            if not resumed:
                check_free(folder, overwrite, own)
            folder.mkdir(parents=True, exist_ok=True)
            before = _record(folder) if (folder / RUN).is_file() else None
            _write_record(folder, (before or {}) | {"command": command, "token": token})
        except (PerforatedError, OSError) as caught:
            error = f"{caught}"
    process.wait_for_everyone()
    if error := broadcast_object_list([error])[0]:
        raise PerforatedError(error)
    if not all(gather_object([_record(folder).get("token") == token])):
        if process.is_main_process:  # the folder is as it was before
            if before is None:
                (folder / RUN).unlink(missing_ok=True)
            else:
                _write_record(folder, before)
        raise PerforatedError(
            f"{folder} is not the same folder for all processes: on several machines, --output_dir must be on a disk "
            "that they share"
        )
    if before is not None and not resumed:  # in the first process
        _remove_run(folder)
        _write_record(folder, {"command": command, "token": token})
    process.wait_for_everyone()


def _record(folder: Path) -> dict:
    """What `run.json` says: how the run was started, and the files of its model in `final/`."""
    try:
        return json.loads((folder / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _write_record(folder: Path, record: dict) -> None:
    checkpoint.write_whole(folder / RUN, json.dumps(record) + "\n")


def results_of(folder: Path) -> dict:
    """What `results.json` holds of a finished run with dendrites. PerforatedError where `folder` is something else."""
    flag = f"--control_of {folder}"
    if not (folder / RUN).is_file():
        raise PerforatedError(f"{flag}: there is no run in this folder")
    if not (folder / RESULTS).is_file() or not (folder / FINAL / "config.json").is_file():
        raise PerforatedError(f"{flag}: this run is not complete; go on with it first, --resume_from_checkpoint true")
    try:
        results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        settings, _ = results["settings"], results["restarts"]
        control_of, doing_pai = settings["control_of"], settings["doing_pai"]
    except (ValueError, KeyError):
        raise PerforatedError(f"{flag}: its {RESULTS} has no settings and restarts, or cannot be read") from None
    if control_of:
        raise PerforatedError(f"{flag}: this is itself a control, of {control_of}: name that run")
    if not doing_pai or results["testing_dendrite_capacity"]:
        raise PerforatedError(f"{flag}: this run was not trained with dendrites, there is nothing to compare")
    return results


def _remove_run(folder: Path) -> None:
    """Delete what a run wrote into its folder, and nothing else."""
    for path in [*folder.glob("checkpoint-*"), folder / f"{FINAL}.unfinished"]:
        if checkpoint.is_written_by_a_run(path):
            checkpoint.discard(path)
    _remove_final(folder)
    for pattern in ("best_model.*", "switch_*.pt", "perforatedai_*"):  # the library's networks, pictures and tables
        for path in (folder / LIBRARY).glob(pattern):
            path.unlink()
    _remove_if_empty(folder / LIBRARY)
    for name in (RESULTS, RUN, f"{folder.resolve().name}.png"):
        (folder / name).unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------- the model


def _remove_final(folder: Path) -> None:
    """Delete the model in `final/`. Other files that lie there stay."""
    final = folder / FINAL
    for name in _record(folder).get(FINAL, []):
        (final / name).unlink(missing_ok=True)
    for path in sorted(final.rglob("*"), reverse=True):
        _remove_if_empty(path)
    _remove_if_empty(final)


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def publish(unfinished: Path, folder: Path) -> None:
    """Move a model into `final/`, in place of the one that the run wrote there before. Other files there stay.

    Args:
        unfinished: the folder of the model, made by `checkpoint.begin`.
        folder: the run folder.

    Raises PerforatedError where a file of the same name is there that the run did not write.
    """
    final = folder / FINAL
    # The configuration comes last: without it, a half moved model does not load.
    paths = sorted(checkpoint.files_of(unfinished), key=lambda path: path.name == "config.json")
    names = [path.relative_to(unfinished).as_posix() for path in paths]
    if foreign := [name for name in names if name not in _record(folder).get(FINAL, []) and (final / name).exists()]:
        raise PerforatedError(f"{final / foreign[0]} was not written by this run: move it away, the model goes there")
    _remove_final(folder)
    _write_record(folder, _record(folder) | {FINAL: names})  # first: what is half moved is known as the run's
    for path, name in zip(paths, names, strict=True):
        (final / name).parent.mkdir(parents=True, exist_ok=True)
        path.replace(final / name)
    checkpoint.discard(unfinished)
