"""GLUE tasks from files in the original layout."""

import pytest

from spectralbasis.errors import InputError
from spectralbasis.training import load_task, task_names
from spectralbasis.training.text_tasks import GLUE_TASKS, load_glue
from tests.training.examples import RTE_HEADER, write_sst2, write_tsv

RTE_ROWS = [("0", 'the "film', "is bad", "entailment"), ("1", "a plane", 'takes off"', "not_entailment")]


def write_both(folder, header, rows, **options):
    for name in ("train.tsv", "dev.tsv"):
        write_tsv(folder / name, [*([header] if header else []), *rows], **options)


def test_quotes_are_text(tmp_path):
    write_both(tmp_path / "RTE", RTE_HEADER, RTE_ROWS)
    task = load_task("RTE", tmp_path)
    assert task.train["sentence1"][:] == ['the "film', "a plane"]
    assert task.train["sentence2"][:] == ["is bad", 'takes off"']
    assert task.train["label"][:] == [0, 1]
    assert task.train.features["label"].names == ["entailment", "not_entailment"]
    assert task.evaluation_split == "dev"


def test_cola_has_no_header_and_its_label_in_the_second_column(tmp_path):
    write_both(tmp_path / "CoLA", None, [("gj04", "1", "", "the film is good"), ("gj04", "0", "*", "the is film")])
    task = load_task("cola", tmp_path)
    assert task.train[:] == {"sentence": ["the film is good", "the is film"], "label": [1, 0]}
    assert task.headline == "matthews"


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    header = ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String")
    write_both(tmp_path / "MRPC", header, [("1", "7", "8", "a film", "the film")], encoding="utf-8-sig")
    task = load_task("mrpc", tmp_path)
    assert task.train[0] == {"sentence1": "a film", "sentence2": "the film", "label": 1}
    assert (task.headline, task.metrics) == ("accuracy", ("accuracy", "f1"))


def test_similarity_is_a_number(tmp_path):
    header = (
        "index",
        "genre",
        "filename",
        "year",
        "old_index",
        "source1",
        "source2",
        "sentence1",
        "sentence2",
        "score",
    )
    write_both(tmp_path / "STS-B", header, [("0", *["x"] * 6, "a plane", "a film", "3.800")])
    task = load_task("stsb", tmp_path)
    assert task.train[0]["label"] == pytest.approx(3.8)
    assert (task.kind, task.num_labels, task.headline) == ("regression", 1, "pearson_spearman")


def test_mnli_scores_on_the_matched_split(tmp_path):
    header = ("index", "sentence1", "sentence2", "label1", "gold_label")
    for name in ("train.tsv", "dev_matched.tsv"):
        write_tsv(tmp_path / "MNLI" / name, [header, ("0", "a film", "a plane", "neutral", "contradiction")])
    task = load_task("mnli", tmp_path)
    assert task.evaluation[0] == {"premise": "a film", "hypothesis": "a plane", "label": 2}
    assert task.evaluation_split == "dev_matched"


def test_the_test_file_is_taken_where_it_has_labels(tmp_path):
    write_sst2(tmp_path)
    folder = next(tmp_path.rglob("train.tsv")).parent
    glue = next(one for one in GLUE_TASKS if one.name == "SST-2")
    usual = load_glue(glue, tmp_path)
    assert load_glue(glue, tmp_path, test=True).evaluation[:] == usual.evaluation[:]
    write_tsv(folder / "test-labeled.tsv", [("sentence", "label"), ("a fine film", "1")])
    tested = load_glue(glue, tmp_path, test=True)
    assert tested.evaluation[:] == {"sentence": ["a fine film"], "label": [1]}
    assert (tested.evaluation_split, usual.evaluation_split) == ("test-labeled", "dev")
    assert load_glue(glue, tmp_path).evaluation[:] == usual.evaluation[:]


