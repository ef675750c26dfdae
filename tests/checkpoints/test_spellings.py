"""One model in all its spellings: hub files, modules, files in the module's own format, state dicts of the inner model.

The weights are the same in all of them, so every matrix has to find its partner, with equal values.
"""

from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from spectralbasis import SpectralConfig
from spectralbasis.checkpoints import match_matrices, open_checkpoint
from spectralbasis.checkpoints.names import conversions_of, same_names

FIVE = int(transformers.__version__.partition(".")[0]) >= 5
TEXT: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
}
IMAGES = {**TEXT, "num_channels": 3, "image_size": 16, "patch_size": 4, "num_labels": 6}
GROUPED = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {
    **GROUPED,
    "num_experts": 3,
    "num_local_experts": 3,
    "n_routed_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}


def towers(text_type: str, vision_type: str, **more: Any) -> dict[str, Any]:
    """The config of a model of pictures and text."""
    text, vision = {**GROUPED, "model_type": text_type}, {**IMAGES, "model_type": vision_type}
    return {"text_config": text, "vision_config": vision, **more}


QWEN_VISION = {"depth": 3, "embed_dim": 32, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 4}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "ViTForImageClassification": ("vit", IMAGES),
    "DeiTForImageClassification": ("deit", IMAGES),
    "BeitForImageClassification": ("beit", IMAGES),
    "Dinov2ForImageClassification": ("dinov2", IMAGES),
    "Dinov2Model": ("dinov2", {**IMAGES, "use_swiglu_ffn": True}),
    "SwinForImageClassification": (
        "swin",
        {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2},
    ),
    "LlavaForConditionalGeneration": ("llava", towers("llama", "clip_vision_model", image_token_index=49)),
    "PaliGemmaForConditionalGeneration": ("paligemma", towers("gemma", "siglip_vision_model")),
    "Gemma3ForConditionalGeneration": (
        "gemma3",
        towers("gemma3_text", "siglip_vision_model", mm_tokens_per_image=4),
    ),
    "Qwen2VLForConditionalGeneration": ("qwen2_vl", {"text_config": GROUPED, "vision_config": QWEN_VISION}),
    "Qwen2_5_VLForConditionalGeneration": (
        "qwen2_5_vl",
        {"text_config": GROUPED, "vision_config": {**QWEN_VISION, "out_hidden_size": 32}},
    ),
    "MixtralForCausalLM": ("mixtral", EXPERTS),
    "Qwen2MoeForCausalLM": ("qwen2_moe", EXPERTS),
    "Qwen3MoeForCausalLM": ("qwen3_moe", EXPERTS),
    "DeepseekV3ForCausalLM": ("deepseek_v3", EXPERTS),
    "PhimoeForCausalLM": ("phimoe", EXPERTS),
    "GraniteMoeForCausalLM": ("granitemoe", EXPERTS),
    "GptOssForCausalLM": ("gpt_oss", EXPERTS),
    "Llama4ForCausalLM": ("llama4_text", EXPERTS),
    "CLIPModel": ("clip", {"projection_dim": 24, "text_config": TEXT, "vision_config": IMAGES}),
    "BertForMaskedLM": ("bert", TEXT),
}


@pytest.fixture(scope="module", params=MODELS)
def spellings(request, tmp_path_factory):
    """Ways to name one model: as `save_pretrained` writes it, as a module, and so on."""
    model_type, config = MODELS[request.param]
    torch.manual_seed(0)
    settings = transformers.models.auto.configuration_auto.CONFIG_MAPPING[model_type](**config)
    model = getattr(transformers, request.param)(settings)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder / "hub")
    found = {
        "hub": str(folder / "hub"),
        "module": model,
        "state dict": dict(model.state_dict()),
        "inner model": dict(getattr(model, model.base_model_prefix, model).state_dict()),
        "compiled and parallel": {f"module._orig_mod.{name}": W for name, W in model.state_dict().items()},
    }
    if FIVE:
        model.save_pretrained(folder / "own", save_original_format=False)
        found["own format"] = str(folder / "own")
    return found


def test_every_matrix_finds_itself_in_every_other_spelling(spellings):
    hub = open_checkpoint(spellings["hub"])
    for spelling, source in spellings.items():
        other = open_checkpoint(source)
        for base, tuned in ((hub, other), (other, hub)):
            found = match_matrices(base, tuned)
            assert found.unpaired == (), spelling
            assert found.share == 1
            assert len(found.pairs) == len(match_matrices(hub, hub).pairs), spelling
            assert all(torch.equal(before.read(), after.read()) for before, after in found.pairs), spelling


def test_canonical_names_are_their_own(spellings):
    module = spellings["module"]
    conversions = conversions_of(module)
    if conversions is None:
        pytest.skip("transformers renames nothing of this architecture")
    stored = open_checkpoint(spellings["hub"]).names()
    names = [conversions.canonical(name) for name in stored]
    assert all(conversions.canonical(name) == name for name in names if name is not None)
    assert len({name for name in names if name is not None}) == sum(name is not None for name in names)
    by_config = conversions_of(open_checkpoint(spellings["hub"]).config)
    assert by_config is not None
    assert [by_config.canonical(name) for name in stored] == names


