"""Export a spectral adapter as a LoRA adapter that PEFT, vLLM and llama.cpp open without this package.

Each program scales `B A` by another rule: PEFT by alpha over rank of the module (`alpha_pattern`, `rank_pattern`), vLLM
by `lora_alpha / r` of the config, llama.cpp by `lora_alpha` over the rank of the tensor. If every tensor has the rank
of the config and alpha equals it, each scale is 1. So matrices of smaller k are filled up with zeros.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import pad

from spectralbasis.checkpoints.adapters import (
    PEFT_PREFIX,
    AdapterCheckpoint,
    adapted_name,
    is_output_head,
    ties_head,
)
from spectralbasis.checkpoints.matrices import is_embedding_table
from spectralbasis.checkpoints.names import conversions_of, modules_of
from spectralbasis.checkpoints.opening import Source
from spectralbasis.coefficients.spectral_adapters import open_spectral_adapter
from spectralbasis.errors import InputError
from spectralbasis.files import atomic_folder, check_output
from spectralbasis.locations import installed_folder
from spectralbasis.printable import in_markdown
from spectralbasis.tuner.layer import Layers
from spectralbasis.tuner.reading import SpectralEdit

_LORA_BIASES = {"spectral_only": "lora_only"}
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM takes as its largest rank, from the smallest that people use."""
_CARD = """\
---
library_name: peft
---
# LoRA adapter

Made from the coefficients of a spectral adapter by spectralbasis, which is not needed to load it:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/to/this/folder")
```

{matrices} matrices of rank {rank}; relative error of the update: {error:.2g}. Matrices of a smaller rank are filled up
with zeros, so that every tensor has the rank of the config and alpha is equal to it: the scale is 1 by the rule of each
consumer.

{notes}
"""


@dataclass(frozen=True)
class LoraExport:
    """What was written.

    Attributes:
        output: the LoRA adapter's folder.
        ranks: module → rank of its update.
        rank: of every factor as it is written: the largest of these.
        errors: module → `‖ΔW − B A‖ / ‖ΔW‖` in the Frobenius norm, 0 where nothing was cut off.
        error: the same over all matrices at once.
        parameters: how many numbers the factors hold, with the zeros that fill them up to one rank.
        notes: sentences on which programs open the result, and on what was left out.
    """

    output: Path
    ranks: dict[str, int]
    rank: int
    errors: dict[str, float]
    error: float
    parameters: int
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON can hold it."""
        return asdict(self) | {"output": str(self.output)}


class _Module(NamedTuple):
    """A layer to export: its name for PEFT in the installed release, its weight's name in the base, and its update."""

    name: str
    tensor: str
    edit: SpectralEdit
    embedding: bool


class _Export(NamedTuple):
    """What is to be written, all of it resolved before a factor is computed.

    Attributes:
        modules: the layers.
        whole: name for PEFT → name in the adapter's file of what is stored whole: heads, biases, tables.
        base: how the config names the base.
    """

    modules: list[_Module]
    whole: dict[str, str]
    base: str | None


class _Layer(NamedTuple):
    """One module's `ΔW = B A`, with the squared norms of what was cut off and of the whole."""

    module: _Module
    A: Tensor
    B: Tensor
    lost: float
    whole: float
    shape: tuple[int, ...]
    transposed: bool

    @property
    def rank(self) -> int:
        """Of the update."""
        return len(self.A)

    def tensors(self, rank: int) -> dict[str, Tensor]:
        """The factors as PEFT names and shapes them, filled up to a rank."""
        return factor_tensors(self.module.name, self.A, self.B, self.shape, rank, embedding=self.module.embedding)


def factor_tensors(
    module: str, A: Tensor, B: Tensor, shape: tuple[int, ...], rank: int, *, embedding: bool
) -> dict[str, Tensor]:
    """The factors of `ΔW = B A` as PEFT names and shapes them, filled up with zeros to a rank.

    Args:
        module: as PEFT names it.
        A: (r, in), r ≤ rank.
        B: (out, r).
        shape: of the weight as it is stored.
        rank: see above.
        embedding: whether rows of the weight are looked up.
    """
    missing, kernel = rank - len(A), shape[2:]
    A, B = pad(A, (0, 0, 0, missing)), pad(B, (0, missing))
    if embedding:
        named = {"lora_embedding_A": B.T, "lora_embedding_B": A.T}
    elif kernel:
        ones = [1] * len(kernel)
        named = {"lora_A.weight": A.unflatten(1, shape[1:]), "lora_B.weight": B.reshape(*B.shape, *ones)}
    else:
        named = {"lora_A.weight": A, "lora_B.weight": B}
    return {f"{PEFT_PREFIX}{module}.{name}": tensor.contiguous() for name, tensor in named.items()}


