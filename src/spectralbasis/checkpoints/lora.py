"""LoRA adapters and the variants that give a dense weight: rsLoRA, DoRA, PiSSA and OLoRA.

PiSSA and OLoRA start B·A as a part of W and subtract this part from W. An adapter that was saved without conversion
holds only the trained B·A, so the part is computed again where it is well determined. PEFT computes it in float32, so
it differs between machines by about `FLOAT32_ERROR` over the relative gap between the part and the rest of W.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from typing_extensions import TypedDict

from spectralbasis.checkpoints.adapters import (
    AdaptedBase,
    Adapter,
    AdapterMethod,
    Edit,
    adapted_name,
    edited_dtype,
    register_adapter_method,
)
from spectralbasis.checkpoints.checkpoint import Checkpoint
from spectralbasis.checkpoints.matrices import Layouts, dtype_name
from spectralbasis.errors import InputError
from spectralbasis.linalg import leading_svd
from spectralbasis.printable import shortened, warn
from spectralbasis.records import checked, pattern_of

Start = Callable[[Tensor, int, float], Tensor]
"""(W (out, in), rank, scaling) → what the initialisation subtracts from W."""
FLOAT32_ERROR = 1e-6
LARGEST_SINE = 1e-2
CONVERSION = (
    "convert the adapter to LoRA where it was trained (save_pretrained with path_initial_model_for_weight_conversion) "
    "or merge it there, and pass that folder"
)
_FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<factor>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|lora_B\.bias)"
    r"(\.weight)?"
)
# These change the base, or the formula, at load time, so B·A alone would be the wrong update.
_UNREADABLE_OPTIONS = (
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
)
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_LARGEST_ALPHA = 1e30
_PAIRS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))
_MERGE = "merge it with PEFT (model.merge_and_unload()), save the model and pass that folder"


class _Switches(TypedDict, total=False):
    """What `adapter_config.json` switches on; PEFT would take a text such as "no" for yes."""

    use_rslora: bool | None
    use_dora: bool | None
    fan_in_fan_out: bool | None


def lora_edits(adapter: Adapter) -> Mapping[str, Edit]:
    """The edits of a LoRA adapter, by tensor of the base. A bias for a layer that has none is left out.

    Raises:
        InputError: the adapter uses a variant whose weights cannot be known, or a factor is missing or misshapen.
    """
    _refuse_variants(adapter)
    layouts = Layouts(adapter.base, adapter.base.config)
    edits: dict[str, Edit] = {}
    modules = _factors(adapter)
    wanted = adapter.config.get("target_modules")
    if isinstance(wanted, list) and all(isinstance(name, str) for name in wanted):
        others = [name for name in modules if not any(name == end or name.endswith(f".{end}") for end in wanted)]
        if others:
            warn(
                f"the adapter in {adapter.folder} holds factors of {shortened(others[0], 100)}, which target_modules "
                f"in its config leaves out ({len(others)} modules in all): PEFT does not load them, but they are "
                "measured here",
                stacklevel=2,
            )
    for module, factors in modules.items():
        edit = _edit(adapter, layouts, module, factors)
        edits[adapter.base_tensor(f"{module}.weight")] = edit
        bias = adapter.find_base_tensor(f"{module}.bias")
        if "lora_B.bias" in factors and bias is not None:
            edits[bias] = BiasEdit(adapter.tensors, factors["lora_B.bias"], edit.scaling)
    return edits


def _refuse_variants(adapter: Adapter) -> None:
    checked(dict(adapter.config), _Switches, f"adapter_config.json in {adapter.folder}")
    used = [option for option in _UNREADABLE_OPTIONS if adapter.config.get(option)]
    if used:
        raise InputError(
            f"the LoRA adapter in {adapter.folder} uses {', '.join(used)}, with which the tuned weights are not "
            f"base + scaling·B·A; {_MERGE}"
        )
    start = adapter.config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS and str(start) not in STARTS:
        raise InputError(
            f"the LoRA adapter in {adapter.folder} has init_lora_weights={start!r}, which changed the base in a way "
            f"that cannot be repeated from the adapter alone; {CONVERSION}"
        )


def _factors(adapter: Adapter) -> dict[str, dict[str, str]]:
    """Module name to the stored names of its factors, magnitude and bias."""
    modules: dict[str, dict[str, str]] = {}
    for stored in adapter.tensors.names():
        name = adapted_name(stored)
        match = _FACTOR.fullmatch(name)
        if match:
            factors = modules.setdefault(match["module"], {})
            if factors.setdefault(match["factor"], stored) != stored:
                raise InputError(
                    f"the adapter in {adapter.folder} holds {factors[match['factor']]} and {stored}, two tensors for "
                    f"one factor; remove one of them"
                )
        elif "lora_" in name:
            raise InputError(f"the adapter in {adapter.folder} holds {stored}, which LoRA does not have; {_MERGE}")
    return modules


def _edit(adapter: Adapter, layouts: Layouts, module: str, factors: Mapping[str, str]) -> "LoraEdit":
    pairs = [pair for pair in _PAIRS if any(factor in factors for factor in pair)]
    if len(pairs) != 1:
        raise InputError(
            f"the adapter in {adapter.folder} has {', '.join(factors)} of {module}, expected lora_A and lora_B, or "
            f"lora_embedding_A and lora_embedding_B; save the adapter again"
        )
    if not all(factor in factors for factor in pairs[0]):
        raise InputError(
            f"the adapter in {adapter.folder} has one LoRA factor of {module} and not the other; it is cut short"
        )
    embedding = "lora_embedding_A" in pairs[0]
    A, B = (factors[factor] for factor in pairs[0])
    for factor in (A, B):
        shape, dtype = adapter.tensors.shape(factor), adapter.tensors.dtype(factor)
        if len(shape) < 2 or 0 in shape or not dtype.is_floating_point:
            raise InputError(
                f"the adapter in {adapter.folder} holds {factor} as {dtype_name(dtype)} of shape {shape}, expected a "
                "matrix of real numbers of rank at least 1; save the adapter again"
            )
    rank = adapter.tensors.shape(A)[0]
    named = _of_module(adapter, module, "rank_pattern", adapter.config.get("r"))
    if named is not None and named != rank:  # then the config, and so alpha, is that of another adapter
        raise InputError(
            f"adapter_config.json in {adapter.folder} has r={shortened(repr(named), 40)} for {module}, and its factors "
            f"have rank {rank}; its two files belong to different adapters, so save it again"
        )
    alpha = _of_module(adapter, module, "alpha_pattern", adapter.config.get("lora_alpha", 8))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < _LARGEST_ALPHA:
        raise InputError(f"adapter_config.json in {adapter.folder} has lora_alpha={alpha!r}, expected a number")
    start = STARTS.get(str(adapter.config.get("init_lora_weights")))
    base = adapter.base  # where it stores the module's weight, PEFT has taken the start out of it already
    if embedding or (isinstance(base, AdaptedBase) and adapter.base_tensor(f"{module}.weight") in base.stored):
        start = None
    return LoraEdit(
        tensors=adapter.tensors,
        A=A,
        B=B,
        scaling=alpha / math.sqrt(rank) if adapter.config.get("use_rslora") else alpha / rank,
        transposed=_transposed(adapter, layouts, module, A, B),
        start=start,
        magnitude=_magnitude(adapter, module, factors),
    )


def _transposed(adapter: Adapter, layouts: Layouts, module: str, A: str, B: str) -> bool:
    """Whether the base stores the module's weight as (in, out); by shape, and where that is square by what is known."""
    rank, *inputs = adapter.tensors.shape(A)
    outputs, *inner = adapter.tensors.shape(B)
    tensor = adapter.base_tensor(f"{module}.weight")
    weight = adapter.base.shape(tensor)
    size = (outputs, math.prod(inputs))
    straight, turned = (*weight[:1], math.prod(weight[1:])) == size, weight == size[::-1]
    if math.prod(inner) != rank or not (straight or turned):
        if (reason := adapter.base.unreadable(tensor)) is not None:
            raise InputError(f"{module}, which the adapter in {adapter.folder} updates, cannot be read: {reason}")
        raise InputError(
            f"the adapter in {adapter.folder} updates {module} by {outputs}×{size[1]} at rank {rank}, but its base "
            f"{adapter.base.source} has {'×'.join(map(str, weight))}; it was trained on another model"
        )
    fan_in_fan_out = (
        adapted_name(A).endswith("lora_embedding_A")
        or bool(adapter.config.get("fan_in_fan_out"))
        or layouts.transposed(tensor)
    )
    return turned and (not straight or fan_in_fan_out)


