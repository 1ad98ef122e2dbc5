"""Lists of tensors in, tables out: what a kernel needs to know to update all of them in one launch.

A step's tensors are checked once, sorted into launches (one for each combination of device, dtypes and
variant) and described by two int64 tables: one row for each tensor (`Column`), and one row for each
dimension of the tensors that are not contiguous. The tables are kept. While the tensors stay the same, a
step writes only the gradients' addresses, because `zero_grad(set_to_none=True)` moves the gradients.

Every step compares each tensor's address and kind (dtype, shape, strides, ...) with the plan's. A plan keeps
no tensor alive: another tensor of the same kind at the same address is as good.
"""

import random
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cache
from itertools import accumulate, chain, pairwise
from operator import is_, mul
from typing import Any, Literal, NamedTuple, TypeGuard, TypeVar

import numpy as np
import torch
from torch import Tensor

from pats_kernels.hyperparameters import Hyperparameters, Variant
from pats_kernels.private import AllKinds, Kinds

T = TypeVar("T")

PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
VECTOR_BYTES = 16
OPERANDS = 6  # tensors of the parameter's shape: the first columns of a row, and the strides of a layout row
# An aligned chunk of a tensor smaller than this does not cross a multiple of 2^32 groups of four.
GROUPS_WITHOUT_CARRY, COARSEST_CHUNK = 2**34, 2**16
# The memory of a kept plan: bytes for each row; on a GPU also 32 bytes for each 4096 elements.
ROW_BYTES, ELEMENTS_A_BYTE = 1300, 128

# What a backend does with a launch: the whole step, or only the half before the means of the updated state
# are known, or only the half after. All but the last end with the statistics and advance t.
Phase = Literal["one_pass", "averages", "noise"]


class Column(IntEnum):
    """The columns of a tensor's row. csrc/table.h and backends/triton_kernel.py read the same rows."""

    PARAM = 0  # addresses; 0 where a tensor has none
    GRAD = 1
    SENS = 2
    UNC = 3
    EXP_AVG = 4
    EXP_AVG_SQ = 5
    STATS = 6  # the means that the normalization reads; 0: a tensor without noise, which only AdamW updates
    SHARE = 7  # where this tensor's part of the new means is written: STATS, except for a shard
    STEP_COUNT = 8  # a counter on the device that the kernel advances, or 0
    NONFINITE = 9  # where to count the elements whose sensitivity is not finite, or 0
    LR_TENSOR = 10  # a learning rate on the device, or 0
    NOISE_SCALE_TENSOR = 11  # a noise_scale on the device, or 0
    NUMEL = 12
    WHOLE = 13  # elements of the unsharded tensor, the sums' divisor; 0: a share that does not count
    OFFSET = 14  # the first element's row-major number in the unsharded tensor
    NDIM = 15  # number of layout rows; 0: contiguous in every operand, numbered in order from a multiple of 4
    LAYOUT = 16  # the first layout row
    VECTOR = 17  # 1: NDIM is 0, and every address is a multiple of 16 bytes
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


NO_ADDRESS = bytes(8)  # in `Plan.grads`; a match across two addresses would only cost a second look
BLOCK = 128  # tensors that are looked at together, so that they stay in a cache meanwhile
# The hyperparameters that may be tensors on the device.
ON_DEVICE = {Column.LR_TENSOR: "lr", Column.NOISE_SCALE_TENSOR: "noise_scale"}


