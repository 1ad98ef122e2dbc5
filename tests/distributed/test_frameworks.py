"""What frameworks do around a step, on several processes: PATS goes on as on one.

Tolerances as in test_sharded: other sums, in another order, and nothing else; elsewhere a comment says why.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from processes import Pool
from small_model import SmallModel, gather, loss_of, small_model, whole
from test_sharded import NOISE, assert_close, optimizer_of
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from pats_kernels import PATS, PATSAdamW
from pats_kernels.replicas import check_replicas, watch_replicas

STEPS = 4
BOTH = ["attached", "ema"]


@dataclass(frozen=True)
class Case:
    """What is done around the steps, and with what optimizer."""

    kind: str = "ema"
    kwargs: dict[str, Any] = field(default_factory=dict)
    accumulate: int = 1
    clip: float | None = None
    offload: bool = False
    scales: tuple[float, ...] = ()  # noise_scale of each step; 0: no noise
    frozen: bool = False  # freezes a parameter and adds a layer that is never used
    added: int | None = None  # before this step the last two parameters join, in a group of their own
    scaler: bool = False
    poison: int | None = None  # in this step one element of a gradient is infinite, on one shard


def spread(model: SmallModel, how: str | None, case: Case) -> Any:
    if how == "ddp":
        return DistributedDataParallel(model, find_unused_parameters=case.frozen)
    if how is not None:
        size = dist.get_world_size()
        shape = {"fsdp": (size,), "hsdp": (2, size // 2)}[how]
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        policy: Any = {"offload_policy": CPUOffloadPolicy(pin_memory=False)} if case.offload else {}
        for module in (model.first, model.second, model):
            fully_shard(module, mesh=mesh, **policy)
    return model


@contextmanager
def unsynchronized(model: Any, really: bool) -> Iterator[None]:
    """Gradients stay this process's, as for all but the last of the accumulated batches."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(not really)
        yield
        return
    with model.no_sync() if really and isinstance(model, DistributedDataParallel) else nullcontext():
        yield


def poison(model: SmallModel) -> None:
    """An element of the last row, which is in the last shard, or in its replicas."""
    grad: Any = model.embedding.weight.grad
    if isinstance(grad, DTensor):
        mesh = grad.device_mesh
        if mesh.get_local_rank(mesh.ndim - 1) == mesh.size(mesh.ndim - 1) - 1:
            grad._local_tensor[-1, 2] = torch.inf
    else:
        grad[-1, 2] = torch.inf


def run(case: Case, how: str | None) -> dict[str, Tensor]:
    model = small_model()
    if case.frozen:
        model.second.bias.requires_grad_(False)
        model.unused = nn.Linear(3, 2)
        for param in model.unused.parameters():
            nn.init.ones_(param)
    wrapped = spread(model, how, case)
    optimizer: Any
    if case.kind == "attached, fused":  # GradScaler leaves unscaling to it
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        keeper: Any = PATS(optimizer, **NOISE, **case.kwargs)
    else:
        optimizer, keeper = optimizer_of(case.kind, model, **case.kwargs)
    group: dict[str, Any] = optimizer.param_groups[0]
    held_back = [group["params"].pop() for _ in range(2)] if case.added is not None else []
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=case.scaler)
    # With bfloat16 autocast every process takes the whole batch: sums of parts would differ by its roundings.
    part = (dist.get_rank(), dist.get_world_size()) if how and not case.scaler else (0, 1)
    for step in range(STEPS):
        if step == case.added:
            optimizer.add_param_group({"params": held_back, "lr": 3e-2, "gamma": 0.5})
        if case.scales:
            group["noise_scale"] = case.scales[step]
        for i in range(case.accumulate):
            with (
                unsynchronized(wrapped, i + 1 < case.accumulate),
                torch.autocast("cpu", torch.bfloat16, enabled=case.scaler),
            ):
                loss = loss_of(wrapped, case.accumulate * step + i, *part)
                scaler.scale(loss / case.accumulate).backward()
        if case.clip is not None:
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), case.clip)
            assert float(whole(norm)) > case.clip
        if step == case.poison:
            poison(model)
            with unchanged(model, optimizer, keeper):
                scaler.step(optimizer)
        else:
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    keeper.state_dict()  # waits for the means
    assert scaler.get_scale() == (1.0 if not case.scaler else 2.0 ** (12 - (case.poison is not None)))
    if how is not None:
        check_replicas(keeper)
    return gather(model, *([optimizer.state] if keeper is optimizer else [optimizer.state, keeper.state]))


