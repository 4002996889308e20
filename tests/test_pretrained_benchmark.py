"""The comparison with LoRA on a pretrained encoder: its rules, and a run at a tiny size."""

import json
import random
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import pretrained  # noqa: E402

WORDS = "red green blue one two three cat dog bird up down left".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with a tiny random BERT and 96 texts of three classes."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("pretrained")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=5 + len(WORDS), **sizes)).save_pretrained(folder / "model")
    draw, lines = random.Random(0), ["label,text"]
    for _ in range(96):
        label = draw.randrange(3)
        words = draw.choices(WORDS[4 * label : 4 * label + 4], k=2) + draw.choices(WORDS, k=draw.randrange(4))
        lines.append(f"class {label},{' '.join(words)}")
    (folder / "texts.csv").write_text("\n".join(lines))
    return folder


@pytest.fixture
def call(data, tmp_path, monkeypatch, capsys):
    """Runs the script on the tiny data, in this process, and returns what it prints."""

    def call(*flags):
        command = ["--csv", data / "texts.csv", "--model", data / "model", "--results", tmp_path / "pretrained.jsonl"]
        command += ["--test_texts", 24, "--validation_texts", 24, "--blocks", 2, "--train_texts", 32, "--rank", 2]
        command += ["--search_seeds", 9, "--trials", 2, *flags]
        monkeypatch.setattr(sys, "argv", ["pretrained.py", *map(str, command)])
        pretrained.main()
        return capsys.readouterr().out

    return call


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_benchmark_tiny_model_records_all_rows_once(call, data, tmp_path):
    results = tmp_path / "pretrained.jsonl"
    first = call("--seeds", 0)
    records = read(results)
    runs = [record for record in records if not record["search"]]
    final = {record["row"]: record for record in runs}
    assert set(final) == set(pretrained.ROWS) and set(list(final)[-4:]) == set(pretrained.ADDING)
    assert len(records) - len(runs) == 2 * 7  # seven rows have a separate search
    assert len(runs) == 2 * 8 + 4  # two candidates of each row, one of each row that adds dendrites
    settings = [
        [run["settings"] for run in runs if run["row"] == name] for name in (pretrained.IDENTITY, pretrained.TANH)
    ]
    assert settings[0] == settings[1]
    numbers = {name: record["trained_parameters"] for name, record in final.items()}
    assert (
        numbers[pretrained.LORA] == numbers[pretrained.TANH] == numbers[pretrained.IDENTITY] < numbers[pretrained.DORA]
    )
    assert numbers[pretrained.HEAD] == 17 * 3
    for growing, baseline in (
        (pretrained.GROWING, pretrained.AS_LONG),
        (pretrained.FULL_RANK, pretrained.FULL_AS_LONG),
    ):
        assert final[growing]["cycles"] == final[baseline]["cycles"] > 1
        assert final[growing]["settings"] == final[baseline]["settings"]
    for record in final.values():
        assert sum(pretrained.hex_to_bits(record["correct"])) / 24 == pytest.approx(record["test_accuracy"])
    # Interrupted and resumed: only missing runs are made, with the same outcome.
    results.write_text("".join(f"{json.dumps(record)}\n" for record in records[:-1]))
    again = call("--seeds", 0)
    ignored = {"cpu_seconds": 0}
    assert [record | ignored for record in read(results)] == [record | ignored for record in records]
    assert (
        len([line for line in again.splitlines() if "validation" in line and "test" in line and "|" not in line]) == 1
    )
    written = results.read_bytes()
    assert str(data).encode() not in written and str(ROOT).encode() not in written
    assert first.count("| LoRA |") == 4  # results, settings, both candidates
    tables, trials = call("--table"), call("--table", "--seeds", 1)
    assert tables == again[again.index("\n2 blocks adapted") :]
    assert "search of" in trials and "2 blocks" not in trials and trials.strip() in tables


