"""Counts what a step reads, writes, launches and sends on one of many GPUs. The counts come from the tensors'
shapes, through the planner that the step itself uses. Also a model of the time; `Assumptions` has all of its
assumptions.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, TypedDict

import torch
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from benchmarks.common.results import ACCESSES, ADAMW
from pats_kernels.backends.tables import Tables
from pats_kernels.backends.triton import CHUNKS, STATISTICS_BLOCK, chunk_of
from pats_kernels.distributed import Layout, _layout
from pats_kernels.hyperparameters import AdamWHyperparameters
from pats_kernels.plan import (
    GROUPS_WITHOUT_CARRY,
    Batch,
    Column,
    Launch,
    Planner,
    are_groups_whole,
    collapse,
    whole_shard,
)

GPUS = (8, 64, 512, 4096)
NODE = 8  # GPUs connected by NVLink; tensor parallelism stays within a node
STATISTICS_BYTES = 8  # per tensor in a message: mean(S) and mean(U) in float32
SMALL_STATE_BYTES = 4 + 8 + 8  # step, sens_stats, the count of non-finite elements; on every rank
OWN_ACCESSES = 3  # w and g are read and w is written, in float32; the rest is state
STATES = {"ema": 4, "moments": 2}  # tensors of the parameter's shape
FORMS = {"ema": "pats_adamw", "moments": "moments_adamw"}  # keys of `ACCESSES`
DTYPES = {
    "float32": 4,
    "bfloat16": 2,
}  # of the state; parameters and gradients are float32, as FSDP keeps them
KERNELS = {"delayed": 2, "exact": 3}  # the update (in two halves where exact) and the statistics


class Weight(NamedTuple):
    """A parameter. `tp`: the dimension that tensor parallelism shards; None: not sharded by it."""

    shape: tuple[int, ...]
    tp: int | None = None


@dataclass(frozen=True)
class Llama:
    """The sizes that decide the shapes of a Llama or, with `bias`, a Qwen2."""

    hidden: int
    ffn: int
    layers: int
    key_values: int  # rows of k and v: heads times head size
    vocabulary: int
    tied: bool = False
    bias: bool = False

    def weights(self) -> list[Weight]:
        """All parameters, in the order of transformers. Tensor parallelism shards them as in torch's recipe
        for Llama: column-wise where a block begins, row-wise where it ends."""
        h, kv = self.hidden, self.key_values
        attention: list[Weight] = []
        for rows in (h, kv, kv):
            attention += [Weight((rows, h), 0)] + ([Weight((rows,), 0)] if self.bias else [])
        mlp = [Weight((self.ffn, h), 0), Weight((self.ffn, h), 0), Weight((h, self.ffn), 1)]
        layer = [*attention, Weight((h, h), 1), *mlp, Weight((h,)), Weight((h,))]
        embedding = Weight((self.vocabulary, h), 0)
        return [embedding, *layer * self.layers, Weight((h,)), *([] if self.tied else [embedding])]


class Model(NamedTuple):
    name: str
    sizes: Llama
    shard: int  # GPUs over which hybrid sharding spreads one replica: enough for float32 state


MODELS = (
    Model("Llama-3.2-1B", Llama(2048, 8192, 16, 512, 128256, tied=True), 8),
    Model("Qwen2.5-7B", Llama(3584, 18944, 28, 512, 152064, bias=True), 8),
    Model("Llama-3-70B", Llama(8192, 28672, 80, 1024, 128256), 64),
    Model("Llama-3.1-405B", Llama(16384, 53248, 126, 1024, 128256), 512),
)


class Piece(NamedTuple):
    """How a parameter is laid out: its mesh, and the placements on it."""

    mesh: tuple[int, ...]
    placements: tuple[Placement, ...]


LAYOUTS = ("fsdp", "hsdp", "fsdp x tp")


def piece(weight: Weight, layout: str, gpus: int, shard: int) -> Piece:
    """The layout that `fully_shard` makes, on one or two mesh dimensions or after `parallelize_module`."""
    if layout == "fsdp":
        return Piece((gpus,), (Shard(0),))
    if layout == "hsdp":
        return Piece((gpus // shard, shard), (Replicate(), Shard(0)))
    if weight.tp is None:
        return Piece((gpus // NODE,), (Shard(0),))
    outer = _StridedShard(0, split_factor=NODE) if weight.tp == 0 else Shard(0)
    return Piece((gpus // NODE, NODE), (outer, Shard(weight.tp)))


def coordinate(rank: int, mesh: tuple[int, ...], gpus: int) -> tuple[int, ...]:
    """A rank's coordinate in a mesh of all GPUs, or in the mesh of the GPUs with its place in each node."""
    if math.prod(mesh) < gpus:
        rank //= NODE
    place: list[int] = []
    for size in reversed(mesh):
        rank, i = divmod(rank, size)
        place.insert(0, i)
    return tuple(place)


