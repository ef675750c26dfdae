"""The numbers of all tasks: rows in memory or in a mapped file, none of which ever moves."""

from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

_FIRST_CHUNK = 256


class BankRows:
    """Rows of equal width in chunks. It grows by chunks as large as all before, so no row is copied or moved.

    Memory that was never written takes no room, so a chunk costs what its rows in use hold.

    Args:
        first: rows to begin with, (rows, width).
    """

    def __init__(self, first: Tensor) -> None:
        self._chunks = [first]
        self._starts = [0]

    def __len__(self) -> int:
        return self._starts[-1] + len(self._chunks[-1])

    @property
    def dtype(self) -> torch.dtype:
        """In which numbers are held."""
        return self._chunks[0].dtype

    @property
    def width(self) -> int:
        """Numbers in a row."""
        return self._chunks[0].shape[1]

    def grow(self) -> None:
        """Make room for as many rows again."""
        fresh = torch.empty(max(_FIRST_CHUNK, len(self)), self.width, dtype=self.dtype)
        self._starts.append(len(self))
        self._chunks.append(fresh)

    def write(self, slot: int, row: Tensor) -> None:
        """Set one row."""
        index = max(i for i, start in enumerate(self._starts) if start <= slot)
        self._chunks[index][slot - self._starts[index]] = row

    def read(self, slots: Sequence[int]) -> Tensor:
        """Copies of rows, (len(slots), width)."""
        wanted = torch.tensor(slots, dtype=torch.int64)
        if len(self._chunks) == 1:
            return self._chunks[0].index_select(0, wanted)
        found = torch.empty(len(wanted), self.width, dtype=self.dtype)
        for start, chunk in zip(self._starts, self._chunks, strict=True):
            here = ((wanted >= start) & (wanted < start + len(chunk))).nonzero().squeeze(1)
            if len(here):
                found[here] = chunk.index_select(0, wanted[here] - start)
        return found

    def save(self, slots: Sequence[int], file: IO[bytes]) -> None:
        """Write rows one after the other as bytes."""
        for start in range(0, len(slots), _FIRST_CHUNK):
            file.write(self.read(slots[start : start + _FIRST_CHUNK]).view(torch.uint8).numpy().data)


def map_rows(path: Path, offset: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Rows of a file, read when they are used and shared by all processes that map it; a change stays in this one."""
    columns = shape[1] * dtype.itemsize
    return torch.from_numpy(np.memmap(path, np.uint8, "c", offset, (shape[0], columns))).view(dtype)
