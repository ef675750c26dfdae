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
from spectralbasis.training.tasks import (
    COMPLETION,
    IMAGE,
    LABEL,
    MASK_SEED,
    MESSAGES,
    PROMPT,
    SIGNALS,
    TEXT,
    Task,
)

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
class CausalCollator:
    """Tokenizes running text, or instructions with their answers, to predict each next token.

    `labels` holds the tokens that are learned: all of running text, and of instructions those of the answers; -100
    elsewhere. Messages are written out by the tokenizer's chat template, and so are a prompt and its completion where
    there is one. The end-of-text token follows a completion without a template, and is learned with it.

    Args:
        tokenizer: of the model.
        max_length: tokens at which rows are cut.
        packing: rows share a sequence, each with positions from 0; models of transformers let none of them see another.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    packing: bool = False

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        pairs = [self.tokens(row) for row in rows]
        for ids, labels in pairs:
            if all(label == IGNORED for label in labels[1 : self.max_length]):
                raise InputError(
                    f"a row of {len(ids)} tokens has none to learn within max_length={self.max_length}: its answer "
                    f"begins later, or it is empty; pass a larger max_length (--max-length)"
                )
        pairs = [(ids[: self.max_length], labels[: self.max_length]) for ids, labels in pairs]
        bins = [[number] for number in range(len(pairs))]
        if self.packing:
            bins = _bins([len(ids) for ids, _ in pairs], self.max_length)
        longest = max(sum(len(pairs[number][0]) for number in one) for one in bins)
        padding = self.tokenizer.pad_token_id
        batch: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "positions": []}
        for one in bins:
            ids = [token for number in one for token in pairs[number][0]]
            # The first token of a row has nothing before it that it could be predicted from.
            labels = [label for number in one for label in (IGNORED, *pairs[number][1][1:])]
            positions = [place for number in one for place in range(len(pairs[number][0]))]
            rest = longest - len(ids)
            batch["input_ids"].append(ids + [padding] * rest)
            batch["labels"].append(labels + [IGNORED] * rest)
            batch["positions"].append(positions + list(range(rest)))
        tensors = {name: torch.tensor(values) for name, values in batch.items()}
        positions_of = tensors.pop("positions")
        if self.packing:
            return {**tensors, "position_ids": positions_of}
        lengths = torch.tensor([len(ids) for ids, _ in pairs])
        return {**tensors, "attention_mask": (torch.arange(longest)[None] < lengths[:, None]).long()}

    def tokens(self, row: Row) -> tuple[list[int], list[int]]:
        """The whole row as tokens, and which of them are learned."""
        if TEXT in row:
            ids = self.tokenizer(row[TEXT], verbose=False)["input_ids"]
            return ids, list(ids)
        ids, labels = [], []
        templated = self._templated(row)
        for text, learned in self.segments(row):
            own = self._ids(text, special=not ids and not templated)
            ids += own
            labels += own if learned else [IGNORED] * len(own)
        if not templated and self.tokenizer.eos_token_id is not None:
            ids.append(self.tokenizer.eos_token_id)
            labels.append(self.tokenizer.eos_token_id)
        return ids, labels

    def segments(self, row: Row) -> list[tuple[str, bool]]:
        """The text of a row in parts, each with whether it is learned.

        Raises:
            InputError: the chat template does not write a conversation as the beginning of a longer one.
        """
        if not self._templated(row):
            return [(row[PROMPT], False), (row[COMPLETION], True)]
        messages = self.messages(row)
        parts: list[tuple[str, bool]] = []
        written = ""
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            for upto, prompted in ((messages[:number], True), (messages[: number + 1], False)):
                text = self.written(upto, prompted)
                if not text.startswith(written):
                    raise InputError(
                        "the tokenizer's chat template does not write the beginning of a conversation alike when it "
                        "goes on, so its answers cannot be told from its prompts; give one question and answer a row"
                    )
                parts.append((text[len(written) :], not prompted))
                written = text
        return [part for part in parts if part[0]]

    def prompt(self, row: Row) -> list[int]:
        """The tokens after which the model goes on: a text, a prompt, or messages up to the last answer."""
        if TEXT not in row and self._templated(row):
            messages = self.messages({COMPLETION: [], **row})
            asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
            return self._ids(self.written(asked, True), special=False)
        return self._ids(str(row.get(TEXT, row.get(PROMPT))), special=True)

    def _ids(self, text: str, *, special: bool) -> list[int]:
        """Tokens of a text that goes on: without the token of its end, which some tokenizers add."""
        ids = list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
        return ids[:-1] if special and ids and ids[-1] == self.tokenizer.eos_token_id else ids

    def messages(self, row: Row) -> list[dict[str, str]]:
        """The conversation of a row, also where it is a prompt and its completion."""
        if MESSAGES in row:
            return list(row[MESSAGES])
        return [
            *(row[PROMPT] if isinstance(row[PROMPT], list) else [{"role": "user", "content": row[PROMPT]}]),
            *(
                row[COMPLETION]
                if isinstance(row[COMPLETION], list)
                else [{"role": "assistant", "content": row[COMPLETION]}]
            ),
        ]

    def _templated(self, row: Row) -> bool:
        if MESSAGES in row or isinstance(row.get(PROMPT), list):
            if not self.tokenizer.chat_template:
                raise InputError(
                    "the tokenizer has no chat template, so messages cannot be written out; give the columns prompt "
                    "and completion, or set chat_template in its folder"
                )
            return True
        return bool(self.tokenizer.chat_template)

    def written(self, messages: Sequence[Mapping[str, str]], prompted: bool) -> str:
        """A conversation as text; `prompted` ends it where an answer begins.

        Raises:
            InputError: the template does not know a role or a sequence of roles.
        """
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [dict(message) for message in messages], tokenize=False, add_generation_prompt=prompted
                )
            )
        except Exception as error:  # templates raise what they like
            raise InputError(
                f"the tokenizer's chat template cannot write the messages {shortened(repr(messages), 120)}: "
                f"{shortened(str(error))}; correct the messages"
            ) from error

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files."""
        self.tokenizer.save_pretrained(folder)


