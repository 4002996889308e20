"""The trainer on stock models of transformers, hard ones: tied weights, shared embeddings, convolutions, adapters."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import models
import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    BertPreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import logging

from perforated_trainer import (
    DendriteArguments,
    PerforatedError,
    PerforatedTrainer,
    load_perforated_model,
    perforate,
)
from perforated_trainer.callbacks import PlotCallback

ROOT = Path(__file__).parent.parent
peft = pytest.mark.skipif(not importlib.util.find_spec("peft"), reason="peft is not installed")
NAMES = [pytest.param(name, marks=peft if "Lora" in name else ()) for name in models.CONFIGS]


@pytest.fixture(scope="module")
def process():
    """A process that has trained nothing and reloads what it is asked for."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, str(ROOT / "tests/reload.py")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, text=True, **pipes) as process:
        yield process
        process.stdin.close()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logging.disable_progress_bar()


class TrainedOnce(TrainerCallback):
    """At each step the optimizer has each parameter that can be trained, has it once, and there are gradients."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        assert any(parameter.grad is not None for parameter in model.parameters())

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        trained = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
        assert sorted(trained) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def trainer_for(name, model, resume=None, max_steps=4, training=None, **settings):
    args = TrainingArguments(
        use_cpu=True,
        max_steps=max_steps,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=3,
        logging_steps=1,
        learning_rate=1e-2,
        metric_for_best_model="loss",
        greater_is_better=False,
        resume_from_checkpoint=resume,
        **{"report_to": "none", "output_dir": "PAI"} | (training or {}),
    )
    model = perforate(model, DendriteArguments(testing_dendrite_capacity=True, **settings), args)
    rows = models.rows(name)
    data = {"train_dataset": rows[8:], "eval_dataset": rows[:8]}
    trainer = PerforatedTrainer(model=model, args=args, callbacks=[TrainedOnce()], **data)
    trainer.remove_callback(PlotCallback)  # pictures would take most of the time here; test_script looks at them
    return trainer


def trained(name, resume=None, **settings):
    torch.manual_seed(1 if resume else 0)
    trainer = trainer_for(name, models.build(name), resume, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def check_reloaded(name, trainer, process, tied):
    """Save, reload in a process of its own, compare: logits to the bit, ties, number and size of parameters."""
    trainer.save_model("final")
    model = trainer.model.eval()
    batch = trainer.data_collator([dict(row) for row in models.rows(name)[:4]])
    torch.save(batch, "batch.pt")
    last = max(Path("PAI").glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    for part in ("final", last):
        process.stdin.write(f"{name} {Path.cwd()} {part}\n")
        process.stdin.flush()
        answer = json.loads(process.stdout.readline())
        with torch.no_grad():
            assert torch.equal(model(**batch).logits, torch.load("reloaded.pt"))
        assert answer["tied"] == tied
        assert answer["parameters"] == trainer.num_parameters
    size = sum(file.stat().st_size for file in Path("final").glob("*.safetensors"))
    buffers = sum(b.numel() * b.element_size() for b in trainer.deployed_model().buffers())
    assert size < 1.05 * (trainer.num_parameters * model.dtype.itemsize + buffers)


@pytest.mark.parametrize("name", NAMES)
def test_model(name, process):
    tied = models.tied(models.build(name))
    assert bool(tied) == (name in {"BertForMaskedLM", "RobertaForMaskedLM", "GPT2LMHeadModel"} or "T5" in name)
    trainer = trained(name)
    assert trainer.num_dendrites == 2
    assert models.tied(trainer.model) == tied
    weights = {key: value.clone() for key, value in trainer.model.state_dict().items() if key != "tracker_string"}

    # A step trains each parameter that the deployed model has, except frozen ones.
    trainer.model.zero_grad()
    trainer.model(**trainer.data_collator(models.rows(name)[:8])).loss.backward()
    used = {id(p): p.numel() for p in trainer.model.parameters() if p.grad is not None}
    frozen = sum(p.numel() for p in trainer.deployed_model().parameters() if not p.requires_grad)
    assert (frozen > 0) == ("Lora" in name)
    assert sum(used.values()) == trainer.num_parameters - frozen
    trainer.model.zero_grad()
    check_reloaded(name, trainer, process, tied)

    # From the middle of the second cycle, another initialization: the same weights in the end.
    resumed = trained(name, resume="PAI/checkpoint-3")
    assert models.tied(resumed.model) == tied and resumed.num_dendrites == 2
    for key, value in weights.items():
        assert torch.equal(resumed.model.state_dict()[key], value), key


@pytest.mark.parametrize("name", ["BertForMaskedLM", "ResNetForImageClassification"])
def test_a_loaded_model_is_trained_on_and_gets_more_dendrites(name):
    trained(name).save_model("first")
    loaded = models.model_class(name).from_pretrained("first")
    assert loaded.num_parameters() > models.build(name).num_parameters()

    # By the stock Trainer, as it is.
    args = TrainingArguments("stock", max_steps=2, use_cpu=True, report_to="none", save_strategy="no")
    stock = Trainer(model=models.model_class(name).from_pretrained("first"), args=args, train_dataset=models.rows(name))
    before = {key: value.clone() for key, value in stock.model.state_dict().items() if "dendrite" in key}
    stock.train()
    assert any(not torch.equal(value, stock.model.state_dict()[key]) for key, value in before.items())
    stock.save_model("second")
    again = models.model_class(name).from_pretrained("second")
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in stock.model.state_dict().items())

    # By PerforatedTrainer, which adds more; killed and resumed, the same bits.
    weights, constant = [], {"lr_scheduler_type": "constant"}
    for folder, resume in (("more", None), ("halves", None), ("halves", True)):
        model = models.model_class(name).from_pretrained("first")
        steps = 4 if folder == "halves" and not resume else 100
        trainer = trainer_for(name, model, max_steps=steps, training={"output_dir": folder} | constant)
        batch = trainer.data_collator([dict(row) for row in models.rows(name)[:4]])
        assert trainer.num_dendrites == 2 and trainer.num_parameters == loaded.num_parameters()
        with torch.no_grad():
            assert torch.equal(trainer.model.eval()(**batch).logits, loaded(**batch).logits)
        trainer.train(resume_from_checkpoint=resume)
        weights.append(trainer.deployed_model().state_dict())
    assert trainer.num_dendrites == 5 and trainer.stopped_by == "tracker"
    assert weights[0].keys() == weights[2].keys()
    assert all(torch.equal(value, weights[2][key]) for key, value in weights[0].items())


@pytest.mark.parametrize("name", ["BertForMaskedLM", "GPT2LMHeadModel"])
def test_a_tied_layer_can_have_dendrites(name, process):
    layer = "cls.predictions.decoder" if "Bert" in name else "lm_head"
    tied = models.tied(models.build(name))
    trainer = trained(name, module_ids_to_perforate=[layer], module_names_to_perforate=[])
    assert trainer.num_parameters > 2 * models.HIDDEN * models.WORDS  # its dendrite has weights of its own
    assert [[n.replace(".main_module", "") for n in names] for names in models.tied(trainer.model)] == tied
    check_reloaded(name, trainer, process, tied)


def test_two_dendrites_in_bfloat16():
    name = "RobertaForMaskedLM"
    trainer = trainer_for(name, models.build(name).to(torch.bfloat16), max_steps=100)
    trainer.train()
    assert trainer.stopped_by == "tracker" and trainer.num_dendrites == 3
    trainer.save_model("final")
    model, batch = load_perforated_model(type(trainer.model), "final"), trainer.data_collator(models.rows(name)[:4])
    assert model.dtype == torch.bfloat16
    assert torch.equal(model(**batch).logits, trainer.model.eval()(**batch).logits)


def test_which_modules_get_dendrites_is_said_once(capsys):
    name = "DistilBertForSequenceClassification"
    settings = {"module_names_to_track": ["FFN"], "module_ids_to_track": [".classifier"]}
    trainer = trained(name, max_steps=2, **settings)
    lines = [line for line in capsys.readouterr().out.splitlines() if "No dendrites" in line]
    assert len(lines) == 1
    for left in ("distilbert.embeddings.word_embeddings", "distilbert.transformer.layer.*.ffn.lin1", "classifier"):
        assert left in lines[0]
    assert "q_lin" not in lines[0] and "pre_classifier" not in lines[0]
    ends = ["attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", "pre_classifier"]
    found = {n.removesuffix(".main_module") for n, _ in trainer.model.named_modules() if n.endswith(".main_module")}
    assert found == {end if end == "pre_classifier" else f"distilbert.transformer.layer.0.{end}" for end in ends}


def test_the_last_layer_after_a_pooler_has_other_dimensions():
    trainer = trainer_for("DistilBertForSequenceClassification", models.build("DistilBertForSequenceClassification"))
    trainer.train()
    model = trainer.model
    assert model.classifier.this_output_dimensions.tolist() == [-1, 0]
    assert model.distilbert.transformer.layer[0].ffn.lin1.this_output_dimensions.tolist() == [-1, -1, 0]


def test_several_outputs_are_named_with_what_to_set():
    trainer = trainer_for(
        "BertForMaskedLM", models.build("BertForMaskedLM"), module_names_to_perforate=["BertAttention"]
    )
    with pytest.raises(PerforatedError, match=r"attention returns a tuple.*--module_ids_to_track bert\.encoder"):
        trainer.train()


def test_wrong_output_dimensions_are_named():
    trainer = trainer_for("BertForMaskedLM", models.build("BertForMaskedLM"), output_dimensions=[-1, 0])
    with pytest.raises(PerforatedError, match="not properly set this_output_dimensions"):
        trainer.train()


class OwnHead(BertPreTrainedModel):
    """As many people build a classifier: with a pooler in the body that is not used."""

    def __init__(self, config):
        super().__init__(config)
        self.bert, self.head = BertModel(config), torch.nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(self, input_ids, labels=None):
        logits = self.head(self.bert(input_ids).last_hidden_state[:, 0])
        return SequenceClassifierOutput(torch.nn.functional.cross_entropy(logits, labels), logits)


class TwoNames(OwnHead):
    def __init__(self, config):
        super().__init__(config)
        self.body = self.bert


def test_a_layer_that_is_not_used_is_named():
    name, config = "DistilBertForSequenceClassification", BertConfig(**models.CONFIGS["BertForMaskedLM"])
    with pytest.raises(PerforatedError, match=r"set --module_ids_to_track bert\.pooler\.dense$"):
        trainer_for(name, OwnHead(config)).train()


def test_layers_with_two_names_get_no_dendrites():
    name, config = "DistilBertForSequenceClassification", BertConfig(**models.CONFIGS["BertForMaskedLM"])
    trainer = trainer_for(name, TwoNames(config))
    trainer.train()
    trainer.save_model("final")
    batch = trainer.data_collator(models.rows(name)[:4])
    loaded = load_perforated_model(TwoNames, "final")
    assert loaded.body is loaded.bert and loaded.head.num_dendrites == 2
    assert torch.equal(loaded(**batch).logits, trainer.model.eval()(**batch).logits)


def test_an_unknown_module_is_named():
    with pytest.raises(PerforatedError, match="no module pooler"):
        trainer_for("BertForMaskedLM", models.build("BertForMaskedLM"), module_ids_to_track=["pooler"])


@peft
def test_a_model_that_saves_adapters_alone_is_refused():
    import peft

    model = models.build("DistilBertForSequenceClassification")
    model.add_adapter(peft.LoraConfig(target_modules=["q_lin"]))
    for adapted in (model, peft.PeftModel(models.build("BertForMaskedLM"), peft.LoraConfig(target_modules=["query"]))):
        with pytest.raises(PerforatedError, match="inject_adapter_in_model"):
            trainer_for("DistilBertForSequenceClassification", adapted)
