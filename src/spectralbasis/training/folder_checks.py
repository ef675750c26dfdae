"""Checks of a folder from an unknown source before transformers or PEFT opens it.

These libraries follow what a folder names: files elsewhere, code of the hub, sizes that no machine has. A folder that
passes the checks names nothing of this kind, so only its own files are read.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig
from transformers import PretrainedConfig, PreTrainedModel

from spectralbasis.checkpoints.adapters import ADAPTER_CONFIG, ADAPTER_TENSORS
from spectralbasis.checkpoints.matrices import is_expert_stack
from spectralbasis.checkpoints.names import check_counts
from spectralbasis.checkpoints.opening import open_tensors
from spectralbasis.checkpoints.weight_files import inside, is_index, root_of
from spectralbasis.errors import InputError, SpectralBasisError
from spectralbasis.printable import shortened
from spectralbasis.records import names_only, read_record
from spectralbasis.sizes import available_memory
from spectralbasis.training.data_files import first_line
from spectralbasis.tuner.config import SpectralConfig

CONFIG = "config.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
_IMPLEMENTATIONS = frozenset({"eager", "sdpa", "flex_attention", "grouped_mm", "batched_mm", *_PACKAGES})
"""Ways to compute that transformers brings itself; any other name is that of a repository of code on the hub."""
_ELSEWHERE = ("checkpoint_path", "pretrained_cfg_overlay", "use_pretrained_backbone", "use_kernels", "kernel_config")
"""Keys of a config by which models start from files or code that are not in their folder."""
_ROOM = 1 << 27
"""Numbers that a model may hold beyond those of its file: a fresh head, tables of positions, masks."""
_OTHER_FOLDERS = {"XLORA": "adapters of other folders", "MULTITASK_PROMPT_TUNING": "a file elsewhere"}
_LEFT_OVER = "special_tokens_map_file"
"""A path that transformers 4 wrote into tokenizer configs and that nothing reads: the file is taken from the folder."""
_TEMPLATES = "additional_chat_templates"
_SIZES = ("r", "encoder_hidden_size", "init_r", "target_r", "num_virtual_tokens", "n_frequency", "rank_pattern")
_MEGATRON = "megatron.core"
_STARTS = frozenset(f"pissa_niter_{number}" for number in range(65))


def described(error: BaseException) -> str:
    """The first line of an error's text, after its class where the text alone says little, as of a KeyError."""
    plain = isinstance(error, OSError | ValueError | RuntimeError)
    return shortened(first_line(error) if plain else f"{type(error).__name__}: {first_line(error)}")


@contextmanager
def reading(place: str | Path, what: str) -> Iterator[None]:
    """Turn whatever a library raises over a folder's content into an error for people.

    Raises:
        InputError: the library raised something; transformers and PEFT raise all kinds.
    """
    try:
        yield
    except SpectralBasisError:
        raise
    except Exception as error:
        raise InputError(
            f"the {what} in {place} cannot be read: {described(error)}; save it again, or name another"
        ) from error


def check_model_folder(folder: Path) -> None:
    """Refuse a model's folder that would have a library read or run anything that is not in it.

    Raises:
        InputError: a file of it is a link out of the folder, an index, a config or a tokenizer names a file elsewhere,
            the folder holds an adapter too, the weights are quantized, or a size is beyond any model.
    """
    _check_links(folder)
    config = read_record(inside(folder, CONFIG), dict[str, Any])
    if (folder / ADAPTER_CONFIG).exists():
        raise InputError(
            f"{folder} has both {CONFIG} and {ADAPTER_CONFIG}; put the adapter into its own folder, and give the "
            "base model first and the adapter after it"
        )
    for index in (path for path in folder.iterdir() if is_index(path.name)):
        located = read_record(index, dict[str, Any]).get("weight_map")
        if not isinstance(located, dict) or not all(isinstance(name, str) for name in located.values()):
            raise InputError(f"{index} names no files under weight_map; restore it from the original")
        for name in set(located.values()):
            inside(folder, name, index)
    _check_config(folder, config)
    for name in ("tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"):
        if (folder / name).exists():
            _check_files_named(folder, name)


