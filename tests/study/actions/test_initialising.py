"""The action that writes models as random weights leave them."""

import json
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from spectralbasis.errors import InputError
from spectralbasis.study.runs import Run, Site
from spectralbasis.study.starting import ARCHITECTURES, initialise
from spectralbasis.training import load_model, load_task, tune
from spectralbasis.training.evaluation import score_task
from spectralbasis.training.models import task_for
from spectralbasis.training.text_tasks import masked_language_task
from tests.checkpoints.test_llama2c import size_of
from tests.training.examples import bright_side_task, save_image_model, save_text_model, write_sst2
from tests.training.tasks.test_corpora import WORDS, words, write_archive
from tests.training.tasks.test_signals import write_motionsense


def initialised(folder, architecture, seed=0, data=None):
    folder.mkdir()
    initialise(Run("initialise", {"architecture": architecture}, seed), Site(data, folder))
    return folder


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("architecture", ["vit-tiny", "bert-tiny", "llama-tiny", "limu-bert"])
def test_the_seed_alone_decides_the_weights(tmp_path, architecture):
    before = torch.get_rng_state()
    first = initialised(tmp_path / "first", architecture)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert same(weights(first), weights(initialised(tmp_path / "again", architecture)))
    assert not same(weights(first), weights(initialised(tmp_path / "other", architecture, seed=1)))


def test_the_result_counts_the_parameters(tmp_path):
    outcome = initialise(Run("initialise", {"architecture": "vit-tiny"}), Site(None, tmp_path))
    assert outcome.result == {"parameters": sum(tensor.numel() for tensor in weights(tmp_path).values())}


@pytest.mark.parametrize("architecture", [pytest.param("vit-digits", marks=pytest.mark.slow), "vit-tiny"])
def test_vision_transformers_are_tuned_from_random_weights(tmp_path, architecture):
    model = initialised(tmp_path / "model", architecture)
    result = tune(
        model, task=bright_side_task(), output=tmp_path / "tuned", method="full", steps=30, learning_rate=3e-3,
        progress=False,
    )  # fmt: skip
    assert result.score == 1


def test_a_text_model_has_a_tokenizer_of_its_corpus_and_reads_pairs(tmp_path):
    model = initialised(tmp_path / "model", "bert-tiny")
    loaded = load_model(model, load_task("descriptions"))
    tokenizer = loaded.collator.tokenizer
    assert loaded.head == ()
    assert len(tokenizer) == loaded.model.config.vocab_size == 512
    tokens = tokenizer("The Iris dataset £")["input_ids"]
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "the iris dataset £"
    pair = tokenizer("one", "two")
    assert pair["input_ids"].count(tokenizer.sep_token_id) == 2
    assert sorted(set(pair["token_type_ids"])) == [0, 1]
    classifier = load_model(model, load_task("sst2", write_sst2(tmp_path)), max_length=16)
    assert classifier.head == ("classifier", "bert.pooler.dense")


def test_pairs_have_types_where_the_folder_does_not_say_so(tmp_path):
    """As transformers 4 wrote it, whose tokenizers of no model's own class give types to all."""
    model = initialised(tmp_path / "model", "bert-tiny")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings.pop("model_input_names")
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    pair = load_model(model, load_task("descriptions")).collator.tokenizer("one", "two")
    assert sorted(set(pair["token_type_ids"])) == [0, 1]


def test_the_tokenizer_is_the_same_for_every_seed(tmp_path):
    files = [initialised(tmp_path / str(seed), "bert-tiny", seed) / "tokenizer.json" for seed in (0, 1)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_model_of_the_novels_finds_them_below_the_data_folder(tmp_path):
    books = {f"{number:02}.txt": words(1000 * number, 20 * WORDS) for number in range(10)}
    write_archive(tmp_path / "english_novels", books)
    model = initialised(tmp_path / "model", "bert-small", data=tmp_path)
    tokenizer = load_model(model, load_task("novels", tmp_path), max_length=32).collator.tokenizer
    assert tokenizer.tokenize("w0 w1") == tokenizer.tokenize("W0 W1")
    with pytest.raises(InputError, match="novels needs --data"):
        initialised(tmp_path / "without", "bert-small")


def test_the_twin_of_a_text_model_has_its_config_and_tokenizer_and_other_weights(tmp_path):
    source = save_text_model(tmp_path / "source")
    twin = initialised(tmp_path / "twin", {"like": str(source)}, seed=1)
    original, drawn = weights(source), weights(twin)
    assert {name: tensor.shape for name, tensor in drawn.items()} == {
        name: tensor.shape for name, tensor in original.items()
    }
    name = "encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(original[name], drawn[name])
    task = load_task("sst2", write_sst2(tmp_path))
    row = {"sentence": "the film is good", "label": 1}
    batches = [load_model(folder, task, max_length=16).collator([row]) for folder in (source, twin)]
    assert torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])


