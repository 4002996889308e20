"""Low-rank dendrites, and networks that start with dendrites."""

import copy
import itertools
import json

import models
import pytest
import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import DistilBertForSequenceClassification, DistilBertModel, TrainingArguments
from transformers.pytorch_utils import Conv1D

from perforated_trainer import (
    DendriteArguments,
    PerforatedError,
    PerforatedTrainer,
    formula,
    layers,
    parameter_count,
    perforate,
)

NAME = "DistilBertForSequenceClassification"
LAYERS = {
    "linear": (lambda: nn.Linear(12, 10), (4, 5, 12)),
    "conv1d of transformers": (lambda: Conv1D(10, 12), (4, 5, 12)),
    "convolution": (lambda: nn.Conv2d(6, 10, 3, stride=2, padding=1), (2, 6, 7, 7)),
}


def grown(name, number, rank=3, activation="tanh"):
    """A layer with dendrites of random values."""
    torch.manual_seed(0)
    layer = layers.add_dendrites(LAYERS[name][0](), number, rank=rank, activation=activation)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer, torch.randn(LAYERS[name][1])


def by_formula(layer, x):
    """The output of a layer with dendrites of low rank, from its weights as full matrices."""
    plain = layers.remove_dendrites(copy.deepcopy(layer))
    output, dendrites, rank = plain(x), [], layer.dendrite_rank
    ones = (1,) * (-1 - layer.dendrite_dim)
    for i in range(layer.num_dendrites):
        down = layer.dendrite_down[i * rank : (i + 1) * rank].flatten(1)
        weight = layer.dendrite_up[i].t() @ down  # neurons, inputs
        twin = copy.deepcopy(plain)
        shape = plain.weight.t().shape if isinstance(plain, Conv1D) else plain.weight.shape
        twin.weight = nn.Parameter(weight.view(shape).t() if isinstance(plain, Conv1D) else weight.view(shape))
        twin.bias = nn.Parameter(layer.dendrite_bias[i])
        value = twin(x)
        for j in range(i):
            value = value + layer.dendrite_to_dendrite[i * (i - 1) // 2 + j].view(-1, *ones) * dendrites[j]
        dendrites.append(layers.ACTIVATIONS[layer.dendrite_activation](value))
        output = output + layer.dendrite_to_output[i].view(-1, *ones) * dendrites[-1]
    return output


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("name", LAYERS)
def test_output_low_rank_equals_formula_with_full_matrices(name, number):
    layer, x = grown(name, number)
    layer.double()
    torch.testing.assert_close(layer(x.double()), by_formula(layer, x.double()))


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "gelu", "identity"])
@pytest.mark.parametrize("block", [1, 2**17])
@pytest.mark.parametrize("number", [1, 3])
def test_gradients_computed_again_equal_those_of_autograd(number, activation, block, monkeypatch):
    monkeypatch.setattr(formula, "_BLOCK", block)  # one row, or all
    monkeypatch.setitem(layers.RECOMPUTED_ABOVE, "cpu", 0)
    layer, x = grown("linear", number, activation=activation)
    layer.double()
    x = x.double().requires_grad_()
    trained = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    found = torch.autograd.grad(layer(x).square().sum(), trained)
    monkeypatch.setattr(torch.jit, "is_tracing", lambda: True)  # the same formula, with all tensors saved by autograd
    expected = torch.autograd.grad(layer(x).square().sum(), trained)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("number", "tolerance"), [(1, 3e-6), (3, 3e-5)])
def test_tanh_of_single_precision_equals_that_of_torch(number, tolerance, monkeypatch):
    """On a CPU it is computed by the sigmoid."""
    monkeypatch.setitem(layers.RECOMPUTED_ABOVE, "cpu", 0)
    layer, x = grown("linear", number)
    double = copy.deepcopy(layer).double()
    for scale in (1e-4, 1.0, 100.0):
        found, expected = layer(scale * x).double(), double(scale * x.double())
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    assert layer(torch.full_like(x, torch.nan)).isnan().all()


