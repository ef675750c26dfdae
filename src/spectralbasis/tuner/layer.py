"""Layers with spectral coefficients: `SpectralLayer`, which holds and merges adapters, and its three kinds.

`Linear` is the most common. In a `Convolution`, V is k filters with the same kernel, stride and padding, and U a 1×1
convolution. In an `Embedding`, a row of `W + U C Vᵀ` is the row of W plus the row of U times `C Vᵀ`.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, Self, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils.quantization_utils import (
    QuantizationBackend,
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.pytorch_utils import Conv1D

from spectralbasis.errors import InputError
from spectralbasis.printable import warn
from spectralbasis.tuner.autograd import FactoredUpdate, LinearUpdate, run
from spectralbasis.tuner.factors import Factors
from spectralbasis.tuner.forms import FORMS, Coefficients, Parametrisation
from spectralbasis.tuner.plain import PlainUpdate, is_bare, is_frozen


def backend_of(layer: nn.Module, model: nn.Module | None = None) -> QuantizationBackend | None:
    """PEFT's backend of a quantized layer; None for a dense one.

    Args:
        layer: any module.
        model: that it is part of, which knows how torchao's layers are quantized again after a merge.
    """
    options = {} if model is None else get_quantization_kwargs(model)
    return resolve_quantization_backend(layer, **{"get_apply_tensor_subclass": _unknown_scheme, **options})


def dequantized(layer: nn.Module, backend: QuantizationBackend) -> Tensor:
    """The weight of a quantized layer, (m, n).

    Raises:
        InputError: the quantization keeps no way back to a dense weight.
    """
    base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    if backend.backend_name == "bnb 4bit":
        base.state_dict()  # inference on a CPU packs the weight in another order, which saving undoes
    try:
        return backend.get_base_weight(base).detach()
    except (TypeError, NotImplementedError) as error:
        raise InputError(
            f"a {type(base).__name__} quantized by {backend.backend_name} gives no dense weight; nothing can be merged "
            "into it, and its directions come from a basis file of the checkpoint that was quantized: "
            "spectralbasis basis MODEL -o FILE, then SpectralConfig(basis='FILE')"
        ) from error


def _unknown_scheme() -> None:
    raise InputError(
        "a merged torchao weight has to be quantized again, and the model does not say how; load it through "
        "transformers with quantization_config=TorchAoConfig(...), or export the adapter and merge it into the "
        "dense checkpoint"
    )


Convolutions = nn.Conv1d | nn.Conv2d | nn.Conv3d
Layers = nn.Linear | Conv1D | nn.Embedding | Convolutions
"""Layers whose weight is one matrix."""
COEFFICIENTS_OF = ".spectral_coefficients"
"""Stands, in the name of a stored tensor, between the module and what PEFT appends."""
DENSE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def to_matrix(weight: Tensor, layer: nn.Module) -> Tensor:
    """The matrix of a weight: transposed for `Conv1D`, (out, in·kernel) for a convolution, else as stored."""
    return weight.T if isinstance(layer, Conv1D) else weight.flatten(1)


def to_weight(matrix: Tensor, layer: nn.Module) -> Tensor:
    """The inverse of `to_matrix`: a matrix in the layout of the layer's weight."""
    if isinstance(layer, Conv1D):
        return matrix.T
    return matrix.unflatten(1, layer.weight.shape[1:]) if isinstance(layer, Convolutions) else matrix


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


