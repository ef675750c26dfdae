"""Embedding tables: a looked-up row of `W + U C Vᵀ` is that of W plus the row of U, times `C Vᵀ`."""

import torch
from torch import Tensor

from spectralbasis.tuner.forms import FORMS
from spectralbasis.tuner.layer import SpectralLayer


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
