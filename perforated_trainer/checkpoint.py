"""Checkpoints: begun, sealed, verified, found, rotated.

A checkpoint counts once its manifest, `perforated.json`, is there: it is written last and names the SHA-256 of each
other file. Nothing here deletes what a run did not write.
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
MANIFEST = "perforated.json"  # written last: a checkpoint without it is unfinished


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


def _mark(folder: Path) -> Path:
    """The file by which an unfinished checkpoint is known as a run's. It becomes the manifest."""
    return folder / f"{MANIFEST}.unfinished"


def is_written_by_a_run(folder: Path) -> bool:
    """Whether `folder` is a checkpoint, whole or not, or the empty folder of one."""
    if not folder.is_dir():
        return False
    return (folder / MANIFEST).is_file() or _mark(folder).is_file() or not any(folder.iterdir())


def files_of(folder: Path) -> list[Path]:
    """All files of a checkpoint but its mark."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != _mark(folder))


def begin(folder: Path) -> None:
    """Make the folder of a checkpoint. An older one of this name, such as a run that was killed leaves, is deleted.

    Raises PerforatedError where the folder was not written by a run.
    """
    if folder.exists():
        if not is_written_by_a_run(folder):
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
    names = {path.relative_to(folder).as_posix(): digest(path) for path in files_of(folder)}
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
