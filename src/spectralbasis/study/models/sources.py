"""What the word for a model stands for: a folder, a hub id, or an installed extra."""

import pickle
import re
from pathlib import Path

from safetensors import SafetensorError

from spectralbasis.checkpoints.installed import installed_folder
from spectralbasis.errors import InputError
from spectralbasis.study.messages import first_line

UNREADABLE = (
    OSError,
    ValueError,
    TypeError,
    RuntimeError,
    EOFError,
    ImportError,  # transformers looks for a tokenizer that needs a package which may be absent
    SafetensorError,
    pickle.UnpicklingError,
)


def resolve_source(source: str | Path) -> str:
    """The folder or hub id that `source` means: a folder with config.json, a hub id, or `minilm` for the extra's model.

    Raises:
        InputError: it is none of these.
    """
    installed = installed_folder(str(source))
    if installed is not None:
        return str(installed)
    path = Path(source)
    if path.is_dir():
        if (path / "config.json").is_file():
            return str(path)
        if (path / "adapter_config.json").is_file():
            raise InputError(f"{path} is an adapter; give its base model first, and the adapter after it")
        raise InputError(f"{path} has no config.json; give a folder that transformers' save_pretrained wrote")
    if path.exists():
        raise InputError(f"{path} is a file; tuning needs a folder with config.json, the weights and the tokenizer")
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", str(source)):
        raise InputError(f"the model folder {source} does not exist; give a folder, a hub id, or minilm")
    return str(source)


def unreadable(place: str, what: str, error: BaseException) -> InputError:
    """The error for a model, tokenizer or adapter at `place` that raised one of `UNREADABLE` when it was loaded."""
    if Path(place).is_dir():
        return InputError(f"the {what} in {place} cannot be read: {first_line(error)}; save it again, or name another")
    return InputError(
        f"there is no folder {place}, and as a hub id its {what} cannot be loaded: {first_line(error)}; "
        "check the name and the connection"
    )