def _check_links(folder: Path) -> None:
    templates = folder / _TEMPLATES
    beside = [templates, *templates.iterdir()] if templates.is_dir() else []
    for path in (*folder.iterdir(), *beside):
        if not path.is_dir() or (path == templates and path.is_symlink()):
            inside(folder, str(path.relative_to(folder)))


def _check_files_named(folder: Path, name: str) -> None:
    """Refuse a tokenizer that names a file which is here, but not in its folder; one that is nowhere does no harm."""
    for key, value in read_record(folder / name, dict[str, Any]).items():
        for one in value if key.endswith("_files") and isinstance(value, list) else ():
            inside(folder, str(one), folder / name)
        named = isinstance(value, str) and (key.endswith("_file") or "/" in value or os.sep in value)
        if key == _LEFT_OVER or not (named and value and _is_file(value)):
            continue
        if not Path(value).resolve().is_relative_to(root_of(folder)):
            raise InputError(
                f"{folder / name} names {shortened(value)} as its {key}, which is not in the folder; remove {key}, "
                "or put the file into the folder"
            )


def _is_file(name: str) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError):  # no name that a file can have
        return False


def _check_config(folder: Path, config: Mapping[str, Any]) -> None:
    file = folder / CONFIG
    try:
        check_counts(config)
    except ValueError as error:
        raise InputError(
            f"{file} describes a model of impossible size ({error}); restore it from the original"
        ) from error
    weights = config.get("transformers_weights")
    if weights is not None:
        inside(folder, str(weights), file)
    for key, value in _entries(config):
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{file} has {key}={value}, expected a finite number; restore it from the original")
        names = list(value.values()) if isinstance(value, dict) else [value]
        if key.endswith("_implementation") or "_implementation_" in key:
            for name in names:
                _check_implementation(file, key, name)
        elif key in ("quantization_config", "compression_config") and value:
            raise InputError(f"{file} describes a quantized model; give the checkpoint that it was quantized from")
        elif key in _ELSEWHERE and value:
            raise InputError(
                f"{file} has {key}={shortened(repr(value), 80)}, which loads files or code from elsewhere; remove it, "
                "and keep all weights in the folder"
            )
        elif key in ("dtype", "torch_dtype"):
            for name in names:
                found = getattr(torch, name.removeprefix("torch."), None) if isinstance(name, str) else None
                known = isinstance(found, torch.dtype) and found.is_floating_point
                if name is not None and name != "auto" and not known:
                    raise InputError(
                        f"{file} has {key}={shortened(repr(name), 80)}, expected a floating type such as 'float32'; "
                        "correct it"
                    )


def _entries(content: Any) -> Iterator[tuple[str, Any]]:
    """All keys of nested JSON objects with their values."""
    if isinstance(content, list):
        for value in content:
            yield from _entries(value)
    elif isinstance(content, dict):
        for key, value in content.items():
            yield key, value
            yield from _entries(value)


def _check_implementation(file: Path, key: str, name: Any) -> None:
    if name is not None and name not in _IMPLEMENTATIONS:
        raise InputError(
            f"{file} has {key}={shortened(repr(name), 80)}, which would be code of a hub repository and is never "
            f"run; remove it, or choose from {', '.join(sorted(_IMPLEMENTATIONS))}"
        )
    if name in _PACKAGES and find_spec(_PACKAGES[name]) is None:
        raise InputError(f"{file} has {key}={name!r}, whose package {_PACKAGES[name]} is not installed; remove {key}")


def check_size(folder: Path, config: PretrainedConfig, build: Callable[[PretrainedConfig], PreTrainedModel]) -> None:
    """Refuse a model that cannot be built, or that is far larger than the weights in its folder; takes no memory.

    Raises:
        InputError: see above.
    """
    try:
        with torch.device("meta"):
            model = build(config)
    except Exception as error:  # transformers raises all kinds
        if "meta" in str(error):  # its constructor needs real numbers
            return
        raise InputError(
            f"{folder / CONFIG} describes a {config.model_type} model that cannot be built "
            f"({described(error)}); restore it from the original"
        ) from error
    numbers = sum(tensor.numel() for part in (model.parameters(), model.buffers()) for tensor in part)
    stored = sum(path.stat().st_size for path in folder.iterdir() if path.suffix in _WEIGHTS)
    room = stored + _ROOM if stored else available_memory() // model.dtype.itemsize
    if numbers > room:
        raise InputError(
            f"{folder / CONFIG} describes a model of {numbers:,} numbers, and the weights there have {stored:,} bytes; "
            "restore the config and the weights from the original"
        )


