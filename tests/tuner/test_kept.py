"""A weight that is kept for calls without gradients is never a stale one, whatever has changed."""

import copy
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

import spectralbasis as sb
from spectralbasis.errors import InputError
from spectralbasis.tuner import kept as kept_module
from spectralbasis.tuner.factors import Factors, Snapshot, sampling_step

SIZE = 24
STORED = "0.spectral_coefficients.default.weight"


@pytest.fixture(autouse=True)
def default_limit():
    yield
    sb.keep_weights()


def adapted(**changes):
    """One square layer with two adapters, "default" and "other"."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(SIZE, SIZE)).requires_grad_(False)
    config = {"target_modules": ["0"], "coefficients": "diagonal", "leading": 5, "init_weights": False} | changes
    model = sb.tuner.SpectralModel(base, sb.SpectralConfig(**config), "default")
    model.peft_config["other"] = sb.SpectralConfig(**config | {"leading": 3, "coefficients": "core"})
    model.inject_adapter(model.model, "other")
    return model.eval()


def layer_of(model):
    return model.model[0]


def dense(layer, x, names=("default",)):
    """The layer's output from the dense weight, computed anew."""
    weight = layer.weight.detach()
    for name in names:
        C, U, V, form = layer.terms(name)
        weight = weight + U @ (torch.diag(C) if form == "diagonal" else C) @ V.T
    return linear(x, weight.to(x.dtype), layer.bias)


def number_kept(layer):
    return sum(len(plain.kept) for plain in layer._plain.values())


X = torch.randn(7, SIZE, generator=torch.Generator().manual_seed(1))


def other_numbers(layer):
    return torch.randn(layer.stored("default").shape)


def optimizer_step(layer):
    with torch.enable_grad():
        layer(X).square().sum().backward()
    torch.optim.AdamW([layer.stored("default")], lr=0.5).step()


def numbers_through_data(layer):
    layer.stored("default").data.copy_(other_numbers(layer))


def one_number_through_data(layer):
    layer.stored("default").data[2] += 1


def numbers_as_data(layer):
    layer.stored("default").data = other_numbers(layer)


def numbers_through_numpy(layer):
    layer.stored("default").detach().numpy()[:] = 3


def numbers_in_place(layer):
    layer.stored("default").mul_(-2)


def numbers_in_inference_mode(layer):
    with torch.inference_mode():
        layer.stored("default").mul_(-2)


def numbers_set(layer):
    layer.stored("default").set_(other_numbers(layer))


def numbers_of_a_state_dict(layer):
    layer.load_state_dict({"spectral_coefficients.default.weight": other_numbers(layer)}, strict=False)


def numbers_assigned(layer):
    state = {"spectral_coefficients.default.weight": other_numbers(layer)}
    layer.load_state_dict(state, strict=False, assign=True)


def another_parameter(layer):
    layer.spectral_coefficients["default"].weight = nn.Parameter(other_numbers(layer))


def weighted(layer):
    layer.set_weighted("default", ["default"], [-0.5])


def weight_in_place(layer):
    layer.weight.mul_(2)


def one_entry_in_place(layer):
    layer.weight[0, 1] += 5  # none of the entries that are compared


def weight_of_a_state_dict(layer):
    layer.load_state_dict({"base_layer.weight": torch.randn(SIZE, SIZE)}, strict=False)


def weight_through_data(layer):
    layer.weight.data += 0.1 * torch.randn(SIZE, SIZE)  # as PEFT merges another adapter


def row_through_data(layer):
    layer.weight.data[5] = 0


def column_through_data(layer):
    layer.weight.data[:, 11] = 0


def weight_through_numpy(layer):
    layer.weight.numpy()[:, 1:] *= 2


def weight_as_data(layer):
    layer.weight.data = torch.randn(SIZE, SIZE)


def weight_turned(layer):
    layer.weight.data = layer.weight.data.T


def weight_and_back_at_the_same_address(layer):
    for _ in range(2):  # the second tensor may get the memory of the first one
        layer.weight.data = layer.weight.data * 2


