"""One `.safetensors` file."""

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spectralbasis.checkpoints.checkpoint import Checkpoint
from spectralbasis.checkpoints.raw_file import read_tensor, sample, take_rows
from spectralbasis.errors import InputError
from spectralbasis.records import parse_json

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class _Entry:
    """One tensor: its type as torch and as the file names it, its shape, and where its bytes start in the file."""

    dtype: torch.dtype
    named: str
    shape: tuple[int, ...]
    start: int


class SafetensorsFile(Checkpoint):
    """Reads the header once, when opened; each read takes the tensor's own bytes, and the file does not stay mapped.

    Attributes:
        path: the file.

    Raises:
        InputError: the file is missing, cut short or no safetensors file.
    """

    def __init__(self, path: Path, source: str, config: Mapping[str, Any]) -> None:
        self.source = source
        self.config = config
        self.path = path
        try:
            self._entries = _read_header(path)
        except InputError:
            raise
        except (SafetensorError, OSError, ValueError, OverflowError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} cannot be read as safetensors ({error}); it may be cut short or damaged, "
                f"so compare its size with the original's and copy or download it again"
            ) from error

    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entries[name].dtype

    def read(self, name: str) -> Tensor:
        return self._read(name, self._entries[name].start, self._entries[name].shape)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        entry = self._entries[name]
        start, stop, _ = slice(start, stop).indices(entry.shape[0])
        inner = entry.shape[1:]
        offset = entry.start + start * prod(inner) * entry.dtype.itemsize
        return self._read(name, offset, (max(stop - start, 0), *inner))

    def take_rows(self, name: str, rows: Tensor, width: int) -> Tensor:
        entry = self._known(name)
        return take_rows(self.path, entry.start, rows, width, entry.dtype)

    def holds_rows(self, name: str) -> bool:
        return name in self._entries

    def alone(self, name: str) -> "SafetensorsFile":
        found = copy(self)
        found.path = self.path.absolute()
        found._entries = {name: self._entries[name]}
        found.config = {}
        return found

    def evidence(self, name: str) -> str:
        entry = self._entries[name]
        return sample(self.path, entry.start, prod(entry.shape) * entry.dtype.itemsize)

    def _read(self, name: str, offset: int, shape: tuple[int, ...]) -> Tensor:
        return read_tensor(self.path, offset, shape, self._known(name).dtype)

    def _known(self, name: str) -> _Entry:
        entry = self._entries[name]
        if entry.named not in _DTYPES:
            raise InputError(f"{name} of {self.path} has the type {entry.named}, which torch cannot represent")
        return entry


def _read_header(path: Path) -> dict[str, _Entry]:
    with safe_open(str(path), framework="pt") as file:  # checks sizes, order and overlaps of all entries
        names = file.keys()
    with path.open("rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        header = parse_json(raw.read(length), f"the header of {path}")
    return {name: _entry(header[name], 8 + length) for name in names}


def _entry(described: Mapping[str, Any], data: int) -> _Entry:
    # Types that torch has no name for (packed 4- and 6-bit floats) are bytes to us, as other quantized weights are.
    named = described["dtype"]
    dtype = _DTYPES.get(named, torch.uint8)
    return _Entry(dtype, named, tuple(described["shape"]), data + described["data_offsets"][0])
