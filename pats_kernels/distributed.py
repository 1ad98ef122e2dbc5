"""Sharded parameters: where a shard lies in the whole tensor, and the statistics over all shards.

Of a DTensor (`fully_shard`, hybrid sharding, tensor parallel, or both at once) each process updates its local
tensor. Noise depends on an element's number in the whole tensor, so the way of splitting changes nothing.
The processes exchange only their shares of mean(S) and mean(U): one all-reduce for all tensors of a mesh,
two floats a tensor, which runs while the next step's gradients are computed. Plain parameters, as under
DistributedDataParallel, need no communication: equal gradients give equal noise.
"""

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from operator import is_
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate
from torch.distributed.tensor import Shard as Sharded

from pats_kernels.plan import Batch, Own, Shard, is_dtensor, whole_shard
from pats_kernels.private import copy_each_, local_tensor, local_tensors, split_specs

Box = tuple[slice, ...]  # the part of a tensor that a process holds


class Layout(NamedTuple):
    """The part of a DTensor that this process holds.

    Attributes:
        box: the local tensor is `[box]` of the whole one.
        shard: the same in the whole tensor's numbering; None if this process holds all of it.
    """

    box: Box
    shard: Shard | None


def layout_of(name: str, param: DTensor) -> Layout:
    """Where this process's part of a parameter lies.

    Raises:
        ValueError: names the parameter and the placement that is not supported.
    """
    mesh = param.device_mesh
    coordinate = mesh.get_coordinate()
    for placement in param.placements:
        if not (placement.is_replicate() or isinstance(placement, Sharded) or _is_strided(placement)):
            raise ValueError(
                f"{name}: PATS supports replicated and sharded parameters, but a placement is {placement!r}"
            )
    if coordinate is None:
        raise ValueError(f"{name}: this process is not in the parameter's {mesh}")
    layout = _layout(tuple(param.shape), tuple(mesh.shape), tuple(coordinate), tuple(param.placements))
    expected = tuple(part.stop - part.start for part in layout.box)
    held = tuple(local(param).shape)
    if expected != held:
        raise ValueError(
            f"{name}: shape mismatch: placements {param.placements} leave {expected} of {tuple(param.shape)} "
            f"to this process, but its local tensor is {held}"
        )
    return layout


