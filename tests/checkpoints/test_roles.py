"""What counts as a weight matrix, what is skipped with a reason, and what is passed over in silence."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from spectralbasis.checkpoints import logical_matrices, matrix_name, open_checkpoint
from spectralbasis.errors import InputError
from tests.models import tiny

FP8 = torch.float8_e4m3fn
DENSE = {"layers.0.dense.weight": torch.ones(4, 3)}


def listed(source, **globs):
    matrices, skipped = logical_matrices(open_checkpoint(source), **globs)
    return set(matrices), skipped


@pytest.mark.parametrize(
    "tensor",
    ["embeddings.word_embeddings.weight", "wte.weight", "model.embed_tokens.weight", "pos_embed", "shared.weight",
     "transformer.wpe.weight", "tok_embeddings.weight", "embed_positions.weight", "gpt_neox.embed_in.weight",
     "layers.0.attn.relative_position_bias_table", "embed.pos_embed.weight"],
)  # fmt: skip
def test_embedding_tables(tensor):
    matrices, skipped = listed({tensor: torch.ones(7, 3), **DENSE})
    assert matrices == {"layers.0.dense"}
    assert [reason.partition(":")[0] for reason in skipped.values()] == ["embedding table"]


@pytest.mark.parametrize(
    "tensor",
    ["classifier.weight", "score.weight", "lm_head.weight", "cls.predictions.transform.dense.weight", "fc.weight",
     "mlp_head.1.weight", "heads.head.weight", "language_model.lm_head.weight",
     "qa_outputs.weight", "classifier.dense.weight", "decoder.weight"],
)  # fmt: skip
def test_task_heads(tensor):
    matrices, skipped = listed({tensor: torch.ones(7, 3), **DENSE})
    assert matrices == {"layers.0.dense"}
    assert len(skipped) == 1


@pytest.mark.parametrize("name", ["wte", "wte.weight", "w*"])
def test_include_admits_embeddings_and_heads(name):
    matrices, _ = listed({"wte.weight": torch.ones(7, 3), **DENSE}, include=[name, "layers.*"])
    assert matrices == {"wte", "layers.0.dense"}


@pytest.mark.parametrize(
    ("tensor", "value"),
    [
        ("h.0.attn.bias", torch.ones(1, 1, 4, 4)),
        ("h.0.attn.bias", torch.ones(1, 1, 4, 4, dtype=torch.bool)),
        ("embeddings.position_ids", torch.arange(8)[None]),
        ("layers.0.relative_position_index", torch.ones(4, 4, dtype=torch.int64)),
        ("layers.0.norm.weight", torch.ones(4)),
        ("layers.0.norm.weight", torch.ones(4, 5)),
        ("layers.0.post_attention_layernorm.weight", torch.ones(4, 5)),
        ("layers.0.LayerNorm.weight", torch.ones(4, 5)),
        ("layers.0.bn1.num_batches_tracked", torch.tensor(3)),
        ("layers.0.dense.bias", torch.ones(4)),
        ("layers.0.empty.weight", torch.ones(0, 4)),
        ("logit_scale", torch.tensor(1.0)),
    ],
)
def test_vectors_norms_and_buffers_are_passed_over(tensor, value):
    assert listed({tensor: value, **DENSE}) == ({"layers.0.dense"}, {})


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
@pytest.mark.parametrize("leaf", ["weight", "packed", "something_new"])
def test_whole_numbers_are_listed(dtype, leaf):
    matrices, skipped = listed({f"layers.1.dense.{leaf}": torch.ones(4, 3, dtype=dtype), **DENSE})
    assert matrices == {"layers.0.dense"}
    assert [str(dtype).removeprefix("torch.") in reason for reason in skipped.values()] == [True]


def test_float8_is_a_matrix_unless_it_has_a_scale():
    weight = {"layers.1.dense.weight": torch.ones(4, 3).to(FP8)}
    assert listed({**weight, **DENSE}) == ({"layers.0.dense", "layers.1.dense"}, {})
    _, skipped = listed({**weight, "layers.1.dense.weight_scale_inv": torch.ones(1, 1)})
    assert "quantized" in skipped["layers.1.dense"]


def whole(*shape, dtype=torch.int32):
    return torch.ones(shape, dtype=dtype)


def byte(*shape):
    return whole(*shape, dtype=torch.uint8)


def real(*shape):
    return torch.randn(shape)


# Formats that are not computed, or not without what the config tells: what lies in one layer, and the format's name.
UNREAD = [
    ("MLX", {"weight": byte(128, 256).view(torch.uint32), "scales": real(128, 8), "biases": real(128, 8)}),
    ("HQQ", {"W_q": byte(64, 128), "scale": real(128, 2), "zero": real(128, 2)}),
    ("VPTQ", {"centroids.weight": real(2, 2048), "indices": whole(1, 8, 64), "res_centroids.weight": real(2, 64)}),
    ("VPTQ", {"centroids": real(2, 64, 8), "indices": whole(1, 8, 64), "weight_scale": real(8), "perm": whole(8)}),
    ("AQLM", {"codebooks": real(2, 256, 1, 8), "codes": whole(9, 16, 2, dtype=torch.int8), "scales": real(9, 1, 1, 1)}),
    ("quanto", {"weight._data": whole(64, 64, dtype=torch.int8), "weight._scale": real(64, 1)}),
    ("quanto", {"weight._data._data": byte(64, 128), "weight._scale": real(128, 1), "weight._shift": real(128, 1)}),
    ("GPTQ, AWQ", {"qweight": whole(8, 64), "qzeros": whole(2, 8), "scales": real(2, 64), "g_idx": whole(64)}),
    ("SVDQuant", {"qweight": byte(8, 64), "wscales": real(2, 64), "lora_up": real(64, 4), "lora_down": real(8, 4)}),
    ("ParoQuant", {"qweight": whole(8, 64), "qzeros": whole(2, 8), "scales": real(2, 64), "theta": real(4, 32),
                   "pairs": whole(4, 32, dtype=torch.int16), "channel_scales": real(1, 64)}),
    ("Marlin", {"B": whole(8, 64), "s": real(2, 64), "workspace": whole(16)}),
    ("QQQ", {"B": whole(8, 64), "s_group": real(2, 64), "s_channel": real(1, 64)}),
    ("EXL2", {"q_weight": whole(8, 64), "q_scale": whole(2, 8), "q_scale_max": real(2), "q_invperm": whole(64)}),
    ("EXL3", {"trellis": whole(4, 4, 48, dtype=torch.int16), "suh": real(64), "svh": real(64)}),
    ("QTIP", {"trellis": whole(16, 48, dtype=torch.int16), "SU": real(64), "SV": real(64), "tlut": real(512, 2)}),
    ("QuIP#", {"Qidxs": whole(64, 8, dtype=torch.int64), "SU": real(64), "SV": real(64), "Wscale": real(1)}),
    ("SpQR", {"dense_weights": whole(64, 8, dtype=torch.int64), "row_offsets": whole(65), "col_vals": whole(4, 4)}),
    ("HIGGS", {"weight": whole(8, 8, dtype=torch.int8), "scales": real(8), "tables": real(4), "tables2": real(4, 4)}),
    ("EETQ", {"weight": whole(64, 64, dtype=torch.int8), "weight_scales": real(64)}),
    ("torchao", {"_weight_qdata": whole(8, 8), "_weight_scale_and_zero": real(2, 8, 2)}),
    ("compressed-tensors", {"weight_packed": whole(4, 8), "weight_scale": real(4, 2)}),
    ("compressed-tensors", {"weight_packed": byte(4, 8), "weight_scale": real(4, 2)}),
    ("compressed-tensors, sparse",
     {"weight.bitmask": byte(8, 1), "weight.compressed": real(24), "weight.row_offsets": whole(8)}),
    ("bitsandbytes, 4 bits", {"weight": byte(32, 1), "weight.absmax": real(1), "weight.quant_map": real(16)}),
    ("ModelOpt, NVFP4, with `pre_quant_scale`",
     {"weight": byte(4, 8), "weight_scale": real(4, 1).to(FP8), "weight_scale_2": real(1),
      "pre_quant_scale": real(16)}),
    ("unknown format", {"W_int": whole(8, 64, dtype=torch.int8), "zero": real(8, 4), "scale": real(8, 4)}),
    ("unknown format", {"packed": byte(8, 64), "lut": real(8, 16)}),
    ("unknown format", {"weight": whole(8, 64, dtype=torch.int8), "my_codebook": real(16, 4)}),
    ("unknown format", {"weight": real(8, 64).to(FP8), "scale_weight": real(1)}),
    ("unknown format", {"weight": real(8, 64).to(FP8), "weight_scale": torch.ones(())}),
    ("unknown format", {"weight": real(8, 64).to(FP8), "weight_scaling_factor": torch.ones(())}),
    ("unknown format", {"weight": byte(8, 64), "weight_scale": byte(8, 4).view(torch.float8_e8m0fnu)}),
    ("unknown format", {"weight": byte(8, 64), "weight_scale": byte(8, 4), "weight_zero_point": byte(8, 4)}),
    ("float4_e2m1fn_x2", {"weight": byte(8, 64).view(torch.float4_e2m1fn_x2)}),
    ("float8_e8m0fnu", {"exponents": byte(8, 64).view(torch.float8_e8m0fnu)}),
]  # fmt: skip


@pytest.mark.parametrize("layer", ["layers.1.dense", "dense", ""])
@pytest.mark.parametrize(("name", "parts"), UNREAD)
def test_a_quantized_weight_is_listed_once_and_no_part_of_it_is_measured(name, parts, layer):
    prefix = f"{layer}." if layer else ""
    state = {f"{prefix}{part}": tensor for part, tensor in {**parts, "bias": real(64)}.items()}
    matrices, skipped = listed({**state, **DENSE})
    assert matrices == {"layers.0.dense"}
    assert len(skipped) == 1
    ((weight, reason),) = skipped.items()
    assert weight.startswith(layer)
    assert name in reason
    assert reason.startswith("quantized (")
    checkpoint = open_checkpoint(state)
    unreadable = next(name for name in checkpoint.names() if checkpoint.unreadable(name))
    with pytest.raises(InputError, match="cannot be read: quantized"):
        checkpoint.read(unreadable)


def test_the_method_that_a_config_names_is_told(tmp_path):
    state = {"a.weight": whole(8, 64, dtype=torch.int8), "a.my_codebook": real(16, 4), "b.weight": real(4, 4)}
    save_file(state, tmp_path / "model.safetensors")
    for config in (
        {"quantization_config": {"quant_method": "new"}},
        {"text_config": {"quantization_config": {"quant_method": "New"}}},
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        matrices, skipped = listed(tmp_path)
        assert matrices == {"b"}
        assert "quantized (new, int8 with `my_codebook`" in skipped["a"]


def test_float8_without_a_scale_is_listed_where_the_config_names_a_quantization(tmp_path):
    save_file({"a.weight": real(8, 8).to(FP8)}, tmp_path / "model.safetensors")
    assert listed(tmp_path)[0] == {"a"}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "fp8"}}))
    matrices, skipped = listed(tmp_path)
    assert matrices == set()
    assert "quantized (fp8, float8_e4m3fn)" in skipped["a"]


@pytest.mark.parametrize("kind", [torch.float8_e4m3fnuz, torch.float8_e5m2fnuz])
def test_other_8_bit_floats_are_read_as_they_are(kind, tmp_path):
    stored = real(4, 4).to(kind)
    save_file({"a.weight": stored}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path / "model.safetensors")
    assert torch.equal(logical_matrices(checkpoint)[0]["a"].read().float(), stored.float())


def test_a_dense_weight_beside_its_quantized_copy_is_measured():
    state = {"a.weight": real(64, 64), "a.qweight": byte(64, 32), "a.scales": real(64, 2)}
    matrices, skipped = listed(state)
    assert matrices == {"a"}
    assert list(skipped) == ["a.qweight"]


# Layers of ordinary models with tensors that have the names of companions.
ORDINARY = {
    "quantizer.codebook": real(64, 8), "quantizer.usage": whole(64, dtype=torch.int64),
    "layer.0.codebooks": real(4, 16, 8), "layer.0.biases": real(4, 8), "layer.0.zero": real(8, 8),
    "layer.0.centroids.weight": real(16, 8), "vq.codewords": real(32, 8), "vq.cluster_size": real(32),
    "vq.inited": torch.tensor([True]), "attn.proj_up": real(8, 8), "attn.lora_up": real(8, 8),
    "attn.relative_position_index": whole(8, 8, dtype=torch.int64), "attn.tables": real(8, 8),
    "attn.mask": byte(8, 8), "attn.grid": real(8, 8), "experts.scale_proj": real(4, 8, 8),
    "embeddings.position_ids": whole(1, 8, dtype=torch.int64), "embeddings.projection": real(8, 8),
    "attn.W_q": real(8, 8), "attn.W_k": real(8, 8), "attn.q_weight": real(8, 8), "attn.B": real(8, 8),
    "attn.s": real(8, 8), "attn.qweight": real(8, 8), "mix.scale_packed": real(8, 8), "mix.trellis": real(8, 8),
    "code.codes": real(8, 8), "code.codebooks": real(8, 8), "code.dense_weights": real(8, 8),
}  # fmt: skip
SILENT = {
    "ls1.gamma": real(8), "ls1.scale": real(8, 1, 1), "logit_scale": torch.ones(()), "block.scales": real(8, 1),
    "a.weight_fake_quant.scale": real(8), "a.weight_fake_quant.zero_point": whole(8),
    "a.weight_quantizer._amax": real(8, 1), "bn.num_batches_tracked": whole(1, dtype=torch.int64)[0],
}  # fmt: skip


def test_ordinary_models_lose_no_matrix():
    matrices, skipped = listed({**ORDINARY, **SILENT})
    expected = {name for name, tensor in ORDINARY.items() if tensor.is_floating_point() and tensor.ndim > 1}
    stacked = {f"experts.{number}.scale_proj" for number in range(4)}
    assert matrices == stacked | {matrix_name(name) for name in expected - {"experts.scale_proj"}}
    assert skipped == {}


def test_a_direction_without_its_length_is_skipped_with_what_to_do():
    _, skipped = listed({"layers.1.dense.weight_v": torch.ones(4, 3), **DENSE})
    assert "remove the parametrization" in skipped["layers.1.dense.weight_v"]


@pytest.mark.parametrize("as_module", [True, False])
def test_tied_weights_count_once(as_module):
    model = tiny("gpt2", "causal")
    matrices, skipped = listed(model if as_module else model.state_dict(), include=["*wte*", "lm_head"])
    assert matrices == {"wte"}
    assert skipped["lm_head"] == "tied to transformer.wte.weight"


def test_embedding_is_known_by_type_whatever_its_name():
    module = nn.ModuleDict({"lookup": nn.Embedding(5, 4), "dense": nn.Linear(4, 4)})
    assert listed(module)[0] == {"dense"}


def test_patch_projection_is_a_matrix():
    assert "embeddings.patch_embeddings" in listed(tiny("convnext"))[0]
    assert "embeddings.patch_embeddings.projection" in listed(tiny("vit"))[0]


def test_recurrent_weights_are_matrices():
    assert listed(nn.ModuleDict({"gru": nn.GRU(3, 4)}))[0] == {"gru.weight_ih_l0", "gru.weight_hh_l0"}


def test_a_list_of_tables_is_known_by_the_name_of_the_list():
    layer = {"to_patch_embedding.1.weight": torch.ones(7, 3), "to_patch_embedding.1.bias": torch.ones(7)}
    matrices, skipped = listed({f"depth.embed_tokens.{i}.weight": torch.ones(7, 3) for i in range(3)} | layer | DENSE)
    assert matrices == {"layers.0.dense", "to_patch_embedding.1"}
    assert len(skipped) == 3


@pytest.mark.parametrize("where", ["", "text_config"])
def test_one_row_for_each_word_of_the_vocabulary_is_a_table_or_a_head_whatever_its_name(where, tmp_path):
    config = {"vocab_size": 17, "hidden_size": 3, "model_type": "unheard"}
    (tmp_path / "config.json").write_text(json.dumps({where: config} if where else config))
    save_file({"words.weight": torch.ones(17, 3), **DENSE}, tmp_path / "model.safetensors")
    matrices, skipped = listed(tmp_path)
    assert matrices == {"layers.0.dense"}
    assert "vocabulary" in skipped["words"]


def test_a_vocabulary_as_large_as_a_layer_tells_nothing(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 4, "intermediate_size": 4}))
    save_file(DENSE, tmp_path / "model.safetensors")
    assert listed(tmp_path)[0] == {"layers.0.dense"}
