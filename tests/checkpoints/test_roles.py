"""What counts as a weight matrix, what is skipped with a reason, and what is passed over in silence."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from spectralbasis.checkpoints import logical_matrices, open_checkpoint
from tests.models import tiny

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
@pytest.mark.parametrize("leaf", ["weight", "qweight"])
def test_quantized_weights_are_skipped(dtype, leaf):
    matrices, skipped = listed({f"layers.1.dense.{leaf}": torch.ones(4, 3, dtype=dtype), **DENSE})
    assert matrices == {"layers.0.dense"}
    assert str(dtype).removeprefix("torch.") in next(iter(skipped.values()))


def test_float8_is_a_matrix_unless_it_has_a_scale():
    weight = {"layers.1.dense.weight": torch.ones(4, 3).to(torch.float8_e4m3fn)}
    assert listed({**weight, **DENSE}) == ({"layers.0.dense", "layers.1.dense"}, {})
    _, skipped = listed({**weight, "layers.1.dense.weight_scale_inv": torch.ones(1, 1)})
    assert "quantized" in skipped["layers.1.dense"]


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
    matrices, skipped = listed({f"depth.embed_tokens.{i}.weight": torch.ones(7, 3) for i in range(3)} | DENSE)
    assert matrices == {"layers.0.dense"}
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
