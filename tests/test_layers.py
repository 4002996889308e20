"""Layers with dendrites: the formula, and other features of PyTorch layers. Nothing is trained."""

import copy
import pickle

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from transformers.pytorch_utils import Conv1D

from perforated_trainer import blocks, layers

torch.set_num_threads(1)
LAYERS = {
    "linear": (lambda: nn.Linear(5, 6), (3, 4, 5), -1),
    "linear, no bias": (lambda: nn.Linear(5, 6, bias=False), (4, 5), -1),
    "Conv1D": (lambda: Conv1D(6, 5), (3, 4, 5), -1),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding="same"), (2, 4, 9), -2),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 9, 9), -3),
    "conv2d, no batch": (lambda: nn.Conv2d(4, 6, 3, bias=False), (4, 9, 9), -3),
    "conv2d, groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2), (2, 4, 9, 9), -3),
    "conv3d, groups": (lambda: nn.Conv3d(4, 6, 3, groups=2, bias=False), (2, 4, 5, 5, 5), -4),
    "conv3d": (lambda: nn.Conv3d(4, 6, 3, stride=2, padding=1), (2, 4, 5, 5, 5), -4),
    "conv2d, reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 9, 9), -3),
    "block": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), (2, 4, 9, 9), -3),
    "embedding": (lambda: nn.Embedding(7, 6), None, -1),
}
LOW_RANK = [f"{kind}, rank 2" for kind in LAYERS if kind.split(",")[0] in ("linear", "Conv1D", "conv1d")]
LOW_RANK += ["conv2d, rank 2", "conv2d, no batch, rank 2", "conv3d, rank 2"]
KINDS = [*LAYERS, *LOW_RANK]
each_layer = pytest.mark.parametrize("kind", KINDS)


def parts(kind, count):
    """Layer, dendrites as separate layers, c, a, input, dimension of the neurons, rank."""
    kind, _, rank = kind.partition(", rank ")
    make, shape, dim = LAYERS[kind]
    torch.manual_seed(0)
    layer, *dendrites = (make().eval() for _ in range(count + 1))
    if isinstance(layer, Conv1D):  # its initial values are small
        for one in (layer, *dendrites):
            nn.init.normal_(one.weight)
    to_dendrite, to_output = [torch.randn(i, 6) for i in range(count)], torch.randn(count, 6)
    x = torch.randint(7, (3, 4)) if shape is None else torch.randn(shape)
    if not rank:
        return layer, dendrites, to_dendrite, to_output, x, dim, None
    factors = []
    for i, dendrite in enumerate(dendrites):  # its weight is a product of two matrices
        transposed = isinstance(dendrite, Conv1D)
        weight = dendrite.weight.T if transposed else dendrite.weight
        down, up = torch.randn(int(rank), *weight.shape[1:]), torch.randn(6, int(rank))
        product = (up @ down.flatten(1)).view_as(weight)
        with torch.no_grad():
            dendrite.weight.copy_(product.T if transposed else product)
        bias = torch.zeros(6) if dendrite.bias is None else dendrite.bias.detach()
        factors.append({"down": down, "up": up.T, "bias": bias})
        dendrites[i] = dendrite, factors[i]
    return layer, dendrites, to_dendrite, to_output, x, dim, int(rank)


def joined(layer, dendrites, to_dendrite, to_output, dim, rank=None, activation="sigmoid"):
    """A copy of a layer with the dendrites."""
    new = layers.add_dendrites(copy.deepcopy(layer), len(dendrites), dim, activation, neurons=6, rank=rank)
    for i, dendrite in enumerate(dendrites):
        weights = dendrite[1] if rank else dendrite.state_dict()
        layers.set_dendrite(new, i, weights, to_dendrite[i], to_output[i])
    return new.eval()


def naive(layer, dendrites, to_dendrite, to_output, x, dim):
    """The formula, one dendrite after the other."""

    def broadcast(values, output):
        return values.view(-1, *[1] * (-1 - dim))

    output, values = layer(x), []
    for i, dendrite in enumerate(dendrites):
        total = (dendrite[0] if isinstance(dendrite, tuple) else dendrite)(x)
        for j, value in enumerate(values):
            total = total + broadcast(to_dendrite[i][j], total) * value
        values.append(torch.sigmoid(total))
        output = output + broadcast(to_output[i], output) * values[-1]
    return output


# ---------------------------------------------------------------------------------------------------------- the formula


