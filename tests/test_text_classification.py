"""The text classification example on a small CSV file and a tiny pretrained body."""

import csv
import json
from pathlib import Path

import pytest
import text_classification_perforatedai as example
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel, BertTokenizer

from perforated_trainer import load_dendrites

TEXTS = Path(__file__).with_name("texts.csv")


@pytest.fixture
def body(tmp_path, monkeypatch):
    """A folder with a small BERT of random weights and a tokenizer of whole words."""
    monkeypatch.chdir(tmp_path)
    with TEXTS.open() as file:
        words = sorted({word for row in csv.DictReader(file) for word in row["text"].split()})
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(tokens), max_position_embeddings=32, **sizes)).save_pretrained("body")
    BertTokenizer(vocab={token: i for i, token in enumerate(tokens)}).save_pretrained("body")
    return "body"


def run(body, *flags):
    names = ["--model_name_or_path", body, "--dataset_name", str(TEXTS), "--use_cpu", "--disable_tqdm", "true"]
    return example.main([*names, "--dendrite_rank", "2", "--num_train_epochs", "3", *flags])


def test_example_trains_saves_dendrites_and_its_baseline(body, capsys):
    assert run(body, "--save_name", "run", "--max_dendrites", "2") == 0
    results = json.loads(Path("run/results.json").read_text())
    assert results["final"]["dendrites"] >= 1 and 0 <= results["final"]["test_accuracy"] <= 1
    final = AutoModelForSequenceClassification.from_pretrained("run/final")
    assert set(final.config.id2label.values()) == {"food", "weather"}
    base = AutoModelForSequenceClassification.from_pretrained(body, num_labels=2)
    loaded = load_dendrites(base, "run/dendrites")
    inputs = {"input_ids": torch.tensor([[2, 7, 9, 3]])}
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, final(**inputs).logits)
    small, whole = (Path("run", name, "model.dendrites.safetensors").stat().st_size for name in ("dendrites", "final"))
    assert small < whole

    assert run(body, "--control_of", "run", "--max_dendrites", "2") == 0
    control = json.loads(Path("run-control/results.json").read_text())
    assert control["final"]["dendrites"] == 0 and control["global_step"] == results["global_step"]
    assert "control" in control


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--text_column", "words"], "no column 'words', there are text, label"),
        (["--model_name_or_path", "nowhere"], "error: nowhere: "),
        (["--dendrite_rank", "0"], "--dendrite_rank 0"),
        (["--dataset_name", "none.csv"], "none.csv: "),
    ],
)
def test_example_bad_flags_exit_with_one_line(flags, message, body, capsys):
    assert run(body, "--save_name", "run", *flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
