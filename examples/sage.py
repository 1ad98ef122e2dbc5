"""SAGE: AdamW with a larger learning rate where the sensitivity changes more (Liang et al., ICLR 2022).

"No Parameters Left Behind: Sensitivity Guided Adaptive Learning Rate for Training Large Transformer Models".
Besides the moments it keeps a moving average A of the sensitivity I = |w g|. It multiplies each element's
step by U / A, where U = |I - A| is the distance of this step's sensitivity from its average.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

FLOOR = 1e-12  # added to A, as in the authors' code: the square of their eps of 1e-6


class SAGEAdamW(Optimizer):
    """AdamW with SAGE's factor.

    A has bias correction. In the first step it equals I, so U is 0 and only weight decay changes the weights.
    Weight decay uses the plain learning rate, as in the authors' code.

    Args:
        params: float32 or float64 tensors, or param groups.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.
        sens_beta: decay rate of the sensitivity's average, in [0, 1); the paper uses 0.65 to 0.85.

    Raises:
        ValueError: a hyperparameter out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        sens_beta: float = 0.75,
    ) -> None:
        for name, beta in (("betas", betas[0]), ("betas", betas[1]), ("sens_beta", sens_beta)):
            if not 0 <= beta < 1:
                raise ValueError(f"Invalid {name}: {beta} (must be in [0, 1))")
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"Invalid {name}: {value} (must be >= 0)")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "sens_beta": sens_beta,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Takes a step; returns the closure's loss, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, param.grad, group)
        return loss

    def _update(self, w: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        state = self.state[w]
        if not state:
            state["step"] = 0
            for name in ("exp_avg", "exp_avg_sq", "exp_avg_sens"):
                state[name] = torch.zeros_like(w)
        state["step"] += 1
        m, v, average = state["exp_avg"], state["exp_avg_sq"], state["exp_avg_sens"]
        (b1, b2), b3 = group["betas"], group["sens_beta"]
        c1, c2, c3 = (1 - beta ** state["step"] for beta in (b1, b2, b3))

        sensitivity = (w * g).abs_()
        average.lerp_(sensitivity, 1 - b3)
        corrected = average / c3
        factor = sensitivity.sub_(corrected).abs_().div_(corrected.add_(FLOOR))

        w.mul_(1 - group["lr"] * group["weight_decay"])
        m.lerp_(g, 1 - b1)
        v.mul_(b2).addcmul_(g, g, value=1 - b2)
        denominator = (v / c2).sqrt_().add_(group["eps"])
        w.addcdiv_(factor.mul_(m), denominator, value=-group["lr"] / c1)
