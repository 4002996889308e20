"""The pages: their code runs, links resolve, generated tables are current, and named files and flags exist."""

import ast
import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
import tokenize
import tomllib
from pathlib import Path

import pytest
from transformers import HfArgumentParser, TrainingArguments

import mnist_huggingface_perforatedai as script
from perforated_trainer import DendriteArguments

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))
import generate  # noqa: E402

README = ROOT / "README.md"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def text_of(page):
    return page.read_text(encoding="utf-8")


def without_code(text):
    """A page without its code blocks, inline code and comments."""
    text = re.sub(r"```.*?```|<!--.*?-->", "", text, flags=re.DOTALL)
    return re.sub(r"`[^`]*`", "", re.sub(r"(?m)^    .*$", "", text))


# ------------------------------------------------------------------------------------------------------- the front page


def test_front_page_has_at_most_140_lines():
    assert len(text_of(README).splitlines()) <= 140


def test_results_page_has_at_most_100_lines():
    assert len(text_of(ROOT / "docs/results.md").splitlines()) <= 100


def quick_start():
    return re.search(r"start:quickstart\] -->\n```python\n(.*?)```", text_of(README), re.DOTALL)[1]


def run_quick_start(folder, python):
    """Run the code of the quick start in an empty folder without a network, and load the saved model."""
    folder.mkdir()
    environment = {"PATH": str(Path(python).parent), "HOME": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    (load,) = re.findall(r"`(\w+\.from_pretrained\(\"quickstart/final\"\))`", text_of(README).replace("\n", " "))
    load = f"import perforated_trainer\nfrom transformers import {load.split('.')[0]}\nprint('loaded', {load}.dtype)"
    for code in (quick_start(), load):
        command = [python, "-c", code]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        yield done.stdout


@pytest.fixture(scope="module")
def quick_start_run(wheel, tmp_path_factory):
    """Folder and output of a quick start in an environment where the package is installed, without a clone."""
    folder = tmp_path_factory.mktemp("quickstart")
    environment = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python, code = environment / "bin" / "python", "import sysconfig; print(sysconfig.get_path('purelib'))"
    where = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    target = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", where]
    subprocess.run([*target, wheel], check=True, capture_output=True)
    packages = [path for path in sys.path if path.endswith("site-packages")]
    Path(where, "of_the_tests.pth").write_text("\n".join(packages))  # torch, transformers and perforatedai
    return folder / "empty", list(run_quick_start(folder / "empty", str(python)))


def test_quick_start_has_about_25_lines():
    assert 20 <= len(quick_start().splitlines()) <= 30


@pytest.mark.slow
def test_quick_start_in_empty_folder_saves_model_that_loads(quick_start_run):
    folder, (printed, loaded) = quick_start_run
    assert "model: quickstart/final" in printed and loaded.startswith("loaded")
    results = json.loads((folder / "quickstart/results.json").read_text())
    assert results["stopped_by"] == "tracker"
    assert results["cycles"][-1]["dendrites"] > 0  # whether one is kept depends on rounding
    assert results["final"]["test_accuracy"] > 0.9


def test_argument_table_of_front_page_has_defaults_of_dataclass():
    (table,) = re.findall(r"\| argument \| default \| meaning \|\n\| --- .*\n((?:\|.*\n)+)", text_of(README))
    fields = {field.name: field for field in dataclasses.fields(DendriteArguments)}
    for row in table.splitlines():
        name, default, _ = (cell.strip(" `") for cell in row.strip("|").split("|"))
        assert default == generate.default_of(fields[name]).strip("`"), name


def test_figures_of_front_page_are_those_of_the_table():
    rows = {row.split("|")[1].strip(): row for row in generate.front().splitlines() if row.startswith("| ")}
    errors = {name: row.split("|")[-2].split()[0] for name, row in rows.items()}
    mean, low, high = re.search(r"error -([\d.]+)% \(95% CI -([\d.]+)% to -([\d.]+)%", generate.front()).groups()
    text = " ".join(text_of(README).split())
    shown = f"by {float(mean):.0f}% (95% CI over ten seeds: {float(high):.0f} to {float(low):.0f}%)"
    assert shown in text
    assert f"({errors['wider, same number of steps']}% instead of {errors['with dendrites']}%)" in text


def test_range_of_transformers_on_front_page_is_that_of_the_package():
    project = tomllib.loads(text_of(ROOT / "pyproject.toml"))["project"]
    (wanted,) = [line for line in project["dependencies"] if line.startswith("transformers")]
    low, high = re.fullmatch(r"transformers>=(5\.\d+),<5\.(\d+)", wanted).groups()
    shown = f"5.5 to 5.{int(high) - 1}"
    assert low == "5.5" and text_of(README).count(f"ransformers {shown}") == 2


# ---------------------------------------------------------------------------------------------------- generated tables


def test_reference_lists_each_argument_with_default_of_dataclass():
    table = text_of(ROOT / "docs/reference/arguments.md")
    for field in dataclasses.fields(DendriteArguments):
        (row,) = re.findall(rf"(?m)^\| `{field.name}` \| (.*) \| .* \|$", table)
        default = getattr(DendriteArguments(), field.name)
        shown = None if row == "none" else ast.literal_eval(row.strip("`"))
        assert shown == (default if default != [] else None), field.name


@every_page
def test_generated_blocks_are_current(page):
    assert set(re.findall(r"<!-- begin: (.+?) -->", text_of(page))) <= set(generate.BLOCKS)
    assert generate.generated(page) == text_of(page), "run: python docs/generate.py"


def test_comparison_that_includes_zero_is_not_significant():
    line = 'test error with dendrites lower than of "wider", %: -0.5 (-2.0 to 1.0), 5 seeds'
    assert generate.sentence(line) == (
        "- with dendrites, compared with *wider*: test error +0.5% (95% CI -1.0% to +2.0%, 5 seeds): "
        "not statistically significant.\n"
    )
    line = 'test error with dendrites lower than of "wider", %: 2.5 (2.0 to 3.0), 5 seeds; more'
    assert generate.sentence(line) == (
        "- with dendrites, compared with *wider*: test error -2.5% (95% CI -3.0% to -2.0%, 5 seeds).\n"
    )


@pytest.mark.slow
def test_keys_of_results_are_those_of_the_reference(quick_start_run):
    folder, _ = quick_start_run
    rows = re.findall(r"(?m)^\| (`.*?`) \|", text_of(ROOT / "docs/reference/run_folder.md").split("## results.json")[1])
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    written = json.loads((folder / "quickstart/results.json").read_text()).keys()
    assert named - {"control"} == set(written)


# ------------------------------------------------------------------------------------------------------- links, names


def anchors(page):
    """Anchors of the headings of a page."""
    headings = re.findall(r"(?m)^#+ (.+)$", re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL))
    plain = [re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings]
    return {re.sub(r"[-\s]+", "-", heading) for heading in plain}


