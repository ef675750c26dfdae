"""Which weight of transformers each tensor of a GGUF file is, and in which order llama.cpp keeps its numbers.

The package `gguf` has a table from the names of many libraries to those of llama.cpp. It is read backwards here, and of
the names that lead to one tensor, the one is taken that transformers' model of the architecture has. `ARCHITECTURES`
says what llama.cpp's converter does to the numbers of each architecture; tensors of other architectures keep the names
that they have in the file, so that two files of one architecture can still be compared.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from spectralbasis.checkpoints.fused import split_fused
from spectralbasis.checkpoints.matrices import is_expert_stack
from spectralbasis.checkpoints.names import Conversions, conversions_of, expert_name, matrix_name, model_of

Facts = Mapping[str, Any]
"""The metadata of a file: texts, numbers and short lists by key; of a long list, its length."""


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp's converter changes the weights of one architecture.

    Attributes:
        model_type: what transformers calls the architecture.
        with_experts: what it calls it where the file has experts, if that is another one.
        interleaved: whether the rows of the query and the key are in the order of `Interleaved`.
        by_head: whether the rows of the fused query, key and value are in the order of `ByHead`.
        transposed: tensors of a block that transformers keeps as (in, out).
        norm_offset: what was added to the weights of norms.
        causal: whether the file has the output layer of a causal language model, unless that is tied.
    """

    model_type: str
    with_experts: str = ""
    interleaved: bool = False
    by_head: bool = False
    transposed: tuple[str, ...] = ()
    norm_offset: float = 0.0
    causal: bool = True


ARCHITECTURES = {
    "bert": Architecture("bert", causal=False),
    "cohere2": Architecture("cohere2"),
    "command-r": Architecture("cohere"),
    "gemma": Architecture("gemma", norm_offset=1.0),
    "gemma2": Architecture("gemma2", norm_offset=1.0),
    "gemma3": Architecture("gemma3_text", norm_offset=1.0),
    "gpt2": Architecture("gpt2", transposed=("attn_qkv", "attn_output", "ffn_up", "ffn_down")),
    "gptneox": Architecture("gpt_neox", by_head=True),
    "granite": Architecture("granite", interleaved=True),
    "llama": Architecture("llama", with_experts="mixtral", interleaved=True),
    "olmo": Architecture("olmo", interleaved=True),
    "olmo2": Architecture("olmo2"),
    "phi2": Architecture("phi"),
    "phi3": Architecture("phi3"),
    "qwen2": Architecture("qwen2"),
    "qwen2moe": Architecture("qwen2_moe"),
    "qwen3": Architecture("qwen3"),
    "qwen3moe": Architecture("qwen3_moe"),
    "starcoder2": Architecture("starcoder2"),
}
"""Architectures of GGUF whose names and order of numbers are turned back to those of transformers."""


class Order(Protocol):
    """The order in which a file keeps the rows of a weight."""

    def stored(self, rows: Tensor) -> Tensor:
        """Where the rows with these numbers, (count,) int64, of the weight lie in the file."""


