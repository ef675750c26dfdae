"""Tuning a model to a task, scoring it, and what is left of both in a folder.

Starting to train from the trained numbers of another adapter.

Tuning a model to a task with one of the methods, and writing what came of it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import TrainerCallback, set_seed

from spectralbasis.errors import InputError
from spectralbasis.files import atomic_folder, check_output
from spectralbasis.linalg import Leading
from spectralbasis.records import read_record
from spectralbasis.training.evaluation import MAX_LENGTH, score_task
from spectralbasis.training.fitting import TrainingSettings, fit
from spectralbasis.training.method import Method, MethodOptions, Setup
from spectralbasis.training.methods import BASIS_FILE, check_options, find_method
from spectralbasis.training.models import LoadedModel, load_model
from spectralbasis.training.outcomes import (
    TUNING_FILE,
    ParameterCounts,
    TuneResult,
    copy_tensors,
    library_versions,
    read_tensors,
    save_trained,
    stored,
    trained_parameters,
    write_card,
    write_json,
)
from spectralbasis.training.tasks import Task, load_task
from spectralbasis.tuner.calibration import in_modules
from spectralbasis.tuner.factors import DEFAULT_SCALING

ORIGIN = {"auto_mapping", "base_model_name_or_path", "basis", "peft_version", "revision", "runtime_config", "task_type"}
PLACES = {"exclude_modules", "inference_mode", "modules_to_save", "target_modules"}
SIZE = {"bias", "budget", "leading", "rank_pattern", "tolerance"}
SCHEDULE = {"deltaT", "tfinal", "tinit", "total_step"}
NO_MATTER = ORIGIN | PLACES | SIZE | SCHEDULE
"""Settings of an adapter that say nothing of what its numbers mean: their names, shapes and probes do."""


def start_from(model: nn.Module, loaded: LoadedModel, method: Method, folder: Path) -> None:
    """Give a model, prepared by the method, the trained numbers of an adapter's backbone; the head stays as drawn.

    Raises:
        InputError: the folder holds no adapter of the same method, size and directions, or the method starts otherwise.
    """
    if method.writes == "model":
        raise InputError(
            f"the method {method.name} starts from a whole model, not from the adapter {folder}; give it as the model"
        )
    made = stored(folder).get("method")
    if made != method.name:
        raise InputError(f"{folder} was tuned with {made or 'no method of tune'}, not {method.name}; tune it with that")
    tensors = _outside_head(read_tensors(folder), loaded)
    if isinstance(model, PeftModel):
        _check_meaning(model, folder)
        room = _outside_head(get_peft_model_state_dict(model), loaded)
        copy_tensors(room, tensors, folder)
        set_peft_model_state_dict(model, {**get_peft_model_state_dict(model), **room})
    else:
        copy_tensors(_outside_head(trained_parameters(model), loaded), tensors, folder)


def _outside_head(tensors: Mapping[str, Tensor], loaded: LoadedModel) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not in_modules(name, loaded.head)}


def _check_meaning(model: PeftModel, folder: Path) -> None:
    """Refuse numbers that mean something else here: other directions, entries, units or seeds."""
    here = _as_json(model.peft_config["default"].to_dict())
    there = read_record(folder / "adapter_config.json", dict[str, Any], "tune it again")
    for name in sorted(here.keys() & there.keys() - NO_MATTER, reverse=True):
        if here[name] != there[name]:
            raise InputError(
                f"the numbers of {folder} mean something else here: its {name} differs; "
                "tune it on the same model, with the same options and basis"
            )


def _as_json(content: dict[str, Any]) -> Any:
    return json.loads(json.dumps(content, default=sorted))


def tune(
    model: str | Path,
    *,
    task: Task | str,
    data: str | Path | None = None,
    output: str | Path,
    method: str = "spectral",
    coefficients: str = "diagonal",
    bandwidth: int = 1,
    scaling: str = DEFAULT_SCALING,
    basis: str = "pretrained",
    leading: Leading | None = None,
    budget: float | None = None,
    rank: int | None = None,
    alpha: float | None = None,
    n_frequency: int | None = None,
    dimension: int | None = None,
    sources: Sequence[str | Path] = (),
    start: str | Path | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int = 32,
    max_length: int = MAX_LENGTH,
    learning_rate: float | None = None,
    head_learning_rate: float | None = None,
    seed: int = 0,
    train_examples: int | None = None,
    bf16: bool = False,
    progress: bool = True,
    overwrite: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> TuneResult:
    """Tune a model to a task, score it on the task's evaluation split, and write it to the folder `output`.

    `model` is a folder, a hub id or `minilm`. The folder holds a whole model for the methods `full` and `head`, and an
    adapter for all others; `tuning.json` in it says how it was made, how it scored and what it cost. It appears when
    all is done, never half-written. What a method does not know among `coefficients` to `sources` is refused; see
    `MethodOptions`. `start` is an adapter of the same method and size, from whose trained numbers in the backbone
    training starts. A selection split, where the task has one, is scored too. Learning rates default to the method's;
    `learning_rate` is that of what the method trains in the backbone. The same seed gives the same result on the same
    machine.

    Raises:
        InputError: the model, the task, the data, an option or the output folder cannot be used, or training diverged.
    """
    chosen = find_method(method)
    given = MethodOptions(
        coefficients, bandwidth, scaling, basis, leading, budget, rank, alpha, n_frequency, dimension,
        tuple(str(source) for source in sources),
    )  # fmt: skip
    check_options(chosen, given)
    options = chosen.complete(given)
    backbone_rate, head_rate = chosen.learning_rates(learning_rate, head_learning_rate)
    settings = TrainingSettings(
        learning_rate=backbone_rate,
        head_learning_rate=head_rate,
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        max_length=max_length,
        seed=seed,
        train_examples=train_examples,
        bf16=bf16,
    )
    check_output(Path(output), overwrite=overwrite)
    loaded = load_model(model, _load_task(task, data, settings), seed=seed, max_length=max_length)
    with atomic_folder(Path(output)) as folder:
        setup = Setup(loaded, options, folder, settings.total_steps(len(loaded.task.train)))
        begin = None if start is None else Path(start)
        return _tune_into(Path(output), setup, chosen, settings, begin, progress, callbacks)


def _load_task(task: Task | str, data: str | Path | None, settings: TrainingSettings) -> Task:
    chosen = load_task(task, data) if isinstance(task, str) else task
    if settings.train_examples is None:
        return chosen
    return chosen.subsample(settings.train_examples, settings.seed)


def _tune_into(
    output: Path,
    setup: Setup,
    method: Method,
    settings: TrainingSettings,
    start: Path | None,
    progress: bool,
    callbacks: Sequence[TrainerCallback],
) -> TuneResult:
    """Train, score, and write everything to the folder of the setup, which will become `output`."""
    loaded, options, folder, steps = setup.loaded, setup.options, setup.folder, setup.steps
    task = loaded.task
    total = sum(parameter.numel() for parameter in loaded.model.parameters())
    set_seed(settings.seed)
    model = method.prepare(setup)
    if start is not None:
        start_from(model, loaded, method, start)
    seconds = fit(
        model,
        loaded,
        settings,
        description=f"{task.name}, {method.name}",
        progress=progress,
        callbacks=[*callbacks, *method.callbacks(model)],
    )
    metrics = score_task(model, task, loaded.collator, progress=progress)
    selection = None
    if task.selection is not None:
        selection = score_task(model, replace(task, evaluation=task.selection), loaded.collator, progress=progress)
    _save(model, method, setup)
    result = TuneResult(
        output=output,
        model=loaded.source,
        task=task.name,
        method=method.name,
        coefficients=options.coefficients if "coefficients" in method.options else "",
        metric=task.headline,
        score=metrics[task.headline],
        metrics=metrics,
        evaluation_split=task.evaluation_split,
        parameters=ParameterCounts.of(model, loaded.head, total),
        adapter_bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors") if file.name != BASIS_FILE),
        steps=steps,
        seconds=seconds,
        seconds_per_step=seconds / steps,
        seed=settings.seed,
        settings={
            **asdict(settings),
            **{name: getattr(options, name) for name in sorted(method.options)},
            **({} if start is None else {"start": str(start)}),
        },
        versions=library_versions(),
        precision=settings.precision,
        selection_metrics=selection,
    )
    write_json(folder / TUNING_FILE, result.to_dict())
    if isinstance(model, PeftModel):
        write_card(folder, result, loaded)
    return result


def _save(model: nn.Module, method: Method, setup: Setup) -> None:
    """An adapter's own files where there is one, else the whole model with its tokenizer or image settings."""
    if isinstance(model, PeftModel):
        model.save_pretrained(setup.folder, safe_serialization=True, save_embedding_layers=False)
    elif method.writes == "trained":
        save_trained(model, setup.folder)
    else:
        setup.loaded.save(setup.folder)
