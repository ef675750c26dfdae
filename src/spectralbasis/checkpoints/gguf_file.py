"""One file of GGUF, the format of llama.cpp: metadata, then names, shapes and types of tensors, then their blocks.

The layout is that of docs/gguf.md in ggml's repository, versions 2 and 3. The header is read here and not by the
package `gguf`, whose reader takes an object for each entry of a vocabulary and runs for as long as a damaged count
says. The package's types, its dequantization and its table of names (`gguf_names.py`) are used.
"""

import struct
from collections.abc import Mapping
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field
from functools import lru_cache
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spectralbasis.checkpoints.checkpoint import Checkpoint
from spectralbasis.checkpoints.gguf_names import config_of, find_places
from spectralbasis.checkpoints.weight_files import sample, take_rows
from spectralbasis.errors import InputError
from spectralbasis.extras import require_extra
from spectralbasis.printable import shortened
from spectralbasis.sizes import check_memory

_VERSIONS = (2, 3)
_NUMBERS = ("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?", "", "", "<Q", "<q", "<d")
"""Formats of `struct` by the number of a type of metadata; empty for texts and lists."""
_TEXT, _LIST = 8, 9
_MOST_TENSORS, _MOST_FACTS, _MOST_TEXTS = 1 << 15, 1 << 14, 1 << 21
"""Beyond any model; a vocabulary has a text for each word and each of its merges."""
_LONGEST_NAME, _LONGEST_TEXT, _LONGEST_LIST = 1 << 12, 1 << 12, 1 << 10
_MOST_DIMENSIONS = 4
_ALIGNMENT, _LARGEST_ALIGNMENT = 32, 1 << 20
_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
"""Types that torch has too; all others are dequantized."""
_CHUNK = 1 << 20
"""Numbers that are dequantized at once."""


@dataclass(frozen=True)
class _Type:
    """A type of numbers: how many of them are a block of how many bytes, and whether the package dequantizes it."""

    name: str
    numbers: int
    size: int
    readable: bool


@dataclass(frozen=True)
class _Stored:
    """One tensor as it is stored; the last side of the shape is that of a row. `kind` is None for an unknown type."""

    shape: tuple[int, ...]
    number: int
    start: int
    kind: _Type | None

    @property
    def size(self) -> int:
        return 0 if self.kind is None else prod(self.shape) // self.kind.numbers * self.kind.size


@dataclass
class Header:
    """What a file says before its tensors' data.

    Attributes:
        facts: metadata by key: numbers, short texts, short lists of numbers; of every other list, its length.
        tensors: as they are stored, by name.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, _Stored] = field(default_factory=dict)


class GGUFFile(Checkpoint):
    """Reads the header when opened, and the blocks of a tensor's rows when they are asked for.

    Names, shapes and numbers are those of transformers where the architecture is known (`gguf_names.py`).

    Attributes:
        path: the file.
    """

    def __init__(self, path: Path, source: str, header: Header) -> None:
        self.path, self.source = path, source
        self.config: dict[str, Any] = config_of(header.facts, header.tensors)
        places = find_places({name: one.shape for name, one in header.tensors.items()}, header.facts)
        self._tensors = {place.name: (header.tensors[name], place) for name, place in places.items()}

    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name][1].shape

    def dtype(self, name: str) -> torch.dtype:
        kind = self._tensors[name][0].kind
        return torch.float32 if kind is None else _DTYPES.get(kind.name, torch.float32)

    def unreadable(self, name: str) -> str | None:
        stored, place = self._tensors[name]
        if stored.kind is None:
            return f"it has the type {stored.number}, which the installed package gguf does not know; upgrade gguf"
        if not stored.kind.readable:
            return f"it has the type {stored.kind.name}, which the package gguf cannot dequantize; use another type"
        return place.reason

    def read(self, name: str) -> Tensor:
        place = self._tensors[name][1]
        shape = place.shape[::-1] if place.transposed else place.shape
        width = shape[-1] if shape else 1
        if len(shape) == 1 and place.order is not None:  # the numbers of a bias are in the order of the rows
            width = 1
        W = self._rows(name, torch.arange(prod(shape) // width if width else 0), width).reshape(shape)
        return W.T if place.transposed else W

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        shape = self.shape(name)
        if len(shape) < 2 or not self.holds_rows(name):
            return self.read(name)[start:stop]
        first, last, _ = slice(start, stop).indices(shape[0])
        height, count = prod(shape[1:-1]), max(last - first, 0)
        rows = torch.arange(first * height, (first + count) * height)
        return self._rows(name, rows, shape[-1]).reshape(count, *shape[1:])

    def take_rows(self, name: str, rows: Tensor, width: int) -> Tensor:
        if not self.holds_rows(name) or width != self.shape(name)[-1]:
            return super().take_rows(name, rows, width)
        return self._rows(name, rows, width)

    def holds_rows(self, name: str) -> bool:
        place = self._tensors[name][1]
        return not place.transposed and len(place.shape) > 1 and 0 not in place.shape

    def alone(self, name: str) -> "GGUFFile":
        found = copy(self)
        found.path, found.config = self.path.absolute(), {}
        found._tensors = {name: self._tensors[name]}
        return found

    def evidence(self, name: str) -> str:
        stored = self._tensors[name][0]
        return sample(self.path, stored.start, stored.size)

    def _rows(self, name: str, rows: Tensor, width: int) -> Tensor:
        """Rows of the weight by their numbers, (count, width), as numbers that torch has."""
        if (reason := self.unreadable(name)) is not None:
            raise InputError(f"{name} of {self.source} cannot be read: {reason}")
        stored, place = self._tensors[name]
        assert stored.kind is not None
        kind, places = stored.kind, rows if place.order is None else place.order.stored(rows)
        if kind.name in _DTYPES:
            W = take_rows(self.path, stored.start, places, width, _DTYPES[kind.name])
            return W - place.offset if place.offset else W
        check_memory(4 * len(rows) * width, f"reading {len(rows)}×{width} values of {self.path}")
        W, step = torch.empty(len(rows), width), max(_CHUNK // max(width, 1), 1)
        for first in range(0, len(rows), step):
            blocks = places[first : first + step]
            packed = take_rows(self.path, stored.start, blocks, width // kind.numbers * kind.size, torch.uint8)
            W[first : first + step] = torch.from_numpy(_dequantized(packed.numpy(), stored.number))
        return W - place.offset if place.offset else W


def open_gguf_file(path: Path, source: str, config: Mapping[str, Any]) -> GGUFFile | None:
    """Open a file of GGUF; None where the file is of another kind. Its metadata stand in place of a config.

    Raises:
        InputError: the file is damaged, is of another version or byte order, is one part of several or no model, or
            the package `gguf` is not installed.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            return None
        require_extra("gguf", f"{path} is a GGUF file, and reading it")
        try:
            header = _Reader(file, path.stat().st_size).header()
        except (ValueError, struct.error) as error:
            raise InputError(f"{path} is a damaged GGUF file: {error}; copy or download it again") from error
    _refuse_parts(path, header.facts)
    return GGUFFile(path, source, header)