def another_weight(layer):
    layer.base_layer.weight = nn.Parameter(torch.randn(SIZE, SIZE), requires_grad=False)


def another_base_layer(layer):
    layer.base_layer = nn.Linear(SIZE, SIZE).requires_grad_(False)


def another_bias(layer):
    layer.bias.data += 1


def directions_in_place(layer):
    layer.factors("default").directions.mul_(-1)[:SIZE].mul_(2)


def other_factors(layer):
    U, V = (torch.linalg.qr(torch.randn(SIZE, 5)).Q for _ in "UV")
    layer.spectral_factors["default"] = Factors(U, V, "other")


def adapter_made_again(layer):
    factors, parametrisation = layer.factors("default"), layer.parametrisation("default")
    layer.delete_adapter("default")
    layer.update_layer("default", factors=factors, parametrisation=parametrisation, init_weights=False)
    layer.set_adapter("default")


CHANGES = [value for value in list(globals().values()) if callable(value) and getattr(value, "__code__", None)
           and value.__code__.co_varnames[:1] == ("layer",) and value.__code__.co_argcount == 1
           and value not in (other_numbers, number_kept)]  # fmt: skip


def test_the_table_of_changes_is_whole():
    assert len(CHANGES) == 28


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("coefficients", ["diagonal", "core", "block", "rotation"])
@pytest.mark.parametrize("change", CHANGES)
def test_no_weight_is_stale(change, coefficients, mode):
    layer = layer_of(adapted(coefficients=coefficients, leading=5 if coefficients == "diagonal" else 4))
    with mode():
        before = layer(X)
        assert number_kept(layer) == 1
        torch.testing.assert_close(before, dense(layer, X))
    with torch.no_grad():
        if change is other_factors and coefficients == "core":
            pytest.skip("the same with the diagonal")
        if change is weighted and coefficients == "rotation":
            pytest.skip("a sum of rotations is a core")
        change(layer)
    with mode():
        after = layer(X)
    assert not torch.allclose(after, before, atol=1e-3), "the change changes nothing"
    torch.testing.assert_close(after, dense(layer, X))


@torch.no_grad()
def test_each_adapter_has_its_own():
    model = adapted()
    layer = layer_of(model)
    for name in ("default", "other", "default"):
        layer.set_adapter(name)
        torch.testing.assert_close(layer(X), dense(layer, X, [name]))
    assert number_kept(layer) == 2
    layer.set_adapter(["default", "other"])
    torch.testing.assert_close(layer(X), dense(layer, X, ["default", "other"]))


@torch.no_grad()
def test_disabled_merged_and_unmerged():
    layer = layer_of(adapted())
    kept = layer(X)
    layer.enable_adapters(False)
    assert torch.equal(layer(X), layer.base_layer(X))
    layer.enable_adapters(True)
    layer.merge()
    assert number_kept(layer) == 0
    torch.testing.assert_close(layer(X), kept)
    layer.stored("default").data.fill_(9)
    layer.unmerge()
    torch.testing.assert_close(layer(X), dense(layer, X))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@torch.no_grad()
def test_moved_to_another_dtype_and_back(dtype):
    layer = layer_of(adapted())
    layer(X)
    layer.to(dtype)
    assert number_kept(layer) == 0
    found = layer(X.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), dense(layer.float(), X), atol=0.1, rtol=0.1)
    torch.testing.assert_close(layer(X), dense(layer, X))


@torch.no_grad()
def test_autocast_has_its_own():
    layer = layer_of(adapted())
    full = layer(X)
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(X)
    assert (low.dtype, number_kept(layer)) == (torch.bfloat16, 2)
    torch.testing.assert_close(low.float(), full, atol=0.05, rtol=0.05)
    assert torch.equal(layer(X), full)
    numbers_through_data(layer)
    expected = dense(layer, X)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(X).float(), expected, atol=0.05, rtol=0.05)


