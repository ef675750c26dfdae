"""Turn stored tensors into logical weight matrices (out, in).

`take_inventory` lists which tensors are weights, which are stored transposed, fused or as stacks of experts, and why
others are skipped. A `Matrix` reads its part of a tensor, its `Cut`.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from spectralbasis.checkpoints.checkpoint import Checkpoint
from spectralbasis.checkpoints.fused import Rows, model_type, split_fused
from spectralbasis.checkpoints.names import clashing, expert_name, kind_of, layer_number, matrix_name, plain_name
from spectralbasis.errors import InputError
from spectralbasis.printable import shortened


@dataclass(frozen=True)
class Cut:
    """A matrix as a part of a stored tensor: pick the expert, transpose, flatten to (out, in), pick rows."""

    tensor: str
    expert: int | None = None
    transposed: bool = False
    rows: Rows | None = None

    def read(self, checkpoint: Checkpoint) -> Tensor:
        """The matrix (out, in); where the part is one run of stored rows, no more than these are read."""
        if self.expert is not None:
            stored = checkpoint.read_rows(self.tensor, self.expert, self.expert + 1)[0]
        elif self.rows is not None and self.rows.groups == 1 and not self.transposed:
            return checkpoint.read_rows(self.tensor, self.rows.start, self.rows.stop).flatten(1)
        else:
            stored = checkpoint.read(self.tensor)
        return self._rows_of(stored)

    def of(self, tensor: Tensor) -> Tensor:
        """The matrix (out, in) in the whole tensor."""
        return self._rows_of(tensor if self.expert is None else tensor[self.expert])

    def put(self, tensor: Tensor, matrix: Tensor) -> None:
        """Replace the matrix (out, in) in the whole tensor, in place; the tensor is no convolution's."""
        stored = tensor if self.expert is None else tensor[self.expert]
        place = stored.transpose(0, 1) if self.transposed else stored
        if self.rows is None:
            place.copy_(matrix)
        else:
            blocks = place.unflatten(0, (self.rows.groups, -1))[:, self.rows.start : self.rows.stop]
            blocks.copy_(matrix.unflatten(0, (self.rows.groups, -1)))

    def _rows_of(self, stored: Tensor) -> Tensor:
        matrix = (stored.transpose(0, 1) if self.transposed else stored).flatten(1)
        return matrix if self.rows is None else self.rows.of(matrix)

    def holds_rows(self, checkpoint: Checkpoint) -> bool:
        """Whether rows of the matrix are runs of stored numbers that can be read alone."""
        return not self.transposed and checkpoint.holds_rows(self.tensor)

    def take_rows(self, checkpoint: Checkpoint, rows: Tensor) -> Tensor:
        """Rows of the matrix by their numbers, (count, in), where it `holds_rows`."""
        shape = checkpoint.shape(self.tensor)
        height, *inner = shape if self.expert is None else shape[1:]
        stored = rows if self.rows is None else self.rows.numbers(rows, height)
        return checkpoint.take_rows(self.tensor, stored + (self.expert or 0) * height, prod(inner))


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as people write it, `bfloat16`."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Matrix:
    """One logical weight matrix of shape (out, in).

    Attributes:
        name: stable name, without `.weight` and without the prefix of a task head.
        layer: first integer component of the name, -1 where there is none.
        kind: the name within its layer, for example `attention.self.query`; the number of an expert is left out.
        shape: (out, in); a convolution counts as (out, in·kh·kw).
    """

    name: str
    layer: int
    kind: str
    shape: tuple[int, int]
    checkpoint: Checkpoint = field(repr=False, compare=False)
    cut: Cut = field(repr=False, compare=False)

    def read(self) -> Tensor:
        """The matrix (out, in) on the CPU, in the stored dtype."""
        return self.cut.read(self.checkpoint)

    @property
    def dtype(self) -> torch.dtype:
        """The stored dtype of the matrix."""
        return self.checkpoint.dtype(self.cut.tensor)

    @property
    def held_bytes(self) -> int:
        """What `open_rows` takes at most: nothing, or what the matrix does where it cannot be read by rows.

        One that is made of other tensors takes four in float32: itself, and what lies between them and it.
        """
        if self.cut.holds_rows(self.checkpoint):
            return 0
        transposed = self.checkpoint.holds_rows(self.cut.tensor)
        entry = self.checkpoint.dtype(self.cut.tensor).itemsize if transposed else 4 * torch.float32.itemsize
        return prod(self.shape) * entry

    def open_rows(self) -> Callable[[Tensor], Tensor]:
        """A function that reads rows by their numbers, (count,) int64 on the CPU, in the stored dtype, (count, in).

        A matrix that is stored transposed, quantized or as an adapter's change of another is read here, as a whole.
        """
        if self.cut.holds_rows(self.checkpoint):
            return partial(self.cut.take_rows, self.checkpoint)
        return self.read().__getitem__


_EMBEDDING = re.compile(
    r"(^|_)(emb|embed|embeds|embedding|embeddings)\d*$"
    r"|^(embed|embeddings?)_(tokens|positions|in|out)$|^(wte|wpe|shared|tok_embeddings|tokens_embed)$"
    r"|^(token|position)_embd$|^token_types$"
    r"|^(relative_attention_bias|relative_position_bias_table|rel_pos_[hw])$|(^|_)tokens?$"
)
_HEAD = re.compile(
    r"^(classifier|score|cls|qa_outputs|head|heads|head_dist|pre_classifier|vocab_transform|vocab_projector"
    r"|predictions|logits_proj|seq_relationship|sequence_summary|span_predictor|output_projection|fc_out|proj_out"
    r"|generator_predictions|discriminator_predictions|projector|summary|output)(\.|$)"
    r"|^\w+_(head|heads|classifier|predictor)(\.|$)|(^|\.)lm_heads?(\.|$)|^(fc|decoder)$"
)
_NORM = re.compile(r"(^|_)(ln|bn|norm|layernorm|batchnorm|groupnorm|rmsnorm)(_?\d+|_[a-z])?$", re.IGNORECASE)
_NOT_WEIGHTS = re.compile(
    r"bias$|^(attn_mask|causal_mask|relative_coords_table|relative_position_index|position_ids|inv_freq|A_log"
    r"|weight_g|freqs_(cos|sin|cis)|(query|key|diagonal)_decay|slope_rate)$|(^|_)(scale|scales|scale_inv|zero_point|absmax|amax|SCB)$"
)


