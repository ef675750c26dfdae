"""Scores of predictions against references, as GLUE defines them."""

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

Values = NDArray[np.generic]


def accuracy(predictions: Values, references: Values) -> float:
    """Share of predictions that equal their reference, in [0, 1]."""
    return float(accuracy_score(references, predictions))


def f1(predictions: Values, references: Values) -> float:
    """Harmonic mean of precision and recall of class 1, in [0, 1]; 0 where no example is or is called class 1."""
    return float(f1_score(references, predictions, zero_division=0))


def matthews(predictions: Values, references: Values) -> float:
    """Matthews correlation of two classes, in [-1, 1]; 0 where the predictions are all the same."""
    return float(matthews_corrcoef(references, predictions))


def pearson(predictions: Values, references: Values) -> float:
    """Linear correlation, in [-1, 1]; 0 where either side is constant, as for `matthews`."""
    return _correlation(stats.pearsonr, predictions, references)


def spearman(predictions: Values, references: Values) -> float:
    """Rank correlation, in [-1, 1]; 0 where either side is constant, as for `matthews`."""
    return _correlation(stats.spearmanr, predictions, references)


def pearson_spearman(predictions: Values, references: Values) -> float:
    """Mean of the linear and the rank correlation: the figure that GLUE quotes for STS-B."""
    return (pearson(predictions, references) + spearman(predictions, references)) / 2


METRICS: dict[str, Callable[[Values, Values], float]] = {
    metric.__name__: metric for metric in (accuracy, f1, matthews, pearson, spearman, pearson_spearman)
}


def score(predictions: Values, references: Values, metrics: Iterable[str]) -> dict[str, float]:
    """The named metrics of one set of predictions."""
    return {name: METRICS[name](predictions, references) for name in metrics}


def _correlation(measure: Callable[..., tuple[float, float]], predictions: Values, references: Values) -> float:
    if np.ptp(predictions) == 0 or np.ptp(references) == 0:
        return 0.0
    return float(measure(predictions, references)[0])
