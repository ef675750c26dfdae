"""Measure how finetuning changes the leading singular vectors of a model, and tune by spectral coefficients alone.

PEFT knows the method `SPECTRAL` once both are imported, in either order. Public names are loaded when first used.
"""

# ruff: noqa: E402
from spectralbasis.working_folder import leave_out

leave_out()  # before anything else is imported

from importlib import import_module
from typing import TYPE_CHECKING, Any

from spectralbasis.errors import BaseMismatchError, InputError, SpectralBasisError
from spectralbasis.peft_import import register_with_peft
from spectralbasis.version import __version__

if TYPE_CHECKING:
    from spectralbasis import linalg
    from spectralbasis.basis import SpectralBasis
    from spectralbasis.checkpoints import open_checkpoint
    from spectralbasis.coefficients import (
        CoefficientBank,
        Combination,
        Extraction,
        LoraExport,
        MergedExport,
        Similarity,
        combine,
        export_lora,
        export_merged,
        extract,
    )
    from spectralbasis.coefficients.similarity import similarity
    from spectralbasis.comparison import Comparison, compare, plan_comparison
    from spectralbasis.training import evaluate, predict, predict_file, tune
    from spectralbasis.tuner import (
        SpectralConfig,
        SpectralDriftCallback,
        SpectralModel,
        calibrate,
        curvature_basis,
        gradient_coverage,
        keep_weights,
        parameter_groups,
    )

__all__ = [
    "BaseMismatchError",
    "CoefficientBank",
    "Combination",
    "Comparison",
    "Extraction",
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
    "evaluate",
    "export_lora",
    "export_merged",
    "extract",
    "gradient_coverage",
    "keep_weights",
    "linalg",
    "open_checkpoint",
    "parameter_groups",
    "plan_comparison",
    "predict",
    "predict_file",
    "similarity",
    "tune",
]

_HOMES = {
    "basis": ("SpectralBasis",),
    "checkpoints": ("open_checkpoint",),
    "coefficients": (
        "CoefficientBank",
        "Combination",
        "Extraction",
        "LoraExport",
        "MergedExport",
        "Similarity",
        "combine",
        "export_lora",
        "export_merged",
        "extract",
        "similarity",
    ),
    "comparison": ("Comparison", "compare", "plan_comparison"),
    "training": ("evaluate", "predict", "predict_file", "tune"),
    "tuner": (
        "SpectralConfig",
        "SpectralDriftCallback",
        "SpectralModel",
        "calibrate",
        "curvature_basis",
        "gradient_coverage",
        "keep_weights",
        "parameter_groups",
    ),
}
"""Module → its public names; torch, transformers and PEFT are imported with the first of them that needs it."""


def __getattr__(name: str) -> Any:
    if name == "linalg":
        return import_module("spectralbasis.linalg")
    for module, names in _HOMES.items():
        if name in names:
            found = getattr(import_module(f"spectralbasis.{module}"), name)
            globals()[name] = found
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_peft(lambda: import_module("spectralbasis.tuner"))  # importing it registers the method
