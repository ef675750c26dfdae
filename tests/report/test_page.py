"""The written file: self-contained, complete without a script, safe with hostile names."""

import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest

from spectralbasis.errors import InputError
from spectralbasis.report import write_report
from tests.report import results

EXTERNAL = {"src", "href", "srcset", "action", "data", "poster"}


class Document(HTMLParser):
    """Elements with their attributes, the text outside scripts and styles, and the scripts' text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        tag = self.elements[-1][0] if self.elements else ""
        if self.cdata_elem == "script":
            self.scripts.append(data)
        elif tag != "style":
            self.text.append(data)


def write(folder, **changes):
    table = changes.pop("table", None)
    table = results.comparison(layers=1, k=4) if table is None else table
    results.write_results(folder, table, results.summary(**changes), results.tuning())
    return write_report(folder)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write(tmp_path_factory.mktemp("results")).read_text(encoding="utf-8")


def test_the_report_is_index_html_in_the_folder(tmp_path):
    assert write(tmp_path) == tmp_path / "index.html"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".spectralbasis",
        "comparison.parquet",
        "index.html",
        "summary.json",
        "tuning.json",
    ]


def test_nothing_is_loaded_from_elsewhere(page):
    links = [
        value for _, attributes in Document(page).elements for name, value in attributes.items() if name in EXTERNAL
    ]
    assert links
    assert all(link.startswith("#") for link in links)
    assert "@import" not in page
    assert not re.search(r"url\(\s*[\"']?(https?:)?//", page.split("<script", 1)[0])


def test_only_the_two_scripts_of_the_page_may_run(page):
    document = Document(page)
    (policy,) = [
        attributes["content"] for tag, attributes in document.elements if "http-equiv" in attributes and tag == "meta"
    ]
    _payload, *scripts = document.scripts
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    assert f"script-src {allowed};" in policy
    assert policy.startswith("default-src 'none'")
    assert len(scripts) == 2


def test_title_headings_and_landmarks_tell_what_the_page_is(page):
    tags = [tag for tag, _ in Document(page).elements]
    assert "<title>minilm against rte, sst2 · spectralbasis</title>" in page
    assert tags.count("h1") == tags.count("main") == tags.count("nav") == 1
    ids = [attributes["id"] for _, attributes in Document(page).elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in Document(page).elements:
        for name in ("aria-labelledby", "for"):
            assert attributes.get(name) is None or attributes[name] in ids


def test_verdicts_notes_skips_and_settings_are_in_the_markup(page):
    text = " ".join(" ".join(Document(page).text).split())
    for expected in (
        "Do the leading directions stay where they were?",
        "+0.0210 to +0.0380",
        "Stability at the null's level only shows that the update is small.",
        "only in the finetuned checkpoint",
        "torch 2.13.0",
        "612.0 MB",
        "none was searched for its learning rate",
        "encoder.layer.0.attention.self.query",
    ):
        assert expected in text


def test_hostile_names_are_text(tmp_path):
    evil = [results.HOSTILE, '</script><img src=x onerror="alert(1)">', "\"quoted' `x`", "line\u2028sep\u2029"]
    names = results.matrices(2, dict.fromkeys(evil, (64, 48)))
    summary = {
        "base": evil[0],
        "skipped": {name: name for name in evil},
        "leading": evil[1],
        "versions": {evil[0]: evil[1]},
    }
    table = results.comparison(evil[:2], names=names, k=4)
    page = write(tmp_path, table=table, tuned=evil[:2], **summary).read_text(encoding="utf-8")
    plain = Document(page)
    assert not [tag for tag, _ in plain.elements if tag == "img"]
    assert len(plain.scripts) == 3
    assert not [name for _, attributes in plain.elements for name in attributes if name.startswith("on")]
    assert "alert(1)" in "".join(plain.text)
    assert "\u2028" not in "".join(plain.scripts[:1])


def test_a_name_that_utf8_lacks_is_spelled_out(tmp_path):
    assert rb"lone \ud800" in write(tmp_path, skipped={"lone \ud800": "reason"}).read_bytes()


def test_one_checkpoint_needs_no_selection(tmp_path):
    page = write(tmp_path, table=results.comparison(("rte",), layers=1, k=2), tuned=("rte",)).read_text(
        encoding="utf-8"
    )
    assert 'id="selection"' not in page
    assert "checkpoints" not in page.split("<footer", 1)[0].split("<main>")[1].split('id="overlap"')[0]


def test_a_failed_report_leaves_the_old_one(tmp_path):
    before = write(tmp_path).read_bytes()
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(InputError):
        write_report(tmp_path)
    assert (tmp_path / "index.html").read_bytes() == before


def test_a_large_comparison_is_carried_in_part(tmp_path):
    names = results.matrices(20, {f"kind.{i}": (512, 512) for i in range(10)})
    tuned = tuple(f"task{i}" for i in range(32))
    path = write(tmp_path, table=results.comparison(tuned, names=names, layers=20, k=64), tuned=tuned)
    assert path.stat().st_size < 7_500_000
    assert "carries their mean and range only" in path.read_text(encoding="utf-8")
