"""Turned bits, cut and empty files: told, harmless, or, in the numbers of files that are not ours, beyond telling."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from benchmarks.faults.bench import Bench
from benchmarks.faults.case import Case, Outcome, Trial
from benchmarks.faults.commands import Ended, run

GROUP = "damaged"
Action = Callable[[Path], Ended]


@dataclass(frozen=True)
class Subject:
    """A file, and what reads it.

    Attributes:
        file: relative to the room.
        make: writes it into the room, beside what else is needed.
        read: the command that reads it.
        value: what the command found, to be the same where it did not notice.
    """

    file: str
    make: Callable[[Bench, Path], None]
    read: Callable[[Bench, Path], Ended]
    value: Callable[[Bench, Path], object]


def turned(subject: Subject) -> Callable[[Bench, int], Iterator[Trial]]:
    """Turn one bit of the file at a random place, half of them in its first 2 kB, and read it."""

    def damages(content: bytes, wanted: int) -> Iterator[bytes]:
        places = np.random.default_rng(0)
        for number in range(wanted):
            damaged = bytearray(content)
            end = min(len(content), 2048) if number % 2 else len(content)
            damaged[places.integers(end)] ^= 1 << int(places.integers(8))
            yield bytes(damaged)

    return _read_damaged(subject, damages)


def cut(subject: Subject) -> Callable[[Bench, int], Iterator[Trial]]:
    """Cut the file at random places, and empty it."""

    def damages(content: bytes, wanted: int) -> Iterator[bytes]:
        ends = np.random.default_rng(0)
        yield b""
        yield from (content[: ends.integers(1, len(content))] for _ in range(wanted - 1))

    return _read_damaged(subject, damages)


def _read_damaged(
    subject: Subject, damages: Callable[[bytes, int], Iterator[bytes]]
) -> Callable[[Bench, int], Iterator[Trial]]:
    def trials(bench: Bench, wanted: int) -> Iterator[Trial]:
        with bench.room() as room:
            subject.make(bench, room / "whole")
            content = (room / "whole" / subject.file).read_bytes()
            shutil.copytree(room / "whole", room / "read")
            whole = subject.read(bench, room / "read")
            if whole.code:
                raise RuntimeError(f"{subject.file} could not be read undamaged: {whole.stderr}")
            expected = subject.value(bench, room / "read")
            for damaged in damages(content, wanted):
                shutil.rmtree(room / "read")
                shutil.copytree(room / "whole", room / "read")
                (room / "read" / subject.file).write_bytes(damaged)
                ended = subject.read(bench, room / "read")
                yield Trial(ended, _outcome(ended, lambda: subject.value(bench, room / "read") == expected))

    return trials


def _outcome(ended: Ended, same: Callable[[], bool]) -> Outcome:
    if ended.code:
        return "refused"
    return "as undisturbed" if same() else "other values"


def _pair(bench: Bench, room: Path) -> None:
    room.mkdir()
    for file in bench.pair:
        shutil.copy(file, room)


def _compare(base: str = "base.safetensors", *options: str) -> Callable[[Bench, Path], Ended]:
    def read(bench: Bench, room: Path) -> Ended:
        return bench.compare(room / "out", *options, pair=(room / base, room / "tuned.safetensors"))

    return read


def _table(bench: Bench, room: Path) -> object:
    return bench.is_compared(room / "out")


def _shards(bench: Bench, room: Path) -> None:
    _pair(bench, room)
    state = load_file(room / "base.safetensors")
    (room / "model").mkdir()
    names = sorted(state)
    parts = {"a.safetensors": names[:3], "b.safetensors": names[3:]}
    for file, held in parts.items():
        save_file({name: state[name] for name in held}, room / "model" / file)
    index = {"metadata": {}, "weight_map": {name: file for file, held in parts.items() for name in held}}
    (room / "model" / "model.safetensors.index.json").write_text(json.dumps(index))


def _torch_file(bench: Bench, room: Path) -> None:
    _pair(bench, room)
    torch.save(load_file(room / "base.safetensors"), room / "base.bin")


def _basis(bench: Bench, room: Path) -> None:
    _pair(bench, room)
    run(["basis", room / "base.safetensors", "-o", room / "basis.safetensors", "--leading", "4"])


def _tuned_on_basis(bench: Bench, room: Path) -> None:
    room.mkdir()
    run(["basis", bench.model, "-o", room / "basis.safetensors", "--leading", "4"])


def _tune_on_basis(bench: Bench, room: Path) -> Ended:
    return bench.tune(room / "out", "--basis", room / "basis.safetensors")


def _numbers(bench: Bench, room: Path) -> object:
    return (room / "out" / "adapter_model.safetensors").read_bytes()


def _compared(bench: Bench, room: Path) -> None:
    _pair(bench, room)
    _compare()(bench, room)


def _report(bench: Bench, room: Path) -> Ended:
    return run(["report", room / "out"])


def _page(bench: Bench, room: Path) -> object:
    return (room / "out" / "index.html").read_bytes()


def _adapter(bench: Bench, room: Path) -> None:
    room.mkdir()
    shutil.copytree(bench.tuned, room / "adapter")


def _evaluate(bench: Bench, room: Path) -> Ended:
    command = ["evaluate", bench.model, room / "adapter", "--task", "digits"]
    return run(command, environment={"SPECTRALBASIS_CACHE": str(bench.folder / "tuned" / "cache")})


def _nothing(bench: Bench, room: Path) -> object:
    return None


def _export(bench: Bench, room: Path) -> Ended:
    command = ["export", room / "adapter", "--to", "merged", "-o", room / "merged"]
    return run(command, environment={"SPECTRALBASIS_CACHE": str(bench.folder / "tuned" / "cache")})


def _merged(bench: Bench, room: Path) -> object:
    return (room / "merged" / "model.safetensors").read_bytes()


def _model(bench: Bench, room: Path) -> None:
    room.mkdir()
    shutil.copytree(bench.model, room / "model")


def _tune_model(bench: Bench, room: Path) -> Ended:
    command = ["tune", room / "model", "--task", "digits", "-o", room / "out", "--steps", "2", "--leading", "2"]
    return run([*command, "--train-examples", "64"], environment={"SPECTRALBASIS_CACHE": str(room / "cache")})


def _studied(bench: Bench, room: Path) -> None:
    room.mkdir()
    shutil.copytree(bench.studied, room / "out")
    shutil.copytree(bench.studied.parent / "cache", room / "cache")  # with what tells that the runs are one's own


def _exported(bench: Bench, room: Path) -> None:
    _studied(bench, room)
    (room / "out" / "runs.sqlite").unlink()


def _study(bench: Bench, room: Path) -> Ended:
    return bench.study(room / "out")


def _study_exported(bench: Bench, room: Path) -> Ended:
    return bench.study(room / "out", "--trust")


def _claims(bench: Bench, room: Path) -> object:
    return bench.is_studied(room / "out")


PAIR = Subject("base.safetensors", _pair, _compare(), _table)
INDEX = Subject("model/model.safetensors.index.json", _shards, _compare("model"), _table)
TORCH = Subject("base.bin", _torch_file, _compare("base.bin"), _table)
STORE = Subject("out/store.sqlite", _compared, _compare("base.safetensors", "--resume"), _table)
ROWS = Subject("out/comparison.parquet", _compared, _report, _page)
FINDINGS = Subject("out/summary.json", _compared, _report, _page)
BASIS = Subject("basis.safetensors", _tuned_on_basis, _tune_on_basis, _numbers)
ADAPTER = Subject("adapter/adapter_model.safetensors", _adapter, _export, _merged)
CONFIG = Subject("adapter/adapter_config.json", _adapter, _export, _merged)
TUNING = Subject("adapter/tuning.json", _adapter, _evaluate, _nothing)
MODEL_CONFIG = Subject("model/config.json", _model, _tune_model, _numbers)
RUNS = Subject("out/runs.sqlite", _studied, _study, _claims)
EXPORTED = Subject("out/runs.parquet", _exported, _study_exported, _claims)
MEASURED = Subject("out/measurements.parquet", _exported, _study_exported, _claims)

TOLD: tuple[Outcome, ...] = ("as undisturbed", "refused")
FOREIGN: tuple[Outcome, ...] = (*TOLD, "other values")
SUBJECTS = (
    ("checkpoint (safetensors)", PAIR, FOREIGN, 8, 2),
    ("checkpoint (index of shards)", INDEX, TOLD, 6, 1),
    ("checkpoint (torch)", TORCH, FOREIGN, 8, 2),
    ("store of a comparison", STORE, TOLD, 8, 2),
    ("rows of a comparison", ROWS, TOLD, 8, 2),
    ("findings of a comparison", FINDINGS, FOREIGN, 6, 1),
    ("basis file", BASIS, TOLD, 6, None),
    ("adapter, coefficients", ADAPTER, FOREIGN, 6, 1),
    ("adapter, adapter_config.json", CONFIG, FOREIGN, 6, 1),
    ("adapter, tuning.json", TUNING, FOREIGN, 6, None),
    ("model, config.json", MODEL_CONFIG, FOREIGN, 6, None),
    ("runs of a study", RUNS, TOLD, 6, None),
    ("exported runs of a study", EXPORTED, TOLD, 6, None),
    ("exported measurements of a study", MEASURED, TOLD, 6, None),
)
CASES = tuple(
    Case(GROUP, f"{name}, {how}", damage(subject), many, few, None, expected)
    for name, subject, expected, many, few in SUBJECTS
    for how, damage in (("one bit", turned), ("cut", cut))
)
