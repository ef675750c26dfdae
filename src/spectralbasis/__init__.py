"""Measure how finetuning changes the leading singular vectors of a model, and tune by spectral coefficients alone.

Importing the package registers the method `SPECTRAL` with PEFT.
"""

from spectralbasis import linalg
from spectralbasis.basis import SpectralBasis
from spectralbasis.checkpoints import open_checkpoint
from spectralbasis.coefficients import CoefficientBank, LoraExport, Similarity, export_lora, similarity
from spectralbasis.comparison import Comparison, compare
from spectralbasis.errors import BaseMismatchError, InputError, SpectralBasisError
from spectralbasis.tuner import SpectralConfig, SpectralModel
from spectralbasis.version import __version__

__all__ = [
    "BaseMismatchError",
    "CoefficientBank",
    "Comparison",
    "InputError",
    "LoraExport",
    "Similarity",
    "SpectralBasis",
    "SpectralBasisError",
    "SpectralConfig",
    "SpectralModel",
    "__version__",
    "compare",
    "export_lora",
    "linalg",
    "open_checkpoint",
    "similarity",
]
