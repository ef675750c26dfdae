"""Convolutions: V becomes k filters of the same kernel, stride and padding, and U a 1×1 convolution."""

from typing import Any

import torch
from torch import Tensor

from spectralbasis.tuner.forms import FORMS
from spectralbasis.tuner.layer import SpectralLayer


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
