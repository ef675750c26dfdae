"""The results of tuning and evaluation, and their files: scores, trained numbers, and the model card."""

import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typing_extensions import TypedDict

from spectralbasis.errors import InputError
from spectralbasis.files import atomic_path
from spectralbasis.locations import installed_folder
from spectralbasis.printable import in_code, in_markdown, printable
from spectralbasis.records import Count, Finite, Positive, read_record
from spectralbasis.training.models import LoadedModel, auto_model_of
from spectralbasis.training.tasks import Layout
from spectralbasis.tuner.calibration import in_modules

TUNING_FILE = "tuning.json"
TRAINED_FILE = "adapter_model.safetensors"


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_trained(model: nn.Module, folder: Path) -> None:
    """Write the trained parameters, and nothing else, to `TRAINED_FILE` in the folder."""
    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in trained_parameters(model).items()}
    with atomic_path(folder / TRAINED_FILE) as temporary:
        save_file(tensors, temporary)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder's `TRAINED_FILE`.

    Raises:
        InputError: it is absent or cannot be read.
    """
    try:
        return load_file(folder / TRAINED_FILE)
    except (OSError, SafetensorError) as error:
        raise InputError(f"the weights in {folder} cannot be read: {error}; tune it again, or name another") from error


@torch.no_grad()
def copy_tensors(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Set parameters to the tensors of their names, which were read from a folder.

    Raises:
        InputError: a tensor is missing, or of another shape.
    """
    for name, parameter in parameters.items():
        found = tensors.get(name)
        if found is None or found.shape != parameter.shape:
            there = "is absent there" if found is None else f"of {tuple(found.shape)} there"
            raise InputError(
                f"{folder} does not fit: {name} of {tuple(parameter.shape)} here {there}; "
                "give an adapter of the same model, method and size"
            )
        parameter.copy_(found)


@dataclass(frozen=True)
class ParameterCounts:
    """How many numbers are trained in the backbone and in the head, and how many the adapted model has.

    Examples:
        >>> ParameterCounts(backbone=20, head=5, model=1000).share_backbone
        0.02
    """

    backbone: int
    head: int
    model: int

    @property
    def share_backbone(self) -> float:
        """Trained parameters of the backbone as a fraction of the model's parameters."""
        return self.backbone / self.model

    @property
    def share_head(self) -> float:
        """Trained parameters of the head as a fraction of the model's parameters."""
        return self.head / self.model

    @classmethod
    def of(cls, model: nn.Module, head: Iterable[str], total: int) -> "ParameterCounts":
        """Count the trainable parameters of `model` inside and outside its head modules."""
        trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        in_head = sum(size for name, size in trained.items() if in_modules(name, head))
        return cls(backbone=sum(trained.values()) - in_head, head=in_head, model=total)


