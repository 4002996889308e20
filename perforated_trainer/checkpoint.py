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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from .arguments import PerforatedError

FORMAT = 5  # 1: one file; 2: the network three times; 3: the evaluations in the log only; 4: no activation
MANIFEST = "perforated.json"
MARK = f"{MANIFEST}.unfinished"  # of a checkpoint that is being written or deleted
STATE = "trainer_state.json"  # each checkpoint of a Trainer has one

TEMPORARY = r"\.perforated-[0-9a-f]{16}(\.\w{0,8})?"  # names of `replacing`, which a kill leaves
# Files that a run writes into a checkpoint. Only an unfinished one needs this list: a complete one has its manifest.
_WRITTEN = re.compile(
    rf"{TEMPORARY}|perforated\.json(\.unfinished)?|(training_args|optimizer|scheduler|scaler)\.(pt|bin)|rng_state\w*\.pth"
    r"|(model|network|best_model|adapter_model|pytorch_model)[\w.-]*\.(safetensors|bin|json)"
    r"|((generation|adapter|tokenizer|processor|\w*preprocessor)_)?config\.json|(trainer|dendrite|baseline)_state\.json"
    r"|(dendrites|tokenizer|special_tokens_map|added_tokens|vocab|chat_template)\.json|vocab\.txt|merges\.txt"
    r"|chat_template\.jinja|\w[\w.]*\.(model|spm)|(modeling|configuration|tokenization|[a-z_]*processing|dendrite)_\w+\.py"
)
_CHECKPOINT = re.compile(r"checkpoint-(0|[1-9][0-9]*)")


class _OtherFormat(PerforatedError):
    """A checkpoint of another version: not damaged, so never skipped."""


def is_file(path: Path) -> bool:
    """Whether `path` is a regular file, and no link to one."""
    return os.path.isfile(path) and not os.path.islink(path)


def is_folder(path: Path) -> bool:
    """Whether `path` is a folder, and no link to one."""
    return os.path.isdir(path) and not os.path.islink(path)


def is_count(value) -> bool:
    """Whether `value` is an integer from 0 on, as JSON has it."""
    return type(value) is int and 0 <= value < 2**63


def locate(folder: Path, name: str) -> Path | None:
    """The path of the file `name` of `folder`. None if it is not plain text with "/" that stays in `folder`."""
    parts = name.split("/") if isinstance(name, str) and name.isprintable() and not set(name) & set("\\:") else []
    if not 0 < len(parts) < 32 or {"", ".", ".."} & set(parts):
        return None
    parents = (folder.joinpath(*parts[:depth]) for depth in range(1, len(parts)))
    return None if any(map(os.path.islink, parents)) else folder.joinpath(*parts)


def remove(folder: Path, names: Iterable[str]) -> None:
    """Delete files of `folder`, and folders in it that are then empty.

    Names that `locate` does not know are skipped. A link is deleted itself, never its target.
    """
    paths = {path for name in names if (path := locate(folder, name))}
    for path in paths:
        if os.path.isfile(path) or os.path.islink(path):
            path.unlink()
    parents = {parent for path in paths for parent in path.parents if folder in parent.parents}
    for parent in sorted(parents, reverse=True):
        remove_if_empty(parent)


