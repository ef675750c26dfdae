"""How well a basis fits a task before any training: the share of the loss gradient that lies in it."""

from collections.abc import Iterable

import pandas as pd
import torch
from torch import Tensor, nn

from spectralbasis.basis import SpectralBasis
from spectralbasis.checkpoints.names import kind_of, layer_number
from spectralbasis.comparison.metrics import coverage_shares
from spectralbasis.triplets import DEFAULT_TOLERANCE
from spectralbasis.tuner.allocation import DEFAULT_LEADING
from spectralbasis.tuner.config import SpectralConfig
from spectralbasis.tuner.factors import directions_of
from spectralbasis.tuner.gradients import Batch, Loss, observe_gradients
from spectralbasis.tuner.originals import Target, find_targets
from spectralbasis.tuner.targets import named_in_basis, targeted_modules


def gradient_coverage(
    model: nn.Module,
    batches: Iterable[Batch],
    basis: str | SpectralBasis = "pretrained",
    k: int | None = None,
    *,
    target_modules: list[str] | str = "all-linear",
    exclude_modules: list[str] | str | None = None,
    basis_seed: int = 0,
    loss: Loss | None = None,
) -> pd.DataFrame:
    """The share of `‖∂L/∂W‖_F²` at the base, over all rows of held-out batches, that lies in the first k directions.

    Diagonal, core, left and right, defined as for an update (`coverage_shares`), for k = 1, 2, 4, … and the k asked
    for. The gradients of all targets are in memory at once, as many numbers as their weights.

    Args:
        model: the base, without adapters. It is not changed.
        batches: its keyword arguments, labels among them; read once.
        basis: "pretrained", "minor", "random", the path of a basis file, or a basis.
        k: how many directions; None is 64, or what the basis has. Where min(m, n) is smaller, that.
        target_modules: see `SpectralConfig`.
        exclude_modules: see `SpectralConfig`.
        basis_seed: of the random basis.
        loss: (model, batch) → mean loss over the batch's rows; None takes `model(**batch).loss`.

    Returns:
        A row for each matrix, metric and k: `matrix, layer, kind, m, n, k, metric, side, value, null_mean,
        gradient_norm`. `null_mean` is what a Haar-random basis covers. Matrices without a gradient are left out; the
        share over several matrices is the mean of `value` weighted by the squares of `gradient_norm`.

    Raises:
        InputError: there are no batches, no loss, no gradient, or the basis lacks a target.
    """
    config = SpectralConfig(target_modules=target_modules, exclude_modules=exclude_modules)
    targets = find_targets(targeted_modules(config, model))
    gradients = mean_gradients(model, batches, targets, loss)
    directions = directions_of(basis, tolerance=DEFAULT_TOLERANCE, seed=basis_seed)
    targets = named_in_basis(targets, basis, model)
    rows: list[dict[str, object]] = []
    for target in targets:
        gradient = gradients.pop(target.name, None)
        if gradient is not None and bool(gradient.any()):
            U, V = directions(target.name_in_basis, target.W, _how_many(basis, k, target), target.hash)
            rows.extend(_rows(target, gradient.cpu(), U.cpu(), V.cpu()))
    return pd.DataFrame(rows)


def mean_gradients(
    model: nn.Module, batches: Iterable[Batch], targets: list[Target], loss: Loss | None = None
) -> dict[str, Tensor]:
    """Gradient of the mean loss over all rows with respect to W of each target that it reaches, (m, n)."""
    sums: dict[str, Tensor] = {}

    def observe(name: str, x: Tensor, g: Tensor) -> None:
        dtype = torch.promote_types(g.dtype, torch.float32)
        gradient = g.to(dtype).T @ x.to(dtype)
        sums[name] = sums[name].add_(gradient) if name in sums else gradient

    rows = observe_gradients(model, batches, targets, observe, loss)
    return {name: total.div_(rows) for name, total in sums.items()}


def _how_many(basis: str | SpectralBasis, k: int | None, target: Target) -> int:
    if k is None and isinstance(basis, SpectralBasis) and target.name_in_basis in basis:
        return basis[target.name_in_basis].k
    return min(k or DEFAULT_LEADING, *target.W.shape)


def _rows(target: Target, gradient: Tensor, U: Tensor, V: Tensor) -> list[dict[str, object]]:
    m, n = gradient.shape
    norm = float(torch.linalg.matrix_norm(gradient))
    matrix = {"matrix": target.name, "layer": layer_number(target.name), "kind": kind_of(target.name), "m": m, "n": n}
    return [
        {**matrix, "k": k, "metric": metric, "side": side, "value": value,
         "null_mean": haar_coverage(metric, k, (m, n)), "gradient_norm": norm}
        for (metric, side, k, _), value in coverage_shares(U, V.T, gradient).items()
    ]  # fmt: skip


def haar_coverage(metric: str, k: int, shape: tuple[int, int]) -> float:
    """What a Haar-random basis of k directions covers on average of a matrix of this shape (m, n).

    Raises:
        KeyError: the metric is no coverage.
    """
    m, n = shape
    return {
        "coverage_diagonal": k / (m * n),
        "coverage_core": k**2 / (m * n),
        "coverage_left": k / m,
        "coverage_right": k / n,
    }[metric]
