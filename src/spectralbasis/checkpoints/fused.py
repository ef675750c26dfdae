"""Which rows of a fused weight hold the query, the key, the value, the gate and the up projection."""

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


def _equal(*names: str, square: bool = False) -> Split:
    """Parts of equal height, one after the other; with `square`, each as high as it is wide.

    Where `qkv` of timm and transformers is not square, heads may share keys (LitGPT) or keys be shorter (LeViT).
    """

    def split(rows: int, columns: int, config: Mapping[str, Any]) -> Parts | None:
        size, rest = divmod(rows, len(names))
        return None if rest or (square and size != columns) else _consecutive(dict.fromkeys(names, size))

    return split


def _halves(first: str, second: str) -> Split:
    def split(rows: int, columns: int, config: Mapping[str, Any]) -> Parts | None:
        if rows % 2 == 0 and model_type(config) == "gpt_oss":  # gate and up alternate row by row
            return _consecutive({first: 1, second: 1}, groups=rows // 2)
        return _equal(first, second)(rows, columns, config)

    return split


def _granite(rows: int, columns: int, config: Mapping[str, Any]) -> Parts | None:
    """`input_linear` is fused in the Granite mixtures of experts; elsewhere it may be any layer."""
    granite = model_type(config).startswith("granitemoe")
    return _halves("gate", "up")(rows, columns, config) if granite else None


def _grouped(rows: int, columns: int, config: Mapping[str, Any]) -> Parts | None:
    """All queries, then all keys, then all values; the config tells how many heads share a key (Phi-3, DBRX)."""
    for heads, shared, size in _heads(config, columns):
        if model_type(config) == "codegen" and rows == 3 * heads * size and rows % 12 == 0:
            # Four blocks, one for each accelerator it was trained on, with queries, values and keys in this order.
            return _consecutive({"query": rows // 12, "value": rows // 12, "key": rows // 12}, groups=4)
        if parts := _grouped_if(rows, heads, shared, size):
            return parts
    return None


def _grouped_or_thirds(rows: int, columns: int, config: Mapping[str, Any]) -> Parts | None:
    return _grouped(rows, columns, config) or _equal(*_QKV, square=True)(rows, columns, config)


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
    if model_type(config) != "gpt_bigcode":
        splits = (_equal(*names, square=True) for names in (_QKV[1:], _QKV))
        return next((parts for split in splits if (parts := split(rows, columns, config))), None)
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
    "qkv": _equal(*_QKV, square=True),
    "to_qkv": _equal(*_QKV),
    "in_proj_weight": _equal(*_QKV),
    "to_kv": _equal(*_QKV[1:]),
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
