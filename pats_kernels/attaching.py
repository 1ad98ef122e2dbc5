"""Which optimizers PATS can be attached to, and why it refuses the others."""

from collections.abc import Sequence
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pats_kernels.adamw import PATSAdamW
from pats_kernels.backends.tables import capturing
from pats_kernels.hyperparameters import Hyperparameters, defaults_of
from pats_kernels.private import has_hooks
from pats_kernels.state import parameter_names


def unwrapped(optimizer: Any) -> Any:
    """The optimizer that Accelerate's wrapper calls, or `optimizer` where there is none."""
    while type(optimizer).__module__.startswith("accelerate.") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def attachable(optimizer: Any) -> Optimizer:
    """The optimizer whose steps PATS can run before.

    Raises:
        TypeError: it is no `torch.optim.Optimizer`, or one that has never been initialized as one.
        ValueError: it is a `PATSAdamW`; its steps are another optimizer's; its groups have a key of PATS's.
        RuntimeError: this torch keeps hooks where nobody here knows.
    """
    optimizer = unwrapped(optimizer)
    kind = type(optimizer).__name__
    if isinstance(optimizer, PATSAdamW):
        raise ValueError(f"optimizer is a {kind}, which adds the noise itself: it needs no PATS beside it")
    # ZeroRedundancyOptimizer's own holds this process's share of the parameters; its `step` is all of theirs.
    inner = [] if kind == "ZeroRedundancyOptimizer" else _held_by(optimizer)
    advice = f": attach PATS to the optimizer that steps, its attribute {inner[0]!r}" if inner else ""
    if not isinstance(optimizer, Optimizer) or not has_hooks(optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, but is {kind}{advice}")
    if inner or (hasattr(optimizer, "first_step") and hasattr(optimizer, "second_step")):
        raise ValueError(
            f"optimizer is a {kind}, which steps through another one and puts weights of its own over the "
            f"noise{advice}"
        )
    for name in sorted(defaults_of(Hyperparameters).keys() & getattr(optimizer, "defaults", {}).keys()):
        raise ValueError(
            f"optimizer is a {kind}, whose param groups have a {name!r} of their own, which means something "
            "else and which PATS would read as its: it cannot be attached"
        )
    return optimizer


def _held_by(optimizer: Any) -> list[str]:
    """The attributes in which an optimizer keeps another one."""
    attributes = getattr(optimizer, "__dict__", {})
    return [
        name for name, value in attributes.items() if isinstance(value, Optimizer) and value is not optimizer
    ]


def have_no_masters(optimizer: Optimizer) -> bool:
    """Whether the optimizer's state has been seen, and holds no float32 copy of a parameter.

    Raises:
        ValueError: naming the first parameter that has one: the next step would write it over the noise.
    """
    if any(capturing(param.device) for group in optimizer.param_groups for param in group["params"][:1]):
        return False  # no value can be read now
    low = {torch.bfloat16, torch.float16}
    names = parameter_names(optimizer.param_groups)
    params = [param for param in names if param.dtype in low and param.numel() > 0 and not param.is_meta]
    lists = [value for value in vars(optimizer).values() if isinstance(value, list)]
    seen = not params
    for i, param in enumerate(params):
        state = optimizer.state.get(param)
        seen |= bool(state)
        candidates = [*(state.values() if isinstance(state, dict) else ()), *_entries(lists, i)]
        for value in candidates:
            if not isinstance(value, Tensor) or value.dtype != torch.float32 or value.shape != param.shape:
                continue
            if value.is_sparse or not bool((value.to(param.dtype) == param).all()) or not bool(value.any()):
                continue
            raise ValueError(
                f"{names[param]}: {type(optimizer).__name__} keeps a float32 copy of this {param.dtype} "
                "parameter and writes it over the noise: attach PATS to the optimizer of the float32 copies"
            )
        if seen:
            break
    return seen


def _entries(lists: Sequence[list[Any]], i: int) -> list[Any]:
    """What the lists have for the i-th parameter, in one list or in one of each group."""
    flat = (chain.from_iterable(e if isinstance(e, (list, tuple)) else [e] for e in one) for one in lists)
    return [entry for one in flat for entry in islice(one, i, i + 1)]
