"""Mean and standard deviation of the overlap of leading subspaces under a null, without draws.

The overlap comes from the resolvent of `W0 + E`. For a random E of known singular values it has a deterministic limit,
the rectangular free convolution (Benaych-Georges, Probab. Theory Relat. Fields 144, 2009; for the overlaps of singular
vectors: Ledoit & Péché, Probab. Theory Relat. Fields 151, 2011; Bun et al., Physics Reports 666, 2017): with
`w = σ²` on the side of the base and `ζ = σ'²` on the side of the sum,

    ζ(w) = w (1 + K/A) (1 + K/B),   A(w) = Σ_i w/(w − σ_i²) + m − p,   B(w) = A(w) + n − m,   p = min(m, n),

where `K` depends on the singular values of E and on `P = A B / (m n w)` alone (`SelfEnergy`). The share of the base's
i-th left vector in the k leading ones of the sum is the contour integral of `ζ' / (1 + K/B) / (w − σ_i²)` around the k
leading values. It is exact to second order in E, and to all orders for matrices without few dominant pairs of vectors.
`rotations` says where it holds: there the mean is within 5 % of that of many draws (docs/mathematics.md).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special

from spectralbasis.comparison.coverage_moments import Floats, Moments

Complexes = NDArray[np.complex128]


@dataclass(frozen=True)
class SelfEnergy:
    """`K(P)` of a random update E that is as likely in every orientation; see the head of this file.

    `K = Σ τ² Q / (1 − τ² Q)` over the singular values τ of E, with `P = Q (1 + K/m) (1 + K/n)`. For independent normal
    entries this is `K = ‖E‖_F² P`.

    Attributes:
        shape: (m, n).
        norm: `‖E‖_F²`.
        inverse_rank: `Σ τ⁴ / (Σ τ²)²`, between 1/rank and 1.
        squares: τ², the largest ones alone, the others in groups; None for independent normal entries.
        counts: how many each of `squares` stands for.
    """

    shape: tuple[int, int]
    norm: float
    inverse_rank: float
    squares: Floats | None = None
    counts: Floats | None = None

    def __call__(self, P: Complexes) -> tuple[Complexes, Complexes, Complexes]:
        """K, `dK/dP` and `2K − ∫ K dP/P` at P, (points,); NaN where Newton's method does not converge."""
        if self.squares is None or self.counts is None:
            return self.norm * P, np.full_like(P, self.norm), self.norm * P
        m, n = self.shape
        Q = P / ((1 + self.norm * P / m) * (1 + self.norm * P / n))
        for _ in range(NEWTON_STEPS):
            rest = 1 - self.squares * Q[:, None]
            K = (self.counts * self.squares * Q[:, None] / rest).sum(1)
            slope = (self.counts * self.squares / rest**2).sum(1)
            a, b = 1 + K / m, 1 + K / n
            derivative = a * b + Q * slope * (b / m + a / n)
            step = (Q * a * b - P) / derivative
            if bool((np.abs(step) <= 1e-12 * np.abs(Q)).all()):
                potential = (self.counts * np.log(rest)).sum(1) + m * np.log(a) + n * np.log(b)
                return K, slope / derivative, potential
            Q = Q - step * np.minimum(1, 0.5 * np.abs(Q) / np.maximum(np.abs(step), TINY))
        nothing = np.full_like(P, math.nan)
        return nothing, nothing, nothing


def scrambled_energy(values: Floats, shape: tuple[int, int]) -> SelfEnergy:
    """Of an update with these singular values, (min(m, n),), in a random orientation."""
    squares = np.sort(values**2)[::-1]
    norm, inverse_rank = float(squares.sum()), float((squares**2).sum() / squares.sum() ** 2)
    squares = squares[squares > 1e-14 * squares[0]]
    groups = [*squares[:SINGLE].reshape(-1, 1), *np.array_split(squares[SINGLE:], SINGLE)]
    groups = [group for group in groups if group.size]
    counts = np.array([float(group.size) for group in groups])
    return SelfEnergy(shape, norm, inverse_rank, np.array([group.mean() for group in groups]), counts)