def laid_out(weight: Weight, at: Piece, rank: int, gpus: int) -> Layout:
    return _layout(weight.shape, at.mesh, coordinate(rank, at.mesh, gpus), at.placements)


def sizes(layout: Layout) -> tuple[int, ...]:
    return tuple(part.stop - part.start for part in layout.box)


def launches(weights: list[Weight], layout: str, gpus: int, shard: int, rank: int = 0) -> list[Launch]:
    """The launches that the planner makes on one rank, from tensors without memory."""
    found = [laid_out(w, piece(w, layout, gpus, shard), rank, gpus) for w in weights]
    columns = [[torch.empty(sizes(at), device="meta") for at in found] for _ in range(6)]
    params, grads, *averages = columns
    keys = ("exp_avg_sens", "exp_avg_unc", "exp_avg", "exp_avg_sq")
    batch = Batch(
        name=str,
        params=params,
        grads=grads,
        sens_stats=[torch.empty(2, device="meta") for _ in weights],
        steps=[1] * len(weights),
        tensor_ids=list(range(len(weights))),
        hyperparameters=[AdamWHyperparameters()] * len(weights),
        shards=[at.shard for at in found],
        **dict(zip(keys, averages, strict=True)),
    )
    return Planner().plan(batch).launches


def table_bytes(launch: Launch) -> int:
    """Bytes that `DeviceTables` holds on the GPU for a launch in one stream: see `Tables`."""
    chunks, tensors = chunks_of(launch), len(launch.table)
    held = {"table": launch.table.nbytes, "layout": launch.layout.nbytes, "chunks": 8 * chunks}
    held |= {"starts": 8 * (tensors + 1), "partials": 24 * chunks}
    assert held.keys() == set(Tables._fields)
    return sum(held.values())