@torch.no_grad()
def test_a_hook_that_is_added_runs():
    layer = layer_of(adapted())
    layer(X)
    for register in (layer.base_layer.register_forward_hook, nn.modules.module.register_module_forward_hook):
        seen = []
        handle = register(lambda module, args, output, seen=seen: seen.append(module))
        found = layer(X)
        handle.remove()
        assert layer.base_layer in seen
        torch.testing.assert_close(found, dense(layer, X))


def test_gradients_are_those_of_the_dense_weight_after_a_call_without():
    layer = layer_of(adapted())
    with torch.inference_mode():
        layer(X)
    layer.weight.requires_grad_(True)
    layer(X).square().sum().backward()
    assert layer.weight.grad is not None
    layer.weight.requires_grad_(False)
    numbers = layer.stored("default")
    (found,) = torch.autograd.grad(layer(X).square().sum(), numbers)
    (wanted,) = torch.autograd.grad(dense(layer, X).square().sum(), numbers)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_kept_with_gradients_or_in_training_mode(mode):
    model = adapted()
    layer = layer_of(model)
    layer(X)
    assert number_kept(layer) == 0
    with mode():
        layer(X)
        assert number_kept(layer) == 1
        model.train()
        assert number_kept(layer) == 0
        torch.testing.assert_close(layer(X), dense(layer, X))
    assert number_kept(layer) == 0


def test_training_mode_leaves_what_is_known_of_the_base():
    """Trainers call `train` before each step."""
    layer = layer_of(adapted())
    known = layer.factors("default").singular_values(layer.weight, 5)
    assert known is not None
    assert layer.train().factors("default").singular_values(layer.weight, 5) is known


@pytest.mark.parametrize("twin_of", [copy.deepcopy, copy.copy, lambda layer: pickle.loads(pickle.dumps(layer))])
@torch.no_grad()
def test_copies_carry_none(twin_of):
    layer = layer_of(adapted())
    expected = layer(X)
    twin = twin_of(layer)
    assert (number_kept(layer), number_kept(twin)) == (1, 0)
    assert torch.equal(twin(X), expected)
    numbers_as_data(twin)
    torch.testing.assert_close(twin(X), dense(twin, X))


@torch.no_grad()
def test_a_copy_shares_nothing():
    layer = layer_of(adapted())
    expected = layer(X)
    twin = copy.deepcopy(layer)
    numbers_through_data(twin)
    weight_through_data(twin)
    torch.testing.assert_close(twin(X), dense(twin, X))
    assert torch.equal(layer(X), expected)


@torch.no_grad()
def test_functional_calls_use_what_they_are_given():
    model = adapted().model
    expected = model(X)
    numbers = torch.randn(3, 5)
    for one in numbers:
        found = functional_call(model, {STORED: one}, (X,))
        with torch.no_grad():
            twin = copy.deepcopy(model)
            twin[0].stored("default").copy_(one)
        torch.testing.assert_close(found, dense(twin[0], X))
    batched = vmap(lambda one: functional_call(model, {STORED: one}, (X,)))(numbers)
    torch.testing.assert_close(batched[-1], found)
    weight = torch.randn(SIZE, SIZE)
    found = functional_call(model, {"0.base_layer.weight": weight}, (X,))
    torch.testing.assert_close(found, expected + X @ (weight - model[0].weight).T, atol=1e-4, rtol=1e-4)


def traced(model):
    return torch.jit.trace(model, (X,), check_trace=False)


def as_a_graph(model):
    return make_fx(model)(X)


