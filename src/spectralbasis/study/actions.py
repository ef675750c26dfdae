"""What runs of the study do: one function for each action.

What several actions read from a run: its task, its model, and how long texts are.

The action `compare`: finetuned models of one base, held against it and against each other.

The actions `diagnose` and `power_laws`: what the field looks at beside singular vectors, before and after tuning.

A model at its pretrained weights under a head that was trained on the task alone.

The action `basis`: directions other than a model's own singular vectors, as a basis file.

The action `gradient_coverage`: how much of a task's gradient lies in a basis, and how much of what else.

The action `initialise`: a model as random weights leave it, or the released weights of LIMU-BERT-X.

The action `retention`: what a fully tuned model still does of its task once it was tuned to another.

The action `similarity`: how much trained coefficients of several tasks are alike.

The action `tune`: one model, one task, one method, scored on both halves of the held-out examples.
"""

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from spectralbasis.basis import SpectralBasis
from spectralbasis.checkpoints import logical_matrices, open_checkpoint
from spectralbasis.coefficients.similarity import similarity as similarity_of
from spectralbasis.comparison.comparing import compare as compare_checkpoints
from spectralbasis.errors import InputError
from spectralbasis.study.estimates import power_law_exponents
from spectralbasis.study.probes import (
    FORMS,
    Directions,
    Floats,
    GradientNoise,
    Matrices,
    layer_activations,
    linear_cka,
    linear_probe,
    shares,
    svcca,
)
from spectralbasis.study.runs import Action, Outcome, Run, Site
from spectralbasis.study.trajectories import TrajectoryCallback
from spectralbasis.training.data_files import folder_of
from spectralbasis.training.evaluation import attach_adapter, score_task
from spectralbasis.training.fitting import UpdatePenalty
from spectralbasis.training.handing_over import check_size, image_collator, load_tokenizer, reading
from spectralbasis.training.limu_bert import read_released
from spectralbasis.training.messages import quiet_transformers
from spectralbasis.training.methods import BASIS_FILE, METHODS, calibration_batches
from spectralbasis.training.models import (
    LoadedModel,
    checked_folder,
    find_architecture,
    load_model,
    random_model,
    resolve_source,
)
from spectralbasis.training.outcomes import TuneResult
from spectralbasis.training.tasks import LABEL, Task, batches, load_task
from spectralbasis.training.tuning import tune as tune_model
from spectralbasis.triplets import DEFAULT_TOLERANCE
from spectralbasis.tuner import SpectralConfig
from spectralbasis.tuner.calibration import curvature_basis, haar_coverage, in_modules, mean_gradients
from spectralbasis.tuner.factors import directions_of
from spectralbasis.tuner.preparation import Target, find_targets, named_in_basis
from spectralbasis.tuner.targets import targeted_modules

SPLIT_SEED = 0


def halved_task(name: str, site: Site) -> Task:
    """A task by its name, from its folder below the data folder, with a half of its held-out examples to select by.

    The halves are the same for every run.
    """
    return load_task(name, folder_of(name, site.data)).halved(SPLIT_SEED)


def model_of(run: Run, site: Site) -> str:
    """The model that the run starts from: the folder of its need `model`, else what its settings name."""
    found: Any = site.needs.get("model") or run.settings["model"]
    return str(found)


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


Rows = Iterator[dict[str, Any]]


