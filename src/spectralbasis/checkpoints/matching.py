"""Pairing the matrices of two checkpoints: by name, never by position."""

from collections import Counter
from collections.abc import Mapping, Sequence

from spectralbasis.checkpoints.checkpoint import Checkpoint
from spectralbasis.checkpoints.matrix import Matrix
from spectralbasis.checkpoints.views import logical_matrices
from spectralbasis.errors import InputError


def match_matrices(
    base: Checkpoint, tuned: Checkpoint, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> tuple[list[tuple[Matrix, Matrix]], dict[str, str]]:
    """Pairs of the matrices that two checkpoints share, in the base's order, and what is skipped, with the reason.

    Where most names of one side carry one more prefix than the other's (`backbone.`, `language_model.model.`), that
    prefix is ignored. A checkpoint without a config is read with the other's.

    Raises:
        InputError: no matrix has a partner of the same shape, or `include` names nothing.
    """
    ours, our_skipped = logical_matrices(base, include, exclude, tuned.config)
    theirs, their_skipped = logical_matrices(tuned, include, exclude, base.config)
    partners = _partners(ours, theirs)
    skipped = {**their_skipped, **our_skipped}
    pairs = []
    for name, matrix in ours.items():
        other = theirs.get(partners.get(name, ""))
        if other is None:
            skipped[name] = their_skipped.get(name, f"absent in {tuned.source}")
        elif other.shape != matrix.shape:
            skipped[name] = f"shapes differ: {_size(matrix)} in {base.source}, {_size(other)} in {tuned.source}"
        else:
            pairs.append((matrix, other))
    found = set(partners.values())
    skipped |= {name: our_skipped.get(name, f"absent in {base.source}") for name in theirs if name not in found}
    if not pairs:
        raise InputError(_nothing_shared((base, ours, our_skipped), (tuned, theirs, their_skipped)))
    return pairs, skipped


def _partners(ours: Mapping[str, Matrix], theirs: Mapping[str, Matrix]) -> dict[str, str]:
    """Base name to tuned name: equal names, or names equal but for one prefix if that explains more of them."""
    equal = {name: name for name in ours if name in theirs}
    only_ours = {name: matrix for name, matrix in ours.items() if name not in equal}
    only_theirs = {name: matrix for name, matrix in theirs.items() if name not in equal}
    wrapped_tuned = _without_prefix(only_ours, only_theirs)
    wrapped_base = {long: short for short, long in _without_prefix(only_theirs, only_ours).items()}
    prefixed = max(wrapped_tuned, wrapped_base, key=len)
    return equal | prefixed if len(prefixed) > len(equal) else equal


def _without_prefix(short: Mapping[str, Matrix], long: Mapping[str, Matrix]) -> dict[str, str]:
    """Short name to long name under the one prefix that explains the most; a name that fits two prefixes has none."""
    candidates = [
        (name[: -len(suffix)], suffix)
        for name, matrix in long.items()
        for suffix in _suffixes(name)
        if suffix in short and short[suffix].shape == matrix.shape
    ]
    if not candidates:
        return {}
    prefix = Counter(prefix for prefix, _ in candidates).most_common(1)[0][0]
    fits = Counter(suffix for _, suffix in candidates)
    return {suffix: prefix + suffix for found, suffix in candidates if found == prefix and fits[suffix] == 1}


def _suffixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(1, len(parts))]


def _size(matrix: Matrix) -> str:
    return "×".join(map(str, matrix.shape))


def _nothing_shared(*sides: tuple[Checkpoint, Mapping[str, Matrix], Mapping[str, str]]) -> str:
    for checkpoint, matrices, skipped in sides:
        if not matrices:
            example = next((f"; {name}: {reason}" for name, reason in skipped.items()), "")
            return f"{checkpoint.source} has no matrix that can be measured{example}"
    (base, ours, _), (tuned, theirs, _) = sides
    return (
        f"{base.source} and {tuned.source} share no matrix of the same name and shape: one has {_examples(ours)}, "
        f"the other {_examples(theirs)}; compare checkpoints of one architecture"
    )


def _examples(matrices: Mapping[str, Matrix]) -> str:
    return ", ".join(f"{name} ({_size(matrix)})" for name, matrix in list(matrices.items())[:2])
