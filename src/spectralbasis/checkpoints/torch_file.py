"""One file written by `torch.save`: never run, only read."""

import argparse
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from spectralbasis.checkpoints.tensors import TensorCheckpoint, find_state
from spectralbasis.errors import InputError


def open_torch_file(path: Path, source: str, config: Mapping[str, Any]) -> TensorCheckpoint:
    """Open a `.pt`, `.pth` or `.bin` file, mapped into memory where its format allows.

    Raises:
        InputError: the file is no torch checkpoint, is damaged, or holds objects other than weights.
    """
    return TensorCheckpoint(find_state(_load(path), source), source, config)


def _load(path: Path) -> object:
    try:
        mappable = zipfile.is_zipfile(path)
        # Training scripts save their arguments beside the weights: a Namespace holds values and runs nothing.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error):
            raise InputError(_refusal(path, str(error))) from error
        raise InputError(_not_torch(path)) from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged pickle can fail in any way, with KeyError and IndexError among them
        raise InputError(_not_torch(path)) from error


def _refusal(path: Path, message: str) -> str:
    name = message.partition("GLOBAL ")[2].split(" ")[0].rstrip(".,")
    return (
        f"{path} is refused: besides tensors it holds {name or 'a Python object'}, and unpickling that could run code. "
        f"If you trust where it comes from, load it yourself in a sandbox and write its state_dict with "
        f"safetensors.torch.save_file, then open that file"
    )


def _not_torch(path: Path) -> str:
    return (
        f"{path} is no readable torch checkpoint: it is damaged, cut short or of another format; "
        f"expected a state_dict written by torch.save"
    )
