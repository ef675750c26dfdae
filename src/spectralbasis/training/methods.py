"""Methods that add nothing to the model and train some of its own parameters: all, the head, or the biases.

A random subspace of all linear weights: how many dimensions does a task need?

Methods of PEFT that add updates of low rank, or of few numbers, to every linear layer.

Spectral coefficients, and SVFT, which is theirs over all directions.

Bottleneck adapters of AdapterHub's package `adapters`, and the fusion of several.

The package needs transformers 4.57, so these methods live in an environment of their own: the extra `baselines`.

The methods, by name.

Ways to adapt a model to a task: what each one trains, which options it has, and at which learning rates.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
import transformers
from peft import (
    AdaLoraConfig,
    FourierFTConfig,
    LoraConfig,
    PeftConfig,
    PsoftConfig,
    TinyLoraConfig,
    VeraConfig,
    get_peft_model,
)
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from spectralbasis.errors import InputError
from spectralbasis.training.method import Method, MethodOptions, Setup
from spectralbasis.training.models import LoadedModel
from spectralbasis.training.outcomes import TRAINED_FILE, TUNING_FILE, copy_tensors, read_tensors, stored
from spectralbasis.training.tasks import batches
from spectralbasis.tuner import SpectralConfig
from spectralbasis.tuner.calibration import calibrate, curvature_basis, in_modules, plan_ranks
from spectralbasis.tuner.config import BASIS_FILE
from spectralbasis.tuner.targets import targeted_modules


def full(setup: Setup) -> nn.Module:
    """Everything is trained."""
    return setup.loaded.model


def head(setup: Setup) -> nn.Module:
    """The head alone is trained."""
    return train_head_and(setup, lambda name: False)


def bitfit(setup: Setup) -> nn.Module:
    """The biases of all layers, layer norms among them, and the head (Ben Zaken et al., arXiv 2106.10199).

    Raises:
        InputError: the backbone has no bias.
    """
    loaded = setup.loaded
    names = [name for name, _ in loaded.model.named_parameters() if not in_modules(name, loaded.head)]
    if not any(_is_bias(name) for name in names):
        raise InputError(
            f"{type(loaded.model).__name__} has no biases, which are all that bitfit trains; use lora or spectral"
        )
    return train_head_and(setup, _is_bias)


def train_head_and(setup: Setup, wanted: Callable[[str], bool]) -> nn.Module:
    """The setup's model, of which only the head and the parameters of wanted names require a gradient."""
    model = setup.loaded.model
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(wanted(name) or in_modules(name, setup.loaded.head))
    return model


def _is_bias(name: str) -> bool:
    return name.rpartition(".")[2] == "bias"


SEED = 0


class Coordinates(nn.Module):
    """The trained vector z (d,), zero at first, which all matrices of a model share."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.z = nn.Parameter(torch.zeros(dimension))


class SubspaceUpdate(nn.Module):
    """Adds to a weight its part of `P z`.

    Every entry of the weights takes one coordinate of z, drawn at random, with a random sign: P has one entry in each
    row, its columns are orthogonal, and `scale` makes their norm 1 on average.
    """

    taken: Tensor

    def __init__(self, coordinates: Coordinates, shape: torch.Size, scale: float, draws: torch.Generator) -> None:
        super().__init__()
        self.coordinates = coordinates
        self.scale = scale
        d = len(coordinates.z)
        # Numbers from d on stand for the negative of a coordinate: one index of four bytes holds the sign too.
        taken = torch.randint(2 * d, (shape.numel(),), generator=draws, dtype=torch.int32)
        self.register_buffer("taken", taken.reshape(shape), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        z = self.scale * self.coordinates.z
        entries = torch.cat([z, -z]).index_select(0, self.taken.flatten())
        return weight + entries.view_as(weight)


def subspace(setup: Setup) -> nn.Module:
    """`θ = θ0 + P z` over all linear layers of the backbone, and a head that is trained in full.

    This is the subspace of intrinsic dimension (Li et al., arXiv 1804.08838), but P is a random sparse projection with
    one entry for each weight, of four bytes, where Aghajanyan et al. (arXiv 2012.13255) take the Fastfood transform.

    Raises:
        InputError: there are more dimensions than weights.
    """
    loaded, d = setup.loaded, setup.options.dimension or 1
    config = SpectralConfig(target_modules="all-linear", modules_to_save=list(loaded.head))
    targets = targeted_modules(config, loaded.model).items()
    layers = [layer for key, layer in targets if not in_modules(f"{key}.", loaded.head)]
    shapes = [cast(Tensor, layer.weight).shape for layer in layers]
    size = sum(shape.numel() for shape in shapes)
    if d > size:
        raise InputError(f"dimension={d} is more than the {size} weights of the linear layers; pass a smaller one")
    train_head_and(setup, lambda name: False)
    coordinates = Coordinates(d)
    draws = torch.Generator().manual_seed(SEED)
    for layer, shape in zip(layers, shapes, strict=True):
        update = SubspaceUpdate(coordinates, shape, (d / size) ** 0.5, draws)
        parametrize.register_parametrization(layer, "weight", update)
    return loaded.model


Prepare = Callable[[Setup], nn.Module]


def everywhere(loaded: LoadedModel) -> dict[str, Any]:
    """PEFT's settings for an adapter on every linear layer of the backbone, and a head trained and saved beside it."""
    classifies_text = loaded.task.modality == "text" and loaded.task.kind != "masked_language"
    return {
        "task_type": "SEQ_CLS" if classifies_text else None,
        "target_modules": "all-linear",
        "modules_to_save": list(loaded.head) or None,
    }