def gaussian_energy(values: Floats, shape: tuple[int, int]) -> SelfEnergy:
    """Of independent normal entries with the norm of an update that has these singular values."""
    return SelfEnergy(shape, float((values**2).sum()), 1 / shape[0] + 1 / shape[1])


NEWTON_STEPS = 60
TINY = 1e-300
SINGLE = 32
"""How many of the update's singular values count one by one; the rest count in as many groups."""
RESONANCE = 0.3
"""Largest `τ1² |P|` at σ_k: from 1 on, the update's first singular value adds a direction among the leading ones."""
CLOSE_PAIRS = 0.03
"""Largest share of mixing within single pairs of vectors while σ_k stays apart from σ_{k+1}."""
FEW_PAIRS = 0.6
"""Largest standard deviation of the rotation over its mean where σ_k and σ_{k+1} run into each other."""
ISOLATED, MERGED = 0.02, 0.35
"""Largest strength of all other pairs, and of the pair of σ_k and σ_{k+1}, where that pair is treated as two values."""
ONE_DIRECTION = 0.03
"""Largest strength of that pair times the squared inverse rank: of an update of rank 1 the pair has another law."""
SOLVER_ERROR = 25
"""Least rotation over the squared error bound of the triplets, so that the error is at most 4 % of it."""


@dataclass(frozen=True)
class Side:
    """The left or the right vectors of `W0 + E`.

    Attributes:
        rotation: mean of `1 − φ`.
        std: its standard deviation.
        squares: sum over pairs of vectors of the squares of their means, over k².
        inside: mean share of vectors of the base in the k leading ones of the sum, by groups of them: see `_grouped`;
            last of those of its null space.
        multiplicity: how many vectors each group has.
    """

    rotation: float
    std: float
    squares: float
    inside: Floats
    multiplicity: Floats

    @property
    def overlap(self) -> Moments:
        """Of the base's k leading vectors with those of the sum."""
        return Moments(1 - self.rotation, self.std)


Rotations = dict[int, tuple[Side, Side]]
"""Number of leading directions → left and right."""


def rotations(base: Floats, energy: SelfEnergy, grid: Sequence[int], error_bound: float = 0.0) -> Rotations | None:
    """The rotation of the k leading vectors, left and right, for every k of the grid; None where it is uncertain.

    It is refused where the update's first singular value is near those of the base at k (`RESONANCE`), where few pairs
    of vectors with nearly equal values carry the rotation (`CLOSE_PAIRS`, `FEW_PAIRS`), where the rotation is not
    above the error of the solver (`SOLVER_ERROR`), for all directions of a matrix, and where the equations have no
    solution.

    Args:
        base: all singular values of W0, (p,), descending.
        energy: of the random update.
        grid: numbers of directions.
        error_bound: sum of the bounds on the sine between computed and true leading subspaces of W0 and W1, of as many
            directions as the largest number of the grid.
    """
    found: Rotations = {}
    last = max(grid)
    for k in grid:
        with np.errstate(all="ignore"):
            sides = _rotation(base, energy, k)
        if sides is None:
            return None
        # The bound is residuals over the gap at the largest k; at a wider gap it is smaller.
        narrower = (base[last - 1] - base[last]) / (base[k - 1] - base[k]) if last < len(base) else 1.0
        error = error_bound * min(1.0, narrower)
        if min(side.rotation for side in sides) * k < SOLVER_ERROR * error**2:
            return None
        found[k] = sides
    return found


class _Map(NamedTuple):
    """`ζ(w)` and what goes with it at points w, (points,).

    Attributes:
        zeta: ζ.
        slope: `dζ/dw`.
        left: `ζ' / (1 + K/B) − 1`.
        right: `ζ' / (1 + K/A) − 1`.
        potential: its imaginary part over π is the number of singular values beyond a point of the cut.
        potential_slope: its derivative.
        P: argument of the self-energy.
    """

    zeta: Complexes
    slope: Complexes
    left: Complexes
    right: Complexes
    potential: Complexes
    potential_slope: Complexes
    P: Complexes


