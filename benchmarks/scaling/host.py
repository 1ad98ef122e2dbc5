"""Measures the host's work for a step over very many tensors. The process is one rank of 4,096, in a process
group that sends nothing. The tensors have no memory where only their number matters; where a real step runs,
they are small and real.
"""

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from statistics import median
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.common.timing import SCRATCH_BYTES
from benchmarks.scaling.counts import MODELS, STATISTICS_BYTES, sizes, table_bytes
from benchmarks.step.variants import NoOptimizer
from pats_kernels import PATS, PATSAdamW
from pats_kernels.backends.tables import DeviceTables, narrowed
from pats_kernels.backends.triton import chunk_of
from pats_kernels.distributed import Statistics, _layout
from pats_kernels.plan import Planner

WORLD, RANK = 4096, 1234
TRIES = 7
FEW = 10_000  # with fewer tensors, steps are tried more often
SMALL = (8, 8)  # the shape of a real tensor
Shapes = list[tuple[int, ...]]


class Planned(TypedDict):
    """Times for a model's tensors on one rank: seconds for all tensors together, the least of several tries
    except for what happens once. `kept_bytes`: by how much planning made the process grow."""

    model: str
    params: int
    tensors: int
    state_s: float
    first_layout_s: float
    first_plan_s: float
    first_upload_s: float
    gather_s: float
    layout_s: float
    plan_s: float
    upload_s: float
    step_s: float
    kept_bytes: int
    table_bytes: int
    message_bytes: int


class Stepped(TypedDict):
    """Real steps on the CPU, in microseconds per tensor: with the gradient tensors of the step before, with
    new ones, as after `zero_grad`, and with those of the step before from cold caches."""

    optimizer: str
    tensors: int
    plain_us: float
    plain_new_us: float
    plain_cold_us: float
    sharded_us: float
    sharded_new_us: float
    sharded_cold_us: float


class Strided(TypedDict):
    """Real steps on one big shard with one thread, in nanoseconds per element."""

    shape: list[int]
    rows_ns: float
    columns_ns: float


def deepseek_v3() -> Shapes:
    """671 B parameters; the 256 experts in 58 of 61 layers are unstacked: three matrices each."""
    hidden, expert, ffn, heads, vocabulary = 7168, 2048, 18432, 128, 129280
    mlp = lambda width: [(width, hidden), (width, hidden), (hidden, width)]  # noqa: E731
    attention = [(1536, hidden), (1536,), (heads * 192, 1536), (576, hidden), (512,), (heads * 256, 512)]
    attention += [(hidden, heads * 128), (hidden,), (hidden,)]
    dense = [*attention, *mlp(ffn)]
    sparse = [*attention, (256, hidden), *mlp(expert) * 257]
    return [(vocabulary, hidden), *dense * 3, *sparse * 58, (hidden,), (vocabulary, hidden)]


def many(count: int) -> Shapes:
    return [(2048, 7168)] * count


def join_nobody() -> DeviceMesh:
    dist.init_process_group("fake", rank=RANK, world_size=WORLD, store=FakeStore())
    return init_device_mesh("cpu", (WORLD,))


def sharded(shape: tuple[int, ...], mesh: DeviceMesh, device: str) -> DTensor:
    """A DTensor as `fully_shard` makes it."""
    layout = _layout(shape, tuple(mesh.shape), tuple(mesh.get_coordinate() or ()), (Shard(0),))
    stride = torch.empty(shape, device="meta").stride()
    local = torch.zeros(sizes(layout), device=device)
    return DTensor.from_local(
        local, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride
    )


def least(run: Callable[[], Any], tries: int = TRIES) -> float:
    return min(once(run)[0] for _ in range(tries))


