"""Tune a model to a task or a user's table with one method, score it, and write both to a folder."""

import json
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import TrainerCallback, set_seed

from spectralbasis.errors import InputError
from spectralbasis.extras import require_extra
from spectralbasis.files import atomic_folder, cache_folder, check_output, checksum
from spectralbasis.kinds import DEFAULT_COEFFICIENTS
from spectralbasis.linalg import Leading
from spectralbasis.printable import shortened
from spectralbasis.records import read_record
from spectralbasis.training.evaluation import MAX_LENGTH, cut_texts, length_for, reading_of_text, score_task
from spectralbasis.training.fitting import TrainingSettings, fit, is_main_process
from spectralbasis.training.known_tasks import BUILT_IN, load_task, record_of
from spectralbasis.training.methods import DEFAULT_SCALING, Method, MethodOptions, Setup, find_method
from spectralbasis.training.models import LoadedModel, checked_folder, load_model, resolve_source, task_for
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
from spectralbasis.training.own_tasks import Wanted, own_record
from spectralbasis.training.table_files import identity_of
from spectralbasis.training.tasks import Task
from spectralbasis.tuner.calibration import in_modules
from spectralbasis.tuner.config import BASIS_FILE
from spectralbasis.version import library_versions

LOGGER = logging.getLogger(__name__)
KEPT_FOR = 30 * 24 * 3600.0
"""Seconds for which the state of a training that was killed is kept."""
ORIGIN = {"auto_mapping", "base_model_name_or_path", "basis", "peft_version", "revision", "runtime_config", "task_type"}
PLACES = {"exclude_modules", "inference_mode", "modules_to_save", "target_modules"}
SIZE = {"bias", "budget", "leading", "rank_pattern", "tolerance"}
SCHEDULE = {"deltaT", "tfinal", "tinit", "total_step"}
NO_MATTER = ORIGIN | PLACES | SIZE | SCHEDULE
"""Settings of an adapter that say nothing of what its numbers mean: their names, shapes and probes do."""


