"""Adapt parameters that are not the weight of a layer, mainly stacks of experts (`target_parameters` of PEFT)."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from math import prod
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from spectralbasis.checkpoints import matrix_name
from spectralbasis.checkpoints.fused import Rows, split_fused
from spectralbasis.checkpoints.names import expert_name
from spectralbasis.errors import InputError
from spectralbasis.tuner.factors import Factors
from spectralbasis.tuner.forms import Parametrisation
from spectralbasis.tuner.layer import SpectralLayer, dense_update


@dataclass(frozen=True)
class Held:
    """A parameter where it is held.

    Attributes:
        key: of the parameter in the model, without the wrappers of adapters.
        module: that holds it.
        attribute: its name there.
        config: of the model, which says how fused weights are laid out.
    """

    key: str
    module: nn.Module
    attribute: str
    config: Mapping[str, Any]

    @property
    def parameter(self) -> Tensor:
        """The parameter itself."""
        return getattr(self.module, self.attribute)


@dataclass(frozen=True)
class Slice:
    """One logical matrix in a parameter.

    Attributes:
        key: of the matrix, which has the number of the expert and the part: `….experts.3.gate_up_proj.gate`.
        expert: its number; None where the parameter is no stack.
        number: of the part within the expert, 0 where the weight is one matrix.
        rows: of the expert's matrix; None for all of them.
    """

    key: str
    expert: int | None
    number: int = 0
    rows: Rows | None = None

    @cached_property
    def name(self) -> str:
        """The stable name of the matrix."""
        return matrix_name(self.key)


def held_parameters(model: nn.Module) -> Iterator[Held]:
    """Every parameter of the model itself, not of its adapters."""
    config = BaseTuner.get_model_config(model)
    for path, module in model.named_modules():
        if ".spectral_" in f".{path}":
            continue
        for name, _ in module.named_parameters(recurse=False):
            yield Held(f"{path.replace('.base_layer', '')}.{name}".removeprefix("."), module, name, config)


def slices(held: Held) -> list[Slice]:
    """The matrices in a parameter, in the order in which their numbers are stored: by expert, then by part.

    Raises:
        InputError: the parameter is neither a matrix nor a stack of matrices.
    """
    shape = held.parameter.shape
    if len(shape) not in (2, 3):
        raise InputError(
            f"{held.key} is {tuple(shape)}, neither a matrix nor a stack of one for each expert; "
            "leave it out of target_parameters"
        )
    outputs, inputs = held.parameter.shape[-2:]
    rows, columns = (inputs, outputs) if is_transposed(held.module, held.attribute) else (outputs, inputs)
    experts: Iterable[int | None] = range(shape[0]) if len(shape) == 3 else [None]
    parts = split_fused(held.key, rows, columns, held.config)
    plain = held.key.removesuffix(".weight")
    found = []
    for expert in experts:
        key = plain if expert is None else expert_name(plain, expert)
        if parts is None:
            found.append(Slice(key, expert))
        else:
            found += [Slice(f"{key}.{part}", expert, i, of) for i, (part, of) in enumerate(parts.items())]
    return found


def is_transposed(module: nn.Module, attribute: str) -> bool:
    """Whether a parameter is stored as (…, in, out): where its module says so, or its sizes fit in no other way."""
    if isinstance(module, Conv1D):
        return True
    if getattr(module, attribute).ndim != 3:
        return False
    declared = getattr(module, "is_transposed", None)
    if declared is not None:
        return bool(declared)
    gate_up, down = (getattr(module, name, None) for name in ("gate_up_proj", "down_proj"))
    if not (isinstance(gate_up, Tensor) and isinstance(down, Tensor) and gate_up.ndim == down.ndim == 3):
        return False
    return tuple(gate_up.shape[1:]) == (down.shape[2], 2 * down.shape[1])


class ParamWrapper(SpectralLayer):
    """A module of which one parameter, a matrix or a stack of one for each expert, has spectral coefficients.

    The module runs with the changed parameter in place of its own. Several parameters of one module have nested
    wrappers, which PEFT knows by this class name. Rows of a batch cannot have adapters of their own, since experts see
    the rows mixed.

    Args:
        base_layer: the module, or the wrapper of another parameter of it.
        adapter_name: name of the first adapter.
        parameter_name: of a parameter (experts, out, in), (experts, in, out) where the module says `is_transposed`, or
            (out, in).
        slices: all matrices in the parameter.
        options: see `update_layer`; `factors` are a list with those of each matrix, `parametrisation` is a `Row`.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, *, parameter_name: str, slices: Sequence[Slice], **options: Any
    ) -> None:
        self.parameter_name = parameter_name
        self.slices = list(slices)
        super().__init__(base_layer, adapter_name, **options)

    @property
    def parameter(self) -> nn.Parameter:
        """The wrapped parameter, frozen."""
        return getattr(self.get_base_layer(), self.parameter_name)

    def features(self) -> tuple[int, int]:
        """Inputs and outputs of one matrix of the parameter."""
        outputs, inputs = self.parameter.shape[-2:]
        return (outputs, inputs) if self._is_transposed() else (inputs, outputs)

    def adapted_forward(self, x: Tensor, active: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """The module's output with `W + Σ ΔW` as its parameter."""
        if not active:
            return self.base_layer(x, *args, **kwargs)
        changed: Tensor = self.parameter
        for name in active:
            changed = changed + self._update(name, changed.dtype)
        return functional_call(self.base_layer, {self._path(): changed}, (x, *args), kwargs, tie_weights=False)

    @torch.no_grad()
    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """`U C Vᵀ` of every expert in the layout of the parameter, in float32 or wider."""
        return self._update(adapter_name)

    def set_weighted(self, adapter_name: str, adapters: Sequence[str], weights: Sequence[float]) -> None:
        """Set the numbers of an adapter so that its C are the weighted sums of those of others."""
        rows = [cast(Row, self.spectral_parametrisations[name])(self.stored(name).detach()) for name in adapters]
        sums = [
            sum((w * C for w, C in zip(weights[1:], Cs[1:], strict=True)), weights[0] * Cs[0])
            for Cs in zip(*rows, strict=True)
        ]
        stored = self.stored(adapter_name)
        stored.data = cast(Row, self.spectral_parametrisations[adapter_name]).inverse(sums).to(stored.dtype)

    def check_rows(self, x: Tensor, adapter_names: list[str]) -> None:
        """Raise ValueError: there are no rows to have adapters."""
        raise ValueError(
            f"adapter_names gives each row its adapter, which {self.parameter_name} cannot have: experts see the rows "
            "mixed; call set_adapter and run one adapter at a time"
        )

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module without its wrappers; PEFT calls this when it unloads."""
        layer: nn.Module = self
        while isinstance(layer, ParamWrapper):
            if merge:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            layer = layer.base_layer
        return layer

    def _update(self, adapter_name: str, dtype: torch.dtype | None = None) -> Tensor:
        """ΔW in the layout of the parameter; `dtype` None leaves it in float32 or wider."""
        row = cast(Row, self.spectral_parametrisations[adapter_name])
        factors = cast(Iterable[Factors], self.spectral_factors[adapter_name])
        parts = zip(row.keys, row(self.stored(adapter_name)), factors, row.matrices, strict=True)
        updates = {key: dense_update(C, *held.first(one.k), one.form) for key, C, held, one in parts}
        groups = groupby(self.slices, lambda one: one.expert)
        experts = [self._expert_update(list(group), updates).to(dtype) for _, group in groups]
        update = experts[0] if self.parameter.ndim == 2 else torch.stack(experts)
        return update.mT if self._is_transposed() else update

    def _expert_update(self, parts: Sequence[Slice], updates: Mapping[str, Tensor]) -> Tensor:
        """ΔW (out, in) of one expert from those of its parts; zero where an adapter does not train one."""
        inputs, outputs = self.features()
        like = next(iter(updates.values()))
        found = [
            updates[one.key] if one.key in updates else like.new_zeros(one.rows.count if one.rows else outputs, inputs)
            for one in parts
        ]
        if parts[0].rows is None:
            return found[0]
        blocks = [
            update.unflatten(0, (one.rows.groups, -1)) for update, one in zip(found, parts, strict=True) if one.rows
        ]
        return torch.cat(blocks, 1).flatten(0, 1)

    def _is_transposed(self) -> bool:
        return is_transposed(self.get_base_layer(), self.parameter_name)

    def _path(self) -> str:
        """Name of the parameter in `base_layer`."""
        depth, layer = 0, self.base_layer
        while isinstance(layer, ParamWrapper):
            depth, layer = depth + 1, layer.base_layer
        return "base_layer." * depth + self.parameter_name

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        for held in (self.spectral_coefficients, self.spectral_factors, self.spectral_parametrisations):
            if not any(parameter.is_meta for parameter in held.parameters()):
                held[adapter_name] = held[adapter_name].to(device or self.parameter.device, self.parameter.dtype)

    def extra_repr(self) -> str:
        return f"parameter_name={self.parameter_name!r}"


class Row(nn.Module):
    """The parametrisations of the matrices in a parameter, whose numbers are stored one after another.

    Args:
        keys: of the matrices that an adapter trains, in the order of `slices`.
        matrices: the parametrisation of each.
    """

    def __init__(self, keys: Sequence[str], matrices: Sequence[Parametrisation]) -> None:
        super().__init__()
        self.keys = list(keys)
        self.held = nn.ModuleList(matrices)
        self.sizes = [prod(one.shape) for one in matrices]
        self.shape = (sum(self.sizes),)

    @property
    def matrices(self) -> list[Parametrisation]:
        """One for each matrix."""
        return cast(list[Parametrisation], list(self.held))

    def forward(self, stored: Tensor) -> list[Tensor]:
        """C of each matrix."""
        parts = zip(self.matrices, stored.split(self.sizes), strict=True)
        return [one(part.reshape(one.shape)) for one, part in parts]

    def inverse(self, Cs: Sequence[Tensor]) -> Tensor:
        """The stored numbers of the C of each matrix."""
        return torch.cat([one.inverse(C).flatten() for one, C in zip(self.matrices, Cs, strict=True)])
