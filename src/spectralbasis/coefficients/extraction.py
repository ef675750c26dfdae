"""Extract an adapter from a finetuned checkpoint: a LoRA, or a spectral adapter, of the difference to its base."""

import heapq
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import regex
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from spectralbasis.checkpoints.adapters import PEFT_PREFIX
from spectralbasis.checkpoints.opening import Source, installed_folder
from spectralbasis.coefficients.decomposing import (
    UpdateFacts,
    UpdateSettings,
    UpdateStore,
    UpdateTask,
)
from spectralbasis.coefficients.lora_export import VLLM_RANKS, factor_tensors
from spectralbasis.coefficients.output_check import OutputChange, check_outputs, read_texts
from spectralbasis.coefficients.update_layout import Layer, Layout, lay_out
from spectralbasis.comparison.distributing import check_device, outcomes
from spectralbasis.errors import InputError
from spectralbasis.files import atomic_folder, check_output, check_output_file
from spectralbasis.printable import in_markdown, track
from spectralbasis.sizes import parse_size
from spectralbasis.tuner.config import IMPORT_NOTE, MatrixRecord, SpectralConfig
from spectralbasis.tuner.layer import COEFFICIENTS_OF
from spectralbasis.tuner.targets import unique_names

DEFAULT_RANK = 16
TOLERANCE = 5e-5
"""Largest share of the best energy that an extraction may miss."""
REPORT = "extraction.json"
"""What `extract` found, beside the adapter."""
EXACT = 1e-10
"""Share of an update's energy that is nothing but the rounding of float32 factors."""
_CARD = """\
---
library_name: peft
---
# Adapter of a finetuned checkpoint

The difference between {tuned} and its base {base}, extracted by spectralbasis: {what}.

It holds {energy:.6f} of the energy (the squared Frobenius norm) of the update of {matrices} matrices; the best
possible of these ranks holds at most {best:.6f}. extraction.json has the figures of each matrix.

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/to/this/folder")
```

{notes}
"""


@dataclass(frozen=True)
class ExtractedMatrix:
    """What an adapter holds of the update of one matrix.

    Attributes:
        shape: (out, in).
        rank: of the factors, or k of a spectral adapter.
        update_norm: `‖ΔW‖_F`.
        energy: share of `‖ΔW‖_F²` that the adapter holds.
        best_energy: the largest share that any matrix of this rank can hold (Eckart–Young), from above.
        error_bound: largest share of the best possible energy that the certified triplets may miss.
        relative_error: `‖ΔW − adapter‖_F / ‖ΔW‖_F`.
        solver: what found the triplets.
        intruders: directions that were left out; None where nobody asked.
        intruders_left: intruders that the matrix has after that; None where nobody asked.
        removed_energy: share of `‖ΔW‖_F²` that was left out with them.
    """

    shape: tuple[int, int]
    rank: int
    update_norm: float
    energy: float
    best_energy: float
    error_bound: float
    relative_error: float
    solver: str
    intruders: int | None
    intruders_left: int | None
    removed_energy: float


