"""How the update is computed is a matter of cost: it never changes a result, and stays beside a base that does more."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spectralbasis import SpectralConfig
from spectralbasis.tuner import autograd
from spectralbasis.tuner import layer as linear_module
from tests.tuner.cases import CASES

MANY = 40


@pytest.fixture
def calls(monkeypatch):
    """Which of the two functions ran, in order, and whether it was told singular values."""
    seen = []
    for name in ("LinearUpdate", "FactoredUpdate"):
        function = getattr(linear_module, name)

        class Spy:
            @staticmethod
            def apply(*args, function=function, name=name):
                seen.append((name, name == "LinearUpdate" and args[5] is not None))
                return function.apply(*args)

        monkeypatch.setattr(linear_module, name, Spy)
    return seen


def linear(**changes):
    return CASES["mlp"].adapted(**changes).base_model.model.lin0


@pytest.mark.parametrize("basis", ["pretrained", "random", "minor"])
def test_singular_vectors_of_the_weight_are_known_as_such(basis, calls):
    layer = linear(basis=basis, leading=4)
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(MANY, 10))
    assert calls == [("LinearUpdate", basis == "pretrained")]  # the trailing values are too small for 16 bits
    assert (layer.factors("default").singular_values(layer.weight, 4) is not None) == (basis != "random")


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("shape", [(40, 10), (10, 40), (12, 12)])
@pytest.mark.parametrize("bias", [0.0, 1.0, 10.0])
def test_directions_whose_values_are_tiny_lose_no_digits(shape, bias, autocast):
    """By way of `W x + bias` the update of such a direction would be lost in the rounding of the others."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(*shape))
    with torch.no_grad():
        U, S, Vh = torch.linalg.svd(base[0].weight.double(), full_matrices=False)
        S[-3:] = torch.tensor([1e-2, 5e-3, 2e-3])
        base[0].weight.copy_(U * S @ Vh)
        base[0].bias.copy_(bias * torch.randn(shape[1]))
    config = SpectralConfig(target_modules=["0"], coefficients="diagonal", leading=3, basis="minor", init_weights=False)
    layer = get_peft_model(base, config).base_model.model[0]
    x = torch.randn(MANY, shape[0], requires_grad=True)
    (delta, stored) = (layer.get_delta_weight("default").double(), layer.stored("default"))
    wanted = x.detach().double() @ (layer.weight.double() + delta).T + layer.base_layer.bias.double()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = layer(x)
    tolerance = 0.02 if autocast else 2e-6
    assert (found.double() - wanted).abs().max() < tolerance * wanted.abs().max()
    U, V = layer.factors("default").first(3)
    g = torch.randn_like(found)
    (grad,) = torch.autograd.grad(found, stored, g)
    expected = ((g.double() @ U.double()) * (x.detach().double() @ V.double())).sum(0)
    expected = expected * layer.parametrisation("default").unit.double()
    assert (grad.double() - expected).abs().max() < 2 * tolerance * expected.abs().max()


