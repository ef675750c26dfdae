"""Work on a Ray cluster."""

import logging
import os
import socket
import sys
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

import torch

from spectralbasis.errors import InputError
from spectralbasis.execution.executor import Call, Death, Executor, perform

LOCAL = "local"
AHEAD = 2
"""Calls under way for each that can run: the next one is there when a worker is free."""
SECONDS_TO_ANSWER = 10


class RayCluster(Executor):
    """Runs each call on one core, or one GPU, of a Ray cluster; nodes may come and go.

    Args:
        address: of the cluster; "auto" for the one that this machine belongs to, "local" for one made here.
        gpu: whether each call takes a GPU.

    Raises:
        InputError: Ray is not installed, or no cluster answers.
    """

    def __init__(self, address: str, *, gpu: bool = False) -> None:
        self._ray, self._ours = _connect(address)
        self._kind = "GPU" if gpu else "CPU"
        self._options: dict[str, Any] = {"num_cpus": 1, "num_gpus": 1 if gpu else None, "max_retries": 0}
        self._remote = self._ray.remote(_perform_on_one_thread)
        self._under_way: list[Any] = []

    @property
    def workers(self) -> int:
        return max(1, int(self._ray.cluster_resources().get(self._kind, 0)))

    @property
    def slots(self) -> int:
        return AHEAD * self.workers

    def start(self, call: Call) -> Hashable:
        memory = min(call.memory, self._largest_node()) or None
        remote = self._remote.options(**self._options, memory=memory)
        reference: Hashable = remote.remote(call.work, call.arguments)
        self._under_way.append(reference)
        return reference

    def finished(self) -> list[tuple[Hashable, Any]]:
        if not self._under_way:
            return []
        self._ray.wait(self._under_way)
        ready, self._under_way = self._ray.wait(self._under_way, num_returns=len(self._under_way), timeout=0)
        return [(reference, self._result(reference)) for reference in ready]

    def _result(self, reference: Any) -> Any:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:  # what the work itself raises comes back as a result
            raise InputError(
                f"a worker of the cluster cannot run the work ({_last_line(error)}); install the same spectralbasis on "
                "every node"
            ) from error
        except self._ray.exceptions.RayError as error:
            return Death(f"its worker was lost: {type(error).__name__}: {_first_line(error)}")

    def _largest_node(self) -> int:
        """Bytes that the largest node offers: a call that asked for more would wait for ever."""
        return max((int(node["Resources"].get("memory", 0)) for node in self._ray.nodes() if node["Alive"]), default=0)

    def close(self) -> None:
        for reference in self._under_way:
            self._ray.cancel(reference, force=True)
        self._under_way = []
        if self._ours:
            self._ray.shutdown()


def _perform_on_one_thread(work: Any, arguments: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    return perform(work, arguments)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _last_line(error: Exception) -> str:
    return str(error).strip().rpartition("\n")[2]


def _connect(address: str) -> tuple[Any, bool]:
    """The Ray module, connected to a cluster, and whether the connection is ours to end; no figures of use are sent."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise InputError("--ray needs the package ray; pip install 'spectralbasis[ray]'") from error
    if ray.is_initialized():
        return ray, False
    if ":" in address:
        _check_port(address)
    options: dict[str, Any] = {"include_dashboard": False} if address == LOCAL else {}
    try:
        ray.init(
            address=address, log_to_driver=False, logging_level=logging.ERROR, job_config=_job_config(ray), **options
        )
    except (ConnectionError, ValueError) as error:
        raise _no_cluster(address, error) from error
    return ray, True


class _Importable(list[str]):
    """Folders that workers import from: those alone that this process imports from too."""

    def extend(self, folders: Iterable[str]) -> None:
        here = {Path(folder).absolute() for folder in sys.path}
        super().extend(folder for folder in folders if Path(folder).absolute() in here)


def _job_config(ray: Any) -> Any:
    """How Ray runs our work.

    Ray extends this list by the working folder, in which its workers would then look for `numpy` and for this package
    first; it has no setting to leave that out.
    """
    config = ray.job_config.JobConfig()
    config._py_driver_sys_path = _Importable()
    return config


def _check_port(address: str) -> None:
    """Raise InputError where nobody listens: Ray itself would try for more than a minute."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=SECONDS_TO_ANSWER).close()
    except (OSError, ValueError, OverflowError) as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> InputError:
    return InputError(f"no Ray cluster answers at {address!r} ({error}); start one, or pass --ray local")
