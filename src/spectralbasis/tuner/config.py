"""What a spectral adapter is asked to be, and what the model that it was made on resolved that to.

Making PEFT know the method "SPECTRAL"; done when this package and PEFT are imported, see `peft_import`.

`peft.PeftModel.from_pretrained` can only open a spectral adapter after `import spectralbasis`.

The model card that PEFT writes into an adapter folder.

What a config records of each adapted matrix, so that its adapter means the same wherever it is opened.
"""

import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le
from peft.config import PeftConfig
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType
from typing_extensions import TypedDict

from spectralbasis.basis import SpectralBasis
from spectralbasis.checkpoints.weight_files import inside
from spectralbasis.errors import InputError
from spectralbasis.files import atomic_path
from spectralbasis.linalg import Leading, parse_leading
from spectralbasis.printable import warn
from spectralbasis.records import Count, Finite, Positive, checked, read_json
from spectralbasis.triplets import DEFAULT_TOLERANCE, check_tolerance
from spectralbasis.tuner.factors import BASES, PROBES
from spectralbasis.tuner.parametrisation import (
    COEFFICIENTS,
    DEFAULT_SCALING,
    FORMS,
    SCALINGS,
    Parametrisation,
    numbers,
    parametrisation,
    unpack_positions,
)

METHOD = "SPECTRAL"


def register(config_class: type, model_class: type) -> None:
    """Enter the method into PEFT's registry; a second call changes nothing.

    Args:
        config_class: the `PeftConfig` of the method.
        model_class: its `BaseTuner`, whose `prefix` starts the names of all trained parameters.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    add_peft_type(METHOD)
    if METHOD in PEFT_TYPE_TO_CONFIG_MAPPING:
        return
    register_peft_method(name=METHOD.lower(), config_cls=config_class, model_cls=model_class, is_mixed_compatible=False)


def add_peft_type(name: str) -> None:
    """Add a member to the enum `peft.PeftType`.

    `register_peft_method` refuses names outside the enum, and PEFT calls `.value` on what it finds, so that a plain
    string as key would not do. An enum has no public way to grow; these are the attributes that its constructor sets.
    """
    if name in PeftType.__members__:
        return
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member


IMPORT_NOTE = """
## Loading this adapter

PEFT learns the method "SPECTRAL" from the package `spectralbasis`: import it first.

