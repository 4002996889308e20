"""The benchmarks run, and print what benchmarks/README.md shows; their times are not judged."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_throughput_prints_its_tables(tmp_path):
    flags = "--repeats 1 --steps 4 --evaluation_steps 10 --max_dendrites 1 --widths 2".split()
    command = [sys.executable, str(ROOT / "benchmarks" / "throughput.py"), *flags]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    tables = [
        [line.strip("| ").split(" | ") for line in block.strip().splitlines()]
        for block in re.findall(r"(?:^\|.*\n)+", run.stdout, re.MULTILINE)
    ]
    assert [len(table) - 2 for table in tables] == [4, 2, 6, 2, 2]
    assert [row[:2] for row in tables[0][2:]] == [["0", "64"], ["0", "512"], ["3", "64"], ["3", "512"]]
    for head, _, *rows in tables:
        for row in rows:
            assert len(row) == len(head)
            numbers = row if head[0] != "measure" else row[1:]
            values = [float(number.replace(",", "")) for number in numbers]
            assert min(values[1:]) > 0, row
    assert len(re.findall("^fitted: ", run.stdout, re.MULTILINE)) == 2
    assert all(word in run.stdout for word in ("cores", "torch 2", "perforatedai 3", "seed 0", "--repeats 1"))
    assert not list(tmp_path.iterdir()), "runs are made elsewhere"
