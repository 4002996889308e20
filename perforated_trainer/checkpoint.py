"""Checkpoints: begin, write the manifest, check, find, rotate, discard.

A checkpoint is complete once it has its manifest, `perforated.json`, which is written last and lists the SHA-256 of
each other file. Files are deleted by record only, and no link is followed. A manifest may come from anywhere: what it
says is validated before it is used.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath

from .arguments import PerforatedError

FORMAT = 3  # 1: the single file `perforated_trainer.py`; 2: the network three times, as perforatedai trains it
MANIFEST = "perforated.json"
MARK = f"{MANIFEST}.unfinished"  # of a checkpoint that is being written or deleted
STATE = "trainer_state.json"  # each checkpoint of a Trainer has one
LIMIT = 2**24  # bytes of a JSON file

TEMPORARY = r"\.perforated-[0-9a-f]{16}(\.\w{0,8})?"  # names of `replacing`, which a kill leaves
# Files that a run writes into a checkpoint. Only an unfinished one needs this list: a complete one has its manifest.
_WRITTEN = re.compile(
    rf"{TEMPORARY}"
    r"|perforated\.json(\.unfinished)?|trainer_state\.json|training_args\.bin|rng_state(_\d+)?\.pth"
    r"|(optimizer|scheduler|scaler|training|control|baseline|best|best_model)\.(pt|bin)"
    r"|(model|network|best|training|baseline|adapter_model)[\w.-]*\.safetensors(\.index(\.\w+)?\.json)?"
    r"|(pytorch_model|adapter_model)[\w.-]*\.bin(\.index\.json)?"
    r"|(dendrites?|baseline|perforated)([_-]\w+)?\.json|(config|generation_config|adapter_config)\.json"
    r"|(modeling|configuration|tokenization|processing|image_processing|feature_extraction)_\w+\.py|dendrite_\w+\.py"
    r"|(\w+_)?(preprocessor|processor|tokenizer)_config\.json|(tokenizer|special_tokens_map|added_tokens)\.json"
    r"|vocab\.(txt|json)|merges\.txt|chat_template\.(jinja|json)|(spiece|tokenizer|sentencepiece\.bpe)\.model"
    r"|(source|target)\.spm"
)
_CHECKPOINT = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)  # not on Windows
_READ = os.O_RDONLY | _NO_LINK | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # a FIFO does not block


class _OtherFormat(PerforatedError):
    """A checkpoint of another version: not damaged, so never skipped."""


# ---------------------------------------------------------------------------------------------------- files and names


def _mode(path: Path) -> int:
    """Type and permissions of a file itself, not of what a link points to; 0 if there is none."""
    try:
        return path.lstat().st_mode
    except (OSError, ValueError):
        return 0


def is_file(path: Path) -> bool:
    """Whether `path` is a regular file, and no link to one."""
    return stat.S_ISREG(_mode(path))


def is_folder(path: Path) -> bool:
    """Whether `path` is a folder, and no link to one."""
    return stat.S_ISDIR(_mode(path))


def is_count(value) -> bool:
    """Whether `value` is an integer from 0 on, as JSON has it."""
    return type(value) is int and 0 <= value < 2**63


def is_safe_name(name) -> bool:
    """Whether `name` is a relative path with "/" that stays in its folder, on every operating system."""
    return (
        isinstance(name, str)
        and name.isprintable()
        and not set(name) & set("\\:")
        and len(name) < 1024
        and all(part not in ("", ".", "..") and len(part.encode()) < 256 for part in name.split("/"))
    )


def locate(folder: Path, name: str) -> Path | None:
    """The path of the file `name` of `folder`. None if the name is not safe or one of its folders is a link."""
    if not is_safe_name(name):
        return None
    parents = PurePosixPath(name).parents[:-1]  # without `folder` itself
    return None if any(os.path.islink(folder / parent) for parent in parents) else folder / name


def remove(folder: Path, names: Iterable[str]) -> None:
    """Delete files of `folder`, and subfolders of these files that are then empty.

    Args:
        folder (`Path`): A folder.
        names (`Iterable[str]`): Names of files in it. What is not a safe name, leads through a link or is no file is
            skipped. A link is deleted itself, never its target.
    """
    located = {name: path for name in names if (path := locate(folder, name))}
    for path in located.values():
        if is_file(path) or os.path.islink(path):
            path.unlink()
    parents = {parent for name in located for parent in PurePosixPath(name).parents[:-1]}
    for parent in sorted(parents, key=lambda parent: len(parent.parts), reverse=True):
        remove_if_empty(folder / parent)


def remove_if_empty(folder: Path) -> None:
    """Delete a folder that holds nothing."""
    if is_folder(folder) and not any(folder.iterdir()):
        folder.rmdir()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file completely or not at all: under a new name in the same folder, which is then renamed.

    If `path` is a link, the link is replaced and its target stays as it is.

    Args:
        path (`Path`): The file to write.

    Yields:
        `Path`: An empty file with the suffix of `path`, to be written in the `with` block.
    """
    temporary = path.with_name(f".perforated-{secrets.token_hex(8)}{path.suffix[:9]}")
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINK, 0o666))
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_whole(path: Path, text: str) -> None:
    """Write a text file completely or not at all, as `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path, limit: int = LIMIT) -> dict:
    """Read a JSON object from a file that may come from anywhere.

    Args:
        path (`Path`): The file. A link, FIFO or device is not read.
        limit (`int`): Largest size in bytes.

    Returns:
        `dict`: The JSON object.

    Raises:
        PerforatedError: If the file is missing, cannot be read, is too large or holds something else.
    """
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise PerforatedError(f"{path} is damaged: it is not a regular file")
        with open(os.open(path, _READ), "rb") as file:
            content = file.read(limit + 1)
        if len(content) > limit:
            raise PerforatedError(f"{path} is damaged: it is larger than {limit:,} bytes")
        value = json.loads(content)
    except OSError as error:
        raise PerforatedError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise PerforatedError(f"{path} is damaged: it is not valid JSON") from None
    if not isinstance(value, dict):
        raise PerforatedError(f"{path} is damaged: it is not a JSON object")
    return value


def _digest(path: Path) -> str:
    with open(os.open(path, _READ), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ----------------------------------------------------------------------------------------------- writing and deleting


def is_written_by_a_run(folder: Path) -> bool:
    """Whether `folder` is a checkpoint, complete or not, and no link to one."""
    return is_folder(folder) and (is_file(folder / MANIFEST) or is_file(folder / MARK))


def _files(folder: Path) -> Iterator[str]:
    """Names of the regular files of a folder and its subfolders, without links and what is behind them."""
    for root, _, names in os.walk(folder):
        for path in (Path(root, name) for name in names):
            if is_file(path) and is_safe_name(name := path.relative_to(folder).as_posix()):
                yield name


def _stamp(path: Path) -> list[int]:
    """Numbers that differ once a file has been written again."""
    status = path.lstat()
    return [status.st_ino, status.st_size, status.st_mtime_ns]


def _record(folder: Path) -> dict:
    """What the mark of an unfinished checkpoint says: the files it had before, or the manifest it had."""
    try:
        return read_json(folder / MARK)
    except PerforatedError:
        return {}


def files_of(folder: Path) -> list[Path]:
    """Files of an unfinished checkpoint that the run wrote, sorted: without those that were there before."""
    before = _record(folder).get("before")
    before = before if isinstance(before, dict) else {}
    names = (name for name in _files(folder) if name not in (MANIFEST, MARK))
    return sorted(folder / name for name in names if before.get(name) != _stamp(folder / name))


def begin(folder: Path) -> None:
    """Create the folder of a checkpoint and mark it as unfinished. An older checkpoint of this name is deleted.

    Other files of the user may be in the folder, such as notes: they stay and do not become part of the checkpoint.

    Args:
        folder (`Path`): The checkpoint, of which nothing is written yet.

    Raises:
        PerforatedError: If `folder` is a link or a file, or holds links, or files that the run would overwrite.
    """
    if os.path.lexists(folder) and not is_folder(folder):
        raise PerforatedError(f"{folder} is a link or a file, not a folder: move it away, the run writes there")
    discard(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if os.path.islink(path) or _WRITTEN.fullmatch(path.name):
            raise PerforatedError(f"{path} was not written by a run: move it away, the run writes there")
    write_whole(folder / MARK, json.dumps({"before": {name: _stamp(folder / name) for name in _files(folder)}}))


def discard(folder: Path) -> None:
    """Delete the files of a checkpoint, and its folder if that is then empty. Other files of the user stay.

    Which files are its own is recorded in the manifest; an unfinished checkpoint is known by the names that a run
    writes. A half deleted checkpoint is unfinished. Nothing happens if `folder` is a link or no checkpoint.
    """
    if not is_written_by_a_run(folder):
        return
    if is_file(folder / MANIFEST):
        os.replace(folder / MANIFEST, folder / MARK)
    names = _record(folder).get("files")
    if not isinstance(names, dict):
        names = [path.name for path in files_of(folder) if path.parent == folder and _WRITTEN.fullmatch(path.name)]
    remove(folder, [name for name in names if name != MARK])
    (folder / MARK).unlink()
    remove_if_empty(folder)


def write_manifest(folder: Path, facts: dict) -> None:
    """Write the manifest: from now on the checkpoint is complete.

    Args:
        folder (`Path`): The checkpoint, all its files written. Links in it do not become part of it.
        facts (`dict`): What `check` returns: `step` (`int`), `complete` (`bool`), `train_seconds` (`float`),
            `settings` (`dict`) and `restarts` (`list[int]`).
    """
    names = {path.relative_to(folder).as_posix(): _digest(path) for path in files_of(folder)}
    write_whole(folder / MANIFEST, json.dumps({"format": FORMAT, **facts, "files": names}, indent=1))
    (folder / MARK).unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------ checking and finding


def _is_digests(value) -> bool:
    return (
        isinstance(value, dict)
        and STATE in value
        and all(isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) for digest in value.values())
    )


_VALID = {
    "format": is_count,
    "step": is_count,
    "complete": lambda value: isinstance(value, bool),
    "train_seconds": lambda value: type(value) in (int, float) and 0 <= value < 1e18,
    "settings": lambda value: isinstance(value, dict),
    "restarts": lambda value: isinstance(value, list) and all(map(is_count, value)),
    "files": _is_digests,
}


def _manifest(folder: Path) -> dict:
    """The validated manifest of a checkpoint whose files are all there; their content is not looked at."""
    if not os.path.isdir(folder):
        raise PerforatedError(f"{folder}: there is no such checkpoint folder")
    if not os.path.lexists(folder / MANIFEST):
        raise PerforatedError(f"{folder} is unfinished, or not a checkpoint of a run with dendrites")
    manifest = read_json(folder / MANIFEST)
    written = manifest.get("format", 1)
    if is_count(written) and written != FORMAT:
        age = "an older" if written < FORMAT else "a newer"
        raise _OtherFormat(f"{folder} was written by {age} version (format {written}, not {FORMAT}): use that version")
    for name, is_valid in _VALID.items():
        if not is_valid(manifest.get(name)):
            raise PerforatedError(f"{folder} is damaged: {MANIFEST} has no valid entry {name!r}")
    named = _CHECKPOINT.fullmatch(folder.name)
    if named and int(named[1]) != manifest["step"]:
        raise PerforatedError(f"{folder} is damaged: {MANIFEST} is that of step {manifest['step']}")
    for name in manifest["files"]:
        path = locate(folder, name)
        if path is None or not is_file(path):
            raise PerforatedError(f"{folder} is damaged: {name} is missing or is not what was written")
    return manifest


def check(folder: Path) -> dict:
    """Read the manifest of a checkpoint, and verify all its files.

    Args:
        folder (`Path`): The checkpoint.

    Returns:
        `dict`: The manifest, validated: `step`, `complete`, `train_seconds`, `settings`, `restarts` and `files`.

    Raises:
        PerforatedError: If the checkpoint is unfinished, damaged, cannot be read or was written by another version.
    """
    manifest = _manifest(folder)
    for name, digest in manifest["files"].items():
        try:
            same = _digest(folder / name) == digest
        except OSError as error:
            raise PerforatedError(f"{folder / name} cannot be read: {error.strerror or error}") from None
        if not same:
            raise PerforatedError(f"{folder} is damaged: {name} is missing or is not what was written")
    return manifest


def checkpoint_folders(output_dir: Path) -> list[Path]:
    """The folders `checkpoint-<step>` of a run by step, complete or not. Links are left out.

    Raises:
        PerforatedError: If `output_dir` cannot be read.
    """
    try:
        folders = [path for path in output_dir.iterdir() if _CHECKPOINT.fullmatch(path.name) and is_folder(path)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise PerforatedError(f"{output_dir} cannot be read: {error.strerror or error}") from None
    return sorted(folders, key=lambda path: int(_CHECKPOINT.fullmatch(path.name)[1]))


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, by step. All their files are there; `check` verifies the content."""
    complete = []
    for folder in checkpoint_folders(output_dir):
        with contextlib.suppress(PerforatedError):
            _manifest(folder)
            complete.append(folder)
    return complete


