"""Choices from a few batches before training: which entries to train, how well a basis fits, a curvature basis.

All use the loss gradient at the weights of the base, which `observe_gradients` collects at the layers. Also here:
`parameter_groups`, the parameters for an optimizer.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spectralbasis.basis import SpectralBasis
from spectralbasis.checkpoints.names import kind_of, layer_number
from spectralbasis.comparison.metrics import coverage_shares
from spectralbasis.errors import InputError
from spectralbasis.linalg import Leading, leading_svd, parse_leading, resolve_leading
from spectralbasis.linalg.certificates import triplet_residuals
from spectralbasis.triplets import DEFAULT_TOLERANCE, Triplets, fix_signs, matrix_hash
from spectralbasis.tuner.config import RECORD, SpectralConfig
from spectralbasis.tuner.factors import directions_of
from spectralbasis.tuner.forms import pack_positions
from spectralbasis.tuner.layer import COEFFICIENTS_OF
from spectralbasis.tuner.preparation import (
    DEFAULT_LEADING,
    Target,
    all_targets,
    find_targets,
    named_in_basis,
    normalized_scale,
    prepare,
    resolve_ranks,
)
from spectralbasis.tuner.targets import count_parameters, targeted_modules


def parameter_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    head_learning_rate: float | None = None,
    head: Iterable[str] = ("modules_to_save",),
    other_learning_rate: float | None = None,
) -> list[dict[str, Any]]:
    """The trainable parameters as groups for any torch optimizer, or for `Trainer(optimizers=(optimizer, None))`.

    Args:
        model: whose parameters are trained where they require a gradient.
        learning_rate: of everything outside of the head, such as spectral coefficients.
        head_learning_rate: of the head; None is `learning_rate`.
        head: names of the modules that make up the head; by default what PEFT retrains as `modules_to_save`.
        other_learning_rate: of what is trained outside of the head beside spectral coefficients, such as biases and
            norms; None is `learning_rate`, and so is it where there are no spectral coefficients.

    Returns:
        One group to three, each with `params` and `lr`.

    Raises:
        InputError: nothing is trainable.

    Examples:
        >>> import torch
        >>> import spectralbasis as sb
        >>> model = torch.nn.ModuleDict({"body": torch.nn.Linear(4, 4), "head": torch.nn.Linear(4, 2)})
        >>> groups = sb.parameter_groups(model, learning_rate=0.01, head_learning_rate=0.001, head=["head"])
        >>> [(len(group["params"]), group["lr"]) for group in groups]
        [(2, 0.01), (2, 0.001)]
    """
    names = tuple(head)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trained:
        raise InputError(
            f"{type(model).__name__} has no parameter that requires a gradient; add an adapter, or unfreeze"
        )
    spectral = any(COEFFICIENTS_OF in name for name, _ in trained)
    rates = {
        "body": learning_rate,
        "other": learning_rate if other_learning_rate is None or not spectral else other_learning_rate,
        "head": learning_rate if head_learning_rate is None else head_learning_rate,
    }
    groups: dict[str, dict[str, Any]] = {kind: {"params": [], "lr": rate} for kind, rate in rates.items()}
    for name, parameter in trained:
        kind = "head" if in_modules(name, names) else "body" if not spectral or COEFFICIENTS_OF in name else "other"
        groups[kind]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def in_modules(name: str, modules: Iterable[str]) -> bool:
    """Whether a parameter belongs to one of the modules, whatever wrapper's prefix stands before its name."""
    return any(f".{module}." in f".{name}" for module in modules)


Batch = Mapping[str, Any]
Loss = Callable[[nn.Module, Batch], Tensor]
"""(model, batch) → the mean loss of the batch's rows, a number."""
Observer = Callable[[str, Tensor, Tensor], None]
"""(matrix name, inputs x (tokens, n), gradients g with respect to the outputs (tokens, m)); `∂L/∂W` is `Σ gᵀ x`."""