def add_row_updates(output: Tensor, x: Tensor, layer: "SpectralLayer", adapter_names: list[str]) -> Tensor:
    """Add to each row the update of its adapter; rows of unknown adapters, as "__base__", stay what they are.

    Adapters on one basis are served together: the input meets the directions once, then the coefficients are gathered
    for each row.

    Args:
        output: the base layer's, one row for each of the input.
        x: the layer's input, rows first.
        layer: whose adapters are meant.
        adapter_names: the adapter of each row.
    """
    groups: dict[tuple[int, str], list[str]] = {}
    for name in dict.fromkeys(adapter_names):
        if name in layer.spectral_coefficients:
            groups.setdefault((id(layer.factors(name)), layer.parametrisation(name).form), []).append(name)
    for (_, form), members in groups.items():
        factors = layer.factors(members[0])
        k = max(layer.parametrisation(name).k for name in members)
        # All padded to k directions, behind a zero entry for the rows of other adapters.
        padded = [pad(C, [0, k - C.shape[-1]] * C.ndim) for C in (layer.terms(name)[0] for name in members)]
        C = torch.stack([torch.zeros_like(padded[0]), *padded])
        position = {name: index for index, name in enumerate(members, start=1)}
        rows = torch.tensor([position.get(name, 0) for name in adapter_names], device=x.device)
        U, V = factors.first(k)
        update = layer.expand(layer.project(x, U, V), C[rows].to(V.dtype), U, V, form, output.shape)
        output = output + update.to(output.dtype)
    return output


START_SCALE = 0.3
"""Standard deviation of the coefficients that `init_weights=False` starts from."""


