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
    """The optimizer inside Accelerate's wrapper, or `optimizer` itself if it is not wrapped."""
    while type(optimizer).__module__.startswith("accelerate.") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def attachable(optimizer: Any) -> Optimizer:
    """The optimizer that PATS can be attached to: the given one, without Accelerate's wrapper.

    Raises:
        TypeError: it is not a `torch.optim.Optimizer`, or has never been initialized as one.
        ValueError: it is a `PATSAdamW`; it steps through another optimizer; its groups have a key of PATS.
        RuntimeError: this torch keeps hooks in a place that the package does not know.
    """
    optimizer = unwrapped(optimizer)
    kind = type(optimizer).__name__
    if isinstance(optimizer, PATSAdamW):
        raise ValueError(f"optimizer is a {kind}, which adds the noise itself: do not attach PATS to it")
    # A ZeroRedundancyOptimizer holds one for this process's share of the parameters, but its own `step` steps
    # all of them.
    inner = [] if kind == "ZeroRedundancyOptimizer" else _held_by(optimizer)
    advice = f": attach PATS to the optimizer that steps, its attribute {inner[0]!r}" if inner else ""
    if not isinstance(optimizer, Optimizer) or not has_hooks(optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, but is {kind}{advice}")
    if inner or (hasattr(optimizer, "first_step") and hasattr(optimizer, "second_step")):
        raise ValueError(
            f"optimizer is a {kind}, which steps through another optimizer and then overwrites the noise "
            f"with weights of its own{advice}"
        )
    for name in sorted(defaults_of(Hyperparameters).keys() & getattr(optimizer, "defaults", {}).keys()):
        raise ValueError(
            f"optimizer is a {kind}, whose param groups have a {name!r} of their own with another "
            "meaning, which PATS would read as its own: attach PATS to another optimizer"
        )
    return optimizer


def _held_by(optimizer: Any) -> list[str]:
    """The attributes in which an optimizer keeps another optimizer."""
    attributes = getattr(optimizer, "__dict__", {})
    return [
        name for name, value in attributes.items() if isinstance(value, Optimizer) and value is not optimizer
    ]


def have_no_masters(optimizer: Optimizer) -> bool:
    """Whether the optimizer already has state, and that state holds no float32 copy of a parameter.

    Raises:
        ValueError: names the first parameter with such a copy: the next step would overwrite the noise.
    """
    if any(capturing(param.device) for group in optimizer.param_groups for param in group["params"][:1]):
        return False  # no value can be read during a capture
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
                "parameter, which overwrites the noise: attach PATS to the optimizer that steps the "
                "float32 copies"
            )
        if seen:
            break
    return seen


def _entries(lists: Sequence[list[Any]], i: int) -> list[Any]:
    """The lists' entries for the i-th parameter; a list may have one inner list for each group."""
    flat = (chain.from_iterable(e if isinstance(e, (list, tuple)) else [e] for e in one) for one in lists)
    return [entry for one in flat for entry in islice(one, i, i + 1)]
