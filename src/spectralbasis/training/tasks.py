"""`Task`: the examples as a `datasets.Dataset`, and the metrics that score predictions.

The libraries of the extra `tune` are imported on use: `--help` and a plain installation read this module too.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spectralbasis.errors import InputError
from spectralbasis.extras import require_extra

if TYPE_CHECKING:
    from datasets import Dataset

TEXT = "text"
IMAGE = "image"
SIGNALS = "signals"
LABEL = "label"
MASK_SEED = "mask_seed"
"""Column of the seed that decides which tokens of a row are masked; rows without it are masked anew each time."""

PAIRED = "paired_text"
"""Column of the second text of a pair, in tasks that are made of a user's table."""
MESSAGES, PROMPT, COMPLETION = "messages", "prompt", "completion"
LANGUAGE_KINDS = ("masked_language", "causal_language", "instructions")
"""Kinds of tasks that predict tokens: hidden ones, the next one, or those of answers."""

Kind = Literal["classification", "regression", "masked_language", "causal_language", "instructions"]
Examples = tuple[ArrayLike, ArrayLike]
Values = NDArray[np.generic]


@dataclass(frozen=True)
class Layout:
    """What the columns of a user's table mean; `tuning.json` keeps it, so that other tables are read alike.

    Args:
        kind: `classification`, `regression`, `language`, `instructions` or `images`.
        text: columns that are read: one or two of text, one of images, or those of instructions.
        label: column of the labels, None where there is none.
        label_names: words for the classes, in the order of the model's outputs.
        held_out: rows held out of the training table by the seed, of how many: `seed`, `rows`, `of`; empty where the
            held-out rows were given.
        center: of a regression's labels: the model predicts (label - center) / scale.
        scale: of a regression's labels, above 0.
    """

    kind: str
    text: tuple[str, ...]
    label: str | None = None
    label_names: tuple[str, ...] = ()
    held_out: Mapping[str, int] = field(default_factory=dict)
    center: float = 0.0
    scale: float = 1.0


