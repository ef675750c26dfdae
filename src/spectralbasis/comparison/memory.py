"""How much memory measuring a matrix takes, worked out from its shape."""

from spectralbasis.linalg import Leading, row_source
from spectralbasis.linalg.krylov import BLOCK
from spectralbasis.linalg.svd import gram_pays, krylov_pays
from spectralbasis.linalg.thresholds import leading_by_shape

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
    blocks = _BLOCKS * FLOAT32 * min(m * n, row_source.BLOCK_ENTRIES)
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
