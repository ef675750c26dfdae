"""Mixed batches: one forward pass in which every row has its own adapter."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from spectralbasis.tuner.factors import Factors

if TYPE_CHECKING:
    from spectralbasis.tuner.layer import SpectralLayer


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
    for factors, form, members in _groups(layer, adapter_names):
        k = max(layer.parametrisation(name).k for name in members)
        C = _stacked(layer, members, k)
        position = {name: index for index, name in enumerate(members, start=1)}
        rows = torch.tensor([position.get(name, 0) for name in adapter_names], device=x.device)
        U, V = factors.first(k)
        update = layer.expand(layer.project(x, U, V), C[rows].to(V.dtype), U, V, form, output.shape)
        output = output + update.to(output.dtype)
    return output


def _groups(layer: "SpectralLayer", adapter_names: list[str]) -> list[tuple[Factors, str, list[str]]]:
    groups: dict[tuple[int, str], tuple[Factors, str, list[str]]] = {}
    for name in dict.fromkeys(adapter_names):
        if name in layer.spectral_coefficients:
            factors, form = layer.factors(name), layer.parametrisation(name).form
            groups.setdefault((id(factors), form), (factors, form, []))[2].append(name)
    return list(groups.values())


def _stacked(layer: "SpectralLayer", members: list[str], k: int) -> Tensor:
    """Coefficients of the members behind a zero entry for rows of others, all padded to k directions."""
    coefficients = [layer.terms(name)[0] for name in members]
    padded = [pad(C, [0, k - C.shape[-1]] * C.ndim) for C in coefficients]
    return torch.stack([torch.zeros_like(padded[0]), *padded])
