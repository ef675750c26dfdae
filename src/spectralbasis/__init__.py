"""Measure how finetuning changes the leading singular vectors of a model, and tune by spectral coefficients alone.

Importing the package registers the method `SPECTRAL` with PEFT.
"""

from spectralbasis import linalg
from spectralbasis.basis import SpectralBasis
from spectralbasis.checkpoints import open_checkpoint
from spectralbasis.coefficients import (
    CoefficientBank,
    Combination,
    LoraExport,
    MergedExport,
    Similarity,
    combine,
    export_lora,
    export_merged,
    similarity,
)
from spectralbasis.comparison import Comparison, compare
from spectralbasis.errors import BaseMismatchError, InputError, SpectralBasisError
from spectralbasis.tuner import (
    SpectralConfig,
    SpectralDriftCallback,
    SpectralModel,
    calibrate,
    curvature_basis,
    gradient_coverage,
    parameter_groups,
)
from spectralbasis.version import __version__

__all__ = [
    "BaseMismatchError",
    "CoefficientBank",
    "Combination",
    "Comparison",
    "InputError",
    "LoraExport",
    "MergedExport",
    "Similarity",
    "SpectralBasis",
    "SpectralBasisError",
    "SpectralConfig",
    "SpectralDriftCallback",
    "SpectralModel",
    "__version__",
    "calibrate",
    "combine",
    "compare",
    "curvature_basis",
    "export_lora",
    "export_merged",
    "gradient_coverage",
    "linalg",
    "open_checkpoint",
    "parameter_groups",
    "similarity",
]
