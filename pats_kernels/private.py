"""Private parts of torch that this package uses, each with a fallback.

If a torch version has renamed one of them, the package still imports and steps. If there is no fallback, an
error names the missing part before anything changes.
"""

from collections import deque
from collections.abc import Callable, Sequence
from functools import cache
from operator import attrgetter
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

try:
    from torch.optim.optimizer import ParamsT
except ImportError:  # it is there for type checkers
    ParamsT = Any  # type: ignore[misc, assignment]

STEP_HOOKS = "_optimizer_step_pre_hooks"
SAVE_HOOKS = "_optimizer_state_dict_post_hooks"
LOAD_HOOKS = "_optimizer_load_state_dict_pre_hooks"
LOADED_HOOKS = "_optimizer_load_state_dict_post_hooks"

# torch's own check for graphs that are captured without `capturable`: its name today, and the former one.
_CAPTURE_CHECKS = ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check")


def has_hooks(optimizer: Optimizer) -> bool:
    """Whether it was initialized as a `torch.optim.Optimizer`, and so has hooks.

    Raises:
        RuntimeError: no optimizer of this torch has hooks under the names that are known here.
    """
    names = (STEP_HOOKS, SAVE_HOOKS, LOAD_HOOKS, LOADED_HOOKS)
    missing = [name for name in names if not hasattr(optimizer, name)]
    if missing:
        initialized = torch.optim.SGD([torch.zeros(1)], lr=0.0)
        if unknown := [name for name in missing if not hasattr(initialized, name)]:
            raise RuntimeError(
                f"torch {torch.__version__} does not keep an optimizer's hooks in {', '.join(unknown)}, "
                "where PATS puts its own, so it cannot be attached. Use PATSAdamW, or PATS with an older "
                "torch"
            )
    return STEP_HOOKS not in missing


def check_capture(optimizer: Optimizer) -> None:
    """Raises RuntimeError if a graph is being captured of a step without `capturable`."""
    for name in _CAPTURE_CHECKS:
        if (check := getattr(optimizer, name, None)) is not None:
            check()
            return
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    if capturing and not all(group["capturable"] for group in optimizer.param_groups):
        raise RuntimeError(
            f"Attempting CUDA graph capture of step() for an instance of {type(optimizer).__name__} but "
            "param_groups' capturable is False."
        )


def hooked_step(optimizer: Optimizer) -> CodeType | None:
    """The code of the function that torch wraps around each class's `step`, to run the hooks."""
    # The fallback is the class's own `step`, which torch has wrapped by then.
    return _HOOKED_STEP or getattr(type(optimizer).step, "__code__", None)


def _hooked_step() -> CodeType | None:
    try:
        return Optimizer.profile_hook_step(Optimizer.step).__code__
    except (AttributeError, TypeError):
        return None


_HOOKED_STEP = _hooked_step()


def in_backward() -> bool:
    """Whether this thread is in a backward pass; False if torch does not say.

    This decides which warning is given, and whether an optimizer takes other numbers than another one's.
    """
    task = getattr(torch._C, "_current_graph_task_id", None)
    return task is not None and task() != -1


def local_tensor(tensor: Any) -> Tensor:
    """The tensor that this process holds of a DTensor; to_local() would make a new view each time."""
    held = getattr(tensor, "_local_tensor", None)
    return tensor.to_local() if held is None else held


def local_tensors(tensors: Sequence[Any]) -> list[Tensor]:
    """`local_tensor` of many DTensors."""
    try:
        return list(map(_LOCAL, tensors))
    except AttributeError:
        return list(map(local_tensor, tensors))


def split_specs(tensors: Sequence[Any]) -> list[Any]:
    """The objects that say how each DTensor is split. The same object means that it is split the same way.

    If torch has no such objects, new ones each time: then nothing ever compares as the same.
    """
    try:
        return list(map(_SPEC, tensors))
    except AttributeError:
        return [object() for _ in tensors]


_LOCAL, _SPEC = attrgetter("_local_tensor"), attrgetter("_spec")


def copy_each_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """`torch._foreach_copy_`, or one copy after another if torch does not have it."""
    at_once = getattr(torch, "_foreach_copy_", None)
    if at_once is not None:
        at_once(targets, sources)
        return
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


class Kinds:
    """What the bytes of some tensors mean: class, dtype, shape, strides, device, sign. Keeps no tensor alive.

    Uses the comparison behind torch.compile's guards, which checks all tensors at once. That takes the host a
    fifth of the time of asking each tensor for all these properties.

    Args:
        tensors: the tensors; some may be None.
    """

    __slots__ = ("_count", "_facts", "_gaps", "_guard")

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        self._count = len(tensors)
        self._gaps = [tensor is None for tensor in tensors] if type(None) in map(type, tensors) else None
        present = _without_none(tensors)
        guard = _guard(present) if _guards_tell_apart() else None
        # A guard rejects a list that contains a tensor twice, as a list of gradients may.
        self._guard = guard if guard is not None and guard(*present) else None
        self._facts = None if self._guard is not None else list(map(_facts, present))

    def are_of(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether other tensors are of the same kinds, in the same order, with None at the same places."""
        if len(tensors) != self._count:
            return False
        if self._gaps is not None and self._gaps != [tensor is None for tensor in tensors]:
            return False
        present = tensors if self._gaps is None else _without_none(tensors)
        return self._guard(*present) if self._guard is not None else list(map(_facts, present)) == self._facts


class AllKinds:
    """Makes `Kinds`, and reuses the last few: most state has the same kinds as its gradients.

    So only few are kept, and they are in a cache when they are compared.
    """

    def __init__(self) -> None:
        self._last: deque[Kinds] = deque(maxlen=8)

    def of(self, tensors: Sequence[Tensor | None]) -> Kinds:
        found = next((kinds for kinds in self._last if kinds.are_of(tensors)), None)
        if found is None:
            self._last.append(found := Kinds(tensors))
        return found


def _without_none(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _facts(tensor: Tensor | None) -> tuple[Any, ...] | None:
    if tensor is None:
        return None
    place = (type(tensor), tensor.layout, tensor.dtype, tensor.device)
    # A sparse tensor has a stride too: () if it is 0-d.
    return (*place, tensor.shape, tensor.stride(), tensor.is_neg())


def _guard(tensors: Sequence[Tensor]) -> Callable[..., bool] | None:
    module = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
    guards = getattr(module, "TensorGuards", None)
    if guards is None:
        return None
    sizes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
    try:
        return guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    except (RuntimeError, TypeError, ValueError):
        return None


@cache
def _guards_tell_apart() -> bool:
    """Whether torch's guards tell apart all that is needed here, which torch does not promise."""
    one = torch.zeros(2, 2, device="cpu")
    negative: Any = getattr(torch, "_neg_view", lambda _: None)
    others = (
        *(one.t(), one[:1], one.view(4), one.expand(3, 2, 2), one.double(), one.view(torch.int32)),
        *(negative(one), one.to("meta"), one.to_sparse(), torch.nn.Parameter(one), None),
    )
    guard = _guard([one])
    return guard is not None and guard(torch.ones(2, 2, device="cpu")) and not any(map(guard, others))