def chunks_of(launch: Launch) -> int:
    return int((-(-launch.table[:, Column.NUMEL] // chunk_of(launch.key))).sum())


@cache
def slow_elements(weight: Weight, layout: str, gpus: int, shard: int) -> int:
    """The elements on all ranks, replicas included, that a kernel must address by strides: their indices in
    the whole tensor do not start at a multiple of four, or are not consecutive."""
    at, whole = piece(weight, layout, gpus, shard), whole_shard(weight.shape)
    if whole.strides[0] % 4 == 0 and weight.tp != 1 and whole.numel <= GROUPS_WITHOUT_CARRY:
        return 0  # whole rows of whole groups
    return sum(is_slow(laid_out(weight, at, rank, gpus)) for rank in range(gpus))


def is_slow(found: Layout) -> int:
    """The number of a shard's elements if the plan addresses them by strides, else 0."""
    shape, numel = sizes(found), math.prod(sizes(found))
    if found.shard is None:
        return 0
    in_groups = are_groups_whole(found.shard.offset, numel)
    return numel if collapse(shape, [whole_shard(shape).strides, found.shard.strides], in_groups) else 0


class Assumptions(TypedDict):
    """The assumptions of the model of the time. None of them was measured."""

    hbm_bytes_per_s: float
    gpu_bytes: float
    peak_flops: float
    mfu: float
    tokens_per_gpu: int
    launch_s: float
    tree_base_s: float
    tree_nvlink_s: float
    tree_network_s: float
    message_bytes_per_s: float
    sources: dict[str, str]


H200: Assumptions = {
    "hbm_bytes_per_s": 4.8e12,
    "gpu_bytes": 141e9,
    "peak_flops": 989e12,
    "mfu": 0.4,
    "tokens_per_gpu": 4096,
    "launch_s": 5e-6,
    "tree_base_s": 6.8e-6,
    "tree_nvlink_s": 0.6e-6,
    "tree_network_s": 5.0e-6,
    "message_bytes_per_s": 10e9,
    "sources": {
        "hbm_bytes_per_s, gpu_bytes, peak_flops": "NVIDIA H200 SXM data sheet; bfloat16, dense. The step is "
        "taken to reach the full bandwidth, which no kernel does: a floor",
        "mfu, tokens_per_gpu, launch_s, message_bytes_per_s": "assumed",
        "tree_*_s": "NCCL's own tuning model (src/graph/tuning.cc): trees, protocol LL; "
        "base + 2 ((ranks a node - 1) NVLink + log2(nodes) network)",
    },
}


def allreduce_s(ranks: int, per_node: int, nbytes: int, on: Assumptions) -> float:
    """NCCL's model for a small message: up a tree and down again."""
    if ranks <= 1:
        return 0.0
    nodes = max(1, ranks // per_node)
    hops = (min(ranks, per_node) - 1) * on["tree_nvlink_s"] + math.floor(math.log2(nodes)) * on[
        "tree_network_s"
    ]
    return on["tree_base_s"] + 2 * hops + nbytes / on["message_bytes_per_s"]


def training_step_s(params: int, on: Assumptions) -> float:
    """Time of forward and backward: 6 operations per parameter and token."""
    return 6 * params * on["tokens_per_gpu"] / (on["mfu"] * on["peak_flops"])


def moved_bytes(form: str, state: str, normalization: str = "delayed") -> int:
    """Bytes that a step with AdamW must read and write per element of a float32 parameter."""
    accesses = ADAMW if form == "adamw" else ACCESSES[FORMS[form]][normalization]
    return OWN_ACCESSES * 4 + (accesses - OWN_ACCESSES) * DTYPES[state]


class Row(TypedDict):
    """One model in one layout, with delayed normalization. Dictionaries are by form and the state's dtype.

    All but the last group is counted. `numel`, and what follows from it, is rank 0's, which has the most.
    """

    model: str
    params: int
    tensors: int
    layout: str
    mesh: list[int]
    gpus: int
    numel: int
    balance: float  # numel divided by the mean of all ranks
    empty_tensors: int
    chunks: int
    largest_sum: int  # iterations of the program that sums the largest tensor's chunks
    launches: int
    kernels: dict[str, int]
    messages: int
    message_bytes: int
    slow_share: float
    table_bytes: int
    state_bytes: dict[str, int]
    moved_bytes: dict[str, int]
    adamw_moved_bytes: int
    # modelled
    fits: dict[str, bool]
    step_s: float
    training_step_s: float
    message_s: float
    share: dict[str, float]
    share_over_adamw: dict[str, float]


def row(model: Model, layout: str, gpus: int, on: Assumptions = H200) -> Row:
    weights = model.sizes.weights()
    params = sum(math.prod(w.shape) for w in weights)
    plan = launches(weights, layout, gpus, model.shard)
    local = [int(n) for launch in plan for n in launch.table[:, Column.NUMEL]]
    pieces = [piece(w, layout, gpus, model.shard) for w in weights]
    replicas = gpus // model.shard if layout == "hsdp" else 1
    # What tensor parallelism does not shard is on all GPUs of a node.
    held = sum(
        math.prod(w.shape) * (NODE if math.prod(at.mesh) < gpus else replicas)
        for w, at in zip(weights, pieces, strict=True)
    )
    slow = sum(count * slow_elements(w, layout, gpus, model.shard) for w, count in Counter(weights).items())
    meshes = Counter(at.mesh for at in pieces if math.prod(at.mesh) > 1)
    names = [(form, state) for form in STATES for state in DTYPES]
    numel = sum(local)
    moved = {f"{form}, {state}": moved_bytes(form, state) * numel for form, state in names}
    state = {
        f"{form}, {dtype}": STATES[form] * DTYPES[dtype] * numel + SMALL_STATE_BYTES * len(weights)
        for form, dtype in names
    }
    messages = [
        allreduce_s(math.prod(mesh), NODE if math.prod(mesh) == gpus else 1, STATISTICS_BYTES * count, on)
        for mesh, count in meshes.items()
    ]
    adamw = moved_bytes("adamw", "float32") * numel
    training = training_step_s(params, on)
    overhead = len(plan) * KERNELS["delayed"] * on["launch_s"]
    times = {name: value / on["hbm_bytes_per_s"] + overhead for name, value in moved.items()}
    alone = adamw / on["hbm_bytes_per_s"] + on["launch_s"]
    return {
        "model": model.name,
        "params": params,
        "tensors": len(weights),
        "layout": layout,
        "mesh": list(max(meshes, key=math.prod, default=(1,))),
        "gpus": gpus,
        "numel": numel,
        "balance": numel * gpus / held,
        "empty_tensors": local.count(0),
        "chunks": sum(map(chunks_of, plan)),
        "largest_sum": math.ceil(max(local) / CHUNKS[4] / STATISTICS_BLOCK),
        "launches": len(plan),
        "kernels": {name: count * len(plan) for name, count in KERNELS.items()},
        "messages": len(meshes),
        "message_bytes": STATISTICS_BYTES * sum(meshes.values()),
        "slow_share": slow / held,
        "table_bytes": sum(map(table_bytes, plan)),
        "state_bytes": state,
        "moved_bytes": moved,
        "adamw_moved_bytes": adamw,
        "fits": {name: 8 * numel + value <= on["gpu_bytes"] for name, value in state.items()},
        "step_s": times["ema, float32"],
        "training_step_s": training,
        "message_s": sum(messages),
        "share": {name: value / training for name, value in times.items()},
        "share_over_adamw": {name: (value - alone) / training for name, value in times.items()},
    }


def rows(on: Assumptions = H200) -> Iterator[Row]:
    for model in MODELS:
        for layout in LAYOUTS:
            for gpus in GPUS:
                if layout != "hsdp" or gpus > model.shard:
                    yield row(model, layout, gpus, on)
