"""Every kind of model, as its own library builds and saves it, is compared in full: all its matrices, nothing else."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import spectralbasis
from spectralbasis.checkpoints import logical_matrices, open_checkpoint
from tests.models import tiny

ATTENTION = 4  # query, key, value, output
EMBEDDINGS = {"embeddings.word_embeddings", "embeddings.position_embeddings", "embeddings.token_type_embeddings"}
# Model, number of its matrices with two layers, and what is left out: tables and nothing else.
KINDS = [
    ("bert", 2 * (ATTENTION + 2) + 1, EMBEDDINGS),
    ("roberta", 2 * (ATTENTION + 2) + 1, EMBEDDINGS),
    ("deberta-v2", 2 * (ATTENTION + 2), {"embeddings.word_embeddings", "encoder.rel_embeddings"}),
    ("gpt2", 2 * (ATTENTION + 2), {"wte", "wpe"}),
    ("llama", 2 * (ATTENTION + 3), {"embed_tokens"}),
    ("qwen2_moe", 2 * (ATTENTION + 1 + 3 * 3 + 3 + 1), {"embed_tokens"}),
    ("mixtral", 2 * (ATTENTION + 1 + 3 * 3), {"embed_tokens"}),
    ("phi3", 2 * (ATTENTION + 3), {"embed_tokens"}),
    ("t5", 2 * (ATTENTION + 2) + 2 * (2 * ATTENTION + 2),
     {"shared", *(f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias" for side in ("encoder", "decoder"))}),
    ("vit", 2 * (ATTENTION + 2) + 2, {"embeddings.cls_token", "embeddings.position_embeddings"}),
    ("resnet", 1 + 2 * 2 + 1, set()),
    ("convnext", 1 + 2 * 3 + 1, set()),
    ("clip", 2 * 2 * (ATTENTION + 2) + 3,
     {"text_model.embeddings.token_embedding", "text_model.embeddings.position_embedding",
      "vision_model.embeddings.position_embedding"}),
    ("whisper", 2 * (ATTENTION + 2) + 2 * (2 * ATTENTION + 2) + 2,
     {"encoder.embed_positions", "decoder.embed_positions", "decoder.embed_tokens"}),
    ("wav2vec2", 2 * (ATTENTION + 2) + 2 + 1, set()),
    ("mamba", 2 * 5, {"embeddings"}),
]  # fmt: skip


def moved(state):
    """The state after something like finetuning: every weight has changed a little."""
    return {n: t + 0.01 * torch.randn_like(t) if t.is_floating_point() else t for n, t in state.items()}


def measured(base, tuned):
    """Names of the matrices that were measured, each with finite numbers, and what was skipped."""
    result = spectralbasis.compare(base, [tuned], leading=1, null=None)
    table = result.table
    assert (table[table.metric == "update_norm"].value > 0).all()
    assert table[table.metric == "subspace_overlap"].value.between(0, 1 + 1e-6).all()
    return set(table.matrix), result.summary()["skipped"]


def pair(folder, model):
    """A saved model, and a copy of its folder with other weights."""
    for name in ("base", "tuned"):
        model.save_pretrained(folder / name)
    path = folder / "tuned" / "model.safetensors"
    save_file(moved(load_file(path)), path)
    return folder / "base", folder / "tuned"


@pytest.mark.parametrize(("model_type", "expected", "tables"), KINDS, ids=[kind for kind, *_ in KINDS])
def test_every_matrix_is_measured(model_type, expected, tables, tmp_path):
    matrices, skipped = measured(*pair(tmp_path, tiny(model_type)))
    assert len(matrices) == expected
    assert set(skipped) == tables
    assert all(reason.startswith("embedding table") for reason in skipped.values())


def test_vision_transformer_of_timm():
    shapes = {"attn.qkv": (24, 8), "attn.proj": (8, 8), "mlp.fc1": (32, 8), "mlp.fc2": (8, 32)}
    state = {f"blocks.{i}.{layer}.weight": torch.randn(shape) for i in range(2) for layer, shape in shapes.items()}
    state |= {f"blocks.{i}.{norm}.weight": torch.ones(8) for i in range(2) for norm in ("norm1", "norm2")}
    state |= {"cls_token": torch.zeros(1, 1, 8), "pos_embed": torch.randn(1, 5, 8), "head.weight": torch.randn(3, 8),
              "patch_embed.proj.weight": torch.randn(8, 3, 4, 4), "norm.weight": torch.ones(8)}  # fmt: skip
    matrices, skipped = measured(state, moved(state))
    assert len(matrices) == 2 * 6 + 1
    assert set(skipped) == {"cls_token", "pos_embed", "head"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, tmp_path):
    model = tiny("llama", initializer_range=0.5)
    base, tuned = pair(tmp_path, model)
    model.to(dtype).save_pretrained(base)
    matrices, _ = measured(base, tuned)
    assert len(matrices) == 2 * (ATTENTION + 3)


def test_float8_without_scales(tmp_path):
    base, tuned = pair(tmp_path, tiny("llama", initializer_range=0.5))
    stored = load_file(base / "model.safetensors")
    stored = {n: t.to(torch.float8_e4m3fn) if t.ndim == 2 else t for n, t in stored.items()}
    save_file(stored, base / "model.safetensors")
    matrices, _ = measured(base, tuned)
    assert len(matrices) == 2 * (ATTENTION + 3)


def test_float8_with_blockwise_scales(tmp_path):
    base, tuned = pair(tmp_path, tiny("llama"))
    stored = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        if "proj" in name:
            scale = tensor.abs().max() / 448
            stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = torch.full((-(-len(tensor) // 16), -(-tensor.shape[1] // 16)), scale.item())
        else:
            stored[name] = tensor
    save_file(stored, base / "model.safetensors")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (base / "config.json").write_text(json.dumps(config))
    matrices, skipped = measured(base, tuned)
    assert len(matrices) == 2 * (ATTENTION + 3)
    assert set(skipped) == {"embed_tokens"}


def test_every_matrix_of_a_model_of_mlx(tmp_path):
    base, tuned = pair(tmp_path, tiny("llama", initializer_range=0.5))
    real = load_file(tuned / "model.safetensors")
    stored = dict(real)
    for name, W in real.items():
        if W.ndim == 2:
            groups = W.unflatten(1, (-1, 16))
            offset, scale = groups.amin(-1), (groups.amax(-1) - groups.amin(-1)) / 255
            bytes_ = ((groups - offset[..., None]) / scale[..., None]).round().flatten(1).to(torch.uint8)
            layer = name.removesuffix(".weight")
            stored |= {name: bytes_.view(torch.uint32), f"{layer}.scales": scale, f"{layer}.biases": offset}
    save_file(stored, tuned / "model.safetensors")
    config = json.loads((tuned / "config.json").read_text()) | {"quantization": {"group_size": 16, "bits": 8}}
    (tuned / "config.json").write_text(json.dumps(config))
    matrices, skipped = measured(base, tuned)
    assert len(matrices) == 2 * (ATTENTION + 3)
    assert set(skipped) == {"embed_tokens"}
    for matrix in logical_matrices(open_checkpoint(tuned))[0].values():
        W = real[matrix.cut.tensor]
        torch.testing.assert_close(matrix.read(), W, atol=(W.max() - W.min()).item() / 255, rtol=0)


def test_tied_embeddings_are_no_matrix_more(tmp_path):
    base, tuned = pair(tmp_path, tiny("gpt2", "causal"))
    matrices, skipped = measured(base, tuned)
    assert len(matrices) == 2 * (ATTENTION + 2)
    assert set(skipped) == {"wte", "wpe"}
