"""Methods of adapting a model to a task: one `Method` record each, the source of help and errors.

To add a method, add a record (`register_method`). PEFT and the tuner are imported when a method prepares a model, since
`--help` reads the records.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from spectralbasis.errors import InputError
from spectralbasis.extras import listed_by_group
from spectralbasis.kinds import DEFAULT_COEFFICIENTS, KINDS

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import TrainerCallback

    from spectralbasis.linalg import Leading
    from spectralbasis.training.models import LoadedModel

_LARGEST = 1 << 20
"""Largest rank, number of frequencies or dimension: beyond the width of any model."""
DEFAULT_SCALING = "normalized"
CALIBRATION_EXAMPLES = 256
"""Training examples that sparse coefficients and a curvature basis are calibrated on, or all where there are fewer."""
CALIBRATION_BATCH = 32
ALSO = ("biases", "norms")
"""What `MethodOptions.also` may name."""
ALL_DIRECTIONS = 1 - 1e-9
"""As a fraction, which must be below 1: rounded, it is min(m, n) of every matrix."""


@dataclass(frozen=True)
class MethodOptions:
    """The options of all methods; each method reads those that it names and refuses the others.

    Args:
        coefficients: which numbers of C are trained; a name in `KINDS`.
        bandwidth: largest distance from the diagonal, for `band`.
        block_size: size of a block, for `block` and `rotation`.
        scaling: unit of the coefficients: `absolute`, `relative` or `normalized`.
        basis: `pretrained`, `random`, `minor`, `curvature`, or the path of a basis file.
        leading: directions in each matrix, or the rule that sets them; not together with `budget`.
        budget: share of the model's parameters to train.
        rank: rank or width of what is added to each matrix or layer, from 1; None takes the method's default.
        alpha: LoRA's scale; None takes twice the rank.
        n_frequency: numbers for each matrix, from 1 (FourierFT).
        dimension: numbers for each matrix (TinyLoRA), or in all (a random subspace), from 1.
        sources: folders of the adapters that AdapterFusion fuses.
        basis_seed: of a `random` basis.
        also: what is trained of the backbone besides the coefficients: "biases" of the adapted layers, "norms".

    Raises:
        InputError: `rank`, `n_frequency` or `dimension` is out of range, or `also` has another name.

    Examples:
        >>> MethodOptions(coefficients="core", budget=0.002).changed()
        ('coefficients', 'budget')
    """

    coefficients: str = DEFAULT_COEFFICIENTS
    bandwidth: int = 1
    block_size: int = 8
    scaling: str = DEFAULT_SCALING
    basis: str = "pretrained"
    leading: "Leading | None" = None
    budget: float | None = None
    rank: int | None = None
    alpha: float | None = None
    n_frequency: int | None = None
    dimension: int | None = None
    sources: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    basis_seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rank", "n_frequency", "dimension"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= _LARGEST:
                raise InputError(f"{name} must be a whole number from 1 to {_LARGEST}, got {value}")

        for name in self.also:
            if name not in ALSO:
                raise InputError(f"also={name!r} is unknown; choose from {', '.join(map(repr, ALSO))}")

    def changed(self) -> tuple[str, ...]:
        """Names of the options that differ from their defaults."""
        return tuple(field.name for field in fields(self) if getattr(self, field.name) != field.default)


@dataclass(frozen=True)
class Setup:
    """What a method prepares.

    Args:
        loaded: a model with its task.
        options: of the method, with its defaults filled in.
        folder: in which the adapter will be.
        steps: number of optimizer steps to come.
    """

    loaded: "LoadedModel"
    options: MethodOptions
    folder: Path
    steps: int = 1


@dataclass(frozen=True)
class Method:
    """One way to adapt.

    Args:
        name: what `tune` calls it.
        group: under which lists name it.
        prepare: makes the model whose trainable parameters are those of the method; it may write files that the
            adapter needs to the folder of its setup.
        default_rate: learning rate of what is trained in the backbone; None where nothing is.
        default_head_rate: learning rate of the head.
        options: names of the options that it reads.
        defaults: values of options that were left None.
        writes: "model" for a whole model, "adapter" for the folder of a PEFT adapter, "trained" for the trained
            parameters alone, for which `prepare` makes room again when they are read.
        callbacks: what training needs beside the optimizer, for a prepared model.

    Examples:
        >>> METHODS["lora"].learning_rates(None, None)
        (0.001, 0.006)
    """

    name: str
    group: str
    prepare: "Callable[[Setup], nn.Module]"
    default_rate: float | None
    default_head_rate: float = 6e-3
    options: frozenset[str] = frozenset()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    writes: Literal["model", "adapter", "trained"] = "adapter"
    callbacks: "Callable[[nn.Module], Sequence[TrainerCallback]]" = lambda model: ()

    def complete(self, options: MethodOptions) -> MethodOptions:
        """The options with this method's defaults for what was left None.

        Raises:
            InputError: an option was set that the method does not read.
        """
        for name in options.changed():
            if name not in self.options:
                raise InputError(
                    f"the option {name} does not apply to the method {self.name}; it belongs to {owners(name)}"
                )
        return replace(
            options, **{name: value for name, value in self.defaults.items() if getattr(options, name) is None}
        )

    def learning_rates(self, rate: float | None, head_rate: float | None) -> tuple[float, float]:
        """The learning rates of backbone and head: those given, else the defaults.

        Where the head alone is trained, `rate` is the head's too.
        """
        if self.default_rate is None:
            only = next((given for given in (head_rate, rate) if given is not None), self.default_head_rate)
            return only, only
        return (
            self.default_rate if rate is None else rate,
            self.default_head_rate if head_rate is None else head_rate,
        )


def train_head_and(setup: Setup, wanted: Callable[[str], bool]) -> "nn.Module":
    """The setup's model, of which only the head and the parameters of wanted names require a gradient."""
    from spectralbasis.tuner.calibration import in_modules

    model = setup.loaded.model
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(wanted(name) or in_modules(name, setup.loaded.head))
    return model


