"""The benchmarks that measure what dendrites give: run at a tiny size, and their table recomputed from the records."""

import json
import math
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "dendrites.jsonl"
TINY = ["--max_train_samples", "320", "--max_eval_samples", "50", "--eval_steps", "5", "--max_dendrites", "1"]


def call(script, *flags):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, flags)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_campaign_records_its_runs_and_does_not_repeat_them(tmp_path):
    results = tmp_path / "dendrites.jsonl"
    flags = ["--results", results, "--groups", "a", "d", "f", "--seeds", "7", "--processes", "1", *TINY]
    first = call("dendrites.py", *flags, "--n_epochs_to_switch", "2")
    with_dendrites, longer, wider = [json.loads(line) for line in results.read_text().splitlines()]
    assert (with_dendrites["group"], longer["group"], wider["group"]) == ("a", "d", "f")
    for without in (longer, wider):
        assert without["steps"] == with_dendrites["steps"] == with_dendrites["cycle_ends"][-1]
        assert (without["cycle_ends"], without["dendrites"]) == (with_dendrites["cycle_ends"], 0)
    assert longer["parameters"] == 1610
    assert wider["parameters"] == pytest.approx(with_dendrites["parameters"], rel=0.02)
    written = results.read_bytes()
    second = call("dendrites.py", *flags, "--n_epochs_to_switch", "2")
    assert results.read_bytes() == written
    table = first[first.index("| group") :]
    assert table == second[second.index("| group") :]
    assert (
        f"| with dendrites (a) | 4-8-16 | 1 | {with_dendrites['dendrites']:.1f} | {with_dendrites['parameters']:,} |"
        in table
    )


def test_a_search_records_its_trials(tmp_path):
    results = tmp_path / "search.jsonl"
    flags = ["--results", results, "--processes", "1", "--trials", "1", *TINY, "--max_steps", "5"]
    printed = call("search.py", *flags)
    (record,) = [json.loads(line) for line in results.read_text().splitlines()]
    assert record["steps"] == 5
    assert record["settings"]["learning_rate"] == record["trial"]["learning_rate"]
    error = 100 * (1 - record["cycles"][0]["best_validation"])
    assert f"| nothing | {record['commit']} | 5 | {record['cpu_seconds']:.0f} | {error:.2f} |" in printed
    call("search.py", *flags)
    assert len(results.read_text().splitlines()) == 1


@pytest.mark.skipif(not RESULTS.is_file(), reason="no campaign is recorded")
@pytest.mark.parametrize("data", [["--data_dir", "mnist"], []], ids=["complete", "default"])
def test_the_table_is_that_of_the_records(data, tmp_path):
    records = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    records = [record for record in records if record["data"] == (data[-1] if data else "default")]
    copy = tmp_path / "dendrites.jsonl"
    copy.write_bytes(RESULTS.read_bytes())
    table = call("dendrites.py", "--table", "--results", copy, *data)
    if data:
        assert copy.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]
    rows = {(re.search(r"\((.+)\)", row[0])[1], row[1]): row[2:] for row in rows[2:]}
    assert sum(int(row[0]) for row in rows.values()) == len(records)
    for (group, widths), row in rows.items():
        runs = [r for r in records if r["group"] == group and widths in ("as (a)", "-".join(map(str, r["widths"])))]
        assert len({run["seed"] for run in runs}) == len(runs) == int(row[0])
        for column, name in ((1, "dendrites"), (2, "parameters"), (3, "steps"), (4, "cpu_seconds")):
            tolerance = 0.06 if name == "dendrites" else 0.51
            assert float(row[column].replace(",", "")) == pytest.approx(
                sum(run[name] for run in runs) / len(runs), abs=tolerance
            )
        for column, name in ((5, "validation_error"), (6, "test_error")):
            errors = [run[name] for run in runs]
            mean = sum(errors) / len(errors)
            spread = math.sqrt(sum((error - mean) ** 2 for error in errors) / max(len(errors) - 1, 1))
            numbers = [float(number) for number in row[column].split(" ± ")]
            assert numbers == pytest.approx([mean, spread][: len(numbers)], abs=0.0051)
            assert (len(numbers) == 2) == (len(errors) > 1)
    error = {(record["group"], record["seed"]): record["test_error"] for record in records}
    for other, printed in re.findall(r"that of \((.)\), %: (-?[\d.]+)", table):
        seeds = [seed for group, seed in error if group == "a" and (other, seed) in error]
        reductions = [100 - 100 * error["a", seed] / error[other, seed] for seed in seeds]
        assert float(printed) == pytest.approx(statistics.fmean(reductions), abs=0.051)


@pytest.mark.parametrize(
    "command",
    [
        ["dendrites.py", "--table", "--data_dir", "mnist"],
        ["dendrites.py", "--table"],
        ["search.py", "--table"],
        ["bert.py"],
    ],
)
def test_the_readme_shows_what_is_recorded(command, tmp_path):
    """Each row that is computed from the records, and each comparison, stands in README as it is printed."""
    records = {path: path.read_bytes() for path in RESULTS.parent.iterdir()}
    if command[0] == "dendrites.py":
        copy = tmp_path / RESULTS.name  # the plot is drawn beside it
        copy.write_bytes(records[RESULTS])
        command = [*command, "--results", copy]
    printed = [line for line in call(*command).splitlines() if line.startswith(("| ", "test error of"))]
    assert len(printed) > 3
    readme = (ROOT / "README.md").read_text().splitlines()
    assert [line for line in printed if line not in readme and f"- {line}" not in readme] == []
    assert {path: path.read_bytes() for path in RESULTS.parent.iterdir()} == records
