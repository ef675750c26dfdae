"""What a request to a server may say and ask for: its limits, its token, and its schema.

Whatever a client sends is refused here in a sentence, before anything is computed or read for it.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any

from annotated_types import MaxLen, MinLen
from pydantic import ConfigDict, with_config
from starlette.exceptions import HTTPException
from typing_extensions import TypedDict

from spectralbasis.errors import InputError
from spectralbasis.printable import shortened
from spectralbasis.records import checked, parse_json

LONGEST_TOKEN = 1000
SHORTEST_TOKEN = 16
_BYTES_OF_A_CHARACTER = 12
"""In JSON at most: two escapes of six bytes for a character outside of the basic plane."""
ROOM = 4096
"""Bytes of a body beside its texts."""
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
        return _BYTES_OF_A_CHARACTER * self.characters + 16 * self.rows + ROOM


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
    content = content_of(body, Question)
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


def content_of(body: bytes, schema: Any) -> Any:
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
