"""Ways to make one vector of coefficients from several. All take X (tasks, numbers) and weights (tasks,)."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from spectralbasis.errors import InputError

Method = Callable[[Tensor, Tensor], Tensor]


def weighted_sum(X: Tensor, weights: Tensor) -> Tensor:
    """`Σ wᵢ xᵢ`."""
    return weights @ X


def weighted_mean(X: Tensor, weights: Tensor) -> Tensor:
    """`Σ wᵢ xᵢ / Σ wᵢ`.

    Raises:
        InputError: the weights add up to 0.
    """
    total = weights.sum()
    if not bool(total.abs() > 0):
        raise InputError(f"the weights {weights.tolist()} add up to 0, so they have no mean; use method='sum'")
    return weights @ X / total


def weighted_difference(X: Tensor, weights: Tensor) -> Tensor:
    """`w₁ x₁ − w₂ x₂`.

    Raises:
        InputError: there are not two.
    """
    if len(X) != 2:
        raise InputError(f"a difference is of two adapters, and {len(X)} were given; use method='sum' with weights")
    return weights[0] * X[0] - weights[1] * X[1]


def trim(X: Tensor, keep: Tensor) -> Tensor:
    """The entries of largest modulus of each row, `keep` of them (tasks,), zeros elsewhere."""
    kept = torch.zeros_like(X)
    for row, numbers, count in zip(kept, X, keep.tolist(), strict=True):
        chosen = numbers.abs().topk(count).indices
        row[chosen] = numbers[chosen]
    return kept


def ties(X: Tensor, weights: Tensor, *, keep: Tensor) -> Tensor:
    """Trim, elect signs, and average what agrees (TIES-Merging, arXiv 2306.01708).

    The sign of an entry is that of the weighted sum; the result is the mean of the weighted entries that have it.
    """
    weighted = weights[:, None] * trim(X, keep)
    agreeing = weighted * (weighted.sign() == weighted.sum(0).sign())
    return agreeing.sum(0) / agreeing.count_nonzero(0).clamp(min=1)


_PLAIN: Mapping[str, Method] = MappingProxyType(
    {"sum": weighted_sum, "mean": weighted_mean, "difference": weighted_difference}
)
METHODS = (*_PLAIN, "ties")
"""Names that `find_method` knows."""


def find_method(name: str, density: float, trained: Tensor) -> Method:
    """A method by name.

    Args:
        name: one of `METHODS`.
        density: of "ties", the fraction of each task's numbers that is kept.
        trained: how many numbers each task trains, (tasks,).

    Raises:
        InputError: the name or the density is none.
    """
    if name in _PLAIN:
        return _PLAIN[name]
    if name != "ties":
        raise InputError(f"method={name!r} is unknown; choose from {', '.join(METHODS)}")
    if not 0 < density <= 1:
        raise InputError(f"density={density!r} is no fraction of the numbers to keep; pass one such as 0.2")
    return partial(ties, keep=(density * trained).round().long().clamp(min=1))
