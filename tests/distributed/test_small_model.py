"""Sharded runs of torch's own AdamW are one process's: the ground on which the tests of PATS stand."""

import pytest
import torch
import torch.distributed as dist
from processes import Pool
from small_model import SmallModel, gather, loss_of, small_model
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

STEPS = 3


def train(model: SmallModel, rank: int = 0, world_size: int = 1) -> dict[str, Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(STEPS):
        loss_of(model, step, rank, world_size).backward()
        optimizer.step()
        optimizer.zero_grad()
    return gather(model, optimizer.state)


def sharded(split: bool) -> tuple[dict[str, Tensor], list[tuple[int, ...]]]:
    model = small_model()
    for module in (model.first, model.second, model):
        fully_shard(module)
    tensors = train(model, dist.get_rank(), dist.get_world_size()) if split else train(model)
    params = [param for param in model.parameters() if isinstance(param, DTensor)]
    return tensors, [tuple(param.to_local().shape) for param in params]


def tensor_parallel() -> dict[str, Tensor]:
    model = small_model(12)
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "model"))
    plan = {"first": ColwiseParallel(), "second": RowwiseParallel()}
    parallelize_module(model, mesh["model"], plan)
    for module in (model.first, model.second, model):
        fully_shard(module, mesh=mesh["data"])
    return train(model)


def assert_close(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        # A gradient is a sum of up to 60 terms, rounded in another order; AdamW divides it by its own size.
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6, msg=f"{name} differs")


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("split", [False, True])
def test_fully_shard_is_one_process(pool: Pool, split: bool, world_size: int) -> None:
    expected = train(small_model())
    results = pool(world_size, sharded, split)
    for tensors, shapes in results:
        assert_close(tensors, expected)
        assert len(shapes) == len(list(small_model().parameters()))
    assert any(0 in shape for _, shapes in results for shape in shapes) == (world_size == 4)


@pytest.mark.parametrize("world_size", [2, 4])
def test_tensor_parallel_is_one_process(pool: Pool, world_size: int) -> None:
    expected = train(small_model(12))
    for tensors in pool(world_size, tensor_parallel):
        assert_close(tensors, expected)
