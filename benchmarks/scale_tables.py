"""The tables of docs/scale.md: plans held against what comparisons took, and the arithmetic for large models."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from benchmarks.markdown import machine, table, versions
from benchmarks.planning import read_rates
from spectralbasis.commands.tables import duration
from spectralbasis.comparison.measuring import Settings
from spectralbasis.comparison.planning import KINDS, Group, Rates, describe_work, make_group, seconds_on

GOAL = 0.3
STORED = 2
"""Bytes of a weight, in the base and in the finetuned model: bfloat16."""


@dataclass(frozen=True)
class Llama:
    """The sizes of a model that decide its matrices."""

    width: int
    inner: int
    layers: int
    keys: int

    def shapes(self) -> Counter[tuple[int, int]]:
        """Matrices by shape: queries, keys, values and outputs of attention; gate, up and down projections."""
        attention = [(self.width, self.width)] * 2 + [(self.keys, self.width)] * 2
        feedforward = [(self.inner, self.width)] * 2 + [(self.width, self.inner)]
        return Counter({shape: self.layers * n for shape, n in Counter(attention + feedforward).items()})


@dataclass(frozen=True)
class Place:
    """Where a comparison runs.

    Attributes:
        nodes: machines, or GPUs.
        workers: of each, at most.
        memory: bytes of each.
        read: bytes per second that all together read.
        gpu: whether the rates are those assumed for a GPU, in place of those measured on one core here.
    """

    nodes: int
    workers: int
    memory: float
    read: float
    gpu: bool

    def workers_for(self, memory: int) -> int:
        """How many workers there is memory for, each with so many bytes."""
        return self.nodes * max(1, min(self.workers, int(self.memory // memory)))


MODELS = {
    "7B (Llama 2)": Llama(width=4096, inner=11008, layers=32, keys=4096),
    "70B (Llama 3)": Llama(width=8192, inner=28672, layers=80, keys=1024),
    "405B (Llama 3.1)": Llama(width=16384, inner=53248, layers=126, keys=1024),
}
PLACES = {
    "one H200": Place(nodes=1, workers=1, memory=141e9, read=5e9, gpu=True),
    "8 H200": Place(nodes=8, workers=1, memory=141e9, read=10e9, gpu=True),
    "64 CPU nodes": Place(nodes=64, workers=32, memory=256e9, read=20e9, gpu=False),
}
H200 = {
    "pass": 50e9,
    "product64": 40e12,
    "thin64": 5e12,
    "thin32": 15e12,
    "tridiagonal": 0.1e12,
    "dense": 0.05e12,
}
"""Assumed, not measured: sustained rates of one H200, well below its peaks (67 TFLOP/s in float64 and in float32, and
4.8 TB/s). Hashes are taken on the host; a reduction comes with the eigenvectors that the GPU's library takes too."""


def checked(found: dict[str, Any]) -> str:
    """Planned and measured time of each comparison."""
    heads = [
        "width",
        "layers",
        "matrices",
        "solver",
        "operations",
        "planned",
        "measured",
        "planned / measured",
        "on the wall",
    ]
    rows = [
        [
            str(row["width"]),
            str(row["layers"]),
            str(row["matrices"]),
            ", ".join(row["solvers"]),
            f"{row['operations']:.3g}",
            f"{row['planned_seconds']:.1f} s",
            f"{row['seconds']:.1f} s",
            f"{row['planned_seconds'] / row['seconds']:.2f}",
            f"{row['wall_seconds']:.0f} s at a load of {row['load']:.1f}",
        ]
        for row in found["rows"]
    ]
    within = sum(abs(row["planned_seconds"] / row["seconds"] - 1) <= GOAL for row in found["rows"])
    settings = found["settings"]
    note = (
        f"{within} of {len(rows)} within {GOAL:.0%}. k = {settings['k']}, {settings['draws']} draws, one finetuned "
        f"checkpoint, bfloat16. Planned and measured are seconds of the processor. {machine(found)} {versions(found)}"
    )
    return f"{table(heads, rows)}\n\n{note}\n"


def assumptions(found: dict[str, Any]) -> str:
    """Rates that the arithmetic uses."""
    core = read_rates(found["rates"])
    rows = [
        [kind, what, _rate(kind, H200[kind]), _rate(kind, core.by_side[kind][-1][1])]
        for kind, what in KINDS.items()
        if kind in H200
    ]
    rows.append(["overhead", "seconds for each matrix, whatever its size", *[f"{core.overhead:.2f} s"] * 2])
    places = [
        [
            name,
            f"{place.nodes} × {place.workers}",
            f"{place.memory / 1e9:.0f} GB",
            f"{place.read / 1e9:.0f} GB/s together",
        ]
        for name, place in PLACES.items()
    ]
    return (
        f"{table(['kind', 'of work', 'one H200, assumed', 'one core, measured here'], rows)}\n\n"
        f"{table(['place', 'workers', 'memory of each GPU or node', 'disk'], places)}\n"
    )


def large(found: dict[str, Any]) -> str:
    """What pairs of large models take, by the same code as `--plan`."""
    settings = Settings(found["settings"]["k"], draws=found["settings"]["draws"])
    heads = ["pair", "width, inner, layers, keys", "matrices", "to read", "operations", "memory of a worker", *PLACES]
    rows = []
    for name, model in MODELS.items():
        groups = [
            make_group(shape, count, settings, stored_bytes=2 * STORED * shape[0] * shape[1])
            for shape, count in model.shapes().items()
        ]
        work = describe_work(groups, read_rates(found["rates"], read=((1, 1.0),)))
        rows.append(
            [
                name,
                f"{model.width}, {model.inner}, {model.layers}, {model.keys}",
                str(sum(group.count for group in groups)),
                f"{work['read_bytes'] / 1e9:.3g} GB",
                f"{work['operations']:.2g}",
                f"{max(group.memory for group in groups) / 1e9:.2g} GB",
                *(_time(groups, place, found) for place in PLACES.values()),
            ]
        )
    note = (
        f"k = {settings.leading}, {settings.draws} draws, one finetuned checkpoint, bfloat16, nothing cached; every "
        "matrix but embeddings and heads. In brackets: workers that memory allows at once."
    )
    return f"{table(heads, rows)}\n\n{note}\n"


def _time(groups: list[Group], place: Place, found: dict[str, Any]) -> str:
    workers = place.workers_for(max(group.memory for group in groups))
    core = read_rates(found["rates"], read=((1, place.read),))
    assumed = Rates({kind: ((1, rate),) for kind, rate in {**H200, "read": place.read}.items()}, core.overhead)
    return f"{duration(seconds_on(groups, assumed if place.gpu else core, workers))} ({workers})"


def _rate(kind: str, rate: float) -> str:
    return f"{rate / 1e9:,.1f} {'GB/s' if kind == 'pass' else 'GFLOP/s'}"