@pytest.mark.parametrize("number", [1, 2])
def test_second_derivative_exists(number, monkeypatch):
    monkeypatch.setitem(layers.RECOMPUTED_ABOVE, "cpu", 0)
    layer, x = grown("linear", number)
    layer.double()
    assert torch.autograd.gradgradcheck(layer, (x.double()[:1, :2].requires_grad_(),))


def test_no_rows_have_no_output_and_zero_gradients():  # an expert that no token is routed to
    layer, _ = grown("linear", 2)
    x = torch.randn(0, 12, requires_grad=True)
    assert layer(x).shape == (0, 10)
    layer(x).sum().backward()
    assert x.grad.shape == x.shape and not layer.dendrite_up.grad.any()


class Router(nn.Linear):
    def forward(self, x):
        return super().forward(x).topk(2)


class Named(nn.Linear):
    pass


def test_subclass_that_computes_something_else_has_no_low_rank():
    falcon = transformers.models.falcon.modeling_falcon.FalconLinear
    for cls, expected in ((Router, None), (Named, "Linear"), (falcon, "Linear")):
        layer = cls(12, 10)
        assert layers.kind_of_low_rank(layer) == expected
    assert layers.kind_of_low_rank(layers.add_dendrites(layer, 1, rank=2)) == "Linear"
    with pytest.raises(ValueError, match="Router cannot have dendrites of low rank"):
        layers.add_dendrites(Router(12, 10), 1, rank=2)


def test_output_is_the_same_with_and_without_gradients():
    layer, x = grown("linear", 3)
    with torch.no_grad():
        expected = layer(x)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize(("number", "rows", "is_kept"), [(3, 1000, False), (1, 1000, True), (1, 10_000, False)])
def test_memory_of_the_backward_pass_is_thin(number, rows, is_kept):
    """Of large layers, and of several dendrites, nothing of the size of the output is kept."""
    layer, _ = grown("linear", number)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(rows, 12, requires_grad=True))
    assert any(t.numel() == rows * 10 for t in kept) is is_kept


@pytest.mark.parametrize("autocast", [False, True])
def test_one_dendrite_is_the_same_kept_or_computed_again(autocast, monkeypatch):
    layer, x = grown("linear", 1)
    found, trained = [], [parameter for parameter in layer.parameters() if parameter.requires_grad]
    for limit in (0, 2**60):
        monkeypatch.setitem(layers.RECOMPUTED_ABOVE, "cpu", limit)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = layer(x)
        found.append([output, *torch.autograd.grad(output.float().square().sum(), trained)])
    assert found[0][0].dtype is (torch.bfloat16 if autocast else torch.float32)
    tolerance = {"atol": 0.1, "rtol": 0.05} if autocast else {"atol": 1e-4, "rtol": 1e-5}
    torch.testing.assert_close(*found, **tolerance)


def test_weights_of_full_size_are_never_made():
    layer, x = grown("linear", 3)
    with torch.profiler.profile(record_shapes=True) as found:
        layer(x).sum().backward()
    products = [event.input_shapes for event in found.events() if event.name in ("aten::mm", "aten::addmm")]
    assert products and [3, 12] not in [shapes[1] for shapes in products if len(shapes) > 1]


def arguments(**changes):
    values = {"use_cpu": True, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4, "report_to": "none"}
    values |= {"metric_for_best_model": "loss", "disable_tqdm": True, "save_strategy": "no", "learning_rate": 1e-2}
    return TrainingArguments(output_dir="run", **values | changes)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("name", [NAME, "GPT2LMHeadModel", "ResNetForImageClassification"])
