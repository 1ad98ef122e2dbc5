"""The reference as a backend: plain PyTorch operations, on any device, for when nothing else can run."""

import torch
from torch import Tensor

from pats_kernels.plan import Batch, Launch
from pats_kernels.reference import pats_update_


def unavailable(device: torch.device) -> str | None:
    return None


def step_(launch: Launch, batch: Batch, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    """The reference's update, one tensor after another, without a sync."""
    for i in launch.index:
        grad, count, h = batch.grads[i], batch.steps[i], batch.hyperparameters[i]
        if grad_scale is not None:
            grad = (grad / grad_scale).to(grad.dtype)
        if found_inf is not None:  # a gradient that is nowhere finite changes nothing
            grad = torch.where(found_inf != 0, torch.nan, grad)
        taken = 1 if found_inf is None else 1 - found_inf.squeeze().ne(0).to(torch.int64)
        nonfinite = pats_update_(
            batch.params[i],
            grad,
            batch.exp_avg_sens[i],
            batch.exp_avg_unc[i],
            batch.sens_stats[i],
            step=count if isinstance(count, int) else count.to(torch.int64) + 1,
            tensor_id=batch.tensor_ids[i],
            seed=h.seed,
            noise_scale=h.noise_scale,
            gamma=h.gamma,
            sens_betas=h.sens_betas,
            uncertainty=h.uncertainty,
            normalization=h.normalization,
            stochastic_rounding=h.stochastic_rounding,
        )
        if isinstance(count, Tensor):
            count.add_(taken)
        if batch.nonfinite:
            batch.nonfinite[i].add_(nonfinite * taken)