def find(resume: str | bool, output_dir: Path, say: Callable[[str], None]) -> Path | None:
    """Return the checkpoint that `resume` means. In one process only: it reads all of the checkpoint.

    Args:
        resume (`str` or `bool`): A folder; True or "true" for the checkpoint in `output_dir` that has the highest step
            and is undamaged.
        output_dir (`Path`): The folder of the run.
        say (`Callable`): Receives one message per skipped checkpoint, and one if no usable checkpoint is found.

    Returns:
        `Path` or `None`: The checkpoint; None if `resume` is true and there is none.

    Raises:
        PerforatedError: If the folder is not a usable checkpoint, or the newest one was written by another version.
    """
    if str(resume).lower() != "true":
        check(Path(resume))
        return Path(resume)
    for folder in reversed(checkpoint_folders(output_dir)):
        try:
            check(folder)
            return folder
        except _OtherFormat:
            raise
        except PerforatedError as error:
            say(f"warning: skipped: {error}")
    say(f"no complete checkpoint in {output_dir}: starting from the beginning")
    return None


def rotate(output_dir: Path, limit: int | None, newest: Path | None = None) -> None:
    """Delete complete checkpoints, so that the `limit` ones with the highest steps are left.

    Args:
        output_dir (`Path`): The folder of the run.
        limit (`int`, *optional*): How many to keep. All if None or not positive.
        newest (`Path`, *optional*): Kept and counted whatever its step: the checkpoint just written, after a run was
            resumed from an earlier one by name.
    """
    if limit is None or limit <= 0:
        return
    complete = complete_checkpoints(output_dir)
    if newest in complete:
        complete.remove(newest)
        complete.append(newest)
    for old in complete[:-limit]:
        discard(old)


def step_of(folder: Path) -> int:
    """The training step at which a complete checkpoint was written, from its manifest.

    Raises:
        PerforatedError: If the checkpoint is not complete.
    """
    return _manifest(folder)["step"]