def test_growing_row_uses_the_settings_that_its_row_is_reported_with(call, tmp_path):
    results = tmp_path / "pretrained.jsonl"
    call("--seeds", 0, "--rows", pretrained.TANH)
    run = read(results)[-1]
    better = run | {"settings": run["settings"] | {"rate": 0.02}, "validation_accuracy": 1.5}
    with results.open("a") as file:
        file.write(json.dumps(better) + "\n")
    call("--seeds", 0, "--rows", pretrained.GROWING)
    assert read(results)[-1]["row"] == pretrained.GROWING
    assert read(results)[-1]["settings"] == better["settings"]


@pytest.mark.parametrize("alpha", [2, 3])
def test_next_trial_rates_then_one_change_at_a_time(alpha):
    row = pretrained.Row("lora", [1.0, 2.0], [{"dropout": 0.1}, {"alpha": 1}], {"alpha": alpha})
    first = pretrained.FIRST | {"alpha": alpha}
    assert pretrained.next_trial(row, []) == first | {"rate": 1.0}
    done = [(first | {"rate": 1.0}, (0.5,)), (first | {"rate": 2.0}, (0.6,))]
    assert pretrained.next_trial(row, done) == first | {"rate": 4.0}  # the best is at the end of the range
    done.append((first | {"rate": 4.0}, (0.1,)))
    assert pretrained.next_trial(row, done) == first | {"rate": 2.0, "dropout": 0.1}
    done.append((first | {"rate": 2.0, "dropout": 0.1}, (0.7,)))
    assert pretrained.next_trial(row, done) == first | {"rate": 2.0, "dropout": 0.1, "alpha": 1}
    done.append((first | {"rate": 2.0, "dropout": 0.1, "alpha": 1}, (0.7,)))
    assert pretrained.next_trial(row, done) is None


def test_with_best_settings_most_seeds_then_validation():
    def runs(rate, *scores, loss=1.0):
        return [
            {"settings": {"rate": rate}, "seed": i, "validation_accuracy": score, "validation_loss": loss}
            for i, score in enumerate(scores)
        ]

    two, three, better = runs(1, 0.9, 0.9), runs(2, 0.5, 0.6, 0.7), runs(3, 0.6, 0.7, 0.8)
    assert pretrained.with_best_settings(two + three + better) == better
    same = runs(4, 0.8, 0.7, 0.6, loss=0.9)  # another order of a sum; the loss decides
    assert pretrained.with_best_settings(better + same) == same
    assert pretrained.with_best_settings([]) == []


def test_difference_pairs_seeds_and_texts():
    def run(seed, bits):
        return {"seed": seed, "test_accuracy": sum(bits) / len(bits), "correct": pretrained.bits_to_hex(bits)}

    one = [run(0, [0, 1, 1, 1]), run(1, [1, 1, 1, 1]), run(2, [1, 1, 1, 1])]
    other = [run(1, [0, 0, 1, 1]), run(0, [0, 0, 1, 1])]
    over_seeds, over_texts, seeds = pretrained.difference(one, other)
    # Differences of 25 and 50 points: t with one degree of freedom. Of the texts: 50, 100, 0, 0 points.
    assert seeds == 2 and over_seeds == "+37.50 (-121.33 to +196.33)"
    assert over_texts == "+37.50 (-9.41 to +84.41)"


def test_batches_one_epoch_holds_each_text_once():
    import torch

    indices, lengths = torch.arange(100, 200), torch.arange(300) % 7
    found = pretrained.batches(indices, lengths, torch.Generator().manual_seed(1))
    assert sorted(torch.cat(found).tolist()) == indices.tolist()
    assert max(len(batch) for batch in found) == pretrained.BATCH


def test_states_lower_blocks_computed_once_equal_the_whole_encoder(data):
    import torch

    texts = pretrained.Texts(data / "texts.csv", str(data / "model"), 24, 24, torch.device("cpu"))
    torch.manual_seed(0)
    indices, logits = torch.arange(8), []
    for blocks in (3, 2, 0):
        torch.manual_seed(0)
        model = pretrained.Classifier(texts.encoder, blocks, 3, 0.0).eval()
        logits.append(pretrained.logits_of(model, texts, texts.states(blocks), indices))
    hidden = [texts.encoder(torch.tensor([ids])).last_hidden_state[0].mean(0) for ids in texts.ids[:8]]
    expected = model.head(torch.stack(hidden))
    for values in logits:
        torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)
