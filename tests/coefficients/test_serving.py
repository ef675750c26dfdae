"""A bank behind HTTP, without Ray: who is answered what, which task each row gets, and what is refused."""

import asyncio
import itertools
import json
import threading
from contextlib import ExitStack

import pytest
import torch

pytest.importorskip("ray.serve", reason="the extra `serve` is not installed")
from starlette.testclient import TestClient

import spectralbasis as sb
from spectralbasis.coefficients import serving
from spectralbasis.coefficients.replicas import Asked, Failed, TaskTable, rows_of
from spectralbasis.coefficients.serving import BankApplication, Rows
from spectralbasis.coefficients.serving_requests import Limits, check_host, read_token
from spectralbasis.errors import InputError
from tests.coefficients.folders import load_base, save_adapter
from tests.coefficients.servers import backend, replica, save_served

TEXTS = ["w1 w2", "w3", "w4 w5 w6 w7", "w8 w9", ("w1 w2", "w3 w4")]
TOKEN = "a token of sixteen".replace(" ", "-")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_served(tmp_path_factory.mktemp("served"))


@pytest.fixture
def table():
    return TaskTable()


@pytest.fixture
def one(folder, table):
    return replica(folder, table)


@pytest.fixture
def client_of(folder, table):
    """Makes clients of a server over one replica in this process, or over what stands for it."""
    with ExitStack() as stack:

        def client_of(one, limits=None, **options):
            options = {"adapters": folder / "adapters", "hosts": ("testserver",)} | options
            limits = limits or Limits(rows=8, characters=100, waiting=16, seconds=20)
            application = BankApplication(backend(folder, table, one), limits, **options)
            # Within the client, all requests have one event loop.
            return stack.enter_context(TestClient(application.asgi, raise_server_exceptions=False))

        yield client_of


@pytest.fixture
def client(client_of, one):
    return client_of(one)


