"""Which modules get dendrites, by patterns, and what dendrites cost before they are there."""

import re

import models
import pytest
import torch
from transformers import TrainingArguments, set_seed
from transformers.utils import logging

from perforated_trainer import DendriteArguments, PerforatedError, PerforatedTrainer, perforate, price
from perforated_trainer.arguments import LAYER_TYPES
from perforated_trainer.callbacks import PlotCallback
from perforated_trainer.patterns import last_blocks, matching

BERT, RESNET, GPT2 = "DistilBertForSequenceClassification", "ResNetForImageClassification", "GPT2LMHeadModel"
BLOCK = "distilbert.transformer.layer"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logging.disable_progress_bar()


def arguments(**changes):
    values = {
        "output_dir": "run",
        "use_cpu": True,
        "max_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_strategy": "no",
        "learning_rate": 1e-2,
        "metric_for_best_model": "loss",
        "report_to": "none",
    }
    return TrainingArguments(**values | changes)


def perforated(name, changes=None, **settings):
    """Names of the modules that get dendrites."""
    model = perforate(models.build(name, **changes or {}), DendriteArguments(**settings), arguments())
    return [name.removesuffix(".main_module") for name, _ in model.named_modules() if name.endswith(".main_module")]


def trainer_for(name, model=None, **settings):
    set_seed(0)
    rows = models.rows(name)
    trainer = PerforatedTrainer(
        model=model or models.build(name),
        args=arguments(),
        dendrite_args=DendriteArguments(**{"switch_mode": "fixed", "max_dendrites": 1} | settings),
        train_dataset=rows[8:],
        eval_dataset=rows[:8],
    )
    trainer.remove_callback(PlotCallback)
    return trainer


# ----------------------------------------------------------------------------------------------------------- patterns

NAMES = ["", "query", "a.query", "a.0.query", "a.1.my_query", "a.10.value", "key"]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("query", ["query", "a.query", "a.0.query"]),
        (".query", ["query"]),
        ("0.query", ["a.0.query"]),
        (r"a\.\d+\.query", ["a.0.query"]),
        (r"a\.\d+\..*", ["a.0.query", "a.1.my_query", "a.10.value"]),
        (r".*(query|key)", ["query", "a.query", "a.0.query", "a.1.my_query", "key"]),
        ("y", []),
    ],
)
def test_patterns(pattern, found):
    assert matching(pattern, NAMES) == found


@pytest.mark.skipif(not pytest.importorskip("peft"), reason="peft is not installed")
@pytest.mark.parametrize("pattern", ["q_lin", "lin1", "attention.q_lin", r".*\.layer\.1\..*(q|v)_lin", r".*ffn\.lin\d"])
def test_patterns_mean_what_they_mean_in_peft(pattern):
    import peft

    special = re.search(r"[*\\]", pattern)
    model = models.build(BERT, n_layers=2)
    adapted = peft.inject_adapter_in_model(
        peft.LoraConfig(target_modules=pattern if special else [pattern]), models.build(BERT, n_layers=2)
    )
    theirs = [name for name, module in adapted.named_modules() if hasattr(module, "lora_A")]
    assert theirs and matching(pattern, [name for name, _ in model.named_modules()]) == theirs


def test_only_what_the_patterns_name_gets_dendrites():
    only = {"module_names_to_perforate": ["none"]}
    assert perforated(BERT, module_ids_to_perforate=["q_lin", "v_lin"], **only) == [
        f"{BLOCK}.0.attention.q_lin",
        f"{BLOCK}.0.attention.v_lin",
    ]
    assert perforated(BERT, module_ids_to_perforate=r".*ffn.*", **only) == [
        f"{BLOCK}.0.ffn.lin1",
        f"{BLOCK}.0.ffn.lin2",
    ]
    # No layer of the usual types in what it matches: then what it matches.
    assert perforated(BERT, module_ids_to_perforate=[r".*\.\d\.ffn"], **only) == [f"{BLOCK}.0.ffn"]
    assert perforated(BERT, module_ids_to_track=["attention", r".*\.ffn\..*", "pre_classifier"]) == ["classifier"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"module_ids_to_perforate": ["q_linear"]}, r"no module q_linear; close to it: .*attention\.q_lin\b"),
        ({"module_ids_to_track": ["distilbert.transformer.layers.0.ffn.lin1"]}, r"close to it: .*layer\.0\.ffn\.lin1"),
        ({"module_ids_to_track": [r".*\.atention\..*"]}, r"close to it: .*\.attention"),
        ({"module_ids_to_perforate": ["q_lin", "zzzzzzzz"]}, "no module zzzzzzzz; see model.named_modules"),
        ({"module_ids_to_perforate": ["(q_lin"]}, "is no regular expression"),
        ({"perforate_last_blocks": 3}, rf"last_blocks 3: the model has 1, in {BLOCK}"),
        ({"perforate_last_blocks": 0}, "last_blocks 0"),
    ],
)
def test_what_matches_nothing_is_refused_with_names_that_are_close(settings, message):
    with pytest.raises(PerforatedError, match=message):
        perforated(BERT, **settings)