class SpectralLayer(nn.Module, BaseTunerLayer):
    """A layer, per adapter the numbers that it trains, what makes C of them, and U and V.

    Subclasses say how an input meets V and how U makes an output of it (`project`, `expand`).

    Attributes:
        in_features: see `features`.
        out_features: see `features`.

    Args:
        base_layer: the layer, or another tuner's layer around it.
        adapter_name: name of the first adapter.
        backend: of a base layer that is quantized.
        options: see `update_layer`.
    """

    adapter_layer_names: tuple[str, ...] = ("spectral_coefficients",)
    other_param_names: tuple[str, ...] = ("spectral_factors", "spectral_parametrisations")

    # What BaseTunerLayer provides; PEFT has no types, and nn.Module would pass these off as tensors.
    active_adapters: list[str]
    disable_adapters: bool
    get_base_layer: Callable[[], Any]
    merged: bool
    set_adapter: Callable[..., None]
    _get_embed_scale: Callable[[], Tensor | None]
    _move_adapter_to_device_of_base_layer: Callable[..., None]

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, *, backend: QuantizationBackend | None = None, **options: Any
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = backend
        self.spectral_coefficients = nn.ModuleDict()
        self.spectral_factors = nn.ModuleDict()
        self.spectral_parametrisations = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.in_features, self.out_features = self.features()
        self._original: Any = None  # a dense weight, or the quantized layer; hidden from state_dict in a tuple
        self.update_layer(adapter_name, **options)

    def project(self, x: Tensor, U: Tensor, V: Tensor) -> Tensor:
        """What C multiplies, (rows, tokens, k): the input in the directions that it arrives in."""
        raise NotImplementedError

    def expand(self, Z: Tensor, C: Tensor, U: Tensor, V: Tensor, form: str, shape: torch.Size) -> Tensor:
        """The update of an output of this shape from `project`'s result; C may have one entry for each row."""
        raise NotImplementedError

    def features(self) -> tuple[int | None, int | None]:
        """Inputs and outputs of the base layer as PEFT counts them: channels of a convolution, entries of a table."""
        return _get_in_out_features(self.get_base_layer())

    @property
    def parameter(self) -> nn.Parameter:
        """The base layer's frozen weight."""
        return self.get_base_layer().weight

    @property
    def original_weight(self) -> Tensor:
        """The weight of the base layer, in its own layout, dequantized and without merged adapters."""
        if self.quantization_backend is not None:
            layer = self.base_layer if self._original is None else self._original[0]
            return dequantized(layer, self.quantization_backend)
        return self.parameter.detach() if self._original is None else self._original

    def update_layer(
        self,
        adapter_name: str,
        *,
        factors: Factors,
        parametrisation: Parametrisation,
        init_weights: bool = True,
        inference_mode: bool = False,
    ) -> None:
        """Add an adapter.

        Args:
            adapter_name: a new name.
            factors: may be those of another adapter of this layer, and have more directions.
            parametrisation: of as many directions, or fewer.
            init_weights: start from C = 0, at which the output is exactly that of the base.
            inference_mode: leave the coefficients frozen.
        """
        self.forget()
        self.spectral_factors[adapter_name] = factors
        self.spectral_parametrisations[adapter_name] = parametrisation
        self.spectral_coefficients[adapter_name] = Coefficients(parametrisation.shape)
        if not init_weights:
            nn.init.normal_(self.stored(adapter_name), std=START_SCALE)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def stored(self, adapter_name: str) -> nn.Parameter:
        """The numbers that one adapter trains."""
        return cast(Coefficients, self.spectral_coefficients[adapter_name]).weight

    def factors(self, adapter_name: str) -> Factors:
        """The factors of one adapter."""
        return cast(Factors, self.spectral_factors[adapter_name])

    def parametrisation(self, adapter_name: str) -> Parametrisation:
        """What makes C of the numbers that one adapter trains."""
        return cast(Parametrisation, self.spectral_parametrisations[adapter_name])

    def terms(self, adapter_name: str) -> tuple[Tensor, Tensor, Tensor, str]:
        """C, U (m, k), V (n, k) and the form of C of one adapter."""
        C, form = self.coefficients(adapter_name)
        return C, *self.factors(adapter_name).first(len(C)), form

    def coefficients(self, adapter_name: str) -> tuple[Tensor, str]:
        """C and its form of one adapter."""
        parametrisation = self.parametrisation(adapter_name)
        return parametrisation(self.stored(adapter_name)), parametrisation.form

    def set_weighted(self, adapter_name: str, adapters: Sequence[str], weights: Sequence[float]) -> None:
        """Set the numbers of an adapter so that its C is the weighted sum of those that this layer has of others."""
        pairs = [pair for pair in zip(adapters, weights, strict=True) if pair[0] in self.spectral_coefficients]
        terms = [weight * self.terms(name)[0].detach() for name, weight in pairs]
        stored = self.stored(adapter_name)
        stored.data = self.parametrisation(adapter_name).inverse(sum(terms[1:], terms[0])).to(stored.dtype)

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """The base layer's output plus the update of each active adapter, or of each row's adapter."""
        if adapter_names is not None:
            self.check_rows(x, adapter_names)
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self.mixed_forward(x, adapter_names, *args, **kwargs)
        return self.adapted_forward(x, self.held_adapters(), *args, **kwargs)

    def adapted_forward(self, x: Tensor, active: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus the updates of the adapters `active`."""
        output = self.base_layer(x, *args, **kwargs)
        for name in active:
            C, U, V, form = self.terms(name)
            output = output + self.expand(self.project(x, U, V), C, U, V, form, output.shape).to(output.dtype)
        return output

    def mixed_forward(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus for each row the update of its adapter."""
        return add_row_updates(self.base_layer(x, *args, **kwargs), x, self, adapter_names)

    def held_adapters(self) -> list[str]:
        """The active adapters that this layer has."""
        return [name for name in self.active_adapters if name in self.spectral_coefficients]

    @torch.no_grad()
    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """`U C Vᵀ` of an adapter in the layout of the base weight, in float32 or wider."""
        return to_weight(dense_update(*self.terms(adapter_name)), self.get_base_layer())

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add ΔW of adapters to the base weight; the original is kept until `unmerge`, a dense one on the CPU.

        A quantized weight is dequantized, changed and quantized again.

        Args:
            safe_merge: leave everything as it is when the result is not finite.
            adapter_names: adapters to merge; None takes the active ones.

        Raises:
            ValueError: `safe_merge`, and the result is not finite.
            InputError: the weight is quantized in a way that cannot be merged into, or is no parameter.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.spectral_coefficients]
        if not names:
            return
        if self.quantization_backend is None and not isinstance(self.parameter, nn.Parameter):
            raise InputError(
                f"a weight of {type(self.get_base_layer()).__name__} is computed again from other tensors at each use, "
                "and what is merged into it would be lost; before the adapter is added, make it a parameter with "
                "torch.nn.utils.parametrize.remove_parametrizations (or torch.nn.utils.remove_weight_norm)"
            )
        original = self.original_weight.to(self.parameter.device)
        merged = original
        for name in [*self.merged_adapters, *names]:
            merged = merged + self.get_delta_weight(name)
            if safe_merge and not bool(torch.isfinite(merged.to(original.dtype)).all()):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        self.forget()
        self._put(merged.to(original.dtype).contiguous())
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the original weight back, bit by bit."""
        if not self.merged or self._original is None:
            warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.forget()
        if isinstance(self._original, tuple):
            self.base_layer = self._original[0].to(self.parameter.device)
        else:
            self.parameter.data = self._original.to(self.parameter)
        self._original = None
        self.merged_adapters.clear()

    def forget(self) -> None:
        """Drop what calls keep for later calls; it is found again when it is next needed."""

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; see PEFT."""
        self.forget()
        super().delete_adapter(adapter_name)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self.forget()
        return super()._apply(*args, **kwargs)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's `convert_to_lora` knows such a layer: it takes linear layers alone."""
        return False

    def check_rows(self, x: Tensor, adapter_names: list[str]) -> None:
        """Raise ValueError unless there is one adapter for each row, and none is merged."""
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    def _put(self, weight: Tensor) -> None:
        """Make this the base layer's weight; what was there first is kept."""
        if self.quantization_backend is None:
            self._original = self.parameter.data.cpu() if self._original is None else self._original
            self.parameter.data = weight
            return
        # A layer is kept and a copy changed, since quantization keeps its state in more places than the weight.
        before = self.base_layer
        self.base_layer = copy.deepcopy(before)
        try:
            self.quantization_backend.set_base_weight(self, weight)
        except Exception:
            self.base_layer = before
            raise
        self._original = self._original or (before,)

    def __repr__(self) -> str:
        return "spectral." + super().__repr__()


