"""What one LoRA module does to the base's tensors."""

from dataclasses import dataclass

import torch
from torch import Tensor

from spectralbasis.checkpoints.adapter import edited_dtype
from spectralbasis.checkpoints.checkpoint import Checkpoint
from spectralbasis.checkpoints.lora_start import Start


@dataclass(frozen=True)
class LoraEdit:
    """`W + scaling · B A` of one weight, less what the initialisation took out of it, each row rescaled for DoRA.

    Attributes:
        tensors: the adapter's; the factors are read when the edit is called.
        A: name of the (rank, in) factor.
        B: name of the (out, rank) factor.
        scaling: factor of the update.
        transposed: whether the base stores the weight as (in, out).
        start: what the initialisation subtracts from the base.
        magnitude: name of DoRA's length of each row.
    """

    tensors: Checkpoint
    A: str
    B: str
    scaling: float
    transposed: bool
    start: Start | None
    magnitude: str | None

    def __call__(self, weight: Tensor) -> Tensor:
        """The tuned weight in the shape of the base's, in float32 or wider."""
        stored = weight.to(edited_dtype(weight.dtype))
        A, B = (self.tensors.read(name).float().flatten(1) for name in (self.A, self.B))
        W = (stored.T if self.transposed else stored).flatten(1)
        tuned = W + self.scaling * (B @ A)
        if self.start is not None:
            tuned = tuned - self.start(W, len(A), self.scaling)
        if self.magnitude is not None:
            lengths = self.tensors.read(self.magnitude).float().flatten()
            tuned = tuned * (lengths / torch.linalg.vector_norm(tuned, dim=1))[:, None]
        return (tuned.T if self.transposed else tuned).reshape(weight.shape)


@dataclass(frozen=True)
class BiasEdit:
    """Adds the bias of the second factor, which the layer adds to its own."""

    tensors: Checkpoint
    bias: str
    scaling: float

    def __call__(self, bias: Tensor) -> Tensor:
        """The tuned bias, in float32 or wider."""
        return bias.to(edited_dtype(bias.dtype)) + self.scaling * self.tensors.read(self.bias).float()
