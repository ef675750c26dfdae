"""Linear layers: the layer of nearly every adapter, with forward passes that keep little for the backward pass."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spectralbasis.printable import warn
from spectralbasis.tuner.forms import FORMS
from spectralbasis.tuner.function import FactoredUpdate, LinearUpdate
from spectralbasis.tuner.layer import SpectralLayer


class Linear(SpectralLayer):
    """`torch.nn.Linear`, transformers' `Conv1D` or a quantized linear layer with spectral coefficients.

    Args:
        base_layer: the layer, or another tuner's layer around it.
        adapter_name: name of the first adapter.
        fan_in_fan_out: whether the weight is stored as (in, out); None asks the layer.
        options: see `SpectralLayer`.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, fan_in_fan_out: bool | None = None, **options: Any
    ) -> None:
        super().__init__(base_layer, adapter_name, **options)
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)
        if fan_in_fan_out not in (None, self.fan_in_fan_out):
            kind = type(self.get_base_layer()).__name__
            warn(f"fan_in_fan_out={fan_in_fan_out} does not hold for {kind}; using {self.fan_in_fan_out}", stacklevel=2)

    def adapted_forward(self, x: Tensor, active: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus `x ΔWᵀ` of the adapters `active`."""
        x = _autocast(x) if active else x
        if len(active) == 1 and not args and not kwargs and self._is_plain(x):
            base = cast(nn.Linear, self.base_layer)
            C, form = self.coefficients(active[0])
            factors = self.factors(active[0])
            inverse = factors.inverse_values(base.weight, len(C), x.dtype)
            return LinearUpdate.apply(x, base.weight, base.bias, C, factors.stacked(len(C)), inverse, form)[0]
        output = self.base_layer(x, *args, **kwargs)
        for name in active:
            C, form = self.coefficients(name)
            output, _ = FactoredUpdate.apply(output, x, C, self.factors(name).stacked(len(C)), form)
        return output

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
        if type(base) is not nn.Linear or type(base.weight) is not nn.Parameter or base.weight.requires_grad:
            return False
        hooked = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or "forward" in vars(base)
        return not hooked and base.weight.dtype in (torch.float32, torch.float64) and x.is_floating_point()


def _autocast(x: Tensor) -> Tensor:
    """`x` in the dtype that autocast computes in: cast once, for the base layer and its update."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))
