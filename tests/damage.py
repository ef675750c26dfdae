"""Files with one bit turned, at places that a seed chooses."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np


def flipped(content: bytes, count: int, seed: int = 0, start: int = 0) -> Iterator[bytes]:
    """`count` copies of a file, each with another bit turned, at byte `start` or behind it."""
    places = np.random.default_rng(seed)
    for _ in range(count):
        damaged = bytearray(content)
        damaged[places.integers(start, len(content))] ^= 1 << int(places.integers(8))
        yield bytes(damaged)


def data_start(file: Path) -> int:
    """Byte at which the numbers of a safetensors file begin."""
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")
