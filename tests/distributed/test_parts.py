"""Plain tensors that are parts of a model: replicas draw the same noise, parts never do."""

import copy
import warnings
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from processes import Pool
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import ShardingStrategy, StateDictType
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer

from pats_kernels import PATS, PATSAdamW, parts
from pats_kernels.reference import philox_normal

SEED = 11
# Every gate is open and AdamW moves nothing, so what a step changes is noise.
NOISE: dict[str, Any] = {"noise_scale": 1e-3, "gamma": 0.0, "normalization": "exact", "seed": SEED}
STILL: dict[str, Any] = {"lr": 0.0, "weight_decay": 0.0}


def optimizer_of(kind: str, params: Any, **changes: Any) -> Optimizer:
    settings = STILL | NOISE | changes
    if kind != "attached":
        return PATSAdamW(params, **settings)
    own = {name: settings.pop(name) for name in STILL}
    optimizer = AdamW(params, **own)
    PATS(optimizer, **settings)
    return optimizer


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return nn.Sequential(
            nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 63), nn.LayerNorm(63), nn.Linear(63, 5)
        )


def backward(model: nn.Module, step: int, rank: int | None = None) -> None:
    """Gradients of a batch of the step's; with a rank, of that process's own."""
    random = torch.Generator().manual_seed(100 * step + (0 if rank is None else rank))
    model(torch.randn(8, 16, generator=random)).square().mean().backward()


