"""A bank behind HTTP: what a client may send, what it costs at most, and what it is answered.

`BankApplication` is an ASGI application over a `Backend`, which computes; `replicas.py` has the one on Ray Serve. HTTP
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
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Protocol

from annotated_types import MaxLen, MinLen
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import ConfigDict, with_config
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from typing_extensions import TypedDict

from spectralbasis.coefficients.bank_file import task_name
from spectralbasis.errors import InputError, SpectralBasisError
from spectralbasis.printable import shortened
from spectralbasis.records import checked, parse_json

LONGEST_TOKEN = 1000
SHORTEST_TOKEN = 16
MOST_NAMES = 10_000
"""Names in one answer of `GET /tasks` at most."""
_BYTES_OF_A_CHARACTER = 12
"""In JSON at most: two escapes of six bytes for a character outside of the basic plane."""
_ROOM = 4096
_SECONDS_OF_A_BODY = 30
_LONE = re.compile("[\ud800-\udfff]")
_AGAIN = "correct the request"

Text = str
Pair = tuple[str, str]


@with_config(ConfigDict(extra="forbid"))
class Question(TypedDict):
    """The body of `POST /predict`."""

    task: str
    inputs: Annotated[list[Text | Pair], MinLen(1)]


@with_config(ConfigDict(extra="forbid"))
class Addition(TypedDict):
    """The body of `PUT /tasks/NAME`: a folder within the one that the server was started with."""

    adapter: Annotated[str, MinLen(1), MaxLen(1000)]


@dataclass(frozen=True)
class Limits:
    """What a request and all requests together may ask for.

    Attributes:
        rows: inputs of one request.
        characters: of all inputs of one request.
        waiting: inputs that may wait for an answer at the same time; more are refused with 503.
        seconds: how long one request waits for its answer, and how long a stop waits for all of them.
    """

    rows: int = 256
    characters: int = 200_000
    waiting: int = 4096
    seconds: float = 60

    def __post_init__(self) -> None:
        for name, value in (("rows", self.rows), ("characters", self.characters), ("waiting", self.waiting)):
            if value < 1:
                raise InputError(f"--max-{name} must be at least 1, got {value}")
        if self.waiting < self.rows:
            raise InputError(f"--max-waiting {self.waiting} is less than --max-rows {self.rows}; give at least as many")

    @property
    def bytes(self) -> int:
        """Of a body: what the largest request takes if every character is escaped."""
        return _BYTES_OF_A_CHARACTER * self.characters + 16 * self.rows + _ROOM


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

    tasks: Collection[str]
    """Names of all tasks."""

    async def predict(self, task: str, inputs: Sequence[Text | Pair], seconds: float) -> Rows:
        """Raises `UnknownTask`, `Unavailable` or, with a sentence, `InputError`."""

    async def add(self, task: str, folder: Path, seconds: float) -> bool:
        """Every later request is answered with the new numbers; whether the name is new. Raises as `predict`."""

    async def remove(self, task: str, seconds: float) -> None:
        """Every later request finds the task unknown. Raises as `predict`."""

    async def answers(self, seconds: float) -> bool:
        """Whether a replica answers."""


class Refused(HTTPException):
    """A request that is not answered, with the sentence that says why."""

    def __init__(self, status: int, sentence: str, **headers: str) -> None:
        super().__init__(status, shortened(sentence, 2000), {name.replace("_", "-"): headers[name] for name in headers})


def read_token(file: Path) -> str:
    """The bearer token in a file.

    Raises:
        InputError: the file cannot be read, or holds something else than one word of 16 or more ASCII characters.

    Examples:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "token"
        >>> _ = file.write_text("0123456789abcdef\\n")
        >>> read_token(file)
        '0123456789abcdef'
    """
    try:
        with file.open("rb") as opened:
            content = opened.read(LONGEST_TOKEN + 1)
    except OSError as error:
        raise InputError(f"the token file {file} cannot be read: {error.strerror}") from error
    token = content.strip()
    if not SHORTEST_TOKEN <= len(token) <= LONGEST_TOKEN or not re.fullmatch(rb"[!-~]+", token):
        raise InputError(
            f"the token file {file} must hold one word of {SHORTEST_TOKEN} to {LONGEST_TOKEN} visible ASCII "
            'characters; make one: python -c "import secrets; print(secrets.token_urlsafe())"'
        )
    return token.decode()


def is_loopback(host: str) -> bool:
    """Whether a host is this machine alone.

    Examples:
        >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("localhost"), is_loopback("0.0.0.0")
        (True, True, True, False)
    """
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_host(host: str, token: str | None) -> None:
    """Refuse to listen to other machines without a token.

    Raises:
        InputError: see above.
    """
    if token is None and not is_loopback(host):
        raise InputError(
            f"--host {host} is reachable from other machines, which needs a bearer token; add --token-file FILE, or "
            "leave --host out to serve this machine alone"
        )


def folder_within(root: Path, name: str) -> Path:
    """A folder of adapters by its name within another folder.

    Raises:
        InputError: the name is absolute, leads out of the folder, also by a link, or names no folder.
    """
    if "\0" in name or _LONE.search(name):
        raise InputError(f"adapter {shortened(repr(name))} holds a character that no name has; {_AGAIN}")
    given = Path(name)
    if given.is_absolute() or ".." in given.parts:
        raise InputError(f"adapter {shortened(repr(name))} must be a relative path without '..'; {_AGAIN}")
    try:
        top = root.resolve(strict=True)
        place = (top / given).resolve(strict=True)
        inside = [place, *(file.resolve() for file in place.iterdir())] if place.is_dir() else []
    except (OSError, RuntimeError):
        inside = []
    if not inside or not all(one.is_relative_to(top) for one in inside):
        raise InputError(
            f"adapter {shortened(repr(name))} is no folder of an adapter within the folder that the server was started "
            "with (--adapters); put it there"
        )
    return place


def question(body: bytes, limits: Limits) -> tuple[str, list[Text | Pair]]:
    """Task and inputs of a prediction.

    Raises:
        Refused: 400 if the body is not JSON, 422 if it is something else than a question, 413 if it asks for too much.
    """
    content = _checked(body, Question)
    inputs = [one if isinstance(one, str) else tuple(one) for one in content["inputs"]]
    if len(inputs) > limits.rows:
        raise Refused(413, f"inputs has {len(inputs)} rows, expected at most {limits.rows}; send several requests")
    texts = [text for one in inputs for text in ((one,) if isinstance(one, str) else one)]
    characters = sum(map(len, texts))
    if characters > limits.characters:
        raise Refused(
            413, f"inputs has {characters} characters, expected at most {limits.characters}; send fewer or shorter rows"
        )
    if any(_LONE.search(text) for text in texts):
        raise Refused(422, f"inputs has half of a character (a lone surrogate), which no text holds; {_AGAIN}")
    return content["task"], inputs


def _checked(body: bytes, schema: Any) -> Any:
    try:
        text = body.decode()
        content = parse_json(text, "the body", _AGAIN)
    except UnicodeDecodeError as error:
        raise Refused(400, f"the body is not UTF-8 ({error.reason} at byte {error.start}); {_AGAIN}") from error
    except InputError as error:
        raise Refused(400, str(error)) from error
    if isinstance(content, dict) and any(_LONE.search(str(one)) for one in _strings(content)):
        raise Refused(422, f"the body has half of a character (a lone surrogate), which no text holds; {_AGAIN}")
    try:
        return checked(content, schema, "the body", _AGAIN)
    except InputError as error:
        raise Refused(422, str(error)) from error


def _strings(content: Any) -> Iterator[str]:
    """The texts of an object of the two schemas; what is nested deeper is refused by them."""
    for key, value in content.items():
        yield key
        for one in value if isinstance(value, list) else [value]:
            yield from (text for text in (one if isinstance(one, list) else [one]) if isinstance(text, str))


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
        body = _checked(await self._body(request, _ROOM * 4), Addition)
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
        self._registry = CollectorRegistry()
        to = {"registry": self._registry}
        prefix = "spectralbasis_serve"
        self._requests = Counter(f"{prefix}_requests", "Requests answered.", ["route", "status"], **to)
        self._seconds = Histogram(f"{prefix}_request_seconds", "Seconds until a request was answered.", ["route"], **to)
        self.rows = Counter(f"{prefix}_rows", "Inputs answered.", **to)
        Gauge(f"{prefix}_tasks", "Tasks.", **to).set_function(lambda: len(backend.tasks))
        Gauge(f"{prefix}_waiting_rows", "Inputs that wait for an answer.", **to).set_function(waiting)

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
        for one, handler in before.items():
            signal.signal(one, handler)
