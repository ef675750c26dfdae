"""Numbers that lie one after the other in a file."""

from io import RawIOBase
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from spectralbasis.errors import InputError


def read_tensor(path: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The tensor whose bytes start at `offset`, copied so that the file need not stay open or mapped.

    Raises:
        InputError: the file is gone, cannot be read, or ends before the tensor does.
    """
    data = bytearray(prod(shape) * dtype.itemsize)
    if not data:
        return torch.empty(shape, dtype=dtype)
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            complete = _fill(file, memoryview(data))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    if not complete:
        raise InputError(f"{path} became shorter since it was opened; copy or download it again")
    return torch.frombuffer(data, dtype=dtype).reshape(shape)


def _fill(file: RawIOBase, data: memoryview) -> bool:
    """Read until `data` is full (one call reads 2 GB at most); False where the file ends before."""
    filled = 0
    while filled < len(data) and (count := file.readinto(data[filled:])):
        filled += count
    return filled == len(data)
