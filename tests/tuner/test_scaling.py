"""The unit of the trained numbers: what it is, that it is recorded, and that every way to use an adapter knows it."""

import json

import pytest
import torch
from peft import PeftModel

from spectralbasis.checkpoints import open_checkpoint
from spectralbasis.errors import InputError
from spectralbasis.tuner import SpectralConfig
from tests.tuner.cases import CASES

CASE = CASES["mlp, both layers"]


def layer(model):
    return model.base_model.model.lin0


@pytest.mark.parametrize("coefficients", ["diagonal", "core", "band", "block"])
def test_relative_coefficients_count_in_singular_values(coefficients):
    model = CASE.adapted(coefficients=coefficients, scaling="relative", leading=4, block_size=3, init_weights=True)
    layer(model).stored("default").data.fill_(0.5)
    U, S, Vh = torch.linalg.svd(layer(model).weight.double().detach())
    C = U[:, :4].T @ layer(model).get_delta_weight("default").double() @ Vh[:4].T
    kept = {"diagonal": torch.eye(4), "core": torch.ones(4, 4), "band": torch.ones(4, 4).tril(1).triu(-1)}
    kept["block"] = torch.block_diag(torch.ones(3, 3), torch.ones(1, 1))
    expected = 0.5 * torch.outer(S[:4], S[:4]).sqrt() * kept[coefficients]
    torch.testing.assert_close(C.abs(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("coefficients", ["diagonal", "core", "band", "block"])
@pytest.mark.parametrize("leading", [3, 6])
def test_normalized_coefficients_of_one_size_change_each_output_direction_by_as_much(coefficients, leading):
    model = CASE.adapted(
        coefficients=coefficients, leading=leading, block_size=4, scaling="normalized", init_weights=True
    )
    layer(model).stored("default").data.fill_(0.5)
    mean_square_of_a_row = layer(model).get_delta_weight("default").square().sum() / leading
    torch.testing.assert_close(mean_square_of_a_row, torch.tensor(0.25))


def test_a_scaled_step_is_the_absolute_one_times_the_unit_squared():
    """Plain gradient descent on c moves C by `unit² · gradient`; that is what a unit is for."""
    steps = {}
    for scaling in ("absolute", "normalized"):
        model = CASE.adapted(coefficients="core", scaling=scaling, init_weights=True)
        CASE.output(model).square().sum().backward()
        stored = layer(model).stored("default")
        unit = layer(model).parametrisation("default").unit
        steps[scaling] = stored.grad * (1 if unit is None else unit)
    torch.testing.assert_close(steps["normalized"], steps["absolute"] * unit**2)


@pytest.mark.parametrize("scaling", ["relative", "normalized"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_record_is_what_a_loaded_adapter_uses(scaling, dtype, tmp_path):
    from peft import get_peft_model

    model = get_peft_model(CASE.base().to(dtype), CASE.settings(scaling=scaling)).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(CASE.base().to(dtype), tmp_path)
    assert torch.equal(layer(loaded).parametrisation("default").unit, layer(model).parametrisation("default").unit)
    assert torch.equal(CASE.output(loaded), CASE.output(model))
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {len(scales) for scales in saved["scales"].values()} == ({1} if scaling == "normalized" else {10, 6})


def test_an_adapter_of_before_is_read_as_absolute(tmp_path):
    model = CASE.adapted(scaling="absolute")
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    old = {"scaling", "scales", "bandwidth", "entries"}
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in old}))
    loaded = PeftModel.from_pretrained(CASE.base(), tmp_path)
    assert loaded.peft_config["default"].scaling == "absolute"
    assert torch.equal(CASE.output(loaded), CASE.output(model))


@pytest.mark.parametrize("scaling", ["relative", "normalized"])
def test_a_weighted_sum_is_that_of_the_updates(scaling):
    model = CASE.adapted(scaling=scaling)
    model.add_adapter("other", CASE.settings(scaling=scaling))
    model.base_model.add_weighted_adapter(["default", "other"], [0.5, -2.0], "sum")
    first, second, total = (layer(model).get_delta_weight(name) for name in ("default", "other", "sum"))
    torch.testing.assert_close(total, 0.5 * first - 2 * second)


def test_adapters_of_other_units_share_a_batch_but_are_not_added():
    model = CASE.adapted()
    model.add_adapter("other", CASE.settings(scaling="relative"))
    mixed = CASE.output(model, adapter_names=["default", "other", "__base__"] * 3)
    model.set_adapter("other")
    torch.testing.assert_close(mixed[1::3], CASE.output(model)[1::3], atol=1e-5, rtol=1e-4)
    with pytest.raises(InputError, match="differ in scaling"):
        model.base_model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")


@pytest.mark.parametrize(
    "scales", [None, {"lin0": [1.0]}, {"lin0": [1.0] * 3, "lin1": [1.0]}, {"lin0": ["1"], "lin1": [1.0]}, 3]
)
def test_a_damaged_record_is_refused(scales, tmp_path):
    CASE.adapted(scaling="normalized").save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scales": scales}))
    with pytest.raises(InputError, match=r"restore (adapter_config\.json|it from the original)"):
        open_checkpoint(tmp_path, base=CASE.base())


def test_unknown_scalings_are_refused():
    with pytest.raises(InputError, match="scaling='big' is unknown; choose from 'absolute', 'relative', 'normalized'"):
        SpectralConfig(scaling="big")
