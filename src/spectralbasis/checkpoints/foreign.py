"""Kinds of files, folders and states that cannot be read as a model: how to recognise each, and what to do.

`KINDS` is the only table. Each record has the name of a kind, the advice for the user, and the bytes, names or tensors
that identify it. To add a kind, add a record.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from spectralbasis.checkpoints.checkpoint import Checkpoint
from spectralbasis.checkpoints.torch_file import record_names
from spectralbasis.errors import InputError

State = Callable[[Checkpoint, Sequence[str]], str | None]
"""What in a checkpoint's tensors shows that it is of a kind; None where nothing does.

Of names that differ in the numbers of layers and experts alone, the second argument has the first.
"""
_START = 512
SAFETENSORS_START = re.compile(rb"....\0\0\0\0\{", re.DOTALL)
"""The length of a header that is below 4 GB, and the header: a file of safetensors, whatever its suffix."""
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_TENSORS = ("*.safetensors", "*.safetensors.index*.json", "*.bin", "*.bin.index.json", "adapter_config.json")


@dataclass(frozen=True)
class Foreign:
    """A kind of thing that is not read.

    Attributes:
        called: completes "… is", and ends before what to do.
        remedy: what to do; `{folder}` is the folder that holds the recognised file, `{name}` that file's name,
            `{parts}` the subfolders with weights, `{last}` the last of the folder's `checkpoint-*`.
        start: regular expression of a file's first bytes.
        members: globs; a zip file that holds a member of such a name is of this kind.
        files: globs of a file's name.
        beside: globs; a file known by its name is of this kind only if its folder holds such a file.
        marks: globs; a folder that holds such an entry is of this kind, unless one file of weights stands for it.
        holds: globs; a folder that holds such an entry, and no file of weights, is of this kind.
        state: looks at the tensors of what was opened.
    """

    called: str
    remedy: str
    start: bytes = b""
    members: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()
    holds: tuple[str, ...] = ()
    state: State | None = None

    def starts(self, start: bytes) -> bool:
        return bool(self.start) and re.match(self.start, start, re.DOTALL) is not None

    def has_member(self, members: Sequence[str]) -> bool:
        return any(fnmatch(name, glob) for glob in self.members for name in members)

    def names(self, file: str) -> bool:
        return any(fnmatch(file.lower(), glob) for glob in self.files)

    def fits_beside(self, folder: Path) -> bool:
        return not self.beside or any(next(folder.glob(glob), None) is not None for glob in self.beside)


def refuse_file(path: Path, by_name: bool = True) -> None:
    """Raise InputError if a file is of a kind that is not read, by its content or, second, by its name.

    Args:
        path: an existing file.
        by_name: whether the name counts too.
    """
    with path.open("rb") as file:
        start = file.read(_START)
    if SAFETENSORS_START.match(start):  # the length of its header may begin as other formats do
        return
    members = record_names(path) if start.startswith(b"PK") else []
    found = next((kind for kind in KINDS if kind.starts(start) or kind.has_member(members)), None)
    if found is None and by_name:
        found = next((kind for kind in KINDS if kind.names(path.name) and kind.fits_beside(path.parent)), None)
    if found is not None:
        raise InputError(f"{path} is {found.called}; {_remedy(found, path.parent, path.name)}")


def recognise_folder(folder: Path, without_weights: bool) -> str | None:
    """What a folder is for which no one file of weights stands, and what to do; None where that is not known.

    Args:
        folder: an existing folder.
        without_weights: whether it holds no file of weights, rather than several.
    """
    for kind in KINDS:
        for glob in (*kind.marks, *(kind.holds if without_weights else ())):
            mark = next(iter(sorted(folder.glob(glob))), None)
            if mark is not None:
                return f"{folder} is {kind.called}; {_remedy(kind, mark.parent, mark.name)}"
    return None


def recognise_names(folder: Path, names: Iterable[str]) -> str | None:
    """What the files of a folder without weights are, by their names, and what to do; None where that is not known."""
    names = sorted(names)
    for kind in KINDS:
        name = next((name for name in names if kind.names(name)), None)
        if name is not None:
            return f"{name} is {kind.called}; {_remedy(kind, folder, name)}"
    return None


def refuse_state(checkpoint: Checkpoint) -> None:
    """Raise InputError if the tensors are not a model's weights in full: factors of an adapter, pieces of a shard."""
    names: dict[str, str] = {}
    for name in checkpoint.names():
        names.setdefault(_NUMBER.sub("", name), name)
    for kind in KINDS:
        evidence = kind.state(checkpoint, list(names.values())) if kind.state else None
        if evidence is not None:
            raise InputError(f"{checkpoint.source} is {kind.called} ({evidence}); {kind.remedy}")


