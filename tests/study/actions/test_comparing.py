"""The action `compare` says what `spectralbasis.compare` says, with numbers in place of folders."""

import pytest
import torch

from spectralbasis import compare as compare_checkpoints
from spectralbasis.study.actions import compare
from spectralbasis.study.runs import Run, Site
from tests.models import tiny


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base and four models whose weights were moved at random."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    base = tiny("bert", num_hidden_layers=1)
    base.save_pretrained(root / "base")
    for number in range(4):
        moved = tiny("bert", num_hidden_layers=1)
        moved.load_state_dict({name: one + 0.02 * torch.randn_like(one) for name, one in base.state_dict().items()})
        moved.save_pretrained(root / f"{number}")
    return root


def run_and_site(folders, tmp_path, count, **settings):
    tasks = ["a", "a", "b", "b"][:count]
    needs = {"model": folders / "base"} | {f"tuned_{number}": folders / str(number) for number in range(count)}
    wanted = Run("compare", {"tasks": tasks, "leading": 4, "draws": 2, **settings}, 3, {})
    return wanted, Site(None, tmp_path, needs)


def test_it_is_the_comparison(folders, tmp_path):
    outcome = compare(*run_and_site(folders, tmp_path, 4))
    tuned = [folders / str(number) for number in range(4)]
    summary = compare_checkpoints(
        folders / "base", tuned, tasks=["a", "a", "b", "b"], leading=4, draws=2, seed=3
    ).summary()
    assert outcome.result["stability"] == summary["stability"]
    assert outcome.result["sharing"]["permutation"] == summary["sharing"]["permutation"]
    pairs = outcome.measurements
    assert pairs[["a", "b"]].to_numpy().tolist() == [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
    assert pairs["task_a"].tolist() == ["a", "a", "a", "a", "a", "b"]
    assert pairs["same_task"].tolist() == [True, False, False, False, False, True]
    assert pairs["value"].tolist() == [pair["value"] for pair in summary["sharing"]["pairs"]]
    expected = [one["stability"]["null_mean"] for one in summary["per_tuned"].values()]
    assert pairs["base_null_b"].tolist() == [expected[number] for number in pairs["b"]]
    assert str(folders) not in str(outcome.result)


def test_one_model_has_no_pairs(folders, tmp_path):
    outcome = compare(*run_and_site(folders, tmp_path, 1))
    assert outcome.measurements is None
    assert set(outcome.result) == {"stability", "coverage"}
