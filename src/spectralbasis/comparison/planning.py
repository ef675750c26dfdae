"""What a comparison will need, worked out from shapes alone: memory, bytes to read, floating-point operations, time."""

from spectralbasis.linalg.krylov import BLOCK
from spectralbasis.linalg.svd import gram_pays, krylov_pays

FLOAT32, FLOAT64 = 4, 8


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
    return FLOAT64 * (3 * m * n + 6 * min(m, n) ** 2)
