"""From passages of text to masked tokens and what stood in their place.

From rows of a task's data set to the tensors that a model reads.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from spectralbasis.errors import InputError
from spectralbasis.training.tasks import IMAGE, LABEL, SIGNALS

TEXT = "text"
MASK_SEED = "mask_seed"
"""Column of the seed that decides a row's mask; rows without it are masked anew each time."""
SHARE = 0.15
IGNORED = -100


@dataclass(frozen=True)
class MaskingCollator:
    """Tokenizes passages, cut at `max_length` tokens, and hides 15 % of each one's tokens, at least one.

    Of the hidden tokens 80 % become the mask, 10 % any token and 10 % stay, as in BERT (arXiv 1810.04805); `labels`
    holds what they were, and -100 elsewhere.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
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
            self._hide(tokens, (~fixed).nonzero()[:, 0], wanted, _generator(row))
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


def _generator(row: Mapping[str, Any]) -> torch.Generator | None:
    """The row's own generator, or None for torch's global one."""
    return torch.Generator().manual_seed(row[MASK_SEED]) if MASK_SEED in row else None


Row = Mapping[str, Any]


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
                f"the tokenizer gives a token the number {largest}, and the model has {self.vocabulary} tokens; the "
                "two are not of one model, so save them together again"
            )
        return {**batch, "labels": _labels(rows, self.label_dtype)}

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files."""
        self.tokenizer.save_pretrained(folder)


@dataclass(frozen=True)
class ImageCollator:
    """Scales pixels to [0, 1], fits images to the model's size and channels, and normalises them.

    Images are arrays (channels, height, width), floats in [0, 1] or uint8, or such as Pillow decodes, which become
    colour. `size` is (height, width), or None to keep each image's own; `mean` and `std` are one number for each
    channel, or one for all.
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
        normalised = (values - _as_channels(self.mean)) / _as_channels(self.std)
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


def _as_channels(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values).reshape(-1, 1, 1)


def _labels(rows: Sequence[Row], dtype: torch.dtype) -> Tensor:
    return torch.tensor([row[LABEL] for row in rows], dtype=dtype)
