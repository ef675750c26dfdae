"""Tune a model to a task with one method, score it, and write both to a folder."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import TrainerCallback, set_seed

from spectralbasis.errors import InputError
from spectralbasis.extras import require_extra
from spectralbasis.files import atomic_folder, check_output
from spectralbasis.linalg import Leading
from spectralbasis.printable import shortened
from spectralbasis.records import read_record
from spectralbasis.training.evaluation import MAX_LENGTH, score_task
from spectralbasis.training.fitting import TrainingSettings, fit
from spectralbasis.training.known_tasks import BUILT_IN, load_task, record_of
from spectralbasis.training.methods import DEFAULT_SCALING, Method, MethodOptions, Setup, find_method
from spectralbasis.training.models import LoadedModel, load_model
from spectralbasis.training.outcomes import (
    TUNING_FILE,
    ParameterCounts,
    TuneResult,
    copy_tensors,
    read_tensors,
    save_trained,
    stored,
    trained_parameters,
    write_card,
    write_json,
)
from spectralbasis.training.tasks import Task
from spectralbasis.tuner.calibration import in_modules
from spectralbasis.tuner.config import BASIS_FILE
from spectralbasis.version import library_versions

ORIGIN = {"auto_mapping", "base_model_name_or_path", "basis", "peft_version", "revision", "runtime_config", "task_type"}
PLACES = {"exclude_modules", "inference_mode", "modules_to_save", "target_modules"}
SIZE = {"bias", "budget", "leading", "rank_pattern", "tolerance"}
SCHEDULE = {"deltaT", "tfinal", "tinit", "total_step"}
NO_MATTER = ORIGIN | PLACES | SIZE | SCHEDULE
"""Settings of an adapter that say nothing of what its numbers mean: their names, shapes and probes do."""


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

    The same seed gives the same result on the same machine. The folder appears when all is done, never half-written.

    Args:
        model: a folder, a hub id, or `minilm`.
        task: a name that `task_names` gives, or a task of your own.
        data: folder or file of the task's data; see `load_task`.
        output: folder of the whole model (methods `full` and `head`) or of the adapter (all others), with
            `tuning.json`, which says how it was made, how it scored and what it cost.
        method: a name in `METHODS`.
        coefficients: `diagonal`, `core`, `band` or `sparse`. This and the next ten are options of methods, as in
            `MethodOptions`; an option that the method does not read is refused.
        bandwidth: largest distance from the diagonal, for `band`.
        scaling: unit of the coefficients: `absolute`, `relative` or `normalized`.
        basis: `pretrained`, `random`, `minor`, `curvature`, or the path of a basis file.
        leading: directions in each matrix, or the rule that sets them; not together with `budget`.
        budget: share of the model's parameters to train.
        rank: rank or width of what is added to each matrix or layer, from 1.
        alpha: LoRA's scale.
        n_frequency: numbers for each matrix, from 1 (FourierFT).
        dimension: numbers for each matrix (TinyLoRA), or in all (a random subspace), from 1.
        sources: folders of the adapters that AdapterFusion fuses.
        start: an adapter of the same method and size, from whose trained numbers in the backbone training starts.
        steps: optimizer steps, from 1; not together with `epochs`.
        epochs: passes over the training examples, above 0; three where neither is given.
        batch_size: examples in each step, from 1.
        max_length: tokens at which texts are cut.
        learning_rate: of what the method trains in the backbone, above 0; None takes the method's.
        head_learning_rate: of the head, above 0; None takes the method's.
        seed: of the head, the order of examples and dropout, from 0.
        train_examples: use only so many training examples.
        bf16: train under bfloat16 autocast, where that is native.
        progress: draw bars on stderr.
        overwrite: replace what an earlier run left in `output`.
        callbacks: of transformers' Trainer.

    Returns:
        Scores, counts and costs; the scores on a selection split too, where the task has one.

    Raises:
        InputError: the model, the task, the data, an option or the output folder cannot be used, training diverged, or
            the extra `tune` is not installed.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from spectralbasis.training.quickstart import save_untrained
        >>> folder = Path(tempfile.mkdtemp())
        >>> base = save_untrained(folder / "vit")
        >>> tuned = tune(base, task="digits", output=folder / "adapter", leading=4, steps=2, progress=False)
        >>> tuned.metric, tuned.parameters.backbone, 0 <= tuned.score <= 1
        ('accuracy', 96, True)
    """
    require_extra("tune", "spectralbasis.tune")
    chosen = find_method(method)
    options = chosen.complete(
        MethodOptions(
            coefficients, bandwidth, scaling, basis, leading, budget, rank, alpha, n_frequency, dimension,
            tuple(str(source) for source in sources),
        )
    )  # fmt: skip
    rates = chosen.learning_rates(learning_rate, head_learning_rate)
    settings = TrainingSettings(*rates, steps, epochs, batch_size, max_length, seed, train_examples, bf16)
    check_output(Path(output), overwrite=overwrite)
    known = load_task(task, data) if isinstance(task, str) else task
    if train_examples is not None:
        known = known.subsample(train_examples, seed)
    loaded = load_model(model, known, seed=seed, max_length=max_length)
    with atomic_folder(Path(output)) as folder:
        setup = Setup(loaded, options, folder, settings.total_steps(len(known.train)))
        total = sum(parameter.numel() for parameter in loaded.model.parameters())
        set_seed(seed)
        prepared = chosen.prepare(setup)
        if start is not None:
            start_from(prepared, loaded, chosen, Path(start))
        seconds = fit(
            prepared,
            loaded,
            settings,
            description=f"{known.name}, {method}",
            progress=progress,
            callbacks=[*callbacks, *chosen.callbacks(prepared)],
        )
        metrics = score_task(prepared, known, loaded.collator, progress=progress)
        selection = None
        if known.selection is not None:
            halved = replace(known, evaluation=known.selection)
            selection = score_task(prepared, halved, loaded.collator, progress=progress)
        if isinstance(prepared, PeftModel):
            prepared.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
        elif chosen.writes == "trained":
            save_trained(prepared, folder)
        else:
            loaded.save(folder)
        result = TuneResult(
            output=Path(output),
            model=loaded.source,
            task=known.name,
            method=method,
            coefficients=options.coefficients if "coefficients" in chosen.options else "",
            metric=known.headline,
            score=metrics[known.headline],
            metrics=metrics,
            evaluation_split=known.evaluation_split,
            parameters=ParameterCounts.of(prepared, loaded.head, total),
            adapter_bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors") if file.name != BASIS_FILE),
            steps=setup.steps,
            seconds=seconds,
            seconds_per_step=seconds / setup.steps,
            seed=seed,
            settings={
                **asdict(settings),
                **{name: getattr(options, name) for name in sorted(chosen.options)},
                **({} if start is None else {"start": str(start)}),
            },
            versions=library_versions(),
            precision=settings.precision,
            selection_metrics=selection,
        )
        write_json(folder / TUNING_FILE, result.to_dict())
        if isinstance(prepared, PeftModel):
            record = record_of(task) if isinstance(task, str) else None
            asks = record.description if record else ""
            write_card(folder, result, loaded, data=data, named=record in BUILT_IN, asks=asks)
    return result


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

    def outside_head(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in tensors.items() if not in_modules(name, loaded.head)}

    tensors = outside_head(read_tensors(folder))
    if isinstance(model, PeftModel):
        _check_meaning(model, folder)
        room = outside_head(get_peft_model_state_dict(model))
        copy_tensors(room, tensors, folder)
        set_peft_model_state_dict(model, {**get_peft_model_state_dict(model), **room})
    else:
        copy_tensors(outside_head(trained_parameters(model)), tensors, folder)


def _check_meaning(model: PeftModel, folder: Path) -> None:
    """Refuse numbers that mean something else here: other directions, entries, units or seeds."""
    here = json.loads(json.dumps(model.peft_config["default"].to_dict(), default=sorted))
    there = read_record(folder / "adapter_config.json", dict[str, Any], "tune it again")
    for name in sorted(here.keys() & there.keys() - NO_MATTER, reverse=True):
        if here[name] != there[name]:
            raise InputError(
                f"the numbers of {folder} do not fit this model: its {name} is {shortened(str(there[name]), 60)}, and "
                f"here it is {shortened(str(here[name]), 60)}; tune it on the same model, with the same options and "
                "basis"
            )
