"""The options of all methods in one place."""

from dataclasses import dataclass, fields

from spectralbasis.errors import InputError
from spectralbasis.linalg import Leading
from spectralbasis.tuner.parametrisation import DEFAULT_SCALING

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
