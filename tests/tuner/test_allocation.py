"""From a number, a rule or a budget to one k per matrix."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel

from spectralbasis.errors import InputError
from spectralbasis.kinds import KINDS
from spectralbasis.tuner.preparation import allocate_budget, allocate_leading
from tests.tuner.cases import CASES

SHAPES = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6)


def weights(shapes):
    return {f"layer.{i}": torch.empty(shape) for i, shape in enumerate(shapes)}


@given(SHAPES, st.sampled_from(sorted(KINDS)), st.integers(1, 9), st.floats(0.001, 1))
def test_a_budget_is_kept_and_one_direction_more_would_break_it(shapes, form, size, budget):
    total, W = 4000, weights(shapes)
    spend = {k: sum(KINDS[form].numbers(min(k, *shape), size) for shape in shapes) for k in range(1, 42)}
    allowed = int(budget * total)
    if spend[1] > allowed:
        with pytest.raises(InputError, match="pass budget>="):
            allocate_budget(budget, total, W, {}, form, size)
        return
    best = max(k for k, price in spend.items() if price <= allowed)
    assert allocate_budget(budget, total, W, {}, form, size) == {n: min(best, *w.shape) for n, w in W.items()}


def test_the_budget_that_the_error_names_is_enough():
    W = weights([(8, 8), (4, 9)])
    with pytest.raises(InputError, match=r"is 1 coefficients, but one direction in each of 2 matrices takes 2; pass"):
        allocate_budget(0.001, 1000, W, {}, "core")
    assert allocate_budget(0.002, 1000, W, {}, "core") == {"layer.0": 1, "layer.1": 1}


def test_settled_ranks_are_paid_first():
    W = weights([(8, 8), (8, 8), (8, 8)])
    assert allocate_budget(0.1, 140, W, {"layer.1": 6}, "diagonal") == {"layer.0": 4, "layer.1": 6, "layer.2": 4}


@pytest.mark.parametrize(("leading", "expected"), [(None, [40, 6]), (5, [5, 5]), (0.5, [20, 3])])
def test_numbers_and_fractions(leading, expected):
    found = allocate_leading(leading, weights([(40, 50), (6, 9)]), {})
    assert list(found.values()) == expected


@pytest.mark.parametrize("rule", ["mp", "gd"])
def test_rules_find_planted_directions(rule):
    torch.manual_seed(0)
    noise = torch.randn(200, 150, dtype=torch.float64)
    U, V = (torch.linalg.qr(torch.randn(size, 7, dtype=torch.float64))[0] for size in (200, 150))
    assert allocate_leading(rule, {"a": noise + 100 * U @ V.T}, {}) == {"a": 7}


def test_a_number_that_is_too_large_is_lowered_with_one_warning():
    with pytest.warns(UserWarning, match=r"k=7 exceeds min\(m, n\)=6 of layer.1; min\(m, n\) is taken there") as said:
        assert allocate_leading(7, weights([(40, 50), (6, 9)]), {}) == {"layer.0": 7, "layer.1": 6}
    assert len(said) == 1
    with pytest.warns(UserWarning, match=r"k=9 exceeds min\(m, n\)=6 of layer.0 \(2 matrices are smaller"):
        assert allocate_leading(9, weights([(6, 9), (8, 7)]), {"layer.0": 9}) == {"layer.0": 6, "layer.1": 7}
    with pytest.warns(UserWarning, match=r"k=9 exceeds min\(m, n\)=8 of layer.1"):
        found = allocate_budget(0.2, 140, weights([(8, 8), (8, 8)]), {"layer.1": 9}, "diagonal")
    assert found == {"layer.0": 8, "layer.1": 8}


def test_an_adapter_with_a_lowered_k_is_saved_and_loaded(tmp_path):
    case = CASES["mlp, both layers"]
    with pytest.warns(UserWarning, match=r"k=8 exceeds min\(m, n\)=6 of lin1"):
        model = case.adapted(leading=8)
    assert model.peft_config["default"].ranks == {"lin0": 8, "lin1": 6}
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = PeftModel.from_pretrained(case.base(), tmp_path)
    assert torch.equal(case.output(loaded), case.output(model))


@pytest.mark.parametrize(
    ("coefficients", "trained"),
    [
        ("diagonal", 10 + 6),
        ("core", 10**2 + 6**2),
        ("band", 28 + 16),
        ("block", 8**2 + 2**2 + 6**2),
        ("rotation", 10 + 28 + 1 + 6 + 15),
    ],
)
def test_a_model_reports_what_it_trains(coefficients, trained):
    model = CASES["mlp, both layers"].adapted(coefficients=coefficients)
    model.add_adapter("other", CASES["mlp"].settings(leading=2))
    total = sum(p.numel() for p in CASES["mlp"].base().parameters())
    found = model.base_model.allocation()
    assert (found.ranks, found.trained, found.total) == ({"lin0": 10, "lin1": 6}, trained, total)
    assert found.share == trained / total
    assert model.base_model.allocation("other").trained == 2


def test_a_retrained_head_is_not_counted_twice():
    model = CASES["mlp, head"].adapted()
    assert model.base_model.allocation().total == sum(p.numel() for p in CASES["mlp, head"].base().parameters())


def test_a_budget_chooses_the_same_k_for_a_second_adapter():
    case = CASES["mlp, budget"]
    model = case.adapted()
    model.add_adapter("other", case.settings())
    assert model.peft_config["other"].ranks == model.peft_config["default"].ranks


def test_rank_pattern_matches_ends_of_module_names():
    model = CASES["deep mlp"].adapted(leading=5, rank_pattern={"0.lin1": 2, "1.*": 3})
    assert model.peft_config["default"].ranks == {
        "layers.0.lin0": 5, "layers.0.lin1": 2, "layers.1.lin0": 3, "layers.1.lin1": 3,
    }  # fmt: skip
