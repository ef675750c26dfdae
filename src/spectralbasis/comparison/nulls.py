"""Null models: updates as large as the real one, placed at random relative to the base.

A null is one record: how it is drawn, its closed forms, and the words for it in help, errors, the methods paragraph and
on the page. To add one, put it into the tuple that `NULLS` is made from, or pass it to `compare(null=...)`. torch is
imported only where it is used, so that `--help` can list the nulls without it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

import xxhash

from spectralbasis.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from spectralbasis.comparison.coverage_moments import Coverage, CoverageMoments, Floats, UpdateSums
    from spectralbasis.comparison.rotations import SelfEnergy
    from spectralbasis.linalg.row_blocks import Rows, RowSource

Update = TypeVar("Update", "Tensor", "RowSource")


@dataclass(frozen=True)
class Null:
    """A null model.

    Attributes:
        name: as in `compare(null=...)` and in the column `null` of the table.
        update: what a draw of ΔW is, in a few words that continue "compared with".
        description: what stands in for W1, as a formula in words.
        draw: gives a random update of the shape of ΔW, from ΔW (a tensor, or a row source where a matrix exceeds the
            memory budget) and a CPU generator, which is the only source of randomness; None where closed forms replace
            draws. A function of a module, where other processes measure.
        in_base: whether `draw` takes the singular vectors of W0 (`SingularVectors`) as a third argument. Then a matrix
            is measured whole, never in row blocks.
        keeps: metrics of which every draw has exactly the value of ΔW, so that they have no null.
        closed_forms: (metric, side) → its mean under the null, from k, m and n; functions of a module, too.
        coverage: gives the moments of the coverages without draws; see `coverage_moments.Coverage`. None where they are
            drawn.
        self_energy: gives from the singular values of ΔW and its shape the `rotations.SelfEnergy` of a draw, from which
            the moments of the overlaps follow; None where they are drawn.
    """

    name: str
    update: str
    description: str
    draw: Callable[..., Any] | None = None
    in_base: bool = False
    keeps: frozenset[str] = frozenset()
    closed_forms: Mapping[tuple[str, str], Callable[[Any, Any, Any], Any]] = field(default_factory=dict)
    coverage: "Coverage | None" = None
    self_energy: "Callable[[Floats, tuple[int, int]], SelfEnergy] | None" = None

    def __str__(self) -> str:
        return self.name

    def draws(
        self,
        update: Any,
        count: int,
        seed: int,
        base_hash: str,
        tuned_hash: str,
        vectors: "Callable[[], SingularVectors] | None" = None,
    ) -> Iterator[Any]:
        """Random updates, fixed by the seed and the content of both matrices, whatever the order or place of work.

        Args:
            update: ΔW, (m, n), a tensor or a row source, as each draw is then.
            count: how many to draw; each is drawn when it is asked for.
            seed: of all draws of a comparison.
            base_hash: content hash of W0.
            tuned_hash: content hash of W1.
            vectors: gives the singular vectors of W0, which is asked only where the null is drawn in them (`in_base`).

        Raises:
            InputError: the null has no draws, or `vectors` is missing.
        """
        if self.draw is None:
            raise InputError(f"the null {self.name!r} has no draws, only closed forms; pass null=None instead")
        if self.in_base and vectors is None:
            raise InputError(
                f"the null {self.name!r} is drawn in the singular vectors of the base; pass "
                "vectors=lambda: SingularVectors.of(W0)"
            )
        known = (vectors(),) if self.in_base and vectors is not None else ()
        for number in range(count):
            yield self.draw(update, draw_generator(seed, base_hash, tuned_hash, number), *known)


@dataclass(frozen=True)
class SingularVectors:
    """All singular vectors of a matrix, without those of its null spaces, of which none is distinguished.

    Attributes:
        U: (m, r), columns orthonormal, where r is the rank.
        Vh: (r, n), rows orthonormal.
    """

    U: "Tensor"
    Vh: "Tensor"

    @classmethod
    def of(cls, W: "Tensor") -> "SingularVectors":
        """By a full decomposition in float64; singular values below the rounding of float32 weights count as zero."""
        import torch

        U, values, Vh = torch.linalg.svd(W.double(), full_matrices=False)
        rounding = float(values[0]) * torch.finfo(torch.float32).eps
        rank = int(torch.count_nonzero(values > rounding))
        return cls(U[:, :rank].to(W.dtype), Vh[:rank].to(W.dtype))


def parse_null(null: str | Null | None) -> Null | None:
    """The null of this name, or the record itself; None for no draws.

    Raises:
        InputError: there is none of this name, or it cannot be drawn.
    """
    if null is None:
        return None
    found = NULLS.get(null) if isinstance(null, str) else null
    known = f"{', '.join(NULLS)}, a Null, or None for no draws (--null none)"
    if not isinstance(found, Null):
        raise InputError(f"null={null!r} is unknown; pass one of {known}")
    if found.draw is None:
        raise InputError(f"the null {found.name} has closed forms only and cannot be drawn; pass one of {known}")
    return found


def draw_generator(seed: int, *what: str | int) -> "torch.Generator":
    """A generator for one draw, fixed by the seed and by what is drawn."""
    import torch

    key = "/".join(str(part) for part in (seed, *what))
    return torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(key.encode()) & 0x7FFFFFFFFFFFFFFF)


def scrambled(update: Update, generator: "torch.Generator") -> Update:
    """`D1 P1 ΔW P2 D2`, with random permutations P and signs D: norm and singular values stay, alignment is lost.

    Args:
        update: ΔW, (m, n); a row source gives a row source of the same values.
        generator: a CPU generator, the only source of randomness.
    """
    return _scrambled(update, generator, (0, 1))


def scrambled_left(update: Update, generator: "torch.Generator") -> Update:
    """`D P ΔW`, a random permutation P of the rows with random signs D; arguments as of `scrambled`."""
    return _scrambled(update, generator, (0,))


def scrambled_right(update: Update, generator: "torch.Generator") -> Update:
    """`ΔW P D`, a random permutation P of the columns with random signs D; arguments as of `scrambled`."""
    return _scrambled(update, generator, (1,))


def _scrambled(update: Update, generator: "torch.Generator", sides: tuple[int, ...]) -> Update:
    """Rows (side 0) and columns (side 1) in random order with random signs, as far as `sides` names them."""
    import torch

    from spectralbasis.linalg.row_blocks import RowSource

    shape = update.shape
    orders = {side: torch.randperm(shape[side], generator=generator).to(update.device) for side in sides}
    signs = {side: _signs(shape[side], generator).to(update.device, update.dtype) for side in sides}

    def draw(rows: "Rows") -> "Tensor":
        found = update[orders[0][rows]].mul_(signs[0][rows][:, None]) if 0 in sides else update[rows]
        return found[:, orders[1]].mul_(signs[1]) if 1 in sides else found

    return RowSource(shape, draw, update.device) if isinstance(update, RowSource) else draw(slice(shape[0]))


def energy_preserving(update: "Tensor", generator: "torch.Generator", vectors: SingularVectors) -> "Tensor":
    """The same magnitudes `|u_iᵀ ΔW v_j|` with random signs of rows and columns, (m, n).

    With the singular vectors U, V of W0 it is `H1 ΔW H2`, where `H1 = U D1 Uᵀ + Q1`: D1 are random signs, and Q1 is a
    random rotation of what is orthogonal to U (nothing, where W0 has rank m); H2 likewise from V. Any other rotation of
    a null space would give the same overlaps with W0, since W0 has no vectors of its own there.

    Args:
        update: ΔW, (m, n).
        generator: a CPU generator, the only source of randomness.
        vectors: of W0.
    """
    left = _reflected(update, vectors.U, generator)
    return _reflected(left.T, vectors.Vh.T, generator).T.contiguous()


def _reflected(update: "Tensor", vectors: "Tensor", generator: "torch.Generator") -> "Tensor":
    """The rows' side of `energy_preserving`: `(U D Uᵀ + Q) ΔW` for U (m, r)."""
    import torch

    (m, n), rank = update.shape, vectors.shape[1]
    inside = vectors.T @ update
    signs = _signs(rank, generator).to(update.device, update.dtype)
    found = vectors @ (inside * signs[:, None])
    if rank == m:
        return found
    count = min(m - rank, n)

    def frame() -> "Tensor":
        """Haar-random orthonormal columns that are orthogonal to the vectors, (m, count)."""
        noise = torch.randn(m, count, generator=generator, dtype=torch.float64).to(update)
        Q, R = torch.linalg.qr(noise - vectors @ (vectors.T @ noise))
        return Q * R.diagonal().sign()

    outside = update - vectors @ inside
    part = frame().T @ outside if count == m - rank else torch.linalg.qr(outside, mode="r").R
    return found + frame() @ part


