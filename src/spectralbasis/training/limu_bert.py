"""LIMU-BERT, a model of motion sensors, as a transformers model (Xu et al., SenSys 2021; LIMU-BERT-X, 2024)."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput
from transformers.models.auto.auto_factory import _BaseAutoModelClass, _LazyAutoMapping

from spectralbasis.errors import InputError
from spectralbasis.training.data_files import first_line


class LimuBertConfig(PretrainedConfig):
    """Sizes of a LIMU-BERT; the defaults are those of LIMU-BERT-X. A window is `max_position_embeddings` samples."""

    model_type = "limu_bert"

    def __init__(self, **settings: Any) -> None:
        defaults = {
            "num_channels": 6, "hidden_size": 72, "intermediate_size": 144, "num_hidden_layers": 4,
            "num_attention_heads": 4, "max_position_embeddings": 20, "layer_norm_eps": 1e-12, "initializer_range": 0.02,
        }  # fmt: skip
        for name, value in defaults.items():
            setattr(self, name, settings.pop(name, value))
        super().__init__(**settings)


class _Norm(nn.Module):
    """Layer normalisation whose weights are called as in the released files."""

    def __init__(self, config: LimuBertConfig) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(config.hidden_size))
        self.beta = nn.Parameter(torch.zeros(config.hidden_size))
        self.epsilon = config.layer_norm_eps

    def forward(self, hidden: Tensor) -> Tensor:
        return functional.layer_norm(hidden, self.gamma.shape, self.gamma, self.beta, self.epsilon)


class _Embedding(nn.Module):
    def __init__(self, config: LimuBertConfig) -> None:
        super().__init__()
        self.lin = nn.Linear(config.num_channels, config.hidden_size)
        self.pos_embed = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.norm = _Norm(config)

    def forward(self, signals: Tensor) -> Tensor:
        # One norm serves twice, before and after the positions are added.
        return self.norm(self.norm(self.lin(signals)) + self.pos_embed.weight[: signals.shape[1]])


class _Attention(nn.Module):
    def __init__(self, config: LimuBertConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.proj_q = nn.Linear(config.hidden_size, config.hidden_size)
        self.proj_k = nn.Linear(config.hidden_size, config.hidden_size)
        self.proj_v = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        q, k, v = (self._split(project(hidden)) for project in (self.proj_q, self.proj_k, self.proj_v))
        return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def _split(self, hidden: Tensor) -> Tensor:
        return hidden.unflatten(2, (self.heads, -1)).transpose(1, 2)


class _FeedForward(nn.Module):
    def __init__(self, config: LimuBertConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.fc2(functional.gelu(self.fc1(hidden)))
        return output


class LimuBertPreTrainedModel(PreTrainedModel):
    """What all LIMU-BERTs share; their module names are those of the released files."""

    config_class = LimuBertConfig
    base_model_prefix = "transformer"
    main_input_name = "signals"

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, _Norm):
            nn.init.ones_(module.gamma)
            nn.init.zeros_(module.beta)


class LimuBertModel(LimuBertPreTrainedModel):
    """The encoder: one block, applied `num_hidden_layers` times with the same weights."""

    def __init__(self, config: LimuBertConfig) -> None:
        super().__init__(config)
        self.embed = _Embedding(config)
        self.attn = _Attention(config)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm1 = _Norm(config)
        self.pwff = _FeedForward(config)
        self.norm2 = _Norm(config)
        self.post_init()

    def forward(self, signals: Tensor, **_: Any) -> BaseModelOutput:
        """From signals (N, time, channels), time at most a window, to hidden states (N, time, width)."""
        hidden = self.embed(signals)
        for _layer in range(self.config.num_hidden_layers):
            attended = self.attn(hidden)
            # The residual is that of the attention's output, not of its input.
            hidden = self.norm1(attended + self.proj(attended))
            hidden = self.norm2(hidden + self.pwff(hidden))
        return BaseModelOutput(last_hidden_state=hidden)


class LimuBertForSignalClassification(LimuBertPreTrainedModel):
    """A linear head on the mean of the encoder's states over all windows of a signal."""

    def __init__(self, config: LimuBertConfig) -> None:
        super().__init__(config)
        self.transformer = LimuBertModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, signals: Tensor, labels: Tensor | None = None, **_: Any) -> SequenceClassifierOutput:
        """From signals (N, time, channels), time a multiple of the window, to logits (N, labels)."""
        windows = signals.unflatten(1, (-1, self.config.max_position_embeddings)).flatten(0, 1)
        states = self.transformer(windows).last_hidden_state
        logits = self.classifier(states.unflatten(0, (len(signals), -1)).mean((1, 2)))
        loss = None if labels is None else functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class AutoModelForSignalClassification(_BaseAutoModelClass):
    """Opens a model that classifies signals (time, channels) by its config; transformers has no such class."""

    _model_mapping = _LazyAutoMapping(OrderedDict(), OrderedDict())


AutoConfig.register("limu_bert", LimuBertConfig, exist_ok=True)
AutoModel.register(LimuBertConfig, LimuBertModel, exist_ok=True)
AutoModelForSignalClassification.register(LimuBertConfig, LimuBertForSignalClassification, exist_ok=True)


def read_released(file: Path) -> LimuBertModel:
    """The encoder of a released `.pt` file of LIMU-BERT-X; its decoder is left out, and no code in it is run.

    Raises:
        InputError: the file is absent, or its weights are not those of LIMU-BERT-X.
    """
    if not file.is_file():
        raise InputError(f"no LIMU-BERT weights at {file}; pass --data with the folder that holds limu_bert/")
    model, prefix = LimuBertModel(LimuBertConfig()), "transformer."
    try:
        stored = torch.load(file, map_location="cpu", weights_only=True)
        encoder = {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}
        model.load_state_dict(encoder)
    except Exception as error:  # torch raises all kinds over what such a file may hold
        raise InputError(f"{file} cannot be read as weights of LIMU-BERT-X: {first_line(error)}") from error
    return model
