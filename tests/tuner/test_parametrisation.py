"""From stored numbers to C: which entries they are and in which unit, as a linear map with an exact inverse."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from spectralbasis.errors import InputError
from spectralbasis.tuner.autograd import FactoredUpdate
from spectralbasis.tuner.factors import COEFFICIENTS, numbers, pack_positions, parametrisation, unpack_positions

K = 5
SIGMA = [4.0, 2.0, 1.0, 0.5, 0.25]
POSITIONS = torch.tensor([0, 3, 7, 12, 24])


def make(coefficients, **options):
    return parametrisation(coefficients, K, positions=POSITIONS if coefficients == "sparse" else None, **options)


def dense(parametrised, stored):
    C = parametrised(stored)
    return C if C.shape[-1] == C.shape[-2:][0] and C.ndim > 1 else torch.diag(C)


@pytest.fixture(params=COEFFICIENTS)
def coefficients(request):
    return request.param


@given(st.integers(1, 12), st.integers(0, 14))
def test_a_band_holds_the_entries_near_the_diagonal_and_no_others(k, bandwidth):
    parametrised = parametrisation("band", k, bandwidth=bandwidth)
    C = parametrised(torch.ones(parametrised.shape))
    expected = torch.ones(k, k).tril(bandwidth).triu(-bandwidth)
    assert torch.equal(C, expected)
    assert parametrised.shape == (int(expected.sum()),) == (numbers("band", k, bandwidth),)


def test_sparse_numbers_go_to_their_entries():
    C = make("sparse")(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    expected = torch.zeros(K, K)
    for value, (i, j) in enumerate([(0, 0), (0, 3), (1, 2), (2, 2), (4, 4)], start=1):
        expected[i, j] = value
    assert torch.equal(C, expected)


def test_units(coefficients):
    absolute, normalized, relative = (make(coefficients, scales=scales) for scales in (None, [3.0], SIGMA))
    stored = torch.randn(absolute.shape)
    torch.testing.assert_close(normalized(stored), 3 * absolute(stored))
    roots = torch.tensor(SIGMA).sqrt()
    expected = roots[:, None] * dense(absolute, stored) * roots
    torch.testing.assert_close(dense(relative, stored), expected)


@pytest.mark.parametrize("scales", [None, [3.0], SIGMA])
def test_the_inverse_undoes_it(coefficients, scales):
    parametrised = make(coefficients, scales=scales)
    stored = torch.randn(parametrised.shape)
    found = parametrised.inverse(parametrised(stored))
    torch.testing.assert_close(found, stored)
    if scales is None:
        assert torch.equal(found, stored)


def test_a_unit_of_zero_has_no_inverse_and_gives_zero():
    parametrised = make("diagonal", scales=[1.0, 1.0, 0.0, 1.0, 1.0])
    assert parametrised.inverse(torch.ones(K)).tolist() == [1, 1, 0, 1, 1]


def test_leading_dimensions_are_batches(coefficients):
    parametrised = make(coefficients, scales=SIGMA)
    stored = torch.randn(3, 2, *parametrised.shape)
    expected = torch.stack([torch.stack([parametrised(one) for one in row]) for row in stored])
    assert torch.equal(parametrised(stored), expected)
    assert torch.equal(torch.func.vmap(torch.func.vmap(parametrised))(stored), expected)


@pytest.mark.parametrize("scales", [None, [3.0], SIGMA])
def test_gradients_reach_the_stored_numbers(coefficients, scales):
    parametrised = make(coefficients, scales=scales)
    stored = torch.randn(parametrised.shape, dtype=torch.float64, requires_grad=True)
    x, base = torch.randn(4, 7, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    U, V = (torch.linalg.qr(torch.randn(size, K, dtype=torch.float64))[0] for size in (6, 7))

    def output(stored):
        return FactoredUpdate.apply(base, x, parametrised(stored), torch.cat((U, V)), parametrised.form)[0]

    expected = base + x @ (U @ dense(parametrised, stored) @ V.T).T
    torch.testing.assert_close(output(stored), expected)
    weights = torch.randn_like(expected)
    found, wanted = (torch.autograd.grad((y * weights).sum(), stored)[0] for y in (output(stored), expected))
    torch.testing.assert_close(found, wanted)
    assert gradcheck(output, (stored,))


def test_a_half_precision_model_keeps_units_as_files_have_them():
    parametrised = make("core", scales=[1.2345678, 1.0, 1.0, 1.0, 1.0])
    exact = parametrised.unit.clone()
    assert torch.equal(copy.deepcopy(parametrised).bfloat16().unit, exact)
    assert torch.equal(parametrised.half().unit, exact)
    assert parametrised.to(torch.float64).positions is None


def test_positions_keep_their_type():
    assert make("band").half().positions.dtype == torch.int64


@given(st.integers(1, 30).flatmap(lambda k: st.tuples(st.just(k), st.sets(st.integers(0, k * k - 1), min_size=1))))
def test_packed_positions_are_read_as_they_were(drawn):
    k, chosen = drawn
    positions = torch.tensor(sorted(chosen))
    assert torch.equal(unpack_positions(pack_positions(positions), k), positions)


def test_packed_positions_are_gaps():
    assert pack_positions(torch.tensor([3, 4, 20])) == "3 1 16"


@pytest.mark.parametrize("text", ["", "1 x", "-1", "0 0", "24 1", "1.5", "²", "9" * 30, None, 3])
def test_damaged_positions_are_refused(text):
    with pytest.raises(InputError, match=r"restore adapter_config\.json"):
        unpack_positions(text, K)