def told(function: Callable[[], Any]) -> tuple[Any, list[str]]:
    """A function's result, and what PATS warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function()
    return result, [str(w.message) for w in caught if "PATS" in str(w.message)]


def signs(tensors: list[Tensor], before: list[Tensor]) -> list[Tensor]:
    return [(a.detach() - b.detach()).sign().flatten() for a, b in zip(tensors, before, strict=True)]


def agreement(one: Tensor, other: Tensor) -> float:
    size = min(len(one), len(other))
    return (one[:size] == other[:size]).double().mean().item()


def independent(count: int) -> Any:
    """Half of `count` independent signs agree, with a standard deviation of 0.5 / sqrt(count): 5 of them."""
    return pytest.approx(0.5, abs=2.5 / count**0.5)


# DistributedDataParallel: replicas.


def ddp(kind: str) -> tuple[list[Tensor], list[str]]:
    model = network()
    nn.init.zeros_(model[4].weight)  # as LoRA's B: equal values do not show that these are replicas
    optimizer = optimizer_of(kind, model.parameters(), lr=1e-3)
    wrapped = DistributedDataParallel(model)

    def steps() -> None:
        for step in range(3):
            backward(wrapped, step, dist.get_rank())
            optimizer.step()
            optimizer.zero_grad()

    _, messages = told(steps)
    return [p.detach().clone() for p in model.parameters()], messages


@pytest.mark.parametrize("kind", ["fused", "attached"])
def test_replicas_need_no_word(pool: Pool, kind: str) -> None:
    (one, quiet), (two, also_quiet) = pool(2, ddp, kind)
    assert quiet == also_quiet == []
    assert all(map(torch.equal, one, two))


# Tensor parallelism by hand, as Megatron has it: parts and replicas in one optimizer.


def tensor_parallel(kind: str, names: bool) -> tuple[list[Tensor], list[str]]:
    """`split` and `zero` are this process's parts, the second all zeros, `norm` is everybody's."""
    rank = dist.get_rank()
    own, same = (torch.Generator().manual_seed(seed) for seed in (50 + rank, 7))
    params = {
        "split": nn.Parameter(torch.randn(40, 50, generator=own)),
        "zero": nn.Parameter(torch.zeros(2000)),
        "norm": nn.Parameter(torch.ones(2000)),
    }
    for name, param in params.items():
        param.grad = torch.randn(param.shape, generator=same if name == "norm" else own)
    before = [p.detach().clone() for p in params.values()]
    with torch.no_grad():
        params["zero"][0] = 0.0
    # A tensor of zeros has no sensitivity and no mean. It gets noise in a second step, after AdamW moved it.
    optimizer = optimizer_of(kind, params.items() if names else params.values(), lr=1e-4)

    def steps() -> None:
        for _ in range(2):
            optimizer.step()

    _, messages = told(steps)
    assert before[1].count_nonzero() == 0
    return signs(list(params.values()), before), messages


def flat_norms(kind: str) -> Tensor:
    """A flat part of new layer norms and biases: ones and zeros, the same for each process."""
    param = nn.Parameter(torch.cat((torch.ones(2000), torch.zeros(2000))))
    param.grad = torch.randn(4000, generator=torch.Generator().manual_seed(dist.get_rank()))
    before = param.detach().clone()
    optimizer = optimizer_of(kind, [param], lr=1e-4)
    told(lambda: [optimizer.step() for _ in range(2)])
    return signs([param], [before])[0][:2000]


@pytest.mark.parametrize("kind", ["fused", "attached"])
def test_parts_of_a_few_values(pool: Pool, kind: str) -> None:
    one, two = pool(2, flat_norms, kind)
    assert agreement(one, two) == independent(2000)


@pytest.mark.parametrize("kind", ["fused", "attached"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_parts_draw_their_own_noise_and_replicas_the_same(pool: Pool, kind: str, world_size: int) -> None:
    results = pool(world_size, tensor_parallel, kind, world_size == 2)
    for i in range(world_size):
        for j in range(i):
            one, two = results[i][0], results[j][0]
            assert agreement(one[0], two[0]) == independent(2000)
            assert torch.equal(one[2], two[2])
    # Rank 0 warns, and the first rank that is no replica of it.
    assert [len(messages) for _, messages in results] == [1, 1] + [0] * (world_size - 2)
    assert "hold different tensors at the same place" in results[0][1][0]


def zero_parts(rank_differs: bool) -> list[Tensor]:
    """A tensor that begins with zeros everywhere; its gradient is this process's own, or everybody's."""
    param = nn.Parameter(torch.zeros(2000))
    random = torch.Generator().manual_seed(dist.get_rank() if rank_differs else 0)
    optimizer = PATSAdamW([param], lr=1e-3, **NOISE | {"noise_scale": 1.0})
    for _ in range(4):
        param.grad = torch.randn(2000, generator=random)
        optimizer.step()
    return [param.detach().sign()]


def test_zeros_are_told_apart_by_their_gradients(pool: Pool) -> None:
    (one,), (two,) = pool(2, zero_parts, True)
    assert agreement(one, two) == independent(2000)
    (one,), (two,) = pool(2, zero_parts, False)
    assert torch.equal(one, two)


def one_trains() -> tuple[float, list[str], list[Tensor], list[str]]:
    """Rank 1 takes steps of its own: it asks rank 0, which says nothing, and goes on. Then both train."""
    moved, messages = 0.0, list[str]()
    if dist.get_rank() == 1:
        param = nn.Parameter(torch.ones(10))
        param.grad = torch.ones(10)
        optimizer = PATSAdamW([param], **NOISE)
        with patch.object(parts, "PATIENCE", 0.2):
            _, messages = told(optimizer.step)
        moved = float(param.detach().sub(1).abs().max())
    return moved, messages, *ddp("fused")


def test_a_process_that_trains_alone_goes_on(pool: Pool) -> None:
    """And what it has said does not get in the way of what both say later."""
    (_, _, one, quiet), (moved, messages, two, also_quiet) = pool(2, one_trains)
    assert moved > 0
    assert len(messages) == 1
    assert [m for m in (*quiet, *also_quiet) if "hold different" in m] == []
    assert all(map(torch.equal, one, two))


# torch's ZeroRedundancyOptimizer.


def zero(kind: str, changes: dict[str, Any]) -> tuple[list[Tensor], list[str]]:
    """Three steps, a checkpoint, two more; or the same, resumed by another optimizer after three."""
    settings = STILL | NOISE | {"lr": 1e-3} | changes

    def made(model: nn.Module) -> Any:
        named = list(model.parameters())
        if kind == "inside":
            return ZeroRedundancyOptimizer(named, optimizer_class=PATSAdamW, **settings)
        own = {name: settings[name] for name in STILL}
        optimizer = ZeroRedundancyOptimizer(named, optimizer_class=AdamW, **own)
        PATS(optimizer, **{name: value for name, value in settings.items() if name not in STILL})
        return optimizer

    def steps(model: nn.Module, optimizer: Any, *numbers: int) -> None:
        for step in numbers:
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()

    def run() -> list[Tensor]:
        model = network()
        optimizer = made(model)
        steps(model, optimizer, 1, 2, 3)
        saved: list[Any] = [None]
        optimizer.consolidate_state_dict(to=0)
        if dist.get_rank() == 0:
            saved = [copy.deepcopy(optimizer.state_dict())]
        dist.broadcast_object_list(saved)
        weights = copy.deepcopy(model.state_dict())
        steps(model, optimizer, 4, 5)

        other = network()
        other.load_state_dict(weights)
        resumed = made(other)
        resumed.load_state_dict(saved[0])
        steps(other, resumed, 4, 5)
        assert all(map(torch.equal, model.parameters(), other.parameters()))
        return [p.detach().clone() for p in model.parameters()]

    tensors, messages = told(run)
    return tensors, [message for message in messages if "hold different" in message]


@pytest.mark.parametrize("kind", ["inside", "outside"])
@pytest.mark.parametrize("changes", [{}, {"normalization": "delayed"}])
def test_zero_redundancy_optimizer_is_one_process(pool: Pool, kind: str, changes: dict[str, Any]) -> None:
    """Inside it the positions are those that it knows; PATS on it sees all tensors. Both resume exactly."""
    model = network()
    optimizer = optimizer_of(
        "fused" if kind == "inside" else "attached", model.parameters(), lr=1e-3, **changes
    )
    for step in (1, 2, 3, 4, 5):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    for tensors, messages in pool(2, zero, kind, changes):
        assert messages == []
        assert all(map(torch.equal, tensors, model.parameters()))


# FSDP1.


def wrapped_by_fsdp(
    use_orig_params: bool, how: str = "FULL_SHARD", sharded: bool = False
) -> tuple[Any, nn.Module]:
    model = network()
    wrapped = FSDP(
        model,
        use_orig_params=use_orig_params,
        sharding_strategy=ShardingStrategy[how],
        device_id=torch.device("cpu"),
    )
    if sharded:
        FSDP.set_state_dict_type(wrapped, StateDictType.SHARDED_STATE_DICT)
    return wrapped, model


def fsdp(kind: str, use_orig_params: bool, how: str) -> tuple[list[Tensor], list[Tensor], list[str]]:
    """Signs of the whole tensors' noise, and what this process's parts are of the flat tensor."""
    wrapped, model = wrapped_by_fsdp(use_orig_params, how)
    optimizer = optimizer_of(kind, wrapped.parameters())
    backward(wrapped, 1)
    local = [p.detach().clone() for p in wrapped.parameters()]
    _, messages = told(optimizer.step)
    moved = signs(list(wrapped.parameters()), local)
    with FSDP.summon_full_params(wrapped):
        return signs(list(model.parameters()), list(network().parameters())), moved, messages


@pytest.mark.parametrize("kind", ["fused", "attached"])
@pytest.mark.parametrize("how", ["FULL_SHARD", "NO_SHARD"])
def test_fsdp1_with_original_parameters_draws_one_process_s_noise(pool: Pool, kind: str, how: str) -> None:
    expected = [
        philox_normal(SEED, 1, i, p.numel()).sign().float() for i, p in enumerate(network().parameters())
    ]
    # A tensor of zeros has no sensitivity, so no mean to normalize by, and gets no noise.
    zero_weights = [p.detach().flatten() == 0 for p in network().parameters()]
    for whole, _, messages in pool(2, fsdp, kind, True, how):
        assert len(messages) == 1
        assert "FullyShardedDataParallel" in messages[0]
        for moved, sign, silent in zip(whole, expected, zero_weights, strict=True):
            # All but those whose noise is lost in rounding.
            assert silent.all() or agreement(moved[~silent], sign[~silent]) > 0.98


@pytest.mark.parametrize("kind", ["fused", "attached"])
def test_fsdp1_s_flat_parts_draw_noise_by_their_place(pool: Pool, kind: str) -> None:
    (_, (first,), messages), (_, (second,), _) = pool(2, fsdp, kind, False, "FULL_SHARD")
    assert len(messages) == 1
    size = len(first)
    drawn = philox_normal(SEED, 1, 0, 2 * size).sign().float()
    for moved, sign in ((first, drawn[:size]), (second, drawn[size:])):
        stepped = moved != 0  # all but those whose noise is lost in rounding
        assert stepped.double().mean() > 0.9
        assert agreement(moved[stepped], sign[stepped]) > 0.99
    assert agreement(first, second) == independent(size)


def fsdp_checkpoint(kind: str, use_orig_params: bool) -> float:
    """Saves, loads and goes on: how far the resumed run is from the other."""

    def made() -> tuple[Any, Any]:
        wrapped, _ = wrapped_by_fsdp(use_orig_params, sharded=use_orig_params)
        return wrapped, optimizer_of(kind, wrapped.parameters(), lr=1e-3, normalization="delayed")

    def steps(wrapped: Any, optimizer: Any, *numbers: int) -> None:
        for step in numbers:
            backward(wrapped, step, dist.get_rank())
            optimizer.step()
            optimizer.zero_grad()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FSDP1's own and ours
        wrapped, optimizer = made()
        steps(wrapped, optimizer, 1, 2, 3)
        saved = copy.deepcopy(FSDP.optim_state_dict(wrapped, optimizer))
        weights = copy.deepcopy(wrapped.state_dict())
        before = {key: dict(entry) for key, entry in enumerate(optimizer.state.values())}
        assert before
        steps(wrapped, optimizer, 4, 5, 6)
        other, resumed = made()
        other.load_state_dict(weights)
        resumed.load_state_dict(FSDP.optim_state_dict_to_load(other, resumed, saved))
        steps(other, resumed, 4, 5, 6)
        with FSDP.summon_full_params(wrapped), FSDP.summon_full_params(other):
            pairs = zip(wrapped.parameters(), other.parameters(), strict=True)
            return max(float((a - b).abs().max()) for a, b in pairs)


@pytest.mark.parametrize("kind", ["fused", "attached"])
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp1_s_optim_state_dict(pool: Pool, kind: str, use_orig_params: bool) -> None:
    """The means are computed anew, with a sum in another order: noise of 1e-3 differs in its last bits, and
    weights of 1 by a rounding, 1.2e-7, of which there are three steps.

    Whole state_dicts of original parameters on a CPU are wrong in torch 2.13, with AdamW alone too, as one
    buffer serves all entries: sharded ones are used.
    """
    for distance in pool(2, fsdp_checkpoint, kind, use_orig_params):
        assert distance <= 3 * 2**-23
