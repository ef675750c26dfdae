"""Score a model on the evaluation split of a task, and open a tuned model for it."""

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional

from spectralbasis.errors import InputError, SpectralBasisError
from spectralbasis.extras import require_extra
from spectralbasis.locations import check_folders
from spectralbasis.printable import track
from spectralbasis.records import read_record
from spectralbasis.training.collators import (
    IGNORED,
    CausalCollator,
    Collator,
    MaskingCollator,
    TextCollator,
    load_tokenizer,
)
from spectralbasis.training.folder_checks import CONFIG, adapter_config, described
from spectralbasis.training.known_tasks import load_task
from spectralbasis.training.methods import METHODS, MethodOptions, Setup
from spectralbasis.training.models import (
    LoadedModel,
    checked_folder,
    load_model,
    resolve_source,
    task_for,
    try_out,
    writes_text,
)
from spectralbasis.training.outcomes import (
    TRAINED_FILE,
    TUNING_FILE,
    EvaluateResult,
    StoredTuning,
    copy_tensors,
    read_tensors,
    stored,
    trained_parameters,
)
from spectralbasis.training.own_tasks import Wanted, find_layout, scored_task, token_cutter
from spectralbasis.training.table_files import Table, open_tables
from spectralbasis.training.tasks import LANGUAGE_KINDS, LIKELIHOOD_METRICS, Layout, Task, batches, score
from spectralbasis.tuner.calibration import in_modules  # importing the tuner makes PEFT know its method

if TYPE_CHECKING:
    from datasets import Dataset

LOGGER = logging.getLogger(__name__)
BATCH_SIZE = 64
TOKEN_BATCH = 8
"""Rows at once where each of their tokens gets as many numbers as the vocabulary has tokens."""
MAX_LENGTH = 64
"""Tokens at which texts are cut, where nothing else is asked for."""
TEXT_LENGTH = 256
"""The same for running text and instructions, where the model reads as many."""
SAMPLE = 1000
"""Texts of which the length is looked at."""


