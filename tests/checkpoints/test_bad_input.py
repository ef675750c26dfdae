"""Each wrong input is an InputError of one paragraph that names the input and says what to do."""

import json
import os
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from spectralbasis.checkpoints import open_checkpoint
from spectralbasis.errors import InputError

WEIGHTS = {"a.weight": torch.eye(4)}


def refusal(source) -> str:
    with pytest.raises(InputError) as caught:
        open_checkpoint(source)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    return message


def write_index(folder, file):
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a.weight": file}}))
    return index


class RunsCode:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_missing_path(tmp_path):
    assert "does not exist" in refusal(tmp_path / "nothing.safetensors")


def test_missing_file_with_a_plain_name_is_not_looked_up_on_the_hub():
    assert "nothing.safetensors does not exist" in refusal("nothing.safetensors")


@pytest.mark.parametrize("source", ["a/" * 3000, "a\0b"])
def test_impossible_path(source):
    with pytest.raises(InputError):
        open_checkpoint(source)


def test_empty_folder(tmp_path):
    assert "holds no weights" in refusal(tmp_path)


def test_folder_with_weights_in_a_subfolder_suggests_it(tmp_path):
    (tmp_path / "final").mkdir()
    save_file(WEIGHTS, tmp_path / "final" / "model.safetensors")
    assert f"did you mean {tmp_path / 'final'}?" in refusal(tmp_path)


def test_several_candidates_are_listed(tmp_path):
    for name in ("first.safetensors", "second.safetensors"):
        save_file(WEIGHTS, tmp_path / name)
    message = refusal(tmp_path)
    assert "first.safetensors, second.safetensors" in message


def test_standard_name_wins_over_others(tmp_path):
    save_file({"other.weight": torch.eye(2)}, tmp_path / "adapter.safetensors")
    torch.save({"other.weight": torch.eye(2)}, tmp_path / "pytorch_model.bin")
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).names() == ("a.weight",)


@pytest.mark.parametrize("keep", [0, 4, 20, -1])
def test_truncated_safetensors(tmp_path, keep):
    path = tmp_path / "model.safetensors"
    save_file(WEIGHTS, path)
    path.write_bytes(path.read_bytes()[:keep])
    assert str(path) in refusal(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_torch_file(tmp_path, zipped):
    path = tmp_path / "model.pt"
    torch.save(WEIGHTS, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[:-40])
    assert "cut short" in refusal(path)


@pytest.mark.parametrize("writer", ["torch", "torch before 1.6", "pickle"])
def test_pickle_that_would_run_code(tmp_path, writer):
    path, marker = tmp_path / "model.pt", tmp_path / "ran"
    if writer == "pickle":
        path.write_bytes(pickle.dumps({"a": RunsCode(marker)}, protocol=2))
    else:
        torch.save({"a": RunsCode(marker)}, path, _use_new_zipfile_serialization=writer == "torch")
    message = refusal(path)
    assert "refused" in message
    assert "system" in message
    assert "safetensors" in message
    assert not marker.exists()


def test_pickled_module(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "model.pt")
    assert "torch.nn.modules.linear.Linear" in refusal(tmp_path / "model.pt")


@pytest.mark.parametrize("content", [b"", b"hello world\n", b"\x80\x02]q\x00."])
def test_no_checkpoint(tmp_path, content):
    (tmp_path / "model.pt").write_bytes(content)
    assert str(tmp_path / "model.pt") in refusal(tmp_path / "model.pt")


def test_other_zip_file(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "not a readable torch checkpoint" in refusal(tmp_path / "model.pt")


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_file_with_the_suffix_of_safetensors(tmp_path, zipped):
    torch.save(WEIGHTS, tmp_path / "model.safetensors", _use_new_zipfile_serialization=zipped)
    assert "rename it to model.bin" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["model.weights", "model"])
def test_other_format(tmp_path, name):
    (tmp_path / name).write_bytes(b"something else")
    message = refusal(tmp_path / name)
    assert "has an unknown format" in message
    assert "expected safetensors (.safetensors)" in message


@pytest.mark.parametrize("saved", [[torch.eye(2)], {"epoch": 3}, {}])
def test_torch_file_without_a_state(tmp_path, saved):
    torch.save(saved, tmp_path / "model.pt")
    assert "state_dict" in refusal(tmp_path / "model.pt")


@pytest.mark.parametrize("source", [{}, {"a": 1}, 7, None, nn.Flatten()])
def test_objects_without_weights(source):
    assert "expected" in refusal(source) or "pass a path" in refusal(source)


@pytest.mark.parametrize("file", ["/etc/passwd", "../outside.safetensors", "sub/../../outside.safetensors"])
def test_index_that_leads_out_of_the_folder(tmp_path, file):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(WEIGHTS, tmp_path / "outside.safetensors")
    write_index(folder, file)
    message = refusal(folder)
    assert file in message
    assert "refused" in message


@pytest.mark.parametrize("name", ["model.safetensors", "shard.safetensors", "config.json"])
def test_link_out_of_the_folder(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(WEIGHTS, tmp_path / "secret")
    (folder / name).symlink_to(tmp_path / "secret")
    if name == "shard.safetensors":
        write_index(folder, name)
    elif name == "config.json":
        save_file(WEIGHTS, folder / "model.safetensors")
    assert "refused" in refusal(folder)


def test_links_of_the_hub_cache_are_followed(tmp_path):
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    save_file(WEIGHTS, repository / "blobs" / "123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/123")
    assert open_checkpoint(snapshot).names() == ("a.weight",)


def test_index_whose_shard_is_missing(tmp_path):
    write_index(tmp_path, "model-1.safetensors")
    assert "model-1.safetensors, which is missing" in refusal(tmp_path)


@pytest.mark.parametrize("numbers", [(1,), (1, 3)])
def test_shards_without_an_index_that_are_not_all_there(tmp_path, numbers):
    for number in numbers:
        save_file({f"{number}.weight": torch.eye(2)}, tmp_path / f"model-{number:05}-of-00003.safetensors")
    save_file(WEIGHTS, tmp_path / "consolidated.safetensors")
    message = refusal(tmp_path)
    assert f"{len(numbers)} of 3 shards" in message
    assert "model-00002-of-00003.safetensors" in message


def test_shards_without_an_index_that_hold_one_name_twice(tmp_path):
    for number in (1, 2):
        save_file(WEIGHTS, tmp_path / f"model-{number:05}-of-00002.safetensors")
    message = refusal(tmp_path)
    assert "both model-00001-of-00002.safetensors and model-00002-of-00002.safetensors hold a.weight" in message


def test_two_variants_are_asked_about(tmp_path):
    for variant in ("fp16", "bf16"):
        save_file(WEIGHTS, tmp_path / f"model.{variant}.safetensors")
    assert "model.bf16.safetensors, model.fp16.safetensors" in refusal(tmp_path)


def test_index_that_places_a_tensor_wrongly(tmp_path):
    save_file({"b.weight": torch.eye(2)}, tmp_path / "shard.safetensors")
    write_index(tmp_path, "shard.safetensors")
    assert "places a.weight in shard.safetensors" in refusal(tmp_path)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"weight_map": []}', '{"weight_map": {"a": 3}}', "\xff", "[" * 100_000]
)
def test_corrupt_index(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content, encoding="latin-1")
    assert "index.json" in refusal(tmp_path)


