"""Which modules and parameters a config names, and which of them can be adapted."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from inspect import getsource
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _check_lora_target_modules_mamba,
    _ExcludedModule,
    _find_minimal_target_modules,
    _maybe_include_all_linear_layers,
)
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND, TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel

from spectralbasis.checkpoints import matrix_name
from spectralbasis.checkpoints.matrices import is_expert_stack
from spectralbasis.errors import InputError
from spectralbasis.printable import warn
from spectralbasis.records import excludes, targets
from spectralbasis.tuner.config import SpectralConfig
from spectralbasis.tuner.layer import Convolutions, Layers, SpectralLayer, backend_of
from spectralbasis.tuner.parameters import Held, held_parameters, slices

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
                f"{key} is not supported: {reader} reads it without calling the module that holds it, so coefficients "
                "there would change nothing; leave it out of target_parameters"
            )
        read[reader, name] = path
    if read:
        names = sorted({name for _, name in read})
        warn(
            f"{', '.join(sorted({kind for kind, _ in read}))} has code that reads the weight of {', '.join(names)} "
            f"without calling the layer, for example {next(iter(read.values()))}; where that code runs, coefficients "
            f"there change nothing and are not trained; to leave them out, pass exclude_modules={names}",
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


DEFAULT_TARGETS = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
"""Model type → what is adapted where `target_modules` is None."""


class Targeted(NamedTuple):
    """What a config means in one model.

    Attributes:
        config: with what it names written out.
        modules: key → layer.
        parameters: key → keys of the matrices in this parameter of another module; see `parameters.slices`.
        former: key of such a matrix → the keys of the linear layers that it was in transformers 4.
    """

    config: SpectralConfig
    modules: dict[str, nn.Module]
    parameters: dict[str, list[str]]
    former: dict[str, list[list[str]]]


def targeted(config: SpectralConfig, model: nn.Module) -> Targeted:
    """What is to be adapted, and the config with `target_modules` and `target_parameters` written out.

    transformers 5 keeps the experts of a mixture as stacked parameters and routers as modules of their own, where
    transformers 4 had linear layers. Both are found by the names that they had, through transformers' own table of
    conversions, so that `target_modules` means the same in both.

    Raises:
        InputError: a module is one that PEFT refuses for LoRA, since its owner never calls it, or a weight is named
            twice.
    """
    config = config.changed()
    set_default_targets(config, BaseTuner.get_model_config(model))
    held = list(held_parameters(model))
    conversions = _conversions(model)
    former = {} if config.bound else former_modules(held, conversions)
    wanted = config.target_modules
    everything = isinstance(wanted, str) and wanted.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND
    # "all-linear" as it would be written out for the layers that were there in transformers 4.
    leaves = {key.rpartition(".")[2] for options in former.values() for keys in options for key in keys}
    asked = config.changed(target_modules=leaves) if everything else config
    _maybe_include_all_linear_layers(config, model)
    if everything:
        leave_out_refused(config, model)
    modules = _modules(config, model)
    parameters = _parameters(config, asked, held, former, conversions)
    for key in [key for key, module in modules.items() if not is_layer(module)]:
        # A router: its parameter is adapted, since it is no layer, or one that returns several tensors.
        own = [one for one in held if one.key == f"{key}.weight" and is_matrix(one)]
        for one in own:
            parameters.setdefault(one.key, [piece.key for piece in slices(one)])
            del modules[key]
    for key in [key for key in modules if f"{key}.weight" in parameters]:
        if not config.bound:
            raise InputError(
                f"target_modules={config.target_modules!r} means {key}, and "
                f"target_parameters={config.target_parameters!r} its weight; name it in one of them"
            )
        del modules[key]  # a record says which matrices are adapted, not where they are
    check_called(model, [*(f"{key}.weight" for key in modules), *parameters])
    given = tuple(f".{name}" for name in config.target_parameters or ())
    if parameters.keys() != {one.key for one in held if f".{one.key}".endswith(given)}:
        rest = {one.key for one in held if one.key not in parameters}
        config.target_parameters = sorted(_find_minimal_target_modules(list(parameters), sorted(rest)))
    if everything:
        _warn_of_frozen(model, asked, held, parameters, former)
    return Targeted(config, modules, parameters, former)


def targeted_modules(config: SpectralConfig, model: nn.Module) -> dict[str, nn.Module]:
    """Key → module of the layers that are to be adapted, for what takes layers alone.

    A warning names the parameters that are left out.
    """
    found = targeted(config, model)
    if found.parameters:
        warn(
            f"{', '.join(kinds_of(found.parameters))} of {type(model).__name__} belong to no layer and are left out "
            "here: their inputs cannot be observed",
            stacklevel=3,
        )
    return found.modules


def set_default_targets(config: SpectralConfig, model_config: dict[str, Any]) -> None:
    """Replace `target_modules=None`, without `target_parameters`, by what PEFT's LoRA takes, or by "all-linear"."""
    if config.target_modules is None and not config.target_parameters:
        known = DEFAULT_TARGETS.get(model_config.get("model_type"), INCLUDE_LINEAR_LAYERS_SHORTHAND)
        config.target_modules = known if isinstance(known, str) else set(known)


