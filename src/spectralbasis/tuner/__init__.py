"""The PEFT method "SPECTRAL"; importing this package registers it."""

from spectralbasis.tuner import reading  # noqa: F401  makes spectral adapters readable as checkpoints
from spectralbasis.tuner.allocation import Allocation
from spectralbasis.tuner.config import SpectralConfig
from spectralbasis.tuner.layer import Linear, SpectralLayer
from spectralbasis.tuner.model import SpectralModel
from spectralbasis.tuner.registration import register

__all__ = ["Allocation", "Linear", "SpectralConfig", "SpectralLayer", "SpectralModel"]

register(SpectralConfig, SpectralModel)
