"""The action `gradient_coverage`: how much of a task's gradient lies in a basis, and how much of what else."""

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd
from torch import Tensor

from spectralbasis.study.actions.bases import backbone_layers
from spectralbasis.study.actions.heads import with_trained_head
from spectralbasis.study.actions.inputs import halved_task, model_of
from spectralbasis.study.measures.gradients import FORMS, Directions, GradientNoise, Matrices, shares
from spectralbasis.study.methods import BASIS_FILE
from spectralbasis.study.models.loading import LoadedModel, load_model
from spectralbasis.study.runs import Outcome, Run, Site
from spectralbasis.study.tasks.arrays import batches
from spectralbasis.triplets import DEFAULT_TOLERANCE
from spectralbasis.tuner import SpectralConfig
from spectralbasis.tuner.coverage import haar_coverage, mean_gradients
from spectralbasis.tuner.factors import directions_of
from spectralbasis.tuner.originals import Target, find_targets
from spectralbasis.tuner.targets import named_in_basis, targeted_modules

BATCH = 32
QUANTITIES = ("coverage", "noise", "signal", "update", "after")
"""What is measured: see `gradient_coverage`."""


def gradient_coverage(run: Run, site: Site) -> Outcome:
    """What lies in each basis, at the pretrained weights under a trained head, on held-out examples.

    Settings: `model` (or a need of that name), `task`, `bases` ("pretrained", "random", "minor", or roles of needs
    whose folders hold a basis file), `k` a list, `head_steps`, and `examples`, how many of the half that nothing is
    reported on. The need `tuned` is the model after full finetuning to the task.

    Returns:
        Rows `basis, k, form, quantity, value, null_mean`, over all matrices together; the forms are "core" and
        "diagonal". Quantities: "coverage", the share of the mean gradient's square; "noise", that of single examples'
        gradients; "signal", see `GradientNoise.signal`; "update", the share of full finetuning's update; "after", that
        of the mean gradient once tuned. `null_mean` is what a Haar-random basis would hold of a share. The result has
        the coverage at the largest k, as `BASIS FORM`.
    """
    settings = run.settings
    options = {"max_length": settings.get("max_length", 64)}
    task = halved_task(settings["task"], site)
    loaded = with_trained_head(
        model_of(run, site), task, steps=settings["head_steps"], seed=run.seed, bf16=settings.get("bf16", False),
        **options,
    )  # fmt: skip
    tuned = load_model(site.needs["tuned"], task, head="stored", **options)
    layers, examples = backbone_layers(loaded), settings["examples"]
    base, after = _targets(loaded, layers), _targets(tuned, layers)
    places = {name: str(site.needs[name] / BASIS_FILE) if name in site.needs else name for name in settings["bases"]}
    directions = {
        name: _directions(place, max(settings["k"]), named_in_basis(base, place, loaded.model), run.seed)
        for name, place in places.items()
    }
    noise = {name: GradientNoise(found) for name, found in directions.items()}
    for batch in _held_out(loaded, examples, 1):
        gradients = _gradients(loaded, [batch], base)
        for meter in noise.values():
            meter.add(gradients)
    matrices = {
        "coverage": _gradients(loaded, _held_out(loaded, examples, BATCH), base),
        "update": {old.name: (new.W - old.W).cpu() for old, new in zip(base, after, strict=True)},
        "after": _gradients(tuned, _held_out(tuned, examples, BATCH), after),
    }
    rows: list[dict[str, Any]] = []
    for name, found in directions.items():
        for k in settings["k"]:
            values = {quantity: shares(these, found, k) for quantity, these in matrices.items()}
            values |= {"noise": noise[name].shares(k), "signal": noise[name].signal(k)}
            rows += [{"basis": name, "k": k, **row} for row in _rows(values, matrices["coverage"], k)]
    table = pd.DataFrame(rows)
    largest = table[(table["k"] == max(settings["k"])) & (table["quantity"] == "coverage")]
    return Outcome({f"{row.basis} {row.form}": row.value for row in largest.itertuples()}, table)


def _targets(loaded: LoadedModel, layers: list[str]) -> list[Target]:
    return find_targets(targeted_modules(SpectralConfig(target_modules=layers), loaded.model))


def _directions(place: str, k: int, targets: list[Target], seed: int) -> Directions:
    """The first k directions; those of a smaller k are the first of these."""
    find = directions_of(place, tolerance=DEFAULT_TOLERANCE, seed=seed)
    found = {
        target.name: find(target.name_in_basis, target.W, min(k, *target.W.shape), target.hash) for target in targets
    }
    return {name: (U.cpu(), V.cpu()) for name, (U, V) in found.items()}


def _gradients(loaded: LoadedModel, batches: Any, targets: list[Target]) -> dict[str, Tensor]:
    return {name: gradient.cpu() for name, gradient in mean_gradients(loaded.model, batches, targets).items()}


def _rows(values: Mapping[str, Mapping[str, float]], gradients: Matrices, k: int) -> Iterator[dict[str, Any]]:
    weights = {name: float(gradient.double().square().sum()) for name, gradient in gradients.items()}
    for form in FORMS:
        chance = sum(weight * _chance(form, k, gradients[name]) for name, weight in weights.items())
        null = chance / sum(weights.values())
        for quantity in QUANTITIES:
            labels = {"form": form, "quantity": quantity}
            yield {**labels, "value": values[quantity][form], "null_mean": None if quantity == "signal" else null}


def _chance(form: str, k: int, matrix: Tensor) -> float:
    m, n = matrix.shape
    return haar_coverage(f"coverage_{form}", min(k, m, n), (m, n))


def _held_out(loaded: LoadedModel, examples: int, size: int) -> Iterator[dict[str, Tensor]]:
    held_out = loaded.task.selection
    assert held_out is not None
    return map(loaded.collator, batches(held_out.select(range(min(examples, len(held_out)))), size))
