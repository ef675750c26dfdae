"""The options of all methods in one place.

What a method is: how it prepares a model, which options it reads, and at which rates it learns.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn
from transformers import TrainerCallback

from spectralbasis.errors import InputError
from spectralbasis.linalg import Leading
from spectralbasis.training.models import LoadedModel
from spectralbasis.tuner.factors import DEFAULT_SCALING

_LARGEST = 1 << 20
"""Beyond the width of any model."""


@dataclass(frozen=True)
class MethodOptions:
    """The options of all methods; each method reads those that it names and refuses the others.

    `coefficients`, `bandwidth`, `scaling`, `basis`, and one of `leading` (directions in each matrix) or `budget`
    (fraction of the model's parameters) are for `spectral`, and some of them for `svft`. `rank` is the rank or the
    width of what is added to each matrix or layer (the method's default where None), and `alpha` LoRA's scale (2 x rank
    where None). `n_frequency` counts FourierFT's numbers for each matrix, `dimension` those of TinyLoRA for each matrix
    and of a random subspace altogether. `sources` are the folders of the adapters that AdapterFusion fuses.

    Raises InputError for numbers that cannot be.
    """

    coefficients: str = "diagonal"
    bandwidth: int = 1
    scaling: str = DEFAULT_SCALING
    basis: str = "pretrained"
    leading: Leading | None = None
    budget: float | None = None
    rank: int | None = None
    alpha: float | None = None
    n_frequency: int | None = None
    dimension: int | None = None
    sources: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("rank", "n_frequency", "dimension"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= _LARGEST:
                raise InputError(f"{name}={value} was given; expected a whole number from 1 to {_LARGEST}")

    def changed(self) -> tuple[str, ...]:
        """Names of the options that differ from their defaults."""
        return tuple(field.name for field in fields(self) if getattr(self, field.name) != field.default)


@dataclass(frozen=True)
class Setup:
    """What a method prepares: a model with its task, the options, the folder the adapter will lie in, and how long.

    `steps` is the number of optimizer steps to come.
    """

    loaded: LoadedModel
    options: MethodOptions
    folder: Path
    steps: int = 1


@dataclass(frozen=True)
class Method:
    """One way to adapt.

    Attributes:
        name: what `tune` calls it.
        prepare: makes the model whose trainable parameters are those of the method; it may leave files that the
            adapter needs in the folder of its setup.
        default_rate: the learning rate of what is trained in the backbone; None where nothing is.
        default_head_rate: the learning rate of the head.
        options: the options that it reads.
        defaults: values of those that were left None.
        writes: "model" for a whole model, "adapter" for the folder of a PEFT adapter, "trained" for the trained
            parameters alone, which `prepare` makes room for again.
        callbacks: what training needs beside the optimizer, for a prepared model.
    """

    name: str
    prepare: Callable[[Setup], nn.Module]
    default_rate: float | None
    default_head_rate: float
    options: frozenset[str] = frozenset()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    writes: Literal["model", "adapter", "trained"] = "adapter"
    callbacks: Callable[[nn.Module], Sequence[TrainerCallback]] = lambda model: ()

    def complete(self, options: MethodOptions) -> MethodOptions:
        """The options with this method's defaults for what was left None."""
        return replace(
            options, **{name: value for name, value in self.defaults.items() if getattr(options, name) is None}
        )

    def learning_rates(self, rate: float | None, head_rate: float | None) -> tuple[float, float]:
        """The learning rates of backbone and head: those given, else the defaults.

        Where the head alone is trained, `rate` is the head's too.
        """
        if self.default_rate is None:
            only = next((given for given in (head_rate, rate) if given is not None), self.default_head_rate)
            return only, only
        return (
            self.default_rate if rate is None else rate,
            self.default_head_rate if head_rate is None else head_rate,
        )
