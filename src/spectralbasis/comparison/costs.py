"""How much memory measuring a matrix takes, worked out from its shape.

What measuring a matrix consists of, worked out from its shape: how much work of which kind, step by step.

How fast a machine does each kind of work, from a measurement of a few seconds.
"""

import math
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from spectralbasis.comparison.nulls import scrambled
from spectralbasis.comparison.sharing import UPDATE_DIRECTIONS
from spectralbasis.linalg import Leading, row_blocks
from spectralbasis.linalg.row_blocks import back_and_forth, gram, times_and_back
from spectralbasis.linalg.solvers import BLOCK, eigenvalues
from spectralbasis.linalg.svd import gram_pays, krylov_pays
from spectralbasis.linalg.thresholds import leading_by_shape
from spectralbasis.triplets import matrix_hash

FLOAT32, FLOAT64 = 4, 8
PROCESS_MEMORY = 450_000_000
"""Bytes of an interpreter with torch and this package, before it has read anything."""
USUAL_LEADING = 64
"""k assumed when it depends on the spectrum."""
_BLOCKS = 24
"""Blocks of rows in float32 that a process grows by: those of base, tuned, update and draw, the widened one, and what
lies free between them, of which allocators leave more or less (20 were seen)."""


def expected_k(leading: Leading, shape: tuple[int, int]) -> int:
    """How many directions a setting means for a matrix of shape (m, n), as far as the shape tells."""
    known = leading_by_shape(leading, shape)
    return min(USUAL_LEADING, *shape) if known is None else known


def working_memory(m: int, n: int, k: int, *, trailing: bool = False) -> int:
    """Bytes that measuring one (m, n) matrix against one partner takes at most, beside the interpreter's own.

    Seven float32 matrices are held while a null is drawn: base, tuned, update, the last draw's update and sum, and two
    on the way to the next. A decomposition runs beside five of them.

    Args:
        m: rows.
        n: columns.
        k: leading directions.
        trailing: whether the trailing directions are measured too, which takes all eigenvectors.
    """
    matrix = FLOAT32 * m * n
    return max(7 * matrix, 5 * matrix + _solver_memory(m, n, k, trailing), 3 * matrix + _dense_memory(m, n))


