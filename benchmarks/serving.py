"""How fast is a bank behind HTTP, and does it stay right while tasks come and go and a replica is killed?

Run with `python -m benchmarks.serving`: a bank of 100,000 tasks on MiniLM (made in `--folder`, 1.3 GB, where it is not
there yet) in this process, then behind `spectralbasis serve` with 64 clients; then a soak of `--minutes` with two
replicas, one of which is killed. `--parts bank,served,soak` runs some of these and keeps the results of the others.
"""

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file, save_file

from benchmarks.bank import write_adapter, write_bank_file
from benchmarks.processes import measure
from benchmarks.results import earlier, environment, parse_arguments, write

CLIENTS, WORDS, TEXTS = 64, 30, 16
ROWS_OF_A_REQUEST = (1, 8)
BATCH = 128
CHECKED = 32
"""Tasks of the soak, whose answers are known: as many adapters of different numbers."""
CHANGED = 8
CLOSE = 1e-3
VOCABULARY = sorted(set((__doc__ or "").lower().replace("`", " ").replace(".", " ").split()))


def main() -> None:
    arguments = parse_arguments(
        __doc__, tasks=100_000, seconds=30, minutes=10.0, parts="bank,served,soak", folder=tempfile.gettempdir()
    )
    folder = Path(arguments.folder) / f"serving-{arguments.tasks}"
    file = prepare(folder, arguments.tasks)
    found = earlier("serving") | environment()
    found["settings"] = {"tasks": arguments.tasks, "clients": CLIENTS, "words": WORDS, "batch": BATCH}
    for part in arguments.parts.split(","):
        if part == "bank":
            found["bank"] = measure("benchmarks.serving:alone", str(file), str(arguments.seconds))["result"]
        elif part == "served":
            found["served"] = served(file, arguments.tasks, arguments.seconds)
        else:
            found["soak"] = soak(file, folder, arguments.minutes * 60)
        write("serving", found)


def prepare(folder: Path, tasks: int) -> Path:
    """A bank in a folder, and adapters for tasks that are added; made once."""
    file = folder / "bank.safetensors"
    if not file.exists():
        for number in range(CHANGED):
            adapter = write_adapter(folder / "adapters" / str(number)) / "adapter_model.safetensors"
            draws = torch.Generator().manual_seed(number)
            tensors = {key: 0.1 * torch.randn(one.shape, generator=draws) for key, one in load_file(adapter).items()}
            save_file(tensors, adapter)
        write_bank_file(file, folder / "adapters" / "0", tasks)
    return file


def texts() -> list[str]:
    draws = random.Random(0)
    return [" ".join(draws.choices(VOCABULARY, k=WORDS)) for _ in range(TEXTS)]


def opened(file: str) -> tuple[Any, Any]:
    """The bank in this process, and what reads texts for it."""
    import spectralbasis as sb
    from spectralbasis.coefficients.bank_file import read_bank
    from spectralbasis.training.bank_models import load_served

    layout = read_bank(Path(file)).layout
    model, reader = load_served("minilm", layout.config.task_type, layout.heads, None)
    return sb.CoefficientBank.open(file, model), reader


def alone(file: str, seconds: str) -> Any:
    """A tool: rows a second of the bank itself, from texts to logits, every row of another task."""
    bank, reader = opened(file)
    draws, known = random.Random(0), texts()

    def work() -> dict[str, Any]:
        rows, started, used = 0, 0.0, 0.0
        while not started or time.perf_counter() - started < float(seconds):
            tasks = [f"task {draws.randrange(len(bank))}" for _ in range(BATCH)]
            tokens = [one for one, _ in reader(draws.choices(known, k=BATCH))]
            bank(**reader.batch(tokens), tasks=tasks).logits.tolist()
            rows += BATCH if started else 0  # the first batch warms up
            started, used = (started, used) if started else (time.perf_counter(), time.process_time())
        taken, processor = time.perf_counter() - started, time.process_time() - used
        return {
            "rows_per_second": rows / taken,
            "processor_seconds_per_row": processor / rows,
            "tokens": len(tokens[0]["input_ids"]),
        }

    return work


