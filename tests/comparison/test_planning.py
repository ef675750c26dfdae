"""A plan is the work that a comparison does: the same solvers, its operations counted, its times added up."""

import math

import pytest
import torch
from safetensors.torch import save_file

import spectralbasis as sb
from spectralbasis.checkpoints.weight_files import SafetensorsFile
from spectralbasis.comparison import measuring, plan_comparison, planning
from spectralbasis.comparison.measuring import Settings
from spectralbasis.comparison.planning import Rates, calibrate, make_group, operations, read_rate, seconds_on, total
from spectralbasis.linalg.svd import GUARD
from tests.comparison.pairs import random_updates

KINDS = ("read", "pass", "product64", "thin64", "thin32", "tridiagonal", "dense")
ONE_PER_SECOND = Rates(dict.fromkeys(KINDS, ((1, 1.0),)), overhead=0.0)


def work(m, n, k, **options):
    return operations((m, n), k, **{"draws": 0, "stored_bytes": 0, **options})


def test_the_operations_of_a_gram_matrix_are_counted_in_closed_form():
    steps = work(400, 200, 20)
    values = {"product64": 400 * 200**2, "tridiagonal": 2 * 200**3 // 3}  # in float32, which counts half
    for step in ("base", "tuned", "update"):
        assert {kind: steps[step][kind] for kind in values} == values
    assert steps["update"]["thin64"] == 4 * 400 * 200 * 20
    assert "dense" not in total(steps)
    assert steps["base"]["thin32"] == 4 * 200**2 * (20 + GUARD)


def test_a_matrix_and_its_transpose_take_the_same():
    for shape in ((300, 700), (48, 40), (2048, 600)):
        assert work(*shape, 32, draws=3) == work(*shape[::-1], 32, draws=3)


@pytest.mark.parametrize(
    ("shape", "k", "solver"), [((40, 30), 8, "dense"), ((160, 140), 8, "gram"), ((700, 600), 16, "krylov")]
)
def test_the_solver_that_is_planned_is_the_one_that_is_taken(shape, k, solver):
    group = make_group(shape, 1, Settings(leading=k, draws=1), stored_bytes=0)
    A = torch.randn(shape) + 20 * torch.randn(shape[0], k) @ torch.randn(k, shape[1])
    assert group.solver == sb.linalg.leading_svd(A, k).solver == solver
    kind = {"dense": "dense", "gram": "tridiagonal", "krylov": "thin32"}[solver]
    assert group.steps["null"][kind] > 0


def test_draws_and_partners_multiply_what_depends_on_them():
    one, many = work(300, 200, 16, draws=1), work(300, 200, 16, draws=4, partners=3)
    assert many["null"] == {kind: 12 * amount for kind, amount in one["null"].items()}
    assert many["tuned"] == {kind: 3 * amount for kind, amount in one["tuned"].items()}
    assert many["base"] == one["base"]
    assert "sharing" in many
    assert "sharing" not in one
    assert "null" not in work(300, 200, 16)


def test_rates_between_two_sides_are_interpolated_on_logarithms():
    rates = Rates({"product64": ((256, 4.0), (1024, 16.0))})
    assert rates.rate("product64", 64) == 4
    assert rates.rate("product64", 512) == pytest.approx(8)
    assert rates.rate("product64", 9999) == 16


def test_several_workers_share_the_matrices_and_one_disk():
    groups = [make_group((100, 80), 7, Settings(leading=8, null=None), stored_bytes=0)]
    each = sum(groups[0].seconds(ONE_PER_SECOND).values())
    assert seconds_on(groups, ONE_PER_SECOND, 1) == pytest.approx(7 * each)
    assert seconds_on(groups, ONE_PER_SECOND, 3) == pytest.approx(3 * each)
    assert seconds_on(groups, ONE_PER_SECOND, 100) == pytest.approx(each)
    slow_disk = Rates({**ONE_PER_SECOND.by_side, "read": ((1, 1e-9),)})
    [group] = [make_group((100, 80), 7, Settings(leading=8, null=None), stored_bytes=10)]
    assert seconds_on([group], slow_disk, 100) == pytest.approx(7 * 10 / 1e-9)


def test_a_calibration_finds_rates_of_this_machine():
    rates = calibrate(None, Settings(leading=8, draws=1), threads=1)
    assert set(rates.by_side) == set(KINDS)
    assert rates.rate("read", 1) == math.inf
    assert 1e8 < rates.rate("product64", 1500) < 1e14
    assert rates.rate("product64", 1500) > rates.rate("tridiagonal", 1500)


def test_a_disk_is_as_fast_as_its_file_is_read(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(bytes(1000))
    ticks = iter([10.0, 10.5])
    assert read_rate(file, lambda: next(ticks)) == 2000


@pytest.fixture
def files(tmp_path):
    for name, state in zip(("base", "tuned"), random_updates(6, 0.3), strict=True):
        state["encoder.layer.9.wide.weight"] = torch.randn(90, 200).bfloat16()
        save_file(state, tmp_path / f"{name}.safetensors")
    return tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"


def test_a_plan_says_what_a_comparison_does_and_reads_headers_only(files, monkeypatch):
    monkeypatch.setattr(planning, "calibrate", lambda *_, **__: ONE_PER_SECOND)
    monkeypatch.setattr(SafetensorsFile, "read", lambda *_: pytest.fail("weights were read"))
    plan = plan_comparison(files[0], [files[1]], leading=8, draws=2)
    assert [(one["shape"], one["count"]) for one in plan["matrices"]] == [([90, 200], 1), ([48, 40], 6)]
    assert plan["read_bytes"] == 2 * (90 * 200 * 2 + 6 * 48 * 40 * 4)
    assert plan["operations"] == sum(step["operations"] for step in plan["steps"].values())
    assert plan["memory_bytes"] == max(one["memory_bytes"] for one in plan["matrices"])
    here, processes = plan["executors"]
    assert here["slots"] == 1
    assert here["seconds"] == pytest.approx(sum(step["seconds"] for step in plan["steps"].values()))
    assert processes["seconds"] <= here["seconds"]


def test_a_plan_has_fewer_processes_where_memory_is_short(files, monkeypatch):
    monkeypatch.setattr(planning, "calibrate", lambda *_, **__: ONE_PER_SECOND)
    monkeypatch.setattr(planning, "available_memory", lambda: 1_500_000_000)
    assert plan_comparison(files[0], [files[1]], leading=8, workers=8)["executors"][1]["slots"] == 3


def test_what_is_planned_is_what_is_called(monkeypatch):
    """Every decomposition and product with the whole matrix that a comparison makes is among the planned ones."""
    calls = {"leading_svd": 0, "leading_svd_and_values": 0, "spectrum": 0}
    for name in calls:
        original = getattr(measuring, name)

        def counted(*arguments, name=name, original=original, **options):
            calls[name] += 1
            return original(*arguments, **options)

        monkeypatch.setattr(measuring, name, counted)
    base, tuned = random_updates(1, 0.3)
    sb.compare(base, [tuned], leading=8, draws=3)
    assert calls == {"leading_svd": 3, "leading_svd_and_values": 1, "spectrum": 1}