def _magnitude(adapter: Adapter, module: str, factors: Mapping[str, str]) -> str | None:
    magnitude, expected = factors.get("lora_magnitude_vector"), bool(adapter.config.get("use_dora"))
    if (magnitude is not None) is not expected:
        found = "has" if magnitude is not None else "lacks"
        raise InputError(
            f"the adapter in {adapter.folder} {found} the lora_magnitude_vector of {module}, but its config has "
            f"use_dora={expected}; its two files belong to different adapters, so save it again"
        )
    outputs = adapter.tensors.shape(factors["lora_embedding_B" if "lora_embedding_B" in factors else "lora_B"])[0]
    if magnitude is not None and math.prod(adapter.tensors.shape(magnitude)) != outputs:
        raise InputError(
            f"the adapter in {adapter.folder} holds {magnitude} of shape {adapter.tensors.shape(magnitude)}, expected "
            f"one length for each of the {outputs} rows of {module}; save the adapter again"
        )
    return magnitude


def _of_module(adapter: Adapter, module: str, field: str, common: Any) -> Any:
    """The common value, unless a field of the config has a regular expression for the end of the module's name."""
    patterns = adapter.config.get(field) or {}
    if not isinstance(patterns, dict):
        raise InputError(
            f"adapter_config.json in {adapter.folder} has {field}={shortened(repr(patterns), 80)}, expected names with "
            "their numbers"
        )
    try:
        found = pattern_of(patterns, module)
    except InputError as error:
        raise InputError(
            f"adapter_config.json in {adapter.folder} has a {field} that cannot be used: {error}"
        ) from error
    return common if found is None else patterns[found]


