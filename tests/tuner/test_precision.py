"""Half precision and autocast: outputs stay finite and close, coefficients stay in full precision."""

import copy

import pytest
import torch
from peft import get_peft_model

from tests.tuner.cases import CASES, MLP

HALF = [torch.float16, torch.bfloat16]


def coefficient_dtypes(model):
    return {p.dtype for name, p in model.named_parameters() if "spectral_" in name}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_half_precision_bases(case, dtype, autocast_adapter_dtype, tmp_path):
    base = case.base().to(dtype)
    torch.manual_seed(1)
    model = get_peft_model(base, case.settings(), autocast_adapter_dtype=autocast_adapter_dtype).eval()
    wanted = torch.float32 if autocast_adapter_dtype else dtype
    assert coefficient_dtypes(model) == {wanted}
    assert {b.dtype for name, b in model.named_buffers() if "spectral_factors" in name} == {dtype}
    output = case.output(model)
    assert output.isfinite().all()
    expected = case.output(copy.deepcopy(model).float())
    torch.testing.assert_close(output.float(), expected, atol=0.2, rtol=0.2)
    model.add_adapter("added", case.settings(), autocast_adapter_dtype=autocast_adapter_dtype)
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, adapter_name="loaded", autocast_adapter_dtype=autocast_adapter_dtype)
    assert coefficient_dtypes(model) == {wanted}


@pytest.mark.parametrize("dtype", HALF)
def test_autocast_trains_in_half_precision_with_full_precision_coefficients(case, dtype):
    model = case.adapted()
    reference = copy.deepcopy(model)
    case.loss(reference).backward()
    with torch.autocast("cpu", dtype=dtype):
        loss = case.loss(model)
    loss.backward()
    for (name, found), wanted in zip(model.named_parameters(), reference.parameters(), strict=True):
        if ".spectral_coefficients." in name:
            assert found.grad.dtype == torch.float32
            assert torch.cosine_similarity(found.grad.flatten(), wanted.grad.flatten(), dim=0) > 0.95, name


def test_small_coefficients_survive_in_bfloat16():
    base = MLP().bfloat16()
    model = get_peft_model(base, CASES["mlp"].settings(init_weights=True))
    x = torch.randn(400, 10)
    before = model(x)
    model.base_model.model.lin0.stored("default").data.fill_(3e-3)
    assert (model(x) != before).float().mean() > 0.5
