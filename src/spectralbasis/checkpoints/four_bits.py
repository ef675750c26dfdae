"""4-bit weights as bitsandbytes saves them (QLoRA, arXiv 2305.14314, section 3): NF4 and FP4, scales quantized or not.

Beside the packed weight lie `absmax` (a scale for each block), `quant_map` (the 16 levels) and a description in JSON;
where the scales are quantized too, they are 8-bit indices into `nested_quant_map`, with scales `nested_absmax` and one
offset.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor

from spectralbasis.checkpoints.checkpoint import Checkpoint
from spectralbasis.errors import InputError

_KINDS = ("nf4", "fp4")
_LEVELS = 16


@dataclass(frozen=True)
class FourBitWeight:
    """Two levels a byte, the first in the higher half, times the scale of their block.

    Attributes:
        name: of the packed tensor, and the beginning of the names of what describes it.
        shape: of the real weight.
        block: values that share a scale.
        nested_block: scales that share a scale of their own; None where scales are stored as they are.
        nested_offset: what is added to such scales.
        description: name of the JSON.
    """

    name: str
    shape: tuple[int, ...]
    block: int
    nested_block: int | None
    nested_offset: float
    description: str

    @property
    def parts(self) -> tuple[str, ...]:
        nested = ("nested_absmax", "nested_quant_map") if self.nested_block is not None else ()
        return self.name, self.description, *(f"{self.name}.{part}" for part in ("absmax", "quant_map", *nested))

    def read(self, checkpoint: Checkpoint) -> Tensor:
        """The real weight, float32."""
        packed = checkpoint.read(self.name).reshape(-1).view(torch.uint8)
        levels = torch.stack([packed >> 4, packed & 0xF], dim=1).flatten()[: prod(self.shape)]
        values = self._part(checkpoint, "quant_map")[levels.int()]
        return (values * _spread(self._scales(checkpoint), self.block, len(values))).reshape(self.shape)

    def _scales(self, checkpoint: Checkpoint) -> Tensor:
        scales = self._part(checkpoint, "absmax")
        if self.nested_block is None:
            return scales
        levels = self._part(checkpoint, "nested_quant_map")[scales.int()]
        outer = _spread(self._part(checkpoint, "nested_absmax"), self.nested_block, len(levels))
        return levels * outer + self.nested_offset

    def _part(self, checkpoint: Checkpoint, part: str) -> Tensor:
        return checkpoint.read(f"{self.name}.{part}").float().flatten()


def _spread(scales: Tensor, block: int, count: int) -> Tensor:
    return scales.repeat_interleave(block)[:count]


def find_four_bits(checkpoint: Checkpoint, name: str, names: frozenset[str]) -> FourBitWeight | None:
    """The weight behind a packed tensor; None where the tensor is none.

    Raises:
        InputError: its description is damaged, or does not fit what is stored.
    """
    descriptions = (f"{name}.quant_state.bitsandbytes__{kind}" for kind in _KINDS)
    description = next((candidate for candidate in descriptions if candidate in names), None)
    if description is None:
        return None
    try:
        facts = json.loads(bytes(checkpoint.read(description).to(torch.uint8).flatten().tolist()))
        found = _weight(name, facts, description)
        _check_sizes(found, {part: checkpoint.shape(part) for part in found.parts}, checkpoint.dtype(name))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{name} of {checkpoint.source} is a 4-bit weight whose description is damaged ({error}); "
            f"restore the file from the original"
        ) from error
    return found


def _weight(name: str, facts: Mapping[str, Any], description: str) -> FourBitWeight:
    nested = facts.get("nested_blocksize")
    return FourBitWeight(
        name=name,
        shape=tuple(map(int, facts["shape"])),
        block=int(facts["blocksize"]),
        nested_block=None if nested is None else int(nested),
        nested_offset=0.0 if nested is None else float(facts["nested_offset"]),
        description=description,
    )


def _check_sizes(found: FourBitWeight, stored: Mapping[str, tuple[int, ...]], packed: torch.dtype) -> None:
    """Raise ValueError or KeyError unless every part holds as many numbers as the others call for."""
    sizes = {name: prod(shape) for name, shape in stored.items()}
    if min(found.shape, default=0) < 1 or found.block < 1 or (found.nested_block or 1) < 1:
        raise ValueError(f"shape {found.shape} in blocks of {found.block}")
    count = prod(found.shape)
    blocks = ceil(count / found.block)
    expected = {found.name: ceil(count / 2) // packed.itemsize, "absmax": blocks, "quant_map": _LEVELS}
    if found.nested_block is not None:
        expected |= {"nested_absmax": ceil(blocks / found.nested_block), "nested_quant_map": 256}
    for part, size in expected.items():
        name = part if part == found.name else f"{found.name}.{part}"
        if sizes[name] != size:
            raise ValueError(f"{name} holds {sizes[name]} numbers, expected {size}")
