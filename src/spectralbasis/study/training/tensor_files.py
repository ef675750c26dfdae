"""Trained numbers in a file of their own: written, read, and put where they belong."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spectralbasis.errors import InputError
from spectralbasis.files import atomic_path

TRAINED_FILE = "adapter_model.safetensors"


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_trained(model: nn.Module, folder: Path) -> None:
    """Write the trained parameters, and nothing else, to `TRAINED_FILE` in the folder."""
    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in trained_parameters(model).items()}
    with atomic_path(folder / TRAINED_FILE) as temporary:
        save_file(tensors, temporary)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder's `TRAINED_FILE`.

    Raises:
        InputError: it is absent or cannot be read.
    """
    try:
        return load_file(folder / TRAINED_FILE)
    except (OSError, SafetensorError) as error:
        raise InputError(f"the weights in {folder} cannot be read: {error}; tune it again, or name another") from error


@torch.no_grad()
def copy_tensors(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Set parameters to the tensors of their names, which were read from a folder.

    Raises:
        InputError: a tensor is missing, or of another shape.
    """
    for name, parameter in parameters.items():
        found = tensors.get(name)
        if found is None or found.shape != parameter.shape:
            there = "is absent there" if found is None else f"of {tuple(found.shape)} there"
            raise InputError(
                f"{folder} does not fit: {name} of {tuple(parameter.shape)} here {there}; "
                "give an adapter of the same model, method and size"
            )
        parameter.copy_(found)