@dataclass(frozen=True)
class Task:
    """Examples to train on, held-out examples to score on, and the metrics that score predictions.

    Args:
        name: in tables and messages.
        modality: what the model reads.
        kind: `classification`, `regression`, `masked_language`, `causal_language` or `instructions`.
        inputs: columns that the model reads: one or two of text; one of images (channels, height, width), floats in
            [0, 1] or uint8 in [0, 255]; or one of signals (time, channels).
        label_names: of the classes, one name for a regression, none where tokens are predicted. The column `label`
            holds class numbers, or floats for a regression.
        train: examples to train on.
        evaluation: held-out examples whose scores are reported.
        metrics: names in `METRICS`.
        headline: the one metric of `metrics` that tables quote.
        evaluation_split: what tables call the held-out examples.
        selection: further held-out examples, to choose settings by.
        layout: of the user's table that the task was made of.
        identity: changes when the data do; empty where that is not known.
        notes: sentences on how the data were read.

    Examples:
        >>> import numpy as np
        >>> images, labels = np.zeros((6, 8, 8), np.uint8), np.array([0, 1, 0, 1, 0, 1])
        >>> task = Task.from_arrays("dark", (images, labels), (images, labels))
        >>> task.num_labels, len(task.train), task.train[0]["image"].shape
        (2, 6, (1, 8, 8))
    """

    name: str
    modality: Literal["text", "image", "signal"]
    kind: Kind
    inputs: tuple[str, ...]
    label_names: tuple[str, ...]
    train: "Dataset"
    evaluation: "Dataset"
    metrics: tuple[str, ...] = ("accuracy",)
    headline: str = "accuracy"
    evaluation_split: str = "evaluation"
    selection: "Dataset | None" = None
    layout: Layout | None = None
    identity: str = ""
    notes: tuple[str, ...] = ()

    @property
    def num_labels(self) -> int:
        """Number of outputs of the model's head: the classes, 1 for a regression, 0 where tokens are predicted."""
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
        """A classification of images in memory.

        Args:
            name: of the task.
            train: images and labels to train on. Images are of shape (N, height, width) or (N, height, width,
                channels), uint8 in [0, 255] or floats in [0, 1]; labels are whole numbers from 0, of shape (N,).
            evaluation: the same to score on.
            label_names: of the classes; default: the numbers up to the largest training label.
            evaluation_split: what tables call the examples to score on.

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

    @classmethod
    def from_texts(
        cls,
        name: str,
        train: tuple[Sequence[str], Sequence[str]],
        evaluation: tuple[Sequence[str], Sequence[str]],
        *,
        evaluation_split: str = "evaluation",
    ) -> "Task":
        """A classification of texts in memory.

        Args:
            name: of the task.
            train: texts and the names of their classes, to train on.
            evaluation: the same to score on.
            evaluation_split: what tables call the examples to score on.

        Raises:
            InputError: there is not one label for each text, or a label to score is not among those to train on.
        """
        from datasets import ClassLabel, Dataset, Features, Value

        names = tuple(sorted(set(train[1])))
        parts = []
        for texts, labels in (train, evaluation):
            if len(texts) != len(labels) or not len(texts):
                raise InputError(f"{name}: {len(texts)} texts and {len(labels)} labels; give one label for each text")
            unknown = set(labels) - set(names)
            if unknown:
                raise InputError(f"{name}: no text to train on has the label {min(unknown)!r}, which is to be scored")
            features = Features({TEXT: Value("string"), LABEL: ClassLabel(names=list(names))})
            found = {TEXT: list(texts), LABEL: [names.index(label) for label in labels]}
            parts.append(Dataset.from_dict(found, features=features))
        return cls(
            name=name,
            modality="text",
            kind="classification",
            inputs=(TEXT,),
            label_names=names,
            train=parts[0],
            evaluation=parts[1],
            evaluation_split=evaluation_split,
        )

    def subsample(self, examples: int, seed: int) -> "Task":
        """The same task with `examples` of its training examples, drawn without replacement by the seed.

        Raises:
            InputError: there are fewer.
        """
        available = len(self.train)
        if not 1 <= examples <= available:
            raise InputError(
                f"{examples} training examples were requested of {self.name}, which has {available}; pass a number "
                f"from 1 to {available}, or none to use all"
            )
        chosen = np.random.default_rng(seed).permutation(available)[:examples]
        return replace(self, train=self.train.select(chosen))

    def halved(self, seed: int = 0) -> "Task":
        """The same task with its evaluation split in two disjoint halves: `selection`, and what stays `evaluation`.

        Each label, or each stretch of a regression's labels, has its share in both halves, to within one example.

        Raises:
            InputError: there is one example to evaluate on, or the task has a selection split already.
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

    def held_out_of_train(self, share: float = 0.1, most: int = 1000, seed: int = 0) -> "Task":
        """The same task with `selection` taken out of its training examples; all of `evaluation` stays to score on.

        Args:
            share: of the training examples that is taken, in (0, 1).
            most: examples that are taken at most.
            seed: of which ones; each label has its share, to within one example. Of running text they are masked alike
                every time, as those of `evaluation` are.

        Raises:
            InputError: there are fewer than two training examples, or the task has a selection split already.
        """
        size = len(self.train)
        if self.selection is not None or size < 2:
            found = "a selection split already" if self.selection is not None else f"{size} training example"
            raise InputError(f"{self.name} has {found}; holding some out needs two training examples or more")
        order = np.random.default_rng(seed).permutation(size)
        if LABEL in self.train.column_names:
            labels = np.asarray(self.train.with_format("numpy")[LABEL][:])
            order = order[np.argsort(labels[order], kind="stable")]
        count = max(1, min(most, round(share * size)))
        taken = order[((np.arange(count) + 0.5) * size / count).astype(int)]
        kept = np.setdiff1d(np.arange(size), taken)
        selection = self.train.select(np.sort(taken))
        if MASK_SEED in self.evaluation.column_names and MASK_SEED not in selection.column_names:
            selection = type(selection).from_dict({**selection[:], MASK_SEED: list(range(count))})
        return replace(self, train=self.train.select(kept), selection=selection)


def image_dataset(what: str, images: ArrayLike, labels: ArrayLike, label_names: Sequence[str]) -> "Dataset":
    """A data set with the columns `image` (channels, height, width) and `label`, over the arrays' own memory.

    `what` is how errors call the data; for the arrays see `Task.from_arrays`.

    Raises:
        InputError: a shape, a pixel or a label is not as it must be.
    """
    require_extra("tune", "a Task of images")
    import pyarrow as pa
    from datasets import Array3D, ClassLabel, Dataset, DatasetInfo, Features

    pixels = _checked_pixels(what, np.asarray(images))
    classes = _checked_labels(what, np.asarray(labels), len(pixels), len(label_names))
    kind = Array3D(shape=pixels.shape[1:], dtype=str(pixels.dtype))
    # Nested Arrow lists over the array's own memory: `Dataset.from_dict` would copy each pixel.
    column: pa.Array = pa.array(pixels.reshape(-1))
    for width in reversed(pixels.shape[1:]):
        offsets = np.arange(len(column) // width + 1, dtype=np.int64) * width
        column = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), column)
    table = pa.table({IMAGE: pa.ExtensionArray.from_storage(kind(), column), LABEL: pa.array(classes)})
    features = Features({IMAGE: kind, LABEL: ClassLabel(names=list(label_names))})
    return Dataset(table, info=DatasetInfo(features=features)).with_format("numpy")


