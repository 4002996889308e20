"""Private names of other libraries that the package uses exist and behave as it assumes."""

import copy
import inspect
import pdb
import sys

import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import is_lomo_available
from models import build
from peft import LoraConfig
from small import DISTILBERT, arguments, trainer_for
from test_architecture import HOOKS
from torch import nn
from transformers import AutoModelForSequenceClassification, EarlyStoppingCallback, Trainer, TrainingArguments
from transformers.quantizers import HfQuantizer

from perforated_trainer import DendriteArguments, PerforatedError, PerforatedTrainer, _compat, layers, loading, pai
from perforated_trainer.export import ExportingTrainer
from perforated_trainer.policy import Decision
from perforated_trainer.resuming import ResumingTrainer

# ---------------------------------------------------------------------------------------------------------- safetensors


def tied():
    weight = torch.arange(6.0).view(2, 3)
    return {"first": weight, "second": weight}


def test_safetensors_saves_shared_tensors_with_the_patch_only(tmp_path):
    with pytest.raises(RuntimeError, match="share memory"):
        safetensors.torch.save_file(tied(), tmp_path / "file")
    with _compat.shared_tensors_ignored():
        safetensors.torch.save_file(tied(), tmp_path / "file")
        whole = torch.arange(6.0)
        for part in (whole[:3], whole[1:], whole.view(2, 3)):
            with pytest.raises(RuntimeError, match="share memory"):
                safetensors.torch.save_file({"whole": whole, "part": part}, tmp_path / "other")
    assert safetensors.torch.load_file(tmp_path / "file").keys() == tied().keys()
    assert safetensors.torch._find_shared_tensors is _compat._find_shared_tensors, "the patch ends with its block"


# ------------------------------------------------------------------------------------------ accelerate, transformers


def test_accelerate_searches_for_lomo_at_each_step():
    """If the step no longer does, `_patch_search_for_lomo` can be removed."""
    assert "is_lomo_available()" in inspect.getsource(AcceleratedOptimizer.step)
    assert sys.modules["lomo_optim"] is None and not is_lomo_available()


def test_one_of_several_gpus_is_used():
    args = TrainingArguments(output_dir="run", use_cpu=True, report_to="none")
    _ = args.device
    args._n_gpu = 2
    assert args.n_gpu == 2
    _compat.use_one_gpu(args)
    assert args.n_gpu == 1


def test_what_accelerate_has_prepared_can_be_forgotten():
    model, optimizer = nn.Linear(2, 2), torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)
    accelerator = Accelerator(cpu=True)
    _, prepared = accelerator.prepare(model, optimizer)
    accelerator.prepare(torch.optim.lr_scheduler.ConstantLR(optimizer))
    assert model._is_accelerate_prepared is True
    assert (
        accelerator._optimizers == [prepared] and len(accelerator._schedulers) == 1 and accelerator._models == [model]
    )
    _compat.forget_preparation(model)
    assert model._is_accelerate_prepared is False
    assert '"_is_accelerate_prepared"' in inspect.getsource(Accelerator.prepare_model)
    _compat.forget_optimizer(accelerator)
    assert accelerator._optimizers == accelerator._schedulers == accelerator._models == []


def test_adapters_of_a_model_are_seen():
    model = build(DISTILBERT)
    assert _compat.has_adapters(model) is False
    model.add_adapter(LoraConfig(target_modules=["q_lin"]))
    assert _compat.has_adapters(model) is True


def test_parameters_that_no_file_had_are_new(tmp_path):
    build(DISTILBERT).distilbert.save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    new = {name for name, parameter in model.named_parameters() if _compat.is_new(parameter)}
    assert new == {f"{layer}.{part}" for layer in ("pre_classifier", "classifier") for part in ("weight", "bias")}


