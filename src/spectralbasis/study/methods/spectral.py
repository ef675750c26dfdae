"""Spectral coefficients, and SVFT, which is theirs over all directions."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from peft import get_peft_model
from torch import Tensor, nn

from spectralbasis.errors import InputError
from spectralbasis.study.methods.low_rank import everywhere
from spectralbasis.study.methods.method import Setup
from spectralbasis.study.models.loading import LoadedModel
from spectralbasis.study.tasks.arrays import batches
from spectralbasis.tuner import SpectralConfig
from spectralbasis.tuner.calibration import calibrate, plan_ranks
from spectralbasis.tuner.config import BASIS_FILE
from spectralbasis.tuner.curvature import curvature_basis
from spectralbasis.tuner.targets import targeted_modules

CALIBRATION_EXAMPLES = 256
"""Training examples that sparse coefficients and a curvature basis are calibrated on, or all where there are fewer."""
CALIBRATION_BATCH = 32
ALL_DIRECTIONS = 1 - 1e-9
"""As a fraction, which must be below 1: rounded, it is min(m, n) of every matrix."""
SPECTRAL_RATE = 3e-2
"""The default learning rate of coefficients, meant in the default unit."""
SVFT_PATTERNS = ("diagonal", "band", "sparse")


def spectral(setup: Setup) -> nn.Module:
    """Coefficients on frozen directions, sparse ones calibrated on the task; a curvature basis lies in the folder."""
    loaded, options = setup.loaded, setup.options
    names = ("coefficients", "bandwidth", "scaling", "leading", "budget")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    basis = options.basis
    if basis == "curvature":
        basis = str(_curvature(loaded, SpectralConfig(**given, **everywhere(loaded)), setup.folder))
    config = SpectralConfig(basis=basis, **given, **everywhere(loaded))
    if options.coefficients == "sparse":
        config = calibrate(loaded.model, calibration_batches(loaded), config)
    return get_peft_model(loaded.model, config)


def svft(setup: Setup) -> nn.Module:
    """SVFT (Lingam et al., arXiv 2405.19597): a diagonal, a band, or sparse entries over all singular directions.

    Raises:
        InputError: another pattern was asked for.
    """
    if setup.options.coefficients not in SVFT_PATTERNS:
        raise InputError(
            f"svft has no coefficients {setup.options.coefficients!r}; choose from {', '.join(SVFT_PATTERNS)}"
        )
    return spectral(replace(setup, options=replace(setup.options, leading=ALL_DIRECTIONS)))


def calibration_batches(loaded: LoadedModel) -> Iterator[dict[str, Tensor]]:
    """A fixed sample of the task's training examples, with the head as it is."""
    examples = loaded.task.subsample(min(CALIBRATION_EXAMPLES, len(loaded.task.train)), seed=0).train
    return map(loaded.collator, batches(examples, CALIBRATION_BATCH))


def _curvature(loaded: LoadedModel, config: SpectralConfig, folder: Path) -> Path:
    """The file of a basis of as many directions as the config asks for."""
    k = max(plan_ranks(config, loaded.model).values())
    targets = list(targeted_modules(config, loaded.model))
    basis = curvature_basis(loaded.model, calibration_batches(loaded), k, target_modules=targets)
    return basis.save(folder / BASIS_FILE)
