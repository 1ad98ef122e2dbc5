"""Clipping gradients by their global norm without touching them: the step multiplies them in its pass."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from pats_kernels.plan import is_dtensor

MARK = "_pats_clipping"
EPS = 1e-6  # torch.nn.utils.clip_grad_norm_'s


class Clipping(NamedTuple):
    """A norm that the next step is to clip by.

    Attributes:
        total_norm: of the gradients as they were, 0-d.
        max_norm: that of the gradients as the step is to see them, at most.
        num_grads: how many there were. Each is marked with this norm and its version, for the norm is of
            these numbers alone. (Weak references may be cleared though torch still has the tensor.)
    """

    total_norm: Tensor
    max_norm: float
    num_grads: int

    @classmethod
    def of(cls, grads: Sequence[Tensor], total_norm: Tensor, max_norm: float) -> "Clipping":
        for grad in grads:
            setattr(grad, MARK, (total_norm, grad._version))
        return cls(total_norm, max_norm, len(grads))

    def is_of(self, grads: Sequence[Tensor]) -> bool:
        """Whether these are the gradients of which the norm is, unchanged."""
        marks = (getattr(grad, MARK, (None, 0)) for grad in grads)
        return len(grads) == self.num_grads and all(
            norm is self.total_norm and version == grad._version
            for grad, (norm, version) in zip(grads, marks, strict=True)
        )

    def divisor(self, grad_scale: Tensor | None) -> Tensor:
        """By what the step divides the gradients, a GradScaler's scale included: float32 [1].

        A scale that is still in the gradients is in the norm as well, so `max_norm` is always that of the
        gradients without it.
        """
        scale = 1.0 if grad_scale is None else grad_scale.to(self.total_norm.device, torch.float64)
        norm = self.total_norm.to(torch.float64) / scale
        return (((norm + EPS) / self.max_norm).clamp(min=1.0) * scale).to(torch.float32).reshape(1)


def check_not_released(param_groups: Iterable[Mapping[str, Any]]) -> None:
    """Raises RuntimeError where there are no gradients because hooks in backward have used them up."""
    params = (param for group in param_groups for param in group["params"])
    if any(getattr(param, "_post_accumulate_grad_hooks", None) for param in params):
        raise RuntimeError(
            "clip_grad_norm_ finds no gradients: a hook steps on each in backward and lets go of it, as "
            "release_gradients does, before the norm of all can be known"
        )


def total_norm(
    grads: Sequence[Tensor], norm_type: float, error_if_nonfinite: bool, foreach: bool | None
) -> Tensor:
    """`torch.nn.utils.get_total_norm`, a plain tensor also where gradients are sharded: of the whole ones.

    Each device mesh by itself, which torch takes no two of together; the norm of their norms is that of all.
    """
    parts: dict[Any, list[Tensor]] = {}
    for grad in grads:
        mesh = cast(Any, grad).device_mesh if is_dtensor(type(grad)) else None
        parts.setdefault(mesh, []).append(grad)
    norms = [torch.nn.utils.get_total_norm(part, norm_type, False, foreach) for part in parts.values()]
    whole = [cast(Any, norm).full_tensor() if is_dtensor(type(norm)) else norm for norm in norms]
    return torch.nn.utils.get_total_norm(whole, norm_type, error_if_nonfinite, foreach)
