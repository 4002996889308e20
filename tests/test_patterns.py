"""Patterns that choose the modules that get dendrites, and the number of parameters that dendrites will add."""

import re
from types import SimpleNamespace

import models
import pytest
import torch
from small import arguments, scripted
from torch.nn.utils import prune
from transformers.utils import logging

from perforated_trainer import DendriteArguments, PerforatedError, PerforatedTrainer, layers, parameter_count, perforate
from perforated_trainer.arguments import LAYER_TYPES
from perforated_trainer.convert import plan_dendrites, planned_sizes, table
from perforated_trainer.patterns import last_blocks, matching

BERT, RESNET, GPT2 = "DistilBertForSequenceClassification", "ResNetForImageClassification", "GPT2LMHeadModel"
BLOCK = "distilbert.transformer.layer"
# With a patience of 1: a dendrite after the second and the fourth evaluation, the end after the sixth.
TWO = [0.1, 0.1, 0.2, 0.2, 0.3, 0.3]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logging.disable_progress_bar()


def planned(name, changes=None, **settings):
    """The plan for a model, its table, and the numbers of parameters in it."""
    model, args = models.build(name, **changes or {}), DendriteArguments(**settings)
    plan = plan_dendrites(model, args, arguments())
    return SimpleNamespace(
        plan=plan, names=plan.names, table=table(model, args, plan), sizes=planned_sizes(model, args, plan)
    )


def trained(name, model=None, output_dir="run", **settings):
    """A training of six steps, in which up to two dendrites are added."""
    model, more = models.build(name) if model is None else model, {"name": name}
    trainer = scripted(TWO, model, settings, more=more, eval_steps=1, learning_rate=1e-2, output_dir=output_dir)[0]
    trainer.train()
    return trainer


# ------------------------------------------------------------------------------------------------------------- patterns

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
def test_pattern_means_whole_names_ends_and_expressions(pattern, found):
    assert matching(pattern, NAMES) == found


@pytest.mark.skipif(not pytest.importorskip("peft"), reason="peft is not installed")
@pytest.mark.parametrize("pattern", ["q_lin", "lin1", "attention.q_lin", r".*\.layer\.1\..*(q|v)_lin", r".*ffn\.lin\d"])
def test_pattern_matches_the_modules_that_peft_matches(pattern):
    import peft

    special = re.search(r"[*\\]", pattern)
    model = models.build(BERT, n_layers=2)
    adapted = peft.inject_adapter_in_model(
        peft.LoraConfig(target_modules=pattern if special else [pattern]), models.build(BERT, n_layers=2)
    )
    theirs = [name for name, module in adapted.named_modules() if hasattr(module, "lora_A")]
    assert theirs and matching(pattern, [name for name, _ in model.named_modules()]) == theirs


def test_patterns_choose_the_layers_that_get_dendrites():
    attention, ffn = f"{BLOCK}.0.attention", f"{BLOCK}.0.ffn"
    for only in ({"module_names_to_perforate": []}, {"module_names_to_perforate": ["none"]}):
        found = planned(BERT, module_ids_to_perforate=["q_lin", "v_lin"], **only).names
        assert found == [f"{attention}.q_lin", f"{attention}.v_lin"]
        assert planned(BERT, module_ids_to_perforate=r".*ffn.*", **only).names == [f"{ffn}.lin1", f"{ffn}.lin2"]
        # If a match contains no layer of the usual types, the match itself gets dendrites.
        assert planned(BERT, module_ids_to_perforate=[r".*\.\d\.ffn"], **only).names == [ffn]
    tracked = ["attention", r".*\.ffn\..*", "pre_classifier"]
    assert planned(BERT, module_ids_to_track=tracked).names == ["classifier"]


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
def test_pattern_without_a_match_raises_with_close_names(settings, message):
    with pytest.raises(PerforatedError, match=message):
        planned(BERT, **settings)


def test_last_blocks_are_those_of_the_longest_row():
    settings = {"perforate_last_blocks": 2, "module_ids_to_perforate": ["classifier"]}
    found = planned(BERT, {"n_layers": 3}, **settings).names
    assert len(found) == 13 and found[-1] == "classifier"
    assert all(name.startswith((f"{BLOCK}.1.", f"{BLOCK}.2.")) for name in found[:-1])
    assert last_blocks(models.build(GPT2, n_layer=3), 2) == ["transformer.h.1", "transformer.h.2"]
    resnet = models.build(RESNET, depths=[1, 4])  # its stages are blocks, not the layers in one of them
    assert last_blocks(resnet, 1) == ["resnet.encoder.stages.1"]
    with pytest.raises(PerforatedError, match="no row of blocks"):
        last_blocks(torch.nn.Linear(1, 1), 1)


