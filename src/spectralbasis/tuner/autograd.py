"""`base(x) + x ΔWᵀ` with `ΔW = U C Vᵀ`, in the order that takes the least time (`cheapest_step`).

A `Route` computes it by plain operations, which keep `x V` (tokens × k) and nothing else for the backward pass. The two
functions are for what plain operations cannot do: they form `W + U C Vᵀ` without keeping it, and they multiply in other
dtypes than those of W and C. They keep `x V` too, and return it as a second output: this way `setup_context` may save
it (`torch.func` needs that), and second derivatives are right.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from spectralbasis.linalg import values_of_singular_vectors
from spectralbasis.tuner.forms import FORMS

_WORTHWHILE = 2
"""How many times longer one side of W is, for another route than *factored* to pay: it copies, or subtracts."""
_FORMED_PAYS = 0.57
"""Share of the multiplications of plain operations at which `LinearUpdate` takes less time; measured on a CPU."""


class _Function(torch.autograd.Function):
    """A function whose arguments are given by position."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """As torch's, which first binds default values of arguments: that takes longer than a small layer."""
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]


def run(function: type[_Function], *args: Any, gradients: bool) -> Any:
    """The outputs of a function below; only its forward pass where no gradients are needed."""
    if gradients or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return function.forward(*args)


class FactoredUpdate(_Function):
    """`base_output + ((x V) Cᵀ) Uᵀ`: k (m + n) multiplications a token, and as many in the backward pass.

    Args of `apply`:
        base_output: (..., m), whose dtype the output has.
        x: (..., n); the products are computed in its dtype.
        C: coefficients in the shape of `form`.
        directions: U (m, k) above V (n, k), so that one operation casts both; frozen.
        form: a key of `FORMS`.

    Returns:
        The output, and `x V` as (tokens, k).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(base_output: Tensor, x: Tensor, C: Tensor, directions: Tensor, form: str) -> tuple[Tensor, Tensor]:
        U, V = _split(directions.to(x.dtype), base_output.shape[-1])
        Z = x.reshape(-1, x.shape[-1]) @ V
        return _add_product(base_output, FORMS[form].multiply(Z, C.to(x.dtype)), U.T), Z

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, x, C, directions, ctx.form = inputs
        ctx.save_for_backward(output[1], C, directions)
        ctx.x_shape = x.shape
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_output, grad_Z = grads
        Z, C, directions = ctx.saved_tensors
        U, V = _split(directions.to(Z.dtype), len(directions) - ctx.x_shape[-1])
        _, needs_x, needs_C, *_ = ctx.needs_input_grad
        grad_x, grad_C = None, None
        if grad_output is not None and (needs_x or needs_C):
            G = grad_output.reshape(-1, grad_output.shape[-1]).to(Z.dtype) @ U
            grad_C = FORMS[ctx.form].gradient(G, Z, C.dtype) if needs_C else None
            grad_Z = _add(FORMS[ctx.form].multiply_transposed(G, C.to(Z.dtype)) if needs_x else None, grad_Z)
        if grad_Z is not None and needs_x:
            grad_x = (grad_Z @ V.T).reshape(ctx.x_shape)
        return grad_output, grad_x, grad_C, None, None


class LinearUpdate(_Function):
    """`x (W + U C Vᵀ)ᵀ + bias`, forward and backward in whichever of four ways takes the fewest multiplications.

    A pass needs one product of the tokens with V or U for the coefficients' gradient, and the update itself:

    * *factored* multiplies the tokens with the other factor too;
    * *formed* forms `W + U C Vᵀ` once for all tokens, and does not keep it;
    * where U and V are singular vectors of W with values σ, `W V = U Σ` moves the update to one side of W, *input* or
      *output*: `W + U C Vᵀ = W (I + V Σ⁻¹ C Vᵀ) = (I + U C Σ⁻¹ Uᵀ) W`. Then both products are with the factor of that
      side, and `x Vᵀ = (x Wᵀ) U Σ⁻¹` or `g U = (g W) V Σ⁻¹` is had from what the base computes anyway.

    Args of `apply`:
        x: (..., n), in whose dtype the products are computed.
        W: (m, n), frozen; formed in its own dtype.
        bias: (m,) or None.
        C: coefficients in the shape of `form`.
        directions: U (m, k) above V (n, k), so that one operation casts both; frozen.
        inverse: 1/σ (k,) in the dtype of x, where U and V are singular vectors of W; else None.
        form: a key of `FORMS`.

    Returns:
        The output, `x V` as (tokens, k), and the weight that was multiplied with: where W has to be cast, as under
        autocast, it is kept for the backward pass, as autocast keeps its copies; else it is empty.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, W: Tensor, bias: Tensor | None, C: Tensor, directions: Tensor, inverse: Tensor | None, form: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        flat = x.reshape(-1, x.shape[-1])
        update = _Update(W, C, directions, inverse, form, x.dtype)
        with _without_autocast(x.device.type):
            y, Z = _forward(flat, bias if bias is None else bias.to(x.dtype), update)
        kept = x.new_empty(0) if x.dtype == W.dtype else update.multiplied()
        return _reshaped(y, (*x.shape[:-1], W.shape[0])), Z, kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, W, _, C, directions, inverse, ctx.form = inputs
        _, Z, kept = output
        ctx.mark_non_differentiable(kept)
        ctx.save_for_backward(Z, W, C, directions, inverse, kept)
        ctx.formed = cheapest(len(Z), *W.shape, singular=inverse is not None) == "formed"
        ctx.x_shape = x.shape
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_output, grad_Z, _ = grads
        Z, W, C, directions, inverse, kept = ctx.saved_tensors
        needs_x, _, needs_bias, needs_C, *_ = ctx.needs_input_grad
        update = _Update(W, C, directions, inverse, ctx.form, Z.dtype)
        if Z.dtype != W.dtype and not torch.is_grad_enabled():  # a second derivative has to see C in the weight
            update.keep(kept, formed=ctx.formed)
        grad_x, grad_bias, grad_C = None, None, None
        if grad_output is not None:
            flat = grad_output.reshape(-1, grad_output.shape[-1])
            grad_bias = flat.sum(0) if needs_bias else None
            grad_x, G = _backward(flat, update) if needs_x else (None, flat @ update.U)
            grad_C = FORMS[ctx.form].gradient(G, Z, C.dtype) if needs_C else None
        if grad_Z is not None and needs_x:
            grad_x = _add(grad_x, grad_Z @ update.V.T)
        if grad_x is not None:
            grad_x = grad_x.reshape(ctx.x_shape)
        return grad_x, None, grad_bias, grad_C, None, None, None


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


