"""A bank behind HTTP: its routes, who may use them, what is answered, and a stop that leaves nothing unanswered.

`BankApplication` is an ASGI application over a `Backend`, which computes; `ray_bank.py` has the one on Ray Serve. HTTP
ends in the process of the command and not in Ray's proxy, so that a request is refused by its size, its token or the
load before anything of it travels, and so that a stop answers what was taken.
"""

import asyncio
import heapq
import hmac
import math
import re
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from spectralbasis.coefficients.bank_file import task_name
from spectralbasis.coefficients.serving_requests import (
    ROOM,
    Addition,
    Limits,
    Pair,
    Refused,
    Text,
    content_of,
    folder_within,
    question,
)
from spectralbasis.errors import SpectralBasisError
from spectralbasis.printable import shortened

MOST_NAMES = 10_000
"""Names in one answer of `GET /tasks` at most."""
_SECONDS_OF_A_BODY = 30


@dataclass(frozen=True)
class Rows:
    """What a task says of some inputs.

    Attributes:
        task: whose numbers were used.
        logits: of each input, one for each label of the task.
        cut: of each input, whether it had more tokens than the model reads, so that its end was left out.
    """

    task: str
    logits: list[list[float]]
    cut: list[bool]


class UnknownTask(LookupError):
    """There is no such task."""


class Unavailable(RuntimeError):
    """No replica answers at present; the same request may succeed later."""


class Backend(Protocol):
    """What computes the answers."""

    @property
    def tasks(self) -> Collection[str]:
        """Names of all tasks."""

    async def predict(self, task: str, inputs: Sequence[Text | Pair], seconds: float) -> Rows:
        """Raises `UnknownTask`, `Unavailable` or, with a sentence, `InputError`."""

    async def add(self, task: str, folder: Path, seconds: float) -> bool:
        """Every later request is answered with the new numbers; whether the name is new. Raises as `predict`."""

    async def remove(self, task: str, seconds: float) -> None:
        """Every later request finds the task unknown. Raises as `predict`."""

    async def answers(self, seconds: float) -> bool:
        """Whether a replica answers."""


def predictions(rows: Rows) -> list[dict[str, Any]]:
    """What a client reads of each input: logits, and the label and its probabilities where a task has several labels.

    Examples:
        >>> predictions(Rows("task", [[0.0, 0.0]], [True]))
        [{'label': 0, 'probabilities': [0.5, 0.5], 'logits': [0.0, 0.0], 'cut': True}]
        >>> predictions(Rows("score", [[2.5]], [False]))
        [{'logits': [2.5]}]
    """
    return [
        ({} if len(logits) < 2 else _classified(logits)) | {"logits": logits} | ({"cut": True} if cut else {})
        for logits, cut in zip(rows.logits, rows.cut, strict=True)
    ]


def _classified(logits: list[float]) -> dict[str, Any]:
    most = max(logits)
    powers = [math.exp(logit - most) for logit in logits]
    total = sum(powers)
    return {"label": logits.index(most), "probabilities": [round(power / total, 7) for power in powers]}


