"""Layers with dendrites compared with the forward of perforatedai's own layers, and with the plain layer."""

import copy

import pytest
import torch
from test_layers import KINDS, LAYERS, parts

from perforated_trainer import DendriteArguments, layers
from perforated_trainer.pai import MPA, UPA, PAITracker


@pytest.fixture(scope="module")
def library():
    """perforatedai with the settings and the tracker of a run."""
    tracker = PAITracker(DendriteArguments(), "loss", False)
    with tracker._installed():
        yield


def of_library(layer, dendrites, to_dendrite, to_output, dim, ndim):
    """A copy of the layer as perforatedai trains it, with the same dendrites."""
    module = MPA.PAINeuronModule(copy.deepcopy(layer), ".layer")
    dimensions = [-1] * ndim
    dimensions[dim] = 0
    module.set_this_output_dimensions(dimensions)
    module.dendrite_module.dendrite_values[0].setup_arrays([6 if d == 0 else 1 for d in dimensions])
    UPA.simulate_cycles(module, 2 * len(dendrites), doing_pai=True)
    assert module.dendrite_modules_added == len(dendrites)
    between = list(module.dendrite_module.dendrites_to_dendrites)[1:]
    with torch.no_grad():
        for own, given in zip(module.dendrite_module.layers, dendrites, strict=True):
            own.load_state_dict(given.state_dict())
        for own, given in zip(between, to_dendrite[1:], strict=True):
            own.copy_(given)
        module.dendrites_to_top[len(dendrites) - 1].copy_(to_output)
    return module


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", LAYERS)
def test_logits_and_gradients_equal_those_of_perforatedai(library, kind, count):
    layer, dendrites, to_dendrite, to_output, x, dim, _ = parts(kind, count)
    theirs = of_library(layer, dendrites, to_dendrite, to_output, dim, layer(x).ndim).eval()
    ours = layers.add_dendrites(copy.deepcopy(layer), count, dim, neurons=6)
    for i, dendrite in enumerate(dendrites):
        layers.set_dendrite(ours, i, dendrite.state_dict(), to_dendrite[i], to_output[i])
    output, expected = ours.eval()(x), theirs(x)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    direction = torch.randn_like(output)
    (output * direction).sum().backward()
    (expected * direction).sum().backward()

    def grad_of(module, name):
        return dict(module.named_parameters())[name].grad

    pairs = [(p.grad, grad_of(ours, name)) for name, p in theirs.main_module.named_parameters()]
    pairs += [(theirs.dendrites_to_top[count - 1].grad, ours.dendrite_to_output.grad)]
    for i, dendrite in enumerate(theirs.dendrite_module.layers):
        for name, parameter in dendrite.named_parameters():
            if hasattr(ours, "dendrites"):
                gradient = grad_of(ours.dendrites[i], name)
            else:
                axis = 1 if name == "weight" and kind == "Conv1D" else 0
                gradient = grad_of(ours, f"dendrite_{name}").chunk(count, axis)[i]
            pairs.append((parameter.grad, gradient))
    for i, between in enumerate(list(theirs.dendrite_module.dendrites_to_dendrites)[1:], 1):
        pairs.append((between.grad, ours.dendrite_to_dendrite.grad[i * (i - 1) // 2 :][:i]))
    for expected, gradient in pairs:
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5 * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("activation", ["sigmoid", "relu", "tanh", "gelu"])
def test_activation_is_the_one_that_perforatedai_applies(activation):
    layer, dendrites, to_dendrite, to_output, x, dim, _ = parts("linear", 2)
    tracker = PAITracker(DendriteArguments(dendrite_activation=activation), "loss", False)
    with tracker._installed():
        theirs = of_library(layer, dendrites, to_dendrite, to_output, dim, 3)
        expected = theirs(x)
    ours = layers.add_dendrites(copy.deepcopy(layer), 2, activation=activation)
    for i, dendrite in enumerate(dendrites):
        layers.set_dendrite(ours, i, dendrite.state_dict(), to_dendrite[i], to_output[i])
    torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_dendrites_with_zero_output_weights_leave_the_output_bitwise_equal(kind):
    layer, dendrites, to_dendrite, _, x, dim, rank = parts(kind, 3)
    new = layers.add_dendrites(copy.deepcopy(layer), 3, dim, neurons=6, rank=rank)
    for i, dendrite in enumerate(dendrites):
        layers.set_dendrite(new, i, dendrite[1] if rank else dendrite.state_dict(), to_dendrite[i])
    assert torch.equal(new.eval()(x), layer(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(new(x), layer(x))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if layers.can_fuse(LAYERS[kind.partition(", rank")[0]][0]())])
def test_separate_matmuls_of_dendrites_equal_the_fused_one(kind, monkeypatch):
    layer, dendrites, to_dendrite, to_output, x, _, rank = parts(kind, 3)
    new = layers.add_dendrites(layer, 3, rank=rank)
    for i, dendrite in enumerate(dendrites):
        weights = dendrite[1] if rank else dendrite.state_dict()
        layers.set_dendrite(new, i, weights, to_dendrite[i], to_output[i])
    results = []
    for limit in (layers.FUSED_UP_TO["cpu"], 0):
        monkeypatch.setitem(layers.FUSED_UP_TO, "cpu", limit)
        new.zero_grad()
        output = new(x)
        output.square().sum().backward()
        results.append([output.detach(), *[p.grad for p in new.parameters()]])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)
