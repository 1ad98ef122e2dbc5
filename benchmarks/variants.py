"""The contestants: the same step as a first draft, a careful rewrite, a compiled one, and this package's.

All of them move S and U exactly as `pats_kernels.reference` does and draw their noise as is usual for
them. The first three leave out what costs them extra: the guard against gradients that are not finite,
and noise that does not depend on the order of the draws.
"""

# pyright: reportPrivateImportUsage=false
# torch's foreach functions are its optimizers' own, and private.

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from benchmarks.models import Gradients
from benchmarks.timing import Step, milliseconds
from pats_kernels import PATS, backends
from pats_kernels.hyperparameters import Hyperparameters

SMALLEST = torch.finfo(torch.float32).tiny
TRIALS = 3  # of each configuration of a contestant that has several
HOST_STEPS = 50

Row = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # of `Tensors`: all that one parameter's update needs


@dataclass(slots=True)
class Tensors:
    """What a step reads and writes, as parallel lists."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avg_sens: list[Tensor]
    exp_avg_unc: list[Tensor]
    sens_stats: list[Tensor]

    @classmethod
    def fresh(cls, gradients: Gradients) -> "Tensors":
        """The state before the first step; the gradients are attached as `p.grad`."""
        params, grads = gradients
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        return cls(
            params,
            grads,
            [torch.zeros_like(param) for param in params],
            [torch.zeros_like(param) for param in params],
            [torch.zeros(2, device=param.device) for param in params],
        )

    @property
    def device(self) -> torch.device:
        return self.params[0].device

    def rows(self) -> list[Row]:
        averages = self.exp_avg_sens, self.exp_avg_unc, self.sens_stats
        return list(zip(self.params, self.grads, *averages, strict=True))


class Contestant(NamedTuple):
    """A step, what runs it, and the tensors it updates; `configuration` where it chose among several."""

    name: str
    backend: str
    step: Step
    tensors: Tensors
    configuration: str | None = None


def contestant(name: str, tensors: Tensors, h: Hyperparameters, backend: str = "auto") -> Contestant:
    """The contestant called `name`, one of `NAMES`; `backend` is the fused one's."""
    if name == "fused":
        return fused(tensors, h, backend)
    return _BASELINES[name](tensors, h)


def eager(tensors: Tensors, h: Hyperparameters) -> Contestant:
    """What a user would write first: a loop over the parameters, the formula line by line."""
    rows = tensors.rows()

    @torch.no_grad()
    def step() -> None:
        for row in rows:
            update_(*row, h)

    return Contestant("eager", "aten", step, tensors)


def update_(
    param: Tensor, grad: Tensor, exp_avg_sens: Tensor, exp_avg_unc: Tensor, stats: Tensor, h: Hyperparameters
) -> None:
    """One tensor's step. `float()` is the tensor itself where it is float32 already, else a copy to store."""
    b_s, b_u = h.sens_betas
    w, S, U = param.float(), exp_avg_sens.float(), exp_avg_unc.float()
    s = (w * grad.float()).abs()
    S.lerp_(s, 1 - b_s)
    U.lerp_((s - S).abs(), 1 - b_u)
    updated = torch.stack((S.mean(), U.mean()))
    mean_S, mean_U = (updated if h.normalization == "exact" else stats).unbind()
    q = (S / mean_S) * (U / mean_U)
    a = torch.tanh((1 / q - h.gamma).clamp(min=0)).nan_to_num(nan=0.0)  # nan: no statistics yet
    w.add_(a * torch.randn_like(w), alpha=h.noise_scale)
    stats.copy_(updated)
    if param.dtype != torch.float32:
        store_((param, exp_avg_sens, exp_avg_unc), (w, S, U))


