"""One `.safetensors` file."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spectralbasis.checkpoints.checkpoint import Checkpoint
from spectralbasis.errors import InputError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "BOOL": torch.bool,
}


class SafetensorsFile(Checkpoint):
    """Reads the header when opened; maps the file anew for each tensor, so that nothing stays resident.

    Raises:
        InputError: the file is missing, cut short or no safetensors file.
    """

    def __init__(self, path: Path, source: str, config: Mapping[str, Any]) -> None:
        self.source = source
        self.config = config
        self._path = path
        with _opened(path) as file:
            self._header = {name: _describe(file.get_slice(name)) for name in file.keys()}  # noqa: SIM118

    def names(self) -> tuple[str, ...]:
        return tuple(self._header)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._header[name][0]

    def dtype(self, name: str) -> torch.dtype:
        return self._header[name][1]

    def read(self, name: str) -> Tensor:
        with _opened(self._path) as file:
            return file.get_tensor(name)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        with _opened(self._path) as file:
            return file.get_slice(name)[start:stop]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise InputError(
            f"{path} cannot be read as safetensors ({error}); it may be cut short or damaged, "
            f"so compare its size with the original's and copy or download it again"
        ) from error


def _describe(entry: Any) -> tuple[tuple[int, ...], torch.dtype]:
    # Types that torch has no name for (packed 4- and 6-bit floats) are bytes to us, as other quantized weights are.
    return tuple(entry.get_shape()), _DTYPES.get(entry.get_dtype(), torch.uint8)
