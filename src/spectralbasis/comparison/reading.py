"""How matrices come into a comparison: whole, or row by row where there is no room for that."""

from collections.abc import Iterable

import torch
from torch import Tensor

from spectralbasis.checkpoints import Matrix
from spectralbasis.comparison.memory import row_block_memory, working_memory
from spectralbasis.linalg.row_source import MatrixLike, Rows, RowSource, row_slices
from spectralbasis.sizes import format_size


def read_matrix(matrix: Matrix, device: str, by_rows: bool, where: str) -> MatrixLike:
    """The matrix in float32 where the comparison works on it, or a source of its rows.

    Raises:
        ValueError: it holds NaN or infinite values.
    """
    W = _row_source(matrix, device) if by_rows else matrix.read().to(device=device, dtype=torch.float32)
    bad = sum(int((~torch.isfinite(W[rows])).sum()) for rows in row_slices(W))
    if bad:
        size = matrix.shape[0] * matrix.shape[1]
        raise ValueError(f"{bad} of {size} values in {where} are NaN or infinite; this matrix has no spectrum")
    return W


def _row_source(matrix: Matrix, device: str) -> RowSource:
    numbers, stored = torch.arange(matrix.shape[0]), matrix.open_rows()

    def read(rows: Rows) -> Tensor:
        chosen = numbers[rows] if isinstance(rows, slice) else rows.cpu()
        return stored(chosen).to(device=device, dtype=torch.float32)

    return RowSource(matrix.shape, read, torch.device(device))


def fits_whole(shape: tuple[int, int], k: int, trailing: bool, budget: int | None) -> bool:
    """Whether a matrix can be measured whole within so many bytes."""
    return budget is None or working_memory(*shape, k, trailing=trailing) <= budget


def check_row_blocks(matrices: Iterable[Matrix], k: int, kept: int, trailing: bool, budget: int) -> None:
    """Check that matrices of one shape can be measured in row blocks within so many bytes.

    Args:
        matrices: the base's and one partner.
        k: leading directions.
        kept: triplets that are kept until all partners are measured.
        trailing: whether the trailing directions are measured too.
        budget: bytes.

    Raises:
        ValueError: they cannot.
    """
    matrices = list(matrices)
    m, n = matrices[0].shape
    held = sum(matrix.held_bytes for matrix in matrices)
    needed = held + row_block_memory(m, n, k, kept=kept, trailing=trailing)
    if needed > budget:
        why = f", {format_size(held)} of it for what cannot be read by rows from its file" if held else ""
        raise ValueError(
            f"measuring {m}×{n} values in row blocks takes {format_size(needed)}{why}, and the memory budget is "
            f"{format_size(budget)}; pass --memory-budget {format_size(needed, up=True)} or more"
        )