# ------------------------------------------------------------------------------------------------- number of parameters


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("name", [BERT, RESNET, GPT2])
def test_table_before_the_training_has_the_numbers_of_the_training(name, rank, capsys):
    now = sum(p.numel() for p in models.build(name).parameters())
    expected = planned(name, max_dendrites=2, dendrite_rank=rank)
    trainer = trained(name, max_dendrites=2, dendrite_rank=rank)
    assert expected.table == trainer.plan_table and expected.table in capsys.readouterr().out
    sizes = [int(row.split()[1].replace(",", "")) for row in expected.table.splitlines()[-3:]]
    assert sizes == expected.sizes and sizes[0] == now
    assert [(cycle["dendrites"], cycle["parameters"]) for cycle in trainer.cycles()] == list(enumerate(sizes))
    assert f"+{sizes[1] - sizes[0]:,} +{sizes[1] / sizes[0] - 1:.1%}" in re.sub(" +", " ", expected.table)
    counted = sum(int(row.split()[2]) for row in expected.table.split("\nNo dendrites")[0].splitlines()[1:])
    model = models.build(name)
    kinds = [type(module).__name__ for part, module in model.named_modules() if part != "lm_head"]
    excluded = [n for reason, names in expected.plan.excluded.items() if "rank" in reason for n in names]
    assert counted == len(expected.names) == sum(kind in LAYER_TYPES for kind in kinds) - len(excluded)


def test_dendrite_that_does_not_fit_max_parameters_is_not_added(capsys):
    sizes = planned(BERT, max_dendrites=3).sizes[:3]
    settings = {"max_dendrites": 3, "max_parameters": sizes[1]}
    assert "2 (too large)" in planned(BERT, **settings).table
    trainer = trained(BERT, **settings)
    assert trainer.stopped_by == "tracker" and max(c["dendrites"] for c in trainer.cycles()) == 1
    assert all(entry.get("parameters", 0) <= sizes[1] for entry in trainer.state.log_history)
    said = rf"one more dendrite would make {sizes[2]:,} parameters, .*max_parameters is {sizes[1]:,}: none is added"
    assert re.search(said, capsys.readouterr().out)
    with pytest.raises(PerforatedError, match=f"{sizes[1] - 1:,}: the model has {sizes[0]:,} .* {sizes[1]:,} with"):
        planned(BERT, max_parameters=sizes[1] - 1)


@pytest.mark.parametrize(
    "make, neurons",
    [
        (lambda: torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.BatchNorm2d(8), torch.nn.ReLU()), 8),
        (lambda: torch.nn.Embedding(5, 7), 7),
        (lambda: torch.nn.LayerNorm(6), 6),
        (lambda: torch.nn.Linear(3, 4), 4),
    ],
)
def test_neurons_are_those_of_the_last_layer(make, neurons):
    assert parameter_count.neurons_of(make()) == neurons


def test_sizes_grow_by_a_copy_and_the_weights_between_neurons():
    assert parameter_count.sizes(100, [(10, 2)], 0, 2) == [100, 112, 126]
    assert parameter_count.sizes(100, [(10, 2)], 1, 1) == [100, 114]
    assert parameter_count.of_low_rank(torch.nn.Conv2d(3, 8, 5), 2, 8) == 2 * (75 + 8) + 8


@pytest.mark.filterwarnings("ignore")
def test_sizes_of_layers_with_norms_and_pruned_weights_are_those_of_their_dendrites():
    def grow(number):
        torch.manual_seed(0)
        parts = [torch.nn.Linear(8, 6), torch.nn.Linear(6, 6), torch.nn.Linear(6, 4, bias=False)]
        torch.nn.utils.weight_norm(parts[0])
        torch.nn.utils.parametrizations.weight_norm(parts[1])
        prune.identity(parts[2], "weight")
        model = torch.nn.Sequential(*parts, torch.nn.Conv2d(4, 6, 3, groups=2))
        for part in model if number else ():
            layers.add_dendrites(part, number)
        return model

    args = DendriteArguments(max_dendrites=2)
    expected = [sum(p.numel() for p in grow(number).parameters()) for number in range(3)]
    assert planned_sizes(grow(0), args, plan_dendrites(grow(0), args, arguments())) == expected