@cache
def _layout(
    shape: tuple[int, ...],
    mesh_shape: tuple[int, ...],
    coordinate: tuple[int, ...],
    placements: tuple[Placement, ...],
) -> Layout:
    """Each mesh dimension cuts what the earlier ones left, into the pieces of `torch.chunk`.

    The mesh dimension of a strided placement comes first but cuts last. It arises when `fully_shard` and
    tensor parallelism split the same dimension of a tensor.
    """
    start, size = [0] * len(shape), list(shape)
    order = sorted(range(len(placements)), key=lambda i: _is_strided(placements[i]))
    for i in order:
        if not placements[i].is_replicate():
            dim: int = placements[i].dim  # type: ignore[attr-defined]
            piece = -(-size[dim] // mesh_shape[i])
            first = min(coordinate[i] * piece, size[dim])
            start[dim], size[dim] = start[dim] + first, min(piece, size[dim] - first)
    box = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
    if not any(n > 1 and not p.is_replicate() for n, p in zip(mesh_shape, placements, strict=True)):
        return Layout(box, None)
    whole = whole_shard(shape)
    offset = sum(a * stride for a, stride in zip(start, whole.strides, strict=True))
    counts = all(place == 0 for place, p in zip(coordinate, placements, strict=True) if p.is_replicate())
    return Layout(box, whole._replace(offset=offset, counts=counts))


def _is_strided(placement: Placement) -> bool:
    """Whether it is torch's private `_StridedShard`, a subclass of `Shard` in some versions only."""
    return hasattr(placement, "split_factor")


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, once it has arrived."""
    if not isinstance(tensor, DTensor):
        return tensor
    return _arrived(local_tensor(tensor))


def _arrived(held: Any) -> Any:
    wait = getattr(held, "wait", None)  # of torch's private type for tensors on their way from others
    return held if wait is None else wait()


def laid_out_as(value: Tensor, name: str, param: Tensor) -> Tensor:
    """Splits `value`, a tensor of the parameter's whole shape, as `param` is split.

    Raises:
        ValueError: see `layout_of`.
    """
    if not isinstance(param, DTensor):
        return value.full_tensor() if isinstance(value, DTensor) else value
    mesh, placements = param.device_mesh, param.placements
    if isinstance(value, DTensor):
        if (value.device_mesh, value.placements) == (mesh, placements):
            return value
        value = value.full_tensor()
    part = value[layout_of(name, param).box]
    return DTensor.from_local(
        part, mesh, placements, run_check=False, shape=param.shape, stride=param.stride()
    )


def sums_over_shards(parts: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Sums of (parameter, this process's part) over all shards: one sum for each way of splitting."""
    sums: dict[tuple[DeviceMesh, tuple[Placement, ...]], Tensor] = {}
    for param, part in parts:
        assert isinstance(param, DTensor)
        sum_over = tuple(Replicate() if p.is_replicate() else Partial() for p in param.placements)
        key = (param.device_mesh, sum_over)
        sums[key] = sums[key] + part if key in sums else part
    return [
        DTensor.from_local(part, mesh, placements, run_check=False).full_tensor()
        for (mesh, placements), part in sums.items()
    ]


class _Route(NamedTuple):
    """Where the shares of the tensors of one mesh are written, and where their means go."""

    mesh: DeviceMesh
    shares: Tensor  # float32 [tensors, 2]
    rows: list[Tensor]
    means: "list[weakref.ref[Tensor]]"


class _Lives:
    """Whether all of some tensors are still alive: else their ids may be other tensors'. Keeps none alive."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.all = True
        self._references = [weakref.ref(tensor, self._end) for tensor in tensors]

    def _end(self, _: object) -> None:
        self.all = False


@dataclass(slots=True)
class _Set:
    """Tensors that are stepped together, and what follows from that. Keeps none of them alive.

    Attributes:
        ids, stats: ids of the parameters and of their means.
        lives: whether all of both are alive.
        specs: how the parameters are split.
        matching: how the gradients were split when they were last found to match their parameters.
    """

    ids: list[int]
    stats: list[int]
    lives: _Lives
    specs: list[Any]
    matching: list[Any]
    shards: list[Shard | None]
    shares: Own[Tensor | None]
    routes: list[_Route]

    def holds(self, batch: Batch) -> bool:
        return (
            self.lives.all
            and self.ids == list(map(id, batch.params))
            and self.stats == list(map(id, batch.sens_stats))
            and _are(self.specs, _specs(batch.params))
        )


@dataclass(slots=True)
class _Message:
    """The shares of one mesh's tensors on their way through its process groups, one group after another."""

    route: _Route
    sent: Tensor  # the route's shares, or a copy on a device that the process group supports
    groups: list[dist.ProcessGroup]  # the groups that are still to come
    work: dist.Work
    found_inf: Tensor | None


class Statistics:
    """The means over all shards of an optimizer's parameters, from the processes' shares.

    `localized` returns a batch whose shares go to one buffer for each mesh. `start` sends these buffers,
    `finish` waits for them and writes the means where the next step reads them. All processes of a mesh must
    step the same tensors. They get the same bits, in whatever order the sum is taken.

    Tensors may also be stepped in several sets, each with its own messages; those of other sets stay on their
    way meanwhile. No tensor is in two sets: a new set replaces all sets that it shares a tensor with.
    """

    def __init__(self) -> None:
        self._set_of: dict[int, _Set] = {}  # by a tensor's id
        self._buffers: dict[Any, tuple[Tensor, list[Tensor]]] = {}
        # By the first tensor's id: the set that is being stepped, and the messages on their way.
        self._open: tuple[int, list[_Route]] = (0, [])
        self._pending: dict[int, list[_Message]] = {}

    def localized(self, batch: Batch) -> Batch:
        """The batch of the local tensors, once the means that it reads have arrived.

        Raises:
            ValueError: names the parameter if only one of it and its gradient is sharded, or if a placement
                is not supported.
        """
        first = id(batch.params[0])
        self._open = (first, [])
        self._receive(self._pending.pop(first, []))
        own = self._set_of.get(first)
        if own is None or not own.holds(batch):
            own = self._new_set(batch)
        grads = _matching(batch, own)
        averages = {name: _localized(column) for name, column in batch.averages.items()}
        self._open = (first, own.routes)
        return replace(
            batch,
            params=_localized(batch.params),
            grads=_localized(grads),
            shards=own.shards,
            shares=own.shares,
            **averages,
        )

    def _new_set(self, batch: Batch) -> _Set:
        places = batch.shards or [None] * len(batch.params)
        shards = [
            layout_of(batch.name(i), param).shard if isinstance(param, DTensor) else place
            for i, (param, place) in enumerate(zip(batch.params, places, strict=True))
        ]
        self.finish()
        for param in batch.params:
            if (old := self._set_of.get(id(param))) is not None:
                for other in old.ids:
                    if self._set_of.get(other) is old:  # an id may be another tensor's by now
                        del self._set_of[other]
        if len(self._set_of) + len(batch.params) > batch.kept:  # some are of tensors no longer kept
            self._set_of.clear()
            self._buffers.clear()
        shares, routes = self._routed(batch, shards)
        ids, stats = list(map(id, batch.params)), list(map(id, batch.sens_stats))
        lives = _Lives(tensor for tensor in (*batch.params, *batch.sens_stats) if tensor is not None)
        new = _Set(ids, stats, lives, _specs(batch.params), [], shards, shares, routes)
        self._set_of |= dict.fromkeys(ids, new)
        return new

    def _routed(
        self, batch: Batch, shards: Sequence[Shard | None]
    ) -> tuple[Own[Tensor | None], list[_Route]]:
        """Each tensor's share, a row of one buffer for each mesh and device; the routes of the buffers."""
        of_mesh: dict[Any, list[int]] = {}
        for i, (param, shard) in enumerate(zip(batch.params, shards, strict=True)):
            if shard is not None and batch.sens_stats[i] is not None and isinstance(param, DTensor):
                of_mesh.setdefault((param.device_mesh, param.device), []).append(i)
        shares: Own[Tensor | None] = Own([None] * len(shards))
        routes: list[_Route] = []
        for (mesh, device), index in of_mesh.items():
            buffer, rows = self._buffer(mesh, device, len(index), id(batch.params[index[0]]))
            means = [weakref.ref(stats) for i in index if (stats := batch.sens_stats[i]) is not None]
            routes.append(_Route(mesh, buffer, rows, means))
            for i, row in zip(index, rows, strict=True):
                shares[i] = row
        return shares, routes

    def _buffer(
        self, mesh: DeviceMesh, device: torch.device, count: int, first: int
    ) -> tuple[Tensor, list[Tensor]]:
        """A buffer for shares: the same for sets that take turns, because plans hold its address; sets that
        coexist have one each."""
        key = (mesh, device, count, first)
        if key not in self._buffers:
            buffer = torch.zeros((count, 2), dtype=torch.float32, device=device)
            self._buffers[key] = buffer, list(buffer.unbind())
        return self._buffers[key]

    def start(self, found_inf: Tensor | None) -> None:
        """Sends the shares that the kernels write."""
        first, routes = self._open
        messages: list[_Message] = []
        for route in routes:
            groups = _groups(route.mesh)
            sent = _for_group(route.shares, groups[0], route.mesh.device_type)
            work = dist.all_reduce(sent, group=groups[0], async_op=True)
            assert work is not None
            messages.append(_Message(route, sent, groups[1:], work, found_inf))
        if messages:
            self._pending[first] = messages
        self._open = (0, [])

    def finish(self) -> None:
        """Waits for all messages that were sent."""
        self._open = (0, [])  # of a step that failed
        for messages in self._pending.values():
            self._receive(messages)
        self._pending.clear()

    def _receive(self, messages: list[_Message]) -> None:
        """Waits for the messages and stores the means; after a skipped step the old means stay."""
        for message in messages:
            message.work.wait()
            for group in message.groups:
                dist.all_reduce(message.sent, group=group)
            shares = message.route.shares
            if message.sent is not shares:
                shares.copy_(message.sent)
            pairs = zip(message.route.means, message.route.rows, strict=True)
            alive = [(mean, row) for reference, row in pairs if (mean := reference()) is not None]
            if not alive:
                continue
            means, rows = map(list, zip(*alive, strict=True))
            if message.found_inf is not None:
                found = message.found_inf.to(shares.device) != 0
                rows = list(torch.where(found, torch.stack(means), torch.stack(rows)).unbind())
            copy_each_(means, rows)


def _matching(batch: Batch, own: _Set) -> list[Tensor]:
    """The gradients, split as their parameters. They are checked only if their specs are new."""
    specs = _specs(batch.grads)
    if _are(own.matching, specs):
        return batch.grads
    pairs = enumerate(zip(batch.params, batch.grads, strict=True))
    grads = [_laid_out(batch, i, param, grad) for i, (param, grad) in pairs]
    own.matching = specs if all(map(is_, grads, batch.grads)) else []
    return grads


def _laid_out(batch: Batch, i: int, param: Tensor, grad: Tensor) -> Tensor:
    """A gradient, split as its parameter."""
    sharded = isinstance(param, DTensor)
    if sharded != isinstance(grad, DTensor):
        kinds = ["a DTensor" if isinstance(tensor, DTensor) else "a plain tensor" for tensor in (param, grad)]
        raise ValueError(f"{batch.name(i)}: the parameter is {kinds[0]}, its gradient {kinds[1]}")
    if not sharded:
        return grad
    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    other: DeviceMesh = grad.device_mesh  # type: ignore[attr-defined]
    if mesh != other:
        raise ValueError(f"{batch.name(i)}: the parameter is on {mesh}, its gradient on {other}")
    if placements != grad.placements:  # type: ignore[attr-defined]
        grad = grad.redistribute(mesh, placements)  # type: ignore[attr-defined]
    return grad


def _specs(tensors: Sequence[Tensor]) -> list[Any]:
    """The objects that say how each tensor is split; None for plain tensors."""
    if {*map(type, tensors)} == {DTensor}:
        return split_specs(tensors)
    return [split_specs([t])[0] if isinstance(t, DTensor) else None for t in tensors]


def _are(those: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether both hold the same objects."""
    return len(those) == len(others) and all(map(is_, those, others))


def _localized(column: Sequence[Any]) -> list[Any]:
    """The part of each tensor that this process holds, once it has arrived."""
    kinds = {*map(type, column)}
    if not any(map(is_dtensor, kinds)):
        return column if isinstance(column, list) else list(column)
    held = local_tensors(column) if kinds == {DTensor} else list(map(local, column))
    return held if {*map(type, held)} <= {Tensor} else list(map(_arrived, held))


def _groups(mesh: DeviceMesh) -> list[dist.ProcessGroup]:
    """The process groups whose sums, one after another, give the sum over the mesh.

    The sum includes replicas, although only one of them counts. So all get the same bits and never drift.
    """
    world = dist.group.WORLD
    if mesh.ndim > 1 and world is not None and mesh.size() == dist.get_world_size():
        return [world]
    return [mesh.get_group(dim) for dim in range(mesh.ndim)]


def _for_group(buffer: Tensor, group: dist.ProcessGroup, device_type: str) -> Tensor:
    """The buffer, or a copy on another type of device if the group has no backend for the buffer's device.

    That is so if parameters are offloaded to the CPU and the only backend is NCCL.
    """
    devices = dist.get_backend_config(group)
    return buffer if f"{buffer.device.type}:" in devices else buffer.to(device_type)
