"""Reading back what methods that PEFT does not know have trained.

Scoring a model on a task's evaluation split, and reading a tuned one back to do so.
"""

import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from peft import PeftModel
from torch import nn

from spectralbasis.errors import InputError, SpectralBasisError
from spectralbasis.printable import track
from spectralbasis.training.collators import Collator, MaskingCollator
from spectralbasis.training.handing_over import adapter_config, try_out
from spectralbasis.training.messages import described
from spectralbasis.training.method import MethodOptions, Setup
from spectralbasis.training.methods import METHODS
from spectralbasis.training.models import LoadedModel, load_model
from spectralbasis.training.outcomes import (
    TRAINED_FILE,
    EvaluateResult,
    copy_tensors,
    read_tensors,
    stored,
    stored_settings,
    trained_parameters,
)
from spectralbasis.training.tasks import Task, batches, load_task, score
from spectralbasis.training.text_tasks import masked_token_scores
from spectralbasis.tuner.calibration import in_modules  # importing the tuner makes PEFT know its method


def holds_trained(folder: Path) -> bool:
    """Whether the folder holds the trained parameters alone, of a method that its `tuning.json` names."""
    method = METHODS.get(str(stored(folder).get("method")))
    return method is not None and method.writes == "trained" and (folder / TRAINED_FILE).is_file()


def restore_trained(loaded: LoadedModel, folder: Path) -> nn.Module:
    """The loaded model as its method prepared it, with the trained parameters of the folder.

    Raises:
        InputError: the folder's files do not fit each other or the model.
    """
    record = stored(folder)
    method = METHODS[record["method"]]
    options = method.complete(_options(record.get("settings", {}), folder))
    model = method.prepare(Setup(loaded, options, folder))
    copy_tensors(trained_parameters(model), read_tensors(folder), folder)
    return model


def _options(settings: Mapping[str, Any], folder: Path) -> MethodOptions:
    known = {field.name: settings[field.name] for field in fields(MethodOptions) if field.name in settings}
    try:
        return MethodOptions(**known)
    except TypeError as error:
        raise InputError(f"the settings in {folder} cannot be read: {error}; tune it again") from error


BATCH_SIZE = 64
MAX_LENGTH = 64


def evaluate(
    model: str | Path,
    adapter: str | Path | None = None,
    *,
    task: Task | str,
    data: str | Path | None = None,
    max_length: int | None = None,
    progress: bool = True,
) -> EvaluateResult:
    """Score a tuned model, or a base model with an adapter, on the task's evaluation split, in float32.

    `max_length` defaults to that of the tuning.

    Raises:
        InputError: the model, the adapter or the data cannot be used.
        BaseMismatchError: the adapter was trained on another base.
    """
    started = time.perf_counter()
    chosen = load_task(task, data) if isinstance(task, str) else task
    tuned = Path(adapter or model)
    length = stored_settings(tuned).get("max_length", MAX_LENGTH) if max_length is None else max_length
    loaded = load_model(model, chosen, head="fresh" if adapter else "stored", max_length=length)
    scored = attach_adapter(loaded, tuned) if adapter else loaded.model
    metrics = score_task(scored, chosen, loaded.collator, progress=progress)
    return EvaluateResult(
        model=str(model),
        adapter=str(adapter) if adapter else None,
        task=chosen.name,
        metric=chosen.headline,
        score=metrics[chosen.headline],
        metrics=metrics,
        evaluation_split=chosen.evaluation_split,
        examples=len(chosen.evaluation),
        seconds=time.perf_counter() - started,
    )


def attach_adapter(loaded: LoadedModel, adapter: Path) -> nn.Module:
    """The loaded model with the adapter of a folder, which must carry a head.

    Raises:
        InputError: the folder holds no adapter, or one that does not fit the model or brings no head for it.
        BaseMismatchError: the adapter was trained on another base.
    """
    if holds_trained(adapter):
        return restore_trained(loaded, adapter)
    if not (adapter / "adapter_config.json").is_file():
        raise InputError(
            f"{adapter} has no adapter_config.json; give the folder of an adapter, "
            "or give a fully tuned model as MODEL, without an adapter"
        )
    config = adapter_config(adapter, loaded.model)
    try:
        with warnings.catch_warnings():
            # PEFT only warns, and the model would be scored as if nothing had been trained.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted = PeftModel.from_pretrained(loaded.model, str(adapter), config=config)
    except SpectralBasisError:
        raise
    except Exception as error:  # PEFT raises all kinds
        raise InputError(f"the adapter {adapter} does not fit {loaded.source}: {described(error)}") from error
    if loaded.head and not any(
        "modules_to_save" in name and in_modules(name, loaded.head) for name, _ in adapted.named_parameters()
    ):
        raise InputError(
            f"the adapter {adapter} brings no head for {loaded.task.name}, so its scores would be chance; "
            f"train it with modules_to_save={list(loaded.head)}"
        )
    try_out(adapted, loaded.task, loaded.collator, adapter)
    return adapted


def score_task(model: nn.Module, task: Task, collator: Collator, *, progress: bool) -> dict[str, float]:
    """The task's metrics of the model's predictions on the evaluation split."""
    if isinstance(collator, MaskingCollator):
        return masked_token_scores(model, task.evaluation, collator, progress=progress)
    outputs, references = predict(model, task.evaluation, collator, progress=progress)
    predictions = outputs[:, 0] if task.kind == "regression" else outputs.argmax(1)
    return score(predictions, references, task.metrics)


@torch.inference_mode()
def predict(
    model: nn.Module, examples: Dataset, collator: Collator, *, progress: bool = False
) -> tuple[NDArray[Any], NDArray[Any]]:
    """The model's outputs of shape (N, labels) for the examples, and their labels of shape (N,)."""
    model.eval()
    device = next(model.parameters()).device
    outputs, references = [], []
    total = math.ceil(len(examples) / BATCH_SIZE)
    for rows in track(batches(examples, BATCH_SIZE), "evaluating", total=total, enabled=progress):
        batch = collator(rows)
        references.append(batch.pop("labels").numpy())
        logits = model(**{name: tensor.to(device) for name, tensor in batch.items()}).logits
        outputs.append(logits.float().cpu().numpy())
    return np.concatenate(outputs), np.concatenate(references)