def is_targeted(config: SpectralConfig, key: str) -> Any:
    """Whether a module is to be adapted: one that a record names, or one that the patterns match (truthy)."""
    if config.bound and matrix_name(key) in (config.ranks or {}):
        return True
    return _meant(config, key)


def _meant(config: SpectralConfig, key: str) -> Any:
    """Whether the patterns match a module, as PEFT's own function of it answers."""
    return _ExcludedModule() if excludes(config, key) else targets(config, key)


def former_modules(held: Sequence[Held], conversions: Sequence[Any]) -> dict[str, list[list[str]]]:
    """Matrix in a parameter → the linear layers that transformers 4 had instead, each with the keys that it may have.

    A matrix that could not be cut into what it was made of has several; a router has one. It is empty under
    transformers 4.

    Args:
        held: the model's parameters.
        conversions: transformers' table of the model.
    """
    found = {}
    for one in held:
        options = list(_sources(one, conversions))
        pieces = slices(one) if options else []
        for piece in pieces:
            own = options if len(options) != len({one.number for one in pieces}) else [options[piece.number]]
            found[piece.key] = [_renamed(source.replace("*", str(piece.expert)), conversions) for source in own]
    for router in _routers(held, found):
        found[router.key.removesuffix(".weight")] = [_renamed(router.key, conversions)]
    return found


def _modules(config: SpectralConfig, model: nn.Module) -> dict[str, nn.Module]:
    inside = tuple(f"{key}." for key, module in model.named_modules() if isinstance(module, SpectralLayer))
    return {
        key: module
        for key, module in model.named_modules()
        if key and not key.startswith(inside) and is_targeted(config, key)
    }


def _parameters(
    config: SpectralConfig,
    asked: SpectralConfig,
    held: Sequence[Held],
    former: Mapping[str, list[list[str]]],
    conversions: Sequence[Any],
) -> dict[str, list[str]]:
    """Those that `target_parameters` names, and those that `target_modules` reaches by the names of former layers."""
    named = tuple(f".{name}" for name in config.target_parameters or ())
    ranks = config.ranks or {}
    found = {}
    for one in held:
        keys = [one.key, _former_tensor(one.key, conversions)]
        if any(f".{key}".endswith(named) for key in keys):
            pieces = slices(one)
            known = [piece.key for piece in pieces if piece.name in ranks]
            found[one.key] = known if config.bound and known else [piece.key for piece in pieces]
            continue
        if not is_matrix(one) or asked.target_modules is None:
            continue
        reached = [piece.key for piece in slices(one) if _reaches(asked, one, keys, former.get(piece.key, ()))]
        if reached and not config.bound:
            found[one.key] = reached
    return found


def _reaches(config: SpectralConfig, held: Held, keys: Sequence[str], former: Sequence[Sequence[str]]) -> bool:
    """Whether patterns mean a matrix: by a name of the stack that it is in, or by the layers that it was."""
    stack = [key.removesuffix(".weight") for key in keys]
    if _is_excluded(config, held, [*stack, *(key for options in former for key in options)]):
        return False
    if held.parameter.ndim == 3 and any(_meant(config, key) for key in stack):
        return True
    return bool(former) and all(any(_meant(config, key) for key in keys) for keys in former)


def _is_excluded(config: SpectralConfig, held: Held, keys: Iterable[str]) -> bool:
    """Whether a parameter is left out on purpose: by its name, by that of its module or by one of these."""
    every = (held.key, held.key.rpartition(".")[0], *keys)
    return any(excludes(config, key) for key in every)


def is_layer(module: nn.Module) -> bool:
    layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return backend_of(layer) is not None or (isinstance(layer, Layers) and not _is_router(layer))


def _is_router(layer: nn.Module) -> bool:
    """Whether a linear layer of a class of its own, as some routers are, returns something else than one tensor."""
    if not isinstance(layer, nn.Linear) or type(layer).forward is nn.Linear.forward or layer.weight.is_meta:
        return False
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            return not isinstance(layer(layer.weight.new_zeros(1, layer.in_features)), Tensor)
        except Exception:  # what takes no such input is no router
            return False


def is_matrix(held: Held) -> bool:
    """Whether a parameter of a module that is no layer of torch is a matrix, or a stack of one for each expert."""
    if type(held.module).__module__.startswith("torch.") or is_layer(held.module):
        return False
    shape = tuple(held.parameter.shape)
    return (len(shape) == 2 and not held.attribute.endswith("bias")) or is_expert_stack(held.key, shape)


def _conversions(model: nn.Module) -> list[Any]:
    """How transformers makes this model's parameters of those of its files; transformers 4 has no such table."""
    if not isinstance(model, PreTrainedModel):
        return []
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:
        return []
    return list(get_model_conversion_mapping(model, add_legacy=False))