@each_layer
@pytest.mark.parametrize("count", [1, 2, 5])
def test_layer_with_dendrites_equals_formula_and_survives_copies(kind, count):
    layer, *given, x, dim, rank = parts(kind, count)
    new = joined(layer, *given, dim, rank)
    output = new(x)
    torch.testing.assert_close(output, naive(layer, *given, x, dim), atol=1e-5, rtol=1e-5)
    assert isinstance(new, type(layer)) and new.num_dendrites == count and type(new).__name__.startswith("Dendrite")
    assert f"num_dendrites={count}" in new.extra_repr()
    for same in (copy.deepcopy(new), copy.copy(new), pickle.loads(pickle.dumps(new))):
        assert type(same) is type(new) and torch.equal(same(x), output)
    expected = layer.state_dict()
    assert expected.keys() <= new.state_dict().keys()
    plain = layers.remove_dendrites(new)
    assert type(plain) is type(layer) and plain.state_dict().keys() == expected.keys()
    assert torch.equal(plain(x), layer(x)) and vars(plain).keys() == vars(layer).keys()


@each_layer
def test_layer_with_dendrites_gradients_are_those_of_the_formula(kind):
    layer, dendrites, to_dendrite, to_output, x, dim, rank = parts(kind, 3)
    new = joined(layer, dendrites, to_dendrite, to_output, dim, rank)
    new(x).square().sum().backward()
    to_dendrite, to_output = [c.requires_grad_() for c in to_dendrite], to_output.requires_grad_()
    naive(layer, dendrites, to_dendrite, to_output, x, dim).square().sum().backward()
    pairs = [(p.grad, dict(new.named_parameters())[name].grad) for name, p in layer.named_parameters()]
    pairs += [(to_output.grad, new.dendrite_to_output.grad)]
    pairs += [(torch.cat([c.grad for c in to_dendrite[1:]]), new.dendrite_to_dendrite.grad)]
    if hasattr(new, "dendrite_weight"):
        axis = 1 if isinstance(layer, Conv1D) else 0
        pairs += [(torch.cat([d.weight.grad for d in dendrites], axis), new.dendrite_weight.grad)]
    for expected, gradient in pairs:
        torch.testing.assert_close(gradient, expected, atol=1e-3, rtol=1e-3)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in new.parameters())


@each_layer
def test_resize_keeps_first_dendrites_and_adds_zeros(kind):
    layer, dendrites, to_dendrite, to_output, x, dim, rank = parts(kind, 3)
    one = joined(layer, dendrites[:1], to_dendrite[:1], to_output[:1], dim, rank)
    grown = copy.deepcopy(one)
    layers.resize_dendrites(grown, 3)
    assert grown.num_dendrites == 3 and torch.equal(grown.dendrite_to_output[1:], torch.zeros(2, 6))
    torch.testing.assert_close(grown(x), one(x))
    for i in (1, 2):
        weights = dendrites[i][1] if rank else dendrites[i].state_dict()
        layers.set_dendrite(grown, i, weights, to_dendrite[i], to_output[i])
    three = joined(layer, dendrites, to_dendrite, to_output, dim, rank)
    assert torch.equal(grown(x), three(x))
    layers.resize_dendrites(grown, 1)
    assert grown.state_dict().keys() == one.state_dict().keys()
    assert torch.equal(grown(x), one(x))
    layers.resize_dendrites(grown, 0)
    assert type(grown) is type(layer) and torch.equal(grown(x), layer(x))


@pytest.mark.parametrize("kind", ["linear", "Conv1D", "conv2d, groups", "block", "linear, rank 2", "conv2d, rank 2"])
def test_layer_with_dendrites_autocasts_exports_checkpoints_and_is_made_on_meta(kind):
    layer, *given, x, dim, rank = parts(kind, 2)
    new = joined(layer, *given, dim, rank)
    with torch.autocast("cpu", torch.bfloat16):
        output = new(x)
        assert output.dtype == layer(x).dtype
        torch.testing.assert_close(output.float(), new(x).float())
    torch.testing.assert_close(output.float(), new(x), atol=0.3, rtol=0.1)
    torch.testing.assert_close(torch.export.export(new, (x,)).module()(x), new(x))
    x.requires_grad_()
    torch.utils.checkpoint.checkpoint(new, x, use_reentrant=False).sum().backward()
    assert all(parameter.grad is not None for parameter in new.parameters())
    with torch.device("meta"):
        empty = layers.add_dendrites(LAYERS[kind.partition(", rank")[0]][0](), 2, dim=dim, neurons=6, rank=rank)
    assert {p.device.type for p in empty.parameters()} == {"meta"} and empty(x.to("meta")).device.type == "meta"


