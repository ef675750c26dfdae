"""Checksums of what this package writes, so that a damaged file is told from a whole one."""

from collections.abc import Mapping

import torch
import xxhash
from torch import Tensor


def checksum(*texts: str, tensors: Mapping[str, Tensor] | None = None) -> str:
    """xxh3-128 of texts, and of tensors with their names, types and shapes, as 32 hexadecimal digits."""
    digest = xxhash.xxh3_128()
    for text in texts:
        digest.update(f"{len(text)}:{text}".encode())
    for name, tensor in sorted((tensors or {}).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
