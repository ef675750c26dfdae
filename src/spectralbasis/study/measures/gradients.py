"""What lies in a basis: of a task's gradient, of single examples' gradients, and of other matrices of their shapes."""

from collections.abc import Iterator, Mapping
from math import nan

import torch
from torch import Tensor

Matrices = Mapping[str, Tensor]
Directions = Mapping[str, tuple[Tensor, Tensor]]
"""Matrix name → U (m, k) and V (n, k), columns orthonormal; k may differ."""
FORMS = ("core", "diagonal")
"""Which of the coefficients `C = Uᵀ M V` count: all, or those of paired directions."""


def shares(matrices: Matrices, directions: Directions, k: int) -> dict[str, float]:
    """The share of `Σ ‖M‖_F²` over all matrices M (m, n) that the coefficients of the first k directions hold, by form.

    NaN where the matrices are all zero.
    """
    total = _energy(matrices)
    inside = dict.fromkeys(FORMS, 0.0)
    for name, M in matrices.items():
        for form, C in _by_form(_coefficients(M, *directions[name]), k):
            inside[form] += float(C.double().square().sum())
    return {form: energy / total if total else nan for form, energy in inside.items()}


class GradientNoise:
    """Moments, over single examples, of the loss gradient with respect to the coefficients in one basis.

    Examples go to two halves by turns: the product of the halves' means estimates the square of the mean gradient
    without bias, where the square of a mean over N examples has N-th parts of the noise in it.

    Args:
        directions: of every matrix that gets a gradient.
    """

    def __init__(self, directions: Directions) -> None:
        def zeros() -> dict[str, Tensor]:
            return {
                name: U.new_zeros(U.shape[1], V.shape[1], dtype=torch.float64) for name, (U, V) in directions.items()
            }

        self._directions = directions
        self._sums = zeros(), zeros()
        self._squares = zeros()
        self._energy = 0.0
        self._examples = 0

    def add(self, gradients: Matrices) -> None:
        """One example's gradients, (m, n) each."""
        half = self._sums[self._examples % 2]
        self._examples += 1
        self._energy += _energy(gradients)
        for name, gradient in gradients.items():
            C = _coefficients(gradient, *self._directions[name]).double()
            half[name] += C
            self._squares[name] += C.square()

    def shares(self, k: int) -> dict[str, float]:
        """The share of `Σ ‖∂L_i/∂W‖_F²` over examples i and matrices that the first k directions hold, by form."""
        inside = dict.fromkeys(FORMS, 0.0)
        for squares in self._squares.values():
            for form, part in _by_form(squares, k):
                inside[form] += float(part.sum())
        return {form: energy / self._energy if self._energy else nan for form, energy in inside.items()}

    def signal(self, k: int) -> dict[str, float]:
        """Mean over the coefficients of `E[g]² / E[g²]`, g an example's gradient with respect to one, by form.

        It is what a coefficient's gradient tells over its noise, whatever the size of either: 1 where all examples
        agree, 0 where they cancel. An optimizer that divides by the root of `E[g²]`, as Adam does, sees only this.
        Coefficients that no example moves are left out. NaN with fewer than two examples.
        """
        first, second = self._sums
        halves = (self._examples + 1) // 2, self._examples // 2
        found: dict[str, list[Tensor]] = {form: [] for form in FORMS}
        for name, squares in self._squares.items():
            ratios = (first[name] / halves[0]) * (second[name] / halves[1]) / (squares / self._examples)
            for form, part in _by_form(ratios, k):
                found[form].append(part[part.isfinite()])
        return {form: float(torch.cat(parts).mean()) for form, parts in found.items()}


def _coefficients(M: Tensor, U: Tensor, V: Tensor) -> Tensor:
    return U.T @ M @ V


def _by_form(C: Tensor, k: int) -> Iterator[tuple[str, Tensor]]:
    """The entries of C (k, k) that each form has."""
    core = C[:k, :k]
    yield "core", core.flatten()
    yield "diagonal", core.diagonal()


def _energy(matrices: Matrices) -> float:
    return sum(float(M.double().square().sum()) for M in matrices.values())