@every_page
def test_links_resolve(page):
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", text_of(page))
    broken = []
    for link in links:
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_each_page_is_in_the_navigation():
    named = set(re.findall(r": ([\w/]+\.md)$", text_of(ROOT / "mkdocs.yml"), re.MULTILINE))
    assert named == {page.relative_to(ROOT / "docs").as_posix() for page in ROOT.glob("docs/**/*.md")}


@every_page
def test_tables_end_with_an_empty_line(page):
    """Without it, the next line becomes a row."""
    text = re.sub(r"```.*?```|<!-- end -->", "", text_of(page), flags=re.DOTALL)
    assert re.findall(r"^\|.*\|\n[^|\n].*", text, re.MULTILINE) == []


@every_page
def test_files_that_are_named_exist(page):
    folders = "tests|benchmarks|examples|docs|perforated_trainer|\\.ci"
    named = re.findall(rf"(?<![\w/])((?:{folders})/[\w./-]+\.(?:py|md|jsonl|txt))\b", text_of(page))
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_each_module_has_its_row_in_the_design():
    rows = text_of(ROOT / "docs/design.md").split("## Modules")[1].split("\n## ")[0]
    named = re.findall(r"`(\w+\.py)`", "".join(row.split("|")[1] for row in rows.splitlines() if row.startswith("| `")))
    files = {path.name for path in (ROOT / "perforated_trainer").glob("*.py")} - {"__init__.py"}
    assert sorted(named) == sorted(files)


@every_page
def test_flags_that_are_named_exist(page):
    parser = HfArgumentParser((script.DataArguments, DendriteArguments, TrainingArguments))
    known = {flag for action in parser._actions for flag in action.option_strings}
    own = {"--check", "--help", "--nproc_per_node", "--system-site-packages"}
    for path in (
        *ROOT.glob("benchmarks/*.py"),
        *ROOT.glob("examples/*.py"),
        ROOT / "tests/kills.py",
        ROOT / "docs/generate.py",
    ):
        own |= {f"--{name}" for name in re.findall(r'"--(\w+)"', text_of(path))}
        own |= {f"--{name}" for name in re.findall(r"(?m)^    (\w+): .*HfArg\(", text_of(path))}
    others = {"--api_key", "--password", "--fused", "--predict_with_generate"}  # secrets, removed, of another Trainer
    flags = set(re.findall(r"(?<![\w-])--[a-z]\w+\b(?!-)", text_of(page).replace("<!--", "")))
    assert flags <= known | own | others, flags - known - own - others