def is_weight(checkpoint: Checkpoint, tensor: str) -> bool:
    """Whether the tensor could be a matrix at all: no vector, norm, bias, mask or table of positions.

    One that cannot be read counts, and one of complex numbers, so that it is listed.
    """
    if checkpoint.unreadable(tensor) is not None:
        return True
    shape = checkpoint.shape(tensor)
    *owners, leaf = tensor.split(".")
    if len(shape) < 2 or 0 in shape or _NOT_WEIGHTS.search(leaf):
        return False
    if owners and _NORM.search(owners[-1]):
        return False
    dtype = checkpoint.dtype(tensor)
    return dtype.is_floating_point or dtype.is_complex


def is_embedding_table(checkpoint: Checkpoint, tensor: str) -> bool:
    """Whether rows of the tensor are looked up: by its module where that is known, else by its name.

    A number at the end is that of a table in a list of tables, which has the name: `audio_embeddings.3.weight`. A
    layer with a bias is none.
    """
    owner = checkpoint.module_type(tensor)
    parts = plain_name(tensor).split(".")
    leaf = next((part for part in reversed(parts) if not part.isdigit()), parts[-1])
    if parts[-1] != leaf:
        with suppress(KeyError):
            checkpoint.shape(f"{tensor.removesuffix('.weight')}.bias")
            return False
    convolution = tensor.endswith(".weight") and len(checkpoint.shape(tensor)) > 3
    return (owner is not None and issubclass(owner, nn.Embedding)) or bool(_EMBEDDING.search(leaf) and not convolution)


def left_out_by_default(checkpoint: Checkpoint, tensor: str, name: str) -> str | None:
    """Why the tensor is measured only where `include` names it, if so: it is an embedding table or a task head."""
    if is_embedding_table(checkpoint, tensor):
        return "embedding table: name it with include to measure it"
    if _HEAD.search(name):
        return "task head: name it with include to measure it"
    if checkpoint.shape(tensor)[0] in vocabulary_sizes(checkpoint.config):
        return "one row for each word of the vocabulary, as embeddings and output heads have: include measures it"
    return None


def vocabulary_sizes(config: Mapping[str, Any]) -> set[int]:
    """The sizes of vocabularies that a config names, without those that are also some other size in it."""
    words: set[int] = set()
    others: set[int] = set()
    for key, value in _numbers(config):
        (words if re.search(r"vocab(ulary)?_size$|^n_vocab$|^n_words$", key) else others).add(value)
    return words - others


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Every whole number beyond 1 in a config, with its key; configs of towers lie inside."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _numbers(value)
        elif isinstance(value, int) and value > 1:
            yield str(key), value


_CONV1D_NAMES = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})
_CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
_PROJECTIONS = ("text_projection", "proj")
"""Parameters of the original CLIP and of open_clip, which multiply from the right: `x @ text_projection`."""
_TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Layouts:
    """Tells for each tensor of a checkpoint whether it is stored as (in, out)."""

    def __init__(self, checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
        self._checkpoint = checkpoint
        self._names = frozenset(checkpoint.names())
        # GPT-2's `c_attn` is (d, 3d) as Conv1D stores it, and (3d, d) in models that made it a linear layer.
        shapes = (checkpoint.shape(name) for name in checkpoint.names() if _owner_name(name) == "c_attn")
        wide = any(len(shape) == 2 and shape[1] == 3 * shape[0] for shape in shapes)
        self._conv1d = model_type(config) in _CONV1D_MODELS or wide

    def transposed(self, tensor: str) -> bool:
        """Whether the tensor (or, for a stack of experts, each of its slices) is the transpose of the matrix."""
        owner = self._checkpoint.module_type(tensor)
        if owner is not None and (owner.__name__ == "Conv1D" or issubclass(owner, _TRANSPOSED_CONVOLUTIONS)):
            return True
        if len(self._checkpoint.shape(tensor)) == 2 and tensor.rpartition(".")[2] in _PROJECTIONS:
            return True
        if not is_expert_stack(tensor, self._checkpoint.shape(tensor)):
            return owner is None and self._conv1d and _owner_name(tensor) in _CONV1D_NAMES
        # Experts are (in, out), as in Llama 4 and GPT-OSS, if `gate_up_proj` and `down_proj` only fit that way.
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
            if clash:
                reason = (
                    f"stored more than once: {shortened(name)} is in {' and in '.join(map(shortened, wanted[name]))}, "
                    "and it is unclear which of them the model uses; leave the others out with exclude"
                )
            if tensor not in tied:
                unreadable[label] = unreadable.get(label, 0) + prod(matrix.shape)
        elif not _matches(include, matrix):
            reason = left_out_by_default(checkpoint, tensor, name)
        if reason is None:
            matrices[name] = matrix
        else:
            skipped[label] = reason
    if include and not matrices:
        raise InputError(
            f"include={list(include)} matches no matrix of {checkpoint.source} that can be measured; "
            f"its names look like: {', '.join(list(skipped)[:3]) or 'none'}"
        )
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
