"""Weights split into length and direction by weight normalisation (arXiv 1602.07868), as in wav2vec2 and vocoders."""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from spectralbasis.checkpoints.checkpoint import Checkpoint

# As torch.nn.utils.parametrizations.weight_norm saves them, and as the older torch.nn.utils.weight_norm does.
_DIRECTION = re.compile(r"(?P<layer>.+)\.(parametrizations\.weight\.original1|weight_v)")


@dataclass(frozen=True)
class NormalisedWeight:
    """`W = length · V / ‖V‖`, with a norm for each entry of `length`.

    Attributes:
        name: of W.
        direction: name of V.
        length: name of the lengths: one number, or a tensor of V's dimensions in which the normalised ones are 1.
        shape: of V and W.
    """

    name: str
    direction: str
    length: str
    shape: tuple[int, ...]

    @property
    def parts(self) -> tuple[str, ...]:
        return self.direction, self.length

    def read(self, checkpoint: Checkpoint) -> Tensor:
        """The real weight, float32."""
        direction, length = checkpoint.read(self.direction).float(), checkpoint.read(self.length).float()
        normalised = [i for i in range(direction.ndim) if length.ndim == 0 or length.shape[i] == 1]
        return direction * (length / torch.linalg.vector_norm(direction, dim=normalised, keepdim=True))


def find_weight_norm(checkpoint: Checkpoint, name: str, names: frozenset[str]) -> NormalisedWeight | None:
    """The weight whose direction a stored tensor is; None where it is none, or its lengths are missing or misshapen."""
    match = _DIRECTION.fullmatch(name)
    if match is None:
        return None
    layer, shape = match["layer"], checkpoint.shape(name)
    length = f"{layer}.weight_g" if name.endswith("weight_v") else f"{layer}.parametrizations.weight.original0"
    if length not in names or f"{layer}.weight" in names:
        return None
    sides = checkpoint.shape(length)
    fits = sides == () or (len(sides) == len(shape) and all(a in (1, b) for a, b in zip(sides, shape, strict=True)))
    return NormalisedWeight(f"{layer}.weight", name, length, shape) if fits else None