@pytest.mark.parametrize("through_data", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("shape", [(10, 20), (20, 10)])
def test_a_changed_weight_has_other_singular_vectors(shape, autocast, through_data):
    """A tall and a wide layer, in which the update is computed by way of the weight."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(*shape))
    config = SpectralConfig(target_modules=["0"], leading=4, init_weights=False)
    layer = get_peft_model(base, config).base_model.model[0]
    x = torch.randn(MANY, shape[0])
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = layer(x).float()
        expected = x @ (layer.weight + layer.get_delta_weight("default")).T + layer.base_layer.bias
        tolerance = 0.05 if autocast else 1e-4
        torch.testing.assert_close(found, expected, atol=tolerance * float(expected.detach().abs().max()), rtol=0)
        with torch.no_grad():
            weight = layer.weight.data if through_data else layer.weight
            weight += torch.randn_like(weight)


@pytest.mark.parametrize("shape", [(12, 12), (12, 30), (30, 12)])
@pytest.mark.parametrize("coefficients", ["diagonal", "core", "block", "rotation"])
def test_second_derivatives_and_trained_biases_are_those_of_the_dense_weight(coefficients, shape):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(*shape))
    config = SpectralConfig(target_modules=["0"], leading=4, coefficients=coefficients, init_weights=False)
    layer = get_peft_model(base, config).base_model.model[0].double()
    layer.stored("default").data = layer.stored("default").data.double()
    layer.base_layer.bias.requires_grad_(True)
    x = torch.randn(3, shape[0], dtype=torch.float64, requires_grad=True)
    leaves = (x, layer.stored("default"), layer.base_layer.bias)

    def dense(x):
        C, U, V, form = layer.terms("default")
        return nn.functional.linear(
            x, layer.weight + U @ (torch.diag(C) if form == "diagonal" else C) @ V.T, layer.bias
        )

    found = []
    for function in (layer, dense):
        first = torch.autograd.grad(function(x).pow(3).sum(), leaves, create_graph=True)
        found.append([*first, *torch.autograd.grad(sum(one.square().sum() for one in first), leaves)])
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("coefficients", ["diagonal", "core", "block", "rotation"])
@pytest.mark.parametrize("tokens", [2, 12, 15, 40])
@pytest.mark.parametrize("autocast", [False, True])
def test_all_ways_agree(coefficients, tokens, autocast, monkeypatch):
    x = torch.randn(3, tokens, 10, requires_grad=True)
    results = []
    for way in ("factored", "formed", "input", "output"):
        monkeypatch.setattr(autograd, "cheapest", lambda *sizes, way=way, **open: way)
        layer = linear(coefficients=coefficients, leading=4)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = layer(x)
        assert output.dtype == (torch.bfloat16 if autocast else torch.float32)
        gradients = torch.autograd.grad((output.float() ** 2).sum(), (x, layer.stored("default")))
        results.append((output.float(), *gradients))
    tolerance = 0.05 if autocast else 1e-4
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            torch.testing.assert_close(first, second, atol=tolerance * float(first.abs().max()), rtol=0)


def with_hook(layer):
    layer.base_layer.register_forward_hook(lambda module, args, output: output * 2)


def with_trained_weight(layer):
    layer.base_layer.weight.requires_grad_(True)


def in_half_precision(layer):
    layer.bfloat16()


def with_own_forward(layer):
    layer.base_layer.forward = lambda x: nn.functional.linear(x, layer.base_layer.weight)


@pytest.mark.parametrize("change", [with_hook, with_trained_weight, in_half_precision, with_own_forward])
def test_the_base_layer_itself_is_called_where_it_does_more(change, calls):
    layer = linear(init_weights=True)
    change(layer)
    x = torch.randn(MANY, 10).to(layer.weight.dtype)
    output = layer(x)
    assert calls == [("FactoredUpdate", False)]
    assert torch.equal(output, layer.base_layer(x))
    output.sum().backward()
    assert (layer.weight.grad is not None) == layer.weight.requires_grad


def test_second_derivatives_under_autocast_see_the_coefficients_in_the_weight():
    x = torch.randn(MANY, 10, requires_grad=True)
    found = []
    for autocast in (False, True):
        layer = linear()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = layer(x)
        (grad_x,) = torch.autograd.grad((output.float() ** 2).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(grad_x.square().sum(), layer.stored("default"))[0])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0.05 * float(found[0].abs().max()))


class Operations(TorchDispatchMode):
    """Counts operations, but for those that only view their input or make an empty tensor."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves(args) if isinstance(t, torch.Tensor)}
        made = {
            t.untyped_storage().data_ptr() for t in tree_leaves(output) if isinstance(t, torch.Tensor) and t.numel()
        }
        self.count += not made <= given
        return output


@pytest.mark.parametrize("coefficients", ["diagonal", "core"])
def test_a_step_under_autocast_takes_fewer_operations_than_that_of_lora(coefficients):
    """On an accelerator a step of small batches takes as long as its operations are many."""
    counts = []
    for config in (
        SpectralConfig(target_modules=["0", "1"], coefficients=coefficients, leading=4),
        LoraConfig(target_modules=["0", "1"], r=4),
    ):
        model = get_peft_model(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), config)
        for _ in range(2):  # the first step finds what later ones have
            with Operations() as seen, torch.autocast("cpu", torch.bfloat16):
                loss = model(torch.randn(MANY, 32, requires_grad=True)).float().sum()
            with seen:
                loss.backward()
        counts.append(seen.count)
    assert counts[0] < counts[1]