class _Update:
    """The tensors of one update in the dtype of its tokens, which 1/σ has already."""

    def __init__(
        self, W: Tensor, C: Tensor, directions: Tensor, inverse: Tensor | None, form: str, dtype: torch.dtype
    ) -> None:
        self.stored = W, C, directions
        self.dtype = dtype
        self.C, self.inverse = C.to(dtype), inverse
        self.U, self.V = _split(directions.to(dtype), len(W))
        self.form = FORMS[form]
        self.weights: dict[str, Tensor] = {}

    def keep(self, weight: Tensor, *, formed: bool) -> None:
        """Take the weight of the forward pass, and with it the ways that it serves."""
        self.weights = {"formed" if formed else "base": weight}

    def way(self, tokens: int, outputs: int, inputs: int) -> str:
        """See `cheapest`."""
        if "formed" in self.weights:
            return "formed"
        return cheapest(tokens, outputs, inputs, singular=self.inverse is not None, formed=not self.weights)

    def multiplied(self) -> Tensor:
        """The weight that the pass multiplied with."""
        (weight,) = self.weights.values()
        return weight

    def base(self) -> Tensor:
        """W."""
        if not self.weights:
            self.weights["base"] = self.stored[0].to(self.dtype)
        return self.weights["base"]

    def formed(self) -> Tensor:
        """`W + U C Vᵀ`, rounded once."""
        if not self.weights:
            W, C, directions = self.stored
            U, V = _split(directions, len(W))
            self.weights["formed"] = torch.addmm(W, self.form.left_factor(U, C), V.T).to(self.dtype)
        return self.weights["formed"]

    def over_values(self, Z: Tensor) -> Tensor:
        """`Z Σ⁻¹`."""
        return Z if self.inverse is None else Z * self.inverse


