"""One `.safetensors` file."""

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import TypedDict

from spectralbasis.checkpoints.checkpoint import Checkpoint
from spectralbasis.checkpoints.raw_file import read_tensor, sample, take_rows
from spectralbasis.errors import InputError
from spectralbasis.printable import shortened
from spectralbasis.records import checked, parse_json

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


_PACKED = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
"""Bits of what torch cannot represent."""
_LENGTH = 8
_LONGEST_HEADER = 100_000_000  # as the library of the format has it


class _Described(TypedDict):
    """What a header says of one tensor."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


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
        except (OSError, ValueError) as error:
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
    """Every tensor by its name, once it is certain that they fill the file one after the other.

    The file is not mapped, which a limit of the address space would forbid a large one.

    Raises:
        ValueError: the header is cut short or damaged, or is not that of this file.
    """
    with path.open("rb") as file:
        held = path.stat().st_size - _LENGTH
        length = int.from_bytes(file.read(_LENGTH), "little")
        if not 2 <= length <= min(held, _LONGEST_HEADER):
            raise ValueError(f"its header claims {length} bytes of {max(held, 0)}")
        header = parse_json(file.read(length), f"the header of {path}")
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    header.pop("__metadata__", None)
    described = checked(header, dict[str, _Described], f"the header of {path}")
    if described.keys() != header.keys():
        raise ValueError("a tensor's name is no valid Unicode")
    ends = 0
    for name, one in sorted(described.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = one["data_offsets"]
        if start != ends or stop - start != _size_of(name, one):
            raise ValueError(f"{shortened(name, 80)} claims the bytes {start} to {stop}, which do not fit its shape")
        ends = stop
    if ends != held - length:
        raise ValueError(f"its tensors take {ends} bytes, and the file holds {held - length}")
    return {name: _entry(described[name], _LENGTH + length) for name in header}


def _size_of(name: str, described: "_Described") -> int:
    """Bytes that a tensor of this type and shape takes.

    Raises:
        ValueError: the type is not known, the shape is negative, or the numbers do not fill whole bytes.
    """
    kind, shape = described["dtype"], described["shape"]
    bits = _DTYPES[kind].itemsize * 8 if kind in _DTYPES else _PACKED.get(kind)
    if bits is None or min(shape, default=0) < 0 or prod(shape) * bits % 8:
        raise ValueError(f"{shortened(name, 80)} has the type {shortened(kind, 40)} and the shape {shape[:9]}")
    return prod(shape) * bits // 8


def _entry(described: "_Described", data: int) -> _Entry:
    # Types that torch has no name for (packed 4- and 6-bit floats) are bytes to us, as other quantized weights are.
    named = described["dtype"]
    return _Entry(
        _DTYPES.get(named, torch.uint8), named, tuple(described["shape"]), data + described["data_offsets"][0]
    )
