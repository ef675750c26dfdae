"""What measuring a matrix consists of, worked out from its shape: how much work of which kind, step by step."""

from collections import Counter
from collections.abc import Mapping

from spectralbasis.comparison.memory import FLOAT32
from spectralbasis.comparison.sharing import UPDATE_DIRECTIONS
from spectralbasis.linalg.krylov import BLOCK
from spectralbasis.linalg.svd import gram_pays, krylov_pays

Work = Counter[str]
"""Amounts by kind of work: bytes of `KINDS_OF_BYTES`, floating-point operations of the others."""
KINDS_OF_BYTES = ("read", "pass")
KINDS = {
    "read": "bytes from disk",
    "pass": "bytes of float32 matrices that are hashed, permuted, added",
    "product64": "products of whole matrices in float64, as Gram matrices",
    "thin64": "products with k columns in float64",
    "thin32": "products with 16 columns in float32",
    "tridiagonal": "reductions of Gram matrices to tridiagonal form",
    "dense": "full singular value decompositions in float64",
}
PASSES_OF_A_PAIR = 12
"""How often a float32 matrix is passed through for each partner: finite values, equality, hash, difference, norms."""
PASSES_OF_A_DRAW = 8
"""The same for each draw of a null: rows, columns, signs, the sum, its check and norm."""


def operations(
    shape: tuple[int, int], k: int, *, draws: int, stored_bytes: int, partners: int = 1, trailing: bool = False
) -> dict[str, Work]:
    """What measuring one matrix of the base against its partners takes, by step.

    Spectra are taken to fall: in a flat one Krylov spaces grow to about twice the dimension, and where most tuned
    directions are new, intruders take one full decomposition more.

    Args:
        shape: (m, n).
        k: leading directions.
        draws: draws of the null for each partner; 0 for none.
        stored_bytes: of the matrix in the base and in its partners.
        partners: finetuned checkpoints that it is held against.
        trailing: whether the trailing directions are measured too.
    """
    m, n = shape
    matrix = FLOAT32 * m * n
    steps = {
        "read": Work({"read": stored_bytes, "pass": 2 * matrix * (1 + partners)}),
        "base": _triplets_and_values(m, n, k),
        "tuned": _times(partners, _triplets_and_values(m, n, k)),
        "update": _times(partners, _values(m, n) + _coverages(m, n, k) + Work({"pass": PASSES_OF_A_PAIR * matrix})),
        "null": _times(partners * draws, _draw(m, n, k)),
    }
    if trailing:
        steps["trailing"] = _times(1 + partners * (1 + draws), _trailing(m, n, k))
    if partners > 1:
        pairs = partners * (partners + 1) // 2
        directions = _times(partners, _triplets(m, n, min(UPDATE_DIRECTIONS, m, n)))
        steps["sharing"] = directions + Work(
            {"read": pairs * stored_bytes // (1 + partners), "pass": 6 * pairs * matrix}
        )
    return {step: work for step, work in steps.items() if work}


def total(steps: Mapping[str, Work]) -> Work:
    """All steps together."""
    return sum(steps.values(), Work())


def _times(count: int, work: Work) -> Work:
    return Work({kind: count * amount for kind, amount in work.items() if count})


def _draw(m: int, n: int, k: int) -> Work:
    return _triplets(m, n, k) + _coverages(m, n, k) + Work({"pass": PASSES_OF_A_DRAW * FLOAT32 * m * n})


def _triplets(m: int, n: int, k: int) -> Work:
    """`linalg.leading_svd`, by the solver that it chooses."""
    return _krylov(m, n, k) if krylov_pays(m, n, k) else _triplets_and_values(m, n, k)


def _triplets_and_values(m: int, n: int, k: int) -> Work:
    """`linalg.leading_svd_and_values`, by the solver that it chooses."""
    if not gram_pays(m, n, k):
        return _dense(m, n) + _values(m, n)
    short = min(m, n)
    return _values(m, n) + _ritz(m, n, k + 1) + Work({"thin64": 4 * short**2 * (k + 1)})


def _values(m: int, n: int) -> Work:
    """`linalg.singular_values`: a Gram matrix, and its reduction."""
    short, long = min(m, n), max(m, n)
    return Work({"product64": 2 * long * short**2, "tridiagonal": 4 * short**3 // 3})


def _krylov(m: int, n: int, k: int) -> Work:
    """Block Lanczos until a falling spectrum lets it end, then Rayleigh–Ritz on what is kept of its space."""
    short = min(m, n)
    dimensions = 3 * k + 2 * BLOCK
    orthogonalisation = 4 * short * dimensions**2  # two passes of space @ (space.T @ W) over a growing space
    choice = 2 * short * dimensions * (k + BLOCK)
    projected = Work({"tridiagonal": 4 * dimensions**3 // 3, "thin64": 4 * dimensions**2 * k})
    return Work({"thin32": 4 * m * n * dimensions + orthogonalisation + choice}) + projected + _ritz(m, n, k + BLOCK)


def _ritz(m: int, n: int, p: int) -> Work:
    """Rayleigh–Ritz in float64 on p columns: products there and back, two orthonormal bases, their turning."""
    return Work({"thin64": 4 * m * n * p + 6 * (m + n) * p**2})


def _coverages(m: int, n: int, k: int) -> Work:
    return Work({"thin64": 4 * m * n * k})


def _dense(m: int, n: int) -> Work:
    """A full decomposition (Golub & Van Loan, R-SVD): reduction, iteration and both factors."""
    short, long = min(m, n), max(m, n)
    return Work({"dense": 6 * long * short**2 + 20 * short**3})


def _trailing(m: int, n: int, k: int) -> Work:
    """All eigenvectors of a Gram matrix, by divide and conquer."""
    short, long = min(m, n), max(m, n)
    return Work({"product64": 2 * long * short**2 + 4 * short**3, "tridiagonal": 4 * short**3 // 3}) + _coverages(
        m, n, k
    )
