"""What holds for every matrix, rank and kind of coefficients."""

import copy
from dataclasses import replace

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn

from spectralbasis.basis import SpectralBasis
from spectralbasis.triplets import compute_triplets, matrix_hash
from spectralbasis.tuner import SpectralConfig

QUICK = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


KINDS = ("diagonal", "core", "band", "block", "rotation")


@st.composite
def problems(draw, coefficients=KINDS, dtypes=(torch.float32, torch.bfloat16, torch.float16)):
    """A linear layer, a config for it, and an input."""
    n, m = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    layer = nn.Linear(n, m, bias=draw(st.booleans()))
    layer.weight.data *= draw(st.sampled_from([1e-3, 1.0, 100.0]))
    kind = draw(st.sampled_from(coefficients))
    bases = ["pretrained", "minor"] if kind == "rotation" else ["pretrained", "random", "minor"]
    config = SpectralConfig(
        target_modules=["0"],
        coefficients=kind,
        block_size=draw(st.integers(1, 9)),
        scaling=draw(st.sampled_from(["absolute", "relative", "normalized"])),
        basis=draw(st.sampled_from(bases)),
        leading=draw(st.integers(1, min(m, n))),
        init_weights=draw(st.booleans()),
    )
    dtype = draw(st.sampled_from(dtypes))
    return nn.Sequential(layer).to(dtype), config, torch.randn(draw(st.integers(1, 30)), n, dtype=dtype)


@QUICK
@given(problems())
def test_the_start_is_the_base(problem):
    base, config, x = problem
    expected = base(x)
    assert torch.equal(get_peft_model(base, replace(config, init_weights=True))(x), expected)


@QUICK
@given(problems())
def test_merge_and_unmerge_leave_no_trace(problem):
    base, config, x = problem
    model = get_peft_model(base, config).eval()
    before, weight = model(x), matrix_hash(base[0].weight)
    model.merge_adapter()
    model.unmerge_adapter()
    assert matrix_hash(model.base_model.model[0].weight) == weight
    assert torch.equal(model(x), before)


@QUICK
@given(problems(dtypes=[torch.float32]))
def test_merged_and_unmerged_agree(problem):
    base, config, x = problem
    model = get_peft_model(base, config).eval()
    before = model(x)
    size = base(x).abs().max() + before.abs().max() + 1
    model.merge_adapter()
    assert (model(x) - before).abs().max() <= 1e-5 * size


@QUICK
@given(problems(coefficients=["diagonal"], dtypes=[torch.float32]), st.data())
def test_a_diagonal_does_not_depend_on_the_signs_of_a_stored_basis(tmp_path, problem, data):
    base, config, x = problem
    k = config.leading
    signs = torch.tensor(data.draw(st.lists(st.sampled_from([-1.0, 1.0]), min_size=k, max_size=k)))
    triplets = compute_triplets(base[0].weight.detach(), k)
    flipped = replace(triplets, U=triplets.U * signs, Vh=triplets.Vh * signs[:, None])
    outputs = []
    for name, one in (("as_is", triplets), ("flipped", flipped)):
        file = SpectralBasis({"0": one}).save(tmp_path / f"{name}.safetensors")
        torch.manual_seed(1)
        outputs.append(get_peft_model(copy.deepcopy(base), replace(config, basis=str(file), init_weights=False))(x))
    assert torch.equal(*outputs)


@QUICK
@given(problems(dtypes=[torch.float32]), st.floats(-3, 3), st.floats(-3, 3))
def test_weighted_adapters_add_up(problem, first, second):
    base, config, _ = problem
    model = get_peft_model(base, replace(config, init_weights=False)).eval()
    model.add_adapter("other", replace(config, init_weights=False))
    model.add_weighted_adapter(["default", "other"], [first, second], "sum")
    layer = model.base_model.model[0]
    expected = first * layer.get_delta_weight("default") + second * layer.get_delta_weight("other")
    size = sum(layer.get_delta_weight(name).abs().max() for name in ("default", "other"))
    assert (layer.get_delta_weight("sum") - expected).abs().max() <= 1e-5 * (1 + size)