@contextmanager
def server(file: Path, *options: str) -> Iterator[tuple[int, int]]:
    """`spectralbasis serve` on a free port: its process and port. Ends with SIGTERM, and must end well."""
    command = [sys.executable, "-m", "spectralbasis", "serve", "minilm", str(file), "--port", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if ready := re.search(r"serving .* on http://127.0.0.1:(\d+)", line):
                break
        else:
            raise SystemExit("the server did not start")
        try:
            yield process.pid, int(ready[1])
        finally:
            process.send_signal(signal.SIGTERM)
            process.stderr.read()
            if process.wait(120):
                raise SystemExit(f"the server ended with {process.returncode}")


@asynccontextmanager
async def connection(port: int) -> AsyncIterator[Any]:
    """A function that sends a request over one connection, and gives status and content."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    async def ask(method: str, path: str, content: Any = None) -> tuple[int, Any]:
        body = b"" if content is None else json.dumps(content).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        answer = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(answer.partition("content-length: ")[2].partition("\r\n")[0])
        return int(answer[9:12]), json.loads(await reader.readexactly(length))

    try:
        yield ask
    finally:
        writer.close()


def served(file: Path, tasks: int, seconds: int) -> dict[str, Any]:
    """Rows a second and times of requests behind HTTP, for each number of rows of a request."""
    started = time.perf_counter()
    with server(file, "--threads", str(os.cpu_count())) as (process, port):
        ready = time.perf_counter() - started
        rates = [asyncio.run(load(process, port, tasks, rows, seconds)) for rows in ROWS_OF_A_REQUEST]
    return {"seconds_until_ready": ready, "rates": rates}


async def load(process: int, port: int, tasks: int, rows: int, seconds: float) -> dict[str, Any]:
    """64 clients, each of which sends its next request once the one before is answered."""
    known, begins = texts(), time.perf_counter() + min(5.0, seconds / 2)
    ends, times, before, answered = begins + seconds, [], _processor_seconds(process), 0

    async def client(draws: random.Random) -> None:
        nonlocal answered
        async with connection(port) as ask:
            while (started := time.perf_counter()) < ends:
                question = {"task": f"task {draws.randrange(tasks)}", "inputs": draws.choices(known, k=rows)}
                status, said = await ask("POST", "/predict", question)
                assert (status, said.get("task")) == (200, question["task"]), said
                answered += rows
                if begins < time.perf_counter() < ends:
                    times.append(time.perf_counter() - started)

    await asyncio.gather(*(client(random.Random(number)) for number in range(CLIENTS)))
    times.sort()
    return {
        "rows_of_a_request": rows,
        "rows_per_second": len(times) * rows / seconds,
        "processor_seconds_per_row": (_processor_seconds(process) - before) / answered,
        "median_seconds": times[len(times) // 2],
        "seconds_99": times[int(len(times) * 0.99)],
    }


@dataclass
class Soak:
    """What a soak counts."""

    expected: dict[str, list[list[float]]]
    added: list[list[list[float]]]
    requests: int = 0
    rows: int = 0
    wrong: int = 0
    changes: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    longest: float = 0.0

    def check(self, status: int, said: Any, task: str, right: Sequence[Sequence[float]]) -> None:
        """Compare every row of an answer with its own task's."""
        self.requests += 1
        self.statuses[status] += 1
        if status == 200:
            self.rows += len(right)
            same = said["task"] == task and len(said["predictions"]) == len(right)
            found = [row["logits"] for row in said["predictions"]]
            close = same and torch.allclose(torch.tensor(found), torch.tensor(right), rtol=0, atol=CLOSE)
            self.wrong += not close


def soak(file: Path, folder: Path, seconds: float) -> dict[str, Any]:
    """Minutes of requests whose answers are known, while tasks come and go and a replica is killed."""
    known, added = measure("benchmarks.serving:answers", str(file), str(folder / "adapters"))["result"]
    counted = Soak(known, added)
    with server(file, "--replicas", "2", "--adapters", str(folder / "adapters")) as (process, port):
        memory = asyncio.run(_soak(counted, process, port, seconds))
    return {
        "seconds": seconds,
        "replicas": 2,
        "requests": counted.requests,
        "rows": counted.rows,
        "changes": counted.changes,
        "wrong": counted.wrong,
        "not_answered": counted.requests - counted.statuses[200],
        "statuses": {str(status): count for status, count in sorted(counted.statuses.items())},
        "longest_seconds": counted.longest,
        "memory": memory,
    }


def answers(file: str, adapters: str) -> Any:
    """A tool: the logits of the checked tasks, and of every adapter that is added, for all texts."""
    bank, reader = opened(file)
    names = [f"task {len(bank) * number // CHECKED}" for number in range(CHECKED)]
    for number in range(CHANGED):
        bank.add(f"added {number}", f"{adapters}/{number}")

    def of(task: str) -> list[list[float]]:
        tokens = [one for one, _ in reader(texts())]
        found: list[list[float]] = bank(**reader.batch(tokens), tasks=[task] * TEXTS).logits.tolist()
        return found

    return lambda: ({name: of(name) for name in names}, [of(f"added {number}") for number in range(CHANGED)])


async def _soak(counted: Soak, process: int, port: int, seconds: float) -> list[dict[str, Any]]:
    known, ends = texts(), time.perf_counter() + seconds

    async def client(draws: random.Random) -> None:
        async with connection(port) as ask:
            while (started := time.perf_counter()) < ends:
                task = draws.choice(list(counted.expected))
                chosen = [draws.randrange(TEXTS) for _ in range(draws.choice((1, 2, 8)))]
                said = await ask("POST", "/predict", {"task": task, "inputs": [known[text] for text in chosen]})
                counted.check(*said, task, [counted.expected[task][text] for text in chosen])
                counted.longest = max(counted.longest, time.perf_counter() - started)

    async def changer(name: str, draws: random.Random) -> None:
        async with connection(port) as ask:
            while time.perf_counter() < ends:
                number = draws.randrange(CHANGED)
                status, _ = await ask("PUT", f"/tasks/{name}", {"adapter": str(number)})
                text = draws.randrange(TEXTS)
                question = {"task": name, "inputs": [known[text]]}
                counted.check(*await ask("POST", "/predict", question), name, [counted.added[number][text]])
                counted.wrong += status not in (200, 201)
                if draws.random() < 0.5:
                    status, _ = await ask("DELETE", f"/tasks/{name}")
                    counted.wrong += status != 200
                    status, _ = await ask("POST", "/predict", question)
                    counted.wrong += status != 404
                counted.changes += 1
                await asyncio.sleep(0.5)

    memory: list[dict[str, Any]] = []

    async def watch() -> None:
        for step in range(20):
            await asyncio.sleep(seconds / 20)
            memory.append({"seconds": seconds * (step + 1) / 20, **_memory(process)})
            if step == 7:
                _replicas(process)[0].kill()

    clients = (client(random.Random(number)) for number in range(CLIENTS))
    changers = (changer(f"changed {number}".replace(" ", "-"), random.Random(number)) for number in range(2))
    await asyncio.gather(*clients, *changers, watch())
    return memory


def _processor_seconds(process: int) -> float:
    """What a server and all processes of its replicas and of Ray have computed."""
    whole = psutil.Process(process)
    times = [one.cpu_times() for one in (whole, *whole.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def _replicas(process: int) -> list[psutil.Process]:
    found = psutil.Process(process).children(recursive=True)
    return [one for one in found if "".join(one.cmdline()).startswith("ray::ServeReplica")]


def _memory(process: int) -> dict[str, int]:
    """Memory of their own of the process that takes requests, and of all replicas together."""
    own = [one.memory_info() for one in (psutil.Process(process), *_replicas(process))]
    front, *rest = [info.rss - info.shared for info in own]
    return {"front_bytes": front, "replicas_bytes": sum(rest), "replicas": len(rest)}


if __name__ == "__main__":
    main()