def test_settings_that_are_named_exist():
    (part,) = re.findall(r"\| to \| set \|\n(.*?)\n\n", text_of(ROOT / "docs/your_model.md"), re.DOTALL)
    named = re.findall(r"`(\w+)`", " ".join(row.split("|")[2] for row in part.splitlines()))
    assert len(named) > 5 and set(named) <= set(DendriteArguments.__dataclass_fields__)


def test_messages_of_troubleshooting_are_in_the_package():
    source = "".join(text_of(path) for path in (ROOT / "perforated_trainer").glob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # strings over several lines
    table = text_of(ROOT / "docs/troubleshooting.md").split("## Results")[0]
    messages = re.findall(r"(?m)^\| `(.+?)` \|", table)
    assert len(messages) > 15
    for message in messages:
        if message == "Unknown quantization type, got dendrites":  # of transformers
            continue
        parts = [part.strip() for part in re.split(r"\.\.\.|\(format 3, not 5\)|\ba tuple\b|\ban older\b", message)]
        missing = [part for part in parts if part and part not in source]
        assert missing == [], message


def test_api_page_has_each_public_name():
    import perforated_trainer

    named = re.findall(r"(?m)^::: ([\w.]+)$", text_of(ROOT / "docs/reference/api.md"))
    assert sorted(name.rpartition(".")[2] for name in named) == perforated_trainer.__all__


# ------------------------------------------------------------------------------------------------------------ language

WORDS = [  # replaced by the terms of the field
    r"\banew\b",
    r"\bbeside\b",
    r"\bgo(es)? on\b",
    r"\bthe library'?s?\b(?! looks| of)",
    r"\bours\b|\btheirs\b",
    r"\brooms?\b(?! for)",
    r"\barrows?\b",
    r"\bseal(s|ed)?\b",
    r"\bscaffold\w*",
    r"\bshortcuts?\b",
    r"\bverdicts?\b",
    r"\bprices?\b",
    r"\bpictures?\b",
    r"\bfresh starts?\b",
    r"\brestructur\w+",
    r"\bown share\b",
    r"to the (same |last )?bits?\b|\bsame bits\b|\blast bits?\b",
    r"cannot be told from",
    r"one number a \w+|steps a second",
    r"normalis|quantis|\bgrey\b|\bcolour|behaviour|neighbour",
    r"\d %",
    r"evaluations without a better score",
    r"score that decides",
    r"(?:^|[.:] )Where (?!dendrites do not help)",
    r"in one line\b",
    r"passed over|cannot be had",
]
STRING_EXCEPTIONS = {"picture", "picture.png", "verdict", "top 5 %"}  # names of files, a key and a metric
MODULES = [
    ROOT / "mnist_huggingface_perforatedai.py",
    *(
        path
        for folder in ("perforated_trainer", "examples", "benchmarks", "docs", "tests")
        for path in sorted((ROOT / folder).glob("*.py"))
        if path != Path(__file__)  # it has the list
    ),
]


@every_page
def test_pages_use_the_terms_of_the_field(page):
    text = without_code(text_of(page))
    assert [match[0] for word in WORDS for match in re.finditer(word, text, re.IGNORECASE | re.MULTILINE)] == []


def texts_of_module(path):
    """Strings, docstrings, comments and names of tests of a module, with their lines."""
    with open(path, "rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type == tokenize.NAME and token.string.startswith("test_"):
                yield token.start[0], token.string.replace("_", " ")
            elif token.type in (tokenize.STRING, tokenize.COMMENT, getattr(tokenize, "FSTRING_MIDDLE", -1)):
                yield token.start[0], token.string


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_modules_use_the_terms_of_the_field(path):
    found = []
    for line, text in texts_of_module(path):
        text = re.sub(r"`[^`\n]*`", "", text)
        if text.strip("\"'") in STRING_EXCEPTIONS:
            continue
        found += [(line, match[0]) for word in WORDS for match in re.finditer(word, text, re.IGNORECASE)]
    assert found == []


# ------------------------------------------------------------------------------------------------------------ the site


def test_citation_has_the_version_of_the_package():
    import perforated_trainer

    assert f"\nversion: {perforated_trainer.__version__}\n" in text_of(ROOT / "CITATION.cff")


@pytest.mark.slow
def test_site_is_built_without_warnings(tmp_path):
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("needs docs/requirements.txt")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    front = (tmp_path / "site/index.html").read_text()
    assert "fonts.googleapis" not in front and "Quick start" in front
    assert "n_epochs_to_switch" in (tmp_path / "site/reference/api.html").read_text()