def test_first_output_with_initial_dendrites_equals_stock_model(name, rank, bf16, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = models.build(name).eval()
    rows = models.rows(name)[:2]
    inputs = {key: torch.stack([row[key] for row in rows]) for key in rows[0] if key != "labels"}
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        expected = model(**inputs).logits
        args = DendriteArguments(num_initial_dendrites=2, dendrite_rank=rank)
        trainer = PerforatedTrainer(model=model, args=arguments(), dendrite_args=args, eval_dataset=rows)
        assert trainer.num_dendrites == 2
        assert torch.equal(model.eval()(**inputs).logits, expected)


def test_initial_dendrites_grow_resume_and_save(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = models.rows(NAME)

    def trainer():
        torch.manual_seed(0)
        args = DendriteArguments(
            num_initial_dendrites=1, dendrite_rank=2, n_epochs_to_switch=1, max_dendrites=2, improvement_threshold=0.5
        )
        return PerforatedTrainer(
            model=models.build(NAME),
            args=arguments(max_steps=8, save_strategy="steps", save_steps=2),
            dendrite_args=args,
            train_dataset=rows[:32],
            eval_dataset=rows[32:],
        )

    whole = trainer()
    whole.train()
    assert whole.num_dendrites == 2 and whole.restarts
    expected = {name: value.clone() for name, value in whole.model.state_dict().items()}
    whole.save_model("saved")
    loaded = DistilBertForSequenceClassification.from_pretrained("saved").state_dict()
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name]) for name in expected)
    for step in (6, 8):
        (tmp_path / "run" / f"checkpoint-{step}").rename(tmp_path / f"later-{step}")
    again = trainer()
    again.train(resume_from_checkpoint=True)
    found = again.model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_number_of_parameters_matches_the_table():
    for (make, _), number in itertools.product(LAYERS.values(), (1, 3)):
        layer = make()
        size, neurons = parameter_count.of_low_rank(layer, 3, 10), 10
        before = sum(p.numel() for p in layer.parameters())
        expected = before + sum(parameter_count.of_dendrite(size, neurons, i + 1) for i in range(number))
        layers.add_dendrites(layer, number, rank=3)
        assert sum(p.numel() for p in layer.parameters()) == expected


# -------------------------------------------------------------------------------------------------------- freeze_base


