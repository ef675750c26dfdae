"""Turn rows of a data set into the tensors that a model reads, with the settings of the model's folder.

A collator is a callable from rows to a batch; `load_collator` makes the one for a model and a task.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.image_processing_base import ImageProcessingMixin

from spectralbasis.errors import InputError
from spectralbasis.printable import shortened
from spectralbasis.training.folder_checks import reading
from spectralbasis.training.tasks import IMAGE, LABEL, MASK_SEED, SIGNALS, TEXT, Task

SHARE = 0.15
"""Of a passage's tokens that are hidden."""
IGNORED = -100
Row = Mapping[str, Any]
_LARGEST_SIDE = 1 << 14
_MOST_CHANNELS = 4096


@dataclass(frozen=True)
class MaskingCollator:
    """Tokenizes passages, cut at `max_length` tokens, and hides 15 % of each one's tokens, at least one.

    Of the hidden tokens 80 % become the mask, 10 % any token and 10 % stay, as in BERT (arXiv 1810.04805); `labels`
    holds what they were, and -100 elsewhere.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        batch = self.tokenizer(
            [row[TEXT] for row in rows],
            truncation=True,
            padding=True,
            max_length=self.max_length,
            return_special_tokens_mask=True,
            return_tensors="pt",
        )
        special = batch.pop("special_tokens_mask").bool()
        labels = torch.full_like(batch["input_ids"], IGNORED)
        for row, tokens, fixed, wanted in zip(rows, batch["input_ids"], special, labels, strict=True):
            generator = torch.Generator().manual_seed(row[MASK_SEED]) if MASK_SEED in row else None
            self._hide(tokens, (~fixed).nonzero()[:, 0], wanted, generator)
        return {**batch, "labels": labels}

    def _hide(self, tokens: Tensor, candidates: Tensor, wanted: Tensor, generator: torch.Generator | None) -> None:
        """Replace some candidates of one row of tokens, and note in `wanted` what they were; both in place."""
        count = min(len(candidates), max(1, round(SHARE * len(candidates))))
        hidden = candidates[torch.randperm(len(candidates), generator=generator)[:count]]
        chance = torch.rand(count, generator=generator)
        anything = torch.randint(len(self.tokenizer), (count,), generator=generator)
        wanted[hidden] = tokens[hidden]
        replaced = torch.where(chance < 0.9, anything, tokens[hidden])
        tokens[hidden] = torch.where(chance < 0.8, self.tokenizer.mask_token_id, replaced)

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files."""
        self.tokenizer.save_pretrained(folder)