def is_dtensor(kind: type) -> bool:
    """Whether `kind` is DTensor, without importing DTensor if the program has not done so."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and issubclass(kind, module.DTensor)


class Shard(NamedTuple):
    """Where a tensor lies in the whole tensor that it is a part of; it is a box.

    Attributes:
        offset: number of its first element, in the whole tensor's row-major order.
        strides: how far that number moves along each of its dimensions.
        numel: of the whole tensor.
        counts: whether its sums go into the whole tensor's means; of equal replicas only one counts.
    """

    offset: int
    strides: tuple[int, ...]
    numel: int
    counts: bool = True


class Own(list[T]):
    """A column of tensors that no other code can reach. While it is the same list, they have not moved."""

    __slots__ = ("__weakref__",)


@dataclass(slots=True)
class Batch:
    """Parallel lists, one entry for each tensor that takes part in a step.

    - `name` gives a tensor's name for an error message.
    - `steps` holds t itself, or 0-d float32 tensors on the parameters' devices that count the steps taken so
      far; the step advances them.
    - `nonfinite` holds 0-d int64 tensors that the step adds to.
    - State that a form does not keep is None. A tensor without `sens_stats` gets no noise, only AdamW's step.
    - `exp_avg` and `exp_avg_sq` are empty without AdamW.
    - If `shards` is not empty, some tensors are parts of others. Their part of the new means is written to
      `shares`. The others have None in both, and their means go to `sens_stats`.
    - `kept`: how many tensors the caller keeps from step to step; these may be some of them.
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
        """The state that has the parameters' shape, by name, in the order of its columns."""
        return {
            "exp_avg_sens": self.exp_avg_sens,
            "exp_avg_unc": self.exp_avg_unc,
            "exp_avg": self.exp_avg,
            "exp_avg_sq": self.exp_avg_sq,
        }


class LaunchKey(NamedTuple):
    """What the tensors of one launch have in common."""

    device: torch.device
    param_dtype: torch.dtype
    state_dtype: torch.dtype
    variant: Variant


@dataclass(slots=True)
class Launch:
    """One launch: some of a batch's tensors, and the tables that describe them.

    - `table` is int64 [tensors, Column].
    - `layout` is int64 [rows, 1 + OPERANDS + 1]: a dimension's size, then its stride in elements in each
      operand and in the whole tensor's numbering, outermost dimension first.
    - `aligned`: the rows in which only the gradient's address decides `Column.VECTOR`.
    - `on_device`: for each hyperparameter on the device its column, its different tensors, and for each row
      the index of its tensor among them.
    - `cache` belongs to the backend.
    """

    key: LaunchKey
    index: list[int]
    table: np.ndarray
    layout: np.ndarray
    aligned: np.ndarray
    on_device: list[tuple[Column, list[Tensor | None], list[int]]] = field(default_factory=list)
    cache: dict[Any, Any] = field(default_factory=dict)

    def of(self, column: Sequence[T | None]) -> list[T]:
        """The launch's part of one of the batch's lists, without the entries that are None."""
        part = column if len(self.index) == len(column) or not column else [column[i] for i in self.index]
        return [entry for entry in part if entry is not None]

    def point_to(self, grads: np.ndarray) -> None:
        """Writes the addresses of the batch's gradients, and whether they allow access by 16 bytes."""
        own = grads if len(self.index) == len(grads) else grads[self.index]
        self.table[:, Column.GRAD] = own
        self.table[:, Column.VECTOR] = self.aligned & (own % VECTOR_BYTES == 0)


class _Block(NamedTuple):
    """Addresses and kinds of some of the tensors that users and other code can reach."""

    part: slice
    places: bytes  # addresses of all but the gradients, which come last
    kinds: list[Kinds]  # of each column


class _Hidden:
    """Addresses of a column of tensors that no other code can reach."""

    __slots__ = ("_column", "_places")

    def __init__(self, column: Sequence[Tensor | None]) -> None:
        self._places = _addresses_of(column).tobytes()
        self._remember(column)

    def _remember(self, column: Sequence[Tensor | None]) -> None:
        self._column = weakref.ref(column) if isinstance(column, Own) else lambda: None

    def is_of(self, column: Sequence[Tensor | None]) -> bool:
        if self._column() is not column and (column or self._places):
            if _addresses_of(column).tobytes() != self._places:
                return False
            self._remember(column)
        return True


