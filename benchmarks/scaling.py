"""How does the time of a comparison grow with the number of matrices and of checkpoints?

Run with `python -m benchmarks.scaling`. To the times `t = a + b·x^p` is fitted by least squares on their logarithms:
`a ≥ 0` is the fixed cost of a comparison, without which any growth would look slower than linear; p is the exponent.
"""

import os
import tempfile
import time
from typing import Any

import numpy as np
import torch
from scipy.optimize import least_squares
from torch import Tensor

from benchmarks.results import environment, parse_arguments, write
from spectralbasis import compare

PER_LAYER, M, N, K, DRAWS = 2, 384, 384, 64, 5
STEP = 0.1


def main() -> None:
    arguments = parse_arguments(__doc__, layers="1,2,4,8,16", checkpoints="1,2,3,4,6,8", repeats=3)
    layers, checkpoints = (
        [int(count) for count in listed.split(",")] for listed in (arguments.layers, arguments.checkpoints)
    )
    by_layers = least_times([(count, 1) for count in layers], arguments.repeats)
    by_checkpoints = least_times([(4, count) for count in checkpoints], arguments.repeats)
    series = [
        describe("matrices", [PER_LAYER * count for count in layers], by_layers),
        describe("checkpoints", checkpoints, by_checkpoints),
    ]
    settings = {"shape": [M, N], "k": K, "draws": DRAWS, "matrices": 4 * PER_LAYER, "repeats": arguments.repeats}
    write("scaling", {"settings": settings, "series": series, **environment()})


def least_times(cases: list[tuple[int, int]], repeats: int) -> list[float]:
    """The least time of each (layers, checkpoints), the cases taking turns."""
    times = [[seconds(*case) for case in cases] for _ in range(repeats)]
    return [min(found) for found in zip(*times, strict=True)]


def seconds(layers: int, checkpoints: int) -> float:
    """Time of one comparison with nothing cached."""
    base, *tuned = [state(layers, checkpoint) for checkpoint in range(checkpoints + 1)]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SPECTRALBASIS_CACHE"] = folder
        started = time.perf_counter()
        compare(base, tuned, leading=K, draws=DRAWS)
        return time.perf_counter() - started


def state(layers: int, checkpoint: int) -> dict[str, Tensor]:
    """Weights of checkpoint number 0, the base, or of one finetuned from it."""
    base, update = torch.Generator().manual_seed(0), torch.Generator().manual_seed(checkpoint)
    return {
        f"layers.{index // PER_LAYER}.dense{index % PER_LAYER}.weight": torch.randn(M, N, generator=base)
        + STEP * bool(checkpoint) * torch.randn(M, N, generator=update)
        for index in range(layers * PER_LAYER)
    }


def describe(over: str, counts: list[int], times: list[float]) -> dict[str, Any]:
    """Times over what was varied, with the fit."""
    fixed, exponent = fit(np.array(counts, float), np.array(times))
    return {"over": over, "counts": counts, "seconds": times, "fixed_seconds": fixed, "exponent": exponent}


def fit(counts: np.ndarray, times: np.ndarray) -> tuple[float, float]:
    """Fixed cost a and exponent p of `a + b·x^p`, by least squares on logarithms."""
    unit = times.min()

    def misfit(parameters: np.ndarray) -> np.ndarray:
        a, log_b, p = parameters
        return np.log(a + np.exp(log_b) * counts**p) - np.log(times / unit)

    found = least_squares(misfit, x0=(0.5, np.log(0.5), 1.0), bounds=((0, -np.inf, 0), (1, np.inf, 3)))
    return float(found.x[0] * unit), float(found.x[2])


if __name__ == "__main__":
    main()
