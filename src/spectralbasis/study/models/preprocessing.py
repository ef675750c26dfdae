"""How a model wants its inputs: its tokenizer, or its image size and normalisation, read from where the model is."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.image_processing_base import ImageProcessingMixin

from spectralbasis.errors import InputError
from spectralbasis.study.models.collators import Collator, ImageCollator, SignalCollator, TextCollator
from spectralbasis.study.models.sources import UNREADABLE, unreadable
from spectralbasis.study.tasks.masking import MaskingCollator
from spectralbasis.study.tasks.task import Task


def load_collator(place: str, config: PretrainedConfig, task: Task, max_length: int) -> Collator:
    """What turns the task's rows into inputs of the model at `place`; sets the config's padding token.

    Raises:
        InputError: the tokenizer cannot be read, or `max_length` is more than the model can read.
    """
    if task.modality == "image":
        return image_collator(place, config)
    if task.modality == "signal":
        return SignalCollator()
    return _text_collator(place, config, task, max_length)


def _text_collator(place: str, config: PretrainedConfig, task: Task, max_length: int) -> TextCollator | MaskingCollator:
    tokenizer = load_tokenizer(place)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    config.pad_token_id = tokenizer.pad_token_id
    if type(tokenizer) is PreTrainedTokenizerFast and getattr(config, "type_vocab_size", 0) > 1:
        # A tokenizer of no model's own class gives types to every model in transformers 4, and to none in 5.
        names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
        tokenizer.model_input_names = [*names, "token_type_ids"]
    longest = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", max_length))
    if not 1 <= max_length <= longest:
        raise InputError(
            f"max_length={max_length} for {place}, which reads up to {longest} tokens; pass 1 to {longest}"
        )
    if task.kind == "masked_language":
        return MaskingCollator(tokenizer, max_length)
    dtype = torch.float32 if task.kind == "regression" else torch.long
    return TextCollator(tokenizer, task.inputs, max_length, dtype)


def load_tokenizer(place: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub id.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except UNREADABLE as error:
        raise unreadable(place, "tokenizer", error) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        # What transformers 5 makes of a folder without one: every word would be unknown.
        raise InputError(f"the tokenizer in {place} cannot be read: it has no words; save the tokenizer there too")
    return tokenizer


def image_collator(place: str, config: PretrainedConfig) -> ImageCollator:
    """What fits images to a model: its image size and channels, and mean and deviation of its training, else 0.5."""
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(place)
    except OSError:
        settings = {}
    reads = getattr(config, "vision_config", config)  # models of texts and images describe each part apart
    return ImageCollator(
        size=_size_of(getattr(reads, "image_size", None) or settings.get("crop_size") or settings.get("size")),
        channels=getattr(reads, "num_channels", 3),
        mean=tuple(settings.get("image_mean", (0.5,))),
        std=tuple(settings.get("image_std", (0.5,))),
    )


def _size_of(found: Any) -> tuple[int, int] | None:
    """(height, width) from a number, a pair, or what an image processor writes; None where it is not told."""
    if isinstance(found, Mapping):
        side = found.get("shortest_edge")
        found = (found.get("height", side), found.get("width", side))
    if isinstance(found, int):
        return found, found
    return (found[0], found[1]) if found and None not in found else None
