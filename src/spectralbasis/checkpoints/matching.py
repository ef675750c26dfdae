"""Pairing the matrices of two checkpoints: by name, never by position."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from spectralbasis.checkpoints.checkpoint import Checkpoint
from spectralbasis.checkpoints.fused import Rows
from spectralbasis.checkpoints.matrices import Inventory, Matrix, take_inventory
from spectralbasis.checkpoints.names import (
    Conversions,
    clashing,
    conversions_of,
    kind_of,
    layer_number,
    numberless,
    plain_name,
    same_names,
    stack_of,
)
from spectralbasis.errors import InputError

Matrices = dict[str, Matrix]


@dataclass(frozen=True)
class Unpaired:
    """Matrices of one kind that have no partner in the other checkpoint.

    Attributes:
        side: "base" or "tuned".
        group: their common name, with `*` for numbers of layers and experts.
        matrices: how many they are.
        parameters: how many numbers they hold.
        share: of the numbers in all matrices of their side that would be measured.
        reason: why they have no partner.
    """

    side: str
    group: str
    matrices: int
    parameters: int
    share: float
    reason: str


@dataclass(frozen=True)
class Matching:
    """What two checkpoints have in common.

    Attributes:
        pairs: matrices of base and tuned, in the base's order.
        skipped: matrix → why it is in no pair.
        unpaired: what found no partner, or cannot be read, by groups. Embedding tables, heads and what `include` and
            `exclude` leave out are not counted.
        share: of the model that the pairs make up: of both sides the smaller one, in [0, 1].
    """

    pairs: list[tuple[Matrix, Matrix]]
    skipped: dict[str, str]
    unpaired: tuple[Unpaired, ...] = ()
    share: float = 1.0


def match_matrices(
    base: Checkpoint, tuned: Checkpoint, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> Matching:
    """Pair the matrices that two checkpoints share.

    Names are equal as they stand, by transformers' conversion table of the architecture (which also tells parts of
    fused weights and of stacks), or but for one more prefix of a whole stack of layers (`backbone.`). A checkpoint
    without a config is read with the other's.

    Raises:
        InputError: no matrix has a partner of the same shape, though weights can be read, or `include` names nothing.
    """
    ours = take_inventory(base, include, exclude, tuned.config)
    theirs = take_inventory(tuned, include, exclude, base.config)
    left, right = dict(ours.matrices), dict(theirs.matrices)
    partners = _partners(left, right, base, tuned)
    skipped = {**theirs.skipped, **ours.skipped}
    pairs: list[tuple[Matrix, Matrix]] = []
    alone: dict[str, dict[str, str]] = {"base": {}, "tuned": {}}
    for name, matrix in left.items():
        other = right.get(partners.get(name, ""))
        if other is None:
            alone["base"][name] = theirs.skipped.get(name, f"absent in {tuned.source}")
            continue
        matrix, other = _laid_out_alike(matrix, other)
        if other.shape != matrix.shape:
            reason = f"shapes differ: {_size(matrix)} in {base.source}, {_size(other)} in {tuned.source}"
            alone["base"][name], alone["tuned"][other.name] = reason, reason
        else:
            pairs.append((matrix, other))
    found = set(partners.values())
    alone["tuned"] |= {n: ours.skipped.get(n, f"absent in {base.source}") for n in right if n not in found}
    if not pairs and not (ours.unreadable and theirs.unreadable):
        raise InputError(_nothing_shared((base, ours), (tuned, theirs)))
    sides = {"base": (ours, left), "tuned": (theirs, right)}
    measured = {"base": [before for before, _ in pairs], "tuned": [after for _, after in pairs]}
    totals = {
        side: _parameters(matrices.values()) + sum(one.unreadable.values()) for side, (one, matrices) in sides.items()
    }
    unpaired = [
        group
        for side, (inventory, matrices) in sides.items()
        for group in _groups(side, inventory, matrices, alone[side], totals[side])
    ]
    share = min(_parameters(measured[side]) / totals[side] for side in sides)
    return Matching(pairs, {**skipped, **alone["tuned"], **alone["base"]}, tuple(unpaired), share)


def _partners(ours: Matrices, theirs: Matrices, base: Checkpoint, tuned: Checkpoint) -> dict[str, str]:
    """Base name → tuned name. A fused matrix whose parts the other side holds apart is replaced by its parts."""
    found = _stored_alike(ours, theirs)
    unsure = [
        {name for name, matrix in matrices.items() if matrix.cut.tensor in tensors}
        for matrices, tensors in ((ours, clashing(base.names())), (theirs, clashing(tuned.names())))
    ]
    left, right = _without(ours, {*found, *unsure[0]}), _without(theirs, {*found.values(), *unsure[1]})
    equal = {name: name for name in left if name in right}
    found |= equal
    left, right = _without(left, equal), _without(right, equal)
    if left and right:
        tables = conversions_of(base.config or tuned.config), conversions_of(tuned.config or base.config)
        for matrices, names, table in ((ours, left, tables[0]), (theirs, right, tables[1])):
            _divide(matrices, names, table)
        left, right = _without(ours, {*found, *unsure[0]}), _without(theirs, {*found.values(), *unsure[1]})
        found |= same_names(left, right, lambda: tables)
    left, right = _without(ours, found), _without(theirs, found.values())
    wrapped_tuned = _without_prefix(left, right)
    wrapped_base = _without_prefix(_without(right, wrapped_tuned.values()), _without(left, wrapped_tuned))
    return found | wrapped_tuned | {long: short for short, long in wrapped_base.items()}


def _stored_alike(ours: Matrices, theirs: Matrices) -> dict[str, str]:
    """Base name → tuned name of the same part of a tensor that has one name in both, prefix and all."""
    keys: list[dict[tuple[object, ...], str]] = []
    for matrices in (ours, theirs):
        stored = {name: (plain_name(one.cut.tensor), one.cut.expert, one.cut.rows) for name, one in matrices.items()}
        count = Counter(stored.values())
        keys.append({key: name for name, key in stored.items() if count[key] == 1})
    return {name: keys[1][key] for key, name in keys[0].items() if key in keys[1]}


def _laid_out_alike(before: Matrix, after: Matrix) -> tuple[Matrix, Matrix]:
    """The pair, both read as the side that knows its layer says: a file does not tell a transposed convolution."""
    known = [matrix for matrix in (before, after) if matrix.checkpoint.module_type(matrix.cut.tensor) is not None]
    stored = [matrix.checkpoint.shape(matrix.cut.tensor) for matrix in (before, after)]
    apart = before.cut.transposed != after.cut.transposed
    if not apart or len(known) != 1 or stored[0] != stored[1] or before.cut.rows or after.cut.rows:
        return before, after
    return laid_out_as(known[0], before), laid_out_as(known[0], after)


def laid_out_as(known: Matrix, matrix: Matrix) -> Matrix:
    """The matrix, cut out of its tensor as another is out of one of the same shape."""
    return replace(matrix, shape=known.shape, cut=replace(known.cut, tensor=matrix.cut.tensor))


def _without(matrices: Mapping[str, Matrix], names: Iterable[str]) -> Matrices:
    gone = set(names)
    return {name: matrix for name, matrix in matrices.items() if name not in gone}


def _divide(matrices: Matrices, candidates: Iterable[str], table: Conversions | None) -> None:
    """Replace whole matrices that transformers divides, such as a fused qkv of an unknown name, by their parts."""
    for name in list(candidates) if table is not None else ():
        matrix = matrices[name]
        parts = table.divided(name) if table is not None else []
        if matrix.cut.rows is not None or not parts or matrix.shape[0] % len(parts):
            continue
        size = matrix.shape[0] // len(parts)
        del matrices[name]
        for number, part in enumerate(parts):
            cut = replace(matrix.cut, rows=Rows(1, number * size, (number + 1) * size))
            shape = (size, matrix.shape[1])
            matrices[part] = replace(
                matrix, name=part, layer=layer_number(part), kind=kind_of(part), shape=shape, cut=cut
            )


def _without_prefix(short: Mapping[str, Matrix], long: Mapping[str, Matrix]) -> dict[str, str]:
    """Short name → long name, for stacks of layers that one prefix tells apart; a name that fits two prefixes has none.

    A prefix counts only if it explains most of a stack on both sides: a stray suffix is no evidence.
    """
    lengths = sorted({len(name) for name in short})
    candidates = [
        (name[: -len(suffix)], suffix)
        for name, matrix in long.items()
        for suffix in (name[-length:] for length in lengths if 0 < length < len(name) and name[-length - 1] == ".")
        if suffix in short and short[suffix].shape == matrix.shape
    ]
    fits = Counter(suffix for _, suffix in candidates)
    by_prefix: dict[str, set[str]] = {}
    for prefix, suffix in candidates:
        if fits[suffix] == 1:
            by_prefix.setdefault(prefix, set()).add(suffix)
    sizes = [Counter(map(stack_of, names)) for names in (short, long)]
    found: dict[str, str] = {}
    for prefix, explained in by_prefix.items():
        stacks = {stack_of(suffix) for suffix in explained if layer_number(suffix) >= 0}
        counts = [Counter(map(stack_of, explained)), Counter(stack_of(prefix + suffix) for suffix in explained)]
        whole = [
            stack
            for stack in stacks
            if 2 * counts[0][stack] > sizes[0][stack] and 2 * counts[1][prefix + stack] > sizes[1][prefix + stack]
        ]
        if whole or 2 * len(explained) > max(len(short), len(long)) > 1:
            inside = {suffix for suffix in explained if not stacks or whole}
            found |= {suffix: prefix + suffix for suffix in inside}
    return found


def describe_unpaired(groups: Sequence[Unpaired], most: int = 6) -> str:
    """Groups in words: "visual.blocks.* of the base (32 matrices, 24 % of its parameters): absent in tuned"."""
    shown = [
        f"{one.group} of the {'base' if one.side == 'base' else 'finetuned checkpoint'} ({one.matrices} "
        f"{'matrix' if one.matrices == 1 else 'matrices'}, {share_text(one.share)} of its parameters): {one.reason}"
        for one in sorted(groups, key=lambda one: -one.share)[:most]
    ]
    more = [f"and {len(groups) - most} more groups"] if len(groups) > most else []
    return "; ".join([*shown, *more])


def share_text(share: float) -> str:
    """A share in percent, never rounded to nothing or to all of it."""
    percent = 100 * share
    return f"{min(max(percent, 0.1), 99.9):.1f} %" if percent < 1 or 99 < percent < 100 else f"{percent:.0f} %"


def _groups(
    side: str, inventory: Inventory, matrices: Mapping[str, Matrix], alone: Mapping[str, str], total: int
) -> list[Unpaired]:
    """What has no partner or cannot be read, by kinds; a stack that is left over as a whole is one group."""
    sizes = {name: prod(matrices[name].shape) for name in alone}
    reasons = dict(alone)
    for name, size in inventory.unreadable.items():
        sizes[name], reasons[name] = size, inventory.skipped[name]
    paired = {stack_of(name) for name in matrices if name not in alone}
    groups: dict[tuple[str, str], list[str]] = {}
    for name in sizes:
        stack = stack_of(name)
        whole = stack not in paired and layer_number(name) >= 0
        group = f"{stack}.*".lstrip(".") if whole else numberless(name)
        groups.setdefault((group, reasons[name].partition(":")[0]), []).append(name)
    return [
        Unpaired(side, group, len(names), held := sum(sizes[name] for name in names), held / total, reasons[names[0]])
        for (group, _), names in groups.items()
    ]


def _parameters(matrices: Iterable[Matrix]) -> int:
    return sum(prod(matrix.shape) for matrix in matrices)


def _size(matrix: Matrix) -> str:
    return "×".join(map(str, matrix.shape))


def _nothing_shared(*sides: tuple[Checkpoint, Inventory]) -> str:
    for checkpoint, found in sides:
        if not found.matrices:
            example = next((f"; {name}: {reason}" for name, reason in found.skipped.items()), "")
            return f"{checkpoint.source} has no matrix that can be measured{example}"
    (base, ours), (tuned, theirs) = sides
    remedy = "compare checkpoints of one architecture"
    for source, short, long in ((base, theirs, ours), (tuned, ours, theirs)):
        for name in short.matrices:  # where one side holds the other's stack more than once
            copies = [other for other in long.matrices if f".{other}".endswith(f".{name}")]
            if len(copies) > 1:
                remedy = (
                    f"{source.source} holds {name} more than once ({', '.join(copies[:3])}), and it is unclear which "
                    "of them is meant: pass the state_dict of that part only"
                )
                break
    examples = [
        ", ".join(f"{name} ({_size(matrix)})" for name, matrix in list(one.matrices.items())[:2])
        for one in (ours, theirs)
    ]
    return (
        f"{base.source} and {tuned.source} share no matrix of the same name and shape: one has {examples[0]}, the "
        f"other {examples[1]}; {remedy}"
    )
