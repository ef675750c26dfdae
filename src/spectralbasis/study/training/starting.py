"""Starting to train from the trained numbers of another adapter."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from spectralbasis.errors import InputError
from spectralbasis.records import read_record
from spectralbasis.study.methods import Method
from spectralbasis.study.models.loading import LoadedModel
from spectralbasis.study.training.results import stored
from spectralbasis.study.training.tensor_files import copy_tensors, read_tensors, trained_parameters
from spectralbasis.tuner.optimization import in_modules

ORIGIN = {"auto_mapping", "base_model_name_or_path", "basis", "peft_version", "revision", "runtime_config", "task_type"}
PLACES = {"exclude_modules", "inference_mode", "modules_to_save", "target_modules"}
SIZE = {"bias", "budget", "leading", "rank_pattern", "tolerance"}
SCHEDULE = {"deltaT", "tfinal", "tinit", "total_step"}
NO_MATTER = ORIGIN | PLACES | SIZE | SCHEDULE
"""Settings of an adapter that say nothing of what its numbers mean: their names, shapes and probes do."""


def start_from(model: nn.Module, loaded: LoadedModel, method: Method, folder: Path) -> None:
    """Give a model, prepared by the method, the trained numbers of an adapter's backbone; the head stays as drawn.

    Raises:
        InputError: the folder holds no adapter of the same method, size and directions, or the method starts otherwise.
    """
    if method.writes == "model":
        raise InputError(
            f"the method {method.name} starts from a whole model, not from the adapter {folder}; give it as the model"
        )
    made = stored(folder).get("method")
    if made != method.name:
        raise InputError(f"{folder} was tuned with {made or 'no method of tune'}, not {method.name}; tune it with that")
    tensors = _outside_head(read_tensors(folder), loaded)
    if isinstance(model, PeftModel):
        _check_meaning(model, folder)
        room = _outside_head(get_peft_model_state_dict(model), loaded)
        copy_tensors(room, tensors, folder)
        set_peft_model_state_dict(model, {**get_peft_model_state_dict(model), **room})
    else:
        copy_tensors(_outside_head(trained_parameters(model), loaded), tensors, folder)


def _outside_head(tensors: Mapping[str, Tensor], loaded: LoadedModel) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not in_modules(name, loaded.head)}


def _check_meaning(model: PeftModel, folder: Path) -> None:
    """Refuse numbers that mean something else here: other directions, entries, units or seeds."""
    here = _as_json(model.peft_config["default"].to_dict())
    there = read_record(folder / "adapter_config.json", dict[str, Any])
    for name in sorted(here.keys() & there.keys() - NO_MATTER, reverse=True):
        if here[name] != there[name]:
            raise InputError(
                f"the numbers of {folder} mean something else here: its {name} differs; "
                "tune it on the same model, with the same options and basis"
            )


def _as_json(content: dict[str, Any]) -> Any:
    return json.loads(json.dumps(content, default=sorted))
