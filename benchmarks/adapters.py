"""Ways to finetune a model of random weights, and what a step of each keeps for its backward pass."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, PsoftConfig, TinyLoraConfig, VeraConfig, get_peft_model
from peft.config import PeftConfig
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from spectralbasis import SpectralConfig

SIZES = {
    "MiniLM": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "BERT-base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
}
"""Architectures by the model whose size they have."""
BUDGET = 0.002
"""Share of the parameters that the core trains."""
SHARED = {"task_type": "SEQ_CLS", "target_modules": "all-linear"}


def fresh_model(size: str) -> BertForSequenceClassification:
    """A classifier of this size with random weights, always the same ones, without dropout."""
    torch.manual_seed(0)
    config = BertConfig(**SIZES[size], hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return BertForSequenceClassification(config).train()


def floor(model: BertForSequenceClassification) -> nn.Module:
    """The frozen base: gradients flow to the embeddings' output, nothing but the head is trained."""
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    model.enable_input_require_grads()
    return model


def full(model: BertForSequenceClassification) -> nn.Module:
    """Full finetuning."""
    return model


def peft(make_config: Callable[[nn.Module], PeftConfig]) -> Callable[[BertForSequenceClassification], nn.Module]:
    """A PEFT method on all linear layers, gradients flowing to the embeddings' output as with every other method."""

    def build(model: BertForSequenceClassification) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = get_peft_model(model, make_config(model))
        model.enable_input_require_grads()
        return adapted

    return build


def core_size(model: nn.Module) -> int:
    """k of the core that our budget buys, for the method that has the same core."""
    linear = [
        module for name, module in model.named_modules() if isinstance(module, nn.Linear) and "classifier" not in name
    ]
    return int((BUDGET * sum(p.numel() for p in model.parameters()) / len(linear)) ** 0.5)


FLOOR, LORA, DIAGONAL, CORE = "floor", "LoRA r=8", "diagonal k=64", f"core at {BUDGET:.1%}"
METHODS: dict[str, Callable[[BertForSequenceClassification], nn.Module]] = {
    FLOOR: floor,
    DIAGONAL: peft(lambda model: SpectralConfig(**SHARED, coefficients="diagonal", leading=64)),
    CORE: peft(lambda model: SpectralConfig(**SHARED, coefficients="core", budget=BUDGET)),
    LORA: peft(lambda model: LoraConfig(**SHARED, r=8)),
    "DoRA r=8": peft(lambda model: LoraConfig(**SHARED, r=8, use_dora=True)),
    "VeRA r=256": peft(lambda model: VeraConfig(**SHARED, r=256)),
    "PSOFT free core": peft(
        lambda model: PsoftConfig(**SHARED, r=core_size(model), psoft_orth=False, psoft_mag_a=False, psoft_mag_b=False)
    ),
    "TinyLoRA": peft(lambda model: TinyLoraConfig(**SHARED)),
    "full finetuning": full,
}
"""Method by the name that tables use."""


@contextmanager
def kept_for_backward(model: nn.Module) -> Iterator[list[int]]:
    """Counts what a forward pass within the context saves: bytes of storages, each once, without the model's own."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    total: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total
    total.append(sum(found.values()))
