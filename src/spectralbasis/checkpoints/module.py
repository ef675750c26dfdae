"""Checkpoints that are a live `nn.Module`."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from spectralbasis.checkpoints.tensors import TensorCheckpoint
from spectralbasis.errors import InputError


class ModuleCheckpoint(TensorCheckpoint):
    """The parameters of a module, which also tells the type of layer that each belongs to.

    Raises:
        InputError: the module has no parameters.
    """

    def __init__(self, module: nn.Module) -> None:
        parameters = dict(module.named_parameters(remove_duplicate=False))
        if not parameters:
            raise InputError(f"{type(module).__name__} has no parameters; expected a model with weights")
        super().__init__(parameters, type(module).__name__, _config_of(module))
        self._owners = {name: type(module.get_submodule(name.rpartition(".")[0])) for name in parameters}

    def module_type(self, name: str) -> type[nn.Module]:
        return self._owners[name]


def _config_of(module: nn.Module) -> Mapping[str, Any]:
    to_dict = getattr(getattr(module, "config", None), "to_dict", None)
    config = to_dict() if callable(to_dict) else {}
    return {**config, "architectures": config.get("architectures") or [type(module).__name__]} if config else {}
