"""Forming the changed weight is a matter of cost: it never changes a result, and stays out where it might."""

import pytest
import torch
from torch import nn

from spectralbasis.tuner import linear as linear_module
from tests.tuner.cases import CASES

FEW, MANY = 4, 40


@pytest.fixture
def calls(monkeypatch):
    """Which of the two functions ran, in order."""
    seen = []
    for name in ("DenseUpdate", "FactoredUpdate"):
        function = getattr(linear_module, name)

        class Spy:
            @staticmethod
            def apply(*args, function=function, name=name):
                seen.append(name)
                return function.apply(*args)

        monkeypatch.setattr(linear_module, name, Spy)
    return seen


def linear(**changes):
    return CASES["mlp"].adapted(**changes).base_model.model.lin0


@pytest.mark.parametrize(("tokens", "expected"), [(FEW, "FactoredUpdate"), (MANY, "DenseUpdate")])
def test_many_tokens_form_the_weight(tokens, expected, calls):
    linear()(torch.randn(tokens, 10))
    assert calls == [expected]


@pytest.mark.parametrize("coefficients", ["diagonal", "core"])
@pytest.mark.parametrize("tokens", [12, 15, 40])
def test_both_ways_agree(coefficients, tokens, monkeypatch):
    x = torch.randn(3, tokens, 10, requires_grad=True)
    results = []
    for dense in (True, False):
        monkeypatch.setattr(linear_module, "dense_pays", lambda tokens, features, dense=dense: dense)
        layer = linear(coefficients=coefficients)
        output = layer(x)
        gradients = torch.autograd.grad((output**2).sum(), (x, layer.spectral_coefficients["default"]))
        results.append((output, *gradients))
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)


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
    assert calls == ["FactoredUpdate"]
    assert torch.equal(output, layer.base_layer(x))
    output.sum().backward()
    assert (layer.weight.grad is not None) == layer.weight.requires_grad


def test_autocast_computes_with_factors(calls):
    with torch.autocast("cpu", torch.bfloat16):
        assert linear()(torch.randn(MANY, 10)).dtype == torch.bfloat16
    assert calls == ["FactoredUpdate"]