def compiled(model):
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("record", [traced, as_a_graph, compiled])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@torch.no_grad()
def test_what_is_recorded_depends_on_the_numbers(record):
    model = adapted().model
    model(X)
    recorded = record(model)
    recorded(X)
    numbers_through_data(model[0])
    torch.testing.assert_close(recorded(X), dense(model[0], X), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_change_in_one_thread_is_seen_by_the_others():
    layer = layer_of(adapted())
    wrong = []

    def call():
        with torch.no_grad():
            for _ in range(50):
                barrier.wait()
                if not torch.allclose(layer(X), expected[0], atol=1e-4):
                    wrong.append(1)
                barrier.wait()

    barrier, expected = threading.Barrier(4), [dense(layer, X)]
    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(50):
        numbers_through_data(layer)
        expected[0] = dense(layer, X)
        barrier.wait()
        barrier.wait()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_inference_tensors_are_not_kept():
    with torch.inference_mode():
        layer = layer_of(adapted())
        torch.testing.assert_close(layer(X), dense(layer, X))
        assert number_kept(layer) == 0
        layer.weight.mul_(2)
        torch.testing.assert_close(layer(X), dense(layer, X))


@torch.no_grad()
def test_numbers_that_are_none_are_formed_each_time():
    layer = layer_of(adapted())
    layer.stored("default").data[0] = float("nan")
    assert layer(X).isnan().all()
    layer.stored("default").data[0] = 1.0
    torch.testing.assert_close(layer(X), dense(layer, X))


@torch.no_grad()
def test_the_limit_holds_and_memory_is_given_back():
    first, second = layer_of(adapted()), layer_of(adapted())
    size = 4 * SIZE**2
    sb.keep_weights(size + 1)
    outputs = [layer(X) for layer in (first, second)]
    assert (number_kept(first), number_kept(second)) == (1, 0)
    torch.testing.assert_close(outputs[1], dense(second, X))
    numbers_through_data(first)
    torch.testing.assert_close(first(X), dense(first, X))
    assert number_kept(first) == 1, "the new weight takes the room of the old one"
    entry = weakref.ref(next(iter(first._plain["default"].kept._entries.values())))
    first.train()
    assert entry() is None
    second(X)
    assert number_kept(second) == 1
    sb.keep_weights(None)
    assert number_kept(second) == 0
    torch.testing.assert_close(second(X), dense(second, X))
    assert number_kept(second) == 0
    assert kept_module._take_room(0)
    assert kept_module._held == 0


@pytest.mark.parametrize("limit", ["much", -1, "3 parsecs"])
def test_a_limit_is_an_amount_of_memory(limit):
    with pytest.raises(InputError, match="is not an amount of memory"):
        sb.keep_weights(limit)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (6, 6), (12, 8), (8, 12), (64, 48), (48, 64), (3, 5, 7)])
def test_every_row_and_every_column_is_sampled(shape):
    weight = torch.zeros(shape)
    state = Snapshot(weight)
    for dimension, size in ((-2, shape[-2]), (-1, shape[-1])):
        for index in range(size):
            changed = weight.data.select(dimension, index)
            changed += 1
            assert not state.holds(weight)
            changed -= 1
            assert state.holds(weight)
    assert len(state.sample) < 3 * (weight.numel() // shape[-1] + shape[-1])
    assert sampling_step(1, 1) == 1


class Launches(TorchDispatchMode):
    """Counts operations that make or read entries."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in ("view", "_unsafe_view", "t", "transpose", "detach", "as_strided", "expand", "squeeze"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("coefficients", "training", "allowed"), [("diagonal", True, 10), ("core", True, 9), ("diagonal", False, 2)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_launches_beyond_those_of_the_base(coefficients, training, allowed, bias):
    """On an accelerator a step of small batches takes as long as its launches are many."""
    base = nn.Sequential(nn.Linear(SIZE, SIZE, bias=bias)).requires_grad_(False)
    config = sb.SpectralConfig(target_modules=["0"], coefficients=coefficients, leading=4, init_weights=False)
    counts = []
    for model in (copy.deepcopy(base), sb.tuner.SpectralModel(base, config, "default").model):
        model.train(training)
        for _ in range(2):  # the first call finds what later ones have
            with torch.set_grad_enabled(training), Launches() as seen:
                output = model(X.clone().requires_grad_(training))
                loss = output.sum() if training else None
                if loss is not None:
                    loss.backward()
        counts.append(len(seen.names))
    assert counts[1] - counts[0] <= allowed
