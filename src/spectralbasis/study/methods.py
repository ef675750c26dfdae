"""Ways to adapt a model to a task: what each one trains, which options it has, and at which learning rates."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from peft import LoraConfig, get_peft_model
from torch import nn

from spectralbasis.errors import InputError
from spectralbasis.linalg import Leading
from spectralbasis.study.models import LoadedModel
from spectralbasis.tuner import SpectralConfig
from spectralbasis.tuner.optimization import in_modules


@dataclass(frozen=True)
class MethodOptions:
    """The options of all methods; each method reads those that it names and refuses the others.

    `coefficients`, `basis`, and one of `leading` (directions in each matrix) or `budget` (fraction of the model's
    parameters) are for `spectral`; `rank` and `alpha` (2 x rank where None) are for `lora`.
    """

    coefficients: str = "diagonal"
    basis: str = "pretrained"
    leading: Leading | None = None
    budget: float | None = None
    rank: int = 8
    alpha: float | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"rank={self.rank} was given; expected a whole number from 1")

    def changed(self) -> tuple[str, ...]:
        """Names of the options that differ from their defaults."""
        return tuple(field.name for field in fields(self) if getattr(self, field.name) != field.default)


@dataclass(frozen=True)
class Method:
    """One way to adapt: `prepare` makes the model whose trainable parameters are those of the method.

    `default_rate` is the learning rate of what is trained in the backbone, for the options given (None where nothing
    is), and `default_head_rate` that of the head.
    """

    name: str
    prepare: Callable[[LoadedModel, MethodOptions], nn.Module]
    default_rate: Callable[[MethodOptions], float] | None
    default_head_rate: float
    options: frozenset[str] = frozenset()

    def check(self, options: MethodOptions) -> None:
        """Refuse options that this method would ignore.

        Raises:
            InputError: one of them was set.
        """
        for name in options.changed():
            if name not in self.options:
                owners = ", ".join(method.name for method in METHODS.values() if name in method.options)
                raise InputError(f"the option {name} means nothing to the method {self.name}; it belongs to {owners}")

    def learning_rates(
        self, options: MethodOptions, rate: float | None, head_rate: float | None
    ) -> tuple[float, float]:
        """The learning rates of backbone and head: those given, else the defaults.

        Where the head alone is trained, `rate` is the head's too.
        """
        if self.default_rate is None:
            only = next((given for given in (head_rate, rate) if given is not None), self.default_head_rate)
            return only, only
        return (
            self.default_rate(options) if rate is None else rate,
            self.default_head_rate if head_rate is None else head_rate,
        )


def find_method(name: str) -> Method:
    """The method of this name.

    Raises:
        InputError: there is none.
    """
    if name not in METHODS:
        raise InputError(f"unknown method {name!r}; the known ones are {', '.join(METHODS)}")
    return METHODS[name]


def _full(loaded: LoadedModel, _: MethodOptions) -> nn.Module:
    return loaded.model


def _head(loaded: LoadedModel, _: MethodOptions) -> nn.Module:
    for name, parameter in loaded.model.named_parameters():
        parameter.requires_grad_(in_modules(name, loaded.head))
    return loaded.model


def _lora(loaded: LoadedModel, options: MethodOptions) -> nn.Module:
    alpha = 2 * options.rank if options.alpha is None else options.alpha
    return get_peft_model(loaded.model, LoraConfig(r=options.rank, lora_alpha=alpha, **_everywhere(loaded)))


def _spectral(loaded: LoadedModel, options: MethodOptions) -> nn.Module:
    settings = {name: getattr(options, name) for name in ("coefficients", "basis", "leading", "budget")}
    given = {name: value for name, value in settings.items() if value is not None}
    return get_peft_model(loaded.model, SpectralConfig(**given, **_everywhere(loaded)))


def _spectral_rate(options: MethodOptions) -> float:
    return 2e-2 if options.coefficients == "diagonal" else 5e-3


def _everywhere(loaded: LoadedModel) -> dict[str, Any]:
    """PEFT's settings for an adapter on every linear layer of the backbone, and a head trained and saved beside it."""
    return {
        "task_type": "SEQ_CLS" if loaded.task.modality == "text" else None,
        "target_modules": "all-linear",
        "modules_to_save": list(loaded.head),
    }


METHODS = {
    method.name: method
    for method in (
        Method("spectral", _spectral, _spectral_rate, 6e-3, frozenset({"coefficients", "basis", "leading", "budget"})),
        Method("full", _full, lambda _: 1e-4, 1e-3),
        Method("head", _head, None, 5e-2),
        Method("lora", _lora, lambda _: 1e-3, 6e-3, frozenset({"rank", "alpha"})),
    )
}
