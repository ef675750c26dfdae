"""Which entries sparse coefficients train: those that the loss gradient of a few batches is largest in."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from spectralbasis.errors import InputError
from spectralbasis.tuner.allocation import count_parameters
from spectralbasis.tuner.config import SpectralConfig
from spectralbasis.tuner.entries import pack_positions
from spectralbasis.tuner.gradients import Batch, Loss, observe_gradients
from spectralbasis.tuner.optimization import in_modules
from spectralbasis.tuner.originals import Target, find_targets
from spectralbasis.tuner.preparation import normalized_scales, prepare, resolve_ranks
from spectralbasis.tuner.record import RECORD
from spectralbasis.tuner.targets import all_targets, targeted_modules


def calibrate(
    model: nn.Module, batches: Iterable[Batch], config: SpectralConfig, *, loss: Loss | None = None
) -> SpectralConfig:
    """Pick the entries that sparse coefficients train, over all matrices at once.

    They are those of largest `|Uᵀ (∂L/∂W) V|`, the gradient of C at the base, among the k×k of every matrix, where
    `leading` and `rank_pattern` set k. Matrices of which none is picked are left out, and so are `modules_to_save`.

    Args:
        model: the base, without adapters; with the head that is to be trained, if any. It is not changed.
        batches: its keyword arguments, labels among them; read once.
        config: with coefficients "sparse"; `budget` is the share of the model's parameters to pick, None picks as many
            as "diagonal" coefficients would train with these k.
        loss: (model, batch) → mean loss over the batch's rows; None takes `model(**batch).loss`.

    Returns:
        The config, complete and bound to this base, for `get_peft_model`.

    Raises:
        InputError: the coefficients are not "sparse", the budget does not pay for one entry, or there is no gradient.
    """
    if config.coefficients != "sparse":
        raise InputError(f"coefficients={config.coefficients!r} need no calibration; pass coefficients='sparse'")
    unrecorded: dict[str, Any] = dict.fromkeys(RECORD)
    window = replace(config, coefficients="core", budget=None, **unrecorded)
    modules = targeted_modules(window, model)
    retrained = config.modules_to_save or ()
    targets = find_targets({key: one for key, one in modules.items() if not in_modules(f"{key}.", retrained)})
    gradients = _core_gradients(model, batches, window, targets, loss)
    ranks = window.ranks or {}
    picked = pick_entries(gradients, _how_many(config, model, ranks))
    record: dict[str, Any] = {
        field: {name: getattr(window, field)[name] for name in picked} for field in RECORD if getattr(window, field)
    }
    record["entries"] = {name: pack_positions(positions) for name, positions in picked.items()}
    if config.scaling == "normalized":
        # Of all matrices together: an entry has the unit of any other, since each is as good as its gradient.
        fan_in = sum(map(len, picked.values())) / sum(ranks[name] for name in picked)
        record["scales"] = normalized_scales(dict.fromkeys(picked, max(1.0, fan_in)))
    return replace(config, target_modules={target.key for target in targets if target.name in picked}, **record)


def plan_ranks(config: SpectralConfig, model: nn.Module) -> dict[str, int]:
    """Matrix name → k that an adapter of this config would have on a model.

    Raises:
        InputError: a rank or the budget does not fit the model.
    """
    budget = None if config.coefficients == "sparse" else config.budget
    targets, _ = all_targets(config, model)
    return resolve_ranks(replace(config, budget=budget), targets, count_parameters(model))


def pick_entries(gradients: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """Row-major positions, ascending, of the entries that are largest in absolute value over all matrices.

    Args:
        gradients: matrix name → gradient of C, (k, k).
        number: how many to pick, if there are as many that are not zero.
    """
    sizes = torch.cat([gradient.flatten().abs() for gradient in gradients.values()])
    values, chosen = sizes.topk(min(number, sizes.numel()))
    taken = torch.zeros_like(sizes, dtype=torch.bool)
    taken[chosen[values > 0]] = True
    parts = taken.split([gradient.numel() for gradient in gradients.values()])
    positions = {name: part.nonzero().squeeze(1) for name, part in zip(gradients, parts, strict=True)}
    return {name: found for name, found in positions.items() if found.numel()}


def _core_gradients(
    model: nn.Module, batches: Iterable[Batch], window: SpectralConfig, targets: list[Target], loss: Loss | None
) -> dict[str, Tensor]:
    """Gradient of the mean loss with respect to a core of each matrix, (k, k) on the CPU; `window` gets its record."""
    prepared = prepare(window, targets, count_parameters(model))
    factors = {t.name: [factor.to(t.W.device) for factor in prepared[t.key].directions] for t in targets}
    sums = {name: U.new_zeros(U.shape[1], V.shape[1]) for name, (U, V) in factors.items()}

    def observe(name: str, x: Tensor, g: Tensor) -> None:
        U, V = factors[name]
        sums[name] += (g.to(U.dtype) @ U).T @ (x.to(V.dtype) @ V)

    rows = observe_gradients(model, batches, targets, observe, loss)
    gradients = {name: total.cpu() / rows for name, total in sums.items()}
    total = sum(float(gradient.abs().sum()) for gradient in gradients.values())
    if not (math.isfinite(total) and total > 0):
        raise InputError("the loss has no finite gradient in these directions; check the batches and their labels")
    return gradients


def _how_many(config: SpectralConfig, model: nn.Module, ranks: Mapping[str, int]) -> int:
    if config.budget is None:
        return sum(ranks.values())
    total = count_parameters(model)
    number = math.floor(config.budget * total)
    if number < 1:
        raise InputError(
            f"budget={config.budget:g} of {total:,} parameters pays for no entry; pass budget>={1 / total:.2g}"
        )
    return number
