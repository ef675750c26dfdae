"""The action `gradient_coverage`: how much of a task's gradient, before any training of the backbone, a basis holds."""

from collections.abc import Iterator
from typing import Any

import pandas as pd
from torch import Tensor

from spectralbasis.study.actions.bases import backbone_layers
from spectralbasis.study.actions.heads import with_trained_head
from spectralbasis.study.actions.inputs import halved_task, model_of
from spectralbasis.study.methods import BASIS_FILE
from spectralbasis.study.models.loading import LoadedModel
from spectralbasis.study.runs import Outcome, Run, Site
from spectralbasis.tuner.coverage import gradient_coverage as coverage_of

METRICS = {"coverage_diagonal": "diagonal", "coverage_core": "core"}
BATCH = 32


def gradient_coverage(run: Run, site: Site) -> Outcome:
    """The share of the gradient on held-out examples, at the pretrained weights under a trained head, in each basis.

    Settings: `model` (or a need of that name), `task`, `bases` ("pretrained", "random", "minor", or roles of needs
    whose folders hold a basis file), `k` a list, `head_steps`, and `examples`, how many of the half that nothing is
    reported on.

    Returns:
        Rows `basis, k, metric, value, null_mean`: shares over all matrices together, and what a Haar-random basis would
        hold. The result has the shares of the largest k, as `BASIS METRIC`.
    """
    settings = run.settings
    loaded = with_trained_head(
        model_of(run, site),
        halved_task(settings["task"], site),
        steps=settings["head_steps"],
        max_length=settings.get("max_length", 64),
        seed=run.seed,
        bf16=settings.get("bf16", False),
    )
    targets, ks = backbone_layers(loaded), settings["k"]
    rows: list[dict[str, Any]] = []
    for name in settings["bases"]:
        place = str(site.needs[name] / BASIS_FILE) if name in site.needs else name
        for k in ks:
            table = coverage_of(
                loaded.model, _held_out(loaded, settings["examples"]), place, k, target_modules=targets,
                basis_seed=run.seed,
            )  # fmt: skip
            whole = table[table["k"] == table[["m", "n"]].min(axis=1).clip(upper=k)]
            rows += [{"basis": name, "k": k, **row} for row in _pooled(whole)]
    shares = pd.DataFrame(rows)
    largest = shares[shares["k"] == max(ks)]
    return Outcome({f"{row.basis} {row.metric}": row.value for row in largest.itertuples()}, shares)


def _pooled(table: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Shares over all matrices together: means weighted by the squares of their gradients' norms."""
    for metric, name in METRICS.items():
        rows = table[table["metric"] == metric]
        weights = rows["gradient_norm"] ** 2
        means = {column: float((rows[column] * weights).sum() / weights.sum()) for column in ("value", "null_mean")}
        yield {"metric": name, **means}


def _held_out(loaded: LoadedModel, examples: int) -> Iterator[dict[str, Tensor]]:
    held_out = loaded.task.selection
    assert held_out is not None
    count = min(examples, len(held_out))
    for start in range(0, count, BATCH):
        yield loaded.collator([held_out[row] for row in range(start, min(start + BATCH, count))])