@dataclass(frozen=True)
class Extraction:
    """What was written.

    Attributes:
        output: the adapter's folder.
        base: as it was named.
        tuned: as it was named.
        to: "lora" or "spectral".
        rank: largest rank of the adapter.
        matrices: module → what the adapter holds of its update.
        energy: share of the energy of all updates that the adapter holds.
        best_energy: the largest share that these ranks can hold, from above.
        error_bound: largest share of the best possible energy that may be missed.
        relative_error: of all updates at once.
        removed_energy: share of the energy of all updates that was left out as intruders.
        exact: whether base and adapter are the finetuned model but for rounding: nothing is left out, and nothing is
            cut off.
        parameters: how many numbers the adapter holds, those that are saved whole included.
        whole: modules that are saved whole.
        biases: how many biases are saved.
        left_out: name → why the adapter lacks it, though it changed or may have.
        notes: sentences that a person should read.
        check: change of the model's outputs on the file that was given, or None.
        seconds: wall-clock time.
    """

    output: Path
    base: str
    tuned: str
    to: str
    rank: int
    matrices: dict[str, ExtractedMatrix]
    energy: float
    best_energy: float
    error_bound: float
    relative_error: float
    removed_energy: float
    exact: bool
    parameters: int
    whole: list[str]
    biases: int
    left_out: dict[str, str]
    notes: list[str]
    check: OutputChange | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON can hold it."""
        return asdict(self) | {"output": str(self.output)}


def extract(
    base: Source,
    tuned: Source,
    output: str | Path,
    *,
    to: str = "lora",
    rank: int | None = None,
    energy: float | None = None,
    total_rank: int | None = None,
    drop_intruders: bool = False,
    vllm: bool = False,
    check: str | Path | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    partial: bool = False,
    tolerance: float = TOLERANCE,
    device: str = "cpu",
    workers: int = 1,
    ray: str | None = None,
    memory_budget: str | int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = False,
) -> Extraction:
    """Write an adapter that turns a base model into a checkpoint that was finetuned from it.

    Each changed weight of a layer gets the best factors of its rank (a LoRA), or its projection on the base's leading
    directions (a spectral adapter). Biases, norms and task heads that changed are saved whole. One pair of matrices is
    in memory at a time. The folder takes its place when all of it is written; until then, what was decomposed lies in
    a file `OUTPUT.unfinished`.

    Args:
        base: the pretrained checkpoint: a path, a hub id, a state dict, a module.
        tuned: the checkpoint that was finetuned from it; a PEFT adapter folder is read over `base`.
        output: a new folder.
        to: "lora" for PEFT, vLLM and llama.cpp, or "spectral" for coefficients on the base's directions.
        rank: directions of each matrix, all of a matrix that has fewer; None is 16, or what `energy` or `total_rank`
            come to.
        energy: instead of `rank`, the share of `‖ΔW‖_F²` that each matrix reaches with the smallest rank that can.
        total_rank: instead of `rank`, the sum of all ranks, which the matrices share so that the adapter holds the
            most energy. The ranks become `rank_pattern` and `alpha_pattern`.
        drop_intruders: leave out what the update does in the directions of intruders (Shuttleworth et al., 2410.21228;
            see `decomposing.intruder_directions`).
        vllm: round the rank up to one that vLLM takes, and give every factor this rank.
        check: a file of CSV or JSON lines with a column `text`; both models are run on it, and their outputs compared.
        include: glob patterns of names to extract; empty extracts everything.
        exclude: glob patterns of names to leave out.
        partial: read an adapter also where the base lacks some of what it adapts.
        tolerance: largest share of the best possible energy that may be missed.
        device: where matrices are decomposed, such as "cpu" or "cuda".
        workers: processes that decompose matrices at the same time.
        ray: address of a Ray cluster in their place, "auto" or "local".
        memory_budget: bytes, or text such as "8GB", that each process may work in.
        resume: use what an earlier run into `output` decomposed of the same weights with the same settings.
        overwrite: replace an adapter that is in `output`.
        progress: draw a progress bar on stderr.

    Returns:
        What was written; the same is in `extraction.json` of the folder.

    Raises:
        InputError: a checkpoint cannot be read, nothing changed, an argument is out of its range, or the output is in
            use.

    Examples:
        >>> import tempfile
        >>> import torch
        >>> import spectralbasis as sb
        >>> generator = torch.Generator().manual_seed(0)
        >>> W0 = torch.randn(24, 16, generator=generator)
        >>> update = torch.randn(24, 2, generator=generator) @ torch.randn(2, 16, generator=generator)
        >>> base, tuned = {"layer.0.dense.weight": W0}, {"layer.0.dense.weight": W0 + 0.1 * update}
        >>> found = sb.extract(base, tuned, tempfile.mkdtemp(), rank=2)
        >>> found.rank, round(found.energy, 6), found.exact
        (2, 1.0, True)
    """
    started = time.monotonic()
    output = Path(output)
    settings, ranks = _settings(to, rank, energy, total_rank, drop_intruders, vllm, tolerance, device)
    budget = None if memory_budget is None else parse_size(memory_budget)
    if ray is None:
        check_device(device)
    check_output(output, overwrite=overwrite)
    texts = None if check is None else read_texts(check)
    unfinished = output.with_name(f"{output.name}.unfinished")
    check_output_file(unfinished)
    layout = lay_out(base, tuned, include, exclude, partial=partial)
    known = {name: str(value) for name, value in vars(settings).items()} | {"rank": str(ranks)}
    with UpdateStore(unfinished, known, resume=resume) as store:
        run = _Run(layout, settings, ranks, store, workers, ray, budget, progress)
        facts = run.decompose(total_rank)
        adapter = _Adapter(layout, settings, facts, vllm=vllm)
        found = adapter.describe(output, _named(base, layout))
        with atomic_folder(output) as folder:
            tensors = adapter.tensors(store.tensors)
            found = replace(found, parameters=sum(tensor.numel() for tensor in tensors.values()))
            save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
            del tensors
            adapter.config(_named(base, layout)).save_pretrained(str(folder))
            (folder / "README.md").write_text(_card(found), encoding="utf-8")
            if texts is not None:
                found = replace(found, check=check_outputs(base, tuned, folder, texts, layout.architecture))
            found = replace(found, seconds=round(time.monotonic() - started, 3))
            text = json.dumps(found.to_dict(), indent=2, allow_nan=False)
            (folder / REPORT).write_text(text + "\n", encoding="utf-8")
    with suppress(OSError):
        unfinished.unlink(missing_ok=True)
    return found


def _settings(
    to: str,
    rank: int | None,
    energy: float | None,
    total_rank: int | None,
    drop_intruders: bool,
    vllm: bool,
    tolerance: float,
    device: str,
) -> tuple[UpdateSettings, int]:
    """The settings, and the rank that every matrix starts with; raises InputError where they contradict each other."""
    if to not in ("lora", "spectral"):
        raise InputError(f"to={to!r} is unknown; pass 'lora' or 'spectral' (--to lora, --to spectral)")
    given = {"rank": rank, "energy": energy, "total_rank": total_rank}
    chosen = [name for name, value in given.items() if value is not None]
    if len(chosen) > 1:
        said = " and ".join(f"{name}={given[name]}" for name in chosen)
        raise InputError(f"{said} were given, and one of rank, energy and total_rank sets the ranks; pass one of them")
    if not chosen:
        rank = given["rank"] = DEFAULT_RANK
    if energy is not None and not 0 < energy <= 1:
        raise InputError(f"energy must be a share above 0 and at most 1, got {energy}; pass a number such as 0.9")
    for name in ("rank", "total_rank"):
        value = given[name]
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise InputError(f"{name} must be a whole number of at least 1, got {value!r}")
    if to == "spectral" and (energy is not None or total_rank is not None or vllm):
        raise InputError(
            "a spectral adapter has the base's directions, which hold a share of the update that no rank can choose: "
            "pass rank (--rank) alone, or extract a LoRA (--to lora)"
        )
    if not 0 < tolerance < 1:
        raise InputError(
            f"tolerance must be a share above 0 and below 1, got {tolerance!r}; pass such as {TOLERANCE:g}"
        )
    if vllm and rank is not None:
        rank = vllm_rank(rank)
    return UpdateSettings(to, energy, drop_intruders, tolerance, device=device), rank or DEFAULT_RANK


def vllm_rank(rank: int) -> int:
    """The smallest rank of at least this that vLLM takes.

    Raises:
        InputError: it is above all of them.

    Examples:
        >>> vllm_rank(20), vllm_rank(64)
        (32, 64)
    """
    found = next((one for one in VLLM_RANKS if one >= rank), None)
    if found is None:
        raise InputError(
            f"rank {rank} is above the largest that vLLM takes, {VLLM_RANKS[-1]}; pass a smaller rank, or leave out "
            "vllm (--vllm)"
        )
    return found


def _named(base: Source, layout: Layout) -> str | None:
    """How the adapter's config names the base; None where it has no name."""
    if not isinstance(base, str | Path):
        return None
    return str(installed_folder(layout.base.source) or layout.base.source)


