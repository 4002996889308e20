"""What `_compat` and `tracker` bend in other libraries is there, and does what they assume."""

import inspect
import sys

import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import is_lomo_available
from perforated_trainer.scaffold import GPA, MPA, UPA
from perforated_trainer.tracker import Decision, DendriteTracker
from transformers import Trainer, TrainingArguments

import mnist_huggingface_perforatedai as mnist
from perforated_trainer import DendriteArguments, PerforatedTrainer, _compat, layers, perforate, scaffold

# ---------------------------------------------------------------------------------------------------------- safetensors


def tied():
    weight = torch.arange(6.0).view(2, 3)
    return {"first": weight, "second": weight}


def test_safetensors_refuses_shared_tensors_unless_told_otherwise(tmp_path):
    with pytest.raises(RuntimeError, match="share memory"):
        safetensors.torch.save_file(tied(), tmp_path / "file")
    with _compat.shared_tensors_ignored():
        safetensors.torch.save_file(tied(), tmp_path / "file")
        whole = torch.arange(6.0)
        with pytest.raises(RuntimeError, match="share memory"):
            safetensors.torch.save_file({"whole": whole, "part": whole[:3]}, tmp_path / "other")
    assert safetensors.torch.load_file(tmp_path / "file").keys() == tied().keys()
    assert safetensors.torch._find_shared_tensors is _compat._find_shared_tensors, "the patch ends with its block"


# ------------------------------------------------------------------------------------------ accelerate, transformers


def test_accelerate_searches_for_lomo_at_each_step():
    """When the step no longer does, `_patch_search_for_lomo` can go."""
    assert "is_lomo_available()" in inspect.getsource(AcceleratedOptimizer.step)
    assert sys.modules["lomo_optim"] is None and not is_lomo_available()


def test_one_of_several_gpus_is_used():
    args = TrainingArguments(output_dir="run", use_cpu=True, report_to="none")
    _ = args.device
    args._n_gpu = 2
    assert args.n_gpu == 2
    _compat.use_one_gpu(args)
    assert args.n_gpu == 1


def test_a_prepared_model_is_marked():
    model = torch.nn.Linear(2, 2)
    Accelerator(cpu=True).prepare(model)
    assert model._is_accelerate_prepared is True
    _compat.forget_preparation(model)
    assert model._is_accelerate_prepared is False
    assert '"_is_accelerate_prepared"' in inspect.getsource(Accelerator.prepare_model)


def test_adapters_are_seen():
    model = mnist.MnistCnnForImageClassification(mnist.MnistCnnConfig())
    assert _compat.has_adapters(model) is False
    from peft import LoraConfig

    model.add_adapter(LoraConfig(target_modules=["classifier.0"]))
    assert _compat.has_adapters(model) is True


HOOKS = "_evaluate _save _save_checkpoint _save_optimizer_and_scheduler _save_scaler _load_from_checkpoint"


@pytest.mark.parametrize("name", [*HOOKS.split(), "_push_from_checkpoint"])
def test_the_hook_is_the_trainers(name):
    """Ours takes what the Trainer gives it, and the Trainer itself calls it."""
    stock, ours = (inspect.signature(getattr(cls, name)).parameters for cls in (Trainer, PerforatedTrainer))
    takes_all = any(p.kind is p.VAR_POSITIONAL for p in ours.values())
    assert takes_all or list(stock) == list(ours)
    assert f"self.{name}(" in inspect.getsource(Trainer)


# --------------------------------------------------------------------------------------------------------- perforatedai


@pytest.fixture
def current(tmp_path):
    """The tracker of a converted model, with a folder of its own."""
    args = TrainingArguments(
        output_dir="run", use_cpu=True, eval_strategy="steps", metric_for_best_model="accuracy", report_to="none"
    )
    model = mnist.MnistCnnForImageClassification(mnist.MnistCnnConfig(dropouts=(0.0, 0.0)))
    perforate(model, DendriteArguments(n_epochs_to_switch=1, improvement_threshold=[0.0]), args)
    DendriteTracker.current.folder = tmp_path
    return DendriteTracker.current


