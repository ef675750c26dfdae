"""Methods of PEFT that add updates of low rank, or of few numbers, to every linear layer."""

from collections.abc import Callable, Sequence
from typing import Any

from peft import (
    AdaLoraConfig,
    FourierFTConfig,
    LoraConfig,
    PeftConfig,
    PsoftConfig,
    TinyLoraConfig,
    VeraConfig,
    get_peft_model,
)
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from spectralbasis.study.methods.method import Setup
from spectralbasis.study.methods.options import MethodOptions
from spectralbasis.study.models.loading import LoadedModel

Prepare = Callable[[Setup], nn.Module]


def everywhere(loaded: LoadedModel) -> dict[str, Any]:
    """PEFT's settings for an adapter on every linear layer of the backbone, and a head trained and saved beside it."""
    classifies_text = loaded.task.modality == "text" and loaded.task.kind != "masked_language"
    return {
        "task_type": "SEQ_CLS" if classifies_text else None,
        "target_modules": "all-linear",
        "modules_to_save": list(loaded.head) or None,
    }


def peft_method(make_config: Callable[[MethodOptions, int, dict[str, Any]], PeftConfig]) -> Prepare:
    """How a method of PEFT is prepared; `make_config` takes the options, the steps, and the settings that all share."""

    def prepare(setup: Setup) -> nn.Module:
        config = make_config(setup.options, setup.steps, everywhere(setup.loaded))
        return get_peft_model(setup.loaded.model, config)

    return prepare


def _lora(options: MethodOptions, _: int, common: dict[str, Any], **settings: Any) -> PeftConfig:
    rank = options.rank or 1
    alpha = 2 * rank if options.alpha is None else options.alpha
    return LoraConfig(r=rank, lora_alpha=alpha, **settings, **common)


def _dora(options: MethodOptions, steps: int, common: dict[str, Any]) -> PeftConfig:
    return _lora(options, steps, common, use_dora=True)


def _pissa(options: MethodOptions, _: int, common: dict[str, Any]) -> PeftConfig:
    # PiSSA's factors are the leading triplets themselves, so alpha = rank is the scale at which the model is its base.
    return LoraConfig(r=options.rank, lora_alpha=options.rank, init_lora_weights="pissa", **common)


def _adalora(options: MethodOptions, steps: int, common: dict[str, Any]) -> PeftConfig:
    rank = options.rank or 1
    return AdaLoraConfig(
        target_r=rank,
        init_r=(3 * rank + 1) // 2,
        lora_alpha=2 * rank if options.alpha is None else options.alpha,
        tinit=steps // 10,
        tfinal=steps // 3,
        deltaT=max(1, steps // 50),
        total_step=steps,
        **common,
    )


def _vera(options: MethodOptions, _: int, common: dict[str, Any]) -> PeftConfig:
    return VeraConfig(r=options.rank, save_projection=False, **common)


def _fourierft(options: MethodOptions, _: int, common: dict[str, Any]) -> PeftConfig:
    return FourierFTConfig(n_frequency=options.n_frequency, **common)


def _psoft(options: MethodOptions, _: int, common: dict[str, Any]) -> PeftConfig:
    return PsoftConfig(
        r=options.rank,
        psoft_alpha=options.rank,
        psoft_orth=False,
        psoft_mag_a=False,
        psoft_mag_b=False,
        **common,
    )


def _tinylora(options: MethodOptions, _: int, common: dict[str, Any]) -> PeftConfig:
    return TinyLoraConfig(r=options.rank, u=options.dimension, save_projection=False, **common)


lora = peft_method(_lora)
dora = peft_method(_dora)
pissa = peft_method(_pissa)
adalora = peft_method(_adalora)
vera = peft_method(_vera)
fourierft = peft_method(_fourierft)
psoft = peft_method(_psoft)
tinylora = peft_method(_tinylora)


class AllocateRanks(TrainerCallback):
    """AdaLoRA's part of a training step: it weighs the ranks, and masks those that do not fit the budget."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.model.base_model.update_and_allocate(state.global_step + 1)  # type: ignore[operator, union-attr]


def allocate_ranks(model: nn.Module) -> Sequence[TrainerCallback]:
    """The callbacks of AdaLoRA."""
    return (AllocateRanks(model),)
