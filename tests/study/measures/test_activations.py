"""CKA, SVCCA and probes: what they are blind to, planted truths, and a reference by kernels."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import ViTConfig, ViTModel

from spectralbasis.study.probes import layer_activations, linear_cka, linear_probe, svcca
from tests.models import tiny

N = 200


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def rotation(seed, size):
    return np.linalg.qr(draw(seed, size, size))[0]


@given(st.integers(0, 10_000))
def test_what_cka_is_blind_to(seed):
    X, Y = draw(seed, 30, 5), draw(seed + 1, 30, 7)
    same = linear_cka(X, Y)
    assert 0 <= same <= 1
    assert linear_cka(Y, X) == pytest.approx(same)
    assert linear_cka(3 * X @ rotation(seed, 5) + draw(seed + 2, 5), Y) == pytest.approx(same)
    assert linear_cka(X, X @ rotation(seed, 5)) == pytest.approx(1)


def test_cka_by_kernels():
    """HSIC of centred Gram matrices, as Kornblith et al. define it."""
    X, Y = draw(0, N, 6), draw(1, N, 4)
    Y[:, 0] += X[:, 0]
    H = np.eye(N) - 1 / N
    K, L = H @ X @ X.T @ H, H @ Y @ Y.T @ H
    reference = np.trace(K @ L) / math.sqrt(np.trace(K @ K) * np.trace(L @ L))
    assert linear_cka(X, Y) == pytest.approx(reference)


def test_cka_sees_the_scale_of_a_direction_and_chance():
    X = draw(0, 5000, 2)
    assert linear_cka(X, X * [1, 0]) == pytest.approx(1 / math.sqrt(2), abs=0.02)
    assert linear_cka(draw(1, 5000, 10), draw(2, 5000, 10)) == pytest.approx(10 / 5000, rel=0.5)
    assert math.isnan(linear_cka(X, np.ones((5000, 3))))


def test_svcca_is_blind_to_invertible_maps():
    X = draw(0, N, 6)
    assert svcca(X, X @ draw(1, 6, 6) + 5, variance=1.0) == pytest.approx(1)


def test_svcca_of_half_shared_directions():
    """Two of four directions are the same: correlations 1, 1 and chance, which is small for so many examples."""
    X, Y = draw(0, 20_000, 4), draw(1, 20_000, 4)
    Y[:, :2] = X[:, :2]
    assert svcca(X, Y @ rotation(2, 4)) == pytest.approx(0.5, abs=0.02)


def test_svcca_drops_directions_without_variance():
    X = draw(0, N, 3)
    noisy = np.concatenate([X, 1e-3 * draw(1, N, 20)], 1)
    assert svcca(X, noisy) == pytest.approx(1, abs=1e-3)
    assert svcca(X, noisy, variance=1.0) == pytest.approx(1, abs=1e-3)
    assert math.isnan(svcca(X, np.zeros((N, 2))))


def test_probes_read_what_is_linear():
    X, weights = draw(0, 2 * N, 8), draw(1, 8)
    labels, numbers = X @ weights > 0, X @ weights
    parts = lambda y: ((X[:N], y[:N]), (X[N:], y[N:]))  # noqa: E731
    assert linear_probe(*parts(labels), regression=False) > 0.9
    assert linear_probe(*parts(numbers), regression=True) > 0.99
    assert linear_probe(*parts(draw(2, 2 * N) > 0), regression=False) == pytest.approx(0.5, abs=0.12)


def collate(rows):
    longest = max(len(row["ids"]) for row in rows)
    padded = [row["ids"] + [0] * (longest - len(row["ids"])) for row in rows]
    mask = [[1] * len(row["ids"]) + [0] * (longest - len(row["ids"])) for row in rows]
    return {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask), "labels": torch.zeros(len(rows))}


def test_padding_does_not_count():
    model = tiny("bert")
    short, long = {"ids": [1, 2, 3]}, {"ids": [4, 5, 6, 7, 8, 9]}
    layers = layer_activations(model, [short, long], collate)
    alone = layer_activations(model, [short], collate)
    assert len(layers) == 3
    for both, one in zip(layers, alone, strict=True):
        assert both.shape == (2, 32)
        assert both[0] == pytest.approx(one[0], abs=1e-5)
    with torch.no_grad():
        state = model(torch.tensor([[1, 2, 3]])).last_hidden_state
    assert alone[-1][0] == pytest.approx(state.mean(1)[0].numpy(), abs=1e-5)


def test_images_are_averaged_over_patches():
    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=16, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=16,
    )  # fmt: skip
    layers = layer_activations(
        ViTModel(config), [{}] * 3, lambda rows: {"pixel_values": torch.rand(len(rows), 1, 8, 8)}
    )
    assert [layer.shape for layer in layers] == [(3, 16)] * 2