@contextmanager
def unchanged(model: SmallModel, optimizer: Any, keeper: Any) -> Iterator[None]:
    states = [optimizer.state] if keeper is optimizer else [optimizer.state, keeper.state]
    keeper.state_dict()
    before = gather(model, *states)
    yield
    keeper.state_dict()
    after = gather(model, *states)
    for name, tensor in after.items():  # a skipped step may allocate the state, but only as zeros
        assert torch.equal(before.get(name, torch.zeros_like(tensor)), tensor), name


EXACT = {"normalization": "exact"}
CASES = {
    "accumulation": (Case(accumulate=2), ["ddp", "fsdp", "hsdp"]),
    "accumulation, attached, exact": (Case("attached", EXACT, accumulate=3), ["ddp", "fsdp"]),
    "clipping": (Case(clip=0.05), ["ddp", "fsdp", "hsdp"]),
    "clipping, attached": (Case("attached", clip=0.05, accumulate=2), ["fsdp"]),
    "CPU offload": (Case(offload=True), ["fsdp"]),
    "CPU offload, attached, exact": (Case("attached", EXACT, offload=True), ["fsdp"]),
    "frozen and unused": (Case(frozen=True), ["ddp", "fsdp"]),
    "frozen and unused, attached": (Case("attached", frozen=True), ["fsdp"]),
    "added group": (Case(added=2), ["fsdp"]),
    "added group, attached, exact": (Case("attached", EXACT, added=2), ["fsdp"]),
    "a schedule": (Case(scales=(1e-2, 3e-2, 2e-2, 1e-3)), ["fsdp"]),
    "switched on late": (Case(scales=(0.0, 0.0, 1e-2, 3e-2)), ["fsdp"]),
    "switched on late, attached": (Case("attached", scales=(0.0, 1e-2, 1e-2, 3e-2)), ["fsdp"]),
    "switched off and on, moments": (Case("moments", scales=(1e-2, 1e-2, 0.0, 1e-2)), ["fsdp"]),
    "none": (Case("attached", {"uncertainty": "none"}), ["fsdp", "hsdp"]),
    "none, exact": (Case(kwargs={"uncertainty": "none", **EXACT}), ["fsdp"]),
    "ucb": (Case(kwargs={"uncertainty": "ucb"}), ["fsdp", "hsdp"]),
    "ucb, exact": (Case("attached", {"uncertainty": "ucb", **EXACT}), ["fsdp"]),
    "eager": (Case(kwargs={"backend": "eager"}), ["fsdp", "hsdp"]),
    "eager, attached, exact": (Case("attached", {"backend": "eager", **EXACT}), ["fsdp"]),
    "eager, moments": (Case("moments", {"backend": "eager"}), ["fsdp"]),
    "autocast": (Case(scaler=True, clip=0.05), ["ddp", "fsdp"]),
    "autocast, attached, exact": (Case("attached", EXACT, scaler=True), ["fsdp"]),
    "skipped step": (Case(scaler=True, poison=2), ["fsdp", "hsdp"]),
    "skipped step, exact": (Case(kwargs=EXACT, scaler=True, poison=2), ["fsdp"]),
    "skipped first step, moments": (Case("moments", scaler=True, poison=0), ["fsdp"]),
    "skipped step, attached": (Case("attached", scaler=True, poison=2), ["fsdp"]),
    "skipped step, fused": (Case("attached, fused", scaler=True, poison=2), ["fsdp"]),
    "skipped step, fused, exact": (Case("attached, fused", EXACT, scaler=True, poison=2), ["fsdp"]),
}


