"""PATS over shards is PATS over the whole: the same noise, the same means, whatever the split.

Gradients and means are sums that are rounded in another order on another number of processes, and nothing
else differs: tolerances are a few roundings of what is summed.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import Pool
from small_model import SmallModel, gather, loss_of, small_model
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from pats_kernels import PATS, PATSAdamW

STEPS = 4
NOISE = {"noise_scale": 1e-2, "seed": 2**63 + 5}


def optimizer_of(kind: str, model: SmallModel, **kwargs: Any) -> tuple[torch.optim.Optimizer, Any]:
    """An optimizer, and what keeps the state of PATS."""
    if kind == "attached":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return optimizer, PATS(optimizer, **{**NOISE, **kwargs})
    optimizer = PATSAdamW(model.parameters(), lr=1e-2, sensitivity=kind, **{**NOISE, **kwargs})
    return optimizer, optimizer


def train(
    model: SmallModel, kind: str, rank: int = 0, world_size: int = 1, **kwargs: Any
) -> dict[str, Tensor]:
    optimizer, keeper = optimizer_of(kind, model, **kwargs)
    for step in range(STEPS):
        loss_of(model, step, rank, world_size).backward()
        optimizer.step()
        optimizer.zero_grad()
    keeper.state_dict()  # waits for the means
    return gather(model, keeper.state)


def shard(model: SmallModel, how: str) -> SmallModel:
    """Spread over all processes, as a user would."""
    size = dist.get_world_size()
    if how == "fsdp":
        for module in (model.first, model.second, model):
            fully_shard(module)
        return model
    if how == "hsdp":
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))
        for module in (model.first, model.second, model):
            fully_shard(module, mesh=mesh)
        return model
    mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("data", "model"))
    plan = {"first": ColwiseParallel(), "second": RowwiseParallel()}
    parallelize_module(model, mesh["model"], plan)
    if how == "fsdp+tp":
        for module in (model.first, model.second, model):
            fully_shard(module, mesh=mesh["data"])
    return model


def sharded(how: str, kind: str, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    return train(shard(small_model(12 if "tp" in how else 3), how), kind, **kwargs)


def assert_close(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(
            tensor, expected[name], rtol=2e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("normalization", ["delayed", "exact"])
@pytest.mark.parametrize("kind", ["attached", "ema", "moments"])
@pytest.mark.parametrize(
    ("world_size", "how"), [(2, "fsdp"), (3, "fsdp"), (4, "fsdp"), (4, "hsdp"), (4, "fsdp+tp"), (2, "tp")]
)
def test_is_one_process(pool: Pool, world_size: int, how: str, kind: str, normalization: str) -> None:
    kwargs = {"normalization": normalization}
    expected = train(small_model(12 if "tp" in how else 3), kind, **kwargs)
    quiet = train(small_model(12 if "tp" in how else 3), kind, **kwargs | {"gamma": 1e9})
    assert not torch.allclose(expected["first.weight"], quiet["first.weight"], atol=1e-4)
    for tensors in pool(world_size, sharded, how, kind, kwargs):
        assert_close(tensors, expected)


def clipped(model: SmallModel, own: bool) -> dict[str, Tensor]:
    """Steps with gradients clipped to less than half of their norm, by the optimizer or by torch."""
    optimizer = PATSAdamW(model.parameters(), lr=1e-2, **NOISE)
    for step in range(STEPS):
        loss_of(model, step).backward()
        total = optimizer.clip_grad_norm_(0.05) if own else None
        if total is None:
            total = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        assert type(total) is Tensor
        assert total > 0.1
        optimizer.step()
        optimizer.zero_grad()
    optimizer.state_dict()
    return gather(model, optimizer.state)


def sharded_clipped(how: str) -> dict[str, Tensor]:
    return clipped(shard(small_model(12 if "tp" in how else 3), how), own=True)


@pytest.mark.parametrize(("world_size", "how"), [(2, "fsdp"), (4, "fsdp+tp"), (2, "tp")])
def test_clipping_is_by_the_norm_of_whole_gradients(pool: Pool, world_size: int, how: str) -> None:
    """With tensor parallelism some parameters are plain tensors and some are sharded."""
    expected = clipped(small_model(12 if "tp" in how else 3), own=False)
    for tensors in pool(world_size, sharded_clipped, how):
        assert_close(tensors, expected)


def summary(model: SmallModel, kind: str) -> dict[str, float]:
    """After steps with finite gradients, and one in which a whole tensor's gradient is not."""
    optimizer, keeper = optimizer_of(kind, model)
    param: Any = model.second.weight
    for step in range(3):
        loss_of(model, step).backward()
        if step == 1:
            param.grad.mul_(torch.nan)
        optimizer.step()
        optimizer.zero_grad()
        if step == 1:
            for key in ("exp_avg", "exp_avg_sq"):  # reset what the NaN has reached: moments and weights
                keeper.state[param][key].zero_()
            param.detach().zero_()
    return keeper.pats_summary()


def sharded_summary(how: str, kind: str) -> dict[str, float]:
    return summary(shard(small_model(12 if "tp" in how else 3), how), kind)


@pytest.mark.parametrize("kind", ["ema", "moments"])
@pytest.mark.parametrize(("world_size", "how"), [(3, "fsdp"), (4, "hsdp"), (4, "fsdp+tp"), (2, "tp")])
def test_pats_summary_is_of_all_shards(pool: Pool, world_size: int, how: str, kind: str) -> None:
    """Every process has the numbers of one that holds all, what is not finite included."""
    model = small_model(12 if "tp" in how else 3)
    expected = summary(model, kind)
    assert expected["nonfinite"] == model.second.weight.numel()
    assert 0.01 < expected["mean_gate"] < expected["noisy_share"] < 0.99
    for got in pool(world_size, sharded_summary, how, kind):
        assert got == pytest.approx(expected, rel=2e-5)