@pytest.fixture
def pretrained(tmp_path, monkeypatch):
    """A pretrained body, and a network with a new head on it."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    DistilBertModel(models.build(NAME).config).save_pretrained("body")
    return DistilBertForSequenceClassification.from_pretrained("body")


FROZEN = {"dendrite_rank": 2, "num_initial_dendrites": 1, "freeze_base": True}


def test_freeze_base_trains_dendrites_and_the_new_head_alone(pretrained):
    before = {name: value.clone() for name, value in pretrained.state_dict().items()}
    rows = models.rows(NAME)
    trainer = PerforatedTrainer(
        model=pretrained,
        args=arguments(save_strategy="steps", save_steps=2),
        dendrite_args=DendriteArguments(**FROZEN),
        train_dataset=rows[:32],
        eval_dataset=rows[32:],
    )
    trainer.train()
    changed = {name for name, value in before.items() if not torch.equal(value, pretrained.state_dict()[name])}
    assert changed == {f"{part}classifier.{kind}" for part in ("pre_", "") for kind in ("weight", "bias")}
    trained = {name for name, p in pretrained.named_parameters() if p.requires_grad}
    dendrites = {name: p for name, p in pretrained.named_parameters() if "dendrite" in name}
    assert trained == changed | {name for name, p in dendrites.items() if p.numel()}  # the rest is empty
    held = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in pretrained.parameters() if p.requires_grad}
    assert all(p.grad is None for p in pretrained.parameters() if not p.requires_grad)
    assert set(trainer.growth._best) == changed | dendrites.keys()
    with safe_open("run/checkpoint-4/model.dendrites.safetensors", framework="pt") as file:
        assert set(file.keys()) == changed | dendrites.keys()


def test_modules_to_train_are_trained_in_full(pretrained):
    perforate(pretrained, DendriteArguments(**FROZEN, modules_to_train=["sa_layer_norm"]), arguments())
    assert pretrained.distilbert.transformer.layer[0].sa_layer_norm.weight.requires_grad
    assert not pretrained.distilbert.transformer.layer[0].output_layer_norm.weight.requires_grad


def test_modules_to_train_finds_tied_weights_by_both_names(tmp_path):
    models.build("GPT2LMHeadModel").save_pretrained(tmp_path)
    for name in ("wte", "lm_head"):
        model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
        perforate(model, DendriteArguments(**FROZEN, modules_to_train=[name]), arguments())
        assert [n for n, p in model.named_parameters() if p.requires_grad] == ["transformer.wte.weight"]
    with pytest.raises(PerforatedError, match=r"modules_to_train attn_dropout: .*no weights"):
        perforate(model, DendriteArguments(**FROZEN, modules_to_train=["wte", "attn_dropout"]), arguments())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dendrite_rank": 0}, "dendrite_rank 0: it must be a whole number of at least 1"),
        ({"dendrite_rank": 64}, "dendrite_rank 64 is not below the smaller side of any layer"),
        ({"dendrite_rank": 32, "module_ids_to_perforate": ["q_lin"]}, "q_lin has a smaller side of 32"),
        ({"num_initial_dendrites": 6}, "num_initial_dendrites 6 is above"),
        ({"num_initial_dendrites": 0}, None),  # the head is new, so something is trained
    ],
)
def test_perforate_bad_values_raise_one_line_and_change_nothing(changes, message, pretrained):
    before = list(pretrained.state_dict())
    args = DendriteArguments(**FROZEN | changes)
    if message is None:
        perforate(pretrained, args, arguments())
        return
    with pytest.raises(PerforatedError) as error:
        perforate(pretrained, args, arguments())
    assert message in str(error.value) and "\n" not in str(error.value)
    assert list(pretrained.state_dict()) == before and all(p.requires_grad for p in pretrained.parameters())


def test_rank_above_some_layers_leaves_these_out_with_the_reason(pretrained, capsys):
    args = DendriteArguments(dendrite_rank=2, num_initial_dendrites=1)
    trainer = PerforatedTrainer(model=pretrained, args=arguments(), dendrite_args=args, eval_dataset=[0])
    assert "classifier" not in layers.layers_with_dendrites(pretrained)
    assert "has a smaller side of 2, not above the rank" in trainer.plan_table


@pytest.mark.parametrize("changes", [{"doing_pai": False}, {"num_initial_dendrites": 0}])
def test_freeze_base_without_anything_to_train_raises(changes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = models.build(NAME)  # it was not loaded by from_pretrained, so nothing in it is new
    with pytest.raises(PerforatedError, match="freeze_base: nothing would be trained before the first dendrite"):
        perforate(model, DendriteArguments(**FROZEN | changes), arguments())


def test_config_names_the_rank(pretrained):
    PerforatedTrainer(model=pretrained, args=arguments(), dendrite_args=DendriteArguments(**FROZEN), eval_dataset=[0])
    pretrained.save_pretrained("saved")
    with open("saved/config.json") as file:
        saved = json.load(file)["quantization_config"]["layers"]
    assert saved["distilbert.transformer.layer.0.ffn.lin1"] == {"dendrites": 1, "rank": 2}


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_transforms_of_torch_func_equal_those_of_the_formula(transform):
    layer, x = grown("linear", 2)
    values = dict(layer.named_parameters())

    def output(values, x):
        return torch.func.functional_call(layer, values, (x,))

    if transform == "grad":
        found = torch.func.grad(lambda values: output(values, x).square().sum())(values)
        expected = torch.autograd.grad(layer(x).square().sum(), list(values.values()))
        torch.testing.assert_close(list(found.values()), list(expected))
    elif transform == "vmap":
        torch.testing.assert_close(torch.func.vmap(lambda x: output(values, x))(x), layer(x))
    else:
        _, tangent = torch.func.jvp(lambda x: output(values, x), (x,), (torch.ones_like(x),))
        step = 1e-3 * torch.ones_like(x)
        torch.testing.assert_close(tangent, (layer(x + step) - layer(x - step)) / 2e-3, atol=1e-2, rtol=1e-2)