def full(setup: Setup) -> "nn.Module":
    """All parameters are trained."""
    return setup.loaded.model


def head(setup: Setup) -> "nn.Module":
    """The head alone is trained."""
    return train_head_and(setup, lambda name: False)


def bitfit(setup: Setup) -> "nn.Module":
    """The biases of all layers, layer norms among them, and the head (Ben Zaken et al., arXiv 2106.10199).

    Raises:
        InputError: the backbone has no bias.
    """
    from spectralbasis.tuner.calibration import in_modules

    loaded = setup.loaded
    biases = {name for name, _ in loaded.model.named_parameters() if name.rpartition(".")[2] == "bias"}
    if all(in_modules(name, loaded.head) for name in biases):
        raise InputError(
            f"{type(loaded.model).__name__} has no biases, which are all that bitfit trains; use lora or spectral"
        )
    return train_head_and(setup, biases.__contains__)


def subspace(setup: Setup) -> "nn.Module":
    """A random subspace of all linear weights of the backbone, and the head; see `subspace.add_random_subspace`."""
    from spectralbasis.training.subspace import add_random_subspace

    model = train_head_and(setup, lambda name: False)
    add_random_subspace(model, setup.loaded.head, setup.options.dimension or 1)
    return model


def everywhere(loaded: "LoadedModel") -> dict[str, Any]:
    """PEFT's settings for an adapter on every linear layer of the backbone, and a head trained and saved beside it."""
    task, kinds = loaded.task, {"causal_language": "CAUSAL_LM", "instructions": "CAUSAL_LM", "masked_language": None}
    return {
        "task_type": kinds.get(task.kind, "SEQ_CLS") if task.modality == "text" else None,
        "target_modules": "all-linear",
        "modules_to_save": list(loaded.head) or None,
    }


def with_peft(config_class: str, settings: Callable[[MethodOptions, int], dict[str, Any]]) -> Any:
    """How a method of PEFT is prepared.

    Args:
        config_class: of the method's config in PEFT.
        settings: of the config, from the options and the number of steps.
    """

    def prepare(setup: Setup) -> "nn.Module":
        import peft

        own = settings(setup.options, setup.steps)
        return peft.get_peft_model(setup.loaded.model, getattr(peft, config_class)(**own, **everywhere(setup.loaded)))

    return prepare


def _lora(options: MethodOptions, steps: int) -> dict[str, Any]:
    rank = options.rank or 1
    return {"r": rank, "lora_alpha": 2 * rank if options.alpha is None else options.alpha}


