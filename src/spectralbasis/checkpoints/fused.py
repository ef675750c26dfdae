"""Which rows of a fused weight belong to the query, the key, the value, the gate and the up projection."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Rows `start` to `stop` of every group, for a matrix whose rows are `groups` blocks of equal size."""

    groups: int
    start: int
    stop: int

    @property
    def count(self) -> int:
        return self.groups * (self.stop - self.start)

    def of(self, matrix: Tensor) -> Tensor:
        """The rows of a matrix, in their order."""
        blocks = matrix.unflatten(0, (self.groups, -1))
        return blocks[:, self.start : self.stop].flatten(0, 1)

    def numbers(self, rows: Tensor, height: int) -> Tensor:
        """Which rows of a matrix of `height` rows those with the numbers `rows`, (count,), of the selection are."""
        size = self.stop - self.start
        return rows // size * (height // self.groups) + self.start + rows % size


Parts = dict[str, Rows]
Split = Callable[[int, int, Mapping[str, Any]], Parts | None]
_QKV = ("query", "key", "value")
_BLOCKWISE_HEADS = ("gpt_neox", "gpt_neox_japanese", "bloom", "persimmon")


def split_fused(tensor: str, rows: int, columns: int, config: Mapping[str, Any]) -> Parts | None:
    """Parts of a fused weight of shape (rows, columns); None where it is one matrix or cannot be told apart safely.

    Layouts are those of the models' own code in transformers and timm; a config is needed where one name has several.
    """
    split = _SPLITS.get(tensor.removesuffix(".weight").rpartition(".")[2])
    return split(rows, columns, config) if split else None


def is_fused(name: str) -> bool:
    """Whether a weight of this name may be several matrices."""
    return name.removesuffix(".weight").rpartition(".")[2] in _SPLITS


def model_type(config: Mapping[str, Any]) -> str:
    """The family of models that a config names, "" where it names none."""
    name = config.get("model_type")
    return name if isinstance(name, str) else ""


def _consecutive(sizes: Mapping[str, int], groups: int = 1) -> Parts:
    parts, start = {}, 0
    for name, size in sizes.items():
        parts[name] = Rows(groups, start, start + size)
        start += size
    return parts