```python
import spectralbasis
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, adapter_folder)
```
"""


def note_import(card: Path) -> None:
    """Add to an existing model card, once, that the package must be imported before the adapter is loaded."""
    if not card.is_file():
        return
    text = card.read_text(encoding="utf-8")
    if IMPORT_NOTE.strip() not in text:
        card.write_text(text.rstrip("\n") + "\n" + IMPORT_NOTE, encoding="utf-8")


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


BIASES = ("none", "all", "spectral_only")
BASIS_FILE = "basis.safetensors"
"""The basis file that lies beside an adapter that was trained on one."""


@dataclass
class SpectralConfig(PeftConfig):
    """Configuration of the PEFT method "SPECTRAL": `ΔW = U_k C V_kᵀ`, of which only C is trained.

    `import spectralbasis` before `PeftModel.from_pretrained` opens an adapter, or PEFT does not know the method.

    Attributes:
        target_modules: ends of module names, or one regular expression, or "all-linear"; None takes what PEFT's LoRA
            takes for this architecture, and all linear layers where that is unknown. Experts that transformers 5 keeps
            as stacked parameters are reached by the names of their linear layers in transformers 4, as `gate_proj`.
        target_parameters: ends of names of parameters that are no layer's weight, as `experts.down_proj`, a stack of
            one matrix for each expert; without `target_modules`, they are all that is adapted. A fused one, as
            `gate_up_proj`, is several matrices for each expert.
        exclude_modules: ends of module names, or one regular expression, to leave out.
        layers_to_transform: numbers of the layers to adapt; None is all of them.
        layers_pattern: name of the list of layers, where it is not the first component before a number.
        modules_to_save: modules that are trained in full and saved with the adapter, such as a new head.
        bias: which biases of the base are trained: "none", "all" or "spectral_only" (those of adapted layers).
        fan_in_fan_out: None lets each layer say whether it stores its weight as (in, out), as Conv1D does; a value
            that contradicts the layer is overruled with a warning.
        coefficients: "diagonal" (k numbers a matrix), "core" (k×k), "band" (the entries of a core near its diagonal) or
            "sparse" (those entries of all cores that `calibrate` picks).
        bandwidth: of a band, the largest |i − j| of a trained entry.
        scaling: in which unit the trained numbers c count. "absolute": `C = c`; "relative" to the singular values:
            `C_ij = c_ij √(σ_i σ_j)` with `σ_i = |u_iᵀ W v_i|`; "normalized" by the fan-in: `C = c / √f`, where f
            trained numbers meet in one left direction, so that numbers of one size change what a layer puts out in each
            direction by as much, whatever the mode and k. Empty takes "normalized", or "absolute" for an adapter that
            was stored before there were units.
        leading: k as a number, a fraction of min(m, n), "mp" or "gd"; None, without a budget, is 64 at most. Where
            min(m, n) is smaller than a number, k is that, with a warning.
        budget: instead of `leading`, the fraction of the model's parameters to train; it chooses one k for all. Beside
            `leading` for sparse coefficients: how many entries `calibrate` picks among the k×k of every matrix.
        rank_pattern: end of a module name, as a regular expression → k; wins over `leading` and `budget`.
        basis: "pretrained" (leading singular vectors of each weight), "minor" (the trailing ones), "random"
            (Haar-distributed) or the path of a basis file, which is saved with the adapter.
        basis_seed: of the "random" basis.
        tolerance: largest sine between computed and true singular subspaces.
        init_weights: False starts from random coefficients instead of zero, which is for tests.
        base_hashes: matrix name → hash of the weight the adapter was made on. Set by the model. A config that is
            built with hashes, as one read from an adapter folder is, only fits that base.
        ranks: matrix name → k as resolved. Set by the model; given at construction, it wins over the other settings.
        probes: matrix name → numbers that depend on the directions, see `Factors.probe`. Set by the model.
        scales: matrix name → the σ of a scaling other than "absolute", k of them or one. Set by the model.
        entries: matrix name → which entries are trained, see `pack_positions`. Set by `calibrate`.

    Raises:
        InputError: a value is none of those above, or both `leading` and `budget` are given.
    """

    target_modules: list[str] | set[str] | str | None = None
    target_parameters: list[str] | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"
    fan_in_fan_out: bool | None = None
    coefficients: str = "diagonal"
    bandwidth: int = 1
    scaling: str = ""
    leading: Leading | None = None
    budget: float | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    basis: str = "pretrained"
    basis_seed: int = 0
    tolerance: float = DEFAULT_TOLERANCE
    init_weights: bool = True
    base_hashes: dict[str, str] | None = None
    ranks: dict[str, int] | None = None
    probes: dict[str, list[float]] | None = None
    scales: dict[str, list[float]] | None = None
    entries: dict[str, str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(METHOD)
        self.basis = str(self.basis)
        self.bound = self.base_hashes is not None
        if self.bound and self.ranks:
            self.rank_pattern = {}  # which the ranks were made of
        # `target_parameters` as a model set them for what target_modules reach there, and as they were given.
        self.reached: tuple[list[str], list[str] | None] | None = None
        self.renamed: dict[str, str] = {}  # matrix name as it was recorded → as a model calls it
        self.scaling = self.scaling or ("absolute" if self.bound else DEFAULT_SCALING)
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)
        self._check_choices()
        self._check_size()
        self._check_layers()
        record = {name: getattr(self, name) for name in RECORD}
        check_record(record, scaling=self.scaling, coefficients=self.coefficients)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> "SpectralConfig":
        """Read the configuration of an adapter, whose basis file lies in the adapter's folder.

        Of a path that the configuration gives, its last part counts: what somebody wrote into an adapter chooses no
        other file of this machine. To use one elsewhere, set `basis` on the result and give that as `config`.

        Raises:
            InputError: the basis file is a link out of the folder, or an adapter from a hub needs one.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        config.basis = _find_basis(config.basis, Path(pretrained_model_name_or_path) / (subfolder or ""))
        return config

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """The content of adapter_config.json, checked.

        Raises:
            InputError: it is damaged, or a field is of another type or out of its range.
        """
        content = read_json(Path(path_json_file))
        checked(content, AdapterRecord, path_json_file)
        content.pop("runtime_config", None)
        return content

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json with the basis file beside it, and say in a model card what to import."""
        given = self.basis
        if given not in BASES:
            self.basis = self._keep_basis(Path(save_directory))
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.basis = given
        note_import(Path(save_directory) / "README.md")

    def _keep_basis(self, folder: Path) -> str:
        """Put the basis file into an adapter's folder; returns its name there."""
        try:
            return place_basis(Path(self.basis), folder)
        except InputError as error:  # what was trained must not be lost for it
            warn(f"{error}; the adapter in {folder} needs it: put the file there as {BASIS_FILE}", stacklevel=3)
            return BASIS_FILE

    def parametrisation(self, name: str) -> Parametrisation:
        """What makes C of a matrix from its stored numbers, once a model, or a file, has set the record of it."""
        k = (self.ranks or {})[name]
        return parametrisation(
            self.coefficients,
            k,
            bandwidth=self.bandwidth,
            positions=unpack_positions(self.entries[name], k) if self.entries else None,
            scales=self.scales[name] if self.scales else None,
        )

    def stored_shape(self, name: str) -> tuple[int, ...]:
        """Shape of the numbers that an adapter stores for a matrix, without making anything of that size."""
        k = (self.ranks or {})[name]
        if self.coefficients in FORMS:
            return FORMS[self.coefficients].shape(k)
        return (len(self.entries[name].split()) if self.entries else numbers(self.coefficients, k, self.bandwidth),)

    def _check_choices(self) -> None:
        for name, choices in (("coefficients", COEFFICIENTS), ("scaling", SCALINGS), ("bias", BIASES)):
            value = getattr(self, name)
            if value not in choices:
                raise InputError(f"{name}={value!r} is unknown; choose from {', '.join(map(repr, choices))}")

    def _check_size(self) -> None:
        if self.leading is not None and self.budget is not None and self.coefficients != "sparse":
            raise InputError(f"leading={self.leading!r} and budget={self.budget!r} both choose k; pass one of them")
        if self.leading is not None:
            self.leading = parse_leading(self.leading)
        if self.budget is not None and not (isinstance(self.budget, int | float) and 0 < self.budget <= 1):
            raise InputError(f"budget={self.budget!r} is no fraction of the parameters; pass a number such as 0.002")
        if not isinstance(self.bandwidth, int) or self.bandwidth < 0:
            raise InputError(f"bandwidth={self.bandwidth!r} is no distance from the diagonal; pass a whole number >= 0")
        for pattern, k in self.rank_pattern.items():
            if not isinstance(k, int) or k < 1:
                raise InputError(f"rank_pattern {pattern!r}: k={k!r} is no number of directions; pass a whole number")
        check_tolerance(self.tolerance)

    def _check_layers(self) -> None:
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise InputError(
                    f"{name} cannot be used with target_modules={self.target_modules!r}, a single pattern; "
                    "pass target_modules as a list of names"
                )
        if self.layers_pattern and self.layers_to_transform is None:
            raise InputError(f"layers_pattern={self.layers_pattern!r} needs layers_to_transform, such as [0, 1]")


def place_basis(file: Path, folder: Path) -> str:
    """Put a basis file into an adapter's folder as `BASIS_FILE`, by a second name of the file where that is possible.

    Returns:
        `BASIS_FILE`.

    Raises:
        InputError: it is no basis file, or cannot be written.
    """
    SpectralBasis.load(file)
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / BASIS_FILE
    if place.exists() and place.samefile(file):
        return BASIS_FILE
    try:
        os.link(file.resolve(), place)
    except OSError:  # another file is there, or the disk is another, or knows no second names
        with atomic_path(place) as temporary:
            shutil.copyfile(file, temporary)
    return BASIS_FILE


def _find_basis(basis: str, folder: Path) -> str:
    if basis in BASES:
        return basis
    if not folder.is_dir():
        raise InputError(
            f"the adapter {folder} needs the basis file {Path(basis).name}; download the adapter's folder, "
            "put the file there and load the adapter from that folder"
        )
    return str(inside(folder, Path(basis).name))
