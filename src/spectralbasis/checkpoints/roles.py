"""What a stored tensor is: a weight matrix, or something that only has the shape of one."""

import re

from torch import nn

from spectralbasis.checkpoints.checkpoint import Checkpoint
from spectralbasis.checkpoints.names import plain_name

_EMBEDDING = re.compile(
    r"(^|_)(emb|embed|embeds|embedding|embeddings)\d*$"
    r"|^(embed|embeddings?)_(tokens|positions|in|out)$|^(wte|wpe|shared|tok_embeddings|tokens_embed)$"
    r"|^(relative_attention_bias|relative_position_bias_table|rel_pos_[hw])$|(^|_)tokens?$"
)
_HEAD = re.compile(
    r"^(classifier|score|cls|qa_outputs|head|heads|head_dist|pre_classifier|vocab_transform|vocab_projector"
    r"|predictions|logits_proj|seq_relationship|sequence_summary|span_predictor|output_projection|fc_out|proj_out"
    r"|generator_predictions|discriminator_predictions|projector|summary|output)(\.|$)"
    r"|^\w+_(head|heads|classifier|predictor)(\.|$)|(^|\.)lm_heads?(\.|$)|^(fc|decoder)$"
)
_NORM = re.compile(r"(^|_)(ln|bn|norm|layernorm|batchnorm|groupnorm|rmsnorm)(_?\d+|_[a-z])?$", re.IGNORECASE)
_NOT_WEIGHTS = re.compile(
    r"bias$|^(attn_mask|causal_mask|relative_coords_table|relative_position_index|position_ids|inv_freq|A_log"
    r"|weight_g|freqs_(cos|sin|cis))$|(^|_)(scale|scales|scale_inv|zero_point|absmax|amax|SCB)$"
)


def is_weight(checkpoint: Checkpoint, tensor: str) -> bool:
    """Whether the tensor could be a matrix at all: no vector, norm, bias, mask or table of positions.

    One that cannot be read counts, so that it is listed.
    """
    if checkpoint.unreadable(tensor) is not None:
        return True
    shape = checkpoint.shape(tensor)
    *owners, leaf = tensor.split(".")
    if len(shape) < 2 or 0 in shape or _NOT_WEIGHTS.search(leaf):
        return False
    if owners and _NORM.search(owners[-1]):
        return False
    return checkpoint.dtype(tensor).is_floating_point


def is_embedding_table(checkpoint: Checkpoint, tensor: str) -> bool:
    """Whether rows of the tensor are looked up: by its module where that is known, else by its name."""
    owner = checkpoint.module_type(tensor)
    leaf = plain_name(tensor).rpartition(".")[2]
    convolution = tensor.endswith(".weight") and len(checkpoint.shape(tensor)) > 3
    return (owner is not None and issubclass(owner, nn.Embedding)) or bool(_EMBEDDING.search(leaf) and not convolution)


def left_out_by_default(checkpoint: Checkpoint, tensor: str, name: str) -> str | None:
    """Why the tensor is measured only where `include` names it, if so: it is an embedding table or a task head."""
    if is_embedding_table(checkpoint, tensor):
        return "embedding table: name it with include to measure it"
    if _HEAD.search(name):
        return "task head: name it with include to measure it"
    return None
