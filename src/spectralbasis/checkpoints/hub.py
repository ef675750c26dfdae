"""Models on the Hugging Face hub, downloaded or taken from the local cache."""

import re
from pathlib import Path

from spectralbasis.errors import InputError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FILE_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".tar", ".json", ".gguf", ".h5", ".onnx", ".npz")
_DESCRIPTION = ["*.json", "*.txt", "*.model", "tokenizer*"]
_SUBFOLDERS = ["*/*", "consolidated*"]


def is_hub_id(source: str) -> bool:
    """Whether the text has the form of a hub id (`name`, `organisation/name`) and not of a file's name."""
    return bool(_ID.fullmatch(source)) and ".." not in source and not source.lower().endswith(_FILE_SUFFIXES)


def download(hub_id: str) -> Path:
    """Local folder with the safetensors of a hub model, or with its pickles where it has no safetensors.

    With `HF_HUB_OFFLINE` set, only the local cache is looked at.

    Raises:
        InputError: the model is unknown, not accessible, or not in the cache while offline.
    """
    folder = _snapshot(hub_id, [*_DESCRIPTION, "*.safetensors"])
    if next(folder.glob("*.safetensors"), None) is None:
        folder = _snapshot(hub_id, [*_DESCRIPTION, "*.bin"])
    return folder


def _snapshot(hub_id: str, patterns: list[str]) -> Path:
    from huggingface_hub import constants, snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns, ignore_patterns=_SUBFOLDERS))
    except Exception as error:  # the network stack below differs by version and raises its own kinds
        cause = str(error).strip().partition("\n")[0].rstrip(". ")
        if constants.HF_HUB_OFFLINE:
            cause = "HF_HUB_OFFLINE is set and the model is not in the local cache; unset it to download the model"
        raise InputError(
            f"{hub_id} is neither a file nor a folder here, and as a hub id it cannot be had: {cause}. "
            f"Check the spelling, the network and your access to the model, or pass a local path"
        ) from error
