"""The PEFT method "SPECTRAL"; importing this package registers it."""

from spectralbasis.tuner import reading  # noqa: F401  makes spectral adapters readable as checkpoints
from spectralbasis.tuner.allocation import Allocation
from spectralbasis.tuner.calibration import calibrate
from spectralbasis.tuner.config import SpectralConfig
from spectralbasis.tuner.convolution import Convolution
from spectralbasis.tuner.coverage import gradient_coverage
from spectralbasis.tuner.curvature import curvature_basis
from spectralbasis.tuner.drift import SpectralDriftCallback
from spectralbasis.tuner.embedding import Embedding
from spectralbasis.tuner.layer import SpectralLayer
from spectralbasis.tuner.linear import Linear
from spectralbasis.tuner.model import SpectralModel
from spectralbasis.tuner.optimization import parameter_groups
from spectralbasis.tuner.parameters import ParamWrapper
from spectralbasis.tuner.registration import register

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
    "parameter_groups",
]

register(SpectralConfig, SpectralModel)
