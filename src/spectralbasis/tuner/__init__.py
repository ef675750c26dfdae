"""The PEFT method "SPECTRAL"; importing this package registers it.

transformers may import PEFT, and so this package, before it is complete (`transformers.trainer_utils` does). So this
file imports no part of transformers that PEFT does not import itself, and the callback is loaded on first use.
"""

from typing import TYPE_CHECKING, Any

from spectralbasis.peft_import import register
from spectralbasis.tuner import reading  # noqa: F401  makes spectral adapters readable as checkpoints
from spectralbasis.tuner.calibration import calibrate, curvature_basis, gradient_coverage, parameter_groups
from spectralbasis.tuner.config import SpectralConfig
from spectralbasis.tuner.kept import keep_weights
from spectralbasis.tuner.layer import Convolution, Embedding, Linear, SpectralLayer
from spectralbasis.tuner.model import SpectralModel
from spectralbasis.tuner.parameters import ParamWrapper
from spectralbasis.tuner.preparation import Allocation

if TYPE_CHECKING:
    from spectralbasis.tuner.drift import SpectralDriftCallback

__all__ = [
    "Allocation",
    "Convolution",
    "Embedding",
    "Linear",
    "ParamWrapper",
    "SpectralConfig",
    "SpectralDriftCallback",
    "SpectralLayer",
    "SpectralModel",
    "calibrate",
    "curvature_basis",
    "gradient_coverage",
    "keep_weights",
    "parameter_groups",
]

register(SpectralConfig, SpectralModel)


def __getattr__(name: str) -> Any:
    if name == "SpectralDriftCallback":
        from spectralbasis.tuner.drift import SpectralDriftCallback

        return SpectralDriftCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