@pytest.mark.parametrize(
    ("cls", "module"), [(PerforatedTrainer, "trainer"), (ResumingTrainer, "resuming"), (ExportingTrainer, "export")]
)
def test_hooks_are_those_that_the_trainer_calls(cls, module):
    """Each has the arguments of the Trainer's method, and the Trainer itself uses it."""
    own = {name for name in vars(cls) if name.startswith("_") and not name.startswith("__") and hasattr(Trainer, name)}
    hooks = {name for name in HOOKS[module] if callable(getattr(Trainer, name, None))}
    if cls is PerforatedTrainer:
        own |= {"_load_from_checkpoint"}  # it calls what `ResumingTrainer` overrides
    assert own == hooks == HOOKS[module] - {"_train_batch_size"}
    for name in hooks:
        stock, ours = (inspect.signature(getattr(one, name)).parameters for one in (Trainer, cls))
        takes_all = any(p.kind is p.VAR_POSITIONAL for p in ours.values())
        assert takes_all or list(stock) == list(ours), name
        assert f"self.{name}(" in inspect.getsource(Trainer), name
    assert "self._train_batch_size" in inspect.getsource(Trainer)


@pytest.mark.parametrize("name", sorted(HOOKS["loading"]))
def test_hooks_of_the_quantizer_are_called_by_transformers(name):
    stock, ours = (inspect.signature(getattr(cls, name)).parameters for cls in (HfQuantizer, loading.DendriteQuantizer))
    takes_all = any(p.kind is p.VAR_KEYWORD for p in ours.values())
    assert takes_all or list(stock) == list(ours)
    assert f"self.{name}(" in inspect.getsource(HfQuantizer)


def test_values_of_a_training_are_the_seven_that_are_expected():
    """`schedule.of_all_cycles` unpacks them."""
    trainer = trainer_for()
    values = Trainer.set_initial_training_values(trainer, trainer.args, trainer.get_train_dataloader())
    assert len(values) == 7 and values[1] == 4 and values[-1] == 8


def test_trainer_makes_its_optimizer_before_it_wraps_the_model():
    """`dendrite_learning_rate_factor` scales the optimizer in `_wrap_model`, before the scheduler is created."""
    source = inspect.getsource(Trainer._prepare_for_training)
    order = ["self.create_optimizer()", "self._wrap_model(", "self.create_scheduler("]
    assert [source.index(name) for name in order] == sorted(source.index(name) for name in order)


def test_counter_of_early_stopping_is_there():
    assert EarlyStoppingCallback(3).early_stopping_patience_counter == 0


# --------------------------------------------------------------------------------------------------------- perforatedai


def tracker(**settings):
    return pai.PAITracker(DendriteArguments(**settings), "score", True)


def test_perforatedbp_is_not_imported():
    assert sys.modules["perforatedbp"] is None


def test_entries_of_the_tracker_that_are_set_are_there():
    one = tracker()
    member = one._tracker.member_vars
    for name in ("switch_mode", "current_best_validation_score", "global_best_validation_score", "param_counts"):
        assert name in member, name
    assert {"num_dendrites_added", "accuracies", "epoch_last_improved"} <= member.keys()
    for name in ("making_graphs", "saved_time"):
        assert hasattr(one._tracker, name), name
    for name in ("add_extra_score", "add_test_score", "set_optimizer_instance", "save_graphs"):
        assert callable(getattr(one._tracker, name)), name


def test_global_tracker_of_perforatedai_is_unchanged():
    before = pai.GPA.pc, pai.GPA.pai_tracker
    tracker().add_score(0.5, Decision.CONTINUE)
    assert (pai.GPA.pc, pai.GPA.pai_tracker) == before and before[1] == []


def test_making_a_tracker_draws_no_random_numbers():
    before = torch.get_rng_state()
    tracker().add_score(0.5, Decision.ADD)
    assert torch.equal(torch.get_rng_state(), before)


DECISIONS = [Decision.CONTINUE, Decision.ADD, Decision.CONTINUE, Decision.RETRY, Decision.CONTINUE, Decision.ADD]


def test_perforatedai_follows_each_decision_and_reports_completion():
    one = tracker()
    ends = [one.add_score(0.1 * n, d, {"train loss": 1.0}, {"test score": 0.5}) for n, d in enumerate(DECISIONS)]
    assert ends == [False] * len(DECISIONS)
    assert one._tracker.member_vars["num_dendrites_added"] == 3, "each try counts"
    assert one.add_score(0.9, Decision.COMPLETE) is True


