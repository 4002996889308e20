"""The language modeling example on the command line: results, resume, reload, bad input."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import bert_language_modeling_perforatedai as example
import pytest
import torch

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "bert_language_modeling_perforatedai.py"

# The learning rate falls to almost zero at the first improvement below 5%: the first cycle ends early, and a dendrite,
# which starts at the full rate again, reliably improves the loss.
TINY = """
    --save_name run --config_overrides hidden_size=8,intermediate_size=16 --vocab_size 300 --max_seq_length 16
    --max_train_samples 128 --max_eval_samples 40 --eval_steps 5 --save_steps 5 --logging_steps 5
    --save_total_limit 100 --n_epochs_to_switch 2 --improvement_threshold 0.01 --max_dendrites 1 --learning_rate 1e-2
    --lr_scheduler_kwargs {"factor":0.001,"patience":0,"threshold":0.05}
""".split()


def results(folder):
    return json.loads((folder / "run" / "results.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder of a complete tiny run with a dendrite."""
    folder = tmp_path_factory.mktemp("bert")
    done = subprocess.run([sys.executable, str(EXAMPLE), *TINY], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (folder / "log.txt").write_text(done.stdout)
    return folder


def test_run_keeps_a_dendrite_and_reports_it(finished):
    result = results(finished)
    assert result["stopped_by"] == "tracker"
    assert result["dataset"] == {
        "name": f"reference of Python {sys.version.split()[0]}",
        "train": 128,
        "validation": 40,
        "test": 40,
    }
    before, after = result["cycles"]
    assert (before["dendrites"], after["dendrites"], result["final"]["dendrites"]) == (0, 1, 1)
    assert after["best_validation"] < before["best_validation"] and after["parameters"] > before["parameters"]
    # a model is kept if it improves by 1%: the best score may be another one
    assert result["final"]["validation_loss"] == pytest.approx(after["best_validation"], rel=0.01)
    table = (finished / "log.txt").read_text()
    for cycle in (before, after):
        assert cycle["validation_perplexity"] == pytest.approx(math.exp(cycle["best_validation"]))
        for score in (cycle["best_validation"], cycle["validation_perplexity"], cycle["test_perplexity"]):
            assert f" {score:.4f}" in table


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """Folder and trainer of the same run, in this process, stopped at step 10 and resumed."""
    folder, trainers = tmp_path_factory.mktemp("resumed"), []

    class Remembering(example.MaskingTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            trainers.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(example, "MaskingTrainer", Remembering)
        assert example.main([*TINY, "--max_steps", "10"]) == 0
        assert results(folder)["stopped_by"] == "max_steps"
        assert example.main([*TINY, "--resume_from_checkpoint", "true"]) == 0
        yield folder, trainers[-1]


def test_resumed_run_equals_the_run(finished, resumed):
    assert results(finished)["cycles"][0]["global_step"] > 10
    for key in ("cycles", "final", "global_step", "stopped_by"):
        assert results(resumed[0])[key] == results(finished)[key]
    for name in ("model.dendrites.safetensors", "tokenizer.json"):
        assert (resumed[0] / "run/final" / name).read_bytes() == (finished / "run/final" / name).read_bytes()


def test_loaded_model_has_bitwise_equal_logits(resumed):
    folder, trainer = resumed
    model, ids = trainer.model.eval(), trainer.test_dataset[:8]["input_ids"]
    with torch.no_grad():
        torch.save({"ids": ids, "logits": model(input_ids=ids).logits}, folder / "trained.pt")
    code = """
import torch
from transformers import AutoTokenizer, BertForMaskedLM
from perforated_trainer import load_perforated_model
model, trained = load_perforated_model(BertForMaskedLM, "run/final"), torch.load("trained.pt")
with torch.no_grad():
    assert torch.equal(model(input_ids=trained["ids"]).logits, trained["logits"])
everything = model.named_parameters(remove_duplicate=False)
decoder = [p for name, p in everything if "predictions.decoder" in name and p.ndim == 2]
assert decoder and all(p is model.get_input_embeddings().weight for p in decoder), "the decoder is no longer tied"
print(sum(p.numel() for p in model.parameters()), len(AutoTokenizer.from_pretrained("run/final")))
"""
    card = (folder / "run" / "final" / "README.md").read_text()
    lines = re.findall("```python\n(.*?)```", card, re.DOTALL)  # as the card says, from the folder of the run
    code += "\n".join(
        [lines[0].replace("print(", "("), "print(model.model.num_parameters(), len(model.tokenizer))", ""]
    )
    code += lines[-1]
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    final = results(folder)["final"]
    assert final["dendrites"] > 0 and done.stdout.split() == 2 * [str(final["parameters"]), "300"]


def test_tokenizer_is_the_same_each_time():
    texts = example.read_python_reference()
    first, second = (example.train_tokenizer(texts, 2000) for _ in range(2))
    assert first.get_vocab() == second.get_vocab() and len(first) == 2000
    assert first.tokenize("The interpreter") == ["the", "interpreter"]


def test_validation_data_is_masked_once_and_separate_from_training():
    texts = example.read_texts(example.DataArguments())[1]
    assert not set(texts["train"]) & (set(texts["validation"]) | set(texts["test"]))
    tokenizer = example.train_tokenizer(texts["train"], 1000)
    mask = example.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    parts = example.make_data(example.DataArguments(), mask, texts)
    assert set(parts["train"].column_names) == {"input_ids"}
    for part in ("validation", "test"):
        ids, labels = parts[part]["input_ids"][:], parts[part]["labels"][:]
        assert ids.shape == labels.shape and ids.shape[1] == 32
        assert 0.1 < (labels != -100).float().mean() < 0.16  # special tokens are never masked
    again = example.make_data(example.DataArguments(), mask, texts)
    assert torch.equal(parts["validation"]["labels"][:], again["validation"]["labels"][:])


def test_text_files_are_read_and_split(tmp_path):
    lines = example.read_python_reference()
    (tmp_path / "train.txt").write_text("\n".join(lines[:100]) + "\n\n")
    (tmp_path / "other.txt").write_text("\n".join(lines[100:120]))
    args = example.DataArguments(train_file=str(tmp_path / "train.txt"), validation_file=str(tmp_path / "other.txt"))
    name, texts = example.read_texts(args)
    assert name == "train.txt" and texts == {"train": lines[:100], "validation": lines[100:120]}
    args.validation_file = None
    texts = example.read_texts(args)[1]
    assert sorted(chain for part in texts.values() for chain in part) == sorted(lines[:100])
    assert set(texts) == {"train", "validation", "test"}


def test_width_shrinks_the_model(tmp_path):
    tokenizer = example.train_tokenizer(example.read_python_reference(), 300)
    whole = example.build_model(example.ModelArguments(config_overrides="hidden_size=64"), 32, tokenizer).config
    half = example.build_model(
        example.ModelArguments(config_overrides="hidden_size=64", width=0.4), 32, tokenizer
    ).config
    assert (whole.hidden_size, whole.intermediate_size) == (64, 128)
    assert (half.hidden_size, half.intermediate_size) == (24, 51) and half.hidden_size % half.num_attention_heads == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--train_file missing.txt", "--train_file missing.txt"),
        ("--validation_file missing.txt", "--train_file"),
        ("--config_overrides hiden_size=8", "hiden_size"),
        ("--config_overrides hidden_size=9", "multiple of the number of attention heads"),
        ("--config_overrides vocab_size=10", "10 tokens"),
        ("--mlm_probability 1.5", "--mlm_probability 1.5"),
        ("--max_seq_length 30000", "shorter than one sequence"),
        ("--train_file short.txt", "the train text is shorter"),
        ("--width 0", "--width 0"),
        ("--model_name_or_path nowhere", "nowhere"),
        ("--dataset_name nobody/nothing", "nobody/nothing"),
        ("--no_such_flag", "--no_such_flag"),
        ("--learning_rate high", "high"),
    ],
)
def test_bad_input_exits_with_one_line(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("Only one line.\n")
    replaced = flags.split()[0]
    kept = TINY[:2] if replaced == "--max_seq_length" else TINY
    try:
        status = example.main([*kept, *flags.split()])
    except SystemExit as error:
        status = error.code
    errors = capsys.readouterr().err.strip().splitlines()
    assert status == 2 and len(errors) == 1 and message in errors[0], errors
    assert not (tmp_path / "run").exists()


def test_finished_run_is_not_overwritten(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished)
    before = (finished / "run" / "results.json").read_bytes()
    assert example.main(TINY) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert (finished / "run" / "results.json").read_bytes() == before