def _forward(x: Tensor, bias: Tensor | None, update: _Update) -> tuple[Tensor, Tensor]:
    """`x (W + U C Vᵀ)ᵀ + bias` and `x V`, of x (tokens, n)."""
    U, V = update.U, update.V
    way = update.way(len(x), len(U), len(V))
    if way == "output":
        y = linear(x, update.base(), bias)
        Z = update.over_values(y @ U if bias is None else y @ U - bias @ U)
        return torch.addmm(y, update.form.multiply(Z, update.C), U.T), Z
    Z = x @ V
    if way == "formed":
        return linear(x, update.formed(), bias), Z
    change = update.form.multiply(Z, update.C)
    if way == "input":
        return linear(torch.addmm(x, update.over_values(change), V.T), update.base(), bias), Z
    return torch.addmm(linear(x, update.base(), bias), change, U.T), Z


def _backward(g: Tensor, update: _Update) -> tuple[Tensor, Tensor]:
    """`g (W + U C Vᵀ)` and `g U`, of g (tokens, m): the forward pass of Wᵀ."""
    U, V = update.U, update.V
    way = update.way(len(g), len(V), len(U))
    if way == "output":
        h = g @ update.base()
        G = update.over_values(h @ V)
        return torch.addmm(h, update.form.multiply_transposed(G, update.C), V.T), G
    G = g @ U
    if way == "formed":
        return g @ update.formed(), G
    change = update.form.multiply_transposed(G, update.C)
    if way == "input":
        return torch.addmm(g, update.over_values(change), U.T) @ update.base(), G
    return torch.addmm(g @ update.base(), change, V.T), G


def cheapest(tokens: int, outputs: int, inputs: int, *, singular: bool, formed: bool = True) -> str:
    """The way that takes the fewest multiplications beyond the base's own; k cancels.

    The backward pass is the forward pass of Wᵀ: `outputs` and `inputs` change places.

    Args:
        tokens: rows of the input.
        outputs: m.
        inputs: n.
        singular: whether the ways that need singular vectors of W are open.
        formed: whether the weight may be formed.
    """
    ways = [("factored", tokens * (inputs + outputs))]
    if formed:
        ways.append(("formed", (tokens + outputs) * inputs))
    if singular:
        ways += [("input", 2 * tokens * inputs), ("output", 2 * tokens * outputs)]
    best, least = ways[0]
    for way, cost in ways[1:]:  # torch.compile cannot follow `min` with a key
        best, least = (way, cost) if cost < least else (best, least)
    return best


@lru_cache(maxsize=4096)
def cheapest_step(tokens: int, outputs: int, inputs: int, *, singular: bool) -> str:
    """The way that takes the least time for a pass and its backward pass: that of a route, or "formed".

    Plain operations take fewer launches and less Python than `LinearUpdate`, so that it has to save many
    multiplications. Only by it can the backward pass take another way than the forward pass.

    Args:
        tokens: rows of the input.
        outputs: m.
        inputs: n.
        singular: whether U and V are singular vectors of W.
    """
    ways = {"factored": 2 * tokens * (inputs + outputs)}
    if singular:
        ways |= {"input": 4 * tokens * inputs, "output": 4 * tokens * outputs}
    best = min(ways, key=lambda way: ways[way])
    passes = ((outputs, inputs), (inputs, outputs))
    if sum(_cost(tokens, *pair, singular=singular) for pair in passes) < _FORMED_PAYS * ways[best]:
        return "formed"
    return best


def _cost(tokens: int, outputs: int, inputs: int, *, singular: bool) -> int:
    """Multiplications of one pass by `cheapest`, over k."""
    cost = {
        "factored": tokens * (inputs + outputs),
        "formed": (tokens + outputs) * inputs,
        "input": 2 * tokens * inputs,
        "output": 2 * tokens * outputs,
    }
    return cost[cheapest(tokens, outputs, inputs, singular=singular)]