def expected(folder, task, inputs):
    """What the bank itself says of one input after the other."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    bank = sb.CoefficientBank.open(folder / "bank.safetensors", load_base(folder / "base", labels=3))
    found = []
    for one in inputs:
        texts = [one] if isinstance(one, str) else one
        encoded = tokenizer(*texts, return_tensors="pt", return_token_type_ids=True)
        found.append(bank(**encoded, tasks=[task]).logits[0, : 2 + int(task[1:]) % 2])
    return found


def check(answer, folder, task, inputs):
    assert answer.status_code == 200, answer.text
    said = answer.json()
    assert said["task"] == task
    assert len(said["predictions"]) == len(inputs)
    for row, logits in zip(said["predictions"], expected(folder, task, inputs), strict=True):
        torch.testing.assert_close(torch.tensor(row["logits"]), logits, rtol=0, atol=2e-5)
        torch.testing.assert_close(torch.tensor(row["probabilities"]), logits.softmax(-1), rtol=0, atol=1e-5)
        assert row["label"] == int(logits.argmax())
        assert "cut" not in row


@pytest.mark.parametrize("task", ["t0", "t1", "t2"])
def test_texts_and_pairs_get_the_numbers_of_their_task(client, folder, task):
    check(client.post("/predict", json={"task": task, "inputs": TEXTS}), folder, task, TEXTS)


def test_a_batch_over_tasks_gives_every_request_its_own(one, folder):
    asked = [
        Asked(f"t{number % 3}", [TEXTS[(number + k) % 5] for k in range(1 + number % 4)], 0) for number in range(9)
    ]
    asked.insert(4, Asked("nobody", ["w1"], 0))
    answers = asyncio.run(one.answer(asked))
    assert answers[4] == Failed("unknown")
    for request, answer in zip(asked, answers, strict=True):
        if request.task != "nobody":
            assert answer.task == request.task
            for logits, right in zip(answer.logits, expected(folder, request.task, request.inputs), strict=True):
                torch.testing.assert_close(torch.tensor(logits), right, rtol=0, atol=2e-5)
    assert rows_of([asked[:4], asked[4:]]) == sum(len(request.inputs) for request in asked)


def test_a_long_request_is_computed_in_passes(one, folder, monkeypatch):
    monkeypatch.setattr("spectralbasis.coefficients.replicas.ROWS_OF_A_BATCH", 2)
    (answer,) = asyncio.run(one.predict([("t1", TEXTS)], 0))
    for logits, right in zip(answer.logits, expected(folder, "t1", TEXTS), strict=True):
        torch.testing.assert_close(torch.tensor(logits), right, rtol=0, atol=2e-5)


def test_a_request_that_fails_takes_no_other_along(one):
    one._reader = _Poisoned(one._reader)
    answers = asyncio.run(one.answer([Asked("t0", ["w1"], 0), Asked("t0", ["poison"], 0), Asked("t1", ["w2"], 0)]))
    assert [type(answer) for answer in answers] == [Rows, Failed, Rows]
    assert answers[1].kind == "error"
    assert "poisoned" in answers[1].reason


class _Poisoned:
    """A reader that fails on one text."""

    def __init__(self, reader):
        self.batch, self._reader = reader.batch, reader

    def __call__(self, inputs):
        if "poison" in inputs:
            raise ZeroDivisionError("poisoned")
        return self._reader(inputs)


def test_an_input_that_is_cut_is_marked(client):
    said = client.post("/predict", json={"task": "t0", "inputs": ["w1 " * 20, "w1"]}).json()
    assert [row.get("cut") for row in said["predictions"]] == [True, None]


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        (b"", 400, "not valid JSON"),
        (b"{", 400, "not valid JSON"),
        (b"\xff\xfe", 400, "not UTF-8"),
        (b"[" * 900, 400, "not valid JSON"),
        (b'{"task": "t0", "task": "t1", "inputs": ["w1"]}', 400, "given twice"),
        (b"[1]", 422, "expected an object"),
        (b'{"task": "t0"}', 422, "inputs is missing"),
        (b'{"task": 1, "inputs": ["w1"]}', 422, "task is 1"),
        (b'{"task": "t0", "inputs": []}', 422, "at least 1"),
        (b'{"task": "t0", "inputs": "w1"}', 422, "expected a list"),
        (b'{"task": "t0", "inputs": [["w1"]]}', 422, "inputs[0]"),
        (b'{"task": "t0", "inputs": [["w1", "w2", "w3"]]}', 422, "inputs[0]"),
        (b'{"task": "t0", "inputs": [null]}', 422, "inputs[0] is None"),
        (b'{"task": "t0", "inputs": ["w1"], "path": "/etc"}', 422, "path is not known"),
        (b'{"task": "t0", "inputs": ["\\ud800"]}', 422, "half of a character"),
        (b'{"task": "\\ud800", "inputs": ["w1"]}', 422, "half of a character"),
        (b'{"task": "nobody", "inputs": ["w1"]}', 404, "no task 'nobody'"),
        (json.dumps({"task": "t0", "inputs": ["w1"] * 9}).encode(), 413, "9 rows, expected at most 8"),
        (json.dumps({"task": "t0", "inputs": ["w" * 101]}).encode(), 413, "101 characters, expected at most 100"),
        (b" " * 20000, 413, "expected at most"),
    ],
)  # fmt: skip
def test_what_is_no_question_is_refused_in_a_sentence(client, body, status, sentence):
    answer = client.post("/predict", content=body)
    assert answer.status_code == status, answer.text
    assert sentence in answer.json()["error"]
    assert client.post("/predict", json={"task": "t0", "inputs": ["w1"]}).status_code == 200


def test_json_that_nests_deeply_is_refused(client_of, one):
    wide = client_of(one, Limits(rows=8, characters=100_000, waiting=16))
    answer = wide.post("/predict", content=b'{"task": "t0", "inputs": ' + b"[" * 500_000)
    assert (answer.status_code, "nested too deeply" in answer.text) == (400, True)


def test_a_body_without_a_length_is_read_no_further_than_it_may_be(client):
    answer = client.post("/predict", content=(b" " * 1000 for _ in range(1000)))
    assert answer.status_code == 413
    assert "the body has more than" in answer.json()["error"]


def test_a_body_that_does_not_come_is_not_awaited_for_ever(folder, table, one, monkeypatch):
    monkeypatch.setattr(serving, "_SECONDS_OF_A_BODY", 0.05)
    application = BankApplication(backend(folder, table, one), Limits())
    sent = []

    async def receive():
        await asyncio.sleep(60)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/predict", "headers": [], "query_string": b"", "root_path": ""}
    asyncio.run(application.asgi(scope, receive, send))
    assert sent[0]["status"] == 408


def test_tasks_are_listed_page_by_page(client):
    assert client.get("/tasks").json() == {"count": 3, "tasks": ["t0", "t1", "t2"], "next": None}
    assert client.get("/tasks?limit=2").json() == {"count": 3, "tasks": ["t0", "t1"], "next": "t1"}
    assert client.get("/tasks?limit=2&after=t1").json() == {"count": 3, "tasks": ["t2"], "next": None}
    for limit in ("0", "x", "-1", "99999999"):
        assert client.get(f"/tasks?limit={limit}").status_code == 422


def test_a_task_is_added_replaced_and_removed(client, folder):
    said = [client.put("/tasks/glue/new", json={"adapter": name}) for name in ("t1", "t2")]
    assert [(one.status_code, one.json()["replaced"]) for one in said] == [(201, False), (200, True)]
    assert client.get("/tasks").json()["tasks"] == ["glue/new", "t0", "t1", "t2"]
    answer = client.post("/predict", json={"task": "glue/new", "inputs": ["w1 w2"]}).json()["predictions"]
    assert answer == client.post("/predict", json={"task": "t2", "inputs": ["w1 w2"]}).json()["predictions"]
    assert client.delete("/tasks/glue/new").json() == {"task": "glue/new", "removed": True}
    assert client.post("/predict", json={"task": "glue/new", "inputs": ["w1"]}).status_code == 404
    assert client.delete("/tasks/glue/new").status_code == 404
    assert client.delete("/tasks/t0").status_code == 200
    assert client.post("/predict", json={"task": "t0", "inputs": ["w1"]}).status_code == 404
    check(client.post("/predict", json={"task": "t1", "inputs": TEXTS}), folder, "t1", TEXTS)


@pytest.mark.parametrize(
    ("name", "body", "status", "sentence"),
    [
        ("new", {"adapter": "../base"}, 422, "without '..'"),
        ("new", {"adapter": "/etc"}, 422, "relative path"),
        ("new", {"adapter": "absent"}, 422, "no folder of an adapter"),
        ("new", {"adapter": "t0/adapter_config.json"}, 422, "no folder of an adapter"),
        ("new", {"adapter": "out"}, 422, "no folder of an adapter"),
        ("new", {"adapter": "linked"}, 422, "no folder of an adapter"),
        ("new", {"adapter": "a\0b"}, 422, "holds a character"),
        ("new", {"adapter": "empty"}, 422, "adapter"),
        ("new", {"adapter": "other"}, 422, "does not match the other tasks"),
        ("new", {"adapter": "."}, 422, "no folder of an adapter"),
        ("new", {}, 422, "adapter is missing"),
        ("x" * 201, {"adapter": "t0"}, 422, "1 to 200 visible characters"),
        ("%1b%5b31m", {"adapter": "t0"}, 422, "visible characters"),
        ("%20", {"adapter": "t0"}, 422, "visible characters"),
    ],
)
def test_an_adapter_that_is_not_under_the_folder_or_not_of_the_bank_is_refused(
    client, folder, name, body, status, sentence
):
    adapters = folder / "adapters"
    if not (adapters / "other").exists():
        save_adapter(adapters / "other", folder / "base", leading=3)
        (adapters / "empty").mkdir()
        (adapters / "out").symlink_to(folder / "base")
        (adapters / "linked").mkdir()
        (adapters / "linked" / "adapter_config.json").symlink_to(folder / "base" / "config.json")
    answer = client.put(f"/tasks/{name}", json=body)
    assert answer.status_code == status, answer.text
    assert sentence in answer.json()["error"]
    assert str(folder) not in answer.json()["error"].replace(str(adapters), "")
    assert client.get("/tasks").json()["count"] == 3


def test_without_a_folder_no_task_is_added(client_of, one):
    answer = client_of(one, adapters=None).put("/tasks/x", json={"adapter": "t0"})
    assert answer.status_code == 403
    assert "--adapters" in answer.json()["error"]


ROUTES = [("GET", "/metrics"), ("GET", "/tasks"), ("POST", "/predict"), ("PUT", "/tasks/x"), ("DELETE", "/tasks/t0")]


def test_every_route_but_health_asks_for_the_token(client_of, one):
    server = client_of(one, token=TOKEN)
    wrong = [None, "Bearer", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", f"Basic {TOKEN}", TOKEN]
    for (method, path), sent in itertools.product(ROUTES, wrong):
        answer = server.request(method, path, headers={} if sent is None else {"Authorization": sent})
        assert answer.status_code == 401, (method, path, sent)
        assert answer.headers["www-authenticate"] == "Bearer"
    assert server.get("/health").status_code == 200
    assert server.get("/tasks", headers={"Authorization": f"bearer {TOKEN}"}).json()["count"] == 3


def test_without_a_token_a_page_under_another_name_is_refused(client):
    assert client.get("/tasks", headers={"Host": "evil.example:8000"}).status_code == 403
    assert client.get("/tasks", headers={"Host": "TESTSERVER:8000"}).status_code == 200


def test_paths_and_methods_that_there_are_not(client):
    assert client.get("/nothing").status_code == 404
    assert client.get("/predict").status_code == 405
    assert client.get("/nothing").json()["error"]


def test_what_is_too_much_is_refused_with_when_to_come_again(client_of, one):
    release, entered = threading.Event(), threading.Event()

    class Slow:
        async def predict(self, questions, version):
            entered.set()
            await asyncio.to_thread(release.wait, 20)
            return await one.predict(questions, version)

        pack = ping = None

    server = client_of(Slow(), Limits(rows=3, characters=100, waiting=4))
    answers = []
    question = {"task": "t0", "inputs": ["w1", "w2", "w3"]}
    first = threading.Thread(target=lambda: answers.append(server.post("/predict", json=question)))
    first.start()
    assert entered.wait(20)
    refused = server.post("/predict", json=question)
    release.set()
    first.join(20)
    after = server.post("/predict", json=question)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert "3 inputs are waiting, at most 4 may" in refused.json()["error"]
    assert [answers[0].status_code, after.status_code] == [200, 200]


def test_requests_that_wait_travel_together_and_each_gets_its_own(folder, table, one):
    calls = []

    class Counted:
        async def predict(self, questions, version):
            calls.append(len(questions))
            return await one.predict(questions, version)

        pack = ping = None

    served = backend(folder, table, Counted())
    wanted = [
        (f"t{number % 3}", [TEXTS[number % 5], TEXTS[(number + 1) % 5]][: 1 + number % 2]) for number in range(60)
    ]

    async def work():
        return await asyncio.gather(*(served.predict(*question, 20) for question in wanted))

    answers = asyncio.run(work())
    assert sum(calls) == 60
    assert len(calls) < 10
    right = {task: expected(folder, task, TEXTS) for task in ("t0", "t1", "t2")}
    for (task, inputs), rows in zip(wanted, answers, strict=True):
        assert rows.task == task
        for text, logits in zip(inputs, rows.logits, strict=True):
            torch.testing.assert_close(torch.tensor(logits), right[task][TEXTS.index(text)], rtol=0, atol=2e-5)


@pytest.fixture
def dying(one):
    """A replica that dies under the first two requests, as Ray tells of it."""
    from ray.exceptions import ActorDiedError

    class Dying:
        def __init__(self):
            self.deaths = 0

        async def predict(self, questions, version):
            if self.deaths < 2:
                self.deaths += 1
                error = ActorDiedError()
                error.actor_id = self.deaths
                raise error
            return await one.predict(questions, version)

        pack = ping = None

    return Dying()


def test_a_request_whose_replica_dies_is_asked_again(client_of, folder, dying):
    answer = client_of(dying).post("/predict", json={"task": "t0", "inputs": TEXTS[:2]})
    check(answer, folder, "t0", TEXTS[:2])
    assert dying.deaths == 2


def test_no_replica_for_too_long_is_said(client_of, dying):
    dying.deaths = -2
    question = {"task": "t0", "inputs": ["w1"]}
    answer = client_of(dying).post("/predict", json=question)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert "3 replicas died" in answer.json()["error"]
    dying.deaths = 0
    hurried = client_of(dying, Limits(rows=3, characters=99, waiting=4, seconds=0.15))
    assert "no replica answered in 0.15 seconds" in hurried.post("/predict", json=question).json()["error"]


def test_an_answer_of_another_task_is_never_given(client_of, one):
    class Confused:
        async def predict(self, questions, version):
            return await one.predict([("t1", inputs) for _, inputs in questions], version)

        pack = ping = None

    server = client_of(Confused())
    answer = server.post("/predict", json={"task": "t0", "inputs": ["w1"]})
    assert (answer.status_code, "predictions" in answer.json()) == (500, False)
    assert client_metrics(server)['spectralbasis_serve_requests_total{route="POST /predict",status="500"}'] == 1


def client_metrics(server):
    lines = [line for line in server.get("/metrics").text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_metrics_count(client):
    client.post("/predict", json={"task": "t0", "inputs": TEXTS})
    client.post("/predict", json={"task": "nobody", "inputs": TEXTS})
    found = client_metrics(client)
    assert found["spectralbasis_serve_rows_total"] == 5
    assert found["spectralbasis_serve_tasks"] == 3
    assert found["spectralbasis_serve_waiting_rows"] == 0
    assert found['spectralbasis_serve_requests_total{route="POST /predict",status="200"}'] == 1
    assert found['spectralbasis_serve_requests_total{route="POST /predict",status="404"}'] == 1


def test_a_replica_that_starts_again_knows_every_change(folder, table, client):
    client.put("/tasks/new", json={"adapter": "t1"})
    client.put("/tasks/t0", json={"adapter": "t2"})
    client.delete("/tasks/t1")
    again = replica(folder, table)
    answers = asyncio.run(again.answer([Asked(task, ["w1"], 3) for task in ("new", "t0", "t1", "t2")]))
    assert answers[2] == Failed("unknown")
    assert answers[1].logits == answers[3].logits
    (right,) = expected(folder, "t1", ["w1"])
    torch.testing.assert_close(torch.tensor(answers[0].logits[0]), right, rtol=0, atol=2e-5)


def test_a_table_that_starts_again_is_filled(folder, table, one, client):
    client.put("/tasks/new", json={"adapter": "t1"})
    table.__init__()  # as Ray makes the actor anew
    again = replica(folder, table)
    assert asyncio.run(again.answer([Asked("new", ["w1"], 1)])) == [Failed("behind")]
    # The server that made the change has it still, and gives it to the table.
    assert client.put("/tasks/second", json={"adapter": "t2"}).status_code == 201
    assert table.version == 2
    answers = asyncio.run(again.answer([Asked(task, ["w1"], 2) for task in ("new", "second")]))
    assert [type(answer) for answer in answers] == [Rows, Rows]


def test_a_server_whose_table_is_behind_fills_it_for_a_prediction(folder, table, one, client):
    client.put("/tasks/new", json={"adapter": "t1"})
    table.__init__()
    one._version = 0
    check(client.post("/predict", json={"task": "t2", "inputs": TEXTS}), folder, "t2", TEXTS)
    assert table.version == 1


def test_the_table_gives_the_last_change_of_each_task_in_order():
    table = TaskTable()
    for number, (task, row) in enumerate([("a", b"1"), ("b", b"2"), ("a", None), ("c", b"3"), ("b", b"4")]):
        assert table.extend(number, number + 1, [(task, row)])
    assert table.since(0) == (5, [("a", None), ("c", b"3"), ("b", b"4")])
    assert table.since(4) == (5, [("b", b"4")])
    assert table.since(5) == (5, [])
    assert table.extend(4, 5, [("b", b"other")])  # told twice
    assert table.since(4) == (5, [("b", b"4")])
    assert not table.extend(6, 7, [("d", b"5")])


def test_a_bank_that_was_replaced_is_refused_by_a_replica(folder, table):
    from tests.coefficients.servers import BankReplica, opened

    with pytest.raises(InputError, match="was replaced since the server started"):
        BankReplica(opened(folder, checksum="0" * 32), None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "example.org", ""])
def test_other_machines_are_served_with_a_token_only(host):
    with pytest.raises(InputError, match="--token-file"):
        check_host(host, None)
    check_host(host, TOKEN)


@pytest.mark.parametrize("content", [b"", b"short\n", b"two words of a token\n", b"\xc3\xa9" * 20, b"x" * 2000])
def test_a_file_that_holds_no_token_is_refused(tmp_path, content):
    (tmp_path / "token").write_bytes(content)
    with pytest.raises(InputError, match="must hold one word"):
        read_token(tmp_path / "token")
    with pytest.raises(InputError, match="cannot be read"):
        read_token(tmp_path / "absent")


@pytest.mark.parametrize(("limit", "value"), [("rows", 0), ("characters", 0), ("waiting", 0), ("waiting", 5)])
def test_limits_that_let_nothing_through_are_refused(limit, value):
    with pytest.raises(InputError, match=f"--max-{limit}"):
        Limits(**({"rows": 6} | {limit: value}))
