"""What training changes, and what it leaves alone."""

import pytest
import torch
from peft import PeftModel

from tests.tuner.cases import CASES


def train(model, case, steps=3, rate=0.1):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        case.loss(model).backward()
        optimizer.step()
    return model.eval()


def test_gradients_reach_every_coefficient_and_nothing_frozen(case):
    model = case.adapted().train()
    case.loss(model).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if ".spectral_coefficients." in name:
            assert parameter.grad.abs().sum() > 0, name


def test_only_trainable_parameters_are_updated(case):
    model = case.adapted(init_weights=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    train(model, case, rate=1e-3)
    for name, parameter in model.named_parameters():
        assert torch.equal(before[name], parameter) != parameter.requires_grad, name
    assert all(torch.equal(buffers[name], b) for name, b in model.named_buffers())


def test_training_lowers_the_loss(case):
    model = case.adapted(init_weights=True)
    before = case.loss(model)
    assert case.loss(train(model, case, steps=20, rate=1e-3)) < before


def test_parameters_after_loading_are_those_that_were_trained(case, tmp_path):
    model = train(case.adapted(init_weights=True), case, rate=1e-3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.base(), tmp_path)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict())
    torch.testing.assert_close(case.output(loaded), case.output(model))


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(name, use_reentrant):
    case = CASES[name]

    def gradients(checkpointing):
        model = case.adapted(task_type=None).train()
        torch.manual_seed(2)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        case.loss(model).backward()
        return {key: p.grad for key, p in model.named_parameters() if p.requires_grad}

    torch.testing.assert_close(gradients(True), gradients(False))


def test_layers_to_transform_chooses_layers_by_number():
    case = CASES["deep mlp"]
    model = case.adapted(layers_to_transform=[1], layers_pattern="layers")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        f"base_model.model.layers.1.{name}.spectral_coefficients.default.weight" for name in ("lin0", "lin1")
    }


def test_exclude_modules():
    model = CASES["deep mlp"].adapted(exclude_modules=["lin0"])
    assert set(model.targeted_module_names) == {"layers.0.lin1", "layers.1.lin1"}


@pytest.mark.parametrize(
    ("bias", "expected"),
    [("none", set()), ("all", {"lin0.base_layer.bias", "lin1.bias"}), ("spectral_only", {"lin0.base_layer.bias"})],
)
@pytest.mark.parametrize("rows", [3, 300])
def test_bias(bias, expected, rows, tmp_path):
    case = CASES["mlp"]
    model = case.adapted(bias=bias)
    found = {
        n.removeprefix("base_model.model.") for n, p in model.named_parameters() if p.requires_grad and "bias" in n
    }
    assert found == expected
    model(torch.randn(rows, 10)).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            assert (parameter.grad is not None) == parameter.requires_grad
            if parameter.requires_grad:
                parameter += 1
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.base(), tmp_path)
    torch.testing.assert_close(case.output(loaded), case.output(model))


def test_a_second_adapter_leaves_what_is_trainable_alone():
    model = CASES["mlp"].adapted()
    model.add_adapter("other", CASES["mlp"].settings())
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == ["base_model.model.lin0.spectral_coefficients.default.weight"]


def test_modules_to_save_are_trained_and_saved(tmp_path):
    case = CASES["mlp, head"]
    model = train(case.adapted(), case, rate=0.01)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.base(), tmp_path)
    head = loaded.base_model.model.lin1.modules_to_save["default"].weight
    assert not torch.equal(head, case.base().lin1.weight)
    torch.testing.assert_close(case.output(loaded), case.output(model))
