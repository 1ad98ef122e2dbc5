"""The reference as a backend: plain PyTorch operations, on any device, for when nothing else can run."""

from typing import Any

import torch
from torch import Tensor

from pats_kernels.hyperparameters import AdamWHyperparameters, Hyperparameters, defaults_of
from pats_kernels.plan import Batch, Launch
from pats_kernels.reference import pats_adamw_update_, pats_update_


def unavailable(device: torch.device) -> str | None:
    return None


def step_(launch: Launch, batch: Batch, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    """The reference's update, one tensor after another, without a sync."""
    for i in launch.index:
        param, grad, count, h = batch.params[i], batch.grads[i], batch.steps[i], batch.hyperparameters[i]
        update_: Any = pats_update_
        columns = (batch.exp_avg_sens, batch.exp_avg_unc, batch.sens_stats)
        if isinstance(h, AdamWHyperparameters):
            update_, columns = pats_adamw_update_, (batch.exp_avg, batch.exp_avg_sq, *columns)
        states = [column[i] for column in columns]
        if grad_scale is not None:
            grad = (grad / grad_scale).to(grad.dtype)
        counters = [count] if isinstance(count, Tensor) else []
        nonfinite = batch.nonfinite[i] if batch.nonfinite else None
        written = [t for t in (param, *states, *counters, nonfinite) if t is not None]
        before = [t.clone() for t in written] if found_inf is not None else []

        t = count if isinstance(count, int) else count.to(torch.int64) + 1
        not_finite = update_(param, grad, *states, step=t, tensor_id=batch.tensor_ids[i], **_arguments(h))
        for counter in counters:
            counter.add_(1)
        if nonfinite is not None:
            nonfinite.add_(not_finite)
        if found_inf is not None:
            for tensor, old in zip(written, before, strict=True):
                tensor.copy_(torch.where(found_inf.squeeze() != 0, old, tensor))


def _arguments(h: Hyperparameters) -> dict[str, Any]:
    """What the reference asks for; the other two are in the tensors that it is given."""
    return {
        name: getattr(h, name) for name in defaults_of(type(h)) if name not in ("state_dtype", "sensitivity")
    }
