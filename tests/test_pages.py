"""The pages say what is true: their code runs, their links lead somewhere, their numbers are those of the records."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md", *ROOT.glob("docs/*.md")]


def test_the_front_page_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_front_page_leads_to_each_page():
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / "README.md").read_text())
    assert {page for page in PAGES if page.name != "README.md"} <= {(ROOT / link).resolve() for link in links}
    assert "benchmarks/README.md" in links


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_end_with_an_empty_line(page):
    """Else what follows becomes a row."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    assert re.findall(r"^\|.*\|\n[^|\n].*", text, re.MULTILINE) == []


def test_each_room_has_its_line():
    rooms = re.search(r"## The rooms\n(.*?)\n## ", (ROOT / "docs" / "how_it_works.md").read_text(), re.DOTALL)[1]
    files = {path.name for path in (ROOT / "perforated_trainer").glob("*.py")} - {"__init__.py"}
    named = [cell.split("|")[1] for cell in rooms.splitlines() if cell.startswith("| `")]
    assert sorted(re.findall(r"`(\w+\.py)`", " ".join(named))) == sorted(files)


def test_settings_that_are_named_exist():
    from perforated_trainer import DendriteArguments

    (part,) = re.findall(r"\| to \| set \|\n(.*?)\n\n", (ROOT / "docs" / "your_model.md").read_text(), re.DOTALL)
    named = re.findall(r"`(\w+)`", " ".join(row.split("|")[2] for row in part.splitlines()))
    assert len(named) > 5 and set(named) <= set(DendriteArguments.__dataclass_fields__)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_are_there(page):
    named = re.findall(
        r"`(?:python )?((?:tests|benchmarks|examples|docs|perforated_trainer)/[\w./-]+\.\w+)", page.read_text()
    )
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_code_of_the_front_page(tmp_path):
    """Another model, trained and loaded as it stands there, here with little data and few steps."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL))
    few = {
        "DataArguments()": "DataArguments(max_train_samples=200, max_eval_samples=50)",
        "num_train_epochs=1_000_000": "max_steps=20, use_cpu=True",
        "eval_steps=500": "eval_steps=2",
        "n_epochs_to_switch=5": "testing_dendrite_capacity=True",
    }
    for given, small in few.items():
        assert code.count(given) == 1
        code = code.replace(given, small)
    code += "\nassert model.num_parameters() == trainer.num_parameters\nprint(trainer.num_dendrites, 'dendrites')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("3 dendrites\n") and "model: resnet/final" in done.stdout
    assert json.loads((tmp_path / "resnet" / "results.json").read_text())["final"]["dendrites"] == 3


def test_every_flag_of_the_front_page_exists():
    from transformers import HfArgumentParser, TrainingArguments

    import mnist_huggingface_perforatedai as script
    from perforated_trainer import DendriteArguments

    parser = HfArgumentParser((script.DataArguments, DendriteArguments, TrainingArguments))
    known = {flag for action in parser._actions for flag in action.option_strings}
    names = "processes resume any_script how_it_works your_model from_the_old_instructions".split()
    for page in PAGES[:1] + [ROOT / "docs" / f"{name}.md" for name in names]:
        text = re.sub(r"`?(python|torchrun|pip|pytest)[^`\n]*", "", page.read_text())
        flags = set(re.findall(r"`(--\w+)", text))
        assert flags <= known, flags - known