def test_the_last_blocks():
    found = perforated(BERT, {"n_layers": 3}, perforate_last_blocks=2, module_ids_to_perforate=["classifier"])
    assert len(found) == 13 and found[-1] == "classifier"
    assert all(name.startswith((f"{BLOCK}.1.", f"{BLOCK}.2.")) for name in found[:-1])
    assert last_blocks(models.build(GPT2, n_layer=3), 2) == ["transformer.h.1", "transformer.h.2"]
    resnet = models.build(RESNET, depths=[1, 4])  # its stages are blocks, not the layers in one of them
    assert last_blocks(resnet, 1) == ["resnet.encoder.stages.1"]
    with pytest.raises(PerforatedError, match="no row of blocks"):
        last_blocks(torch.nn.Linear(1, 1), 1)


# -------------------------------------------------------------------------------------------------------------- prices


def text(trainer):
    trainer.train()
    return trainer.tracker.table


@pytest.mark.parametrize("name", [BERT, RESNET, GPT2])
def test_the_table_before_the_training_tells_the_truth(name, capsys):
    now = sum(p.numel() for p in models.build(name).parameters())
    trainer = trainer_for(name, max_dendrites=2, improvement_threshold=[0.0])
    table = text(trainer)
    assert capsys.readouterr().out.startswith(table)
    sizes = [int(row.split()[1].replace(",", "")) for row in table.splitlines()[-3:]]
    assert sizes[0] == now
    for cycle in trainer.cycles():
        assert cycle["parameters"] == sizes[cycle["dendrites"]]
    assert len(trainer.cycles()) > 1
    assert f"+{sizes[1] - sizes[0]:,} +{sizes[1] / sizes[0] - 1:.1%}" in re.sub(" +", " ", table)
    layers = sum(int(row.split()[2]) for row in table.split("\nNo dendrites")[0].splitlines()[1:])
    model = models.build(name)
    kinds = [type(module).__name__ for part, module in model.named_modules() if part != "lm_head"]
    assert layers == sum(kind in LAYER_TYPES for kind in kinds)


def test_no_dendrite_that_would_not_fit(capsys):
    sizes = [58_114, 67_910, 77_964]
    trainer = trainer_for(BERT, max_dendrites=3, max_parameters=sizes[1], improvement_threshold=[0.0])
    assert "2 (too large)" in text(trainer)
    assert trainer.stopped_by == "tracker" and max(c["dendrites"] for c in trainer.cycles()) == 1
    assert all(entry.get("parameters", 0) <= sizes[1] for entry in trainer.state.log_history)
    said = f"one dendrite more would make {sizes[2]:,} parameters, --max_parameters is {sizes[1]:,}: none is added"
    assert said in capsys.readouterr().out
    with pytest.raises(PerforatedError, match="67,909: the model has 58,114 parameters, and 67,910 with one"):
        trainer_for(BERT, max_parameters=sizes[1] - 1)


def test_prices_of_other_modules():
    assert (
        price.neurons_of(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.BatchNorm2d(8), torch.nn.ReLU())) == 8
    )
    assert price.sizes(100, [(10, 2)], 0, 2) == [100, 112, 126]


# ----------------------------------------------------------------------------- a convolution with its normalisation


