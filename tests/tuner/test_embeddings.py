"""Embedding tables against looking up the dense `W + ΔW`, in float64."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn.functional import embedding
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from spectralbasis.tuner import Embedding, SpectralConfig
from tests.models import tiny

IDS = torch.tensor([[1, 5, 0], [7, 7, 2]])


def adapted(coefficients="core", **options):
    config = SpectralConfig(target_modules=["0"], coefficients=coefficients, leading=4, init_weights=False)
    model = get_peft_model(nn.Sequential(nn.Embedding(9, 6, **options).double()), config).eval().double()
    return model, model.base_model.model[0]


@pytest.mark.parametrize("coefficients", ["diagonal", "core"])
@pytest.mark.parametrize("padding_idx", [None, 0])
@pytest.mark.parametrize("ids", [IDS, IDS[0], IDS[0, 0]])
def test_output_and_gradients_are_those_of_the_dense_update(coefficients, padding_idx, ids):
    model, layer = adapted(coefficients, padding_idx=padding_idx)
    assert type(layer) is Embedding
    C, U, V, form = layer.terms("default")
    expected = embedding(ids, layer.weight + U @ (torch.diag(C) if form == "diagonal" else C) @ V.T)
    weights = torch.randn_like(expected)
    torch.testing.assert_close(model(ids), expected)
    stored = layer.stored("default")
    found = torch.autograd.grad((model(ids) * weights).sum(), stored)
    torch.testing.assert_close(found, torch.autograd.grad((expected * weights).sum(), stored))


def test_padding_keeps_its_vector_of_zeros():
    model, _ = adapted(padding_idx=0)
    assert model(IDS)[0, 2].abs().max() < 1e-12


def test_a_table_that_scales_what_it_looks_up():
    config = Gemma3TextConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=False, pad_token_id=0,
    )  # fmt: skip
    settings = SpectralConfig(target_modules=["embed_tokens"], init_weights=False, leading=4)
    model = get_peft_model(Gemma3ForCausalLM(config), settings).eval()
    before = model(IDS).logits
    model.merge_adapter()
    torch.testing.assert_close(model(IDS).logits, before, atol=1e-4, rtol=1e-4)


def test_a_head_tied_to_the_table_is_left_as_it_is_until_the_adapter_is_merged():
    base = tiny("llama", "causal", initializer_range=0.2, tie_word_embeddings=True)
    head = base.lm_head.weight.detach().clone()
    with pytest.warns(UserWarning, match="tied layer is part of the adapter"):
        model = get_peft_model(base, SpectralConfig(target_modules=["embed_tokens"], init_weights=False))
    model(IDS)
    assert torch.equal(model.base_model.model.lm_head.weight, head)
    with pytest.warns(UserWarning, match="You can untie the embeddings"):
        model.merge_adapter()
    assert not torch.equal(model.base_model.model.lm_head.weight, head)
    model.unmerge_adapter()
    assert torch.equal(model.base_model.model.lm_head.weight, head)
