"""Does a comparison take as long as its plan says?

Run with `OMP_NUM_THREADS=1 python -m benchmarks.planning`: writes pairs of checkpoints with the proportions of a Llama,
plans each comparison and makes it, in one process, nothing cached. Time is that of the processor (`process_time`),
which other work on the machine disturbs less than the clock on the wall; both are recorded.
"""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.memory import shapes, weights
from benchmarks.processes import measure
from benchmarks.results import environment, parse_arguments, write
from spectralbasis.comparison.measuring import Settings
from spectralbasis.comparison.planning import Rates, calibrate

K, DRAWS = 64, 5
LAYERS = {384: 4, 768: 2, 1536: 1, 2048: 1}


def main() -> None:
    parse_arguments(__doc__)
    rows = [measure("benchmarks.planning:planned_and_made", str(width)) for width in LAYERS]
    rates = measure("benchmarks.planning:calibrated")["result"]
    settings = {"k": K, "draws": DRAWS}
    write("planning", {"settings": settings, "rows": [row["result"] for row in rows], "rates": rates, **environment()})


def planned_and_made(width: str) -> Callable[[], dict[str, Any]]:
    """The tool that is measured: the plan of one comparison, then the comparison."""
    from spectralbasis.comparison import compare, plan_comparison

    def work() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            base, tuned = write_pair(Path(folder), int(width), LAYERS[int(width)])
            plan = plan_comparison(base, [tuned], leading=K, draws=DRAWS, clock=time.process_time)
            wall, processor = time.perf_counter(), time.process_time()
            compare(base, [tuned], leading=K, draws=DRAWS)
            return {
                "width": int(width),
                "layers": LAYERS[int(width)],
                "matrices": sum(one["count"] for one in plan["matrices"]),
                "solvers": sorted({one["solver"] for one in plan["matrices"]}),
                "operations": plan["operations"],
                "planned_seconds": plan["executors"][0]["seconds"],
                "seconds": time.process_time() - processor,
                "wall_seconds": time.perf_counter() - wall,
                "load": os.getloadavg()[0],
            }

    return work


def calibrated() -> Callable[[], dict[str, Any]]:
    """The rates of one core of this machine."""

    def work() -> dict[str, Any]:
        return asdict(calibrate(None, Settings(K, draws=DRAWS), threads=1, clock=time.process_time))

    return work


def read_rates(found: dict[str, Any], **other: tuple[tuple[int, float], ...]) -> Rates:
    """Rates as they were measured, but for the kinds given."""
    by_side = {kind: tuple((int(side), rate) for side, rate in points) for kind, points in found["by_side"].items()}
    return Rates({**by_side, **other}, found["overhead"])


def write_pair(folder: Path, width: int, layers: int) -> tuple[Path, Path]:
    """A base and a copy with an update in every matrix, all layers different."""
    generator = torch.Generator().manual_seed(width)
    states: dict[str, dict[str, torch.Tensor]] = {"base": {}, "tuned": {}}
    for layer in range(layers):
        for name, (m, n) in shapes(width).items():
            W = weights(m, n, generator)
            update = 0.03 * torch.randn(m, n, generator=generator)
            states["base"][f"model.layers.{layer}.{name}.weight"] = W.bfloat16()
            states["tuned"][f"model.layers.{layer}.{name}.weight"] = (W + update).bfloat16()
    files = [folder / f"{name}.safetensors" for name in states]
    for file, state in zip(files, states.values(), strict=True):
        save_file(state, file)
    return files[0], files[1]


if __name__ == "__main__":
    main()