# ---------------------------------------------------------------------------------- a convolution and its normalization


def logits(model, name=RESNET):
    images = torch.stack([row["pixel_values"] for row in models.rows(name)[:4]])
    with torch.no_grad():
        return model.eval()(pixel_values=images).logits


def test_joined_convolution_and_normalization_get_dendrites_as_one_block():
    stock = models.build(RESNET)
    before, names = logits(stock), [name for name, _ in stock.named_modules()]
    settings = {"join_normalization": True, "max_dendrites": 1}
    perforate(stock, DendriteArguments(**settings), arguments())
    assert [name for name, _ in stock.named_modules()] == names and torch.equal(logits(stock), before)
    assert "resnet.embedder.embedder.convolution Conv2d" in re.sub(" +", " ", planned(RESNET, **settings).table)
    trainer = trained(RESNET, stock, **settings)
    assert trainer.num_dendrites == 1
    model = trainer.model
    block = model.resnet.embedder.embedder.convolution
    assert isinstance(block, torch.nn.Sequential) and isinstance(block[1], torch.nn.BatchNorm2d)
    assert isinstance(block.dendrites[0][1], torch.nn.BatchNorm2d) and block.num_dendrites == 1
    assert trainer.num_parameters == trainer.cycles()[-1]["parameters"] == sum(p.numel() for p in model.parameters())
    trainer.save_model("saved")
    loaded = models.model_class(RESNET).from_pretrained("saved")
    assert torch.equal(logits(loaded), logits(model))
    more = trained(RESNET, loaded, "more", join_normalization=True, max_dendrites=2)
    assert more.num_dendrites == 2
    more.save_model("again")
    assert torch.equal(logits(models.model_class(RESNET).from_pretrained("again")), logits(more.model))


def test_joined_model_without_a_dendrite_is_saved_as_a_stock_model():
    trainer = trained(RESNET, join_normalization=True, max_dendrites=0)
    trainer.save_model("saved")
    assert trainer.model.state_dict().keys() == models.build(RESNET).state_dict().keys()
    assert torch.equal(logits(models.model_class(RESNET).from_pretrained("saved")), logits(trainer.model))


def test_what_gets_no_dendrites_is_not_joined():
    found = planned(RESNET, join_normalization=True, module_ids_to_track=["embedder"])
    assert found.plan.norms and not [name for name in found.plan.norms if "embedder" in name]


# ------------------------------------------------------------------------------------------------------------- adapters


def scores(model):
    batch = torch.stack([row["input_ids"] for row in models.rows(BERT)[:4]])
    with torch.no_grad():
        return model.eval()(input_ids=batch).logits


def test_adapters_are_merged_and_then_the_model_gets_dendrites():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_lin", "v_lin"], task_type="SEQ_CLS", init_lora_weights=False)
    adapted = peft.get_peft_model(models.build(BERT), config)
    with pytest.raises(PerforatedError, match="merge_and_unload"):
        PerforatedTrainer(adapted, arguments(), train_dataset=models.rows(BERT), eval_dataset=models.rows(BERT))
    before, model = scores(adapted), adapted.merge_and_unload()
    assert torch.allclose(scores(model), before, atol=1e-5)
    for parameter in model.distilbert.parameters():
        parameter.requires_grad = False
    trainer = trained(BERT, model)
    assert trainer.num_dendrites == 2
    trainer.save_model("saved")
    loaded = models.model_class(BERT).from_pretrained("saved")
    assert loaded.classifier.num_dendrites == 2 and not layers.layers_with_dendrites(loaded.distilbert)
    assert torch.equal(scores(loaded), scores(trainer.model))


def test_layers_of_adapters_get_dendrites_in_a_class_of_its_own():
    pytest.importorskip("peft")
    trainer = trained(BERT, models.build("LoraDistilBert"))
    assert trainer.num_dendrites == 2
    trainer.save_model("saved")
    loaded = models.LoraDistilBert.from_pretrained("saved")
    assert loaded.distilbert.transformer.layer[0].attention.q_lin.lora_A.default.num_dendrites == 2
    assert torch.equal(scores(loaded), scores(trainer.model))
