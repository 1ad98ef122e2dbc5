"""Parts that do not say so: what other processes hold where an optimizer is given plain tensors.

A DTensor knows where it lies in its whole tensor (`distributed`). FSDP1, ZeRO, Megatron and others hand
plain tensors to the optimizer. Another process may hold the same, a replica that has to draw the same noise,
or another part of the model, which must not. Two things tell:

- FSDP1 marks its parameters, and its handles know which elements a process holds: `flat_places`. torch's
  ZeroRedundancyOptimizer knows where in its own order those stand that it gave away: `zero_positions`.
- Otherwise each process compares what it holds with what the others do: `streams`. Replicas are equal to the
  bit, parts are not.
"""

import gc
import hashlib
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from itertools import count
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pats_kernels.plan import Shard, is_dtensor

SAMPLE = 4096  # elements of a tensor that are compared: other parts differ in nearly all of them
PATIENCE = timedelta(seconds=60)  # for processes with a lower rank, which step at the same time as this one
GLANCE = timedelta(seconds=5)  # of rank 0, which only wants to know whether to warn

_turn = count()  # how often this process has compared: every process does it in the same order


def digest(tensor: Tensor) -> Tensor:
    """A number, int64, that depends on every bit of a tensor and on where it stands."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.detach().flatten().view(integers[tensor.element_size()]).to(torch.int64)
    odd = 2 * torch.arange(bits.numel(), device=bits.device) + 1
    golden = -0x61C8864680B583EB  # the golden ratio's 64 bits, as Philox has its 32
    return ((bits + odd) * (odd * golden)).sum()


def is_flattened(param: Tensor) -> bool:
    """Whether FSDP1 made this parameter, or took it apart."""
    return getattr(param, "_fsdp_flattened", False) is True


def flat_places(params: Sequence[Tensor]) -> dict[int, Shard]:
    """Where FSDP1's parts lie, by the parameter's id; those of which its handles do not know are left out.

    With use_orig_params=True in the original tensor, else in the flat one, which all processes number alike.
    A part's means are its own: its `Shard` says that it is as large as the part.
    """
    module = sys.modules.get("torch.distributed.fsdp._flat_param")
    if module is None:
        return {}
    wanted = {id(param) for param in params}
    places: dict[int, Shard] = {}
    # A parameter does not lead to its handle; this is looked for once, at the first step.
    for handle in [o for o in gc.get_objects() if isinstance(o, module.FlatParamHandle)]:
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

    Empty where none did.

    Args:
        param_groups: those of the optimizer that it made, which hold this process's share of the parameters.
    """
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    if module is None:
        return {}
    for outer in [o for o in gc.get_objects() if isinstance(o, module.ZeroRedundancyOptimizer)]:
        if getattr(getattr(outer, "optim", None), "param_groups", None) is param_groups:
            return {id(param): position for param, position in outer._param_to_index.items()}
    return {}


def are_several() -> bool:
    """Whether this is one of several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def streams(params: Sequence[Tensor | None]) -> tuple[list[int], bool]:
    """For each tensor the lowest rank that holds the same, to the bit, at its place in the optimizer.

    Also whether to warn: on rank 0, and on the first process that is no replica of it.

    The rank is 0 everywhere where all processes are replicas, as under DistributedDataParallel. A tensor
    whose elements are all equal tells nothing: there the gradients are compared too. Reads a sample of each
    tensor and waits for the device once. What is exchanged goes through the process group's store: a
    collective would hang where a process takes no part in the step.

    Args:
        params: plain tensors, in the optimizer's order; None, and DTensors, are not compared: 0.
    """
    nothing = [0] * len(params)
    compared = {i: p for i, p in enumerate(params) if p is not None and _is_plain(p)}
    store = _store() if are_several() and (compared or not params) else None
    if store is None:
        return nothing, False
    rank, turn = dist.get_rank(), next(_turn)
    own = np.zeros(len(params), dtype=np.int64)
    own[list(compared)] = _fingerprints(list(compared.values()))
    store.set(_key(turn, rank), own.tobytes())
    found = np.where(own == 0, 0, rank)
    others: list[np.ndarray] = []
    for other in range(rank):
        theirs = _fetched(store, turn, other, PATIENCE)
        others.append(theirs)
        shared = min(len(theirs), len(own))
        same = np.flatnonzero(theirs[:shared] == own[:shared])
        found[same] = np.minimum(found[same], other)
        if (found < rank).all():
            break
    first_apart = all(np.array_equal(theirs, others[0]) for theirs in others[1:])
    if rank == 0:
        theirs = _fetched(store, turn, 1, GLANCE)
        apart = len(theirs) > 0 and not np.array_equal(theirs, own)
    else:
        apart = first_apart and bool((found == rank).any())
    return found.tolist(), apart


APART = (
    "the processes of this run hold different tensors at the same place of their optimizers: parts of a "
    "model (ZeRO, flat buffers, plain tensors under tensor or pipeline parallelism), or models of their own. "
    "Where a part lies in its whole cannot be known, so each process draws noise of its own for what only it "
    "holds, and each part has means of its own. Lost by that: the noise is not that of one process, and a "
    "run resumed on another number of processes draws other noise. FSDP2 (fully_shard) loses nothing, and a "
    "param group's 'tensor_id' says which tensors they are"
)


def _store() -> Any:
    """The default process group's key-value store; None where it has none."""
    try:
        return dist.distributed_c10d._get_default_store()
    except (AttributeError, RuntimeError, ValueError):
        return None


