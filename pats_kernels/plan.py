"""Lists of tensors in, tables out: what a kernel needs to know to update all of them in one launch.

A step's tensors are checked once, sorted into launches (one for each combination of device, dtypes and
variant) and described by two tables of int64: one row for each tensor (`Column`), and one row for each
dimension of the tensors that are not contiguous. The tables are kept: as long as the tensors stay what
they were, a step only writes the gradients' addresses anew, since `zero_grad(set_to_none=True)` moves them.
No plan holds a gradient; none holds any tensor, unless the planner's owner holds them all the same.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cache
from itertools import accumulate, pairwise
from operator import mul
from typing import Any, Literal, NamedTuple, TypeGuard, TypeVar

import numpy as np
import torch
from torch import Tensor

from pats_kernels.hyperparameters import Hyperparameters, Variant

T = TypeVar("T")

PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
VECTOR_BYTES = 16
OPERANDS = 6  # tensors of the parameter's shape: the first columns, and a layout row's strides
# An aligned chunk of a tensor smaller than this does not cross a multiple of 2^32 groups of four.
GROUPS_WITHOUT_CARRY, COARSEST_CHUNK = 2**34, 2**16

# What a backend is asked to do with a launch: all of it, or the half before the means of the state just
# updated are known, or the half after. Each but the last ends with the statistics, and advances t.
Phase = Literal["one_pass", "averages", "noise"]


class Column(IntEnum):
    """A tensor's row. The kernels read the same names: csrc/table.h and backends/triton.py."""

    PARAM = 0  # addresses; 0 where a tensor has none
    GRAD = 1
    SENS = 2
    UNC = 3
    EXP_AVG = 4
    EXP_AVG_SQ = 5
    STATS = 6  # the means that the normalization reads; 0: a tensor without noise, which only AdamW updates
    SHARE = 7  # where this tensor's part in the new means is written: the same, but for a shard
    STEP_COUNT = 8  # 0, or a counter on the device that the kernel advances
    NONFINITE = 9  # 0, or where to count the elements whose sensitivity is not finite
    LR_TENSOR = 10  # 0, or where a learning rate lies on the device
    NOISE_SCALE_TENSOR = 11  # 0, or where a noise_scale does
    NUMEL = 12
    WHOLE = (
        13  # elements of the unsharded tensor, by which the sums are divided; 0: a share that is not counted
    )
    OFFSET = 14  # the first element's row-major number in the unsharded tensor
    NDIM = 15  # 0: contiguous in every operand, numbered so, from a multiple of 4; else its layout rows
    LAYOUT = 16  # the first of them
    VECTOR = 17  # 1: NDIM is 0, and every address a multiple of 16 bytes
    TENSOR_ID = 18
    STEP = 19  # t, where there is no counter
    SEED = 20
    NOISE_SCALE = 21  # from here on float64: `Hyperparameters.numbers`
    GAMMA = 22
    SENS_BETA = 23  # b_s, and 1 - b_s as a rate
    SENS_RATE = 24
    UNC_BETA = 25
    UNC_RATE = 26
    LR = 27  # from here on AdamW's
    WEIGHT_DECAY = 28
    DECAY = 29  # 1 - lr weight_decay
    EPS = 30
    RATE1 = 31  # 1 - b_1
    BETA2 = 32
    RATE2 = 33
    LOG_BETA1 = 34
    LOG_BETA2 = 35
    GRAD_SIGN = 36  # -1: maximize


ON_DEVICE = {Column.LR_TENSOR: "lr", Column.NOISE_SCALE_TENSOR: "noise_scale"}  # hyperparameters that may be


