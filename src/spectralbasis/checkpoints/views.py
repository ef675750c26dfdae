"""From stored tensors to logical matrices."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from spectralbasis.printable import shortened

_MOST_EXPERTS = 1 << 16


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
    found = list(_matrices(checkpoint, config))
    left_out = [_left_out(matrix, include, exclude) for matrix, _ in found]
    claims = _claims([matrix for matrix, _ in found])
    wanted = _claims([matrix for (matrix, _), reason in zip(found, left_out, strict=True) if reason is None])
    for (matrix, reason), left in zip(found, left_out, strict=True):
        tensor, name = matrix.cut.tensor, matrix.name
        clash = len(wanted.get(name, ())) > 1
        label = name if len(claims[name]) == 1 else tensor  # so that none hides another
        if left is not None:
            reason = left
        elif clash or reason is not None:
            reason = _several_claims(name, wanted[name]) if clash else reason
            if tensor not in tied:
                unreadable[label] = unreadable.get(label, 0) + prod(matrix.shape)
        elif not _matches(include, matrix):
            reason = left_out_by_default(checkpoint, tensor, name)
        if reason is None:
            matrices[name] = matrix
        else:
            skipped[label] = reason
    if include and not matrices:
        raise InputError(_nothing_included(checkpoint, include, skipped))
    return Inventory(matrices, skipped, unreadable)


def _left_out(matrix: Matrix, include: Sequence[str], exclude: Sequence[str]) -> str | None:
    """Why a person does not want the matrix; None where that is not said."""
    if _matches(exclude, matrix):
        return "left out by exclude"
    return "not named by include" if include and not _matches(include, matrix) else None


def _claims(matrices: Iterable[Matrix]) -> dict[str, list[str]]:
    """Name of a matrix → the stored tensors that are, or hold, a matrix of this name."""
    found: dict[str, list[str]] = {}
    for matrix in matrices:
        found.setdefault(matrix.name, []).append(matrix.cut.tensor)
    return found


def _several_claims(name: str, tensors: Sequence[str]) -> str:
    return (
        f"stored more than once: {shortened(name)} is in {' and in '.join(map(shortened, tensors))}, and nothing tells "
        f"which of them the model uses; leave the others out with exclude"
    )


def _matrices(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Iterator[tuple[Matrix, str | None]]:
    """Every matrix with the reason, if any, why it can never be read."""
    layouts, tied = Layouts(checkpoint, config), checkpoint.tied()
    for tensor, name in _names(checkpoint).items():
        reason = f"tied to {tied[tensor]}" if tensor in tied else checkpoint.unreadable(tensor)
        if reason is None and checkpoint.dtype(tensor).is_complex:
            reason = "it holds complex numbers, and only matrices of real numbers are measured"
        shape = checkpoint.shape(tensor)
        if reason is None and is_expert_stack(tensor, shape) and shape[0] > _MOST_EXPERTS:
            reason = f"it is a stack of {shape[0]} experts, and at most {_MOST_EXPERTS} are measured"
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
    while len(set(names.values())) < len(names):  # a name may be the whole of one tensor's and the short of another's
        count = Counter(names.values())
        names = {tensor: name if count[name] == 1 else tensor for tensor, name in names.items()}
    return names


def _matrix(checkpoint: Checkpoint, cut: Cut, name: str, shape: tuple[int, ...]) -> Matrix:
    return Matrix(name, layer_number(name), kind_of(name), (prod(shape[:1]), prod(shape[1:])), checkpoint, cut)


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
