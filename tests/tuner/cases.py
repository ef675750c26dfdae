"""Models, inputs and settings that the behaviour of a PEFT method is tested on."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spectralbasis.tuner import SpectralConfig
from tests.models import tiny


class MLP(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 20, bias=bias)
        self.relu = nn.ReLU()
        self.lin1 = nn.Linear(20, 6, bias=bias)

    def forward(self, X: Tensor) -> Tensor:
        return self.lin1(self.relu(self.lin0(X.to(self.lin0.weight.dtype))))


class DeepMLP(nn.Module):
    """Layers in a list, so that they can be chosen by number."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"lin0": nn.Linear(10, 10), "lin1": nn.Linear(10, 10)}) for _ in "ab")

    def forward(self, X: Tensor) -> Tensor:
        X = X.to(self.layers[0]["lin0"].weight.dtype)
        for layer in self.layers:
            X = X + layer["lin1"](torch.tanh(layer["lin0"](X)))
        return X


class EmbeddingConv1D(nn.Module):
    """An embedding, transformers' transposed linear layer, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(100, 5)
        self.conv1d = Conv1D(8, 5)
        nn.init.normal_(self.conv1d.weight)
        self.lin0 = nn.Linear(8, 3)

    def forward(self, X: Tensor) -> Tensor:
        return self.lin0(torch.tanh(self.conv1d(self.emb(X))))


class Convolutions(nn.Module):
    """Convolutions of one, two and three dimensions, with stride, padding and dilation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1d = nn.Conv1d(2, 6, 3, padding=1, padding_mode="circular")
        self.conv2d = nn.Conv2d(6, 4, (2, 3), stride=(1, 2), padding="valid", bias=False)
        self.conv3d = nn.Conv3d(1, 5, (4, 1, 1), dilation=(1, 2, 1))
        self.lin0 = nn.Linear(5, 3)

    def forward(self, X: Tensor) -> Tensor:
        X = X.to(self.lin0.weight.dtype).unflatten(1, (2, -1))
        X = torch.tanh(self.conv1d(X)).unsqueeze(2).expand(-1, -1, 3, -1)
        X = torch.tanh(self.conv2d(X)).unsqueeze(1)
        return self.lin0(self.conv3d(X).flatten(2).mean(2))


@dataclass(frozen=True)
class Case:
    """How a base model is built and called, and what is asked of the adapter."""

    build: Callable[[], nn.Module]
    inputs: dict[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)

    def base(self) -> nn.Module:
        """The base model, the same one each time, for inference.

        It is frozen, as it is under an adapter: which attention kernel torch takes, and so how a result is rounded,
        depends on whether T5's position bias requires a gradient.
        """
        torch.manual_seed(0)
        return self.build().eval().requires_grad_(False)

    def settings(self, **changes: Any) -> SpectralConfig:
        return SpectralConfig(**{"init_weights": False, "coefficients": "diagonal", **self.config, **changes})

    def adapted(self, *, adapter_name: str = "default", seed: int = 1, **changes: Any) -> PeftModel:
        """The base with an adapter whose coefficients are random unless `init_weights=True`."""
        base = self.base()
        torch.manual_seed(seed)
        return get_peft_model(base, self.settings(**changes), adapter_name=adapter_name).eval()

    def base_output(self, dtype: torch.dtype | None = None) -> Tensor:
        """Output of the base, with frozen weights as in an adapted model.

        T5's position biases are the mask of its attention, and torch takes another kernel, which rounds differently,
        for a mask that requires a gradient. The same would be true of any method of PEFT.
        """
        return self.output(self.base().to(dtype).requires_grad_(False))

    def output(self, model: nn.Module, **extra: Any) -> Tensor:
        result = model(**self.inputs, **extra)
        return result if isinstance(result, Tensor) else result[0]

    def loss(self, model: nn.Module) -> Tensor:
        """Squared distance to a fixed target; squares alone would be constant where an output is normalised."""
        output = self.output(model).float()
        return (output - torch.arange(output.numel()).reshape(output.shape).sin()).square().sum()