def remove_if_empty(folder: Path) -> None:
    """Delete a folder that holds nothing."""
    if is_folder(folder) and not any(folder.iterdir()):
        folder.rmdir()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file with the suffix of `path`, which takes the place of `path` once the `with` block has written it.

    If the block fails, `path` stays as it is. If `path` is a link, it is replaced, and its target stays as it is.
    """
    temporary = path.with_name(f".perforated-{secrets.token_hex(8)}{path.suffix[:9]}")
    temporary.touch(exist_ok=False)  # follows no link
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


def read_json(path: Path, limit: int = 2**24) -> dict:
    """Read a JSON object of at most `limit` bytes from a file that may come from anywhere. No link, no FIFO is read.

    Raises:
        PerforatedError: If the file is missing, cannot be read, is too large or holds something else.
    """
    try:
        if os.path.lexists(path) and not is_file(path):
            raise PerforatedError(f"{path} is damaged: it is not a regular file")
        with open(path, "rb") as file:
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
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise PerforatedError(f"{path} cannot be read: {error.strerror or error}") from None


def read_record(path: Path) -> dict:
    """As `read_json`; an empty dictionary if there is nothing to read."""
    try:
        return read_json(path)
    except PerforatedError:
        return {}


def _files(folder: Path) -> list[str]:
    """Names of the regular files of a folder and its subfolders, without links and what is behind them."""
    paths = [Path(root, name) for root, _, names in os.walk(folder) for name in names]
    return sorted(path.relative_to(folder).as_posix() for path in paths if is_file(path))


def files_of(folder: Path) -> list[Path]:
    """Files of an unfinished checkpoint that the run wrote, sorted: without those that were there before."""
    before = read_record(folder / MARK).get("before")  # of the mark of `begin`
    others = {MANIFEST, MARK, *(before if isinstance(before, dict) else ())}
    return [folder / name for name in _files(folder) if name not in others and locate(folder, name)]


def begin(folder: Path) -> None:
    """Create the folder of a checkpoint and mark it as unfinished. An older checkpoint of this name is deleted.

    Other files of the user may be in the folder, such as notes: they stay and do not become part of the checkpoint.
    PerforatedError for a link, and for a file that the run would overwrite.
    """
    if os.path.lexists(folder) and not is_folder(folder):
        raise PerforatedError(f"{folder} is a link or a file, not a folder: move it away, the run writes there")
    discard(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for path in list(folder.iterdir()):
        if is_file(path) and re.fullmatch(TEMPORARY, path.name):
            path.unlink()  # of a kill before there was a mark
        elif os.path.islink(path) or _WRITTEN.fullmatch(path.name):
            raise PerforatedError(f"{path} was not written by a run: move it away, the run writes there")
    write_whole(folder / MARK, json.dumps({"before": dict.fromkeys(_files(folder))}))


def is_written_by_a_run(folder: Path) -> bool:
    """Whether `folder` is a checkpoint, complete or not, and no link to one."""
    return is_folder(folder) and (is_file(folder / MANIFEST) or is_file(folder / MARK))


def discard(folder: Path) -> None:
    """Delete the files of a checkpoint, and its folder if that is then empty. Other files of the user stay.

    Its files are those in its manifest, or of an unfinished one those with names that a run writes. A half deleted
    checkpoint is unfinished. Nothing happens if `folder` is a link or no checkpoint.
    """
    if not is_written_by_a_run(folder):
        return
    if is_file(folder / MANIFEST):
        os.replace(folder / MANIFEST, folder / MARK)
    names = read_record(folder / MARK).get("files")  # of the manifest, which is now the mark
    if not isinstance(names, dict):
        names = [path.name for path in files_of(folder) if path.parent == folder and _WRITTEN.fullmatch(path.name)]
    remove(folder, [name for name in names if name != MARK])
    (folder / MARK).unlink()
    remove_if_empty(folder)


def write_manifest(folder: Path, facts: dict) -> None:
    """Write the manifest with `facts`, which is what `check` returns: from now on the checkpoint is complete."""
    names = {path.relative_to(folder).as_posix(): _digest(path) for path in files_of(folder)}
    write_whole(folder / MANIFEST, json.dumps({"format": FORMAT, **facts, "files": names}, indent=1))
    (folder / MARK).unlink(missing_ok=True)


_VALID = {
    "format": is_count,
    "step": is_count,
    "complete": lambda value: isinstance(value, bool),
    "train_seconds": lambda value: type(value) in (int, float) and 0 <= value < 1e18,
    "settings": lambda value: isinstance(value, dict),
    "restarts": lambda value: isinstance(value, list) and all(map(is_count, value)),
    "files": lambda value: isinstance(value, dict) and STATE in value,
}


def check(folder: Path, content: bool = True) -> dict:
    """The validated manifest of a checkpoint of which all files are as they were written.

    Args:
        folder (`Path`): The checkpoint.
        content (`bool`): Whether to read all its files, or only to see that they are there.

    Raises:
        PerforatedError: If the checkpoint is unfinished, damaged, cannot be read or was written by another version.
    """
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
    if _CHECKPOINT.fullmatch(folder.name) and folder.name != f"checkpoint-{manifest['step']}":
        raise PerforatedError(f"{folder} is damaged: {MANIFEST} is that of step {manifest['step']}")
    for name, digest in manifest["files"].items():
        path = locate(folder, name)
        if path is None or not is_file(path) or (content and _digest(path) != digest):
            raise PerforatedError(f"{folder} is damaged: {name} is missing or is not what was written")
    return manifest


def checkpoint_folders(output_dir: Path) -> list[Path]:
    """The folders `checkpoint-<step>` of a run by step, complete or not. Links are left out."""
    try:
        paths = list(output_dir.iterdir()) if output_dir.is_dir() else []
    except OSError as error:
        raise PerforatedError(f"{output_dir} cannot be read: {error.strerror or error}") from None
    folders = [path for path in paths if _CHECKPOINT.fullmatch(path.name) and is_folder(path)]
    return sorted(folders, key=step_in_name)


def step_in_name(folder: Path) -> int:
    """The step in the name `checkpoint-<step>`."""
    return int(folder.name.split("-")[1])


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, by step. All their files are there; `check` verifies the content."""
    complete = []
    for folder in checkpoint_folders(output_dir):
        with contextlib.suppress(PerforatedError):
            check(folder, content=False)
            complete.append(folder)
    return complete


def find(resume: str | bool, output_dir: Path, say: Callable[[str], None]) -> Path | None:
    """The checkpoint that `resume` means. In one process only: it reads all of the checkpoint.

    Args:
        resume (`str` or `bool`): A folder; True or "true" for the undamaged checkpoint with the highest step, if any.
        output_dir (`Path`): The folder of the run.
        say (`Callable`): Receives one message per skipped checkpoint, and one if no usable checkpoint is found.

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


def rotate(output_dir: Path, limit: int | None) -> None:
    """Delete old checkpoints, so that the `limit` complete ones with the highest steps are left; none without a limit.

    Unfinished ones of earlier steps, which a kill left, are deleted too. Damaged ones and other formats stay.
    """
    complete = complete_checkpoints(output_dir)
    if limit is not None and limit > 0 and complete:
        newest = step_in_name(complete[-1])
        unfinished = [f for f in checkpoint_folders(output_dir) if is_file(f / MARK) and not is_file(f / MANIFEST)]
        for old in complete[:-limit] + [folder for folder in unfinished if step_in_name(folder) < newest]:
            discard(old)


def discard_after(output_dir: Path, step: int, say: Callable[[str], None]) -> None:
    """Delete checkpoints of steps after `step`, from which the run is resumed: it is to be found at its new end."""
    for folder in checkpoint_folders(output_dir):
        if step_in_name(folder) > step and is_written_by_a_run(folder):
            say(f"note: {folder} is deleted: the run is resumed from step {step:,}")
            discard(folder)


def step_of(folder: Path) -> int:
    """The training step at which a complete checkpoint was written, from its manifest."""
    return check(folder, content=False)["step"]