def _remedy(kind: Foreign, folder: Path, name: str) -> str:
    """The remedy with what it names filled in; folders are looked through only where it names them."""
    known = {"folder": str(folder), "name": name, "parts": "", "last": ""}
    if "{parts}" in kind.remedy:
        parts = {path.parent for glob in _TENSORS for path in folder.glob(f"*/{glob}")}
        known["parts"] = ", ".join(map(str, sorted(parts, key=_numbers))) or "they are subfolders"
    if "{last}" in kind.remedy:
        known["last"] = str(max(folder.glob("checkpoint-*"), key=_numbers))
    return kind.remedy.format_map(known)


def _numbers(path: Path) -> list[tuple[int, str]]:
    """Sorts `checkpoint-1000` after `checkpoint-500`."""
    return [(int(piece or -1), text) for text, piece in re.findall(r"([^0-9]+)([0-9]*)", f"/{path.name}")]


def _named(pattern: str) -> State:
    """Recognises a tensor by a regular expression that is found in its name."""
    compiled = re.compile(pattern)

    def find(checkpoint: Checkpoint, names: Sequence[str]) -> str | None:
        return next((f"it holds {name}" for name in names if compiled.search(name)), None)

    return find


# PEFT wraps a layer X: its own weights become X.base_layer.weight, and the method's parameters lie beside base_layer,
# whatever the method calls them. A base_layer of several layers (DLA's base_layer.0.weight) is a part of a model.
_WRAPPED = re.compile(r"(.+)\.base_layer\.((_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)*[A-Za-z_]\w*")
_REPLACED = re.compile(r"(^|\.)(modules_to_save|trainable_tokens_(delta|original))\.")


def _unmerged(checkpoint: Checkpoint, names: Sequence[str]) -> str | None:
    stored = checkpoint.names() if any(".base_layer." in name for name in names) else ()
    wrapped = {match[1] for name in stored if (match := _WRAPPED.fullmatch(name))}
    for name in stored if wrapped else ():
        pieces = name.split(".")
        for end in range(1, len(pieces)):
            layer = ".".join(pieces[:end])
            if layer in wrapped and pieces[end] != "base_layer":
                return f"it holds {name} beside {layer}.base_layer"
    return next((f"it holds {name}" for name in names if _REPLACED.search(name)), None)


def _empty(checkpoint: Checkpoint, names: Sequence[str]) -> str | None:
    weights = (name for name in checkpoint.names() if name.rpartition(".")[2] == "weight")
    return next((f"{name} has the shape (0,)" for name in weights if checkpoint.shape(name) == (0,)), None)


# Names that no model has, and the prefixes of PEFT's methods, which some model may have: these count in PEFT's frame.
_FACTORS = (
    r"(^|\.)(lora_[ABEab]|lora_embedding_[AB]|lora_magnitude_vector|ia3_l|hada_w[12]_[ab]|lokr_w[12](_[ab])?|lokr_t2|"
    r"oft_[rR]|boft_[RS]|vera_lambda_[bd]|fourierft_spectrum|adaption_(prompt|gate)|spectral_coefficients)(\.|$)"
    r"|^prompt_encoder\.default\.|^prompt_embeddings$"
    r"|(^|\.)base_model\.model\..*\.(adamss|beft|boft|c3a|deft|delora|fourierft|frod|glora|gralora|hira|hra|lily|"
    r"ln_tuning|lokr|lora|miss|oft|osf|peanut|poly|psoft|pvera|randlora|road|shira|spectral|supertuning|tinylora|"
    r"unilora|vblora|vera|waveft)_\w+"
)
_INTO_PIPELINE = (
    "load it into its pipeline (pipe.load_lora_weights, pipe.fuse_lora, pipe.unload_lora_weights), save the part that "
    "it changes (pipe.unet.save_pretrained(OUT), or pipe.transformer's) and pass OUT"
)
_GATHER = "gather it into one state_dict with full tensors, save that and pass the file"
_LOAD_AND_SAVE = "load it with the library that wrote it, and pass a mapping of names to torch tensors"

