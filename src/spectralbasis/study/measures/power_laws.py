"""Power-law exponents of weight matrices, through the package `weightwatcher` where it is installed."""

from contextlib import redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pandas as pd
from torch import nn

from spectralbasis.checkpoints import matrix_name
from spectralbasis.errors import InputError


def is_available() -> bool:
    """Whether `weightwatcher` is installed."""
    return find_spec("weightwatcher") is not None


def power_law_exponents(model: nn.Module, matrices: set[str]) -> dict[str, float]:
    """The exponent α of the tail of each matrix's eigenvalue density (Martin & Mahoney, 1810.01075), by matrix name.

    Args:
        model: its layers are read as they are.
        matrices: names of matrices to fit.

    Returns:
        Matrices that the package finds no fit for are absent.

    Raises:
        InputError: the package is not installed.
    """
    if not is_available():
        raise InputError("power-law exponents need the package weightwatcher: pip install 'spectralbasis[diagnostics]'")
    with redirect_stdout(None):  # it prints where it has few eigenvalues to fit
        watcher = import_module("weightwatcher").WeightWatcher(model=model)
        layers = _rows(watcher.describe())
        wanted = [int(row.layer_id) for row in layers if matrix_name(str(row.longname)) in matrices]
        found = watcher.analyze(layers=wanted) if wanted else pd.DataFrame()
    return {matrix_name(str(row.longname)): float(row.alpha) for row in _rows(found) if row.alpha > 0}


def _rows(table: pd.DataFrame) -> Any:
    return table.itertuples()