@dataclass(frozen=True)
class LoraEdit:
    """`W + scaling · B A` of one weight, less what the initialisation took out of it, each row rescaled for DoRA.

    Attributes:
        tensors: the adapter's; the factors are read when the edit is called.
        A: name of the (rank, in) factor.
        B: name of the (out, rank) factor.
        scaling: factor of the update.
        transposed: whether the base stores the weight as (in, out).
        start: what the initialisation subtracts from the base.
        magnitude: name of DoRA's length of each row.
    """

    tensors: Checkpoint
    A: str
    B: str
    scaling: float
    transposed: bool
    start: Start | None
    magnitude: str | None

    def __call__(self, weight: Tensor) -> Tensor:
        """The tuned weight in the shape of the base's, in float32 or wider."""
        stored = weight.to(edited_dtype(weight.dtype))
        A, B = (self.tensors.read(name).float().flatten(1) for name in (self.A, self.B))
        W = (stored.T if self.transposed else stored).flatten(1)
        tuned = W + self.scaling * (B @ A)
        if self.start is not None:
            tuned = tuned - self.start(W, len(A), self.scaling)
        if self.magnitude is not None:
            lengths = self.tensors.read(self.magnitude).float().flatten()
            tuned = tuned * (lengths / torch.linalg.vector_norm(tuned, dim=1))[:, None]
        return (tuned.T if self.transposed else tuned).reshape(weight.shape)


@dataclass(frozen=True)
class BiasEdit:
    """Adds the bias of the second factor, which the layer adds to its own."""

    tensors: Checkpoint
    bias: str
    scaling: float

    def __call__(self, bias: Tensor) -> Tensor:
        """The tuned bias, in float32 or wider."""
        return bias.to(edited_dtype(bias.dtype)) + self.scaling * self.tensors.read(self.bias).float()


def leading_part(W: Tensor, rank: int, scaling: float) -> Tensor:
    """PiSSA (arXiv 2404.02948, equation 2): the leading triplets, whatever the scaling.

    Raises:
        InputError: σ_rank and σ_{rank+1} are too close for their subspaces to be told apart in float32.
    """
    svd = leading_svd(W, rank)
    gap = float(svd.S[-1] - svd.next_singular_value)
    if gap * LARGEST_SINE <= FLOAT32_ERROR * float(svd.S[0]):
        raise InputError(
            f"PiSSA took the {rank} leading directions out of the base, but the singular values {rank} and {rank + 1} "
            f"of this matrix are equal to {gap / float(svd.S[0]):.1g} of the largest, so they cannot be found again; "
            f"{CONVERSION}"
        )
    return (svd.U * svd.S) @ svd.Vh


def leading_columns(W: Tensor, rank: int, scaling: float) -> Tensor:
    """OLoRA (arXiv 2406.01775): `scaling` times W projected on the span of its first columns.

    Raises:
        InputError: these columns are linearly dependent in float32.
    """
    W = W.double()
    Q, R = torch.linalg.qr(W[:, :rank])
    if float(torch.linalg.cond(R)) * FLOAT32_ERROR >= LARGEST_SINE:
        raise InputError(
            f"OLoRA took the span of the first {rank} columns out of the base, but these columns are nearly dependent, "
            f"so it cannot be found again; {CONVERSION}"
        )
    return (scaling * Q @ (Q.T @ W)).float()


STARTS: Mapping[str, Start] = MappingProxyType({"pissa": leading_part, "olora": leading_columns})
"""Start by the name that `LoraConfig.init_lora_weights` has for it."""


register_adapter_method("LORA", AdapterMethod(prefix="lora_", edits=lora_edits))
