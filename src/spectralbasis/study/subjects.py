"""The subjects of experiments: pretrained models with the tasks they are tuned to, and lineages.

A lineage is one architecture at several scales of pretraining, with the tasks it is tuned to afterwards.
"""

import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from spectralbasis.study.estimates import interpolate_at
from spectralbasis.study.runs import Results, Run
from spectralbasis.study.trajectories import NOISE, summarise_steps


@dataclass(frozen=True)
class Subject:
    """A pretrained model and the tasks that it is tuned to.

    Args:
        name: of the model, in tables.
        model: what `load_model` opens, or the run that makes it.
        tasks: names of tasks.
        settings: of every tuning of it: steps, batch size and the like.
        learning_rates: of full finetuning, from small to large steps.
    """

    name: str
    model: str | Run
    tasks: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    learning_rates: tuple[float, ...] = (1e-4,)

    def needs(self) -> dict[str, Run]:
        """What a run on this model needs first."""
        return {"model": self.model} if isinstance(self.model, Run) else {}

    def named(self) -> dict[str, Any]:
        """The setting `model` of a run on it, where no run makes it."""
        return {} if isinstance(self.model, Run) else {"model": self.model}

    def tune(self, task: str, seed: int, *, needs: Mapping[str, Run] | None = None, **settings: Any) -> Run:
        """The run that tunes it to a task; `settings` win over its own."""
        wanted = {**self.named(), "task": task, **self.settings, **settings}
        return Run("tune", wanted, seed, {**self.needs(), **(needs or {})})


def pretrained(architecture: str, task: str, seed: int = 0, **settings: Any) -> Run:
    """The run that trains an architecture from random weights, in full, on a task."""
    untrained = Run("initialise", {"architecture": architecture}, seed)
    return Run("tune", {"task": task, "method": "full", **settings}, seed, {"model": untrained})


GLUE = ("RTE", "MRPC", "CoLA", "STS-B", "SST-2")
_TEXT = {"batch_size": 32, "max_length": 64}

MINILM = Subject(
    "MiniLM", "minilm", GLUE, {**_TEXT, "steps": 120, "train_examples": 2048, "bf16": True}, (3e-5, 2e-4, 1e-3)
)
MINILM_LONGER = replace(MINILM, settings={**MINILM.settings, "batch_size": 16, "steps": 360, "train_examples": 2400})
"""Where scores are compared: in 120 steps no method gets beyond chance on RTE and MRPC. About 3 minutes on a core."""
CSV = (
    "movie_reviews", "mpqa", "trec", "sst5", "tweets_emotion", "tweets_irony", "tweets_hate", "tweets_offensive",
)  # fmt: skip
MINILM_TASKS = Subject(
    "MiniLM",
    "minilm",
    (*GLUE, *CSV),
    {"batch_size": 16, "max_length": 64, "steps": 600, "bf16": True, "select_on": "train"},
    (2e-4,),
)
"""Thirteen tasks, scored on their whole test sets; settings are chosen on training examples that are not trained on."""
SMALL_VIT = Subject(
    "ViT (Fashion-MNIST)",
    pretrained("vit-small", "Fashion-MNIST", steps=800, batch_size=64, learning_rate=1e-3),
    ("MNIST", "USPS", "CIFAR-10"),
    {"steps": 200, "batch_size": 64, "train_examples": 4000},
    (1e-4, 5e-4, 3e-3),
)
SMALL_BERT = Subject(
    "BERT (novels)",
    pretrained(
        "bert-small", "novels", steps=1000, batch_size=16, max_length=48, learning_rate=2e-3, train_examples=16000
    ),
    ("Shakespeare", "WikiText-2", "SST-2"),
    {"steps": 120, "batch_size": 16, "max_length": 48, "train_examples": 4000},
    (1e-4, 5e-4, 3e-3),
)
LIMU_BERT = Subject(
    "LIMU-BERT-X",
    Run("initialise", {"architecture": "limu-bert-x"}),
    ("MotionSense",),
    {"steps": 150, "batch_size": 32, "train_examples": 2048},
    (1e-4, 5e-4, 3e-3),
)
"""A pretrained model of motion sensors: one block of six matrices, applied four times."""
ROBERTA = Subject(
    "RoBERTa-base", "FacebookAI/roberta-base", GLUE, {**_TEXT, "max_length": 128, "steps": 2000, "bf16": True},
    (1e-5, 1e-4, 5e-4),
)  # fmt: skip
ROBERTA_LARGE = replace(
    ROBERTA, name="RoBERTa-large", model="FacebookAI/roberta-large", learning_rates=(5e-6, 5e-5, 2e-4)
)
DEBERTA = replace(ROBERTA, name="DeBERTa-v3-base", model="microsoft/deberta-v3-base")
MULTIBERTS = tuple(
    replace(ROBERTA, name=f"MultiBERT {seed}", model=f"google/multiberts-seed_{seed}", tasks=("RTE", "MRPC", "SST-2"))
    for seed in range(5)
)
"""One architecture, pretrained five times on the same text from other weights (Sellam et al., arXiv 2106.16163)."""
VIT_B16 = Subject(
    "ViT-B/16 (ImageNet-21k)", "google/vit-base-patch16-224-in21k", ("CIFAR-100", "SVHN", "DTD", "EuroSAT", "Pets"),
    {"batch_size": 64, "steps": 2000, "bf16": True}, (1e-5, 1e-4, 5e-4),
)  # fmt: skip
DEIT = replace(VIT_B16, name="DeiT-B/16", model="facebook/deit-base-distilled-patch16-224")
CLIP = replace(VIT_B16, name="CLIP ViT-B/32", model="openai/clip-vit-base-patch32")
"""Its image part alone."""
LARGE = (ROBERTA, ROBERTA_LARGE, DEBERTA, *MULTIBERTS, VIT_B16, DEIT, CLIP)
"""From the hub; they want a GPU."""
TINY_VIT = Subject(
    "tiny ViT (digits)",
    pretrained("vit-tiny", "digits", steps=60, batch_size=64, learning_rate=3e-3),
    ("digits-parity", "digits-larger-than-four", "digits-rotated"),
    {"steps": 12, "batch_size": 32},
    (3e-4, 3e-3),
)
"""The smallest that shows something, from built-in data."""