def export_lora(
    adapter: str | Path,
    output: str | Path,
    *,
    base: Source | None = None,
    rank: int | None = None,
    partial: bool = False,
    overwrite: bool = False,
) -> LoraExport:
    """Write a spectral adapter as a LoRA adapter: `A = Vᵀ`, `B = U C`, scaling 1, heads and biases as they are.

    No ΔW is formed or decomposed. Without `rank` the update is the same. With it, matrices of larger k get their best
    approximation of that rank, from a decomposition of the k×k coefficients. All factors are filled up with zeros to
    the largest rank, so that PEFT, vLLM and llama.cpp give the same update; where a few matrices have a much larger k
    than the others, that makes a large file, and `rank` a small one. What the adapter stores of its base is left out
    where the base has the same. An embedding table is known by its name where the base is a file and not a module.
    PEFT's LoRA leaves out the dilation and the padding mode of a convolution: one that has them keeps its update in
    `export_merged` alone.

    Examples:
        >>> import copy, tempfile
        >>> from pathlib import Path
        >>> import peft, torch
        >>> import spectralbasis as sb
        >>> folder, base = Path(tempfile.mkdtemp()), torch.nn.Sequential(torch.nn.Linear(8, 6))
        >>> config = sb.SpectralConfig(target_modules=["0"], leading=3, init_weights=False)
        >>> peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(folder / "task")
        >>> sb.export_lora(folder / "task", folder / "lora", base=base).rank
        3

    Args:
        adapter: folder of a spectral adapter.
        output: a new folder.
        base: the model that it was trained on; None opens the one that the adapter names.
        rank: largest rank, 1 or more.
        partial: leave out what the adapter adapts and the base lacks, instead of refusing the adapter.
        overwrite: replace an adapter that is in `output`.

    Raises:
        InputError: the adapter or the base cannot be read, or the output is in use.
        BaseMismatchError: the base is not the one that the adapter was trained on.
    """
    if rank is not None and rank < 1:
        raise InputError(f"rank must be at least 1, got {rank}; leave it out to keep the whole update")
    check_output(Path(output), overwrite=overwrite)
    opened = open_spectral_adapter(adapter, base, partial=partial)
    export = _resolve(opened, base)
    layers = [_factored(one, opened.start.read(one.tensor), rank) for one in export.modules]
    whole = {name: opened.adapter.tensors.read(stored) for name, stored in export.whole.items()}
    config = _config(opened.adapter.config, layers, export.base)
    written = _described(Path(output), layers, _notes(opened, layers, whole, config))
    with atomic_folder(Path(output)) as folder:
        tensors = {name: tensor for one in layers for name, tensor in one.tensors(written.rank).items()}
        save_file(tensors | whole, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(folder)
        notes = "\n".join(f"- {in_markdown(note)}" for note in written.notes)
        card = _CARD.format(matrices=len(layers), rank=written.rank, error=written.error, notes=notes)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return written


def _resolve(opened: AdapterCheckpoint, base: Source | None) -> _Export:
    """Which modules and tensors the LoRA adapter has, under the names of the installed release."""
    names = _ModuleNames(opened)
    parameters = tuple(f".{name}" for name in opened.adapter.config.get("target_parameters") or ())
    modules = []
    for tensor, edit in opened.updates.items():
        name = names.of(edit.module) if isinstance(edit, SpectralEdit) else ""
        found = names.class_of(name)
        if (
            not isinstance(edit, SpectralEdit)
            or f".{edit.module}.weight".endswith(parameters)
            or (found is not None and not issubclass(found, Layers))
        ):
            raise InputError(
                f"{tensor} of the base is adapted as a parameter that belongs to no layer, as in experts and routers, "
                "but LoRA has factors for layers only; write the whole model instead: spectralbasis export ADAPTER "
                "--to merged"
            )
        table = is_embedding_table(opened.start, tensor) and not is_output_head(tensor)
        modules.append(_Module(name, tensor, edit, table))
    of_base, whole = set(opened.base.names()), {}
    for name, stored in opened.start.stored.items():
        place = opened.start.aliases.get(name, name)
        # PEFT saves beside an update the table that it is of, which the base has as well.
        is_table = name not in opened.retrained and place in of_base
        if not (is_table and _equal(opened.adapter.tensors.read(stored), opened.base.read(place))):
            whole[names.of_tensor(stored)] = stored
    if base is None or isinstance(base, str | Path):
        return _Export(modules, whole, str(installed_folder(opened.base.source) or opened.base.source))
    named = opened.adapter.config.get("base_model_name_or_path")
    return _Export(modules, whole, named if isinstance(named, str) else None)


def _factored(module: _Module, weight: Tensor, rank: int | None) -> _Layer:
    """`U C Vᵀ` as a product of two factors of rank at most `rank`; U and V have orthonormal columns."""
    found = module.edit.factors(weight)
    U, C, V = found.U.float(), found.C.float(), found.V.float()
    whole, shape = float(C.double().square().sum()), tuple(weight.shape)
    if rank is None or rank >= len(C):
        return _Layer(module, V.T, U @ C, 0.0, whole, shape, found.transposed)
    P, S, Qh = torch.linalg.svd(C.double())
    A, B = Qh[:rank].float() @ V.T, U @ (P[:, :rank] * S[:rank]).float()
    return _Layer(module, A, B, float(S[rank:].square().sum()), whole, shape, found.transposed)


class _ModuleNames:
    """The names that the installed release of transformers gives to the modules of an adapter.

    PEFT passes over modules that it does not find. An adapter that was made under another release has other names, so
    its LoRA adapter would be loaded in part. Where transformers puts several of its matrices into one parameter, the
    names stay as they are, since PEFT converts these adapters itself.
    """

    def __init__(self, opened: AdapterCheckpoint) -> None:
        config = opened.base.config
        given = [edit.module for edit in opened.updates.values() if isinstance(edit, SpectralEdit)]
        self._modules = modules_of(config)
        self._table = conversions_of(config) if self._modules else None
        if self._table is not None and any(self._table.parameter(f"{module}.weight") is None for module in given):
            self._table, self._modules = None, {}

    def of(self, module: str) -> str:
        """The name of a module, its own where nothing else is known."""
        if self._table is None or self.class_of(module) is not None:
            return module
        renamed = (self._table.parameter(f"{module}.weight") or "").removesuffix(".weight")
        return renamed if renamed and self.class_of(renamed) is not None else module

    def of_tensor(self, name: str) -> str:
        """The name of a tensor that the adapter stores whole."""
        module, _, leaf = adapted_name(name).rpartition(".")
        return f"{PEFT_PREFIX}{self.of(module)}.{leaf}" if module else name

    def class_of(self, module: str) -> type[nn.Module] | None:
        """The class of a module, whatever the adapter's model or the base puts before its name."""
        found = (of for name, of in self._modules.items() if f".{name}".endswith(f".{module}"))
        longer = (of for name, of in self._modules.items() if f".{module}".endswith(f".{name}") and "." in name)
        return next(found, None) or next(longer, None)


def _config(given: Mapping[str, Any], layers: list[_Layer], base: str | None) -> LoraConfig:
    """The config with which PEFT puts these factors where they belong, at scaling 1."""
    rank = max(one.rank for one in layers)
    bias = str(given.get("bias") or "none")
    return LoraConfig(
        task_type=given.get("task_type"),
        auto_mapping=given.get("auto_mapping"),
        base_model_name_or_path=base,
        revision=given.get("revision"),
        inference_mode=True,
        target_modules=sorted(one.module.name for one in layers),
        r=rank,
        lora_alpha=rank,
        fan_in_fan_out=any(one.transposed for one in layers),
        bias=_LORA_BIASES.get(bias, bias),
        modules_to_save=given.get("modules_to_save"),
    )


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers, whatever their dtypes."""
    dtype = torch.promote_types(one.dtype, other.dtype)
    return torch.equal(one.to(dtype), other.to(dtype))


def _notes(
    opened: AdapterCheckpoint, layers: Sequence[_Layer], others: Mapping[str, Tensor], config: LoraConfig
) -> list[str]:
    """Which programs open the result, as their loaders are written."""
    tables = [name for name in others if name.endswith(".base_layer.weight")]
    whole = [adapted_name(name) for name in others if name not in tables]
    convolutions = [one.module.name for one in layers if one.shape[2:]]
    notes = ["PEFT opens it."]
    if whole or convolutions or config.modules_to_save:
        held = whole or convolutions or list(config.modules_to_save or ())
        what = "tensors that are not factors" if whole else "convolutions" if convolutions else "modules_to_save"
        notes.append(
            f"vLLM and llama.cpp do not open it, because it has {what} ({_listed(held)}); export a merged model for "
            "them."
        )
    else:
        rank = config.r
        limit = f"with --max-lora-rank {rank} or more" if rank <= VLLM_RANKS[-1] else "not: its largest rank is 512"
        notes.append(f"vLLM opens it {limit}, where it supports these modules in the architecture.")
        notes.append("convert_lora_to_gguf.py of llama.cpp converts it, where it knows the architecture.")
    heads = [one.module.name for one in layers if is_output_head(one.module.name)]
    if heads and opened.base.config and ties_head(opened.base.config):
        notes.append(f"llama.cpp does not convert the update of {heads[0]}, which is tied to a table.")
    if tables:
        rows = max(len(others[name]) for name in tables)
        notes.append(f"It was trained on a vocabulary of {rows}: call base.resize_token_embeddings({rows}) first.")
    if opened.missing:
        notes.append(f"Left out, since the base lacks them: {', '.join(opened.missing)}.")
    return notes


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _described(output: Path, layers: list[_Layer], notes: list[str]) -> LoraExport:
    rank = max(one.rank for one in layers)
    return LoraExport(
        output=output,
        ranks={one.module.name: one.rank for one in layers},
        rank=rank,
        errors={one.module.name: _relative(one.lost, one.whole) for one in layers},
        error=_relative(sum(one.lost for one in layers), sum(one.whole for one in layers)),
        parameters=sum(rank * (one.A.shape[1] + len(one.B)) for one in layers),
        notes=notes,
    )


def _relative(lost: float, whole: float) -> float:
    return math.sqrt(lost / whole) if whole else 0.0