@each_layer
def test_output_of_layer_with_dendrites_can_be_changed_in_place(kind):
    layer, *given, x, dim, rank = parts(kind, 2)
    new = joined(layer, *given, dim, rank)
    output = new(x)
    output /= 2  # as the code of some models does
    output.sum().backward()
    torch.testing.assert_close(output, new(x) / 2)
    assert all(parameter.grad is not None for parameter in new.parameters())


@pytest.mark.parametrize("kind", ["linear", "linear, rank 2"])
def test_dynamo_traces_layer_as_one_graph(kind):
    layer, *given, x, dim, rank = parts(kind, 2)
    new = joined(layer, *given, dim, rank)
    torch.testing.assert_close(torch.compile(new, fullgraph=True, backend="eager")(x), new(x))


@pytest.mark.parametrize("size, matmuls", [(256, 1), (257, 3)])
def test_dendrites_are_fused_up_to_a_size(size, matmuls):
    layer = layers.add_dendrites(nn.Linear(size, size), 3)
    sums = layer._sums(None, torch.randn(2, size))
    assert len({total.untyped_storage().data_ptr() for total in sums}) == matmuls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["linear", "conv2d", "block", "linear, rank 2"])
def test_dendrites_have_dtype_and_frozen_parameters_stay_frozen(kind, dtype):
    layer, *_, x, dim, rank = parts(kind, 2)
    new = layers.add_dendrites(layer.to(dtype), 2, dim=dim, neurons=6, rank=rank)
    assert {p.dtype for p in new.parameters()} == {dtype} and new(x.to(dtype)).dtype == dtype
    layers.resize_dendrites(new, 3)
    assert {p.dtype for p in new.parameters()} == {dtype}


@pytest.mark.parametrize("kind", ["conv2d, reflect", "block"])
def test_copies_of_a_frozen_block_are_trained(kind):
    block = layers.add_dendrites(LAYERS[kind][0]().requires_grad_(False), 1, dim=-3, neurons=6)
    layers.resize_dendrites(block, 2)
    trained = {name: p.requires_grad for name, p in block.named_parameters()}
    assert all(is_trained == ("dendrite" in name) for name, is_trained in trained.items()) and len(trained) >= 8


WRONG = {
    "already": lambda: layers.add_dendrites(layers.add_dendrites(nn.Linear(3, 4), 2), 1),
    "Unknown dendrite activation": lambda: layers.add_dendrites(nn.Linear(3, 4), 1, activation="os.system"),
    "`dim`": lambda: layers.add_dendrites(nn.Embedding(3, 4), 1),
    "num_dendrites must be a whole number": lambda: layers.add_dendrites(nn.Linear(3, 4), True),
    "of at least 0": lambda: layers.add_dendrites(nn.Linear(3, 4), -1),
    "rank must be a whole number": lambda: layers.add_dendrites(nn.Linear(3, 4), 1, rank=0),
    "rank 3 is not below": lambda: layers.add_dendrites(nn.Linear(3, 4), 1, rank=3),
    "Embedding cannot have dendrites of low rank": lambda: layers.add_dendrites(nn.Embedding(3, 4), 1, rank=1),
    "Conv2d cannot have": lambda: layers.add_dendrites(nn.Conv2d(4, 4, 3, groups=2), 1, rank=1),
}


@pytest.mark.parametrize("message", WRONG)
def test_add_dendrites_wrong_arguments_are_named(message):
    with pytest.raises(ValueError, match=message):
        WRONG[message]()


def test_add_dendrites_none_leaves_the_class():
    assert type(layers.add_dendrites(nn.Linear(3, 4), 0)) is nn.Linear


# --------------------------------------------------------------------------------- other features of a layer


@pytest.mark.parametrize("kind", ["linear", "block", "linear, rank 2"])
def test_hooks_of_layer_fire_with_dendrites_and_not_in_them(kind):
    layer, *_, x, dim, rank = parts(kind, 2)
    called, x = [], x.requires_grad_()
    layer.register_forward_pre_hook(lambda module, inputs: called.append("before"))
    layer.register_forward_hook(lambda module, inputs, output: called.append("after"))
    layer.register_forward_hook(lambda module, inputs, kwargs, output: called.append("kwargs"), with_kwargs=True)
    layer.register_full_backward_hook(lambda module, gradients, outputs: called.append("backward"))
    layer.register_full_backward_pre_hook(lambda module, outputs: called.append("before backward"))
    expected = ["before", "after", "kwargs", "before backward", "backward"]
    for change in (lambda: None, lambda: layers.add_dendrites(layer, 2, dim, neurons=6, rank=rank)):
        change()
        called.clear()
        layer(x).sum().backward()
        assert called == expected
    layers.resize_dendrites(layer, 3)
    called.clear()
    layer(x).sum().backward()
    assert called == expected
    layer.register_forward_hook(lambda module, inputs, output: output * 0)  # one that is registered later
    assert not layer(x).any()


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


