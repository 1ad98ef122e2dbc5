"""A debugging aid that checks that replicas never drift apart; no step needs it."""

from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from pats_kernels.distributed import local
from pats_kernels.optim import PATS
from pats_kernels.parts import digest
from pats_kernels.state import parameter_names


def check_replicas(optimizer: Optimizer | PATS, group: dist.ProcessGroup | None = None) -> None:
    """Checks that replicas have the same bits: in parameters, and in the state of the optimizer and PATS.

    Costs a pass over the memory and two small all-reduces for each process group. Every process must call it.

    Args:
        optimizer: a `PATSAdamW`, any other optimizer, or the `PATS` attached to one.
        group: the processes that hold replicas of plain tensors; None: all. DTensors know their own.

    Raises:
        RuntimeError: on all processes of a group, if a tensor is not the same on them; names the first one.
    """
    owner = optimizer.optimizer if isinstance(optimizer, PATS) else optimizer
    states = [owner.state, *([optimizer.state] if isinstance(optimizer, PATS) else [])]
    everyone = group or dist.distributed_c10d._get_default_group()
    entries: dict[dist.ProcessGroup, list[tuple[str, Tensor]]] = {}
    for param, name in parameter_names(owner.param_groups).items():
        tensors: dict[str, Any] = {name: param}
        for state in states:
            tensors |= {f"{key} of {name}": value for key, value in state.get(param, {}).items()}
        for label, tensor in tensors.items():
            if isinstance(tensor, Tensor):
                bits = digest(local(tensor))
                for replicas in _replica_groups(tensor, everyone):
                    entries.setdefault(replicas, []).append((label, bits))
    messages: list[str] = []
    for replicas, labelled in entries.items():
        labels, digests = zip(*labelled, strict=True)
        device = (
            torch.device("cuda") if "cpu:" not in dist.get_backend_config(replicas) else torch.device("cpu")
        )
        low = torch.stack([digest.to(device) for digest in digests])
        high = low.clone()
        dist.all_reduce(low, dist.ReduceOp.MIN, group=replicas)
        dist.all_reduce(high, dist.ReduceOp.MAX, group=replicas)
        different = (low != high).nonzero().flatten().tolist()
        if different:
            messages.append(
                f"replicas have drifted apart: {labels[different[0]]} is not the same on all of "
                f"{dist.get_world_size(replicas)} processes, nor are {len(different) - 1} other tensors"
            )
    if messages:  # not earlier: processes of another group would wait for this one
        raise RuntimeError(messages[0])


def watch_replicas(
    optimizer: Optimizer | PATS, every: int = 100, group: dist.ProcessGroup | None = None
) -> RemovableHandle:
    """Runs `check_replicas` after every `every` steps, until `remove()` of the returned handle.

    Args:
        optimizer: as in `check_replicas`.
        every: number of steps from one check to the next.
        group: as in `check_replicas`.
    """
    owner = optimizer.optimizer if isinstance(optimizer, PATS) else optimizer
    steps = count(1)

    def check(*_: Any) -> None:
        if next(steps) % every == 0:
            check_replicas(optimizer, group)

    return owner.register_step_post_hook(check)


def _replica_groups(tensor: Tensor, everyone: dist.ProcessGroup) -> list[dist.ProcessGroup]:
    """The groups whose processes hold the same values as this one."""
    if not isinstance(tensor, DTensor):
        return [everyone]
    mesh = tensor.device_mesh
    return [mesh.get_group(dim) for dim, p in enumerate(tensor.placements) if p.is_replicate()]
