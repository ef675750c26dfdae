"""Bottleneck adapters of AdapterHub's package `adapters`, and the fusion of several.

The package needs transformers 4.57, so these methods live in an environment of their own: the extra `baselines`.
"""

import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import transformers
from torch import nn

from spectralbasis.errors import InputError
from spectralbasis.study.methods.method import Setup
from spectralbasis.study.methods.plain import train_head_and
from spectralbasis.study.training.results import TUNING_FILE, stored
from spectralbasis.study.training.tensor_files import TRAINED_FILE, copy_tensors, read_tensors

NAME = "task"
CONFIGS = {"houlsby": "DoubleSeqBnConfig", "parallel": "ParBnConfig"}


def bottleneck(kind: str) -> Callable[[Setup], nn.Module]:
    """How `houlsby` (arXiv 1902.00751) or `parallel` (He et al., arXiv 2110.04366) adapters are prepared."""

    def prepare(setup: Setup) -> nn.Module:
        hub = _hub(kind)
        model = _with_room(hub, setup)
        model.add_adapter(NAME, config=_config(hub, kind, setup.options.rank or 1, model))
        model.train_adapter(NAME)
        return _train_added(setup)

    return prepare


def adapterfusion(setup: Setup) -> nn.Module:
    """Attention over the adapters of other tasks, which stay as they are (Pfeiffer et al., arXiv 2005.00247).

    The sources are folders that `tune` wrote with `houlsby` or `parallel` on the same model; what is needed of them is
    copied into the folder of the setup.

    Raises:
        InputError: fewer than two sources, or one that is no such folder or does not fit.
    """
    hub = _hub("adapterfusion")
    model = _with_room(hub, setup)
    folders = _sources(setup)
    names = [f"source{number}" for number in range(len(folders))]
    for name, folder in zip(names, folders, strict=True):
        _add_source(hub, model, name, folder)
    fusion = hub.composition.Fuse(*names)
    model.add_adapter_fusion(fusion)
    model.train_adapter_fusion(fusion)
    return _train_added(setup)


def _hub(method: str) -> ModuleType:
    try:
        return import_module("adapters")
    except ImportError as error:
        raise InputError(
            f"the method {method} needs AdapterHub's package adapters, which cannot be imported here: it works with "
            f"transformers 4.57 alone, and this is transformers {transformers.__version__}; install it in a virtual "
            "environment of its own, with: pip install 'spectralbasis[baselines]'"
        ) from error


def _with_room(hub: ModuleType, setup: Setup) -> Any:
    """The model, in which the package has found the places for adapters."""
    model = setup.loaded.model
    try:
        hub.init(model)
    except (ValueError, AttributeError, KeyError) as error:
        raise InputError(
            f"the package adapters does not know {type(model).__name__}; use a method such as lora or spectral"
        ) from error
    return model


def _config(hub: ModuleType, kind: str, width: int, model: Any) -> Any:
    return getattr(hub, CONFIGS[kind])(reduction_factor=model.config.hidden_size / width)


def _train_added(setup: Setup) -> nn.Module:
    """What the package made trainable, and the head."""
    added = {name for name, parameter in setup.loaded.model.named_parameters() if parameter.requires_grad}
    return train_head_and(setup, added.__contains__)


def _sources(setup: Setup) -> list[Path]:
    """The folders of the source adapters: those copied beside the fusion, else copies of those that were named."""
    folders = sorted(setup.folder.glob("source-*"))
    if folders:
        return folders
    if len(setup.options.sources) < 2:
        raise InputError(
            f"adapterfusion fuses two adapters or more, and got {len(setup.options.sources)}; "
            "pass the folders that tune wrote with the method houlsby or parallel as its sources"
        )
    for number, source in enumerate(setup.options.sources):
        copy = setup.folder / f"source-{number:03d}"
        copy.mkdir(parents=True)
        for name in (TUNING_FILE, TRAINED_FILE):
            if not (Path(source) / name).is_file():
                raise InputError(f"{source} has no {name}; pass a folder that tune wrote with houlsby or parallel")
            shutil.copyfile(Path(source) / name, copy / name)
        folders.append(copy)
    return folders


def _add_source(hub: ModuleType, model: Any, name: str, folder: Path) -> None:
    """Add the adapter of a folder under a name of its own, frozen."""
    made = stored(folder)
    kind, width = made.get("method"), made.get("settings", {}).get("rank")
    if kind not in CONFIGS or not isinstance(width, int):
        raise InputError(f"{folder} was tuned with {kind}; adapterfusion takes {' or '.join(CONFIGS)}")
    model.add_adapter(name, config=_config(hub, kind, width, model))
    room = {entry: parameter for entry, parameter in model.named_parameters() if f".{name}." in entry}
    weights = {entry.replace(f".{NAME}.", f".{name}."): tensor for entry, tensor in read_tensors(folder).items()}
    copy_tensors(room, weights, folder)
