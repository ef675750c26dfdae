"""Output folders appear whole or not at all."""

import pytest
from safetensors import SafetensorError

from spectralbasis.errors import InputError
from spectralbasis.folders import atomic_folder, check_output


def test_a_folder_appears_when_the_block_ends(tmp_path):
    target = tmp_path / "new" / "folder"
    with atomic_folder(target) as folder:
        (folder / "file").write_text("content")
        assert not target.exists()
    assert (target / "file").read_text() == "content"
    assert [entry.name for entry in target.parent.iterdir()] == ["folder"]


def test_a_failure_leaves_the_old_folder_as_it_was(tmp_path):
    target = tmp_path / "folder"
    target.mkdir()
    (target / "file").write_text("old")
    with pytest.raises(FileNotFoundError), atomic_folder(target) as folder:
        (folder / "file").joinpath("missing").read_text()
    assert (target / "file").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left"), SafetensorError("IoError(Os { code: 28 }) (os error 28)")]
)
def test_a_full_disk_is_a_sentence_and_other_errors_stay_what_they_are(tmp_path, error):
    with pytest.raises(InputError, match="there is no room for it"), atomic_folder(tmp_path / "folder"):
        raise error
    with pytest.raises(SafetensorError, match="header"), atomic_folder(tmp_path / "folder"):
        raise SafetensorError("header")
    assert not list(tmp_path.iterdir())


def test_a_parent_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"), atomic_folder(tmp_path / "file" / "folder"):
        pass


def test_an_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file; name a new folder"):
        check_output(tmp_path / "file", overwrite=True, written_file="tuning.json")


def test_a_second_writer_is_refused_while_the_first_is_at_work(tmp_path):
    with atomic_folder(tmp_path / "folder") as folder:
        with (
            pytest.raises(InputError, match="another command is writing"),
            atomic_folder(tmp_path / "folder"),
        ):
            pass
        with atomic_folder(tmp_path / "folder.other"):
            pass
        (folder / "file").write_text("first")
    assert (tmp_path / "folder" / "file").read_text() == "first"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["folder", "folder.other"]


@pytest.mark.parametrize("parts", [(), ("new",), ("new", "old")])
def test_what_a_killed_process_left_is_removed_and_what_it_had_moved_away_is_put_back(tmp_path, parts):
    (tmp_path / ".folder.abcd_123").mkdir()
    for part in parts:
        (tmp_path / ".folder.abcd_123" / part).mkdir(parents=True)
        (tmp_path / ".folder.abcd_123" / part / "file").write_text(part)
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "folder"):
        _ = 1 // 0
    assert [entry.name for entry in tmp_path.iterdir()] == (["folder"] if "old" in parts else [])
    assert "old" not in parts or (tmp_path / "folder" / "file").read_text() == "old"