def diagnose(run: Run, site: Site) -> Outcome:
    """Compare the activations of a model before and after full finetuning, and what probes read off each layer.

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


def _outcome(rows: Iterable[dict[str, Any]]) -> Outcome:
    table = pd.DataFrame(rows, columns=["layer", "matrix", "metric", "value"])
    means = table.groupby("metric")["value"].mean()
    return Outcome({str(metric): float(value) for metric, value in means.items()}, table)


def _activations(before: LoadedModel, after: LoadedModel, settings: Any, seed: int) -> Rows:
    task = before.task
    held_out = _rows_of(task.evaluation, settings["examples"], seed)
    states = [layer_activations(one.model, held_out, one.collator) for one in (before, after)]
    for layer, (X, Y) in enumerate(zip(*states, strict=True), start=-1):
        yield _row(layer, "cka", linear_cka(X, Y))
        yield _row(layer, "svcca", svcca(X, Y))
    if task.kind == "masked_language":
        return
    seen = _rows_of(task.train, settings["probe_examples"], seed)
    for name, one, unseen in zip(("before", "after"), (before, after), states, strict=True):
        for layer, (X, Y) in enumerate(zip(layer_activations(one.model, seen, one.collator), unseen, strict=True), -1):
            score = linear_probe((X, _labels(seen)), (Y, _labels(held_out)), regression=task.kind == "regression")
            yield _row(layer, f"probe_{name}", score)


def _power_laws(before: LoadedModel, after: LoadedModel) -> Rows:
    for name, one in (("before", before), ("after", after)):
        matrices = logical_matrices(open_checkpoint(one.model))[0]
        for matrix, exponent in power_law_exponents(one.model, set(matrices)).items():
            yield _row(matrices[matrix].layer, f"power_law_{name}", exponent, matrix)


def _row(layer: int, metric: str, value: float, matrix: str = "") -> dict[str, Any]:
    return {"layer": layer, "matrix": matrix, "metric": metric, "value": value}


def _rows_of(examples: Dataset, most: int, seed: int) -> list[dict[str, Any]]:
    """A sample of the examples, drawn by the seed, or all where there are no more."""
    chosen = np.random.default_rng(seed).permutation(len(examples))[:most]
    return [row for rows in batches(examples.select(chosen), 64) for row in rows]


def _labels(rows: Sequence[dict[str, Any]]) -> Floats:
    return np.array([row[LABEL] for row in rows], dtype=np.float64)


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


RELEASED: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "limu-bert-x": ("limu_bert/x/weights/limu_bert_x.pt", read_released)
}
"""Pretrained models in other formats than transformers': their file below the data folder, and what reads it."""


def initialise(run: Run, site: Site) -> Outcome:
    """Write a model that `load_model` opens, with its tokenizer where it reads text.

    The setting `architecture` is the name of one of `ARCHITECTURES` or `RELEASED`, or `{"like": MODEL}` for the twin of
    a model: the same config and inputs, and weights drawn by the run's seed.

    Raises:
        InputError: the name is not known, or the model or data that it needs cannot be read.
    """
    wanted = run.settings["architecture"]
    with quiet_transformers():
        model = _write(wanted, run.seed, site)
    return Outcome({"parameters": sum(parameter.numel() for parameter in model.parameters())})


def _write(wanted: str | Mapping[str, str], seed: int, site: Site) -> Any:
    if not isinstance(wanted, str):
        return _write_twin(wanted["like"], seed, site.folder)
    if wanted in RELEASED:
        return _write_released(wanted, site)
    architecture = find_architecture(wanted)
    model = random_model(architecture.auto_model, architecture.make_config(), seed)
    model.save_pretrained(site.folder)
    if architecture.corpus is not None:
        architecture.make_tokenizer(folder_of(architecture.corpus, site.data)).save_pretrained(site.folder)
    return model


def _write_released(name: str, site: Site) -> Any:
    file, read = RELEASED[name]
    if site.data is None:
        raise InputError(f"{name} is read from {file}; pass --data with the folder that holds it")
    model = read(site.data / file)
    model.save_pretrained(site.folder)
    return model


def _write_twin(source: str, seed: int, folder: Path) -> Any:
    place = checked_folder(resolve_source(source))
    with reading(place, "model"):
        config = AutoConfig.from_pretrained(place, trust_remote_code=False)
    check_size(place, config, AutoModel.from_config)
    model = random_model(AutoModel, config, seed)
    model.save_pretrained(folder)
    if type(config) in AutoModelForImageClassification._model_mapping:
        image_collator(place, config).save(folder)
    else:
        load_tokenizer(place).save_pretrained(folder)
    return model


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
    second = _tuned(place, site.needs["adapter"], halved_task(run.settings["second_task"], site), length)
    setattr(first.model, first.model.base_model_prefix, getattr(second, second.base_model_prefix))
    return Outcome({"before": before, "after": _score(first)})


