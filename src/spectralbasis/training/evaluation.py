"""Score a model on the evaluation split of a task, and open a tuned model for it."""

import math
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional

from spectralbasis.errors import InputError, SpectralBasisError
from spectralbasis.extras import require_extra
from spectralbasis.printable import track
from spectralbasis.training.collators import IGNORED, Collator, MaskingCollator
from spectralbasis.training.folder_checks import adapter_config, described
from spectralbasis.training.known_tasks import load_task
from spectralbasis.training.methods import METHODS, MethodOptions, Setup
from spectralbasis.training.models import LoadedModel, load_model, try_out
from spectralbasis.training.outcomes import (
    TRAINED_FILE,
    EvaluateResult,
    copy_tensors,
    read_tensors,
    stored,
    trained_parameters,
)
from spectralbasis.training.tasks import LIKELIHOOD_METRICS, Task, batches, score
from spectralbasis.tuner.calibration import in_modules  # importing the tuner makes PEFT know its method

if TYPE_CHECKING:
    from datasets import Dataset

BATCH_SIZE = 64
MAX_LENGTH = 64
"""Tokens at which texts are cut, where nothing else is asked for."""


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

    Args:
        model: a folder, a hub id or `minilm`; a fully tuned model, or the base of the adapter.
        adapter: folder of an adapter that `tune` or PEFT wrote; None scores the model's own head.
        task: a name that `task_names` gives, or a task of your own.
        data: folder or file of the task's data; see `load_task`.
        max_length: tokens at which texts are cut; None takes that of the tuning.
        progress: draw a bar on stderr.

    Returns:
        The task's metrics, each in the range of its definition in `tasks`, and the seconds it took.

    Raises:
        InputError: the model, the adapter or the data cannot be used, or the extra `tune` is not installed.
        BaseMismatchError: the adapter was trained on another base.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from spectralbasis.training import tune
        >>> from spectralbasis.training.quickstart import save_untrained
        >>> folder = Path(tempfile.mkdtemp())
        >>> options = {"task": "digits-parity", "progress": False}
        >>> tuned = tune(save_untrained(folder / "vit"), output=folder / "head", method="head", steps=2, **options)
        >>> evaluate(folder / "head", **options).score == tuned.score
        True
    """
    require_extra("tune", "spectralbasis.evaluate")
    started = time.perf_counter()
    chosen = load_task(task, data) if isinstance(task, str) else task
    tuned = Path(adapter or model)
    record = stored(tuned)
    length = record.get("settings", {}).get("max_length", MAX_LENGTH) if max_length is None else max_length
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
    record = stored(adapter)
    method = METHODS.get(str(record.get("method")))
    if method is not None and method.writes == "trained" and (adapter / TRAINED_FILE).is_file():
        settings: Mapping[str, Any] = record.get("settings", {})
        given = {field.name: settings[field.name] for field in fields(MethodOptions) if field.name in settings}
        model = method.prepare(Setup(loaded, method.complete(MethodOptions(**given)), adapter))
        copy_tensors(trained_parameters(model), read_tensors(adapter), adapter)
        return model
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
            f"the adapter {adapter} has no head for {loaded.task.name}, so its scores would be random; train it with "
            f"modules_to_save={list(loaded.head)}"
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
    model: nn.Module, examples: "Dataset", collator: Collator, *, progress: bool = False
) -> tuple[NDArray[Any], NDArray[Any]]:
    """The model's outputs of shape (N, labels) for the examples, and their labels of shape (N,)."""
    found = [(logits.float(), labels) for logits, labels in _outputs(model, examples, collator, progress)]
    logits, references = (torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True))
    return logits, references


@torch.inference_mode()
def masked_token_scores(
    model: nn.Module, examples: "Dataset", collator: MaskingCollator, *, progress: bool = False
) -> dict[str, float]:
    """How the model predicts the hidden tokens of all examples.

    `log_likelihood` is the mean over hidden tokens of log p(token), in nats: at most 0, and larger is better.
    `perplexity` is exp(-log_likelihood), and `accuracy` the share of tokens that the model predicts as the likeliest.
    """
    total, hits, tokens = 0.0, 0, 0
    for outputs, labels in _outputs(model, examples, collator, progress):
        hidden = labels != IGNORED
        logits, wanted = outputs[hidden].float(), labels[hidden]
        total -= float(functional.cross_entropy(logits, wanted, reduction="sum"))
        hits += int((logits.argmax(1) == wanted).sum())
        tokens += len(wanted)
    mean = total / tokens
    return dict(zip(LIKELIHOOD_METRICS, (mean, math.exp(-mean), hits / tokens), strict=True))


def _outputs(
    model: nn.Module, examples: "Dataset", collator: Collator, progress: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """The logits and the labels of one batch after another."""
    model.eval()
    device = next(model.parameters()).device
    total = math.ceil(len(examples) / BATCH_SIZE)
    for rows in track(batches(examples, BATCH_SIZE), "evaluating", total=total, enabled=progress):
        batch = {name: tensor.to(device) for name, tensor in collator(rows).items()}
        labels = batch.pop("labels")
        yield model(**batch).logits, labels
