"""The action `initialise`: a model as random weights leave it, or the released weights of LIMU-BERT-X."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from spectralbasis.errors import InputError
from spectralbasis.study.messages import quiet_transformers
from spectralbasis.study.models.architectures import find_architecture, random_model
from spectralbasis.study.models.handing_over import check_size, reading
from spectralbasis.study.models.limu_bert import read_released
from spectralbasis.study.models.preprocessing import image_collator, load_tokenizer
from spectralbasis.study.models.sources import checked_folder, resolve_source
from spectralbasis.study.runs import Outcome, Run, Site
from spectralbasis.study.tasks.data_folders import folder_of

RELEASED: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "limu-bert-x": ("limu_bert/x/weights/limu_bert_x.pt", read_released)
}
"""Pretrained models in other formats than transformers': their file below the data folder, and what reads it."""


def initialise(run: Run, site: Site) -> Outcome:
    """Write a model that `load_model` opens, with its tokenizer where it reads text.

    The setting `architecture` is the name of one of `ARCHITECTURES` or `RELEASED`, or `{"like": MODEL}` for the twin of
    a model: the same config and inputs, and weights drawn by the run's seed.

    Raises:
        InputError: the name is not known, or the model or data that it needs cannot be read.
    """
    wanted = run.settings["architecture"]
    with quiet_transformers():
        model = _write(wanted, run.seed, site)
    return Outcome({"parameters": sum(parameter.numel() for parameter in model.parameters())})


def _write(wanted: str | Mapping[str, str], seed: int, site: Site) -> Any:
    if not isinstance(wanted, str):
        return _write_twin(wanted["like"], seed, site.folder)
    if wanted in RELEASED:
        return _write_released(wanted, site)
    architecture = find_architecture(wanted)
    model = random_model(architecture.auto_model, architecture.make_config(), seed)
    model.save_pretrained(site.folder)
    if architecture.corpus is not None:
        architecture.make_tokenizer(folder_of(architecture.corpus, site.data)).save_pretrained(site.folder)
    return model


def _write_released(name: str, site: Site) -> Any:
    file, read = RELEASED[name]
    if site.data is None:
        raise InputError(f"{name} is read from {file}; pass --data with the folder that holds it")
    model = read(site.data / file)
    model.save_pretrained(site.folder)
    return model


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
