"""`SpectralConfig`, the settings of a spectral adapter that users give and adapter_config.json holds.

`MatrixRecord` is what an adapter records of each matrix, so that it means the same wherever it is opened.
"""

import copy
import math
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from annotated_types import Ge, Le
from peft.config import PeftConfig
from peft.utils.peft_types import PeftType
from typing_extensions import TypedDict

from spectralbasis.basis import SpectralBasis
from spectralbasis.checkpoints.weight_files import inside
from spectralbasis.errors import InputError
from spectralbasis.files import atomic_path
from spectralbasis.kinds import COEFFICIENTS, DEFAULT_COEFFICIENTS, KINDS, KindName
from spectralbasis.linalg import Leading, parse_leading
from spectralbasis.peft_import import METHOD
from spectralbasis.printable import warn
from spectralbasis.records import Count, Finite, Positive, checked, read_json
from spectralbasis.triplets import DEFAULT_TOLERANCE, check_tolerance
from spectralbasis.tuner.factors import BASES, DEFAULT_SCALING, PROBES, SCALINGS
from spectralbasis.tuner.forms import FORMS, Parametrisation, parametrisation, unpack_positions

BIASES = ("none", "all", "spectral_only")
BASIS_FILE = "basis.safetensors"
"""The basis file that lies beside an adapter that was trained on one."""
MOST_DIRECTIONS = 1 << 16
"""Of one matrix at most: several times the smaller side of the largest there are."""
Rank = Annotated[int, Ge(1), Le(MOST_DIRECTIONS)]
"""The k of one matrix."""
IMPORT_NOTE = """
## Loading this adapter

PEFT learns the method "SPECTRAL" from the package `spectralbasis`: import it first.

```python
import spectralbasis
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, adapter_folder)
```
"""


class MatrixRecord(NamedTuple):
    """What an adapter records of one matrix.

    Attributes:
        base_hash: of the weight that the adapter was made on.
        k: number of directions.
        probes: numbers that depend on the directions, see `Factors.probe`.
        scales: the σ of a scaling other than "absolute", k of them or one.
        entries: of sparse coefficients, which entries are trained, see `pack_positions`.
        values: of a rotation, the singular values of the directions.
    """

    base_hash: str
    k: int
    probes: list[float]
    scales: list[float] | None = None
    entries: str | None = None
    values: list[float] | None = None


RECORD = ("base_hashes", "ranks", "probes", "scales", "entries", "singular_values")
"""The fields of `SpectralConfig` that hold those of `MatrixRecord`, in this order, by matrix name."""


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
    coefficients: KindName
    bandwidth: Count
    block_size: Positive
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
    singular_values: dict[str, list[Finite]] | None


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


