"""From stored tensors to logical matrices."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import Any

from spectralbasis.checkpoints.checkpoint import Checkpoint
from spectralbasis.checkpoints.fused import split_fused
from spectralbasis.checkpoints.layout import Layouts, is_expert_stack
from spectralbasis.checkpoints.matrix import Cut, Matrix
from spectralbasis.checkpoints.names import clashing, expert_name, kind_of, layer_number, matrix_name, plain_name
from spectralbasis.checkpoints.roles import is_weight, left_out_by_default
from spectralbasis.errors import InputError


@dataclass(frozen=True)
class Inventory:
    """The matrices of a checkpoint, and what is none that can be measured.

    Attributes:
        matrices: by name.
        skipped: name → why it is not among them.
        unreadable: name → numbers that are stored of a weight whose values cannot be read, such as a quantized one.
    """

    matrices: dict[str, Matrix]
    skipped: dict[str, str]
    unreadable: dict[str, int]


def logical_matrices(
    checkpoint: Checkpoint,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Matrix], dict[str, str]]:
    """The weight matrices of a checkpoint by name, and what was skipped, with the reason; see `take_inventory`."""
    found = take_inventory(checkpoint, include, exclude, config)
    return found.matrices, found.skipped


def take_inventory(
    checkpoint: Checkpoint,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
) -> Inventory:
    """List the weight matrices of a checkpoint, and what is skipped. Reads no data.

    Vectors, norms, biases and buffers are no matrices and are not listed. Embedding tables and task heads are skipped
    unless `include` names them.

    Args:
        include: globs for matrix or tensor names (`*.attention.*`); empty for all.
        exclude: globs that win over `include`.
        config: the model's config, where the checkpoint lacks its own.

    Raises:
        InputError: `include` names nothing that is there.
    """
    config = checkpoint.config or config or {}
    if not config and any(name.endswith("experts.gate_up_proj_bias") for name in checkpoint.names()):
        config = {"model_type": "gpt_oss"}  # the one architecture with such a bias, whose gate and up alternate
    matrices: dict[str, Matrix] = {}
    skipped: dict[str, str] = {}
    unreadable: dict[str, int] = {}
    tied = checkpoint.tied()
    for matrix, reason in _matrices(checkpoint, config):
        named = _matches(include, matrix)
        if _matches(exclude, matrix):
            reason = "left out by exclude"
        elif include and not named:
            reason = "not named by include"
        elif reason is not None:
            if matrix.cut.tensor not in tied:
                unreadable[matrix.name] = prod(matrix.shape)
        elif not named:
            reason = left_out_by_default(checkpoint, matrix.cut.tensor, matrix.name)
        if reason is None:
            matrices[matrix.name] = matrix
        else:
            skipped[matrix.name] = reason
    if include and not matrices:
        raise InputError(_nothing_included(checkpoint, include, skipped))
    return Inventory(matrices, skipped, unreadable)


def _matrices(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Iterator[tuple[Matrix, str | None]]:
    """Every matrix with the reason, if any, why it can never be read."""
    layouts, tied = Layouts(checkpoint, config), checkpoint.tied()
    for tensor, name in _names(checkpoint).items():
        reason = f"tied to {tied[tensor]}" if tensor in tied else checkpoint.unreadable(tensor)
        if reason is not None:
            yield _matrix(checkpoint, Cut(tensor), name, checkpoint.shape(tensor)), reason
            continue
        for part, shape, cut in _cuts(tensor, name, checkpoint.shape(tensor), layouts.transposed(tensor), config):
            yield _matrix(checkpoint, cut, part, shape), None


def _names(checkpoint: Checkpoint) -> dict[str, str]:
    """Tensor to matrix name; names of stacks that would coincide without their prefixes keep them."""
    weights = [tensor for tensor in checkpoint.names() if is_weight(checkpoint, tensor)]
    short = Counter(map(matrix_name, weights))
    plain = Counter(map(plain_name, weights))
    unsure = clashing(checkpoint.names())
    names = {}
    for tensor in weights:
        if short[matrix_name(tensor)] == 1 and tensor not in unsure:
            names[tensor] = matrix_name(tensor)
        else:
            names[tensor] = plain_name(tensor) if plain[plain_name(tensor)] == 1 else tensor
    return names


def _matrix(checkpoint: Checkpoint, cut: Cut, name: str, shape: tuple[int, ...]) -> Matrix:
    return Matrix(name, layer_number(name), kind_of(name), (shape[0], prod(shape[1:])), checkpoint, cut)


def _cuts(
    tensor: str, name: str, shape: tuple[int, ...], transposed: bool, config: Mapping[str, Any]
) -> Iterator[tuple[str, tuple[int, ...], Cut]]:
    """Name, shape and cut of each matrix in one stored tensor."""
    experts = range(shape[0]) if is_expert_stack(tensor, shape) else (None,)
    inner = shape if experts[0] is None else shape[1:]
    rows, columns = (inner[1], inner[0]) if transposed else (inner[0], inner[1])
    parts = split_fused(tensor, rows, columns, config) if len(inner) == 2 else None
    for expert in experts:
        label = name if expert is None else expert_name(name, expert)
        if parts is None:
            yield label, (rows, columns, *inner[2:]), Cut(tensor, expert, transposed)
            continue
        for part, selected in parts.items():
            yield f"{label}.{part}", (selected.count, columns), Cut(tensor, expert, transposed, selected)


def _matches(patterns: Sequence[str], matrix: Matrix) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in (matrix.name, matrix.cut.tensor))


def _nothing_included(checkpoint: Checkpoint, include: Sequence[str], skipped: Mapping[str, str]) -> str:
    examples = ", ".join(list(skipped)[:3]) or "none"
    return (
        f"include={list(include)} names no matrix of {checkpoint.source} that can be measured; "
        f"its names look like: {examples}"
    )