def peft_method(make_config: Callable[[MethodOptions, int, dict[str, Any]], PeftConfig]) -> Prepare:
    """How a method of PEFT is prepared; `make_config` takes the options, the steps, and the settings that all share."""

    def prepare(setup: Setup) -> nn.Module:
        config = make_config(setup.options, setup.steps, everywhere(setup.loaded))
        return get_peft_model(setup.loaded.model, config)

    return prepare


def _lora(options: MethodOptions, _: int, common: dict[str, Any], **settings: Any) -> PeftConfig:
    rank = options.rank or 1
    alpha = 2 * rank if options.alpha is None else options.alpha
    return LoraConfig(r=rank, lora_alpha=alpha, **settings, **common)


def _dora(options: MethodOptions, steps: int, common: dict[str, Any]) -> PeftConfig:
    return _lora(options, steps, common, use_dora=True)


def _pissa(options: MethodOptions, _: int, common: dict[str, Any]) -> PeftConfig:
    # PiSSA's factors are the leading triplets themselves, so alpha = rank is the scale at which the model is its base.
    return LoraConfig(r=options.rank, lora_alpha=options.rank, init_lora_weights="pissa", **common)


def _adalora(options: MethodOptions, steps: int, common: dict[str, Any]) -> PeftConfig:
    rank = options.rank or 1
    return AdaLoraConfig(
        target_r=rank,
        init_r=(3 * rank + 1) // 2,
        lora_alpha=2 * rank if options.alpha is None else options.alpha,
        tinit=steps // 10,
        tfinal=steps // 3,
        deltaT=max(1, steps // 50),
        total_step=steps,
        **common,
    )


def _vera(options: MethodOptions, _: int, common: dict[str, Any]) -> PeftConfig:
    return VeraConfig(r=options.rank, save_projection=False, **common)


def _fourierft(options: MethodOptions, _: int, common: dict[str, Any]) -> PeftConfig:
    return FourierFTConfig(n_frequency=options.n_frequency, **common)


def _psoft(options: MethodOptions, _: int, common: dict[str, Any]) -> PeftConfig:
    return PsoftConfig(
        r=options.rank,
        psoft_alpha=options.rank,
        psoft_orth=False,
        psoft_mag_a=False,
        psoft_mag_b=False,
        **common,
    )


def _tinylora(options: MethodOptions, _: int, common: dict[str, Any]) -> PeftConfig:
    return TinyLoraConfig(r=options.rank, u=options.dimension, save_projection=False, **common)


lora = peft_method(_lora)
dora = peft_method(_dora)
pissa = peft_method(_pissa)
adalora = peft_method(_adalora)
vera = peft_method(_vera)
fourierft = peft_method(_fourierft)
psoft = peft_method(_psoft)
tinylora = peft_method(_tinylora)


class AllocateRanks(TrainerCallback):
    """AdaLoRA's part of a training step: it weighs the ranks, and masks those that do not fit the budget."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.model.base_model.update_and_allocate(state.global_step + 1)  # type: ignore[operator, union-attr]


def allocate_ranks(model: nn.Module) -> Sequence[TrainerCallback]:
    """The callbacks of AdaLoRA."""
    return (AllocateRanks(model),)


CALIBRATION_EXAMPLES = 256
"""Training examples that sparse coefficients and a curvature basis are calibrated on, or all where there are fewer."""
CALIBRATION_BATCH = 32
ALL_DIRECTIONS = 1 - 1e-9
"""As a fraction, which must be below 1: rounded, it is min(m, n) of every matrix."""
SPECTRAL_RATE = 3e-2
"""The default learning rate of coefficients, meant in the default unit."""
SVFT_PATTERNS = ("diagonal", "band", "sparse")


def spectral(setup: Setup) -> nn.Module:
    """Coefficients on frozen directions, sparse ones calibrated on the task; a curvature basis lies in the folder."""
    loaded, options = setup.loaded, setup.options
    names = ("coefficients", "bandwidth", "scaling", "leading", "budget")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    basis = options.basis
    if basis == "curvature":
        basis = str(_curvature(loaded, SpectralConfig(**given, **everywhere(loaded)), setup.folder))
    config = SpectralConfig(basis=basis, **given, **everywhere(loaded))
    if options.coefficients == "sparse":
        config = calibrate(loaded.model, calibration_batches(loaded), config)
    return get_peft_model(loaded.model, config)


def svft(setup: Setup) -> nn.Module:
    """SVFT (Lingam et al., arXiv 2405.19597): a diagonal, a band, or sparse entries over all singular directions.

    Raises:
        InputError: another pattern was asked for.
    """
    if setup.options.coefficients not in SVFT_PATTERNS:
        raise InputError(
            f"svft has no coefficients {setup.options.coefficients!r}; choose from {', '.join(SVFT_PATTERNS)}"
        )
    return spectral(replace(setup, options=replace(setup.options, leading=ALL_DIRECTIONS)))


def calibration_batches(loaded: LoadedModel) -> Iterator[dict[str, Tensor]]:
    """A fixed sample of the task's training examples, with the head as it is."""
    examples = loaded.task.subsample(min(CALIBRATION_EXAMPLES, len(loaded.task.train)), seed=0).train
    return map(loaded.collator, batches(examples, CALIBRATION_BATCH))


def _curvature(loaded: LoadedModel, config: SpectralConfig, folder: Path) -> Path:
    """The file of a basis of as many directions as the config asks for."""
    k = max(plan_ranks(config, loaded.model).values())
    targets = list(targeted_modules(config, loaded.model))
    basis = curvature_basis(loaded.model, calibration_batches(loaded), k, target_modules=targets)
    return basis.save(folder / BASIS_FILE)


NAME = "task"
CONFIGS = {"houlsby": "DoubleSeqBnConfig", "parallel": "ParBnConfig"}


def bottleneck(kind: str) -> Callable[[Setup], nn.Module]:
    """How `houlsby` (arXiv 1902.00751) or `parallel` (He et al., arXiv 2110.04366) adapters are prepared."""

    def prepare(setup: Setup) -> nn.Module:
        hub = _hub(kind)
        model = _with_room(hub, setup)
        model.add_adapter(NAME, config=_config(hub, kind, setup.options.rank or 1, model))
        model.train_adapter(NAME)
        return _train_added(setup)

    return prepare


def adapterfusion(setup: Setup) -> nn.Module:
    """Attention over the adapters of other tasks, which stay as they are (Pfeiffer et al., arXiv 2005.00247).

    The sources are folders that `tune` wrote with `houlsby` or `parallel` on the same model; what is needed of them is
    copied into the folder of the setup.

    Raises:
        InputError: fewer than two sources, or one that is no such folder or does not fit.
    """
    hub = _hub("adapterfusion")
    model = _with_room(hub, setup)
    folders = _sources(setup)
    names = [f"source{number}" for number in range(len(folders))]
    for name, folder in zip(names, folders, strict=True):
        _add_source(hub, model, name, folder)
    fusion = hub.composition.Fuse(*names)
    model.add_adapter_fusion(fusion)
    model.train_adapter_fusion(fusion)
    return _train_added(setup)


def _hub(method: str) -> ModuleType:
    try:
        return import_module("adapters")
    except ImportError as error:
        raise InputError(
            f"the method {method} needs AdapterHub's package adapters, which cannot be imported here: it works with "
            f"transformers 4.57 alone, and this is transformers {transformers.__version__}; install it in a virtual "
            "environment of its own, with: pip install 'spectralbasis[baselines]'"
        ) from error


def _with_room(hub: ModuleType, setup: Setup) -> Any:
    """The model, in which the package has found the places for adapters."""
    model = setup.loaded.model
    try:
        hub.init(model)
    except (ValueError, AttributeError, KeyError) as error:
        raise InputError(
            f"the package adapters does not know {type(model).__name__}; use a method such as lora or spectral"
        ) from error
    return model


def _config(hub: ModuleType, kind: str, width: int, model: Any) -> Any:
    return getattr(hub, CONFIGS[kind])(reduction_factor=model.config.hidden_size / width)


def _train_added(setup: Setup) -> nn.Module:
    """What the package made trainable, and the head."""
    added = {name for name, parameter in setup.loaded.model.named_parameters() if parameter.requires_grad}
    return train_head_and(setup, added.__contains__)


def _sources(setup: Setup) -> list[Path]:
    """The folders of the source adapters: those copied beside the fusion, else copies of those that were named."""
    folders = sorted(setup.folder.glob("source-*"))
    if folders:
        return folders
    if len(setup.options.sources) < 2:
        raise InputError(
            f"adapterfusion fuses two adapters or more, and got {len(setup.options.sources)}; "
            "pass the folders that tune wrote with the method houlsby or parallel as its sources"
        )
    for number, source in enumerate(setup.options.sources):
        copy = setup.folder / f"source-{number:03d}"
        copy.mkdir(parents=True)
        for name in (TUNING_FILE, TRAINED_FILE):
            if not (Path(source) / name).is_file():
                raise InputError(f"{source} has no {name}; pass a folder that tune wrote with houlsby or parallel")
            shutil.copyfile(Path(source) / name, copy / name)
        folders.append(copy)
    return folders


def _add_source(hub: ModuleType, model: Any, name: str, folder: Path) -> None:
    """Add the adapter of a folder under a name of its own, frozen."""
    made = stored(folder)
    kind, width = made.get("method"), made.get("settings", {}).get("rank")
    if kind not in CONFIGS or not isinstance(width, int):
        raise InputError(f"{folder} was tuned with {kind}; adapterfusion takes {' or '.join(CONFIGS)}")
    model.add_adapter(name, config=_config(hub, kind, width, model))
    room = {entry: parameter for entry, parameter in model.named_parameters() if f".{name}." in entry}
    weights = {entry.replace(f".{NAME}.", f".{name}."): tensor for entry, tensor in read_tensors(folder).items()}
    copy_tensors(room, weights, folder)


SPECTRAL = frozenset({"coefficients", "bandwidth", "scaling", "basis", "leading", "budget"})
SVFT = frozenset({"coefficients", "bandwidth", "scaling", "budget"})
RANK = frozenset({"rank"})
LORA = frozenset({"rank", "alpha"})
FOURIER = frozenset({"n_frequency"})
TINY = frozenset({"rank", "dimension"})
SUBSPACE = frozenset({"dimension"})
FUSED = frozenset({"sources"})

METHODS = {
    method.name: method
    for method in (
        Method("spectral", spectral, SPECTRAL_RATE, 6e-3, SPECTRAL),
        Method("full", full, 1e-4, 1e-3, writes="model"),
        Method("head", head, None, 5e-2, writes="model"),
        Method("lora", lora, 1e-3, 6e-3, LORA, {"rank": 8}),
        Method("bitfit", bitfit, 2e-3, 6e-3, writes="trained"),
        Method("dora", dora, 1e-3, 6e-3, LORA, {"rank": 8}),
        Method("pissa", pissa, 5e-4, 6e-3, RANK, {"rank": 8}),
        Method("adalora", adalora, 5e-3, 6e-3, LORA, {"rank": 8}, callbacks=allocate_ranks),
        Method("vera", vera, 1e-2, 6e-3, RANK, {"rank": 256}),
        Method("fourierft", fourierft, 5e-2, 6e-3, FOURIER, {"n_frequency": 1000}),
        Method("psoft", psoft, 5e-3, 6e-3, RANK, {"rank": 32}),
        Method("tinylora", tinylora, 1e-2, 6e-3, TINY, {"rank": 2, "dimension": 64}),
        Method("houlsby", bottleneck("houlsby"), 1e-3, 6e-3, RANK, {"rank": 8}, "trained"),
        Method("parallel", bottleneck("parallel"), 1e-3, 6e-3, RANK, {"rank": 8}, "trained"),
        Method("adapterfusion", adapterfusion, 1e-4, 6e-3, FUSED, writes="trained"),
        Method("svft", svft, SPECTRAL_RATE, 6e-3, SVFT),
        Method("subspace", subspace, 1e-2, 6e-3, SUBSPACE, {"dimension": 1000}, "trained"),
    )
}


def find_method(name: str) -> Method:
    """The method of this name.

    Raises:
        InputError: there is none.
    """
    if name not in METHODS:
        raise InputError(f"unknown method {name!r}; the known ones are {', '.join(METHODS)}")
    return METHODS[name]


def check_options(method: Method, options: MethodOptions) -> None:
    """Refuse options that a method would ignore.

    Raises:
        InputError: one of them was set.
    """
    for name in options.changed():
        if name not in method.options:
            owners = ", ".join(owner.name for owner in METHODS.values() if name in owner.options)
            raise InputError(f"the option {name} means nothing to the method {method.name}; it belongs to {owners}")
