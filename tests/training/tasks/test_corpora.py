"""Tasks of masked language modelling from archives and text files."""

import io
import itertools
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectralbasis.errors import InputError
from spectralbasis.training import load_task
from spectralbasis.training.text_tasks import EVALUATION_PASSAGES, NOVELS, WORDS, masked_language_task, passages


def words(start, count):
    return " ".join(f"w{number}" for number in range(start, start + count))


def write_archive(folder, texts):
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / NOVELS, "w:xz") as archive:
        for name, text in texts.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))


@given(st.integers(0, 5 * WORDS))
def test_passages_hold_the_words_in_order_and_leave_out_less_than_one(count):
    text = words(0, count)
    cut = passages(text.replace(" ", "\n  "))
    assert all(len(passage.split()) == WORDS for passage in cut) or count < WORDS
    kept = sum(len(passage.split()) for passage in cut)
    assert " ".join(cut).split() == text.split()[:kept]
    assert count - kept < WORDS


def test_every_tenth_book_is_held_out_whole(tmp_path):
    books = {f"corpus/{number:02}.txt": words(1000 * number, 2 * WORDS) for number in range(20)}
    write_archive(tmp_path / "english_novels", {**books, "corpus/notes.md": "not a book " * 100})
    task = load_task("novels", tmp_path)
    assert (len(task.train), len(task.evaluation)) == (36, 4)
    held_out = " ".join(task.evaluation["text"][:]).split()
    assert {int(word[1:]) // 1000 for word in held_out} == {9, 19}
    assert not set(held_out) & set(" ".join(task.train["text"][:]).split())


def test_shakespeare_ends_with_what_is_held_out(tmp_path):
    (tmp_path / "tinyshakespeare.txt").write_text(words(0, 20 * WORDS))
    task = load_task("shakespeare", tmp_path)
    assert (len(task.train), len(task.evaluation)) == (18, 2)
    assert task.evaluation[1]["text"] == words(19 * WORDS, WORDS)
    assert (task.kind, task.headline, task.num_labels) == ("masked_language", "log_likelihood", 0)


def test_wikitext_is_scored_on_its_test_part(tmp_path):
    for number, part in enumerate(("valid", "test")):
        (tmp_path / f"wikitext2_{part}.txt").write_text(words(1000 * number, WORDS))
    task = load_task("WikiText-2", tmp_path)
    assert (task.train["text"][:], task.evaluation["text"][:]) == ([words(0, WORDS)], [words(1000, WORDS)])


def test_long_evaluations_are_thinned_evenly():
    task = masked_language_task("long", ["a"], [str(number) for number in range(5 * EVALUATION_PASSAGES)], "end")
    chosen = [int(text) for text in task.evaluation["text"][:]]
    assert (len(chosen), chosen[0], chosen[-1]) == (EVALUATION_PASSAGES, 0, 5 * EVALUATION_PASSAGES - 1)
    assert {after - before for before, after in itertools.pairwise(chosen)} <= {5, 6}


def test_the_descriptions_need_no_data(tmp_path):
    task = load_task("descriptions")
    assert len(task.train) > 100
    assert "iris" in " ".join(task.train["text"][:]).lower()
    with pytest.raises(InputError, match="bundled with scikit-learn and reads no data"):
        load_task("descriptions", tmp_path)


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(InputError, match="novels needs --data"):
        load_task("novels")
    with pytest.raises(InputError, match=r"no tinyshakespeare\.txt for the task Shakespeare"):
        load_task("Shakespeare", tmp_path)
    (tmp_path / NOVELS).write_bytes(b"\xfd7zXZ no archive")
    with pytest.raises(InputError, match="cannot be read as an archive"):
        load_task("novels", tmp_path)
    (tmp_path / "tinyshakespeare.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="cannot be read as UTF-8"):
        load_task("Shakespeare", tmp_path)
    write_archive(tmp_path / "english_novels", {"corpus/one.txt": words(0, WORDS)})
    with pytest.raises(InputError, match="novels has 0 passages to train on and 1 held out"):
        load_task("novels", tmp_path / "english_novels")


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "train", "evaluation"),
    [("novels", 300_000, 1024), ("Shakespeare", 4000, 500), ("WikiText-2", 5000, 1024)],
)
def test_the_real_texts_are_read_whole(data_dir, name, train, evaluation):
    task = load_task(name, data_dir / ("english_novels" if name == "novels" else "wikitext2_shakespeare"))
    assert len(task.train) == pytest.approx(train, rel=0.15)
    assert len(task.evaluation) == pytest.approx(evaluation, rel=0.15)
