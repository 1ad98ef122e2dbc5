"""A checkpoint continues on any number of processes, however it was split, as if nothing had been.

Tolerances as in test_sharded: other sums, in another order, and nothing else.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from processes import Pool
from small_model import SmallModel, gather, loss_of, small_model
from test_sharded import NOISE, assert_close, optimizer_of, shard
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from pats_kernels import PATS, PATSAdamW

BEFORE, AFTER = 3, 3
KINDS = ["attached", "ema", "moments"]


def train(model: SmallModel, optimizer: torch.optim.Optimizer, first: int, steps: int) -> None:
    for step in range(first, first + steps):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()


def gathered(model: SmallModel, keeper: Any) -> dict[str, Tensor]:
    keeper.state_dict()  # waits for the means
    return gather(model, keeper.state)


def uninterrupted(kind: str, **kwargs: Any) -> dict[str, Tensor]:
    model = small_model()
    optimizer, keeper = optimizer_of(kind, model, **kwargs)
    train(model, optimizer, 0, BEFORE + AFTER)
    return gathered(model, keeper)


def built(kind: str, how: str | None, **kwargs: Any) -> tuple[SmallModel, torch.optim.Optimizer, Any]:
    model = small_model() if how is None else shard(small_model(), how)
    return (model, *optimizer_of(kind, model, **kwargs))


def save(kind: str, how: str | None, path: str, kwargs: dict[str, Any]) -> None:
    model, optimizer, _ = built(kind, how, **kwargs)
    train(model, optimizer, 0, BEFORE)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=path)  # pyright: ignore[reportPrivateImportUsage]


def load(kind: str, how: str | None, path: str, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    # Another seed and noise_scale than in the checkpoint, which has to override them.
    model, optimizer, keeper = built(kind, how, **{**kwargs, "seed": 1, "noise_scale": 3.0})
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=path)  # pyright: ignore[reportPrivateImportUsage]
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    train(model, optimizer, BEFORE, AFTER)
    return gathered(model, keeper)


@pytest.mark.parametrize("normalization", ["delayed", "exact"])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_on_3_continues_on_2_and_on_1(
    pool: Pool, tmp_path: Path, kind: str, normalization: str
) -> None:
    kwargs = {"normalization": normalization}
    expected = uninterrupted(kind, **kwargs)
    pool(3, save, kind, "fsdp", str(tmp_path), kwargs)
    for world_size, how in [(2, "fsdp"), (1, None), (4, "hsdp")]:
        for tensors in pool(world_size, load, kind, how, str(tmp_path), kwargs):
            assert_close(tensors, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_on_1_continues_on_3(pool: Pool, tmp_path: Path, kind: str) -> None:
    expected = uninterrupted(kind)
    pool(1, save, kind, None, str(tmp_path), {})
    for tensors in pool(3, load, kind, "fsdp", str(tmp_path), {}):
        assert_close(tensors, expected)


def plain_state(kind: str) -> dict[str, Any]:
    model, optimizer, _ = built(kind, None)
    train(model, optimizer, 0, BEFORE)
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def load_plain(kind: str, how: str, state: dict[str, Any]) -> dict[str, Tensor]:
    model = small_model()
    model.load_state_dict(state["model"])
    model = shard(model, how)
    optimizer, keeper = optimizer_of(kind, model)
    if kind == "attached":  # torch's load_state_dict cannot shard the state of torch's AdamW
        keeper.load_state_dict(state["optimizer"]["pats"])
    else:
        optimizer.load_state_dict(state["optimizer"])
    return gathered(model, keeper)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("world_size", "how"), [(3, "fsdp"), (4, "hsdp")])
def test_a_plain_state_dict_loads_into_a_sharded_run(
    pool: Pool, kind: str, world_size: int, how: str
) -> None:
    model, optimizer, keeper = built(kind, None)
    train(model, optimizer, 0, BEFORE)
    expected = gathered(model, keeper)
    for tensors in pool(world_size, load_plain, kind, how, plain_state(kind)):
        assert tensors.keys() == expected.keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, expected[name]), name


def load_full(kind: str, broadcast: bool) -> dict[str, Tensor]:
    """All tensors whole, on every process or on the first alone."""
    model, optimizer, keeper = built(kind, "fsdp")
    train(model, optimizer, 0, BEFORE)
    options = StateDictOptions(full_state_dict=True, cpu_offload=broadcast)
    model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
    model, optimizer, keeper = built(kind, "fsdp")
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
    set_model_state_dict(model, model_state, options=options)
    set_optimizer_state_dict(model, optimizer, optimizer_state, options=options)
    train(model, optimizer, BEFORE, AFTER)
    return gathered(model, keeper)


@pytest.mark.parametrize("broadcast", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_full_state_dicts(pool: Pool, kind: str, broadcast: bool) -> None:
    expected = uninterrupted(kind)
    for tensors in pool(2, load_full, kind, broadcast):
        assert_close(tensors, expected)


def reload_sharded(kind: str, reverse: bool) -> str | None:
    """What a second optimizer says to the state of a first one of another order."""
    model = shard(small_model(), "fsdp")
    params = list(model.parameters())
    optimizers: list[torch.optim.Optimizer] = []
    for own in (params, params[::-1] if reverse else params):
        if kind == "attached":
            optimizers.append(torch.optim.AdamW(own, lr=1e-2))
            PATS(optimizers[-1], **NOISE)
        else:
            optimizers.append(PATSAdamW(own, lr=1e-2, sensitivity=kind, **NOISE))
    train(model, optimizers[0], 0, BEFORE)
    state = get_optimizer_state_dict(model, optimizers[0])
    try:
        set_optimizer_state_dict(model, optimizers[1], state)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("kind", KINDS)
def test_another_order_is_refused(pool: Pool, kind: str) -> None:
    assert pool(2, reload_sharded, kind, False) == [None, None]
    for message in pool(2, reload_sharded, kind, True):
        assert message is not None
        assert "another order" in message


def test_another_order_by_name() -> None:
    model = small_model()
    named = list(model.named_parameters())
    optimizer = PATSAdamW(named, **NOISE)
    train(model, optimizer, 0, 1)
    other = PATSAdamW([named[0], named[2], named[1], *named[3:]], **NOISE)
    with pytest.raises(ValueError, match=r"first\.bias: another order"):
        other.load_state_dict(optimizer.state_dict())
    wrapped = PATSAdamW([(f"module.{name}", param) for name, param in named], **NOISE)
    wrapped.load_state_dict(optimizer.state_dict())


def resume_from_own_dict(kind: str) -> dict[str, Tensor]:
    model, optimizer, keeper = built(kind, "fsdp")
    train(model, optimizer, 0, BEFORE)
    state = optimizer.state_dict()
    optimizer, keeper = optimizer_of(kind, model, seed=3)
    optimizer.load_state_dict(state)
    train(model, optimizer, BEFORE, AFTER)
    return gathered(model, keeper)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sharded_optimizers_own_dictionary(pool: Pool, kind: str) -> None:
    expected = uninterrupted(kind)
    for tensors in pool(3, resume_from_own_dict, kind):
        assert_close(tensors, expected)