@dataclass
class SpectralConfig(PeftConfig):
    """Configuration of the PEFT method "SPECTRAL": `ΔW = U_k C V_kᵀ`, of which only C is trained.

    `import spectralbasis` before `PeftModel.from_pretrained` opens an adapter, or PEFT does not know the method. An
    adapter leaves the config that it is made with as it is: the model holds a complete one, in `model.peft_config`.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from spectralbasis import SpectralConfig
        >>> base = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
        >>> model = get_peft_model(base, SpectralConfig(target_modules=["0"], coefficients="core", leading=3))
        >>> model.base_model.allocation().trained
        9

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
        coefficients: "band" (the entries of a core near its diagonal), "diagonal" (k numbers a matrix), "core" (k×k),
            "sparse" (those entries of all cores that `calibrate` picks), "block" (square blocks on the diagonal of a
            core) or "rotation" (`C = (Σ + diag c) R − Σ`: the singular values, and a rotation within each block).
        bandwidth: of a band, the largest |i − j| of a trained entry.
        block_size: of "block" and "rotation", the size of a block; the last one is smaller where k is no multiple.
        scaling: in which unit the trained numbers c count. "absolute": `C = c`; "relative" to the singular values:
            `C_ij = c_ij √(σ_i σ_j)` with `σ_i = |u_iᵀ W v_i|`; "normalized" by the fan-in: `C = c / √f`, where f
            trained numbers meet in one left direction, so that numbers of one size change what a layer puts out in each
            direction by as much, whatever the mode and k. The angles of a rotation are radians, and if "normalized"
            such a share of one that they change C by as much as c does; see `forms.Rotation`. Empty takes "normalized",
            or "absolute" for an adapter that was stored before there were units.
        leading: k as a number, a fraction of min(m, n), "mp" or "gd"; None, without a budget, is all of them up to
            1,024, or 64 of a core and of sparse entries. Where min(m, n) is smaller than a number, k is that, with a
            warning.
        budget: instead of `leading`, the fraction of the model's parameters to train; it chooses one k for all. Beside
            `leading` for sparse coefficients: how many entries `calibrate` picks among the k×k of every matrix.
        rank_pattern: end of a module name, as a regular expression → k; wins over `leading` and `budget`.
        basis: "pretrained" (leading singular vectors of each weight), "minor" (the trailing ones), "random"
            (Haar-distributed) or the path of a basis file, which is saved with the adapter.
        basis_seed: of the "random" basis.
        tolerance: largest sine between computed and true singular subspaces.
        init_weights: False starts from random coefficients instead of zero, which is for tests.
        base_hashes: matrix name → hash of the weight that the adapter was made on. The record of an adapter is this and
            the five fields below. A model sets it; a config that is built with it, as one read from an adapter folder
            is, fits that base alone.
        ranks: matrix name → k.
        probes: matrix name → numbers that depend on the directions, see `Factors.probe`.
        scales: matrix name → the σ of a scaling other than "absolute", k of them or one.
        entries: matrix name → which entries are trained, see `pack_positions`; set by `calibrate`.
        singular_values: matrix name → Σ of a rotation, k of them.

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
    coefficients: str = DEFAULT_COEFFICIENTS
    bandwidth: int = 1
    block_size: int = 8
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
    singular_values: dict[str, list[float]] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(METHOD)
        self.basis = str(self.basis)
        if self.bound and self.ranks:
            self.rank_pattern = {}  # which the ranks were made of
        self.renamed: dict[str, str] = {}  # matrix name as an adapter's file has it → as a model calls it
        self.scaling = self.scaling or ("absolute" if self.bound else DEFAULT_SCALING)
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)
        self._check_choices()
        self._check_size()
        self._check_layers()
        self._check_record()

    @property
    def bound(self) -> bool:
        """Whether there is a record, so that the config fits one base alone."""
        return self.base_hashes is not None

    @property
    def size(self) -> int:
        """The value of the option that the kind of coefficients has; 1 where it has none."""
        option = KINDS[self.coefficients].option
        return getattr(self, option) if option else 1

    @property
    def record(self) -> dict[str, MatrixRecord]:
        """Matrix name → what is recorded of it; empty where there is no record."""
        return {name: self.matrix(name) for name in self.ranks or {}}

    def matrix(self, name: str) -> MatrixRecord:
        """What is recorded of a matrix."""
        fields: list[Any] = [None if (values := getattr(self, field)) is None else values[name] for field in RECORD]
        return MatrixRecord(*fields)

    def with_record(self, record: Mapping[str, MatrixRecord], **changes: Any) -> "SpectralConfig":
        """A copy with another record, and with other values of the attributes in `changes`."""
        fields = {
            field: {name: one[i] for name, one in record.items() if one[i] is not None} or None
            for i, field in enumerate(RECORD)
        }
        return self.changed(**fields, **changes)

    def changed(self, **changes: Any) -> "SpectralConfig":
        """A copy with other values of some attributes, which are taken as they are."""
        made = copy.copy(self)
        for name, value in changes.items():
            setattr(made, name, value)
        return made

    def parametrisation(self, matrix: MatrixRecord) -> Parametrisation:
        """What makes C of a matrix from its stored numbers."""
        return parametrisation(
            self.coefficients,
            matrix.k,
            size=self.size,
            positions=unpack_positions(matrix.entries, matrix.k) if matrix.entries else None,
            scales=matrix.scales,
            values=matrix.values,
        )

    def stored_shape(self, matrix: MatrixRecord) -> tuple[int, ...]:
        """Shape of the numbers that an adapter stores for a matrix, without making anything of that size."""
        if self.coefficients in FORMS:
            return FORMS[self.coefficients].shape(matrix.k)
        if matrix.entries:
            return (len(matrix.entries.split()),)
        return (KINDS[self.coefficients].numbers(matrix.k, self.size),)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> "SpectralConfig":
        """Read the configuration of an adapter, whose basis file lies in the adapter's folder.

        Only the last part of a path in the configuration counts: what somebody wrote into an adapter chooses no other
        file of this machine. To use one elsewhere, set `basis` on the result and give that as `config`.

        Raises:
            InputError: the basis file is a link out of the folder, or an adapter from a hub needs one.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        folder = Path(pretrained_model_name_or_path) / (subfolder or "")
        if config.basis not in BASES:
            name = Path(config.basis).name
            if not folder.is_dir():
                raise InputError(
                    f"the adapter {folder} needs the basis file {name}; download the adapter's folder, "
                    "put the file there and load the adapter from that folder"
                )
            config.basis = str(inside(folder, name))
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
        folder, saved = Path(save_directory), self
        if self.basis not in BASES:
            try:
                place_basis(Path(self.basis), folder)
            except InputError as error:  # what was trained must not be lost for it
                warn(f"{error}; the adapter in {folder} needs it: put the file there as {BASIS_FILE}", stacklevel=2)
            saved = self.changed(basis=BASIS_FILE)
        super(SpectralConfig, saved).save_pretrained(save_directory, **kwargs)
        card = folder / "README.md"
        text = card.read_text(encoding="utf-8") if card.is_file() else IMPORT_NOTE
        if IMPORT_NOTE.strip() not in text:
            card.write_text(text.rstrip("\n") + "\n" + IMPORT_NOTE, encoding="utf-8")

    def _check_choices(self) -> None:
        for name, choices in (("coefficients", COEFFICIENTS), ("scaling", SCALINGS), ("bias", BIASES)):
            value = getattr(self, name)
            if value not in choices:
                raise InputError(f"{name}={value!r} is unknown; choose from {', '.join(map(repr, choices))}")
        if self.basis == "random" and KINDS[self.coefficients].singular:
            raise InputError(
                f"coefficients={self.coefficients!r} turn singular vectors, which basis='random' has none of; pass "
                "basis='pretrained' or 'minor', or coefficients='block'"
            )

    def _check_size(self) -> None:
        if self.leading is not None and self.budget is not None and self.coefficients != "sparse":
            raise InputError(f"leading={self.leading!r} and budget={self.budget!r} both set k; pass one of them")
        if self.leading is not None:
            self.leading = parse_leading(self.leading)
        if self.budget is not None and not (isinstance(self.budget, int | float) and 0 < self.budget <= 1):
            raise InputError(f"budget must be above 0 and at most 1, got {self.budget!r}; pass a number such as 0.002")
        if not isinstance(self.bandwidth, int) or self.bandwidth < 0:
            raise InputError(f"bandwidth must be a whole number of at least 0, got {self.bandwidth!r}")
        if not isinstance(self.block_size, int) or self.block_size < 1:
            raise InputError(f"block_size must be a whole number of at least 1, got {self.block_size!r}")
        for pattern, k in self.rank_pattern.items():
            if not isinstance(k, int) or k < 1:
                raise InputError(f"rank_pattern {pattern!r} must be a whole number of at least 1, got {k!r}")
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

    def _check_record(self) -> None:
        """Raise InputError unless there is no record, or one that is whole: what these settings need, by matrix."""
        record = {field: getattr(self, field) for field in RECORD}
        given = {field: values for field, values in record.items() if values is not None}
        if not given:
            return
        needed = {"base_hashes", "ranks", "probes"}
        needed |= {"scales"} if self.scaling != "absolute" else set()
        needed |= {"entries"} if self.coefficients == "sparse" else set()
        needed |= {"singular_values"} if KINDS[self.coefficients].singular else set()
        names = given["ranks"].keys() if isinstance(self.ranks, dict) else set()
        if (
            given.keys() != needed
            or not all(isinstance(values, dict) and values.keys() == names for values in given.values())
            or not all(self._is_whole(self.matrix(name)) for name in names)
        ):
            raise InputError(
                f"base_hashes, ranks and probes do not hold a hash, a k of 1 or more and {PROBES} numbers for each "
                f"matrix, or scales, entries and singular_values do not hold what scaling={self.scaling!r} and "
                f"coefficients={self.coefficients!r} need; restore adapter_config.json, or pass none of them"
            )
        for name, text in (self.entries or {}).items():
            unpack_positions(text, given["ranks"][name])

    def _is_whole(self, matrix: MatrixRecord) -> bool:
        return (
            isinstance(matrix.base_hash, str)
            and isinstance(matrix.k, int)
            and matrix.k >= 1
            and _is_numbers(matrix.probes, PROBES)
            and (matrix.scales is None or _is_numbers(matrix.scales, matrix.k if self.scaling == "relative" else 1))
            and (matrix.entries is None or isinstance(matrix.entries, str))
            and (matrix.values is None or _is_numbers(matrix.values, matrix.k))
        )


def _is_numbers(value: Any, count: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == count
        and all(isinstance(number, float | int) and math.isfinite(number) for number in value)
    )


def read_config(folder: Path) -> SpectralConfig:
    """The config of the adapter in a folder.

    Raises:
        InputError: adapter_config.json is missing or damaged.
    """
    try:
        return SpectralConfig.from_pretrained(str(folder))
    except InputError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{folder}: adapter_config.json cannot be used ({error}); restore it") from error


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
