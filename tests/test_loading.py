"""`from_pretrained` of models that were trained: the MNIST script's and a BERT, from each folder that a run writes."""

import json
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import small_bert
import torch
from models import rows, tied
from transformers import AutoModelForImageClassification, AutoModelForMaskedLM

from perforated_trainer import load_perforated_model
from perforated_trainer.layers import DendriteLinear, layers_with_dendrites

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(finished, tmp_path_factory):
    """For each of the two: the folder of the run, what loads it, a batch, and the logits of the trained model."""
    folder, before = tmp_path_factory.mktemp("loading"), Path.cwd()
    os.chdir(folder)
    try:
        trainer = small_bert.train("bert")
    finally:
        os.chdir(before)
    batch = trainer.data_collator([dict(row) for row in rows("BertForMaskedLM")[:4]])
    with torch.no_grad():
        expected = trainer.model.eval()(**batch).logits
    images = {"pixel_values": torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))}
    mnist = load_mnist(finished / "run/final")
    with torch.no_grad():
        return {
            "mnist": (finished / "run", load_mnist, images, mnist(**images).logits),
            "bert": (folder / "bert", AutoModelForMaskedLM.from_pretrained, batch, expected),
        }


def load_mnist(folder, **kwargs):
    return AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True, **kwargs)


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def last_checkpoint(run):
    return max(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


@pytest.fixture(params=["mnist", "bert"])
def trained(request, runs):
    return runs[request.param]


def test_final_checkpoints_and_the_output_folder(trained):
    run, load, batch, expected = trained
    assert torch.equal(logits(load(run / "final"), batch), expected)
    # After the last restructure the library goes back to the best model, and the last checkpoint holds that one.
    assert torch.equal(logits(load(last_checkpoint(run)), batch), expected)
    if (run / "config.json").exists():  # written by `save_model()`
        assert torch.equal(logits(load(run), batch), expected)
    numbers = set()
    for folder in run.glob("checkpoint-*"):
        numbers |= {layer.num_dendrites for layer in layers_with_dendrites(load(folder)).values()} or {0}
    assert len(numbers) >= 3, numbers


def test_the_thin_name_and_the_class_itself(runs):
    run, load, batch, expected = runs["bert"]
    model = load_perforated_model(AutoModelForMaskedLM, run / "final")
    assert torch.equal(logits(model, batch), expected)
    same = type(load(run / "final")).from_pretrained(run / "final")
    assert torch.equal(logits(same, batch), expected)
    assert any(isinstance(layer, DendriteLinear) for layer in same.modules())


def test_saved_again_nothing_changes(trained, tmp_path):
    run, load, batch, expected = trained
    model, folder = load(run / "final"), run / "final"
    for number in range(2):
        model.save_pretrained(tmp_path / str(number))
        weights = "model.dendrites.safetensors"
        assert (tmp_path / str(number) / weights).read_bytes() == (folder / weights).read_bytes()
        model = load(tmp_path / str(number))
        assert torch.equal(logits(model, batch), expected)
    again = json.loads((tmp_path / "1/config.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    assert again["quantization_config"] == config["quantization_config"]


def test_shards(trained, tmp_path):
    run, load, batch, expected = trained
    load(run / "final").save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(logits(load(tmp_path), batch), expected)
    next(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(OSError, match="no file"):
        load(tmp_path)


def test_dtype_and_device_map(trained):
    run, load, batch, expected = trained
    model = load(run / "final", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    half = {name: value.bfloat16() if value.is_floating_point() else value for name, value in batch.items()}
    assert (logits(model, half).float() - expected).abs().max() < 0.1 * expected.abs().max()
    assert torch.equal(logits(load(run / "final", device_map="auto"), batch), expected)


def test_tied_weights_stay_tied(runs):
    run, load, *_ = runs["bert"]
    model = load(run / "final")
    assert [names for names in tied(model) if any("embeddings" in name for name in names)] == [
        ["bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"]
    ]
    with safetensors.safe_open(run / "final/model.dendrites.safetensors", "pt") as file:
        assert "cls.predictions.decoder.weight" not in file.keys()  # noqa: SIM118 - no dict


def test_size_of_the_file(trained):
    run, load, *_ = trained
    model = load(run / "final")
    parameters = json.loads((run / "results.json").read_text())["final"]["parameters"]
    assert model.num_parameters() == parameters
    assert (run / "final/model.dendrites.safetensors").stat().st_size < 4 * parameters + 10_000


# ------------------------------------------------------------------------------------------------------------ bad input


def change_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def truncate(folder):
    weights = folder / "model.dendrites.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def drop_a_dendrite(folder):
    weights = folder / "model.dendrites.safetensors"
    tensors = safetensors.torch.load_file(weights)
    del tensors[next(name for name in tensors if name.endswith("dendrite_to_output"))]
    safetensors.torch.save_file(tensors, weights, {"format": "pt"})


def one_dendrite_more(folder):
    def change(config):
        name = next(iter(config["layers"]))
        config["layers"][name] += 1

    change_config(folder, change)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.dendrites.safetensors").unlink(), "no file"),
        (truncate, "damaged"),
        (drop_a_dendrite, "dendrite_to_output is missing"),
        (one_dendrite_more, "do not fit the dendrites in config.json"),
        (lambda folder: change_config(folder, lambda config: config["layers"].update(nowhere=1)), "nowhere"),
        (lambda folder: change_config(folder, lambda config: config.update(format=99)), "newer version"),
    ],
    ids=["missing", "damaged", "a dendrite missing", "a dendrite more", "a layer more", "newer format"],
)
def test_bad_input_is_one_clear_line(trained, tmp_path, damage, message):
    run, load, *_ = trained
    folder = tmp_path / "final"
    shutil.copytree(run / "final", folder)
    damage(folder)
    with pytest.raises((OSError, ValueError), match=message) as caught:
        load(folder)
    assert len(str(caught.value).strip().splitlines()) == 1