# Functions that compute the weight of a layer before each forward, and whether they rename its parameters.
REPARAMETRIZED = {
    "weight_norm, old": nn.utils.weight_norm,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm, old": nn.utils.spectral_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "own": lambda layer: (parametrize.register_parametrization(layer, "weight", Double()), layer)[1],
    "pruned": lambda layer: prune.random_unstructured(layer, "weight", 0.5),
    "pruned twice": lambda layer: prune.ln_structured(
        prune.random_unstructured(layer, "weight", 0.3), "weight", 0.3, 2, 0
    ),
    "pruned bias": lambda layer: prune.random_unstructured(layer, "bias", 0.5),
}


MADE = {
    "linear": lambda: nn.Linear(8, 6),
    "Conv1D": lambda: Conv1D(6, 8),
    "conv2d": lambda: nn.Conv2d(3, 6, 3),
    "conv2d, reflect": lambda: nn.Conv2d(3, 6, 3, padding_mode="reflect"),  # its dendrites are copies
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind, rank", [*((kind, None) for kind in MADE), ("linear", 2), ("Conv1D", 2), ("conv2d", 2)])
@pytest.mark.parametrize("how", REPARAMETRIZED)
def test_reparametrized_layer_trains_copies_loads_and_loses_its_dendrites(how, kind, rank):
    torch.manual_seed(0)
    layer, same, fresh = (REPARAMETRIZED[how](MADE[kind]()) for _ in range(3))
    same.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, 5, 5) if isinstance(layer, nn.Conv2d) else torch.randn(4, 8)
    names, add = {name for name, _ in layer.named_parameters()}, {"dim": -3, "neurons": 6, "rank": rank}
    layers.add_dendrites(layer.eval(), 2, **add)  # the Trainer has evaluated before
    assert {n for n, _ in layer.named_parameters() if "dendrite" not in n} == names
    assert torch.equal(layer.train()(x), same.train()(x))  # dendrites of zero

    for name, parameter in layer.named_parameters():
        if "dendrite" in name:
            nn.init.normal_(parameter)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    layer(x).square().mean().backward()
    optimizer.step()
    still = {name for name, p in layer.named_parameters() if torch.equal(p, before[name])}
    assert not still, still

    with torch.no_grad():
        output = layer.eval()(x)
    assert torch.equal(copy.deepcopy(layer)(x), output)
    layers.resize_dendrites(layer, 1)
    layers.resize_dendrites(layer, 2)
    layers.add_dendrites(fresh, 2, **add)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh.eval()(x), layer(x))
    plain = layers.remove_dendrites(layer)
    same.load_state_dict(plain.state_dict())
    assert type(plain).__mro__[1:] == type(same).__mro__[1:] and torch.equal(plain(x), same.eval()(x))


@pytest.mark.filterwarnings("ignore")
def test_reparametrization_is_taken_off_and_put_on_with_dendrites():
    torch.manual_seed(0)
    x, layer = torch.randn(4, 8), layers.add_dendrites(nn.Linear(8, 6), 2)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    expected = layer(x)
    off = {
        parametrizations.weight_norm: lambda: parametrize.remove_parametrizations(layer, "weight"),
        nn.utils.weight_norm: lambda: nn.utils.remove_weight_norm(layer),
        lambda it: prune.identity(it, "weight"): lambda: prune.remove(layer, "weight"),
        lambda it: prune.identity(it, "dendrite_weight"): lambda: prune.remove(layer, "dendrite_weight"),
    }
    for put_on, take_off in off.items():
        put_on(layer)
        assert layer.num_dendrites == 2 and isinstance(layer, nn.Linear)
        torch.testing.assert_close(layer(x), expected)
        take_off()
        torch.testing.assert_close(layer(x), expected)
        assert {n for n, _ in layer.named_parameters()} >= {"weight", "bias", "dendrite_weight", "dendrite_bias"}
    prune.random_unstructured(layer, "weight", 0.5)
    pruned = layer.weight == 0
    layers.resize_dendrites(layer, 3)
    layer(x).sum().backward()
    assert pruned.sum() == 24 and torch.equal(layer.weight == 0, pruned)