@dataclass(frozen=True)
class TuneResult:
    """One tuned model: where it is, how it was made, its scores and what it cost; `tune` returns it.

    Args:
        output: the folder that was written.
        model: what was tuned.
        task: what it was tuned to.
        method: how it was tuned.
        coefficients: which entries were trained; empty for methods without coefficients.
        metric: the task's headline metric.
        score: that metric on the task's evaluation split.
        metrics: all metrics of the task on that split.
        evaluation_split: what the scored examples are called.
        parameters: how many numbers were trained.
        adapter_bytes: size of the weights that were written: coefficients and head, or a whole checkpoint.
        steps: number of optimizer steps.
        seconds: how long they took.
        seconds_per_step: `seconds` divided by `steps`.
        seed: of training.
        settings: of training, with the options of the method.
        versions: of Python and the libraries.
        precision: of the products in training, "float32" or "bf16".
        selection_metrics: on the task's selection split; None where it has none.
        layout: what the columns of the user's table mean; None for other tasks.
        notes: sentences on how the user's table was read.
    """

    output: Path
    model: str
    task: str
    method: str
    coefficients: str
    metric: str
    score: float
    metrics: Mapping[str, float]
    evaluation_split: str
    parameters: ParameterCounts
    adapter_bytes: int
    steps: int
    seconds: float
    seconds_per_step: float
    seed: int
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    precision: str = "float32"
    selection_metrics: Mapping[str, float] | None = None
    layout: Layout | None = None
    notes: tuple[str, ...] = ()

    @property
    def selection_score(self) -> float | None:
        """The headline metric on the selection split, None where there is none."""
        return None if self.selection_metrics is None else self.selection_metrics[self.metric]

    def row(self) -> dict[str, Any]:
        """The row of a table of tuned models, as the report reads it."""
        return {
            **{name: getattr(self, name) for name in ("task", "method", "coefficients", "metric", "score")},
            "parameters_backbone": self.parameters.backbone,
            "parameters_head": self.parameters.head,
            "share_backbone": self.parameters.share_backbone,
            "share_head": self.parameters.share_head,
            **{name: getattr(self, name) for name in ("adapter_bytes", "seconds_per_step", "seed")},
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it; the selection split's scores are absent where there is none."""
        selection = {}
        if self.selection_metrics is not None:
            selection = {"selection_score": self.selection_score, "selection_metrics": dict(self.selection_metrics)}
        own: dict[str, Any] = {}
        if self.layout is not None:
            own = {"layout": asdict(self.layout), "notes": list(self.notes)}
            if self.layout.kind in ("classification", "images"):
                own["id2label"] = {str(number): name for number, name in enumerate(self.layout.label_names)}
        return {
            **self.row(),
            **selection,
            **own,
            "output": str(self.output),
            "model": self.model,
            "metrics": dict(self.metrics),
            "evaluation_split": self.evaluation_split,
            "parameters_model": self.parameters.model,
            "steps": self.steps,
            "precision": self.precision,
            "seconds": self.seconds,
            "settings": dict(self.settings),
            "versions": dict(self.versions),
        }


@dataclass(frozen=True)
class EvaluateResult:
    """The scores of one model, with an adapter or without, on a task's evaluation split; `evaluate` returns it.

    `score` is the headline `metric`, `metrics` are all of them, and `examples` is how many were scored in `seconds`.
    """

    model: str
    adapter: str | None
    task: str
    metric: str
    score: float
    metrics: Mapping[str, float]
    evaluation_split: str
    examples: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        return asdict(self)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write `content` so that no reader sees half of it."""
    with atomic_path(file) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_tuning_table(folder: Path | str, results: Iterable[TuneResult], note: str = "") -> Path:
    """Write `tuning.json`, the table of tuned models that the report of `folder` shows.

    Args:
        folder: of the report.
        results: one for each row.
        note: shown below the table.

    Returns:
        The file.

    Examples:
        >>> import tempfile
        >>> write_tuning_table(tempfile.mkdtemp(), []).name
        'tuning.json'
    """
    file = Path(folder) / TUNING_FILE
    write_json(file, {"rows": [result.row() for result in results], "note": note})
    return file


class StoredSettings(TypedDict, total=False):
    """The settings of `tune` that are read back from `tuning.json`: the length of texts, and `MethodOptions`."""

    max_length: Positive
    coefficients: str
    bandwidth: Positive
    block_size: Positive
    scaling: str
    basis: str
    leading: int | Finite | str | None
    budget: Finite | None
    rank: int | None
    alpha: Finite | None
    n_frequency: int | None
    dimension: int | None
    sources: tuple[str, ...]
    also: tuple[str, ...]
    basis_seed: Count


class StoredLayout(TypedDict):
    """What `Layout` holds."""

    kind: Literal["classification", "regression", "language", "instructions", "images"]
    text: tuple[str, ...]
    label: str | None
    label_names: tuple[str, ...]
    held_out: dict[str, Count]
    center: Finite
    scale: Finite


class StoredTuning(TypedDict, total=False):
    """What is read back of the `tuning.json` that `tune` leaves in its output folder, see `TuneResult.to_dict`."""

    method: str
    settings: StoredSettings
    layout: StoredLayout


def stored(folder: Path) -> StoredTuning:
    """What `tune` left in the tuning.json of its output folder; empty where there is none.

    Raises:
        InputError: it is there and cannot be read.
    """
    file = folder / TUNING_FILE
    return read_record(file, StoredTuning, "restore it, or tune again") if file.exists() else {}


_SHOWN = 50
"""Up to so many names of classes stand in a card's code."""
CARD = """\
---
library_name: peft
tags:
- spectralbasis
- {method_tag}
---
# {task_text} adapter ({title})

An adapter for {model_code}, trained on {task_text}{asks} with spectralbasis {version}.

| | |
| --- | --- |
| {metric_text} on {split} | {score:.4f} |
| trained parameters in the backbone | {backbone:,} ({share_backbone:.4%} of the model) |
| trained parameters in the head | {head:,} ({share_head:.4%} of the model) |
| size of the weights | {size:,} bytes |
| steps, batch size, seed | {steps}, {batch_size}, {seed} |

All settings and scores are in `tuning.json`.

## Use

Score it, from within its folder:

{scoring}

Open it with PEFT, from within its folder:

```python
import spectralbasis  # registers the method with PEFT
from peft import PeftModel
from {module} import {auto_model}

base = {auto_model}.from_pretrained({place}{arguments})
model = PeftModel.from_pretrained(base, ".")
```
"""


def write_card(
    folder: Path,
    result: TuneResult,
    loaded: LoadedModel,
    *,
    data: str | Path | None,
    named: bool,
    asks: str = "",
    own: tuple[str | Path, bool] | None = None,
) -> None:
    """Write `README.md` for the adapter in `folder`, in place of PEFT's template; its commands run as printed.

    Args:
        folder: of the adapter.
        result: of tuning.
        loaded: the model that was tuned, with its task.
        data: folder of the task's data, as it was given.
        named: whether the command line knows the task by its name.
        asks: what the task asks, in a few words.
        own: the user's table that holds the scored rows, and whether `tune` held them out of it.
    """
    auto_model = auto_model_of(loaded.task)
    module = auto_model.__module__ if auto_model.__module__.startswith("spectralbasis") else "transformers"
    model = result.model if installed_folder(result.model) else _whole_path(result.model)
    if own is not None:
        table, held_out = own
        command = ["spectralbasis", "evaluate", model, ".", "--test", _whole_path(str(table), folder=False)]
        command += ["--held-out"] if held_out else []
        scoring = f"```\n{' '.join(shlex.quote(printable(word)) for word in command)}\n```"
    elif named:
        command = ["spectralbasis", "evaluate", model, ".", "--task", result.task]
        command += [] if data is None else ["--data", str(Path(data).absolute())]
        scoring = f"```\n{' '.join(shlex.quote(printable(word)) for word in command)}\n```"
    else:
        scoring = f'```python\nimport spectralbasis\n\nspectralbasis.evaluate({json.dumps(model)}, ".", task=task)\n```'
        scoring += "\n\nwhere `task` is the `spectralbasis.training.Task` that it was tuned to."
    names = loaded.task.label_names
    labels = f", num_labels={len(names)}, ignore_mismatched_sizes=True"
    if loaded.task.layout is not None and loaded.task.kind == "classification" and len(names) <= _SHOWN:
        shown = ", ".join(f"{number}: {json.dumps(name)}" for number, name in enumerate(names))
        labels = f", id2label={{{shown}}}, ignore_mismatched_sizes=True"
    card = CARD.format(
        **{**result.settings, **vars(result)},
        title=in_markdown(f"{result.method}, {result.coefficients}" if result.coefficients else result.method),
        task_text=in_markdown(result.task),
        asks=f" ({in_markdown(asks)})" if asks else "",
        metric_text=in_markdown(result.metric),
        model_code=in_code(result.model),
        method_tag=json.dumps(result.method),
        scoring=scoring,
        version=result.versions["spectralbasis"],
        split=in_markdown(result.evaluation_split),
        backbone=result.parameters.backbone,
        head=result.parameters.head,
        share_backbone=result.parameters.share_backbone,
        share_head=result.parameters.share_head,
        size=result.adapter_bytes,
        module=module,
        auto_model=auto_model.__name__,
        place=json.dumps(_whole_path(loaded.model.config.name_or_path)),
        arguments=labels if loaded.task.num_labels else "",
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _whole_path(model: str, *, folder: bool = True) -> str:
    """A folder, or a file too, on this machine by its whole path; a hub id as it is."""
    path = Path(model)
    return str(path.absolute()) if path.is_dir() or (not folder and path.exists()) else model