def once(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def planned(name: str, shapes: Shapes, mesh: DeviceMesh) -> Planned:
    """Times all that the host does before a kernel starts on a GPU, without a GPU."""
    params = [nn.Parameter(sharded(shape, mesh, "meta")) for shape in shapes]
    for param, shape in zip(params, shapes, strict=True):
        param.grad = sharded(shape, mesh, "meta")
    optimizer, statistics, planner = PATSAdamW(params), Statistics(), Planner(owned=True)
    with torch.no_grad():
        state_s, batch = once(optimizer._batch)
        gather_s = least(optimizer._batch)
    gc.collect()
    before = resident()
    first_layout_s, held = once(lambda: statistics.localized(batch))
    layout_s = least(lambda: statistics.localized(batch))
    first_plan_s, plan = once(lambda: planner.plan(held))
    plan_s = least(lambda: planner.plan(held))
    (launch,) = plan.launches
    on_cpu = replace(launch, key=launch.key._replace(device=torch.device("cpu")), cache={})
    first_upload_s, tables = once(lambda: DeviceTables(on_cpu, chunk_of(on_cpu.key), narrowed))
    tables.current(on_cpu)

    def upload() -> None:
        on_cpu.table[:, 1] ^= np.int64(16)  # the gradients have moved
        tables.current(on_cpu)

    upload_s = least(upload)
    return {
        "model": name,
        "params": sum(map(math.prod, shapes)),
        "tensors": len(shapes),
        "state_s": state_s,
        "first_layout_s": first_layout_s,
        "first_plan_s": first_plan_s,
        "first_upload_s": first_upload_s,
        "gather_s": gather_s,
        "layout_s": layout_s,
        "plan_s": plan_s,
        "upload_s": upload_s,
        "step_s": gather_s + layout_s + plan_s + upload_s,
        "kept_bytes": resident() - before,
        "table_bytes": table_bytes(launch),
        "message_bytes": STATISTICS_BYTES * len(shapes),
    }


def resident() -> int:
    """Resident memory of this process in bytes; 0 if the system does not report it."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096
    except OSError:
        return 0


Makers = dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]]
FUSED_ADAMW = "torch.optim.AdamW(fused=True)"
MAKERS: Makers = {
    "PATSAdamW": lambda params: PATSAdamW(params, seed=1),
    'PATSAdamW(sensitivity="moments")': lambda params: PATSAdamW(params, sensitivity="moments", seed=2),
    "PATS, attached to an optimizer": lambda params: _attached(NoOptimizer([*params])),
    FUSED_ADAMW: lambda params: torch.optim.AdamW(params, fused=True),
}


def _attached(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    PATS(optimizer, seed=3)
    return optimizer


def stepped(mesh: DeviceMesh, count: int, tries: int = TRIES) -> Iterator[Stepped]:
    """Whole steps, kernels included, on tensors so small that the host's part dominates.

    All optimizers take turns on the same parameters, so each finds its state as the others left the caches.
    """
    plain, shards = (times_of(mesh, count, split, tries) for split in (False, True))
    for name in MAKERS:
        yield {
            "optimizer": name,
            "tensors": count,
            "plain_us": plain[name].kept,
            "plain_new_us": plain[name].new,
            "plain_cold_us": plain[name].cold,
            "sharded_us": shards[name].kept,
            "sharded_new_us": shards[name].new,
            "sharded_cold_us": shards[name].cold,
        }


class Times(NamedTuple):
    """Times of a step: with kept gradients and with new ones, the least; from cold caches, the median."""

    kept: float
    new: float
    cold: float


def times_of(mesh: DeviceMesh, count: int, split: bool, tries: int) -> dict[str, Times]:
    """Each optimizer's times of a step, in microseconds per tensor."""
    # The same number of local elements either way, so that the kernels' part is the same.
    shape = SMALL if not split else (SMALL[0] * WORLD, *SMALL[1:])
    tensors = [
        [sharded(shape, mesh, "cpu") if split else torch.zeros(shape) for _ in range(count)] for _ in range(3)
    ]
    params, gradients = list(map(nn.Parameter, tensors[0])), tensors[1:]
    optimizers = {name: make(params) for name, make in MAKERS.items()}
    scratch = torch.empty(SCRATCH_BYTES, dtype=torch.uint8)

    def taken(cold: bool = False) -> dict[str, float]:
        times: dict[str, float] = {}
        for name, optimizer in optimizers.items():
            if cold:
                scratch.fill_(0)
            times[name] = 1e6 * once(optimizer.step)[0] / count
        return times

    turns: list[tuple[dict[str, float], ...]] = []
    gc.collect()
    for turn in range(1 + tries):
        for param, grad in zip(params, gradients[turn % 2], strict=True):
            param.grad = grad
        new, kept = taken(), taken()
        turns.append((kept, new, taken(cold=True) if turn <= TRIES else {}))
    of = {
        name: [[times[name] for times in column if times] for column in zip(*turns[1:], strict=True)]
        for name in optimizers
    }
    return {name: Times(min(kept), min(new), median(cold)) for name, (kept, new, cold) in of.items()}


def strided(mesh: DeviceMesh, rows: int = 2048, columns: int = 2048) -> Strided:
    """A shard of columns, as in tensor parallelism, compared with one of rows. The indices of its elements in
    the whole tensor are not all consecutive."""
    times: list[float] = []
    for dim in (0, 1):
        whole = [rows, columns]
        whole[dim] *= WORLD
        tensors = [
            DTensor.from_local(
                torch.ones(rows, columns),
                mesh,
                [Shard(dim)],
                run_check=False,
                shape=torch.Size(whole),
                stride=(whole[1], 1),
            )
            for _ in range(2)
        ]
        param = nn.Parameter(tensors[0])
        param.grad = tensors[1]
        optimizer = PATSAdamW([param])
        for _ in range(2):
            optimizer.step()
        times.append(1e9 * least(optimizer.step) / (rows * columns))
    return {"shape": [rows, columns], "rows_ns": times[0], "columns_ns": times[1]}


class Host(TypedDict):
    world_size: int
    rank: int
    tries: int
    threads: int
    planned: list[Planned]
    stepped: list[Stepped]
    strided: Strided


def models_of(counts: tuple[int, ...]) -> dict[str, Shapes]:
    """The models to plan: the largest model, one with many experts, and one of equal matrices per count."""
    largest = MODELS[-1]
    models = {largest.name: [weight.shape for weight in largest.sizes.weights()]}
    models["DeepSeek-V3, experts unstacked"] = deepseek_v3()
    return models | {f"{count} matrices (2048, 7168)": many(count) for count in counts}


def measure(
    models: dict[str, Shapes], real: Sequence[int], tell: Callable[[str], None] = lambda doing: None
) -> Host:
    """All measurements, in a process group destroyed afterwards. `real`: numbers of tensors in real steps."""
    threads = torch.get_num_threads()
    mesh = join_nobody()
    try:
        torch.set_num_threads(1)
        steps: list[Stepped] = []
        for count in real:
            tell(f"real steps of {count} tensors")
            steps += stepped(mesh, count, max(TRIES, FEW // count))
        columns = strided(mesh)
        plans: list[Planned] = []
        for name, shapes in models.items():
            tell(name)
            plans.append(planned(name, shapes, mesh))
            gc.collect()
    finally:
        torch.set_num_threads(threads)
        dist.destroy_process_group()
    return {
        "world_size": WORLD,
        "rank": RANK,
        "tries": TRIES,
        "threads": 1,
        "planned": plans,
        "stepped": steps,
        "strided": columns,
    }
