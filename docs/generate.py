"""Write the generated parts of the pages: the tables of arguments and the tables of results.

    python docs/generate.py           rewrites what lies between `<!-- begin: NAME -->` and `<!-- end -->`
    python docs/generate.py --check   only lists the pages that are out of date; exit status 1 if there are any

The tables of arguments come from the dataclass, those of results from the records in `benchmarks/results`. Nothing is
trained.
"""

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
BLOCK = re.compile(r"(<!-- begin: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
NAMES = {  # how the experiments of the benchmarks are called on the pages
    "same training, no dendrites": "step-matched baseline",
    "wider, same training": "wider, same number of steps",
    "equal memory, same training": "equal memory, same number of steps",
}


# ---------------------------------------------------------------------------------------------------------- arguments


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def table(head: list[str], rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(map(cell, row))} |\n" for row in [head, ["---"] * len(head), *rows])


def default_of(field: dataclasses.Field) -> str:
    value = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    return (
        "none"
        if value is None or value == []
        else f"`{json.dumps(value)}`".replace("true", "True").replace("false", "False")
    )


def arguments() -> str:
    """All fields of DendriteArguments."""
    from perforated_trainer import DendriteArguments

    fields = dataclasses.fields(DendriteArguments)
    rows = [[f"`{field.name}`", default_of(field), field.metadata["help"].replace("%%", "%")] for field in fields]
    return table(["argument", "default", "meaning"], rows)


def refused() -> str:
    """Arguments of the Trainer that raise an error."""
    from perforated_trainer.arguments import REFUSED

    return table(["argument", "use instead"], [[f"`{name}`", reason] for name, reason in REFUSED.items()])


def script_defaults() -> str:
    """What the MNIST script sets."""
    import mnist_huggingface_perforatedai as script

    values = script.DENDRITE_DEFAULTS | script.TRAINING_DEFAULTS
    return table(["argument", "default of the script"], [[f"`{n}`", f"`{v!r}`"] for n, v in values.items()])


# ------------------------------------------------------------------------------------------------------------ results


@cache
def printed(*command: str) -> str:
    """What a benchmark prints from its records."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, str(ROOT / "benchmarks" / command[0]), *command[1:]]
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True).stdout


def renamed(text: str) -> str:
    for old, new in NAMES.items():
        text = text.replace(f"| {old} |", f"| {new} |").replace(f'"{old}"', f'"{new}"')
    return text


COMPARISON = re.compile(
    r'(test|validation) error (.+) lower than of "(.+)", %: (-?[\d.]+) \((-?[\d.]+) to (-?[\d.]+)\), (.+)'
)


def signed(value: float) -> str:
    return f"{value:+.1f}%"


def sentence(line: str) -> str:
    """A comparison of two experiments as a line of a list: relative differences, negative if the error is lower."""
    part, name, other, mean, low, high, seeds = COMPARISON.match(line).groups()
    mean, low, high = -float(mean), -float(high), -float(low)
    end = ": not statistically significant" if low <= 0 <= high else ""
    interval = f"95% CI {signed(low)} to {signed(high)}, {seeds.split(';')[0]}"
    return f"- {name}, compared with *{other}*: {part} error {signed(mean)} ({interval}){end}.\n"


def results(text: str, columns: tuple[int, ...] = ()) -> str:
    """Tables and comparisons that a benchmark printed, as Markdown; `columns` are left out.

    Relative differences are means over pairs of runs with the same seed, with a paired t interval.
    """
    lines = []
    for line in renamed(text).strip("\n").splitlines():
        if line.startswith("|"):
            cells = line.strip("|").split("|")
            lines.append("|" + "|".join(c for i, c in enumerate(cells) if i not in columns) + "|\n")
        elif COMPARISON.match(line):
            lines.append(sentence(line))
        elif not line:
            lines.append("\n")
    return re.sub(r"\n{3,}", "\n\n", "".join(lines)).strip("\n") + "\n"


def records(file: str, **label) -> list[dict]:
    lines = (ROOT / "benchmarks" / "results" / file).read_text().splitlines()
    return [record for record in map(json.loads, lines) if label.items() <= record.items()]


def source(command: str, file: str, **label) -> str:
    """The command of a table, and where its records are from."""
    found = records(file, **label)
    commits = sorted({record.get("commit") or "not recorded" for record in found})
    versions = {
        f"{name} {version}"
        for record in found
        for name, version in record["versions"].items()
        if name in ("torch", "transformers", "perforatedai")
    }
    machines = sorted({record["machine"] for record in found})
    return (
        f"\n`{command}`. Records: `benchmarks/results/{file}`; commit {', '.join(commits)}; "
        f"{', '.join(sorted(versions))}; {' and '.join(machines)}, one thread per run. "
        "± is the standard deviation over seeds.\n"
    )


def campaign(*flags: str) -> str:
    command = ("dendrites.py", "--table", "--data_dir", "mnist", *flags)
    shown = "python benchmarks/dendrites.py --data_dir mnist" + "".join(f" {flag}" for flag in flags)
    return results(printed(*command)) + source(shown, "dendrites.jsonl", data="mnist", flags=list(flags))


def front() -> str:
    """The table of the front page: four rows, and the comparison with the step-matched baseline."""
    lines = results(printed("dendrites.py", "--table", "--data_dir", "mnist"), columns=(2, 5)).splitlines()
    shown = [line for line in lines if not line.startswith(("| wider |", "-")) or "*step-matched baseline*" in line]
    return "\n".join(shown) + "\n"


def first_run() -> str:
    text = printed("dendrites.py", "--table", "--first_run")
    rows = "".join(f"{line}\n" for line in text.splitlines() if line.startswith("|"))
    means, *paired = re.search(r"%: (-?[\d.]+) on the means, (.+)", text).groups()
    line = sentence(f'test error with dendrites lower than of "the same run before its first dendrite", %: {paired[0]}')
    kept, longest = re.search(r"at least one dendrite kept: (.+); the longest took (.+) CPU s", text).groups()
    lines = f"{line}- The mean test error changes by {signed(-float(means))}.\n"
    lines += f"- At least one dendrite kept: {kept}. The longest training took {longest} CPU seconds.\n"
    return f"{rows}\n{lines}{source('python benchmarks/dendrites.py --first_run', 'first_run.jsonl')}"


def study(name: str) -> str:
    text = printed("studies.py", "--table", "--studies", name)
    return results(text) + f"\n`python benchmarks/studies.py --studies {json.dumps(name)}`\n"


def fine_tuning() -> str:
    return results(printed("finetune.py", "--table")) + source("python benchmarks/finetune.py", "finetune.jsonl")


def normalization() -> str:
    command = "python benchmarks/normalization.py"
    return results(printed("normalization.py", "--table")) + source(command, "normalization.jsonl")


def language_modeling() -> str:
    """The script has no `--table`: it would train what is not recorded."""
    if len(records("bert.jsonl")) < 6:
        return "The records are incomplete: `python benchmarks/bert.py --jobs 2`.\n"
    return results(printed("bert.py")) + source("python benchmarks/bert.py --jobs 2", "bert.jsonl")


BLOCKS: dict[str, Callable[[], str]] = {
    "arguments": arguments,
    "refused arguments": refused,
    "script defaults": script_defaults,
    "front page": front,
    "campaign": campaign,
    "five dendrites": lambda: campaign("--max_dendrites", "5"),
    "eight dendrites": lambda: campaign("--max_dendrites", "8"),
    "first run": first_run,
    "fine-tuning": fine_tuning,
    "normalization": normalization,
    "language modeling": language_modeling,
    "studies": lambda: source("python benchmarks/studies.py", "studies.jsonl").lstrip(),
} | {
    f"study {name}": lambda name=name: study(name)
    for name in ("little data", "memory", "later layers", "initial scale", "other settings")
}


def generated(page: Path) -> str:
    """The text of a page with its blocks as they should be."""
    text = page.read_text(encoding="utf-8")
    gap = "" if page.name == "README.md" else "\n"  # its length is limited
    return BLOCK.sub(lambda match: f"{match[1]}{gap}{BLOCKS[match[2]]()}{gap}{match[3]}", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    stale = [page for page in PAGES if generated(page) != page.read_text(encoding="utf-8")]
    for page in stale:
        print(f"{page.relative_to(ROOT)}: {'out of date' if args.check else 'written'}")
        if not args.check:
            page.write_text(generated(page), encoding="utf-8")
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
