"""What PATS does, as the logs of a training framework have it."""

from collections.abc import Iterator
from typing import Any

from pats_kernels.adamw import PATSAdamW
from pats_kernels.optim import PATS, attached_to

LOGGED = ("mean_gate", "noisy_share", "noise_scale", "noise_rms", "noise_to_weight", "nonfinite")


def layers(optimizer: Any) -> Iterator[Any]:
    """An optimizer, and those that frameworks have put wrappers around: the innermost comes last.

    Not all wrappers are optimizers themselves: DeepSpeed's are not.
    """
    yield optimizer
    while (optimizer := getattr(optimizer, "optimizer", None)) is not None:
        yield optimizer


def name_of(optimizer: Any) -> str:
    """The class of the innermost optimizer, for an error message."""
    *_, inner = layers(optimizer)
    return type(inner).__name__


def pats_of(optimizer: Any) -> PATS | PATSAdamW | None:
    """What keeps the state of PATS: an optimizer that is a `PATSAdamW`, or the `PATS` attached to it."""
    found = (own if isinstance(own, PATSAdamW) else attached_to(own) for own in layers(optimizer))
    return next((source for source in found if source is not None), None)


def log_of(source: PATS | PATSAdamW) -> dict[str, float]:
    """`pats_summary` as logs have it: the keys of LOGGED that there are, each after "pats/"."""
    return {f"pats/{name}": value for name, value in source.pats_summary().items() if name in LOGGED}
