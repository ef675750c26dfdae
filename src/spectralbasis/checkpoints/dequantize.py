"""From the numbers that a quantized format stores to the real weight, float32.

Every formula takes the stored tensors by their part (`values`, `scale`, `zero` and so on) and gives the weight.

4-bit weights as bitsandbytes saves them (QLoRA, arXiv 2305.14314, section 3): NF4 and FP4, scales quantized or not.

Beside the packed weight lie `absmax` (a scale for each block), `quant_map` (the 16 levels) and a description in JSON;
where the scales are quantized too, they are 8-bit indices into `nested_quant_map`, with scales `nested_absmax` and one
offset.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import NotRequired

import torch
from torch import Tensor
from typing_extensions import TypedDict

from spectralbasis.checkpoints.checkpoint import Checkpoint
from spectralbasis.errors import InputError
from spectralbasis.records import checked, parse_json

Parts = Mapping[str, Tensor]
# E2M1 and E2M3 of the OCP microscaling specification (MX, version 1.0, section 5.3): bit patterns as indices.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M3 = (*(m / 8 for m in range(8)), *((1 + m / 8) * 2**e for e in range(3) for m in range(8)))
# AWQ packs eight numbers into a word in the order 0, 2, 4, 6, 1, 3, 5, 7; this is where each of them lies.
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
_INT8_STEPS = 127.0


Formula = Callable[[Parts], Tensor]
"""A function from stored tensors to the real weight, float32."""


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight that is computed from several stored tensors.

    Attributes:
        name: of the real weight.
        roles: part that the formula knows → name of the stored tensor; the first is the one that holds the numbers.
        shape: of the real weight.
        formula: how it is computed.
        belonging: names of stored tensors that the formula does not need.
    """

    name: str
    roles: Mapping[str, str]
    shape: tuple[int, ...]
    formula: Formula
    belonging: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        return (*self.roles.values(), *self.belonging)

    def read(self, checkpoint: Checkpoint) -> Tensor:
        """The real weight, float32.

        Raises:
            InputError: the parts contradict each other.
        """
        parts = {role: checkpoint.read(name) for role, name in self.roles.items()}
        return self._computed(parts, self.shape, checkpoint)

    def read_rows(self, checkpoint: Checkpoint, start: int, stop: int) -> Tensor:
        """`read(checkpoint)[start:stop]`; of a stack of experts, only the parts of these experts are read."""
        if len(self.shape) < 3:
            return self.read(checkpoint)[start:stop]
        parts = {}
        for role, name in self.roles.items():
            stacked = checkpoint.shape(name)[:1] == self.shape[:1]
            parts[role] = checkpoint.read_rows(name, start, stop) if stacked else checkpoint.read(name)
        count = len(range(*slice(start, stop).indices(self.shape[0])))
        return self._computed(parts, (count, *self.shape[1:]), checkpoint)

    def _computed(self, parts: Parts, shape: tuple[int, ...], checkpoint: Checkpoint) -> Tensor:
        try:
            W = self.formula(parts)
        except (RuntimeError, ValueError, IndexError) as error:
            raise InputError(
                f"{self.name} of {checkpoint.source} is quantized, and its parts contradict each other ({error}); "
                f"restore the file from the original"
            ) from error
        if tuple(W.shape) != shape:
            raise InputError(
                f"{self.name} of {checkpoint.source} is quantized, and its parts make a weight of shape "
                f"{tuple(W.shape)}, expected {shape}; restore the file from the original"
            )
        return W


def unpack_bits(words: Tensor, bits: int, count: int) -> Tensor:
    """Numbers of 1 to 8 bits that lie one after the other along the last dimension, from the lowest bit of a word up.

    A number may begin in one word and end in the next. Eight numbers take `bits` bytes.

    Args:
        words: (…, words), of whole numbers.
        bits: of each number.
        count: how many numbers there are; the rest is padding.

    Returns:
        (…, count), uint8.
    """
    data = words.flatten().view(torch.uint8).unflatten(0, (*words.shape[:-1], -1))
    if bits == 8:
        return data[..., :count]
    data = torch.nn.functional.pad(data, (0, -data.shape[-1] % bits)).unflatten(-1, (-1, bits))
    joined = torch.stack([data[..., byte].long() << (8 * byte) for byte in range(bits)]).sum(0)
    numbers = [((joined >> (bits * place)) & (2**bits - 1)).to(torch.uint8) for place in range(8)]
    return torch.stack(numbers, dim=-1).flatten(-2)[..., :count]


