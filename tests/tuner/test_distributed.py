"""Two processes that each see half of a batch train as one that sees all of it."""

import socket
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from spectralbasis.errors import InputError
from tests.tuner.cases import CASES

CASE = CASES["bert"]
IDS = torch.randint(1, 50, (4, 7), generator=torch.Generator().manual_seed(0))


def loss(model, rows):
    return model(input_ids=IDS[rows]).logits.square().mean()


def gradients(model):
    """Gradients of the coefficients, whole, by the name of their layer."""
    found = {}
    for name, parameter in model.named_parameters():
        if "spectral_" in name:
            grad = parameter.grad
            found[name.removeprefix("module.")] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return found


def data_parallel(model):
    wrapped = DistributedDataParallel(model)
    sent = {name for name, _ in model.named_buffers()} - wrapped.parameters_to_ignore
    assert not any("spectral_" in name for name in sent)
    return wrapped


def fully_sharded(model):
    for layer in model.base_model.model.bert.encoder.layer:
        fully_shard(layer)
    return fully_shard(model)


KINDS = (data_parallel, fully_sharded)


def train(rank, port, folder):
    options = {"rank": rank, "world_size": 2, "timeout": timedelta(seconds=60)}
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", **options)
    for wrap in KINDS:
        model = wrap(CASE.adapted(task_type=None))
        loss(model, slice(2 * rank, 2 * rank + 2)).backward()
        found = gradients(model)
        if rank == 0:
            torch.save(found, folder / f"{wrap.__name__}.pt")
    with pytest.raises(InputError, match="is sharded over processes"):  # the last one is, and has no whole weights
        model.add_adapter("late", CASE.settings(target_modules=["key"], task_type=None))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_gradients_are_those_of_the_whole_batch(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(train, (port, tmp_path), nprocs=2)
    model = CASE.adapted(task_type=None)
    loss(model, slice(None)).backward()
    for wrap in KINDS:
        found = torch.load(tmp_path / f"{wrap.__name__}.pt", weights_only=True)
        torch.testing.assert_close(found, gradients(model), atol=1e-6, rtol=1e-4, msg=wrap.__name__)