def test_pruning_of_all_weights_of_a_model_reaches_dendrites_by_name():
    model = nn.Sequential(layers.add_dendrites(nn.Linear(8, 6), 2), nn.ReLU(), layers.add_dendrites(nn.Linear(6, 2), 1))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    pairs = [(m, n) for m in model if layers.has_dendrites(m) for n in ("weight", "dendrite_weight")]
    prune.global_unstructured(pairs, prune.L1Unstructured, amount=0.5)
    model(torch.randn(3, 8)).sum().backward()
    zeros = sum(int((getattr(module, name) == 0).sum()) for module, name in pairs)
    assert zeros == sum(getattr(module, name).numel() for module, name in pairs) // 2
    for module, name in pairs:
        prune.remove(module, name)
    assert zeros == sum(int((getattr(module, name) == 0).sum()) for module, name in pairs)


# ---------------------------------------------------------------------------------------- layers that hold other layers


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_transformer_encoder_evaluates_with_its_dendrites(nested, norm_first, padded):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
    x = torch.randn(3, 5, 16)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]]) if padded else None

    def compute():
        kept = slice(None) if mask is None else ~mask
        with_gradient = model.eval()(x, src_key_padding_mask=mask)[kept].detach()
        with torch.no_grad():
            return with_gradient, model(x, src_key_padding_mask=mask)[kept]

    for layer in model.layers:
        for part in (layer.linear1, layer.linear2):
            layers.add_dendrites(part, 2)
            for name, parameter in part.named_parameters():
                nn.init.normal_(parameter) if "dendrite" in name else None
    blocks.compute_in_full(model)
    for same in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        model = same
        torch.testing.assert_close(*compute(), atol=1e-5, rtol=1e-4)
    used = compute()[0]
    for layer in model.layers:
        for part in (layer.linear1, layer.linear2):
            layers.remove_dendrites(part)
    assert not torch.allclose(used, compute()[0], atol=1e-2)


@pytest.mark.filterwarnings("ignore")
def test_zero_dendrites_leave_a_padded_encoder_as_it_is_and_removed_ones_its_fast_path():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16)).eval(), torch.randn(3, 6, 16)
    padded = torch.arange(6) >= torch.tensor([[4], [2], [4]])  # torch sets these positions to 0 before the norm

    @torch.no_grad()
    def compute():
        blocks.compute_in_full(model)
        return model(x, src_key_padding_mask=padded)

    before, expected = [set(vars(part)) for part in model.modules()], compute()
    for _ in range(2):
        layers.add_dendrites(model.layers[1].linear1, 1)
        torch.testing.assert_close(compute(), expected, atol=1e-5, rtol=1e-4)
        layers.remove_dendrites(model.layers[1].linear1)
        assert torch.equal(compute(), expected) and not model.layers[1]._forward_hooks
        assert [set(vars(part)) for part in model.modules()] == before


def test_hook_of_accelerate_calls_the_layer_with_its_dendrites():
    layer, x = nn.Linear(4, 6), torch.randn(2, 4)
    add_hook_to_module(layer, ModelHook())
    assert not layers.forward_is_replaced(layer)
    expected = layer(x)
    nn.init.ones_(layers.add_dendrites(layer, 1).dendrite_to_output)
    torch.testing.assert_close(layer(x), expected + 0.5)  # a sigmoid of zero
    assert not layers.forward_is_replaced(layer) and torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert torch.equal(layers.remove_dendrites(layer)(x), expected)


def test_join_and_separate_give_back_the_model():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
    names, x = list(model.state_dict()), torch.randn(2, 3, 5, 5)
    expected = model.eval()(x)
    block = blocks.join(model, "0", "1")
    assert torch.equal(model(x), expected) and isinstance(model[1], nn.Identity) and len(block) == 2
    layers.add_dendrites(block, 2, dim=-3, neurons=6)
    assert torch.equal(model.eval()(x), expected) and len(block) == 2
    layers.remove_dendrites(block)
    blocks.separate(model, "0")
    assert list(model.state_dict()) == names and torch.equal(model(x), expected)
    for name, norm in (("0", "3"), ("4", "1"), ("0", "0")):
        with pytest.raises(ValueError, match="There are no modules"):
            blocks.join(model, name, norm)


def test_sequential_with_dendrites_iterates_over_its_own_modules():
    block = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
    layers.add_dendrites(block, 2, dim=-1, neurons=6)
    assert [type(part) for part in block] == [nn.Linear, nn.Tanh] and len(block) == 2 and isinstance(block[1], nn.Tanh)
    assert [type(part) for part in copy.deepcopy(block)] == [nn.Linear, nn.Tanh]
