"""Similarity of finetuned checkpoints of one base: cosines of their coefficients and of their updates."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from spectralbasis.checkpoints import Checkpoint, match_matrices, open_checkpoint
from spectralbasis.checkpoints.adapters import AdapterCheckpoint
from spectralbasis.checkpoints.names import short_labels
from spectralbasis.coefficients.spectral_adapters import (
    check_one_basis,
    is_spectral_adapter,
    read_spectral_adapter,
    with_names_of,
)
from spectralbasis.errors import InputError
from spectralbasis.files import atomic_path, claim_files
from spectralbasis.linalg import gram_cosines, inner_products

Grams = Mapping[str, Tensor]
"""Matrix name → inner products between checkpoints, (t, t), float64."""


@dataclass(frozen=True)
class Similarity:
    """Cosines between finetuned checkpoints.

    Attributes:
        table: one row per pair and matrix: `a`, `b`, `matrix`, `coefficient_cosine`, `update_cosine`; NaN where one of
            the two does not change the matrix, or where it was not asked for.
        coefficients: cosines over all matrices at once, (t, t), labelled; None where not every checkpoint is a
            spectral adapter, or where they were not asked for.
        updates: the same of the full updates ΔW.
        sources: label → path or name.
        base: what the updates were taken from; empty where they were not.
    """

    table: pd.DataFrame
    coefficients: pd.DataFrame | None
    updates: pd.DataFrame | None
    sources: dict[str, str]
    base: str

    def to_dict(self) -> dict[str, Any]:
        """The overall cosines, pair by pair; None where a number does not exist."""
        kinds = {"coefficients": self.coefficients, "updates": self.updates}
        pairs = [
            {"a": a, "b": b} | {kind: _number(found, a, b) for kind, found in kinds.items()}
            for a, b in combinations(self.sources, 2)
        ]
        matrices = int(self.table["matrix"].nunique())
        return {"checkpoints": self.sources, "base": self.base, "matrices": matrices, "pairs": pairs}

    def save(self, directory: str | Path) -> None:
        """Write `similarity.parquet` (matrix by matrix) and `similarity.json` (overall) into a folder."""
        folder = Path(directory)
        claim_files(folder, "similarity.parquet", "similarity.json")
        with atomic_path(folder / "similarity.parquet") as temporary:
            self.table.to_parquet(temporary, index=False)
        with atomic_path(folder / "similarity.json") as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def similarity(
    checkpoints: Sequence[Any],
    *,
    base: Any = None,
    of: str = "both",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    output: str | Path | None = None,
) -> Similarity:
    """Cosine similarity of finetuned checkpoints of one base, matrix by matrix and overall.

    Trained coefficients are compared where all are spectral adapters. An adapter of fewer directions counts as zero in
    the others. Since U and V are orthonormal, `⟨U C_a Vᵀ, U C_b Vᵀ⟩ = ⟨C_a, C_b⟩`: the updates' cosine is the same.

    Examples:
        >>> import copy, tempfile
        >>> from pathlib import Path
        >>> import peft, torch
        >>> import spectralbasis as sb
        >>> folder, base = Path(tempfile.mkdtemp()), torch.nn.Sequential(torch.nn.Linear(8, 6))
        >>> config = sb.SpectralConfig(target_modules=["0"], leading=3, init_weights=False)
        >>> peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(folder / "task")
        >>> one = sb.combine([folder / "task"], weights=[-2], output=folder / "minus").output
        >>> found = sb.similarity([folder / "task", one], of="coefficients")
        >>> round(float(found.coefficients.loc["task", "minus"]), 4)
        -1.0

    Args:
        checkpoints: two or more adapter folders, or full checkpoints: paths, hub ids, state dicts, modules.
        base: the pretrained checkpoint; None takes the one that the first adapter names.
        of: "both"; "coefficients", which needs no base; or "updates".
        include: glob patterns of matrix names to take; empty takes all coefficients, and all updates but those of
            embeddings and heads.
        exclude: glob patterns of matrix names to leave out.
        output: folder for `similarity.json` and `similarity.parquet`; None writes nothing.

    Raises:
        InputError: fewer than two checkpoints, coefficients that are not of one base, form and basis, or no base.
    """
    if len(checkpoints) < 2:
        raise InputError(f"checkpoints must be two or more, got {len(checkpoints)}")
    if of not in ("both", "coefficients", "updates"):
        raise InputError(f"of={of!r} is unknown; pass 'both', 'coefficients' or 'updates'")
    if output is not None:
        claim_files(Path(output), "similarity.parquet", "similarity.json")
    coefficients = _coefficients(checkpoints, of, include, exclude)
    opened, start = ([], None) if of == "coefficients" else _open(checkpoints, base)
    updates = {} if start is None else _update_grams(start, opened, include, exclude)
    sources = [one.source for one in opened] or [str(one) for one in checkpoints]
    labels = short_labels(sources)
    found = Similarity(
        table=_table(labels, coefficients, updates),
        coefficients=_overall(labels, coefficients),
        updates=_overall(labels, updates),
        sources=dict(zip(labels, sources, strict=True)),
        base="" if start is None else start.source,
    )
    if output is not None:
        found.save(output)
    return found


def _coefficients(checkpoints: Sequence[Any], of: str, include: Sequence[str], exclude: Sequence[str]) -> Grams:
    """Inner products of trained coefficients; none where they are not asked for, or where there are none."""
    foreign = [one for one in checkpoints if not is_spectral_adapter(one)]
    if of == "updates" or (foreign and of == "both"):
        return {}
    if foreign:
        raise InputError(f"{foreign[0]} is not a spectral adapter's folder, so it has no coefficients; leave out `of`")
    adapters = [read_spectral_adapter(Path(one)) for one in checkpoints]
    adapters = [with_names_of(adapters[0].config, one) for one in adapters]
    check_one_basis(adapters)
    trained = [adapter.coefficients() for adapter in adapters]
    every = dict.fromkeys(name for one in trained for name in one)
    names = [
        name
        for name in every
        if (not include or any(fnmatchcase(name, pattern) for pattern in include))
        and not any(fnmatchcase(name, pattern) for pattern in exclude)
    ]
    if not names:
        raise InputError(
            f"include={list(include)} and exclude={list(exclude)} leave none of {len(every)} trained matrices, such as "
            f"{next(iter(every))}; give other patterns"
        )
    return {name: _gram([one.get(name) for one in trained]) for name in names}


def _gram(found: Sequence[Tensor | None]) -> Tensor:
    largest = max((C for C in found if C is not None), key=torch.numel)
    padded = torch.zeros(len(found), *largest.shape, dtype=torch.float64)
    for row, C in zip(padded, found, strict=True):
        if C is not None:
            row[tuple(slice(size) for size in C.shape)] = C
    return padded.flatten(1) @ padded.flatten(1).T


def _open(checkpoints: Sequence[Any], base: Any) -> tuple[list[Checkpoint], Checkpoint]:
    """The checkpoints, and the base that their updates start from."""
    given = None if base is None else open_checkpoint(base)
    opened = [open_checkpoint(one, base=given) for one in checkpoints]
    named = (one.base for one in opened if isinstance(one, AdapterCheckpoint))
    start = given or next(named, None)
    if start is None:
        raise InputError(
            "full checkpoints do not say what they were finetuned from, so their updates are not known; "
            "pass the pretrained model: base=..., or --base MODEL"
        )
    return opened, start


def _update_grams(
    base: Checkpoint, checkpoints: Sequence[Checkpoint], include: Sequence[str], exclude: Sequence[str]
) -> Grams:
    """Inner products of the updates of every matrix that all checkpoints have and some of them change."""
    matched = [match_matrices(base, one, include, exclude).pairs for one in checkpoints]
    partners = [{before.name: after for before, after in pairs} for pairs in matched]
    grams = {}
    for before, _ in matched[0]:
        if all(before.name in one for one in partners):
            W0 = before.read().float()
            updates = [partial(lambda after, W0: after.read().float() - W0, one[before.name], W0) for one in partners]
            gram = inner_products(updates)
            if not bool(torch.isfinite(gram).all()):
                raise InputError(f"{before.name} holds NaN or infinite values; leave it out with exclude (--exclude)")
            if bool(gram.any()):
                grams[before.name] = gram
    if not grams:
        raise InputError(f"{base.source} and the checkpoints hold the same weights: there is no update to compare")
    return grams


def _overall(labels: Sequence[str], grams: Grams) -> pd.DataFrame | None:
    if not grams:
        return None
    total = torch.stack(list(grams.values())).sum(0)
    return pd.DataFrame(gram_cosines(total).numpy(), index=list(labels), columns=list(labels))


def _table(labels: Sequence[str], coefficients: Grams, updates: Grams) -> pd.DataFrame:
    kinds = {"coefficient_cosine": coefficients, "update_cosine": updates}
    cosines = {kind: {name: gram_cosines(gram) for name, gram in grams.items()} for kind, grams in kinds.items()}
    rows = [
        {"a": labels[i], "b": labels[j], "matrix": name}
        | {kind: float(found[name][i, j]) if name in found else math.nan for kind, found in cosines.items()}
        for i, j in combinations(range(len(labels)), 2)
        for name in dict.fromkeys((*coefficients, *updates))
    ]
    return pd.DataFrame(rows, columns=["a", "b", "matrix", *kinds])


def _number(found: pd.DataFrame | None, a: str, b: str) -> float | None:
    value = math.nan if found is None else found.loc[[a], [b]].to_numpy().item()
    return value if math.isfinite(value) else None