def evaluate(
    model: str | Path,
    adapter: str | Path | None = None,
    *,
    task: Task | str | None = None,
    data: str | Path | None = None,
    test: str | Path | None = None,
    held_out: bool = False,
    kind: str | None = None,
    text: str | Sequence[str] = (),
    label: str | None = None,
    max_length: int | None = None,
    progress: bool = True,
) -> EvaluateResult:
    """Score a tuned model, or a base model with an adapter, on a task's evaluation split or on a table, in float32.

    Args:
        model: a folder, a hub id or `minilm`; a fully tuned model, or the base of the adapter.
        adapter: folder of an adapter that `tune` or PEFT wrote; None scores the model's own head.
        task: a name that `task_names` gives, or a task of your own; not together with `test`.
        data: folder or file of the task's data; see `load_task`.
        test: a table of yours, or hub id of a data set; labels that the model does not know are refused.
        held_out: score only those rows that `tune` held out of this table.
        kind: what the table is for; None takes that of the tuning, as for the next two.
        text: columns of text in the table.
        label: column of labels in the table.
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
    if (task is None) == (test is None):
        raise InputError("neither a task nor test data were given; give one" if task is None else "both a task and "
                         "test data were given; give one of them")  # fmt: skip
    if held_out and test is None:
        raise InputError("held_out goes with test, the table that was tuned on; give it, or leave out held_out")
    if test is not None:
        check_folders([Path(adapter) if adapter else None])
    tuned = Path(adapter or model)
    record = stored(tuned)
    length = record.get("settings", {}).get("max_length") if max_length is None else max_length
    if test is not None:
        layout = layout_of(model, record, Wanted(kind, (text,) if isinstance(text, str) else tuple(text), label), test)
        cutting = reading_of_text(model, length) if layout.kind in ("language", "instructions") else {}
        chosen = scored_task(test, layout, held_out=held_out, **cutting)
        for sentence in chosen.notes:
            LOGGER.info(sentence)
    else:
        chosen = task_for(model, load_task(task, data) if isinstance(task, str) else cast(Task, task))
    loaded = load_model(model, chosen, head="fresh" if adapter else "stored",
                        max_length=length_for(model, chosen.kind, length))  # fmt: skip
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


def layout_of(
    model: str | Path, record: StoredTuning, wanted: Wanted, table: str | Path | Table, *, labelled: bool = True
) -> Layout:
    """How a table is read for a model: as the record of its tuning says, with the changes that are wanted.

    Raises:
        InputError: there is no such record, and neither the table nor the model tells what its columns and classes are.
    """
    if "layout" in record:
        kept = Layout(**record["layout"])
        if wanted.kind not in (None, kept.kind):
            raise InputError(f"the model was tuned for {kept.kind}, not for {wanted.kind}; leave out the kind")
        return replace(kept, text=wanted.text or kept.text, label=wanted.label or kept.label)
    opened = table if isinstance(table, Table) else next(iter(open_tables(table).values()))
    found = find_layout(opened, wanted, labelled=labelled)
    if found.kind in ("language", "instructions"):
        return found
    if not labelled and found.kind == "" and writes_text(model):
        return replace(found, kind="language", text=found.text[:1])
    config = checked_folder(resolve_source(model)) / CONFIG
    names = read_record(config, dict[str, Any]).get("id2label")
    if isinstance(names, dict) and len(names) > 1 and found.kind in ("", "classification", "images"):
        ordered = tuple(str(names[key]) for key in sorted(names, key=lambda key: (len(key), key)))
        return replace(found, kind=found.kind or "classification", label_names=ordered)
    raise InputError(
        f"nothing says which labels {model} has: there is no {TUNING_FILE} of a tuning on a table, and no id2label "
        "with two or more classes in config.json; give a model or an adapter that tune --train wrote"
    )


def reading_of_text(model: str | Path, length: int | None) -> dict[str, Any]:
    """How running text is read for a model: whether each next token is predicted, and what cuts texts into pieces.

    The tokenizer is read when the first text is cut: a model of pictures has none.
    """
    folder = checked_folder(resolve_source(model))

    @lru_cache(maxsize=1)
    def cutter() -> Callable[[str], list[str]]:
        return token_cutter(load_tokenizer(folder), length_for(model, "causal_language", length))

    return {"causal": writes_text(model), "cut": lambda text: cutter()(text)}


def length_for(model: str | Path, kind: str, length: int | None) -> int:
    """The tokens at which texts are cut: those asked for, else 64, or 256 where tokens are predicted.

    The limit of the model or of its tokenizer holds where it is less and nothing is asked for.
    """
    if length is not None:
        return length
    usual = TEXT_LENGTH if kind in LANGUAGE_KINDS and kind != "masked_language" else MAX_LENGTH
    folder = checked_folder(resolve_source(model))
    config, texts = folder / CONFIG, folder / "tokenizer_config.json"
    found = read_record(config, dict[str, Any])
    limits = [found.get("max_position_embeddings"), found.get("n_positions")]
    if texts.is_file():
        limits.append(read_record(texts, dict[str, Any]).get("model_max_length"))
    return int(min([usual, *(limit for limit in limits if isinstance(limit, int | float) and limit > 1)]))


def cut_texts(loaded: LoadedModel) -> list[str]:
    """What share of the training texts is cut, by a sample, as a sentence; nothing where none is."""
    collator, rows = loaded.collator, loaded.task.train
    if not isinstance(collator, TextCollator | CausalCollator) or loaded.task.kind == "causal_language":
        return []
    sample = rows.select(range(0, len(rows), max(1, len(rows) // SAMPLE)))
    longest, over = 0, 0
    for (row,) in batches(sample, 1):
        if isinstance(collator, CausalCollator):
            tokens = len(collator.tokens(row)[0])
        else:
            texts = [row[column] for column in collator.columns]
            tokens = len(collator.tokenizer(*texts, verbose=False)["input_ids"])
        longest, over = max(longest, tokens), over + (tokens > collator.max_length)
    if not over:
        return []
    return [
        f"About {over / len(sample):.0%} of the texts are longer than {collator.max_length} tokens (the longest of "
        f"{len(sample)} has {longest:,}) and are cut there; pass --max-length to read more."
    ]


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
    if isinstance(collator, MaskingCollator | CausalCollator):
        return token_scores(model, task.evaluation, collator, progress=progress)
    outputs, references = all_outputs(model, task.evaluation, collator, progress=progress)
    predictions = outputs[:, 0] if task.kind == "regression" else outputs.argmax(1)
    return score(predictions, references, task.metrics)


@torch.inference_mode()
def all_outputs(
    model: nn.Module, examples: "Dataset", collator: Collator, *, progress: bool = False
) -> tuple[NDArray[Any], NDArray[Any]]:
    """The model's outputs of shape (N, labels) for the examples, and their labels of shape (N,)."""
    found = [(logits.float(), labels) for logits, labels in _outputs(model, examples, collator, progress)]
    logits, references = (torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True))
    return logits, references


@torch.inference_mode()
def token_scores(
    model: nn.Module, examples: "Dataset", collator: MaskingCollator | CausalCollator, *, progress: bool = False
) -> dict[str, float]:
    """How the model predicts the hidden tokens, or each next token, of all examples.

    `log_likelihood` is the mean over predicted tokens of log p(token), in nats: at most 0, and larger is better.
    `perplexity` is exp(-log_likelihood), and `accuracy` the share of tokens that the model predicts as the likeliest.
    """
    total, hits, tokens = 0.0, 0, 0
    causal = isinstance(collator, CausalCollator)
    for outputs, labels in _outputs(model, examples, collator, progress, TOKEN_BATCH if causal else BATCH_SIZE):
        if causal:  # a position predicts the token after it
            outputs, labels = outputs[:, :-1], labels[:, 1:]
        hidden = labels != IGNORED
        logits, wanted = outputs[hidden].float(), labels[hidden]
        total -= float(functional.cross_entropy(logits, wanted, reduction="sum"))
        hits += int((logits.argmax(1) == wanted).sum())
        tokens += len(wanted)
    mean = total / tokens
    return dict(zip(LIKELIHOOD_METRICS, (mean, math.exp(-mean), hits / tokens), strict=True))


def _outputs(
    model: nn.Module, examples: "Dataset", collator: Collator, progress: bool, size: int = BATCH_SIZE
) -> Iterator[tuple[Tensor, Tensor]]:
    """The logits and the labels of one batch after another."""
    model.eval()
    device = next(model.parameters()).device
    total = math.ceil(len(examples) / size)
    for rows in track(batches(examples, size), "evaluating", total=total, enabled=progress):
        batch = {name: tensor.to(device) for name, tensor in collator(rows).items()}
        labels = batch.pop("labels")
        yield model(**batch).logits, labels
