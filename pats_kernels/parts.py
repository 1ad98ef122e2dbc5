"""Plain tensors that may be parts of larger ones: how a process finds out what the others hold.

A DTensor knows where it lies in its whole tensor (`distributed`). But FSDP1, ZeRO, Megatron and others give
plain tensors to the optimizer. Another process may hold the same tensor, a replica, which must draw the same
noise. Or it may hold another part of the model, which must draw different noise. Two ways to find out:

- FSDP1 marks its parameters, and its handles know which elements a process holds: `flat_places`. torch's
  ZeroRedundancyOptimizer knows the positions of the parameters that it gave to each process:
  `zero_positions`.
- Otherwise each process compares what it holds with what the others hold: `streams`. Replicas are equal to
  the bit, parts are not.
"""

import gc
import hashlib
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pats_kernels.plan import Shard, is_dtensor

SAMPLE = 4096  # elements of a tensor that are compared; different parts differ in nearly all of them
FEW = 16  # a tensor with fewer different values may have equal parts by chance
PATIENCE = 60.0  # seconds to wait for a process of lower rank, which steps at the same time as this one
GLANCE = 5.0  # seconds to wait where an answer is unlikely


def digest(tensor: Tensor) -> Tensor:
    """An int64 number that depends on every bit of a tensor and on its position."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.detach().flatten().view(integers[tensor.element_size()]).to(torch.int64)
    odd = 2 * torch.arange(bits.numel(), device=bits.device) + 1
    golden = -0x61C8864680B583EB  # the golden ratio's 64 bits, as Philox has its 32
    return ((bits + odd) * (odd * golden)).sum()


def is_flattened(param: Tensor) -> bool:
    """Whether FSDP1 made this parameter, or took it apart."""
    return getattr(param, "_fsdp_flattened", False) is True


def flat_places(params: Sequence[Tensor]) -> dict[int, Shard]:
    """Where FSDP1's parts lie, by the parameter's id. Parts that its handles do not know are left out.

    The place is in the original tensor with use_orig_params=True, else in the flat one, which all processes
    number alike. A part has its own means, so its `Shard` says that the whole is as large as the part. If
    torch has renamed what this function reads, no place is known; the warning `flattened` says so.
    """
    try:
        return _flat_places(params)
    except AttributeError:
        return {}


def _flat_places(params: Sequence[Tensor]) -> dict[int, Shard]:
    module = sys.modules.get("torch.distributed.fsdp._flat_param")
    if module is None:
        return {}
    wanted = {id(param) for param in params}
    places: dict[int, Shard] = {}
    # A parameter has no reference to its handle. This search runs once, at the first step.
    for handle in _alive(module.FlatParamHandle):
        flat = handle.flat_param
        if id(flat) in wanted:
            first = handle.rank * flat.numel() if handle.uses_sharded_strategy else 0
            places[id(flat)] = Shard(first, (1,), flat.numel())
        elif flat._params is not None and handle.uses_sharded_strategy:
            for param, info in zip(flat._params, flat._shard_param_infos, strict=True):
                if id(param) in wanted and info.in_shard:
                    places[id(param)] = Shard(info.intra_param_start_idx, (1,), info.numel_in_shard)
        elif flat._params is not None:
            places |= {id(p): Shard(0, p.stride(), p.numel()) for p in flat._params if id(p) in wanted}
    return places


def zero_positions(param_groups: Sequence[Mapping[str, Any]]) -> dict[int, int]:
    """By the parameter's id, its position in the ZeroRedundancyOptimizer that made this optimizer.

    Empty if none did, or if torch has renamed what this function reads. Then the processes compare what they
    hold, as for other parts.

    Args:
        param_groups: of the optimizer that it made, with this process's share of the parameters.
    """
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    if module is None or not dist.is_initialized():  # looking for one takes a tenth of a second
        return {}
    for outer in _alive(module.ZeroRedundancyOptimizer):
        if getattr(getattr(outer, "optim", None), "param_groups", None) is param_groups:
            return {id(param): position for param, position in getattr(outer, "_param_to_index", {}).items()}
    return {}


def _alive(kind: type) -> list[Any]:
    """All instances of a class in this process. By `type`: `isinstance` would call into each object."""
    return [found for found in gc.get_objects() if issubclass(type(found), kind)]


def are_several() -> bool:
    """Whether this is one of several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def streams(params: Sequence[Tensor | None]) -> tuple[list[int], bool]:
    """For each tensor the lowest rank that holds the same bits at the same place in its optimizer.

    Also returns whether to warn: true on rank 0 and on the first process that is not its replica.

    If all processes are replicas, as under DistributedDataParallel, every rank is 0. Tensors with few
    different values, such as a layer norm's ones or a bias's zeros, may be equal by chance, so their
    gradients are compared too. Reads a sample of each tensor and waits for the device once. The processes
    exchange the results through the process group's store: a collective would hang if a process takes no
    part in the step.

    Args:
        params: plain tensors, in the optimizer's order. None and DTensors are not compared and give 0.
    """
    nothing = [0] * len(params)
    compared = {i: p for i, p in enumerate(params) if p is not None and _is_plain(p)}
    exchange = _exchange() if are_several() and (compared or not params) else None
    if exchange is None:
        return nothing, False
    own = np.zeros(1 + len(params), dtype=np.int64)
    own[0] = _hashed(tuple((i, tuple(p.shape), str(p.dtype)) for i, p in compared.items()))
    own[[1 + i for i in compared]] = _fingerprints(list(compared.values()))
    exchange.say(own)
    found = np.where(own[1:] == 0, 0, exchange.rank)
    others: list[np.ndarray] = []
    until = time.monotonic() + PATIENCE
    for rank in range(exchange.rank):
        others.append(exchange.hear(rank, own[0], until))
        theirs = others[-1][1 : len(own)]
        same = np.flatnonzero(theirs == own[1 : 1 + len(theirs)])
        found[same] = np.minimum(found[same], rank)
        if (found < exchange.rank).all():
            break
    if exchange.rank == 0:
        theirs = exchange.hear(1, own[0], time.monotonic() + GLANCE)
        apart = len(theirs) > 0 and not np.array_equal(theirs, own)
    else:
        first = all(np.array_equal(theirs, others[0]) for theirs in others[1:])
        apart = first and bool((found == exchange.rank).any())
    return found.tolist(), apart


