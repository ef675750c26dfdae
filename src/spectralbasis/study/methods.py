"""Ways to adapt a model to a task: what each one trains, which options it has, and at which learning rates."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from spectralbasis.errors import InputError
from spectralbasis.linalg import Leading
from spectralbasis.study.models import LoadedModel
from spectralbasis.tuner import SpectralConfig
from spectralbasis.tuner.calibration import calibrate, plan_ranks
from spectralbasis.tuner.curvature import curvature_basis
from spectralbasis.tuner.optimization import in_modules
from spectralbasis.tuner.targets import targeted_modules

BASIS_FILE = "basis.safetensors"
CALIBRATION_EXAMPLES = 256
"""Training examples that sparse coefficients and a curvature basis are calibrated on, or all where there are fewer."""
CALIBRATION_BATCH = 32


@dataclass(frozen=True)
class MethodOptions:
    """The options of all methods; each method reads those that it names and refuses the others.

    `coefficients`, `bandwidth`, `scaling`, `basis`, and one of `leading` (directions in each matrix) or `budget`
    (fraction of the model's parameters) are for `spectral`; `rank` and `alpha` (2 x rank where None) are for `lora`.
    """

    coefficients: str = "diagonal"
    bandwidth: int = 1
    scaling: str = "absolute"
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

    It may leave a basis file, `BASIS_FILE`, in the folder that it is given, where the adapter will lie.
    `default_rate` is the learning rate of what is trained in the backbone, for the options given (None where nothing
    is), and `default_head_rate` that of the head.
    """

    name: str
    prepare: Callable[[LoadedModel, MethodOptions, Path], nn.Module]
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


def _full(loaded: LoadedModel, _: MethodOptions, __: Path) -> nn.Module:
    return loaded.model


def _head(loaded: LoadedModel, _: MethodOptions, __: Path) -> nn.Module:
    for name, parameter in loaded.model.named_parameters():
        parameter.requires_grad_(in_modules(name, loaded.head))
    return loaded.model


def _lora(loaded: LoadedModel, options: MethodOptions, _: Path) -> nn.Module:
    alpha = 2 * options.rank if options.alpha is None else options.alpha
    return get_peft_model(loaded.model, LoraConfig(r=options.rank, lora_alpha=alpha, **_everywhere(loaded)))


def _spectral(loaded: LoadedModel, options: MethodOptions, folder: Path) -> nn.Module:
    names = ("coefficients", "bandwidth", "scaling", "leading", "budget")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    config = SpectralConfig(basis=options.basis, **given, **_everywhere(loaded))
    if options.basis == "curvature":
        config = SpectralConfig(basis=str(_curvature(loaded, config, folder)), **given, **_everywhere(loaded))
    if options.coefficients == "sparse":
        config = calibrate(loaded.model, _calibration_batches(loaded), config)
    return get_peft_model(loaded.model, config)


def _curvature(loaded: LoadedModel, config: SpectralConfig, folder: Path) -> Path:
    """The file of a basis of as many directions as the config asks for."""
    k = max(plan_ranks(config, loaded.model).values())
    targets = list(targeted_modules(config, loaded.model))
    basis = curvature_basis(loaded.model, _calibration_batches(loaded), k, target_modules=targets)
    return basis.save(folder / BASIS_FILE)


def _calibration_batches(loaded: LoadedModel) -> Iterator[dict[str, Tensor]]:
    """A fixed sample of the task's training examples, with the head as it is drawn."""
    examples = loaded.task.subsample(min(CALIBRATION_EXAMPLES, len(loaded.task.train)), seed=0).train
    for start in range(0, len(examples), CALIBRATION_BATCH):
        stop = min(start + CALIBRATION_BATCH, len(examples))
        yield loaded.collator([examples[row] for row in range(start, stop)])


def _spectral_rate(options: MethodOptions) -> float:
    return 2e-2 if options.coefficients == "diagonal" else 5e-3


def _everywhere(loaded: LoadedModel) -> dict[str, Any]:
    """PEFT's settings for an adapter on every linear layer of the backbone, and a head trained and saved beside it."""
    return {
        "task_type": "SEQ_CLS" if loaded.task.modality == "text" else None,
        "target_modules": "all-linear",
        "modules_to_save": list(loaded.head),
    }


SPECTRAL_OPTIONS = frozenset({"coefficients", "bandwidth", "scaling", "basis", "leading", "budget"})

METHODS = {
    method.name: method
    for method in (
        Method("spectral", _spectral, _spectral_rate, 6e-3, SPECTRAL_OPTIONS),
        Method("full", _full, lambda _: 1e-4, 1e-3),
        Method("head", _head, None, 5e-2),
        Method("lora", _lora, lambda _: 1e-3, 6e-3, frozenset({"rank", "alpha"})),
    )
}