@pytest.mark.parametrize("place", ["trec", "text_classification/trec", "."])
def test_a_task_of_csv_files_is_scored_on_its_test_file(tmp_path, place):
    folder = tmp_path / place
    folder.mkdir(parents=True, exist_ok=True)
    with pytest.raises(InputError, match=r"no trec in .*looked for train.csv"):
        load_task("trec", tmp_path)
    (folder / "train.csv").write_text('text,label\n"who, then?",person\nwhere?,place\nwho?,person\nhere?,place\n')
    (folder / "test.csv").write_text("text,label\nwho is it?,person\n")
    task = load_task("trec", tmp_path)
    assert (task.name, task.label_names, len(task.train)) == ("trec", ("person", "place"), 4)
    assert task.evaluation[:]["label"] == [0]


@pytest.mark.parametrize("place", ["RTE", "rte", "glue/RTE", "."])
def test_the_folder_may_be_the_tasks_own_or_one_above(tmp_path, place):
    write_both(tmp_path / place, RTE_HEADER, RTE_ROWS)
    assert len(load_task("rte", tmp_path).train) == 2


@pytest.mark.parametrize("name", ["SST-2", "sst2", "sst-2", "SST_2"])
def test_names_are_found_in_any_case_and_with_or_without_hyphen(tmp_path, name):
    assert load_task(name, write_sst2(tmp_path)).name == "SST-2"


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(InputError, match="unknown task 'glue'") as caught:
        load_task("glue")
    assert all(name in str(caught.value) for name in task_names())


def test_a_folder_without_the_task_says_where_it_looked(tmp_path):
    with pytest.raises(InputError, match="no RTE in") as caught:
        load_task("rte", tmp_path)
    assert str(tmp_path / "RTE") in str(caught.value)
    with pytest.raises(InputError, match=r"missing does not exist; pass --data"):
        load_task("rte", tmp_path / "missing")


def test_a_missing_evaluation_file_is_named(tmp_path):
    write_tsv(tmp_path / "RTE" / "train.tsv", [RTE_HEADER, *RTE_ROWS])
    with pytest.raises(InputError, match=r"RTE lacks dev\.tsv"):
        load_task("rte", tmp_path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("index", "sentence1", "label"), ("0", "a", "entailment")], r"train\.tsv has no column 'sentence2'"),
        ([RTE_HEADER, ("0", "a", "b", "maybe")], r"line 2: the label is 'maybe' where entailment or not_entailment"),
        ([RTE_HEADER, ("0", "a", "b", "2")], r"line 2: the label is '2'"),
        ([RTE_HEADER, ("0", "a", "b", "1"), ("1", "a")], r"line 3: 2 columns where 4 or more"),
        ([RTE_HEADER], r"holds no examples"),
        ([], r"its columns are none"),
    ],
)
def test_a_file_in_another_layout_says_what_is_wrong(tmp_path, rows, message):
    write_tsv(tmp_path / "RTE" / "train.tsv", rows)
    with pytest.raises(InputError, match=message):
        load_task("rte", tmp_path)


def test_a_file_that_is_no_text_is_named(tmp_path):
    write_both(tmp_path / "RTE", RTE_HEADER, [("0", "Ünder", "b", "1")], encoding="latin-1")
    with pytest.raises(InputError, match=r"train\.tsv cannot be read as tab-separated UTF-8"):
        load_task("rte", tmp_path)


def test_without_data_and_offline_the_error_says_what_to_pass(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"RTE cannot be loaded from nyu-mll/glue.*pass --data"):
        load_task("rte")


def test_subsampling_is_decided_by_the_seed(tmp_path):
    task = load_task("sst2", write_sst2(tmp_path))
    first, again, other = (task.subsample(20, seed).train[:] for seed in (0, 0, 1))
    assert first == again != other
    assert len(task.subsample(20, 0).evaluation) == len(task.evaluation)
    with pytest.raises(InputError, match=r"65 training examples were requested of SST-2, which has 64"):
        task.subsample(65, 0)


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "train", "evaluation"),
    [("RTE", 2490, 277), ("MRPC", 3668, 408), ("CoLA", 8551, 1043), ("STS-B", 5749, 1500), ("SST-2", 67349, 872)],
)
def test_the_real_files_are_read_whole(data_dir, name, train, evaluation):
    task = load_task(name, data_dir)
    assert (len(task.train), len(task.evaluation)) == (train, evaluation)
    labels = task.evaluation["label"][:]
    assert set(labels) == {0, 1} if task.kind == "classification" else (min(labels), max(labels)) == (0, 5)
