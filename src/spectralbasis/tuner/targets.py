"""Which modules of a model a config means."""

from typing import Any

from peft.tuners.tuners_utils import BaseTuner, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from spectralbasis.checkpoints import matrix_name
from spectralbasis.tuner.config import SpectralConfig
from spectralbasis.tuner.layer import SpectralLayer

DEFAULT_TARGETS = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
"""Model type → what is adapted where `target_modules` is None."""


def targeted_modules(config: SpectralConfig, model: nn.Module) -> dict[str, nn.Module]:
    """Key → module of what is to be adapted; `config.target_modules` becomes the list that it stands for."""
    set_default_targets(config, BaseTuner.get_model_config(model))
    _maybe_include_all_linear_layers(config, model)
    inside = tuple(f"{key}." for key, module in model.named_modules() if isinstance(module, SpectralLayer))
    return {
        key: module
        for key, module in model.named_modules()
        if key and not key.startswith(inside) and is_targeted(config, key)
    }


def set_default_targets(config: SpectralConfig, model_config: dict[str, Any]) -> None:
    """Replace `target_modules=None`, without `target_parameters`, by what PEFT's LoRA takes, or by "all-linear"."""
    if config.target_modules is None and not config.target_parameters:
        known = DEFAULT_TARGETS.get(model_config.get("model_type"), "all-linear")
        config.target_modules = known if isinstance(known, str) else set(known)


def is_targeted(config: SpectralConfig, key: str) -> Any:
    """Whether a module is to be adapted: one that a record names, or one that the patterns match (truthy)."""
    if config.bound and matrix_name(key) in (config.ranks or {}):
        return True
    return check_target_module_exists(config, key)