@dataclass(slots=True)
class Plan:
    """What a step needs to know, and which tensors it is valid for.

    Attributes:
        columns: the columns of `_columns` that there are.
        blocks, hidden: addresses and kinds of these tensors, and of those that no other code can reach.
        tensor_ids, shards: the batch's.
        grads, hyperparameters: the addresses and the values that are in the tables now. The plan does not
            depend on them.
        without_memory: an error message if a tensor has no memory of its own, so that no kernel can find it
            by address; None: there is no such tensor.
    """

    columns: list[Column]
    blocks: list[_Block]
    hidden: list[_Hidden]
    tensor_ids: list[int]
    shards: Sequence[Shard | None]
    variants: list[Variant]
    launches: list[Launch]
    grads: bytes
    hyperparameters: Sequence[Hyperparameters] = field(default_factory=list)
    without_memory: str | None = None

    def is_of(self, batch: Batch) -> bool:
        """Whether the plan is valid for these tensors. If so, it takes over their gradients' addresses.

        A tensor's identity is not enough: after `.data = ...` or `set_` the same object may lie elsewhere, or
        have other strides or another dtype.
        """
        columns = _columns(batch)
        if (
            self.columns != list(columns)
            or self.tensor_ids != batch.tensor_ids
            or self.shards != batch.shards
            or not (self.has_written(batch.hyperparameters) or self.variants == _variants(batch))
            or not all(map(_Hidden.is_of, self.hidden, (batch.shares, batch.nonfinite)))
        ):
            return False
        parts: list[bytes] = []
        for block in self.blocks:
            # The kinds first: what looks at them waits for many tensors at once to come into the caches.
            tensors = [column[block.part] for column in columns.values()]
            if not all(map(Kinds.are_of, block.kinds, tensors)):
                return False
            places, own = _places_of(tensors)
            if places != block.places:
                return False
            parts.append(own)
        if (grads := b"".join(parts)) != self.grads:
            self.grads = grads
            for launch in self.launches:
                launch.point_to(np.frombuffer(grads, np.int64))
        return True

    def has_written(self, hyperparameters: Sequence[Hyperparameters]) -> bool:
        """Whether the tables hold these very objects: equal ones may hold tensors at other addresses."""
        own = self.hyperparameters
        return len(own) == len(hyperparameters) and all(map(is_, own, hyperparameters))

    @property
    def rows(self) -> int:
        return sum(len(launch.index) for launch in self.launches)

    @property
    def bytes(self) -> int:
        """Roughly the memory that keeping it takes."""
        numel = sum(int(launch.table[:, Column.NUMEL].sum()) for launch in self.launches)
        return ROW_BYTES * self.rows + numel // ELEMENTS_A_BYTE