@dataclass(frozen=True)
class Route:
    """Adds `C (A s - offset)`, expanded by B, to something: k numbers a token in between.

    With singular vectors, `W V = U Σ` and `Uᵀ W = Σ Vᵀ`, so that the longer side of W need not be touched: where W is
    tall, `U C z = W (V Σ⁻¹ C z)` is a change of the *input*; where it is wide, `z = Vᵀ x = Σ⁻¹ Uᵀ (y - b)` is found
    from the *output*. That costs `2 k min(m, n)` a token, the plain way `k (m + n)`.

    Attributes:
        A: (size of the source, k), the source being x, or y where `from_output`.
        B: (k, size of the target), the target being y, or x where `on_input`.
        offset: (k,), or None for 0.
        from_output: whether the source is the layer's output.
        on_input: whether the target is the layer's input.
    """

    A: Tensor
    B: Tensor
    offset: Tensor | None = None
    from_output: bool = False
    on_input: bool = False

    def add(self, source: Tensor, target: Tensor, C: Tensor, form: str) -> Tensor:
        """The target, changed in place by the update of each row's C.

        Args:
            source: (rows, ..., size of the source).
            target: (rows, ..., size of the target), contiguous.
            C: (rows, *shape of the form).
            form: a key of `FORMS`.
        """
        Z = source.reshape(len(C), -1, source.shape[-1]) @ self.A.to(target.dtype)
        if self.offset is not None:
            Z -= self.offset.to(target.dtype)
        update = FORMS[form].multiply(Z, C.to(target.dtype)).flatten(0, 1)
        target.view(-1, target.shape[-1]).addmm_(update, self.B.to(target.dtype))
        return target

    def linear(self, x: Tensor, W: Tensor, bias: Tensor | None, C: Tensor) -> Tensor:
        """`x (W + U C Vᵀ)ᵀ + bias` by operations that autograd knows; all tensors have one dtype.

        Args:
            x: (tokens, n).
            W: (m, n), frozen.
            bias: (m,) or None; the route's own `offset` is not used.
            C: (k,) or (k, k), the same for all tokens.
        """
        if self.on_input:
            return linear(torch.addmm(x, _times(x @ self.A, C), self.B), W, bias)
        y = linear(x, W, bias)
        if not self.from_output:
            Z = x @ self.A
        elif bias is None:
            Z = y @ self.A
        else:
            Z = torch.addmm(bias @ self.A, y, self.A, beta=-1)
        return y.addmm_(_times(Z, C), self.B)


def _times(Z: Tensor, C: Tensor) -> Tensor:
    """`Z Cᵀ`; C of shape (k,) is a diagonal."""
    return Z * C if C.ndim == 1 else Z @ C.t()


def make_route(way: str, U: Tensor, V: Tensor, S: Tensor | None, unit: Tensor | None = None) -> Route:
    """The route of a way that `cheapest_step` names, other than "formed".

    Args:
        way: "factored", "input" or "output".
        U: (m, k).
        V: (n, k).
        S: σ (k,) for "input" and "output", where U and V are singular vectors of W.
        unit: what C is multiplied by, (k,) for a diagonal or a number; None is 1.
    """
    if way == "factored" or S is None:
        return Route(V if unit is None else V * unit, U.T)
    if way == "input":
        return Route(V if unit is None else V * unit, (V / S).T.contiguous(), on_input=True)
    return Route(U / S if unit is None else U * (unit / S), U.T, from_output=True)


def cheapest_route(W: Tensor, U: Tensor, V: Tensor, bias: Tensor | None) -> Route:
    """The route for a layer `W x + b` that only runs inference, its tensors contiguous.

    Args:
        W: (m, n).
        U: (m, k).
        V: (n, k); singular vectors of W, or any other directions, for which the plain route is taken.
        bias: (m,) or None.
    """
    m, n = W.shape
    S = values_of_singular_vectors(W, U, V, bias=bias) if max(m, n) >= _WORTHWHILE * min(m, n) else None
    route = make_route(cheapest(1, m, n, singular=S is not None, formed=False), U, V, S)
    offset = bias @ route.A if route.from_output and bias is not None else None
    return replace(route, A=route.A.contiguous(), B=route.B.contiguous(), offset=offset)


def _split(directions: Tensor, outputs: int) -> tuple[Tensor, Tensor]:
    """U and V."""
    U, V = directions.split((outputs, len(directions) - outputs))
    return U, V


def _add_product(base: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`base + left @ right`, rounded once where the dtypes allow it."""
    if base.dtype != left.dtype:
        return base + (left @ right).reshape(base.shape).to(base.dtype)
    return _reshaped(torch.addmm(base.reshape(-1, base.shape[-1]), left, right), base.shape)


def _reshaped(y: Tensor, shape: Sequence[int]) -> Tensor:
    """A result in another shape, but no view of it: torch forbids to change such a view in place, as Llama 4 does."""
    return torch.ops.aten._unsafe_view(y, list(shape))


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b
