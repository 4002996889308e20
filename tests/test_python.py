"""Loading on newer versions of Python, for which perforatedai is not available."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mnist_huggingface_perforatedai as mnist
from perforated_trainer.layers import add_dendrites
from perforated_trainer.remote_code import save_code
from perforated_trainer.saving import make_dendritic

ROOT = Path(__file__).parent.parent
LOAD = """
import sys
sys.modules["perforatedai"] = None
import torch
import perforated_trainer
from transformers import AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
assert model.classifier[0].num_dendrites == 2
x = torch.linspace(-1, 1, 784).view(1, 1, 28, 28)
torch.save(model(x).logits.detach(), sys.argv[2])
"""


def newer_python():
    """A Python 3.13 or later that has torch and transformers, named by PYTHON_FOR_LOADING or found on the PATH."""
    names = [os.environ.get("PYTHON_FOR_LOADING"), "python3.13", "python3.14", "python3.15"]
    for python in filter(None, map(shutil.which, filter(None, names))):
        code = "import sys, importlib.util as i; assert i.find_spec('torch') and i.find_spec('transformers')"
        if subprocess.run([python, "-c", code], capture_output=True).returncode == 0:
            return python
    return None


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a custom model that has dendrites, and its logits."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    model = mnist.MnistCnnForImageClassification(mnist.MnistCnnConfig()).eval()
    add_dendrites(model.classifier[0], 2)
    for parameter in model.classifier[0].parameters():
        torch.nn.init.normal_(parameter)
    make_dendritic(model).save_pretrained(folder)
    save_code(model, folder)
    return folder, model(torch.linspace(-1, 1, 784).view(1, 1, 28, 28)).logits.detach()


def load(python, saved, tmp_path):
    folder, logits = saved
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [python, "-c", LOAD, str(folder), str(tmp_path / "logits.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    return torch.load(tmp_path / "logits.pt"), logits


def test_model_loads_without_perforatedai(saved, tmp_path):
    again, logits = load(sys.executable, saved, tmp_path)
    assert torch.equal(again, logits)


def test_training_without_perforatedai_names_the_reason():
    """One line, with what works. In a separate process, as this one may have imported the modules."""
    code = "import sys; sys.modules['perforatedai'] = None; from perforated_trainer import PerforatedTrainer"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "needs perforatedai" in last and "Loading a model with dendrites does not need it" in last


@pytest.mark.skipif(newer_python() is None, reason="no Python 3.13 or later with torch and transformers is at hand")
def test_model_loads_in_a_newer_python(saved, tmp_path):
    """Another build of torch may round differently."""
    again, logits = load(newer_python(), saved, tmp_path)
    assert torch.allclose(again, logits, atol=1e-6)
