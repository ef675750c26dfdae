"""One logical weight matrix and how it is cut out of a stored tensor."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import prod

import torch
from torch import Tensor

from spectralbasis.checkpoints.checkpoint import Checkpoint
from spectralbasis.checkpoints.fused import Rows


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