def row_block_memory(m: int, n: int, k: int, *, kept: int = 0, trailing: bool = False) -> int:
    """Bytes that measuring one (m, n) matrix in row blocks takes at most, beside what cannot be read by rows.

    The Gram matrix of the smaller side is the largest part; that of a wide matrix comes from blocks of its own size,
    and all its eigenvectors take several more.

    Args:
        m: rows.
        n: columns.
        k: leading directions.
        kept: triplets that are kept until all partners of the matrix are measured.
        trailing: whether the trailing directions are measured too.
    """
    short = min(m, n)
    dimensions = min(short // 2, 6 * k + 20 * BLOCK) + BLOCK
    krylov = FLOAT32 * dimensions * short + 3 * FLOAT64 * dimensions**2
    gram = FLOAT64 * short**2 * (7 if trailing else 2 if m < n else 1)
    blocks = _BLOCKS * FLOAT32 * min(m * n, row_blocks.BLOCK_ENTRIES)
    return blocks + max(gram, krylov) + (6 * FLOAT64 + kept * FLOAT32) * k * (m + n)


def _solver_memory(m: int, n: int, k: int, trailing: bool) -> int:
    """Bytes of the solver that `linalg.svd` chooses for k directions, the matrix itself left out."""
    short = min(m, n)
    if trailing:
        return max(_dense_memory(m, n), 3 * FLOAT64 * short**2)
    gram = 2 * FLOAT64 * short**2 + 4 * FLOAT64 * k * (m + n)
    if krylov_pays(m, n, k):
        dimensions = min(short // 2, 6 * k + 20 * BLOCK) + BLOCK
        return max(gram, FLOAT32 * dimensions * short + FLOAT64 * dimensions**2)
    return gram if gram_pays(m, n, k) else _dense_memory(m, n)


def _dense_memory(m: int, n: int) -> int:
    """Bytes of a full decomposition in float64: the matrix, LAPACK's copy, both factors and their workspace.

    It is the last resort of every solver, and what doubtful intruders are settled by.
    """
    return FLOAT64 * (4 * m * n + 9 * min(m, n) ** 2)


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


Clock = Callable[[], float]
Points = tuple[tuple[int, float], ...]
"""Smaller side of a matrix, and the amount per second there, by ascending side."""
REPEATS = 5
COLUMNS = 64
PASSES = 8
"""Passes through a float32 matrix in `_pass`."""
PIECE = 64_000_000
"""Bytes that are read to see how fast a disk is."""


@dataclass(frozen=True)
class Rates:
    """Amounts per second by kind of work.

    Attributes:
        by_side: kind → (smaller side of the matrix, amount per second), by ascending side; between two sides the rate
            is interpolated on logarithms, beyond them it is that of the last.
        overhead: seconds that each matrix takes whatever its size.
    """

    by_side: Mapping[str, Points]
    overhead: float = 0.0

    def seconds(self, work: Work, side: int) -> float:
        """How long work on a matrix of this smaller side takes, without the overhead."""
        return sum(amount / self.rate(kind, side) for kind, amount in work.items())

    def rate(self, kind: str, side: int) -> float:
        """Amount per second at this side."""
        points = self.by_side[kind]
        after = next((position for position, (known, _) in enumerate(points) if known >= side), len(points) - 1)
        (low, slow), (high, fast) = points[max(after - 1, 0)], points[after]
        if high == low or side >= high:
            return fast
        share = max(0.0, math.log(side / low) / math.log(high / low))
        return slow ** (1 - share) * fast**share


def calibrate(file: Path | None, threads: int, *, clock: Clock = time.perf_counter) -> Rates:
    """Measure this machine; takes a few seconds.

    Args:
        file: read to see how fast its disk is; None where no weights are read.
        threads: to compute with.
        clock: what time is taken by.
    """

    def measured(work: Callable[[Tensor], object], amount: Callable[[int], float], *sides: int) -> Points:
        return tuple((side, amount(side) / _typical(work, _matrix(side, side), clock)) for side in sides)

    with _threads(threads):
        return Rates(
            {
                "read": ((1, math.inf if file is None else read_rate(file, clock)),),
                "pass": measured(_pass, lambda side: PASSES * FLOAT32 * side**2, 512, 2048),
                "product64": measured(gram, lambda side: 2 * side**3, 256, 768, 1536),
                "thin64": measured(_thin64, lambda side: 4 * side**2 * COLUMNS, 384, 1024, 2048),
                "thin32": measured(_thin32, lambda side: 4 * side**2 * BLOCK, 512, 1024, 2048),
                "tridiagonal": measured(_tridiagonal, lambda side: 4 * side**3 / 3, 256, 512, 1024),
                "dense": measured(_dense_rate, lambda side: 26 * side**3, 128, 384),
            }
        )


def read_rate(file: Path, clock: Clock = time.perf_counter) -> float:
    """Bytes per second that a file is read with; it is dropped from the system's cache first, where that can be."""
    with file.open("rb", buffering=0) as opened:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(opened.fileno(), 0, PIECE, os.POSIX_FADV_DONTNEED)
        started = clock()
        count = len(opened.read(PIECE))
        return count / max(clock() - started, 1e-9)


def _typical(work: Callable[[Tensor], object], A: Tensor, clock: Clock) -> float:
    """The median of the seconds that some calls take, after one to warm up."""
    work(A)
    seconds = []
    for _ in range(REPEATS):
        started = clock()
        work(A)
        seconds.append(clock() - started)
    return max(statistics.median(seconds), 1e-9)


def _matrix(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def _pass(A: Tensor) -> None:
    """Pass through a matrix `PASSES` times: scramble it (4), hash it (2), add (1), compare (1)."""
    drawn = scrambled(A, torch.Generator().manual_seed(0))
    matrix_hash(drawn)
    torch.equal(A + drawn, A)


def _thin64(A: Tensor) -> None:
    times_and_back(A, _matrix(A.shape[1], COLUMNS).double())


def _thin32(A: Tensor) -> None:
    back_and_forth(A, _matrix(A.shape[1], BLOCK), 1.0)


def _tridiagonal(A: Tensor) -> None:
    eigenvalues(A.double())


def _dense_rate(A: Tensor) -> None:
    torch.linalg.svd(A.double(), full_matrices=False)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Compute with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with threadpool_limits(count):
            yield
    finally:
        torch.set_num_threads(before)
