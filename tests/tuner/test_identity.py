"""A fresh adapter changes nothing, to the bit, and adds nothing but coefficients to what is trained and saved."""

import pytest
import torch
from peft import get_peft_model_state_dict

from tests.tuner.cases import CASES


def test_the_output_at_the_start_is_that_of_the_base_bit_by_bit(case):
    assert torch.equal(case.output(case.adapted(init_weights=True)), case.base_output())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_start_is_exact_in_other_dtypes(case, dtype):
    assert torch.equal(case.output(case.adapted(init_weights=True).to(dtype)), case.base_output(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_start_is_exact_under_autocast(case, dtype):
    with torch.autocast("cpu", dtype):
        assert torch.equal(case.output(case.adapted(init_weights=True)), case.base_output())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_start_is_exact_in_inference_beside_a_base_that_is_not_frozen(case, dtype, autocast):
    base, model = case.base().to(dtype).requires_grad_(True), case.adapted(init_weights=True).to(dtype)
    within = torch.float16 if dtype == torch.float16 else torch.bfloat16
    with torch.inference_mode(), torch.autocast("cpu", within, enabled=autocast):
        assert torch.equal(case.output(model), case.output(base))


@pytest.mark.parametrize(
    "name",
    [
        "mlp",
        "mlp, both layers",
        "mlp, band",
        "conv1d, band",
        "mlp, block",
        "mlp, rotation",
        "conv1d, rotation",
        "embedding",
        "convolutions",
    ],
)
@pytest.mark.parametrize("dtypes", [(torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)])
def test_a_model_in_one_half_precision_runs_under_autocast_to_the_other(name, dtypes):
    """Coefficients and all; torch's own layer norms would not."""
    case, (stored, autocast) = CASES[name], dtypes
    with torch.autocast("cpu", autocast):
        assert torch.equal(case.output(case.adapted(init_weights=True).to(stored)), case.base_output(stored))


def test_the_start_is_exact_where_the_changed_weight_is_formed():
    case = CASES["mlp"]
    many = torch.randn(500, 10)
    assert torch.equal(case.adapted(init_weights=True)(many), case.base()(many))


def test_random_coefficients_change_the_output(case):
    assert not torch.allclose(case.output(case.adapted()), case.output(case.base()), atol=1e-3)


def test_state_dict_holds_coefficients_but_no_factors(case):
    base, model = case.base().state_dict(), case.adapted(modules_to_save=None, task_type=None)
    added = [key for key in model.state_dict() if key.removeprefix("base_model.model.") not in base]
    added = [key for key in added if ".base_layer." not in key]
    assert added
    assert all(".spectral_coefficients.default.weight" in key for key in added)
    assert len(added) == len(get_peft_model_state_dict(model))


def test_only_coefficients_and_the_head_are_trainable(case):
    names = [name for name, parameter in case.adapted().named_parameters() if parameter.requires_grad]
    assert names
    assert all("spectral_" in name or ".modules_to_save." in name for name in names)


def test_embeddings_stay_as_they_are():
    model = CASES["conv1d"].adapted()
    assert type(model.base_model.model.emb) is torch.nn.Embedding
