"""Released gradients of sharded parameters: the bits of the plain sharded step; of replicas: refused."""

import gc
import weakref
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from processes import Pool
from small_model import gather, loss_of, small_model
from test_sharded import NOISE, STEPS, assert_close, optimizer_of, shard
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from pats_kernels import PATS, PATSAdamW, plan, release_gradients
from pats_kernels.distributed import Statistics


def train(how: str, kind: str, released: bool, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    rank, size = dist.get_rank(), dist.get_world_size()
    ranks = (rank, size) if how == "fsdp" else (0, 1)  # otherwise all ranks see the same batch
    model = shard(small_model(12 if "tp" in how else 3, kwargs.pop("dtype", torch.float32)), how)
    optimizer, keeper = optimizer_of(kind, model, **kwargs)
    scheduler = LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch))
    # Tensor parallelism leaves some parameters plain. Their gradients need no reduction.
    handle = release_gradients(optimizer, synchronized=how == "tp") if released else None
    for step in range(STEPS + 2):
        if step == STEPS and handle is not None:  # the last two steps are plain ones
            handle.remove()
        loss_of(model, step, *ranks).backward()
        if handle is not None:
            assert all((p.grad is None) == (step < STEPS) for p in model.parameters())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    keeper.state_dict()  # waits for the means
    return gather(model, keeper.state)


def both(how: str, kind: str, kwargs: dict[str, Any]) -> None:
    plain, released = (train(how, kind, release, dict(kwargs)) for release in (False, True))
    assert_close(released, plain)
    if dist.get_world_size() > 2:  # the order of a sum depends on the message's length
        return
    different = [name for name in plain if not torch.equal(released[name], plain[name])]
    assert not different, different


@pytest.mark.parametrize("kwargs", [{}, {"normalization": "exact"}, {"dtype": torch.bfloat16}], ids=str)
@pytest.mark.parametrize("kind", ["attached", "ema", "moments"])
def test_fsdp2_has_the_same_bits(pool: Pool, kind: str, kwargs: dict[str, Any]) -> None:
    """On two processes, where a sum has no order in which it could be rounded otherwise."""
    pool(2, both, "fsdp", kind, kwargs)


@pytest.mark.parametrize("how", ["tp", "hsdp", "fsdp+tp"])
def test_other_ways_to_split(pool: Pool, how: str) -> None:
    pool(2 if how == "tp" else 4, both, how, "ema", {})


def accumulated(released: bool) -> dict[str, Tensor]:
    model = shard(small_model(), "fsdp")
    optimizer, keeper = optimizer_of("ema", model)
    handle = release_gradients(optimizer) if released else None
    for step in range(STEPS):
        if handle is not None:
            with handle.accumulate():
                loss_of(model, 2 * step).backward()
        else:
            loss_of(model, 2 * step).backward()
        loss_of(model, 2 * step + 1).backward()
        optimizer.step()
        optimizer.zero_grad()
    keeper.state_dict()
    return gather(model, keeper.state)


def test_accumulation(pool: Pool) -> None:
    plain, released = (pool(2, accumulated, release)[0] for release in (False, True))
    assert all(torch.equal(released[name], plain[name]) for name in plain)


def counted() -> tuple[list[int], list[int]]:
    """How many tensors each plan that is made has, and each set of the statistics."""
    plans: list[int] = []
    sets: list[int] = []
    make, new = plan._planned, Statistics._new_set

    def planned(batch: plan.Batch) -> plan.Plan:
        plans.append(len(batch.params))
        return make(batch)

    def new_set(self: Statistics, batch: plan.Batch) -> Any:
        sets.append(len(batch.params))
        return new(self, batch)

    with patch.object(plan, "_planned", planned), patch.object(Statistics, "_new_set", new_set):
        train("fsdp", "ema", True, {})
    return plans, sets


def test_plans_and_sets_are_made_once(pool: Pool) -> None:
    count = len(list(small_model().parameters()))
    for plans, sets in pool(2, counted):
        assert plans == sets == [1] * count + [count]


def on_their_way() -> None:
    model = shard(small_model(), "fsdp")
    optimizer = PATSAdamW(model.parameters(), **NOISE)
    release_gradients(optimizer)
    pending: dict[int, Any] = {}
    for step in range(3):
        loss_of(model, step).backward()
        pending = optimizer._launcher._statistics._pending
        # In the first step each set is new, and making one waits for all messages before it.
        assert len(pending) == (1 if step == 0 else len(optimizer.state))
    optimizer.state_dict()
    assert not pending


def test_a_step_waits_for_its_own_means_only(pool: Pool) -> None:
    pool(2, on_their_way)


def forgotten(released: bool) -> None:
    model = shard(small_model(), "fsdp")
    optimizer = PATSAdamW(model.parameters(), **NOISE)
    handle = release_gradients(optimizer) if released else None
    for step in range(2):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.state_dict()
    if handle is not None:
        handle.remove()
    entries = [entry for entry in optimizer.state.values() if isinstance(entry, dict)]
    alive = [weakref.ref(tensor) for entry in entries for tensor in entry.values()]
    del entries
    gc.disable()  # all has to be freed without it, at the same time on all processes
    optimizer.state.clear()
    assert not any(reference() is not None for reference in alive)
    gc.enable()
    loss_of(model, 2).backward()  # training goes on, with new state
    optimizer.step()
    optimizer.state_dict()
    assert all(float(entry["step"]) == 1 for entry in optimizer.state.values())
    assert all(bool((entry["sens_stats"] > 0).any()) for entry in optimizer.state.values())


@pytest.mark.parametrize("released", [False, True])
def test_state_is_freed_with_its_last_reference(pool: Pool, released: bool) -> None:
    """Also that of which a message is, or was, on its way."""
    pool(2, forgotten, released)


# Replicas.


def refused() -> None:
    model = small_model()
    optimizer = PATSAdamW(model.named_parameters())
    with pytest.raises(RuntimeError, match=r"embedding\.weight: a plain parameter in one of 2 processes"):
        release_gradients(optimizer)
    assert not any(param._post_accumulate_grad_hooks for param in model.parameters())
    release_gradients(optimizer, synchronized=True)


def test_plain_parameters_are_refused(pool: Pool) -> None:
    pool(2, refused)


def of_ddp() -> None:
    model = DistributedDataParallel(small_model())
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    PATS(optimizer)
    release_gradients(optimizer, synchronized=True)
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match="has a gradient again after it was stepped in backward"):
        optimizer.step()


@pytest.mark.parametrize("world_size", [1, 2])
def test_ddp_is_found_out(pool: Pool, world_size: int) -> None:
    """Where it was not refused: one process has nothing to average, and a user may say what is not true."""
    pool(world_size, of_ddp)


def without_ddp() -> None:
    """Each process for itself."""
    model = small_model()
    optimizer = PATSAdamW(model.parameters(), **NOISE)
    release_gradients(optimizer, synchronized=True)
    for step in range(STEPS):
        loss_of(model, step).backward()
        optimizer.step()


def test_processes_that_train_for_themselves(pool: Pool) -> None:
    pool(2, without_ddp)