def store_(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Writes one tensor's w, S and U to bfloat16, rounding stochastically: 31 random bits an element.

    The low half is for w, the high half for S and U, as in the package; that they share a bit is harmless.
    """
    bits = torch.randint(0, 2**31 - 1, targets[0].shape, dtype=torch.int32, device=targets[0].device)
    for target, value, shift in zip(targets, values, (0, 15, 15), strict=True):
        target.copy_(round_stochastically(value, (bits >> shift) & 0xFFFF))


def round_stochastically(x: Tensor, bits: Tensor) -> Tensor:
    """A float32 that bfloat16 can hold: a random 16-bit integer added to its bits, the low half cut off."""
    return ((x.view(torch.int32) + bits) & -0x10000).view(torch.float32)


def foreach(tensors: Tensors, h: Hyperparameters) -> Contestant:
    """What a careful user would write: few calls over all tensors, the noise drawn in one."""
    sizes = [param.numel() for param in tensors.params]

    @torch.no_grad()
    def step() -> None:
        flat = torch.randn(sum(sizes), device=tensors.device)
        pairs = zip(flat.split(sizes), tensors.params, strict=True)
        foreach_update_(tensors, [z.view_as(param) for z, param in pairs], h)

    return Contestant("foreach", "aten", step, tensors)


def foreach_update_(tensors: Tensors, noise: list[Tensor], h: Hyperparameters) -> None:
    """All tensors' step with normals `noise`, in place wherever that spares a temporary."""
    b_s, b_u = h.sens_betas
    w, g, S, U = (
        [x.float() for x in column]  # the tensors themselves where they are float32 already
        for column in (tensors.params, tensors.grads, tensors.exp_avg_sens, tensors.exp_avg_unc)
    )
    s = torch._foreach_mul(w, g)
    torch._foreach_abs_(s)
    torch._foreach_lerp_(S, s, 1 - b_s)
    torch._foreach_sub_(s, S)
    torch._foreach_abs_(s)
    torch._foreach_lerp_(U, s, 1 - b_u)

    updated = [torch.stack((x.mean(), y.mean())) for x, y in zip(S, U, strict=True)]
    means = torch.stack(updated if h.normalization == "exact" else tensors.sens_stats)
    mean_products = list(means.prod(dim=1).unbind())
    gate = torch._foreach_mul(S, U)
    torch._foreach_add_(gate, SMALLEST)  # so that 0 / 0, no statistics yet, gives a closed gate
    gate = torch._foreach_div(mean_products, gate)  # 1 / q
    torch._foreach_sub_(gate, h.gamma)
    torch._foreach_clamp_min_(gate, 0)
    torch._foreach_tanh_(gate)
    torch._foreach_mul_(gate, noise)
    torch._foreach_add_(w, gate, alpha=h.noise_scale)

    torch._foreach_copy_(tensors.sens_stats, updated)
    if tensors.params[0].dtype != torch.float32:
        stored = zip(tensors.params, tensors.exp_avg_sens, tensors.exp_avg_unc, strict=True)
        for targets, values in zip(stored, zip(w, S, U, strict=True), strict=True):
            store_(targets, values)


def compiled(tensors: Tensors, h: Hyperparameters) -> Contestant:
    """`torch.compile` of the above: several ways to ask for it, and the fastest of them here.

    On a GPU the foreach form fuses horizontally. On a CPU it compiles for minutes and gains nothing, and
    inductor's own random numbers may be far slower than ATen's, which `fallback_random` keeps.
    """
    makers: dict[str, Callable[[], Step]] = {
        "one tensor at a time": partial(_compiled_update, tensors, h, {}),
        "one tensor at a time, fallback_random": partial(
            _compiled_update, tensors, h, {"fallback_random": True}
        ),
    }
    if tensors.device.type == "cuda":
        makers["foreach"] = partial(_compiled_foreach, tensors, h)
    steps = {name: make() for name, make in makers.items()}
    taken = {name: _trial(step, tensors.device) for name, step in steps.items()}
    best = min(taken, key=lambda name: taken[name])
    return Contestant("compile", "inductor", steps[best], tensors, best)


def _compiled_update(tensors: Tensors, h: Hyperparameters, options: dict[str, Any]) -> Step:
    """`update_` compiled for flat tensors of any length; the longest first, as it sets the tuning."""
    rows = sorted(tensors.rows(), key=lambda row: -row[0].numel())
    flat_rows = [[tensor.view(-1) for tensor in row] for row in rows]

    @torch.compile(dynamic=True, options=options)
    def update(w: Tensor, g: Tensor, S: Tensor, U: Tensor, stats: Tensor) -> None:
        update_(w, g, S, U, stats, h)

    @torch.no_grad()
    def step() -> None:
        for row in flat_rows:
            update(*row)

    return step


def _compiled_foreach(tensors: Tensors, h: Hyperparameters) -> Step:
    """`foreach_update_` compiled as a whole, its noise drawn where it is used."""

    @torch.compile(dynamic=False)
    def update() -> None:
        foreach_update_(tensors, [torch.randn_like(p, dtype=torch.float32) for p in tensors.params], h)

    return torch.no_grad()(update)


def _trial(step: Step, device: torch.device) -> float:
    """A first impression of a step's milliseconds, once it is compiled."""
    step()
    return median(milliseconds(step, device) for _ in range(TRIALS))


class NoOptimizer(Optimizer):
    """Holds parameters and leaves them alone, so that its step is that of the PATS attached to it."""

    def __init__(self, params: list[Tensor]) -> None:
        super().__init__(params, {})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Does nothing."""


def fused(tensors: Tensors, h: Hyperparameters, backend: str) -> Contestant:
    """This package, by the road that a user takes."""
    optimizer, pats = _attached(tensors.params, h, backend)
    zeros = zip(tensors.exp_avg_sens, tensors.exp_avg_unc, tensors.sens_stats, strict=True)
    pats.load_state_dict(
        {
            "state": {
                i: {"exp_avg_sens": S, "exp_avg_unc": U, "sens_stats": stats, "step": torch.zeros(())}
                for i, (S, U, stats) in enumerate(zeros)
            }
        }
    )
    own = {
        key: [pats.state[param][key] for param in tensors.params]
        for key in ("exp_avg_sens", "exp_avg_unc", "sens_stats")
    }
    chosen = backends.choose(backend, tensors.device)
    return Contestant("fused", chosen, optimizer.step, replace(tensors, **own))


def _attached(params: list[Tensor], h: Hyperparameters, backend: str) -> tuple[NoOptimizer, PATS]:
    optimizer = NoOptimizer(params)
    pats = PATS(
        optimizer,
        noise_scale=h.noise_scale,
        gamma=h.gamma,
        sens_betas=h.sens_betas,
        normalization=h.normalization,
        backend=backend,
    )
    return optimizer, pats


def host_us_per_tensor(count: int, h: Hyperparameters, backend: str, device: torch.device) -> float:
    """Microseconds of the host's time per tensor and step: a step over `count` one-element tensors.

    They leave a kernel nothing to do, and neither a GPU nor a second thread is waited for. Gradients move
    from step to step, as `zero_grad` makes them.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    params = [torch.ones(1, device=device) for _ in range(count)]
    gradients = [[torch.ones_like(param) for param in params] for _ in range(2)]
    optimizer, _ = _attached(params, h, backend)
    host = torch.device("cpu")
    taken = []
    for turn in range(HOST_STEPS):
        for param, grad in zip(params, gradients[turn % 2], strict=True):
            param.grad = grad
        taken.append(milliseconds(optimizer.step, host))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    torch.set_num_threads(threads)
    return 1e3 * median(taken) / count


_BASELINES: dict[str, Callable[[Tensors, Hyperparameters], Contestant]] = {
    "eager": eager,
    "foreach": foreach,
    "compile": compiled,
}
NAMES = (*_BASELINES, "fused")
