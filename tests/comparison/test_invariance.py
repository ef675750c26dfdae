"""What must not change a measurement does not: signs, scale, rotations of the space, transposition."""

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectralbasis import compare
from tests.comparison.pairs import layered
from tests.matrices import orthonormal, power_law, with_spectrum

K = 4
IN_UNIT_RANGE = ("cosine", "overlap", "coverage", "wedin")


def pair(seed: int, m: int, n: int):
    W0, _, _ = with_spectrum(m, n, power_law(min(m, n)), seed)
    generator = torch.Generator().manual_seed(seed)
    return W0, W0 + 0.03 * torch.randn(m, n, generator=generator, dtype=torch.float64)


def measured(W0, W1) -> pd.Series:
    table = compare(layered({"0.dense": W0}), [layered({"0.dense": W1})], leading=K, null=None).table
    return table.set_index(["metric", "side", "k", "index"])["value"].sort_index()


def assert_same(first: pd.Series, second: pd.Series) -> None:
    pd.testing.assert_series_equal(first, second, check_names=False, rtol=1e-3, atol=1e-4)


shapes = {"seed": st.integers(0, 10**4), "m": st.integers(K + 1, 24), "n": st.integers(K + 1, 24)}


@settings(max_examples=20, deadline=None)
@given(**shapes)
def test_ranges(seed, m, n):
    values = measured(*pair(seed, m, n))
    assert bool(values.notna().all())
    for (metric, *_), value in values.items():
        if any(word in metric for word in IN_UNIT_RANGE):
            assert -1e-9 <= value <= 1 + 1e-9, metric
        if "rank" in metric:
            assert 1 - 1e-6 <= value <= min(m, n) + 1e-6, metric


@settings(max_examples=15, deadline=None)
@given(**shapes, left=st.booleans(), right=st.booleans())
def test_rotating_input_or_output_space_of_both_changes_nothing(seed, m, n, left, right):
    W0, W1 = pair(seed, m, n)
    P = orthonormal(m, m, seed + 1) if left else torch.eye(m, dtype=torch.float64)
    Q = orthonormal(n, n, seed + 2) if right else torch.eye(n, dtype=torch.float64)
    assert_same(measured(W0, W1), measured(P @ W0 @ Q, P @ W1 @ Q))


@settings(max_examples=15, deadline=None)
@given(**shapes)
def test_transposition_swaps_left_and_right(seed, m, n):
    W0, W1 = pair(seed, m, n)
    plain, transposed = (
        values.drop(["max_cosine", "intruders"], level="metric") for values in (measured(W0, W1), measured(W0.T, W1.T))
    )
    swap = {"left": "right", "right": "left", "both": "both"}
    metric_swap = {"coverage_left": "coverage_right", "coverage_right": "coverage_left"}
    transposed.index = transposed.index.map(lambda key: (metric_swap.get(key[0], key[0]), swap[key[1]], *key[2:]))
    assert_same(plain, transposed.sort_index())


@settings(max_examples=15, deadline=None)
@given(**shapes, scale=st.floats(1e-3, 1e3), sign=st.sampled_from([-1, 1]))
def test_scaling_both_changes_only_what_has_the_units_of_the_weights(seed, m, n, scale, sign):
    W0, W1 = pair(seed, m, n)
    plain, scaled = measured(W0, W1), measured(sign * scale * W0, sign * scale * W1)
    units = [key for key in plain.index if key[0] in ("update_norm", "singular_value_base", "singular_value_tuned")]
    plain[units] *= scale
    assert_same(plain, scaled)


def test_a_rotation_inside_a_degenerate_cluster_does_not_count_as_change():
    S = torch.tensor([3.0, 2.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    W0, U, V = with_spectrum(20, 15, S)
    Q = orthonormal(2, 2, 9)
    U[:, 1:3], V[:, 1:3] = U[:, 1:3] @ Q, V[:, 1:3] @ Q
    same = (U * S) @ V.T
    torch.testing.assert_close(same, W0)
    values = measured(W0, same + 1e-4 * torch.outer(U[:, 4], V[:, 4]))
    assert values["subspace_overlap", "left", K, -1] == pytest.approx(1, abs=1e-5)
