"""Two ways to compute `base(x) + x ΔWᵀ`, `ΔW = U C Vᵀ`, that keep only `x V` (tokens × k) for the backward pass.

Both return `x V` beside the output: as an output it may be saved by `setup_context`, which `torch.func` needs, and is
differentiated through, so that second derivatives are right as well.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from spectralbasis.tuner.forms import FORMS


class FactoredUpdate(torch.autograd.Function):
    """`base_output + ((x V) Cᵀ) Uᵀ`: k (m + n) multiplications a token, and as many in the backward pass.

    Args of `apply`:
        base_output: (..., m), whose dtype the output has.
        x: (..., n); the products are computed in its dtype.
        C: coefficients in the shape of `form`.
        U: (m, k), frozen.
        V: (n, k), frozen.
        form: a key of `FORMS`.

    Returns:
        The output, and `x V` as (tokens, k).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(base_output: Tensor, x: Tensor, C: Tensor, U: Tensor, V: Tensor, form: str) -> tuple[Tensor, Tensor]:
        Z = x.reshape(-1, x.shape[-1]) @ V.to(x.dtype)
        return _add_product(base_output, FORMS[form].multiply(Z, C.to(x.dtype)), U.to(x.dtype).T), Z

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, x, C, U, V, ctx.form = inputs
        ctx.save_for_backward(output[1], C, U, V)
        ctx.x_shape = x.shape
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_output, grad_Z = grads
        Z, C, U, V = ctx.saved_tensors
        _, needs_x, needs_C, *_ = ctx.needs_input_grad
        grad_x, grad_C = None, None
        if grad_output is not None and (needs_x or needs_C):
            G = grad_output.reshape(-1, grad_output.shape[-1]).to(Z.dtype) @ U.to(Z.dtype)
            grad_C = FORMS[ctx.form].gradient(G, Z, C.dtype) if needs_C else None
            grad_Z = _add(FORMS[ctx.form].multiply_transposed(G, C.to(Z.dtype)) if needs_x else None, grad_Z)
        if grad_Z is not None and needs_x:
            grad_x = (grad_Z @ V.to(Z.dtype).T).reshape(ctx.x_shape)
        return grad_output, grad_x, grad_C, None, None, None


class DenseUpdate(torch.autograd.Function):
    """`x (W + U C Vᵀ)ᵀ + bias`: the changed weight is formed, once for each pass that it pays for, and not kept.

    Args of `apply`:
        x: (..., n).
        W: (m, n), frozen, of one dtype with all other tensors.
        bias: (m,) or None.
        C, U, V, form: see `FactoredUpdate`.

    Returns:
        The output, and `x V` as (tokens, k).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, W: Tensor, bias: Tensor | None, C: Tensor, U: Tensor, V: Tensor, form: str
    ) -> tuple[Tensor, Tensor]:
        return linear(x, _changed(W, C, U, V, form), bias), x.reshape(-1, x.shape[-1]) @ V

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, W, _, C, U, V, ctx.form = inputs
        ctx.save_for_backward(output[1], W, C, U, V)
        ctx.x_shape = x.shape
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_output, grad_Z = grads
        Z, W, C, U, V = ctx.saved_tensors
        needs_x, _, needs_bias, needs_C, *_ = ctx.needs_input_grad
        grad_x, grad_bias, grad_C = None, None, None
        if grad_output is not None:
            flat = grad_output.reshape(-1, grad_output.shape[-1])
            grad_bias = flat.sum(0) if needs_bias else None
            G = flat @ U
            grad_C = FORMS[ctx.form].gradient(G, Z, C.dtype) if needs_C else None
            grad_x = _input_gradient(flat, G, W, C, U, V, ctx.form) if needs_x else None
        if grad_Z is not None and needs_x:
            grad_x = _add(grad_x, grad_Z @ V.T)
        if grad_x is not None:
            grad_x = grad_x.reshape(ctx.x_shape)
        return grad_x, None, grad_bias, grad_C, None, None, None


def dense_pays(tokens: int, features: int) -> bool:
    """Whether forming ΔW (m·n·k multiplications) costs less than `tokens` products with its second factor.

    In the forward pass that factor is U (tokens·m·k, so `features` is n), in the backward pass V (`features` is m);
    the product with the first factor is needed either way, and k cancels.
    """
    return tokens > features


def _input_gradient(flat: Tensor, G: Tensor, W: Tensor, C: Tensor, U: Tensor, V: Tensor, form: str) -> Tensor:
    """`flat (W + U C Vᵀ)`, where `G = flat U` is at hand."""
    if dense_pays(flat.shape[0], W.shape[0]):
        return flat @ _changed(W, C, U, V, form)
    return torch.addmm(FORMS[form].multiply_transposed(G, C) @ V.T, flat, W)


def _changed(W: Tensor, C: Tensor, U: Tensor, V: Tensor, form: str) -> Tensor:
    return torch.addmm(W, FORMS[form].left_factor(U, C), V.T)


def _add_product(base: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`base + left @ right`, rounded once where the dtypes allow it."""
    if base.dtype != left.dtype:
        return base + (left @ right).reshape(base.shape).to(base.dtype)
    return torch.addmm(base.reshape(-1, base.shape[-1]), left, right).reshape(base.shape)


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b