def adapter_config(folder: Path, model: PreTrainedModel) -> PeftConfig:
    """The config of an adapter as PEFT may have it: it names modules of the model, and no expressions, code or files.

    Raises:
        InputError: the config cannot be read, or asks for what is not in the folder.
    """
    _check_links(folder)
    file = inside(folder, ADAPTER_CONFIG)
    content = read_record(file, dict[str, Any])
    kind = content.get("peft_type")
    if not isinstance(kind, str) or kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise InputError(f"{file} has peft_type={shortened(repr(kind), 80)}, which PEFT does not know; correct it")
    if kind in _OTHER_FOLDERS:
        raise InputError(f"{file} is of the type {kind}, which reads {_OTHER_FOLDERS[kind]}; it is not opened")
    if content.get("megatron_config") or content.get("megatron_core") not in (None, _MEGATRON):
        raise InputError(
            f"{file} asks PEFT to import {shortened(repr(content.get('megatron_core')), 80)}; remove megatron_config "
            "and megatron_core, which belong to training with Megatron"
        )
    start = str(content.get("init_lora_weights"))
    if "_niter_" in start and start not in _STARTS:
        raise InputError(f"{file} has init_lora_weights={shortened(repr(start), 80)}, expected at most 64 iterations")
    _check_replication(file, content.get("layer_replication"))
    _check_sizes(file, folder, content)
    with reading(folder, "adapter's config"):
        config: PeftConfig = PEFT_TYPE_TO_CONFIG_MAPPING[kind].from_pretrained(str(folder))
        if not isinstance(config, SpectralConfig):  # whose patterns this package matches itself
            if isinstance(getattr(config, "target_modules", None), str):
                _check_no_stacks(file, model)
            names_only(config, [name for name, _ in model.named_modules() if name])
    return config


def _check_no_stacks(file: Path, model: PreTrainedModel) -> None:
    """Refuse an expression for a model that has stacks of experts: it may mean layers that the stacks were made of."""
    stack = next((name for name, part in model.named_parameters() if is_expert_stack(name, tuple(part.shape))), None)
    if stack is not None:
        raise InputError(
            f"{file} has a pattern as target_modules, but the model has a stack of experts, {stack}, and a pattern "
            "does not say which experts it means; write the names of the layers as a list"
        )


def _check_replication(file: Path, layers: Any) -> None:
    if not layers:
        return
    pairs = layers if isinstance(layers, list) else []
    valid = pairs and all(isinstance(pair, list) and [type(end) for end in pair] == [int, int] for pair in pairs)
    try:
        check_counts({"num_layers": sum(stop - start for start, stop in pairs) if valid else None})
    except ValueError as error:
        raise InputError(f"{file} has a layer_replication of impossible size ({error}); correct it") from error
    if not valid:
        raise InputError(f"{file} has layer_replication={shortened(repr(layers), 80)}, expected pairs of numbers")


def _check_sizes(file: Path, folder: Path, content: Mapping[str, Any]) -> None:
    """Refuse sizes that the adapter's tensors do not have: PEFT makes room for them before it looks at the tensors."""
    found = next((name for name in ADAPTER_TENSORS if (folder / name).exists()), None)
    if found is None:
        raise InputError(f"{folder} has {ADAPTER_CONFIG} but no {ADAPTER_TENSORS[0]}; save the adapter again")
    tensors = open_tensors(inside(folder, found))
    largest = max((size for name in tensors.names() for size in tensors.shape(name)), default=0)
    for key in _SIZES:
        value = content.get(key)
        for size in value.values() if isinstance(value, dict) else [value]:
            if isinstance(size, int) and size > largest:
                raise InputError(
                    f"{file} has {key}={size}, and the largest tensor of the adapter has {largest} rows or columns; "
                    "its two files belong to different adapters, so save it again"
                )
