"""Layers whose weight a model's code reads without calling them, so that what stands in their place is not noticed."""

import re
from collections.abc import Iterable
from functools import cache
from inspect import getsource
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer, _check_lora_target_modules_mamba
from torch import nn

from spectralbasis.errors import InputError
from spectralbasis.printable import warn

# `self.NAME.ATTRIBUTE` where the values are used: no assignment, and no question for dtype, shape and the like.
_READS = (
    r"\bself\.{}\.{}\b(?!\s*=[^=]|, torch\.Tensor\)"
    r"|\.(?:dtype|device|data|shape|size|is_|ndim|numel|requires_grad|_))"
)
_STARTS = ("__init__", "_init_weights", "init_weights", "reset_parameters")


def check_called(model: nn.Module, keys: Iterable[str]) -> None:
    """Check that modules are called, and not only their parameters read, by the modules that own them.

    Args:
        model: with or without adapters.
        keys: of the parameters to adapt.

    Raises:
        InputError: PEFT refuses the module for LoRA, or a wrapped parameter is read by its owner's owner.
    """
    read: dict[tuple[str, str], str] = {}
    for key in keys:
        path, _, attribute = key.rpartition(".")
        name = path.rpartition(".")[2]
        if refused_for_lora(model, name):
            raise InputError(
                f"{path} is not supported: fused kernels of {type(model).__name__} read its weight and never call it, "
                f"so coefficients there would not be trained; leave it out with exclude_modules=[{name!r}], or name "
                "the modules to adapt in target_modules"
            )
        reader = reader_of(model, key)
        if not reader:
            continue
        if attribute != "weight":
            raise InputError(
                f"{key} is not supported: {reader} reads it and does not leave that to the module that holds "
                "it, so coefficients there would change nothing; leave it out of target_parameters"
            )
        read[reader, name] = path
    if read:
        names = sorted({name for _, name in read})
        warn(
            f"{', '.join(sorted({kind for kind, _ in read}))} has code that reads the weight of {', '.join(names)} "
            f"without calling the layer, as {next(iter(read.values()))}; where that code runs, coefficients there "
            f"change nothing and are not trained; to leave them out, pass exclude_modules={names}",
            stacklevel=5,
        )


def leave_out_refused(config: Any, model: nn.Module) -> None:
    """Take out of the names that "all-linear" stood for those that PEFT refuses for LoRA, and say which."""
    refused = sorted(name for name in config.target_modules or () if refused_for_lora(model, name.rpartition(".")[2]))
    if refused:
        config.target_modules = set(config.target_modules) - set(refused)
        warn(
            f"target_modules='all-linear' leaves {', '.join(refused)} frozen: fused kernels of {type(model).__name__} "
            "read their weights and never call the layers, so coefficients there would not be trained",
            stacklevel=5,
        )


def refused_for_lora(model: nn.Module, name: str) -> bool:
    """Whether PEFT refuses modules of this name for LoRA, since the model never calls them."""
    try:
        _check_lora_target_modules_mamba(LoraConfig(), model, name)
    except ValueError:
        return True
    return False


def reader_of(model: nn.Module, key: str) -> str:
    """The class of the module above the one that holds a parameter, if its code reads the parameter; else empty."""
    path, _, attribute = key.rpartition(".")
    above, _, name = path.rpartition(".")
    kind: Any = type(_owner(model, above))
    return kind.__name__ if re.search(_READS.format(re.escape(name), re.escape(attribute)), _source(kind)) else ""


def _owner(model: nn.Module, key: str) -> nn.Module:
    """The module at a key that leaves out the wrappers of adapters."""
    module: Any = model
    for part in filter(None, key.split(".")):
        module = getattr(module if hasattr(module, part) else module.get_base_layer(), part)
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


@cache
def _source(owner: Any) -> str:
    """The code of a class of modules and what it inherits, without methods that only initialise."""
    code = []
    for one in owner.__mro__:
        if issubclass(one, nn.Module) and not one.__module__.startswith("torch."):
            try:
                code += re.split(r"^    (?=def )", getsource(one), flags=re.MULTILINE)
            except (OSError, TypeError):
                continue
    return "\n".join(part for part in code if not part.startswith(tuple(f"def {name}(" for name in _STARTS)))