def checked_groups(order: Tensor, count: int) -> Tensor:
    """The group of each column, int64.

    Raises:
        ValueError: one of them is none of the `count` groups.
    """
    order = order.long()
    if order.numel() and not 0 <= int(order.min()) <= int(order.max()) < count:
        raise ValueError(f"groups are numbered {int(order.min())} to {int(order.max())}, expected 0 to {count - 1}")
    return order


def spread(factors: Tensor, shape: tuple[int, ...], block: tuple[int, ...]) -> Tensor:
    """One factor for each block → one for each entry; blocks at the end of a dimension may be cut.

    Args:
        factors: (blocks along each dimension), as many dimensions as `shape` has.
        shape: of what is multiplied.
        block: sides of a block; a side as long as `shape`'s stays 1 and is broadcast.
    """
    for dimension, side in enumerate(block):
        if side > 1 and factors.shape[dimension] > 1:
            factors = factors.repeat_interleave(side, dimension).narrow(dimension, 0, shape[dimension])
    return factors


def factors_of(stored: Tensor) -> Tensor:
    """Scales as float32; bytes are exponents of two with a bias of 127 (E8M0)."""
    return stored.contiguous().view(torch.float8_e8m0fnu).float() if stored.dtype == torch.uint8 else stored.float()


def scaled(parts: Parts, *, block: tuple[int, ...], grid: tuple[int, ...] | None = None) -> Tensor:
    """`W = (Q - zero) · scale`, with a scale and perhaps a zero for each block.

    Args:
        parts: `values` of any shape, `scale` and perhaps `zero`.
        block: sides of a block.
        grid: what scales and zeros are reshaped to, if they have not the dimensions of the values already.
    """
    values = parts["values"].float()
    shape = tuple(values.shape)
    scale, zero = factors_of(parts["scale"]), parts.get("zero")
    if zero is not None:
        zero = zero.float() if grid is None else zero.float().reshape(grid)
        values = values - spread(zero, shape, block)
    return values * spread(scale if grid is None else scale.reshape(grid), shape, block)


def bitsandbytes_int8(parts: Parts) -> Tensor:
    """LLM.int8 (arXiv 2208.07339): each row counted in 127ths of its largest entry."""
    return parts["values"].float() * parts["scale"].float()[:, None] / _INT8_STEPS


def small_floats(parts: Parts, *, bits: int, columns: int) -> Tensor:
    """4- or 6-bit floats (E2M1, E2M3) with a scale for each run of a row; `outer` multiplies and `inverse` divides.

    Args:
        parts: `values` (…, bytes), `scale` (…, runs), perhaps `outer` or `inverse`, one number each.
        bits: of a float.
        columns: of the weight.
    """
    levels = torch.tensor(_E2M1 if bits == 4 else _E2M3)
    values = torch.cat([levels, -levels])[unpack_bits(parts["values"], bits, columns).int()]
    scale = factors_of(parts["scale"])
    if "outer" in parts:
        scale = scale * parts["outer"].float().reshape(())
    if "inverse" in parts:
        scale = scale / parts["inverse"].float().reshape(())
    return (values.unflatten(-1, (scale.shape[-1], -1)) * scale[..., None]).flatten(-2)


def gpt_oss(parts: Parts) -> Tensor:
    """MXFP4 as gpt-oss stores experts: values (experts, out, runs, 16) → (experts, in, out)."""
    values = parts["values"].flatten(-2)
    return small_floats({**parts, "values": values}, bits=4, columns=2 * values.shape[-1]).transpose(1, 2)


