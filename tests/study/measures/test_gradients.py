"""Shares and signal of gradients are those that were planted."""

import math

import pytest
import torch
from torch import Tensor

from spectralbasis.study.directions import GradientNoise, shares

M, N, K = 12, 9, 3
GENERATOR = torch.Generator().manual_seed(0)


def haar(size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, K, generator=GENERATOR, dtype=torch.float64)).Q


U, V = haar(M), haar(N)
DIRECTIONS = {"a": (U, V), "b": (U, V)}


def inside(C: Tensor) -> Tensor:
    return U @ C @ V.T


def outside() -> Tensor:
    """A matrix without any part in the core."""
    W = torch.randn(M, N, generator=GENERATOR, dtype=torch.float64)
    return W - U @ U.T @ W @ V @ V.T


def test_shares_are_those_of_all_matrices_together():
    C = torch.diag(torch.tensor([3.0, 0.0, 4.0], dtype=torch.float64))
    C[0, 1] = 12.0
    rest = outside()
    found = shares({"a": inside(C), "b": rest}, DIRECTIONS, K)
    total = 25 + 144 + float(rest.square().sum())
    assert found == pytest.approx({"core": 169 / total, "diagonal": 25 / total})
    fewer = shares({"a": inside(C), "b": rest}, DIRECTIONS, 2)
    assert fewer == pytest.approx({"core": 153 / total, "diagonal": 9 / total})


def test_nothing_has_no_share():
    assert math.isnan(shares({"a": torch.zeros(M, N, dtype=torch.float64)}, DIRECTIONS, K)["core"])
    assert math.isnan(GradientNoise(DIRECTIONS).shares(K)["core"])
    assert math.isnan(GradientNoise(DIRECTIONS).signal(K)["core"])


def test_examples_that_agree_are_all_signal():
    meter = GradientNoise(DIRECTIONS)
    C = torch.randn(K, K, generator=GENERATOR, dtype=torch.float64)
    for _ in range(4):
        meter.add({"a": inside(C)})
    assert meter.signal(K) == pytest.approx({"core": 1.0, "diagonal": 1.0})
    assert meter.shares(K)["core"] == pytest.approx(1.0)


def test_the_signal_is_the_same_however_large_gradients_are_and_noise_adds_none():
    mean = torch.full((K, K), 0.5, dtype=torch.float64)
    sizes = torch.logspace(-2, 2, K, dtype=torch.float64)[:, None]
    small, pure = GradientNoise(DIRECTIONS), GradientNoise(DIRECTIONS)
    for _ in range(4000):
        draw = torch.randn(K, K, generator=GENERATOR, dtype=torch.float64)
        small.add({"a": inside(sizes * (mean + draw)) + outside()})
        pure.add({"a": inside(draw)})
    assert small.signal(K)["core"] == pytest.approx(0.25 / 1.25, abs=0.02)  # E[g]² / (E[g]² + variance)
    assert pure.signal(K)["core"] == pytest.approx(0.0, abs=2e-3)
    assert small.signal(K)["diagonal"] == pytest.approx(0.25 / 1.25, abs=0.03)


def test_the_share_of_single_examples_counts_what_the_mean_loses():
    meter = GradientNoise(DIRECTIONS)
    C = torch.eye(K, dtype=torch.float64)
    rest = outside()
    for sign in (1, -1):
        meter.add({"a": sign * inside(C) + rest})
    assert meter.shares(K)["core"] == pytest.approx(K / (K + float(rest.square().sum())))
