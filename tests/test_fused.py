"""A layer and its dendrites as one product while training, compared with the library's own forward."""

import copy

import models
import pytest
import torch
from test_models import NAMES, trainer_for
from transformers import TrainerCallback

from perforated_trainer import layers
from perforated_trainer.tracker import DendriteTracker


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def outputs_and_gradients(trainer, batch):
    model = trainer.model.eval()  # no dropout
    model.zero_grad()
    output = model(**copy.deepcopy(batch))
    output.loss.backward()
    return output.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_gradients_are_the_librarys(name):
    """With each number of dendrites up to three, some numbers of theirs made large: new ones do nothing yet."""
    torch.manual_seed(0)
    trainer, seen = trainer_for(name, models.build(name), max_steps=100), set()
    batch = trainer.data_collator([dict(row) for row in models.rows(name)[:8]])

    class Compare(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            tracker = DendriteTracker.current
            if tracker.num_dendrites in seen:
                return
            seen.add(tracker.num_dendrites)
            with torch.no_grad():
                for key, parameter in trainer.model.named_parameters():
                    if "dendrites_to" in key:
                        parameter.copy_(torch.randn_like(parameter))
            results = []
            for fused in (True, False):
                with tracker.forward(fused=fused):
                    results.append(outputs_and_gradients(trainer, batch))
            (ours, our_gradients), (theirs, their_gradients) = results
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * max(1.0, float(theirs.abs().max())))
            assert our_gradients.keys() == their_gradients.keys()
            for key, gradient in their_gradients.items():
                scale = max(1.0, float(gradient.abs().max()))
                torch.testing.assert_close(our_gradients[key], gradient, rtol=1e-4, atol=2e-6 * scale, msg=key)
            trainer.model.zero_grad()

    trainer.add_callback(Compare())
    trainer.train()
    assert seen == {0, 1, 2, 3}


def test_a_whole_run_is_the_same_within_what_floating_point_allows():
    scores = []
    for fused in (True, False):
        torch.manual_seed(0)
        trainer = trainer_for(
            "BertForMaskedLM", models.build("BertForMaskedLM"), max_steps=100, fused=fused, overwrite_run=True
        )
        trainer.train()
        assert trainer.num_dendrites == 3
        scores.append([cycle["best_validation"] for cycle in trainer.cycles()])
    assert scores[0] == pytest.approx(scores[1], rel=1e-4) and len(scores[0]) == 4


@pytest.mark.parametrize("how", [{"gradient_checkpointing": True}, {"bf16": True}, {"torch_compile": True}], ids=str)
def test_fused_layers_train_with(how):
    torch.manual_seed(0)
    trainer = trainer_for("BertForMaskedLM", models.build("BertForMaskedLM"), max_steps=100, training=how)
    trainer.train()
    assert trainer.num_dendrites == 3


@pytest.mark.parametrize(
    "name", ["GPT2LMHeadModel", "ResNetForImageClassification", "DistilBertForSequenceClassification"]
)
def test_layers_too_large_for_one_product_are_the_same_after_training(name, monkeypatch, tmp_path):
    """Whatever their size here: each layer and dendrite has a product of its own, in the saved model as well."""
    assert 2**12 < layers.FUSED_UP_TO < 2**20
    monkeypatch.setattr(layers, "FUSED_UP_TO", 0)
    torch.manual_seed(0)
    trainer = trainer_for(name, models.build(name), max_steps=100)
    trainer.train()
    batch = trainer.data_collator([dict(row) for row in models.rows(name)[:8]])
    deployed = trainer.deployed_model().eval()
    trainer.save_model("saved")
    loaded = type(deployed).from_pretrained("saved").eval()
    with torch.no_grad():
        trained = trainer.model.eval()(**copy.deepcopy(batch)).logits
        assert torch.equal(deployed(**copy.deepcopy(batch)).logits, trained)
        assert torch.equal(loaded(**copy.deepcopy(batch)).logits, trained)


def test_small_layers_are_one_product_and_large_ones_are_not():
    for size, expected in ((256, 1), (257, 3)):
        layer = torch.nn.Linear(size, size)
        parts = [layer.weight] * 3, [layer.bias] * 3
        outputs, _ = layers._product(layer, torch.randn(2, size), 3, *parts)
        assert len({output.untyped_storage().data_ptr() for output in outputs}) == expected
