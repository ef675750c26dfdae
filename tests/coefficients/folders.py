"""Base models and spectral adapters in folders, as a person has them."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

import spectralbasis as sb
from tests.models import tiny

AUTO_MODELS = {"": AutoModel, "classifier": AutoModelForSequenceClassification, "causal": AutoModelForCausalLM}
TASK_TYPES = {"": "FEATURE_EXTRACTION", "classifier": "SEQ_CLS", "causal": "CAUSAL_LM"}


def save_base(folder: Path, model_type: str = "bert", head: str = "classifier", **config: Any) -> Path:
    """A tiny model in a folder, without the classification head that each task has its own of."""
    torch.manual_seed(0)
    if head == "classifier":
        tiny(model_type, initializer_range=0.2, **config).save_pretrained(folder)
    else:
        tiny(model_type, head, initializer_range=0.2, **config).save_pretrained(folder)
    return folder


def load_base(folder: Path, head: str = "classifier", labels: int = 2) -> PreTrainedModel:
    """The base with a random head, the same each time."""
    torch.manual_seed(1)
    extra = {"num_labels": labels} if head == "classifier" else {}
    return AUTO_MODELS[head].from_pretrained(folder, **extra).eval()


def save_adapter(
    folder: Path, base: Path, head: str = "classifier", *, seed: int = 0, labels: int = 2, **config: Any
) -> PeftModel:
    """An adapter with random coefficients, head and trained biases in a folder; gives the model that was saved."""
    model = load_base(base, head, labels)
    torch.manual_seed(100 + seed)
    settings = {"target_modules": "all-linear", "leading": 6, "init_weights": False, "task_type": TASK_TYPES[head]}
    adapted = get_peft_model(model, sb.SpectralConfig(**{**settings, **config}))
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and "spectral_" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return adapted.eval()


def tokens(rows: int = 5, length: int = 7) -> dict[str, Tensor]:
    """A batch; the last row is shorter than the others."""
    ids = torch.randint(1, 50, (rows, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[-1, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}