@pytest.mark.parametrize("name", CASES)
def test_is_one_process(pool: Pool, name: str) -> None:
    case, hows = CASES[name]
    expected = run(case, None)
    for how in hows:
        for world_size in (4,) if how == "hsdp" or "backend" in case.kwargs else (3,):
            for tensors in pool(world_size, run, case, how):
                assert_close(tensors, expected)


# Mixed precision and low precision.


def mixed(kind: str, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    model = small_model()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in (model.first, model.second, model):
        fully_shard(module, mp_policy=policy)
    optimizer, keeper = optimizer_of(kind, model, **kwargs)
    for step in range(STEPS):
        loss_of(model, step).backward()
        params: list[Any] = list(model.parameters())
        assert all(param.grad.dtype == param.dtype == torch.float32 for param in params)
        optimizer.step()
        optimizer.zero_grad()
    keeper.state_dict()
    return gather(model, keeper.state)


@pytest.mark.parametrize("kind", BOTH)
def test_mixed_precision_policy(pool: Pool, kind: str) -> None:
    """Equal batches, as sums of bfloat16's roundings differ by more; a mesh of one process shards nothing."""
    (expected,) = pool(1, mixed, kind, {})
    for tensors in pool(3, mixed, kind, {}):
        assert_close(tensors, expected)


SHAPES = [(7, 5), (33,), (3, 4, 5), (13, 22)]
PLACEMENTS: dict[str, tuple[tuple[int, ...], list[Placement]]] = {  # mesh and placements, on 4 processes
    "rows": ((4,), [Shard(0)]),
    "hybrid": ((2, 2), [Replicate(), Shard(0)]),
    "both": ((2, 2), [Shard(0), Shard(0)]),
    "last": ((4,), [Shard(-1)]),
    "two meshes": ((2, 1, 2), [Replicate(), Shard(0)]),  # of two processes each, with the same tensors
}


def rounded(kind: str, steps: int, placing: str | None, normalization: str) -> list[Tensor]:
    """bfloat16 parameters and averages after steps with given gradients."""
    random = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=random).to(torch.bfloat16) for shape in SHAPES]
    grads = [[torch.randn(s, generator=random).to(torch.bfloat16) for s in SHAPES] for _ in range(steps)]
    shape, placements = PLACEMENTS[placing or "rows"]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=tuple("abc")[: len(shape)]) if placing else None
    if mesh is not None and placing == "two meshes":
        mesh = mesh["b", "c"]

    def placed(value: Tensor) -> Tensor:
        if mesh is None:
            return value.clone()
        dims = [Shard(value.ndim - 1) if p == Shard(-1) else p for p in placements]
        return distribute_tensor(value, mesh, dims)

    params = [nn.Parameter(placed(value)) for value in values]
    kwargs: dict[str, Any] = {**NOISE, "normalization": normalization}
    if kind == "attached":
        optimizer: Any = torch.optim.SGD(params, lr=0.0)
        keeper: Any = PATS(optimizer, **kwargs)
    else:
        optimizer = keeper = PATSAdamW(params, lr=1e-2, sensitivity=kind, **kwargs)
    for step in range(steps):
        for param, grad in zip(params, grads[step], strict=True):
            param.grad = placed(grad)
        optimizer.step()
    keeper.state_dict()
    averages = [keeper.state[p][k] for p in params for k in sorted(keeper.state[p]) if k.startswith("exp")]
    return [whole(tensor) for tensor in (*params, *averages)]


@pytest.mark.parametrize("placing", PLACEMENTS)
@pytest.mark.parametrize("kind", [*BOTH, "moments"])
def test_stochastic_rounding_is_the_wholes(pool: Pool, kind: str, placing: str) -> None:
    """The first delayed step has no means in it: equal to the bit. Later, float32 values differ by 1e-7 or so
    of themselves, which takes a bfloat16, of 2^-8, across its random threshold once in some 2^15 writes."""
    for steps, normalization in ((1, "delayed"), (4, "delayed"), (4, "exact")):
        expected = rounded(kind, steps, None, normalization)
        for tensors in pool(4, rounded, kind, steps, placing, normalization):
            different = sum(int((a != b).sum()) for a, b in zip(tensors, expected, strict=True))
            assert all(tensor.dtype == torch.bfloat16 for tensor in tensors)
            assert different <= (0 if steps == 1 else 4)
            for tensor, other in zip(tensors, expected, strict=True):
                torch.testing.assert_close(tensor, other, rtol=2**-6, atol=1e-6)