def _grouped(base: Floats, k: int) -> tuple[Floats, Floats]:
    """Squared singular values and how many each stands for: those near the first k alone, those far below in groups."""
    squares, near = base**2, min(2 * k + SINGLE, len(base))
    if near == len(base):
        return squares, np.ones(near)
    starts = np.unique(np.linspace(near, len(base), 2 * SINGLE + 1)[:-1].astype(int))
    sizes = np.diff(np.append(starts, len(base))).astype(float)
    means = np.add.reduceat(squares, starts) / sizes
    return np.append(squares[:near], means), np.append(np.ones(near), sizes)


def _map(w: Complexes, squares: Floats, counts: Floats, energy: SelfEnergy) -> _Map:
    (m, n), p = energy.shape, float(counts.sum())
    apart = w[:, None] - squares
    inverse = 1 / apart
    total, total_slope = inverse @ counts, -(inverse**2) @ counts
    A, B, slope = w * total + (m - p), w * total + (n - p), total + w * total_slope
    P = A * B / (m * n * w)
    K, K_slope, potential = energy(P)
    K_slope = K_slope * (slope * (A + B) / (m * n * w) - P / w)
    u, v = 1 + K / A, 1 + K / B
    u_slope, v_slope = (K_slope - K * slope / A) / A, (K_slope - K * slope / B) / B
    zeta, zeta_slope = w * u * v, u * v + w * (u_slope * v + u * v_slope)
    count = np.log(apart) @ counts + (m - p) * np.log(w) - (n - m) * np.log(v) + potential
    return _Map(
        zeta,
        zeta_slope,
        K / A + w * (u_slope + u * v_slope / v),
        K / B + w * (v_slope + v * u_slope / u),
        count,
        (A + K) / zeta * zeta_slope,
        P,
    )


def _rotation(base: Floats, energy: SelfEnergy, k: int) -> tuple[Side, Side] | None:
    if not 0 < k < len(base) or not base[k - 1] > base[k] > 0 or energy.norm == 0:
        return None
    squares, counts = _grouped(base, k)
    cut = _cut(squares, counts, energy, k)
    if cut is None:
        return None
    start, apart = cut
    scale = squares[k - 1] - squares[k] + abs(start.imag)
    # From the cut upwards, in logarithmic steps; the first weight is that of the stretch below the first of them.
    reach = math.log(1e-3 * scale), math.log(1e8 * squares[0])
    nodes, weights = _gauss_legendre()
    heights = np.exp(reach[0] + (reach[1] - reach[0]) * (nodes + 1) / 2)
    weights = weights * (reach[1] - reach[0]) / 2 * heights
    heights, weights = np.append(0.5e-3 * scale, heights), np.append(1e-3 * scale, weights)
    path = _map(start + 1j * heights, squares, counts, energy)
    largest = energy.squares[0] if energy.squares is not None else 0.0
    if not largest * abs(path.P[0]) <= RESONANCE:
        return None
    gain = float(abs(energy(path.P[:1])[1][0])) / energy.norm
    values = np.append(squares, 0.0)
    kernel = 1j * weights[:, None] / (start + 1j * heights[:, None] - values)
    before = np.angle(start - values + 0j) / math.pi
    m, n = energy.shape
    sides = []
    for size, factor in ((m, path.left), (n, path.right)):
        inside = before - (factor[:, None] * kernel).sum(0).imag / math.pi
        side = _side(inside, np.append(counts, size - counts.sum()), squares, energy, k, apart, gain)
        if side is None:
            return None
        sides.append(side)
    return sides[0], sides[1]


NODES = 72
"""Points of the contour integral."""


