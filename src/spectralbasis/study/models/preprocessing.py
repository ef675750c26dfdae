"""How a model wants its inputs: its tokenizer, or its image size and normalisation, read from where the model is."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.image_processing_base import ImageProcessingMixin

from spectralbasis.errors import InputError
from spectralbasis.printable import shortened
from spectralbasis.study.models.collators import Collator, ImageCollator, SignalCollator, TextCollator
from spectralbasis.study.models.handing_over import reading
from spectralbasis.study.tasks.masking import MaskingCollator
from spectralbasis.study.tasks.task import Task

_LARGEST_SIDE = 1 << 14
_MOST_CHANNELS = 4096


def load_collator(folder: Path, config: PretrainedConfig, task: Task, max_length: int) -> Collator:
    """What turns the task's rows into inputs of the model in `folder`; sets the config's padding token.

    Raises:
        InputError: the tokenizer cannot be read, or `max_length` is more than the model can read.
    """
    if task.modality == "image":
        return image_collator(folder, config)
    if task.modality == "signal":
        return SignalCollator()
    return _text_collator(folder, config, task, max_length)


def _text_collator(
    folder: Path, config: PretrainedConfig, task: Task, max_length: int
) -> TextCollator | MaskingCollator:
    tokenizer = load_tokenizer(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise InputError(f"the tokenizer in {folder} has neither a pad_token nor an eos_token; set one of them there")
    config.pad_token_id = tokenizer.pad_token_id
    if type(tokenizer) is PreTrainedTokenizerFast and getattr(config, "type_vocab_size", 0) > 1:
        # A tokenizer of no model's own class gives types to every model in transformers 4, and to none in 5.
        names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
        tokenizer.model_input_names = [*names, "token_type_ids"]
    longest = _longest(folder, tokenizer.model_max_length, getattr(config, "max_position_embeddings", None))
    if not 1 <= max_length <= longest:
        raise InputError(
            f"max_length={max_length} for {folder}, which reads up to {longest} tokens; {_advice(longest)}"
        )
    if task.kind == "masked_language":
        return MaskingCollator(tokenizer, max_length)
    dtype = torch.float32 if task.kind == "regression" else torch.long
    vocabulary = getattr(config, "vocab_size", None)
    return TextCollator(tokenizer, task.inputs, max_length, dtype, vocabulary if isinstance(vocabulary, int) else None)


def _longest(folder: Path, of_tokenizer: Any, of_model: Any) -> int:
    """How many tokens a model reads at most, by its tokenizer and its positions; -1 and None stand for no limit."""
    for limit in (of_tokenizer, of_model):
        if isinstance(limit, bool) or not isinstance(limit, int | float | None):
            raise InputError(
                f"the texts that {folder} reads have at most {limit!r} tokens, expected a number; correct it"
            )
    limits = (of_tokenizer, None if of_model == -1 else of_model)
    return int(min(limit for limit in (*limits, 1e30) if limit is not None))


def _advice(longest: int) -> str:
    return f"pass 1 to {longest}" if longest >= 1 else "correct model_max_length in its tokenizer_config.json"


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's folder.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    with reading(folder, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        # What transformers 5 makes of a folder without one: every word would be unknown.
        raise InputError(f"the tokenizer in {folder} cannot be read: it has no words; save the tokenizer there too")
    return tokenizer


def image_collator(folder: Path, config: PretrainedConfig) -> ImageCollator:
    """What fits images to a model: its image size and channels, and mean and deviation of its training, else 0.5.

    Raises:
        InputError: a size is no size, or mean and deviation are no numbers by which pixels can be normalised.
    """
    try:
        with reading(folder, "image processor"):
            settings, _ = ImageProcessingMixin.get_image_processor_dict(folder)
            if not isinstance(settings, dict):
                raise InputError(f"the image settings in {folder} are a {type(settings).__name__}, expected an object")
    except InputError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        settings = {}
    reads = getattr(config, "vision_config", config)  # models of texts and images describe each part apart
    size = getattr(reads, "image_size", None) or settings.get("crop_size") or settings.get("size")
    channels = getattr(reads, "num_channels", 3)
    if not (isinstance(channels, int) and 1 <= channels <= _MOST_CHANNELS):
        raise InputError(
            f"the images that {folder} reads have num_channels={channels!r}, expected a number; correct it"
        )
    return ImageCollator(
        size=_size_of(size, folder),
        channels=channels,
        mean=_per_channel(settings.get("image_mean", (0.5,)), channels, "image_mean", folder),
        std=_per_channel(settings.get("image_std", (0.5,)), channels, "image_std", folder),
    )


def _per_channel(found: Any, channels: int, name: str, folder: Path) -> tuple[float, ...]:
    """One finite number, or one for each channel; deviations are positive."""
    numbers = [found] if isinstance(found, int | float) else found
    valid = isinstance(numbers, list | tuple) and all(
        isinstance(number, int | float) and math.isfinite(number) and (number > 0 or name == "image_mean")
        for number in numbers
    )
    if valid and len(numbers) not in {1, channels} and len(set(numbers)) == 1:
        numbers = numbers[:1]  # written for coloured images, and the same for grey ones
    if not valid or len(numbers) not in {1, channels}:
        raise InputError(
            f"the image settings in {folder} have {name}={shortened(repr(found), 80)}, expected "
            f"{'numbers' if name == 'image_mean' else 'positive numbers'}, one or one for each channel; correct them"
        )
    return tuple(float(number) for number in numbers)


def _size_of(found: Any, folder: Path) -> tuple[int, int] | None:
    """(height, width) from a number, a pair, or what an image processor writes; None where it is not told."""
    told = found
    if isinstance(found, Mapping):
        side = found.get("shortest_edge")
        found = (found.get("height", side), found.get("width", side))
    if isinstance(found, int):
        found = (found, found)
    if not found or (isinstance(found, list | tuple) and None in found):
        return None
    valid = isinstance(found, list | tuple) and len(found) == 2
    if not valid or not all(isinstance(side, int) and 1 <= side <= _LARGEST_SIDE for side in found):
        raise InputError(
            f"the images that {folder} reads are of size {shortened(repr(told), 80)}, expected a height and a width of "
            f"1 to {_LARGEST_SIDE}; correct image_size or size"
        )
    return found[0], found[1]