def step(current):
    """A training step, without which the library cannot restructure."""
    optimizer = torch.optim.SGD(current.model.parameters(), 0.1)
    current.set_optimizer(optimizer)
    current.model(torch.randn(4, 1, 28, 28), labels=torch.arange(4)).loss.backward()
    optimizer.step()


def open_modules(current):
    """The library's layers as it made them."""
    for module in current._layers:
        scaffold._register(module, scaffold._ORDER)
        scaffold._register(module.dendrite_module, scaffold._DENDRITE_ORDER)
    return current._layers


def test_the_librarys_functions_are_replaced_by_ours():
    assert MPA.PAINeuronModule.forward is scaffold._forward and MPA.filter_backward is scaffold._filter_backward
    assert callable(scaffold._librarys_forward) and callable(scaffold._librarys_filter_backward)


def test_the_paid_package_stays_out():
    assert sys.modules["perforatedbp"] is None


def test_a_converted_layer_has_the_parts_that_are_taken_out(current):
    """In this order, which is that of the parameters."""
    modules = open_modules(current)
    names = [".features.0", ".features.2", ".classifier.0", ".classifier.3"]
    assert sorted(module.name for module in modules) == sorted(names)
    for module in modules:
        assert isinstance(module, MPA.PAINeuronModule)
        assert tuple(module._modules) == scaffold._ORDER
        assert tuple(module.dendrite_module._modules) == scaffold._DENDRITE_ORDER
        assert module.dendrite_modules_added == 0 and module.processor is None
        assert list(module.dendrite_module.processors) == []
        assert module._fb_init_done is False and module._fb_hook_handle is None
        assert module.dendrite_module.dendrite_values[0].out_channels == -1, "no gradient has come"


def test_the_first_gradient_tells_the_number_of_neurons(current):
    assert len(current.idle_modules()) == 4
    step(current)
    assert current.idle_modules() == []
    assert all(module._fb_init_done for module in current._layers), "the library asks once only"


def test_scores_decide_and_a_dendrite_is_added(current):
    decisions = []
    for score in (0.5, 0.4, 0.3):
        step(current)
        decisions.append(current.add_score(score, {"train loss": 1.0}, {"test accuracy": 0.5}, step=1))
    assert decisions == [Decision.CONTINUE, Decision.CONTINUE, Decision.RESTRUCTURED]
    member = GPA.pai_tracker.member_vars
    assert member["num_dendrites_added"] == current.num_dendrites == 1
    assert {"num_epochs_run", "epoch_last_improved", "accuracies"} <= member.keys()
    for module in current._layers:
        dendrites, between, to_output = scaffold.dendrites_of(module)
        assert len(dendrites) == len(between) == 1 and to_output.shape[0] == 1
        dimensions = module.this_output_dimensions.tolist()
        assert dimensions.count(0) == 1
    # Ours and the library's forward agree.
    x = torch.randn(4, 1, 28, 28)
    ours = current.model(x).logits
    for module in open_modules(current):
        module.__dict__["parts"] = None
    assert torch.allclose(current.model(x).logits, ours, atol=1e-6)
    current._close()


def test_the_activation_is_one_that_we_know(current):
    """Ours computes it, so a new default of the library must be seen."""
    assert layers.activation_name(GPA.pc.get_pai_forward_function()) == "sigmoid"


def test_save_and_load_keep_all(current, tmp_path):
    """With the library's own file, and what `load` does in place of its `load_system`."""
    for score in (0.5, 0.4, 0.3):
        step(current)
        current.add_score(score, {}, {}, step=1)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    current.save(folder)
    x, member = torch.randn(4, 1, 28, 28), dict(GPA.pai_tracker.member_vars)
    logits = current.model(x).logits
    step(current)
    assert not torch.equal(current.model(x).logits, logits)
    current.load(folder)
    assert torch.equal(current.model(x).logits, logits)
    for name in ("num_dendrites_added", "num_epochs_run", "epoch_last_improved", "accuracies"):
        assert GPA.pai_tracker.member_vars[name] == member[name]
    assert UPA.get_tracked_modules(current.model, 0) == []