CHANCE = {"RTE": 0.527, "MRPC": 0.684, "SST-2": 0.509, "CoLA": 0.0, "STS-B": 0.0}
"""Task → what the best constant answer scores on its held-out examples; of other tasks it is not known here."""
LEARNED = 0.05
"""Scores less than this above `CHANCE` teach nothing: two standard errors of a half of a few hundred examples."""


def is_learned(task: Hashable, scores: pd.Series, constant: float = math.nan) -> bool:
    """Whether the median of some scores is beyond chance by `LEARNED`; true where chance is not known.

    Chance is what a constant answer scored in these runs, or else that of `CHANCE`.
    """
    chance = CHANCE.get(str(task), math.nan) if math.isnan(constant) else constant
    return bool(math.isnan(chance) or scores.median() >= chance + LEARNED)


SHIFT, CHANGE = "distribution shift", "task change"
STABILITY, EXCESS, NORM = "overlap", "held", "norm"
"""Columns of `summarise_steps` that are compared."""


@dataclass(frozen=True)
class Lineage:
    """One architecture, pretrained on growing parts of one data set at equal numbers of updates, then finetuned.

    Args:
        name: in tables.
        architecture: as the action `initialise` takes it.
        sizes: pretraining examples, ascending.
        moves: task that the pretrained models are finetuned on → kind of move.
        finetuning: settings of `tune` for these tasks.
        pretraining: settings of `tune` for pretraining, its task among them.
        released: size → where a model that others pretrained is, with `{}` for the number of its seed, from 1; such
            models are taken as they are, and their numbers of updates are not equal.
    """

    name: str
    architecture: str | Mapping[str, str]
    sizes: tuple[int, ...]
    moves: Mapping[str, str]
    finetuning: Mapping[str, Any]
    pretraining: Mapping[str, Any] = field(default_factory=dict)
    released: Mapping[int, str] = field(default_factory=dict)

    def untrained(self, seed: int) -> Run:
        """The run that writes the architecture with random weights."""
        return Run("initialise", {"architecture": self.architecture}, seed)

    def pretrained(self, size: int, seed: int, **settings: Any) -> Run | str:
        """The run that pretrains on so many examples, or the model that others did; sizes of one seed are nested.

        `settings` win over those of `pretraining`.
        """
        if size in self.released:
            return self.released[size].format(seed + 1)
        settings = {**self.pretraining, "method": "full", "train_examples": size, **settings}
        return Run("tune", settings, seed, {"model": self.untrained(seed)})

    def finetune(self, model: Run | str, task: str, seed: int, measured: Mapping[str, Any], **settings: Any) -> Run:
        """The run that finetunes a model in full; `measured` are the settings of `TrajectoryCallback` save the steps,
        and `shares`, of all steps after which it measures."""
        subject = Subject(self.name, model, (task,), self.finetuning)
        options = {name: value for name, value in measured.items() if name != "shares"}
        last = {**self.finetuning, **settings}["steps"]
        steps = sorted({max(1, round(share * last)) for share in measured["shares"]})
        return subject.tune(task, seed, method="full", measure={**options, "steps": steps}, **settings)


@dataclass(frozen=True)
class LabelledRun:
    """A run, and its labels in tables."""

    run: Run
    labels: Mapping[str, Any]


def measured_steps(runs: Iterable[LabelledRun], results: Results) -> tuple[pd.DataFrame, int]:
    """`summarise_steps` of each finished run, with its labels, its score and `constant_score`, that of a constant
    answer (NaN where it is not recorded); and how many runs are finished."""
    tables = []
    for one in runs:
        record = results.get(one.run)
        if record is not None and len(record.measurements):
            scores = {"score": record.result["score"], "constant_score": record.result.get("constant_score", math.nan)}
            tables.append(summarise_steps(record.measurements).assign(**one.labels, **scores))
    return (pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()), len(tables)