def is_dtensor(kind: type) -> bool:
    """Whether it is the type of sharded tensors: without importing it for those who have none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and issubclass(kind, module.DTensor)


class Shard(NamedTuple):
    """Where a tensor lies in the whole one of which it is a part: a box.

    Attributes:
        offset: its first element's number, as row-major order numbers the whole's elements.
        strides: how far that number moves along each of its dimensions.
        numel: of the whole.
        counts: whether its sums go into the whole's means; of equal replicas one does.
    """

    offset: int
    strides: tuple[int, ...]
    numel: int
    counts: bool = True


@dataclass(slots=True)
class Batch:
    """Parallel lists, one entry for each tensor that takes part in a step.

    `steps` holds either t itself, or 0-d float32 tensors that count the steps taken so far, on their
    parameters' devices, and that the step advances. `nonfinite` holds 0-d int64 tensors that the step
    adds to. `name` gives a tensor's name for an error message. Where a form keeps no such state there is
    None; a tensor without `sens_stats` gets no noise, only AdamW's step. `exp_avg` and `exp_avg_sq` are
    empty where no AdamW is asked for. Where `shards` is not empty, some of the tensors are parts of others:
    their part in the new means goes to `shares`, as the means themselves do for the rest (None). `kept`: how
    many tensors the caller keeps from step to step, where these may be some of them.
    """

    name: Callable[[int], str]
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    exp_avg_sens: Sequence[Tensor | None] = field(default_factory=list)
    exp_avg_unc: Sequence[Tensor | None] = field(default_factory=list)
    sens_stats: Sequence[Tensor | None] = field(default_factory=list)
    steps: list[Tensor] | list[int] = field(default_factory=list)
    nonfinite: Sequence[Tensor | None] = field(default_factory=list)
    tensor_ids: list[int] = field(default_factory=list)
    hyperparameters: Sequence[Hyperparameters] = field(default_factory=list)
    exp_avg: list[Tensor] = field(default_factory=list)
    exp_avg_sq: list[Tensor] = field(default_factory=list)
    shards: Sequence[Shard | None] = field(default_factory=list)
    shares: Sequence[Tensor | None] = field(default_factory=list)
    kept: int = 0

    @property
    def averages(self) -> dict[str, Sequence[Tensor | None]]:
        """The state of the parameters' shape, by name, in the order of the columns that hold it."""
        return {
            "exp_avg_sens": self.exp_avg_sens,
            "exp_avg_unc": self.exp_avg_unc,
            "exp_avg": self.exp_avg,
            "exp_avg_sq": self.exp_avg_sq,
        }


class LaunchKey(NamedTuple):
    """What one launch has in common."""

    device: torch.device
    param_dtype: torch.dtype
    state_dtype: torch.dtype
    variant: Variant


@dataclass(slots=True)
class Launch:
    """One launch: some of a batch's tensors, and the tables that describe them.

    `table` is int64 [tensors, Column], `layout` int64 [rows, 1 + OPERANDS + 1]: a dimension's size, then its
    stride in elements in each operand and in the whole tensor's numbering, outermost dimension first. `cache`
    is the backend's own.
    """

    key: LaunchKey
    index: list[int]
    table: np.ndarray
    layout: np.ndarray
    cache: dict[Any, Any] = field(default_factory=dict)

    def of(self, column: Sequence[T | None]) -> list[T]:
        """The launch's part of one of the batch's lists, without the entries that are None."""
        part = column if len(self.index) == len(column) or not column else [column[i] for i in self.index]
        return [entry for entry in part if entry is not None]


@dataclass(slots=True)
class Plan:
    signature: list[Any]
    launches: list[Launch]
    hyperparameters: Sequence[Hyperparameters] = field(default_factory=list)
    alive: list[Any] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return sum(len(launch.index) for launch in self.launches)