class Planner:
    """Makes plans and keeps many of them, so that freezing and unfreezing a layer costs nothing.

    When there is no more room, random plans are forgotten. If sets of tensors take turns, those that fit
    then stay; forgetting the least recently used plan would always forget the one that comes next.

    Args:
        owned: the caller keeps state for the tensors, so each has a counter of its steps.
        capacity: how many plans for all the tensors that the caller keeps always have room. The room also
            suffices for one plan a tensor, if each is stepped alone, however many they are.
        spare: bytes that further plans may take.
    """

    def __init__(self, owned: bool = False, capacity: int = 8, spare: int = 2**25) -> None:
        self._owned = owned
        self._capacity = capacity
        self._spare = spare
        self._plans: dict[bytes, list[Plan]] = {}  # by the parameters' addresses; last used first
        self._last: Plan | None = None
        self._rows = self._bytes = 0  # of all of them
        self._most = 0  # tensors that were kept, or planned at once
        self._random = random.Random(0)

    def plan(self, batch: Batch) -> Plan:
        """The tables for these tensors, up to date. Gradients with torch's negative bit are resolved.

        Raises:
            TypeError, ValueError: names the first tensor that no kernel can update, and says why.
        """
        try:
            plan = self._kept(batch)
            if plan is None and any(map(Tensor.is_neg, batch.grads)):  # their memory holds -g
                batch.grads = [grad.resolve_neg() for grad in batch.grads]
                return self.plan(batch)
        except (AttributeError, NotImplementedError, RuntimeError, TypeError):
            check(batch, self._owned)  # a sparse tensor, say, has neither address nor strides
            raise
        if plan is None:
            check(batch, self._owned)
            plan = _planned(batch)
            self._most = max(self._most, batch.kept, len(batch.params))
            self._keep(_key_of(batch), plan)
        self._last = plan
        _refresh(plan, batch)
        return plan

    def _kept(self, batch: Batch) -> Plan | None:
        """The plan that is valid for these tensors, if any. It becomes the most recently used."""
        if self._last is not None and self._last.is_of(batch):
            return self._last
        plans = self._plans.get(_key_of(batch), [])
        for i, plan in enumerate(plans):
            if plan.is_of(batch):
                if i > 0:
                    plans.insert(0, plans.pop(i))
                return plan
        return None

    def _keep(self, key: bytes, plan: Plan) -> None:
        plans = self._plans.setdefault(key, [])
        plans.insert(0, plan)
        self._rows += plan.rows
        self._bytes += plan.bytes
        if len(plans) > self._capacity:
            self._drop(key)
        others = [other for other in self._plans if other != key] if self._is_full() else []
        self._random.shuffle(others)
        while self._is_full() and others:
            self._drop(others[-1])
            if others[-1] not in self._plans:
                others.pop()

    def _is_full(self) -> bool:
        return self._rows > self._capacity * self._most and self._bytes > self._spare

    def _drop(self, key: bytes) -> None:
        """Forgets the least recently used plan of these parameters."""
        plan = self._plans[key].pop()
        self._rows -= plan.rows
        self._bytes -= plan.bytes
        if not self._plans[key]:
            del self._plans[key]


def _columns(batch: Batch) -> dict[Column, Sequence[Tensor | None]]:
    """The tensors that other code may move or turn into another view of their memory; gradients last."""
    columns: dict[Column, Sequence[Tensor | None]] = {
        Column.PARAM: batch.params,
        Column.SENS: batch.exp_avg_sens,
        Column.UNC: batch.exp_avg_unc,
        Column.EXP_AVG: batch.exp_avg,
        Column.EXP_AVG_SQ: batch.exp_avg_sq,
        Column.STATS: batch.sens_stats,
        Column.STEP_COUNT: batch.steps if are_counters(batch.steps) else [],
        Column.GRAD: batch.grads,
    }
    return {column: tensors for column, tensors in columns.items() if tensors}


def _places_of(columns: Sequence[Sequence[Tensor | None]]) -> tuple[bytes, bytes]:
    """The addresses of all but the last column, which are the gradients; the gradients'."""
    addresses = _addresses_of(list(chain(*columns)))
    staying = len(addresses) - len(columns[-1])
    return addresses[:staying].tobytes(), addresses[staying:].tobytes()


def _key_of(batch: Batch) -> bytes:
    return _addresses_of(batch.params).tobytes()


def _addresses_of(tensors: Sequence[Any]) -> np.ndarray:
    """int64, 0 for None. Uses `map`: calling a Python function for each tensor would take twice as long."""
    try:
        return np.fromiter(map(Tensor.data_ptr, tensors), np.int64, len(tensors))
    except TypeError:  # some of them are None
        each = (0 if tensor is None else tensor.data_ptr() for tensor in tensors)
        return np.fromiter(each, np.int64, len(tensors))


def _variants(batch: Batch) -> list[Variant]:
    return [h.variant for h in batch.hyperparameters]


def are_counters(steps: list[Tensor] | list[int]) -> TypeGuard[list[Tensor]]:
    return bool(steps) and isinstance(steps[0], Tensor)


