"""The PATS step in plain PyTorch: the specification as code. Read this first.

| # | what           | formula                                                        |
|---|----------------|----------------------------------------------------------------|
| 1 | sensitivity    | s = abs(w * g)                                                 |
| 2 | its average    | S <- S + (1 - b_s) (s - S)                                     |
| 3 | uncertainty    | U <- U + (1 - b_u) (abs(s - S) - U), S already updated         |
| 4 | normalization  | q = (S / mean(S)) * (U / mean(U)), means over this tensor      |
| 5 | gate           | a = tanh(max(1/q - gamma, 0)), in [0, 1]                       |
| 6 | noise          | w <- w + noise_scale * a * z, z ~ N(0, 1)                      |

`PATSAdamW` continues with AdamW (Loshchilov, Hutter, ICLR 2019) on the noised w, in torch's arithmetic:

| 7 | moments        | m <- m + (1 - b_1) (g - m), v <- b_2 v + (1 - b_2) g^2         |
| 8 | step           | w <- (1 - lr wd) w - lr m^ / (sqrt(v^) + eps)                  |

where m^ = m / (1 - b_1^t), v^ = v / (1 - b_2^t). With sensitivity="moments", rows 1 to 3 are
S = abs(w) sqrt(v^) and U = abs(w) sqrt(max(v^ - m^^2, 0)), and neither is stored.

Sources: rows 1 to 4 as in PLATON (Zhang et al., ICML 2022) and AdaLoRA (Zhang et al., ICLR 2023); noise
by sensitivity as in PATS (Zhang et al., EMNLP 2022). docs/algorithm.md names the source of each formula.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pats_kernels.philox import normals, random_words, words_of_groups

KAPPA = 1.0  # weight of the uncertainty in uncertainty="ucb"
# The range of means that count as statistics. Means are kept in float32: below the range, an element of a
# hundredth of the mean would be subnormal; above it, the sum of a few thousand elements would overflow.
LEAST_MEAN, MOST_MEAN = 2.0**-120, 2.0**112
LEAST_SQUARE = 2.0**-110  # the same limit for v^ with sensitivity="moments"


def philox_normal(seed: int, step: int, tensor_id: int, numel: int, offset: int = 0) -> Tensor:
    """The exact normals z of elements `offset` to `offset + numel` of a tensor: float64, shape [numel]."""
    z = normals(random_words(seed, step, tensor_id, numel, offset)).flatten()
    return z[offset % 4 :][:numel]


def round_stochastically(x: Tensor, bits: Tensor) -> Tensor:
    """float32 to bfloat16: adds a 16-bit integer to the float32 bits, then truncates.

    Unbiased for uniform `bits`. bfloat16 values, zeros and infinities map to themselves, NaN to NaN.
    """
    rounded = ((x.view(torch.int32) + bits.to(torch.int32)) >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(x.isnan(), x.to(torch.bfloat16), rounded)


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
    numbers: Tensor | None = None,
) -> Tensor:
    """One tensor's step, in place. Returns how many elements had a sensitivity that is not finite.

    For a shard, `numbers` (int64, the parameter's shape) are its elements' row-major numbers in the unsharded
    tensor, which its noise depends on. Its means are still those of the shard.

    Arithmetic is float32, or float64 for float64 parameters. Both averages are rounded to their storage
    dtype before the means and the gate are computed, so `sens_stats` are the means of the stored values.
    """
    draw = (seed, step, tensor_id, numbers)
    bits = rounding_bits(param, exp_avg_sens.dtype, *draw) if stochastic_rounding else None
    w, g = (x.to(arithmetic_dtype(param)) for x in (param, grad))
    S, U, finite = update_averages_(w, g, exp_avg_sens, exp_avg_unc, sens_betas, bits)
    means = update_means_(sens_stats, S, U, normalization)
    a = torch.where(finite, gate(S, U, *means, gamma=gamma, uncertainty=uncertainty), 0)
    store_(param, add_noise(w, a, noise_scale, *draw), bits, WEIGHT)
    return (~finite).sum()


def pats_adamw_update_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_sens: Tensor | None,
    exp_avg_unc: Tensor | None,
    sens_stats: Tensor | None,
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
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    maximize: bool,
    numbers: Tensor | None = None,
) -> Tensor:
    """`pats_update_`, then AdamW's step on the noised weights, which are not stored in between.

    Without `sens_stats` there is no noise; without `exp_avg_sens` the sensitivity comes from the moments.
    AdamW uses its moments as computed, before they are rounded to their storage dtype. A gradient that is not
    finite changes the moments and the weight as in `torch.optim.AdamW`.
    """
    draw = (seed, step, tensor_id, numbers)
    bits = rounding_bits(param, exp_avg.dtype, *draw) if stochastic_rounding else None
    dtype = arithmetic_dtype(param)
    w, g, m, v = (x.to(dtype) for x in (param, -grad if maximize else grad, exp_avg, exp_avg_sq))
    t = step.to(torch.float64) if isinstance(step, Tensor) else step
    correction1, correction2 = (1 - beta**t for beta in betas)
    m = m + (1 - betas[0]) * (g - m)
    v = betas[1] * v + (1 - betas[1]) * g * g

    nonfinite = torch.zeros((), dtype=torch.int64, device=param.device)
    if sens_stats is not None:
        if exp_avg_sens is not None:
            S, U, finite = update_averages_(w, g, exp_avg_sens, exp_avg_unc, sens_betas, bits)
        else:
            S, U, finite = moments_sensitivity(w, m / correction1, v / correction2, uncertainty)
        means = update_means_(sens_stats, S, U, normalization)
        a = torch.where(finite, gate(S, U, *means, gamma=gamma, uncertainty=uncertainty), 0)
        w = add_noise(w, a, noise_scale, *draw)
        nonfinite = (~finite).sum()

    denominator = v.sqrt() / correction2**0.5 + eps
    w = w * (1 - lr * weight_decay) - (lr / correction1) * m / denominator
    store_(exp_avg, m, bits, STATE)
    store_(exp_avg_sq, v, bits, STATE)
    store_(param, w, bits, WEIGHT)
    return nonfinite


def arithmetic_dtype(param: Tensor) -> torch.dtype:
    """The dtype that a parameter's step is computed in, whatever its storage dtype."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def update_averages_(
    w: Tensor,
    g: Tensor,
    exp_avg_sens: Tensor,
    exp_avg_unc: Tensor | None,
    sens_betas: tuple[float, float],
    bits: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows 1 to 3. Returns S and U (0 if U is not kept) as stored, and which elements have a finite s."""
    beta_s, beta_u = sens_betas
    S = exp_avg_sens.to(w.dtype)
    s = (w * g).abs()
    finite = s.isfinite()
    # In this form of the averages, b = 0 gives S = s to the last bit, and therefore U = 0.
    S_new = torch.where(finite, beta_s * S + (1 - beta_s) * s, S)
    if exp_avg_unc is None:
        U = torch.zeros_like(S)
    else:
        U = exp_avg_unc.to(w.dtype)
        U_new = torch.where(finite, beta_u * U + (1 - beta_u) * (s - S_new).abs(), U)
        U = store_(exp_avg_unc, U_new, bits, STATE).to(w.dtype)
    S = store_(exp_avg_sens, S_new, bits, STATE).to(w.dtype)
    return S, U, finite


def moments_sensitivity(
    w: Tensor, m_hat: Tensor, v_hat: Tensor, uncertainty: str
) -> tuple[Tensor, Tensor, Tensor]:
    """S and U from AdamW's bias-corrected moments (0 where not finite), and which elements are finite.

    v^ - m^^2 is 0 in the first step, but its computed value is rounding error. So that this error does not
    decide which elements get noise, values below it count as 0. So does a v^ below `LEAST_SQUARE`, because a
    v that gets no more gradient stops decaying near the end of float32's range.
    """
    S = w.abs() * v_hat.sqrt()
    finite = S.isfinite()
    roundings = 2.0**-49 if w.dtype == torch.float64 else 2.0**-20
    U = w.abs() * (v_hat - ((1 + roundings) * m_hat).square()).clamp(min=0).sqrt()
    U = torch.zeros_like(S) if uncertainty == "none" else U
    counts = finite & (v_hat >= LEAST_SQUARE)
    return torch.where(counts, S, 0), torch.where(counts, U, 0), finite


def update_means_(sens_stats: Tensor, S: Tensor, U: Tensor, normalization: str) -> Tensor:
    """Stores mean(S) and mean(U). Returns the means that the normalization uses, [2]."""
    updated = torch.stack((S.mean(dtype=torch.float64), U.mean(dtype=torch.float64))).to(torch.float32)
    means = updated if normalization == "exact" else sens_stats.clone()
    sens_stats.copy_(updated)
    return means.to(S.dtype)


def score(S: Tensor, U: Tensor, mean_S: Tensor, mean_U: Tensor, uncertainty: str) -> Tensor:
    """Row 4: q of every element; not finite if the means are 0. "none" does not read U.

    Args:
        S, U: the averages, of the same shape.
        mean_S, mean_U: their means, 0-d.
    """
    if uncertainty == "product":
        return (S / mean_S) * (U / mean_U)
    if uncertainty == "ucb":
        return (S + KAPPA * U) / (mean_S + KAPPA * mean_U)
    return S / mean_S


def has_statistics(mean_S: Tensor, mean_U: Tensor, uncertainty: str) -> Tensor:
    """Whether the means that `score` divides by are in the range that float32 can resolve."""
    mean = mean_S + KAPPA * mean_U if uncertainty == "ucb" else mean_S
    known = (mean >= LEAST_MEAN) & (mean <= MOST_MEAN)
    if uncertainty == "product":
        known &= (mean_U >= LEAST_MEAN) & (mean_U <= MOST_MEAN)
    return known


def gate(S: Tensor, U: Tensor, mean_S: Tensor, mean_U: Tensor, *, gamma: float, uncertainty: str) -> Tensor:
    """Row 5, from `score`: the gate a of every element, in [0, 1]; 0 for a tensor without statistics."""
    q = score(S, U, mean_S, mean_U, uncertainty)
    a = torch.tanh((1 / q - gamma).clamp(min=0))
    # With a mean that is one step old, S / mean may overflow float32: then q is not finite.
    return torch.where(q.isfinite() & has_statistics(mean_S, mean_U, uncertainty), a, 0)


def add_noise(
    w: Tensor,
    a: Tensor,
    noise_scale: float,
    seed: int,
    step: int | Tensor,
    tensor_id: int,
    numbers: Tensor | None = None,
) -> Tensor:
    """Row 6. Where the gate is closed, w does not change in any bit."""
    z = normals(group_words(w, numbers, seed, step, tensor_id))
    z = own(z, w, numbers).to(w.dtype)
    return torch.where(a > 0, w + noise_scale * a * z, w)


WEIGHT, STATE = 0, 16  # the first of the 16 bits of a word of `rounding_bits` that round each


def rounding_bits(
    param: Tensor,
    state_dtype: torch.dtype,
    seed: int,
    step: int | Tensor,
    tensor_id: int,
    numbers: Tensor | None = None,
) -> Tensor | None:
    """The random words for stochastic rounding: int64, the parameter's shape. None if nothing is bfloat16."""
    if torch.bfloat16 not in (param.dtype, state_dtype):
        return None
    return own(group_words(param, numbers, seed, step, tensor_id, rounding=True), param, numbers)


def group_words(
    x: Tensor,
    numbers: Tensor | None,
    seed: int,
    step: int | Tensor,
    tensor_id: int,
    rounding: bool = False,
) -> Tensor:
    """The random words of x's groups of four, [groups, 4]. With `numbers`, of each element's own group."""
    if numbers is None:
        return random_words(seed, step, tensor_id, x.numel(), rounding=rounding, device=x.device)
    return words_of_groups(seed, step, tensor_id, numbers.flatten() // 4, rounding=rounding)


def own(drawn: Tensor, x: Tensor, numbers: Tensor | None) -> Tensor:
    """Each element's own value from those drawn for its group: x's shape."""
    if numbers is None:
        return drawn.flatten()[: x.numel()].view(x.shape)
    return drawn.gather(1, numbers.reshape(-1, 1) % 4).view(x.shape)


def store_(target: Tensor, value: Tensor, bits: Tensor | None, shift: int) -> Tensor:
    """Writes `value` in `target`'s dtype; bfloat16 is rounded with 16 of the random bits, if any."""
    if target.dtype == torch.bfloat16 and bits is not None:
        value = round_stochastically(value.to(torch.float32), (bits >> shift) & 0xFFFF)
    return target.copy_(value)


def per_tensor(value: Any, count: int) -> list[Any]:
    """Turns one value, or a sequence of one per tensor, into a list of one per tensor."""
    is_sequence = isinstance(value, Sequence) and not isinstance(value, str)
    return list(value) if is_sequence else [value] * count


def betas_per_tensor(value: Any, count: int) -> list[Any]:
    """The same for pairs: a sequence of two numbers is one value."""
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
    """`pats_kernels.pats_step_` with the same signature, one tensor after another; `backend` is ignored."""
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
