"""Opening a pretrained model with a head for a task."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from spectralbasis.errors import InputError
from spectralbasis.study.messages import quiet_transformers
from spectralbasis.study.models.collators import Collator
from spectralbasis.study.models.handing_over import check_size, reading, try_out
from spectralbasis.study.models.limu_bert import AutoModelForSignalClassification
from spectralbasis.study.models.preprocessing import load_collator
from spectralbasis.study.models.sources import checked_folder, resolve_source
from spectralbasis.study.tasks.task import Task
from spectralbasis.tuner.optimization import in_modules

AUTO_MODELS = {
    "text": AutoModelForSequenceClassification,
    "image": AutoModelForImageClassification,
    "signal": AutoModelForSignalClassification,
}


@dataclass(frozen=True)
class LoadedModel:
    """A model with a head for one task, what turns the task's rows into its inputs, and which modules are its head.

    `head` names the modules that no pretraining shaped: those beside the backbone, and a pooler whose weights the
    checkpoint lacks. It is empty where a checkpoint comes with what fills in masked words.
    """

    source: str
    task: Task
    model: PreTrainedModel
    collator: Collator
    head: tuple[str, ...]

    def save(self, folder: Path) -> None:
        """Write the model, and its tokenizer or image settings, as a folder that `load_model` opens."""
        self.model.save_pretrained(folder, safe_serialization=True)
        self.collator.save(folder)


def load_model(
    source: str | Path,
    task: Task,
    *,
    head: Literal["fresh", "stored"] = "fresh",
    seed: int = 0,
    max_length: int = 64,
) -> LoadedModel:
    """Open a model folder, a hub id or `minilm` in float32, with a head for the task.

    A fresh head is drawn from the seed alone, even where the checkpoint has one; a stored one is taken as it is. What
    fills in masked words is no task's own, and is drawn only where the checkpoint lacks it. Code in a checkpoint is
    never run.

    Raises:
        InputError: the model, its tokenizer or a stored head is absent or cannot be read, its kind does not suit the
            task, or `max_length` is more than it can read.
    """
    place = resolve_source(source)
    folder = checked_folder(place)
    with quiet_transformers():
        config = _load_config(place, folder, task)
        collator = load_collator(folder, config, task, max_length)
        with torch.random.fork_rng(devices=[]):
            check_size(folder, config, auto_model_of(task).from_config)
            torch.manual_seed(seed)
            model, unusable = _load_weights(place, folder, config, task)
            beside = _beside_backbone(model)
            poolers = _poolers(place, model, [name for name in unusable if not in_modules(name, beside)])
            if task.kind == "masked_language" and not unusable:
                beside = ()
            if head == "stored":
                _require_stored_head(place, task, unusable)
            else:
                _reinitialise(model, beside)
    try_out(model.float(), task, collator, place)
    return LoadedModel(str(source), task, model, collator, (*beside, *poolers))


def auto_model_of(task: Task) -> Any:
    """The class of transformers, or in its manner, that opens models for the task."""
    return AutoModelForMaskedLM if task.kind == "masked_language" else AUTO_MODELS[task.modality]


def _load_config(place: str, folder: Path, task: Task) -> PretrainedConfig:
    with reading(place, "model"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **_labels_of(task))
    if type(config) not in auto_model_of(task)._model_mapping:
        work = "fill in masked words" if task.kind == "masked_language" else f"classify {task.modality}s"
        raise InputError(
            f"{place} is a {config.model_type} model, which does not {work}; the task {task.name} needs one that does"
        )
    config.architectures = []  # else a kind with several classes gets the checkpoint's, such as one for inference alone
    return config


def _labels_of(task: Task) -> dict[str, Any]:
    if task.kind == "masked_language":
        return {}
    return {
        "id2label": dict(enumerate(task.label_names)),
        "label2id": {name: number for number, name in enumerate(task.label_names)},
        "problem_type": "regression" if task.kind == "regression" else "single_label_classification",
    }


def _load_weights(place: str, folder: Path, config: PretrainedConfig, task: Task) -> tuple[PreTrainedModel, list[str]]:
    """The model, and the names of the weights that the checkpoint lacks or has in another shape."""
    with reading(place, "model"):
        model, report = auto_model_of(task).from_pretrained(
            folder, config=config, ignore_mismatched_sizes=True, output_loading_info=True, trust_remote_code=False
        )
    model.name_or_path = model.config._name_or_path = place  # what an adapter records as its base
    mismatched = [name if isinstance(name, str) else name[0] for name in report["mismatched_keys"]]
    return model, sorted({*report["missing_keys"], *mismatched})


def _beside_backbone(model: PreTrainedModel) -> tuple[str, ...]:
    """The parts that are no backbone; of a model that does not name its backbone as transformers do, the last part."""
    parts = [name for name, child in model.named_children() if any(True for _ in child.parameters())]
    if model.base_model_prefix not in parts:
        return tuple(parts[-1:])
    return tuple(name for name in parts if name != model.base_model_prefix)


def _poolers(place: str, model: PreTrainedModel, unusable: Sequence[str]) -> tuple[str, ...]:
    """The modules of unusable weights in the backbone: only poolers may be so, since few objectives train them."""
    foreign = [name for name in unusable if "pooler" not in name]
    if foreign:
        raise InputError(
            f"{place} does not fit the {model.config.model_type} model that its config.json describes: {len(foreign)} "
            f"weights are absent or of another shape, first {foreign[0]}; give a complete checkpoint"
        )
    return tuple(sorted({name.rpartition(".")[0] for name in unusable}))


def _require_stored_head(place: str, task: Task, unusable: Sequence[str]) -> None:
    if unusable:
        raise InputError(
            f"{place} has no head for {task.name} ({task.num_labels} outputs): {unusable[0]} is absent or of another "
            "shape, so its scores would be chance; tune it on the task first, or give the adapter too"
        )


def _reinitialise(model: PreTrainedModel, modules: Iterable[str]) -> None:
    for name in modules:
        head = model.get_submodule(name)
        for part in (*head.modules(), *head.parameters()):
            # transformers marks what it has loaded, and draws no marked weight again.
            vars(part)["_is_hf_initialized"] = False
        head.apply(model._init_weights)
