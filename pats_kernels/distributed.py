"""Sharded parameters: where a shard lies in the whole tensor, and the statistics over all shards.

A DTensor (`fully_shard`, hybrid sharding, tensor parallel, or both at once) is updated as the local tensor
that this process holds of it. Noise depends on an element's number in the whole tensor, so how it is split
changes nothing, and all that processes tell one another is their share of mean(S) and mean(U): one all-reduce
of two floats a tensor for all tensors of a mesh, under way while the next step's gradients are computed.
Plain parameters, as DistributedDataParallel has them, need no word: equal gradients give equal noise.
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

Box = tuple[slice, ...]  # what a process holds of a tensor


class Layout(NamedTuple):
    """What this process holds of a DTensor.

    Attributes:
        box: the local tensor is the whole one's `[box]`.
        shard: the same in the whole tensor's numbering; None where this process holds all of it.
    """

    box: Box
    shard: Shard | None


def layout_of(name: str, param: DTensor) -> Layout:
    """Where this process's part of a parameter lies.

    Raises:
        ValueError: naming the parameter and the placement that no step could work with.
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
    """Each mesh dimension cuts what those before it left, in `torch.chunk`'s pieces.

    A strided placement says that its mesh dimension comes first and yet cuts last: `fully_shard` over tensor
    parallelism on one dimension of the tensor.
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
    """Whether it is torch's private `_StridedShard`, in some versions a `Shard` and in others not."""
    return hasattr(placement, "split_factor")


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, once it is there."""
    if not isinstance(tensor, DTensor):
        return tensor
    return _arrived(local_tensor(tensor))


def _arrived(held: Any) -> Any:
    wait = getattr(held, "wait", None)  # of torch's private type for what is on its way from other processes
    return held if wait is None else wait()


def laid_out_as(value: Tensor, name: str, param: Tensor) -> Tensor:
    """`value`, a tensor of the parameter's whole shape, as this process needs it beside `param`.

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
    """Sums over all shards of (parameter, what this process has to add): one for each way of splitting."""
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
    """Where the shares of the tensors of one mesh are written, and where their means are to go."""

    mesh: DeviceMesh
    shares: Tensor  # float32 [tensors, 2]
    rows: list[Tensor]
    means: "list[weakref.ref[Tensor]]"


class _Lives:
    """Whether all of some tensors are still alive, as an id may be another's later. Keeps none of them so."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.all = True
        self._references = [weakref.ref(tensor, self._end) for tensor in tensors]

    def _end(self, _: object) -> None:
        self.all = False


@dataclass(slots=True)
class _Set:
    """Tensors that are stepped together, and what follows from which they are. Keeps none of them alive.

    Attributes:
        ids, stats: of the parameters, and of their means.
        lives: of both.
        specs: how the parameters are split.
        matching: how gradients were split when they were last found to be so as their parameters.
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
    """The shares of the tensors of one mesh, on their way through its process groups, one after another."""

    route: _Route
    sent: Tensor  # the route's shares, or a copy where the process group can have it
    groups: list[dist.ProcessGroup]  # those that are still to come
    work: dist.Work
    found_inf: Tensor | None


class Statistics:
    """The means over all shards of an optimizer's parameters, from their shares.

    `localized` gives a batch whose shares go to one buffer a mesh, `start` sends these, `finish` waits for
    them and writes the means where the next step reads them. All processes of a mesh have to step the same
    tensors, and get the same bits, whatever the order in which the sum is taken.

    Tensors may also be stepped in several sets, each with its own messages: those of the others stay on their
    way meanwhile. No tensor is in two sets: a new one takes the place of all that it shares a tensor with.
    """

    def __init__(self) -> None:
        self._set_of: dict[int, _Set] = {}  # by a tensor's id
        self._buffers: dict[Any, tuple[Tensor, list[Tensor]]] = {}
        # By the first tensor's id: the set that is being stepped, and the messages that are on their way.
        self._open: tuple[int, list[_Route]] = (0, [])
        self._pending: dict[int, list[_Message]] = {}

    def localized(self, batch: Batch) -> Batch:
        """The batch of what this process holds of each tensor, once the means that it reads are there.

        Raises:
            ValueError: naming the parameter, where it and its gradient are not both sharded, or a placement
                that no step could work with.
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
        if len(self._set_of) + len(batch.params) > batch.kept:  # some are of tensors that are kept no more
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
        """Where each tensor's share goes, rows of one buffer for each mesh and device; and on from there."""
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
        """The same for sets that take turns, since plans know it; another for each of those that coexist."""
        key = (mesh, device, count, first)
        if key not in self._buffers:
            buffer = torch.zeros((count, 2), dtype=torch.float32, device=device)
            self._buffers[key] = buffer, list(buffer.unbind())
        return self._buffers[key]

    def start(self, found_inf: Tensor | None) -> None:
        """Sends the shares that the kernels have been asked to write."""
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
        """Waits for all that was sent."""
        self._open = (0, [])  # of a step that failed
        for messages in self._pending.values():
            self._receive(messages)
        self._pending.clear()

    def _receive(self, messages: list[_Message]) -> None:
        """Waits for the messages, and stores the means; where a step was skipped they stay."""
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
    """The gradients, laid out as their parameters: looked at where what says how they are split is new."""
    specs = _specs(batch.grads)
    if _are(own.matching, specs):
        return batch.grads
    pairs = enumerate(zip(batch.params, batch.grads, strict=True))
    grads = [_laid_out(batch, i, param, grad) for i, (param, grad) in pairs]
    own.matching = specs if all(map(is_, grads, batch.grads)) else []
    return grads


def _laid_out(batch: Batch, i: int, param: Tensor, grad: Tensor) -> Tensor:
    """A gradient, laid out as its parameter."""
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
    """What says how each is split; None for plain tensors."""
    if {*map(type, tensors)} == {DTensor}:
        return split_specs(tensors)
    return [split_specs([t])[0] if isinstance(t, DTensor) else None for t in tensors]


def _are(those: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether they are the very same objects."""
    return len(those) == len(others) and all(map(is_, those, others))


def _localized(column: Sequence[Any]) -> list[Any]:
    """What this process holds of each tensor, once it is there."""
    kinds = {*map(type, column)}
    if not any(map(is_dtensor, kinds)):
        return column if isinstance(column, list) else list(column)
    held = local_tensors(column) if kinds == {DTensor} else list(map(local, column))
    return held if {*map(type, held)} <= {Tensor} else list(map(_arrived, held))


def _groups(mesh: DeviceMesh) -> list[dist.ProcessGroup]:
    """The process groups whose sums, one after another, are the sum over the mesh.

    Replicas are summed over too, though but one of them counts: so all get the same bits, and never drift.
    """
    world = dist.group.WORLD
    if mesh.ndim > 1 and world is not None and mesh.size() == dist.get_world_size():
        return [world]
    return [mesh.get_group(dim) for dim in range(mesh.ndim)]


def _for_group(buffer: Tensor, group: dist.ProcessGroup, device_type: str) -> Tensor:
    """The buffer, or a copy on a device of another type where the group has no backend for the buffer's: as
    where parameters are offloaded to the CPU, and there is NCCL alone."""
    devices = dist.get_backend_config(group)
    return buffer if f"{buffer.device.type}:" in devices else buffer.to(device_type)
