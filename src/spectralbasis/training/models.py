"""Pretrained models with a head for a task: find, check, open, and try one example."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from spectralbasis.checkpoints.opening import download
from spectralbasis.errors import InputError
from spectralbasis.locations import installed_folder, is_hub_id
from spectralbasis.training.collators import Collator, MaskingCollator, load_collator
from spectralbasis.training.folder_checks import CONFIG, check_model_folder, check_size, reading
from spectralbasis.training.limu_bert import AutoModelForSignalClassification
from spectralbasis.training.tasks import LANGUAGE_KINDS, Task, batches
from spectralbasis.tuner.calibration import in_modules

AUTO_MODELS = {
    "text": AutoModelForSequenceClassification,
    "image": AutoModelForImageClassification,
    "signal": AutoModelForSignalClassification,
}


LANGUAGE_MODELS = {
    "masked_language": AutoModelForMaskedLM,
    "causal_language": AutoModelForCausalLM,
    "instructions": AutoModelForCausalLM,
}
WORK = {
    "masked_language": "fill in masked words", "causal_language": "write text", "instructions": "write answers",
}  # fmt: skip
"""Kind of a task → what a model must be able to do for it."""


@dataclass(frozen=True)
class LoadedModel:
    """A model with a head for one task.

    Args:
        source: what was opened, as `load_model` was given it.
        task: with its examples.
        model: in float32.
        collator: turns the task's rows into the model's inputs.
        head: names of the modules that no pretraining shaped: those beside the backbone, and a pooler whose weights
            the checkpoint lacks. Empty where a checkpoint comes with what predicts tokens.
    """

    source: str
    task: Task
    model: PreTrainedModel
    collator: Collator
    head: tuple[str, ...]

    def save(self, folder: Path) -> None:
        """Write the model, and its tokenizer or image settings, as a folder that `load_model` opens."""
        with quiet_transformers():
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
    """Open a model in float32, with a head for the task. Code in a checkpoint is never run.

    Args:
        source: a model folder, a hub id, or `minilm` for the model of the extra `minilm`.
        task: what the head is for.
        head: "fresh" draws the head from the seed alone, even where the checkpoint has one; "stored" takes the
            checkpoint's. The part that predicts tokens is drawn only where the checkpoint lacks it.
        seed: of a fresh head, from 0.
        max_length: tokens at which texts are cut.

    Raises:
        InputError: the model, its tokenizer or a stored head is absent or cannot be read, its kind does not suit the
            task, or `max_length` is more than it can read.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from spectralbasis.training import load_task
        >>> from spectralbasis.training.quickstart import save_untrained
        >>> folder = save_untrained(Path(tempfile.mkdtemp()) / "vit")
        >>> load_model(folder, load_task("digits-parity")).head
        ('classifier',)
    """
    place = resolve_source(source)
    folder = checked_folder(place)
    with quiet_transformers():
        with reading(place, "model"):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **_labels_of(task))
        causal = auto_model_of(task) is AutoModelForCausalLM
        if type(config) not in auto_model_of(task)._model_mapping or (causal and not _writes(config)):
            work = WORK.get(task.kind, f"classify {task.modality}s")
            raise InputError(
                f"{place} is a {config.model_type} model, which cannot {work}; the task {task.name} needs a model "
                "that can"
            )
        # Else a kind with several classes gets the checkpoint's, such as one for inference alone.
        config.architectures = []
        collator = load_collator(folder, config, task, max_length)
        with torch.random.fork_rng(devices=[]):
            check_size(folder, config, auto_model_of(task).from_config)
            torch.manual_seed(seed)
            model, unusable = _load_weights(place, folder, config, task)
            beside = _beside_backbone(model)
            poolers = _poolers(place, model, [name for name in unusable if not in_modules(name, beside)])
            if task.kind in LANGUAGE_KINDS and not unusable:
                beside = ()
            if head == "stored" and unusable:
                raise InputError(
                    f"{place} has no head for {task.name} ({task.num_labels} outputs): {unusable[0]} is absent or of "
                    "another shape, so its scores would be random; tune it on the task first, or give the adapter too"
                )
            if head == "fresh":
                _reinitialise(model, beside)
    try_out(model.float(), task, collator, place)
    return LoadedModel(str(source), task, model, collator, (*beside, *poolers))


def resolve_source(source: str | Path) -> str:
    """The folder or hub id that `source` means: a folder with config.json, a hub id, or `minilm` for the extra's model.

    Raises:
        InputError: it is none of these.

    Examples:
        >>> resolve_source("FacebookAI/roberta-base")
        'FacebookAI/roberta-base'
    """
    installed = installed_folder(str(source))
    if installed is not None:
        return str(installed)
    path = Path(source)
    if path.is_dir():
        if (path / "config.json").is_file():
            return str(path)
        if (path / "adapter_config.json").is_file():
            raise InputError(f"{path} is an adapter; give its base model first, and the adapter after it")
        raise InputError(f"{path} has no config.json; give a folder that transformers' save_pretrained wrote")
    if path.exists():
        raise InputError(f"{path} is a file; tuning needs a folder with config.json, the weights and the tokenizer")
    if not is_hub_id(str(source)):
        raise InputError(f"the model folder {source} does not exist; give a folder, a hub id, or minilm")
    return str(source)


def checked_folder(place: str) -> Path:
    """The folder that `resolve_source` found, or that of a hub id once it is here, checked before a library opens it.

    Raises:
        InputError: the model cannot be had, or `check_model_folder` refuses it.
    """
    path = Path(place)
    folder = path if path.is_dir() else download(place)
    if not (folder / CONFIG).is_file():
        raise InputError(f"{place} has no {CONFIG}; give a model that transformers' save_pretrained wrote")
    with reading(place, "model"):
        check_model_folder(folder)
    return folder


def auto_model_of(task: Task) -> Any:
    """The class of transformers, or in its manner, that opens models for the task."""
    return LANGUAGE_MODELS.get(task.kind) or AUTO_MODELS[task.modality]


def writes_text(source: str | Path) -> bool:
    """Whether a model predicts each next token: its config names such an architecture, or it cannot fill in masks.

    Raises:
        InputError: `resolve_source` or `checked_folder` refuses it.
    """
    place = resolve_source(source)
    folder = checked_folder(place)
    with quiet_transformers(), reading(place, "model"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return _writes(config)


def task_for(model: str | Path, task: Task) -> Task:
    """The task as a model can do it: running text is learned by each next token where the model writes text.

    Raises:
        InputError: `resolve_source` or `checked_folder` refuses the model.
    """
    if task.kind == "masked_language" and writes_text(model):
        return replace(task, kind="causal_language")
    return task


def _writes(config: PretrainedConfig) -> bool:
    names = config.architectures or []
    if any(name.endswith(("ForMaskedLM", "ForCausalLM", "LMHeadModel")) for name in names):
        return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)
    masked, causal = AutoModelForMaskedLM._model_mapping, AutoModelForCausalLM._model_mapping
    return type(config) not in masked and type(config) in causal


def _labels_of(task: Task) -> dict[str, Any]:
    if task.kind in LANGUAGE_KINDS:
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
    """The parts beside the backbone; the last part where a model does not name its backbone as transformers does."""
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


def _reinitialise(model: PreTrainedModel, modules: Iterable[str]) -> None:
    for name in modules:
        head = model.get_submodule(name)
        for part in (*head.modules(), *head.parameters()):
            # transformers marks what it has loaded, and draws no marked weight again.
            vars(part)["_is_hf_initialized"] = False
        head.apply(model._init_weights)


@torch.no_grad()
def try_out(model: nn.Module, task: Task, collator: Collator, place: str | Path) -> None:
    """Run a model on one example, so that what does not fit it shows before any work.

    Raises:
        InputError: the model cannot read it: a tokenizer of another model, an adapter of another kind of model.
    """
    if not len(task.train) or isinstance(collator, MaskingCollator):  # which draws what it masks
        return
    was_training = model.training
    with reading(place, "model or its tokenizer"):
        batch = collator(next(batches(task.train, 1)))
        batch.pop("labels", None)
        model.eval()(**batch)
    model.train(was_training)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' notes and bars while a model loads or is saved: which weights are new is handled here."""
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()
