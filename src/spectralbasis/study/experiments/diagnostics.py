"""Do activations, probes and power laws tell the story that the singular vectors of the weights tell?"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from spectralbasis.report.study_page import Stated
from spectralbasis.study.claims import (
    Claim,
    Experiment,
    Findings,
    as_family,
    conclude,
    marked,
    scatter_figure,
    task_units,
)
from spectralbasis.study.estimates import is_available, mean_interval, rank_correlation_with_p, within
from spectralbasis.study.experiments import stability
from spectralbasis.study.runs import Record, Results, Run
from spectralbasis.study.subjects import is_learned
from spectralbasis.study.trajectories import summarise_steps

QUESTION = (
    "Where finetuning turns the leading singular directions of a layer, do its activations change (CKA, SVCCA), do "
    "linear probes read more off it, and do the power-law exponents of its spectra move?"
)


@dataclass(frozen=True)
class Settings:
    """Which finetuned models are looked into.

    Args:
        finetuning: the runs of `stability` that are taken over.
        rate: which of a subject's learning rates, by number.
        examples: held-out examples whose activations are compared.
        probe_examples: training examples of the probes.
    """

    finetuning: stability.Settings
    rate: int = 1
    examples: int = 1000
    probe_examples: int = 1000


PRESETS = {
    "quick": Settings(stability.PRESETS["quick"], examples=200, probe_examples=200),
    "cpu": Settings(stability.SEVERAL_TASKS),
    "paper": Settings(stability.PRESETS["paper"], examples=4000, probe_examples=4000),
}

RUN = ["model", "task", "seed"]
OWN, BEYOND, DEPTH, LEVEL = "own", "beyond", "at equal depth", "with depth"
"""Of a story: its correlation with the task's rotation; how much that exceeds those with other tasks' rotations; the
partial correlation with depth taken off; and the correlation with depth itself."""
STORIES = {
    "activation change (CKA)": "1 − CKA before and after, against the rotation of the layer's matrices",
    "activation change (SVCCA)": "1 − SVCCA before and after, against the rotation of the layer's matrices",
    "probe gain": "what probes gain by finetuning, against the rotation of the layer's matrices",
    "power-law shift": "relative change of the exponents of the layer's spectra, against the same rotation",
}

NO_FITS = " No power laws were fitted: they need weightwatcher (pip install 'spectralbasis[diagnostics]')."


def plan(settings: Settings, results: Results) -> list[Run]:
    """A diagnosis of each finetuned model; power laws where they are known or `weightwatcher` can fit them."""
    return [
        run
        for look in _looks(settings)
        for run in (look.diagnosis, look.power_laws)
        if run.action != "power_laws" or is_available() or results.get(run)
    ]


@dataclass(frozen=True)
class _Look:
    """What is measured of one finetuned model: its labels, its finetuning, and the two runs."""

    labels: dict[str, Any]
    tuned: Run
    diagnosis: Run
    power_laws: Run


def _looks(settings: Settings) -> Iterator[_Look]:
    finetuning = settings.finetuning
    for seed in finetuning.seeds:
        for subject in finetuning.subjects:
            for task in subject.tasks:
                tuned = stability.finetuning(finetuning, subject, task, subject.learning_rates[settings.rate], seed)
                labels = dict(zip(RUN, (subject.name, task, seed), strict=True))
                needs = {**subject.needs(), "tuned": tuned}
                read = {**subject.named(), "task": task, "max_length": subject.settings.get("max_length", 64)}
                samples = {"examples": settings.examples, "probe_examples": settings.probe_examples}
                diagnosis = Run("diagnose", {**read, **samples}, seed, needs)
                yield _Look(labels, tuned, diagnosis, Run("power_laws", read, seed, needs))


def analyse(settings: Settings, results: Results) -> Findings:
    """Rank correlations over the layers of each model, averaged over models and tasks."""
    layers = [
        _by_layer(found, tuned, results.get(look.power_laws)).assign(**look.labels)
        for look in _looks(settings)
        if (found := results.get(look.diagnosis)) and (tuned := results.get(look.tuned))
    ]
    if not layers:
        return Findings(_claims(_correlations(pd.DataFrame(columns=RUN))), note="No run is finished yet.")
    table = pd.concat(layers, ignore_index=True)
    scores = table.groupby(["model", "task"], sort=False)["score"]
    idle = [f"{model} on {task}" for (model, task), found in scores if not is_learned(task, found)]
    correlations = _correlations(table)
    weighed = ~(correlations["model"] + " on " + correlations["task"]).isin(idle)
    claims = _claims(correlations[weighed])
    numbers = [name for name in table.columns if name not in (*RUN, "layer")]
    return Findings(
        claims,
        {
            "Rank correlations with rotation at equal depth": _by_task(correlations, DEPTH),
            "Rank correlations with depth": _by_task(correlations, LEVEL),
            "Layers": table.groupby(["model", "layer"], sort=False)[numbers].mean().reset_index(),
            "Rank correlations over layers": _by_task(correlations, OWN),
            "More than with other tasks' rotation": _by_task(correlations, BEYOND),
        },
        {"Activations and singular vectors": _figure(table)},
        f"{len(layers)} finished runs. Each correlation is Spearman's, over the layers of one finetuned model; "
        "intervals are Student's t over models and tasks, whose seeds were averaged. A layer's activations also carry "
        "what the layers before it did, so that a trend over depth alone makes some correlation: the rotation of the "
        "same layers under the model's other tasks, at the same seed, is one control, and a partial correlation that "
        "takes off depth, the number of the layer, is another. It does not exist where a quantity ranks exactly by "
        "depth, as 1 − CKA often does: what it shows then is depth."
        + (f" {', '.join(idle)} learned nothing, and carries no weight in the claims." if idle else "")
        + ("" if table["power-law shift"].notna().any() else NO_FITS),
        _answer(claims),
    )


def _answer(claims: Sequence[Claim]) -> str:
    parts = [
        claim.tell(
            f"{quantity} rises with rotation, {{effect}} over {{units}}",
            f"{quantity} falls with rotation, {{effect}} over {{units}}",
            f"{quantity} is undecided, {{effect}} over {{units}}",
        )
        for claim, quantity in zip(
            claims, ("activation change by SVCCA", "probe gain", "power-law shift"), strict=False
        )
        if math.isfinite(claim.effect)
    ]
    return f"At equal depth of layers: {'; '.join(parts)}." if parts else ""


def _by_layer(found: Record, tuned: Record, fits: Record | None) -> pd.DataFrame:
    """What each numbered layer shows, beside the final rotation of its matrices."""
    measured = tuned.measurements
    last = measured[(measured["step"] == measured["step"].max()) & (measured["layer"] >= 0)]
    table = summarise_steps(last, by=["layer"]).set_index("layer")[["norm", "overlap", "held", "core_gain"]]
    values = found.measurements.groupby(["layer", "metric"])["value"].mean().unstack("metric")
    for name in ("cka", "svcca", "probe_before", "probe_after"):
        table[name] = values.get(name, np.nan)
    table["score"] = tuned.result["score"]
    table["rotation"] = 1 - table["overlap"]
    table["activation change (CKA)"] = 1 - table["cka"]
    table["activation change (SVCCA)"] = 1 - table["svcca"]
    table["probe gain"] = table["probe_after"] - table["probe_before"]
    table["power-law shift"] = _power_law_shift(fits.measurements) if fits and len(fits.measurements) else np.nan
    return table.reset_index()


def _power_law_shift(fits: pd.DataFrame) -> pd.Series:
    """Mean relative change of the exponents, by layer."""
    exponents = fits.set_index(["layer", "matrix", "metric"])["value"].unstack("metric")
    exponents = exponents.reindex(columns=["power_law_before", "power_law_after"])
    shift = (exponents["power_law_after"] / exponents["power_law_before"] - 1).abs()
    return shift.groupby("layer").mean()


def _correlations(table: pd.DataFrame) -> pd.DataFrame:
    """Of each run and story, over layers: see `OWN` and the others."""
    rows = []
    for (model, seed), runs in table.groupby(["model", "seed"], sort=False):
        rotations = runs.pivot(index="layer", columns="task", values="rotation")
        for task, layers in runs.groupby("task", sort=False):
            for story in STORIES:
                told = layers.set_index("layer")[story].reindex(rotations.index)
                rhos = pd.Series({other: rank_correlation_with_p(rotations[other], told).rho for other in rotations})
                beyond = rhos[task] - rhos.drop(task).mean()
                level = rank_correlation_with_p(told.index, told).rho
                turned = rank_correlation_with_p(told.index, rotations[task]).rho
                partial = partial_correlation(rhos[task], turned, level)
                found = {OWN: rhos[task], BEYOND: beyond, DEPTH: partial, LEVEL: level}
                rows.append({"model": model, "task": task, "seed": seed, "story": story, **found})
    return pd.DataFrame(rows, columns=[*RUN, "story", OWN, BEYOND, DEPTH, LEVEL])


def partial_correlation(xy: float, xz: float, yz: float) -> float:
    """Correlation of x and y with z taken off, from the three of each two; NaN where z tells one of them exactly."""
    left = (1 - xz**2) * (1 - yz**2)
    return (xy - xz * yz) / math.sqrt(left) if left > 1e-9 else math.nan


def _claims(correlations: pd.DataFrame) -> list[Claim]:
    """The primary ones ask at equal depth; of activations that is by SVCCA, as 1 − CKA ranks by depth."""
    claims = as_family(_claim(correlations, story, column) for column in (DEPTH, OWN, BEYOND) for story in STORIES)
    return marked(claims, *(f"{story} follows rotation at equal depth" for story in list(STORIES)[1:]))


def _claim(correlations: pd.DataFrame, story: str, column: str) -> Claim:
    rows = correlations[correlations["story"] == story]
    quantity, about = story.split(" (")[0], STORIES[story]
    asked: dict[str, tuple[str, str, str, Stated]] = {
        DEPTH: (
            f"{story} follows rotation at equal depth",
            f"Layers whose leading directions turn more than their depth tells show more {quantity}: {about}, with the "
            "number of the layer taken off.",
            "Correlations around zero: then both follow depth.",
            "after",
        ),
        OWN: (
            f"{story} follows rotation",
            f"Layers whose leading directions turn more show more {quantity}: {about}; depth is not taken off.",
            "Correlations around zero, or negative ones: then the two tell different stories.",
            "changed",
        ),
        BEYOND: (
            f"{story} follows the task's own rotation",
            f"How much a task turns a layer says more of its {quantity} than how much the model's other tasks turn it: "
            f"{about}.",
            "Other tasks' rotation telling as much: then both follow the layers, such as their depth, not each other.",
            "after",
        ),
    }
    name, text, change, stated = asked[column]
    known = rows.dropna(subset=[column])
    return conclude(
        name,
        text,
        within(mean_interval(known[column].astype(float), known["model"] + " / " + known["task"])),
        unit="Spearman's rho over layers",
        would_change=change,
        runs=len(known),
        units=task_units(known),
        stated=stated,
    )


def _by_task(correlations: pd.DataFrame, column: str) -> pd.DataFrame:
    """Means over seeds, a column for each story."""
    wide = correlations.pivot_table(index=["model", "task"], columns="story", values=column, sort=False)
    return wide.reindex(columns=list(STORIES)).reset_index()


def _figure(table: pd.DataFrame) -> go.Figure:
    traces = (
        {
            "x": rows["rotation"],
            "y": rows["activation change (CKA)"],
            "name": str(model),
            "text": [f"{task}, layer {layer}" for task, layer in zip(rows["task"], rows["layer"], strict=True)],
        }
        for model, rows in table.groupby("model", sort=False)
    )
    rotation = "rotation, 1 − overlap of the leading directions"
    return scatter_figure(traces, rotation, "1 − CKA of activations", log="xy")


EXPERIMENT = Experiment(
    "diagnostics", QUESTION, PRESETS, plan, analyse, "Do activations, probes and spectra change where directions turn?"
)