class BankApplication:
    """The HTTP interface of a bank.

    Args:
        backend: what computes.
        limits: of requests.
        token: that every request must bear, except `GET /health`; None asks for none.
        hosts: the names under which a server without a token may be addressed, so that a page of the web whose name
            leads to this machine cannot use it; empty accepts all.
        adapters: the folder in which the adapters of new tasks lie; None refuses new tasks.

    Attributes:
        asgi: the application.
        seconds: how long a request waits for its answer at most.
        is_stopping: whether answers tell their client to send no more over this connection.
    """

    def __init__(
        self,
        backend: Backend,
        limits: Limits,
        *,
        token: str | None = None,
        hosts: Collection[str] = (),
        adapters: Path | None = None,
    ) -> None:
        self.seconds = limits.seconds
        self._backend = backend
        self._limits = limits
        self._token = token
        self._hosts = frozenset(hosts)
        self._adapters = adapters
        self.is_stopping = False
        self._waiting = 0
        self._metrics = _Metrics(backend, lambda: self._waiting)
        self.asgi = Starlette(
            routes=[
                self._route("/health", self._health, "GET", is_open=True),
                self._route("/metrics", self._show_metrics, "GET"),
                self._route("/predict", self._predict, "POST"),
                self._route("/tasks", self._list, "GET"),
                self._route("/tasks/{name:path}", self._add, "PUT"),
                self._route("/tasks/{name:path}", self._remove, "DELETE"),
            ],
            exception_handlers={HTTPException: _refusal, Exception: _failure},
        )
        self.asgi.router.redirect_slashes = False

    def _route(
        self, path: str, work: Callable[[Request], Awaitable[Response]], method: str, *, is_open: bool = False
    ) -> Route:
        async def answer(request: Request) -> Response:
            started, status = time.perf_counter(), 500
            try:
                if not is_open:
                    self._check_sender(request)
                response = await _answered(work, request)
                status = response.status_code
                if self.is_stopping:
                    response.headers["connection"] = "close"
                return response
            except HTTPException as refused:
                status = refused.status_code
                raise
            finally:
                self._metrics.count(f"{method} {path.partition('/{')[0]}", status, time.perf_counter() - started)

        return Route(path, answer, methods=[method])

    def _check_sender(self, request: Request) -> None:
        """The token is compared in a time that tells nothing of it."""
        if self._token is None:
            host = re.sub(r":\d+$", "", request.headers.get("host", "")).strip("[]").lower()
            if self._hosts and host not in self._hosts:
                raise Refused(403, f"the host {host!r} is not this server's; address it as {min(self._hosts)}")
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode("utf-8", "replace"), self._token.encode())
        if kind.lower() != "bearer" or not right:
            raise Refused(
                401, "the bearer token is missing or wrong; send Authorization: Bearer TOKEN", www_authenticate="Bearer"
            )

    async def _body(self, request: Request, most: int) -> bytes:
        """The body, of which no more is held than may be sent."""
        announced = request.headers.get("content-length", "0")
        body = bytearray()
        try:
            if announced.isdecimal() and int(announced[:20]) > most:
                raise Refused(
                    413, f"the body has {announced[:20]} bytes, expected at most {most}; send less", connection="close"
                )
            async with asyncio.timeout(_SECONDS_OF_A_BODY):
                async for part in request.stream():
                    body += part
                    if len(body) > most:
                        raise Refused(
                            413, f"the body has more than {most} bytes; send less at once", connection="close"
                        )
        except TimeoutError as error:
            raise Refused(408, f"the body took more than {_SECONDS_OF_A_BODY} seconds", connection="close") from error
        return bytes(body)

    @contextmanager
    def _admitted(self, rows: int) -> Iterator[None]:
        if self._waiting + rows > self._limits.waiting:
            raise Refused(
                503,
                f"{self._waiting} inputs are waiting, at most {self._limits.waiting} may; send this again later",
                retry_after="1",
            )
        self._waiting += rows
        try:
            yield
        finally:
            self._waiting -= rows

    async def _predict(self, request: Request) -> Response:
        task, inputs = question(await self._body(request, self._limits.bytes), self._limits)
        self._check_known(task)
        with self._admitted(len(inputs)):
            rows = await self._backend.predict(task, inputs, self._limits.seconds)
        if rows.task != task or len(rows.logits) != len(inputs):
            raise RuntimeError(f"asked for {len(inputs)} rows of {task!r}, got {len(rows.logits)} of {rows.task!r}")
        self._metrics.rows.inc(len(inputs))
        return JSONResponse({"task": task, "predictions": predictions(rows)})

    def _check_known(self, task: str) -> None:
        if task not in self._backend.tasks:
            raise UnknownTask(task)

    async def _list(self, request: Request) -> Response:
        limit, after = request.query_params.get("limit", "1000"), request.query_params.get("after", "")
        if not re.fullmatch(r"[0-9]{1,6}", limit) or not 1 <= int(limit) <= MOST_NAMES:
            raise Refused(422, f"limit is {shortened(repr(limit), 40)}, expected a number from 1 to {MOST_NAMES}")
        names = heapq.nsmallest(int(limit) + 1, (name for name in self._backend.tasks if name > after))
        shown = names[: int(limit)]
        following = shown[-1] if len(shown) < len(names) else None
        return JSONResponse({"count": len(self._backend.tasks), "tasks": shown, "next": following})

    async def _add(self, request: Request) -> Response:
        if self._adapters is None:
            raise Refused(403, "this server takes no new tasks; start it with --adapters FOLDER")
        body = content_of(await self._body(request, 4 * ROOM), Addition)
        name = task_name(request.path_params["name"])
        folder = folder_within(self._adapters, body["adapter"])
        with self._admitted(1):
            is_new = await self._backend.add(name, folder, self._limits.seconds)
        return JSONResponse({"task": name, "replaced": not is_new}, 201 if is_new else 200)

    async def _remove(self, request: Request) -> Response:
        name = request.path_params["name"]
        self._check_known(name)
        with self._admitted(1):
            await self._backend.remove(name, self._limits.seconds)
        return JSONResponse({"task": name, "removed": True})

    async def _health(self, request: Request) -> Response:
        if not await self._backend.answers(min(5, self._limits.seconds)):
            raise Unavailable("no replica answers at present")
        return JSONResponse({"status": "ok"})

    async def _show_metrics(self, request: Request) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _answered(work: Callable[[Request], Awaitable[Response]], request: Request) -> Response:
    """The response, with the status that belongs to each kind of error."""
    try:
        return await work(request)
    except UnknownTask as error:
        name = shortened(repr(error.args[0]), 80)
        raise Refused(404, f"there is no task {name}; GET /tasks lists those that there are") from error
    except Unavailable as error:
        raise Refused(503, f"{error}; send this again later", retry_after="5") from error
    except SpectralBasisError as error:
        raise Refused(422, str(error)) from error
    except ClientDisconnect as error:
        raise Refused(400, "the body ended early") from error


