"""Numbers that lie one after the other in a file."""

from collections.abc import Sequence
from io import RawIOBase
from math import prod
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor

from spectralbasis.errors import InputError
from spectralbasis.sizes import check_memory

Run = tuple[int, int]
"""Where consecutive bytes begin in a file, and how many they are."""

SAMPLES, PIECE = 16, 4096


def read_tensor(path: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The tensor whose bytes start at `offset`, copied so that the file need not stay open or mapped.

    Raises:
        InputError: the file is gone, cannot be read, or ends before the tensor does.
    """
    return _read_runs(path, [(offset, prod(shape) * dtype.itemsize)], shape, dtype)


def take_rows(path: Path, offset: int, rows: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Some rows of the matrix whose bytes start at `offset`, (count, width), read in the order given.

    Args:
        path: the file.
        offset: where row 0 starts.
        rows: their numbers, (count,) int64; rows that follow each other are read at once.
        width: entries of a row.
        dtype: of an entry.

    Raises:
        InputError: as `read_tensor` does.
    """
    numbers, size = rows.numpy(), width * dtype.itemsize
    starts = np.flatnonzero(np.diff(numbers, prepend=-2) != 1)
    lengths = np.diff(starts, append=len(numbers))
    runs = zip((offset + numbers[starts] * size).tolist(), (lengths * size).tolist(), strict=True)
    return _read_runs(path, list(runs), (len(numbers), width), dtype)


def _read_runs(path: Path, runs: Sequence[Run], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The bytes of all runs, one after the other, as a tensor.

    Raises:
        InputError: as `read_tensor` does, or the memory is too small.
    """
    count = prod(shape) * dtype.itemsize
    check_memory(count, f"reading {'×'.join(map(str, shape))} values of {path}")
    data = bytearray(count)
    if not data:
        return torch.empty(shape, dtype=dtype)
    view, filled, complete = memoryview(data), 0, True
    try:
        with path.open("rb", buffering=0) as file:
            for offset, size in runs:
                file.seek(offset)
                complete = complete and _fill(file, view[filled : filled + size])
                filled += size
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    if not complete:
        raise InputError(f"{path} became shorter since it was opened; copy or download it again")
    return torch.frombuffer(data, dtype=dtype).reshape(shape)


def sample(path: Path, offset: int, count: int) -> str:
    """Hash of a file's size and of `SAMPLES` short pieces, evenly spread over `count` bytes from `offset` on.

    Raises:
        InputError: the file is gone or cannot be read.
    """
    try:
        digest = xxhash.xxh3_128(str(path.stat().st_size).encode())
        with path.open("rb", buffering=0) as file:
            for number in range(SAMPLES):
                file.seek(offset + max(count - PIECE, 0) * number // (SAMPLES - 1))
                digest.update(file.read(min(PIECE, count)))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def _fill(file: RawIOBase, data: memoryview) -> bool:
    """Read until `data` is full (one call reads 2 GB at most); False where the file ends before."""
    filled = 0
    while filled < len(data) and (count := file.readinto(data[filled:])):
        filled += count
    return filled == len(data)
