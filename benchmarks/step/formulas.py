"""The baselines: the PATS step, and AdamW's after it, as users of torch would write them.

All update S and U exactly as `pats_kernels.reference` does and draw noise with torch's generators. They
leave out what would cost them extra: the guard against gradients that are not finite, and noise that does
not depend on the order of the draws. `h.uncertainty` is "product", the default, in all of them.
"""

# pyright: reportPrivateImportUsage=false
# torch's foreach functions, which its own optimizers use, are private.

from collections.abc import Sequence

import torch
from torch import Tensor

from pats_kernels.hyperparameters import AdamWHyperparameters, Hyperparameters

SMALLEST = torch.finfo(torch.float32).tiny


def update_(
    param: Tensor,
    grad: Tensor,
    state: Sequence[Tensor],
    stats: Tensor,
    h: AdamWHyperparameters,
    corrections: Tensor | None = None,
) -> None:
    """One tensor's step, line by line. For float32, `float()` returns the tensor itself, updated in place;
    for other dtypes a copy, which is stored at the end.

    Args:
        state: S, U; with AdamW also m, v.
        corrections: `bias_corrections` if AdamW's step follows; None: PATS alone.
    """
    targets = [param, *state]
    values = [tensor.float() for tensor in targets]
    w, g, (S, U, *moments) = values[0], grad.float(), values[1:]
    perturb_(w, g, S, U, stats, h)
    if corrections is not None:
        m, v = moments
        adamw_(w, g, m, v, corrections, h)
    if param.dtype != torch.float32:
        store_(targets, values)


def perturb_(w: Tensor, g: Tensor, S: Tensor, U: Tensor, stats: Tensor, h: Hyperparameters) -> None:
    """PATS: the reference's rows 1 to 6."""
    b_s, b_u = h.sens_betas
    s = (w * g).abs()
    S.lerp_(s, 1 - b_s)
    U.lerp_((s - S).abs(), 1 - b_u)
    updated = torch.stack((S.mean(), U.mean()))
    mean_S, mean_U = (updated if h.normalization == "exact" else stats).unbind()
    q = (S / mean_S) * (U / mean_U)
    a = torch.tanh((1 / q - h.gamma).clamp(min=0)).nan_to_num(nan=0.0)  # nan: no statistics yet
    w.add_(a * torch.randn_like(w), alpha=float(h.noise_scale))
    stats.copy_(updated)


def adamw_(w: Tensor, g: Tensor, m: Tensor, v: Tensor, corrections: Tensor, h: AdamWHyperparameters) -> None:
    """AdamW: the reference's rows 7 and 8."""
    b_1, b_2 = h.betas
    step_size, root = corrections.unbind()
    m.lerp_(g, 1 - b_1)
    v.mul_(b_2).addcmul_(g, g, value=1 - b_2)
    w.mul_(1 - h.lr * h.weight_decay).sub_(step_size * (m / (v.sqrt() / root + h.eps)))


def bias_corrections(step: Tensor, h: AdamWHyperparameters) -> Tensor:
    """lr / (1 - b_1^t) and sqrt(1 - b_2^t), float32 [2], for the count of steps `step`, 0-d float64.

    Computed once per step, outside the graph: a compiler may compute a power of t for every element.
    """
    b_1, b_2 = h.betas
    return torch.stack((h.lr / (1 - b_1**step), (1 - b_2**step).sqrt())).float()


def store_(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Writes a tensor's w and state to bfloat16, rounded stochastically, with 31 random bits per element.

    The low half is for w, the high half for the state, as in the package. They share a bit: harmless.
    """
    bits = torch.randint(0, 2**31 - 1, targets[0].shape, dtype=torch.int32, device=targets[0].device)
    for i, (target, value) in enumerate(zip(targets, values, strict=True)):
        target.copy_(round_stochastically(value, (bits >> (0 if i == 0 else 15)) & 0xFFFF))


def round_stochastically(x: Tensor, bits: Tensor) -> Tensor:
    """A float32 that bfloat16 can hold: adds a random 16-bit integer, then cuts off the low half."""
    return ((x.view(torch.int32) + bits) & -0x10000).view(torch.float32)


def foreach_update_(
    params: list[Tensor],
    grads: list[Tensor],
    state: Sequence[list[Tensor]],
    stats: list[Tensor],
    noise: list[Tensor],
    h: AdamWHyperparameters,
    corrections: Tensor | None = None,
) -> None:
    """`update_` for all tensors in few calls, with normals `noise`; `state`: a list each of S, U, m, v."""
    targets = [params, *state]
    values = [[tensor.float() for tensor in column] for column in targets]
    w, g, (S, U, *moments) = values[0], [grad.float() for grad in grads], values[1:]
    foreach_perturb_(w, g, S, U, stats, noise, h)
    if corrections is not None:
        m, v = moments
        foreach_adamw_(w, g, m, v, corrections, h)
    if params[0].dtype != torch.float32:
        for stored, computed in zip(zip(*targets, strict=True), zip(*values, strict=True), strict=True):
            store_(stored, computed)


def foreach_perturb_(
    w: list[Tensor],
    g: list[Tensor],
    S: list[Tensor],
    U: list[Tensor],
    stats: list[Tensor],
    noise: list[Tensor],
    h: Hyperparameters,
) -> None:
    """`perturb_` for all tensors, in place wherever that saves a temporary."""
    b_s, b_u = h.sens_betas
    s = torch._foreach_mul(w, g)
    torch._foreach_abs_(s)
    torch._foreach_lerp_(S, s, 1 - b_s)
    torch._foreach_sub_(s, S)
    torch._foreach_abs_(s)
    torch._foreach_lerp_(U, s, 1 - b_u)

    updated = [torch.stack((x.mean(), y.mean())) for x, y in zip(S, U, strict=True)]
    means = torch.stack(updated if h.normalization == "exact" else stats)
    mean_products = list(means.prod(dim=1).unbind())
    gate = torch._foreach_mul(S, U)
    torch._foreach_add_(gate, SMALLEST)  # without statistics, 0 / this closes the gate, instead of 0 / 0
    gate = torch._foreach_div(mean_products, gate)  # 1 / q
    torch._foreach_sub_(gate, h.gamma)
    torch._foreach_clamp_min_(gate, 0)
    torch._foreach_tanh_(gate)
    torch._foreach_mul_(gate, noise)
    torch._foreach_add_(w, gate, alpha=float(h.noise_scale))
    torch._foreach_copy_(stats, updated)


def foreach_adamw_(
    w: list[Tensor],
    g: list[Tensor],
    m: list[Tensor],
    v: list[Tensor],
    corrections: Tensor,
    h: AdamWHyperparameters,
) -> None:
    """`adamw_` for all tensors."""
    b_1, b_2 = h.betas
    step_size, root = corrections.unbind()
    torch._foreach_lerp_(m, g, 1 - b_1)
    torch._foreach_mul_(v, b_2)
    torch._foreach_addcmul_(v, g, g, 1 - b_2)
    change = torch._foreach_sqrt(v)
    torch._foreach_div_(change, root)
    torch._foreach_add_(change, h.eps)
    change = torch._foreach_div(m, change)
    torch._foreach_mul_(change, step_size)
    torch._foreach_mul_(w, 1 - h.lr * h.weight_decay)
    torch._foreach_sub_(w, change)
