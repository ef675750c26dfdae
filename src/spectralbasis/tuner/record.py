"""What a config records of each adapted matrix, so that its adapter means the same wherever it is opened."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le
from typing_extensions import TypedDict

from spectralbasis.errors import InputError
from spectralbasis.records import Count, Finite, Positive
from spectralbasis.tuner.entries import unpack_positions
from spectralbasis.tuner.factors import PROBES

RECORD = ("base_hashes", "ranks", "probes", "scales", "entries")
"""Fields of `SpectralConfig` that hold one value for each adapted matrix."""
MOST_DIRECTIONS = 1 << 16
"""Of one matrix at most: several times the smaller side of the largest there are."""
Rank = Annotated[int, Ge(1), Le(MOST_DIRECTIONS)]
"""The k of one matrix."""


class AdapterRecord(TypedDict, total=False):
    """What adapter_config.json says of an adapter of the method SPECTRAL; other keys are PEFT's."""

    peft_type: str
    task_type: str | None
    base_model_name_or_path: str | None
    revision: str | None
    inference_mode: bool
    target_modules: list[str] | str | None
    target_parameters: list[str] | None
    exclude_modules: list[str] | str | None
    layers_to_transform: list[Count] | Count | None
    layers_pattern: list[str] | str | None
    modules_to_save: list[str] | None
    bias: str
    fan_in_fan_out: bool | None
    coefficients: Literal["diagonal", "core", "band", "sparse"]
    bandwidth: Count
    scaling: Literal["absolute", "relative", "normalized", ""]
    leading: int | Finite | str | None
    budget: Finite | None
    rank_pattern: dict[str, Positive]
    basis: str
    basis_seed: Count
    tolerance: Finite
    init_weights: bool
    base_hashes: dict[str, str] | None
    ranks: dict[str, Rank] | None
    probes: dict[str, list[Finite]] | None
    scales: dict[str, list[Finite]] | None
    entries: dict[str, str] | None


def same_weights(ours: Mapping[str, str], theirs: Mapping[str, str]) -> dict[str, str]:
    """Our name → their name of the same weight, where the two sides name it differently.

    The hash of a weight identifies it whatever it is called, as by another release of transformers. Weights that one
    side has twice have no certain partner and are left out.

    Args:
        ours: name → hash.
        theirs: name → hash.
    """
    here, there = Counter(ours.values()), Counter(theirs.values())
    partners = {value: name for name, value in theirs.items() if there[value] == 1 and name not in ours}
    return {
        name: partners[value]
        for name, value in ours.items()
        if name not in theirs and here[value] == 1 and value in partners
    }


def renamed_record(record: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The fields of `RECORD` with other names of matrices: `names` are those of the record → the new ones."""
    return {
        field: None if values is None else {names.get(name, name): value for name, value in values.items()}
        for field, values in record.items()
    }


def check_record(record: Mapping[str, Any], *, scaling: str, coefficients: str) -> None:
    """Check the fields of `RECORD`: all None, or one value for each matrix in all that these settings need.

    Raises:
        InputError: one is absent, superfluous, damaged, or of other matrices.
    """
    needed = ["base_hashes", "ranks", "probes"]
    needed += ["scales"] * (scaling != "absolute") + ["entries"] * (coefficients == "sparse")
    if all(field is None for field in record.values()):
        return
    if not _is_complete(record, needed, scaling):
        raise InputError(
            f"base_hashes, ranks and probes do not hold a hash, a k of 1 or more and {PROBES} numbers for each matrix, "
            f"or scales and entries do not hold what scaling={scaling!r} and coefficients={coefficients!r} need; "
            "restore adapter_config.json, or pass none of them"
        )
    for name, text in (record["entries"] or {}).items():
        unpack_positions(text, record["ranks"][name])


def _is_complete(record: Mapping[str, Any], needed: list[str], scaling: str) -> bool:
    if any((record[field] is not None) != (field in needed) for field in RECORD):
        return False
    if not all(isinstance(record[field], dict) and record[field].keys() == record["ranks"].keys() for field in needed):
        return False
    ranks = record["ranks"]
    valid: dict[str, Callable[[str, Any], bool]] = {
        "base_hashes": lambda name, value: isinstance(value, str),
        "ranks": lambda name, value: isinstance(value, int) and value >= 1,
        "probes": lambda name, value: _is_numbers(value, PROBES),
        "scales": lambda name, value: _is_numbers(value, ranks[name] if scaling == "relative" else 1),
        "entries": lambda name, value: isinstance(value, str),
    }
    return all(valid[field](name, value) for field in needed for name, value in record[field].items())


def _is_numbers(value: Any, count: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == count
        and all(isinstance(number, float | int) and math.isfinite(number) for number in value)
    )
