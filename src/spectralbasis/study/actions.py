"""The actions of study runs: functions that tune, compare and examine tuned models. `ACTIONS` lists all actions.

Further actions are in `starting` and `directions`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from peft import PeftModel

from spectralbasis.checkpoints import logical_matrices, open_checkpoint
from spectralbasis.coefficients.similarity import similarity as similarity_of
from spectralbasis.comparison.comparing import compare as compare_checkpoints
from spectralbasis.study.directions import basis, gradient_coverage
from spectralbasis.study.estimates import power_law_exponents
from spectralbasis.study.exchange import exchange
from spectralbasis.study.penalty import UpdatePenalty
from spectralbasis.study.probes import Floats, layer_activations, linear_cka, linear_probe, svcca
from spectralbasis.study.runs import Action, Outcome, Run, Site
from spectralbasis.study.starting import halved_task, initialise, model_of, searched_task, tested_task
from spectralbasis.study.trajectories import TrajectoryCallback
from spectralbasis.training.evaluation import attach_adapter, score_task
from spectralbasis.training.methods import METHODS
from spectralbasis.training.models import LoadedModel, load_model
from spectralbasis.training.outcomes import TuneResult
from spectralbasis.training.tasks import LABEL, Task, batches, score
from spectralbasis.training.tuning import tune as tune_model
from spectralbasis.tuner.config import BASIS_FILE

if TYPE_CHECKING:
    from datasets import Dataset

_FINDINGS = ("stability", "coverage")


def compare(run: Run, site: Site) -> Outcome:
    """Measure what finetuned models did to their base, and what each two of them share.

    The needs are `tuned_0`, `tuned_1`, …, and `model`, the base, unless it is a setting. The settings are `tasks`, what
    each was tuned to, in their order, and `leading`, `draws` and `null` as for `spectralbasis.compare`.

    Returns:
        `stability` and `coverage` over all, `sharing` over pairs of different tasks with its `ceiling` and
        `permutation` test; the measurements are a row for each pair: `a` and `b` are numbers of finetuned models,
        `task_a` and `task_b`, `base_null_a` and `base_null_b` (the base's overlap with scrambled updates of each), and
        what `summary()["sharing"]["pairs"]` holds.
    """
    settings = dict(run.settings)
    tasks, base = settings.pop("tasks"), model_of(run, site)
    settings.pop("model", None)
    tuned = [str(site.needs[f"tuned_{number}"]) for number in range(len(tasks))]
    summary = compare_checkpoints(base, tuned, tasks=tasks, seed=run.seed, **settings).summary()
    result: dict[str, Any] = {name: summary[name] for name in _FINDINGS}
    sharing = summary.get("sharing")
    if sharing is None:
        return Outcome(result)
    result["sharing"] = {name: found for name, found in sharing.items() if name not in ("pairs", "tasks")}
    return Outcome(result, _pairs(summary, tasks))


def _pairs(summary: Mapping[str, Any], tasks: list[str]) -> pd.DataFrame:
    """The pairs with numbers in place of labels, which name folders of this machine."""
    labels, pairs = summary["tuned"], pd.DataFrame(summary["sharing"]["pairs"])
    chance = [summary["per_tuned"][label]["stability"]["null_mean"] for label in labels]
    for side in ("a", "b"):
        pairs[side] = [labels.index(label) for label in pairs[side]]
        pairs[f"task_{side}"] = [tasks[number] for number in pairs[side]]
        pairs[f"base_null_{side}"] = [chance[number] for number in pairs[side]]
    return pairs


Rows = Iterator[tuple[int, str, str, float]]
"""Layer, matrix, metric, value."""


def diagnose(run: Run, site: Site) -> Outcome:
    """Compare the activations of a model before and after full finetuning, and what probes predict from each layer.

    The needs are `tuned`, a whole model, and `model`, what it was before, unless that is a setting. The settings are
    `task`, `examples` (of the reporting half, at most), `probe_examples` (of the training examples, at most) and
    `max_length`.

    Returns:
        Rows `layer, matrix, metric, value`, where `matrix` is empty. For each layer from 0, and −1 for the embeddings,
        `cka` and `svcca` between before and after; for tasks with labels `probe_before` and `probe_after`, accuracy or
        Pearson's correlation.
    """
    return _outcome(_activations(*_before_and_after(run, site), run.settings, run.seed))


def power_laws(run: Run, site: Site) -> Outcome:
    """Fit the power-law exponents of a model's matrices before and after full finetuning.

    The needs are those of `diagnose`, the settings `task` and `max_length`.

    Returns:
        Rows `layer, matrix, metric, value`: for each matrix `power_law_before` and `power_law_after`. Its result also
        names the version of `weightwatcher`.

    Raises:
        InputError: `weightwatcher` is not installed.
    """
    found = _outcome(_power_laws(*_before_and_after(run, site)))
    return Outcome({**found.result, "weightwatcher": version("weightwatcher")}, found.measurements)


def _before_and_after(run: Run, site: Site) -> tuple[LoadedModel, LoadedModel]:
    task, length = halved_task(run.settings["task"], site), run.settings.get("max_length", 64)
    before = load_model(model_of(run, site), task, seed=run.seed, max_length=length)
    return before, load_model(site.needs["tuned"], task, head="stored", max_length=length)


def _outcome(rows: Rows) -> Outcome:
    table = pd.DataFrame(rows, columns=["layer", "matrix", "metric", "value"])
    means = table.groupby("metric")["value"].mean()
    return Outcome({str(metric): float(value) for metric, value in means.items()}, table)


def _activations(before: LoadedModel, after: LoadedModel, settings: Any, seed: int) -> Rows:
    task = before.task
    held_out = _rows_of(task.evaluation, settings["examples"], seed)
    states = [layer_activations(one.model, held_out, one.collator) for one in (before, after)]
    for layer, (X, Y) in enumerate(zip(*states, strict=True), start=-1):
        yield layer, "", "cka", linear_cka(X, Y)
        yield layer, "", "svcca", svcca(X, Y)
    if task.kind == "masked_language":
        return
    seen = _rows_of(task.train, settings["probe_examples"], seed)
    for name, one, unseen in zip(("before", "after"), (before, after), states, strict=True):
        for layer, (X, Y) in enumerate(zip(layer_activations(one.model, seen, one.collator), unseen, strict=True), -1):
            score = linear_probe((X, _labels(seen)), (Y, _labels(held_out)), regression=task.kind == "regression")
            yield layer, "", f"probe_{name}", score


def _power_laws(before: LoadedModel, after: LoadedModel) -> Rows:
    for name, one in (("before", before), ("after", after)):
        matrices = logical_matrices(open_checkpoint(one.model))[0]
        for matrix, exponent in power_law_exponents(one.model, set(matrices)).items():
            yield matrices[matrix].layer, matrix, f"power_law_{name}", exponent


def _rows_of(examples: "Dataset", most: int, seed: int) -> list[dict[str, Any]]:
    """A sample of the examples, drawn by the seed, or all where there are no more."""
    chosen = np.random.default_rng(seed).permutation(len(examples))[:most]
    return [row for rows in batches(examples.select(chosen), 64) for row in rows]


def _labels(rows: Sequence[dict[str, Any]]) -> Floats:
    return np.array([row[LABEL] for row in rows], dtype=np.float64)


def retention(run: Run, site: Site) -> Outcome:
    """Score a model on its own task, with its own head, before and after tuning to another changed its backbone.

    The model (a need, or a setting where no run makes it) has a head for the setting `task`; the need `adapter` was
    tuned from it to the setting `second_task` by any method, also as a whole model. `max_length` is for texts.

    Returns:
        `before` and `after`, means of the scores on both halves of the held-out examples.
    """
    place, length = model_of(run, site), run.settings.get("max_length", 64)
    first = load_model(place, halved_task(run.settings["task"], site), head="stored", max_length=length)
    before = _score(first)
    task, tuned = halved_task(run.settings["second_task"], site), site.needs["adapter"]
    if (tuned / "config.json").is_file():
        second: Any = load_model(tuned, task, head="stored", max_length=length).model
    else:
        adapted: Any = attach_adapter(load_model(place, task, max_length=length), tuned)
        second = adapted.get_base_model() if isinstance(adapted, PeftModel) else adapted
    setattr(first.model, first.model.base_model_prefix, getattr(second, second.base_model_prefix))
    return Outcome({"before": before, "after": _score(first)})


def _score(loaded: LoadedModel) -> float:
    task = loaded.task
    splits = [split for split in (task.evaluation, task.selection) if split is not None]
    halves = [replace(task, evaluation=split) for split in splits]
    scores = [score_task(loaded.model, half, loaded.collator, progress=False)[task.headline] for half in halves]
    return sum(scores) / len(scores)


def similarity(run: Run, site: Site) -> Outcome:
    """Cosines between the coefficients of spectral adapters on one basis.

    The needs are `adapter_0`, `adapter_1`, …; the setting `tasks` says in their order what each was tuned to.

    Returns:
        `tasks`, and `cosines`, a table (adapters, adapters) over all matrices at once.
    """
    tasks = run.settings["tasks"]
    found = similarity_of([site.needs[f"adapter_{number}"] for number in range(len(tasks))], of="coefficients")
    assert found.coefficients is not None  # it was asked for
    return Outcome({"tasks": tasks, "cosines": found.coefficients.to_numpy().tolist()})


OWN_SETTINGS = ("model", "task", "measure", "penalty", "select_on")
SPLITS = {"held out": halved_task, "train": tested_task, "train alone": searched_task}
"""On what settings are chosen: half of the held-out examples, or some of the training examples, and then without a
score on the test examples."""


def tune(run: Run, site: Site) -> Outcome:
    """Tune, and leave the tuned model or adapter in the folder of the run.

    The settings are the keyword arguments of `spectralbasis.training.tune`, with the task by name, `measure`, those of
    `TrajectoryCallback`, `penalty`, those of `UpdatePenalty`, and `select_on`, a key of `SPLITS`. The needs may be
    `model`, instead of the setting; `basis`, whose folder holds a basis file; `start`, an adapter from whose numbers
    training starts; and `source_0`, `source_1`, … to be fused.

    Returns:
        The scores, counts and costs; the measurements are the trajectory, where one was asked for.
    """
    options = {name: value for name, value in run.settings.items() if name not in OWN_SETTINGS}
    if "basis" in site.needs:
        options["basis"] = str(site.needs["basis"] / BASIS_FILE)
    sources = sorted(role for role in site.needs if role.startswith("source_"))
    measure: Mapping[str, Any] | None = run.settings.get("measure")
    trajectory = None if measure is None else TrajectoryCallback(**{"seed": run.seed, **measure})
    penalties = [UpdatePenalty(**run.settings["penalty"])] if "penalty" in run.settings else []
    model = model_of(run, site)
    task = SPLITS[run.settings.get("select_on", "held out")](run.settings["task"], site)
    result = tune_model(
        model,
        task=task,
        output=site.folder,
        start=site.needs.get("start"),
        sources=[site.needs[role] for role in sources],
        seed=run.seed,
        callbacks=[*([] if trajectory is None else [trajectory]), *penalties],
        progress=False,
        **options,
    )
    # What names folders of this machine, or is in the run already, is left out.
    left_out = ("output", "model", "settings", "versions", "layout", "notes", "evaluation_split")
    facts = {name: value for name, value in result.to_dict().items() if name not in left_out}
    facts |= {**_distance(model, result), **constant_score(task)}
    if task.selection is None:
        facts["selection_score"] = facts["score"]
    return Outcome(facts, None if trajectory is None else trajectory.table())


def constant_score(task: Task) -> dict[str, float]:
    """What the commonest label of the training examples scores, given as the answer to everything; tokens have none."""
    if task.kind not in ("classification", "regression"):
        return {}
    seen, asked = (np.asarray(part.with_format("numpy")[LABEL][:]) for part in (task.train, task.evaluation))
    answer = np.bincount(seen).argmax() if task.kind == "classification" else seen.mean()
    return {"constant_score": score(np.full(len(asked), answer), asked, [task.headline])[task.headline]}


def _distance(model: str, result: TuneResult) -> dict[str, float]:
    """How far a whole model has moved, `‖ΔW‖_F / ‖W0‖_F` over all its weight matrices; nothing for an adapter."""
    if METHODS[result.method].writes != "model":
        return {}
    base, tuned = (logical_matrices(open_checkpoint(place))[0] for place in (model, result.output))
    pairs = ((base[name].read(), tuned[name].read()) for name in base.keys() & tuned.keys())
    squares = [(float((W1 - W0).square().sum()), float(W0.square().sum())) for W0, W1 in pairs if W0.shape == W1.shape]
    moved, size = (math.fsum(column) for column in zip(*squares, strict=True))
    return {"update_norm_relative": math.sqrt(moved / size)}


ACTIONS: dict[str, Action] = {
    action.__name__: action
    for action in (
        basis, compare, diagnose, exchange, gradient_coverage, initialise, power_laws, retention, similarity, tune,
    )
}  # fmt: skip


def find_action(name: str) -> Action:
    """The function of an action, named by a key of `ACTIONS` or itself as `package.module:function`."""
    if name in ACTIONS:
        return ACTIONS[name]
    module, _, function = name.partition(":")
    action: Action = getattr(import_module(module), function)
    return action
