"""Rules that set the number of leading directions from a spectrum."""

import math
from functools import cache

import torch
from torch import Tensor

from spectralbasis.errors import InputError
from spectralbasis.linalg.row_blocks import MatrixLike
from spectralbasis.linalg.svd import singular_values

Leading = int | float | str
"""A number of directions, a fraction of min(m, n), "auto" (`AUTO_LEADING`, or half of min(m, n) where that is less),
"mp" (Marchenko–Pastur) or "gd" (Gavish–Donoho)."""
AUTO_LEADING = 64
_RULES = ("auto", "mp", "gd")


def parse_leading(text: Leading) -> Leading:
    """A leading setting as typed ("64", "0.1", "mp") or given, checked.

    Raises:
        InputError: it is none of a positive whole number, a fraction below 1, "auto", "mp" and "gd".

    Examples:
        >>> from spectralbasis.linalg import parse_leading
        >>> parse_leading("64"), parse_leading("0.1"), parse_leading("MP")
        (64, 0.1, 'mp')
    """
    value: Leading = text.strip().lower() if isinstance(text, str) else text
    if isinstance(value, str) and value not in _RULES:
        try:
            value = int(value) if value.isdigit() else float(value)
        except ValueError:
            raise _leading_error(text) from None
    if isinstance(value, bool) or (isinstance(value, int) and value < 1):
        raise _leading_error(text)
    if isinstance(value, float) and not 0 < value < 1:
        raise _leading_error(text)
    return value


def _leading_error(value: Leading) -> InputError:
    return InputError(
        f"leading={value!r} is not a number of directions; pass a whole number such as 64, "
        "a fraction of min(m, n) such as 0.1, 'auto', 'mp' (Marchenko–Pastur edge) or 'gd' (Gavish–Donoho threshold)"
    )


def resolve_leading(leading: Leading, W: MatrixLike) -> int:
    """How many leading directions of `W` (m, n) the setting means, at least 1 and at most min(m, n).

    A whole number beyond min(m, n) means all directions.

    Raises:
        InputError: the setting is malformed.

    Examples:
        >>> import torch
        >>> from spectralbasis.linalg import resolve_leading
        >>> resolve_leading(0.5, torch.ones(6, 4)), resolve_leading(9, torch.ones(6, 4))
        (2, 4)
    """
    leading = parse_leading(leading)
    known = leading_by_shape(leading, (W.shape[0], W.shape[1]))
    if known is not None:
        return known
    S = singular_values(W)
    rule = marchenko_pastur_edge if leading == "mp" else gavish_donoho_threshold
    threshold = rule(S, (W.shape[0], W.shape[1]))
    return max(1, int(torch.count_nonzero(threshold < S)))


def leading_by_shape(leading: Leading, shape: tuple[int, int]) -> int | None:
    """`resolve_leading` of a matrix of shape (m, n); None where the rule needs its spectrum."""
    short = min(shape)
    if leading == "auto":
        return min(AUTO_LEADING, max(1, short // 2))
    if isinstance(leading, str):
        return None
    return min(leading, short) if isinstance(leading, int) else max(1, round(leading * short))


def marchenko_pastur_edge(S: Tensor, shape: tuple[int, int], scale: float | None = None) -> float:
    """Largest singular value that pure noise of this shape has, `scale · (√m + √n)`, in the units of S.

    Args:
        S: all singular values, (min(m, n),), descending.
        shape: (m, n).
        scale: standard deviation of the noise's entries; None estimates it from the median singular value, which a
            few strong directions cannot move (Gavish & Donoho, 1305.5870, section III.E).

    Examples:
        >>> import torch
        >>> from spectralbasis.linalg import marchenko_pastur_edge
        >>> marchenko_pastur_edge(torch.tensor([3.0, 2.0]), (4, 9), scale=1.0)
        5.0
    """
    m, n = shape
    sigma = _noise_scale(S, shape) if scale is None else scale
    return sigma * (math.sqrt(m) + math.sqrt(n))


def gavish_donoho_threshold(S: Tensor, shape: tuple[int, int]) -> float:
    """Optimal hard threshold for singular values in white noise of unknown scale (Gavish & Donoho, 1305.5870).

    Args:
        S: all singular values, (min(m, n),), descending.
        shape: (m, n).

    Examples:
        >>> import torch
        >>> from spectralbasis.linalg import gavish_donoho_threshold
        >>> round(gavish_donoho_threshold(torch.tensor([9.0, 1.0, 1.0]), (3, 3)), 3)  # 2.858 times the median
        2.858
    """
    beta = min(shape) / max(shape)
    optimal = math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta * beta + 14 * beta + 1)))
    return optimal * math.sqrt(max(shape)) * _noise_scale(S, shape)


def _noise_scale(S: Tensor, shape: tuple[int, int]) -> float:
    median = float(torch.quantile(S.double(), 0.5))
    return median / math.sqrt(max(shape) * marchenko_pastur_median(min(shape) / max(shape)))


@cache
def marchenko_pastur_median(beta: float) -> float:
    """Median of the Marchenko–Pastur law of aspect ratio β in (0, 1], for unit variance."""
    from scipy.integrate import quad
    from scipy.optimize import brentq

    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2

    # x = low + 2 r sin²(t/2) removes the square-root ends of the density, which slow the quadrature.
    radius = (high - low) / 2

    def density(t: float) -> float:
        sine, cosine = math.sin(t / 2) ** 2, math.cos(t / 2) ** 2
        return 2 * radius**2 * sine * cosine / (math.pi * beta * (low + 2 * radius * sine))

    angle = brentq(lambda t: quad(density, 0, t)[0] - 0.5, 1e-6, math.pi)
    return low + 2 * radius * math.sin(angle / 2) ** 2
