"""From rows of a task's data set to the tensors that a model reads."""

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
from spectralbasis.study.tasks.arrays import IMAGE, LABEL, SIGNALS
from spectralbasis.study.tasks.masking import MaskingCollator

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
        normalised = (values - _per_channel(self.mean)) / _per_channel(self.std)
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


def _per_channel(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values).reshape(-1, 1, 1)


def _labels(rows: Sequence[Row], dtype: torch.dtype) -> Tensor:
    return torch.tensor([row[LABEL] for row in rows], dtype=dtype)
