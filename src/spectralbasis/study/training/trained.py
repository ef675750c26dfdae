"""Reading back what methods that PEFT does not know have trained."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from spectralbasis.errors import InputError
from spectralbasis.study.methods import METHODS, MethodOptions, Setup
from spectralbasis.study.models.loading import LoadedModel
from spectralbasis.study.training.results import stored
from spectralbasis.study.training.tensor_files import TRAINED_FILE, copy_tensors, read_tensors, trained_parameters


def holds_trained(folder: Path) -> bool:
    """Whether the folder holds the trained parameters alone, of a method that its `tuning.json` names."""
    method = METHODS.get(str(stored(folder).get("method")))
    return method is not None and method.writes == "trained" and (folder / TRAINED_FILE).is_file()


def restore_trained(loaded: LoadedModel, folder: Path) -> nn.Module:
    """The loaded model as its method prepared it, with the trained parameters of the folder.

    Raises:
        InputError: the folder's files do not fit each other or the model.
    """
    record = stored(folder)
    method = METHODS[record["method"]]
    options = method.complete(_options(record.get("settings", {}), folder))
    model = method.prepare(Setup(loaded, options, folder))
    copy_tensors(trained_parameters(model), read_tensors(folder), folder)
    return model


def _options(settings: Mapping[str, Any], folder: Path) -> MethodOptions:
    known = {field.name: settings[field.name] for field in fields(MethodOptions) if field.name in settings}
    try:
        return MethodOptions(**known)
    except TypeError as error:
        raise InputError(f"the settings in {folder} cannot be read: {error}; tune it again") from error
