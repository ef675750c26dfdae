"""The updates of other tasks as a null, beside NumPy."""

import numpy as np
import pytest
import torch

from spectralbasis.errors import InputError
from spectralbasis.study.exchange import OTHER_TASKS, exchange, exchanged
from spectralbasis.study.runs import Run, Site
from tests.models import tiny

K = 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base and three models, of tasks a, a and b, whose weights were moved at random by different amounts."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    base = tiny("bert", num_hidden_layers=1)
    base.save_pretrained(root / "base")
    for number, size in enumerate((0.01, 0.02, 0.05)):
        moved = tiny("bert", num_hidden_layers=1)
        moved.load_state_dict({name: one + size * torch.randn_like(one) for name, one in base.state_dict().items()})
        moved.save_pretrained(root / f"{number}")
    return root


def action(folders, tmp_path, tasks):
    needs = {"model": folders / "base"} | {f"tuned_{number}": folders / str(number) for number in range(len(tasks))}
    return exchange(Run("exchange", {"tasks": tasks, "leading": K}), Site(None, tmp_path, needs))


def overlaps(W0, W1):
    (U0, _, V0), (U1, _, V1) = (np.linalg.svd(W, full_matrices=False) for W in (W0, W1))
    return {
        "left": ((U0[:, :K].T @ U1[:, :K]) ** 2).sum() / K, "right": ((V0[:K] @ V1[:K].T) ** 2).sum() / K,
    }  # fmt: skip


def test_the_null_is_the_other_tasks_update_at_the_norm_of_its_own():
    generator = np.random.default_rng(0)
    W0 = generator.standard_normal((14, 10)) @ np.diag(np.arange(10, 0, -1.0))
    updates = [size * generator.standard_normal((14, 10)) for size in (0.5, 1.0, 3.0)]
    tensors = [torch.from_numpy(one).float() for one in updates]
    found = list(exchanged(torch.from_numpy(W0).float(), tensors, ["a", "a", "b"], K))
    assert [(number, side) for number, side, *_ in found] == [(n, s) for n in range(3) for s in ("left", "right")]
    for number, side, value, mean, std in found:
        others = [2] if number < 2 else [0, 1]
        size = np.linalg.norm(updates[number])
        chance = [overlaps(W0, W0 + updates[b] * size / np.linalg.norm(updates[b]))[side] for b in others]
        assert value == pytest.approx(overlaps(W0, W0 + updates[number])[side], abs=1e-5)
        assert mean == pytest.approx(np.mean(chance), abs=1e-5)
        assert np.isnan(std) if number < 2 else std == pytest.approx(np.std(chance, ddof=1), abs=1e-5)


def test_matrices_that_did_not_change_take_no_part():
    W0 = torch.randn(9, 8, generator=torch.Generator().manual_seed(0))
    nothing, update = torch.zeros(9, 8), 0.1 * torch.randn(9, 8, generator=torch.Generator().manual_seed(1))
    assert not list(exchanged(W0, [nothing, update], ["a", "b"], K))
    found = list(exchanged(W0, [nothing, update, 2 * update], ["a", "b", "c"], K))
    assert {number for number, *_ in found} == {1, 2}
    assert found[0][2] == pytest.approx(found[0][3], abs=1e-5), "the same update at the same size"


def test_the_action_measures_every_matrix_of_every_model(folders, tmp_path):
    outcome = action(folders, tmp_path, ["a", "a", "b"])
    table = outcome.measurements
    assert set(table["null"]) == {OTHER_TASKS}
    assert len(table) == 3 * 2 * outcome.result["matrices"]
    assert table.groupby("tuned")["task"].first().tolist() == ["a", "a", "b"]
    assert table["null_mean"].between(0, 1).all()


def test_one_task_has_no_other(folders, tmp_path):
    with pytest.raises(InputError, match="are one task"):
        action(folders, tmp_path, ["a", "a"])
