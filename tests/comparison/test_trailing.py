"""The trailing window is measured beside the leading one, against the same null."""

import pytest
import torch

from spectralbasis import compare
from spectralbasis.comparison.metrics import trailing
from spectralbasis.linalg import trailing_vectors
from tests.matrices import orthonormal, power_law, with_spectrum

M, N, K = 48, 40, 6


def test_trailing_vectors_are_those_of_the_smallest_values():
    A, U, V = with_spectrum(M, N, power_law(N))
    found_U, found_V = trailing_vectors(A, K)
    expected = (U.flip(1)[:, :K], V.flip(1)[:, :K])
    for found, true in zip((found_U, found_V), expected, strict=True):
        torch.testing.assert_close((found * true).sum(0).abs(), torch.ones(K).double(), rtol=0, atol=1e-8)


def test_a_turn_of_the_trailing_directions_alone_shows_in_their_overlap():
    """Rotating the last K left vectors into the K before them leaves an overlap of cos² in the trailing window."""
    spectrum = torch.linspace(2.0, 1.0, N)
    W0, U, V = with_spectrum(M, N, spectrum)
    angle = torch.tensor(0.6).double()
    turned = U.clone()
    last, before = U[:, -K:], U[:, -2 * K : -K]
    turned[:, -K:] = angle.cos() * last + angle.sin() * before
    turned[:, -2 * K : -K] = angle.cos() * before - angle.sin() * last
    W1 = (turned * spectrum.double()) @ V.T
    values = trailing(trailing_vectors(W0, K), trailing_vectors(W1, K), W1 - W0)
    assert values["trailing_overlap", "left", K, -1] == pytest.approx(float(angle.cos() ** 2))
    assert values["trailing_overlap", "right", K, -1] == pytest.approx(1.0)


def test_coverage_is_the_share_of_the_update_in_the_trailing_core():
    W0, U, V = with_spectrum(M, N, power_law(N))
    inside = U[:, -K:] @ torch.randn(K, K).double() @ V[:, -K:].T
    outside = U[:, :3] @ torch.randn(3, 3).double() @ V[:, :3].T
    update = inside / inside.norm() * 0.6 + outside / outside.norm() * 0.8
    window = trailing_vectors(W0, K)
    assert trailing(window, window, update)["trailing_coverage", "both", K, -1] == pytest.approx(0.36)


def models(layers=6):
    """Updates that lie in the base's trailing directions alone."""
    base, tuned = {}, {}
    for layer in range(layers):
        W0, U, V = with_spectrum(M, N, power_law(N, 0.3), seed=10 * layer)
        step = U[:, -K:] @ orthonormal(K, K, layer) @ V[:, -K:].T
        name = f"encoder.layer.{layer}.dense.weight"
        base[name], tuned[name] = W0.float(), (W0 + 0.05 * step).float()
    return base, tuned


def test_compare_finds_what_moves_only_the_trailing_directions():
    base, tuned = models()
    result = compare(base, [tuned], leading=K, draws=5, trailing=True)
    summary = result.summary()
    assert summary["trailing_coverage"]["value"] > 0.99
    assert summary["trailing_coverage"]["verdict"] == "supported"
    assert summary["coverage"]["value"] < 0.01
    rows = result.table[result.table.metric == "trailing_overlap"]
    assert set(rows.side) == {"left", "right"}
    assert rows["null"].eq("scrambled").all()
    assert "leading and as many trailing" in summary["methods"]


def test_it_is_measured_only_where_it_was_asked_for():
    base, tuned = models(2)
    result = compare(base, [tuned], leading=K, draws=2)
    assert not result.table.metric.str.startswith("trailing").any()
    assert "trailing_stability" not in result.summary()
