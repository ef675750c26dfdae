"""The curvature basis against eigenvectors of densely computed covariances, and its file as the basis of an adapter."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from spectralbasis.basis import SpectralBasis
from spectralbasis.errors import InputError
from spectralbasis.triplets import matrix_hash
from spectralbasis.tuner.calibration import curvature_basis
from tests.tuner.cases import CASES
from tests.tuner.test_sparse import batches

BERT = CASES["bert"]
NAME = "encoder.layer.0.intermediate.dense"


def dense_covariances(base, name):
    """Σ g gᵀ and Σ x xᵀ over tokens, where g is the gradient of the summed loss, by autograd on kept activations."""
    layer, left, right = base.bert.get_submodule(name), 0, 0
    for batch in batches():
        kept = {}
        handle = layer.register_forward_hook(lambda module, args, output, kept=kept: kept.update(x=args[0], y=output))
        loss = base(**batch).loss * len(batch["labels"])
        g = torch.autograd.grad(loss, kept["y"])[0].flatten(0, 1).double()
        handle.remove()
        x = kept["x"].detach().flatten(0, 1).double()[g.abs().sum(1) > 0]
        left, right = left + g.T @ g, right + x.T @ x
    return left, right


@pytest.fixture(scope="module")
def basis():
    return curvature_basis(BERT.base(), batches(), 4, target_modules=["query", "dense"])


def test_directions_are_the_leading_eigenvectors(basis):
    left, right = dense_covariances(BERT.base().requires_grad_(True), NAME)
    for covariance, found in ((left, basis[NAME].U), (right, basis[NAME].Vh.T)):
        values, vectors = torch.linalg.eigh(covariance)
        expected = vectors.flip(1)[:, :4]
        assert (values.diff().flip(0)[:4] > 1e-3 * values[-1]).all(), "the test needs eigenvalues that are apart"
        torch.testing.assert_close(
            (expected * found).sum(0).abs(), torch.ones(4, dtype=torch.float64), atol=1e-4, rtol=0
        )


def test_columns_are_orthonormal_even_where_few_tokens_are_reached(basis):
    for triplets in basis.values():
        for factor in (triplets.U, triplets.Vh.T):
            torch.testing.assert_close(factor.T @ factor, torch.eye(triplets.k), atol=1e-5, rtol=0)


def test_what_a_pair_says_of_the_weight(basis):
    base = BERT.base().bert
    for name, triplets in basis.items():
        W = base.get_submodule(name).weight.detach()
        torch.testing.assert_close((triplets.U.T @ W @ triplets.Vh.T).diagonal(), triplets.S, atol=1e-5, rtol=1e-4)
        assert (triplets.S >= 0).all()
        assert triplets.base_hash == matrix_hash(W)
        largest = triplets.U.gather(0, triplets.U.abs().argmax(0, keepdim=True))
        assert (largest > 0).all()
        assert triplets.subspace_error_bound == triplets.leading(2).subspace_error_bound == 1


def test_the_file_says_what_it_is_and_is_a_basis(basis, tmp_path):
    file = basis.save(tmp_path / "curvature.safetensors")
    loaded = SpectralBasis.load(file)
    assert (loaded.kind, loaded.leading) == ("curvature", 4)
    assert all(torch.equal(loaded[name].U, basis[name].U) for name in basis)
    settings = BERT.settings(basis=str(file), target_modules=["query"], leading=3, scaling="absolute")
    model = get_peft_model(BERT.base(), settings).eval()
    layer = model.base_model.model.bert.encoder.layer[0].attention.self.query
    name = "encoder.layer.0.attention.self.query"
    C = layer.stored("default").detach()
    expected = basis[name].U[:, :3] @ torch.diag(C) @ basis[name].Vh[:3]
    torch.testing.assert_close(layer.get_delta_weight("default"), expected)


def test_another_base_is_told(basis, tmp_path):
    file = basis.save(tmp_path / "curvature.safetensors")
    other = BERT.base()
    with torch.no_grad():
        other.bert.encoder.layer[0].attention.self.query.weight[0, 0] += 1e-3
    with pytest.warns(UserWarning, match="computed from other weights"):
        get_peft_model(other, BERT.settings(basis=str(file), target_modules=["query"], leading=3))


def test_a_planted_gradient_is_found():
    """Where every input is along v and every gradient along u, the first pair is (u, v), in whatever batches."""
    layer = nn.Sequential(nn.Linear(6, 5, bias=False))
    v, u = nn.functional.normalize(torch.randn(6), dim=0), nn.functional.normalize(torch.randn(5), dim=0)
    found = curvature_basis(
        layer,
        [{"input": torch.randn(rows, 1) * v} for rows in (4, 7, 1)],
        2,
        loss=lambda model, batch: (model(batch["input"]) @ u).pow(3).mean(),
    )["0"]
    torch.testing.assert_close(
        torch.outer(found.U[:, 0], found.Vh[0]).abs(), torch.outer(u, v).abs(), atol=1e-4, rtol=1e-3
    )


def test_a_target_without_gradient_is_skipped_with_the_reason():
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    found = curvature_basis(
        Beside(), [{"x": torch.randn(8, 4)}], 2, loss=lambda model, batch: model(**batch).pow(2).mean()
    )
    assert (set(found), found.skipped) == ({"used"}, {"unused": "no gradient of the loss reaches it"})


def test_a_model_in_bfloat16():
    base = BERT.base()
    wide = curvature_basis(base, batches(), 1, target_modules=["query"])
    half = curvature_basis(BERT.base().bfloat16(), batches(), 1, target_modules=["query"])
    for name in wide:
        assert abs(float(wide[name].Vh[0] @ half[name].Vh[0])) > 0.98


def test_not_finite():
    with pytest.raises(InputError, match=r"no matrix gets a usable gradient; .*NaN or infinite"):
        curvature_basis(BERT.base(), batches(), 2, target_modules=["query"],
                        loss=lambda model, batch: model(**batch).loss * float("nan"))  # fmt: skip


def test_embeddings_are_no_linear_layers():
    with pytest.raises(InputError, match="word_embeddings"):
        curvature_basis(BERT.base(), batches(), 2, target_modules=["word_embeddings"])