@lru_cache(maxsize=1)
def _gauss_legendre() -> tuple[Floats, Floats]:
    """Nodes and weights on [-1, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    return nodes, weights


def _cut(squares: Floats, counts: Floats, energy: SelfEnergy, k: int) -> tuple[complex, bool] | None:
    """Where the contour around the k leading values crosses the real axis of ζ, in w; and whether σ_k stays apart.

    Between σ_{k+1}² and σ_k² where ζ grows with w there: no value of the sum lies in between. Else at the point of the
    upper half-plane where ζ is real and k values lie beyond it.
    """
    low, high = squares[k], squares[k - 1]
    between = low + (high - low) * np.linspace(0.1, 0.9, 9)
    found = _map(between + 1e-9j * (high - low), squares, counts, energy)
    open_ = (found.slope.real > 0) & (np.abs(found.potential.imag / math.pi - k) < 1e-3)
    if open_.any():
        return complex(between[np.argmax(np.where(open_, found.slope.real, -1))]), True
    wide = max(high - low, math.sqrt(energy.norm / math.prod(energy.shape) * low))
    for height in (1.0, 0.3, 3.0, 0.1, 10.0):
        w = complex((low + high) / 2, height * wide)
        for _ in range(NEWTON_STEPS):
            at = _map(np.array([w]), squares, counts, energy)
            slope, count_slope = complex(at.slope[0]), complex(at.potential_slope[0])
            error = np.array([at.zeta[0].imag, at.potential[0].imag - math.pi * k])
            slopes = np.array([[slope.imag, slope.real], [count_slope.imag, count_slope.real]])
            determinant = slopes[0, 0] * slopes[1, 1] - slopes[0, 1] * slopes[1, 0]
            if not (math.isfinite(determinant) and determinant and np.isfinite(error).all()):
                break
            along, upwards = np.linalg.solve(slopes, error)
            step = complex(float(along), float(upwards))
            w -= step * min(1.0, 0.5 * w.imag / max(abs(step), TINY))
            if abs(step) < 1e-9 * w.imag:
                return w, False
    return None


def _side(
    inside: Floats, multiplicity: Floats, squares: Floats, energy: SelfEnergy, k: int, apart: bool, gain: float
) -> Side | None:
    """Mean and standard deviation of the rotation from the mean shares; None where they are uncertain.

    The shares are spread over pairs (i ≤ k < j) in the proportions of second-order perturbation, and scaled to the
    sums over i and over j. The variance of a pair is that of `_pair_table`. Pairs of one vector i vary together: for an
    update `Σ τ_a x_a y_aᵀ` the coefficient of a pair is a sum over a of `τ_a (σ_i x_aj y_ai + σ_j x_ai y_aj)`, and its
    two parts have the shares `σ_i²` and `σ_j²` of `σ_i² + σ_j²`; so do pairs of one vector j.

    Pairs with nearly equal values mix more than in the limit of large matrices: where σ_k stays apart, by four times
    the sum of their squared shares, which fits draws; where σ_k and σ_{k+1} are far from all others, they mix as two
    values alone do, with the second-order strength times `gain`, which is what an update of low rank adds to it
    (`dK/dP` over its value at P = 0).
    """
    counted = multiplicity[k:]
    leaving, entering = np.clip(1 - inside[:k], TINY, 1), np.clip(inside[k:], TINY, 1) * counted
    lost, gained = float((1 - inside[:k]).sum()), float((inside[k:] * counted).sum())
    if not (lost > 0 and abs(lost - gained) <= 0.03 * lost):
        return None
    i, j = squares[:k, None], np.append(squares[k:], 0.0)
    bare = energy.norm / math.prod(energy.shape) * (i + j) / (i - j) ** 2
    pairs = bare / (1 + 2 * bare) * counted
    for _ in range(4):
        pairs *= entering / np.maximum(pairs.sum(0), TINY)
        pairs *= (leaving / np.maximum(pairs.sum(1), TINY))[:, None]
    each = pairs / np.maximum(counted, 1)
    total, within = (lost + gained) / 2, float((each**2 * counted).sum())
    table = _pair_table(float(f"{energy.inverse_rank:.1e}"))
    closest = float(each[-1, 0])
    others = bare * np.minimum(counted, 1)
    others[-1, 0] = 0
    isolated = others.max() <= ISOLATED and bare[-1, 0] <= MERGED
    total += 4 * within * apart
    if isolated:
        if bare[-1, 0] * gain * energy.inverse_rank**2 > ONE_DIRECTION:
            return None
        strength = math.log(bare[-1, 0] * gain)
        alone = math.exp(strength + np.interp(strength, table.strengths, table.means - table.strengths))
        total += alone - closest - 4 * closest**2 * apart
        each[-1, 0], pairs[-1, 0] = alone, alone
    elif apart and within > CLOSE_PAIRS * total:
        return None
    ratios = np.interp(np.log(np.maximum(each, TINY)), table.means, table.ratios)
    first, second = i / (i + j), j / (i + j)
    together = -2 * (each**2 * counted * (first**2 + second**2)).sum()
    for part in (first, second):
        together += ((pairs * part).sum(1) ** 2).sum() + ((each * part).sum(0) ** 2 * counted).sum()
    variance = float((each**2 * ratios * counted).sum() + 2 * energy.inverse_rank * together)
    rotation, std = total / k, math.sqrt(max(variance, 0.0)) / k
    if not isolated and not apart and std > FEW_PAIRS * rotation:
        return None
    return Side(rotation, std, float((each**2 * counted).sum()) / k**2, inside, multiplicity)


class _Pairs(NamedTuple):
    """Logarithms of the strength of a pair and of the mean of its `sin² θ`; the variance over the squared mean."""

    strengths: Floats
    means: Floats
    ratios: Floats


@lru_cache(maxsize=256)
def _pair_table(inverse_rank: float) -> _Pairs:
    """Mean and variance of `sin² θ` for a pair of vectors by its strength, which is the mean to second order.

    Two singular values at a distance 1 turn by θ with `tan 2θ = y / x`, where x and y are normal with means 1 and 0 and
    one variance s², four times the strength. Then `E cos 2θ = √(πu/2) e^{−u} (I0(u) + I1(u))` and
    `E cos 4θ = 1 − (1 − e^{−2u}) / 2u` with `u = 1 / 4s²` (the phase of Rice's law). For updates of low rank s² is
    itself random: Gamma of variance `inverse_rank` about its mean, which is exact for equal singular values.
    """
    ranks = (np.arange(24) + 0.5) / 24
    spread = special.gammaincinv(1 / inverse_rank, ranks) * inverse_rank if inverse_rank > 1e-4 else np.ones(1)
    spread = np.maximum(spread / spread.mean(), 1e-6)
    strengths = np.logspace(-6, 3, 181)
    u = 1 / (16 * strengths[:, None] * spread)
    once = np.sqrt(np.pi * u / 2) * (special.ive(0, u) + special.ive(1, u))
    twice = 1 + np.expm1(-2 * u) / (2 * u)
    means = ((1 - once) / 2).mean(1)
    squares = ((1 - 2 * once + (1 + twice) / 2) / 4).mean(1)
    return _Pairs(np.log(strengths), np.log(means), squares / means**2 - 1)


def shared_overlap(a: Side, b: Side, k: int) -> Moments:
    """Overlap of the k leading subspaces of `W0 + E_a` and `W0 + E_b` with two independent random updates.

    The mean of each projector is diagonal in the base's vectors, so that the mean overlap is the sum of the products of
    their shares. To second order the coefficients of each pair of vectors are subtracted, so that the variances add,
    and four times the product of the means of each pair.
    """
    inside = float((a.inside * b.inside * a.multiplicity).sum()) / k
    corrected = sum(side.rotation - float((1 - side.inside[:k]).mean()) for side in (a, b))
    std = math.sqrt(a.std**2 + b.std**2 + 4 * math.sqrt(a.squares * b.squares))
    return Moments(min(max(inside - corrected, 0.0), 1.0), std)
