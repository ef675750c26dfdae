"""What this machine has to work with."""

import os

import torch


def native_bf16() -> bool:
    """Whether this machine multiplies bfloat16; where it must emulate, that is slower than float32, up to tenfold."""
    return torch.cuda.is_available() or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def cores() -> int:
    """How many cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