def _is_plain(tensor: Tensor) -> bool:
    """Whether it is a tensor whose elements this process holds and can read."""
    strided = tensor.layout is torch.strided and tensor.dtype.is_floating_point
    return strided and not tensor.is_meta and not is_dtensor(type(tensor))


def _key(turn: int, rank: int) -> str:
    return f"pats_kernels/{turn}/{rank}"


def _fetched(store: Any, turn: int, rank: int, patience: timedelta) -> np.ndarray:
    """What another process holds: its fingerprints, or none where it has said nothing in time."""
    try:
        store.wait([_key(turn, rank)], patience)
        return np.frombuffer(store.get(_key(turn, rank)), dtype=np.int64)
    except (RuntimeError, ValueError):  # a store's timeout is a RuntimeError
        return np.empty(0, dtype=np.int64)


@torch.no_grad()
def _fingerprints(params: Sequence[Tensor]) -> list[int]:
    """A number above 0 for each tensor, which its replicas have too."""
    numbers = [0] * len(params)
    on_device: dict[torch.device, list[int]] = {}
    for i, param in enumerate(params):
        on_device.setdefault(param.device, []).append(i)
    for index in on_device.values():
        rows = torch.stack([_fingerprint(params[i]) for i in index]).tolist()
        for i, (value, gradient, constant) in zip(index, rows, strict=True):
            seen = value, gradient if constant else 0
            numbers[i] = _hashed((tuple(params[i].shape), str(params[i].dtype), *seen))
    return numbers


def _fingerprint(param: Tensor) -> Tensor:
    """Digests of a sample of the values and of the gradient, and whether all values are equal: int64 [3]."""
    nothing = torch.zeros((), dtype=torch.int64, device=param.device)
    if param.numel() == 0:
        return torch.stack((nothing, nothing, nothing))
    size = min(SAMPLE, param.numel())
    places = torch.arange(size, device=param.device) * param.numel() // size
    values = torch.take(param.detach(), places)
    grad = param.grad
    comparable = grad is not None and _is_plain(grad) and grad.numel() == param.numel()
    of_grad = digest(torch.take(grad, places)) if grad is not None and comparable else nothing
    return torch.stack((digest(values), of_grad, (values == values[0]).all().to(torch.int64)))


def _hashed(values: tuple[Any, ...]) -> int:
    """A tuple's hash that every process has: Python's own of a string is another in each."""
    return int.from_bytes(hashlib.blake2b(repr(values).encode(), digest_size=7).digest(), "little") + 1


def flattened(name: str, known: bool) -> str:
    """The warning for FSDP1's parameters, of which `name` is the first."""
    lost = "a run resumed on another number of processes has other means"
    if not known:
        lost = f"each process draws noise of its own, and {lost} and other noise"
    return (
        f"{name} and others are parts that FullyShardedDataParallel (FSDP1) made. Their sensitivities are "
        f"normalized by the means of each part, not of each tensor, and {lost}. "
        "FSDP2 (fully_shard) loses nothing"
    )