def _thirds(rows: int, columns: int, config: Mapping[str, Any]) -> Parts | None:
    return _consecutive(dict.fromkeys(_QKV, rows // 3)) if rows % 3 == 0 else None


def _halves(first: str, second: str) -> Split:
    def split(rows: int, columns: int, config: Mapping[str, Any]) -> Parts | None:
        if rows % 2:
            return None
        if model_type(config) == "gpt_oss":  # gate and up alternate row by row
            return _consecutive({first: 1, second: 1}, groups=rows // 2)
        return _consecutive({first: rows // 2, second: rows // 2})

    return split


def _granite(rows: int, columns: int, config: Mapping[str, Any]) -> Parts | None:
    """`input_linear` is fused in the Granite mixtures of experts; elsewhere it may be any layer."""
    granite = model_type(config).startswith("granitemoe")
    return _halves("gate", "up")(rows, columns, config) if granite else None


def _key_value(rows: int, columns: int, config: Mapping[str, Any]) -> Parts | None:
    return _consecutive({"key": rows // 2, "value": rows // 2}) if rows % 2 == 0 else None


def _grouped(rows: int, columns: int, config: Mapping[str, Any]) -> Parts | None:
    """All queries, then all keys, then all values; the config tells how many heads share a key (Phi-3, DBRX)."""
    for heads, shared, size in _heads(config, columns):
        if model_type(config) == "codegen" and rows == 3 * heads * size and rows % 12 == 0:
            return _codegen(rows)
        if parts := _grouped_if(rows, heads, shared, size):
            return parts
    return None


def _grouped_or_thirds(rows: int, columns: int, config: Mapping[str, Any]) -> Parts | None:
    thirds = _thirds(rows, columns, config) if rows == 3 * columns else None
    return _grouped(rows, columns, config) or thirds


def _square_thirds(rows: int, columns: int, config: Mapping[str, Any]) -> Parts | None:
    """`qkv` of timm and transformers; of other sizes, heads may share keys (LitGPT) or keys be shorter (LeViT)."""
    return _thirds(rows, columns, config) if rows == 3 * columns else None


def _codegen(rows: int) -> Parts:
    """Four blocks, one for each accelerator it was trained on, each with queries, values and keys in this order."""
    size = rows // 12
    return _consecutive({"query": size, "value": size, "key": size}, groups=4)


def _per_head(rows: int, columns: int, config: Mapping[str, Any]) -> Parts | None:
    """GPT-NeoX, BLOOM, ChatGLM: query, key and value of the first head, then of the second; Falcon in three layouts."""
    family = model_type(config)
    for heads, shared, size in _heads(config, columns):
        if family == "falcon" and config.get("new_decoder_architecture"):
            return _shared_keys(rows, heads, shared, size)
        if family == "falcon" and config.get("multi_query"):
            return _grouped_if(rows, heads, 1, size)
        if family == "chatglm" and config.get("multi_query_attention"):
            return _grouped_if(rows, heads, _first(config, "multi_query_group_num") or heads, size)
        if family in (*_BLOCKWISE_HEADS, "falcon", "chatglm") and rows == 3 * heads * size:
            return _consecutive(dict.fromkeys(_QKV, size), groups=heads)
    return None


def _shared_keys(rows: int, heads: int, shared: int, size: int) -> Parts | None:
    """Per key head: the queries that share it, then the key, then the value (Falcon 40B, InternLM2)."""
    if rows != (heads + 2 * shared) * size or heads % shared:
        return None
    return _consecutive({"query": heads // shared * size, "key": size, "value": size}, groups=shared)


def _internlm(rows: int, columns: int, config: Mapping[str, Any]) -> Parts | None:
    splits = (_shared_keys(rows, *sizes) for sizes in _heads(config, columns))
    return next((parts for parts in splits if parts), None)


def _grouped_if(rows: int, heads: int, shared: int, size: int) -> Parts | None:
    if rows != (heads + 2 * shared) * size:
        return None
    return _consecutive({"query": heads * size, "key": shared * size, "value": shared * size})


def _attention(rows: int, columns: int, config: Mapping[str, Any]) -> Parts | None:
    """`c_attn`: thirds in GPT-2, keys and values in its cross-attention, and two more layouts in GPT-BigCode."""
    if model_type(config) == "gpt_bigcode":
        return _bigcode(rows, columns, config)
    if rows == 2 * columns:
        return _key_value(rows, columns, config)
    return _thirds(rows, columns, config) if rows == 3 * columns else None


def _bigcode(rows: int, columns: int, config: Mapping[str, Any]) -> Parts | None:
    for heads, _, size in _heads(config, columns):
        if config.get("multi_query", True):
            return _grouped_if(rows, heads, 1, size)
        if rows == 3 * heads * size:
            return _consecutive(dict.fromkeys(_QKV, size), groups=heads)
    return None


def _heads(config: Mapping[str, Any], columns: int) -> Iterator[tuple[int, int, int]]:
    """Heads, heads of keys and values, and head size, for each tower that a config describes."""
    nested = [config.get(key) for key in ("text_config", "vision_config", "attn_config", "audio_config")]
    for tower in [config, *(part for part in nested if isinstance(part, Mapping))]:
        heads = _first(tower, "num_attention_heads", "n_head", "n_heads", "num_heads") or _first(
            config, "num_attention_heads", "n_head", "n_heads"
        )
        if heads is None:
            continue
        shared = _first(tower, "num_key_value_heads", "num_kv_heads", "kv_n_heads") or heads
        size = _first(tower, "head_dim") or columns // heads
        yield heads, shared, size


def _first(config: Mapping[str, Any], *keys: str) -> int | None:
    return next((config[key] for key in keys if type(config.get(key)) is int and config[key] > 0), None)


_SPLITS: dict[str, Split] = {
    "qkv": _square_thirds,
    "to_qkv": _thirds,
    "in_proj_weight": _thirds,
    "to_kv": _key_value,
    "qkv_proj": _grouped,
    "Wqkv": _grouped_or_thirds,
    "wqkv": _internlm,
    "query_key_value": _per_head,
    "c_attn": _attention,
    "gate_up_proj": _halves("gate", "up"),
    "input_linear": _granite,
    "w12": _halves("gate", "up"),
    "weights_in": _halves("gate", "up"),
    "Wi": _halves("input", "gate"),
}
