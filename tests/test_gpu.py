"""Tests of what can differ on a GPU. `benchmarks/gpu.py` runs them, with --dry_run on the CPU."""

import math
import os

import models
import pytest
import small
import torch
from transformers import TrainerCallback

from perforated_trainer import layers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_CPU = DEVICE == "cpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON_CPU and not os.environ.get("GPU_TESTS_ON_CPU"), reason="needs a GPU"),
]


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


def trainer_for(scores=small.TWO_DENDRITES, **changes):
    return small.scripted(scores, **{"use_cpu": ON_CPU, "logging_steps": 1} | changes)[0]


def trained(**changes):
    trainer = trainer_for(**changes)
    trainer.train()
    assert trainer.num_dendrites == 2 and trainer.stopped_by == "tracker"
    assert next(trainer.model.parameters()).device.type == DEVICE
    assert all(math.isfinite(loss) for loss in small.losses(trainer))
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    return trainer


def batch(device):
    rows = small.EVAL
    return {"input_ids": torch.stack([row["input_ids"] for row in rows]).to(device)}


@torch.no_grad()
def logits(model, device=DEVICE):
    return model.eval()(**batch(device)).logits


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True


def test_resumed_run_is_bitwise_equal_to_uninterrupted_run(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    settings = {"full_determinism": True, "save_strategy": "steps", "save_steps": 2}
    whole = trained(output_dir="whole", **settings)
    first = trainer_for(output_dir="cut", **settings)
    first.add_callback(StopAt(11))  # with one dendrite and the second one on trial
    first.train()
    rest = trainer_for(small.scores_left(small.TWO_DENDRITES, first), output_dir="cut", **settings)
    rest.train(resume_from_checkpoint=True)
    assert small.losses(rest) == small.losses(whole)
    assert rest.restarts == whole.restarts
    expected, found = whole.model.state_dict(), rest.model.state_dict()
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_mixed_precision_trains_through_two_dendrites(precision):
    if precision == "fp16" and ON_CPU:
        pytest.skip("fp16 with its gradient scaler needs a GPU")
    trainer = trained(**{precision: True})
    assert (trainer.accelerator.scaler is not None) == (precision == "fp16")
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    if precision == "fp16":
        assert trainer.accelerator.scaler.get_scale() >= 1


def test_saved_model_has_equal_logits_on_its_device_and_near_ones_on_the_cpu():
    trainer = trained()
    expected = logits(trainer.model)
    trainer.save_results()
    model = models.model_class(small.DISTILBERT).from_pretrained("run/final")
    torch.testing.assert_close(logits(model, "cpu"), expected.cpu(), rtol=1e-3, atol=1e-4)
    assert torch.equal(logits(model.to(DEVICE)), expected)


def test_device_map_places_dendrites_next_to_their_layers():
    trainer = trained()
    expected = logits(trainer.model)
    trainer.save_results()
    cls, device_map = models.model_class(small.DISTILBERT), {"": "cpu" if ON_CPU else 0}
    model = cls.from_pretrained("run/final", device_map=device_map)
    assert {parameter.device.type for parameter in model.parameters()} == {DEVICE}
    assert len(layers.layers_with_dendrites(model)) == len(layers.layers_with_dendrites(trainer.model)) > 0
    assert torch.equal(logits(model), expected)
    again = trainer_for([0.1, 0.1, 0.2, 0.2], model=model, dendrites={"max_dendrites": 3}, output_dir="again")
    again.train()
    assert again.num_dendrites == 3 and {parameter.device.type for parameter in again.model.parameters()} == {DEVICE}


def test_capacity_test_reports_memory_of_the_device(capsys):
    trainer = trainer_for([0.1, 0.1, 0.1, 0.1], dendrites={"testing_dendrite_capacity": True})
    trainer.train()
    trainer.save_results()
    assert trainer.num_dendrites == 3
    line = next(line for line in capsys.readouterr().out.splitlines() if "memory in use" in line)
    assert ("of GPU memory" in line) != ON_CPU


def test_low_rank_dendrites_train_and_load_on_the_device():
    trainer = trained(dendrites={"dendrite_rank": 4})
    expected = logits(trainer.model)
    trainer.save_results()
    model = models.model_class(small.DISTILBERT).from_pretrained("run/final").to(DEVICE)
    assert torch.equal(logits(model), expected)


# Last, because it takes longest.
def test_compiled_run_equals_eager_run_nearly():
    backend = "eager" if ON_CPU else "inductor"
    compiled = trained(output_dir="compiled", torch_compile=True, torch_compile_backend=backend)
    eager = trained(output_dir="eager")
    assert small.losses(compiled) == pytest.approx(small.losses(eager), abs=0.05)