def test_a_config_that_is_no_model_of_transformers_converts_nothing():
    for config in (
        {},
        {"model_type": "unheard"},
        {"model_type": 3},
        {"model_type": "bert", "num_hidden_layers": 10**9},
    ):
        assert conversions_of(config) is None


def test_names_that_two_tensors_share_have_no_partner():
    assert same_names(["model.a", "bert.a", "b"], ["a", "module.b"]) == {"b": "module.b"}


def test_towers_of_any_number_of_blocks_are_read_under_either_prefix():
    for blocks, layers in ((4, 5), (5, 4)):
        torch.manual_seed(0)
        hub = {f"visual.blocks.{i}.attn.proj.weight": torch.randn(8, 8) for i in range(blocks)}
        hub |= {f"model.layers.{i}.self_attn.q_proj.weight": torch.randn(8, 8) for i in range(layers)}
        module = {
            name.replace("model.layers", "model.language_model.layers").replace("visual.", "model.visual."): W
            for name, W in hub.items()
        }
        found = match_matrices(open_checkpoint(hub), open_checkpoint(module))
        assert len(found.pairs) == blocks + layers
        assert all(torch.equal(before.read(), after.read()) for before, after in found.pairs)


def test_two_stacks_may_each_have_a_prefix_of_their_own():
    torch.manual_seed(0)
    base = {f"blocks.{i}.proj.weight": torch.randn(8, 8) for i in range(3)}
    base |= {f"layers.{i}.up.weight": torch.randn(12, 8) for i in range(5)}
    tuned = {f"eyes.{name}" if "blocks" in name else f"my.mouth.{name}": W for name, W in base.items()}
    found = match_matrices(open_checkpoint(base), open_checkpoint(tuned))
    assert len(found.pairs) == 8
    assert all(torch.equal(before.read(), after.read()) for before, after in found.pairs)


@pytest.mark.parametrize(
    ("architecture", "targets"),
    [
        ("ViTForImageClassification", "all-linear"),
        ("LlavaForConditionalGeneration", r".*(language_model|vision_tower).*\.(q|v)_proj"),
        ("Qwen2_5_VLForConditionalGeneration", ["q_proj", "qkv", "down_proj"]),
    ],
)
@pytest.mark.parametrize("method", ["lora", "spectral"])
def test_an_adapter_is_read_over_a_folder_whose_names_are_not_those_of_modules(architecture, targets, method, tmp_path):
    torch.manual_seed(0)
    model_type, sizes = MODELS[architecture]
    settings = transformers.models.auto.configuration_auto.CONFIG_MAPPING[model_type](**sizes)
    getattr(transformers, architecture)(settings).save_pretrained(tmp_path / "base")
    model = getattr(transformers, architecture).from_pretrained(tmp_path / "base")
    config = (
        LoraConfig(target_modules=targets, r=4, init_lora_weights=False)
        if method == "lora"
        else SpectralConfig(target_modules=targets, leading=4, coefficients="core", init_weights=False)
    )
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload()

    base, tuned = open_checkpoint(tmp_path / "base"), open_checkpoint(tmp_path / "adapter", base=tmp_path / "base")
    truth = match_matrices(base, open_checkpoint(merged))
    found = match_matrices(base, tuned)
    expected = {before.name: after.read() for before, after in truth.pairs}
    changed = 0
    assert len(found.pairs) == len(truth.pairs)
    for before, after in found.pairs:
        torch.testing.assert_close(after.read(), expected[before.name], rtol=1e-5, atol=1e-6)
        changed += not torch.equal(before.read(), after.read())
    assert changed >= 4


@pytest.mark.skipif(not FIVE, reason="transformers 4 keeps experts as layers of their own, or adapts no stacks")
@pytest.mark.parametrize(
    "coefficients", ["core", *(pytest.param(one, marks=pytest.mark.slow) for one in ("diagonal", "band", "rotation"))]
)
@pytest.mark.parametrize(
    "architecture", ["MixtralForCausalLM", "Qwen3MoeForCausalLM", "GptOssForCausalLM", "GraniteMoeForCausalLM"]
)
def test_an_adapter_of_stacked_experts_is_read_over_every_spelling_of_its_base(architecture, coefficients, tmp_path):
    torch.manual_seed(0)
    model_type, sizes = MODELS[architecture]
    settings = transformers.models.auto.configuration_auto.CONFIG_MAPPING[model_type](**sizes)
    kind = getattr(transformers, architecture)
    kind(settings).save_pretrained(tmp_path / "hub")
    model = kind.from_pretrained(tmp_path / "hub")
    model.save_pretrained(tmp_path / "own", save_original_format=False)
    config = SpectralConfig(
        target_modules=["q_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        leading=3,
        coefficients=coefficients,
        init_weights=False,
    )
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload()

    for spelling in ("hub", "own"):
        base = open_checkpoint(tmp_path / spelling)
        expected = {before.name: after.read() for before, after in match_matrices(base, open_checkpoint(merged)).pairs}
        tuned = open_checkpoint(tmp_path / "adapter", base=tmp_path / spelling)
        changed = 0
        for before, after in match_matrices(base, tuned).pairs:
            torch.testing.assert_close(after.read(), expected[before.name], rtol=1e-5, atol=1e-6)
            changed += "self_attn" not in before.name and not torch.equal(before.read(), after.read())
        assert changed >= 2 * 3 * 3, spelling
