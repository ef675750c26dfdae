"""The commands for banks of tasks; `spectralbasis.cli` registers them."""

import json
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from spectralbasis.commands import tables
from spectralbasis.commands.options import AsJson, Model, Ray, existing_folder
from spectralbasis.errors import InputError
from spectralbasis.extras import require_extra
from spectralbasis.locations import check_folders
from spectralbasis.printable import printable

bank = typer.Typer(no_args_is_help=True, help="Put the adapters of many tasks into one file, and show such a file.")


def existing_file(given: Path) -> Path:
    """Refuse a file that does not exist while a command is parsed, before anything large is imported."""
    if not given.is_file():
        wrong = "is no file" if given.exists() else "does not exist"
        raise InputError(f"{given} {wrong}; pass a file that `spectralbasis bank build` wrote")
    return given


def named_folders(given: list[str]) -> list[str]:
    """Refuse adapters that do not exist, or two of one name, before anything large is imported."""
    check_folders(adapters_by_name(given).values())
    return given


def adapters_by_name(given: Sequence[str]) -> dict[str, Path]:
    """Task → folder, from folders and from `name=folder`.

    Raises:
        InputError: a name is empty or given twice.

    Examples:
        >>> sorted(adapters_by_name(["adapters/rte", "glue/mrpc=adapters/mrpc-2"]))
        ['glue/mrpc', 'rte']
    """
    found: dict[str, Path] = {}
    for one in given:
        name, is_named, folder = one.partition("=")
        if not is_named or Path(one).is_dir():
            name, folder = Path(one).absolute().name, one
        if not name or not folder:
            raise InputError(f"{one!r} names no task or no folder; write FOLDER or NAME=FOLDER")
        if name in found:
            raise InputError(f"{found[name]} and {folder} are both named {name!r}; write NAME=FOLDER for one of them")
        found[name] = Path(folder)
    return found


Bank = Annotated[
    Path, typer.Argument(help="A bank: a file that `spectralbasis bank build` wrote.", callback=existing_file)
]


@bank.command("build")
def build(
    model: Model,
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER|NAME=ADAPTER...",
            help="Folders of spectral adapters of the model. A task is named as its folder, or as you write.",
            callback=named_folders,
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write the bank to.")],
    labels: Annotated[
        int | None,
        typer.Option(min=1, help="Labels to leave room for in every head. Default: those of the largest head."),
    ] = None,
    dtype: Annotated[str, typer.Option(metavar="float32|float16|bfloat16", help="Type of the numbers.")] = "float32",
    as_json: AsJson = False,
) -> None:
    """Put the coefficients and heads of many adapters of one model into one file.

    Example: `spectralbasis bank build minilm adapters/rte adapters/mrpc -o tasks.safetensors`
    """
    from spectralbasis.files import check_replaceable

    check_replaceable(output)
    import torch

    from spectralbasis.coefficients.bank import CoefficientBank
    from spectralbasis.coefficients.bank_file import head_shapes, task_name
    from spectralbasis.coefficients.spectral_adapters import other_shapes, read_spectral_adapter
    from spectralbasis.training.bank_models import load_base

    types = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype not in types:
        raise InputError(f"--dtype {dtype} is unknown; write one of {', '.join(types)}")
    folders = {task_name(name): folder for name, folder in adapters_by_name(adapters).items()}
    task_type = read_spectral_adapter(next(iter(folders.values()))).config.task_type
    base = load_base(model, task_type, head_shapes([other_shapes(folder) for folder in folders.values()], labels))
    CoefficientBank.from_adapters(base, folders, labels=labels, dtype=types[dtype]).save(output)
    tables.show_result(tables.bank_facts(output), tables.bank_table, as_json)


@bank.command("list")
def show(file: Bank, as_json: AsJson = False) -> None:
    """Check a bank, and show its tasks and what they have in common.

    Example: `spectralbasis bank list tasks.safetensors`
    """
    tables.show_result(tables.bank_facts(file), tables.bank_table, as_json)


