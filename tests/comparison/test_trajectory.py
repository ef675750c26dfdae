"""Checkpoints of one run are told by their names and become a course of findings."""

import pytest
from safetensors.torch import save_file

import spectralbasis as sb
from spectralbasis.comparison.sharing import parse_step, training_runs
from tests.comparison.pairs import random_updates


@pytest.mark.parametrize(
    ("label", "step"),
    [
        ("checkpoint-200", 200),
        ("rte/checkpoint-1000", 1000),
        ("step_50", 50),
        ("out/rte_step-7.safetensors", 7),
        ("global_step300", 300),
        ("model.ckpt-12", 12),
        ("iter_9.pt", 9),
        ("roberta-base", None),
        ("sst2", None),
        ("checkpoint-best", None),
        ("footstep-stops", None),
        ("checkpoint-100/model", None),
    ],
)
def test_steps_are_read_from_the_last_component(label, step):
    assert parse_step(label) == step


def test_runs_are_told_apart_by_where_they_lie():
    paths = ["x/a/checkpoint-20", "x/a/checkpoint-100", "x/b/step_1.pt", "x/b/step_2.pt", "x/c/checkpoint-5", "x/d"]
    found = training_runs(dict(zip("pqrstu", paths, strict=True)))
    assert found == {"a": {20: "p", 100: "q"}, "b": {1: "r", 2: "s"}}
    late_first = training_runs({"q": paths[1], "p": paths[0]})
    assert list(late_first["a"]) == [20, 100]


def test_files_in_step_folders_and_runs_in_one_folder():
    inside = {"a": "r/checkpoint-1/model.safetensors", "b": "r/checkpoint-2/model.safetensors"}
    assert training_runs(inside) == {"r": {1: "a", 2: "b"}}
    beside = {"a": "x/rte-step-1.pt", "b": "x/rte-step-2.pt", "c": "x/sst-step-1.pt", "d": "x/sst-step-2.pt"}
    assert training_runs(beside) == {"rte": {1: "a", 2: "b"}, "sst": {1: "c", 2: "d"}}
    same_name = {"a": "x/r/step-1", "b": "x/r/step-2", "c": "y/r/step-1", "d": "y/r/step-2"}
    assert list(training_runs(same_name)) == ["x/r", "y/r"]


def test_the_course_of_a_run_is_in_the_summary(tmp_path):
    base, last = random_updates(4, 0.4)
    save_file(base, tmp_path / "base.safetensors")
    for step in (300, 100, 200):
        state = {name: base[name] + step / 300 * (last[name] - base[name]) for name in base}
        (tmp_path / "run" / f"checkpoint-{step}").mkdir(parents=True)
        save_file(state, tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors")
    tuned = sorted((tmp_path / "run").iterdir(), reverse=True)
    summary = sb.compare(tmp_path / "base.safetensors", tuned, leading=8, draws=2).summary()
    (run,) = summary["trajectory"]
    assert run["run"] == "run"
    assert [point["step"] for point in run["points"]] == [100, 200, 300]
    assert [point["tuned"] for point in run["points"]] == ["checkpoint-100", "checkpoint-200", "checkpoint-300"]
    sizes = [point["update_norm_relative"] for point in run["points"]]
    assert sizes == pytest.approx([sizes[2] / 3, 2 * sizes[2] / 3, sizes[2]], rel=1e-3)
    for point in run["points"]:
        finding = summary["per_tuned"][point["tuned"]]
        assert point["stability"]["value"] == finding["stability"]["value"]
        assert point["coverage"]["null_mean"] == finding["coverage"]["null_mean"]
    assert summary["sharing"]["over"] == "one run"


def test_checkpoints_that_are_no_run_have_no_course():
    base, one = random_updates(2, 0.3)
    assert "trajectory" not in sb.compare(base, [one], leading=4, null=None).summary()
