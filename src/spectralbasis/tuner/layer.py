"""The linear layer with spectral coefficients beside its frozen weight."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spectralbasis.tuner.batches import add_row_updates
from spectralbasis.tuner.factors import Factors
from spectralbasis.tuner.forms import FORMS
from spectralbasis.tuner.function import DenseUpdate, FactoredUpdate, dense_pays
from spectralbasis.tuner.parametrisation import Parametrisation

START_SCALE = 0.3
"""Standard deviation of the coefficients that `init_weights=False` starts from."""


class SpectralLayer(BaseTunerLayer):
    """What every layer with spectral coefficients holds: per adapter its numbers, what makes C of them, and U and V."""

    adapter_layer_names: tuple[str, ...] = ("spectral_coefficients",)
    other_param_names: tuple[str, ...] = ("spectral_factors", "spectral_parametrisations")

    # What BaseTunerLayer provides; PEFT has no types, and nn.Module would pass these off as tensors.
    base_layer: nn.Module
    active_adapters: list[str]
    get_base_layer: Callable[[], Any]

    def __init__(self, base_layer: nn.Module) -> None:
        self.base_layer = base_layer
        self.spectral_coefficients = nn.ParameterDict()
        self.spectral_factors = nn.ModuleDict()
        self.spectral_parametrisations = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._unmerged_weight: Tensor | None = None

    @property
    def original_weight(self) -> Tensor:
        """The weight of the base layer, in its own layout, without merged adapters."""
        return self.get_base_layer().weight.detach() if self._unmerged_weight is None else self._unmerged_weight

    def held_factors(self, source: str, k: int) -> Factors | None:
        """Factors of an adapter of this layer that serve k directions of the basis `source` too."""
        for factors in cast(Iterable[Factors], self.spectral_factors.values()):
            if factors.source == source and factors.k >= k:
                return factors
        return None

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
        self.spectral_factors[adapter_name] = factors
        self.spectral_parametrisations[adapter_name] = parametrisation
        self.spectral_coefficients[adapter_name] = nn.Parameter(torch.zeros(parametrisation.shape))
        if not init_weights:
            nn.init.normal_(self.spectral_coefficients[adapter_name], std=START_SCALE)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def factors(self, adapter_name: str) -> Factors:
        """The factors of one adapter."""
        return cast(Factors, self.spectral_factors[adapter_name])

    def parametrisation(self, adapter_name: str) -> Parametrisation:
        """What makes C of the numbers that one adapter trains."""
        return cast(Parametrisation, self.spectral_parametrisations[adapter_name])

    def terms(self, adapter_name: str) -> tuple[Tensor, Tensor, Tensor, str]:
        """C, U (m, k), V (n, k) and the form of C of one adapter."""
        parametrisation = self.parametrisation(adapter_name)
        C = parametrisation(self.spectral_coefficients[adapter_name])
        return C, *self.factors(adapter_name).first(parametrisation.k), parametrisation.form

    def set_weighted(self, adapter_name: str, adapters: Sequence[str], weights: Sequence[float]) -> None:
        """Set the numbers of an adapter so that its C is the weighted sum of those that this layer has of others."""
        pairs = [pair for pair in zip(adapters, weights, strict=True) if pair[0] in self.spectral_coefficients]
        terms = [weight * self.terms(name)[0].detach() for name, weight in pairs]
        stored = self.spectral_coefficients[adapter_name]
        stored.data = self.parametrisation(adapter_name).inverse(sum(terms[1:], terms[0])).to(stored.dtype)


class Linear(nn.Module, SpectralLayer):
    """`torch.nn.Linear` or transformers' `Conv1D` with spectral coefficients.

    Args:
        base_layer: the layer, or another tuner's layer around it.
        adapter_name: name of the first adapter.
        fan_in_fan_out: whether the weight is stored as (in, out); None asks the layer.
        options: see `SpectralLayer.update_layer`.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, fan_in_fan_out: bool | None = None, **options: Any
    ) -> None:
        super().__init__()
        SpectralLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)
        if fan_in_fan_out not in (None, self.fan_in_fan_out):
            kind = type(self.get_base_layer()).__name__
            warnings.warn(
                f"fan_in_fan_out={fan_in_fan_out} does not hold for {kind}; using {self.fan_in_fan_out}", stacklevel=2
            )
        self.update_layer(adapter_name, **options)

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """The base layer's output plus `x ΔWᵀ` of each active adapter, or of each row's adapter."""
        if adapter_names is not None:
            self._check_rows(x, adapter_names)
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return add_row_updates(self.base_layer(x, *args, **kwargs), x, self, adapter_names)
        active = [name for name in self.active_adapters if name in self.spectral_coefficients]
        x = _autocast(x) if active else x
        if len(active) == 1 and not args and not kwargs and self._may_form_weight(x):
            return self._dense_forward(x, active[0])
        output = self.base_layer(x, *args, **kwargs)
        for name in active:
            output, _ = FactoredUpdate.apply(output, x, *self.terms(name))
        return output

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """`U C Vᵀ` of an adapter in the layout of the base weight, in float32 or wider."""
        C, U, V, form = self.terms(adapter_name)
        dtype = torch.promote_types(U.dtype, torch.float32)
        update = FORMS[form].left_factor(U.to(dtype), C.detach().to(dtype)) @ V.to(dtype).T
        return update.T if self.fan_in_fan_out else update

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add ΔW of adapters to the base weight, whose original is kept on the CPU until `unmerge`.

        Args:
            safe_merge: leave everything as it is when the result is not finite.
            adapter_names: adapters to merge; None takes the active ones.

        Raises:
            ValueError: `safe_merge`, and the result is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.spectral_coefficients]
        if not names:
            return
        weight = self.get_base_layer().weight.data
        merged = weight
        for name in names:
            merged = merged + self.get_delta_weight(name)
            if safe_merge and not bool(torch.isfinite(merged.to(weight.dtype)).all()):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        if not self.merged:
            self._unmerged_weight = weight.cpu()
        self.get_base_layer().weight.data = merged.to(weight.dtype).contiguous()
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the original weight back, bit by bit."""
        if not self.merged or self._unmerged_weight is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        weight = self.get_base_layer().weight
        weight.data = self._unmerged_weight.to(weight)
        self._unmerged_weight = None
        self.merged_adapters.clear()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True: ΔW has rank k. PEFT converts through a decomposition of the dense ΔW."""
        return True

    def _check_rows(self, x: Tensor, adapter_names: list[str]) -> None:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    def _may_form_weight(self, x: Tensor) -> bool:
        """Whether forming W + ΔW is cheaper and changes nothing else.

        In 16 bits it would round a small ΔW away; a base layer with hooks, or one that is no plain `nn.Linear`, must be
        called itself.
        """
        base = self.base_layer
        if type(base) is not nn.Linear or type(base.weight) is not nn.Parameter:
            return False
        if not dense_pays(x.numel() // base.in_features, base.in_features):
            return False
        plain = not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or "forward" in vars(base))
        wide = x.dtype == base.weight.dtype and x.dtype in (torch.float32, torch.float64)
        return plain and wide and not base.weight.requires_grad

    def _dense_forward(self, x: Tensor, adapter_name: str) -> Tensor:
        C, U, V, form = self.terms(adapter_name)
        base = self.get_base_layer()
        output, _ = DenseUpdate.apply(x, base.weight, base.bias, C, U, V, form)
        return output

    def __repr__(self) -> str:
        return "spectral." + super().__repr__()


def _autocast(x: Tensor) -> Tensor:
    """`x` in the dtype that autocast computes in: cast once, for the base layer and its update."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))
