"""Rules for where a spectrum stops leading, against published constants and simulated noise."""

import math

import pytest
import torch

from spectralbasis.errors import InputError
from spectralbasis.linalg import (
    gavish_donoho_threshold,
    marchenko_pastur_edge,
    parse_leading,
    resolve_leading,
    singular_values,
)
from spectralbasis.linalg.thresholds import marchenko_pastur_median


@pytest.mark.parametrize(("beta", "omega"), [(0.05, 1.5194), (0.5, 2.1711), (1.0, 2.8582)])
def test_gavish_donoho_reproduces_the_published_table(beta, omega):
    """Table IV of arXiv 1305.5870."""
    n = 1000
    threshold = gavish_donoho_threshold(torch.full((5,), 1.0), (round(beta * n), n))
    assert threshold == pytest.approx(omega, abs=1e-3)


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0])
def test_the_median_of_the_law_is_that_of_simulated_noise(beta):
    noise = torch.randn(round(beta * 800), 800)
    eigenvalues = singular_values(noise).square() / 800
    assert float(eigenvalues.quantile(0.5)) == pytest.approx(marchenko_pastur_median(beta), rel=0.03)


@pytest.mark.parametrize("shape", [(300, 300), (150, 600)])
@pytest.mark.parametrize("rank", [3, 10])
def test_planted_directions_are_counted(shape, rank):
    noise = torch.randn(*shape)
    strong = 4 * (math.sqrt(shape[0]) + math.sqrt(shape[1]))
    U = torch.linalg.qr(torch.randn(shape[0], rank))[0]
    V = torch.linalg.qr(torch.randn(shape[1], rank))[0]
    W = noise + strong * U @ V.T
    assert resolve_leading("gd", W) == rank
    assert rank <= resolve_leading("mp", W) <= rank + 1


def test_the_edge_of_a_known_scale_is_exact():
    assert marchenko_pastur_edge(torch.ones(4), (4, 9), scale=2.0) == pytest.approx(2 * (2 + 3))


@pytest.mark.parametrize(
    ("given", "value"), [("64", 64), (" 0.1 ", 0.1), ("MP", "mp"), ("gd", "gd"), (8, 8), (0.5, 0.5)]
)
def test_settings_are_read_as_typed(given, value):
    assert parse_leading(given) == value


@pytest.mark.parametrize("given", ["", "many", "0", "-3", "1.5", 0, -1, 1.0, True, "nan"])
def test_what_names_no_number_of_directions_is_refused(given):
    with pytest.raises(InputError, match="pass a whole number"):
        parse_leading(given)


def test_counts_and_fractions_resolve_against_the_shorter_side():
    W = torch.randn(40, 20)
    assert resolve_leading(20, W) == 20
    assert resolve_leading(0.25, W) == 5
    assert resolve_leading(0.001, W) == 1
    assert resolve_leading(21, W) == 20
    assert resolve_leading("auto", W) == 10
    assert resolve_leading("auto", torch.empty(300, 129)) == 64
    assert resolve_leading("auto", torch.empty(1, 7)) == 1