@dataclass(frozen=True)
class TextCollator:
    """Tokenizes one or two columns of text, cut at `max_length` tokens and padded to the longest of the batch.

    `vocabulary` is how many tokens the model has numbers for; None where its config does not say.
    """

    tokenizer: PreTrainedTokenizerBase
    columns: tuple[str, ...]
    max_length: int
    label_dtype: torch.dtype
    vocabulary: int | None = None

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        texts = [[row[column] for row in rows] for column in self.columns]
        batch = self.tokenizer(*texts, truncation=True, padding=True, max_length=self.max_length, return_tensors="pt")
        largest = int(batch["input_ids"].max()) if batch["input_ids"].numel() else 0
        if self.vocabulary is not None and largest >= self.vocabulary:
            raise InputError(
                f"the tokenizer gives a token the number {largest}, and the model has {self.vocabulary} tokens; they "
                "belong to different models, so save them together again"
            )
        return {**batch, "labels": _labels(rows, self.label_dtype)}

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files."""
        self.tokenizer.save_pretrained(folder)


@dataclass(frozen=True)
class ImageCollator:
    """Scales pixels to [0, 1], fits images to the model's size and channels, and normalises them.

    Images are arrays (channels, height, width), floats in [0, 1] or uint8, or images of Pillow, which become colour.
    `size` is (height, width), or None to keep each image's own; `mean` and `std` are one number for each channel, or
    one for all.
    """

    size: tuple[int, int] | None
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    label_dtype: torch.dtype = torch.long

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        images = [_pixels(row[IMAGE]) for row in rows]
        alike = len({image.shape for image in images}) == 1
        values = self._fit(torch.stack(images)) if alike else torch.cat([self._fit(image[None]) for image in images])
        mean, std = (torch.tensor(numbers).reshape(-1, 1, 1) for numbers in (self.mean, self.std))
        normalised = (values - mean) / std
        return {"pixel_values": normalised, "labels": _labels(rows, self.label_dtype)}

    def _fit(self, values: Tensor) -> Tensor:
        """Grey to colour by repetition, colour to grey by the mean, and bilinear resizing where sizes differ."""
        if values.shape[1] != self.channels:
            values = values.mean(1, keepdim=True).expand(-1, self.channels, -1, -1)
        if self.size is None or values.shape[2:] == self.size:
            return values
        return functional.interpolate(values, size=self.size, mode="bilinear", antialias=True, align_corners=False)

    def save(self, folder: Path) -> None:
        """Write `preprocessor_config.json`, from which a later load takes mean and standard deviation."""
        settings: dict[str, Any] = {
            "image_processor_type": "ViTImageProcessor",
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        if self.size:
            settings["size"] = {"height": self.size[0], "width": self.size[1]}
        (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")


class SignalCollator:
    """Stacks signals as they are, (rows, time, channels)."""

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        signals = torch.from_numpy(np.stack([row[SIGNALS] for row in rows]))
        return {"signals": signals.float(), "labels": _labels(rows, torch.long)}

    def save(self, folder: Path) -> None:
        """Nothing: signals come in the units that models read."""


Collator = TextCollator | MaskingCollator | ImageCollator | SignalCollator


def _pixels(image: Any) -> Tensor:
    """An image as (channels, height, width) in [0, 1]."""
    array = image if isinstance(image, np.ndarray) else np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    pixels = torch.tensor(array)
    return pixels.float() if pixels.is_floating_point() else pixels.float() / 255


def _labels(rows: Sequence[Row], dtype: torch.dtype) -> Tensor:
    return torch.tensor([row[LABEL] for row in rows], dtype=dtype)


def load_collator(folder: Path, config: PretrainedConfig, task: Task, max_length: int) -> Collator:
    """What turns the task's rows into inputs of the model in `folder`; sets the config's padding token.

    Raises:
        InputError: the tokenizer cannot be read, or `max_length` is more than the model can read.
    """
    if task.modality == "image":
        return image_collator(folder, config)
    if task.modality == "signal":
        return SignalCollator()
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
    limits = (tokenizer.model_max_length, getattr(config, "max_position_embeddings", None))
    for limit in limits:
        if isinstance(limit, bool) or not isinstance(limit, int | float | None):
            raise InputError(
                f"the texts that {folder} reads have at most {limit!r} tokens, expected a number; correct it"
            )
    of_tokenizer, of_model = limits
    known = (of_tokenizer, None if of_model == -1 else of_model, 1e30)  # some configs say -1 for no limit
    longest = int(min(limit for limit in known if limit is not None))
    if not 1 <= max_length <= longest:
        advice = f"pass 1 to {longest}" if longest >= 1 else "correct model_max_length in its tokenizer_config.json"
        raise InputError(f"max_length={max_length} for {folder}, which reads up to {longest} tokens; {advice}")
    if task.kind == "masked_language":
        return MaskingCollator(tokenizer, max_length)
    dtype = torch.float32 if task.kind == "regression" else torch.long
    vocabulary = getattr(config, "vocab_size", None)
    return TextCollator(tokenizer, task.inputs, max_length, dtype, vocabulary if isinstance(vocabulary, int) else None)


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
        InputError: a size, mean or deviation is not a number that pixels can be resized or normalised by.
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
    """(height, width) from a number, a pair, or what an image processor writes; None where the size is not given."""
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