def compressed_tensors(parts: Parts, *, shape: tuple[int, int], bits: int) -> Tensor:
    """`W = (Q - zero) · scale`, Q and zeros counted from the middle of their range, groups along a row.

    Args:
        parts: `values` (out, words), `scale` (out, groups), perhaps `zero` (words, groups), which is packed along its
            first dimension, and `order` (in,), the group of each column.
        shape: of the weight.
        bits: of a number.
    """
    rows, columns = shape
    middle, scale = 2 ** (bits - 1), parts["scale"].float().reshape(-1, parts["scale"].shape[-1])
    values = unpack_bits(parts["values"], bits, columns).float() - middle
    group = torch.arange(columns) // (columns // scale.shape[1])
    if "order" in parts and not (parts["order"] == -1).all():  # -1 says that columns are in order
        group = checked_groups(parts["order"], scale.shape[1])
    if "zero" in parts:
        zero = unpack_bits(parts["zero"].T, bits, rows).T.float() - middle
        values = values - zero[:, group]
    return values * scale.expand(rows, -1)[:, group]


def gptq(parts: Parts, *, bits: int, first: int) -> Tensor:
    """GPTQ: `W[o, i] = scale[g, o] · (Q[i, o] - zero[g, o])` with g the group of input i.

    Args:
        parts: `values` (words, out), packed along the first dimension, `scale` (groups, out), `zero` (groups, words)
            and perhaps `order` (in,), the group of each input.
        bits: of a number.
        first: what is added to a stored zero: 1 in the first format, 0 in the second.
    """
    scale = parts["scale"].float()
    inputs = parts["values"].shape[0] * 32 // bits
    values = unpack_bits(parts["values"].T, bits, inputs)
    zero = (unpack_bits(parts["zero"], bits, scale.shape[1]).int() + first) & (2**bits - 1)
    group = torch.arange(inputs) // (inputs // len(scale) or 1)
    if "order" in parts:
        group = checked_groups(parts["order"], len(scale))
    return (values.float() - zero.T.float()[:, group]) * scale.T[:, group]


def awq(parts: Parts) -> Tensor:
    """AWQ (arXiv 2306.00978): `W[o, i] = scale[g, o] · (Q[i, o] - zero[g, o])`, packed along the outputs."""
    scale = parts["scale"].float()
    values, zero = (_awq_numbers(parts[part]) for part in ("values", "zero"))
    group = len(values) // len(scale)
    return ((values - zero.repeat_interleave(group, 0)) * scale.repeat_interleave(group, 0)).T


def _awq_numbers(words: Tensor) -> Tensor:
    numbers = unpack_bits(words, 4, 8 * words.shape[-1]).unflatten(-1, (-1, 8))
    return numbers[..., list(_AWQ_PLACES)].flatten(-2).float()


def mlx(parts: Parts, *, bits: int, columns: int) -> Tensor:
    """MLX: `W = scale · Q + offset`, groups along the last dimension."""
    values = unpack_bits(parts["values"], bits, columns).float()
    scale, offset = parts["scale"].float(), parts["offset"].float()
    return (values.unflatten(-1, (scale.shape[-1], -1)) * scale[..., None] + offset[..., None]).flatten(-2)


def hqq(parts: Parts, *, shape: tuple[int, int], bits: int, rows: int) -> Tensor:
    """HQQ: `W = (Q - zero) · scale`; a byte or word holds numbers of runs of rows, the first in the highest bits.

    Args:
        parts: `values` (packed rows, columns), `scale` and `zero`, which broadcast over the unpacked rows.
        shape: of the weight.
        bits: of a number.
        rows: what the unpacked rows come to; the rest is padding.
    """
    stored = parts["values"].view(torch.int32) if bits == 3 else parts["values"].view(torch.uint8)
    held = 10 if bits == 3 else 8 // bits
    runs = [(stored >> (bits * place)) & (2**bits - 1) for place in reversed(range(held))]
    values = torch.cat(runs).float()[:rows]
    return ((values - parts["zero"].float()) * parts["scale"].float()).reshape(shape)


def bitnet(parts: Parts, *, divided: bool) -> Tensor:
    """BitNet: -1, 0 and 1 in two bits, four runs of rows in a byte, the first in the lowest bits."""
    values = torch.cat([((parts["values"] >> (2 * place)) & 3).float() - 1 for place in range(4)])
    scale = parts["scale"].float().reshape(())
    return values / scale if divided else values * scale


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
