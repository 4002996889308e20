"""Checkpoints as files: written, checked, found, rotated. Nothing is trained here."""

import json
import os

import pytest

from perforated_trainer import PerforatedError, checkpoint

FACTS = {"step": 2, "complete": False, "train_seconds": 1.5, "settings": {"seed": 42}, "restarts": [1]}


def write(run, step, **facts):
    """A complete checkpoint of a few bytes."""
    folder = run / f"checkpoint-{step}"
    checkpoint.begin(folder)
    for name in ("trainer_state.json", "model.safetensors", "optimizer.pt", "best/adapter_model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"{name} of step {step}")
    checkpoint.write_manifest(folder, FACTS | {"step": step} | facts)
    return folder


def damage(folder):
    (folder / "model.safetensors").write_text("damaged")


def steps(run):
    return sorted(int(path.name.split("-")[1]) for path in run.glob("checkpoint-*"))


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------------------ checking


def test_check_complete_checkpoint_returns_facts(tmp_path):
    manifest = checkpoint.check(write(tmp_path, 2))
    assert {name: manifest[name] for name in FACTS} == FACTS
    assert set(manifest["files"]) == files(tmp_path / "checkpoint-2") - {"perforated.json"}
    assert checkpoint.step_of(tmp_path / "checkpoint-2") == 2


@pytest.mark.parametrize("name", ["trainer_state.json", "best/adapter_model.safetensors"])
def test_check_changed_or_missing_file_is_damaged(name, tmp_path):
    folder = write(tmp_path, 2)
    (folder / name).write_text(f"{name} of step 3")
    assert checkpoint.check(folder, content=False)["step"] == 2
    with pytest.raises(PerforatedError, match=f"checkpoint-2 is damaged: {name} is missing or is not what was"):
        checkpoint.check(folder)
    (folder / name).unlink()
    with pytest.raises(PerforatedError, match=f"checkpoint-2 is damaged: {name} is missing or is not what was"):
        checkpoint.check(folder, content=False)


def test_check_without_manifest_is_unfinished(tmp_path):
    checkpoint.begin(tmp_path / "checkpoint-2")
    with pytest.raises(PerforatedError, match="is unfinished"):
        checkpoint.check(tmp_path / "checkpoint-2")
    with pytest.raises(PerforatedError, match="no such checkpoint folder"):
        checkpoint.check(tmp_path / "checkpoint-4")


@pytest.mark.parametrize(("written", "age"), [(None, "an older"), (1, "an older"), (4, "an older"), (6, "a newer")])
def test_find_other_format_raises(written, age, tmp_path):
    """It is not skipped: the run would start from the beginning."""
    manifest = write(tmp_path, 2) / "perforated.json"
    values = json.loads(manifest.read_text())
    values.pop("format")
    manifest.write_text(json.dumps(values if written is None else values | {"format": written}))
    before = files(tmp_path)
    for resume in (True, str(tmp_path / "checkpoint-2")):
        with pytest.raises(PerforatedError, match=f"was written by {age} version") as caught:
            checkpoint.find(resume, tmp_path, print)
        assert "\n" not in str(caught.value) and files(tmp_path) == before


def test_check_other_step_than_name_is_damaged(tmp_path):
    write(tmp_path, 2).rename(tmp_path / "checkpoint-9")
    with pytest.raises(PerforatedError, match="is that of step 2"):
        checkpoint.check(tmp_path / "checkpoint-9")
    (tmp_path / "checkpoint-9").rename(tmp_path / "saved")
    assert checkpoint.check(tmp_path / "saved")["step"] == 2


# ------------------------------------------------------------------------------------------------------------- finding


def test_find_true_returns_highest_step_whatever_the_clock(tmp_path):
    for step, time in ((9, 3e8), (10, 1e8), (8, 2e9)):
        folder = write(tmp_path, step)
        for path in (*folder.iterdir(), folder):
            os.utime(path, (time, time))
    assert checkpoint.find(True, tmp_path, print) == tmp_path / "checkpoint-10"
    assert checkpoint.find("true", tmp_path, print) == tmp_path / "checkpoint-10"


def test_find_true_skips_damaged_with_one_message_each(tmp_path):
    for step in (2, 4, 6, 8):
        write(tmp_path, step)
    damage(tmp_path / "checkpoint-8")
    (tmp_path / "checkpoint-6" / "perforated.json").unlink()
    said = []
    assert checkpoint.find(True, tmp_path, said.append) == tmp_path / "checkpoint-4"
    assert ["checkpoint-8 is damaged" in said[0], "checkpoint-6 is unfinished" in said[1]] == [True, True]
    assert len(said) == 2


def test_find_true_reads_no_older_checkpoint(tmp_path, monkeypatch):
    read, digest = [], checkpoint._digest
    for step in (2, 4, 6):
        write(tmp_path, step)
    monkeypatch.setattr(checkpoint, "_digest", lambda path: read.append(path.parts[-2]) or digest(path))
    checkpoint.find(True, tmp_path, print)
    assert "checkpoint-6" in read and not {"checkpoint-2", "checkpoint-4"} & set(read)


def test_find_true_without_checkpoint_returns_none(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        said = []
        assert checkpoint.find(True, folder, said.append) is None
        assert said == [f"no complete checkpoint in {folder}: starting from the beginning"]


def test_find_true_ignores_other_names(tmp_path):
    write(tmp_path, 2)
    for name in ("checkpoint-07", "checkpoint-x", "checkpoint-", "my-checkpoint-9", "checkpoint-9-old", "checkpoint-٣"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-8").write_text("a file")
    said = []
    assert checkpoint.find(True, tmp_path, said.append) == tmp_path / "checkpoint-2" and not said


def test_complete_checkpoints_lists_what_a_run_can_resume_from(tmp_path):
    for step in (10, 4, 6, 8):
        write(tmp_path, step)
    (tmp_path / "checkpoint-6" / "optimizer.pt").unlink()
    (tmp_path / "checkpoint-8" / "perforated.json").write_text("{")
    assert checkpoint.complete_checkpoints(tmp_path) == [tmp_path / "checkpoint-4", tmp_path / "checkpoint-10"]
    assert checkpoint.complete_checkpoints(tmp_path / "none") == []


# ------------------------------------------------------------------------------------------------------------ rotating


@pytest.mark.parametrize(("limit", "left"), [(1, [10]), (2, [9, 10]), (4, [7, 8, 9, 10]), (None, [7, 8, 9, 10])])
def test_rotate_keeps_highest_steps_whatever_the_clock(limit, left, tmp_path):
    for step, time in ((7, 2e9), (8, 1e9), (10, 1e8), (9, 1.5e9)):
        folder = write(tmp_path, step)
        for path in (*folder.iterdir(), folder):
            os.utime(path, (time, time))
    checkpoint.rotate(tmp_path, limit)
    assert steps(tmp_path) == left
    assert all(map(checkpoint.check, tmp_path.glob("checkpoint-*")))


def test_discard_after_deletes_the_abandoned_end_of_a_resumed_run(tmp_path):
    for step in (2, 4, 8, 10):
        write(tmp_path, step)
    checkpoint.begin(tmp_path / "checkpoint-8")
    (tmp_path / "checkpoint-10" / "notes.txt").write_text("of the user")
    (tmp_path / "checkpoint-12").mkdir()
    (tmp_path / "checkpoint-12" / "model.bin").write_text("of the user")
    said = []
    checkpoint.discard_after(tmp_path, 4, said.append)
    assert len(said) == 2 and said[1].endswith("checkpoint-10 is deleted: the run is resumed from step 4")
    assert files(tmp_path / "checkpoint-10") == {"notes.txt"} and steps(tmp_path) == [2, 4, 10, 12]
    assert checkpoint.find(True, tmp_path, said.append) == tmp_path / "checkpoint-4"


def test_rotate_damaged_or_newer_unfinished_or_foreign_folder_stays(tmp_path):
    for step in (2, 4, 6):
        write(tmp_path, step)
    (tmp_path / "checkpoint-2" / "perforated.json").write_text("{")
    for unfinished in (1, 8):
        checkpoint.begin(tmp_path / f"checkpoint-{unfinished}")
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "model.bin").write_text("of the user")
    checkpoint.rotate(tmp_path, None)
    assert steps(tmp_path) == [1, 2, 3, 4, 6, 8]
    checkpoint.rotate(tmp_path, 1)
    assert steps(tmp_path) == [2, 3, 6, 8]  # what a kill left of step 1 is deleted, step 8 is being written


# ------------------------------------------------------------------------------------------------ writing and deleting


def test_begin_unfinished_checkpoint_starts_empty(tmp_path):
    folder = tmp_path / "checkpoint-2"
    checkpoint.begin(folder)
    names = """
    config.json model.safetensors model-00001-of-00002.safetensors model.safetensors.index.json
    optimizer.pt scheduler.pt scaler.pt rng_state.pth rng_state_1.pth trainer_state.json
    training_args.bin generation_config.json model.dendrites.safetensors
    model.safetensors.index.dendrites.json network.safetensors best_model.safetensors
    dendrite_state.json dendrites.json adapter_model.safetensors adapter_config.json dendrite_formula.py
    dendrite_saving.py dendrite_layers.py dendrite_blocks.py dendrite_loading.py modeling_mnist.py tokenizer.json
    tokenizer_config.json vocab.txt preprocessor_config.json .perforated-0123456789abcdef.json
    """
    for name in names.split():
        (folder / name).write_text("half")
    checkpoint.begin(folder)
    assert files(folder) == {"perforated.json.unfinished"}


def test_begin_after_a_kill_before_the_mark(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint-2"
    monkeypatch.setattr(os, "replace", lambda *paths: os._exit(7))  # between the mark's text and its name
    if not (child := os.fork()):
        checkpoint.begin(folder)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    monkeypatch.undo()
    assert len(files(folder)) == 1 and files(folder).pop().startswith(".perforated-")
    checkpoint.begin(folder)
    assert files(folder) == {"perforated.json.unfinished"}


def test_begin_complete_checkpoint_starts_empty(tmp_path):
    checkpoint.begin(write(tmp_path, 2))
    assert files(tmp_path / "checkpoint-2") == {"perforated.json.unfinished"}
    assert not (tmp_path / "checkpoint-2" / "best").exists()


def test_discard_half_deleted_checkpoint_continues(tmp_path, monkeypatch):
    """It is no longer complete, but its record still exists."""
    folder = write(tmp_path, 2)
    (folder / "notes.txt").write_text("of the user")
    remove = os.unlink

    def killed(path, **kwargs):
        if str(path).endswith("optimizer.pt"):
            raise KeyboardInterrupt
        remove(path, **kwargs)

    monkeypatch.setattr(os, "unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.discard(folder)
    monkeypatch.undo()
    assert not checkpoint.complete_checkpoints(tmp_path) and "optimizer.pt" in files(folder)
    checkpoint.discard(folder)
    assert files(folder) == {"notes.txt"} and [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_begin_foreign_file_that_a_run_writes_raises(tmp_path):
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    (folder / "model.safetensors").write_text("of the user")
    with pytest.raises(PerforatedError, match=r"model.safetensors was not written by a run: move it away"):
        checkpoint.begin(folder)
    assert files(folder) == {"model.safetensors"}


def test_manifest_leaves_out_files_that_were_there_before(tmp_path):
    folder = tmp_path / "checkpoint-2"
    (folder / "mine").mkdir(parents=True)
    for name in ("notes.txt", "mine/notes.txt"):
        (folder / name).write_text("of the user")
    checkpoint.begin(folder)
    (folder / "trainer_state.json").write_text("{}")
    (folder / "spiece.vocab").write_text("by the run: the file of an unusual tokenizer")
    checkpoint.write_manifest(folder, FACTS)
    assert set(checkpoint.check(folder)["files"]) == {"trainer_state.json", "spiece.vocab"}
    checkpoint.discard(folder)
    assert files(folder) == {"notes.txt", "mine/notes.txt"}


def test_replacing_failure_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "plot.png"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), checkpoint.replacing(path) as temporary:
        assert temporary.suffix == ".png" and temporary.parent == tmp_path and temporary != path
        temporary.write_text("half")
        raise ZeroDivisionError
    assert files(tmp_path) == {"plot.png"} and path.read_text() == "old"
    checkpoint.write_whole(path, "näw")
    assert files(tmp_path) == {"plot.png"} and path.read_text(encoding="utf-8") == "näw"


@pytest.mark.parametrize("name", ["x" * 251 + ".txt", 'it\'s "quoted"', "with space.json", "ä" * 120])
def test_write_whole_any_name_of_the_file_system(name, tmp_path):
    checkpoint.write_whole(tmp_path / name, "text")
    assert [path.name for path in tmp_path.iterdir()] == [name]