def _adalora(options: MethodOptions, steps: int) -> dict[str, Any]:
    own = _lora(options, steps)
    rank = own.pop("r")
    ranks = {"target_r": rank, "init_r": (3 * rank + 1) // 2}
    times = {"tinit": steps // 10, "tfinal": steps // 3, "deltaT": max(1, steps // 50), "total_step": steps}
    return {**own, **ranks, **times}


def _psoft(options: MethodOptions, steps: int) -> dict[str, Any]:
    loose = dict.fromkeys(("psoft_orth", "psoft_mag_a", "psoft_mag_b"), False)
    return {"r": options.rank, "psoft_alpha": options.rank, **loose}


def allocate_ranks(model: "nn.Module") -> "Sequence[TrainerCallback]":
    """AdaLoRA's part of a training step: it weighs the ranks, and masks those that do not fit the budget."""
    from transformers import TrainerCallback

    class AllocateRanks(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            model.base_model.update_and_allocate(state.global_step + 1)  # type: ignore[operator, union-attr]

    return (AllocateRanks(),)


def spectral(setup: Setup) -> "nn.Module":
    """Coefficients on frozen directions, sparse ones calibrated on the task; and what `also` names.

    A curvature basis is made from the task, and written to the folder of the setup.

    Raises:
        InputError: the model has nothing that `also` names, or the basis does not suit the coefficients.
    """
    from peft import get_peft_model

    from spectralbasis.tuner import SpectralConfig
    from spectralbasis.tuner.calibration import calibrate, curvature_basis, plan_ranks
    from spectralbasis.tuner.config import BASIS_FILE
    from spectralbasis.tuner.targets import targeted_modules

    loaded, options = setup.loaded, setup.options
    names = ("coefficients", "bandwidth", "block_size", "scaling", "leading", "budget", "basis_seed")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    given |= everywhere(loaded)
    if "norms" in options.also:
        given["modules_to_save"] = [*loaded.head, *norms_of(loaded)]
    if "biases" in options.also:
        _check_biases(SpectralConfig(**given), loaded)
        given["bias"] = "spectral_only"
    basis = options.basis
    if basis == "curvature":
        if KINDS[options.coefficients].singular:
            raise InputError(
                f"the coefficients {options.coefficients} turn singular vectors, which the basis curvature has none "
                "of; use the basis pretrained or minor, or the coefficients block"
            )
        config = SpectralConfig(**given)
        k, targets = max(plan_ranks(config, loaded.model).values()), list(targeted_modules(config, loaded.model))
        made = curvature_basis(loaded.model, calibration_batches(loaded), k, target_modules=targets)
        basis = str(made.save(setup.folder / BASIS_FILE))
    config = SpectralConfig(basis=basis, **given)
    if options.coefficients == "sparse":
        config = calibrate(loaded.model, calibration_batches(loaded), config)
    return get_peft_model(loaded.model, config)


def norms_of(loaded: "LoadedModel") -> list[str]:
    """The layer norms of the backbone, RMS norms among them: ends of their names, where no other module has these.

    Raises:
        InputError: there are none.
    """
    from spectralbasis.tuner.calibration import in_modules

    modules = dict(loaded.model.named_modules())
    norms = [
        name
        for name, module in modules.items()
        if "norm" in type(module).__name__.lower()
        and next(module.parameters(recurse=False), None) is not None
        and not in_modules(f"{name}.", loaded.head)
    ]
    if not norms:
        raise InputError(f"{type(loaded.model).__name__} has no layer norms to train; leave out also='norms'")
    ends = sorted({name.rpartition(".")[2] for name in norms})
    return ends if [name for name in modules if name.endswith(tuple(ends))] == norms else norms


def _check_biases(config: Any, loaded: "LoadedModel") -> None:
    """Raise InputError unless a layer that the config adapts has a bias."""
    from spectralbasis.tuner.targets import targeted_modules

    if all(getattr(module, "bias", None) is None for module in targeted_modules(config, loaded.model).values()):
        raise InputError(
            f"the adapted layers of {type(loaded.model).__name__} have no biases to train; leave out also='biases'"
        )


def svft(setup: Setup) -> "nn.Module":
    """SVFT (Lingam et al., arXiv 2405.19597): a diagonal, a band, or sparse entries over all singular directions.

    Raises:
        InputError: another pattern was asked for.
    """
    patterns = ("diagonal", "band", "sparse")
    if setup.options.coefficients not in patterns:
        raise InputError(f"svft has no coefficients {setup.options.coefficients!r}; choose from {', '.join(patterns)}")
    return spectral(replace(setup, options=replace(setup.options, leading=ALL_DIRECTIONS)))


def calibration_batches(loaded: "LoadedModel") -> "Iterator[dict[str, Tensor]]":
    """A fixed sample of the task's training examples, as the model's inputs."""
    from spectralbasis.training.tasks import batches

    examples = loaded.task.subsample(min(CALIBRATION_EXAMPLES, len(loaded.task.train)), seed=0).train
    return map(loaded.collator, batches(examples, CALIBRATION_BATCH))


def bottleneck(kind: str) -> "Callable[[Setup], nn.Module]":
    """How `houlsby` (arXiv 1902.00751) or `parallel` (He et al., arXiv 2110.04366) adapters are prepared."""

    def prepare(setup: Setup) -> "nn.Module":
        from spectralbasis.training.adapterhub import add_bottleneck

        add_bottleneck(setup.loaded.model, kind, setup.options.rank or 1)
        return _train_added(setup)

    return prepare


def adapterfusion(setup: Setup) -> "nn.Module":
    """Attention over adapters of other tasks; see `adapterhub.add_fusion`."""
    from spectralbasis.training.adapterhub import add_fusion

    add_fusion(setup.loaded.model, setup.options.sources, setup.folder)
    return _train_added(setup)


def _train_added(setup: Setup) -> "nn.Module":
    """The setup's model, of which what another package made trainable is trained, and the head."""
    added = {name for name, parameter in setup.loaded.model.named_parameters() if parameter.requires_grad}
    return train_head_and(setup, added.__contains__)


RANK = frozenset({"rank"})
LORA = frozenset({"rank", "alpha"})
DIRECTIONS = frozenset({"coefficients", "bandwidth", "scaling", "budget"})
PEFT, ADAPTERS = "PEFT", "extra baselines, with transformers 4.57"
# PiSSA's factors are the leading triplets themselves, so alpha = rank is the scale at which the model is its base.
_RECORDS = (
    Method("spectral", "spectral", spectral, 3e-2,
           options=DIRECTIONS | {"block_size", "basis", "basis_seed", "leading", "also"}),
    Method("svft", "spectral", svft, 3e-2, options=DIRECTIONS),
    Method("full", "parts of the model", full, 1e-4, 1e-3, writes="model"),
    Method("head", "parts of the model", head, None, 5e-2, writes="model"),
    Method("bitfit", "parts of the model", bitfit, 2e-3, writes="trained"),
    Method("subspace", "parts of the model", subspace, 1e-2, options=frozenset({"dimension"}),
           defaults={"dimension": 1000}, writes="trained"),
    Method("lora", PEFT, with_peft("LoraConfig", _lora), 1e-3, options=LORA, defaults={"rank": 8}),
    Method("dora", PEFT, with_peft("LoraConfig", lambda options, steps: {**_lora(options, steps), "use_dora": True}),
           1e-3, options=LORA, defaults={"rank": 8}),
    Method("pissa", PEFT, with_peft("LoraConfig", lambda options, _: {
        "r": options.rank, "lora_alpha": options.rank, "init_lora_weights": "pissa"}),
           5e-4, options=RANK, defaults={"rank": 8}),
    Method("adalora", PEFT, with_peft("AdaLoraConfig", _adalora), 5e-3, options=LORA, defaults={"rank": 8},
           callbacks=allocate_ranks),
    Method("vera", PEFT, with_peft("VeraConfig", lambda options, _: {"r": options.rank, "save_projection": False}),
           1e-2, options=RANK, defaults={"rank": 256}),
    Method("fourierft", PEFT, with_peft("FourierFTConfig", lambda options, _: {"n_frequency": options.n_frequency}),
           5e-2, options=frozenset({"n_frequency"}), defaults={"n_frequency": 1000}),
    Method("psoft", PEFT, with_peft("PsoftConfig", _psoft), 5e-3, options=RANK, defaults={"rank": 32}),
    Method("tinylora", PEFT, with_peft("TinyLoraConfig", lambda options, _: {
        "r": options.rank, "u": options.dimension, "save_projection": False}),
           1e-2, options=RANK | {"dimension"}, defaults={"rank": 2, "dimension": 64}),
    Method("houlsby", ADAPTERS, bottleneck("houlsby"), 1e-3, options=RANK, defaults={"rank": 8}, writes="trained"),
    Method("parallel", ADAPTERS, bottleneck("parallel"), 1e-3, options=RANK, defaults={"rank": 8}, writes="trained"),
    Method("adapterfusion", ADAPTERS, adapterfusion, 1e-4, options=frozenset({"sources"}), writes="trained"),
)  # fmt: skip
METHODS: dict[str, Method] = {method.name: method for method in _RECORDS}


def register_method(method: Method) -> None:
    """Make a method known by its name, to `tune` and its `--method`; a known name is replaced.

    Examples:
        >>> from spectralbasis.training.methods import find_method, head
        >>> register_method(Method("last layer", "mine", head, None, 1e-2, writes="model"))
        >>> find_method("last layer").group
        'mine'
    """
    METHODS[method.name] = method


def methods_in_words() -> str:
    """The names of all methods, by group."""
    return listed_by_group((method.group, method.name) for method in METHODS.values())


def owners(option: str) -> str:
    """The names of the methods that read an option."""
    return ", ".join(method.name for method in METHODS.values() if option in method.options)


def find_method(name: str) -> Method:
    """The method of this name.

    Raises:
        InputError: there is none.
    """
    if name not in METHODS:
        raise InputError(f"unknown method {name!r}; the known ones are {methods_in_words()}")
    return METHODS[name]
