"""Tiny models built offline, with random weights from the libraries' own config classes."""

from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

_TEXT = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
}
_IMAGES = {"num_channels": 3, "image_size": 16, "patch_size": 4}
_SIZES: dict[str, dict[str, Any]] = {
    "bert": _TEXT,
    "roberta": _TEXT,
    "deberta-v2": {**_TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm",
                   "share_att_key": True, "position_buckets": 4, "position_biased_input": False},
    "distilbert": {"vocab_size": 50, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    "t5": {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    "gpt2": {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16},
    "gpt_bigcode": {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16},
    "gpt_neox": _TEXT,
    "bloom": {"vocab_size": 50, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": _TEXT,
    "codegen": {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16, "rotary_dim": 4},
    "modernbert": {**_TEXT, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2},
    "llama": {**_TEXT, "num_key_value_heads": 2},
    "phi3": {**_TEXT, "num_key_value_heads": 2},
    "mixtral": {**_TEXT, "num_key_value_heads": 2, "num_local_experts": 3},
    "qwen2_moe": {**_TEXT, "num_key_value_heads": 2, "num_experts": 3, "num_experts_per_tok": 2,
                  "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40, "decoder_sparse_step": 1},
    "qwen3_moe": {**_TEXT, "num_key_value_heads": 2, "num_experts": 3, "num_experts_per_tok": 2, "head_dim": 8,
                  "moe_intermediate_size": 24},
    "granitemoe": {**_TEXT, "num_key_value_heads": 2, "num_local_experts": 3},
    "llama4_text": {**_TEXT, "num_key_value_heads": 2, "num_local_experts": 3, "head_dim": 8},
    "gpt_oss": {**_TEXT, "num_key_value_heads": 2, "num_local_experts": 3, "head_dim": 8},
    "vit": {**_TEXT, **_IMAGES},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    "convnext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    "mamba": {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 6},
    "clip": {"projection_dim": 24, "text_config": _TEXT,
             "vision_config": {**_TEXT, **_IMAGES, "hidden_size": 16, "intermediate_size": 24}},
    "whisper": {"vocab_size": 50, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
                "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8,
                "max_source_positions": 16, "max_target_positions": 16, "pad_token_id": 0, "bos_token_id": 1,
                "eos_token_id": 2, "decoder_start_token_id": 1},
    "wav2vec2": {**_TEXT, "conv_dim": (8,), "conv_kernel": (3,), "conv_stride": (2,), "num_feat_extract_layers": 1,
                 "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
}  # fmt: skip
_HEADS = {"": AutoModel, "causal": AutoModelForCausalLM, "classifier": AutoModelForSequenceClassification}


def tiny(model_type: str, head: str = "", **config: Any) -> nn.Module:
    """A transformers model of a few thousand parameters; `head` is empty, `causal` or `classifier`."""
    return _HEADS[head].from_config(AutoConfig.for_model(model_type, **{**_SIZES[model_type], **config})).eval()
