"""Models on the Hugging Face hub, downloaded or taken from the local cache."""

import re
from collections.abc import Sequence
from pathlib import Path

from spectralbasis.checkpoints.foreign import recognise_names
from spectralbasis.errors import InputError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FILE_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".tar", ".json", ".gguf", ".h5", ".onnx", ".npz")
_DESCRIPTION = ["*.json", "*.txt", "*.model", "tokenizer*"]
_SUBFOLDERS = "*/*"
# What to download, best first, and what not: some models hold each weight once more, under Mistral's names.
_PREFERRED = (
    ("*.safetensors", (_SUBFOLDERS, "consolidated*")),
    ("*.bin", (_SUBFOLDERS, "consolidated*")),
    ("consolidated*.safetensors", (_SUBFOLDERS,)),
)


def is_hub_id(source: str) -> bool:
    """Whether the text has the form of a hub id (`name`, `organisation/name`) and not of a file's name."""
    return bool(_ID.fullmatch(source)) and ".." not in source and not source.lower().endswith(_FILE_SUFFIXES)


def download(hub_id: str) -> Path:
    """Local folder with a hub model's safetensors, its pickles where it has none, or else Mistral's own file.

    With `HF_HUB_OFFLINE` set, only the local cache is looked at.

    Raises:
        InputError: the model is unknown, not accessible, or not in the cache while offline, or all of its weights are
            of a kind that is not read.
    """
    for pattern, ignored in _PREFERRED:
        folder = _snapshot(hub_id, [*_DESCRIPTION, pattern], ignored)
        if next(folder.glob(pattern), None) is not None:
            return folder
    other = recognise_names(Path(hub_id), _files_on_hub(hub_id))
    if other is not None:
        raise InputError(f"{hub_id} on the hub holds no weights that are read: {other}")
    return folder


def _files_on_hub(hub_id: str) -> list[str]:
    """Names of the files in the model's repository, not of those in subfolders; none while offline."""
    from huggingface_hub import constants, list_repo_files

    if constants.HF_HUB_OFFLINE:
        return []
    try:
        return [name for name in list_repo_files(hub_id) if "/" not in name]
    except Exception:  # the list only makes a message better; what is wrong with the model was said above
        return []


def _snapshot(hub_id: str, patterns: list[str], ignored: Sequence[str]) -> Path:
    from huggingface_hub import constants, snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns, ignore_patterns=list(ignored)))
    except Exception as error:  # the network stack below differs by version and raises its own kinds
        cause = str(error).strip().partition("\n")[0].rstrip(". ")
        if constants.HF_HUB_OFFLINE:
            cause = "HF_HUB_OFFLINE is set and the model is not in the local cache; unset it to download the model"
        raise InputError(
            f"{hub_id} is neither a file nor a folder here, and as a hub id it cannot be had: {cause}. "
            f"Check the spelling, the network and your access to the model, or pass a local path"
        ) from error
