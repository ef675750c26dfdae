"""Formulas that compute a float32 weight from the stored parts of a quantized, normalised or pruned one.

Every formula takes the stored tensors by part (`values`, `scale`, `zero` and so on) and returns the weight.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from spectralbasis.checkpoints.checkpoint import Checkpoint
from spectralbasis.errors import InputError

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
class EncodedWeight:
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
        stacked = {role for role, name in self.roles.items() if checkpoint.shape(name)[:1] == self.shape[:1]}
        if len(self.shape) < 3 or "values" not in stacked:
            return self.read(checkpoint)[start:stop]
        parts = {
            role: checkpoint.read_rows(name, start, stop) if role in stacked else checkpoint.read(name)
            for role, name in self.roles.items()
        }
        count = len(range(*slice(start, stop).indices(self.shape[0])))
        return self._computed(parts, (count, *self.shape[1:]), checkpoint)

    def _computed(self, parts: Parts, shape: tuple[int, ...], checkpoint: Checkpoint) -> Tensor:
        try:
            W = self.formula(parts)
            if tuple(W.shape) != shape:
                raise ValueError(f"they make a weight of shape {tuple(W.shape)}, expected {shape}")
        except (RuntimeError, ValueError, IndexError) as error:
            raise InputError(
                f"{self.name} of {checkpoint.source} is stored in parts, which contradict each other ({error}); "
                f"restore the file from the original"
            ) from error
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


def bitsandbytes_4bit(
    parts: Parts, *, shape: tuple[int, ...], block: int, nested_block: int | None, nested_offset: float
) -> Tensor:
    """NF4 and FP4 (QLoRA, arXiv 2305.14314, section 3): a level times the scale of its block.

    Args:
        parts: `values` (two levels a byte, the first in the higher half), `levels` (16,) and `scale`, one for each
            block; where the scales are quantized too, they are 8-bit indices into `nested_levels`, times one of
            `nested_scale` for each block of them.
        shape: of the weight.
        block: values that share a scale.
        nested_block: scales that share a scale of their own; None where scales are stored as they are.
        nested_offset: what is added to such scales.
    """
    packed = parts["values"].reshape(-1).view(torch.uint8)
    levels = torch.stack([packed >> 4, packed & 0xF], dim=1).flatten()[: prod(shape)]
    values, scale = parts["levels"].float().flatten()[levels.int()], parts["scale"].float().flatten()
    if nested_block is not None:
        nested = parts["nested_levels"].float().flatten()[scale.int()]
        outer = parts["nested_scale"].float().flatten().repeat_interleave(min(nested_block, len(nested)))
        scale = nested * outer[: len(nested)] + nested_offset
    return (values * scale.repeat_interleave(min(block, len(values)))[: len(values)]).reshape(shape)


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
    scale, numbers = parts["scale"].float(), []
    for words in (parts["values"], parts["zero"]):
        eights = unpack_bits(words, 4, 8 * words.shape[-1]).unflatten(-1, (-1, 8))
        numbers.append(eights[..., list(_AWQ_PLACES)].flatten(-2).float())
    values, zero = numbers
    group = len(values) // len(scale)
    return ((values - zero.repeat_interleave(group, 0)) * scale.repeat_interleave(group, 0)).T


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


def weight_norm(parts: Parts) -> Tensor:
    """Weight normalisation (arXiv 1602.07868): `W = length · V / ‖V‖`, with a norm for each entry of `length`.

    Args:
        parts: `direction`, V, and `length`: one number, or a tensor of V's dimensions in which the normalised ones
            are 1.
    """
    direction, length = parts["direction"].float(), parts["length"].float()
    normalised = [i for i in range(direction.ndim) if length.ndim == 0 or length.shape[i] == 1]
    return direction * (length / torch.linalg.vector_norm(direction, dim=normalised, keepdim=True))


def spectral_norm(parts: Parts) -> Tensor:
    """Spectral normalisation (arXiv 1802.05957) in evaluation: `W = V / σ` with `σ = u · (V v)`.

    V is flattened to a matrix whose rows are its first dimension, or its second for transposed convolutions. Which of
    the two it is where both have one length is not stored: u is V v but for its length, and that tells.

    Args:
        parts: `original`, V, `left`, u, and `right`, v.
    """
    V, u, v = (parts[part].float() for part in ("original", "left", "right"))
    images = [V.movedim(rows, 0).flatten(1) @ v for rows in spectral_rows(tuple(V.shape), u, v)]
    best = max(images, key=lambda image: float(u @ image) / float(image.norm().clamp_min(1e-30)))
    return V / (u @ best)


def spectral_rows(shape: tuple[int, ...], u: Tensor, v: Tensor) -> list[int]:
    """Dimensions of V that u may belong to: the second only for convolutions."""
    candidates = (0, 1) if len(shape) > 2 else (0,)
    return [rows for rows in candidates if u.shape == (shape[rows],) and v.shape == (prod(shape) // shape[rows],)]


def pruned(parts: Parts) -> Tensor:
    """`W = V · mask`, of `original`, V, and `mask`, a tensor of ones and zeros of V's shape."""
    return parts["original"].float() * parts["mask"].float()
