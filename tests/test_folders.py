"""Output folders appear whole or not at all."""

from pathlib import Path

import pytest
from safetensors import SafetensorError

from spectralbasis import files
from spectralbasis.errors import InputError
from spectralbasis.files import LIST, atomic_folder, check_output, claim_files, not_ours


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
    with pytest.raises(InputError, match="the disk is full"), atomic_folder(tmp_path / "folder"):
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
        check_output(tmp_path / "file", overwrite=True)


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


def left_over(target, *parts):
    scratch = target.with_name(files._prefix(target) + "abcdefgh")
    scratch.mkdir()
    (scratch / "spectralbasis.lock").touch()
    for part in parts:
        (scratch / part).mkdir()
        (scratch / part / "file").write_text(part)
    return scratch


@pytest.mark.parametrize("parts", [(), ("new",), ("new", "old")])
def test_what_a_killed_process_left_is_removed_and_what_it_had_moved_away_is_put_back(tmp_path, parts):
    left_over(tmp_path / "folder", *parts)
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "folder"):
        _ = 1 // 0
    assert [entry.name for entry in tmp_path.iterdir()] == (["folder"] if "old" in parts else [])
    assert "old" not in parts or (tmp_path / "folder" / "file").read_text() == "old"


def test_a_folder_that_was_put_back_is_not_replaced_without_being_asked(tmp_path):
    left_over(tmp_path / "folder", "new", "old")
    with pytest.raises(InputError, match=r"is not empty; name a new one, or add --overwrite \(overwrite=True\)"):
        check_output(tmp_path / "folder", overwrite=False)
    assert (tmp_path / "folder" / "file").read_text() == "old"


def test_folders_of_a_person_with_names_like_ours_survive(tmp_path):
    for name in (".folder.original", ".folder.abcd_123", files._prefix(tmp_path / "folder") + "abcdefgh"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("a person's")
    make(tmp_path / "folder")
    assert len([file for file in tmp_path.rglob("file") if file.read_text() == "a person's"]) == 3


def make(path, content="new"):
    with atomic_folder(path) as folder:
        (folder / "made").write_text(content)


def test_only_a_folder_that_we_made_and_that_holds_nothing_else_is_replaced(tmp_path):
    make(tmp_path / "ours")
    check_output(tmp_path / "ours", overwrite=True)
    assert not_ours(tmp_path / "ours") == []
    (tmp_path / "ours" / "notes.txt").write_text("a person's")
    with pytest.raises(InputError, match=r"holds notes\.txt, which no earlier run wrote"):
        check_output(tmp_path / "ours", overwrite=True)
    for name, content in {"model": None, "damaged": "{", "other": '{"a": 1}'}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        if content is not None:
            (tmp_path / name / LIST).write_text(content)
        with pytest.raises(InputError, match="was not made by spectralbasis, so it is not replaced"):
            check_output(tmp_path / name, overwrite=True)


def test_a_folder_that_is_replaced_keeps_its_mode(tmp_path):
    make(tmp_path / "folder")
    (tmp_path / "folder").chmod(0o750)
    make(tmp_path / "folder", "newer")
    assert (tmp_path / "folder" / "made").read_text() == "newer"
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o750


def test_a_link_that_leads_to_a_folder_stays_and_the_folder_is_written(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    check_output(tmp_path / "link", overwrite=False)
    make(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "made").read_text() == "new"


@pytest.mark.parametrize("name", [".", "", "../here", ".."])
def test_the_working_folder_can_be_the_output(tmp_path, monkeypatch, name):
    inner = tmp_path / "here" / "inner" if name == ".." else tmp_path / "here"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    if name != "..":
        check_output(Path(name), overwrite=False)
        make(Path(name))
        assert (tmp_path / "here" / "made").read_text() == "new"
    else:
        with pytest.raises(InputError, match="is not empty"):
            check_output(Path(name), overwrite=False)


@pytest.mark.parametrize("to", ["nowhere", "file", "link"])
def test_a_link_that_leads_to_no_folder_is_refused(tmp_path, to):
    (tmp_path / "file").write_text("a person's")
    (tmp_path / "link").symlink_to(to)
    with pytest.raises(InputError, match=r"is a file|a link to .*, which is not a folder"):
        check_output(tmp_path / "link", overwrite=True)
    with pytest.raises(InputError, match="which is not a folder"):
        make(tmp_path / "link")
    assert (tmp_path / "file").read_text() == "a person's"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "link"]


def make_while_another_does(path):
    with atomic_folder(path) as folder:
        (folder / "made").write_text("new")
        path.mkdir()
        (path / "file").write_text("a person's")


def test_a_place_that_was_filled_meanwhile_is_kept_and_so_is_what_was_made(tmp_path):
    with pytest.raises(InputError, match=r"was written by another process; the result is in .*folder-1"):
        make_while_another_does(tmp_path / "folder")
    assert (tmp_path / "folder" / "file").read_text() == "a person's"
    assert (tmp_path / "folder-1" / "made").read_text() == "new"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["folder", "folder-1"]


def test_a_folder_that_cannot_take_its_place_leaves_the_old_one(tmp_path, monkeypatch):
    make(tmp_path / "folder", "old")
    rename = files.Path.rename

    def failing(self, target):
        if self.name == "new":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(files.Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output"):
        make(tmp_path / "folder")
    monkeypatch.undo()
    assert (tmp_path / "folder" / "made").read_text() == "old"


def test_claimed_files_are_written_again_and_others_never(tmp_path):
    claim_files(tmp_path, "index.html")
    (tmp_path / "index.html").write_text("ours")
    claim_files(tmp_path, "index.html", "summary.json")
    (tmp_path / "notes.json").write_text("a person's")
    with pytest.raises(InputError, match=r"holds notes\.json, which no earlier run wrote"):
        claim_files(tmp_path, "notes.json")
    claim_files(tmp_path, "notes.json", adopt=True)
    claim_files(tmp_path, "notes.json")


def test_a_page_of_ours_is_known_without_a_list(tmp_path):
    (tmp_path / "index.html").write_text('<html><meta name="generator" content="spectralbasis 1.0"></html>')
    claim_files(tmp_path, "index.html")
    (tmp_path / ".spectralbasis").unlink()
    (tmp_path / "index.html").write_text("<html>mine</html>")
    with pytest.raises(InputError, match="no earlier run wrote"):
        claim_files(tmp_path, "index.html")


@pytest.mark.parametrize("change", ["text", "folder", "beside"])
def test_what_was_changed_since_is_not_replaced(tmp_path, change):
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "README.md").write_text("ours")
        (folder / "part").mkdir()
        (folder / "part" / "file").write_text("ours too")
    check_output(tmp_path / "out", overwrite=True)
    changed = tmp_path / "out" / "README.md"
    if change == "text":
        changed.write_text("mine")
    elif change == "folder":
        changed.unlink()
        changed.mkdir()
        (changed / "precious").write_text("mine")
    else:
        (tmp_path / "out" / "part" / "precious").write_text("mine")
    with pytest.raises(InputError, match="changed since"):
        check_output(tmp_path / "out", overwrite=True)
