"""torch.compile and torch.func on whole models."""

import shutil

import pytest
import torch
from torch.func import functional_call, grad, vmap

from tests.tuner.cases import CASES


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(model, output):
    return torch.autograd.grad(output.square().sum(), list(trained(model).values()))


@pytest.mark.parametrize("name", ["llama", "convolutions", "embedding, core", "mlp, block", "mlp, rotation"])
def test_traced_by_autograd_too(name):
    case = CASES[name]
    model = case.adapted(task_type=None)
    expected = gradients(model, case.output(model))
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(gradients(model, case.output(compiled)), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="inductor needs a C++ compiler")
def test_compiled_to_machine_code():
    case = CASES["mlp"]
    model = case.adapted()
    expected = gradients(model, case.output(model))
    compiled = torch.compile(model)
    torch.testing.assert_close(case.output(compiled), case.output(model))
    torch.testing.assert_close(gradients(model, case.output(compiled)), expected)


def test_compiled_before_and_after_a_change_of_adapter():
    case = CASES["mlp"]
    model = case.adapted()
    model.add_adapter("other", case.settings())
    compiled = torch.compile(model, backend="eager")
    for name in ("default", "other"):
        model.set_adapter(name)
        torch.testing.assert_close(case.output(compiled), case.output(model))
    with model.disable_adapter():
        assert torch.equal(case.output(compiled), case.base_output())


@pytest.mark.parametrize(
    "name",
    ["mlp", "mlp, both layers", "conv1d, core", "convolutions", "embedding", "llama", "mlp, block", "mlp, rotation"],
)
def test_per_example_gradients(name):
    case = CASES[name]
    model = case.adapted(task_type=None)
    leaves = {key: p.detach() for key, p in trained(model).items()}
    inputs = {key: value[:3] for key, value in case.inputs.items() if key != "attention_mask"}

    def loss(leaves, row):
        output = functional_call(model, leaves, (), {key: value[None] for key, value in row.items()})
        return (output if isinstance(output, torch.Tensor) else output.logits).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(leaves, inputs)
    for row in range(3):
        expected = grad(loss)(leaves, {key: value[row] for key, value in inputs.items()})
        torch.testing.assert_close({k: g[row] for k, g in found.items()}, expected, atol=1e-5, rtol=1e-4)


def test_a_batch_of_coefficients():
    """Many candidates for C in one call, as evolution strategies and ensembles have them."""
    case = CASES["mlp, both layers"]
    model = case.adapted()
    leaves = {key: torch.randn(4, *p.shape) for key, p in trained(model).items()}
    found = vmap(lambda leaves: functional_call(model, leaves, (case.inputs["X"],)))(leaves)
    for index in range(4):
        one = functional_call(model, {key: value[index] for key, value in leaves.items()}, (case.inputs["X"],))
        torch.testing.assert_close(found[index], one)
