"""The action `basis`: directions other than a model's own singular vectors, as a basis file."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from spectralbasis.basis import SpectralBasis
from spectralbasis.errors import InputError
from spectralbasis.study.actions.heads import with_trained_head
from spectralbasis.study.actions.inputs import halved_task, model_of
from spectralbasis.study.methods import BASIS_FILE
from spectralbasis.study.methods.spectral import calibration_batches
from spectralbasis.study.models.loading import LoadedModel
from spectralbasis.study.runs import Outcome, Run, Site
from spectralbasis.tuner import SpectralConfig
from spectralbasis.tuner.curvature import curvature_basis
from spectralbasis.tuner.optimization import in_modules
from spectralbasis.tuner.targets import targeted_modules

WHICH = "which_task"


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
        found = _curvature(run, site, leading)
    else:
        raise InputError(f"kind={kind!r} of a basis is unknown; choose from 'curvature', 'checkpoint'")
    found.save(site.folder / BASIS_FILE)
    return Outcome({"matrices": len(found), "leading": leading, "kind": found.kind})


def _curvature(run: Run, site: Site, leading: int) -> SpectralBasis:
    settings = run.settings
    options = {"max_length": settings.get("max_length", 64), "bf16": settings.get("bf16", False)}
    models = [
        with_trained_head(
            model_of(run, site), halved_task(name, site), steps=settings.get("head_steps", 0), seed=run.seed, **options
        )
        for name in settings["tasks"]
    ]
    return shared_curvature(models, leading)


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

    return curvature_basis(first, _batches(models), leading, target_modules=backbone_layers(models[0]), loss=loss)


def backbone_layers(loaded: LoadedModel) -> list[str]:
    """The linear layers outside the head: what every adapter of the study adapts."""
    config = SpectralConfig(target_modules="all-linear", modules_to_save=list(loaded.head) or None)
    return [key for key in targeted_modules(config, loaded.model) if not in_modules(f"{key}.", loaded.head)]


def _batches(models: Sequence[LoadedModel]) -> Iterator[dict[str, Any]]:
    for number, loaded in enumerate(models):
        for batch in calibration_batches(loaded):
            yield {**batch, WHICH: number}
