"""Train in a random subspace of all linear weights, to find how many dimensions a task needs."""

from collections.abc import Collection
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from spectralbasis.errors import InputError
from spectralbasis.tuner import SpectralConfig
from spectralbasis.tuner.calibration import in_modules
from spectralbasis.tuner.targets import targeted_modules

SEED = 0


def add_random_subspace(model: nn.Module, head: Collection[str], d: int) -> None:
    """Train `θ = θ0 + P z` over all linear layers of the backbone.

    This is the subspace of intrinsic dimension (Li et al., arXiv 1804.08838), but P is a random sparse projection with
    one entry for each weight, of four bytes, where Aghajanyan et al. (arXiv 2012.13255) take the Fastfood transform.

    Args:
        model: changed in place.
        head: names of the modules of its head, which stay as they are.
        d: dimensions, from 1.

    Raises:
        InputError: there are more dimensions than weights.
    """
    config = SpectralConfig(target_modules="all-linear", modules_to_save=list(head))
    targets = targeted_modules(config, model).items()
    layers = [layer for key, layer in targets if not in_modules(f"{key}.", head)]
    shapes = [cast(Tensor, layer.weight).shape for layer in layers]
    size = sum(shape.numel() for shape in shapes)
    if d > size:
        raise InputError(
            f"dimension={d} is larger than the number of weights of the linear layers, {size}; pass a smaller one"
        )
    coordinates = Coordinates(d)
    draws = torch.Generator().manual_seed(SEED)
    for layer, shape in zip(layers, shapes, strict=True):
        update = SubspaceUpdate(coordinates, shape, (d / size) ** 0.5, draws)
        parametrize.register_parametrization(layer, "weight", update)


class Coordinates(nn.Module):
    """The trained vector z (d,), zero at first, which all matrices of a model share."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.z = nn.Parameter(torch.zeros(dimension))


class SubspaceUpdate(nn.Module):
    """Adds to a weight its part of `P z`.

    Every entry of the weights takes one coordinate of z, drawn at random, with a random sign: P has one entry in each
    row, its columns are orthogonal, and `scale` makes their norm 1 on average.
    """

    taken: Tensor

    def __init__(self, coordinates: Coordinates, shape: torch.Size, scale: float, draws: torch.Generator) -> None:
        super().__init__()
        self.coordinates = coordinates
        self.scale = scale
        d = len(coordinates.z)
        # Numbers from d on stand for the negative of a coordinate: one index of four bytes holds the sign too.
        taken = torch.randint(2 * d, (shape.numel(),), generator=draws, dtype=torch.int32)
        self.register_buffer("taken", taken.reshape(shape), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        z = self.scale * self.coordinates.z
        entries = torch.cat([z, -z]).index_select(0, self.taken.flatten())
        return weight + entries.view_as(weight)