def _tuned(place: str, tuned: Path, task: Task, length: int) -> Any:
    """The model for the second task, its adapters in place."""
    if (tuned / "config.json").is_file():
        return load_model(tuned, task, head="stored", max_length=length).model
    adapted = attach_adapter(load_model(place, task, max_length=length), tuned)
    return adapted.get_base_model() if isinstance(adapted, PeftModel) else adapted


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


OWN_SETTINGS = ("model", "task", "measure", "penalty")


def tune(run: Run, site: Site) -> Outcome:
    """Tune, and leave the tuned model or adapter in the folder of the run.

    The settings are the keyword arguments of `spectralbasis.training.tune`, with the task by name, `measure`, those of
    `TrajectoryCallback`, and `penalty`, those of `UpdatePenalty`. The needs may be `model`, instead of the setting;
    `basis`, whose folder holds a basis file; `start`, an adapter from whose numbers training starts; and `source_0`,
    `source_1`, … to be fused.

    Returns:
        The scores, counts and costs; the measurements are the trajectory, where one was asked for.
    """
    options = {name: value for name, value in run.settings.items() if name not in OWN_SETTINGS}
    if "basis" in site.needs:
        options["basis"] = str(site.needs["basis"] / BASIS_FILE)
    sources = sorted(role for role in site.needs if role.startswith("source_"))
    measure: Mapping[str, Any] | None = run.settings.get("measure")
    trajectory = None if measure is None else TrajectoryCallback(**{"seed": run.seed, **measure})
    model = model_of(run, site)
    result = tune_model(
        model,
        task=halved_task(run.settings["task"], site),
        output=site.folder,
        start=site.needs.get("start"),
        sources=[site.needs[role] for role in sources],
        seed=run.seed,
        callbacks=[*([] if trajectory is None else [trajectory]), *_penalties(run)],
        progress=False,
        **options,
    )
    return Outcome({**_facts(result), **_distance(model, result)}, None if trajectory is None else trajectory.table())


def _penalties(run: Run) -> list[UpdatePenalty]:
    return [UpdatePenalty(**run.settings["penalty"])] if "penalty" in run.settings else []


def _facts(result: TuneResult) -> dict[str, Any]:
    facts = result.to_dict()
    return {name: value for name, value in facts.items() if name not in ("output", "model", "settings", "versions")}


def _distance(model: str, result: TuneResult) -> dict[str, float]:
    """How far a whole model has moved, `‖ΔW‖_F / ‖W0‖_F` over all its weight matrices; nothing for an adapter."""
    if METHODS[result.method].writes != "model":
        return {}
    base, tuned = (logical_matrices(open_checkpoint(place))[0] for place in (model, result.output))
    squares = [_squares(base[name].read(), tuned[name].read()) for name in base.keys() & tuned.keys()]
    moved, size = (math.fsum(column) for column in zip(*squares, strict=True))
    return {"update_norm_relative": math.sqrt(moved / size)}


def _squares(W0: Any, W1: Any) -> tuple[float, float]:
    if W0.shape != W1.shape:
        return 0.0, 0.0
    return float((W1 - W0).square().sum()), float(W0.square().sum())


ACTIONS: dict[str, Action] = {
    action.__name__: action
    for action in (
        basis, compare, diagnose, gradient_coverage, initialise, power_laws, retention, similarity, tune,
    )
}  # fmt: skip


def find_action(name: str) -> Action:
    """The function of an action, named by a key of `ACTIONS` or itself as `package.module:function`."""
    if name in ACTIONS:
        return ACTIONS[name]
    module, _, function = name.partition(":")
    action: Action = getattr(import_module(module), function)
    return action