def at_last_step(steps: pd.DataFrame, run: list[str]) -> pd.DataFrame:
    """The last measured step of each run, a row each; `run` names the columns that identify a run."""
    return steps.loc[steps.groupby(run)["step"].idxmax()].reset_index(drop=True)


def at_equal_norm(steps: pd.DataFrame, run: list[str], among: list[str]) -> pd.DataFrame:
    """What was measured where runs had moved equally far: at the largest norm that all runs of a group reached.

    Rotations, `1 − overlap`, are interpolated along the steps, their logarithm in that of the norm: they grow about as
    its square. So is `held`, which is a logarithm already.

    Args:
        steps: measurements by step, with the columns `norm`, `overlap`, `overlap_null` and `held`.
        run: columns that identify a run.
        among: columns that identify a group of runs, some of `run`.

    Returns:
        A row for each run: `run`, `norm`, `overlap`, `overlap_null` and `held`, NaN where a run never had that norm
        between two steps.
    """
    reached = steps.groupby(run)[NORM].transform("max")
    targets = reached.groupby([steps[name] for name in among]).transform("min")
    paths = steps.assign(target=targets).sort_values("step").groupby(run, sort=False)
    found = pd.DataFrame({NORM: paths["target"].first()})
    for name in (STABILITY, f"{STABILITY}_null"):
        found[name] = paths.apply(_overlap_at_target, name)
    found[EXCESS] = paths.apply(lambda path: interpolate_at(path[NORM], path[EXCESS], float(path["target"].iloc[0])))
    return found.reset_index()


def _overlap_at_target(path: pd.DataFrame, name: str) -> float:
    rotations = np.log((1 - path[name]).clip(lower=NOISE))
    return 1 - math.exp(interpolate_at(path[NORM], rotations, float(path["target"].iloc[0])))


VIT = Lineage(
    name="ViT (MNIST)",
    architecture="vit-small",
    sizes=(200, 800, 3200, 12800, 51200),
    moves={"USPS": SHIFT, "Fashion-MNIST": CHANGE},
    finetuning={"steps": 200, "batch_size": 64, "learning_rate": 5e-4},
    pretraining={"task": "MNIST", "steps": 800, "batch_size": 64, "learning_rate": 1e-3},
)
BERT = Lineage(
    name="BERT (novels)",
    architecture="bert-small",
    sizes=(500, 2000, 8000, 32000),
    moves={"Shakespeare": SHIFT, "SST-2": CHANGE},
    finetuning={"steps": 250, "batch_size": 32, "max_length": 32, "learning_rate": 1e-3, "head_learning_rate": 3e-3},
    pretraining={"task": "novels", "steps": 1000, "batch_size": 32, "max_length": 32, "learning_rate": 2e-3},
)
TINY = Lineage(
    name="tiny ViT (digits)",
    architecture="vit-tiny",
    sizes=(20, 80, 320, 1280),
    moves={"digits-rotated": SHIFT, "digits-parity": CHANGE},
    finetuning={"steps": 12, "batch_size": 32, "learning_rate": 3e-3},
    pretraining={"task": "digits", "steps": 40, "batch_size": 32, "learning_rate": 3e-3},
)
"""The smallest that shows something, from built-in data."""
MINILM_LINEAGE = Lineage(
    name="MiniLM",
    architecture={"like": "minilm"},
    sizes=(1_170_060_424,),
    moves={"SST-2": CHANGE, "MRPC": CHANGE},
    finetuning={"steps": 80, "batch_size": 32, "max_length": 64, "learning_rate": 2e-4, "train_examples": 2048,
                "bf16": True},
    released={1_170_060_424: "minilm"},
)  # fmt: skip
"""Its size counts the pairs of sentences that it was trained on last, as its authors tell."""
ROBERTA_LINEAGE = Lineage(
    name="RoBERTa-base",
    architecture={"like": "nyu-mll/roberta-base-1B-1"},
    sizes=(10**7, 10**8, 10**9),
    moves={"Shakespeare": SHIFT, "RTE": CHANGE},
    finetuning={"steps": 2000, "batch_size": 32, "max_length": 128, "learning_rate": 2e-5, "bf16": True},
    released={10**power: f"nyu-mll/roberta-base-{name}-{{}}" for power, name in ((7, "10M"), (8, "100M"), (9, "1B"))},
)
"""Sizes count words; the seeds of these models are their authors' (Warstadt et al., EMNLP 2020)."""
VIT_BASE = Lineage(
    name="ViT-B/16 (ImageNet-21k)",
    architecture={"like": "google/vit-base-patch16-224-in21k"},
    sizes=(14_197_122,),
    moves={"CIFAR-10": SHIFT, "Fashion-MNIST": CHANGE},
    finetuning={"steps": 2000, "batch_size": 64, "learning_rate": 5e-5, "bf16": True},
    released={14_197_122: "google/vit-base-patch16-224-in21k"},
)
