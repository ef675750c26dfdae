"""Metrics against their definitions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from spectralbasis.training import tasks

BINARY = arrays(np.int64, 12, elements=st.integers(0, 1))
REAL = arrays(np.float64, 12, elements=st.integers(-50, 50).map(float))


@pytest.mark.filterwarnings("ignore:A single label was found")
@given(BINARY, BINARY)
def test_f1_and_matthews_follow_from_the_confusion_matrix(predictions, references):
    tp = float(np.sum((predictions == 1) & (references == 1)))
    fp = float(np.sum((predictions == 1) & (references == 0)))
    fn = float(np.sum((predictions == 0) & (references == 1)))
    tn = float(np.sum((predictions == 0) & (references == 0)))
    f1 = 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0.0
    spread = np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert tasks.f1(predictions, references) == pytest.approx(f1)
    assert tasks.accuracy(predictions, references) == pytest.approx((tp + tn) / 12)
    assert tasks.matthews(predictions, references) == pytest.approx((tp * tn - fp * fn) / spread if spread else 0.0)


@given(REAL, REAL)
def test_correlations_agree_with_numpy(predictions, references):
    if np.ptp(predictions) == 0 or np.ptp(references) == 0:
        expected = 0.0
    else:
        expected = np.corrcoef(predictions, references)[0, 1]
    assert tasks.pearson(predictions, references) == pytest.approx(expected, abs=1e-9)


def test_rank_correlation_sees_order_alone():
    references = np.arange(10.0)
    predictions = np.exp(references)
    assert tasks.spearman(predictions, references) == pytest.approx(1)
    assert tasks.pearson(predictions, references) < 0.9
    mean = (1 + tasks.pearson(predictions, references)) / 2
    assert tasks.pearson_spearman(predictions, references) == pytest.approx(mean)


def test_score_gives_the_named_metrics_alone():
    found = tasks.score(np.array([1, 0, 1]), np.array([1, 0, 0]), ("accuracy", "f1"))
    assert found == {"accuracy": pytest.approx(2 / 3), "f1": pytest.approx(2 / 3)}
