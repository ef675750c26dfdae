"""Names of matrices are stable under heads and wrappers; layer and kind come from the name."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectralbasis.checkpoints import logical_matrices, matrix_name, open_checkpoint
from spectralbasis.checkpoints.names import kind_of, layer_number
from tests.models import tiny

SAME = [
    ("encoder.layer.0.attention.self.query", "encoder.layer.0.attention.self.query.weight"),
    ("encoder.layer.0.attention.self.query", "bert.encoder.layer.0.attention.self.query.weight"),
    ("encoder.layer.0.attention.self.query", "base_model.model.roberta.encoder.layer.0.attention.self.query"),
    ("encoder.layer.0.output.dense", "module._orig_mod.bert.encoder.layer.0.output.dense.base_layer.weight"),
    ("layer.1.ffn.lin1", "distilbert.transformer.layer.1.ffn.lin1.weight"),
    ("layers.3.mlp.up_proj", "model.layers.3.mlp.up_proj.weight"),
    ("h.2.attn.c_attn", "transformer.h.2.attn.c_attn.weight"),
    ("encoder.layers.0.fc1", "model.encoder.layers.0.fc1.weight"),
    ("layers.0.self_attn.in_proj", "layers.0.self_attn.in_proj_weight"),
    ("lm_head", "lm_head.weight"),
    ("weight", "weight"),
    ("model", "model.weight"),
]


@pytest.mark.parametrize(("expected", "tensor"), SAME)
def test_name(expected, tensor):
    assert matrix_name(tensor) == expected


@given(st.lists(st.sampled_from(["model", "bert", "encoder", "layer", "0", "weight", "base_layer"]), max_size=6))
def test_a_name_is_its_own_name(parts):
    name = matrix_name(".".join([*parts, "dense", "weight"]))
    assert name.endswith("dense")
    assert matrix_name(name) == matrix_name(f"{name}.weight") == name


@pytest.mark.parametrize(
    ("name", "layer", "kind"),
    [
        ("encoder.layer.3.attention.self.query", 3, "attention.self.query"),
        ("h.11.attn.c_attn.key", 11, "attn.c_attn.key"),
        ("pooler.dense", -1, "pooler.dense"),
        ("decoder.block.1.layer.2.DenseReluDense.wi", 1, "decoder.layer.2.DenseReluDense.wi"),
        ("layers.5.block_sparse_moe.experts.7.w1", 5, "block_sparse_moe.experts.w1"),
        ("encoder.stages.0.layers.1.dwconv", 0, "layers.1.dwconv"),
        ("features.3", 3, "features"),
        ("2", 2, "weight"),
    ],
)
def test_layer_and_kind(name, layer, kind):
    assert (layer_number(name), kind_of(name)) == (layer, kind)


def test_encoder_and_decoder_are_told_apart_by_kind():
    matrices, _ = logical_matrices(open_checkpoint(tiny("t5")))
    places = [(matrix.layer, matrix.kind) for matrix in matrices.values()]
    assert len(set(places)) == len(places)


def test_names_that_would_coincide_keep_their_prefix():
    layer = tiny("bert").pooler.dense.weight
    state = {"model.fc1.weight": layer, "transformer.fc1.weight": layer.clone(), "model.fc2.weight": layer.clone()}
    matrices, _ = logical_matrices(open_checkpoint(state))
    assert set(matrices) == {"model.fc1", "transformer.fc1", "fc2"}


@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert", "gpt2", "llama", "vit", "resnet", "convnext"])
def test_bare_model_and_model_with_a_head_have_the_same_names(model_type):
    # Heads go without the pooler, as task models of these architectures may do.
    bare, _ = logical_matrices(open_checkpoint(tiny(model_type)))
    head, skipped = logical_matrices(open_checkpoint(with_head(model_type)))
    assert set(head) == {name for name in bare if not name.startswith("pooler") or name in head}
    assert any("task head" in reason for reason in skipped.values())


def with_head(model_type):
    if model_type in ("vit", "resnet", "convnext"):
        from transformers import AutoModelForImageClassification

        return AutoModelForImageClassification.from_config(tiny(model_type).config)
    return tiny(model_type, "classifier")
