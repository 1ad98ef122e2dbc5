"""The PATS step in plain PyTorch: the specification in code. Read this first.

| # | what           | formula                                                        |
|---|----------------|----------------------------------------------------------------|
| 1 | sensitivity    | s = abs(w * g)                                                 |
| 2 | its average    | S <- S + (1 - b_s) (s - S)                                     |
| 3 | uncertainty    | U <- U + (1 - b_u) (abs(s - S) - U), S already updated         |
| 4 | normalization  | q = (S / mean(S)) * (U / mean(U)), means over this tensor      |
| 5 | gate           | a = tanh(max(1/q - gamma, 0)), in [0, 1]                       |
| 6 | noise          | w <- w + noise_scale * a * z, z ~ N(0, 1)                      |

Sources: rows 1 to 4 as in PLATON (Zhang et al., ICML 2022) and AdaLoRA (Zhang et al., ICLR 2023); noise
by sensitivity as in PATS (Zhang et al., EMNLP 2022). docs/algorithm.md says what is whose.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pats_kernels.philox import normals, random_words

KAPPA = 1.0  # weight of the uncertainty in uncertainty="ucb"


def philox_normal(seed: int, step: int, tensor_id: int, numel: int, offset: int = 0) -> Tensor:
    """The exact noise of elements `offset` to `offset + numel` of a tensor: float64, shape [numel]."""
    z = normals(random_words(seed, step, tensor_id, numel, offset)).flatten()
    return z[offset % 4 :][:numel]


def round_stochastically(x: Tensor, bits: Tensor) -> Tensor:
    """float32 to bfloat16: adds a 16-bit integer to the float32 bits, then truncates.

    Unbiased over uniform `bits`; bfloat16 values, zeros and infinities map to themselves, NaN to NaN.
    """
    rounded = ((x.view(torch.int32) + bits.to(torch.int32)) >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(x.isnan(), x.to(torch.bfloat16), rounded)


def gate(S: Tensor, U: Tensor, mean_S: Tensor, mean_U: Tensor, *, gamma: float, uncertainty: str) -> Tensor:
    """Rows 4 and 5: the gate a of every element, in [0, 1]; 0 for a tensor without statistics.

    Args:
        S, U: the averages, of one shape; "none" does not read U.
        mean_S, mean_U: their means, 0-d.
    """
    if uncertainty == "product":
        q = (S / mean_S) * (U / mean_U)
    elif uncertainty == "ucb":
        q = (S + KAPPA * U) / (mean_S + KAPPA * mean_U)
    else:
        q = S / mean_S
    a = torch.tanh((1 / q - gamma).clamp(min=0))
    return torch.where(q.isfinite(), a, 0)  # q is not finite where its mean is 0: no statistics yet


def pats_update_(
    param: Tensor,
    grad: Tensor,
    exp_avg_sens: Tensor,
    exp_avg_unc: Tensor | None,
    sens_stats: Tensor,
    *,
    step: int | Tensor,
    tensor_id: int,
    seed: int,
    noise_scale: float,
    gamma: float,
    sens_betas: tuple[float, float],
    uncertainty: str,
    normalization: str,
    stochastic_rounding: bool,
) -> Tensor:
    """One tensor's step, in place. Returns how many elements had a sensitivity that is not finite.

    Arithmetic is float32, or float64 for float64 parameters. Both averages are rounded to their storage
    dtype before the means and the gate are computed, so `sens_stats` are the means of what is stored.
    """
    dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
    beta_s, beta_u = sens_betas
    rounding_words = None
    if stochastic_rounding and torch.bfloat16 in (param.dtype, exp_avg_sens.dtype):
        words = random_words(seed, step, tensor_id, param.numel(), rounding=True, device=param.device)
        rounding_words = words.flatten()[: param.numel()].view(param.shape)

    def store(target: Tensor, value: Tensor, shift: int) -> Tensor:
        """Writes `value` as `target`'s dtype (bfloat16 with the random bits from `shift`); reads it back."""
        if target.dtype == torch.bfloat16 and rounding_words is not None:
            value = round_stochastically(value.to(torch.float32), (rounding_words >> shift) & 0xFFFF)
        return target.copy_(value).to(dtype)

    w, S = param.to(dtype), exp_avg_sens.to(dtype)
    s = (w * grad.to(dtype)).abs()
    finite = s.isfinite()

    # The averages in the form in which b = 0 gives S = s to the last bit, and U = 0 with it.
    S_new = torch.where(finite, beta_s * S + (1 - beta_s) * s, S)
    if exp_avg_unc is not None:
        U = exp_avg_unc.to(dtype)
        U_new = torch.where(finite, beta_u * U + (1 - beta_u) * (s - S_new).abs(), U)
        U = store(exp_avg_unc, U_new, shift=16)
    else:
        U = torch.zeros_like(S)
    S = store(exp_avg_sens, S_new, shift=16)

    updated = torch.stack((S.mean(dtype=torch.float64), U.mean(dtype=torch.float64))).to(torch.float32)
    means = updated if normalization == "exact" else sens_stats.clone()
    sens_stats.copy_(updated)
    mean_S, mean_U = means.to(dtype)

    a = gate(S, U, mean_S, mean_U, gamma=gamma, uncertainty=uncertainty)
    a = torch.where(finite, a, 0)

    z = normals(random_words(seed, step, tensor_id, param.numel(), device=param.device))
    z = z.flatten()[: param.numel()].view(param.shape).to(dtype)
    store(param, torch.where(a > 0, w + noise_scale * a * z, w), shift=0)
    return (~finite).sum()