def check(batch: Batch, owned: bool = False) -> None:
    """Raises an error that names the first tensor that no kernel can update.

    Args:
        owned: a step count must be a tensor, which the step advances.
    """
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
                dtypes = (average.dtype,)  # the same for all of a parameter's averages
        if stats is not None:
            _check_stats(name, param, stats)
        if owned or isinstance(batch.steps[i], Tensor):
            _check_counter(name, "step", batch.steps[i], param, torch.float32)
        if batch.nonfinite and (count := batch.nonfinite[i]) is not None:
            _check_counter(name, "count of elements that are not finite", count, param, torch.int64)
    _check_disjoint(batch)


def averages_of(variant: Variant, noisy: bool = True) -> tuple[str, ...]:
    """The names of the state of a parameter's shape that the variant keeps, with noise or without."""
    sensitivity = () if not noisy or variant.form == "moments_adamw" else ("exp_avg_sens", "exp_avg_unc")
    if variant.uncertainty == "none":
        sensitivity = sensitivity[:1]
    return sensitivity + (() if variant.form == "pats" else ("exp_avg", "exp_avg_sq"))


def _described(variant: Variant) -> str:
    sensitivity = "sensitivity='moments', " if variant.form == "moments_adamw" else ""
    return f"{sensitivity}uncertainty={variant.uncertainty!r}"


def _check_counter(name: str, key: str, counter: object, param: Tensor, dtype: torch.dtype) -> None:
    if not isinstance(counter, Tensor):
        raise ValueError(f"{name}: {key} is {counter!r}, but must be a 0-d tensor of {dtype}")
    _check_kind(name, key, counter, floating=False)
    if counter.dtype != dtype or counter.numel() != 1:
        raise ValueError(
            f"{name}: {key} must be a 0-d tensor of {dtype}, but is {counter.dtype} of shape "
            f"{tuple(counter.shape)}"
        )
    _require_same(name, "device", param.device, key, counter.device)
    _check_sign(name, key, counter)


def _check_stats(name: str, param: Tensor, stats: Tensor) -> None:
    if not isinstance(stats, Tensor):
        raise ValueError(f"{name}: sens_stats is {stats!r}, but must be a tensor")
    _check_kind(name, "sens_stats", stats)
    _check_sign(name, "sens_stats", stats)
    if stats.shape != (2,) or stats.dtype != torch.float32 or not stats.is_contiguous():
        raise ValueError(
            f"{name}: sens_stats must be contiguous float32 of shape (2,), "
            f"but is {stats.dtype} of shape {tuple(stats.shape)} and stride {stats.stride()}"
        )
    _require_same(name, "device", param.device, "sens_stats", stats.device)


def _check_disjoint(batch: Batch) -> None:
    """Raises ValueError if two tensors share memory, unless both are gradients, which are only read.

    Tensors with holes are compared by their first element only, because two of them may interleave.
    """
    extents: list[tuple[int, int, int, str]] = []
    columns: dict[str, Sequence[Tensor | None]] = {"params": batch.params, **batch.averages}
    columns |= {"sens_stats": batch.sens_stats, "nonfinite": batch.nonfinite, "grads": batch.grads}
    columns |= {"step": batch.steps} if are_counters(batch.steps) else {}
    for key, tensors in columns.items():
        for i, tensor in enumerate(tensors):
            if tensor is not None and tensor.numel() > 0 and (start := tensor.data_ptr()):
                dense = tensor.numel() * tensor.element_size()
                extents.append((start, start + (dense if _has_no_holes(tensor) else 1), i, key))
    extents.sort()
    for (_, end, i, key), (start, _, j, other) in pairwise(extents):
        if start < end and not (key == other == "grads"):
            raise ValueError(
                f"{batch.name(j)}: overlapping memory: its {other} shares some with the {key} of "
                f"{batch.name(i)}"
            )