def test_corrupt_config(tmp_path):
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{'single': quotes}")
    assert "config.json is not valid JSON" in refusal(tmp_path)


def test_file_that_vanishes_between_opening_and_reading(tmp_path):
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot be read"):
        checkpoint.read("a.weight")


def test_meta_weights_are_refused_when_read():
    checkpoint = open_checkpoint(nn.Linear(2, 2, device="meta"))
    with pytest.raises(InputError, match="meta device"):
        checkpoint.read("weight")


@pytest.mark.parametrize("kind", ["pipe", "folder", "loop"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "model.safetensors.index.json"])
def test_what_is_no_file_is_refused_at_once(tmp_path, kind, name):
    place = tmp_path / name
    if name == "config.json":
        save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    else:
        place.symlink_to(name)
    with pytest.raises(InputError):
        open_checkpoint(tmp_path)


def test_an_index_is_no_shard(tmp_path):
    index = {"weight_map": {"a.weight": "model.safetensors.index.json"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "which is an index" in refusal(tmp_path)


def test_mappings_that_share_others_are_looked_into_once(tmp_path):
    maze = {}
    for _ in range(6):
        maze = {f"part{number}": maze for number in range(60)}
    torch.save(maze, tmp_path / "maze.pt")
    assert "holds no tensors" in refusal(tmp_path / "maze.pt")


def test_a_header_whose_length_begins_as_an_archive_does(tmp_path):
    header = json.dumps({"a.weight": {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes((0x8B1F).to_bytes(8, "little") + header.ljust(0x8B1F) + bytes(4))
    assert open_checkpoint(file).names() == ("a.weight",)


@pytest.mark.parametrize("name", ["a" * 5000, ".".join("a" * 300)])
def test_names_that_no_model_has(tmp_path, name):
    save_file({name: torch.eye(2)}, tmp_path / "model.safetensors")
    assert "rename it" in refusal(tmp_path)


def test_a_config_of_something_else_beside_a_file_is_told_of(tmp_path):
    save_file({"a.weight": torch.eye(2)}, tmp_path / "weights.safetensors")
    (tmp_path / "config.json").write_text("[1]")
    with pytest.warns(UserWarning, match="is read without its config"):
        assert open_checkpoint(tmp_path / "weights.safetensors").config == {}


def test_matrices_beside_the_state_that_is_taken(tmp_path):
    torch.save({**WEIGHTS, "model": {"b.weight": torch.eye(3)}}, tmp_path / "run.pt")
    assert "and also a state_dict in" in refusal(tmp_path / "run.pt")


def test_the_file_that_a_config_names_is_the_one_read(tmp_path):
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    save_file({"b.weight": torch.eye(3)}, tmp_path / "real.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"transformers_weights": "real.safetensors"}))
    assert open_checkpoint(tmp_path).names() == ("b.weight",)
    (tmp_path / "config.json").write_text(json.dumps({"transformers_weights": "../real.safetensors"}))
    assert "leads out of" in refusal(tmp_path)


def test_hidden_companions_of_files_are_no_weights(tmp_path):
    save_file(WEIGHTS, tmp_path / "w.safetensors")
    (tmp_path / "._w.safetensors").write_bytes(b"\0\5\26\7")
    assert open_checkpoint(tmp_path).names() == ("a.weight",)
