"""The kinds of coefficients: which numbers of C in `ΔW = U C Vᵀ` an adapter trains, one `Kind` record each.

The records are the source of help, of errors and of the schemas of files. To add a kind, add a record; one whose C is
not a choice of entries also needs a `Parametrisation` of its own in `tuner/forms.py`. Nothing large is imported here,
since `--help` reads the records.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Count = Callable[[int, int], int]
"""(k, size) → how many."""


@dataclass(frozen=True)
class Kind:
    """One kind of coefficients. `size` is the value of its `option`.

    Args:
        name: what `SpectralConfig.coefficients` calls it.
        summary: which entries of C are trained, for help.
        numbers: (k, size) → how many numbers k directions take; where entries are picked, how many there are to pick
            from.
        form: how C multiplies, "diagonal" or "core".
        option: the setting that says how large its parts are, a field of `SpectralConfig`; empty for none.
        positions: (k, size) → row-major positions of the trained entries in a core, ascending; None where all of C is
            trained, or where the record of an adapter has the entries.
        linear: whether C is a linear function of the numbers, so that adapters can be added number by number.
        entries: (k, size) → how many entries of C change; None where these are as many as the numbers.
        singular: whether the directions have to be singular vectors of the weight.
        leading: directions of each matrix where neither a number nor a budget is asked for; smaller matrices give all
            that they have.

    Examples:
        >>> KINDS["band"].numbers(5, 1), KINDS["block"].numbers(5, 2), KINDS["rotation"].numbers(5, 2)
        (13, 9, 7)
    """

    name: str
    summary: str
    numbers: Count
    form: Literal["diagonal", "core"] = "core"
    option: str = ""
    positions: "Callable[[int, int], Tensor] | None" = None
    linear: bool = True
    entries: Count | None = None
    singular: bool = False
    leading: int = 1024

    def fan_in(self, k: int, size: int) -> float:
        """How many trained entries of C meet in one left direction, on average."""
        return (self.entries or self.numbers)(k, size) / k


def _band_numbers(k: int, bandwidth: int) -> int:
    b = min(bandwidth, k - 1)
    return k * (2 * b + 1) - b * (b + 1)


def _band_positions(k: int, bandwidth: int) -> "Tensor":
    import torch

    b = min(bandwidth, k - 1)
    i, j = torch.arange(k)[:, None], torch.arange(k)[:, None] + torch.arange(-b, b + 1)
    return (i * k + j)[(j >= 0) & (j < k)]


def _block_numbers(k: int, block_size: int) -> int:
    blocks, rest = divmod(k, min(block_size, k))
    return blocks * min(block_size, k) ** 2 + rest**2


def _block_positions(k: int, block_size: int) -> "Tensor":
    import torch

    b = min(block_size, k)
    i = torch.arange(k)[:, None]
    j = i // b * b + torch.arange(b)
    return (i * k + j)[j < k]


def _rotation_numbers(k: int, block_size: int) -> int:
    """k numbers c, and one angle for each pair of directions within a block."""
    return k + (_block_numbers(k, block_size) - k) // 2


_RECORDS = (
    Kind("diagonal", "one number for each direction", lambda k, _: k, form="diagonal"),
    Kind("core", "all entries", lambda k, _: k * k, leading=64),
    Kind("band", "entries near the diagonal", _band_numbers, option="bandwidth", positions=_band_positions),
    Kind("sparse", "entries with the largest gradient", lambda k, _: k * k, leading=64),
    Kind("block", "square blocks on the diagonal", _block_numbers, option="block_size", positions=_block_positions),
    Kind("rotation", "changes of the singular values, and rotations of the right singular vectors within blocks",
         _rotation_numbers, option="block_size", linear=False, entries=_block_numbers, singular=True),
)  # fmt: skip
KINDS: dict[str, Kind] = {kind.name: kind for kind in _RECORDS}
COEFFICIENTS = tuple(KINDS)
DEFAULT_COEFFICIENTS = "band"
"""What is trained where nothing else is asked for; docs/results/frontier.md has what other kinds scored."""
if TYPE_CHECKING:
    KindName = str
else:
    KindName = Literal[tuple(KINDS)]
"""The type of a name of a kind, for schemas of files."""


def kinds_in_words() -> str:
    """The names of all kinds, and what each trains.

    Examples:
        >>> kinds_in_words().split(";")[0]
        'diagonal: one number for each direction'
    """
    return "; ".join(f"{kind.name}: {kind.summary}" for kind in KINDS.values())


def leading_in_words() -> str:
    """How many directions each kind has where nothing says so.

    Examples:
        >>> leading_in_words()
        'all of them up to 1,024 (64 for core, sparse)'
    """
    most = KINDS[DEFAULT_COEFFICIENTS].leading
    fewer = [kind for kind in KINDS.values() if kind.leading != most]
    numbers = dict.fromkeys(kind.leading for kind in fewer)
    others = "; ".join(f"{k} for {', '.join(kind.name for kind in fewer if kind.leading == k)}" for k in numbers)
    return f"all of them up to {most:,} ({others})"


def kinds_with(option: str) -> str:
    """The names of the kinds that have this option.

    Examples:
        >>> kinds_with("block_size")
        'block, rotation'
    """
    return ", ".join(kind.name for kind in KINDS.values() if kind.option == option)