def _has_no_holes(tensor: Tensor) -> bool:
    if tensor.is_contiguous():
        return True
    extent = 1 + sum(s * (n - 1) for s, n in zip(tensor.stride(), tensor.shape, strict=True))
    return extent == tensor.numel()


def check_param(name: str, param: Tensor) -> None:
    """Raises a TypeError or ValueError that names the parameter if PATS cannot update it."""
    _check_kind(name, "parameter", param)
    _check_sign(name, "parameter", param)
    if param.dtype not in PARAM_DTYPES:
        raise TypeError(f"{name}: PATS supports {_names(PARAM_DTYPES)}, but the parameter is {param.dtype}")
    if _overlaps_itself(param):
        raise ValueError(f"{name}: overlapping memory: the parameter has strides {param.stride()}; clone it")


def _check_kind(name: str, what: str, tensor: Tensor, floating: bool = True) -> None:
    if tensor.layout is not torch.strided:
        remedy = "; sparse=False in its nn.Embedding or nn.EmbeddingBag gives a dense one"
        raise TypeError(
            f"{name}: PATS does not support sparse tensors, but the {what} is {tensor.layout}"
            f"{remedy if what == 'gradient' else ''}"
        )
    if floating and not tensor.dtype.is_floating_point:
        raise TypeError(f"{name}: PATS needs real floating-point tensors, but the {what} is {tensor.dtype}")
    try:
        tensor.data_ptr()
    except RuntimeError as error:  # of a transformed function, say
        raise TypeError(f"{name}: the {what}, a {type(tensor).__name__}, has no address: {error}") from error


def _check_sign(name: str, what: str, tensor: Tensor) -> None:
    if tensor.is_neg():
        raise ValueError(
            f"{name}: the {what} has torch's negative bit set (Tensor.is_neg): its memory, which the step "
            "writes to, holds the negated values. Use its resolve_neg() instead"
        )


def _without_memory(batch: Batch) -> str | None:
    """A text that names the first tensor with elements but no address, such as a wrapper subclass."""
    columns: dict[str, Sequence[Tensor | None]] = {
        "parameter": batch.params,
        "gradient": batch.grads,
        **batch.averages,
        "sens_stats": batch.sens_stats,
        "nonfinite": batch.nonfinite,
        "step": batch.steps if are_counters(batch.steps) else [],
    }
    for what, tensors in columns.items():
        for i, tensor in enumerate(tensors):
            if tensor is not None and tensor.numel() > 0 and tensor.data_ptr() == 0:
                return f"{batch.name(i)}: the {what}, a {type(tensor).__name__}, has no memory of its own"
    return None


def _check_grad(name: str, param: Tensor, grad: Tensor) -> None:
    _check_kind(name, "gradient", grad)
    _require_same(name, "shape", tuple(param.shape), "gradient", tuple(grad.shape))
    _require_same(name, "dtype", param.dtype, "gradient", grad.dtype)
    _require_same(name, "device", param.device, "gradient", grad.device)
    if _overlaps_itself(grad):
        raise ValueError(f"{name}: overlapping memory: the gradient has strides {grad.stride()}; clone it")