def dense_update(C: Tensor, U: Tensor, V: Tensor, form: str) -> Tensor:
    """`U C Vᵀ`, (m, n), in float32 or wider."""
    dtype = torch.promote_types(U.dtype, torch.float32)
    return FORMS[form].left_factor(U.to(dtype), C.to(dtype)) @ V.to(dtype).T


class Linear(SpectralLayer):
    """`torch.nn.Linear`, transformers' `Conv1D` or a quantized linear layer with spectral coefficients.

    Args:
        base_layer: the layer, or another tuner's layer around it.
        adapter_name: name of the first adapter.
        fan_in_fan_out: whether the weight is stored as (in, out); None asks the layer.
        options: see `SpectralLayer`.
    """

    _plain: "dict[str, PlainUpdate]"

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, fan_in_fan_out: bool | None = None, **options: Any
    ) -> None:
        super().__init__(base_layer, adapter_name, **options)
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)
        if fan_in_fan_out not in (None, self.fan_in_fan_out):
            kind = type(self.get_base_layer()).__name__
            warn(f"fan_in_fan_out={fan_in_fan_out} does not hold for {kind}; using {self.fan_in_fan_out}", stacklevel=2)

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """The base layer's output plus the update of each active adapter, or of each row's adapter."""
        special = adapter_names is not None or args or kwargs or self._disable_adapters or self.merged_adapters
        if not special and not torch.compiler.is_compiling():
            plain = self._find_plain()
            output = None if plain is None else plain(x, training=self.training)
            if output is not None:
                return output
        return super().forward(x, *args, adapter_names=adapter_names, **kwargs)

    def adapted_forward(self, x: Tensor, active: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus `x ΔWᵀ` of the adapters `active`."""
        x = _autocast(x) if active else x
        if len(active) == 1 and not args and not kwargs and self._is_plain(x):
            base = cast(nn.Linear, self.base_layer)
            C, form = self.coefficients(active[0])
            factors = self.factors(active[0])
            inverse = factors.inverse_values(base.weight, len(C), base.bias, x.dtype)
            whole = (x, base.weight, base.bias, C, factors.stacked(len(C)), inverse, form)
            return run(LinearUpdate, *whole, gradients=_needs_gradient(x, base.bias, C))[0]
        output = self.base_layer(x, *args, **kwargs)
        for name in active:
            C, form = self.coefficients(name)
            operands = (output, x, C, self.factors(name).stacked(len(C)), form)
            output = run(FactoredUpdate, *operands, gradients=_needs_gradient(output, x, C))[0]
        return output

    def forget(self) -> None:
        """Drop what calls keep for later calls; it is found again when it is next needed."""
        self._plain = {}
        for factors in self.spectral_factors.values():
            cast(Factors, factors).forget()

    def train(self, mode: bool = True) -> Self:
        """Set training mode, in which no weights are kept, or evaluation mode."""
        if mode:
            for plain in self._plain.values():
                plain.kept.clear()
        return super().train(mode)

    def project(self, x: Tensor, U: Tensor, V: Tensor) -> Tensor:
        """`x V`."""
        return x.reshape(len(x), -1, x.shape[-1]).to(V.dtype) @ V

    def expand(self, Z: Tensor, C: Tensor, U: Tensor, V: Tensor, form: str, shape: torch.Size) -> Tensor:
        """`Z Cᵀ Uᵀ`."""
        return (FORMS[form].multiply(Z, C) @ U.T).reshape(shape)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True: ΔW has rank k. PEFT converts through a decomposition of the dense ΔW."""
        return True

    def _is_plain(self, x: Tensor) -> bool:
        """Whether the base layer is `x Wᵀ + bias` with a frozen W in 32 bits or more, and nothing else.

        One with hooks, or one that is no plain `nn.Linear`, must be called itself; a weight stored in 16 bits would
        round a small ΔW away where it is formed.
        """
        base = self.base_layer
        return is_bare(base) and is_frozen(base.weight) and x.is_floating_point()

    def _find_plain(self) -> "PlainUpdate | None":
        """What the active adapter needs for a call of a plain base layer, or None where another way is taken."""
        active, modules = self._active_adapter, self._modules
        base = modules["base_layer"]
        if not is_bare(base) or (not isinstance(active, str) and len(active) != 1):
            return None
        name = active if isinstance(active, str) else active[0]
        plain = self._plain.get(name)
        if plain is not None and plain.is_current(modules):
            return plain
        if name not in self.spectral_coefficients or not PlainUpdate.fits(name, modules):
            return None
        plain = self._plain[name] = PlainUpdate(name, modules)
        return plain

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_plain": {}}


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in tensors)