KINDS: tuple[Foreign, ...] = (
    # Not the file that it seems to be.
    Foreign(
        "a pointer of git-lfs and not the file itself",
        "fetch the file (git lfs pull in {folder}) and try again",
        start=rb"version https://git-lfs",
    ),
    Foreign(
        "a web page or a server's error message, saved under the name of a checkpoint",
        "download the file itself, with your access token if the model is gated",
        start=rb"\s*(<!doctype|<!DOCTYPE|<html|<HTML|<\?xml|\{\s*\"error\"|Entry not found|Repository not found|"
        rb"Invalid username or password|Access to model)",
    ),
    Foreign("an empty file (0 bytes)", "download or copy it again", start=rb"\Z"),
    Foreign(
        "a download that did not finish",
        "download it again",
        files=("*.incomplete", "*.part", "*.crdownload", "*.aria2"),
        holds=("*.incomplete", ".cache/huggingface/download/*.incomplete"),
    ),
    # Other libraries' formats.
    Foreign(
        "a GGML file, which llama.cpp wrote before it had GGUF and which is not read",
        "pass the safetensors that it was made from, or a GGUF file of the same model",
        start=rb"lmgg|tjgg|fmgg",
        files=("*.ggml",),
    ),
    Foreign(
        "a file of Keras or HDF5, which is not read",
        "convert it with transformers 4 (AutoModel.from_pretrained('{folder}', from_tf=True).save_pretrained(OUT)) "
        "and pass OUT, or load it yourself and pass a mapping of names to torch tensors",
        start=rb"\x89HDF",
        members=("model.weights.h5",),
        files=("*.h5", "*.hdf5", "*.keras"),
    ),
    Foreign(
        "a part of a TensorFlow checkpoint or SavedModel, which is not read",
        "convert it with transformers 4 (AutoModel.from_pretrained(FOLDER, from_tf=True).save_pretrained(OUT)) and "
        "pass OUT, or load it with TensorFlow and pass a mapping of names to torch tensors",
        files=("*.ckpt.index", "*.ckpt.meta", "*.ckpt-*.index", "*.data-?????-of-?????", "saved_model.pb", "*.pb"),
    ),
    Foreign(
        "a file of Flax (msgpack), which is not read",
        "convert it with transformers 4 (AutoModel.from_pretrained('{folder}', from_flax=True).save_pretrained(OUT)) "
        "and pass OUT",
        start=rb"([\x81-\x8f]|\xde..)[\xa3-\xbf][ -~]{3}",
        files=("*.msgpack",),
    ),
    Foreign(
        "an Orbax checkpoint of JAX, which is not read",
        _LOAD_AND_SAVE,
        files=("manifest.ocdbt",),
        holds=("manifest.ocdbt", "*/manifest.ocdbt"),
    ),
    Foreign(
        "an ONNX graph, which is not read",
        "pass the model that it was exported from",
        start=rb"\x08[\x01-\x20]\x12[\x01-\x7f][ -~]{3}",
        files=("*.onnx", "*.onnx_data", "*.onnx.data"),
        holds=("onnx/*.onnx",),
    ),
    Foreign(
        "a model of OpenVINO, TensorFlow Lite or Core ML, which is not read",
        "pass the model that it was converted from",
        start=rb"....TFL3",
        files=("openvino_*.bin", "openvino_*.xml", "*.tflite", "*.mlmodel"),
        holds=("*.mlpackage",),
    ),
    Foreign(
        "a NumPy file (.npy, .npz, as MLX writes it too), which is not read",
        "load it with numpy.load and pass a mapping of names to torch tensors",
        start=rb"\x93NUMPY",
        members=("*.npy",),
        files=("*.npz", "*.npy"),
    ),
    Foreign("a file of Paddle, which is not read", _LOAD_AND_SAVE, files=("*.pdparams", "*.pdiparams")),
    # Torch's other formats.
    Foreign(
        "a TorchScript archive, which holds code beside the weights and is not read",
        "if you trust where it comes from, load it with torch.jit.load, save its state_dict() with "
        "safetensors.torch.save_file and pass that file",
        members=("*/constants.pkl",),
    ),
    Foreign(
        "a program exported by torch.export, which is not read",
        "if you trust where it comes from, load it with torch.export.load, save its state_dict with "
        "safetensors.torch.save_file and pass that file",
        members=("*archive_format", "*serialized_exported_program.json"),
    ),
    Foreign(
        "a distributed checkpoint of torch (DCP, as FSDP and Megatron save it), whose tensors are in pieces",
        "write it as one file (python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} OUT.pt) "
        "and pass OUT.pt",
        files=("*.distcp", ".metadata"),
        marks=("*.distcp", "*/*.distcp"),
    ),
    Foreign(
        "a checkpoint of DeepSpeed's ZeRO, whose tensors are in pieces",
        "run the zero_to_fp32.py that DeepSpeed wrote into the checkpoint's folder (python zero_to_fp32.py . OUT) and "
        "pass OUT",
        files=("*zero_pp_rank_*", "*_optim_states.pt"),
        marks=("zero_to_fp32.py", "*zero_pp_rank_*", "global_step*/*_states.pt"),
    ),
    Foreign(
        "one slice of a model that is split over several devices (tensor parallel)",
        "convert the checkpoint to one of transformers with the tools of the library that wrote it, and pass that "
        "folder",
        files=("mp_rank_*_model_states.pt", "consolidated.??.pth"),
        beside=("mp_rank_01_*", "consolidated.01.pth"),
    ),
    Foreign(
        "a checkpoint whose tensors are split over several devices (Megatron, or Meta's Llama)",
        "convert it to one of transformers with the tools of the library that wrote it, and pass that folder",
        marks=("consolidated.01.pth", "mp_rank_01_*", "mp_rank_*/*.pt", "iter_*/mp_rank_*"),
    ),
    Foreign(
        "a state of FSDP with flattened parameters, or one rank's part of it",
        f"{_GATHER} (StateDictType.FULL_STATE_DICT)",
        state=_named(r"(^|\.)_?flat_param(_\d+)?$"),
    ),
    Foreign(
        "a state without its values, as DeepSpeed's ZeRO-3 leaves it on one rank",
        "run the zero_to_fp32.py in the checkpoint's folder, or set stage3_gather_16bit_weights_on_model_save and save "
        "again, and pass the result",
        state=_empty,
    ),
    # Archives.
    Foreign(
        "an archive",
        "unpack it and pass the folder or the file of weights in it",
        start=rb"\x1f\x8b|BZh[1-9]|\xfd7zXZ|7z\xbc\xaf|\x28\xb5\x2f\xfd|Rar!|.{257}ustar[\0 ]",
        members=("*.safetensors", "*pytorch_model*.bin", "*config.json", "*.gguf"),
    ),
    # Folders of several models.
    Foreign(
        "a pipeline of diffusers, which is several models",
        "pass the folder of one of them ({parts})",
        marks=("model_index.json",),
    ),
    Foreign(
        "a model of sentence-transformers, whose weights are in a subfolder",
        "pass the folder of its transformer ({parts})",
        holds=("modules.json",),
    ),
    Foreign(
        "the output folder of a Trainer, which holds checkpoints and no final model",
        "pass its last checkpoint, {last}, or the one that you mean",
        holds=("checkpoint-[0-9]*",),
    ),
    # Adapters.
    Foreign(
        "a LoRA file of a diffusion model with kohya's names",
        _INTO_PIPELINE,
        state=_named(r"^lora_(unet|te\d?|transformer|prior)_|\.lora_(down|up)\.weight$|\.(oft_blocks|oft_diag)$"),
    ),
    Foreign(
        "a LoRA file of a diffusion model with the names of diffusers or ComfyUI",
        _INTO_PIPELINE,
        files=("pytorch_lora_weights.*",),
        state=_named(
            r"[._]lora(_linear_layer)?\.(down|up)\.weight$"
            r"|^(unet|text_encoder(_\d)?|diffusion_model|transformer\.(single_)?transformer_blocks)\..*\.lora_[ABab]\."
        ),
    ),
    Foreign(
        "a PEFT model whose adapter was not merged, so that its weights are in two parts",
        "pass model.merge_and_unload(), or save the adapter with model.save_pretrained(FOLDER) and pass FOLDER",
        state=_unmerged,
    ),
    Foreign(
        "an adapter's tensors without the adapter_config.json that says how they change the base",
        "save the adapter with model.save_pretrained(FOLDER), which writes that file beside them, and pass FOLDER, or "
        "pass model.merge_and_unload()",
        files=("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt"),
        state=_named(_FACTORS),
    ),
)