class Planner:
    """Makes plans and keeps the last few, so that freezing and unfreezing a layer costs nothing either.

    Args:
        owned: the caller keeps the tensors from step to step and lets go of the planner with them. Then it
            is enough to see that they are the same objects, which halves the host's time. Each of them may
            also be stepped alone: no matter how many they are, each then has its plan.
        capacity: plans that begin with the same tensor, or, of a caller who keeps none, plans at all.
    """

    def __init__(self, owned: bool = False, capacity: int = 8) -> None:
        self._owned = owned
        self._capacity = capacity
        self._plans: dict[int, list[Plan]] = {}  # by their first tensor; the last used at the end
        self._most = 0  # tensors that were kept, or planned at once

    def plan(self, batch: Batch) -> Plan:
        """The tables for these tensors, up to date.

        Raises:
            TypeError, ValueError: naming the first tensor that no kernel could update, and why.
        """
        try:
            signature = _identities(batch) if self._owned else _descriptions(batch)
        except (RuntimeError, NotImplementedError):  # a sparse tensor has neither address nor strides
            check(batch)
            raise
        first = id(batch.params[0]) if self._owned and batch.params else 0
        plans = self._plans.pop(first, [])
        self._plans[first] = plans
        plan = next((plan for plan in plans if plan.signature == signature), None)
        if plan is None:
            check(batch)
            plan = Plan(signature, _launches(batch))
            if self._owned:  # an object's identity is its own only while it lives
                plan.alive = [batch.params, *batch.averages.values()]
                plan.alive += [batch.sens_stats, batch.shares, batch.steps, batch.nonfinite]
            del plans[self._capacity - 1 :]
            plans.insert(0, plan)
            self._most = max(self._most, batch.kept, len(batch.params))
            self._forget_oldest()
        elif plan is not plans[0]:
            plans.remove(plan)
            plans.insert(0, plan)
        _refresh(plan, batch)
        return plan

    def _forget_oldest(self) -> None:
        """Keeps no more rows than `capacity` plans of all tensors have: plans keep what they are of alive."""
        rows = sum(plan.rows for plans in self._plans.values() for plan in plans)
        while rows > self._capacity * self._most:
            first, plans = next(iter(self._plans.items()))
            if plans:
                rows -= plans.pop().rows
            else:
                del self._plans[first]


# Everything about the tensors that a plan relies on, but for what `_refresh` writes at every step. Flat
# comprehensions: a call for each tensor would cost as much again.


def _identities(batch: Batch) -> list[Any]:
    """For tensors that are kept: which they are, and where, as `.data` may be assigned anew."""
    moved = (batch.params, *batch.averages.values())
    return [
        [
            list(map(id, tensors))
            for tensors in (*moved, batch.sens_stats, batch.shares, batch.steps, batch.nonfinite)
        ],
        [_addresses(tensors) for tensors in moved],
        [(g.dtype, g.device, g.shape, g.stride()) for g in batch.grads],
        batch.tensor_ids,
        batch.shards,
        [h.variant for h in batch.hyperparameters],
    ]


def _descriptions(batch: Batch) -> list[Any]:
    """For tensors of which nothing is known: all that matters about each, and no reference to it."""
    counters = batch.steps if are_counters(batch.steps) else []
    kept = (batch.params, *batch.averages.values(), batch.sens_stats, batch.shares, counters, batch.nonfinite)
    return [
        [
            [None if t is None else (t.dtype, t.device, t.shape, t.stride()) for t in tensors]
            for tensors in (*kept, batch.grads)
        ],
        [_addresses(tensors) for tensors in kept],
        batch.tensor_ids,
        batch.shards,
        [h.variant for h in batch.hyperparameters],
    ]


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def are_counters(steps: list[Tensor] | list[int]) -> TypeGuard[list[Tensor]]:
    return bool(steps) and isinstance(steps[0], Tensor)


def check(batch: Batch) -> None:
    """Raises the error that names the first tensor that a kernel could not update."""
    for i, (param, grad) in enumerate(zip(batch.params, batch.grads, strict=True)):
        name, variant, stats = batch.name(i), batch.hyperparameters[i].variant, batch.sens_stats[i]
        check_param(name, param)
        _check_grad(name, param, grad)
        needed = averages_of(variant, noisy=stats is not None)
        dtypes = STATE_DTYPES
        for key, column in batch.averages.items():
            average = column[i] if column else None
            if average is not None and key not in needed:
                raise ValueError(f"{name}: {_described(variant)} keeps no {key}, but one was given")
            if key in needed:
                if average is None:
                    raise ValueError(f"{name}: {_described(variant)} needs {key}, but it is None")
                _check_state(name, key, average, param, dtypes)
                dtypes = (average.dtype,)  # all of a parameter's
        if stats is not None:
            _check_stats(name, param, stats)
    _check_disjoint(batch)