def _refuse_parts(path: Path, facts: Mapping[str, Any]) -> None:
    parts, kind = facts.get("split.count"), facts.get("general.type", "model")
    if isinstance(parts, int) and parts > 1:
        raise InputError(
            f"{path} is one of {parts} parts of a GGUF file; join them with llama.cpp (llama-gguf-split --merge FIRST "
            "OUT.gguf) and pass OUT.gguf"
        )
    if kind not in ("model", "mmproj"):
        raise InputError(
            f"{path} is a GGUF file of the type {shortened(repr(kind), 60)}, not of a model; pass the model's own file"
        )


class _Reader:
    """Reads the header from its start to its end, and believes no count that the rest of the file cannot hold.

    Every method raises ValueError where the file is damaged.
    """

    def __init__(self, file: BufferedReader, size: int) -> None:
        self._file, self._size, self._texts = file, size, 0
        self._at = file.tell()

    def header(self) -> Header:
        (version,) = self._numbers("<I", 1)
        if version and version % (1 << 16) == 0:
            raise ValueError("its numbers are big-endian (gguf-convert-endian of the package gguf turns them)")
        if version not in _VERSIONS:
            raise ValueError(f"it has version {version}, expected 2 or 3")
        tensors, facts = self._numbers("<Q", 2)
        for count, most, what in ((tensors, _MOST_TENSORS, "tensors"), (facts, _MOST_FACTS, "entries of metadata")):
            if count > most:
                raise ValueError(f"it claims {count} {what}, expected at most {most}")
        found = Header()
        for _ in range(facts):
            key = self._name("a key")
            if key in found.facts:
                raise ValueError(f"it has the key {shortened(key, 80)} twice")
            found.facts[key] = self._fact(key)
        described: dict[str, _Stored] = {}
        for _ in range(tensors):
            name = self._name("a tensor")
            if name in described:
                raise ValueError(f"it has the tensor {shortened(name, 80)} twice")
            described[name] = self._described(name)
        found.tensors = self._placed(described, found.facts)
        return found

    def _take(self, count: int) -> bytes:
        self._advance(count)
        return self._file.read(count)

    def _skip(self, count: int) -> None:
        self._advance(count)
        self._file.seek(count, 1)

    def _advance(self, count: int) -> None:
        if count > self._size - self._at:
            raise ValueError(f"it ends at {self._size} bytes, and {count} more are announced at byte {self._at}")
        self._at += count

    def _numbers(self, kind: str, count: int) -> tuple[Any, ...]:
        return struct.unpack(f"<{count}{kind[1:]}", self._take(struct.calcsize(kind) * count))

    def _name(self, what: str) -> str:
        (length,) = self._numbers("<Q", 1)
        if not 1 <= length <= _LONGEST_NAME:
            raise ValueError(f"the name of {what} has {length} bytes, expected 1 to {_LONGEST_NAME}")
        try:
            name = self._take(length).decode()
        except UnicodeDecodeError:
            raise ValueError(f"the name of {what} is not valid UTF-8") from None
        if not name.isprintable():
            raise ValueError(f"the name of {what}, {shortened(name, 80)}, has characters that are not printable")
        return name

    def _fact(self, key: str) -> Any:
        """A value of the metadata; None for a long text."""
        (kind,) = self._numbers("<I", 1)
        if kind == _TEXT:
            (length,) = self._numbers("<Q", 1)
            if length <= _LONGEST_TEXT:
                return self._take(length).decode("utf-8", "replace")
            self._skip(length)
            return None
        if kind == _LIST:
            return self._list(key)
        return self._numbers(self._format(key, kind), 1)[0]

    def _list(self, key: str) -> Any:
        """The numbers of a short list; of any other one, how many entries it has."""
        (kind,), (count,) = self._numbers("<I", 1), self._numbers("<Q", 1)
        if kind == _TEXT:
            self._texts += count
            if self._texts > _MOST_TEXTS:
                raise ValueError(f"{shortened(key, 80)} claims {count} texts, expected at most {_MOST_TEXTS} in all")
            for _ in range(count):
                self._skip(*self._numbers("<Q", 1))
            return count
        form = self._format(key, kind)
        if count <= _LONGEST_LIST:
            return self._numbers(form, count)
        self._skip(struct.calcsize(form) * count)
        return count

    def _format(self, key: str, kind: int) -> str:
        if kind < len(_NUMBERS) and _NUMBERS[kind]:
            return _NUMBERS[kind]
        raise ValueError(f"{shortened(key, 80)} has values of the type {kind}, which GGUF does not have here")

    def _described(self, name: str) -> _Stored:
        """What the header says of one tensor; its start counts from that of the data."""
        (count,) = self._numbers("<I", 1)
        if count > _MOST_DIMENSIONS:
            raise ValueError(f"{shortened(name, 80)} has {count} dimensions, expected at most {_MOST_DIMENSIONS}")
        shape = self._numbers("<Q", count)[::-1]
        (number,), (start,) = self._numbers("<I", 1), self._numbers("<Q", 1)
        kind = _type(number)
        if kind is not None and (shape[-1] if shape else 1) % kind.numbers:
            raise ValueError(
                f"{shortened(name, 80)} has rows of {shape[-1] if shape else 1} numbers, which are no whole blocks of "
                f"{kind.name} ({kind.numbers})"
            )
        return _Stored(shape, number, start, kind)

    def _placed(self, described: Mapping[str, _Stored], facts: Mapping[str, Any]) -> dict[str, _Stored]:
        """The tensors with the places of their data in the file, once each lies in it and none in another."""
        alignment = facts.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or not 1 <= alignment <= _LARGEST_ALIGNMENT or alignment & (alignment - 1):
            raise ValueError(f"general.alignment is {shortened(repr(alignment), 40)}, expected a small power of two")
        data, ends = -(-self._at // alignment) * alignment, 0
        for name, one in sorted(described.items(), key=lambda item: (item[1].start, item[1].size)):
            if one.start < ends or data + one.start + one.size > self._size:
                raise ValueError(
                    f"{shortened(name, 80)} claims {one.size} bytes from byte {data + one.start} on, which are in "
                    f"another tensor or beyond the end at {self._size}"
                )
            ends = one.start + one.size
        return {name: _Stored(one.shape, one.number, data + one.start, one.kind) for name, one in described.items()}


@lru_cache(maxsize=256)
def _type(number: int) -> _Type | None:
    """A type by its number in the file; None where the package does not know it."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        named = GGMLQuantizationType(number)
    except ValueError:
        return None
    numbers, size = GGML_QUANT_SIZES[named]
    readable = named.name in _DTYPES
    with suppress(NotImplementedError):
        readable = readable or _dequantized(np.zeros((1, size), np.uint8), number).shape == (1, numbers)
    return _Type(named.name, numbers, size, readable)


def _dequantized(blocks: np.ndarray[Any, Any], number: int) -> np.ndarray[Any, Any]:
    """Rows of blocks, (rows, bytes), as rows of float32."""
    from gguf import GGMLQuantizationType, dequantize

    with np.errstate(all="ignore"):  # scales of a damaged file may be infinite; what is not finite is found later
        found: np.ndarray[Any, Any] = dequantize(blocks, GGMLQuantizationType(number))
    return found