APART = (
    "the processes of this run hold different tensors at the same place of their optimizers: parts of one "
    "model (ZeRO, flat buffers, plain tensors under tensor or pipeline parallelism), or different models. "
    "PATS cannot know where a part lies in its whole tensor. So each process draws noise of its own for what "
    "only it holds, and each part is normalized by its own means. As a result, the noise differs from that "
    "of a run in one process, and a run resumed on another number of processes draws other noise. To avoid "
    "this, shard with FSDP2 (fully_shard), or set 'tensor_id' in the param groups to say which tensors they "
    "are"
)


class _Exchange:
    """Messages between the processes of the default group, through its key-value store.

    Each process numbers its messages. A reader looks for a message with its own signature, because a process
    may have an optimizer that the others do not have.
    """

    def __init__(self, store: Any) -> None:
        self.store = store
        self.rank = dist.get_rank()
        self._said: dict[int, list[np.ndarray]] = {}

    def say(self, own: np.ndarray) -> None:
        """Publishes a message: a signature, then the fingerprints."""
        said = self._said.setdefault(self.rank, [])
        self.store.set(self._key(self.rank, len(said)), own.tobytes())
        said.append(own)

    def hear(self, rank: int, signature: int, until: float) -> np.ndarray:
        """A process's message with the signature that this one has just sent, or else that of this turn."""
        own, theirs = self._said[self.rank], self._said.setdefault(rank, [])
        place = sum(said[0] == signature for said in own) - 1
        while True:
            while self.store.check([key := self._key(rank, len(theirs))]):
                theirs.append(np.frombuffer(self.store.get(key), dtype=np.int64))
            same = [said for said in theirs if said[0] == signature]
            if len(same) > place:
                return same[place]
            if len(theirs) >= len(own):  # it sent something else; the awaited message may still come
                until = min(until, time.monotonic() + GLANCE)
            if time.monotonic() >= until:
                return theirs[len(own) - 1] if len(theirs) >= len(own) else np.empty(0, dtype=np.int64)
            time.sleep(0.01)

    @staticmethod
    def _key(rank: int, turn: int) -> str:
        return f"pats_kernels/{rank}/{turn}"