def averages_of(variant: Variant, noisy: bool = True) -> tuple[str, ...]:
    """The names of the state of a parameter's shape that it has, with noise or without."""
    sensitivity = () if not noisy or variant.form == "moments_adamw" else ("exp_avg_sens", "exp_avg_unc")
    if variant.uncertainty == "none":
        sensitivity = sensitivity[:1]
    return sensitivity + (() if variant.form == "pats" else ("exp_avg", "exp_avg_sq"))


def _described(variant: Variant) -> str:
    sensitivity = "sensitivity='moments', " if variant.form == "moments_adamw" else ""
    return f"{sensitivity}uncertainty={variant.uncertainty!r}"


def _check_stats(name: str, param: Tensor, stats: Tensor) -> None:
    if stats.shape != (2,) or stats.dtype != torch.float32 or not stats.is_contiguous():
        raise ValueError(
            f"{name}: sens_stats must be contiguous float32 of shape (2,), "
            f"but is {stats.dtype} of shape {tuple(stats.shape)}"
        )
    _require_same(name, "device", param.device, "sens_stats", stats.device)


def _check_disjoint(batch: Batch) -> None:
    """Raises ValueError where two written tensors share memory, or one is a gradient.

    Tensors with holes are compared by their first element alone: two of them may well interleave.
    """
    extents: list[tuple[int, int, int, str]] = []
    columns: dict[str, Sequence[Tensor | None]] = {"params": batch.params, **batch.averages}
    columns |= {"sens_stats": batch.sens_stats, "grads": batch.grads}
    for key, tensors in columns.items():
        for i, tensor in enumerate(tensors):
            if tensor is not None and tensor.numel() > 0 and not tensor.is_meta:  # others have no memory
                start, dense = tensor.data_ptr(), tensor.numel() * tensor.element_size()
                extents.append((start, start + (dense if _has_no_holes(tensor) else 1), i, key))
    extents.sort()
    for (_, end, i, key), (start, _, j, other) in pairwise(extents):
        if start < end and not (key == other == "grads"):
            raise ValueError(
                f"{batch.name(j)}: overlapping memory: its {other} shares some with {key} of {batch.name(i)}"
            )


def _has_no_holes(tensor: Tensor) -> bool:
    if tensor.is_contiguous():
        return True
    extent = 1 + sum(s * (n - 1) for s, n in zip(tensor.stride(), tensor.shape, strict=True))
    return extent == tensor.numel()


def check_param(name: str, param: Tensor) -> None:
    """Raises TypeError or ValueError, naming it, where PATS cannot update this parameter."""
    _check_kind(name, "parameter", param)
    kind = type(param)
    if hasattr(kind, "__tensor_flatten__") and not is_dtensor(kind):  # it has no memory of its own
        raise TypeError(
            f"{name}: PATS updates plain tensors and DTensors, but the parameter is a {kind.__name__}, "
            "made of several tensors: leave it to another optimizer"
        )
    if param.dtype not in PARAM_DTYPES:
        raise TypeError(f"{name}: PATS updates {_names(PARAM_DTYPES)}, but the parameter is {param.dtype}")
    if _overlaps_itself(param):
        raise ValueError(f"{name}: overlapping memory: the parameter has strides {param.stride()}")


def _check_kind(name: str, what: str, tensor: Tensor) -> None:
    if tensor.layout is not torch.strided:
        remedy = "; sparse=False in its nn.Embedding or nn.EmbeddingBag gives a dense one"
        raise TypeError(
            f"{name}: PATS does not support sparse tensors, but the {what} is {tensor.layout}"
            f"{remedy if what == 'gradient' else ''}"
        )
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{name}: PATS needs real floating point, but the {what} is {tensor.dtype}")


def _check_grad(name: str, param: Tensor, grad: Tensor) -> None:
    _check_kind(name, "gradient", grad)
    _require_same(name, "shape", tuple(param.shape), "gradient", tuple(grad.shape))
    _require_same(name, "dtype", param.dtype, "gradient", grad.dtype)
    _require_same(name, "device", param.device, "gradient", grad.device)
    if _overlaps_itself(grad):
        raise ValueError(f"{name}: overlapping memory: the gradient has strides {grad.stride()}")


