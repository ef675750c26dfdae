"""From what a person asks for to the place where work runs."""

from spectralbasis.errors import InputError
from spectralbasis.execution.executor import Executor
from spectralbasis.execution.here import Here
from spectralbasis.execution.machine import cores
from spectralbasis.execution.processes import Processes
from spectralbasis.execution.ray_cluster import RayCluster
from spectralbasis.printable import shortened

MOST_WORKERS = 1024
"""Processes on one machine; each takes hundreds of megabytes before it works."""


def open_executor(
    workers: int = 1, ray: str | None = None, *, threads: int | None = None, gpu: bool = False
) -> Executor:
    """This process, local processes or a Ray cluster.

    Args:
        workers: local processes; 1 works in this one.
        ray: address of a Ray cluster, "auto" or "local", in place of local processes.
        threads: threads that each local process computes with; None gives each its share of the cores.
        gpu: whether each call on the cluster takes a GPU.

    Raises:
        InputError: `workers` is below 1 or above `MOST_WORKERS`, or there is no Ray to use.
    """
    if not 1 <= workers <= MOST_WORKERS:
        raise InputError(f"workers={shortened(workers, 40)} cannot work; pass a number from 1 to {MOST_WORKERS}")
    if ray is not None:
        return RayCluster(ray, gpu=gpu)
    return Here() if workers == 1 else Processes(workers, threads or max(1, cores() // workers))
