"""A batch in which every row has its own adapter gives each row what it would get alone."""

import pytest
import torch
from peft import get_peft_model

from tests.tuner.cases import CASES

CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def several(case, **changes):
    """Two adapters of the case's kind and one of another form and rank."""
    model = case.adapted(adapter_name="first", task_type=None, modules_to_save=None)
    model.add_adapter(
        "second", case.settings(task_type=None, modules_to_save=None, rank_pattern={}, leading=3, budget=None)
    )
    model.add_adapter(
        "third", case.settings(task_type=None, modules_to_save=None, coefficients="core", basis="random", **changes)
    )
    return model.eval()


def alone(case, model, name):
    if name == "__base__":
        return case.base_output()
    model.set_adapter(name)
    return case.output(model)


@torch.inference_mode()
def test_each_row_gets_its_adapter(case):
    model = several(case)
    rows = len(next(iter(case.inputs.values())))
    names = [["__base__", "first", "second", "third"][row % 4] for row in range(rows)]
    mixed = case.output(model, adapter_names=names)
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], alone(case, model, name)[row], **CLOSE)


@torch.inference_mode()
def test_rows_of_the_base_are_exact():
    case = CASES["mlp, both layers"]
    mixed = case.output(several(case), adapter_names=["__base__", "first", "second"] * 3)
    assert torch.equal(mixed[::3], case.base_output()[::3])


@torch.inference_mode()
def test_half_precision():
    case = CASES["mlp"]
    model = several(case).bfloat16()
    mixed = case.output(model, adapter_names=["first", "second", "third"] * 3)
    for row, name in enumerate(["first", "second", "third"]):
        torch.testing.assert_close(mixed[row], alone(case, model, name)[row], atol=0.05, rtol=0.05)


@torch.inference_mode()
def test_each_row_gets_the_retrained_module_of_its_adapter():
    case = CASES["mlp, head"]
    model = case.adapted(adapter_name="first")
    model.add_adapter("second", case.settings())
    model.base_model.model.lin1.modules_to_save["second"].weight.data.mul_(-1)
    mixed = case.output(model.eval(), adapter_names=["first", "second", "second"] * 3)
    for row, name in enumerate(["first", "second", "second"]):
        torch.testing.assert_close(mixed[row], alone(case, model, name)[row], **CLOSE)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
@torch.inference_mode()
def test_generation(name, options):
    case = CASES[name]
    model = case.adapted(adapter_name="first")
    model.add_adapter("second", case.settings())
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    names = ["first", "__base__", "second"]
    mixed = model.eval().generate(**case.inputs, **options, adapter_names=names)
    copies = options.get("num_return_sequences", 1)
    for row, adapter in enumerate(names):
        if adapter == "__base__":
            expected = case.base().generate(**case.inputs, **options)
        else:
            model.set_adapter(adapter)
            expected = model.generate(**case.inputs, **options)
        chosen = slice(row * copies, (row + 1) * copies)
        assert torch.equal(mixed[chosen], expected[chosen])


def test_hooks_are_gone_after_an_error():
    case = CASES["mlp"]
    model = case.adapted()
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        case.output(model, adapter_names=["default"])
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("prepare", "names", "message"),
    [
        (lambda model: model.train(), ["default"], "training mode"),
        (lambda model: model, ["nobody", "default"], "non-existing adapter.*: nobody"),
        (lambda model: model.merge_adapter(), ["default"] * 9, "unmerge_adapter"),
    ],
)
def test_refusals(prepare, names, message):
    case = CASES["mlp"]
    model = get_peft_model(case.base(), case.settings()).eval()
    prepare(model)
    with pytest.raises(ValueError, match=message):
        case.output(model, adapter_names=names)
