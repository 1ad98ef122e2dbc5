"""The backends, which run one launch each, and which of them can run where.

A backend is two functions: `unavailable(device)` returns the reason why it cannot run there, or None;
`step_(launch, batch, phase, grad_scale, found_inf)` updates the launch's tensors in place.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from pats_kernels.backends import cuda, eager, native, triton
from pats_kernels.plan import Batch, Launch, Phase

Step = Callable[[Launch, Batch, Phase, Tensor | None, Tensor | None], None]


class Backend(NamedTuple):
    unavailable: Callable[[torch.device], str | None]
    step_: Step


AUTO = "auto"
FEW = 10_000  # elements; for so few, eager is fast enough
_BACKENDS = {  # in the order in which "auto" prefers them
    "triton": Backend(triton.unavailable, triton.step_),
    "cuda": Backend(cuda.unavailable, cuda.step_),
    "cpp": Backend(native.unavailable, native.step_),
    "eager": Backend(eager.unavailable, eager.step_),
}
NAMES = (AUTO, *_BACKENDS)


def check_name(backend: str) -> None:
    """Raises ValueError if there is no backend of this name."""
    if backend not in NAMES:
        raise ValueError(f"Invalid backend: {backend!r} (must be one of {', '.join(map(repr, NAMES))})")


def available_backends(device: torch.device | str = "cpu") -> dict[str, str | None]:
    """For each backend None if this machine can run it on tensors on `device`, else the reason.

    "auto" is always available: it takes the first of "triton", "cuda", "cpp", "eager" that can run.
    """
    device = torch.device(device)
    return {AUTO: None} | {name: backend.unavailable(device) for name, backend in _BACKENDS.items()}


def resolve(backend: str, device: torch.device) -> Step:
    """The step function of the backend that `choose` returns; raises the same errors."""
    return _BACKENDS[choose(backend, device)].step_


def choose(backend: str, device: torch.device) -> str:
    """The name of the backend that `backend` stands for on this device: itself, unless it is "auto".

    Raises:
        ValueError: there is no such backend.
        RuntimeError: it cannot run here; the message says why, and which backends can.
    """
    check_name(backend)
    return _choose(backend, device.type)


def warn_of_eager(params: Sequence[Tensor]) -> None:
    """Warns once in a process that "auto" uses eager for many elements on the CPU."""
    global _said
    if not _said and sum(param.numel() for param in params if param.device.type == "cpu") > FEW:
        _said = True
        warnings.warn(
            "PATS: backend='auto' takes 'eager' on the CPU, some ten times slower than 'cpp': "
            f"{native.MISSING}. To keep 'eager' without this warning, set backend='eager'",
            stacklevel=2,
        )


_said = False


@cache
def _choose(backend: str, device_type: str) -> str:
    reasons = available_backends(device_type)
    usable = [name for name in _BACKENDS if reasons[name] is None]
    if backend == AUTO:
        # Under its interpreter Triton runs on the CPU, for tests only; "auto" must not choose it.
        return next(name for name in usable if (name, device_type) != ("triton", "cpu"))
    if reasons[backend] is not None:
        raise RuntimeError(
            f"backend={backend!r} cannot run on {device_type}: {reasons[backend]}. "
            f"Here these can: {', '.join(map(repr, [AUTO, *usable]))}"
        )
    return backend
