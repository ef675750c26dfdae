"""Parameters that are no layer's weight, above all stacks of experts; PEFT calls them `target_parameters`.

What is adapted in a model: the targeted matrices, with their stable names and their original weights.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from math import prod
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from spectralbasis.basis import SpectralBasis
from spectralbasis.checkpoints import matrix_name
from spectralbasis.checkpoints.fused import Rows, split_fused
from spectralbasis.errors import InputError
from spectralbasis.triplets import Triplets, matrix_hash
from spectralbasis.tuner.factors import BASES, Factors
from spectralbasis.tuner.layer import (
    Convolutions,
    Layers,
    SpectralLayer,
    backend_of,
    dense_update,
    dequantized,
    to_matrix,
)
from spectralbasis.tuner.parametrisation import Parametrisation

DENSE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Target:
    """A matrix to adapt.

    Attributes:
        key: of its module in the model.
        name: the stable name of the matrix.
        module: that holds it.
        W: the original weight, (m, n); of a quantized one, what can be had of it.
        known_hash: of the weight before it was quantized, where a basis file tells it.
        also: other keys by which patterns may name it.
        basis_name: how the basis file calls it; empty where it has the same name there.
    """

    key: str
    name: str
    module: nn.Module
    W: Tensor
    known_hash: str | None = None
    also: tuple[str, ...] = ()
    basis_name: str = ""

    @property
    def name_in_basis(self) -> str:
        """How a basis calls the matrix."""
        return self.basis_name or self.name

    @cached_property
    def hash(self) -> str:
        """What identifies the base: the hash of the weight, of a quantized one that of its original where known."""
        return self.known_hash or matrix_hash(self.W)


def find_targets(modules: Mapping[str, nn.Module], basis: str = "pretrained") -> list[Target]:
    """Name the modules and read their weights, as they were before any merge.

    Args:
        modules: key in the model → module.
        basis: as in `SpectralConfig`; a file says what quantized weights were before.

    Raises:
        InputError: a module has no matrix that coefficients can be put on.
    """
    names = unique_names(list(modules))
    file = None if basis in BASES else SpectralBasis.load(basis)
    return [_target(key, names[key], module, file) for key, module in modules.items()]


def unique_names(keys: Sequence[str]) -> dict[str, str]:
    """Stable matrix names; modules that would share one keep their full keys."""
    names = {key: matrix_name(key) for key in keys}
    count = Counter(names.values())
    return {key: name if count[name] == 1 else key for key, name in names.items()}


def check_dense(key: str, weight: Tensor) -> None:
    """Raise InputError unless a weight is at hand, whole and in a dtype that has singular vectors."""
    if hasattr(weight, "full_tensor") or not weight.numel():
        raise InputError(
            f"{key} is sharded over processes, so its singular vectors cannot be found; add the adapter before the "
            "model is sharded (FSDP: before prepare; DeepSpeed: ZeRO stage 2, as stage 3 shards while it loads)"
        )
    if weight.is_meta or weight.dtype not in DENSE_DTYPES:
        raise InputError(
            f"{key} has no dense weight here ({weight.dtype} on {weight.device}), so its singular vectors cannot be "
            "found; load the base unquantized and not on the meta device"
        )


def _target(key: str, name: str, module: nn.Module, file: SpectralBasis | None) -> Target:
    layer: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    backend = backend_of(layer)
    if backend is not None:
        return _quantized_target(key, name, module, backend, file)
    _check_layer(key, layer)
    weight = module.original_weight if isinstance(module, SpectralLayer) else layer.weight.detach()
    check_dense(key, weight)
    return Target(key, name, module, to_matrix(weight, layer))


def _quantized_target(
    key: str, name: str, module: nn.Module, backend: QuantizationBackend, file: SpectralBasis | None
) -> Target:
    original = file[name] if file is not None and name in file else None
    try:
        # On the CPU, since the dequantized weights of all targets are held at once and may not fit on the device.
        W = (module.original_weight if isinstance(module, SpectralLayer) else dequantized(module, backend)).cpu()
    except InputError as error:
        if original is None:
            raise InputError(f"{key}: {error}") from error
        return Target(key, name, module, (original.U * original.S) @ original.Vh, original.base_hash)
    if original is None or file is None:
        return Target(key, name, module, W)
    _check_quantized_from(original, name, W, file.source)
    return Target(key, name, module, W, original.base_hash)


def _check_quantized_from(original: Triplets, name: str, W: Tensor, source: str) -> None:
    """Raise InputError if the triplets are far from those of W: rounding W moves `u_iᵀ W v_i` by far less than this."""
    found = ((W.float() @ original.Vh.T) * original.U).sum(0) if original.shape == tuple(W.shape) else None
    if found is None or torch.linalg.norm(found - original.S) > torch.linalg.norm(original.S) / 2:
        raise InputError(
            f"the basis file is of {source or 'a model'}, whose weights are not those that {name} was quantized from; "
            "compute it from the checkpoint that was quantized: spectralbasis basis MODEL -o FILE"
        )


def _check_layer(key: str, layer: nn.Module) -> None:
    if not isinstance(layer, Layers):
        raise InputError(
            f"Target module {key} is not supported: it is {type(layer).__name__}, and spectral coefficients take "
            "torch.nn.Linear, Conv1d, Conv2d, Conv3d and Embedding and transformers Conv1D; leave it out of "
            "target_modules"
        )
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        raise InputError(
            f"{key} belongs to torch.nn.MultiheadAttention, which reads its weight and never calls it, so coefficients "
            "there would change nothing; leave it out with exclude_modules"
        )
    if isinstance(layer, Convolutions) and layer.groups != 1:
        raise InputError(
            f"{key} is a convolution of {layer.groups} groups: each output sees a part of the input, so its weight is "
            "no one matrix; leave it out with exclude_modules"
        )
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        raise InputError(
            f"{key} has max_norm={layer.max_norm:g}, with which looking up changes the table that the directions are "
            "of; leave it out with exclude_modules"
        )


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
    rows, columns = (inputs, outputs) if _is_transposed(held.module, held.attribute) else (outputs, inputs)
    experts: Iterable[int | None] = range(shape[0]) if len(shape) == 3 else [None]
    parts = split_fused(held.key, rows, columns, held.config)
    plain = held.key.removesuffix(".weight")
    found = []
    for expert in experts:
        key = plain if expert is None else _expert_key(plain, expert)
        if parts is None:
            found.append(Slice(key, expert))
        else:
            found += [Slice(f"{key}.{part}", expert, i, of) for i, (part, of) in enumerate(parts.items())]
    return found


def parameter_targets(model: nn.Module, wanted: Mapping[str, Sequence[str]]) -> list[Target]:
    """The matrices in parameters, with their original weights.

    Args:
        model: with or without adapters.
        wanted: key of the parameter → keys of its matrices.

    Raises:
        InputError: a parameter has other than two or three dimensions, or no dense weight.
    """
    wrappers = [module for module in model.modules() if isinstance(module, ParamWrapper)]
    originals = {(id(one.get_base_layer()), one.parameter_name): one.original_weight for one in wrappers}
    found = []
    for held in held_parameters(model):
        if held.key not in wanted:
            continue
        weight = originals.get((id(held.module), held.attribute), held.parameter.detach())
        check_dense(held.key, weight)
        turned = weight.mT if _is_transposed(held.module, held.attribute) else weight
        for one in slices(held):
            if one.key in wanted[held.key]:
                W = turned if one.expert is None else turned[one.expert]
                W = W if one.rows is None else one.rows.of(W)
                also = (held.key.removesuffix(".weight"), _without_part(one))
                found.append(Target(one.key, one.key, nn.Module(), W, also=also))
    names = unique_names([target.key for target in found])
    return [replace(target, name=names[target.key]) for target in found]


def _without_part(one: Slice) -> str:
    return one.key if one.rows is None else one.key.rpartition(".")[0]


def _expert_key(key: str, expert: int) -> str:
    """As `logical_matrices` names the expert of a stack."""
    return key.replace("experts.", f"experts.{expert}.", 1) if "experts." in key else f"{key}.{expert}"


def _is_transposed(module: nn.Module, attribute: str) -> bool:
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
        return _is_transposed(self.get_base_layer(), self.parameter_name)

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