@dataclass
class _Run:
    """The decompositions of one extraction; only this process writes the store."""

    layout: Layout
    settings: UpdateSettings
    rank: int
    store: UpdateStore
    workers: int
    ray: str | None
    budget: int | None
    progress: bool

    def decompose(self, total_rank: int | None) -> dict[str, UpdateFacts]:
        """Module → facts of the update that the store holds, in the order of the layers.

        Raises:
            InputError: no layer changed, and nothing else did.
        """
        layers = self.layout.layers
        ranks = {module: min(self.rank, *layer.before.shape) for module, layer in layers.items()}
        changed = self._round(layers, ranks)
        facts = {module: self.store.facts(module) for module in layers if module in changed}
        if total_rank is not None and facts:
            facts = self._shared_out(facts, total_rank)
        if not facts and not self.layout.whole and not self.layout.biases:
            raise InputError(self._nothing())
        return facts

    def _round(self, layers: Mapping[str, Layer], ranks: Mapping[str, int]) -> set[str]:
        """Decompose layers to these ranks; the modules of those that the store holds afterwards."""
        known = self.store.known()
        names = unique_names(list(self.layout.layers))
        tasks = [
            UpdateTask(
                layer.before,
                {self.layout.tuned.source: layer.after},
                self.settings,
                ranks[module],
                module,
                names[module],
                self.layout.base.source,
                known[module][0] if module in known and self._suffices(known[module][1], ranks[module]) else "",
                self.budget,
            )
            for module, layer in layers.items()
        ]
        if not tasks:
            return set()
        done = set()
        with outcomes(
            tasks, workers=self.workers, ray=self.ray, budget=self.budget, device=self.settings.device
        ) as running:
            for task, update in track(running, "extracting", total=len(tasks), enabled=self.progress):
                if update.skipped:
                    if not update.unchanged:
                        self.layout.left_out[task.module] = update.skipped
                    continue
                if update.facts is not None:
                    self.store.put(task.module, update)
                done.add(task.module)
        return done

    def _suffices(self, facts: UpdateFacts, rank: int) -> bool:
        return self.settings.energy is not None or facts["rank"] >= rank

    def _shared_out(self, facts: Mapping[str, UpdateFacts], total_rank: int) -> dict[str, UpdateFacts]:
        """Ranks under one total: the largest squared singular values of all updates; more are found where all count."""
        layers = self.layout.layers
        while True:
            values = {module: self.store.tensors(module)["S"].square() for module in facts}
            ranks = share_out(values, total_rank)
            short = {module: min(layers[module].before.shape) for module in facts}
            more = {
                m: min(2 * len(values[m]), short[m]) for m, rank in ranks.items() if rank == len(values[m]) < short[m]
            }
            if not more:
                break
            self._round({module: layers[module] for module in more}, more)
        found = {}
        for module, rank in ranks.items():
            if rank:
                held = float(values[module][:rank].sum())
                found[module] = UpdateFacts(**{**self.store.facts(module), "rank": rank, "held": held, "best": held})
            else:
                self.layout.left_out[module] = "none of the total rank went to it: its values are the smallest of all"
        return found

    def _nothing(self) -> str:
        base, tuned, left_out = self.layout.base.source, self.layout.tuned.source, self.layout.left_out
        if not left_out:
            return f"{base} and {tuned} hold the same weights: there is no update to extract"
        name = next(iter(left_out))
        return (
            f"nothing that finetuning changed can be put into an adapter ({len(left_out)} names); {name}: "
            f"{left_out[name]}"
        )


