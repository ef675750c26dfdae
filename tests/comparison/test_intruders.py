"""Intruder counts equal, number for number, the published definition by full decompositions."""

import numpy as np
import pytest
import torch

from spectralbasis import compare
from tests.comparison.pairs import layered
from tests.matrices import orthonormal, power_law, with_spectrum


def published(W0, W1, top=10, epsilon=0.5):
    """Shuttleworth et al. (2410.21228): tuned top vectors whose cosine to every base vector is below epsilon."""
    U0 = np.linalg.svd(W0.double().numpy(), full_matrices=False)[0]
    U1 = np.linalg.svd(W1.double().numpy(), full_matrices=False)[0][:, :top]
    largest = np.abs(U0.T @ U1).max(0)
    return largest, int((largest < epsilon).sum())


def pair(size: float, rank: int, m: int, n: int, seed: int):
    """A base, and the base plus an update of few strong directions that it does not know."""
    W0 = with_spectrum(m, n, power_law(min(m, n)), seed)[0]
    update = orthonormal(m, rank, seed + 5) @ orthonormal(n, rank, seed + 6).T
    return W0.float(), (W0 + size * update).float()


@pytest.mark.parametrize("shape", [(60, 50), (50, 60), (90, 30)])
@pytest.mark.parametrize(("size", "rank"), [(0.01, 3), (0.4, 3), (2.0, 4), (0.3, 12)])
@pytest.mark.parametrize("k", [10, 24])
def test_equal_to_the_published_definition(shape, size, rank, k):
    W0, W1 = pair(size, rank, *shape, seed=rank)
    table = compare(layered({"0.dense": W0}), [layered({"0.dense": W1})], leading=k, null=None).table
    largest, count = published(W0, W1)
    cosines = table[table.metric == "max_cosine"].sort_values("index")["value"]
    np.testing.assert_allclose(cosines, largest, atol=1e-5)
    assert table[table.metric == "intruders"]["value"].tolist() == [count]


def test_strong_unknown_directions_are_counted_one_by_one():
    W0, W1 = pair(5.0, 4, 80, 70, seed=0)
    table = compare(layered({"0.dense": W0}), [layered({"0.dense": W1})], leading=16, null=None).table
    assert table[table.metric == "intruders"]["value"].tolist() == [4]


def test_fewer_directions_than_ten_count_among_those():
    W0, W1 = pair(5.0, 4, 80, 70, seed=0)
    table = compare(layered({"0.dense": W0}), [layered({"0.dense": W1})], leading=3, null=None).table
    rows = table[table.metric == "intruders"]
    assert (rows["k"].tolist(), rows["value"].tolist()) == ([3], [3])
    assert torch.isfinite(torch.tensor(table["value"].to_numpy())).all()