def _autocast(x: Tensor) -> Tensor:
    """`x` in the dtype that autocast computes in: cast once, for the base layer and its update."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


class Convolution(SpectralLayer):
    """`torch.nn.Conv1d`, `Conv2d` or `Conv3d` of one group, with spectral coefficients on W (out, in·kernel)."""

    def project(self, x: Tensor, U: Tensor, V: Tensor) -> Tensor:
        """The k filters' outputs at each position."""
        base: Any = self.get_base_layer()
        filters = V.T.reshape(-1, *base.weight.shape[1:])
        batched = x if x.ndim == base.weight.ndim else x.unsqueeze(0)
        # Contiguous, since matmul's rounding depends on strides together with what requires a gradient.
        return base._conv_forward(batched, filters.to(x.dtype), None).flatten(2).mT.contiguous()

    def expand(self, Z: Tensor, C: Tensor, U: Tensor, V: Tensor, form: str, shape: torch.Size) -> Tensor:
        """`Z Cᵀ Uᵀ` with the channels where convolutions have them."""
        return (FORMS[form].multiply(Z, C.to(Z.dtype)) @ U.to(Z.dtype).T).mT.reshape(shape)


class Embedding(SpectralLayer):
    """`torch.nn.Embedding` with spectral coefficients on W (entries, features), as it is stored.

    A layer that scales what it looks up, as Gemma's does, scales the update too.
    """

    def project(self, x: Tensor, U: Tensor, V: Tensor) -> Tensor:
        """The rows of U that are asked for."""
        return U[x.reshape(len(x) if x.ndim else 1, -1)]

    def expand(self, Z: Tensor, C: Tensor, U: Tensor, V: Tensor, form: str, shape: torch.Size) -> Tensor:
        """`Z C Vᵀ`, scaled as the base layer scales."""
        update = (FORMS[form].multiply_transposed(Z, C.to(Z.dtype)) @ V.T).reshape(shape)
        scale = self._get_embed_scale()
        return update if scale is None else update * scale.to(update.dtype)