def share_out(values: Mapping[str, Tensor], total: int) -> dict[str, int]:
    """Ranks whose sum is at most `total`, and whose leading values have the largest sum; sums of leading values are
    concave, so taking the largest values of all is the best there is.

    Args:
        values: name → squared singular values, descending.
        total: sum of the ranks.

    Examples:
        >>> import torch
        >>> share_out({"a": torch.tensor([9.0, 1.0]), "b": torch.tensor([4.0, 2.0])}, 3)
        {'a': 1, 'b': 2}
    """
    ranks = dict.fromkeys(values, 0)
    every = ((float(value), name) for name, squares in values.items() for value in squares)
    for _, name in heapq.nlargest(total, every):
        ranks[name] += 1
    return ranks


@dataclass(frozen=True)
class _Adapter:
    """The files of an adapter, from a layout and the facts of its updates."""

    layout: Layout
    settings: UpdateSettings
    facts: Mapping[str, UpdateFacts]
    vllm: bool

    @property
    def ranks(self) -> dict[str, int]:
        """Module → rank as it is written."""
        ranks = {module: facts["rank"] for module, facts in self.facts.items()}
        if not self.vllm or not ranks:
            return ranks
        return dict.fromkeys(ranks, vllm_rank(max(ranks.values())))

    def tensors(self, stored: Callable[[str], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """All tensors under PEFT's names."""
        tensors: dict[str, Tensor] = {}
        ranks = self.ranks
        for module, facts in self.facts.items():
            found, layer = stored(module), self.layout.layers[module]
            if self.settings.to == "spectral":
                tensors[f"{PEFT_PREFIX}{module}{COEFFICIENTS_OF}.weight"] = found["C"]
                continue
            k = facts["rank"]
            roots = found["S"][:k].sqrt().float()  # both factors of one size, as training keeps them
            A, B = roots[:, None] * found["Vh"][:k], found["U"][:, :k] * roots
            named = factor_tensors(module, A, B, layer.shape, ranks[module], embedding=layer.embedding)
            tensors |= named
        for name, tensor in self.layout.biases.items():
            module, _, leaf = name.rpartition(".")
            inner = f"{module}.base_layer.{leaf}" if module in self.facts else name
            tensors[f"{PEFT_PREFIX}{inner}"] = self.layout.tuned.read(tensor).contiguous().clone()
        for name, tensor in self.layout.whole.items():
            tensors[f"{PEFT_PREFIX}{name}"] = self.layout.tuned.read(tensor).contiguous().clone()
        return tensors

    def config(self, base: str | None) -> LoraConfig | SpectralConfig:
        """The config that puts these tensors where they belong."""
        layout, ranks = self.layout, self.ranks
        targets = list(self.facts)
        common: dict[str, Any] = {
            "task_type": layout.task_type,
            "base_model_name_or_path": base,
            "inference_mode": True,
            "target_modules": sorted(targets),
            "exclude_modules": [name for name in layout.exclude_modules if _ends(name, targets)] or None,
            "bias": "all" if layout.biases else "none",
            "modules_to_save": layout.modules_to_save or None,
            "fan_in_fan_out": any(layout.layers[module].after.cut.transposed for module in targets),
        }
        if self.settings.to == "spectral":
            names = unique_names(list(layout.layers))
            record = {
                names[module]: MatrixRecord(facts["base_hash"], facts["rank"], facts["probes"])
                for module, facts in self.facts.items()
            }
            blank = SpectralConfig(
                **common, coefficients="core", scaling="absolute", leading=max(ranks.values(), default=1)
            )
            return blank.with_record(record)
        rank = max(ranks.values(), default=1)
        others = {regex.escape(m): ranks[m] for m in sorted(ranks, key=len, reverse=True) if ranks[m] != rank}
        pattern = {key.replace("\\_", "_"): value for key, value in others.items()}
        return LoraConfig(**common, r=rank, lora_alpha=rank, rank_pattern=pattern, alpha_pattern=dict(pattern))

    def describe(self, output: Path, base: str | None) -> Extraction:
        """The report."""
        layout = self.layout
        matrices = {module: self._matrix(module, facts) for module, facts in self.facts.items()}
        total, held, removed = (
            sum(facts[key] for facts in self.facts.values()) for key in ("total", "held", "removed")
        )
        best = sum(facts["best"] / (1 - facts["error_bound"]) for facts in self.facts.values())
        found = sum(facts["best"] for facts in self.facts.values())
        # What is cut off is less than rounding only if it is so for each matrix.
        exact = not layout.left_out and all(one.relative_error**2 <= EXACT for one in matrices.values())
        return Extraction(
            output=output,
            base=layout.base.source,
            tuned=layout.tuned.source,
            to=self.settings.to,
            rank=max(self.ranks.values(), default=0),
            matrices=matrices,
            energy=held / total if total else 1.0,
            best_energy=min(best / total, 1.0) if total else 1.0,
            error_bound=1 - found / best if best else 0.0,
            relative_error=max(1 - held / total, 0.0) ** 0.5 if total else 0.0,
            removed_energy=removed / total if total else 0.0,
            exact=exact,
            parameters=0,
            whole=list(layout.modules_to_save),
            biases=len(layout.biases),
            left_out=dict(layout.left_out),
            notes=[*layout.notes, *self._notes(exact)],
            check=None,
            seconds=0.0,
        )

    def _matrix(self, module: str, facts: UpdateFacts) -> ExtractedMatrix:
        total, asked = facts["total"], facts["intruders"] >= 0
        energy = min(facts["held"] / total, 1.0)
        return ExtractedMatrix(
            shape=self.layout.layers[module].before.shape,
            rank=facts["rank"],
            update_norm=total**0.5,
            energy=energy,
            best_energy=min(facts["best"] / (1 - facts["error_bound"]) / total, 1.0),
            error_bound=facts["error_bound"],
            relative_error=max(1 - energy, 0.0) ** 0.5,
            solver=facts["solver"],
            intruders=facts["intruders"] if asked else None,
            intruders_left=facts["intruders_left"] if asked else None,
            removed_energy=facts["removed"] / total,
        )

    def _notes(self, exact: bool) -> list[str]:
        layout, notes = self.layout, []
        if layout.left_out:
            name, reason = next(iter(layout.left_out.items()))
            more = f", and {len(layout.left_out) - 1} more" if len(layout.left_out) > 1 else ""
            notes.append(f"The adapter is not the whole of the finetuning. It lacks {name}{more}: {reason}.")
        if layout.modules_to_save or layout.biases:
            kept = [*layout.modules_to_save, *layout.biases]
            notes.append(
                f"vLLM and llama.cpp do not open it, because it has {len(kept)} modules or biases that are saved whole "
                f"({', '.join(kept[:3])}{' and more' if len(kept) > 3 else ''})."
            )
        elif self.settings.to == "lora" and self.ranks:
            rank = max(self.ranks.values())
            limit = next((one for one in VLLM_RANKS if one >= rank), None)
            notes.append(
                f"vLLM opens it with --max-lora-rank {limit}, where it supports these modules in the architecture."
                if limit
                else f"vLLM does not open it: its largest rank is {VLLM_RANKS[-1]}."
            )
        if layout.biases:
            notes.append("The biases take the place of the base's, also while the adapter is disabled.")
        heads = [module for module in layout.modules_to_save if "classifier" in module or "score" in module]
        if heads and layout.architecture:
            labels = [
                layout.tuned.shape(tensor)[0]
                for name, tensor in layout.whole.items()
                if name.endswith(".weight") and any(name.startswith(f"{head}.") for head in heads)
            ]
            notes.append(
                f"Load the base as {layout.architecture} with num_labels={min(labels)}; PEFT then fills in the head."
            )
        return notes


def _ends(name: str, targets: Iterable[str]) -> bool:
    return any(name.endswith(f".{target}") for target in targets)


def _card(found: Extraction) -> str:
    what = f"a LoRA of rank {found.rank}" if found.to == "lora" else f"coefficients on {found.rank} directions"
    notes = "\n".join(f"- {in_markdown(note)}" for note in found.notes)
    card = _CARD.format(
        tuned=in_markdown(found.tuned),
        base=in_markdown(found.base),
        what=what,
        energy=found.energy,
        best=found.best_energy,
        matrices=len(found.matrices),
        notes=notes,
    )
    return card + IMPORT_NOTE if found.to == "spectral" else card
