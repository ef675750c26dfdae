"""The PEFT tuner: adds spectral coefficients to a model, loads their numbers, and adds adapters."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _ExcludedModule
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from spectralbasis.checkpoints import matrix_name
from spectralbasis.checkpoints.names import conversions_of, same_names
from spectralbasis.errors import InputError
from spectralbasis.kinds import KINDS
from spectralbasis.records import excludes
from spectralbasis.tuner.config import MatrixRecord, SpectralConfig
from spectralbasis.tuner.forms import pack_positions, unpack_positions
from spectralbasis.tuner.layer import (
    COEFFICIENTS_OF,
    Convolution,
    Convolutions,
    Embedding,
    Linear,
    SpectralLayer,
    backend_of,
)
from spectralbasis.tuner.parameters import ParamWrapper, Row
from spectralbasis.tuner.preparation import Allocation, Plan, plan_adapter
from spectralbasis.tuner.targets import DEFAULT_TARGETS, count_parameters, is_targeted

ALIKE = ("coefficients", "bandwidth", "block_size", "scaling", "basis", "basis_seed")
"""Settings that adapters must share for their coefficients to be added."""


def combined_config(configs: Sequence[SpectralConfig], names: Sequence[str]) -> SpectralConfig:
    """The config of a weighted sum of adapters of one base.

    It is the first one's; of sparse ones, with the union of entries; of ones whose C is not linear in the numbers, that
    of a core.

    Args:
        configs: complete ones, as a model holds them.
        names: of the adapters, for errors.

    Raises:
        InputError: they are not of one kind.
    """
    first = configs[0]
    ranks: dict[str, int] = {}
    for config in configs:
        ranks |= config.ranks or {}
    # Only sparse adapters may adapt different matrices.
    alike = all(
        one.ranks == first.ranks if first.coefficients != "sparse" else (one.ranks or {}).items() <= ranks.items()
        for one in configs
    )
    differing = [field for field in ALIKE if any(getattr(one, field) != getattr(first, field) for one in configs)]
    if differing or not alike:
        field = (*differing, "ranks")[0]
        raise InputError(f"adapters {', '.join(names)} differ in {field}, so their coefficients cannot be added")
    if not KINDS[first.coefficients].linear:
        cores = {name: one._replace(scales=None, values=None) for name, one in first.record.items()}
        return first.with_record(cores, coefficients="core", scaling="absolute", inference_mode=True)
    if first.coefficients != "sparse":
        return replace(first).changed(inference_mode=True)
    record: dict[str, MatrixRecord] = {}
    for config in configs:
        record |= config.record
    for name, one in record.items():
        packed = [config.entries[name] for config in configs if config.entries and name in config.entries]
        positions = torch.cat([unpack_positions(text, one.k) for text in packed]).unique()
        record[name] = one._replace(entries=pack_positions(positions))
    modules: set[str] = set().union(*(config.target_modules or () for config in configs))
    return replace(first, target_modules=modules).with_record(record, inference_mode=True)


_WRAPPED = ("", "base_model.")
"""Where this model may be in the module that is made parallel: that module itself, or in a `PeftModel`."""
_UNCOUNTED = (
    "target_modules=.* were set but no module was matched",
    "The following rank_pattern keys did not match any targeted module",
    "You have passed exclude_modules=.* but no modules were excluded",
)
"""What PEFT warns of where patterns meet parameters alone, which it does not count; see `preparation.resolve_ranks`."""


class SpectralModel(BaseTuner):
    """A model whose linear layers train coefficients on fixed singular directions; made by `peft.get_peft_model`.

    PEFT's `convert_to_lora` works, through a decomposition of each dense ΔW.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from spectralbasis import SpectralConfig
        >>> base = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
        >>> model = get_peft_model(base, SpectralConfig(target_modules=["0"], leading=3)).base_model
        >>> type(model).__name__, model.allocation().trained, model.allocation().total
        ('SpectralModel', 3, 68)
    """

    prefix: str = "spectral_"
    tuner_layer_cls = SpectralLayer
    target_module_mapping = DEFAULT_TARGETS
    _plan: Plan | None = None

    def allocation(self, adapter_name: str = "default") -> Allocation:
        """How many coefficients an adapter trains, and on how many parameters."""
        layers = [one for one in _spectral_layers(self.model).values() if adapter_name in one.spectral_coefficients]
        return Allocation(
            ranks=dict(self.peft_config[adapter_name].ranks),
            trained=sum(layer.stored(adapter_name).numel() for layer in layers),
            total=count_parameters(self.model),
        )

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> set[str]:
        """What DistributedDataParallel leaves alone: buffers, which it would send from process 0 at every step."""
        return {f"{prefix}{name}" for name, _ in self.named_buffers() if ".spectral_" in name for prefix in _WRAPPED}

    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        """Add an adapter whose ΔW is exactly `Σ wᵢ ΔWᵢ`.

        Args:
            adapters: names of adapters with the same modules, basis, ranks and kind of coefficients; sparse ones may
                have other entries and modules each.
            weights: one number each; any sign.
            adapter_name: name of the new adapter, which is not made active.

        Raises:
            InputError: an adapter is unknown, the numbers differ in length, or the adapters are not of one kind.
        """
        self._check_weighted(adapters, weights, adapter_name)
        self.peft_config[adapter_name] = combined_config([self.peft_config[name] for name in adapters], adapters)
        self.inject_adapter(self.model, adapter_name)
        for layer in _spectral_layers(self.model).values():
            if adapter_name in layer.spectral_coefficients:
                layer.set_weighted(adapter_name, adapters, weights)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SpectralConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's key mapping; what it leaves over finds its layer by the names of matrices.

        Raises:
            InputError: the file has the numbers of some matrices in a stack of experts, and not those of others.
        """
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        held = {key: f"{key}.spectral_coefficients.{adapter_name}.weight" for key in _spectral_layers(model)}
        layers, known = {_name_in_layer(key): stored for key, stored in held.items()}, set(held.values())
        found = {key if key in known else _by_matrix_name(key, layers): value for key, value in remapped.items()}
        found = _by_canonical_name(model, config, adapter_name, found, held)
        here = _spectral_layers(model)
        return found | {
            stored: found[stored].reshape(here[key].stored(adapter_name).shape)
            for key, stored in held.items()
            if stored in found and _is_other_layout(found[stored], here[key], adapter_name)
        }

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add the adapter of a config, which is replaced by a complete one and is itself not changed.

        PEFT's own method calls the three methods below for every module, with no room for anything but the config: the
        plan is there while it runs, and not afterwards.
        """
        plan = plan_adapter(self.peft_config[adapter_name], model)
        for name, other in self.peft_config.items():
            wanted, found = (set(one.target_parameters or ()) for one in (plan.config, other))
            if name != adapter_name and wanted and found and wanted != found:
                raise InputError(
                    f"target_parameters are {sorted(wanted)}, but adapter {name!r} of this model has {sorted(found)}; "
                    "all adapters of a model that have target_parameters must have the same ones, or saved adapters "
                    "could be confused"
                )
        self.peft_config[adapter_name] = plan.config
        self._plan = plan
        try:
            with warnings.catch_warnings():
                for message in _UNCOUNTED:
                    warnings.filterwarnings("ignore", message)
                super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            self._plan = None

    def _prepare_adapter_config(self, config: SpectralConfig, model_config: dict[str, Any]) -> SpectralConfig:
        return config

    def _check_target_module_exists(self, config: SpectralConfig, key: str) -> Any:
        if self._plan is None:  # PEFT asks afterwards too, to show what was adapted
            return is_targeted(config, key)
        if key in self._plan.matrices and f"{key}.weight" not in self._plan.stacks:  # else a router, say
            return True
        return _ExcludedModule() if excludes(config, key) else False

    def _create_and_replace(
        self,
        config: SpectralConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        options: dict[str, Any] = {"init_weights": config.init_weights, "inference_mode": config.inference_mode}
        options |= self._prepared(config, current_key, parameter_name)
        if isinstance(target, SpectralLayer) and getattr(target, "parameter_name", None) == parameter_name:
            target.update_layer(adapter_name, **options)
            return
        base: Any = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        layer: SpectralLayer
        if parameter_name is not None:
            options["slices"] = cast(Plan, self._plan).stacks[current_key]
            layer = ParamWrapper(target, adapter_name, parameter_name=parameter_name, **options)
        elif isinstance(base, nn.Embedding | Convolutions):
            kind = Embedding if isinstance(base, nn.Embedding) else Convolution
            layer = kind(target, adapter_name, backend=backend_of(base, self.model), **options)
        else:
            options |= {"fan_in_fan_out": config.fan_in_fan_out, "backend": backend_of(base, self.model)}
            layer = Linear(target, adapter_name, **options)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _prepared(self, config: SpectralConfig, key: str, parameter_name: str | None) -> dict[str, Any]:
        """Factors and parametrisation of a module, or of all matrices in a parameter, as a layer takes them."""
        plan = cast(Plan, self._plan)
        if parameter_name is None:
            if key not in plan.matrices:
                raise InputError(f"{key} is not among target_modules={config.target_modules!r}; add it there")
            return {"factors": plan.matrices[key].factors, "parametrisation": plan.matrices[key].parametrisation}
        if key not in plan.stacks:
            raise InputError(
                f"{key} is not a parameter: it is computed from others at each use; remove what computes it first, "
                "with torch.nn.utils.parametrize.remove_parametrizations"
            )
        keys = [one.key for one in plan.stacks[key] if one.key in plan.matrices]
        return {
            "factors": nn.ModuleList([plan.matrices[one].factors for one in keys]),
            "parametrisation": Row(keys, [plan.matrices[one].parametrisation for one in keys]),
        }

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, ParamWrapper) and not isinstance(new_module, ParamWrapper):
            setattr(parent, child_name, new_module)  # PEFT would hand on a weight, which such a module may not have
        else:
            super()._replace_module(parent, child_name, new_module, child)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Within this context, layers learn which adapter each row of a mixed batch has."""
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is None:
            yield
            return
        self._check_mixed(adapter_names)
        hook = partial(_pass_adapter_names, adapter_names=list(adapter_names), copies=_copies(kwargs))
        modules = [m for m in self.modules() if isinstance(m, SpectralLayer | AuxiliaryTrainingWrapper)]
        handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _check_mixed(self, adapter_names: Sequence[str]) -> None:
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        known = {name for layer in _spectral_layers(self.model).values() for name in layer.spectral_coefficients}
        unknown = sorted(set(adapter_names) - known - {"__base__"})
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")

    def _check_weighted(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        if not adapters or len(adapters) != len(weights):
            raise InputError(f"{len(adapters)} adapters and {len(weights)} weights; pass one weight for each adapter")
        unknown = [name for name in adapters if name not in self.peft_config]
        if unknown or adapter_name in self.peft_config:
            problem = f"adapter {unknown[0]!r} is unknown" if unknown else f"adapter {adapter_name!r} exists already"
            raise InputError(f"{problem}; the model has {', '.join(self.peft_config)}")
        if any(self.peft_config[name].modules_to_save for name in adapters):
            raise InputError(f"adapters {', '.join(adapters)} have modules_to_save, which cannot be added")


def _spectral_layers(model: nn.Module) -> dict[str, SpectralLayer]:
    return {key: module for key, module in model.named_modules() if isinstance(module, SpectralLayer)}


def _by_matrix_name(key: str, layers: dict[tuple[str, int], str]) -> str:
    module, found, _ = key.partition(COEFFICIENTS_OF)
    return layers.get(_name_in_layer(module), key) if found else key


def _by_canonical_name(
    model: nn.Module, config: SpectralConfig, adapter_name: str, found: dict[str, Tensor], held: dict[str, str]
) -> dict[str, Tensor]:
    """The numbers of matrices that have other names here; those of one stack are put together, in its order."""
    here = set(held.values())
    strange = {
        matrix_name(key.partition(COEFFICIENTS_OF)[0]): key
        for key in found
        if COEFFICIENTS_OF in key and key not in here
    }
    missing = {key: layer for key, layer in _spectral_layers(model).items() if held[key] not in found}
    rows = {key: _row_names(layer, key, adapter_name) for key, layer in missing.items()}
    if not strange or not rows:
        return found
    table = conversions_of(model)
    wanted = [name for names in rows.values() for name in names]
    same = {name: ours for name, ours in config.renamed.items() if name in strange and ours in wanted}
    left = [name for name in strange if name not in same]
    same |= same_names(left, [name for name in wanted if name not in same.values()], lambda: (table, table))
    partners = {ours: name for name, ours in same.items()}
    for key, names in rows.items():
        absent = [name for name in names if name not in partners]
        if names and not absent:
            pieces = [found.pop(strange[partners[name]]) for name in names]
            found[held[key]] = pieces[0] if len(pieces) == 1 else torch.cat([piece.flatten() for piece in pieces])
        elif len(absent) < len(names):
            raise InputError(
                f"the adapter has no coefficients of {absent[0]} ({len(absent)} of the {len(names)} matrices of {key} "
                "are missing), which this model keeps in one parameter; load it under the release of transformers that "
                "it was made with"
            )
    return found


def _is_other_layout(numbers: Tensor, layer: SpectralLayer, adapter_name: str) -> bool:
    """Whether these are a layer's numbers in another shape: a router is a layer in one release, a row in the other."""
    if adapter_name not in layer.spectral_coefficients:
        return False
    shape = layer.stored(adapter_name).shape
    return numbers.shape != shape and numbers.numel() == shape.numel() and 1 in (numbers.ndim, len(shape))


def _row_names(layer: SpectralLayer, key: str, adapter_name: str) -> list[str]:
    """Names of the matrices whose numbers a layer stores for an adapter, in their order."""
    if adapter_name not in layer.spectral_parametrisations:
        return []
    stored = layer.spectral_parametrisations[adapter_name]
    return [matrix_name(one) for one in (stored.keys if isinstance(stored, Row) else [key])]


def _name_in_layer(key: str) -> tuple[str, int]:
    """Matrix name of a layer, and how many wrappers of other parameters are around it."""
    return matrix_name(key), key.split(".").count("base_layer")


def _copies(kwargs: dict[str, Any]) -> int:
    """How many rows `generate` makes of each row that it is given."""
    return max(kwargs.get("num_beams") or 1, kwargs.get("num_return_sequences") or 1)


def _pass_adapter_names(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], adapter_names: list[str], copies: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args and len(args[0]) == copies * len(adapter_names):
        adapter_names = [name for name in adapter_names for _ in range(copies)]
    return args, {**kwargs, "adapter_names": adapter_names}
