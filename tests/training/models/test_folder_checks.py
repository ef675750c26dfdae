"""Folders that somebody made, before transformers and PEFT open them: nothing else is read, run or made room for."""

import json
import shutil
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoTokenizer

from spectralbasis.errors import InputError
from spectralbasis.training import load_model, load_task
from spectralbasis.training.evaluation import attach_adapter
from spectralbasis.training.folder_checks import adapter_config
from tests.training.examples import bright_side_task, save_image_model, save_text_model, write_sst2


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {"image": save_image_model(folder / "image", labels=2), "text": save_text_model(folder / "text")}


@pytest.fixture
def image(saved, tmp_path):
    return shutil.copytree(saved["image"], tmp_path / "model")


@pytest.fixture
def text(saved, tmp_path):
    return shutil.copytree(saved["text"], tmp_path / "model")


@pytest.fixture
def sst2(tmp_path):
    return load_task("sst2", write_sst2(tmp_path / "data"))


def edit(file, **changes):
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**content, **changes}))


def opened(folder):
    return load_model(folder, bright_side_task())


CODE = "code of a hub repository"
CONFIGS = {
    "code of the hub": ({"_attn_implementation": "owner/kernel"}, CODE),
    "code of the hub, its public key": ({"attn_implementation": "owner/kernel"}, CODE),
    "code of the hub, its inner key": ({"_attn_implementation_internal": "owner/kernel:function"}, CODE),
    "code of the hub, by part": ({"attn_implementation": {"vision_config": "owner/kernel"}}, CODE),
    "code of the hub, in a part": ({"text_config": {"_attn_implementation": "owner/kernel"}}, CODE),
    "code of the hub, for experts": ({"experts_implementation": "owner/kernel"}, CODE),
    "kernels": ({"use_kernels": True}, "from elsewhere"),
    "an absent package": ({"_attn_implementation": "flash_attention_3"}, "flash_attn_interface is not installed"),
    "quantized": ({"quantization_config": {"quant_method": "torchao"}}, "quantized model"),
    "quantized by a list": ({"quantization_config": [1]}, "quantized model"),
    "a checkpoint of timm": ({"model_args": {"checkpoint_path": "/x.pth"}}, "from elsewhere"),
    "another model's backbone": ({"use_pretrained_backbone": True}, "from elsewhere"),
    "weights elsewhere": ({"transformers_weights": "../x.safetensors"}, "leads out of"),
    "a type of no numbers": ({"torch_dtype": "os.system"}, "expected a floating type"),
    "a type of whole numbers": ({"dtype": "int64"}, "expected a floating type"),
    "as wide as nothing": ({"hidden_size": 10**9}, "numbers, and the weights there have|cannot be built"),
    "of too many layers": ({"num_hidden_layers": 10**7}, "impossible size"),
    "of less than no layers": ({"num_hidden_layers": -1}, "impossible size"),
    "of too many experts": ({"num_local_experts": 4000, "num_hidden_layers": 4000}, "4000 layers of 4000 experts"),
    "of too many labels": ({"num_labels": 10**10}, "impossible size"),
    "of text for a size": ({"hidden_size": "x"}, "cannot be (built|read)"),
    "of no width": ({"hidden_size": 0}, "expected|cannot be|does not fit"),
    "of no patches": ({"patch_size": 0}, "cannot be (built|read)"),
    "of no heads": ({"num_attention_heads": 0}, "cannot be (built|read)"),
    "of a list of images": ({"image_size": [[]]}, "of size|cannot be"),
    "of an unknown activation": ({"hidden_act": "__import__"}, "cannot be (built|read)"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_asks_for_more_than_its_folder_is_refused(case, image):
    changes, message = CONFIGS[case]
    edit(image / "config.json", **changes)
    with pytest.raises(InputError, match=message):
        opened(image)


@pytest.mark.parametrize(
    "changes",
    [
        {"_attn_implementation": "eager"},
        {"attn_implementation": {"": "sdpa"}},
        {"dtype": "bfloat16"},
        {"torch_dtype": "torch.float16"},
        {"max_relative_positions": -1, "feature_layer": -2},
        {"auto_map": {"AutoConfig": "code.Config"}},
        {"layer_norm_eps": 1e-5, "expert_intermediate_size": 20_000},
    ],
    ids=str,
)
def test_what_configs_usually_say_is_no_reason(changes, image):
    edit(image / "config.json", **changes)
    assert opened(image).model.config.num_labels == 2


@pytest.mark.parametrize("kind", ["..", "absolute", "link"])
def test_weights_outside_of_the_folder_are_not_read(kind, image, tmp_path):
    elsewhere = tmp_path / "elsewhere.safetensors"
    (image / "model.safetensors").rename(elsewhere)
    names = load_file(elsewhere)
    if kind == "link":
        (image / "model.safetensors").symlink_to(elsewhere)
    else:
        named = str(elsewhere) if kind == "absolute" else "../elsewhere.safetensors"
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, named)}
        (image / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="leads out of"):
        opened(image)