def test_state_restores_a_tracker():
    one, other = tracker(), tracker()
    for number, decision in enumerate(DECISIONS):
        one.add_score(0.1 * number, decision)
    other.load_state_dict(one.state_dict())
    for name in ("num_dendrites_added", "num_epochs_run", "accuracies"):
        assert other._tracker.member_vars[name] == one._tracker.member_vars[name]
    assert other.state_dict() == one.state_dict()
    with pytest.raises(ValueError, match="cannot be read"):
        other.load_state_dict([["a score"]])


@pytest.mark.parametrize("decisions", [DECISIONS[:1], DECISIONS[:2], DECISIONS])
def test_graphs_are_drawn_after_any_decision(decisions):
    one = tracker()
    assert one.draw() == []
    for number, decision in enumerate(decisions):
        one.add_score(0.1 * number, decision, {}, {"test f1, macro": 0.5})
    assert {path.suffix for path in one.draw()} == {".png", ".csv"}


@pytest.mark.parametrize("layer", [nn.Linear(4, 6), nn.Conv2d(3, 6, 3), nn.Conv1d(3, 6, 3)])
@pytest.mark.parametrize("scale", [0.01, 1.0])
def test_new_dendrite_has_the_shapes_of_its_layer_and_the_scale_of_the_settings(layer, scale):
    torch.manual_seed(0)
    new = tracker(dendrite_init_scale=scale).new_dendrite(layer)["weights"]
    assert {name: value.shape for name, value in new.items()} == {n: p.shape for n, p in layer.named_parameters()}
    values = torch.cat([value.flatten() for value in new.values()])
    assert 0.3 * scale < values.std() < 3 * scale


def test_low_rank_dendrite_has_the_shapes_of_its_factors():
    layer = layers.add_dendrites(nn.Linear(8, 6), 1, rank=2)
    new = tracker(dendrite_rank=2).new_dendrite(layer)
    layers.set_dendrite(layer, 0, **new)
    assert new["weights"]["down"].shape == (2, 8)


STARTS = {"tanh": (0, 1), "gelu": (0, 1), "identity": (0, 1), "sigmoid": (0.1, 0), "relu": (0.1, 0)}


@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize("activation, expected", STARTS.items())
def test_low_rank_dendrite_starts_with_zeros_where_it_still_trains(activation, expected, scale):
    """Either its second factor or its weight in the output is zero, so that the output does not change."""
    torch.manual_seed(0)
    layer = layers.add_dendrites(nn.Linear(64, 48), 1, activation=activation, rank=8)
    one = tracker(dendrite_rank=8, dendrite_activation=activation, dendrite_init_scale=scale)
    layers.set_dendrite(layer, 0, **one.new_dendrite(layer))
    up, to_output = (scale if scale and value else value for value in expected)
    assert layer.dendrite_up.std().item() == pytest.approx(up, rel=0.2)
    assert torch.equal(layer.dendrite_to_output, torch.full((1, 48), float(to_output)))
    x = torch.randn(4, 64)
    assert torch.equal(layer(x), layers.remove_dendrites(copy.deepcopy(layer))(x))
    layer(x).square().sum().backward()
    assert any(getattr(layer, f"dendrite_{name}").grad.any() for name in ("up", "to_output"))


def test_debugger_call_of_perforatedai_raises_with_its_message(monkeypatch):
    """perforatedai prints the problem and calls pdb, which would wait for input."""
    original, one = pdb.set_trace, tracker()

    def stop(*args, **kwargs):
        print("this_output_dimensions are wrong")
        pdb.set_trace()

    monkeypatch.setattr(pai.UPA, "simulate_cycles", stop)
    with pytest.raises(PerforatedError, match="this_output_dimensions are wrong"):
        one.new_dendrite(nn.Linear(2, 2))
    assert pdb.set_trace is original


def test_trainer_can_be_made_with_the_names_that_are_used(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = trainer_for(arguments(max_steps=1))
    trainer.evaluate()
    assert trainer.model._is_accelerate_prepared is True and trainer.args._n_gpu == trainer.args.n_gpu
