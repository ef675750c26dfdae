"""How often `compare` gives a verdict where nothing, or an alignment of known strength, is planted.

Run with `python -m benchmarks.calibration`; writes benchmarks/results/calibration.json, from which
`python -m benchmarks.tables` makes the table in docs/mathematics.md.
"""

from typing import Any

import torch
from torch import Tensor

from benchmarks.results import environment, parse_arguments, write
from spectralbasis import compare
from spectralbasis.comparison.nulls import scrambled
from spectralbasis.printable import track

LAYERS, PER_LAYER, M, N, K = 6, 4, 48, 40, 8
STRENGTHS = (0.0, 0.01, 0.03, 0.1, 0.3)
STEPS = (0.05, 0.5)


def main() -> None:
    arguments = parse_arguments(__doc__, trials=100)
    cells = [(step, strength) for step in STEPS for strength in STRENGTHS]
    rows = []
    for step, strength in track(cells, "calibrating", total=len(cells), enabled=True):
        rows.append(rates(step, strength, arguments.trials))
    settings = {"layers": LAYERS, "matrices": LAYERS * PER_LAYER, "shape": [M, N], "k": K, "trials": arguments.trials}
    write("calibration", {"settings": settings, "rows": rows, **environment()})


def rates(step: float, strength: float, trials: int) -> dict[str, Any]:
    """Share of trials in which each claim was supported or contradicted.

    Args:
        step: `‖ΔW‖_F / ‖W0‖_F`.
        strength: share of `‖ΔW‖_F²` that is planted in the leading core; the rest is placed at random.
        trials: number of simulated comparisons.
    """
    counts = dict.fromkeys(("stability_supported", "stability_contradicted"), 0)
    counts |= dict.fromkeys(("coverage_supported", "coverage_contradicted"), 0)
    for trial in range(trials):
        base, tuned = planted(step, strength, trial)
        summary = compare(base, [tuned], leading=K, draws=5, seed=trial).summary()
        for claim in ("stability", "coverage"):
            verdict = summary[claim]["verdict"]
            if verdict != "undecided":
                counts[f"{claim}_{verdict}"] += 1
    return {"step": step, "strength": strength, **{name: count / trials for name, count in counts.items()}}


def planted(step: float, strength: float, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Base and finetuned state dicts of one simulated comparison."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, N + 1, dtype=torch.float64) ** -0.7
    base, tuned = {}, {}
    for index in range(LAYERS * PER_LAYER):
        U, V = (torch.linalg.qr(torch.randn(size, N, generator=generator, dtype=torch.float64))[0] for size in (M, N))
        W0 = (U * spectrum) @ V.T
        core = U[:, :K] @ torch.randn(K, K, generator=generator, dtype=torch.float64) @ V[:, :K].T
        chance = scrambled(torch.randn(M, N, generator=generator, dtype=torch.float64), generator)
        update = strength**0.5 * core / core.norm() + (1 - strength) ** 0.5 * chance / chance.norm()
        name = f"layer.{index // PER_LAYER}.dense{index % PER_LAYER}.weight"
        base[name], tuned[name] = W0, W0 + step * W0.norm() * update / update.norm()
    return base, tuned


if __name__ == "__main__":
    main()
