"""The classes of perforated_trainer beyond what the script uses."""

import copy
import importlib
import json
import pdb
import sys

import pytest
import safetensors.torch
import torch
from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_outputs import ImageClassifierOutput

from mnist_huggingface_perforatedai import MnistCnnConfig, MnistCnnForImageClassification, compute_metrics
from perforated_trainer import (
    DendriteArguments,
    PerforatedError,
    PerforatedTrainer,
    ignore_shared_tensors,
    load_perforated_model,
    perforate,
)


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return TrainingArguments(
        output_dir="PAI",
        use_cpu=True,
        eval_strategy="steps",
        eval_steps=2,
        max_steps=8,
        logging_steps=2,
        metric_for_best_model="accuracy",
        remove_unused_columns=False,
        report_to="none",
    )


def rows(count=64):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 1, 28, 28, generator=generator)
    return [{"pixel_values": image, "labels": index % 10} for index, image in enumerate(images)]


def trainer_for(model, arguments, cls=PerforatedTrainer, **kwargs):
    data = {"train_dataset": rows(), "eval_dataset": rows(20)}
    return cls(model=model, args=arguments, compute_metrics=compute_metrics, **data, **kwargs)


def test_results_without_test_data_and_packages_that_only_the_script_needs(arguments, monkeypatch, capsys):
    model = perforate(MnistCnnForImageClassification(MnistCnnConfig()), DendriteArguments(), arguments)
    trainer = trainer_for(model, arguments)
    trainer.train()
    for package in ("torchvision", "datasets"):
        monkeypatch.setitem(sys.modules, package, None)  # as where it is not installed
    results = trainer.save_results({"name": "noise"})
    with open("PAI/results.json") as file:
        assert json.load(file) == results
    assert set(results["final"]) == {"dendrites", "parameters", "validation_accuracy"}
    assert "transformers" in results["versions"] and not {"torchvision", "datasets"} & results["versions"].keys()
    assert f"validation_accuracy {results['final']['validation_accuracy']:.4f}" in capsys.readouterr().out


def test_whole_aliases_are_written_and_partial_overlaps_are_not(tmp_path):
    importlib.reload(safetensors.torch)  # as it is before a script calls the override
    weight = torch.arange(6.0)
    with pytest.raises(RuntimeError, match="share memory"):
        safetensors.torch.save_file({"a": weight, "b": weight.view(6)}, tmp_path / "x")
    ignore_shared_tensors()
    ignore_shared_tensors()
    safetensors.torch.save_file({"a": weight, "b": weight.view(6)}, tmp_path / "x")
    assert torch.equal(safetensors.torch.load_file(tmp_path / "x")["b"], weight)
    for other in (weight[:3], weight[1:], weight.view(2, 3)):
        with pytest.raises(RuntimeError, match="share memory"):
            safetensors.torch.save_file({"a": weight, "b": other}, tmp_path / "x")


class TwoNamesConfig(PreTrainedConfig):
    model_type = "two_names"


class TwoNames(PreTrainedModel):
    """A model that registers its body under a second name."""

    config_class = TwoNamesConfig
    base_model_prefix = "body"

    def __init__(self, config):
        super().__init__(config)
        self.body = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))
        self.base_model = self.body
        self.post_init()

    def forward(self, pixel_values, labels=None):
        logits = self.body(pixel_values)
        return ImageClassifierOutput(loss=torch.nn.functional.cross_entropy(logits, labels), logits=logits)


def test_a_second_name_for_the_body_is_deleted(arguments):
    model = TwoNames(TwoNamesConfig())
    assert "base_model" in dict(model.named_modules(remove_duplicate=False))
    model = perforate(model, DendriteArguments(testing_dendrite_capacity=True), arguments)
    assert "base_model" not in dict(model.named_modules(remove_duplicate=False))
    trainer = trainer_for(model, arguments)
    assert trainer.num_parameters == 7850
    trainer.train()
    assert trainer.num_dendrites == 3 and trainer.stopped_by == "tracker"
    trainer.save_model("saved")
    reloaded = load_perforated_model(TwoNames, "saved")
    images = torch.randn(4, 1, 28, 28)
    labels = torch.zeros(4, dtype=torch.int64)
    assert torch.equal(reloaded(images, labels).logits, model.eval()(images, labels).logits)


def test_the_read_only_property_is_left_alone(arguments):
    model = perforate(MnistCnnForImageClassification(MnistCnnConfig()), DendriteArguments(), arguments)
    assert model.base_model is model


def test_a_call_to_the_debugger_becomes_an_error_with_the_librarys_message(arguments):
    class Wide(MnistCnnForImageClassification):
        """Its linear layers give three dimensions, which `output_dimensions` denies: the library prints that, exits."""

        def forward(self, pixel_values, labels=None):
            images = self.features(pixel_values).flatten(1).unsqueeze(1).expand(-1, 3, -1)
            logits = self.classifier(images).mean(1)
            return ImageClassifierOutput(loss=torch.nn.functional.cross_entropy(logits, labels), logits=logits)

    original = pdb.set_trace
    dendrite_args = DendriteArguments(output_dimensions=[-1, 0, -1, -1])  # for the convolutions alone
    trainer = trainer_for(perforate(Wide(MnistCnnConfig()), dendrite_args, arguments), arguments)
    with pytest.raises(PerforatedError, match="this_output_dimensions"):
        trainer.train()
    assert pdb.set_trace is original