async def _refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def _failure(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": "the server failed over this request; its log says why"}, 500)


class _Metrics:
    """What `GET /metrics` shows, in the format of Prometheus; tasks are no labels, since there are too many."""

    def __init__(self, backend: Backend, waiting: Callable[[], int]) -> None:
        self._registry = registry = CollectorRegistry()
        prefix = "spectralbasis_serve"
        self._requests = Counter(f"{prefix}_requests", "Requests answered.", ["route", "status"], registry=registry)
        self._seconds = Histogram(
            f"{prefix}_request_seconds", "Seconds until a request was answered.", ["route"], registry=registry
        )
        self.rows = Counter(f"{prefix}_rows", "Inputs answered.", registry=registry)
        Gauge(f"{prefix}_tasks", "Tasks.", registry=registry).set_function(lambda: len(backend.tasks))
        Gauge(f"{prefix}_waiting_rows", "Inputs that wait for an answer.", registry=registry).set_function(waiting)

    def count(self, route: str, status: int, seconds: float) -> None:
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self._registry)


def describe_address(host: str, port: int) -> str:
    """The URL of a server.

    Examples:
        >>> describe_address("::1", 8000)
        'http://[::1]:8000'
    """
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run_until_stopped(application: BankApplication, taken: socket.socket, ready: Callable[[], None]) -> None:
    """Serve on a socket until SIGINT or SIGTERM comes and all requests that were taken are answered.

    Args:
        application: what to serve.
        taken: a bound socket.
        ready: called once requests are accepted.
    """
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready()

        def handle_exit(self, sig: int, frame: Any) -> None:
            application.is_stopping = True
            super().handle_exit(sig, frame)

    config = uvicorn.Config(
        application.asgi,
        http="h11",  # which bounds the size of headers
        ws="none",
        lifespan="off",
        log_level="error",
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=math.ceil(application.seconds) + 5,
    )
    # uvicorn stops at these signals, and then raises them again for the handlers from before.
    before = {one: signal.signal(one, lambda *_: None) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        Server(config).run([taken])
    finally:
        signal.signal(signal.SIGINT, before[signal.SIGINT])  # a second SIGTERM does not disturb what follows
