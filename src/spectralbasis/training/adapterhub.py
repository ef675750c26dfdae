"""Bottleneck adapters of AdapterHub's package `adapters`, and the fusion of several.

The package needs transformers 4.57, so these methods need an environment of their own: the extra `baselines`.
"""

import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from spectralbasis.errors import InputError
from spectralbasis.training.methods import Setup, train_head_and
from spectralbasis.training.outcomes import TRAINED_FILE, TUNING_FILE, copy_tensors, read_tensors, stored

NAME = "task"
CONFIGS = {"houlsby": "DoubleSeqBnConfig", "parallel": "ParBnConfig"}


def add_bottleneck(kind: str, setup: Setup) -> nn.Module:
    """The setup's model with adapters of a kind of `CONFIGS`, which are trained together with the head.

    Raises:
        InputError: the package is not installed, or does not know the model.
    """
    hub, model = _hub_and_model(kind, setup)
    model.add_adapter(NAME, config=_config(hub, kind, setup.options.rank or 1, model))
    model.train_adapter(NAME)
    return _train_added(setup)


def add_fusion(setup: Setup) -> nn.Module:
    """Attention over the adapters of other tasks, which stay as they are (Pfeiffer et al., arXiv 2005.00247).

    The sources are folders that `tune` wrote with `houlsby` or `parallel` on the same model; what is needed of them is
    copied into the folder of the setup.

    Raises:
        InputError: there are fewer than two sources, or one of them is not such a folder or does not fit.
    """
    hub, model = _hub_and_model("adapterfusion", setup)
    folders = _sources(setup)
    names = [f"source{number}" for number in range(len(folders))]
    for name, folder in zip(names, folders, strict=True):
        made = stored(folder)
        kind, width = made.get("method"), made.get("settings", {}).get("rank")
        if kind not in CONFIGS or not isinstance(width, int):
            raise InputError(f"{folder} was tuned with {kind}; adapterfusion takes {' or '.join(CONFIGS)}")
        model.add_adapter(name, config=_config(hub, kind, width, model))
        room = {entry: parameter for entry, parameter in model.named_parameters() if f".{name}." in entry}
        weights = {entry.replace(f".{NAME}.", f".{name}."): tensor for entry, tensor in read_tensors(folder).items()}
        copy_tensors(room, weights, folder)
    fusion = hub.composition.Fuse(*names)
    model.add_adapter_fusion(fusion)
    model.train_adapter_fusion(fusion)
    return _train_added(setup)


def _hub_and_model(method: str, setup: Setup) -> tuple[Any, Any]:
    """The package, and the setup's model in which it has found the places for adapters."""
    try:
        hub = import_module("adapters")
    except ImportError as error:
        raise InputError(
            f"the method {method} needs AdapterHub's package adapters, which cannot be imported here: it only works "
            f"with transformers 4.57, and this is transformers {transformers.__version__}; install it in a separate "
            "virtual environment, with: pip install 'spectralbasis[baselines]'"
        ) from error
    model = setup.loaded.model
    try:
        hub.init(model)
    except (ValueError, AttributeError, KeyError) as error:
        raise InputError(
            f"the package adapters does not know {type(model).__name__}; use a method such as lora or spectral"
        ) from error
    return hub, model


def _config(hub: Any, kind: str, width: int, model: Any) -> Any:
    return getattr(hub, CONFIGS[kind])(reduction_factor=model.config.hidden_size / width)


def _train_added(setup: Setup) -> nn.Module:
    """Train what the package made trainable, and the head."""
    added = {name for name, parameter in setup.loaded.model.named_parameters() if parameter.requires_grad}
    return train_head_and(setup, added.__contains__)


def _sources(setup: Setup) -> list[Path]:
    """The folders of the source adapters: those copied beside the fusion, else copies of those that were named."""
    folders = sorted(setup.folder.glob("source-*"))
    if folders:
        return folders
    if len(setup.options.sources) < 2:
        raise InputError(
            f"adapterfusion needs at least two adapters, got {len(setup.options.sources)}; pass the folders that tune "
            "wrote with the method houlsby or parallel as its sources"
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
