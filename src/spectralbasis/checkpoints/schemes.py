"""The schemes of quantization that are read: one `Scheme` record each in `SCHEMES`.

A record names the parts of a weight (numbers, scales, zeros, codebooks), its **group**, and, if the scheme is certain,
the formula in `dequantize.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import ceil, prod
from typing import Any, NotRequired

import torch
from typing_extensions import TypedDict

from spectralbasis.checkpoints import dequantize
from spectralbasis.checkpoints.checkpoint import FLOAT8, INTEGERS, NUMBERS, Checkpoint
from spectralbasis.checkpoints.dequantize import EncodedWeight, Formula
from spectralbasis.errors import InputError
from spectralbasis.records import checked, parse_json

_BYTE, _INT8, _WORD = frozenset({torch.uint8}), frozenset({torch.int8}), frozenset({torch.int32, torch.uint32})
_EIGHT = FLOAT8 | _INT8
_LONGEST_DESCRIPTION = 1 << 16


@dataclass(frozen=True)
class Group:
    """The tensors of one weight.

    Attributes:
        checkpoint: where they are stored.
        weight: name of the real weight.
        base: what all names begin with.
        roles: rest of the name → stored name.
        settings: what the config says about quantization; empty where it says nothing.
    """

    checkpoint: Checkpoint
    weight: str
    base: str
    roles: Mapping[str, str]
    settings: Mapping[str, Any]

    @property
    def method(self) -> str:
        """The method that the config names; empty where it names none."""
        return method_of(self.settings)

    def shape(self, role: str) -> tuple[int, ...]:
        """Shape of one part; empty where the group has none."""
        return self.checkpoint.shape(self.roles[role]) if role in self.roles else ()

    def dtype(self, role: str) -> torch.dtype:
        return self.checkpoint.dtype(self.roles[role])

    def real(self, *roles: str) -> bool:
        """Whether those of the parts that are there hold ordinary floating-point numbers."""
        kinds = [self.dtype(role) for role in roles if role in self.roles]
        return all(kind.is_floating_point and kind.itemsize > 1 for kind in kinds)

    def whole(self, *roles: str) -> bool:
        """Whether those of the parts that are there hold whole numbers."""
        return all(self.dtype(role) in INTEGERS for role in roles if role in self.roles)

    def in_groups(self, length: int, count: int) -> bool:
        """Whether `count` equal groups make up `length`, of the size that the config names if it names one."""
        named = [self.settings, *_weight_arguments(self.settings)]
        sizes = [found["group_size"] for found in named if isinstance(found.get("group_size"), int)]
        sizes = [size for size in sizes if size > 0]
        return count > 0 and length % count == 0 and (count == 1 or not sizes or length // count in sizes)

    def number(self, role: str) -> int:
        """A whole number that is stored as a tensor of its own."""
        return int(self.checkpoint.read(self.roles[role]).item())

    def made(self, shape: tuple[int, ...], formula: Formula, parts: Mapping[str, str]) -> EncodedWeight:
        """The weight that a formula gives for parts (its name for one → rest of the stored name)."""
        used = {part: self.roles[role] for part, role in parts.items() if role in self.roles}
        rest = tuple(name for name in self.roles.values() if name not in used.values())
        return EncodedWeight(self.weight, used, shape, formula, rest)


Plan = Callable[[Group], EncodedWeight | str | None]
"""What a group stands for; or what else a person should know of the format (empty or None for nothing)."""


@dataclass(frozen=True)
class Scheme:
    """One way of storing a weight.

    Attributes:
        name: as people call it.
        payload: how the name of the tensor with the numbers ends, after the base.
        needs: ends of names (globs) that the group must have.
        others: ends of names that it may have.
        kinds: dtypes of the numbers; None for any.
        weight: how the name of the real weight ends.
        methods: what the config must name; empty for anything.
        plan: what the group stands for; None where that is not certain.
    """

    name: str
    payload: str
    needs: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    kinds: frozenset[torch.dtype] | None = NUMBERS
    weight: str = ".weight"
    methods: frozenset[str] = frozenset()
    plan: Plan | None = None


def settings_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a model's config says about quantization, also where only a part of the model has a config of its own."""
    for key in ("quantization_config", "compression_config", "quantization"):
        if isinstance(config.get(key), Mapping) and config[key]:
            return config[key]
    inner = (config.get(key) for key in ("text_config", "llm_config", "language_config"))
    return next((found for part in inner if isinstance(part, Mapping) and (found := settings_of(part))), {})