def _tokens(rows: int = 3) -> dict[str, Tensor]:
    ids = torch.randint(1, 50, (rows, 7), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


_X = {"X": torch.linspace(-1, 1, 90).reshape(9, 10).sin()}
_IDS = {"X": torch.arange(90).reshape(9, 10)}

CASES = {
    "mlp": Case(MLP, _X, {"target_modules": ["lin0"]}),
    "mlp, both layers": Case(MLP, _X, {"target_modules": ["lin0", "lin1"], "coefficients": "core"}),
    "mlp, no bias": Case(lambda: MLP(bias=False), _X, {"target_modules": "all-linear", "leading": 3}),
    "mlp, pattern": Case(MLP, _X, {"target_modules": ".*[0-9]", "leading": 0.5, "rank_pattern": {"lin1": 2}}),
    "mlp, budget": Case(MLP, _X, {"target_modules": "all-linear", "budget": 0.1, "coefficients": "core"}),
    "mlp, head": Case(MLP, _X, {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    "mlp, minor": Case(MLP, _X, {"target_modules": ["lin0"], "basis": "minor", "leading": 4}),
    "mlp, random": Case(MLP, _X, {"target_modules": ["lin0"], "basis": "random", "coefficients": "core"}),
    "mlp, band": Case(
        MLP, _X, {"target_modules": ["lin0", "lin1"], "coefficients": "band", "bandwidth": 2, "scaling": "normalized"}
    ),
    "mlp, block": Case(MLP, _X, {"target_modules": ["lin0", "lin1"], "coefficients": "block", "block_size": 4}),
    "mlp, rotation": Case(
        MLP, _X, {"target_modules": ["lin0", "lin1"], "coefficients": "rotation", "block_size": 3, "leading": 5}
    ),
    "deep mlp": Case(DeepMLP, _X, {"target_modules": ["lin0", "lin1"], "leading": "mp"}),
    "conv1d": Case(EmbeddingConv1D, _IDS, {"target_modules": ["conv1d"]}),
    "conv1d, band": Case(
        EmbeddingConv1D, _IDS, {"target_modules": ["conv1d"], "coefficients": "band", "scaling": "relative"}
    ),
    "conv1d, core": Case(EmbeddingConv1D, _IDS, {"target_modules": ["conv1d", "lin0"], "coefficients": "core"}),
    "embedding": Case(EmbeddingConv1D, _IDS, {"target_modules": ["emb"]}),
    "embedding, core": Case(EmbeddingConv1D, _IDS, {"target_modules": ["emb", "lin0"], "coefficients": "core"}),
    "conv1d, rotation": Case(
        EmbeddingConv1D, _IDS, {"target_modules": ["conv1d", "emb"], "coefficients": "rotation", "scaling": "relative"}
    ),
    "convolutions, block": Case(
        Convolutions, _X, {"target_modules": ["conv1d", "conv2d", "conv3d"], "coefficients": "block", "block_size": 2}
    ),
    "convolutions, rotation": Case(
        Convolutions,
        _X,
        {"target_modules": ["conv1d", "conv2d"], "coefficients": "rotation", "basis": "minor", "scaling": "absolute"},
    ),
    "convolutions": Case(Convolutions, _X, {"target_modules": ["conv1d", "conv2d", "conv3d"], "leading": 4}),
    "convolutions, core": Case(Convolutions, _X, {"target_modules": ".*conv2d|lin0", "coefficients": "core"}),
    "bert": Case(
        lambda: tiny("bert", "classifier", initializer_range=0.2),
        _tokens(),
        {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"},
    ),
    "features": Case(
        lambda: tiny("roberta", initializer_range=0.2, max_position_embeddings=24),
        _tokens(),
        {"target_modules": ["query", "value"], "leading": 4, "task_type": "FEATURE_EXTRACTION"},
    ),
    "encoder and decoder": Case(
        lambda: tiny("t5"),
        {**_tokens(), "decoder_input_ids": _tokens()["input_ids"][:, :4]},
        {"target_modules": ["q", "v", "wo"], "coefficients": "core", "leading": 4},
    ),
    "gpt2": Case(
        lambda: tiny("gpt2", "causal", initializer_range=0.2),
        _tokens(),
        {"target_modules": ["c_attn", "c_proj"], "task_type": "CAUSAL_LM"},
    ),
    "llama": Case(
        lambda: tiny("llama", "causal", initializer_range=0.2),
        _tokens(),
        {"target_modules": "all-linear", "coefficients": "core", "leading": 8, "task_type": "CAUSAL_LM"},
    ),
}
