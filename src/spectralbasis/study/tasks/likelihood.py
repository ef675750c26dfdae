"""How well a model fills in masked tokens."""

import math

import torch
from datasets import Dataset
from torch import nn
from torch.nn import functional

from spectralbasis.progress import track
from spectralbasis.study.tasks.arrays import batches
from spectralbasis.study.tasks.masking import IGNORED, MaskingCollator

METRICS = ("log_likelihood", "perplexity", "accuracy")
BATCH_SIZE = 64


@torch.inference_mode()
def masked_token_scores(
    model: nn.Module, examples: Dataset, collator: MaskingCollator, *, progress: bool = False
) -> dict[str, float]:
    """How the model predicts the hidden tokens of all examples.

    `log_likelihood` is the mean over hidden tokens of log p(token), in nats: at most 0, and larger is better.
    `perplexity` is exp(-log_likelihood), and `accuracy` the share of tokens that the model holds the likeliest.
    """
    model.eval()
    device = next(model.parameters()).device
    total, hits, tokens = 0.0, 0, 0
    count = math.ceil(len(examples) / BATCH_SIZE)
    for rows in track(batches(examples, BATCH_SIZE), "evaluating", total=count, enabled=progress):
        batch = {name: tensor.to(device) for name, tensor in collator(rows).items()}
        labels = batch.pop("labels")
        hidden = labels != IGNORED
        logits, wanted = model(**batch).logits[hidden].float(), labels[hidden]
        total -= float(functional.cross_entropy(logits, wanted, reduction="sum"))
        hits += int((logits.argmax(1) == wanted).sum())
        tokens += len(wanted)
    mean = total / tokens
    return dict(zip(METRICS, (mean, math.exp(-mean), hits / tokens), strict=True))
