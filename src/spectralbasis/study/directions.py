"""The actions `basis` and `gradient_coverage`: make bases and measure how well they cover updates.

Coverage is measured for the gradient of a task, for the gradients of single examples, and for the update of full
finetuning.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from math import nan
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from spectralbasis.basis import SpectralBasis
from spectralbasis.errors import InputError
from spectralbasis.study.runs import Outcome, Run, Site
from spectralbasis.study.starting import halved_task, model_of
from spectralbasis.training.methods import calibration_batches
from spectralbasis.training.models import LoadedModel, load_model
from spectralbasis.training.tasks import Task, batches
from spectralbasis.training.tuning import tune as tune_model
from spectralbasis.triplets import DEFAULT_TOLERANCE
from spectralbasis.tuner import SpectralConfig
from spectralbasis.tuner.calibration import curvature_basis, haar_coverage, in_modules, mean_gradients
from spectralbasis.tuner.config import BASIS_FILE
from spectralbasis.tuner.factors import directions_of
from spectralbasis.tuner.preparation import Target, find_targets, named_in_basis
from spectralbasis.tuner.targets import targeted_modules

BATCH = 32
WHICH = "which_task"
Matrices = Mapping[str, Tensor]
Directions = Mapping[str, tuple[Tensor, Tensor]]
"""Matrix name → U (m, k) and V (n, k), columns orthonormal; k may differ."""
FORMS = ("core", "diagonal")
"""Which of the coefficients `C = Uᵀ M V` count: all, or those of paired directions."""
QUANTITIES = ("coverage", "noise", "signal", "update", "after")
"""What is measured: see `gradient_coverage`."""


def with_trained_head(model: str, task: Task, *, steps: int, max_length: int, seed: int, **options: Any) -> LoadedModel:
    """Train the head alone for some steps and open the result; with no steps, the head is as drawn.

    A gradient at a random head says more of the draw than of the task.

    Args:
        model: as `load_model` takes it.
        task: with its examples.
        steps: of training the head.
        max_length: tokens at which texts are cut.
        seed: of the head and the order of examples.
        options: further ones of `tune`.
    """
    if steps == 0:
        return load_model(model, task, seed=seed, max_length=max_length)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "head"
        tune_model(
            model, task=task, output=folder, method="head", steps=steps, max_length=max_length, seed=seed,
            progress=False, **options,
        )  # fmt: skip
        return load_model(folder, task, head="stored", max_length=max_length)


def basis(run: Run, site: Site) -> Outcome:
    """Write a basis of a model's matrices to `basis.safetensors` in the folder of the run.

    The setting `kind` is "curvature", of the loss on training examples of the `tasks` together, each under a head that
    was trained alone for `head_steps` (0: as drawn); or "checkpoint", the leading singular vectors of another model's
    weights, the run's need `checkpoint`. `leading` is the number of directions.

    Raises:
        InputError: the kind is another, or a model, a task or the checkpoint cannot be used.
    """
    kind, leading = run.settings["kind"], run.settings["leading"]
    if kind == "checkpoint":
        found = SpectralBasis.compute(site.needs["checkpoint"], leading)
    elif kind == "curvature":
        options = {"max_length": run.settings.get("max_length", 64), "bf16": run.settings.get("bf16", False)}
        steps = run.settings.get("head_steps", 0)
        models = [
            with_trained_head(model_of(run, site), halved_task(name, site), steps=steps, seed=run.seed, **options)
            for name in run.settings["tasks"]
        ]
        found = shared_curvature(models, leading)
    else:
        raise InputError(f"kind={kind!r} of a basis is unknown; choose from 'curvature', 'checkpoint'")
    found.save(site.folder / BASIS_FILE)
    return Outcome({"matrices": len(found), "leading": leading, "kind": found.kind})


def shared_curvature(models: Sequence[LoadedModel], leading: int) -> SpectralBasis:
    """The curvature basis of several tasks' summed losses, over a backbone that all their models have.

    Args:
        models: one for each task, of equal backbones; those after the first get its backbone in place of their own.
        leading: how many directions.
    """
    first = models[0].model
    for other in models[1:]:
        for name, part in first.named_children():
            if name not in models[0].head:
                setattr(other.model, name, part)

    def loss(_: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        inputs = {name: value for name, value in batch.items() if name != WHICH}
        found: Tensor = models[batch[WHICH]].model(**inputs).loss
        return found

    batches_of_all = (
        {**batch, WHICH: number} for number, loaded in enumerate(models) for batch in calibration_batches(loaded)
    )
    return curvature_basis(first, batches_of_all, leading, target_modules=backbone_layers(models[0]), loss=loss)


def backbone_layers(loaded: LoadedModel) -> list[str]:
    """The linear layers outside the head: what every adapter of the study adapts."""
    config = SpectralConfig(target_modules="all-linear", modules_to_save=list(loaded.head) or None)
    return [key for key in targeted_modules(config, loaded.model) if not in_modules(f"{key}.", loaded.head)]


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
        shapes = {name: (gradient.shape[0], gradient.shape[1]) for name, gradient in gradients.items()}
        chance = sum(
            weight * haar_coverage(f"coverage_{form}", min(k, *shapes[name]), shapes[name])
            for name, weight in weights.items()
        )
        null = chance / sum(weights.values())
        for quantity in QUANTITIES:
            labels = {"form": form, "quantity": quantity}
            yield {**labels, "value": values[quantity][form], "null_mean": None if quantity == "signal" else null}


def _held_out(loaded: LoadedModel, examples: int, size: int) -> Iterator[dict[str, Tensor]]:
    held_out = loaded.task.selection
    assert held_out is not None
    return map(loaded.collator, batches(held_out.select(range(min(examples, len(held_out)))), size))


def shares(matrices: Matrices, directions: Directions, k: int) -> dict[str, float]:
    """The share of `Σ ‖M‖_F²` over all matrices M (m, n) that the coefficients of the first k directions hold, by form.

    NaN where the matrices are all zero.
    """
    total = _energy(matrices)
    inside = dict.fromkeys(FORMS, 0.0)
    for name, M in matrices.items():
        U, V = directions[name]
        for form, C in _by_form(U.T @ M @ V, k):
            inside[form] += float(C.double().square().sum())
    return {form: energy / total if total else nan for form, energy in inside.items()}


class GradientNoise:
    """Moments, over single examples, of the loss gradient with respect to the coefficients in one basis.

    Examples go to two halves alternately: the product of the halves' means estimates the square of the mean gradient
    without bias, where the square of a mean over N examples has N-th parts of the noise in it.

    Args:
        directions: of every matrix that gets a gradient.
    """

    def __init__(self, directions: Directions) -> None:
        def zeros() -> dict[str, Tensor]:
            return {
                name: U.new_zeros(U.shape[1], V.shape[1], dtype=torch.float64) for name, (U, V) in directions.items()
            }

        self._directions = directions
        self._sums = zeros(), zeros()
        self._squares = zeros()
        self._energy = 0.0
        self._examples = 0

    def add(self, gradients: Matrices) -> None:
        """One example's gradients, (m, n) each."""
        half = self._sums[self._examples % 2]
        self._examples += 1
        self._energy += _energy(gradients)
        for name, gradient in gradients.items():
            U, V = self._directions[name]
            C = (U.T @ gradient @ V).double()
            half[name] += C
            self._squares[name] += C.square()

    def shares(self, k: int) -> dict[str, float]:
        """The share of `Σ ‖∂L_i/∂W‖_F²` over examples i and matrices that the first k directions hold, by form."""
        inside = dict.fromkeys(FORMS, 0.0)
        for squares in self._squares.values():
            for form, part in _by_form(squares, k):
                inside[form] += float(part.sum())
        return {form: energy / self._energy if self._energy else nan for form, energy in inside.items()}

    def signal(self, k: int) -> dict[str, float]:
        """Mean over the coefficients of `E[g]² / E[g²]`, g an example's gradient with respect to one, by form.

        It is what a coefficient's gradient tells over its noise, whatever the size of either: 1 where all examples
        agree, 0 where they cancel. An optimizer that divides by the root of `E[g²]`, as Adam does, sees only this.
        Coefficients that no example moves are left out. NaN with fewer than two examples.
        """
        first, second = self._sums
        halves = (self._examples + 1) // 2, self._examples // 2
        found: dict[str, list[Tensor]] = {form: [] for form in FORMS}
        for name, squares in self._squares.items():
            ratios = (first[name] / halves[0]) * (second[name] / halves[1]) / (squares / self._examples)
            for form, part in _by_form(ratios, k):
                found[form].append(part[part.isfinite()])
        return {form: float(torch.cat(parts).mean()) for form, parts in found.items()}


def _by_form(C: Tensor, k: int) -> Iterator[tuple[str, Tensor]]:
    """The entries of C (k, k) that each form has."""
    core = C[:k, :k]
    yield "core", core.flatten()
    yield "diagonal", core.diagonal()


def _energy(matrices: Matrices) -> float:
    return sum(float(M.double().square().sum()) for M in matrices.values())
