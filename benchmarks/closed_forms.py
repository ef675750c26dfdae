"""How far the closed form of the rotation's null agrees with draws, where it is admitted.

Run with `python -m benchmarks.closed_forms [--model FILE.safetensors]`; writes benchmarks/results/closed_forms.json,
from which `python -m benchmarks.tables` makes the table in docs/mathematics.md. The bases are random matrices of four
spectra and, with `--model`, the first square and the first rectangular matrix of a model.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from scipy.linalg import eigh
from torch import Tensor

from benchmarks.results import environment, parse_arguments, write
from spectralbasis.comparison.nulls import SCRAMBLED, draw_generator
from spectralbasis.comparison.rotations import rotations
from spectralbasis.comparison.statistics import against_moments
from spectralbasis.printable import track

M, N = 160, 120
STEPS = (0.001, 0.01, 0.03, 0.1, 0.3, 0.5)
MODEL_STEPS = (0.001, 0.03)
SIZES = (4, 16, 32)
MODEL_SIZES = (8, 64)


def main() -> None:
    arguments = parse_arguments(__doc__, draws=400, model="")
    generator = torch.Generator().manual_seed(0)
    bases = {name: (make(generator), STEPS, SIZES) for name, make in BASES.items()}
    if arguments.model:
        bases |= {name: (W, MODEL_STEPS, MODEL_SIZES) for name, W in model_matrices(Path(arguments.model)).items()}
    cells = [
        (name, base, update, step, sizes)
        for name, (base, steps, sizes) in bases.items()
        for update in UPDATES
        for step in steps
    ]
    rows: list[dict[str, Any]] = []
    for name, base, update, step, sizes in track(cells, "drawing", total=len(cells), enabled=True):
        made = UPDATES[update](base.shape[0], base.shape[1], generator)
        found = compare_with_draws(base, made * (step * base.norm() / made.norm()), sizes, arguments.draws)
        rows += [{"base": name, "update": update, "step": step, **row} for row in found]
    write("closed_forms", {"settings": {"draws": arguments.draws}, "rows": rows, **environment()})


def compare_with_draws(base: Tensor, update: Tensor, sizes: tuple[int, ...], draws: int) -> list[dict[str, Any]]:
    """One row for every number of directions: whether it is admitted, and the closed form beside the draws.

    Args:
        base: W0, (m, n), float64.
        update: ΔW, (m, n), float64.
        sizes: numbers of directions.
        draws: how many draws of the scrambled null.
    """
    U, S, Vh = torch.linalg.svd(base, full_matrices=False)
    assert SCRAMBLED.self_energy is not None
    energy = SCRAMBLED.self_energy(torch.linalg.svdvals(update).numpy(), (base.shape[0], base.shape[1]))
    closed = {k: (rotations(S.numpy(), energy, [k]) or {}).get(k) for k in sizes}
    drawn: dict[tuple[int, int], list[float]] = {(k, side): [] for k in sizes for side in (0, 1)}
    if any(closed.values()):
        for number in range(draws):
            assert SCRAMBLED.draw is not None
            moved = base + SCRAMBLED.draw(update, draw_generator(0, "closed forms", number))
            n = moved.shape[1]
            V1 = torch.from_numpy(
                eigh((moved.T @ moved).numpy(), subset_by_index=(n - max(sizes), n - 1), driver="evr")[1].copy()
            ).flip(1)
            U1 = torch.linalg.qr(moved @ V1)[0]
            for k in sizes:
                drawn[k, 0].append(1 - float((U[:, :k].T @ U1[:, :k]).square().sum()) / k)
                drawn[k, 1].append(1 - float((Vh[:k] @ V1[:, :k]).square().sum()) / k)
    rows = []
    for k, sides in closed.items():
        for number, side in enumerate(sides or ()):
            values = np.array(drawn[k, number])
            p_values = np.array([against_moments(1 - value, *side.overlap).p_value for value in values])
            rows.append(
                {
                    "k": k,
                    "admitted": True,
                    "rotation": float(values.mean()),
                    "mean": side.rotation / float(values.mean()),
                    "error": float(values.std(ddof=1) / values.mean() / len(values) ** 0.5),
                    "std": side.std / float(values.std(ddof=1)),
                    "below_05": float((p_values < 0.05).mean()),
                    "below_01": float((p_values < 0.01).mean()),
                }
            )
        if sides is None:
            rows += [{"k": k, "admitted": False}] * 2
    return rows


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))[0]


def _with_spectrum(spectrum: Tensor, m: int, n: int, generator: torch.Generator) -> Tensor:
    p = len(spectrum)
    return (_orthonormal(m, p, generator) * spectrum) @ _orthonormal(n, p, generator).T


def _low_rank(rank: int) -> Callable[[int, int, torch.Generator], Tensor]:
    def make(m: int, n: int, generator: torch.Generator) -> Tensor:
        left = torch.randn(m, rank, generator=generator, dtype=torch.float64)
        return left @ torch.randn(rank, n, generator=generator, dtype=torch.float64)

    return make


def _outliers(generator: torch.Generator) -> Tensor:
    noise = torch.randn(M, N, generator=generator, dtype=torch.float64) / M**0.5
    return noise + _with_spectrum(torch.linspace(8, 4, 8, dtype=torch.float64), M, N, generator)


ORDER = torch.arange(1, N + 1, dtype=torch.float64)
BASES: dict[str, Callable[[torch.Generator], Tensor]] = {
    "flat": lambda generator: torch.randn(M, N, generator=generator, dtype=torch.float64),
    "power law": lambda generator: _with_spectrum(ORDER**-0.5, M, N, generator),
    "exponential": lambda generator: _with_spectrum(torch.exp(-ORDER / 20), M, N, generator),
    "8 outliers": _outliers,
}
UPDATES: dict[str, Callable[[int, int, torch.Generator], Tensor]] = {
    "rank 1": _low_rank(1),
    "rank 4": _low_rank(4),
    "rank 16": _low_rank(16),
    "power law": lambda m, n, generator: _with_spectrum(
        torch.arange(1, min(m, n) + 1, dtype=torch.float64) ** -0.7, m, n, generator
    ),
    "full rank": lambda m, n, generator: torch.randn(m, n, generator=generator, dtype=torch.float64),
}


def model_matrices(file: Path) -> dict[str, Tensor]:
    """The first square matrix of a safetensors file, and the first one with more rows than columns, by their names."""
    found: dict[str, Tensor] = {}
    with safe_open(file, "pt") as opened:
        for name in sorted(opened.keys()):
            shape = opened.get_slice(name).get_shape()
            if len(shape) != 2 or "embed" in name or min(shape) <= max(MODEL_SIZES):
                continue
            kind = "square" if shape[0] == shape[1] else "tall" if shape[0] > shape[1] else "wide"
            if kind != "wide" and not any(key.startswith(kind) for key in found):
                found[f"{kind} matrix of the model"] = opened.get_tensor(name).double()
    return found


if __name__ == "__main__":
    main()