def test_on_the_fork_the_trainers_own_steps_are_off(arguments):
    seen = []

    class Fork(Trainer):
        def __init__(self, *args, using_perforatedai=True, **kwargs):
            seen.append(using_perforatedai)
            super().__init__(*args, **kwargs)

    class OnFork(PerforatedTrainer, Fork):
        """PerforatedTrainer where the next class is the fork's Trainer."""

    model = perforate(MnistCnnForImageClassification(MnistCnnConfig()), DendriteArguments(), arguments)
    trainer_for(model, arguments, cls=OnFork).train()
    assert seen == [False]


def test_an_optimizer_of_the_old_network_is_refused(arguments):
    model = perforate(MnistCnnForImageClassification(MnistCnnConfig()), DendriteArguments(), arguments)
    with pytest.raises(PerforatedError, match="optimizer_cls_and_kwargs"):
        trainer_for(model, arguments, optimizers=(torch.optim.SGD(model.parameters()), None))
    trainer_for(model, arguments, optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1})).train()


def test_the_schedule_follows_the_metric(arguments):
    arguments.lr_scheduler_type = "reduce_lr_on_plateau"
    model = perforate(MnistCnnForImageClassification(MnistCnnConfig()), DendriteArguments(), arguments)
    trainer = trainer_for(model, arguments)
    trainer.train()
    assert trainer.lr_scheduler.mode == "max"


def test_private_names_that_are_used_exist(arguments):
    """accelerate's mark (1.15) and the Trainer's number of GPUs (transformers 5.23), see the comments at their uses."""
    model = perforate(MnistCnnForImageClassification(MnistCnnConfig()), DendriteArguments(), arguments)
    trainer = trainer_for(model, arguments)
    trainer.evaluate()
    assert model._is_accelerate_prepared is True and arguments._n_gpu == arguments.n_gpu


class LooksAtShortcuts(TrainerCallback):
    """Switches a module to evaluation before each step, counts what the network has, keeps a copy of the first one."""

    def __init__(self):
        self.numbers, self.copy = [], None

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        assert vars(model)["parameters"]
        model.classifier[0].eval()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        assert all(module.training for module in model.modules())  # the Trainer's train() reached each of them
        assert any(parameter.grad is not None for parameter in model.parameters())
        self.numbers.append(len(list(model.parameters())))
        assert self.numbers[-1] == len({id(parameter) for _, parameter in model.named_parameters()})
        self.copy = self.copy or copy.deepcopy(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        assert all(parameter.grad is None for parameter in model.parameters())


def test_what_is_looked_up_once_a_cycle_is_what_is_there(arguments):
    callback = LooksAtShortcuts()
    settings = DendriteArguments(n_epochs_to_switch=1, max_dendrites=1)
    trainer = trainer_for(MnistCnnForImageClassification(MnistCnnConfig()), arguments, dendrite_args=settings)
    trainer.args.max_steps = 20
    trainer.add_callback(callback)
    trainer.train()
    assert len(set(callback.numbers)) > 1, "a dendrite was added"
    assert not {"parameters", "train"} & vars(trainer.model).keys()
    assert not {"parameters", "train"} & vars(trainer.deployed_model()).keys()
    own = {id(parameter) for parameter in trainer.model.parameters()}
    copied = list(callback.copy.parameters())
    assert len(copied) == callback.numbers[0] and not own & {id(parameter) for parameter in copied}
    assert not callback.copy.eval().features.training


def test_shortcuts_end_with_an_error_too(arguments):
    class Stops(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise RuntimeError("of the user")

    trainer = trainer_for(MnistCnnForImageClassification(MnistCnnConfig()), arguments, callbacks=[Stops()])
    with pytest.raises(RuntimeError, match="of the user"):
        trainer.train()
    assert not {"parameters", "train"} & vars(trainer.model).keys()


def test_persistent_workers_do_not_give_the_test_data_the_loader_of_the_validation(arguments):
    arguments.dataloader_num_workers, arguments.dataloader_persistent_workers = 1, True
    model, data = MnistCnnForImageClassification(MnistCnnConfig()), rows(30)
    for number, row in enumerate(data):
        row["labels"] = number % 10 if number < 20 else 0
    model.classifier[-1].bias.data[0] = 100.0  # answers 0, whatever it sees
    trainer = trainer_for(model, arguments, test_dataset=data[20:])
    trainer.eval_dataset = data[:20]
    arguments.learning_rate = 0.0
    trainer.train()
    for name, score in (("eval_accuracy", 0.1), ("test_accuracy", 1.0)):
        assert {entry[name] for entry in trainer.state.log_history if name in entry} == {score}
    assert trainer.get_eval_dataloader(trainer.test_dataset) is trainer.get_eval_dataloader(trainer.test_dataset)