_exchanges: list[_Exchange] = []  # that of the current process group


def _exchange() -> _Exchange | None:
    """The default process group's exchange; None without a store, or with a fake one that stores nothing."""
    default_store = getattr(dist.distributed_c10d, "_get_default_store", None)
    if default_store is None:
        warnings.warn(
            f"PATS: torch {torch.__version__} does not keep a process group's store where PATS looks for "
            "it, so PATS cannot compare what the processes hold: plain tensors that are other parts of a "
            "model on each process draw the same noise. If there are such, set 'tensor_id' in their param "
            "groups",
            stacklevel=2,
        )
        return None
    try:
        store = default_store()
        if store.check(["pats_kernels"]):  # nobody stores this key; a FakeStore may have every key
            return None
    except (AttributeError, RuntimeError, ValueError):
        return None
    if not _exchanges or _exchanges[0].store is not store:
        _exchanges[:] = [_Exchange(store)]
    return _exchanges[0]


def _is_plain(tensor: Tensor) -> bool:
    """Whether this process holds the tensor's elements and can read them."""
    strided = tensor.layout is torch.strided and tensor.dtype.is_floating_point
    return strided and not tensor.is_meta and not is_dtensor(type(tensor)) and _has_memory(tensor)


def _has_memory(tensor: Tensor) -> bool:
    """False for tensors that are made of other tensors."""
    return tensor.numel() == 0 or tensor.data_ptr() != 0


def _key(turn: int, rank: int) -> str:
    return f"pats_kernels/{turn}/{rank}"


@torch.no_grad()
def _fingerprints(params: Sequence[Tensor]) -> list[int]:
    """A number above 0 for each tensor, the same for its replicas."""
    numbers = [0] * len(params)
    on_device: dict[torch.device, list[int]] = {}
    for i, param in enumerate(params):
        on_device.setdefault(param.device, []).append(i)
    for index in on_device.values():
        rows = torch.stack([_fingerprint(params[i]) for i in index]).tolist()
        for i, (value, gradient, few) in zip(index, rows, strict=True):
            seen = value, gradient if few else 0
            numbers[i] = _hashed((tuple(params[i].shape), str(params[i].dtype), *seen))
    return numbers


def _fingerprint(param: Tensor) -> Tensor:
    """Digests of a sample of the values and of the gradient; whether there are few values: int64 [3]."""
    nothing = torch.zeros((), dtype=torch.int64, device=param.device)
    if param.numel() == 0:
        return torch.stack((nothing, nothing, nothing))
    size = min(SAMPLE, param.numel())
    places = torch.arange(size, device=param.device) * param.numel() // size
    values = torch.take(param.detach(), places)
    grad = param.grad
    comparable = grad is not None and _is_plain(grad) and grad.numel() == param.numel()
    of_grad = digest(torch.take(grad, places)) if grad is not None and comparable else nothing
    ordered = values.sort().values
    distinct = 1 + (ordered[1:] != ordered[:-1]).sum()
    return torch.stack((digest(values), of_grad, (distinct < min(max(size, 2), FEW)).to(torch.int64)))


def _hashed(values: tuple[Any, ...]) -> int:
    """A tuple's hash that is the same in every process; Python's own hash of a string is not."""
    return int.from_bytes(hashlib.blake2b(repr(values).encode(), digest_size=7).digest(), "little") + 1


def flattened(name: str, known: bool) -> str:
    """The warning for FSDP1's parameters; `name` is the first of them."""
    lost = "a run resumed on another number of processes has other means"
    if not known:
        lost = f"each process draws noise of its own, and {lost} and other noise"
    return (
        f"{name} and others are parts that FullyShardedDataParallel (FSDP1) made. Their sensitivities are "
        f"normalized by the means of each part, not of each tensor, and {lost}. "
        "FSDP2 (fully_shard) avoids this"
    )