def serve(
    model: Model,
    bank: Bank,
    host: Annotated[
        str, typer.Option(help="Address to listen on; one that other machines reach needs --token-file.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    replicas: Annotated[int, typer.Option(min=1, help="Copies of the model, each in its own process.")] = 1,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Threads of each copy. Default: its share of the cores; 1 on a Ray cluster."),
    ] = None,
    ray: Ray = None,
    token_file: Annotated[
        Path | None, typer.Option(help="File with the bearer token that every request must send. Default: none.")
    ] = None,
    adapters: Annotated[
        Path | None,
        typer.Option(
            help="Folder in which the adapters of new tasks lie. Default: no tasks are added.", callback=existing_folder
        ),
    ] = None,
    max_rows: Annotated[int, typer.Option(help="Inputs of one request at most.")] = 256,
    max_characters: Annotated[int, typer.Option(help="Characters of one request at most.")] = 200_000,
    max_waiting: Annotated[int, typer.Option(help="Inputs that may wait at once; more are refused with 503.")] = 4096,
    max_length: Annotated[
        int | None, typer.Option(help="Inputs are cut after this many tokens. Default: what the model reads.")
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=0.1, max=3600, help="Seconds that a request waits for its answer at most.")
    ] = 60,
    as_json: AsJson = False,
) -> None:
    """Serve the tasks of a bank over HTTP, with any mix of tasks in a batch. Ctrl-C answers what was taken, and stops.

    Needs the extra `serve`: `pip install 'spectralbasis[serve]'`.

    Example: `spectralbasis serve minilm tasks.safetensors --port 8000`
    """
    require_extra("serve", "the command serve")
    from spectralbasis.coefficients.serving_requests import Limits, check_host, read_token

    limits = Limits(max_rows, max_characters, max_waiting, timeout)
    token = None if token_file is None else read_token(token_file)
    check_host(host, token)
    with listening(host, port) as taken:

        def ready(url: str, tasks: int) -> None:
            print(printable(f"serving {tasks:,} tasks on {url}; Ctrl-C stops"), file=sys.stderr, flush=True)
            if as_json:
                print(json.dumps({"url": url, "tasks": tasks}), flush=True)

        where = {"replicas": replicas, "threads": threads, "ray": ray}
        _serve(model, bank, taken, limits, token, adapters, max_length, ready, where)
    print("stopped; every request that was taken has its answer", file=sys.stderr)


def listening(host: str, port: int) -> socket.socket:
    """A socket at this address; it accepts nothing yet.

    Raises:
        InputError: the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        taken = socket.socket(family, kind, protocol)
        try:
            if sys.platform != "win32":
                taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind(address)
        except OSError:
            taken.close()
            raise
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot listen on {host} port {port} ({reason}); pass another --host or --port") from error
    return taken


def _serve(
    model: str,
    file: Path,
    taken: socket.socket,
    limits: Any,
    token: str | None,
    adapters: Path | None,
    max_length: int | None,
    ready: Callable[[str, int], None],
    where: dict[str, Any],
) -> None:
    from functools import partial

    from spectralbasis.coefficients.bank_file import read_bank
    from spectralbasis.coefficients.ray_bank import started
    from spectralbasis.coefficients.serving import BankApplication, describe_address, run_until_stopped
    from spectralbasis.training.bank_models import check_served, load_served

    found = read_bank(file)
    config, heads = found.layout.config, found.layout.heads
    check_served(config.task_type, heads)
    place = str(Path(model).absolute()) if Path(model).exists() else model
    load = partial(load_served, place, config.task_type, heads, max_length)
    host, port = taken.getsockname()[:2]
    with started(load, file, found, **where) as backend:
        hosts = () if token else ("localhost", "127.0.0.1", "::1", host)
        application = BankApplication(backend, limits, token=token, hosts=hosts, adapters=adapters)
        run_until_stopped(application, taken, lambda: ready(describe_address(host, port), len(found.tasks)))
