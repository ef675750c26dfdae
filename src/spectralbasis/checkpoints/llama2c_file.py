"""One `.bin` file of llama2.c, version 0: seven integers, then every weight of the model in float32.

The layout is that of `legacy_export` in llama2.c's `export.py`: each kind of weight for all layers, then the next kind.
Tensors get the names that Meta's Llama checkpoints have (`layers.0.attention.wq.weight`).
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectralbasis.checkpoints.checkpoint import Checkpoint
from spectralbasis.checkpoints.weight_files import read_tensor, take_rows
from spectralbasis.errors import InputError

_HEADER = struct.Struct("<7i")
_LATER_VERSIONS = 0x616B3432  # "ak42", with which versions 1 and 2 begin
_LARGEST = 1 << 24  # beyond any model, and below what the first bytes of pickles and zip files read as
_MOST_LAYERS = 1 << 12


@dataclass(frozen=True)
class Header:
    """The sizes that a file begins with; a negative `vocabulary` says that the output layer has its own weights."""

    width: int
    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    positions: int

    def is_plausible(self) -> bool:
        """Whether these can be the sizes of a model."""
        sizes = (self.width, self.hidden, self.layers, self.heads, self.key_value_heads, self.positions)
        return (
            all(1 <= size <= _LARGEST for size in (*sizes, abs(self.vocabulary)))
            and self.layers <= _MOST_LAYERS
            and self.width % (2 * self.heads) == 0
            and self.heads % self.key_value_heads == 0
        )

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor, in the order of the file."""
        width, hidden, keys = self.width, self.hidden, self.width // self.heads * self.key_value_heads
        yield "tok_embeddings.weight", (abs(self.vocabulary), width)
        kinds: dict[str, tuple[int, ...]] = {
            "attention_norm": (width,),
            "attention.wq": (width, width),
            "attention.wk": (keys, width),
            "attention.wv": (keys, width),
            "attention.wo": (width, width),
            "ffn_norm": (width,),
            "feed_forward.w1": (hidden, width),
            "feed_forward.w2": (width, hidden),
            "feed_forward.w3": (hidden, width),
        }
        for kind, shape in kinds.items():
            yield from ((f"layers.{layer}.{kind}.weight", shape) for layer in range(self.layers))
        yield "norm.weight", (width,)
        for table in ("freqs_cos", "freqs_sin"):
            yield table, (self.positions, width // self.heads // 2)
        if self.vocabulary < 0:
            yield "output.weight", (-self.vocabulary, width)


class Llama2cFile(Checkpoint):
    """Reads the header when opened, and one tensor at a time afterwards."""

    def __init__(self, path: Path, source: str, header: Header) -> None:
        self.source = source
        self.config: dict[str, Any] = {
            "model_type": "llama",
            "num_attention_heads": header.heads,
            "num_key_value_heads": header.key_value_heads,
        }
        self._path = path
        self._places: dict[str, tuple[int, tuple[int, ...]]] = {}
        self.size = _HEADER.size
        for name, shape in header.shapes():
            self._places[name] = (self.size, shape)
            self.size += 4 * prod(shape)

    def names(self) -> tuple[str, ...]:
        return tuple(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name][1]

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def read(self, name: str) -> Tensor:
        offset, shape = self._places[name]
        return read_tensor(self._path, offset, shape, torch.float32)

    def take_rows(self, name: str, rows: Tensor, width: int) -> Tensor:
        return take_rows(self._path, self._places[name][0], rows, width, torch.float32)

    def holds_rows(self, name: str) -> bool:
        return name in self._places


def open_llama2c_file(path: Path, source: str, config: Mapping[str, Any]) -> Llama2cFile | None:
    """Open a file of llama2.c; None where the file is of another kind. Its own header stands in place of a config.

    Raises:
        InputError: the file is cut short, or of a later version.
    """
    with path.open("rb") as file:
        start = file.read(_HEADER.size)
    if len(start) < _HEADER.size:
        return None
    numbers = _HEADER.unpack(start)
    if numbers[0] == _LATER_VERSIONS:
        raise InputError(
            f"{path} is a llama2.c file of version {numbers[1]}, and only version 0 is read; "
            f"export the model again with --version 0"
        )
    header = Header(*numbers)
    if not header.is_plausible():
        return None
    found, size = Llama2cFile(path, source, header), path.stat().st_size
    if size != found.size:
        raise InputError(
            f"{path} begins like a llama2.c file of {header.layers} layers of width {header.width}, which has "
            f"{found.size} bytes, but it has {size}; copy or download it again"
        )
    return found
