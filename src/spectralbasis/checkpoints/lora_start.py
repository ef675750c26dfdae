"""What an initialisation of LoRA takes out of the base: PiSSA and OLoRA start B·A as a part of W and subtract it.

An adapter saved without conversion holds the trained B·A alone, so that part has to be found again to know the tuned
weights. It is found where it is well determined: PEFT takes it in float32, so it differs from machine to machine by
about `FLOAT32_ERROR` over the relative gap that separates it from the rest of W.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from spectralbasis.errors import InputError
from spectralbasis.linalg import leading_svd

Start = Callable[[Tensor, int, float], Tensor]
"""(W (out, in), rank, scaling) → what the initialisation subtracts from W."""
FLOAT32_ERROR = 1e-6
LARGEST_SINE = 1e-2
CONVERSION = (
    "convert the adapter to LoRA where it was trained (save_pretrained with path_initial_model_for_weight_conversion) "
    "or merge it there, and pass that folder"
)


def leading_part(W: Tensor, rank: int, scaling: float) -> Tensor:
    """PiSSA (arXiv 2404.02948, equation 2): the leading triplets, whatever the scaling.

    Raises:
        InputError: σ_rank and σ_{rank+1} are too close for their subspaces to be told apart in float32.
    """
    svd = leading_svd(W, rank)
    gap = float(svd.S[-1] - svd.next_singular_value)
    if gap * LARGEST_SINE <= FLOAT32_ERROR * float(svd.S[0]):
        raise InputError(
            f"PiSSA took the {rank} leading directions out of the base, but the singular values {rank} and {rank + 1} "
            f"of this matrix are equal to {gap / float(svd.S[0]):.1g} of the largest, so they cannot be found again; "
            f"{CONVERSION}"
        )
    return (svd.U * svd.S) @ svd.Vh


def leading_columns(W: Tensor, rank: int, scaling: float) -> Tensor:
    """OLoRA (arXiv 2406.01775): `scaling` times W projected on the span of its first columns.

    Raises:
        InputError: these columns are linearly dependent in float32.
    """
    W = W.double()
    Q, R = torch.linalg.qr(W[:, :rank])
    if float(torch.linalg.cond(R)) * FLOAT32_ERROR >= LARGEST_SINE:
        raise InputError(
            f"OLoRA took the span of the first {rank} columns out of the base, but these columns are nearly dependent, "
            f"so it cannot be found again; {CONVERSION}"
        )
    return (scaling * Q @ (Q.T @ W)).float()


STARTS: Mapping[str, Start] = MappingProxyType({"pissa": leading_part, "olora": leading_columns})
"""Start by the name that `LoraConfig.init_lora_weights` has for it."""
