"""Named architectures: configs of transformers models, and the tokenizers that go with them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from spectralbasis.errors import InputError
from spectralbasis.study.models.limu_bert import AutoModelForSignalClassification
from spectralbasis.study.models.vocabulary import train_tokenizer


@dataclass(frozen=True)
class Architecture:
    """What a model is before it has weights.

    `corpus` is the task whose training part the tokenizer, of `config["vocab_size"]` tokens, learns from; None for
    models that read no text.
    """

    model_type: str
    auto_model: Any
    config: Mapping[str, Any] = field(default_factory=dict)
    corpus: str | None = None

    def make_config(self) -> PretrainedConfig:
        """The config, of transformers' class for this kind of model."""
        return AutoConfig.for_model(self.model_type, **self.config)

    def make_tokenizer(self, data: Path | None) -> PreTrainedTokenizerFast:
        """The tokenizer of an architecture with a corpus, the same for every seed; `data` is the corpus's folder.

        Raises:
            InputError: the corpus cannot be read, or there is none.
        """
        if self.corpus is None:
            raise InputError(f"a {self.model_type} model reads no text here, and so has no tokenizer")
        longest = self.config["max_position_embeddings"]
        return train_tokenizer(self.corpus, data, size=self.config["vocab_size"], max_length=longest)


def _vit(**sizes: float) -> Architecture:
    return Architecture("vit", AutoModelForImageClassification, {"num_channels": 1, **sizes})


def _bert(corpus: str, **sizes: float) -> Architecture:
    return Architecture("bert", AutoModelForMaskedLM, {"pad_token_id": 0, **sizes}, corpus)


ARCHITECTURES: dict[str, Architecture] = {
    "vit-small": _vit(
        image_size=28, patch_size=7, hidden_size=96, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4,
        initializer_range=0.1,
    ),
    "vit-digits": _vit(
        image_size=8, patch_size=2, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4
    ),
    "vit-tiny": _vit(
        image_size=8, patch_size=4, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    ),
    "bert-small": _bert(
        "novels", vocab_size=1024, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.05,
    ),
    "bert-tiny": _bert(
        "descriptions", vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64,
    ),
    "limu-bert": Architecture("limu_bert", AutoModelForSignalClassification),
}  # fmt: skip
"""The small ones begin with larger weights than transformers' default, which suits widths of 768: they learn in some
hundred steps, and a small vocabulary lets a language model learn more than how frequent words are in as few."""


def find_architecture(name: str) -> Architecture:
    """The architecture of this name.

    Raises:
        InputError: there is none.
    """
    if name not in ARCHITECTURES:
        raise InputError(f"unknown architecture {name!r}; the known ones are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def random_model(auto_model: Any, config: PretrainedConfig, seed: int) -> PreTrainedModel:
    """A model whose weights are drawn by the seed alone; torch's global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = auto_model.from_config(config)
    return model