def _signs(size: int, generator: "torch.Generator") -> "Tensor":
    import torch

    return torch.randint(0, 2, (size,), generator=generator) * 2 - 1


def gaussian(update: Update, generator: "torch.Generator") -> Update:
    """An update of independent normal entries, (m, n), with the Frobenius norm of ΔW; arguments as of `scrambled`."""
    import torch

    from spectralbasis.linalg.row_blocks import RowSource, frobenius_norm

    norm = frobenius_norm(update)
    if not isinstance(update, RowSource):
        noise = torch.randn(update.shape, generator=generator, dtype=torch.float64).to(update)
        return noise * float(norm / frobenius_norm(noise))
    source = normal_rows(update.shape, generator, update.device)
    scale = float(norm / frobenius_norm(source))
    return replace(source, read=lambda rows: source[rows] * scale)


TOGETHER = 16
"""How many normal numbers torch makes of as many uniform ones at once, so that 16 more continue where it stopped."""


def normal_rows(shape: tuple[int, int], generator: "torch.Generator", device: "torch.device") -> "RowSource":
    """`torch.randn(shape, generator=generator, dtype=torch.float64)` in float32, a run of rows at a time.

    The state of the generator before each run is kept; what the generator is left with is that of the whole draw. Runs
    of rows can be read, single ones cannot.

    Args:
        shape: (m, n).
        generator: a CPU generator.
        device: where the rows come to lie.
    """
    import torch

    from spectralbasis.linalg import row_blocks

    m, n = shape
    height = TOGETHER * max(1, row_blocks.BLOCK_ENTRIES // (TOGETHER * n))
    starts = range(0, max(1, m - TOGETHER + 1), height)  # the last run is never shorter than what is made together
    stops = [*starts[1:], m]
    states = []
    for start, stop in zip(starts, stops, strict=True):
        states.append(generator.get_state())
        torch.randn(stop - start, n, generator=generator, dtype=torch.float64)

    @lru_cache(maxsize=1)
    def run(number: int) -> "Tensor":
        own = torch.Generator()
        own.set_state(states[number])
        return torch.randn(stops[number] - starts[number], n, generator=own, dtype=torch.float64).to(torch.float32)

    def read(rows: "Rows") -> "Tensor":
        if not isinstance(rows, slice):
            raise TypeError(f"normal numbers are drawn in their order; expected a slice of rows, got {type(rows)}")
        start, stop, _ = rows.indices(m)
        first = min(start // height, len(starts) - 1)
        parts = [run(number) for number in range(first, len(starts)) if starts[number] < stop]
        return torch.cat(parts)[start - starts[first] : stop - starts[first]].to(device)

    return row_blocks.RowSource(shape, read, device)


def _scrambled_coverage(update: Any, sums: "UpdateSums", U: "Tensor", Vh: "Tensor") -> "CoverageMoments":
    from spectralbasis.comparison import coverage_moments

    return coverage_moments.scrambled_coverage(sums, U, Vh)


def _left_coverage(update: Any, sums: "UpdateSums", U: "Tensor", Vh: "Tensor") -> "CoverageMoments":
    from spectralbasis.comparison import coverage_moments

    return coverage_moments.one_sided_coverage("left", update, sums, U, Vh)


def _right_coverage(update: Any, sums: "UpdateSums", U: "Tensor", Vh: "Tensor") -> "CoverageMoments":
    from spectralbasis.comparison import coverage_moments

    return coverage_moments.one_sided_coverage("right", update, sums, U, Vh)


def _gaussian_coverage(update: Any, sums: "UpdateSums", U: "Tensor", Vh: "Tensor") -> "CoverageMoments":
    from spectralbasis.comparison import coverage_moments

    return coverage_moments.gaussian_coverage(sums, U, Vh)


def _scrambled_energy(values: "Floats", shape: tuple[int, int]) -> "SelfEnergy":
    from spectralbasis.comparison import rotations

    return rotations.scrambled_energy(values, shape)


def _gaussian_energy(values: "Floats", shape: tuple[int, int]) -> "SelfEnergy":
    from spectralbasis.comparison import rotations

    return rotations.gaussian_energy(values, shape)


def _left_share(k: Any, m: Any, n: Any) -> Any:
    return k / m


def _right_share(k: Any, m: Any, n: Any) -> Any:
    return k / n


def _core_share(k: Any, m: Any, n: Any) -> Any:
    return k * k / (m * n)


def _diagonal_share(k: Any, m: Any, n: Any) -> Any:
    return k / (m * n)


COVERAGES = ("coverage_left", "coverage_right", "coverage_core", "coverage_diagonal")

SCRAMBLED = Null(
    name="scrambled",
    update="a random update of the same size and spectrum",
    description="W0 + D1 P1 ΔW P2 D2 with random permutations P and signs D",
    draw=scrambled,
    coverage=_scrambled_coverage,
    self_energy=_scrambled_energy,
)
SCRAMBLED_LEFT = Null(
    name="scrambled-left",
    update="the same update with its rows at random",
    description="W0 + D P ΔW with a random permutation P and signs D of the rows",
    draw=scrambled_left,
    keeps=frozenset({"coverage_right"}),
    coverage=_left_coverage,
)
SCRAMBLED_RIGHT = Null(
    name="scrambled-right",
    update="the same update with its columns at random",
    description="W0 + ΔW P D with a random permutation P and signs D of the columns",
    draw=scrambled_right,
    keeps=frozenset({"coverage_left"}),
    coverage=_right_coverage,
)
ENERGY = Null(
    name="energy",
    update="an update of the same energy on each pair of the base's directions, with random signs",
    description="W0 + U D1 (Uᵀ ΔW V) D2 Vᵀ with all singular vectors U, V of W0 and random signs D",
    draw=energy_preserving,
    in_base=True,
    keeps=frozenset({*COVERAGES, "trailing_coverage"}),
)
GAUSSIAN = Null(
    name="gaussian",
    update="a random update of the same size",
    description="W0 + G with independent normal entries and ‖G‖ = ‖ΔW‖",
    draw=gaussian,
    coverage=_gaussian_coverage,
    self_energy=_gaussian_energy,
)
HAAR = Null(
    name="haar",
    update="directions that are independent of those of the base",
    description="matrices whose singular vectors are Haar-random",
    closed_forms={
        ("subspace_overlap", "left"): _left_share,
        ("subspace_overlap", "right"): _right_share,
        ("coverage_core", "both"): _core_share,
        ("coverage_diagonal", "both"): _diagonal_share,
        ("coverage_left", "left"): _left_share,
        ("coverage_right", "right"): _right_share,
    },
)
NULLS = {null.name: null for null in (SCRAMBLED, SCRAMBLED_LEFT, SCRAMBLED_RIGHT, ENERGY, GAUSSIAN)}
"""The nulls that `compare` can draw, by name; the first is the default."""
