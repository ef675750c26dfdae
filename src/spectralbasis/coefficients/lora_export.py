"""A spectral adapter as a LoRA adapter that PEFT opens without this package."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from re import escape
from typing import Any, NamedTuple, cast

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from spectralbasis.checkpoints.adapter import AdapterCheckpoint, adapted_name
from spectralbasis.checkpoints.opening import Source
from spectralbasis.checkpoints.roles import is_embedding_table
from spectralbasis.coefficients.adapters import COEFFICIENTS, named_base, open_spectral_adapter, other_tensors
from spectralbasis.errors import InputError
from spectralbasis.folders import atomic_folder, check_output
from spectralbasis.tuner.reading import SpectralEdit

_LORA_BIASES = {"spectral_only": "lora_only"}
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

{matrices} matrices of rank at most {rank}; relative error of the update: {error:.2g}.
"""


@dataclass(frozen=True)
class LoraExport:
    """What was written.

    Attributes:
        output: the LoRA adapter's folder.
        ranks: module → rank.
        errors: module → `‖ΔW − B A‖ / ‖ΔW‖` in the Frobenius norm, 0 where nothing was cut off.
        error: the same over all matrices at once.
        parameters: how many numbers the factors hold.
    """

    output: Path
    ranks: dict[str, int]
    errors: dict[str, float]
    error: float
    parameters: int

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON can hold it."""
        return asdict(self) | {"output": str(self.output)}


class _Factors(NamedTuple):
    """One module's `ΔW = B A`, with the squared norms of what was cut off and of the whole."""

    A: Tensor
    B: Tensor
    lost: float
    whole: float


class _Layer(NamedTuple):
    """A module as an adapter names it, its factors, and what its weight is in the base."""

    module: str
    factors: _Factors
    shape: tuple[int, ...]
    transposed: bool
    embedding: bool

    def tensors(self) -> dict[str, Tensor]:
        """The factors as PEFT names and shapes them."""
        A, B, kernel = self.factors.A, self.factors.B, self.shape[2:]
        if self.embedding:
            named = {"lora_embedding_A": B.T, "lora_embedding_B": A.T}
        elif kernel:
            ones = [1] * len(kernel)
            named = {"lora_A.weight": A.unflatten(1, self.shape[1:]), "lora_B.weight": B.reshape(*B.shape, *ones)}
        else:
            named = {"lora_A.weight": A, "lora_B.weight": B}
        return {f"{self.module}.{name}": tensor.contiguous() for name, tensor in named.items()}


def export_lora(
    adapter: str | Path,
    output: str | Path,
    *,
    base: Source | None = None,
    rank: int | None = None,
    overwrite: bool = False,
) -> LoraExport:
    """Write a spectral adapter as a LoRA adapter: `A = Vᵀ`, `B = U C`, scaling 1, heads and biases as they are.

    No ΔW is formed or decomposed. Without `rank` the update is the same; each matrix has its own k as rank. With it,
    matrices of larger k get their best approximation of that rank, from a decomposition of the k×k coefficients.
    An embedding table is known by its name where the base is a file and not a module. PEFT's LoRA leaves out the
    dilation and the padding mode of a convolution: one that has them keeps its update in `export_merged` alone.

    Args:
        adapter: folder of a spectral adapter.
        output: a new folder.
        base: the model that it was trained on; None opens the one that the adapter names.
        rank: largest rank, 1 or more.
        overwrite: replace an adapter that is in `output`.

    Raises:
        InputError: the adapter or the base cannot be read, or the output is in use.
        BaseMismatchError: the base is not the one that the adapter was trained on.
    """
    if rank is not None and rank < 1:
        raise InputError(f"rank={rank} is no rank; pass a whole number of 1 or more, or leave it out to lose nothing")
    check_output(Path(output), overwrite=overwrite, written_file="adapter_config.json")
    opened = open_spectral_adapter(adapter, base)
    layers = list(_layers(opened, rank))
    config = _config(opened, layers, named_base(opened, base))
    written = _described(Path(output), layers)
    with atomic_folder(Path(output)) as folder:
        tensors = {name: tensor for one in layers for name, tensor in one.tensors().items()}
        tensors |= other_tensors(opened.adapter.tensors)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(folder)
        card = _CARD.format(matrices=len(layers), rank=max(written.ranks.values()), error=written.error)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return written


def _layers(opened: AdapterCheckpoint, rank: int | None) -> Iterator[_Layer]:
    for tensor, edit in cast(Mapping[str, SpectralEdit], opened.edits).items():
        weight = opened.base.read(tensor)
        U, C, V = edit.factors(weight)
        yield _Layer(
            module=edit.coefficients.partition(COEFFICIENTS)[0],
            factors=_cut(U.float(), C.float(), V.float(), rank),
            shape=tuple(weight.shape),
            transposed=edit.transposed(weight),
            embedding=is_embedding_table(opened.base, tensor),
        )


def _cut(U: Tensor, C: Tensor, V: Tensor, rank: int | None) -> _Factors:
    """`U C Vᵀ` as a product of two factors of rank at most `rank`; U and V have orthonormal columns."""
    whole = float(C.double().square().sum())
    if rank is None or rank >= len(C):
        return _Factors(V.T, U @ C, 0.0, whole)
    P, S, Qh = torch.linalg.svd(C.double())
    B = U @ (P[:, :rank] * S[:rank]).float()
    return _Factors(Qh[:rank].float() @ V.T, B, float(S[rank:].square().sum()), whole)


def _config(opened: AdapterCheckpoint, layers: list[_Layer], base: str | None) -> LoraConfig:
    """The config with which PEFT puts these factors where they belong, at scaling 1."""
    given: Mapping[str, Any] = opened.adapter.config
    ranks = _ranks(layers)
    common = Counter(ranks.values()).most_common(1)[0][0]
    # PEFT takes keys as regular expressions for the end of a name; with "^" they stand for one module alone.
    pattern = {f"^{escape(module)}": k for module, k in ranks.items() if k != common}
    bias = str(given.get("bias") or "none")
    return LoraConfig(
        task_type=given.get("task_type"),
        auto_mapping=given.get("auto_mapping"),
        base_model_name_or_path=base,
        revision=given.get("revision"),
        inference_mode=True,
        target_modules=sorted(ranks),
        r=common,
        lora_alpha=common,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        fan_in_fan_out=any(one.transposed for one in layers),
        bias=_LORA_BIASES.get(bias, bias),
        modules_to_save=given.get("modules_to_save"),
    )


def _ranks(layers: list[_Layer]) -> dict[str, int]:
    return {adapted_name(one.module): len(one.factors.A) for one in layers}


def _described(output: Path, layers: list[_Layer]) -> LoraExport:
    factors = {adapted_name(one.module): one.factors for one in layers}
    return LoraExport(
        output=output,
        ranks=_ranks(layers),
        errors={module: _relative(one.lost, one.whole) for module, one in factors.items()},
        error=_relative(sum(one.lost for one in factors.values()), sum(one.whole for one in factors.values())),
        parameters=sum(one.A.numel() + one.B.numel() for one in factors.values()),
    )


def _relative(lost: float, whole: float) -> float:
    return math.sqrt(lost / whole) if whole else 0.0
