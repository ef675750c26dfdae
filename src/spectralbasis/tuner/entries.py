"""Entries of sparse coefficients as a config holds them: one string for each matrix."""

import torch
from torch import Tensor

from spectralbasis.errors import InputError


def pack_positions(positions: Tensor) -> str:
    """Row-major positions `i·k + j`, ascending, as gaps in decimal: the first position, then each less the one before.

    Gaps are short, so that an entry takes 2 to 4 bytes, and JSON keeps the string on one line.
    """
    return " ".join(map(str, torch.diff(positions, prepend=positions.new_zeros(1)).tolist()))


def unpack_positions(text: str, k: int) -> Tensor:
    """Row-major positions in a k×k matrix, ascending, (numbers,) int64.

    Raises:
        InputError: the text is damaged, or names a position outside of the matrix.
    """
    gaps = text.split() if isinstance(text, str) else []
    if gaps and all(gap.isascii() and gap.isdigit() and len(gap) <= 12 for gap in gaps):
        positions = torch.tensor([int(gap) for gap in gaps]).cumsum(0)
        if bool((positions.diff() > 0).all()) and int(positions[-1]) < k * k:
            return positions
    raise InputError(
        f"the entries {str(text)[:40]!r} are no gaps between positions in a {k}×{k} matrix; restore adapter_config.json"
    )