# Tensor parallel.


def tensor_parallel(model: SmallModel) -> SmallModel:
    """Embedding by vocabulary, norm over the sequence: gradients laid out otherwise than their parameters."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("model",))
    plan = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "first": ColwiseParallel(input_layouts=Shard(1)),
        "second": RowwiseParallel(output_layouts=Shard(1)),
        "norm": SequenceParallel(),
    }
    parallelize_module(model, mesh, plan)
    output = PrepareModuleOutput(output_layouts=Shard(1), desired_output_layouts=Replicate())
    parallelize_module(model, mesh, output)
    return model


def sequence_parallel(kind: str | None, kwargs: dict[str, Any]) -> tuple[dict[str, Tensor], set[str]]:
    model = small_model(12)
    if dist.is_initialized():
        tensor_parallel(model)
    optimizer, keeper = optimizer_of(kind, model, **kwargs)
    seen: set[str] = set()
    for step in range(STEPS):
        loss_of(model, step).backward()
        params: list[Any] = list(model.parameters())
        for param in params:
            if isinstance(param.grad, DTensor) and param.grad.placements != param.placements:
                seen |= {type(p).__name__ for p in param.grad.placements}
        optimizer.step()
        optimizer.zero_grad()
    keeper.state_dict()
    return gather(model, *([optimizer.state] if keeper is optimizer else [keeper.state])), seen


@pytest.mark.parametrize(("kind", "normalization"), [("ema", "delayed"), ("ema", "exact")])
def test_gradients_of_other_placements(pool: Pool, kind: str, normalization: str) -> None:
    kwargs = {"normalization": normalization}
    expected, _ = sequence_parallel(kind, kwargs)
    for tensors, seen in pool(2, sequence_parallel, kind, kwargs):
        assert_close(tensors, expected)
        assert any("Partial" in name for name in seen), seen


# What cannot work.


def refused(what: str, kind: str) -> str:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    part = torch.ones(2, 3)
    if what == "placement":
        param = nn.Parameter(DTensor.from_local(part, mesh, [Partial()], run_check=False))
        param.grad = torch.ones_like(param)
    elif what == "plain gradient":
        param = nn.Parameter(DTensor.from_local(part, mesh, [Shard(0)]))
        param.grad = torch.ones(4, 3)
    else:
        param = nn.Parameter(torch.ones(4, 3))
        param.grad = DTensor.from_local(part, mesh, [Shard(0)])
    named = [("w", param)]
    optimizer: Any = torch.optim.SGD(named, lr=0.1) if kind == "attached" else PATSAdamW(named)
    keeper = PATS(optimizer) if kind == "attached" else optimizer
    try:
        optimizer.step()
    except ValueError as error:
        held: Tensor = getattr(param, "_local_tensor", param)
        assert bool((held == 1).all())  # nothing was touched
        return str(error)
    return f"took it, with {keeper.state}"


REFUSALS = {
    "placement": "w: PATS supports replicated and sharded parameters, but a placement is Partial(sum)",
    "plain gradient": "w: the parameter is a DTensor, its gradient a plain tensor",
    "sharded gradient": "w: the parameter is a plain tensor, its gradient a DTensor",
}


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("what", REFUSALS)
def test_what_cannot_work_is_named(pool: Pool, what: str, kind: str) -> None:
    assert pool(2, refused, what, kind) == [REFUSALS[what]] * 2


# Messages.


class Witnessed:
    """A message under way that notes, in the step that it happens in, that somebody waits for it."""

    def __init__(self, work: Any, steps: list[list[str]]) -> None:
        self.work, self.steps = work, steps

    def wait(self) -> Any:
        self.steps[-1].append("wait")
        return self.work.wait()


def messages(kind: str, normalization: str, how: str) -> list[list[str]]:
    """What happens in each step of ours, and in `state_dict` after the last."""
    model = small_model()
    spread(model, how, Case())
    optimizer, keeper = optimizer_of(kind, model, normalization=normalization)
    steps: list[list[str]] = []
    original = dist.all_reduce

    def all_reduce(tensor: Tensor, *args: Any, async_op: bool = False, **kwargs: Any) -> Any:
        steps[-1].append(f"{'send' if async_op else 'blocking'} {tuple(tensor.shape)}")
        return Witnessed(original(tensor, *args, async_op=async_op, **kwargs), steps)

    for step in range(3):
        loss_of(model, step).backward()
        steps.append([])
        with patch.object(dist, "all_reduce", all_reduce):
            optimizer.step()
        optimizer.zero_grad()
    steps.append([])
    keeper.state_dict()
    return steps


@pytest.mark.parametrize("kind", [*BOTH, "moments"])
@pytest.mark.parametrize("how", ["fsdp", "hsdp"])
def test_one_message_a_step(pool: Pool, how: str, kind: str) -> None:
    """Delayed, it is under way until the next step begins."""
    send = f"send ({len(list(small_model().parameters()))}, 2)"
    for steps in pool(4, messages, kind, "delayed", how):
        assert steps == [[send], ["wait", send], ["wait", send], ["wait"]]
    for steps in pool(4, messages, kind, "exact", how):
        assert steps == [[send, "wait"]] * 3 + [[]]


# Replicas.


def replicas(how: str, dtype: torch.dtype, steps: int) -> list[Tensor]:
    model = small_model(dtype=dtype)
    wrapped = spread(model, how, Case())
    optimizer, _ = optimizer_of("ema", model)
    for step in range(steps):
        loss_of(wrapped, step, dist.get_rank(), dist.get_world_size()).backward()
        optimizer.step()
        optimizer.zero_grad()
    check_replicas(optimizer)
    states = [value for state in optimizer.state.values() for value in state.values()]
    return [tensor.detach() for tensor in (*model.parameters(), *states)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replicas_never_drift(pool: Pool, dtype: torch.dtype) -> None:
    first, *others = pool(3, replicas, "ddp", dtype, 20)
    assert first[0].dtype == dtype
    for other in others:
        assert all(map(torch.equal, first, other))


def drifted(how: str, where: str, watch: bool) -> str:
    """What is said of one bit that the last process has otherwise after two steps."""
    model = small_model()
    wrapped = spread(model, how, Case())
    optimizer = PATSAdamW(model.named_parameters(), lr=1e-2, **NOISE)
    for step in range(2):
        loss_of(wrapped, step).backward()
        optimizer.step()
    check_replicas(optimizer)
    if dist.get_rank() == dist.get_world_size() - 1:
        param: Any = model.embedding.weight
        tensor: Any = param if where == "embedding.weight" else optimizer.state[param]["exp_avg_unc"]
        held: Tensor = getattr(tensor, "_local_tensor", tensor).detach()
        # With `watch` a step follows, which would round a change of the last bit away.
        held.view(torch.int32)[-1, -1] ^= 1 << (20 if watch else 0)
    try:
        if watch:
            handle = watch_replicas(optimizer, every=2)
            optimizer.step()
            optimizer.zero_grad()  # no gradients: nothing moves, but the check takes place
            optimizer.step()
            handle.remove()
        else:
            check_replicas(optimizer)
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("how", "where", "watch"),
    [
        ("ddp", "embedding.weight", False),
        ("ddp", "exp_avg_unc of embedding.weight", False),
        ("hsdp", "embedding.weight", False),
        ("hsdp", "exp_avg_unc of embedding.weight", False),
        ("ddp", "embedding.weight", True),
        ("hsdp", "embedding.weight", True),
    ],
)
def test_a_bit_that_is_not_the_same_is_found(pool: Pool, how: str, where: str, watch: bool) -> None:
    """On the processes that have a replica of it: with hybrid sharding, the second and the last of four."""
    said = pool(4, drifted, how, where, watch)
    for rank, message in enumerate(said):
        if how == "hsdp" and rank in (0, 2):
            assert message == ""
        else:
            assert message.startswith(f"replicas have drifted apart: {where} is not the same on all of ")
