"""What a model is tuned for: examples, labels and how predictions are scored; and the list of tasks known by name."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from datasets import Dataset
from numpy.typing import ArrayLike

from spectralbasis.errors import InputError
from spectralbasis.study.tasks.arrays import IMAGE, LABEL, image_dataset

Examples = tuple[ArrayLike, ArrayLike]


@dataclass(frozen=True)
class Task:
    """Examples to train on, held-out examples to score on, and the metrics that judge the scores.

    `inputs` names the columns that the model reads: one or two of text, one of images (channels, height, width) whose
    values lie in [0, 1] as floats or in [0, 255] as uint8, or one of signals (time, channels). The column `label` holds
    class numbers, or floats where `kind` is `regression`; `masked_language` has none, and its label names are empty.
    `headline` is the one metric of `metrics` that tables quote. `selection` holds further held-out examples, to choose
    settings by, so that `evaluation` is only reported on.
    """

    name: str
    modality: Literal["text", "image", "signal"]
    kind: Literal["classification", "regression", "masked_language"]
    inputs: tuple[str, ...]
    label_names: tuple[str, ...]
    train: Dataset
    evaluation: Dataset
    metrics: tuple[str, ...] = ("accuracy",)
    headline: str = "accuracy"
    evaluation_split: str = "evaluation"
    selection: Dataset | None = None

    @property
    def num_labels(self) -> int:
        """Number of outputs that a model's head needs: the classes, or one for a regression."""
        return len(self.label_names)

    @classmethod
    def from_arrays(
        cls,
        name: str,
        train: Examples,
        evaluation: Examples,
        *,
        label_names: Sequence[str] | None = None,
        evaluation_split: str = "evaluation",
    ) -> "Task":
        """A classification of images in memory: (images, labels) to train on, and (images, labels) to score on.

        Images are of shape (N, height, width) or (N, height, width, channels), uint8 in [0, 255] or floats in [0, 1];
        labels are whole numbers from 0. `label_names` are the numbers up to the largest training label by default.

        Raises:
            InputError: a shape, a pixel or a label is not as above.
        """
        names = tuple(label_names or (str(number) for number in range(int(np.max(train[1])) + 1)))
        return cls(
            name=name,
            modality="image",
            kind="classification",
            inputs=(IMAGE,),
            label_names=names,
            train=image_dataset(f"{name}, training examples", *train, names),
            evaluation=image_dataset(f"{name}, evaluation examples", *evaluation, names),
            evaluation_split=evaluation_split,
        )

    def subsample(self, examples: int, seed: int) -> "Task":
        """The same task with `examples` of its training examples, drawn without replacement by the seed.

        Raises:
            InputError: there are not as many.
        """
        available = len(self.train)
        if not 1 <= examples <= available:
            raise InputError(
                f"{examples} training examples were asked of {self.name}, which has {available}; "
                f"pass a number from 1 to {available}, or none to use all"
            )
        chosen = np.random.default_rng(seed).permutation(available)[:examples]
        return replace(self, train=self.train.select(chosen))

    def halved(self, seed: int = 0) -> "Task":
        """The same task with its evaluation split in two disjoint halves: `selection`, and what stays `evaluation`.

        Each label, or each stretch of a regression's labels, has its share in both halves, to within one example.

        Raises:
            InputError: there is but one example to evaluate on, or the task has a selection split already.
        """
        if self.selection is not None or len(self.evaluation) < 2:
            found = "a selection split already" if self.selection is not None else f"{len(self.evaluation)} example"
            raise InputError(f"{self.name} has {found}; halving needs an evaluation split of two examples or more")
        order = np.random.default_rng(seed).permutation(len(self.evaluation))
        if LABEL in self.evaluation.column_names:
            labels = np.asarray(self.evaluation.with_format("numpy")[LABEL][:])
            order = order[np.argsort(labels[order], kind="stable")]
        return replace(
            self,
            selection=self.evaluation.select(np.sort(order[::2])),
            evaluation=self.evaluation.select(np.sort(order[1::2])),
            evaluation_split=f"{self.evaluation_split}, reporting half",
        )


TaskLoader = Callable[[Path | None], Task]

_loaders: dict[str, tuple[str, TaskLoader]] = {}


def register_task(name: str, loader: TaskLoader) -> None:
    """Make a task known by name; `loader` gets the folder of data that the user named, or None."""
    _loaders[_key(name)] = (name, loader)


def task_names() -> tuple[str, ...]:
    """The names that `load_task` knows."""
    return tuple(name for name, _ in _loaders.values())


def load_task(name: str, data: Path | str | None = None) -> Task:
    """Load a task by its name, in any case and with or without hyphens, from the folder or file `data`.

    GLUE tasks come from the hub where `data` is None; the digits tasks need no data.

    Raises:
        InputError: the name is not known, or the data are absent or not in the expected layout.
    """
    found = _loaders.get(_key(name))
    if found is None:
        raise InputError(f"unknown task {name!r}; the known ones are {', '.join(task_names())}")
    if data is not None and not Path(data).exists():
        raise InputError(f"the data folder {data} does not exist; pass --data with the folder that holds {found[0]}")
    return found[1](None if data is None else Path(data))


def same_name(one: str, other: str) -> bool:
    """Whether both are the name of one task: case, hyphens and underscores do not count."""
    return _key(one) == _key(other)


def _key(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")
