"""From passages of text to masked tokens and what stood in their place."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

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
