"""Security of the files of a run, one guarantee per test.

Files of a run may come from anywhere: a download, a shared disk, another user. A damaged or crafted file raises a
one-line error. Nothing outside the folder of a run is written or deleted, no link is followed, and in the folder only
files that a run wrote are deleted. Recorded commands contain no secrets.
"""

import json
import os
import shlex
import signal
import sys
import threading
import types

import pytest
from test_checkpoint import FACTS, files, steps, write

from perforated_trainer import PerforatedError, checkpoint, cli, export, run_dir

RESULTS = {
    "settings": {"control_of": None, "doing_pai": True},
    "restarts": [4],
    "global_step": 8,
    "cycles": [{"dendrites": 0, "parameters": 10, "best_validation": 0.5}],
    "final": {"dendrites": 1, "parameters": 20, "test_accuracy": 0.6},
    "metric": "eval_accuracy",
    "command": "python train.py",
    "testing_dendrite_capacity": False,
}


@pytest.fixture(autouse=True)
def _no_hang():
    """Fail after 60 seconds if a test waits for a FIFO."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("this hangs"))
    signal.alarm(60)
    yield
    signal.alarm(0)


@pytest.fixture
def precious(tmp_path):
    """A folder of the user outside the run. Checks at the end that it is unchanged."""
    folder = tmp_path / "precious"
    folder.mkdir()
    (folder / "thesis.tex").write_text("of the user")
    yield folder
    assert files(folder) == {"thesis.tex"} and (folder / "thesis.tex").read_text() == "of the user"


@pytest.fixture
def run(tmp_path, precious):
    """The folder of a finished run, with everything that a run writes."""
    folder = tmp_path / "run"
    run_dir.acquire(folder, "python train.py")
    for step in (2, 4):
        write(folder, step)
    move(folder, "config.json", "model.safetensors", "code/modeling_mnist.py")
    (folder / "perforatedai").mkdir()
    for name in ("best_model.pt", "switch_1.pt", "perforatedai_tracker.png", "perforatedaiBest PBScores.csv"):
        (folder / "perforatedai" / name).write_text("of the run")
    checkpoint.write_whole(folder / "results.json", json.dumps(RESULTS))
    checkpoint.write_whole(folder / "run.png", "of the run")
    return folder


def move(folder, *names):
    staging = run_dir.stage(folder)
    for name in names:
        (staging / name).parent.mkdir(exist_ok=True)
        (staging / name).write_text("of the run")
    run_dir.export(staging, folder)


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def error_of(function, *args, **kwargs):
    """The message of the PerforatedError that a call raises. Checks that it is one line."""
    with pytest.raises(PerforatedError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------ untrusted manifests

OUTSIDE = [
    "../../precious/thesis.tex",
    "best/../../../precious/thesis.tex",
    "{root}/precious/thesis.tex",
    "..\\..\\precious\\thesis.tex",
    "C:\\precious\\thesis.tex",
    "C:thesis.tex",
    "linked/thesis.tex",
    "best/./adapter_model.safetensors",
    "best//adapter_model.safetensors",
    "",
    ".",
    "..",
    "nul\0byte",
    "surrogate\ud800",
    "x" * 300,
    "/".join("x" * 100_000),
]


def test_manifest_name_outside_its_folder_is_damaged_and_touches_nothing(run, precious, tmp_path):
    digest = checkpoint._digest(precious / "thesis.tex")
    for name in OUTSIDE:
        folder, name = write(run, 4), name.replace("{root}", str(tmp_path))
        (folder / "linked").symlink_to(precious)
        manifest = json.loads((folder / "perforated.json").read_text())
        change(folder / "perforated.json", files={**manifest["files"], name: digest})
        assert "is damaged" in error_of(checkpoint.check, folder), name
        assert checkpoint.complete_checkpoints(run) == [run / "checkpoint-2"]
        checkpoint.discard(folder)  # the fixture `precious` checks its files
        assert [path.name for path in folder.iterdir()] == ["linked"], name
        (folder / "linked").unlink()


WRONG = {
    "step": [None, "4", 4.0, True, -1, 10**30, [4]],
    "complete": [None, 0, "false", []],
    "train_seconds": [None, "1", -1.0, float("nan"), float("inf"), 10**400, True],
    "settings": [None, [], "seed", 3],
    "restarts": [None, {}, 3, ["1"], [1.5], [-1], [True], [None]],
    "files": [None, [], "optimizer.pt", {}, {"optimizer.pt": "0" * 64}],
    "format": ["4", None, -4, 4.0, [], True],
}


def test_manifest_entry_that_is_wrong_or_missing_is_damaged(run):
    manifest = run / "checkpoint-4" / "perforated.json"
    good = json.loads(manifest.read_text())
    for name, value in [(name, value) for name, values in WRONG.items() for value in values]:
        manifest.write_text(json.dumps(good | {name: value}))
        assert f"no valid entry {name!r}" in error_of(checkpoint.check, run / "checkpoint-4"), value
    for name in WRONG.keys() - {"format"}:
        manifest.write_text(json.dumps({key: value for key, value in good.items() if key != name}))
        assert "is damaged" in error_of(checkpoint.check, run / "checkpoint-4")
    assert checkpoint.find(True, run, lambda line: None) == run / "checkpoint-2"


CONTENTS = {
    "empty": b"",
    "cut off": b'{"format": 4, "step"',
    "no object": b"[1, 2]",
    "no text": b"\xff\xfe\x00\x80",
    "deep list": b"[" * 200_000,
    "deep object": b'{"a":' * 200_000,
    "long number": b'{"format": ' + b"9" * 10_000 + b"}",
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_damaged_json_raises_one_line(content, run):
    for path in (run / "checkpoint-4" / "perforated.json", run / "results.json"):
        path.write_bytes(content)
        assert "is damaged" in error_of(checkpoint.read_json, path)
    assert "is damaged" in error_of(checkpoint.check, run / "checkpoint-4")
    assert "is damaged" in error_of(run_dir.results_of, run)
    (run / "run.json").write_bytes(content)
    assert "already holds a run" in error_of(run_dir.check_free, run)


def test_huge_json_is_not_read(run, tmp_path):
    with open(run / "checkpoint-4" / "perforated.json", "r+b") as file:
        file.truncate(2**43)  # sparse
    assert "larger than 16,777,216 bytes" in error_of(checkpoint.check, run / "checkpoint-4")
    (tmp_path / "small.json").write_text('{"a": 1}')
    assert checkpoint.read_json(tmp_path / "small.json", 8) == {"a": 1}
    assert "larger than 7 bytes" in error_of(checkpoint.read_json, tmp_path / "small.json", 7)


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "link"])
@pytest.mark.parametrize("name", ["perforated.json", "optimizer.pt"])
def test_what_is_no_regular_file_is_damaged_and_does_not_hang(name, kind, run):
    path = run / "checkpoint-4" / name
    path.rename(run / "moved")
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else run / "moved")
    said = []
    assert "is damaged" in error_of(checkpoint.check, run / "checkpoint-4")
    assert checkpoint.find(True, run, said.append) == run / "checkpoint-2" and len(said) == 1
    checkpoint.discard(run / "checkpoint-4")
    run_dir.acquire(run, "python train.py", overwrite=True)
    assert (run / "moved").is_file()


def test_results_and_record_that_are_a_fifo_do_not_hang(run):
    (run / "results.json").unlink()
    os.mkfifo(run / "results.json")
    assert "is not a regular file" in error_of(run_dir.results_of, run)
    (run / "run.json").unlink()
    os.mkfifo(run / "run.json")
    assert "holds no run" in error_of(run_dir.check_free, run, overwrite=True)


def test_a_file_that_cannot_be_read_is_not_called_damaged(run, monkeypatch):
    def refused(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoint, "open", refused, raising=False)
    message = error_of(checkpoint.check, run / "checkpoint-4")
    assert "cannot be read: Permission denied" in message and "written" not in message and "damaged" not in message


# --------------------------------------------------------------------------------------------------------------- links


def test_checkpoint_that_is_a_link_is_not_found_rotated_deleted_or_written(run, tmp_path):
    elsewhere = write(tmp_path / "elsewhere", 9)
    before = files(elsewhere)
    (run / "checkpoint-9").symlink_to(elsewhere)
    (run / "checkpoint-latest").symlink_to("checkpoint-2")
    assert checkpoint.find(True, run, print) == run / "checkpoint-4"
    checkpoint.rotate(run, 1)
    checkpoint.discard(run / "checkpoint-9")
    assert "is a link" in error_of(checkpoint.begin, run / "checkpoint-9")
    run_dir.acquire(run, "python train.py", overwrite=True)
    assert files(elsewhere) == before and checkpoint.check(elsewhere)
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-9", "checkpoint-latest"}
    assert (run / "checkpoint-9").is_symlink() and (run / "checkpoint-latest").is_symlink()


def test_named_link_to_a_checkpoint_can_be_resumed_from(run):
    (run / "checkpoint-latest").symlink_to("checkpoint-4")
    assert checkpoint.find(str(run / "checkpoint-latest"), run, print) == run / "checkpoint-latest"


@pytest.mark.parametrize("name", ["optimizer.pt", "perforated.json", "perforated.json.unfinished", "any.txt"])
def test_link_in_a_new_checkpoint_is_not_written_through(name, run, precious):
    (run / "checkpoint-6").mkdir()
    (run / "checkpoint-6" / name).symlink_to(precious / "thesis.tex")
    assert "move it away" in error_of(checkpoint.begin, run / "checkpoint-6")


def test_link_does_not_become_part_of_a_checkpoint(run, precious):
    checkpoint.begin(run / "checkpoint-6")
    (run / "checkpoint-6" / "trainer_state.json").write_text("{}")
    (run / "checkpoint-6" / "linked.tex").symlink_to(precious / "thesis.tex")
    (run / "checkpoint-6" / "linked").symlink_to(precious)
    checkpoint.write_manifest(run / "checkpoint-6", FACTS | {"step": 6})
    assert set(checkpoint.check(run / "checkpoint-6")["files"]) == {"trainer_state.json"}


def test_written_file_replaces_a_link_and_leaves_its_target(run, precious):
    for name in ("results.json", "run.png"):
        (run / name).unlink()
        (run / name).symlink_to(precious / "thesis.tex")
        checkpoint.write_whole(run / name, "of the run")
        assert not (run / name).is_symlink() and (run / name).read_text() == "of the run"


def test_temporary_name_that_is_a_link_is_not_written_through(run, precious, monkeypatch):
    monkeypatch.setattr(checkpoint.secrets, "token_hex", lambda size: "0" * 16)
    (run / f".perforated-{'0' * 16}.json").symlink_to(precious / "thesis.tex")
    with pytest.raises(FileExistsError):
        checkpoint.write_whole(run / "results.json", "of the run")


@pytest.mark.parametrize("name", ["run.json", "final", "final.unfinished", "perforatedai"])
@pytest.mark.parametrize("how", [{}, {"overwrite": True}, {"resumed": True}])
def test_link_in_the_place_of_a_written_file_raises_at_the_start(name, how, run, precious):
    if os.path.lexists(run / name):
        (run / name).rename(run / f"{name}.moved")
    (run / name).symlink_to(precious)
    before = files(run)
    assert "is a link" in error_of(run_dir.acquire, run, "python train.py", **how)
    assert files(run) == before


def test_final_that_is_a_link_is_not_written_through(run, precious):
    staging = run_dir.stage(run)
    (staging / "thesis.tex").write_text("of the run")
    (run / "final").rename(run / "moved")
    (run / "final").symlink_to(precious)
    assert "is a link" in error_of(run_dir.export, staging, run)
    (run / "final").unlink()
    (run / "final").mkdir()
    (staging / "code").mkdir()
    (staging / "code" / "model.py").write_text("of the run")
    (run / "final" / "code").symlink_to(precious)
    assert "was not written by this run" in error_of(run_dir.export, staging, run)


# ----------------------------------------------------------------------------------------------- deletion by record

MINE = ["notes.txt", "final/notes.txt", "final/code/notes.txt", "checkpoint-2/notes.txt", "checkpoint-2/mine/a.txt"]
MINE += ["perforatedai/notes.txt", "checkpoint-7/model.bin", "checkpoint-x/notes.txt", "best_model.pt"]
EMPTY = ["final/empty", "checkpoint-2/empty", "perforatedai/empty", "checkpoint-9"]


def put(folder):
    for name in MINE:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("of the user")
    for name in EMPTY:
        (folder / name).mkdir()


def test_overwriting_deletes_what_the_run_wrote_and_nothing_else(run):
    put(run)
    run_dir.acquire(run, "python again.py", overwrite=True)
    assert files(run) == {*MINE, "run.json"}
    assert all((run / name).is_dir() for name in EMPTY)
    assert all((run / name).read_text() == "of the user" for name in MINE)
    assert json.loads((run / "run.json").read_text())["command"] == "python again.py"


def test_overwriting_leaves_an_empty_folder_for_the_new_run(run):
    checkpoint.begin(run / "checkpoint-6")  # of a run that was killed, as the next two
    (run / "checkpoint-6" / "model.safetensors").write_text("half")
    (run_dir.stage(run) / "README.md").write_text("half")
    for folder, name in ((run, "json"), (run / "perforatedai", "png")):
        (folder / f".perforated-{'a' * 16}.{name}").write_text("half")
    run_dir.acquire(run, "python train.py", overwrite=True)
    assert [path.name for path in run.iterdir()] == ["run.json"]


def test_new_checkpoint_next_to_a_note_leaves_the_note(run):
    put(run)
    run_dir.acquire(run, "python again.py", overwrite=True)
    assert checkpoint.check(write(run, 2))
    run_dir.acquire(run, "python again.py", overwrite=True)
    assert files(run) == {*MINE, "run.json"}


def test_overwriting_a_run_with_damaged_manifest_deletes_known_names_only(run):
    (run / "checkpoint-4" / "perforated.json").write_text("{")
    (run / "checkpoint-4" / "notes.txt").write_text("of the user")
    run_dir.acquire(run, "python train.py", overwrite=True)
    assert "notes.txt" in files(run / "checkpoint-4") and "optimizer.pt" not in files(run / "checkpoint-4")


@pytest.mark.parametrize(
    "names",
    [["../../precious/thesis.tex"], ["{root}/precious/thesis.tex"], ["linked/thesis.tex"], ["..", ""], [3, {}]],
)
def test_record_that_names_files_outside_deletes_nothing_there(names, run, precious, tmp_path):
    """The fixture `precious` checks its files."""
    names = [name.replace("{root}", str(tmp_path)) if isinstance(name, str) else name for name in names]
    (run / "final" / "linked").symlink_to(precious)
    change(run / "run.json", final=[*names, "config.json", "model.safetensors", "code/modeling_mnist.py"])
    move(run, "config.json")
    change(run / "run.json", final=[*names, "config.json"])
    run_dir.acquire(run, "python train.py", overwrite=True)
    assert (run / "final" / "linked").is_symlink()


@pytest.mark.parametrize("names", [None, 7, "config.json", {"config.json": 1}])
def test_record_without_a_list_of_files_deletes_no_model(names, run):
    change(run / "run.json", final=names)
    before = files(run)
    assert "final is not of this run" in error_of(run_dir.acquire, run, "python train.py", overwrite=True)
    assert "final is not of this run" in error_of(run_dir.acquire, run, "python train.py", resumed=True)
    assert files(run) == before


def test_overwriting_leaves_a_link_among_the_graphs(run, precious):
    (run / "perforatedai" / "best_model.pt").unlink()
    (run / "perforatedai" / "best_model.pt").symlink_to(precious / "thesis.tex")
    run_dir.acquire(run, "python train.py", overwrite=True)
    assert [path.name for path in (run / "perforatedai").iterdir()] == ["best_model.pt"]


def test_export_replaces_its_model_and_leaves_other_files(run):
    (run / "final" / "notes.txt").write_text("of the user")
    (run / "final" / "code" / "empty").mkdir()
    move(run, "config.json", "other.safetensors")
    assert files(run / "final") == {"config.json", "other.safetensors", "notes.txt"}
    assert (run / "final" / "code" / "empty").is_dir() and not (run / "final.unfinished").exists()


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json", "dendrites.json"])
def test_foreign_model_in_final_raises_at_the_start(name, tmp_path):
    """Before the training, not when the model cannot be moved there after it."""
    run_dir.acquire(tmp_path, "python train.py")
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / name).write_text("of the user")
    for how in ({"overwrite": True}, {"resumed": True}):
        assert "final is not of this run" in error_of(run_dir.acquire, tmp_path, "python train.py", **how)
    assert (tmp_path / "final" / name).read_text() == "of the user"


def test_export_over_a_file_of_the_user_raises(run):
    (run / "final" / "README.md").write_text("of the user")
    message = error_of(move, run, "config.json", "README.md")
    assert "final/README.md was not written by this run: move it away" in message
    assert (run / "final" / "README.md").read_text() == "of the user"
    assert (run / "final" / "model.safetensors").is_file(), "the model from before is still complete"


def test_export_after_a_kill_moves_all_files(run):
    (run_dir.stage(run) / "README.md").write_text("half")
    move(run, "config.json", "README.md")
    assert files(run / "final") == {"config.json", "README.md"}


# -------------------------------------------------------------------------------------------------------- acquiring


def test_two_starts_in_one_empty_folder_only_one_acquires_it(tmp_path):
    for number in range(20):
        barrier, answers = threading.Barrier(2), []

        def start(folder=tmp_path / f"{number}", barrier=barrier, answers=answers):
            barrier.wait()
            try:
                run_dir.acquire(folder, "python train.py")
                answers.append("acquired")
            except PerforatedError as error:
                answers.append(str(error))

        threads = [threading.Thread(target=start) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(answers)[1] == "acquired" and "already holds a run" in sorted(answers)[0], answers


@pytest.mark.parametrize("overwrite", [False, True])
def test_start_after_the_check_of_another_run_raises(overwrite, tmp_path, monkeypatch):
    """Both found the folder empty before one of them acquired it."""
    is_free = run_dir.check_free

    def check_free(*args, **kwargs):
        found = is_free(*args, **kwargs)
        (tmp_path / "run.json").write_text('{"command": "the other"}')
        return found

    monkeypatch.setattr(run_dir, "check_free", check_free)
    message = error_of(run_dir.acquire, tmp_path, "python train.py", overwrite=overwrite)
    assert "already holds a run" in message
    assert (tmp_path / "run.json").read_text() == '{"command": "the other"}'


def test_scores_of_this_process_do_not_make_its_folder_taken(tmp_path):
    (tmp_path / "all_results.json").write_text("{}")
    assert "not empty and holds no run" in error_of(run_dir.acquire, tmp_path, "python train.py")
    run_dir.acquire(tmp_path, "python train.py", own=True)
    assert "already holds a run" in error_of(run_dir.acquire, tmp_path, "python train.py", own=True)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("resumed", [False, True])
def test_folder_of_something_else_raises(overwrite, resumed, precious):
    message = error_of(run_dir.acquire, precious, "python train.py", overwrite=overwrite, resumed=resumed)
    assert "is not empty and holds no run" in message


def test_folder_with_checkpoints_alone_can_be_resumed(run, tmp_path):
    write(tmp_path / "copied", 2)
    run_dir.acquire(tmp_path / "copied", "python train.py", resumed=True)
    run_dir.acquire(run, "python resumed.py", resumed=True)
    record = json.loads((run / "run.json").read_text())
    assert record["command"] == "python resumed.py" and "model.safetensors" in record["final"]
    assert steps(run) == [2, 4]


def test_folder_that_is_a_file_raises(tmp_path):
    (tmp_path / "file").write_text("of the user")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    for name in ("file", "broken"):
        assert "is not a folder" in error_of(run_dir.acquire, tmp_path / name, "python train.py", overwrite=True)


def test_folder_of_the_run_may_be_a_link(tmp_path):
    """Runs are often stored on another disk than the scripts."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    run_dir.acquire(tmp_path / "run", "python train.py")
    assert checkpoint.check(write(tmp_path / "run", 2))
    run_dir.acquire(tmp_path / "run", "python train.py", overwrite=True)
    assert files(tmp_path / "disk") == {"run.json"}