@dataclass(frozen=True)
class Interleaved:
    """Rows of each head, such that the two that are rotated together follow each other.

    In transformers, the second row of a pair lies half a head after the first.
    """

    heads: int
    height: int

    def stored(self, rows: Tensor) -> Tensor:
        size = self.height // self.heads
        place = rows % size
        return rows - place + place % (size // 2) * 2 + place // (size // 2)


@dataclass(frozen=True)
class ByHead:
    """All queries, then all keys, then all values, of a weight that transformers keeps head by head."""

    heads: int
    height: int

    def stored(self, rows: Tensor) -> Tensor:
        size = self.height // self.heads // 3
        head, part, place = rows // (3 * size), rows // size % 3, rows % size
        return (part * self.heads + head) * size + place


@dataclass(frozen=True)
class Place:
    """What a stored tensor is.

    Attributes:
        name: in transformers; that of the file where it is not certain.
        shape: in transformers.
        order: of the rows in the file; None where it is that of transformers.
        transposed: whether the file has the transpose.
        offset: what was added to the numbers.
        reason: why it cannot be read as this weight; None where it can.
    """

    name: str
    shape: tuple[int, ...]
    order: Order | None = None
    transposed: bool = False
    offset: float = 0.0
    reason: str | None = None


_SIZES = {
    "block_count": ("num_hidden_layers",),
    "embedding_length": ("hidden_size",),
    "feed_forward_length": ("intermediate_size",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.key_length": ("head_dim",),
    "expert_count": ("num_experts", "num_local_experts"),
    "vocab_size": ("vocab_size",),
}
"""Key of the metadata, after the architecture → the sizes of a config that it is."""
_MOST_BLOCKS = 512
_BLOCK = re.compile(r"blk\.(\d{1,9})\.(.+)")
_TOKENS = "tokenizer.ggml.tokens"


def config_of(facts: Facts, tensors: Collection[str]) -> dict[str, Any]:
    """What a file says of the model, as `config.json` has it; {} for an architecture that is not in the table.

    A causal model without an output layer among its `tensors` is one whose output layer is its embedding table.
    """
    model_type = _model_type(facts)
    if not model_type:
        return {}
    name = facts["general.architecture"]
    found = {size: facts.get(f"{name}.{key}") for key, sizes in _SIZES.items() for size in sizes}
    found["vocab_size"] = found["vocab_size"] or facts.get(_TOKENS)
    known: dict[str, Any] = {size: value for size, value in found.items() if type(value) is int and value > 0}
    if (head := _head(model_type)) and ARCHITECTURES[name].causal:
        known |= {"architectures": [head], "tie_word_embeddings": "output.weight" not in tensors}
    return {"model_type": model_type, **known}


def _head(model_type: str) -> str | None:
    """Transformers' class of an architecture that writes text."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)


def _model_type(facts: Facts) -> str:
    name = facts.get("general.architecture")
    known = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if known is None:
        return ""
    return known.with_experts or known.model_type if facts.get(f"{name}.expert_count") else known.model_type


def find_places(shapes: Mapping[str, tuple[int, ...]], facts: Facts) -> dict[str, Place]:
    """What each tensor of a file is.

    Args:
        shapes: tensor → its shape, the last dimension being that of a row.
        facts: the metadata.
    """
    named = _Names(shapes, facts) if _model_type(facts) else None
    names = {tensor: named.certain(tensor) if named else None for tensor in shapes}
    count = Counter(names.values())
    places = {}
    for tensor, shape in shapes.items():
        name = names[tensor]
        if name is None or count[name] > 1 or name in shapes:
            places[tensor] = Place(tensor, shape)
        else:
            places[tensor] = _placed(tensor, name, named.with_row(name, shape) if named else shape, facts)
    return {tensor: _checked(tensor, place, shapes) for tensor, place in places.items()}


class _Names:
    """The names that transformers' model of the file's architecture has, and the table that leads to them."""

    def __init__(self, tensors: Mapping[str, tuple[int, ...]], facts: Facts) -> None:
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        blocks = [int(match[1]) for tensor in tensors if (match := _BLOCK.fullmatch(tensor))]
        count = min(max(blocks, default=-1) + 1, len(tensors), _MOST_BLOCKS)
        numbers = {name: number for number, name in MODEL_ARCH_NAMES.items()}
        table = get_tensor_name_map(numbers[facts["general.architecture"]], count).mapping
        self._candidates: dict[str, list[str]] = {}
        for name, (_, tensor) in table.items():
            if name != tensor:
                self._candidates.setdefault(tensor, []).append(name)
        model = _model(_model_type(facts), count, ARCHITECTURES[facts["general.architecture"]].causal)
        self._table: Conversions | None = conversions_of(model)
        self._known: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False) if model is not None else ():
            self._known |= _parts(name, tuple(parameter.shape), _model_type(facts))

    def certain(self, tensor: str) -> str | None:
        """What transformers calls a tensor of the file; None where it has no such weight, or more than one.

        A bias goes by the weight beside it, for only some models of an architecture have biases.
        """
        stem, _, leaf = tensor.rpartition(".")
        if leaf not in ("weight", "bias"):
            return None
        found: dict[str, str] = {}
        for candidate in self._candidates.get(stem, ()):
            canonical = self._canonical(candidate)
            if canonical in self._known:
                weight = self._known[canonical][0] or f"{candidate}.weight"
                found.setdefault(canonical, f"{weight.removesuffix('.weight')}.{leaf}")
        return next(iter(found.values())) if len(found) == 1 else None

    def with_row(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a tensor of this name, with the dimension of one row that llama.cpp leaves out."""
        _, known = self._known.get(str(self._canonical(name)), ("", ()))
        return (1, *shape) if len(known) == 2 and known[0] == 1 and len(shape) == 1 else shape

    def _canonical(self, name: str) -> str | None:
        short = matrix_name(name)
        if "experts" in short.split("."):
            short = expert_name(short, 0)
        return self._table.canonical(short) if self._table else short


def _model(model_type: str, blocks: int, causal: bool) -> nn.Module | None:
    """Transformers' model of an architecture, with one expert at most, for its names alone."""
    head = _head(model_type) if causal else None
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = {"model_type": model_type, "num_hidden_layers": blocks, "num_experts": 1, "num_local_experts": 1, **tokens}
    return model_of({**config, "architectures": [head]} if head else config)


def _parts(name: str, shape: tuple[int, ...], model_type: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What one parameter holds by canonical name, with its shape: itself, or its first expert and that one's parts.

    The parameter's own name comes with itself alone: a stack of experts has other ones in other files.
    """
    short = matrix_name(name)
    if "experts" in short.split("."):
        name = ""
    if not is_expert_stack(short, shape):
        return {short: (name, shape)}
    first = expert_name(short, 0)
    _, height, width = shape
    parts = split_fused(short, height, width, {"model_type": model_type}) or {}
    of_parts = {f"{first}.{part}": ("", (rows.count, width)) for part, rows in parts.items()}
    return {first: ("", shape[1:]), **of_parts}


def _placed(tensor: str, name: str, shape: tuple[int, ...], facts: Facts) -> Place:
    """A tensor of a known name, with what was done to its numbers."""
    known = ARCHITECTURES[facts["general.architecture"]]
    match = _BLOCK.fullmatch(tensor)
    kind, _, leaf = (match[2] if match else tensor).rpartition(".")
    if known.transposed and kind in known.transposed and leaf == "weight" and len(shape) == 2:
        return Place(name, shape[::-1], transposed=True)
    if known.norm_offset and kind.endswith("norm") and leaf == "weight" and len(shape) == 1:
        return Place(name, shape, offset=known.norm_offset)
    if match and known.interleaved and kind in ("attn_q", "attn_k"):
        heads, size = _heads(facts, int(match[1]), "_kv" if kind == "attn_k" else "")
        if heads and size and shape[0] == heads * size and size % 2 == 0:
            return Place(name, shape, Interleaved(heads, shape[0]))
    elif match and known.by_head and kind == "attn_qkv":
        heads, size = _heads(facts, int(match[1]), "")
        if heads and size and shape[0] == 3 * heads * size:
            return Place(name, shape, ByHead(heads, shape[0]))
    else:
        return Place(name, shape)
    stated = f"states {heads} heads of {size} rows for its {shape[0]} rows" if heads else "does not state its heads"
    return Place(name, shape, reason=f"its rows are in another order in GGUF, and the file {stated}: convert it again")


def _heads(facts: Facts, block: int, of: str) -> tuple[int, int]:
    """How many heads a block has, of keys if `of` is "_kv", and their height; 0 for what the file does not state."""
    name = facts["general.architecture"]

    def stated(key: str) -> int:
        value = facts.get(f"{name}.{key}")
        value = value[block] if isinstance(value, tuple) and block < len(value) else value
        return value if type(value) is int and value > 0 else 0

    all_heads = stated("attention.head_count")
    size = stated("attention.key_length") or (stated("embedding_length") // all_heads if all_heads else 0)
    return (stated("attention.head_count_kv") or all_heads) if of else all_heads, size


def _checked(tensor: str, place: Place, shapes: Mapping[str, tuple[int, ...]]) -> Place:
    """The place, with the reason if the tensor is no plain matrix of weights."""
    reason = place.reason
    stem = tensor.removesuffix(".weight")
    if tensor.endswith(".weight") and (scale := f"{stem}.scale") in shapes:
        reason = f"its numbers count only together with {scale}, which is not applied; pass a file without such scales"
    elif len(place.shape) > 2 and not is_expert_stack(place.name, place.shape):
        reason = f"it has {len(place.shape)} dimensions, and what they mean in this architecture of GGUF is not known"
    return Place(place.name, place.shape, place.order, place.transposed, place.offset, reason)
