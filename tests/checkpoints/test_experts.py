"""Stacked experts are one matrix per expert, with the layout that the model's own forward pass has."""

import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from spectralbasis.checkpoints import logical_matrices, open_checkpoint
from tests.models import tiny

FIVE = int(transformers.__version__.partition(".")[0]) >= 5


def experts_of(model, tmp_path, prefix):
    model.save_pretrained(tmp_path)
    matrices, _ = logical_matrices(open_checkpoint(tmp_path))
    return {name.removeprefix(prefix): matrix for name, matrix in matrices.items() if name.startswith(prefix)}


@torch.no_grad()
def test_llama4(tmp_path):
    model = tiny("llama4_text")
    matrices = experts_of(model, tmp_path, "layers.0.feed_forward.experts.")
    x = torch.randn(3, 5, 32)  # five tokens for each of three experts
    expected = model.layers[0].feed_forward.experts(x.reshape(15, 32)).reshape(3, 5, 32)
    for expert in range(3):
        gate, up, down = (
            matrices[f"{expert}.{name}"].read() for name in ("gate_up_proj.gate", "gate_up_proj.up", "down_proj")
        )
        found = (nn.functional.silu(x[expert] @ gate.T) * (x[expert] @ up.T)) @ down.T
        torch.testing.assert_close(found, expected[expert], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_gpt_oss_alternates_gate_and_up(tmp_path):
    model = tiny("gpt_oss")
    module = model.layers[1].mlp.experts
    for name, parameter in module.named_parameters():
        nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.normal_(parameter, std=0.1)
    matrices = experts_of(model, tmp_path, "layers.1.mlp.experts.")
    x = torch.randn(1, 4, 32)
    for expert in range(3):
        routing = torch.zeros(4, 3)
        routing[:, expert] = 1
        chosen = torch.full((4, 1), expert)
        expected = module(x[0], chosen, torch.ones(4, 1)) if FIVE else module(x, chosen, routing)[0]
        gate, up, down = (
            matrices[f"{expert}.{name}"].read() for name in ("gate_up_proj.gate", "gate_up_proj.up", "down_proj")
        )
        gated, linear = x[0] @ gate.T, x[0] @ up.T
        found = ((linear + 1) * gated * torch.sigmoid(gated * module.alpha)) @ down.T
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_granite(tmp_path):
    model = tiny("granitemoe")
    matrices = experts_of(model, tmp_path, "layers.0.block_sparse_moe.")
    x = torch.randn(3, 5, 32)  # five tokens for each of three experts
    expected = granite_experts(model.layers[0].block_sparse_moe, x.reshape(15, 32)).reshape(3, 5, 32)
    for expert in range(3):
        gate, up = (matrices[f"input_linear.{expert}.{part}"].read() for part in ("gate", "up"))
        found = (nn.functional.silu(x[expert] @ gate.T) * (x[expert] @ up.T)) @ matrices[
            f"output_linear.{expert}"
        ].read().T
        torch.testing.assert_close(found, expected[expert], rtol=1e-5, atol=1e-6)


def granite_experts(module, x):
    """What the experts make of 15 tokens, of which each has five."""
    if FIVE:
        return module.experts(x, torch.arange(3).repeat_interleave(5)[:, None], torch.ones(15, 1))
    gate, up = module.input_linear(x, [5, 5, 5]).chunk(2, dim=-1)
    return module.output_linear(nn.functional.silu(gate) * up, [5, 5, 5])


def test_the_state_of_gpt_oss_needs_no_config():
    model = tiny("gpt_oss")
    with_config, _ = logical_matrices(open_checkpoint(model))
    without, _ = logical_matrices(open_checkpoint(dict(model.state_dict())))
    assert without.keys() == with_config.keys()
    assert all(torch.equal(without[name].read(), matrix.read()) for name, matrix in with_config.items())


def test_stack_stored_as_out_in():
    state = {"0.experts.gate_up_proj": torch.randn(2, 12, 8), "0.experts.down_proj": torch.randn(2, 8, 6)}
    matrices, _ = logical_matrices(open_checkpoint(state))
    assert torch.equal(matrices["0.experts.1.gate_up_proj.up"].read(), state["0.experts.gate_up_proj"][1, 6:])
    assert torch.equal(matrices["0.experts.1.down_proj"].read(), state["0.experts.down_proj"][1])


def test_mixtral_experts_are_plain_layers(tmp_path):
    model = tiny("mixtral")
    matrices = experts_of(model, tmp_path, "layers.0.block_sparse_moe.")
    stored = load_file(tmp_path / "model.safetensors")
    assert torch.equal(matrices["experts.2.w3"].read(), stored["layers.0.block_sparse_moe.experts.2.w3.weight"])
    assert matrices["experts.2.w3"].kind == "block_sparse_moe.experts.w3"
    assert matrices["gate"].shape == (3, 32)


def test_expert_number_stays_in_the_name_only():
    state = {"layers.4.mlp.experts.down_proj": torch.randn(2, 8, 6)}
    matrices, _ = logical_matrices(open_checkpoint(state))
    described = {(matrix.name, matrix.layer, matrix.kind) for matrix in matrices.values()}
    assert described == {(f"layers.4.mlp.experts.{expert}.down_proj", 4, "mlp.experts.down_proj") for expert in (0, 1)}
