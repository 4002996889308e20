"""The installed package: its dependencies, its files, and that its import does no work."""

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def ranges(lines):
    """Name and range of each package in lines of pyproject."""
    found = {(wanted := Requirement(line)).name.replace("_", "-"): wanted.specifier for line in lines}
    found.pop("perforated-trainer", None)  # an extra that includes another one
    return found


def pins(file):
    """Name and version of each package in a requirements file, and in those that it includes."""
    found = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("-r "):
            found |= pins(file.parent / line[3:])
        elif line and not line.startswith("#"):
            name, version = line.split("==")
            found[name.replace("_", "-")] = version
    return found


def python(code, folder, **environment):
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment
    )


def test_imports_of_the_package_are_declared():
    used = set()
    for file in (ROOT / "perforated_trainer").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                used |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                used.add(node.module.split(".")[0])
    used = {name.replace("_", "-") for name in used - sys.stdlib_module_names}
    assert used == set(ranges(PROJECT["dependencies"]))


def test_imports_of_the_scripts_are_an_extra():
    declared = ranges([*PROJECT["dependencies"], *EXTRAS["examples"]])
    for script in (ROOT / "mnist_huggingface_perforatedai.py", *(ROOT / "examples").glob("*.py")):
        for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names.append(node.module)
            for name in (name.split(".")[0] for name in names):
                ours = name == "perforated_trainer" or name in sys.stdlib_module_names
                assert ours or name.replace("_", "-") in declared, f"{script.name} imports {name}"


def test_tested_versions_are_in_the_ranges():
    wanted = ranges([*PROJECT["dependencies"], *EXTRAS["examples"]])
    locked = pins(ROOT / "requirements.txt")
    assert set(locked) <= set(wanted)
    for name, version in locked.items():
        assert version in wanted[name], f"{name} {version} is not in {wanted[name]}"


def test_versions_for_tests_are_in_the_ranges():
    wanted = ranges([*PROJECT["dependencies"], *EXTRAS["examples"], *EXTRAS["test"]])
    installed = pins(ROOT / "tests" / "requirements.txt")
    assert set(ranges(EXTRAS["test"])) <= set(installed)
    for name, version in installed.items():
        assert version in wanted[name], f"{name} {version} is not in {wanted[name]}"


def test_oldest_versions_are_those_of_the_ranges():
    wanted, oldest = ranges(PROJECT["dependencies"]), pins(ROOT / "tests" / "oldest.txt")
    lowest = re.search(r">=([\d.]+)", str(wanted["transformers"]))[1]
    assert Version(oldest["transformers"]) == Version(lowest)
    assert oldest["huggingface-hub"] in wanted["huggingface-hub"]


IMPORT = """
import os, sys
import perforated_trainer, torch
assert "perforatedai" not in sys.modules and "matplotlib" not in sys.modules
assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()
assert set(perforated_trainer.__all__) <= set(dir(perforated_trainer))
print(perforated_trainer.__version__, os.listdir("."))
"""


def test_import_does_no_work(tmp_path):
    done = python(IMPORT, tmp_path)
    assert done.returncode == 0, done.stderr
    # torchao, which transformers imports if it is installed, logs warnings
    assert [line for line in done.stderr.splitlines() if not re.match(r"W\d{4} .*torch/utils/_pytree", line)] == []
    version, files = done.stdout.split()
    assert files == "[]" and Version(version) > Version("0")


def test_public_names_have_docstrings():
    import perforated_trainer

    for name in perforated_trainer.__all__:
        assert getattr(perforated_trainer, name).__doc__, name


@pytest.mark.slow
def test_script_runs_without_an_installed_package(tmp_path):
    """In a clone, Python finds the package next to the script."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / "mnist_huggingface_perforatedai.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "--max_dendrites" in done.stdout, done.stderr


@pytest.mark.slow
def test_wheel_holds_the_package_alone(wheel, tmp_path):
    names = zipfile.ZipFile(wheel).namelist()
    modules = {f"perforated_trainer/{file.name}" for file in (ROOT / "perforated_trainer").glob("*.py")}
    assert {name for name in names if ".dist-info/" not in name} == modules
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    done = python("import perforated_trainer; print(perforated_trainer.__file__)", tmp_path, PYTHONPATH="installed")
    assert "installed" in done.stdout, done.stderr
