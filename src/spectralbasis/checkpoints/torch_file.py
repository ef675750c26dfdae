"""One file written by `torch.save`: never run, only read.

Such a file is a zip archive whose records torch maps into memory as they lie there. `check_archive` makes sure, before
torch sees it, that this is what reading it record by record would give; `_check_storages` that no tensor claims more
than its record holds.
"""

import argparse
import io
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

from spectralbasis.checkpoints.archive import SIGNATURE, check_archive
from spectralbasis.checkpoints.tensors import TensorCheckpoint, find_state
from spectralbasis.errors import InputError
from spectralbasis.printable import shortened


def open_torch_file(path: Path, source: str, config: Mapping[str, Any]) -> TensorCheckpoint:
    """Open a `.pt`, `.pth` or `.bin` file, mapped into memory where its format allows.

    Raises:
        InputError: the file is no torch checkpoint, is damaged, or holds objects other than weights.
    """
    return TensorCheckpoint(find_state(_load(path), source), source, config)


def _load(path: Path) -> object:
    try:
        with path.open("rb") as file:
            sizes = check_archive(file, path) if file.read(len(SIGNATURE)) == SIGNATURE else None
        # Training scripts save their arguments beside the weights: a Namespace holds values and runs nothing.
        with (
            warnings.catch_warnings(),
            torch.serialization.safe_globals([argparse.Namespace]),
            torch.sparse.check_sparse_tensor_invariants(),
        ):
            warnings.simplefilter("ignore", UserWarning)
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=sizes is not None)
            if sizes is not None:
                _check_storages(path, sizes)
            return loaded
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error):
            raise InputError(_refusal(path, str(error))) from error
        raise InputError(_not_torch(path)) from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged pickle can fail in any way, with KeyError and IndexError among them
        raise InputError(_not_torch(path)) from error


def _check_storages(path: Path, sizes: Mapping[str, int]) -> None:
    """Raise InputError if a tensor's storage claims more bytes than its record holds. Torch has accepted the file."""
    with zipfile.ZipFile(path) as archive:
        folder = archive.namelist()[0].partition("/")[0]
        reader = _StorageReader(io.BytesIO(archive.read(f"{folder}/data.pkl")))
    reader.load()
    for key, claimed in reader.claims:
        held = sizes.get(f"data/{key}", -1)
        if not 0 <= claimed <= held:
            raise InputError(
                f"{path} is damaged: a tensor claims {claimed} bytes of the record data/{shortened(key, 40)}, which "
                f"holds {max(held, 0)}; copy or download it again"
            )


class _StorageReader(pickle._Unpickler):
    """Reads which record each storage is from and how large it claims to be; imports, makes and runs nothing.

    It is the one in Python, as torch's is: the one in C allocates whatever number a pickle gives to a memo.

    Attributes:
        claims: key of the record, and bytes, of each storage.
    """

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="utf-8")
        self.claims: list[tuple[str, int]] = []

    def find_class(self, module: str, name: str) -> type:
        return type(name, (_Inert,), {})

    def persistent_load(self, pid: Sequence[Any]) -> "_Inert":
        _, kind, key, _, count = pid
        dtype = getattr(getattr(torch, kind.__name__, None), "dtype", torch.uint8)
        self.claims.append((str(key), count * dtype.itemsize))
        return _Inert()


class _Inert:
    """Stands for any object of a pickle, and does nothing with what the pickle puts into it."""

    def __new__(cls, *_: object, **__: object) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...

    def __setitem__(self, key: object, value: object) -> None: ...

    def __iter__(self) -> Iterator[object]:
        return iter(())

    def append(self, value: object) -> None: ...

    def add(self, value: object) -> None: ...


def _refusal(path: Path, message: str) -> str:
    name = message.partition("GLOBAL ")[2].split(" ")[0].rstrip(".,")
    return (
        f"{path} is refused: besides tensors it holds {name or 'a Python object'}, and unpickling that could run code. "
        f"If you trust where it comes from, load it yourself in a sandbox and write its state_dict with "
        f"safetensors.torch.save_file, then open that file"
    )


def _not_torch(path: Path) -> str:
    return (
        f"{path} is no readable torch checkpoint: it is damaged, cut short or of another format; "
        f"expected a state_dict written by torch.save"
    )