def observe_gradients(
    model: nn.Module, batches: Iterable[Batch], targets: Iterable[Target], observer: Observer, loss: Loss | None = None
) -> int:
    """Run the model forward and backward over batches and show inputs and output gradients of the targets.

    Gradients are those of the summed loss of all rows: of the batch's mean loss, times its rows. Tokens that no
    gradient reaches, as padding, are left out, and so are targets that take no part, as experts may. The model stays as
    it is: nothing of it collects a gradient, dropout is off.

    Args:
        model: a module; tensors of the batches are moved to where its parameters are.
        batches: keyword arguments of the model; an iterable that is read once.
        targets: what is observed; linear layers.
        observer: called once for each target, batch and use of the layer.
        loss: None takes `model(**batch).loss`.

    Returns:
        The number of rows.

    Raises:
        InputError: there is no batch, no loss, a target is no linear layer, or no gradient reaches any.
    """
    seen: set[str] = set()

    def note(name: str, x: Tensor, g: Tensor) -> None:
        x, g = x.detach().flatten(0, -2), g.detach().flatten(0, -2)
        reached = g.any(1)
        seen.add(name)
        observer(name, x[reached], g[reached])

    def watch(name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Note the gradient of the output when it comes; a graph starts here where none led here."""
        if not output.requires_grad:
            output = output.detach().requires_grad_().clone()  # no leaf, so that it may be changed in place
        output.register_hook(partial(note, name, args[0]))
        return output

    modules = {target.name: _linear(target.key, model) for target in targets}
    device, rows = next(model.parameters()).device, 0
    with _at_rest(model), ExitStack() as stack, torch.enable_grad():
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(partial(watch, name)).remove)
        for batch in batches:
            size = next((len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim), 1)
            moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
            total = (loss or _model_loss)(model, moved)
            (total * size).backward()
            rows += size
    if not rows:
        raise InputError("there is no batch to take gradients on; pass an iterable of the model's keyword arguments")
    if not seen:
        raise InputError("no gradient of the loss reaches a target; check that the loss depends on the target modules")
    return rows


def _linear(key: str, model: nn.Module) -> nn.Module:
    module = model.get_submodule(key)
    if not isinstance(module, nn.Linear | Conv1D):
        raise InputError(
            f"gradients are observed in linear layers of a base without adapters, but {key} is a "
            f"{type(module).__name__}; leave it out with exclude_modules, or pass the base model"
        )
    return module


@contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, with frozen parameters."""
    training = {module: module.training for module in model.modules()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module, mode in training.items():
            module.training = mode


def _model_loss(model: nn.Module, batch: Batch) -> Tensor:
    found = getattr(model(**batch), "loss", None)
    if not isinstance(found, Tensor):
        raise InputError(
            f"{type(model).__name__} gave no loss for a batch of {', '.join(batch)}; "
            "put labels into the batches, or pass loss=a function of (model, batch)"
        )
    return found


def calibrate(
    model: nn.Module, batches: Iterable[Batch], config: SpectralConfig, *, loss: Loss | None = None
) -> SpectralConfig:
    """Pick the entries that sparse coefficients train, over all matrices at once.

    They are those of largest `|Uᵀ (∂L/∂W) V|`, the gradient of C at the base, among the k×k of every matrix, where
    `leading` and `rank_pattern` set k. Matrices of which none is picked are left out, and so are `modules_to_save`.

    Examples:
        >>> import torch
        >>> import spectralbasis as sb
        >>> base = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
        >>> batches, loss = [{"input": torch.randn(8, 6)}], lambda model, batch: model(**batch).square().mean()
        >>> config = sb.SpectralConfig(target_modules=["0"], coefficients="sparse", leading=3)
        >>> config = sb.calibrate(base, batches, config, loss=loss)
        >>> len(config.entries["0"].split())
        3

    Args:
        model: the base, without adapters; with the head that is to be trained, if any. It is not changed.
        batches: its keyword arguments, labels among them; read once.
        config: with coefficients "sparse"; `budget` is the share of the model's parameters to pick, None picks as many
            as "diagonal" coefficients would train with these k.
        loss: (model, batch) → mean loss over the batch's rows; None takes `model(**batch).loss`.

    Returns:
        The config, complete and bound to this base, for `get_peft_model`.

    Raises:
        InputError: the coefficients are not "sparse", the budget does not pay for one entry, or there is no gradient.
    """
    if config.coefficients != "sparse":
        raise InputError(f"coefficients={config.coefficients!r} need no calibration; pass coefficients='sparse'")
    unrecorded: dict[str, Any] = dict.fromkeys(RECORD)
    window = replace(config, coefficients="core", budget=None, **unrecorded)
    modules = targeted_modules(window, model)
    retrained = config.modules_to_save or ()
    targets = find_targets({key: one for key, one in modules.items() if not in_modules(f"{key}.", retrained)})
    window, gradients = _core_gradients(model, batches, window, targets, loss)
    number = sum((window.ranks or {}).values())
    if config.budget is not None:
        total = count_parameters(model)
        number = math.floor(config.budget * total)
        if number < 1:
            raise InputError(
                f"budget={config.budget:g} of {total:,} parameters is less than one entry; pass budget>={1 / total:.2g}"
            )
    picked = pick_entries(gradients, number)
    record = {name: window.matrix(name)._replace(entries=pack_positions(found)) for name, found in picked.items()}
    if config.scaling == "normalized":
        # Of all matrices together: an entry has the unit of any other, since each is as good as its gradient.
        fan_in = sum(map(len, picked.values())) / sum(one.k for one in record.values())
        scale = normalized_scale(max(1.0, fan_in))
        record = {name: one._replace(scales=scale) for name, one in record.items()}
    chosen = {target.key for target in targets if target.name in picked}
    complete = config.with_record(record, target_modules=chosen)
    return replace(complete)  # checked again as a whole


def plan_ranks(config: SpectralConfig, model: nn.Module) -> dict[str, int]:
    """Matrix name → k that an adapter of this config would have on a model.

    Raises:
        InputError: a rank or the budget does not fit the model.
    """
    budget = None if config.coefficients == "sparse" else config.budget
    _, targets, _ = all_targets(config, model)
    return resolve_ranks(replace(config, budget=budget), targets, count_parameters(model))


def pick_entries(gradients: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """Row-major positions, ascending, of the entries that are largest in absolute value over all matrices.

    Args:
        gradients: matrix name → gradient of C, (k, k).
        number: how many to pick, if there are as many that are not zero.
    """
    sizes = torch.cat([gradient.flatten().abs() for gradient in gradients.values()])
    values, chosen = sizes.topk(min(number, sizes.numel()))
    taken = torch.zeros_like(sizes, dtype=torch.bool)
    taken[chosen[values > 0]] = True
    parts = taken.split([gradient.numel() for gradient in gradients.values()])
    positions = {name: part.nonzero().squeeze(1) for name, part in zip(gradients, parts, strict=True)}
    return {name: found for name, found in positions.items() if found.numel()}


def _core_gradients(
    model: nn.Module, batches: Iterable[Batch], window: SpectralConfig, targets: list[Target], loss: Loss | None
) -> tuple[SpectralConfig, dict[str, Tensor]]:
    """The window with its record, and the gradient of the mean loss with respect to a core of each matrix, (k, k)."""
    window, prepared = prepare(window, targets, count_parameters(model))
    factors = {t.name: [factor.to(t.W.device) for factor in prepared[t.key].directions] for t in targets}
    sums = {name: U.new_zeros(U.shape[1], V.shape[1]) for name, (U, V) in factors.items()}

    def observe(name: str, x: Tensor, g: Tensor) -> None:
        U, V = factors[name]
        sums[name] += (g.to(U.dtype) @ U).T @ (x.to(V.dtype) @ V)

    rows = observe_gradients(model, batches, targets, observe, loss)
    gradients = {name: total.cpu() / rows for name, total in sums.items()}
    total = sum(float(gradient.abs().sum()) for gradient in gradients.values())
    if not (math.isfinite(total) and total > 0):
        raise InputError("the loss has no finite gradient in these directions; check the batches and their labels")
    return window, gradients


def gradient_coverage(
    model: nn.Module,
    batches: Iterable[Batch],
    basis: str | SpectralBasis = "pretrained",
    k: int | None = None,
    *,
    target_modules: list[str] | str = "all-linear",
    exclude_modules: list[str] | str | None = None,
    basis_seed: int = 0,
    loss: Loss | None = None,
) -> pd.DataFrame:
    """The share of `‖∂L/∂W‖_F²` at the base, over all rows of held-out batches, that lies in the first k directions.

    Diagonal, core, left and right, defined as for an update (`coverage_shares`), for k = 1, 2, 4, … and the k asked
    for. The gradients of all targets are in memory at once, as many numbers as their weights.

    Examples:
        >>> import torch
        >>> import spectralbasis as sb
        >>> base = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
        >>> batches, loss = [{"input": torch.randn(8, 6)}], lambda model, batch: model(**batch).square().mean()
        >>> table = sb.gradient_coverage(base, batches, k=5, target_modules=["0"], loss=loss)
        >>> left = table[(table.metric == "coverage_left") & (table.k == 5)]
        >>> round(float(left.value.item()), 4)
        1.0

    Args:
        model: the base, without adapters. It is not changed.
        batches: its keyword arguments, labels among them; read once.
        basis: "pretrained", "minor", "random", the path of a basis file, or a basis.
        k: how many directions; None is 64, or what the basis has. Where min(m, n) is smaller, that.
        target_modules: see `SpectralConfig`.
        exclude_modules: see `SpectralConfig`.
        basis_seed: of the random basis.
        loss: (model, batch) → mean loss over the batch's rows; None takes `model(**batch).loss`.

    Returns:
        A row for each matrix, metric and k: `matrix, layer, kind, m, n, k, metric, side, value, null_mean,
        gradient_norm`. `null_mean` is what a Haar-random basis covers. Matrices without a gradient are left out; the
        share over several matrices is the mean of `value` weighted by the squares of `gradient_norm`.

    Raises:
        InputError: there are no batches, no loss, no gradient, or the basis lacks a target.
    """
    config = SpectralConfig(target_modules=target_modules, exclude_modules=exclude_modules)
    targets = find_targets(targeted_modules(config, model))
    gradients = mean_gradients(model, batches, targets, loss)
    directions = directions_of(basis, tolerance=DEFAULT_TOLERANCE, seed=basis_seed)
    targets = named_in_basis(targets, basis, model)
    rows: list[dict[str, object]] = []
    for target in targets:
        gradient = gradients.pop(target.name, None)
        if gradient is not None and bool(gradient.any()):
            U, V = directions(target.name_in_basis, target.W, _leading_in(basis, k, target), target.hash)
            rows.extend(_coverage_rows(target, gradient.cpu(), U.cpu(), V.cpu()))
    return pd.DataFrame(rows)


def mean_gradients(
    model: nn.Module, batches: Iterable[Batch], targets: list[Target], loss: Loss | None = None
) -> dict[str, Tensor]:
    """Gradient of the mean loss over all rows with respect to W of each target that it reaches, (m, n)."""
    sums: dict[str, Tensor] = {}

    def observe(name: str, x: Tensor, g: Tensor) -> None:
        dtype = torch.promote_types(g.dtype, torch.float32)
        gradient = g.to(dtype).T @ x.to(dtype)
        sums[name] = sums[name].add_(gradient) if name in sums else gradient

    rows = observe_gradients(model, batches, targets, observe, loss)
    return {name: total.div_(rows) for name, total in sums.items()}


def _leading_in(basis: str | SpectralBasis, k: int | None, target: Target) -> int:
    if k is None and isinstance(basis, SpectralBasis) and target.name_in_basis in basis:
        return basis[target.name_in_basis].k
    return min(k or DEFAULT_LEADING, *target.W.shape)


def _coverage_rows(target: Target, gradient: Tensor, U: Tensor, V: Tensor) -> list[dict[str, object]]:
    m, n = gradient.shape
    norm = float(torch.linalg.matrix_norm(gradient))
    matrix = {"matrix": target.name, "layer": layer_number(target.name), "kind": kind_of(target.name), "m": m, "n": n}
    return [
        {**matrix, "k": k, "metric": metric, "side": side, "value": value,
         "null_mean": haar_coverage(metric, k, (m, n)), "gradient_norm": norm}
        for (metric, side, k, _), value in coverage_shares(U, V.T, gradient).items()
    ]  # fmt: skip


def haar_coverage(metric: str, k: int, shape: tuple[int, int]) -> float:
    """What a Haar-random basis of k directions covers on average of a matrix of this shape (m, n).

    Raises:
        KeyError: the metric is no coverage.
    """
    m, n = shape
    return {
        "coverage_diagonal": k / (m * n),
        "coverage_core": k**2 / (m * n),
        "coverage_left": k / m,
        "coverage_right": k / n,
    }[metric]


KIND = "curvature"


class Covariances:
    """Uncentred second moments of what passes the target layers, summed as it comes: `Σ g gᵀ` and `Σ x xᵀ`.

    Attributes:
        left: matrix name → (m, m), of the gradients with respect to the outputs.
        right: matrix name → (n, n), of the inputs.
    """

    def __init__(self) -> None:
        self.left: dict[str, Tensor] = {}
        self.right: dict[str, Tensor] = {}

    def add(self, name: str, x: Tensor, g: Tensor) -> None:
        """Add the tokens of one use of a layer: inputs x (tokens, n) and output gradients g (tokens, m)."""
        for sums, rows in ((self.left, g), (self.right, x)):
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
            if name not in sums:
                sums[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
            sums[name].addmm_(rows.T, rows)


def curvature_basis(
    model: nn.Module,
    batches: Iterable[Batch],
    leading: Leading | None = None,
    *,
    target_modules: list[str] | str = "all-linear",
    exclude_modules: list[str] | str | None = None,
    loss: Loss | None = None,
) -> SpectralBasis:
    """The leading eigenvectors of the outputs' gradient covariance and of the inputs' covariance, for each matrix.

    They are the Kronecker factors of K-FAC (Martens & Grosse, arXiv 1503.05671), with the gradients of the given labels
    (the empirical Fisher matrix), over all tokens that a gradient reaches. U holds eigenvectors of `Σ g gᵀ`, V those of
    `Σ x xᵀ`, both in descending order of eigenvalues; the i-th of one goes with the i-th of the other. Such pairs are
    no singular vectors of W: `S_i = u_iᵀ W v_i`, made positive by the sign of v_i and in no order, the residuals say
    how far the pair is from a singular one, and `subspace_error_bound` is 1. One pass; the two matrices are all that
    is kept.

    Examples:
        >>> import torch
        >>> import spectralbasis as sb
        >>> base = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
        >>> batches, loss = [{"input": torch.randn(8, 6)}], lambda model, batch: model(**batch).square().mean()
        >>> basis = sb.curvature_basis(base, batches, 3, target_modules=["0"], loss=loss)
        >>> basis["0"].U.shape, basis["0"].Vh.shape
        (torch.Size([5, 3]), torch.Size([3, 6]))

    Args:
        model: the base, without adapters. It is not changed.
        batches: its keyword arguments, labels among them; read once.
        leading: how many directions: a number (min(m, n) where that is smaller), a fraction, "mp" or "gd", by the
            singular values of W; None is 64.
        target_modules: see `SpectralConfig`.
        exclude_modules: see `SpectralConfig`.
        loss: (model, batch) → mean loss over the batch's rows; None takes `model(**batch).loss`.

    Returns:
        A basis of the kind "curvature"; its file is what `SpectralConfig(basis=PATH)` takes.

    Raises:
        InputError: there are no batches, no loss, no finite gradient, or a target is no linear layer.
    """
    leading = DEFAULT_LEADING if leading is None else parse_leading(leading)
    config = SpectralConfig(target_modules=target_modules, exclude_modules=exclude_modules)
    targets = find_targets(targeted_modules(config, model))
    covariances = Covariances()
    observe_gradients(model, batches, targets, covariances.add, loss)
    found, skipped = {}, {}
    for target in targets:
        try:
            found[target.name] = _eigenvectors(target, covariances, leading)
        except ValueError as error:
            skipped[target.name] = str(error)
    source = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    if not found:
        name, reason = next(iter(skipped.items()))
        raise InputError(f"no matrix gets a usable gradient; {name}: {reason}")
    return SpectralBasis(found, kind=KIND, source=source, leading=leading, skipped=skipped)


def _eigenvectors(target: Target, covariances: Covariances, leading: Leading) -> Triplets:
    if target.name not in covariances.left:
        raise ValueError("no gradient of the loss reaches it")
    W = target.W
    k = min(leading, *W.shape) if isinstance(leading, int) else resolve_leading(leading, W)
    U = leading_svd(covariances.left.pop(target.name), k).U
    V = leading_svd(covariances.right.pop(target.name), k).U
    return pair_directions(W, U, V, solver=KIND)


def pair_directions(W: Tensor, U: Tensor, V: Tensor, *, solver: str) -> Triplets:
    """Directions that are no singular vectors of W (m, n), U (m, k) and V (n, k), in the form of a basis.

    `S_i = u_iᵀ W v_i` is made positive by the sign of v_i; the sign of u_i follows the rule of `Triplets`.
    """
    U, Vh = fix_signs(U.double().cpu(), V.double().cpu().T)
    W = W.cpu()
    S = ((W.double() @ Vh.T) * U).sum(0)
    Vh = torch.where(S < 0, -1.0, 1.0)[:, None] * Vh
    return Triplets(
        U=U.float().contiguous(),
        S=S.abs().float(),
        Vh=Vh.float().contiguous(),
        residuals=triplet_residuals(W, U, S.abs(), Vh).float(),
        next_singular_value=torch.inf,
        subspace_error_bound=1.0,
        solver=solver,
        base_hash=matrix_hash(W),
    )
