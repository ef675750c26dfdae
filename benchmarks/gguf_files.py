"""Writes GGUF files from models of transformers as llama.cpp's converter does, with the package `gguf` alone."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from torch import nn

CONVERTED = {
    "bert": "bert", "cohere": "command-r", "gemma": "gemma", "gpt2": "gpt2", "gpt_neox": "gptneox", "llama": "llama",
    "mixtral": "llama", "phi3": "phi3", "qwen2": "qwen2", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe",
}  # fmt: skip
"""Type of a model of transformers → the architecture of GGUF that it is written as."""
Array = np.ndarray[Any, Any]


def write(model: nn.Module, path: Path, kind: str = "F32", blocks: dict[str, Array] | None = None) -> None:
    """Write a model as GGUF.

    Args:
        model: of transformers, of a type in `CONVERTED`.
        path: the file.
        kind: type of the matrices whose rows are whole blocks of it; all else is float32. One that the package
            quantizes to.
        blocks: tensor of GGUF → its blocks of the type, (…, bytes of a row), in place of the quantized matrix.
    """
    config: Any = model.config
    architecture = CONVERTED[config.model_type]
    shared = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(shared)
    writer.add_token_list([f"word {number}" for number in range(config.vocab_size)])
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
    if experts := getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None):
        writer.add_expert_count(experts)
    chosen = gguf.GGMLQuantizationType[kind]
    size, _ = gguf.GGML_QUANT_SIZES[chosen]
    for name, W in converted(model).items():
        if blocks and name in blocks:
            writer.add_tensor(name, blocks[name], raw_dtype=chosen)
        elif W.ndim > 1 and W.shape[-1] % size == 0:
            writer.add_tensor(name, gguf.quantize(W, chosen), raw_dtype=chosen)
        else:
            writer.add_tensor(name, W)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def converted(model: nn.Module) -> dict[str, Array]:
    """Tensors by their names in GGUF, float32, in the order of numbers of llama.cpp."""
    config: Any = model.config
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(numbers[CONVERTED[config.model_type]], config.num_hidden_layers)
    state = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
    found = _experts({name: W for name, W in state.items() if ".experts." in name})
    for stored, W in state.items():
        name = stored.removeprefix("bert.")
        if ".experts." in name:
            continue
        if (named := table.get_name(name, (".weight", ".bias"))) and not _tied(model, named):
            found[named] = np.ascontiguousarray(_rearranged(config, stored, named, W), dtype=np.float32)
    return found


def _tied(model: nn.Module, name: str) -> bool:
    config: Any = model.config
    return name == "output.weight" and config.tie_word_embeddings


def _experts(state: dict[str, Array]) -> dict[str, Array]:
    """Stacks of experts, or experts one by one as transformers 4 has them, as the stacks of GGUF."""
    parts = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}
    stacks: dict[str, list[Array]] = {}
    for name, W in state.items():
        block, kind = name.split(".")[2], name.removesuffix(".weight").rpartition(".")[2]
        halves = kind == "gate_up_proj"
        for part, one in zip(("gate", "up"), np.split(W, 2, axis=1), strict=True) if halves else [(parts[kind], W)]:
            stacks.setdefault(f"blk.{block}.ffn_{part}_exps.weight", []).append(one)
    return {name: np.stack(held) if held[0].ndim == 2 else held[0].copy() for name, held in stacks.items()}


def _rearranged(config: Any, stored: str, named: str, W: Array) -> Array:
    heads = config.num_attention_heads
    kind = named.split(".")[-2]
    if CONVERTED[config.model_type] == "llama" and kind in ("attn_q", "attn_k"):
        if kind == "attn_k":
            heads = config.num_key_value_heads
        return W.reshape(heads, 2, -1, *W.shape[1:]).swapaxes(1, 2).reshape(W.shape)
    if config.model_type == "gpt2" and stored.split(".")[-2] in ("c_attn", "c_proj", "c_fc") and W.ndim == 2:
        return W.T
    if config.model_type == "gpt_neox" and kind == "attn_qkv":
        return W.reshape(heads, 3, -1, *W.shape[1:]).swapaxes(0, 1).reshape(W.shape)
    return W + 1 if config.model_type == "gemma" and kind.endswith("norm") else W