def per_tensor(value: Any, count: int) -> list[Any]:
    """One value, or a sequence of one per tensor, as a list of one per tensor."""
    is_sequence = isinstance(value, Sequence) and not isinstance(value, str)
    return list(value) if is_sequence else [value] * count


def betas_per_tensor(value: Any, count: int) -> list[Any]:
    """The same for pairs: two numbers are one value."""
    is_pair = isinstance(value, Sequence) and len(value) == 2 and not isinstance(value[0], Sequence)
    return [value] * count if is_pair else per_tensor(value, count)


@torch.no_grad()
def pats_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avg_sens: Sequence[Tensor],
    exp_avg_unc: Sequence[Tensor | None],
    sens_stats: Sequence[Tensor],
    *,
    step: int | Sequence[int],
    tensor_ids: Sequence[int],
    seed: int | Sequence[int] = 0,
    noise_scale: float | Sequence[float] = 1e-5,
    gamma: float | Sequence[float] = 1.0,
    sens_betas: tuple[float, float] | Sequence[tuple[float, float]] = (0.85, 0.95),
    uncertainty: str | Sequence[str] = "product",
    normalization: str | Sequence[str] = "delayed",
    stochastic_rounding: bool | Sequence[bool] = True,
    backend: str = "auto",
) -> None:
    """`pats_kernels.pats_step_` in the same signature, one tensor after another; `backend` is ignored."""
    count = len(params)
    columns = {
        "step": per_tensor(step, count),
        "tensor_id": tensor_ids,
        "seed": per_tensor(seed, count),
        "noise_scale": per_tensor(noise_scale, count),
        "gamma": per_tensor(gamma, count),
        "sens_betas": betas_per_tensor(sens_betas, count),
        "uncertainty": per_tensor(uncertainty, count),
        "normalization": per_tensor(normalization, count),
        "stochastic_rounding": per_tensor(stochastic_rounding, count),
    }
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        arguments = {name: column[i] for name, column in columns.items()}
        if grad is not None and param.numel() > 0 and arguments["noise_scale"] > 0:
            pats_update_(param, grad, exp_avg_sens[i], exp_avg_unc[i], sens_stats[i], **arguments)