def _sources(held: Held, conversions: Sequence[Any]) -> Iterator[str]:
    """The tensors of which a stack of experts is made, `*` being the number of the expert."""
    for conversion in conversions:
        merges = any(type(one).__name__ == "MergeModulelist" for one in getattr(conversion, "operations", ()))
        target = conversion.target_patterns[0] if merges and len(conversion.target_patterns) == 1 else ""
        if target and held.parameter.ndim == 3 and held.key.endswith(target):
            prefix = held.key.removesuffix(target)
            for source in conversion.source_patterns:
                yield prefix + source.replace("\\", "").removeprefix("^")
            return


def _former_tensor(key: str, conversions: Sequence[Any]) -> str:
    """The name of a tensor in files of the model, where it was only renamed."""
    for conversion in reversed(conversions):
        if not hasattr(conversion, "operations"):
            key = conversion.reverse_transform().rename_source_key(key)[0]
    return key


def _renamed(key: str, conversions: Sequence[Any]) -> list[str]:
    """The module of a tensor, by its prefix in this model and, where that differs, in its files."""
    names = (key, _former_tensor(key, conversions))
    return list(dict.fromkeys(name.removesuffix(".weight") for name in names))


def _routers(held: Sequence[Held], found: Mapping[str, Any]) -> list[Held]:
    """Matrices of one row for each expert, in a module beside a stack that was linear layers."""
    sizes = {}
    for one in held:
        if one.parameter.ndim == 3 and any(piece.key in found for piece in slices(one)):
            sizes[_grandparent(one.key)] = len(one.parameter)
    return [
        one
        for one in held
        if one.key.endswith(".weight")
        and one.parameter.ndim == 2
        and is_matrix(one)
        and sizes.get(_grandparent(one.key)) == len(one.parameter)
    ]


def _warn_of_frozen(
    model: nn.Module,
    config: SpectralConfig,
    held: Sequence[Held],
    parameters: Mapping[str, Any],
    former: Mapping[str, list[list[str]]],
) -> None:
    """Say which experts and routers stay as they are without being excluded, and what share of the model they are."""
    stacks = [one for one in held if is_expert_stack(one.key, one.parameter.shape) or "experts" in one.key.split(".")]
    beside = {_grandparent(one.key) for one in stacks if is_matrix(one)}
    routers = [one for one in held if one.key.endswith(".weight") and _grandparent(one.key) in beside]
    left = {one.key: one for one in [*stacks, *routers] if is_matrix(one) and one.key not in parameters}
    for key, one in list(left.items()):
        layers = (name for piece in slices(one) for names in former.get(piece.key, ()) for name in names)
        if _is_excluded(config, one, layers):
            del left[key]
    if not left:
        return
    share = sum(one.parameter.numel() for one in left.values()) / count_parameters(model)
    possible = kinds_of(key for key in left if not reader_of(model, key))
    advice = f"to train them, pass target_parameters={possible} as well" if possible else "they cannot be adapted"
    warn(
        f"target_modules='all-linear' leaves {', '.join(kinds_of(left))} frozen, {share:.1%} of the parameters: they "
        f"are not linear layers of {type(model).__name__}; {advice}",
        stacklevel=4,
    )


def kinds_of(keys: Iterable[str]) -> list[str]:
    """The last three components of names, once each, without the numbers of layers."""
    return sorted({".".join(part for part in key.split(".")[-3:] if not part.isdigit()) for key in keys})


def _grandparent(key: str) -> str:
    """The module that holds the module of a parameter."""
    return key.rpartition(".")[0].rpartition(".")[0]


def count_parameters(model: nn.Module) -> int:
    """Parameters of the model itself: no coefficients, and of retrained modules the original only."""
    added = (".spectral_coefficients.", ".modules_to_save.")
    return sum(_size(p) for name, p in model.named_parameters() if not any(part in f".{name}" for part in added))


def _size(parameter: nn.Parameter) -> int:
    """Number of weights in a parameter; bitsandbytes packs two of 4 bits into a byte."""
    quantized = getattr(parameter, "quant_state", None)
    return parameter.numel() if quantized is None else math.prod(quantized.shape)


def unique_names(keys: Sequence[str]) -> dict[str, str]:
    """Stable matrix names; modules that would share one keep their full keys."""
    names = {key: matrix_name(key) for key in keys}
    count = Counter(names.values())
    return {key: name if count[name] == 1 else key for key, name in names.items()}


def check_layer(key: str, layer: nn.Module) -> None:
    if not isinstance(layer, Layers):
        raise InputError(
            f"Target module {key} is not supported: it is {type(layer).__name__}, and spectral coefficients take "
            "torch.nn.Linear, Conv1d, Conv2d, Conv3d and Embedding and transformers Conv1D; leave it out of "
            "target_modules"
        )
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        raise InputError(
            f"{key} belongs to torch.nn.MultiheadAttention, which reads its weight and never calls it, so coefficients "
            "there would change nothing; leave it out with exclude_modules"
        )
    if isinstance(layer, Convolutions) and layer.groups != 1:
        raise InputError(
            f"{key} is a convolution of {layer.groups} groups: each output sees a part of the input, so its weight is "
            "not a single matrix; leave it out with exclude_modules"
        )
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        raise InputError(
            f"{key} has max_norm={layer.max_norm:g}, so each lookup changes the table, and its directions with it; "
            "leave it out with exclude_modules"
        )