def tune(
    model: str | Path,
    *,
    task: Task | str | None = None,
    data: str | Path | None = None,
    train: str | Path | None = None,
    validation: str | Path | None = None,
    kind: str | None = None,
    text: str | Sequence[str] = (),
    label: str | None = None,
    output: str | Path,
    method: str = "spectral",
    coefficients: str = DEFAULT_COEFFICIENTS,
    bandwidth: int = 1,
    block_size: int = 8,
    scaling: str = DEFAULT_SCALING,
    basis: str = "pretrained",
    leading: Leading | None = None,
    budget: float | None = None,
    rank: int | None = None,
    alpha: float | None = None,
    n_frequency: int | None = None,
    dimension: int | None = None,
    sources: Sequence[str | Path] = (),
    also: Sequence[str] = (),
    basis_seed: int = 0,
    start: str | Path | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
    learning_rate: float | None = None,
    head_learning_rate: float | None = None,
    seed: int = 0,
    train_examples: int | None = None,
    bf16: bool = False,
    gradient_accumulation: int = 1,
    gradient_checkpointing: bool = False,
    packing: bool = False,
    patience: int | None = None,
    progress: bool = True,
    overwrite: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> TuneResult:
    """Tune a model to a task or to a table of yours, score it on held-out rows, and write it to the folder `output`.

    The same seed gives the same result on the same machine. The folder appears when all is done, never half-written.
    A training of more than a minute that was killed goes on where it was when the same call is made again.

    Args:
        model: a folder, a hub id, or `minilm`.
        task: a name that `task_names` gives, or a task of your own; not together with `train`.
        data: folder or file of the task's data; see `load_task`.
        train: a table of yours to train on: a CSV, TSV, JSON lines, Parquet or text file, a folder of them, a data set
            that `save_to_disk` wrote, a folder with one folder of pictures for each class, or a hub id.
        validation: rows to score on; None takes the split `validation` of `train`, else holds a tenth of its rows out.
        kind: `classification`, `regression`, `language`, `instructions` or `images`; None tells it by the columns.
        text: column of text, or two for pairs; by default found by name.
        label: column of labels; by default found by name.
        output: folder of the whole model (methods `full` and `head`) or of the adapter (all others), with
            `tuning.json`, which says how it was made, how it scored and what it cost.
        method: a name in `METHODS`.
        coefficients: `diagonal`, `core`, `band`, `sparse`, `block` or `rotation`. This and the next thirteen are
            options of methods, as in `MethodOptions`; an option that the method does not read is refused.
        bandwidth: largest distance from the diagonal, for `band`.
        block_size: size of a block, for `block` and `rotation`.
        scaling: unit of the coefficients: `absolute`, `relative` or `normalized`.
        basis: `pretrained`, `random`, `minor`, `curvature`, or the path of a basis file.
        leading: directions in each matrix, or the rule that sets them; not together with `budget`. None takes all of
            them up to 1,024, or 64 for `core` and `sparse`.
        budget: share of the model's parameters to train.
        rank: rank or width of what is added to each matrix or layer, from 1.
        alpha: LoRA's scale.
        n_frequency: numbers for each matrix, from 1 (FourierFT).
        dimension: numbers for each matrix (TinyLoRA), or in all (a random subspace), from 1.
        sources: folders of the adapters that AdapterFusion fuses.
        basis_seed: of a `random` basis.
        also: what to train of the backbone besides the coefficients: `biases` of the adapted layers, `norms`; they are
            trained at a fifteenth of the learning rate and saved in the adapter.
        start: an adapter of the same method and size, from whose trained numbers in the backbone training starts.
        steps: optimizer steps, from 1; not together with `epochs`.
        epochs: passes over the training examples, above 0; three where neither is given.
        batch_size: examples in each step, from 1.
        max_length: tokens at which texts are cut; None is 64, or 256 for running text and instructions.
        learning_rate: of what the method trains in the backbone, above 0; None takes the method's.
        head_learning_rate: of the head, above 0; None takes the method's.
        seed: of the head, the order of examples and dropout, from 0.
        train_examples: use only so many training examples.
        bf16: train under bfloat16 autocast, where that is native.
        gradient_accumulation: parts in which each batch goes through the model, to save memory.
        gradient_checkpointing: compute activations again in the backward pass, to save memory.
        packing: put several texts of a batch into one sequence (running text and instructions alone).
        patience: stop after so many of ten validations in a row without a better score, and keep the best; None trains
            to the end.
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
        ('accuracy', 240, True)
    """
    require_extra("tune", "spectralbasis.tune")
    chosen = find_method(method)
    options = chosen.complete(
        MethodOptions(
            coefficients, bandwidth, block_size, scaling, basis, leading, budget, rank, alpha, n_frequency, dimension,
            tuple(str(source) for source in sources), tuple(also), basis_seed,
        )
    )  # fmt: skip
    rates = chosen.learning_rates(learning_rate, head_learning_rate)
    if (task is None) == (train is None):
        raise InputError(
            "give either task with the name of a task, or train with your own data (--task, --train); "
            f"got {'neither' if task is None else 'both'}"
        )
    wanted = Wanted(kind, (text,) if isinstance(text, str) else tuple(text), label)
    if train is None and (wanted != Wanted() or validation is not None):
        raise InputError("validation, kind, text and label go with train, not with the name of a task; leave them out")
    asked = TrainingSettings(
        *rates, steps, epochs, batch_size, max_length or MAX_LENGTH, seed, train_examples, bf16, gradient_accumulation,
        gradient_checkpointing, packing, patience,
    )  # fmt: skip
    check_output(Path(output), overwrite=overwrite)
    record = record_of(task) if isinstance(task, str) else None
    if train is not None:
        read = reading_of_text(model, max_length)
        record = own_record(train, validation, wanted=wanted, seed=seed, **read)
        known = record.load(None)
    else:
        known = task_for(model, load_task(task, data) if isinstance(task, str) else cast(Task, task))
    length = length_for(model, known.kind, max_length)
    settings = replace(asked, max_length=length)
    for sentence in known.notes:
        LOGGER.info(sentence)
    if train_examples is not None:
        known = known.subsample(train_examples, seed)
    loaded = load_model(model, known, seed=seed, max_length=length)
    notes = [*known.notes, *(cut_texts(loaded) if train is not None else ())]
    for sentence in notes[len(known.notes) :]:
        LOGGER.info(sentence)
    with atomic_folder(Path(output)) if is_main_process() else scratch_folder() as folder:
        setup = Setup(loaded, options, folder, settings.total_steps(len(known.train)))
        total = sum(parameter.numel() for parameter in loaded.model.parameters())
        set_seed(seed)
        prepared = chosen.prepare(setup)
        if start is not None:
            start_from(prepared, loaded, chosen, Path(start))
        own_callbacks = chosen.callbacks(prepared)
        judged = known if known.selection is None else replace(known, evaluation=known.selection)
        fitted = fit(
            prepared,
            loaded,
            settings,
            description=f"{known.name}, {method}",
            progress=progress,
            callbacks=[*callbacks, *own_callbacks],
            score=lambda: score_task(prepared, judged, loaded.collator, progress=False),
            kept=None
            if own_callbacks or callbacks
            else kept_training(model, known, output, asdict(settings), asdict(options), method, start),
        )
        if patience is not None and fitted.steps < (planned := settings.total_steps(len(known.train))):
            notes.append(
                f"Training stopped after step {fitted.steps} of {planned}, since {known.headline} was not better in "
                f"{patience} validations in a row; the best numbers are kept."
            )
            LOGGER.info(notes[-1])
        metrics = score_task(prepared, known, loaded.collator, progress=progress)
        selection = None
        if known.selection is not None:
            selection = score_task(prepared, judged, loaded.collator, progress=progress)
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
            steps=fitted.steps,
            seconds=fitted.seconds,
            seconds_per_step=fitted.seconds / fitted.steps,
            seed=seed,
            settings={
                **asdict(settings),
                **{name: getattr(options, name) for name in sorted(chosen.options)},
                **({} if start is None else {"start": str(start)}),
            },
            versions=library_versions(),
            precision=settings.precision,
            selection_metrics=selection,
            layout=known.layout,
            notes=tuple(notes),
        )
        write_json(folder / TUNING_FILE, result.to_dict())
        if isinstance(prepared, PeftModel):
            own = None
            if train is not None and known.layout is not None:
                own = (train if validation is None else validation, bool(known.layout.held_out))
            asks = record.description if record else ""
            write_card(folder, result, loaded, data=data, named=record in BUILT_IN, asks=asks, own=own)
    return result


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for what the processes beside the first would write, which is removed."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def kept_training(
    model: str | Path,
    task: Task,
    output: str | Path,
    settings: Mapping[str, Any],
    options: Mapping[str, Any],
    method: str,
    start: str | Path | None,
) -> Path | None:
    """Where the state of this very training is kept while it runs; None where its data cannot be told from others.

    The name is a checksum of the model's files, the data, all settings and the output. What is older than a month is
    removed.
    """
    if not task.identity:
        return None
    folder = cache_folder() / "training"
    for old in folder.glob("*"):
        with suppress(OSError):
            if time.time() - old.stat().st_mtime > KEPT_FOR:
                shutil.rmtree(old, ignore_errors=True)
    files = sorted(file for file in checked_folder(resolve_source(model)).iterdir() if file.is_file())
    parts = [identity_of(files), task.identity, str(Path(output).absolute()), method, str(start)]
    parts += [json.dumps(one, sort_keys=True, default=str) for one in (settings, options, library_versions())]
    place = folder / checksum(*parts)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError:  # a cache that cannot be written costs time only
        return None
    return place


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