def method_of(settings: Mapping[str, Any]) -> str:
    """The method that a config names, in lower case; empty where it names none."""
    found = settings.get("quant_method")
    return found.lower() if isinstance(found, str) else ""


# ---- what groups stand for -------------------------------------------------------------------------------------------


class _FourBits(TypedDict):
    """What the description says; the rest of it (`quant_type`, `dtype`) concerns computing with the weight."""

    shape: list[int]
    blocksize: int
    nested_blocksize: NotRequired[int | None]
    nested_offset: NotRequired[float | None]


def _bitsandbytes_4bit(group: Group) -> EncodedWeight | None:
    """4 bits: beside the numbers lie their scales, the levels and a description in JSON.

    Raises:
        InputError: the description is damaged, or does not fit what is stored.
    """
    kinds = (f".quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))
    role = next((kind for kind in kinds if kind in group.roles), None)
    if role is None:
        return None
    where = f"the description of {group.weight} of {group.checkpoint.source}"
    size, kind = group.shape(role), group.dtype(role)
    if kind != torch.uint8 or prod(size) > _LONGEST_DESCRIPTION:
        raise InputError(f"{where} is {kind} of shape {size}, expected a short text; restore the file")
    text = bytes(group.checkpoint.read(group.roles[role]).flatten().tolist())
    facts = checked(parse_json(text, where), _FourBits, where)
    shape, block, nested_block = tuple(facts["shape"]), facts["blocksize"], facts.get("nested_blocksize")
    try:
        if min(shape, default=0) < 1 or block < 1 or (nested_block or 1) < 1:
            raise ValueError(f"shape {shape} in blocks of {block}")
        count, blocks = prod(shape), -(-prod(shape) // block)
        held = prod(group.shape("")) * group.dtype("").itemsize
        if held != -(-count // 2):
            raise ValueError(f"{group.weight} holds {held} bytes, expected {-(-count // 2)}")
        expected = {"absmax": (blocks, nested_block is None), "quant_map": (16, True)}
        if nested_block is not None:
            expected |= {"nested_absmax": (-(-blocks // nested_block), True), "nested_quant_map": (256, True)}
        for part, (numbers, real) in expected.items():
            if f".{part}" not in group.roles:
                raise ValueError(f"{group.weight}.{part} is missing")
            stored, kind = prod(group.shape(f".{part}")), group.dtype(f".{part}")
            if stored != numbers:
                raise ValueError(f"{group.weight}.{part} holds {stored} numbers, expected {numbers}")
            if not (kind.is_floating_point if real else kind == torch.uint8):
                raise ValueError(f"{group.weight}.{part} holds {kind}, expected {'real numbers' if real else 'bytes'}")
    except ValueError as error:
        raise InputError(
            f"{group.weight} of {group.checkpoint.source} is a 4-bit weight whose description is damaged ({error}); "
            f"restore the file from the original"
        ) from error
    formula = partial(
        dequantize.bitsandbytes_4bit,
        shape=shape,
        block=block,
        nested_block=nested_block,
        nested_offset=facts.get("nested_offset") or 0.0,
    )
    parts = {"values": "", "scale": ".absmax", "levels": ".quant_map"}
    if nested_block is not None:
        parts |= {"nested_scale": ".nested_absmax", "nested_levels": ".nested_quant_map"}
    return group.made(shape, formula, parts)


def _bitsandbytes_8bit(group: Group) -> EncodedWeight | None:
    shape = group.shape(".weight")
    if len(shape) != 2 or group.shape(".SCB") != shape[:1] or not group.real(".SCB"):
        return None
    return group.made(shape, dequantize.bitsandbytes_int8, {"values": ".weight", "scale": ".SCB"})


def _scaled(group: Group, values: str, scale: str, zero: str | None = None, side: object = None) -> EncodedWeight | str:
    """Whole or 8-bit numbers times a factor for the matrix, each row, or each block."""
    shape, factors = group.shape(values), group.shape(scale)
    real = group.dtype(scale).is_floating_point and group.dtype(scale) not in FLOAT8
    if not real and not (group.dtype(scale) == torch.uint8 and _counts_exponents(group)):
        return "scales of an unknown kind"
    found = _grid(shape, factors, side)
    if found is None:
        return f"scales of shape {factors} for numbers of shape {shape}"
    if zero is not None and zero in group.roles and group.shape(zero) != factors:
        return f"zeros of shape {group.shape(zero)} for scales of shape {factors}"
    block, grid = found
    parts = {"values": values, "scale": scale, **({} if zero is None else {"zero": zero})}
    return group.made(shape, partial(dequantize.scaled, block=block, grid=grid), parts)


def _counts_exponents(group: Group) -> bool:
    """Whether scales that are stored as bytes are exponents of two."""
    return "mxfp8" in str(group.settings).lower() or group.settings.get("scale_fmt") == "ue8m0"


def _grid(
    shape: tuple[int, ...], factors: tuple[int, ...], side: object
) -> tuple[tuple[int, ...], tuple[int, ...] | None] | None:
    """Sides of the blocks that share a factor, and what the factors are reshaped to; None where it is not certain."""
    if len(shape) not in (2, 3):
        return None
    if prod(factors) == 1:
        return shape, (1,) * len(shape)
    if len(shape) == 2 and factors == shape[:1]:
        return (1, shape[1]), (shape[0], 1)
    if len(factors) != len(shape) or 0 in factors or (len(shape) == 3 and factors[0] not in (1, shape[0])):
        return None
    inner, counts = shape[-2:], factors[-2:]
    if isinstance(side, list | tuple) and len(side) == 2 and all(isinstance(n, int) and n > 0 for n in side):
        block: tuple[int | None, ...] = tuple(side)
        if counts != tuple(ceil(n / b) for n, b in zip(inner, side, strict=True)):
            block = tuple(_even(n, count) if count in (1, n) else None for n, count in zip(inner, counts, strict=True))
    else:
        block = tuple(_even(n, count) for n, count in zip(inner, counts, strict=True))
    if None in block:
        return None
    whole = tuple(b for b in block if b is not None)
    return ((1, *whole) if len(shape) == 3 else whole), None


def _even(length: int, count: int) -> int | None:
    """Side of a block if all blocks are equal and no other usual side gives as many blocks."""
    side, rest = divmod(length, count)
    return side if not rest and (count in (1, length) or side & (side - 1) == 0) else None


def _float8(group: Group) -> EncodedWeight | str:
    """DeepSeek's and transformers' fp8: the factor multiplies, whatever it is called (`_inv` too)."""
    scale = next(role for role in ("_scale_inv", "_scale", ".scale", ".qscale_weight") if role in group.roles)
    values = ".weight" if ".weight" in group.roles else ""
    shape, factors = group.shape(values), group.shape(scale)
    exponents = group.dtype(scale) == torch.float8_e8m0fnu or (group.dtype(scale) == torch.uint8)
    if group.dtype(values) == torch.int8:  # DeepSeek V4's experts: two 4-bit floats a byte, a scale for 32 of them
        if exponents and len(shape) == 2 and shape == (shape[0], 16 * factors[-1]) and factors[:-1] == shape[:1]:
            return _small_floats(group, values, scale)
        return "whole numbers in a format of 8-bit floats"
    if group.method == "fbgemm_fp8" and len(shape) != 2:
        return "a stack of experts"
    return _scaled(group, values, scale, side=group.settings.get("weight_block_size"))


def _small_floats(group: Group, values: str, scale: str, bits: int = 4, **more: str) -> EncodedWeight:
    shape = group.shape(values)
    columns = shape[-1] * 8 // bits
    parts = {"values": values, "scale": scale, **more}
    return group.made((*shape[:-1], columns), partial(dequantize.small_floats, bits=bits, columns=columns), parts)


def _compressed(group: Group) -> EncodedWeight | str:
    """compressed-tensors with one number a byte: `int-quantized`, `float-quantized`, `mxfp8-quantized`."""
    arguments = _weight_arguments(group.settings)
    blocks = [found["block_structure"] for found in arguments if found.get("block_structure")]
    side = blocks[0] if blocks and all(block == blocks[0] for block in blocks) else None
    return _scaled(group, "", "_scale", "_zero_point", side)


def _weight_arguments(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = settings.get("config_groups")
    found = groups.values() if isinstance(groups, Mapping) else ()
    weights = (group.get("weights") for group in found if isinstance(group, Mapping))
    return [arguments for arguments in weights if isinstance(arguments, Mapping)]


def _compressed_words(group: Group) -> EncodedWeight | str:
    """compressed-tensors' `pack-quantized`: whole numbers without gaps in words."""
    stored, scale = group.shape("_packed"), group.shape("_scale")
    if len(stored) != 2 or group.shape("_shape") != (2,) or len(scale) != 2 or not group.real("_scale"):
        return "packed in an unknown way"
    rows, columns = (int(side) for side in group.checkpoint.read(group.roles["_shape"]).tolist())
    fitting = [bits for bits in range(1, 9) if stored == (rows, ceil(columns * bits / 32))]
    if len(fitting) != 1 or scale[0] not in (1, rows) or not group.in_groups(columns, scale[1]):
        return "packed in an unknown way"
    bits = fitting[0]
    if "_zero_point" in group.roles and (
        group.dtype("_zero_point") not in _WORD or group.shape("_zero_point") != (ceil(rows * bits / 32), scale[1])
    ):
        return "zeros packed in an unknown way"
    if "_g_idx" in group.roles and (group.shape("_g_idx") != (columns,) or not group.whole("_g_idx")):
        return "groups in an unknown order"
    parts = {"values": "_packed", "scale": "_scale", "zero": "_zero_point", "order": "_g_idx"}
    shape = (rows, columns)
    return group.made(shape, partial(dequantize.compressed_tensors, shape=shape, bits=bits), parts)


def _compressed_floats(group: Group) -> EncodedWeight | str:
    """compressed-tensors' `nvfp4-`, `mxfp4-` and `mxfp6-pack-quantized`."""
    stored, scale, outer = group.shape("_packed"), group.shape("_scale"), group.shape("_global_scale")
    known = "_zero_point" not in group.roles and group.real("_global_scale")
    if len(stored) != 2 or len(scale) != 2 or scale[0] != stored[0] or not known:
        return "packed in an unknown way"
    run, kind = divmod(stored[1], scale[1] or 1), group.dtype("_scale")
    if kind == torch.float8_e4m3fn and run == (8, 0) and "_global_scale" in group.roles and prod(outer) == 1:
        return _small_floats(group, "_packed", "_scale", inverse="_global_scale")
    if kind in (torch.uint8, torch.float8_e8m0fnu) and run in ((16, 0), (24, 0)) and "_global_scale" not in group.roles:
        return _small_floats(group, "_packed", "_scale", 4 if run == (16, 0) else 6)
    return "packed in an unknown way"


def _modelopt_nvfp4(group: Group) -> EncodedWeight | None:
    stored, scale = group.shape(""), group.shape("_scale")
    known = group.dtype("_scale") == torch.float8_e4m3fn and prod(group.shape("_scale_2")) == 1
    known = known and group.real("_scale_2")
    if not known or len(stored) != 2 or stored != (scale[0], 8 * scale[-1]):
        return None
    return _small_floats(group, "", "_scale", outer="_scale_2")


def _gpt_oss(group: Group) -> EncodedWeight | None:
    stored = group.shape("_blocks")
    if (
        len(stored) != 4
        or stored[3] != 16
        or group.shape("_scales") != stored[:3]
        or group.dtype("_scales") not in _BYTE
    ):
        return None
    experts, outputs, runs, _ = stored
    shape = (experts, 32 * runs, outputs)
    return group.made(shape, dequantize.gpt_oss, {"values": "_blocks", "scale": "_scales"})


def _gptq(group: Group) -> EncodedWeight | str:
    layout = str(group.settings.get("checkpoint_format") or group.settings.get("format") or "gptq").lower()
    if layout not in ("gptq", "gptq_v2"):
        return f"checkpoint_format {layout}"
    stored, zeros, scale = (group.shape(role) for role in (".qweight", ".qzeros", ".scales"))
    kinds = group.real(".scales") and group.dtype(".qzeros") in _WORD and group.whole(".g_idx")
    if not kinds or not len(stored) == len(zeros) == len(scale) == 2 or 0 in scale:
        return "packed in an unknown way"
    if zeros[0] != scale[0] or stored[1] != scale[1]:
        return "packed in an unknown way"
    bits = zeros[1] * 32 // scale[1]
    inputs = stored[0] * 32 // max(bits, 1)
    whole = zeros[1] * 32 == bits * scale[1] and stored[0] * 32 == bits * inputs
    if bits not in (2, 3, 4, 8) or not whole or group.settings.get("bits", bits) != bits:
        return "packed in an unknown way"
    if ".g_idx" in group.roles and group.shape(".g_idx") != (inputs,):
        return "groups in an unknown order"
    if ".g_idx" not in group.roles and not group.in_groups(inputs, scale[0]):
        return "groups in an unknown order"
    parts = {"values": ".qweight", "scale": ".scales", "zero": ".qzeros", "order": ".g_idx"}
    first = 1 if layout == "gptq" else 0
    return group.made((scale[1], inputs), partial(dequantize.gptq, bits=bits, first=first), parts)


def _awq(group: Group) -> EncodedWeight | str:
    told = [group.settings[key] for key in ("version", "format", "checkpoint_format") if group.settings.get(key)]
    bits = group.settings.get("bits", group.settings.get("w_bit", 4))
    if (
        any(str(version).lower() != "gemm" for version in told)
        or group.settings.get("backend") == "llm-awq"
        or bits != 4
    ):
        return f"{bits} bits, version {', '.join(map(str, told)) or 'unknown'}"
    stored, zeros, scale = (group.shape(role) for role in (".qweight", ".qzeros", ".scales"))
    kinds = group.real(".scales") and group.dtype(".qzeros") in _WORD
    if not kinds or not len(stored) == len(zeros) == len(scale) == 2 or not group.in_groups(stored[0], scale[0]):
        return "packed in an unknown way"
    if 8 * stored[1] != scale[1] or zeros != (scale[0], stored[1]):
        return "packed in an unknown way"
    parts = {"values": ".qweight", "scale": ".scales", "zero": ".qzeros"}
    return group.made((scale[1], stored[0]), dequantize.awq, parts)


def _mlx(group: Group) -> EncodedWeight | str:
    own = group.settings.get(group.base)
    settings = {**group.settings, **own} if isinstance(own, Mapping) else group.settings
    bits, size, mode = settings.get("bits"), settings.get("group_size"), settings.get("mode", "affine")
    stored, scale = group.shape(".weight"), group.shape(".scales")
    offset = next((role for role in (".biases", ".qbiases") if role in group.roles), "")
    if not isinstance(bits, int) or not isinstance(size, int):
        return "whose config does not give bits and group size"
    known = f"{bits} bits, groups of {size}"
    fits = len(stored) == len(scale) >= 2 and stored[:-1] == scale[:-1] and stored[-1] * 32 == bits * size * scale[-1]
    fits = fits and size > 0 and group.real(".scales", offset)
    if mode != "affine" or not fits or not 1 <= bits <= 8 or group.shape(offset) != scale:
        return known if mode == "affine" else f"mode {mode}, {known}"
    columns = size * scale[-1]
    parts = {"values": ".weight", "scale": ".scales", "offset": offset}
    return group.made((*stored[:-1], columns), partial(dequantize.mlx, bits=bits, columns=columns), parts)


def _hqq(group: Group) -> EncodedWeight | str:
    told = ("nbits", "group_size", "shape", "axis", "packing", "scale", "zero")
    if any(f".{name}" not in group.roles for name in told):
        return "whose description is not stored"
    numbers = ("nbits", "group_size", "axis", "quant_scale", "quant_zero")
    single = all(prod(group.shape(f".{name}")) == 1 for name in numbers if f".{name}" in group.roles)
    if not single or group.shape(".shape") != (2,) or prod(group.shape(".packing")) > 64:
        return "whose description is damaged"
    if any(f".{name}" in group.roles and group.number(f".{name}") for name in ("quant_scale", "quant_zero")):
        return "scales quantized too"
    bits, size, axis = (group.number(f".{name}") for name in ("nbits", "group_size", "axis"))
    if bits not in (1, 2, 3, 4, 8) or size < 1 or axis not in (0, 1):
        return "whose description is damaged"
    shape = tuple(map(int, group.checkpoint.read(group.roles[".shape"]).tolist()))
    packing = bytes(group.checkpoint.read(group.roles[".packing"]).tolist()).decode("ascii", "replace")
    unpacked = (prod(shape) // size, size) if axis == 1 else (size, prod(shape) // size)
    held = 10 if bits == 3 else 8 // bits
    factors = (unpacked[0], 1) if axis == 1 else (1, unpacked[1])
    width = group.dtype(".W_q").itemsize
    stored, rest = divmod(ceil(unpacked[0] / held) * unpacked[1] * (4 if bits == 3 else 1), width)
    usual = packing == ("3bit_32" if bits == 3 else f"{bits}bit_u8")
    fits = prod(group.shape(".W_q")) == stored and group.shape(".scale") == group.shape(".zero") == factors
    fits = fits and not rest and min(shape) > 0 and group.real(".scale", ".zero")
    if not usual or not fits or len(shape) != 2 or prod(unpacked) != prod(shape):
        return f"{bits} bits, packed in an unknown way"
    parts = {"values": ".W_q", "scale": ".scale", "zero": ".zero"}
    return group.made(shape, partial(dequantize.hqq, shape=shape, bits=bits, rows=unpacked[0]), parts)


def _quanto(group: Group) -> EncodedWeight | str:
    if group.method != "quanto":
        return ""
    return _scaled(group, "._data", "._scale")


def _bitnet(group: Group) -> EncodedWeight | str:
    stored, kind = group.shape(""), group.settings.get("linear_class", "bitlinear")
    one = prod(group.shape("_scale")) == 1 and group.real("_scale")
    if len(stored) != 2 or not one or kind not in ("bitlinear", "autobitlinear"):
        return f"linear_class {kind}"
    parts = {"values": "", "scale": "_scale"}
    return group.made((4 * stored[0], stored[1]), partial(dequantize.bitnet, divided=kind == "bitlinear"), parts)


# ---- the table -------------------------------------------------------------------------------------------------------

_HQQ_PARTS = (
    *(
        ".scale",
        ".zero",
        ".nbits",
        ".group_size",
        ".shape",
        ".axis",
        ".packing",
        ".view_as_float",
        ".unpack_view_dtype",
    ),
    *(".quant_scale", ".quant_zero", ".compute_dtype", ".offload_meta", ".encoded_state_dict", ".stores_quant_config"),
    *(".channel_wise", ".optimize", ".round_zero", ".meta"),
)
_TORCHAO = partial(_scaled, values="._weight_qdata", scale="._weight_scale", zero="._weight_zero_point")
_AUTO_ROUND = frozenset({"auto-round", "intel/auto-round", "auto_round"})

SCHEMES = (
    Scheme("bitsandbytes, 4 bits", "", (".absmax", ".quant_state.bitsandbytes__*"), (".quant_map", ".nested_*"),
           None, "", plan=_bitsandbytes_4bit),
    Scheme("bitsandbytes, 4 bits, without its description", "", (".absmax",), (".quant_map", ".nested_*"), None, ""),
    Scheme("bitsandbytes, 8 bits", ".weight", (".SCB",), (".weight_format",), _INT8, plan=_bitsandbytes_8bit),
    Scheme("gpt-oss, MXFP4", "_blocks", ("_scales",), (), _BYTE, "", plan=_gpt_oss),
    Scheme("compressed-tensors", "_packed", ("_scale", "_shape"), ("_zero_point", "_g_idx"), _WORD, "",
           plan=_compressed_words),
    Scheme("compressed-tensors", "_packed", ("_scale",), ("_global_scale", "_zero_point", "_shape"), _BYTE, "",
           plan=_compressed_floats),
    Scheme("compressed-tensors", "_packed", ("_scale",), ("_*",), NUMBERS, ""),
    Scheme("compressed-tensors", "", ("_scale",), ("_zero_point",), _EIGHT, "", frozenset({"compressed-tensors"}),
           _compressed),
    Scheme("compressed-tensors, sparse", ".bitmask", (".compressed",), (".*",), NUMBERS, ""),
    Scheme("ModelOpt, NVFP4", "", ("_scale", "_scale_2"), (), _BYTE, "", plan=_modelopt_nvfp4),
    Scheme("ModelOpt", "", ("_scale",), (), FLOAT8, "", frozenset({"modelopt"}), _float8),
    Scheme("fp8", "", ("_scale_inv|_scale",), (), _EIGHT, "", frozenset({"fp8"}), _float8),
    Scheme("fp8", ".weight", (".scale|.qscale_weight",), (), _EIGHT, ".weight", frozenset({"fp8"}), _float8),
    Scheme("FBGEMM", "", ("_scale",), (), FLOAT8, "", frozenset({"fbgemm_fp8"}), _float8),
    Scheme("Quark", "", ("_scale",), (), FLOAT8, "", frozenset({"quark"}), _float8),
    Scheme("BitNet", "", ("_scale",), (), _BYTE, "", frozenset({"bitnet"}), _bitnet),
    Scheme("MLX", ".weight", (".scales",), (".biases", ".qbiases"), frozenset({torch.uint32}), plan=_mlx),
    Scheme("SINQ", ".W_q", (), (".*",), methods=frozenset({"sinq"})),
    Scheme("HQQ", ".W_q", (), _HQQ_PARTS, plan=_hqq),
    Scheme("HQQ", ".W_q", (".scale", ".zero", ".nbits"), _HQQ_PARTS, None, plan=_hqq),
    Scheme("quanto", "._data", ("._scale",), (), _EIGHT, "", plan=_quanto),
    Scheme("quanto", "._data", ("._scale",), ("._*",), NUMBERS, ""),
    Scheme("quanto", "._data._data", (), ("._scale", "._shift"), NUMBERS, ""),
    Scheme("torchao", "._weight_qdata", ("._weight_scale",), ("._weight_zero_point",), _EIGHT, plan=_TORCHAO),
    Scheme("torchao", "._weight_qdata", (), ("._weight_*",)),
    Scheme("SVDQuant", ".qweight", (".wscales",), (".*",)),
    Scheme("ParoQuant", ".qweight", (".theta",), (".*",)),
    Scheme("AWQ", ".qweight", (".scales", ".qzeros"), (), _WORD, methods=frozenset({"awq"}), plan=_awq),
    Scheme("GPTQ", ".qweight", (".scales", ".qzeros"), (".g_idx",), _WORD, methods=frozenset({"gptq"}), plan=_gptq),
    Scheme("AutoRound", ".qweight", (), (".*",), methods=_AUTO_ROUND),
    Scheme("GPTQ, AWQ or a relative of theirs", ".qweight", (), (".*",)),
    Scheme("Marlin", ".B", (".s",), (".*",)),
    Scheme("QQQ", ".B", (".s_channel",), (".*",)),
    Scheme("EXL2", ".q_weight", (), (".*",)),
    Scheme("EXL3", ".trellis", (".suh|.svh|.su|.sv",), (".*",)),
    Scheme("QTIP", ".trellis", (), (".*",)),
    Scheme("QuIP#", ".Qidxs", (), (".*",)),
    Scheme("VPTQ", ".indices", (".centroids|.centroids.weight",), (".*", ".*centroids.weight"), None),
    Scheme("AQLM", ".codes", (".codebooks",), (".*",)),
    Scheme("SpQR", ".dense_weights", (".row_offsets",), (".*",)),
    Scheme("HIGGS", ".weight", (".tables|.tables2",), (".*",)),
    Scheme("EETQ", "", ("_scales",), (), _INT8, ""),
    Scheme("NVFP4", "", ("_sf",), ("_*",), _BYTE, ""),
)  # fmt: skip

# How names end of numbers that may be stored as ordinary floats.
NAMED = tuple(form.payload for form in SCHEMES if form.kinds is None and form.payload)