def test_a_snapshot_of_the_hub_cache_opens(image, tmp_path):
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / "0"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in image.iterdir():
        path.rename(repository / "blobs" / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert opened(snapshot).model.config.num_labels == 2
    (tmp_path / "link").symlink_to(snapshot)  # which the person named
    assert opened(tmp_path / "link").model.config.num_labels == 2


def test_a_model_of_the_hub_is_checked_too_and_keeps_its_name(image, tmp_path, monkeypatch):
    monkeypatch.setattr("spectralbasis.training.models.download", lambda name: image)
    loaded = opened("owner/name")
    adapted = get_peft_model(loaded.model, LoraConfig(target_modules="all-linear"))
    assert adapted.peft_config["default"].base_model_name_or_path == "owner/name"
    edit(image / "config.json", _attn_implementation="owner/kernel")
    with pytest.raises(InputError, match=CODE):
        opened("owner/name")


def test_an_adapter_beside_a_model_does_not_choose_its_weights(image):
    (image / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/name"}))
    with pytest.raises(InputError, match="into its own folder"):
        opened(image)


@pytest.mark.parametrize("key", ["vocab_file", "tokenizer_file"])
def test_words_outside_of_the_folder_are_not_read(key, text, sst2, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text((text / "vocab.txt").read_text() + "\nsecret")
    edit(text / "tokenizer_config.json", **{key: str(secret)})
    with pytest.raises(InputError, match=f"as its {key}, which is not in the folder"):
        load_model(text, sst2, max_length=16)


def test_files_of_its_author_that_a_tokenizer_names_do_no_harm(text, sst2):
    edit(text / "tokenizer_config.json", special_tokens_map_file="/home/author/special_tokens_map.json")
    words = load_model(text, sst2, max_length=16).collator.tokenizer
    assert words("film")["input_ids"] == AutoTokenizer.from_pretrained(text)("film")["input_ids"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_max_length": "x"}, "expected a number"),
        ({"model_max_length": 0}, "correct model_max_length"),
        ({"pad_token": None}, "neither a pad_token nor an eos_token"),
    ],
    ids=str,
)
def test_a_tokenizer_that_cannot_be_used_says_why(changes, message, text, sst2):
    edit(text / "tokenizer_config.json", **changes)
    for file in text.glob("special_tokens_map.json"):
        file.unlink()
    with pytest.raises(InputError, match=message):
        load_model(text, sst2, max_length=16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([1], "image (settings|processor) in"),
        ({"image_mean": "x"}, "image_mean='x'"),
        ({"image_mean": [0.5], "image_std": [0]}, "image_std=.*expected positive numbers"),
        ({"image_mean": [0.1, 0.2, 0.3]}, "image_mean"),
        ({"image_std": [1e400]}, "image_std"),
    ],
    ids=str,
)
def test_image_settings_that_cannot_be_used_say_why(settings, message, image):
    (image / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=message):
        opened(image)


EXPRESSION = r".*attention.*(q_proj|query)"


class TestAdapters:
    @pytest.fixture
    def loaded(self, image):
        return opened(image)

    @pytest.fixture
    def adapter(self, image, tmp_path):
        torch.manual_seed(0)
        config = LoraConfig(
            r=2, target_modules=EXPRESSION, modules_to_save=["classifier"], init_lora_weights=False,
            rank_pattern={r".*0\..*": 3},
        )  # fmt: skip
        get_peft_model(opened(image).model, config).save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"megatron_config": {"x": 1}, "megatron_core": "mine"}, "asks PEFT to import 'mine'"),
            ({"megatron_core": "mine"}, "asks PEFT to import 'mine'"),
            ({"peft_type": ["LORA"]}, "which PEFT does not know"),
            ({"peft_type": "NONE"}, "which PEFT does not know"),
            ({"peft_type": "XLORA", "adapters": {"a": "/elsewhere"}}, "adapters of other folders"),
            ({"r": 10**9}, "r=1000000000"),
            ({"rank_pattern": {"x": 10**9}}, "rank_pattern=1000000000"),
            ({"layer_replication": [[0, 10**6]]}, "impossible size"),
            ({"layer_replication": [1]}, "expected pairs"),
            ({"target_modules": 3}, "cannot be read"),
            ({"target_modules": "(q"}, "not a regular expression"),
            ({"lora_alpha": "x"}, "does not fit"),
            ({"use_dora": True}, "Found missing adapter keys"),
            ({"init_lora_weights": "pissa_niter_1000000000"}, "expected at most 64 iterations"),
        ],
        ids=str,
    )
    def test_a_config_that_asks_for_more_than_its_folder_is_refused(
        self, changes, message, adapter, loaded, tmp_path, monkeypatch
    ):
        (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        monkeypatch.syspath_prepend(tmp_path)
        edit(adapter / "adapter_config.json", **changes)
        with pytest.raises(InputError, match=message):
            attach_adapter(loaded, adapter)
        assert not (tmp_path / "ran").exists()
        assert "mine" not in sys.modules

    def test_weights_outside_of_the_folder_are_not_read(self, adapter, loaded, tmp_path):
        (adapter / "adapter_model.safetensors").rename(tmp_path / "x.safetensors")
        (adapter / "adapter_model.safetensors").symlink_to(tmp_path / "x.safetensors")
        with pytest.raises(InputError, match="leads out of"):
            attach_adapter(loaded, adapter)

    def test_expressions_mean_the_same_to_peft_once_they_are_names(self, adapter, image, loaded):
        expected = PeftModel.from_pretrained(opened(image).model, str(adapter))
        found = attach_adapter(loaded, adapter)
        assert adapter_config(adapter, opened(image).model).target_modules != EXPRESSION
        state = found.state_dict()
        assert state.keys() == expected.state_dict().keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in expected.state_dict().items())
