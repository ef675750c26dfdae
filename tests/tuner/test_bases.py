"""Which directions each basis gives, and that they are orthonormal, nested and reproducible."""

import pytest
import torch

from spectralbasis.basis import SpectralBasis
from spectralbasis.errors import InputError
from spectralbasis.triplets import matrix_hash
from spectralbasis.tuner.factors import Factors, directions_of
from tests.models import tiny
from tests.tuner.cases import CASES


def directions(basis, W, k, seed=0):
    return directions_of(basis, tolerance=1e-4, seed=seed)("name", W, k, matrix_hash(W))


@pytest.fixture(params=[(12, 20), (20, 12), (9, 9)])
def W(request):
    return torch.randn(request.param)


@pytest.mark.parametrize("basis", ["pretrained", "minor", "random"])
def test_columns_are_orthonormal_and_nested(basis, W):
    wide = directions(basis, W, 6)
    for factor, narrow, size in zip(wide, directions(basis, W, 3), W.shape, strict=True):
        assert factor.shape == (size, 6)
        torch.testing.assert_close(factor.T @ factor, torch.eye(6), atol=1e-5, rtol=0)
        torch.testing.assert_close(factor[:, :3], narrow, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("basis", "chosen"), [("pretrained", slice(0, 3)), ("minor", slice(-1, -4, -1))])
def test_singular_vectors_from_either_end(basis, chosen, W):
    U, V = directions(basis, W, 3)
    S = torch.from_numpy(torch.linalg.svdvals(W).numpy()[chosen].copy())
    torch.testing.assert_close(U.T @ W @ V, torch.diag(S), atol=1e-5, rtol=1e-5)


def test_random_directions_depend_on_the_matrix_and_the_seed_alone(W):
    first = directions("random", W, 4)
    torch.randn(3)
    for again, same in ((directions("random", W, 4), True), (directions("random", W, 4, seed=1), False),
                        (directions("random", W + 1, 4), False)):  # fmt: skip
        assert all(torch.equal(a, b) == same for a, b in zip(first, again, strict=True))


def test_random_directions_are_haar():
    overlaps = []
    for seed in range(200):
        U, V = directions("random", torch.eye(8), 2, seed=seed)
        overlaps.append(torch.stack([U[0, 0] ** 2, V[3, 1] ** 2, (U[:, 0] @ V[:, 0]) ** 2]))
    torch.testing.assert_close(torch.stack(overlaps).mean(0), torch.full((3,), 1 / 8), atol=0.04, rtol=0)


@pytest.mark.parametrize("form", ["diagonal", "core"])
def test_a_probe_moves_with_rotations_and_for_a_core_with_signs(form, W):
    U, V = directions("pretrained", W, 5)
    sign = torch.tensor([1.0, 1.0, -1.0, 1.0, 1.0])
    swap = torch.eye(5)[[1, 0, 2, 3, 4]]

    def moved(U1, V1):
        before, after = (Factors(*pair, "").probe(form, 5) for pair in ((U, V), (U1, V1)))
        return max(abs(a - b) for a, b in zip(before, after, strict=True))

    assert moved(U + 1e-6, V) < 1e-4
    assert moved(U @ swap, V @ swap) > 1e-2
    assert (moved(U * sign, V * sign) > 1e-2) == (form == "core")


def test_probes_do_not_see_that_the_base_is_in_half_precision(W):
    factors = Factors(*directions("pretrained", W, 5), "")
    before = factors.probe("core", 4)
    assert factors.bfloat16().probe("core", 4) == before


def test_probes_are_of_order_one():
    values = []
    for _ in range(200):
        U, V = (torch.linalg.qr(torch.randn(size, 4))[0] for size in (40, 30))
        values.extend(Factors(U, V, "").probe("core", 4))
    assert 0.7 < torch.tensor(values).square().mean().sqrt() < 1.4


class TestFiles:
    @pytest.fixture
    def file(self, tmp_path):
        base = CASES["llama"].base()
        return str(SpectralBasis.compute(base, leading=8).save(tmp_path / "basis.safetensors"))

    def test_a_file_gives_what_is_computed(self, file):
        case = CASES["llama"]
        from_file = case.adapted(basis=file)
        assert torch.equal(case.output(from_file), case.output(case.adapted()))

    def test_the_basis_of_another_checkpoint_is_used_with_a_warning(self, file):
        case = CASES["llama"]
        other = tiny("llama", "causal", initializer_range=0.2)
        another = SpectralBasis.compute(other, leading=8).save(file)
        with pytest.warns(UserWarning, match=r"other weights .* \(layers.0.self_attn.q_proj differs\)") as caught:
            model = case.adapted(basis=str(another))
        assert sum("other weights" in str(warning.message) for warning in caught) == 1
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        expected = SpectralBasis.load(another)["layers.0.self_attn.q_proj"]
        assert torch.equal(layer.factors("default").first(8)[0], expected.U)

    @pytest.mark.parametrize(
        ("case", "settings", "message"),
        [
            ("llama", {"leading": 9}, "has 8 directions for .*, fewer than k=9; pass leading<=8"),
            ("mlp", {"leading": 8}, "has no directions for lin0; leave it out"),
        ],
    )
    def test_a_file_that_does_not_fit(self, case, settings, message, file):
        with pytest.raises(InputError, match=message):
            CASES[case].adapted(basis=file, **settings)

    def test_a_file_of_other_shapes(self, file):
        other = {"layers.0.self_attn.q_proj.weight": torch.randn(5, 9)}
        SpectralBasis.compute(other, leading=5).save(file)
        with pytest.raises(InputError, match=r"q_proj is \(32, 32\) but \(5, 9\) in"):
            CASES["llama"].adapted(basis=file, target_modules=["q_proj"], leading=4)

    def test_a_missing_file(self):
        with pytest.raises(InputError, match=r"no basis file at nowhere\.safetensors"):
            CASES["mlp"].adapted(basis="nowhere.safetensors")
