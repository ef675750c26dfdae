"""4-bit weights as bitsandbytes saves them (QLoRA, arXiv 2305.14314, section 3): NF4 and FP4, scales quantized or not.

Beside the packed weight lie `absmax` (a scale for each block), `quant_map` (the 16 levels) and a description in JSON;
where the scales are quantized too, they are 8-bit indices into `nested_quant_map`, with scales `nested_absmax` and one
offset.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import NotRequired

import torch
from torch import Tensor
from typing_extensions import TypedDict

from spectralbasis.checkpoints.checkpoint import Checkpoint
from spectralbasis.errors import InputError
from spectralbasis.records import checked, parse_json

_KINDS = ("nf4", "fp4")
_LEVELS = 16
_LONGEST_DESCRIPTION = 1 << 16


class _Facts(TypedDict):
    """What the description says; the rest of it (`quant_type`, `dtype`) concerns computing with the weight."""

    shape: list[int]
    blocksize: int
    nested_blocksize: NotRequired[int | None]
    nested_offset: NotRequired[float | None]


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
    return scales.repeat_interleave(min(block, count))[:count]


def find_four_bits(checkpoint: Checkpoint, name: str, names: frozenset[str]) -> FourBitWeight | None:
    """The weight behind a packed tensor; None where the tensor is none.

    Raises:
        InputError: its description is damaged, or does not fit what is stored.
    """
    descriptions = (f"{name}.quant_state.bitsandbytes__{kind}" for kind in _KINDS)
    description = next((candidate for candidate in descriptions if candidate in names), None)
    if description is None:
        return None
    where = f"the description of {name} of {checkpoint.source}"
    facts = checked(parse_json(_text(checkpoint, description, where), where), _Facts, where)
    found = _weight(name, facts, description)
    stored = {part: checkpoint.shape(part) for part in found.parts if part in names or part == name}
    kinds = {part: checkpoint.dtype(part) for part in stored}
    try:
        _check_parts(found, kinds, stored)
    except ValueError as error:
        raise InputError(
            f"{name} of {checkpoint.source} is a 4-bit weight whose description is damaged ({error}); "
            f"restore the file from the original"
        ) from error
    return found


def _text(checkpoint: Checkpoint, description: str, where: str) -> bytes:
    """The JSON that a tensor of bytes holds."""
    shape, kind = checkpoint.shape(description), checkpoint.dtype(description)
    if kind != torch.uint8 or prod(shape) > _LONGEST_DESCRIPTION:
        raise InputError(f"{where} is {kind} of shape {shape}, expected a short text; restore the file")
    return bytes(checkpoint.read(description).flatten().tolist())


def _weight(name: str, facts: "_Facts", description: str) -> FourBitWeight:
    return FourBitWeight(
        name=name,
        shape=tuple(facts["shape"]),
        block=facts["blocksize"],
        nested_block=facts.get("nested_blocksize"),
        nested_offset=facts.get("nested_offset") or 0.0,
        description=description,
    )


def _check_parts(found: FourBitWeight, kinds: Mapping[str, torch.dtype], stored: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError unless every part is there and holds as many numbers as the others call for, of its kind."""
    if min(found.shape, default=0) < 1 or found.block < 1 or (found.nested_block or 1) < 1:
        raise ValueError(f"shape {found.shape} in blocks of {found.block}")
    nested, count = found.nested_block is not None, prod(found.shape)
    blocks = -(-count // found.block)
    bytes_held = prod(stored[found.name]) * kinds[found.name].itemsize
    if bytes_held != -(-count // 2):
        raise ValueError(f"{found.name} holds {bytes_held} bytes, expected {-(-count // 2)}")
    expected = {"absmax": (blocks, not nested), "quant_map": (_LEVELS, True)}
    if found.nested_block is not None:
        expected |= {"nested_absmax": (-(-blocks // found.nested_block), True), "nested_quant_map": (256, True)}
    for part, (size, real) in expected.items():
        name = f"{found.name}.{part}"
        if name not in stored:
            raise ValueError(f"{name} is missing")
        if prod(stored[name]) != size:
            raise ValueError(f"{name} holds {prod(stored[name])} numbers, expected {size}")
        if not (kinds[name].is_floating_point if real else kinds[name] == torch.uint8):
            raise ValueError(f"{name} holds {kinds[name]}, expected {'real numbers' if real else 'bytes'}")
