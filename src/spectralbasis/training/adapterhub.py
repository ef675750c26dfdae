"""Bottleneck adapters of AdapterHub's package `adapters`, and the fusion of several.

The package needs transformers 4.57, so these methods need an environment of their own: the extra `baselines`.
"""

import shutil
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from spectralbasis.errors import InputError
from spectralbasis.training.outcomes import TRAINED_FILE, TUNING_FILE, copy_tensors, read_tensors, stored

NAME = "task"
CONFIGS = {"houlsby": "DoubleSeqBnConfig", "parallel": "ParBnConfig"}


def add_bottleneck(model: nn.Module, kind: str, width: int) -> None:
    """Add adapters of a kind of `CONFIGS` to the model, so that they alone require a gradient.

    Raises:
        InputError: the package is not installed, or does not know the model.
    """
    hub, adapted = _hub_and_model(kind, model)
    adapted.add_adapter(NAME, config=_config(hub, kind, width, adapted))
    adapted.train_adapter(NAME)


def add_fusion(model: nn.Module, sources: Sequence[str], folder: Path) -> None:
    """Add attention over adapters of other tasks, which stay as they are (Pfeiffer et al., arXiv 2005.00247).

    Args:
        model: changed in place; the attention alone requires a gradient.
        sources: folders that `tune` wrote with `houlsby` or `parallel` on the same model.
        folder: of the fusion; what is needed of the sources is copied into it.

    Raises:
        InputError: there are fewer than two sources, or one of them is not such a folder or does not fit.
    """
    hub, adapted = _hub_and_model("adapterfusion", model)
    folders = _copied(sources, folder)
    names = [f"source{number}" for number in range(len(folders))]
    for name, source in zip(names, folders, strict=True):
        made = stored(source)
        kind, width = made.get("method"), made.get("settings", {}).get("rank")
        if kind not in CONFIGS or not isinstance(width, int):
            raise InputError(f"{source} was tuned with {kind}; adapterfusion takes {' or '.join(CONFIGS)}")
        adapted.add_adapter(name, config=_config(hub, kind, width, adapted))
        room = {entry: parameter for entry, parameter in adapted.named_parameters() if f".{name}." in entry}
        weights = {entry.replace(f".{NAME}.", f".{name}."): tensor for entry, tensor in read_tensors(source).items()}
        copy_tensors(room, weights, source)
    fusion = hub.composition.Fuse(*names)
    adapted.add_adapter_fusion(fusion)
    adapted.train_adapter_fusion(fusion)


def _hub_and_model(method: str, model: Any) -> tuple[Any, Any]:
    """The package, and the model in which it has found the places for adapters."""
    try:
        hub = import_module("adapters")
    except ImportError as error:
        raise InputError(
            f"the method {method} needs AdapterHub's package adapters, which cannot be imported here: it only works "
            f"with transformers 4.57, and this is transformers {transformers.__version__}; install it in a separate "
            "virtual environment, with: pip install 'spectralbasis[baselines]'"
        ) from error
    try:
        hub.init(model)
    except (ValueError, AttributeError, KeyError) as error:
        raise InputError(
            f"the package adapters does not know {type(model).__name__}; use a method such as lora or spectral"
        ) from error
    return hub, model


def _config(hub: Any, kind: str, width: int, model: Any) -> Any:
    return getattr(hub, CONFIGS[kind])(reduction_factor=model.config.hidden_size / width)


def _copied(sources: Sequence[str], folder: Path) -> list[Path]:
    """The folders of the source adapters: those copied beside the fusion, else copies of those that were named."""
    folders = sorted(folder.glob("source-*"))
    if folders:
        return folders
    if len(sources) < 2:
        raise InputError(
            f"adapterfusion needs at least two adapters, got {len(sources)}; pass the folders that tune wrote with the "
            "method houlsby or parallel as its sources"
        )
    for number, source in enumerate(sources):
        copy = folder / f"source-{number:03d}"
        copy.mkdir(parents=True)
        for name in (TUNING_FILE, TRAINED_FILE):
            if not (Path(source) / name).is_file():
                raise InputError(f"{source} has no {name}; pass a folder that tune wrote with houlsby or parallel")
            shutil.copyfile(Path(source) / name, copy / name)
        folders.append(copy)
    return folders
