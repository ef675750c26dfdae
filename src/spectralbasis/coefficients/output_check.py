"""Run two models on the texts of a file and tell how far their outputs differ."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spectralbasis.checkpoints.adapters import ADAPTER_CONFIG
from spectralbasis.checkpoints.opening import Source
from spectralbasis.coefficients.architectures import quiet
from spectralbasis.errors import InputError
from spectralbasis.peft_import import register_now
from spectralbasis.records import parse_json

TEXT = "text"
"""Name of the column."""
BATCH = 8
LONGEST = 512
"""Tokens of a text that are run, at most."""


@dataclass(frozen=True)
class OutputChange:
    """How far the outputs of base and adapter are from those of the finetuned model.

    Attributes:
        texts: how many were run.
        output: "logits" or "last_hidden_state": what was compared.
        largest: largest difference of one number.
        mean: mean of all differences.
        mean_of_base: the same between the finetuned model and the base without the adapter.
        scale: mean size of the finetuned model's numbers.
        agreement: share of the texts, or of their tokens, for which the largest logit is that of the same class or
            token; None where there are no logits.
    """

    texts: int
    output: str
    largest: float
    mean: float
    mean_of_base: float
    scale: float
    agreement: float | None


def read_texts(file: str | Path) -> list[str]:
    """The column `text` of a CSV file (.csv) or of JSON lines (.jsonl, .json).

    Raises:
        InputError: the file is of another kind, has no such column, or a row has no text in it.
    """
    path = Path(file)
    if path.suffix.lower() not in (".csv", ".jsonl", ".json"):
        raise InputError(f"{path} has the suffix {path.suffix!r}, expected .csv or .jsonl; pass a file of one of these")
    try:
        rows = list(_csv_rows(path) if path.suffix.lower() == ".csv" else _json_rows(path))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; name a file with a column {TEXT}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 ({error}); save it in UTF-8") from error
    texts = []
    for number, row in rows:
        if TEXT not in row:
            raise InputError(
                f"{path}, row {number} has no column {TEXT!r}; it has {', '.join(map(str, row)) or 'none'}"
            )
        if not isinstance(row[TEXT], str) or not row[TEXT].strip():
            raise InputError(f"{path}, row {number} has no text in the column {TEXT!r}; remove the row")
        texts.append(row[TEXT])
    if not texts:
        raise InputError(f"{path} holds no rows; pass a file with at least one text")
    return texts


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import csv

    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            yield from enumerate(csv.DictReader(file, strict=True), 1)
        except csv.Error as error:
            raise InputError(f"{path} is not a CSV file ({error}); save it again") from error


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                row = parse_json(line, f"{path}, line {number}")
                if not isinstance(row, dict):
                    raise InputError(f"{path}, line {number} is not an object; write one for each text: {{'text': …}}")
                yield number, row


def check_outputs(base: Source, tuned: Source, adapter: Path, texts: Sequence[str], architecture: str) -> OutputChange:
    """Run the finetuned model, the base, and the base with the adapter on texts.

    Args:
        base: folder or hub id of the base.
        tuned: folder or hub id of the finetuned model, or folder of an adapter of the base.
        adapter: folder of the extracted adapter.
        texts: at least one.
        architecture: class of transformers to load them as.

    Raises:
        InputError: transformers cannot load them, or they have no tokenizer.
    """
    from peft import PeftModel

    register_now()
    if not isinstance(base, str | Path) or not isinstance(tuned, str | Path):
        raise InputError("check needs models in folders, or hub ids: save both with save_pretrained")
    over_base = (Path(tuned) / ADAPTER_CONFIG).is_file()
    labels = _labels(adapter)
    tokenizer = _tokenizer([str(tuned), str(base)])
    try:
        wanted = _outputs(
            PeftModel.from_pretrained(_load(base, architecture, labels), str(tuned))
            if over_base
            else _load(tuned, architecture, {}),
            tokenizer,
            texts,
        )
        plain = _outputs(_load(base, architecture, labels), tokenizer, texts)
        adapted = _outputs(PeftModel.from_pretrained(_load(base, architecture, labels), str(adapter)), tokenizer, texts)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the models cannot be run on the texts of check ({error}); leave out --check") from error
    output, tuned_values = wanted
    differences = [(a - b).abs() for a, b in zip(tuned_values, adapted[1], strict=True)]
    base_differences = [(a - b).abs() for a, b in zip(tuned_values, plain[1], strict=True)]
    same = [(a.argmax(-1) == b.argmax(-1)).float() for a, b in zip(tuned_values, adapted[1], strict=True)]
    return OutputChange(
        texts=len(texts),
        output=output,
        largest=max(float(one.max()) for one in differences),
        mean=_mean(differences),
        mean_of_base=_mean(base_differences),
        scale=_mean([values.abs() for values in tuned_values]),
        agreement=_mean(same) if output == "logits" else None,
    )


def _labels(adapter: Path) -> dict[str, Any]:
    """How many labels the adapter's head has, as an argument for transformers; empty where it has no head."""
    from safetensors import safe_open

    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        heads = [
            file.get_slice(name).get_shape()[0]
            for name in file.keys()  # noqa: SIM118
            if name.removeprefix("base_model.model.").startswith(("classifier.", "score.")) and name.endswith("weight")
        ]
    return {"num_labels": min(heads)} if heads else {}


def _load(source: str | Path, architecture: str, labels: dict[str, Any]) -> nn.Module:
    import transformers

    found = getattr(transformers, architecture, None) if architecture else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise InputError(
            f"transformers {transformers.__version__} does not know the class {architecture or '(none is named)'}; "
            "leave out check (--check), since the models cannot be run"
        )
    model: Any = found
    with quiet():
        loaded: nn.Module = model.from_pretrained(
            str(source), dtype=torch.float32, trust_remote_code=False, use_safetensors=True, **labels
        )
    return loaded.eval()


def _tokenizer(sources: Sequence[str]) -> Any:
    from transformers import AutoTokenizer

    reason: Exception | None = None
    for source in sources:
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = error
            continue
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer
    raise InputError(f"neither {' nor '.join(sources)} has a tokenizer ({reason}); save the tokenizer beside the model")


@torch.no_grad()
def _outputs(model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> tuple[str, list[Tensor]]:
    """What is put out, and its values for each batch, without those of padding."""
    model.eval()
    config: Any = getattr(model, "config", None)
    longest = min(LONGEST, getattr(config, "max_position_embeddings", None) or LONGEST, tokenizer.model_max_length)
    if tokenizer.pad_token_id is not None and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id
    values, name = [], ""
    for start in range(0, len(texts), BATCH):
        batch = tokenizer(
            list(texts[start : start + BATCH]), padding=True, truncation=True, max_length=longest, return_tensors="pt"
        )
        found = model(**batch)
        name = "logits" if getattr(found, "logits", None) is not None else "last_hidden_state"
        output: Tensor = getattr(found, name).float()
        mask = batch["attention_mask"].bool()
        values.append(output[mask] if output.shape[:2] == mask.shape else output)
    return name, values


def _mean(parts: Sequence[Tensor]) -> float:
    return float(sum(float(part.double().sum()) for part in parts) / sum(part.numel() for part in parts))
