"""The folder of a run and its checkpoints: claimed, sealed, verified, found, rotated.

A run folder holds `run.json`. A checkpoint counts once its manifest, `perforated.json`, is there: it is written last
and names the SHA-256 of each other file. Nothing here deletes what a run did not write.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from .arguments import PerforatedError

FORMAT = 2  # of a checkpoint; 1 was that of the single file `perforated_trainer.py`
RUN = "run.json"  # marks the folder of a run
MANIFEST = "perforated.json"  # written last: a checkpoint without it is unfinished
FINAL = "final"
RESULTS = "results.json"
LIBRARY = "perforatedai"  # the folder of the library's own files


class _OtherFormat(PerforatedError):
    """A checkpoint of another version: not damaged, so never skipped."""


def digest(path: Path) -> str:
    """The SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all: under another name first."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


# ------------------------------------------------------------------------------------------------------- the run folder


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


def claim(
    folder: Path, command: str, token: str, overwrite: bool = False, resumed: bool = False, own: bool = False
) -> dict | None:
    """Make `folder` the folder of this run; returns the record of the run that it held, if any, for `release`.

    Args:
        folder: the run folder; made where it is not there.
        command: how the run was started, for the record.
        token: unlike that of any other start: other processes see by it that they share the folder.
        overwrite: whether the run that the folder holds may be replaced. It stays until `clear`.
        resumed: go on with the run that the folder holds.
        own: as for `check_free`.

    Raises PerforatedError where the folder is not free.
    """
    if not resumed:
        check_free(folder, overwrite, own)
    folder.mkdir(parents=True, exist_ok=True)
    before = _record(folder) if (folder / RUN).is_file() else None
    _write_record(folder, (before or {}) | {"command": command, "token": token})
    return before


def clear(folder: Path) -> None:
    """Delete what the run before wrote into a claimed folder; files that are not a run's stay."""
    record = _record(folder)
    _remove_run(folder)
    _write_record(folder, {name: record[name] for name in ("command", "token")})


def release(folder: Path, before: dict | None) -> None:
    """Undo `claim` where the run cannot start after all: the folder is as it was before."""
    if before is None:
        (folder / RUN).unlink(missing_ok=True)
    else:
        _write_record(folder, before)


def holds_token(folder: Path, token: str) -> bool:
    """Whether `folder` was claimed with this token, as this process sees it."""
    return _record(folder).get("token") == token


def _record(folder: Path) -> dict:
    """What `run.json` says: how the run was started, and the files of its model in `final/`."""
    try:
        return json.loads((folder / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _write_record(folder: Path, record: dict) -> None:
    write_whole(folder / RUN, json.dumps(record) + "\n")


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
        if _is_written_by_a_run(path):
            discard(path)
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
        unfinished: the folder of the model, made by `begin`.
        folder: the run folder.

    Raises PerforatedError where a file of the same name is there that the run did not write.
    """
    final, mark = folder / FINAL, _mark(unfinished)
    paths = [path for path in unfinished.rglob("*") if path.is_file() and path != mark]
    # The configuration comes last: without it, a half moved model does not load.
    paths.sort(key=lambda path: path.name == "config.json")
    names = [path.relative_to(unfinished).as_posix() for path in paths]
    if foreign := [name for name in names if name not in _record(folder).get(FINAL, []) and (final / name).exists()]:
        raise PerforatedError(f"{final / foreign[0]} was not written by this run: move it away, the model goes there")
    _remove_final(folder)
    _write_record(folder, _record(folder) | {FINAL: names})  # first: what is half moved is known as the run's
    for path, name in zip(paths, names, strict=True):
        (final / name).parent.mkdir(parents=True, exist_ok=True)
        path.replace(final / name)
    discard(unfinished)


# --------------------------------------------------------------------------------------------------------- a checkpoint


def _mark(folder: Path) -> Path:
    """The file by which an unfinished checkpoint is known as a run's. It becomes the manifest."""
    return folder / f"{MANIFEST}.unfinished"


def _is_written_by_a_run(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    return (folder / MANIFEST).is_file() or _mark(folder).is_file() or not any(folder.iterdir())


def begin(folder: Path) -> None:
    """Make the folder of a checkpoint. An older one of this name, such as a run that was killed leaves, is deleted.

    Raises PerforatedError where the folder was not written by a run.
    """
    if folder.exists():
        if not _is_written_by_a_run(folder):
            raise PerforatedError(f"{folder} was not written by a run: move it away, the run writes there")
        discard(folder)
    folder.mkdir(parents=True)
    _mark(folder).touch()


def discard(folder: Path) -> None:
    """Delete a checkpoint. One that is half deleted does not count, and is still known as a run's."""
    if (folder / MANIFEST).is_file():
        (folder / MANIFEST).replace(_mark(folder))
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path != _mark(folder):
            path.unlink()
    shutil.rmtree(folder)


def seal(folder: Path, facts: dict) -> None:
    """Write the manifest: from now on the checkpoint counts.

    Args:
        folder: the checkpoint, all its files written.
        facts: what the trainer wants back from `check`.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != _mark(folder))
    names = {path.relative_to(folder).as_posix(): digest(path) for path in files}
    manifest = {"format": FORMAT, "saved_at": time.time(), **facts, "files": names}
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=1))


def check(folder: Path) -> dict:
    """Return the manifest of a complete and undamaged checkpoint, else raise PerforatedError."""
    if not folder.is_dir():
        raise PerforatedError(f"{folder}: there is no such checkpoint folder")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        written = manifest.get("format", 1)
        if written != FORMAT:
            age = "an older" if written < FORMAT else "a newer"
            raise _OtherFormat(f"{folder} was written by {age} version (format {written}, not {FORMAT}): use that one")
        for name, value in manifest["files"].items():
            if not (folder / name).is_file() or digest(folder / name) != value:
                raise PerforatedError(f"{folder} is damaged: {name} is missing or is not what was written")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise PerforatedError(f"{folder} is unfinished, or no checkpoint of a run with dendrites") from None
    return manifest


def find(resume: str | bool, output_dir: Path, say: Callable[[str], None]) -> Path | None:
    """The checkpoint that `resume` means.

    Args:
        resume: a folder, or True or "true" for the newest complete checkpoint in `output_dir`.
        output_dir: the run folder.
        say: is told in a line of each checkpoint that is skipped, and where none is left.

    Returns None where `resume` is true and there is none. Raises PerforatedError for a named one that is not whole, and
    for any of another version.
    """
    if str(resume).lower() != "true":
        check(Path(resume))
        return Path(resume)
    found = {}
    for folder in sorted(output_dir.glob("checkpoint-*")):
        try:
            found[check(folder)["saved_at"]] = folder
        except _OtherFormat:
            raise
        except PerforatedError as error:
            say(f"warning: skipped: {error}")
    if not found:
        say(f"no complete checkpoint in {output_dir}: starting from the beginning")
    return found[max(found)] if found else None


def rotate(output_dir: Path, limit: int | None) -> None:
    """Delete the oldest complete checkpoints, so that at most `limit` are left; None keeps all."""
    complete = sorted(output_dir.glob(f"checkpoint-*/{MANIFEST}"), key=os.path.getmtime)
    for old in complete[:-limit] if limit else []:
        discard(old.parent)


def step_of(folder: Path) -> int:
    """The training step at which a checkpoint was written."""
    return json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
