"""`spectralbasis serve` on Ray Serve, as clients see it: right answers whatever comes, goes and dies meanwhile."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path

import psutil
import pytest
import torch

pytest.importorskip("ray.serve", reason="the extra `serve` is not installed")

import spectralbasis as sb
from tests.coefficients.folders import load_base
from tests.coefficients.servers import opened, save_served

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]
TEXTS = ["w1 w2 w3", "w4", "w5 w6", ["w7 w8", "w9"]]
DOCS = Path(__file__).parents[2] / "docs"


@contextmanager
def serving(folder, *arguments):
    """The process of a server and its address."""
    command = [sys.executable, "-P", "-m", "spectralbasis", "serve", *map(str, arguments)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=folder, start_new_session=True)
    said = []
    try:
        for line in process.stderr:
            said.append(line)
            if ready := re.search(r"serving .* tasks on (http://\S+);", line):
                break
        else:
            pytest.fail("".join(said))
        yield process, ready[1]
    finally:
        if process.poll() is None:
            process.terminate()
        process.stderr.read()
        process.wait(60)


def ask(address, method, path, content=None):
    body = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(f"{address}{path}", body, method=method)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_served(tmp_path_factory.mktemp("served"), tasks=5)


@pytest.fixture(scope="module")
def right(folder):
    """Task → logits of the texts, from the bank in this process."""
    _, reader = opened(folder).load()
    bank = sb.CoefficientBank.open(folder / "bank.safetensors", load_base(folder / "base", labels=3))
    tokens = [one for one, _ in reader([one if isinstance(one, str) else tuple(one) for one in TEXTS])]
    batch = reader.batch(tokens)
    return {
        task: bank(**batch, tasks=[task] * len(TEXTS)).logits[:, : 2 + int(task[1:]) % 2].clone() for task in bank.tasks
    }


@pytest.fixture(scope="module")
def server(folder):
    with serving(folder, "base", "bank.safetensors", "--port", 0, "--replicas", 2, "--adapters", "adapters") as found:
        yield found


def check(address, task, logits):
    status, said = ask(address, "POST", "/predict", {"task": task, "inputs": TEXTS})
    assert (status, said.get("task")) == (200, task), said
    found = torch.tensor([row["logits"] for row in said["predictions"]])
    torch.testing.assert_close(found, logits, rtol=0, atol=2e-5)


def check_many(address, wanted):
    """Requests of many clients at once; `wanted` has pairs of a task and its logits."""
    with ThreadPoolExecutor(16) as clients:
        list(clients.map(lambda one: check(address, *one), wanted))


def replicas(process):
    found = psutil.Process(process.pid).children(recursive=True)
    return [one for one in found if "".join(one.cmdline()).startswith("ray::ServeReplica")]


def test_every_row_of_many_clients_gets_its_task(server, right):
    check_many(server[1], list(right.items()) * 20)
    assert ask(server[1], "GET", "/health") == (200, {"status": "ok"})


def test_a_change_is_in_every_replica_once_it_is_answered(server, right):
    _, address = server
    for source in ("t1", "t2", "t1"):
        assert ask(address, "PUT", "/tasks/new", {"adapter": source})[0] in (200, 201)
        check_many(address, [("new", right[source])] * 32)
    assert ask(address, "DELETE", "/tasks/new")[0] == 200
    assert {ask(address, "POST", "/predict", {"task": "new", "inputs": TEXTS})[0] for _ in range(16)} == {404}


def test_no_request_is_lost_with_a_replica_and_the_next_one_knows_the_changes(server, right):
    process, address = server
    assert ask(address, "PUT", "/tasks/kept", {"adapter": "t3"})[0] == 201
    before = {one.pid for one in replicas(process)}
    killer = threading.Timer(0.2, replicas(process)[0].kill)
    killer.start()
    check_many(address, [*right.items(), ("kept", right["t3"])] * 40)
    killer.join()
    # Until a new replica has come, requests are the other's; afterwards both answer, and both know the new task.
    for _ in range(600):
        now = {one.pid for one in replicas(process)}
        if len(now) == 2 and now != before:
            break
        threading.Event().wait(0.1)
    assert len(now) == 2
    assert now != before
    check_many(address, [*right.items(), ("kept", right["t3"])] * 20)


def test_nothing_of_it_listens_to_other_machines(server):
    process, _ = server
    everything = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    places = [one.laddr.ip for each in everything for one in each.net_connections("tcp") if one.status == "LISTEN"]
    assert places
    open_to_all = [place for place in places if not ip_address(place.removeprefix("::ffff:")).is_loopback]
    assert open_to_all == []


def test_ctrl_c_under_load_answers_what_was_taken(server):
    """The last test with this server."""
    process, address = server
    answers = []

    def client():
        while True:
            try:
                answers.append(ask(address, "POST", "/predict", {"task": "t1", "inputs": TEXTS})[0])
            except (urllib.error.URLError, ConnectionError) as error:
                answers.append(str(error))
                return

    clients = [threading.Thread(target=client) for _ in range(16)]
    for one in clients:
        one.start()
    while len(answers) < 50:
        clients[0].join(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group
    for one in clients:
        one.join(60)
    assert process.wait(60) == 0
    assert "every request that was taken has its answer" in process.stderr.read()
    # A connection that the server had not taken yet is refused, reset or broken; one that it took is never closed
    # unanswered.
    untaken = ("refused", "reset by peer", "Broken pipe")
    assert [one for one in answers if one != 200 and not any(words in str(one) for words in untaken)] == []
    assert psutil.wait_procs(children, timeout=30)[1] == []


def test_on_a_cluster_of_two_nodes(folder, right, monkeypatch):
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    node = {"num_cpus": 1, "object_store_memory": 80_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        cluster.add_node(**node)
        options = ("--port", 0, "--replicas", 2, "--adapters", "adapters", "--ray", cluster.address)
        with serving(folder, "base", "bank.safetensors", *options) as (process, address):
            assert ask(address, "PUT", "/tasks/new", {"adapter": "t2"})[0] == 201
            check_many(address, [*right.items(), ("new", right["t2"])] * 8)
            process.terminate()
            assert process.wait(60) == 0
    finally:
        cluster.shutdown()


def test_the_guide_runs(tmp_path, minilm):
    """The commands of docs/serve.md, on adapters of MiniLM with random numbers."""
    from peft import get_peft_model
    from transformers import AutoModelForSequenceClassification

    config = sb.SpectralConfig(task_type="SEQ_CLS", target_modules=["query"], leading=4, init_weights=False)
    for name in ("rte", "mrpc"):
        model = AutoModelForSequenceClassification.from_pretrained(minilm)
        get_peft_model(model, config).save_pretrained(tmp_path / "adapters" / name)
    blocks = re.findall(r"```bash\n(.*?)```", (DOCS / "serve.md").read_text(), re.DOTALL)
    lines = [shlex.split(line) for block in blocks for line in block.splitlines()]
    here = [sys.executable, "-P", "-m", "spectralbasis"]
    for line in lines:
        if line[:2] == ["spectralbasis", "bank"]:
            done = subprocess.run([*here, *line[1:]], capture_output=True, text=True, cwd=tmp_path, check=False)
            assert done.returncode == 0, done.stderr
            assert "mrpc" in done.stdout
    first = next(line for line in lines if line[:2] == ["spectralbasis", "serve"])
    arguments = [("0" if one == "8000" else one) for one in first[2:]]
    requests = [line for line in lines if line[0] == "curl"]
    assert len(requests) == 3
    with serving(tmp_path, *arguments) as (process, address):
        for line in requests:
            url = next(one for one in line if one.startswith("http")).replace("http://127.0.0.1:8000", address)
            method = line[line.index("-X") + 1] if "-X" in line else "POST"
            content = json.loads(line[line.index("-d") + 1]) if "-d" in line else None
            status, said = ask(url, method, "", content)
            assert status in (200, 201), said
        process.terminate()
        assert process.wait(60) == 0
