"""What the logs of all training frameworks need: the source of PATS's numbers, and the log entries."""

from collections.abc import Iterator
from typing import Any

from pats_kernels.adamw import PATSAdamW
from pats_kernels.optim import PATS, attached_to

LOGGED = ("mean_gate", "noisy_share", "noise_scale", "noise_rms", "noise_to_weight", "nonfinite")


def layers(optimizer: Any) -> Iterator[Any]:
    """An optimizer, then those inside the wrappers of frameworks; the innermost comes last.

    Not all wrappers are optimizers themselves; DeepSpeed's are not.
    """
    yield optimizer
    while (optimizer := getattr(optimizer, "optimizer", None)) is not None:
        yield optimizer


def name_of(optimizer: Any) -> str:
    """The class of the innermost optimizer, for an error message."""
    *_, inner = layers(optimizer)
    return type(inner).__name__


def pats_of(optimizer: Any) -> PATS | PATSAdamW | None:
    """The object that keeps the state of PATS: the optimizer if it is a `PATSAdamW`, or its `PATS`."""
    found = (own if isinstance(own, PATSAdamW) else attached_to(own) for own in layers(optimizer))
    return next((source for source in found if source is not None), None)


def log_of(source: PATS | PATSAdamW) -> dict[str, float]:
    """`pats_summary` as log entries: its keys that are in LOGGED, with "pats/" in front."""
    return {f"pats/{name}": value for name, value in source.pats_summary().items() if name in LOGGED}