def _checked_pixels(what: str, pixels: NDArray[Any]) -> NDArray[Any]:
    if pixels.ndim not in (3, 4) or not pixels.size:
        raise InputError(
            f"{what}: images of shape {pixels.shape}; expected (N, height, width) or (N, height, width, channels)"
        )
    if pixels.dtype.kind not in "biuf":
        raise InputError(f"{what}: pixels of type {pixels.dtype}; expected floats in [0, 1], or uint8 in [0, 255]")
    if pixels.dtype != np.uint8:
        pixels = pixels.astype(np.float32)
        low, high = pixels.min(), pixels.max()
        if not (low >= 0 and high <= 1):
            raise InputError(
                f"{what}: pixels from {low:g} to {high:g}; expected floats in [0, 1], or uint8 in [0, 255]"
            )
    pixels = pixels[:, None] if pixels.ndim == 3 else np.moveaxis(pixels, -1, 1)
    return np.ascontiguousarray(pixels)


def _checked_labels(what: str, labels: NDArray[Any], examples: int, classes: int) -> NDArray[np.int64]:
    if labels.shape != (examples,):
        raise InputError(f"{what}: labels of shape {labels.shape} for {examples} images; give one label an image")
    if not np.issubdtype(labels.dtype, np.integer):
        raise InputError(f"{what}: labels of type {labels.dtype}; expected whole numbers from 0 to {classes - 1}")
    low, high = labels.min(), labels.max()
    if low < 0 or high >= classes:
        raise InputError(f"{what}: labels from {low} to {high}; expected 0 to {classes - 1}, one for each label name")
    return labels.astype(np.int64)


def batches(examples: "Dataset", size: int) -> Iterator[list[dict[str, Any]]]:
    """The rows of a data set in order, `size` at a time; reading them one by one takes several times as long."""
    for start in range(0, len(examples), size):
        columns = examples[start : start + size]
        yield [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def accuracy(predictions: Values, references: Values) -> float:
    """Share of predictions that equal their reference, in [0, 1]."""
    return float(np.mean(predictions == references))


def f1(predictions: Values, references: Values) -> float:
    """Harmonic mean of precision and recall of class 1, in [0, 1]; 0 where no example is or is called class 1."""
    from sklearn.metrics import f1_score

    return float(f1_score(references, predictions, zero_division=0))


def macro_f1(predictions: Values, references: Values) -> float:
    """Mean over the classes of the harmonic mean of precision and recall, in [0, 1]: each class weighs the same."""
    from sklearn.metrics import f1_score

    return float(f1_score(references, predictions, average="macro", zero_division=0))


def matthews(predictions: Values, references: Values) -> float:
    """Matthews correlation of two classes, in [-1, 1]; 0 where the predictions are all the same."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(references, predictions))


def pearson(predictions: Values, references: Values) -> float:
    """Linear correlation, in [-1, 1]; 0 where either side is constant, as for `matthews`."""
    from scipy import stats

    return _correlation(stats.pearsonr, predictions, references)


def spearman(predictions: Values, references: Values) -> float:
    """Rank correlation, in [-1, 1]; 0 where either side is constant, as for `matthews`."""
    from scipy import stats

    return _correlation(stats.spearmanr, predictions, references)


def _correlation(measure: Callable[..., tuple[float, float]], predictions: Values, references: Values) -> float:
    if np.ptp(predictions) == 0 or np.ptp(references) == 0:
        return 0.0
    return float(measure(predictions, references)[0])


def r2(predictions: Values, references: Values) -> float:
    """Share of the labels' variance that predictions explain, at most 1; 0 for the constant mean of the labels."""
    labels, found = np.asarray(references, np.float64), np.asarray(predictions, np.float64)
    spread = float(np.sum((labels - labels.mean()) ** 2))
    return 1 - float(np.sum((labels - found) ** 2)) / spread if spread else 0.0


def pearson_spearman(predictions: Values, references: Values) -> float:
    """Mean of the linear and the rank correlation: the figure that GLUE quotes for STS-B."""
    return (pearson(predictions, references) + spearman(predictions, references)) / 2


METRICS: dict[str, Callable[[Values, Values], float]] = {
    metric.__name__: metric for metric in (accuracy, f1, macro_f1, matthews, pearson, spearman, pearson_spearman, r2)
}
LIKELIHOOD_METRICS = ("log_likelihood", "perplexity", "accuracy")
"""Metrics of tokens; see `evaluation.token_scores`."""


def score(predictions: Values, references: Values, metrics: Iterable[str]) -> dict[str, float]:
    """The named metrics of one set of predictions."""
    return {name: METRICS[name](predictions, references) for name in metrics}
