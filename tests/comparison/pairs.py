"""Pairs of state dicts with a known relation, and a shorthand to read one measurement."""

import math

import pandas as pd
import torch
from torch import Tensor

from spectralbasis.comparison.nulls import scrambled
from tests.matrices import power_law, with_spectrum


def layered(W: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict of one matrix per layer."""
    return {f"encoder.layer.{name}.weight": tensor for name, tensor in W.items()}


def rotated_pair(k: int, angle: float, m: int = 60, n: int = 40) -> tuple[Tensor, Tensor]:
    """W0, and W1 with u_1 turned by `angle` towards u_{k+1} (left vectors only)."""
    spectrum = power_law(n)
    W0, U, V = with_spectrum(m, n, spectrum)
    turned = U.clone()
    turned[:, 0] = math.cos(angle) * U[:, 0] + math.sin(angle) * U[:, k]
    turned[:, k] = math.cos(angle) * U[:, k] - math.sin(angle) * U[:, 0]
    return W0, (turned * spectrum) @ V.T


def random_updates(count: int, size: float, *, per_layer: int = 2, m: int = 48, n: int = 40, seed: int = 0):
    """Base and finetuned state dicts whose updates are unrelated to the base, `per_layer` matrices in each layer."""
    generator = torch.Generator().manual_seed(seed)
    base, tuned = {}, {}
    for index in range(count):
        name = f"{index // per_layer}.dense{index % per_layer}"
        W0 = with_spectrum(m, n, power_law(n), seed=10 * index + seed)[0].float()
        update = torch.randn(m, n, generator=generator)
        base[name], tuned[name] = W0, W0 + size * update / update.norm()
    return layered(base), layered(tuned)


def value(table: pd.DataFrame, metric: str, *, k: int, side: str = "both", index: int = -1) -> float:
    """The one value of a metric in a table of one matrix."""
    rows = table[(table.metric == metric) & (table.side == side) & (table.k == k) & (table["index"] == index)]
    assert len(rows) == 1, rows
    return float(rows["value"].iloc[0])


def chance_pairs(count: int, size: float, *, per_layer: int = 1, m: int = 24, n: int = 20, seed: int = 0):
    """Base and finetuned state dicts for which the null is true: each update is itself a scrambled one."""
    base, tuned = {}, {}
    for index in range(count):
        name = f"{index // per_layer}.dense{index % per_layer}"
        W0 = with_spectrum(m, n, power_law(n), seed=count * seed + index)[0].float()
        generator = torch.Generator().manual_seed(count * seed + index)
        update = scrambled(torch.randn(m, n, generator=generator), generator)
        base[name], tuned[name] = W0, W0 + size * update / update.norm()
    return layered(base), layered(tuned)
