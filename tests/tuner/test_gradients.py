"""The hand-written backward passes against numerical differences and against autograd on the dense ΔW."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import linear

from spectralbasis.tuner import autograd
from spectralbasis.tuner.autograd import FactoredUpdate, LinearUpdate, cheapest
from spectralbasis.tuner.forms import FORMS

M, N, K = 5, 7, 3


def tensors(form, tokens=(2, 2), dtype=torch.float64):
    torch.manual_seed(0)
    W, bias = torch.randn(M, N, dtype=dtype), torch.randn(M, dtype=dtype, requires_grad=True)
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    x = torch.randn(*tokens, N, dtype=dtype, requires_grad=True)
    C = torch.randn(FORMS[form].shape(K), dtype=dtype, requires_grad=True)
    return x, C, U[:, :K], Vh[:K].T, W, bias


def dense_reference(x, C, U, V, W, bias):
    full = torch.diag(C) if C.ndim == 1 else C
    return linear(x, W + U @ full @ V.T, bias)


def apply(kind, form, x, C, U, V, W, bias):
    if kind == "beside the base":
        return FactoredUpdate.apply(linear(x, W, bias), x, C, torch.cat((U, V)), form)
    inverse = 1 / torch.linalg.vector_norm(W @ V, dim=0) if kind in ("input", "output") else None
    return LinearUpdate.apply(x, W, bias, C, torch.cat((U, V)), inverse, form)[:2]


@pytest.fixture(params=["beside the base", "factored", "formed", "input", "output"])
def kind(request, monkeypatch):
    """The way of computing that is taken, forward and backward, whatever it costs."""
    monkeypatch.setattr(autograd, "cheapest", lambda *sizes, **open: request.param)
    return request.param


@pytest.fixture(params=sorted(FORMS))
def form(request):
    return request.param


@pytest.mark.parametrize("tokens", [(2,), (2, 2), (3, 4)])
def test_first_derivatives(kind, form, tokens):
    x, C, U, V, W, bias = tensors(form, tokens)
    assert gradcheck(lambda x, C, bias: apply(kind, form, x, C, U, V, W, bias), (x, C, bias))


def test_second_derivatives(kind, form):
    x, C, U, V, W, bias = tensors(form, (2,))
    assert gradgradcheck(lambda x, C, bias: apply(kind, form, x, C, U, V, W, bias), (x, C, bias))


@pytest.mark.parametrize("tokens", [(4,), (2, 9)])
def test_agrees_with_autograd_on_the_dense_update(kind, form, tokens):
    leaves = tensors(form, tokens)
    x, C, _, _, _, bias = leaves
    output, _ = apply(kind, form, *leaves)
    expected = dense_reference(*leaves)
    weights = torch.randn_like(expected)
    found = torch.autograd.grad((output * weights).sum(), (x, C, bias))
    wanted = torch.autograd.grad((expected * weights).sum(), (x, C, bias))
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("frozen", ["x", "C"])
def test_what_needs_no_gradient_gets_none(kind, form, frozen):
    x, C, U, V, W, bias = tensors(form)
    (x if frozen == "x" else C).requires_grad_(False)
    apply(kind, form, x, C, U, V, W, bias)[0].sum().backward()
    assert (x.grad is None) == (frozen == "x")
    assert (C.grad is None) == (frozen == "C")


def test_per_example_gradients_with_torch_func(kind, form):
    x, C, U, V, W, bias = (tensor.detach() for tensor in tensors(form, (6,)))

    def loss(C, row):
        return (apply(kind, form, row[None], C, U, V, W, bias)[0] ** 2).sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(C, x)
    wanted = torch.stack([torch.func.grad(loss)(C, row) for row in x])
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_products_keep_full_precision_coefficients(form, dtype):
    x, C, U, V, W, bias = tensors(form, (3, 4))
    directions = torch.cat((U, V)).float()
    output, _ = FactoredUpdate.apply(linear(x, W, bias).to(dtype), x.to(dtype), C.float(), directions, form)
    assert output.dtype == dtype
    grad = torch.autograd.grad(output.float().sum(), C)[0]
    wanted = torch.autograd.grad(dense_reference(x, C, U, V, W, bias).sum(), C)[0]
    torch.testing.assert_close(grad, wanted, atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    ("tokens", "shape", "singular", "expected"),
    [
        (100, (384, 384), False, "factored"),
        (1000, (384, 384), False, "formed"),
        (1000, (384, 384), True, "formed"),
        (1000, (1536, 384), True, "input"),
        (1000, (1536, 384), False, "formed"),
        (10_000, (1536, 384), True, "formed"),
        (1000, (384, 1536), True, "output"),
        (100, (384, 1536), False, "factored"),
    ],
)
def test_the_way_of_fewest_multiplications_is_taken(tokens, shape, singular, expected):
    assert cheapest(tokens, *shape, singular=singular) == expected
