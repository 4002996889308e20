"""The speed benchmark runs and prints the tables of benchmarks/README.md; the times are not tested."""

import re
import sys
from pathlib import Path

import kills
import pytest
from test_script import write_idx

ROOT = Path(__file__).parent.parent


def test_throughput_prints_its_tables(tmp_path):
    short = "--max_train_samples 300 --max_eval_samples 50 --eval_steps 5 --max_dendrites 1 --n_epochs_to_switch 1"
    flags = [
        "--repeats",
        "1",
        "--steps",
        "4",
        "--dendrites",
        "0",
        "1",
        "--run_flags",
        f"{short} --per_device_train_batch_size 32",
    ]
    run = kills.forked([sys.executable, str(ROOT / "benchmarks" / "throughput.py"), *flags], cwd=tmp_path)
    assert run.returncode == 0
    tables = [
        [line.strip("| ").split(" | ") for line in block.strip().splitlines()]
        for block in re.findall(r"(?:^\|.*\n)+", run.stdout, re.MULTILINE)
    ]
    steps, whole, parts = (len(table) - 2 for table in tables)
    assert (steps, whole) == (4, 2) and parts > 9
    assert [row[:2] for row in tables[0][2:]] == [["0", "64"], ["0", "512"], ["1", "64"], ["1", "512"]]
    for row in tables[0][2:]:
        assert min(float(number.replace(",", "")) for number in row[2:7]) > 0, row
    for row in tables[1][2:]:
        assert min(float(number.replace(",", "")) for number in row[1:4]) > 0 and re.search("met|missed", row[4]), row
    shares = {row[0]: float(row[1]) for row in tables[2][2:]}
    assert sum(shares.values()) == pytest.approx(100, abs=1) and min(shares.values()) > 0
    assert all(word in run.stdout for word in ("cores", "torch 2", "perforatedai 3", "seed 0", "--repeats 1"))
    assert not list(tmp_path.iterdir()), "runs are made elsewhere"


def test_scale_prints_its_table(run_benchmark):
    printed = run_benchmark("scale.py", "--dendrites", "1", "--steps", "1")
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith(("| BERT", "| ResNet"))]
    assert [row[:2] for row in rows] == [["BERT", "0"], ["BERT", "1"], ["ResNet", "0"], ["ResNet", "1"]]
    assert all(min(float(number.replace(",", "")) for number in row[2:]) > 0 for row in rows)


def test_data_of_the_hub_is_timed(tmp_path):
    write_idx(tmp_path)
    flags = ["--data_dir", str(tmp_path), "--max_steps", "4", "--eval_steps", "2", "--use_cpu"]
    run = kills.forked([sys.executable, str(ROOT / "benchmarks" / "hub_form.py"), *flags])
    assert run.returncode == 0
    assert "stopped by max_steps at step 4" in run.stdout
    assert re.search(r"120 PNGs; launch to final table \d+ s, of which training \d+ s for 4 steps", run.stdout)
