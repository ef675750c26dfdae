"""What a stored tensor is: a weight matrix, or something that only has the shape of one."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

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
    r"|weight_g|freqs_(cos|sin|cis)|(query|key|diagonal)_decay|slope_rate)$|(^|_)(scale|scales|scale_inv|zero_point|absmax|amax|SCB)$"
)


def is_weight(checkpoint: Checkpoint, tensor: str) -> bool:
    """Whether the tensor could be a matrix at all: no vector, norm, bias, mask or table of positions.

    One that cannot be read counts, and one of complex numbers, so that it is listed.
    """
    if checkpoint.unreadable(tensor) is not None:
        return True
    shape = checkpoint.shape(tensor)
    *owners, leaf = tensor.split(".")
    if len(shape) < 2 or 0 in shape or _NOT_WEIGHTS.search(leaf):
        return False
    if owners and _NORM.search(owners[-1]):
        return False
    dtype = checkpoint.dtype(tensor)
    return dtype.is_floating_point or dtype.is_complex


def _is_there(checkpoint: Checkpoint, name: str) -> bool:
    try:
        checkpoint.shape(name)
    except KeyError:
        return False
    return True


def is_embedding_table(checkpoint: Checkpoint, tensor: str) -> bool:
    """Whether rows of the tensor are looked up: by its module where that is known, else by its name.

    A number at the end is that of a table in a list of tables, which has the name: `audio_embeddings.3.weight`. A
    layer with a bias is none.
    """
    owner = checkpoint.module_type(tensor)
    parts = plain_name(tensor).split(".")
    leaf = next((part for part in reversed(parts) if not part.isdigit()), parts[-1])
    if parts[-1] != leaf and _is_there(checkpoint, f"{tensor.removesuffix('.weight')}.bias"):
        return False
    convolution = tensor.endswith(".weight") and len(checkpoint.shape(tensor)) > 3
    return (owner is not None and issubclass(owner, nn.Embedding)) or bool(_EMBEDDING.search(leaf) and not convolution)


def left_out_by_default(checkpoint: Checkpoint, tensor: str, name: str) -> str | None:
    """Why the tensor is measured only where `include` names it, if so: it is an embedding table or a task head."""
    if is_embedding_table(checkpoint, tensor):
        return "embedding table: name it with include to measure it"
    if _HEAD.search(name):
        return "task head: name it with include to measure it"
    if checkpoint.shape(tensor)[0] in vocabulary_sizes(checkpoint.config):
        return "one row for each word of the vocabulary, as embeddings and output heads have: include measures it"
    return None


def vocabulary_sizes(config: Mapping[str, Any]) -> set[int]:
    """The sizes of vocabularies that a config names, without those that are also some other size in it."""
    words: set[int] = set()
    others: set[int] = set()
    for key, value in _numbers(config):
        (words if re.search(r"vocab(ulary)?_size$|^n_vocab$|^n_words$", key) else others).add(value)
    return words - others


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Every whole number beyond 1 in a config, with its key; configs of towers lie inside."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _numbers(value)
        elif isinstance(value, int) and value > 1:
            yield str(key), value
