"""What the word for a model stands for: a folder, a hub id, or an installed extra.

Tokenizers for models that are pretrained here, learned from a corpus.

Named architectures: configs of transformers models, and the tokenizers that go with them.

Opening a pretrained model with a head for a task.

Models with a head for a task: found, opened, made, and fed.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from spectralbasis.checkpoints.opening import download, installed_folder, is_hub_id
from spectralbasis.errors import InputError
from spectralbasis.training.collators import TEXT, Collator
from spectralbasis.training.handing_over import CONFIG, check_model_folder, check_size, load_collator, reading, try_out
from spectralbasis.training.limu_bert import AutoModelForSignalClassification
from spectralbasis.training.messages import quiet_transformers
from spectralbasis.training.tasks import Task, load_task
from spectralbasis.tuner.calibration import in_modules


def resolve_source(source: str | Path) -> str:
    """The folder or hub id that `source` means: a folder with config.json, a hub id, or `minilm` for the extra's model.

    Raises:
        InputError: it is none of these.
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


SPECIAL = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
INPUTS = ["input_ids", "token_type_ids", "attention_mask"]
"""What the tokenizers give: BERT tells the texts of a pair apart by their types."""
SAMPLE = 20_000
"""Passages, evenly spaced over the training part, that a vocabulary is learned from."""


def train_tokenizer(corpus: str, data: Path | None, *, size: int, max_length: int) -> PreTrainedTokenizerFast:
    """A lower-case tokenizer of `size` tokens, learned from the training part of a masked-language task.

    Byte pairs rather than word pieces: their training gives the same vocabulary each time, and no word is unknown.

    Raises:
        InputError: the task or its data cannot be used.
    """
    train = load_task(corpus, data).train
    sample = train.select(range(0, len(train), max(1, len(train) // SAMPLE)))[TEXT]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(list(sample), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=max_length, model_input_names=INPUTS, **SPECIAL
    )


@dataclass(frozen=True)
class Architecture:
    """What a model is before it has weights.

    `corpus` is the task whose training part the tokenizer, of `config["vocab_size"]` tokens, learns from; None for
    models that read no text.
    """

    model_type: str
    auto_model: Any
    config: Mapping[str, Any] = field(default_factory=dict)
    corpus: str | None = None

    def make_config(self) -> PretrainedConfig:
        """The config, of transformers' class for this kind of model."""
        return AutoConfig.for_model(self.model_type, **self.config)

    def make_tokenizer(self, data: Path | None) -> PreTrainedTokenizerFast:
        """The tokenizer of an architecture with a corpus, the same for every seed; `data` is the corpus's folder.

        Raises:
            InputError: the corpus cannot be read, or there is none.
        """
        if self.corpus is None:
            raise InputError(f"a {self.model_type} model reads no text here, and so has no tokenizer")
        longest = self.config["max_position_embeddings"]
        return train_tokenizer(self.corpus, data, size=self.config["vocab_size"], max_length=longest)


def _vit(**sizes: float) -> Architecture:
    return Architecture("vit", AutoModelForImageClassification, {"num_channels": 1, **sizes})


def _bert(corpus: str, **sizes: float) -> Architecture:
    return Architecture("bert", AutoModelForMaskedLM, {"pad_token_id": 0, **sizes}, corpus)


ARCHITECTURES: dict[str, Architecture] = {
    "vit-small": _vit(
        image_size=28, patch_size=7, hidden_size=96, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4,
        initializer_range=0.1,
    ),
    "vit-digits": _vit(
        image_size=8, patch_size=2, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4
    ),
    "vit-tiny": _vit(
        image_size=8, patch_size=4, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    ),
    "bert-small": _bert(
        "novels", vocab_size=1024, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.05,
    ),
    "bert-tiny": _bert(
        "descriptions", vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64,
    ),
    "limu-bert": Architecture("limu_bert", AutoModelForSignalClassification),
}  # fmt: skip
"""The small ones begin with larger weights than transformers' default, which suits widths of 768: they learn in some
hundred steps, and a small vocabulary lets a language model learn more than how frequent words are in as few."""


def find_architecture(name: str) -> Architecture:
    """The architecture of this name.

    Raises:
        InputError: there is none.
    """
    if name not in ARCHITECTURES:
        raise InputError(f"unknown architecture {name!r}; the known ones are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def random_model(auto_model: Any, config: PretrainedConfig, seed: int) -> PreTrainedModel:
    """A model whose weights are drawn by the seed alone; torch's global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = auto_model.from_config(config)
    return model


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
