"""Parameters that are no layer's weight, above all stacks of experts; PEFT calls them `target_parameters`."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from spectralbasis.errors import InputError
from spectralbasis.tuner.factors import Factors
from spectralbasis.tuner.layer import SpectralLayer, dense_update
from spectralbasis.tuner.originals import Target, check_dense, unique_names
from spectralbasis.tuner.parametrisation import Parametrisation


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
        options: see `update_layer`.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, *, parameter_name: str, **options: Any) -> None:
        self.parameter_name = parameter_name
        super().__init__(base_layer, adapter_name, **options)

    @property
    def parameter(self) -> nn.Parameter:
        """The wrapped parameter, frozen."""
        return getattr(self.get_base_layer(), self.parameter_name)

    def features(self) -> tuple[int, int]:
        """Inputs and outputs of one matrix of the parameter."""
        outputs, inputs = self.parameter.shape[-2:]
        turned = self.parameter.ndim == 3 and _is_transposed(self.get_base_layer())
        return (outputs, inputs) if turned else (inputs, outputs)

    def update_layer(self, adapter_name: str, *, factors: Any, parametrisation: Any, **options: Any) -> None:
        """Add an adapter; see `SpectralLayer.update_layer`.

        Args:
            adapter_name: a new name.
            factors: one for each expert.
            parametrisation: one for each expert; their numbers are stored in a row.
            options: see there.
        """
        held: dict[str, Any] = {"factors": nn.ModuleList(factors), "parametrisation": _Row(parametrisation)}
        super().update_layer(adapter_name, **held, **options)

    def adapted_forward(self, x: Tensor, active: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """The module's output with `W + Σ ΔW` as its parameter."""
        if not active:
            return self.base_layer(x, *args, **kwargs)
        changed: Tensor = self.parameter
        for name in active:
            changed = changed + self._update(name).to(changed.dtype)
        return functional_call(self.base_layer, {self._path(): changed}, (x, *args), kwargs, tie_weights=False)

    @torch.no_grad()
    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """`U C Vᵀ` of every expert in the layout of the parameter, in float32 or wider."""
        return self._update(adapter_name)

    def set_weighted(self, adapter_name: str, adapters: Sequence[str], weights: Sequence[float]) -> None:
        """Set the numbers of an adapter to the weighted sum of those of others, which have the same entries."""
        terms = [w * self.stored(name).detach() for name, w in zip(adapters, weights, strict=True)]
        self.stored(adapter_name).data = sum(terms[1:], terms[0])

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

    def _update(self, adapter_name: str) -> Tensor:
        row = cast(_Row, self.spectral_parametrisations[adapter_name])
        factors = cast(Iterable[Factors], self.spectral_factors[adapter_name])
        experts = zip(row(self.stored(adapter_name)), factors, row.experts, strict=True)
        updates = [dense_update(C, *held.first(one.k), one.form) for C, held, one in experts]
        if self.parameter.ndim == 2:
            return updates[0]
        return torch.stack(updates).mT if _is_transposed(self.get_base_layer()) else torch.stack(updates)

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


class _Row(nn.Module):
    """The parametrisations of the experts, whose numbers are stored one after another."""

    def __init__(self, experts: Sequence[Parametrisation]) -> None:
        super().__init__()
        self.held = nn.ModuleList(experts)
        self.sizes = [prod(expert.shape) for expert in experts]
        self.shape = (sum(self.sizes),)

    @property
    def experts(self) -> list[Parametrisation]:
        """One for each expert."""
        return cast(list[Parametrisation], list(self.held))

    def forward(self, stored: Tensor) -> list[Tensor]:
        """C of each expert."""
        parts = zip(self.experts, stored.split(self.sizes), strict=True)
        return [expert(part.reshape(expert.shape)) for expert, part in parts]


def parameter_targets(model: nn.Module, wanted: Collection[str]) -> list[Target]:
    """The matrices, one for each expert, in parameters whose names end with a wanted one; with their original weights.

    Raises:
        InputError: a parameter has other than two or three dimensions, or no dense weight.
    """
    wrappers = [module for module in model.modules() if isinstance(module, ParamWrapper)]
    originals = {(id(one.get_base_layer()), one.parameter_name): one.original_weight for one in wrappers}
    matrices: dict[str, Tensor] = {}
    for key, module, name in _parameters(model, wanted):
        weight = originals.get((id(module), name), getattr(module, name).detach())
        check_dense(key, weight)
        stack = weight.mT if weight.ndim == 3 and _is_transposed(module) else weight
        matrices |= zip(matrix_keys(key, weight), stack.unsqueeze(0) if stack.ndim == 2 else stack, strict=True)
    names = unique_names(list(matrices))
    return [Target(key, names[key], nn.Module(), W) for key, W in matrices.items()]


def matrix_keys(key: str, parameter: Tensor) -> list[str]:
    """The key of each matrix in a parameter: a stack's have the expert's number before the parameter's name.

    Raises:
        InputError: the parameter is neither a matrix nor a stack of matrices.
    """
    module, _, name = key.rpartition(".")
    if parameter.ndim not in (2, 3):
        raise InputError(
            f"{key} is {tuple(parameter.shape)}, neither a matrix nor a stack of one for each expert; "
            "leave it out of target_parameters"
        )
    return [key] if parameter.ndim == 2 else [f"{module}.{expert}.{name}" for expert in range(len(parameter))]


def _parameters(model: nn.Module, wanted: Collection[str]) -> Iterator[tuple[str, nn.Module, str]]:
    """Key, module and name of what PEFT will wrap."""
    for path, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            key = f"{path.replace('.base_layer', '')}.{name}"
            if key in wanted or key.endswith(tuple(f".{one}" for one in wanted)):
                yield key, module, name


def _is_transposed(module: nn.Module) -> bool:
    return bool(getattr(module, "is_transposed", False))
