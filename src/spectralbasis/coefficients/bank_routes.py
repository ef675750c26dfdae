"""The cheapest exact way to add `U C Vᵀ x` to `W x + b` for a C that differs from row to row."""

from dataclasses import dataclass

from torch import Tensor

from spectralbasis.linalg import values_of_singular_vectors

_WORTHWHILE = 2
"""How many times longer one side of W is, for another route than the plain one to pay."""


@dataclass(frozen=True)
class Route:
    """Adds `C (A s - offset)`, expanded by B, to something: k numbers a token in between.

    With singular vectors, `W V = U Σ` and `Uᵀ W = Σ Vᵀ`, so that the longer side of W need not be touched: where W is
    tall, `U C z = W (V Σ⁻¹ C z)` is a change of the *input*; where it is wide, `z = Vᵀ x = Σ⁻¹ Uᵀ (y - b)` is found
    from the *output*. That costs `2 k min(m, n)` a token, the plain way `k (m + n)`.

    Attributes:
        A: (k, size of the source), the source being x, or y where `from_output`.
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


def cheapest_route(W: Tensor, U: Tensor, V: Tensor, bias: Tensor | None) -> Route:
    """The route for a layer `W x + b`.

    Args:
        W: (m, n).
        U: (m, k).
        V: (n, k); singular vectors of W, or any other directions, for which the plain route is taken.
        bias: (m,) or None.
    """
    m, n = W.shape
    S = values_of_singular_vectors(W, U, V) if max(m, n) >= _WORTHWHILE * min(m, n) else None
    if S is None:
        return Route(V.T.contiguous(), U.T.contiguous())
    if m > n:
        return Route(V.T.contiguous(), (V / S).T.contiguous(), on_input=True)
    A = (U / S).T.contiguous()
    return Route(A, U.T.contiguous(), offset=None if bias is None else A @ bias, from_output=True)
