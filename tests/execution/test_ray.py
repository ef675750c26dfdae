"""On a Ray cluster of several nodes: the same table, whatever dies meanwhile, and never many tasks under way."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

import spectralbasis as sb
from spectralbasis.comparison import distributing
from spectralbasis.execution import RayCluster
from spectralbasis.study.runner import run_all
from spectralbasis.study.runs import Run, RunStore
from tests.comparison.pairs import layered, random_updates
from tests.execution import planted

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]  # one cluster for all of them
NODE = {"num_cpus": 1, "object_store_memory": 80_000_000}


@pytest.fixture(scope="module")
def cluster():
    """Two nodes on this machine; a test may add others."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")]))
        started = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
        started.add_node(**NODE)
        ray.init(started.address, log_to_driver=False)  # comparisons take this connection, and so the same workers
        yield started
        ray.shutdown()
        started.shutdown()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    for name, state in zip(("base", "tuned"), random_updates(30, 0.3), strict=True):
        save_file(state, folder / f"{name}.safetensors")
    return folder / "base.safetensors", folder / "tuned.safetensors"


@pytest.fixture(scope="module")
def alone(files):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the workers: their number may change the last bits of a product
    table = compare(files)
    torch.set_num_threads(threads)
    return table


@pytest.fixture(autouse=True)
def no_marks(files):
    (files[0].parent / "measured").unlink(missing_ok=True)


def compare(files, **options):
    return sb.compare(files[0], [files[1]], **{"leading": 8, "draws": 2, **options}).table


def assert_same(table, expected):
    pd.testing.assert_frame_equal(table, expected, check_exact=True)


def wait_for(marks, number):
    deadline = time.monotonic() + 60
    while planted.count(marks) < number:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_table_is_that_of_this_process(cluster, files, alone):
    assert_same(compare(files, ray=cluster.address), alone)


def test_weights_in_memory_travel_through_the_object_store(cluster, files, alone):
    found = sb.compare(load_file(files[0]), [load_file(files[1])], leading=8, draws=2, ray=cluster.address).table
    assert_same(found.drop(columns="tuned"), alone.drop(columns="tuned"))


def test_where_workers_do_not_see_the_files_the_driver_sends_them(cluster, files, alone, monkeypatch):
    monkeypatch.setattr(distributing, "perform_parcel", planted.measure_blindly)
    assert_same(compare(files, ray=cluster.address), alone)


def test_a_node_that_dies_costs_nothing(cluster, files, alone, monkeypatch):
    monkeypatch.setattr(distributing, "perform_parcel", planted.measure_slowly)
    node = cluster.add_node(**NODE)
    marks = files[0].parent / "measured"

    def kill():
        wait_for(marks, 8)
        cluster.remove_node(node, allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    found = compare(files, ray=cluster.address)
    killer.join()
    assert_same(found, alone)


def test_a_killed_driver_goes_on_with_what_is_missing(cluster, files, alone, tmp_path, monkeypatch):
    marks = files[0].parent / "measured"
    script = (
        "import sys\n"
        "from spectralbasis.comparison import compare, distributing\n"
        "from tests.execution import planted\n"
        "distributing.perform_parcel = planted.measure_slowly\n"
        "compare(sys.argv[1], [sys.argv[2]], leading=8, draws=2, ray=sys.argv[3], output=sys.argv[4])\n"
    )
    arguments = [*map(str, files), cluster.address, str(tmp_path / "out")]
    driver = subprocess.Popen([sys.executable, "-c", script, *arguments])
    wait_for(marks, 10)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    time.sleep(1)  # its workers are ended by the cluster
    before = planted.count(marks)
    monkeypatch.setattr(distributing, "perform_parcel", planted.measure_or_die)
    assert_same(compare(files, ray=cluster.address, output=tmp_path / "out", resume=True), alone)
    assert 30 <= planted.count(marks) <= 30 + 4  # those under way were measured, but not stored
    assert before < 30


def test_a_matrix_that_kills_its_worker_ends_as_a_skip(cluster, tmp_path, monkeypatch):
    base, tuned = random_updates(4, 0.3)
    base |= layered({"7.poison": torch.ones(48, 40)})
    tuned |= layered({"7.poison": 2 * torch.ones(48, 40)})
    for name, state in {"base": base, "tuned": tuned}.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    monkeypatch.setattr(distributing, "perform_parcel", planted.measure_or_die)
    found = sb.compare(
        tmp_path / "base.safetensors", [tmp_path / "tuned.safetensors"], leading=8, draws=2, ray=cluster.address
    ).summary()
    assert found["matrices"] == 4
    [(name, reason)] = found["skipped"].items()
    assert name == "encoder.layer.7.poison"
    assert reason.startswith("tried 3 times, the last time with no other task running: its worker was lost")


def test_a_thousand_matrices_never_queue_up(cluster, tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.w.weight": torch.randn(10, 8, generator=generator) for i in range(1000)}
    tuned = {name: W + 0.1 * torch.randn(10, 8, generator=generator) for name, W in base.items()}
    under_way, slots = [], []
    start = RayCluster.start

    def counted(executor, call):
        ticket = start(executor, call)
        under_way.append(len(executor._under_way))
        slots.append(executor.slots)
        return ticket

    monkeypatch.setattr(RayCluster, "start", counted)
    options = {"leading": 2, "null": None}
    found = sb.compare(base, [tuned], ray=cluster.address, **options).table
    assert_same(found, sb.compare(base, [tuned], **options).table)
    assert len(under_way) == 1000
    assert max(under_way) <= max(slots) < 100  # a node that Ray takes for dead meanwhile leaves fewer slots, not calls


def test_runs_of_a_study_go_side_by_side(cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = Run("tests.study.runs.planted:act", {"value": 1}, 0, {})
    runs = [Run("tests.study.runs.planted:act", {"value": 10 * i}, 0, {"base": base}) for i in range(2)]
    with RunStore(Path("study")) as store:
        run_all(lambda _: runs, store, data=None, ray=cluster.address)
        assert [store.results.get(run).result["total"] for run in runs] == [1, 11]


def test_a_plan_reckons_with_the_cores_of_the_cluster(cluster, files):
    plan = sb.plan_comparison(files[0], [files[1]], leading=8, ray=cluster.address)
    here, _, there = plan["executors"]
    cores = int(ray.cluster_resources()["CPU"])
    assert (there["name"], there["slots"]) == (f"Ray at {cluster.address}, {cores} cores", cores)
    assert there["seconds"] < here["seconds"]


def test_a_cluster_that_is_not_there_is_a_sentence(files):
    ray.shutdown()
    with pytest.raises(sb.InputError, match=r"no Ray cluster answers at '127\.0\.0\.1:1'"):
        compare(files, ray="127.0.0.1:1")
