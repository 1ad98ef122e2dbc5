"""What PATS does, as the logs of a training framework have it."""

from typing import Any

from torch.optim import Optimizer

from pats_kernels.adamw import PATSAdamW
from pats_kernels.optim import PATS, attached_to

LOGGED = ("mean_gate", "noisy_share", "noise_scale", "noise_rms", "noise_to_weight", "nonfinite")


def unwrapped(optimizer: Any) -> Any:
    """The optimizer itself, out of the wrappers that frameworks put around it."""
    while isinstance(wrapped := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = wrapped
    return optimizer


def pats_of(optimizer: Any) -> PATS | PATSAdamW | None:
    """What keeps the state of PATS: an optimizer that is a `PATSAdamW`, or the `PATS` attached to it."""
    optimizer = unwrapped(optimizer)
    if isinstance(optimizer, PATSAdamW):
        return optimizer
    return attached_to(optimizer) if isinstance(optimizer, Optimizer) else None


def log_of(source: PATS | PATSAdamW) -> dict[str, float]:
    """`pats_summary` as logs have it: the keys of LOGGED that there are, each after "pats/"."""
    return {f"pats/{name}": value for name, value in source.pats_summary().items() if name in LOGGED}
