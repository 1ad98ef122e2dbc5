"""The reference as a backend: plain PyTorch operations on any device, if nothing else can run."""

from typing import Any

import torch
from torch import Tensor

from pats_kernels.counters import advanced, steps_of
from pats_kernels.hyperparameters import AdamWHyperparameters, Hyperparameters, defaults_of
from pats_kernels.plan import Batch, Launch, Phase, Shard
from pats_kernels.reference import pats_adamw_update_, pats_update_


def unavailable(device: torch.device) -> str | None:
    return None


def step_(
    launch: Launch, batch: Batch, phase: Phase, grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """The reference's update, one tensor after another, without a sync.

    Exact normalization is delayed normalization with the means of the state just updated. Its first phase
    computes these means by updating copies.
    """
    for i in launch.index:
        grad = batch.grads[i]
        if grad_scale is not None:
            grad = (grad / grad_scale.reshape(())).to(grad.dtype)  # as a scalar: 0-d gradients stay 0-d
        for target, value in _updated(batch, i, grad, phase, copies=found_inf is not None):
            if found_inf is not None:
                value = torch.where(found_inf.squeeze() != 0, target, value)
            if value is not target:
                target.copy_(value)


def _updated(batch: Batch, i: int, grad: Tensor, phase: Phase, copies: bool) -> list[tuple[Tensor, Tensor]]:
    """The phase's writes for one tensor, as (target, value); without `copies`, some are done already."""
    h, count, stats = batch.hyperparameters[i], batch.steps[i], batch.sens_stats[i]
    shard = batch.shards[i] if batch.shards else None
    update_: Any = pats_update_
    columns = (batch.params, batch.exp_avg_sens, batch.exp_avg_unc)
    if isinstance(h, AdamWHyperparameters):
        update_ = pats_adamw_update_
        columns = (batch.params, batch.exp_avg, batch.exp_avg_sq, batch.exp_avg_sens, batch.exp_avg_unc)
    live = [column[i] if column else None for column in columns]
    copies |= phase == "averages"
    new = [tensor.clone() if copies and tensor is not None else tensor for tensor in live]
    means = None if stats is None else stats.clone()

    nonfinite = torch.zeros((), dtype=torch.int64, device=grad.device)
    if phase != "averages" or stats is not None:
        param, *averages = new
        t = count if isinstance(count, int) else steps_of(count) + (phase != "noise")
        arguments = _arguments(h) | {"step": t, "tensor_id": batch.tensor_ids[i], "normalization": "delayed"}
        numbers = None if shard is None else numbers_of(shard, grad)
        nonfinite = update_(param, grad, *averages, means, **arguments, numbers=numbers)

    writes = list(zip(live, new, strict=True)) if phase != "averages" else []
    if phase != "noise":
        share = batch.shares[i] if batch.shares else None
        writes.append((stats if share is None else share, _share(means, grad, shard)))
        if isinstance(count, Tensor):
            writes.append((count, advanced(count)))
        counter = batch.nonfinite[i] if batch.nonfinite else None
        if counter is not None:
            writes.append((counter, counter + nonfinite))
    return [(target, value) for target, value in writes if target is not None and value is not None]


def _share(means: Tensor | None, grad: Tensor, shard: Shard | None) -> Tensor | None:
    """A shard's part of the whole tensor's means."""
    if means is None or shard is None:
        return means
    if not shard.counts or grad.numel() == 0:
        return torch.zeros_like(means)
    return means * (grad.numel() / shard.numel)


def numbers_of(shard: Shard, like: Tensor) -> Tensor:
    """The elements' row-major numbers in the unsharded tensor: int64, of `like`'s shape and device."""
    numbers = torch.full(like.shape, shard.offset, dtype=torch.int64, device=like.device)
    for dimension, (size, stride) in enumerate(zip(like.shape, shard.strides, strict=True)):
        shape = [-1 if d == dimension else 1 for d in range(like.ndim)]
        numbers += (torch.arange(size, device=like.device) * stride).view(shape)
    return numbers


def _arguments(h: Hyperparameters) -> dict[str, Any]:
    """The reference's hyperparameters. It gets the two others through the tensors."""
    return {
        name: getattr(h, name) for name in defaults_of(type(h)) if name not in ("state_dtype", "sensitivity")
    }
