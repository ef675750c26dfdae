"""LoRA adapters: `ΔW = scaling · B A`."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from spectralbasis.checkpoints.adapter import Adapter, AdapterMethod, Edit, adapted_name, edited_dtype
from spectralbasis.checkpoints.checkpoint import Checkpoint
from spectralbasis.errors import InputError

_FACTOR = re.compile(r"(?P<module>.+)\.(?P<factor>lora_A|lora_B|lora_embedding_A|lora_embedding_B)(\.weight)?")
# These change the base, or the formula, at load time, so B·A alone would be the wrong update.
_UNREADABLE_OPTIONS = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
)
_PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LoraEdit:
    """Adds one LoRA update to the base's tensor, reading the two factors when called."""

    tensors: Checkpoint
    A: str
    B: str
    scaling: float
    transposed: bool

    def __call__(self, weight: Tensor) -> Tensor:
        A, B = (self.tensors.read(name).float() for name in (self.A, self.B))
        update = B.flatten(1) @ A.flatten(1)
        update = (update.T if self.transposed else update).reshape(weight.shape)
        return weight.to(edited_dtype(weight.dtype)) + self.scaling * update


def lora_edits(adapter: Adapter) -> Mapping[str, Edit]:
    """The edits of a LoRA adapter, by tensor of the base.

    Raises:
        InputError: the adapter uses a variant whose update is not `B A`, or a factor is missing or misshapen.
    """
    _refuse_variants(adapter)
    return {
        adapter.base_tensor(f"{module}.weight"): _edit(adapter, module, factors)
        for module, factors in _factors(adapter).items()
    }


def _refuse_variants(adapter: Adapter) -> None:
    used = [option for option in _UNREADABLE_OPTIONS if adapter.config.get(option)]
    initialisation = adapter.config.get("init_lora_weights", True)
    if initialisation not in _PLAIN_INITIALISATIONS:
        used.append(f"init_lora_weights={initialisation!r}")
    if used:
        raise InputError(
            f"the LoRA adapter in {adapter.folder} uses {', '.join(used)}, with which the tuned weights are not "
            f"base + scaling·B·A; merge it with PEFT (model.merge_and_unload()), save the model and pass that folder"
        )


def _factors(adapter: Adapter) -> dict[str, dict[str, str]]:
    """Module name to the stored names of its factors A and B."""
    modules: dict[str, dict[str, str]] = {}
    for stored in adapter.tensors.names():
        name = adapted_name(stored)
        match = _FACTOR.fullmatch(name)
        if match:
            modules.setdefault(match["module"], {})[match["factor"]] = stored
        elif "lora_" in name:
            raise InputError(
                f"the adapter in {adapter.folder} holds {stored}, which plain LoRA does not have; "
                f"merge it with PEFT (model.merge_and_unload()), save the model and pass that folder"
            )
    return modules


def _edit(adapter: Adapter, module: str, factors: Mapping[str, str]) -> LoraEdit:
    embedding = "lora_embedding_A" in factors
    A, B = (factors.get(f"lora_embedding_{x}" if embedding else f"lora_{x}") for x in "AB")
    if A is None or B is None:
        raise InputError(
            f"the adapter in {adapter.folder} has one LoRA factor of {module} and not the other; it is cut short"
        )
    rank, *inputs = adapter.tensors.shape(A)
    outputs, *inner = adapter.tensors.shape(B)
    weight = adapter.base.shape(adapter.base_tensor(f"{module}.weight"))
    size = (outputs, math.prod(inputs))
    straight, turned = (weight[0], math.prod(weight[1:])) == size, weight == size[::-1]
    if math.prod(inner) != rank or not (straight or turned):
        raise InputError(
            f"the adapter in {adapter.folder} updates {module} by {outputs}×{size[1]} at rank {rank}, but its base "
            f"{adapter.base.source} has {'×'.join(map(str, weight))}; it was trained on another model"
        )
    transposed = turned and (not straight or embedding or bool(adapter.config.get("fan_in_fan_out")))
    return LoraEdit(adapter.tensors, A, B, _scaling(adapter, module, rank), transposed)


def _scaling(adapter: Adapter, module: str, rank: int) -> float:
    alpha = _alpha(adapter, module)
    if not isinstance(alpha, int | float):
        raise InputError(f"adapter_config.json in {adapter.folder} has lora_alpha={alpha!r}, expected a number")
    return alpha / math.sqrt(rank) if adapter.config.get("use_rslora") else alpha / rank


def _alpha(adapter: Adapter, module: str) -> Any:
    """The common alpha, unless `alpha_pattern` has a regular expression for the end of the module's name."""
    patterns = adapter.config.get("alpha_pattern") or {}
    try:
        return next(
            (patterns[key] for key in patterns if re.match(rf"(.*\.)?({key})$", module)),
            adapter.config.get("lora_alpha", 8),
        )
    except re.error as error:
        raise InputError(f"adapter_config.json in {adapter.folder} has an invalid alpha_pattern: {error}") from error


LORA = AdapterMethod(prefix="lora_", edits=lora_edits)