@pytest.mark.parametrize("name", ['it\'s "quoted"', "with space", "x" * 250, "ä" * 100, "-rf", "$HOME;*", "."])
def test_folder_of_any_name_works(name, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    folder = type(tmp_path)(name)
    run_dir.acquire(folder, "python train.py")
    write(folder, 2)
    move(folder, "config.json")
    assert run_dir.plot_path(folder).name == f"{'here' if name == '.' else name}.png"
    checkpoint.write_whole(run_dir.plot_path(folder), "plot")
    checkpoint.write_whole(folder / "results.json", json.dumps(RESULTS))
    assert run_dir.results_of(folder) == RESULTS
    run_dir.acquire(folder, "python train.py", overwrite=True)
    assert files(folder) == {"run.json"}


def test_baseline_does_not_overwrite_its_run(run, tmp_path):
    before = files(run)
    (tmp_path / "alias").symlink_to(run)
    for folder in (run, tmp_path / "alias", tmp_path / "precious" / ".." / "run"):
        for how in ({"overwrite": True}, {"resumed": True}):
            message = error_of(run_dir.acquire, folder, "python train.py", control_of=str(run), **how)
            assert "is the run to compare with" in message
    assert files(run) == before
    run_dir.acquire(tmp_path / "run-control", "python train.py", control_of=str(run))


def test_messages_name_flags_to_a_command_line_and_calls_to_python(run, precious):
    flags = error_of(run_dir.check_free, run, from_command_line=True)
    assert "--resume_from_checkpoint true" in flags and "--overwrite_run" in flags and "--output_dir" in flags
    calls = error_of(run_dir.check_free, run)
    assert "trainer.train(resume_from_checkpoint=True)" in calls and "DendriteArguments(overwrite_run=True)" in calls
    (run / "results.json").unlink()
    for message in (calls, error_of(run_dir.results_of, run), error_of(run_dir.check_free, precious)):
        assert "--" not in message
    assert "--resume_from_checkpoint true" in error_of(run_dir.results_of, run, from_command_line=True)


# ---------------------------------------------------------------------------------------------------------- results

BAD = {
    "settings": [None, [], {}, {"control_of": None}, {"control_of": 3, "doing_pai": True}, {"doing_pai": True}],
    "restarts": [None, 3, ["4"], [4.5], [-4], {}],
    "global_step": [None, "8", 8.5, True, -1],
    "cycles": [None, {}, [3], [{}], [{"dendrites": 0, "parameters": "10", "best_validation": 0.5}]],
    "final": [None, [], {}, {"dendrites": 1, "parameters": None}],
    "metric": [None, 3],
    "command": [None, ["python"]],
    "testing_dendrite_capacity": [None, "false"],
}


def test_results_entry_of_wrong_type_raises_one_line(run):
    assert run_dir.results_of(run) == RESULTS
    for name, value in [(name, value) for name, values in BAD.items() for value in values]:
        checkpoint.write_whole(run / "results.json", json.dumps(RESULTS | {name: value}))
        assert f"no valid entry {name!r}" in error_of(run_dir.results_of, run), value


def test_results_score_that_is_no_number_raises_one_line(run):
    change(run / "results.json", final=RESULTS["final"] | {"test_accuracy": "high"})
    assert "'test_accuracy' is not a number" in error_of(run_dir.results_of, run)


def test_results_that_are_resumed_are_validated(run):
    args = types.SimpleNamespace(output_dir=str(run), resume_from_checkpoint="true")
    assert "no valid entry 'stopped_by'" in error_of(cli.already_finished, args)
    change(run / "results.json", stopped_by="max_steps")
    assert not cli.already_finished(args)
    (run / "results.json").rename(run / "moved")
    (run / "results.json").symlink_to(run / "moved")
    assert not cli.already_finished(args)


@pytest.mark.parametrize("state", ["{", "{}", '{"log_history": [3]}'])
def test_damaged_log_of_the_run_to_compare_with_is_a_warning(state, run, capsys):
    checkpoint.begin(run / "checkpoint-8")
    (run / "checkpoint-8" / "trainer_state.json").write_text(state)
    checkpoint.write_manifest(run / "checkpoint-8", FACTS | {"step": 8})
    trainer = types.SimpleNamespace(
        growth=types.SimpleNamespace(last_step=8, results=RESULTS),
        score_name="eval_accuracy",
        args=types.SimpleNamespace(greater_is_better=True),
        results={"control": {"without": 0.5}},
    )
    export.ExportingTrainer._draw_run_with_baseline(trainer, run)
    assert "run.png cannot be drawn" in "".join(capsys.readouterr())


def test_results_of_other_runs_raise(run, tmp_path):
    assert "no run in this folder" in error_of(run_dir.results_of, tmp_path)
    weights = run / "final" / "model.safetensors"
    weights.rename(tmp_path / "moved")
    assert "this run has no results.json or no model in final/" in error_of(run_dir.results_of, run)
    (tmp_path / "moved").rename(weights)
    change(run / "results.json", settings={"control_of": "other", "doing_pai": False})
    assert "is itself a control, of other" in error_of(run_dir.results_of, run)
    change(run / "results.json", settings={"control_of": None, "doing_pai": False})
    assert "not trained with dendrites" in error_of(run_dir.results_of, run)


# ---------------------------------------------------------------------------------------------------------- secrets

HIDDEN = [
    ["--hub_token", "SECRET"],
    ["--hub_token=SECRET"],
    ["--hub-token", "SECRET"],
    ["--hub_tok", "SECRET"],  # argparse accepts it
    ["--HUB_TOKEN", "SECRET"],
    ["--wandb_api_key", "SECRET"],
    ["--password", "-123SECRET"],
    ["--client_secret", "SECRET==", "SECRET"],
    ["-token", "SECRET"],
    ["+wandb.api_key=SECRET"],
    ["credential=SECRET"],
    ["https://me:SECRET@example.org/data"],
    ["--note", "hf_SECRETSECRETSECRETSECRET"],
    ["x:hf_SECRETSECRETSECRETSECRET:y"],
]
SHOWN = [
    ["--tokenizer_name", "bert"],
    ["--num_tokens", "3"],
    ["--max_new_tokens=5"],
    ["--keys_to_ignore", "a", "b"],
    ["--monkey", "x"],
    ["--tokenizer", "hf_internal"],
    ["--learning_rate", "-1e-3"],
    ["--hub_model_id", "me/model"],
    ["--use_auth_token", "--seed", "3"],
    ["a=b", "it's"],
    ["https://example.org/a@b"],
]


def test_redact_hides_secrets_and_shows_everything_else():
    for flags in HIDDEN:
        command = run_dir.redact(["train.py", *flags, "--seed", "3"])
        assert "SECRET" not in command and "***" in command and command.endswith("--seed 3"), flags
    for flags in SHOWN:
        assert run_dir.redact(["train.py", *flags]) == shlex.join(["train.py", *flags])


@pytest.mark.skipif(sys.platform == "win32", reason="has no modes")
def test_written_file_has_the_users_mode(tmp_path):
    before = os.umask(0o027)
    try:
        checkpoint.write_whole(tmp_path / "run.json", "{}")
    finally:
        os.umask(before)
    assert (tmp_path / "run.json").stat().st_mode & 0o777 == 0o640
