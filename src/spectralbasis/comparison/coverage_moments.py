"""Exact mean and standard deviation of coverage under a null, without draws.

Coverage is a quadratic form of the update, so that its first two moments follow from sums over the update and from the
vectors of the base.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spectralbasis.linalg.row_blocks import MatrixLike, frobenius_norm, row_slices, times, transposed_times

Floats = NDArray[np.float64]
Key = tuple[str, str, int, int]
"""Of a measurement: metric, side, number of leading directions, index."""


class Moments(NamedTuple):
    """Mean and standard deviation of a measurement under a null."""

    mean: float
    std: float


@dataclass(frozen=True)
class UpdateSums:
    """What the moments of coverage need of `ΔW`, with `‖ΔW‖_F` scaled to 1.

    Attributes:
        shape: (m, n).
        gram: `‖ΔW ΔWᵀ‖_F²`, the sum of the fourth powers of the singular values.
        rows: sum of the fourth powers of the norms of the rows.
        columns: the same of the columns.
        entries: sum of the fourth powers of the entries.
    """

    shape: tuple[int, int]
    gram: float
    rows: float
    columns: float
    entries: float

    @classmethod
    def of(cls, update: MatrixLike, values: Floats) -> "UpdateSums":
        """The sums of ΔW, (m, n), not zero, from its entries and its singular values."""
        rows, entries, columns = 0.0, 0.0, torch.zeros(update.shape[1], dtype=torch.float64, device=update.device)
        scale = math.sqrt(math.prod(update.shape) / float((values**2).sum()))
        for block in row_slices(update):
            squares = (update[block] * scale).square_()
            rows += float(squares.sum(1, dtype=torch.float64).square().sum())
            columns += squares.sum(0, dtype=torch.float64)
            entries += float(squares.square_().sum(dtype=torch.float64))
        total = float(columns.sum())
        return cls(
            (update.shape[0], update.shape[1]),
            float((values**4).sum() / (values**2).sum() ** 2),
            rows / total**2,
            float(columns.square().sum()) / total**2,
            entries / total**2,
        )


CoverageMoments = dict[tuple[str, str], list[Moments]]
"""(metric, side) → moments for 1 to k directions."""
Coverage = Callable[[MatrixLike, UpdateSums, Tensor, Tensor], CoverageMoments]
"""Gives these moments from ΔW, its sums, U (m, k) and Vh (k, n)."""


def scrambled_coverage(sums: UpdateSums, U: Tensor, Vh: Tensor) -> CoverageMoments:
    """Exact moments of the coverages of `D1 P1 ΔW P2 D2` with random permutations P and signs D.

    A coverage is `X = Σ tr(P ΔW R ΔWᵀ)` with P and R projectors onto directions. In `E X²` only products survive in
    which signs cancel: of the four row indices two pairs are equal, and of the four columns too. Averaging over
    permutations leaves for either side three numbers: for a pair P, Q of projectors of m dimensions

        α = (tr P tr Q − d) / m(m−1),   β = (⟨P, Q⟩ − d) / m(m−1),   γ = d/m − α − 2β,   d = Σ_i P_ii Q_ii,

    for equal rows in pairs (12)(34), in (13)(24) or (14)(23), and for all four equal. With the sums of ΔW over the rows
    and columns that are equal, `N = ‖ΔW‖_F² = 1`, G = gram, R = rows, C = columns, F = entries,

        E X² = α1 α2 + 2 (α1 β2 + β1 α2) G + α1 γ2 C + γ1 α2 R + β1 β2 (2 + 2 G) + 2 β1 γ2 C + 2 γ1 β2 R + γ1 γ2 F.

    Args:
        sums: of ΔW.
        U: (m, k), columns orthonormal.
        Vh: (k, n), rows orthonormal.
    """
    m, n = sums.shape
    left, right = (_diagonals(one).cpu().numpy() for one in (U, Vh.T))
    k = np.arange(1.0, len(left) + 1)

    projectors = _averages(_corners(left), k**2, k, m), _averages(_corners(right), k**2, k, n)
    identities = _averages(m, m * m, m, m), _averages(n, n * n, n, n)
    single = np.ones_like(left), np.eye(len(left))
    vectors = _averages(left, *single, m), _averages(right, *single, n)
    return {
        ("coverage_left", "left"): _moments(k / m, _second_moment(sums, projectors[0], identities[1])),
        ("coverage_right", "right"): _moments(k / n, _second_moment(sums, identities[0], projectors[1])),
        ("coverage_core", "both"): _moments(k**2 / (m * n), _second_moment(sums, *projectors)),
        ("coverage_diagonal", "both"): _moments(k / (m * n), _corners(_second_moment(sums, *vectors))),
    }


def one_sided_coverage(side: str, update: MatrixLike, sums: UpdateSums, U: Tensor, Vh: Tensor) -> CoverageMoments:
    """Exact moments of the coverages of `D P ΔW` (side "left"), or of `ΔW P D` ("right").

    The vectors of the other side meet the update as it is: with `B = ΔW V_k`, (m, k), the core is `tr(P S B Bᵀ Sᵀ)`
    for a random signed permutation S. As in `scrambled_coverage`, for one side,

        E X² = α (tr A)² + 2β ‖A‖_F² + γ Σ_a A_aa²,   A = B Bᵀ,

    for pairs of directions of the diagonal with `A_i = b_i b_iᵀ`. For "right", rows and columns change places. The
    coverage of the other side is kept, so it is left out.

    Args:
        side: that is scrambled.
        update: ΔW, (m, n), not zero.
        sums: of ΔW.
        U: (m, k), columns orthonormal.
        Vh: (k, n), rows orthonormal.
    """
    if side == "left":
        size, vectors, fourth = sums.shape[0], U, sums.rows
        turned = times(update, Vh.double().T)
    else:
        size, vectors, fourth = sums.shape[1], Vh.T, sums.columns
        turned = transposed_times(update, U.double())
    B = (turned / frobenius_norm(update)).cpu().numpy()
    gram, squares = B.T @ B, B**2
    k, energies, overlaps = np.arange(1.0, B.shape[1] + 1), gram.diagonal(), _diagonals(vectors).cpu().numpy()
    a, b, c = _averages(_corners(overlaps), k**2, k, size)
    traces, core_fourth = energies.cumsum(), (squares.cumsum(1) ** 2).sum(0)
    core = a * traces**2 + 2 * b * _corners(gram**2) + c * core_fourth
    pair = _averages(overlaps, np.ones_like(gram), np.eye(len(gram)), size)
    pairs = pair[0] * np.outer(energies, energies) + 2 * pair[1] * gram**2 + pair[2] * (squares.T @ squares)
    return {
        (f"coverage_{side}", side): _moments(k / size, a + 2 * b * sums.gram + c * fourth),
        ("coverage_core", "both"): _moments(k / size * traces, core),
        ("coverage_diagonal", "both"): _moments(traces / size, _corners(pairs)),
    }


def gaussian_coverage(sums: UpdateSums, U: Tensor, Vh: Tensor) -> CoverageMoments:
    """Exact moments of the coverages of independent normal entries, from the number of dimensions; see above.

    The share of d of D dimensions in the norm of a normal vector is Beta(d/2, (D − d)/2).
    """
    (m, n), most = sums.shape, len(Vh)

    def moments(dimensions: Callable[[int], int]) -> list[Moments]:
        whole, parts = m * n, [dimensions(k) for k in range(1, most + 1)]
        return [Moments(d / whole, math.sqrt(2 * d * (whole - d) / (whole + 2)) / whole) for d in parts]

    return {
        ("coverage_left", "left"): moments(lambda k: k * n),
        ("coverage_right", "right"): moments(lambda k: k * m),
        ("coverage_core", "both"): moments(lambda k: k * k),
        ("coverage_diagonal", "both"): moments(lambda k: k),
    }


def _corners(terms: Floats) -> Floats:
    """Sum of terms (k, k) over their first j rows and columns, for j = 1..k."""
    return np.asarray(terms).cumsum(0).cumsum(1).diagonal()


def _moments(mean: Floats, square: Floats) -> list[Moments]:
    """From the means and the means of squares, (k,) each."""
    variances = np.maximum(square - mean**2, 0)
    return [Moments(float(one), math.sqrt(two)) for one, two in zip(mean, variances, strict=True)]


def _diagonals(vectors: Tensor) -> Tensor:
    """`Σ_i u_ir² u_is²` of vectors (size, k), for every two of them, (k, k)."""
    squares = vectors.double().square()
    return squares.T @ squares


Averages = tuple[Floats, Floats, Floats]


def _averages(diagonal: Floats | int, traces: Floats | int, inner: Floats | int, size: int) -> Averages:
    """α, β, γ of two projectors; see `scrambled_coverage`."""
    d, pairs = np.asarray(diagonal, dtype=float), size * max(size - 1, 1)
    alpha, beta = (traces - d) / pairs, (inner - d) / pairs
    return alpha, beta, d / size - alpha - 2 * beta


def _second_moment(sums: UpdateSums, left: Averages, right: Averages) -> Floats:
    (a1, b1, c1), (a2, b2, c2) = left, right
    return np.asarray(
        a1 * a2
        + 2 * (a1 * b2 + b1 * a2 + b1 * b2) * sums.gram
        + 2 * b1 * b2
        + (a1 + 2 * b1) * c2 * sums.columns
        + c1 * (a2 + 2 * b2) * sums.rows
        + c1 * c2 * sums.entries
    )
