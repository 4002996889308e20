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


def check_free(folder: Path, overwrite: bool) -> None:
    """Raise PerforatedError where `folder` is not free for a new run. Writes nothing.

    Args:
        folder: the run folder; it need not exist.
        overwrite: whether a run that is there may be replaced.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / RUN).is_file():
        raise PerforatedError(f"{folder} is not empty and holds no run: choose another --output_dir or --save_name")
    if not overwrite:
        raise PerforatedError(
            f"{folder} already holds a run: --resume_from_checkpoint true goes on with it, --overwrite_run replaces "
            "it, another --output_dir or --save_name keeps both"
        )


def claim(folder: Path, command: str, token: str, overwrite: bool = False, resumed: bool = False) -> None:
    """Make `folder` the folder of this run.

    Args:
        folder: the run folder; made where it is not there.
        command: how the run was started, for the record.
        token: unlike that of any other start: other processes see by it that they share the folder.
        overwrite: replace the run that the folder holds; files that are not a run's stay.
        resumed: go on with the run that the folder holds.

    Raises PerforatedError where the folder is not free.
    """
    if not resumed:
        check_free(folder, overwrite)
        if (folder / RUN).is_file():
            _remove_run(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / RUN, json.dumps({"command": command, "token": token}) + "\n")


def release(folder: Path) -> None:
    """Undo `claim` where the run cannot start after all: the folder is free for the next try."""
    (folder / RUN).unlink(missing_ok=True)


def holds_token(folder: Path, token: str) -> bool:
    """Whether `folder` was claimed with this token, as this process sees it."""
    try:
        return json.loads((folder / RUN).read_text(encoding="utf-8")).get("token") == token
    except (OSError, ValueError):
        return False


def _remove_run(folder: Path) -> None:
    """Delete what a run wrote into its folder, and nothing else."""
    for path in [*folder.glob("checkpoint-*"), folder / FINAL, folder / f"{FINAL}.unfinished", folder / "perforatedai"]:
        shutil.rmtree(path, ignore_errors=True)
    for name in (RESULTS, RUN, f"{folder.resolve().name}.png"):
        (folder / name).unlink(missing_ok=True)


def remove_model(folder: Path) -> None:
    """Delete the folder of a model that a run wrote. Raises PerforatedError where it is something else."""
    if not folder.is_dir():
        return
    if any(folder.iterdir()) and not (folder / "config.json").is_file() and not folder.name.endswith(".unfinished"):
        raise PerforatedError(f"{folder} holds no model: move it away, the run writes its model there")
    shutil.rmtree(folder)


# --------------------------------------------------------------------------------------------------------- a checkpoint


def discard(folder: Path) -> None:
    """Make room for a checkpoint: delete an older one of this name, such as a run that was killed leaves unfinished."""
    if folder.is_dir():
        (folder / MANIFEST).unlink(missing_ok=True)  # first: what is half deleted must not count
        shutil.rmtree(folder)


def seal(folder: Path, facts: dict) -> None:
    """Write the manifest: from now on the checkpoint counts.

    Args:
        folder: the checkpoint, all its files written.
        facts: what the trainer wants back from `check`.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
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