def test_the_twin_of_an_image_model_scales_images_as_it_does(tmp_path):
    source = save_image_model(tmp_path / "source")
    loaded = load_model(source, bright_side_task())
    (source / "preprocessor_config.json").write_text('{"image_mean": [0.2], "image_std": [0.3]}')
    twin = load_model(initialised(tmp_path / "twin", {"like": str(source)}), bright_side_task())
    assert (twin.collator.mean, twin.collator.std) == ((0.2,), (0.3,))
    assert twin.model.config.hidden_size == loaded.model.config.hidden_size


def test_what_is_not_known_or_absent_is_named(tmp_path):
    with pytest.raises(InputError, match="unknown architecture 'vit-huge'") as caught:
        initialised(tmp_path / "huge", "vit-huge")
    assert all(name in str(caught.value) for name in ARCHITECTURES)
    with pytest.raises(InputError, match=r"limu-bert-x is read from .*pass --data"):
        initialised(tmp_path / "released", "limu-bert-x")
    with pytest.raises(InputError, match="no LIMU-BERT weights at"):
        initialised(tmp_path / "absent", "limu-bert-x", data=tmp_path)
    with pytest.raises(InputError, match=r"no stories260K\.bin in .*stories260K; give the folder"):
        initialised(tmp_path / "untold", "stories260K", data=tmp_path)
    with pytest.raises(InputError, match="nowhere does not exist"):
        initialised(tmp_path / "twin", {"like": str(tmp_path / "nowhere")})


@pytest.mark.parametrize("header", [(8, 12, 2, 4, 2, 5, 6), (64, 172, 4, 8, 4, 512, 512)])
def test_other_files_of_llama2c_are_not_taken_for_stories260k(tmp_path, header):
    folder = tmp_path / "stories260K"
    folder.mkdir()
    numbers = np.zeros(size_of(header), "<f4")
    (folder / "stories260K.bin").write_bytes(struct.pack("<7i", *header) + numbers.tobytes())
    (folder / "tok512.bin").write_bytes(bytes(4))
    with pytest.raises(InputError, match="are not those of stories260K"):
        initialised(tmp_path / "model", "stories260K", data=tmp_path)


@pytest.mark.data
def test_the_released_teller_of_stories_has_its_numbers_and_predicts_the_next_token(tmp_path, data_dir):
    outcome = initialise(Run("initialise", {"architecture": "stories260K"}), Site(data_dir, tmp_path))
    assert outcome.result == {"parameters": 260_032}
    assert task_for(tmp_path, load_task("descriptions")).kind == "causal_language"
    story = ["Once upon a time, there was a little girl named Lily. She loved to play outside in the park."]
    loaded = load_model(tmp_path, task_for(tmp_path, masked_language_task("story", story, story, "all")))
    found = score_task(loaded.model, loaded.task, loaded.collator, progress=False)
    assert found["perplexity"] < 4


@pytest.mark.data
def test_the_released_motion_model_is_opened_like_any_other(tmp_path, data_dir):
    model = initialised(tmp_path / "model", "limu-bert-x", data=data_dir)
    stored = torch.load(
        data_dir / "limu_bert" / "x" / "weights" / "limu_bert_x.pt", map_location="cpu", weights_only=True
    )
    found = weights(model)
    assert all(torch.equal(tensor, stored[f"transformer.{name}"]) for name, tensor in found.items())
    write_motionsense(tmp_path)
    assert load_model(model, load_task("MotionSense", tmp_path)).head == ("classifier",)


def test_minilm_has_an_untrained_twin(tmp_path, minilm):
    twin = initialised(tmp_path / "twin", {"like": "minilm"})
    loaded = load_model(twin, load_task("sst2", write_sst2(tmp_path)), max_length=16)
    assert sum(p.numel() for p in loaded.model.parameters()) > 22_000_000
