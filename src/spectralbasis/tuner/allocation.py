"""Who gets how many directions: from a number, a rule or a budget to one k per matrix."""

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from spectralbasis.errors import InputError
from spectralbasis.linalg import Leading, resolve_leading
from spectralbasis.printable import warn
from spectralbasis.tuner.parametrisation import numbers

DEFAULT_LEADING = 64
"""k where neither `leading` nor `budget` is given; smaller matrices give all they have."""


@dataclass(frozen=True)
class Allocation:
    """How many numbers an adapter trains.

    Attributes:
        ranks: matrix name → k.
        trained: coefficients over all matrices; heads and biases are not counted.
        total: parameters of the model without adapters.
    """

    ranks: Mapping[str, int]
    trained: int
    total: int

    @property
    def share(self) -> float:
        """`trained / total`."""
        return self.trained / self.total


def count_parameters(model: nn.Module) -> int:
    """Parameters of the model itself: no coefficients, and of retrained modules the original only."""
    added = (".spectral_coefficients.", ".modules_to_save.")
    return sum(_size(p) for name, p in model.named_parameters() if not any(part in f".{name}" for part in added))


def allocate_leading(
    leading: Leading | None, weights: Mapping[str, Tensor], fixed: Mapping[str, int]
) -> dict[str, int]:
    """k of each matrix by a number, a fraction or a rule; min(m, n) where that is smaller, with one warning.

    Args:
        leading: see `linalg.resolve_leading`; None is `DEFAULT_LEADING`, or min(m, n) where that is smaller.
        weights: matrix name → W, (m, n).
        fixed: matrix name → k, of the matrices whose k is settled already.
    """
    fixed = {name: leading for name in weights if isinstance(leading, int)} | dict(fixed)
    fixed = _lowered(fixed, weights)
    return {name: fixed[name] if name in fixed else _leading_rank(leading, W) for name, W in weights.items()}


def allocate_budget(
    budget: float,
    total: int,
    weights: Mapping[str, Tensor],
    fixed: Mapping[str, int],
    coefficients: str,
    bandwidth: int = 1,
) -> dict[str, int]:
    """The largest k, one for all matrices (min(m, n) where that is smaller), that trains at most `budget * total`.

    Args:
        budget: fraction of the model's parameters.
        total: parameters of the model.
        weights: matrix name → W, (m, n).
        fixed: matrix name → k, of the matrices whose k is settled already; they are paid first. Where min(m, n) is
            smaller, k is that, with one warning.
        coefficients: "diagonal", "core" or "band".
        bandwidth: of a band.

    Raises:
        InputError: the budget does not pay for k = 1.
    """
    fixed = _lowered(fixed, weights)
    sides = {name: min(W.shape) for name, W in weights.items() if name not in fixed}
    settled = sum(numbers(coefficients, k, bandwidth) for k in fixed.values())

    def price(k: int) -> int:
        return settled + sum(numbers(coefficients, min(k, side), bandwidth) for side in sides.values())

    allowed = math.floor(budget * total)
    if price(1) > allowed:
        raise InputError(
            f"budget={budget:g} of {total:,} parameters is {allowed:,} coefficients, but one direction in each of "
            f"{len(weights)} matrices takes {price(1):,}; pass budget>={price(1) / total:.2g} or target fewer modules"
        )
    k = bisect_right(range(1, max(sides.values(), default=1) + 1), allowed, key=price)
    return {name: fixed[name] if name in fixed else min(k, sides[name]) for name in weights}


def _size(parameter: nn.Parameter) -> int:
    """Number of weights in a parameter; bitsandbytes packs two of 4 bits into a byte."""
    quantized = getattr(parameter, "quant_state", None)
    return parameter.numel() if quantized is None else math.prod(quantized.shape)


def _leading_rank(leading: Leading | None, W: Tensor) -> int:
    return min(DEFAULT_LEADING, *W.shape) if leading is None else resolve_leading(leading, W)


def _lowered(ranks: Mapping[str, int], weights: Mapping[str, Tensor]) -> dict[str, int]:
    """These k, where they exceed min(m, n) that; one warning names the matrices."""
    lowered = {name: min(k, *weights[name].shape) for name, k in ranks.items()}
    changed = [name for name, k in ranks.items() if lowered[name] != k]
    if changed:
        first = changed[0]
        warn(
            f"k={ranks[first]} exceeds min(m, n)={lowered[first]} of {first}"
            + (f" ({len(changed)} matrices are smaller than their k)" if len(changed) > 1 else "")
            + "; min(m, n) is taken there",
            stacklevel=2,
        )
    return lowered
