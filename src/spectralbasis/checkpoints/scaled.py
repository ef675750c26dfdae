"""8-bit weights with a factor for the whole matrix, for each row or for each block.

Formats: DeepSeek's and transformers' block-wise fp8, compressed-tensors, FBGEMM, ModelOpt, and bitsandbytes' int8.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor

from spectralbasis.checkpoints.checkpoint import Checkpoint

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# The suffix of the factor's name, by the `quant_method` of the config; every one of them multiplies, `_inv` too.
_SUFFIXES = {"fp8": "_scale_inv", "compressed-tensors": "_scale", "fbgemm_fp8": "_scale", "modelopt": "_scale"}
_INT8_STEPS = 127.0


@dataclass(frozen=True)
class ScaledWeight:
    """`W = factor · Q / steps`, one factor for each block of Q.

    Attributes:
        name: of Q, and of W.
        factor: name of the factors, one number or (rows,) or (block rows, block columns).
        shape: of Q.
        block: rows and columns of a block; those at the right and lower edge may be cut.
        steps: what Q is counted in.
    """

    name: str
    factor: str
    shape: tuple[int, ...]
    block: tuple[int, int]
    steps: float = 1.0

    @property
    def parts(self) -> tuple[str, ...]:
        return self.name, self.factor

    def read(self, checkpoint: Checkpoint) -> Tensor:
        """The real weight, float32, (out, in)."""
        grid = [ceil(side / block) for side, block in zip(self.shape, self.block, strict=True)]
        factors = checkpoint.read(self.factor).float().reshape(grid) / self.steps
        rows, columns = self.shape
        for dimension, block in enumerate(self.block):
            factors = factors.repeat_interleave(block, dimension)
        return checkpoint.read(self.name).float() * factors[:rows, :columns]


def find_scaled(checkpoint: Checkpoint, name: str, names: frozenset[str]) -> ScaledWeight | None:
    """The weight behind a stored tensor; None where it has another format, or one that cannot be told for certain."""
    shape, dtype = checkpoint.shape(name), checkpoint.dtype(name)
    if dtype.itemsize != 1 or len(shape) != 2:
        return None
    rows = f"{name.removesuffix('weight')}SCB"
    if dtype == torch.int8 and name.endswith(".weight") and rows in names and checkpoint.shape(rows) == shape[:1]:
        return ScaledWeight(name, rows, shape, (1, shape[1]), _INT8_STEPS)
    config = _quantization(checkpoint.config)
    method = config.get("quant_method")
    suffix = _SUFFIXES.get(method) if isinstance(method, str) else None
    known = dtype in _FLOAT8 or (dtype == torch.int8 and method == "compressed-tensors")
    if suffix is None or not known or name + suffix not in names or f"{name}_zero_point" in names:
        return None
    block = _block(shape, checkpoint.shape(name + suffix), config.get("weight_block_size"))
    return None if block is None else ScaledWeight(name, name + suffix, shape, block)


def _quantization(config: Mapping[str, Any]) -> Mapping[str, Any]:
    found = config.get("quantization_config")
    return found if isinstance(found, Mapping) else {}


def _block(shape: tuple[int, ...], factors: tuple[int, ...], configured: object) -> tuple[int, int] | None:
    """Rows and columns that share a factor: all, one row, the configured block, or an even division."""
    rows, columns = shape
    if factors in ((), (1,), (1, 1)):
        return rows, columns
    if factors in ((rows,), (rows, 1)):
        return 1, columns
    if len(factors) != 2 or 0 in factors:
        return None
    if isinstance(configured, list | tuple) and len(configured) == 2 and all(_is_size(size) for size in configured):
        block = configured[0], configured[1]
        return block if factors == (ceil(rows / block[0]), ceil(columns / block[1])) else None
    even = rows % factors[0] == 0 and columns % factors[1] == 0
    return (rows // factors[0], columns // factors[1]) if even else None


def _is_size(size: object) -> bool:
    return isinstance(size, int) and size > 0