def _bins(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Numbers of rows that fit into one sequence together, the longest first (first fit decreasing)."""
    bins: list[list[int]] = []
    free: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda one: -lengths[one]):
        at = next((at for at, left in enumerate(free) if left >= lengths[number]), None)
        if at is None:
            bins.append([])
            free.append(room)
            at = len(bins) - 1
        bins[at].append(number)
        free[at] -= lengths[number]
    return bins


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


Collator = TextCollator | MaskingCollator | CausalCollator | ImageCollator | SignalCollator


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
    tokenizer, longest = fitted_tokenizer(folder, config)
    if not 1 <= max_length <= longest:
        advice = f"pass 1 to {longest}" if longest >= 1 else "correct model_max_length in its tokenizer_config.json"
        raise InputError(f"max_length={max_length} for {folder}, which reads up to {longest} tokens; {advice}")
    if task.kind == "masked_language":
        return MaskingCollator(tokenizer, max_length)
    if task.kind in ("causal_language", "instructions"):
        return CausalCollator(tokenizer, max_length)
    dtype = torch.float32 if task.kind == "regression" else torch.long
    vocabulary = getattr(config, "vocab_size", None)
    return TextCollator(tokenizer, task.inputs, max_length, dtype, vocabulary if isinstance(vocabulary, int) else None)


def fitted_tokenizer(folder: Path, config: PretrainedConfig) -> tuple[PreTrainedTokenizerBase, int]:
    """The tokenizer of a model's folder with a padding token, which the config gets too, and the most tokens of a text.

    Raises:
        InputError: the tokenizer cannot be read, or does not say how it pads or how long texts are.
    """
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
    return tokenizer, longest


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
