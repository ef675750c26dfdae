"""Checkpoints that are a live `nn.Module`."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from spectralbasis.checkpoints.quantized_formats import NUMBERS
from spectralbasis.checkpoints.tensors import TensorCheckpoint, is_wrapper
from spectralbasis.errors import InputError

_PARAMETRIZED = ("_u", "_v", "_mask")  # buffers of spectral normalisation and of pruning


class ModuleCheckpoint(TensorCheckpoint):
    """The parameters of a module, which also tells the type of layer that each belongs to.

    Layers that keep a weight in parts (quantized, normalised, pruned) hold some of them in buffers or add them when
    they are saved; these count too.

    Raises:
        InputError: the module has no parameters.
    """

    def __init__(self, module: nn.Module) -> None:
        parameters = dict(module.named_parameters(remove_duplicate=False))
        if not parameters:
            raise InputError(f"{type(module).__name__} has no parameters; expected a model with weights")
        super().__init__(parameters | _saved(module, parameters), type(module).__name__, _config_of(module))
        modules = dict(module.named_modules(remove_duplicate=False))
        self._owners = {name: type(modules[name.rpartition(".")[0]]) for name in parameters}

    def module_type(self, name: str) -> type[nn.Module] | None:
        return self._owners.get(name)


def _saved(module: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What layers that keep a weight in parts save beside parameters; not of one that knows its real weight itself."""
    whole = tuple(f"{name}." for name, tensor in parameters.items() if is_wrapper(tensor))
    known = set(map(id, parameters.values()))
    found: dict[str, Any] = {}
    for place, layer in module.named_modules(remove_duplicate=False):
        if _keeps_parts(layer):
            layer.state_dict(destination=found, prefix=f"{place}." if place else "", keep_vars=True)
    return {
        name: tensor
        for name, tensor in found.items()
        if isinstance(tensor, Tensor) and id(tensor) not in known and not name.startswith(whole)
    }


def _keeps_parts(layer: nn.Module) -> bool:
    buffers = dict(layer.named_buffers(recurse=False))
    own = (*layer.parameters(recurse=False), *buffers.values())
    quantized = any(tensor.dtype in NUMBERS and tensor.dtype != torch.int64 for tensor in own)
    return (
        quantized
        or isinstance(getattr(layer, "W_q", None), Tensor)
        or any(name.endswith(_PARAMETRIZED) for name in buffers)
    )


def _config_of(module: nn.Module) -> Mapping[str, Any]:
    to_dict = getattr(getattr(module, "config", None), "to_dict", None)
    config = to_dict() if callable(to_dict) else {}
    return {**config, "architectures": config.get("architectures") or [type(module).__name__]} if config else {}