def _check_state(name: str, key: str, state: Tensor, param: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    if not isinstance(state, Tensor):
        raise ValueError(f"{name}: {key} is {state!r}, but must be a tensor")
    _check_kind(name, key, state)
    _check_sign(name, key, state)
    _require_same(name, "shape", tuple(param.shape), key, tuple(state.shape))
    _require_same(name, "device", param.device, key, state.device)
    if state.dtype not in dtypes or (state.dtype == torch.float64 and param.dtype != torch.float64):
        raise ValueError(
            f"{name}: dtype mismatch: {key} is {state.dtype}, but "
            f"for a {param.dtype} parameter it must be one of {_names(dtypes)}"
        )
    if _overlaps_itself(state):
        raise ValueError(f"{name}: overlapping memory: {key} has strides {state.stride()}; clone it")


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
        if stride < extent:  # less than the dimensions inside it span: rare, so count the addresses
            offsets = np.zeros(1, dtype=np.int64)
            for step, count in dimensions:
                offsets = (offsets[:, None] + step * np.arange(count)).ravel()
            return len(np.unique(offsets)) < len(offsets)
        extent = stride * (size - 1) + extent
    return False


def _planned(batch: Batch) -> Plan:
    columns, all_kinds = _columns(batch), AllKinds()
    blocks: list[_Block] = []
    for first in range(0, len(batch.params), BLOCK):
        part = slice(first, first + BLOCK)
        tensors = [column[part] for column in columns.values()]
        places, _ = _places_of(tensors)
        blocks.append(_Block(part, places, list(map(all_kinds.of, tensors))))
    owned = {Column.SHARE: batch.shares, Column.NONFINITE: batch.nonfinite}
    addresses = {c: _addresses_of(tensors) for c, tensors in (columns | owned).items() if tensors}
    return Plan(
        list(columns),
        blocks,
        list(map(_Hidden, owned.values())),
        batch.tensor_ids,
        batch.shards,
        _variants(batch),
        _launches(batch, addresses),
        addresses[Column.GRAD].tobytes(),
        without_memory=_without_memory(batch),
    )


def _launches(batch: Batch, addresses: Mapping[Column, np.ndarray]) -> list[Launch]:
    """Sorts the tensors into launches and fills the columns that do not change."""
    indices: dict[LaunchKey, list[int]] = {}
    averages = [column for column in batch.averages.values() if column]
    for i, (param, h) in enumerate(zip(batch.params, batch.hyperparameters, strict=True)):
        state_dtype = next(state.dtype for column in averages if (state := column[i]) is not None)
        key = LaunchKey(param.device, param.dtype, state_dtype, h.variant)
        indices.setdefault(key, []).append(i)
    return [_launch(batch, key, index, addresses) for key, index in indices.items()]


def _launch(batch: Batch, key: LaunchKey, index: list[int], addresses: Mapping[Column, np.ndarray]) -> Launch:
    table = np.zeros((len(index), len(Column)), dtype=np.int64)
    for column, own in addresses.items():
        table[:, column] = own[index]
    alone = table[:, Column.SHARE] == 0  # not a shard: its sums are the whole means
    table[alone, Column.SHARE] = table[alone, Column.STATS]
    layout: list[tuple[int, ...]] = []
    nothing = [None] * len(batch.params)
    columns = [batch.grads, *(column or nothing for column in batch.averages.values())]
    shards = batch.shards or nothing
    for row, i in zip(table, index, strict=True):
        param, shard = batch.params[i], shards[i] or whole_shard(batch.params[i].shape)
        operands = [param, *(param if (own := column[i]) is None else own for column in columns)]
        strides = [operand.stride() for operand in operands]
        in_groups = are_groups_whole(shard.offset, param.numel())
        dimensions = collapse(param.shape, [*strides, shard.strides], may_vanish=in_groups)
        row[Column.NUMEL] = param.numel()
        row[Column.WHOLE] = shard.numel if shard.counts else 0
        row[Column.OFFSET] = shard.offset
        row[Column.NDIM] = len(dimensions)
        row[Column.LAYOUT] = len(layout)
        row[Column.TENSOR_ID] = batch.tensor_ids[i]
        layout += dimensions
    others = table[:, Column.PARAM] | np.bitwise_or.reduce(table[:, Column.SENS : OPERANDS], axis=1)
    aligned = (others % VECTOR_BYTES == 0) & (table[:, Column.NDIM] == 0)
    rows = np.array(layout, dtype=np.int64).reshape(-1, 2 + OPERANDS)
    launch = Launch(key, index, table, rows, aligned)
    launch.point_to(addresses[Column.GRAD])
    return launch


@cache
def whole_shard(shape: tuple[int, ...]) -> Shard:
    """A whole tensor as a shard of itself."""
    sizes = [1, *accumulate(reversed(shape), mul)]
    return Shard(0, tuple(reversed(sizes[:-1])), sizes[-1])


def are_groups_whole(offset: int, numel: int) -> bool:
    """Whether elements numbered from `offset` on form groups of four that a chunk can count in 32 bits."""
    return offset % 4 == 0 and (offset % COARSEST_CHUNK == 0 or offset + numel <= GROUPS_WITHOUT_CARRY)


def collapse(
    shape: Sequence[int], strides: Sequence[Sequence[int]], may_vanish: bool = True
) -> list[tuple[int, ...]]:
    """The fewest dimensions that walk all operands in row-major order, as (size, stride, stride, ...).

    If they `may_vanish`, none where every operand is contiguous.
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
    """Writes what else may change while the tensors stay the same: t and hyperparameters."""
    if plan.without_memory is not None or NO_ADDRESS in plan.grads:
        plan.without_memory = _without_memory(batch)
    steps = None if are_counters(batch.steps) else np.array(batch.steps, dtype=np.int64)
    changed = not plan.has_written(batch.hyperparameters)
    if changed:
        plan.hyperparameters = []  # until all tables have the new ones, because the following may raise
    for launch in plan.launches:
        table, index = launch.table, launch.index
        if steps is not None:
            table[:, Column.STEP] = steps[index]
        if changed:
            _write_hyperparameters(launch, [batch.hyperparameters[i] for i in index])
        for column, tensors, rows in launch.on_device:
            for tensor in tensors:
                if tensor is not None:
                    _check_on_device(ON_DEVICE[column], tensor, launch.key.device)
            table[:, column] = _addresses_of(tensors)[rows]
    plan.hyperparameters = batch.hyperparameters


def _check_on_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raises ValueError for a hyperparameter that the kernel cannot read on its device."""
    if tensor.device != device:
        raise ValueError(f"device mismatch: {name} is on {tensor.device}, its parameters on {device}")
    if tensor.dtype != torch.float32 or tensor.numel() != 1 or tensor.is_neg() or tensor.data_ptr() == 0:
        raise ValueError(
            f"Invalid {name}: {tensor!r} (a tensor must have one element, and be float32 on a GPU)"
        )


def _write_hyperparameters(launch: Launch, values: list[Hyperparameters]) -> None:
    """Converts each different object only once, because with a schedule this runs at every step."""
    kinds = {id(h): h for h in values}
    place = {identity: i for i, identity in enumerate(kinds)}
    rows = [place[id(h)] for h in values]
    launch.on_device.clear()
    for column, name in ON_DEVICE.items():
        tensors = [h.on_device.get(name) for h in kinds.values()]
        if any(tensor is not None for tensor in tensors):
            launch.on_device.append((column, tensors, rows))
        launch.table[:, column] = 0
    seeds = np.array([h.seed for h in kinds.values()], dtype=np.uint64)
    launch.table[:, Column.SEED] = seeds.view(np.int64)[rows]
    numbers = np.array([h.numbers for h in kinds.values()])
    last = Column.NOISE_SCALE + numbers.shape[1]
    launch.table.view(np.float64)[:, Column.NOISE_SCALE : last] = numbers[rows]


def chunk_table(numels: np.ndarray, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """Which piece of which tensor each program of a launch works on.

    Args:
        numels: the tensors' sizes, [tensors].
        chunk: elements in a piece; a tensor's last piece may be smaller.

    Returns:
        int32 [chunks, 2]: row of the table, number of the piece; int64 [tensors + 1]: where each tensor's
        pieces start. So a tensor's partial sums lie side by side.
    """
    counts = -(-numels // chunk)
    starts = np.concatenate(([0], np.cumsum(counts)))
    rows = np.repeat(np.arange(len(numels)), counts)
    pieces = np.arange(starts[-1]) - starts[rows]
    return np.stack((rows, pieces), axis=1).astype(np.int32), starts
