"""Clipping by the global norm without writing the gradients: the step multiplies them in its own pass."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from pats_kernels.plan import is_dtensor

MARK = "_pats_clipping"
EPS = 1e-6  # torch.nn.utils.clip_grad_norm_'s


class Clipping(NamedTuple):
    """A norm that the next step clips by.

    Attributes:
        total_norm: norm of the gradients before clipping, 0-d.
        max_norm: the largest norm that the step lets the gradients have.
        num_grads: how many gradients there were. Each is marked with this norm and with its version, because
            the norm is valid for these values only. (Marks, not weak references: those may be cleared while
            torch still has the tensor.)
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
        """Whether these are the gradients that the norm was computed from, unchanged."""
        marks = (getattr(grad, MARK, (None, 0)) for grad in grads)
        return len(grads) == self.num_grads and all(
            norm is self.total_norm and version == grad._version
            for grad, (norm, version) in zip(grads, marks, strict=True)
        )

    def divisor(self, grad_scale: Tensor | None) -> Tensor:
        """What the step divides the gradients by, a GradScaler's scale included: float32 [1].

        If the gradients are still scaled, so is their norm. It is unscaled first, so `max_norm` always
        applies to the unscaled gradients.
        """
        scale = 1.0 if grad_scale is None else grad_scale.to(self.total_norm.device, torch.float64)
        norm = self.total_norm.to(torch.float64) / scale
        return (((norm + EPS) / self.max_norm).clamp(min=1.0) * scale).to(torch.float32).reshape(1)


def check_not_released(param_groups: Iterable[Mapping[str, Any]]) -> None:
    """Raises RuntimeError if there are no gradients because hooks in backward have used them up."""
    params = (param for group in param_groups for param in group["params"])
    if any(getattr(param, "_post_accumulate_grad_hooks", None) for param in params):
        raise RuntimeError(
            "clip_grad_norm_ finds no gradients: a hook uses and frees each of them in backward, as "
            "release_gradients does, before their global norm can be known. The two cannot be combined"
        )


def total_norm(
    grads: Sequence[Tensor], norm_type: float, error_if_nonfinite: bool, foreach: bool | None
) -> Tensor:
    """`torch.nn.utils.get_total_norm` as a plain tensor; for sharded gradients, the norm of the whole ones.

    torch cannot combine gradients of different device meshes, so each mesh gets its own norm. The norm of
    these norms is the norm of all gradients.
    """
    parts: dict[Any, list[Tensor]] = {}
    for grad in grads:
        mesh = cast(Any, grad).device_mesh if is_dtensor(type(grad)) else None
        parts.setdefault(mesh, []).append(grad)
    norms = [torch.nn.utils.get_total_norm(part, norm_type, False, foreach) for part in parts.values()]
    whole = [cast(Any, norm).full_tensor() if is_dtensor(type(norm)) else norm for norm in norms]
    return torch.nn.utils.get_total_norm(whole, norm_type, error_if_nonfinite, foreach)
