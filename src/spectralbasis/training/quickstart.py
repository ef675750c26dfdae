"""The complete workflow on one small model: pretrain, finetune, compare, tune, report.

An example to copy: it calls only the public API, needs no data and no network, and takes under two minutes on one core.
"""

from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits
from transformers import ViTConfig, ViTForImageClassification

import spectralbasis as sb
from spectralbasis.report import write_report
from spectralbasis.training import tune, write_tuning_table
from spectralbasis.training.models import quiet_transformers

TASKS = ("digits-parity", "digits-larger-than-four", "digits-rotated")

# Spectral coefficients: the 64 of a diagonal for each of 24 matrices (1,536 numbers), or cores of 12×12 (3,456).
# LoRA of rank 1 trains 3,584, at a rate above its default, which suits larger models and would hold it back here.
ADAPTERS: dict[str, dict[str, Any]] = {
    "diagonal": {"method": "spectral", "coefficients": "diagonal", "leading": 64},
    "core": {"method": "spectral", "coefficients": "core", "leading": 12},
    "lora": {"method": "lora", "rank": 1, "learning_rate": 5e-3},
}


# So small a model gains nothing from more threads, and a busy machine makes them wait for each other.
@threadpool_limits.wrap(limits=1)
def quickstart(output: Path | str, progress: bool = True) -> Path:
    """Write models, adapters, measurements and the report to the folder `output`; returns its index.html."""
    output = Path(output)
    models, adapters = output / "models", output / "adapters"
    options: dict[str, Any] = {"batch_size": 64, "seed": 0, "progress": progress, "overwrite": True}

    # A base: a small vision transformer that learns scikit-learn's digits.
    untrained = save_untrained(models / "untrained")
    base = models / "base"
    tune(untrained, task="digits", output=base, method="full", learning_rate=1e-3, steps=500, **options)

    # Three tasks that differ from pretraining and from each other, each finetuned in full.
    finetuned = [
        tune(base, task=task, output=models / task, method="full", learning_rate=3e-4, steps=150, **options)
        for task in TASKS
    ]

    # Did finetuning move the leading singular vectors less than random updates of the same size would?
    sb.compare(
        base,
        [result.output for result in finetuned],
        leading=16,
        seed=0,
        output=output,
        progress=progress,
    )

    # The same tasks in a few kilobytes each: spectral coefficients on the base's own directions, and LoRA.
    adapted = [
        tune(base, task=task, output=adapters / f"{task}-{name}", steps=150, **adapter, **options)
        for task in TASKS
        for name, adapter in ADAPTERS.items()
    ]

    write_tuning_table(output, [*finetuned, *adapted], note="One seed each, scored on 450 held-out digits.")
    return write_report(output)


def save_untrained(folder: Path) -> Path:
    """A vision transformer for images of 8×8 pixels, as random weights leave it."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=64, intermediate_size=128,
        num_hidden_layers=4, num_attention_heads=4,
    )  # fmt: skip
    with quiet_transformers():
        ViTForImageClassification(config).save_pretrained(folder)
    return folder
