"""From stored numbers to C: which entries they are and in which unit, as a linear map with an exact inverse."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from spectralbasis.errors import InputError
from spectralbasis.kinds import COEFFICIENTS, KINDS
from spectralbasis.tuner.autograd import FactoredUpdate
from spectralbasis.tuner.forms import pack_positions, parametrisation, unpack_positions

K = 5
SIGMA = [4.0, 2.0, 1.0, 0.5, 0.25]
POSITIONS = torch.tensor([0, 3, 7, 12, 24])


def make(coefficients, **options):
    positions = POSITIONS if coefficients == "sparse" else None
    values = SIGMA if coefficients == "rotation" else None
    size = 1 if coefficients == "band" else 2
    return parametrisation(coefficients, K, size=size, positions=positions, values=values, **options)


def dense(parametrised, stored):
    C = parametrised(stored)
    return C if C.shape[-1] == C.shape[-2:][0] and C.ndim > 1 else torch.diag(C)


@pytest.fixture(params=COEFFICIENTS)
def coefficients(request):
    return request.param


@pytest.fixture(params=[name for name in COEFFICIENTS if KINDS[name].linear])
def linear(request):
    return request.param


@given(st.integers(1, 12), st.integers(0, 14))
def test_a_band_holds_the_entries_near_the_diagonal_and_no_others(k, bandwidth):
    parametrised = parametrisation("band", k, size=bandwidth)
    C = parametrised(torch.ones(parametrised.shape))
    expected = torch.ones(k, k).tril(bandwidth).triu(-bandwidth)
    assert torch.equal(C, expected)
    assert parametrised.shape == (int(expected.sum()),) == (KINDS["band"].numbers(k, bandwidth),)


def test_sparse_numbers_go_to_their_entries():
    C = make("sparse")(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    expected = torch.zeros(K, K)
    for value, (i, j) in enumerate([(0, 0), (0, 3), (1, 2), (2, 2), (4, 4)], start=1):
        expected[i, j] = value
    assert torch.equal(C, expected)


def test_units(linear):
    absolute, normalized, relative = (make(linear, scales=scales) for scales in (None, [3.0], SIGMA))
    stored = torch.randn(absolute.shape)
    torch.testing.assert_close(normalized(stored), 3 * absolute(stored))
    roots = torch.tensor(SIGMA).sqrt()
    expected = roots[:, None] * dense(absolute, stored) * roots
    torch.testing.assert_close(dense(relative, stored), expected)


@pytest.mark.parametrize("scales", [None, [3.0], SIGMA])
def test_the_inverse_undoes_it(linear, scales):
    parametrised = make(linear, scales=scales)
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


@given(st.integers(1, 12), st.integers(1, 14))
def test_a_block_is_a_core_that_is_zero_outside_of_its_blocks(k, size):
    parametrised = parametrisation("block", k, size=size)
    stored = torch.arange(1.0, parametrised.shape[0] + 1)
    mask = np.kron(np.eye(-(-k // size)), np.ones((size, size)))[:k, :k]
    expected = np.zeros((k, k), np.float32)
    expected[mask == 1] = stored
    assert np.array_equal(parametrised(stored).numpy(), expected)
    assert parametrised.shape == (int(mask.sum()),) == (KINDS["block"].numbers(k, size),)


def rotated(stored, sigma, size, scale=None):
    """C of a rotation, and R, by NumPy's inverse, block by block."""
    k, R = len(sigma), np.eye(len(sigma))
    c, angles = np.array(stored[:k], float), list(stored[k:])
    for start in range(0, k, size):
        stop = min(start + size, k)
        A = np.zeros((stop - start, stop - start))
        for i in range(stop - start):
            for j in range(i + 1, stop - start):
                pair = np.hypot(sigma[start + i], sigma[start + j]) / 2**0.5
                angle = angles.pop(0) * (1 if scale is None else scale / max(1, pair))
                A[i, j], A[j, i] = angle, -angle
        identity = np.eye(stop - start)
        R[start:stop, start:stop] = np.linalg.inv(identity - A / 2) @ (identity + A / 2)
    assert not angles
    return (np.diag(sigma) + np.diag(c * (1 if scale is None else scale))) @ R - np.diag(sigma), R


@given(st.integers(1, 11), st.integers(1, 13), st.sampled_from([None, 0.5]), st.integers(0, 99))
def test_a_rotation_is_that_of_an_independent_computation(k, size, scale, seed):
    draws = np.random.default_rng(seed)
    sigma = (10 ** draws.uniform(-2, 1, k)).round(4).tolist()
    parametrised = parametrisation("rotation", k, size=size, values=sigma, scales=scale and [scale])
    assert parametrised.shape == (KINDS["rotation"].numbers(k, size),)
    stored = draws.standard_normal(parametrised.shape)
    expected, R = rotated(stored, np.float32(sigma).astype(float), size, scale and float(np.float32(scale)))
    C = parametrised(torch.from_numpy(stored))
    np.testing.assert_allclose(C, expected, atol=1e-6 * max(1, *sigma))
    np.testing.assert_allclose(R @ R.T, np.eye(k), atol=1e-12)
    assert np.count_nonzero(np.abs(expected) + np.eye(k)) <= KINDS["rotation"].entries(k, size)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_rotation_is_orthogonal_and_begins_at_exactly_zero(dtype):
    parametrised = parametrisation("rotation", 13, size=8, values=[1e3] + 11 * [1.0] + [0.0]).to(dtype)
    assert not parametrised(torch.zeros(parametrised.shape, dtype=dtype)).any()
    angles = 3 * torch.randn(parametrised.shape[0] - 13).to(dtype)
    R = parametrised.rotation(angles.to(torch.promote_types(dtype, torch.float32))) + torch.eye(8)
    assert float((R @ R.mT - torch.eye(8)).abs().max()) < 1e-6
    assert parametrised(torch.ones(parametrised.shape, dtype=dtype)).dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("scales", [None, [0.25], SIGMA])
def test_units_of_a_rotation(scales):
    """A small number c moves its σ by its unit; a small angle moves C by as much, or by radians times σ."""
    parametrised = make("rotation", scales=scales)
    sigma, small = torch.tensor(SIGMA), 1e-3
    moved = torch.stack([parametrised(small * row) / small for row in torch.eye(parametrised.shape[0])])
    units = torch.ones(K) if scales is None else torch.tensor(scales).expand(K)
    torch.testing.assert_close(moved[:K].diagonal(dim1=1, dim2=2).diagonal(), units, rtol=1e-3, atol=0)
    pairs = sigma[[0, 2]].square() + sigma[[1, 3]].square()
    expected = 0.25 * (2 / pairs.clamp(min=2)).sqrt() * pairs.sqrt() if scales == [0.25] else pairs.sqrt()
    torch.testing.assert_close(moved[K:].flatten(1).norm(dim=1), expected, rtol=1e-3, atol=0)


def test_a_rotation_has_no_inverse():
    with pytest.raises(InputError, match="store it as a core"):
        make("rotation").inverse(torch.eye(K))


def test_gradients_of_a_rotation_twice():
    parametrised = make("rotation", scales=[0.5])
    stored = torch.randn(parametrised.shape, dtype=torch.float64, requires_grad=True)
    assert gradcheck(parametrised, (stored,))
    assert gradgradcheck(parametrised, (stored,))
    hessian = torch.func.hessian(lambda x: parametrised(x).square().sum())(stored.detach())
    torch.testing.assert_close(hessian, hessian.T)
    assert hessian.any()