def _check_state(name: str, key: str, state: Tensor, param: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    _check_kind(name, key, state)
    _require_same(name, "shape", tuple(param.shape), key, tuple(state.shape))
    _require_same(name, "device", param.device, key, state.device)
    if state.dtype not in dtypes or (state.dtype == torch.float64 and param.dtype != torch.float64):
        raise ValueError(
            f"{name}: dtype mismatch: {key} is {state.dtype}, "
            f"for a {param.dtype} parameter it must be one of {_names(dtypes)}"
        )
    if _overlaps_itself(state):
        raise ValueError(f"{name}: overlapping memory: {key} has strides {state.stride()}")


def _require_same(name: str, what: str, expected: object, key: str, actual: object) -> None:
    if expected != actual:
        raise ValueError(f"{name}: {what} mismatch: the parameter has {expected}, its {key} {actual}")


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements share memory."""
    if tensor.is_contiguous() or tensor.numel() < 2:
        return False
    dimensions = sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1)
    if dimensions[0][0] == 0:
        return True
    extent = 1
    for stride, size in dimensions:
        if stride < extent:  # it does not clear the dimensions inside it: rare, so count the addresses
            offsets = np.zeros(1, dtype=np.int64)
            for step, count in dimensions:
                offsets = (offsets[:, None] + step * np.arange(count)).ravel()
            return len(np.unique(offsets)) < len(offsets)
        extent = stride * (size - 1) + extent
    return False


def _launches(batch: Batch) -> list[Launch]:
    """Sorts the tensors into launches and fills the columns that stay."""
    indices: dict[LaunchKey, list[int]] = {}
    averages = [column for column in batch.averages.values() if column]
    for i, (param, h) in enumerate(zip(batch.params, batch.hyperparameters, strict=True)):
        state_dtype = next(state.dtype for column in averages if (state := column[i]) is not None)
        key = LaunchKey(param.device, param.dtype, state_dtype, h.variant)
        indices.setdefault(key, []).append(i)
    return [_launch(batch, key, index) for key, index in indices.items()]


def _launch(batch: Batch, key: LaunchKey, index: list[int]) -> Launch:
    table = np.zeros((len(index), len(Column)), dtype=np.int64)
    layout: list[tuple[int, ...]] = []
    nothing = [None] * len(batch.params)
    columns = (batch.params, batch.grads, *(column or nothing for column in batch.averages.values()))
    counters = batch.steps if are_counters(batch.steps) else nothing
    shares = [
        stats if share is None else share
        for stats, share in zip(batch.sens_stats, batch.shares or nothing, strict=True)
    ]
    others = (batch.sens_stats, shares, counters, batch.nonfinite or nothing)
    shards = batch.shards or nothing
    for row, i in zip(table, index, strict=True):
        param, operands = batch.params[i], [column[i] for column in columns]
        row[: Column.LR_TENSOR] = _addresses(operands + [column[i] for column in others])
        shard = shards[i] or whole_shard(param.shape)
        strides = [(param if operand is None else operand).stride() for operand in operands]
        in_groups = are_groups_whole(shard.offset, param.numel())
        dimensions = collapse(param.shape, [*strides, shard.strides], may_vanish=in_groups)
        row[Column.NUMEL] = param.numel()
        row[Column.WHOLE] = shard.numel if shard.counts else 0
        row[Column.OFFSET] = shard.offset
        row[Column.NDIM] = len(dimensions)
        row[Column.LAYOUT] = len(layout)
        row[Column.TENSOR_ID] = batch.tensor_ids[i]
        layout += dimensions
    return Launch(key, index, table, np.array(layout, dtype=np.int64).reshape(-1, 2 + OPERANDS))


@cache
def whole_shard(shape: tuple[int, ...]) -> Shard:
    """The shard that a tensor is of itself."""
    sizes = [1, *accumulate(reversed(shape), mul)]
    return Shard(0, tuple(reversed(sizes[:-1])), sizes[-1])


def are_groups_whole(offset: int, numel: int) -> bool:
    """Whether elements numbered from `offset` on are groups of four that a chunk counts in 32 bits."""
    return offset % 4 == 0 and (offset % COARSEST_CHUNK == 0 or offset + numel <= GROUPS_WITHOUT_CARRY)


def collapse(
    shape: Sequence[int], strides: Sequence[Sequence[int]], may_vanish: bool = True
) -> list[tuple[int, ...]]:
    """The fewest dimensions that walk all operands in row-major order, as (size, stride, stride, ...).

    None at all where every operand is contiguous, if they `may_vanish`.
    """
    plain = whole_shard(tuple(shape)).strides
    if may_vanish and all(tuple(operand) == plain for operand in strides):  # most tensors are
        return []
    merged: list[list[int]] = []
    for size, *steps in zip(shape, *strides, strict=True):
        if size == 1:
            continue
        if merged and all(outer == size * step for outer, step in zip(merged[-1][1:], steps, strict=True)):
            merged[-1] = [merged[-1][0] * size, *steps]
        else:
            merged.append([size, *steps])
    if may_vanish and (not merged or (len(merged) == 1 and set(merged[0][1:]) == {1})):
        return []
    return [tuple(dimension) for dimension in merged or [[1] * (1 + len(strides))]]


def _refresh(plan: Plan, batch: Batch) -> None:
    """Writes what may change while the tensors stay: the gradients' addresses, t, hyperparameters."""
    grads = np.array([grad.data_ptr() for grad in batch.grads], dtype=np.int64)
    steps = None if are_counters(batch.steps) else np.array(batch.steps, dtype=np.int64)
    changed = plan.hyperparameters != batch.hyperparameters
    for launch in plan.launches:
        table, index = launch.table, launch.index
        table[:, Column.GRAD] = grads[index]
        if steps is not None:
            table[:, Column.STEP] = steps[index]
        addresses = np.bitwise_or.reduce(table[:, :OPERANDS], axis=1)
        table[:, Column.VECTOR] = (addresses % VECTOR_BYTES == 0) & (table[:, Column.NDIM] == 0)
        if changed:
            _write_hyperparameters(launch, [batch.hyperparameters[i] for i in index])
    plan.hyperparameters = batch.hyperparameters


def _write_hyperparameters(launch: Launch, values: list[Hyperparameters]) -> None:
    """Each of the few different ones is put into numbers once: a schedule may come here at every step."""
    kinds = {id(h): h for h in values}
    place = {identity: i for i, identity in enumerate(kinds)}
    rows = [place[id(h)] for h in values]
    for column, name in ON_DEVICE.items():
        tensors = [h.on_device.get(name) for h in kinds.values()]
        for tensor in tensors:
            if tensor is not None and tensor.device != launch.key.device:
                raise ValueError(
                    f"device mismatch: {name} is on {tensor.device}, its parameters on {launch.key.device}"
                )
        launch.table[:, column] = np.array(_addresses(tensors))[rows]
    seeds = np.array([h.seed for h in kinds.values()], dtype=np.uint64)
    launch.table[:, Column.SEED] = seeds.view(np.int64)[rows]
    numbers = np.array([h.numbers for h in kinds.values()])
    last = Column.NOISE_SCALE + numbers.shape[1]
    launch.table.view(np.float64)[:, Column.NOISE_SCALE : last] = numbers[rows]


def chunk_table(numels: np.ndarray, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """Which tensor, and which piece of it, each program of a launch works on.

    Args:
        numels: the tensors' sizes, [tensors].
        chunk: elements a piece; a tensor's last piece may be smaller.

    Returns:
        int32 [chunks, 2]: row of the table, number of the piece; int64 [tensors + 1]: where each tensor's
        pieces start, so that its partial sums lie side by side.
    """
    counts = -(-numels // chunk)
    starts = np.concatenate(([0], np.cumsum(counts)))
    rows = np.repeat(np.arange(len(numels)), counts)
    pieces = np.arange(starts[-1]) - starts[rows]
    return np.stack((rows, pieces), axis=1).astype(np.int32), starts
