"""Where runs start: their task, their model, and the action `initialise`, which makes untrained models."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from spectralbasis.errors import InputError
from spectralbasis.study.runs import Outcome, Run, Site
from spectralbasis.study.stories import read_stories
from spectralbasis.training.collators import image_collator, load_tokenizer
from spectralbasis.training.folder_checks import check_size, reading
from spectralbasis.training.known_tasks import folder_of, load_task
from spectralbasis.training.limu_bert import AutoModelForSignalClassification, read_released
from spectralbasis.training.models import checked_folder, quiet_transformers, resolve_source
from spectralbasis.training.tasks import TEXT, Task
from spectralbasis.training.text_tasks import GLUE_TASKS, load_glue

SPLIT_SEED = 0
SPECIAL = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
INPUTS = ["input_ids", "token_type_ids", "attention_mask"]
"""What the tokenizers give: BERT distinguishes the texts of a pair by their types."""
SAMPLE = 20_000
"""Passages, evenly spaced over the training part, that a vocabulary is learned from."""


def halved_task(name: str, site: Site) -> Task:
    """A task by its name, from its folder below the data folder, with a half of its held-out examples to select by.

    The halves are the same for every run.
    """
    return load_task(name, folder_of(name, site.data)).halved(SPLIT_SEED)


def tested_task(name: str, site: Site) -> Task:
    """A task by its name with all of its test examples to score on, and some training examples to select by.

    GLUE's tasks have their test file where it has labels, else the development set. The parts are the same for every
    run.
    """
    place = folder_of(name, site.data)
    glue = next((one for one in GLUE_TASKS if one.name == name), None)
    task = load_task(name, place) if glue is None or place is None else load_glue(glue, place, test=True)
    return task.held_out_of_train(seed=SPLIT_SEED)


def searched_task(name: str, site: Site) -> Task:
    """A task by its name that is scored on the examples by which `tested_task` selects, and on no others."""
    task = tested_task(name, site)
    assert task.selection is not None  # it was just held out
    return replace(task, evaluation=task.selection, selection=None)


def model_of(run: Run, site: Site) -> str:
    """The model that the run starts from: the folder of its need `model`, else what its settings name."""
    found: Any = site.needs.get("model") or run.settings["model"]
    return str(found)


@dataclass(frozen=True)
class Architecture:
    """A model before it has weights.

    `corpus` is the task from whose training part the tokenizer, of `config["vocab_size"]` tokens, is learned; None for
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
            raise InputError(f"a {self.model_type} model reads no text here, so it has no tokenizer")
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
    "llama-tiny": Architecture(
        "llama", AutoModelForCausalLM,
        {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2, "tie_word_embeddings": True},
        "descriptions",
    ),
    "limu-bert": Architecture("limu_bert", AutoModelForSignalClassification),
}  # fmt: skip
"""The small ones start from larger weights than transformers' default, which suits widths of 768: they learn in some
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


RELEASED: dict[str, tuple[str, Callable[[Path], Sequence[Any]]]] = {
    "limu-bert-x": ("limu_bert/x/weights/limu_bert_x.pt", lambda file: [read_released(file)]),
    "stories260K": ("stories260K", read_stories),
}
"""Pretrained models in other formats than transformers': their place below the data folder, and what reads the model
there, and its tokenizer where it reads text."""


def initialise(run: Run, site: Site) -> Outcome:
    """Write a model that `load_model` opens, with its tokenizer where it reads text.

    The setting `architecture` is the name of one of `ARCHITECTURES` or `RELEASED`, or `{"like": MODEL}` for the twin of
    a model: the same config and inputs, and weights drawn by the run's seed.

    Raises:
        InputError: the name is not known, or the model or data that it needs cannot be read.
    """
    wanted = run.settings["architecture"]
    with quiet_transformers():
        if not isinstance(wanted, str):
            model = _write_twin(wanted["like"], run.seed, site.folder)
        elif wanted in RELEASED:
            place, read = RELEASED[wanted]
            if site.data is None:
                raise InputError(f"{wanted} is read from {place}; pass --data with the folder that holds it")
            model, *tokenizer = read(site.data / place)
            for part in (model, *tokenizer):
                part.save_pretrained(site.folder)
        else:
            architecture = find_architecture(wanted)
            model = random_model(architecture.auto_model, architecture.make_config(), run.seed)
            model.save_pretrained(site.folder)
            if architecture.corpus is not None:
                architecture.make_tokenizer(folder_of(architecture.corpus, site.data)).save_pretrained(site.folder)
    return Outcome({"parameters": sum(parameter.numel() for parameter in model.parameters())})


def _write_twin(source: str, seed: int, folder: Path) -> Any:
    place = checked_folder(resolve_source(source))
    with reading(place, "model"):
        config = AutoConfig.from_pretrained(place, trust_remote_code=False)
    check_size(place, config, AutoModel.from_config)
    model = random_model(AutoModel, config, seed)
    model.save_pretrained(folder)
    if type(config) in AutoModelForImageClassification._model_mapping:
        image_collator(place, config).save(folder)
    else:
        load_tokenizer(place).save_pretrained(folder)
    return model


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
