"""Which tensors are stored as (in, out), so that a matrix is their transpose."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from spectralbasis.checkpoints.checkpoint import Checkpoint
from spectralbasis.checkpoints.fused import model_type

_CONV1D_NAMES = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})
_CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
_PROJECTIONS = ("text_projection", "proj")
"""Parameters of the original CLIP and of open_clip, which multiply from the right: `x @ text_projection`."""
_TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Layouts:
    """Tells for each tensor of a checkpoint whether it is stored as (in, out)."""

    def __init__(self, checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
        self._checkpoint = checkpoint
        self._conv1d = model_type(config) in _CONV1D_MODELS or self._has_wide_attention()
        self._names = frozenset(checkpoint.names())

    def transposed(self, tensor: str) -> bool:
        """Whether the tensor (or, for a stack of experts, each of its slices) is the transpose of the matrix."""
        owner = self._checkpoint.module_type(tensor)
        if owner is not None and (owner.__name__ == "Conv1D" or issubclass(owner, _TRANSPOSED_CONVOLUTIONS)):
            return True
        if len(self._checkpoint.shape(tensor)) == 2 and tensor.rpartition(".")[2] in _PROJECTIONS:
            return True
        if is_expert_stack(tensor, self._checkpoint.shape(tensor)):
            return self._transposed_experts(tensor)
        return owner is None and self._conv1d and _owner_name(tensor) in _CONV1D_NAMES

    def _has_wide_attention(self) -> bool:
        """GPT-2's `c_attn` is (d, 3d) as Conv1D stores it, and (3d, d) in models that made it a linear layer."""
        shapes = (self._checkpoint.shape(name) for name in self._checkpoint.names() if _owner_name(name) == "c_attn")
        return any(len(shape) == 2 and shape[1] == 3 * shape[0] for shape in shapes)

    def _transposed_experts(self, tensor: str) -> bool:
        """Stored as (in, out), as in Llama 4 and GPT-OSS, if `gate_up_proj` and `down_proj` only fit that way."""
        prefix = tensor.removesuffix(".weight").rpartition(".")[0]
        siblings = (f"{prefix}.gate_up_proj", f"{prefix}.down_proj")
        if not all(name in self._names for name in siblings):
            return False
        gate_up, down = (self._checkpoint.shape(name)[1:] for name in siblings)
        return gate_up == (down[1], 2 * down[0])


def is_expert_stack(tensor: str, shape: tuple[int, ...]) -> bool:
    """Whether a three-dimensional tensor holds one matrix for each expert, rather than a 1-d convolution."""
    parts = tensor.removesuffix(".weight").split(".")
    return len(shape) == 3 and ("experts" in parts or parts[-1] in ("input_linear", "output_linear"))


def _owner_name(tensor: str) -> str:
    return tensor.removesuffix(".weight").rpartition(".")[2]
