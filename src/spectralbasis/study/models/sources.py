"""What the word for a model stands for: a folder, a hub id, or an installed extra."""

from pathlib import Path

from spectralbasis.checkpoints.hub import download, is_hub_id
from spectralbasis.checkpoints.installed import installed_folder
from spectralbasis.errors import InputError
from spectralbasis.study.models.handing_over import CONFIG, check_model_folder, reading


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
