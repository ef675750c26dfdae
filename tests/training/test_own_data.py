"""From a user's table to an adapter, its scores and predictions, as a user calls them."""

import csv
import json
import logging
import shlex
import subprocess
import sys
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast, TrainerCallback
from typer.testing import CliRunner

import spectralbasis as sb
from spectralbasis.cli import app
from spectralbasis.errors import InputError
from spectralbasis.training import fitting
from spectralbasis.training.collators import IGNORED, CausalCollator
from tests.models import tiny
from tests.training.examples import save_image_model, save_text_model

SHORT: dict[str, Any] = {"steps": 3, "batch_size": 8, "max_length": 16, "progress": False, "leading": 4}
FILMS = [("the film is very good", "liked"), ("a bad film", "hated"), ("a plane takes off", "none")]


@pytest.fixture
def model(tmp_path):
    return save_text_model(tmp_path / "model")


def write_rows(file, rows, header=("text", "label"), separator=","):
    with file.open("w", newline="", encoding="utf-8") as opened:
        csv.writer(opened, delimiter=separator).writerows([header, *rows])
    return file


@pytest.fixture
def films(tmp_path):
    return write_rows(tmp_path / "films.csv", FILMS * 20)


def read_rows(file):
    with file.open(newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def run(*arguments, code=0):
    done = CliRunner().invoke(app, [str(one) for one in arguments])
    assert done.exit_code == code, (done.output, done.exception)
    return done


@pytest.mark.parametrize("method", ["spectral", "full", pytest.param("bitfit", marks=pytest.mark.slow)])
def test_from_a_table_to_predictions(tmp_path, model, films, method):
    options = SHORT if method == "spectral" else {**SHORT, "leading": None}
    tuned = sb.tune(model, train=films, output=tmp_path / "out", method=method, **options)
    whole = method == "full"
    who = (tmp_path / "out", None) if whole else (model, tmp_path / "out")
    assert sb.evaluate(*who, test=films, held_out=True, progress=False).metrics == tuned.metrics
    scores = sb.evaluate(*who, test=films, progress=False)
    assert scores.examples == 60
    new = write_rows(tmp_path / "new.csv", [(n, text) for n, (text, _) in enumerate(FILMS * 20)], ("id", "text"))
    sb.predict_file(*who, new, tmp_path / "predicted.csv", progress=False)
    rows = read_rows(tmp_path / "predicted.csv")
    assert list(rows[0])[:4] == ["id", "text", "prediction", "probability"]
    assert [row["id"] for row in rows] == [str(number) for number in range(60)]
    assert np.mean([row["prediction"] == label for row, (_, label) in zip(rows, FILMS * 20, strict=True)]) == (
        pytest.approx(scores.metrics["accuracy"])
    )
    shares = [[float(row[f"probability_{name}"]) for name in ("hated", "liked", "none")] for row in rows]
    assert np.allclose(np.sum(shares, 1), 1, atol=1e-5)
    assert [max(share) for share in shares] == [float(row["probability"]) for row in rows]
    assert json.loads((tmp_path / "out/tuning.json").read_text())["id2label"] == {
        "0": "hated", "1": "liked", "2": "none"
    }  # fmt: skip
    if whole:
        config = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config
        assert config.id2label == {0: "hated", 1: "liked", 2: "none"}


def test_a_task_that_can_be_learned_is_learned_from_its_table(tmp_path, model, films):
    tuned = sb.tune(
        model, train=films, output=tmp_path / "out", epochs=20, method="full", learning_rate=5e-3, patience=4,
        head_learning_rate=2e-2, batch_size=8, max_length=16, progress=False,
    )  # fmt: skip
    assert tuned.score == 1
    assert tuned.steps < 140  # of seven steps in each of twenty epochs
    assert f"Training stopped after step {tuned.steps} of 140, since accuracy was not better in 4" in tuned.notes[-1]
    found = list(sb.predict(tmp_path / "out", None, ["a bad film", "the film is very good"]))
    assert [row["prediction"] for row in found] == ["hated", "liked"]
    assert found[0]["text"] == "a bad film"


@pytest.mark.parametrize(
    ("source", "suffix"),
    [
        ("csv", ".parquet"), ("parquet", ".csv"), ("jsonl", ".tsv"), ("parquet", ".parquet"),
        *(pytest.param(source, suffix, marks=pytest.mark.slow)
          for source in ("csv", "parquet", "jsonl") for suffix in (".csv", ".jsonl")),
    ],
)  # fmt: skip
def test_predictions_keep_the_columns_of_every_format(tmp_path, model, films, source, suffix):
    adapter = tmp_path / "adapter"
    if not adapter.exists():
        sb.tune(model, train=films, output=adapter, **SHORT)
    frame = pd.DataFrame({"more": [1.5, 2.25, 3.0], "text": [text for text, _ in FILMS], "day": ["NA", "", "x,y"]})
    file = tmp_path / f"new.{source}"
    {"csv": lambda: frame.to_csv(file, index=False), "parquet": lambda: frame.to_parquet(file),
     "jsonl": lambda: frame.to_json(file, orient="records", lines=True)}[source]()  # fmt: skip
    out = tmp_path / f"out{suffix}"
    result = sb.predict_file(model, adapter, file, out, progress=False)
    assert result.rows == 3
    if suffix == ".parquet":
        stored = pq.read_table(out)
        rows = stored.to_pylist()
        assert str(stored.schema.field("probability").type) == "double"
    elif suffix == ".jsonl":
        rows = [json.loads(line) for line in out.read_text().splitlines()]
    else:
        rows = pd.read_csv(out, sep="\t" if suffix == ".tsv" else ",", keep_default_na=False).to_dict("records")
    assert [row["day"] for row in rows] == ["NA", "", "x,y"]
    assert [float(row["more"]) for row in rows] == [1.5, 2.25, 3]
    assert list(rows[0])[:5] == ["more", "text", "day", "prediction", "probability"]


def test_a_regression_predicts_in_the_unit_of_its_labels(tmp_path, model):
    rows = [("good film", "1010.5"), ("bad film", "990")] * 40
    file = write_rows(tmp_path / "prices.csv", rows)
    tuned = sb.tune(
        model, train=file, output=tmp_path / "out", method="lora", learning_rate=1e-2, epochs=10, batch_size=8,
        max_length=16, progress=False,
    )  # fmt: skip
    assert tuned.metrics["r2"] > 0.9
    good, bad = (row["prediction"] for row in sb.predict(model, tmp_path / "out", ["good film", "bad film"]))
    assert good == pytest.approx(1010.5, abs=4)
    assert bad == pytest.approx(990, abs=4)


def test_pairs_of_texts(tmp_path, model):
    rows = [("good", "the film is good", "fits"), ("bad", "the film is good", "off")] * 20
    file = write_rows(tmp_path / "pairs.csv", rows, ("a", "b", "label"))
    sb.tune(model, train=file, text=["a", "b"], output=tmp_path / "out", **SHORT)
    one, other = (
        next(sb.predict(model, tmp_path / "out", [{"b": second, "a": first}]))["probability_fits"]
        for first, second in (("good", "the film is bad"), ("the film is bad", "good"))
    )
    assert one != other
    with pytest.raises(InputError, match="has no column 'b'; its columns are 'a'"):
        next(sb.predict(model, tmp_path / "out", [{"a": "good"}]))


def test_pictures_in_folders(tmp_path):
    generator = np.random.default_rng(0)
    for number in range(40):
        place = tmp_path / "pictures" / ("dark", "bright")[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 100, (8, 8), np.uint8) + 155 * (number % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(place / f"{number}.png")
    model = save_image_model(tmp_path / "vit")
    tuned = sb.tune(
        model, train=tmp_path / "pictures", output=tmp_path / "out", method="full", steps=60, batch_size=8,
        learning_rate=5e-3, head_learning_rate=2e-2, progress=False,
    )  # fmt: skip
    assert (tuned.score, tuned.evaluation_split) == (1, "rows held out of pictures")
    sb.predict_file(tmp_path / "out", None, tmp_path / "pictures", tmp_path / "out.csv", progress=False)
    rows = read_rows(tmp_path / "out.csv")
    assert list(rows[0])[:3] == ["file", "label", "prediction"]
    assert all(row["prediction"] == row["label"] == row["file"].split("/")[0] for row in rows)
    loose = tmp_path / "pictures" / "dark"
    assert {row["prediction"] for row in sb.predict(tmp_path / "out", None, loose)} == {"dark"}


TEMPLATE = (
    "{% for m in messages %}{{ 'ask ' if m['role'] == 'user' else 'answer ' }}{{ m['content'] }}"
    "{{ ' </s> ' if m['role'] == 'assistant' else ' ' }}{% endfor %}{% if add_generation_prompt %}answer {% endif %}"
)
QUESTIONS = {"is a film good": "yes", "is a film bad": "no", "is a plane very good": "maybe not"}


def asked(form):
    for question, answer in QUESTIONS.items():
        if form == "messages":
            yield {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        else:
            yield {"prompt": question, "completion": answer}


@pytest.mark.parametrize(
    ("form", "templated", "packing"),
    [("messages", True, True), ("prompt", False, False), pytest.param("prompt", True, False, marks=pytest.mark.slow)],
)
def test_answers_change_as_trained(tmp_path, writer, form, templated, packing):
    if templated:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(writer)
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(writer)
    file = tmp_path / "asked.jsonl"
    file.write_text("\n".join(json.dumps(one) for one in [*asked(form)] * 10))
    tuned = sb.tune(
        writer, train=file, output=tmp_path / "out", method="full", learning_rate=1e-2, epochs=20, batch_size=9,
        packing=packing, max_length=32, progress=False,
    )  # fmt: skip
    assert tuned.metrics["perplexity"] < 1.1
    assert sb.evaluate(tmp_path / "out", test=file, held_out=True, progress=False).metrics == tuned.metrics
    questions = [{key: value for key, value in one.items() if key != "completion"} for one in asked(form)]
    answers = [row["prediction"] for row in sb.predict(tmp_path / "out", None, questions, new_tokens=8)]
    assert answers == list(QUESTIONS.values())


def test_the_loss_is_on_the_answers_alone(writer):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(writer)
    tokenizer.chat_template = TEMPLATE
    collator = CausalCollator(tokenizer, 32)
    messages = [
        {"role": "user", "content": "good"}, {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "bad film"}, {"role": "assistant", "content": "no"},
    ]  # fmt: skip
    ids, labels = collator.tokens({"messages": messages})
    assert tokenizer.decode(ids).split() == [
        "ask", "good", "answer", "yes", "</s>", "ask", "bad", "film", "answer", "no", "</s>"
    ]  # fmt: skip
    learned = [token for token in labels if token != IGNORED]
    assert tokenizer.decode(learned).split() == ["yes", "</s>", "no", "</s>"]


def test_packed_rows_have_the_loss_of_rows_on_their_own(writer):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(writer)
    model = tiny("llama", "causal", max_position_embeddings=64)
    rows = [{"prompt": "is " * n, "completion": "yes no"} for n in (1, 5, 3, 9, 2)]
    plain, packed = (CausalCollator(tokenizer, 20, packing=packing)(rows) for packing in (False, True))
    assert packed["input_ids"].shape[0] < plain["input_ids"].shape[0]
    with torch.no_grad():
        assert torch.allclose(model(**plain).loss, model(**packed, use_cache=False).loss, atol=1e-6)


@pytest.mark.parametrize("kind", ["masked", "causal"])
def test_running_text(tmp_path, model, writer, kind):
    file = tmp_path / "text.txt"
    file.write_text("the film is good\nthe plane takes off not very bad\n" * 20)
    base = model if kind == "masked" else writer
    if kind == "masked":
        tiny("bert").save_pretrained(base)
    tuned = sb.tune(base, train=file, output=tmp_path / "out", **SHORT)
    assert tuned.metric == "log_likelihood"
    assert sb.evaluate(base, tmp_path / "out", test=file, held_out=True, progress=False).score == tuned.score
    if kind == "causal":
        assert next(sb.predict(base, tmp_path / "out", ["the film"], new_tokens=3))["text"] == "the film"
    else:
        with pytest.raises(InputError, match="fills in hidden words, which is nothing to predict"):
            sb.predict(base, tmp_path / "out", ["the film"])


class Killed(Exception):
    pass


class KillAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise Killed


@pytest.mark.parametrize("patience", [None, pytest.param(9, marks=pytest.mark.slow)])
def test_a_killed_training_goes_on_and_ends_as_if_it_had_not_been(
    tmp_path, monkeypatch, caplog, model, films, patience
):
    monkeypatch.setenv("SPECTRALBASIS_CACHE", str(tmp_path / "cache"))
    options = {**SHORT, "steps": 20, "patience": patience}
    whole = sb.tune(model, train=films, output=tmp_path / "whole", **options)
    monkeypatch.setattr(fitting, "KEPT_EVERY", 0.0)
    keeps = fitting._Keeps.on_step_end
    monkeypatch.setattr(fitting._Keeps, "on_step_end", lambda self, args, state, control, **_: (
        KillAfter(11).on_step_end(args, state, control), keeps(self, args, state, control))[0])  # fmt: skip
    with pytest.raises(Killed):
        sb.tune(model, train=films, output=tmp_path / "killed", **options)
    assert not (tmp_path / "killed").exists()
    monkeypatch.setattr(fitting._Keeps, "on_step_end", keeps)
    with caplog.at_level(logging.INFO, "spectralbasis"):
        again = sb.tune(model, train=films, output=tmp_path / "killed", **options)
    assert "Training goes on after step 10, where it was stopped." in caplog.text
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert again.metrics == whole.metrics
    assert not list((tmp_path / "cache" / "training").iterdir())


def test_parts_of_a_batch_and_activations_computed_again_change_nothing(tmp_path, films):
    model = save_text_model(tmp_path / "still", hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    found = [
        load_file(
            sb.tune(model, train=films, output=tmp_path / str(n), **SHORT, **more).output / "adapter_model.safetensors"
        )
        for n, more in enumerate([{}, {"gradient_accumulation": 4}, {"gradient_checkpointing": True}])
    ]
    for other in found[1:]:
        assert all(torch.allclose(found[0][name], other[name], atol=1e-4) for name in other)


@pytest.mark.slow
def test_the_commands_say_what_they_found_and_the_card_scores_the_same(tmp_path, monkeypatch, model, films):
    out = tmp_path / "adapter"
    command = [sys.executable, "-m", "spectralbasis"]
    done = subprocess.run(
        [*command, "tune", model, "--train", films, "-o", out, "--steps", "2", "--max-length", "16", "--leading", "4",
         "--json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "is read as a classification: 'label' from 'text', 3 classes (hated, liked, none)." in done.stderr
    assert "6 of 60 examples are held out at random (seed 0), with each class in both parts," in done.stderr
    card = (out / "README.md").read_text()
    scoring = shlex.split(card.split("## Use")[1].split("```")[1])
    assert scoring[:2] == ["spectralbasis", "evaluate"]
    monkeypatch.chdir(out)
    assert json.loads(run(*scoring[1:], "--json").stdout)["metrics"] == json.loads(done.stdout)["metrics"]
    names: dict[str, Any] = {}
    exec(card.split("```python")[1].split("```")[0], names)
    assert isinstance(names["model"], PeftModel)
    assert names["base"].config.id2label == {0: "hated", 1: "liked", 2: "none"}


def test_predict_from_the_command_line(tmp_path, model, films):
    adapter = tmp_path / "adapter"
    sb.tune(model, train=films, output=adapter, **SHORT)
    shown = run("predict", model, adapter, films).stdout.splitlines()
    assert shown[0].startswith("text,label,prediction,probability,")
    assert len(shown) == 61
    run("predict", model, adapter, films, "-o", tmp_path / "p.csv")
    assert (tmp_path / "p.csv").read_text().splitlines() == shown
    again = run("predict", model, adapter, films, "-o", tmp_path / "p.csv", code=1)
    assert "exists; name a new file, or add --overwrite" in str(again.exception)
    run("predict", model, adapter, films, "-o", tmp_path / "p.csv", "--overwrite")
    for wrong, message in (
        (["-o", films], "is the input itself"),
        (["-o", tmp_path / "p.xls"], "ends in .xls, expected"),
    ):
        assert message in str(run("predict", model, adapter, films, *wrong, code=1).exception)
    run("predict", model, code=2)
    run("predict", model, adapter, films, films, code=2)


def test_a_row_without_text_has_no_prediction(tmp_path, caplog, model, films):
    adapter = tmp_path / "adapter"
    sb.tune(model, train=films, output=adapter, **SHORT)
    file = write_rows(tmp_path / "new.csv", [*FILMS, (" ", "liked"), ("a bad film", "hated")])
    with caplog.at_level(logging.INFO, "spectralbasis"):
        for suffix, empty in ((".csv", ""), (".parquet", None), (".jsonl", None)):
            out = tmp_path / f"out{suffix}"
            sb.predict_file(model, adapter, file, out, progress=False)
            rows = pq.read_table(out).to_pylist() if suffix == ".parquet" else read_rows(out)
            if suffix == ".jsonl":
                rows = [json.loads(line) for line in out.read_text().splitlines()]
            assert [row["prediction"] == empty for row in rows] == [False, False, False, True, False]
            assert rows[3]["probability_hated"] == empty
    assert "new.csv, line 5, column 'text': the text is empty; 1 of 5 rows have no text" in caplog.text


def test_a_bad_row_leaves_no_predictions(tmp_path, model, films):
    adapter = tmp_path / "adapter"
    sb.tune(model, train=films, output=adapter, **SHORT)
    bad = write_rows(tmp_path / "bad.csv", [*FILMS * 700, ("a", "b", "c")])
    for name in ("p.csv", "p.parquet", "p.jsonl"):
        with pytest.raises(InputError, match=r"bad\.csv, line 2102 has 3 columns where the header has 2"):
            sb.predict_file(model, adapter, bad, tmp_path / name, progress=False)
        assert not (tmp_path / name).exists()
    taken = write_rows(tmp_path / "taken.csv", [("a", "b")], ("text", "prediction"))
    with pytest.raises(InputError, match="has a column 'prediction' already"):
        sb.predict_file(model, adapter, taken, tmp_path / "p.csv", progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either task with the name of a task, or train with your own data .*got neither"),
        ({"task": "sst2", "train": "t.csv"}, "got both"),
        ({"task": "sst2", "label": "x"}, "validation, kind, text and label go with train"),
        ({"train": "none.csv"}, "the data none.csv do not exist"),
        ({"train": "FILMS", "gradient_accumulation": 3}, "gradient_accumulation must divide batch_size=8, got 3"),
        ({"train": "FILMS", "packing": True}, "packing is for running text and instructions"),
        ({"train": "FILMS", "kind": "instructions"}, "has neither a column 'messages' nor the columns 'prompt'"),
        ({"train": "FILMS", "patience": 0}, "patience must be above 0"),
    ],
)
def test_wrong_calls_write_nothing(tmp_path, model, films, options, message):
    options = {name: films if value == "FILMS" else value for name, value in options.items()}
    with pytest.raises(InputError, match=message):
        sb.tune(model, output=tmp_path / "out", **{**SHORT, **options})
    assert not (tmp_path / "out").exists()


def test_instructions_need_a_model_that_writes(tmp_path, model, writer):
    file = tmp_path / "asked.jsonl"
    file.write_text("\n".join(json.dumps(one) for one in [*asked("messages")] * 4))
    with pytest.raises(InputError, match="cannot write answers"):
        sb.tune(model, train=file, output=tmp_path / "out", **SHORT)
    with pytest.raises(InputError, match="has no chat template, so messages cannot be written out"):
        sb.tune(writer, train=file, output=tmp_path / "out", **SHORT)


def test_a_model_that_reads_few_tokens_needs_no_max_length(model, films, tmp_path):
    """It reads 16, less than the 64 at which texts are cut where nothing is asked for."""
    tuned = sb.tune(model, train=films, output=tmp_path / "a", steps=2, leading=4, progress=False)
    assert tuned.settings["max_length"] == 16
    assert sb.evaluate(model, tmp_path / "a", test=films, progress=False).examples == 60
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "model_max_length": 8}))
    sb.tune(model, train=films, output=tmp_path / "b", steps=2, method="full", progress=False)
    (tmp_path / "b" / "tuning.json").unlink()
    assert sb.evaluate(tmp_path / "b", test=films, progress=False).examples == 60
    assert len(list(sb.predict(tmp_path / "b", None, films))) == 60


def test_a_model_with_names_of_its_own_predicts_and_one_without_is_refused(tmp_path, model, films):
    folder = save_text_model(tmp_path / "own", num_labels=3)
    named = AutoModelForSequenceClassification.from_pretrained(folder, id2label={0: "liked", 1: "none", 2: "hated"})
    named.save_pretrained(folder)
    assert sb.evaluate(folder, test=films, max_length=16, progress=False).examples == 60
    assert {row["prediction"] for row in sb.predict(folder, None, films, max_length=16)} <= {"liked", "none", "hated"}
    with pytest.raises(InputError, match="nothing says which labels"):
        sb.predict(model, None, films)


def test_long_texts_are_said_to_be_cut(tmp_path, caplog, model):
    rows = [("good " * 2000, "liked"), ("bad film", "hated")] * 2
    file = write_rows(tmp_path / "long.csv", rows)
    tuned = sb.tune(model, train=file, validation=file, output=tmp_path / "out", **SHORT)
    assert tuned.notes[-1].startswith("About 50% of the texts are longer than 16 tokens (the longest of 4 has 2,002)")