def logits(model, name=RESNET):
    images = torch.stack([row["pixel_values"] for row in models.rows(name)[:4]])
    with torch.no_grad():
        return model.eval()(pixel_values=images).logits


def test_a_convolution_and_its_normalisation_are_one_block():
    stock = models.build(RESNET)
    before = logits(stock)
    trainer = trainer_for(RESNET, stock, join_normalization=True, improvement_threshold=[0.0])
    assert "resnet.embedder.embedder.convolution  Conv2d" in re.sub("  +", "  ", trainer.tracker.table)
    assert torch.equal(logits(trainer.model), before)
    trainer.train()
    assert trainer.num_dendrites == 1
    model = trainer.deployed_model()
    block = model.resnet.embedder.embedder.convolution
    assert isinstance(block, torch.nn.Sequential) and isinstance(block[1], torch.nn.BatchNorm2d)
    assert isinstance(block.dendrites[0][1], torch.nn.BatchNorm2d) and block.num_dendrites == 1
    assert trainer.num_parameters == trainer.cycles()[-1]["parameters"] == sum(p.numel() for p in model.parameters())
    trainer.save_model("saved")
    loaded = models.model_class(RESNET).from_pretrained("saved")
    assert torch.equal(logits(loaded), logits(trainer.model))
    again = trainer_for(RESNET, loaded, join_normalization=True)  # gets more dendrites
    assert again.num_dendrites == 1 and torch.equal(logits(again.model), logits(trainer.model))


def test_without_a_dendrite_a_joined_model_is_saved_as_a_stock_model():
    trainer = trainer_for(RESNET, join_normalization=True, max_dendrites=0)
    trainer.train()
    trainer.save_model("saved")
    names = models.build(RESNET).state_dict().keys()
    assert trainer.deployed_model().state_dict().keys() == names
    assert torch.equal(logits(models.model_class(RESNET).from_pretrained("saved")), logits(trainer.model))


def test_what_gets_no_dendrites_is_not_joined():
    model, settings = models.build(RESNET), {"join_normalization": True, "module_ids_to_track": ["embedder"]}
    perforate(model, DendriteArguments(**settings), arguments())
    assert isinstance(model.resnet.embedder.embedder.convolution, torch.nn.Conv2d)
    assert isinstance(model.resnet.embedder.embedder.normalization, torch.nn.BatchNorm2d)


# ------------------------------------------------------------------------------------------------------------ adapters


def scores(model):
    batch = torch.stack([row["input_ids"] for row in models.rows(BERT)[:4]])
    with torch.no_grad():
        return model.eval()(input_ids=batch).logits


def test_adapters_are_merged_and_then_the_model_gets_dendrites():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_lin", "v_lin"], task_type="SEQ_CLS", init_lora_weights=False)
    adapted = peft.get_peft_model(models.build(BERT), config)
    with pytest.raises(PerforatedError, match="merge_and_unload"):
        trainer_for(BERT, adapted)
    before, model = scores(adapted), adapted.merge_and_unload()
    assert torch.allclose(scores(model), before, atol=1e-5)
    for parameter in model.distilbert.parameters():
        parameter.requires_grad = False
    trainer = trainer_for(BERT, model, improvement_threshold=[0.0])
    trainer.train()
    assert trainer.num_dendrites == 1
    trainer.save_model("saved")
    loaded = models.model_class(BERT).from_pretrained("saved")
    assert loaded.classifier.num_dendrites == 1 and not hasattr(loaded.distilbert.transformer.layer[0], "num_dendrites")
    assert torch.equal(scores(loaded), scores(trainer.model))


def test_the_layers_of_adapters_get_dendrites_in_a_class_of_its_own():
    pytest.importorskip("peft")
    trainer = trainer_for(BERT, models.build("LoraDistilBert"), improvement_threshold=[0.0])
    trainer.train()
    assert trainer.num_dendrites == 1
    trainer.save_model("saved")
    loaded = models.LoraDistilBert.from_pretrained("saved")
    assert loaded.distilbert.transformer.layer[0].attention.q_lin.lora_A.default.num_dendrites == 1
    assert torch.equal(scores(loaded), scores(trainer.model))
