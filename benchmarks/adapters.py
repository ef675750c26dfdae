"""Ways to finetune a model of random weights, and what a step of each keeps for its backward pass."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, PsoftConfig, TinyLoraConfig, VeraConfig, get_peft_model
from peft.config import PeftConfig
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from spectralbasis import SpectralConfig


def _bert(width: int, layers: int, vocabulary: int = 30522) -> BertConfig:
    """An encoder of the usual proportions, without dropout."""
    return BertConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, intermediate_size=4 * width,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip


SIZES: dict[str, PretrainedConfig] = {
    "MiniLM": _bert(384, 6),
    "BERT-base": _bert(768, 12),
    "RoBERTa-base": _bert(768, 12, 50265),
    "Llama-1B": LlamaConfig(
        vocab_size=128256, hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        intermediate_size=8192, pad_token_id=0, dtype="bfloat16",
    ),
}  # fmt: skip
"""Architectures by the model whose size they have; encoders have weights in float32, the decoder in bfloat16."""
BUDGET = 0.002
"""Share of the parameters that the core trains."""
SHARED = {"task_type": "SEQ_CLS", "target_modules": "all-linear"}


def fresh_model(size: str, device: str = "cpu") -> PreTrainedModel:
    """A classifier of this size with random weights, always the same ones; those of all layers are equal.

    So that a basis is computed once for all layers; the time of a step does not depend on the weights' values.
    """
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForSequenceClassification.from_config(SIZES[size])
    first, *rest = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    for layer in rest:
        layer.load_state_dict(first.state_dict())
    return model.train()


def head_of(model: nn.Module) -> nn.Module:
    """The linear layer that classifies."""
    return model.score if hasattr(model, "score") else model.classifier


def floor(model: PreTrainedModel) -> nn.Module:
    """The frozen base: gradients flow to the embeddings' output, nothing but the head is trained."""
    model.requires_grad_(False)
    head_of(model).requires_grad_(True)
    model.enable_input_require_grads()
    return model


def full(model: PreTrainedModel) -> nn.Module:
    """Full finetuning."""
    return model


def peft(make_config: Callable[[nn.Module], PeftConfig]) -> Callable[[PreTrainedModel], nn.Module]:
    """A PEFT method on all linear layers, gradients flowing to the embeddings' output as with every other method."""

    def build(model: PreTrainedModel) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = get_peft_model(model, make_config(model))
        model.enable_input_require_grads()
        return adapted

    return build


def core_size(model: nn.Module) -> int:
    """k of the core that our budget buys, for the method that has the same core."""
    head = head_of(model)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    return int((BUDGET * sum(p.numel() for p in model.parameters()) / len(linear)) ** 0.5)


FLOOR, LORA, DIAGONAL, CORE = "floor", "LoRA r=8", "diagonal k=64", f"core at {BUDGET:.1%}"
METHODS: dict[str, Callable[[PreTrainedModel], nn.Module]] = {
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
