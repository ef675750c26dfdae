"""Where work runs: in this process, in local processes side by side, or on a Ray cluster."""

from spectralbasis.execution.crew import Crew
from spectralbasis.execution.executor import ATTEMPTS, Executor, Failure
from spectralbasis.execution.here import Here
from spectralbasis.execution.machine import native_bf16
from spectralbasis.execution.opening import open_executor
from spectralbasis.execution.processes import Processes
from spectralbasis.execution.ray_cluster import RayCluster

__all__ = ["ATTEMPTS", "Crew", "Executor", "Failure", "Here", "Processes", "RayCluster", "native_bf16", "open_executor"]
