"""Checks that the timed code still is the right step: compares one more step with eager PyTorch's."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.step import variants
from benchmarks.step.variants import Contestant, NoOptimizer, Task
from pats_kernels import PATS, PATSAdamW
from pats_kernels.state import keys_of

SAMPLE, MOST = 8, 2**20  # tensors that are compared, and elements of each at most: eager takes its time
NORMALS = 3e-3  # a kernel's normals are off by 2e-3 at most, and its gates by less than half of that
# Shares of an element, and of its tensor's largest. bfloat16: a result that lies between two of its numbers
# may be rounded to the other one, 2^-7 away.
RELATIVE = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (2.0**-6, 2.0**-7)}


class Wrong(RuntimeError):
    """A contestant's step is not the step that it was timed for."""


def recheck(contestant: Contestant, task: Task) -> float:
    """Takes one more step of one of this package's contestants. Returns its largest difference from eager's,
    as a share of what is allowed.

    Raises:
        Wrong: that is above 1; names what differs.
    """
    tensors, values = contestant.tensors, variants._values(task, _sensitivity(contestant))
    chosen = _sample(tensors.params)
    keys = keys_of(values)
    columns: dict[str, list[Tensor]] = {key: getattr(tensors, key) for key in keys - {"step"}}
    params = [tensors.params[i].detach().clone().requires_grad_() for i in chosen]
    keywords: dict[str, Any] = {**variants._keywords(values), "backend": "eager"}
    groups = [{"params": params, "tensor_id": chosen}]
    optimizer = NoOptimizer(groups) if task.optimizer == "none" else PATSAdamW(groups, **keywords)  # type: ignore[arg-type]
    keeper = optimizer if isinstance(optimizer, PATSAdamW) else PATS(optimizer, **keywords)
    for i, param in zip(chosen, params, strict=True):
        param.grad = tensors.grads[i].clone()
        state = {key: column[i].clone() for key, column in columns.items()}
        keeper.state[param] = state | {"step": tensors.steps[i].clone()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that both draw the same noise, which is what is asked of them
        contestant.step()
        optimizer.step()
    worst = 0.0
    noise = NORMALS * float(values.noise_scale)
    for i, param in zip(chosen, params, strict=True):
        found = {key: column[i] for key, column in columns.items()} | {"w": tensors.params[i]}
        expected = {key: keeper.state[param][key] for key in columns} | {"w": param}
        for key, value in found.items():
            share = _share(value.detach(), expected[key].detach(), noise if key == "w" else 0.0)
            if not share <= 1:
                raise Wrong(
                    f"{contestant.name}: {key} of parameter {i} is not what eager's step makes of the same "
                    f"tensors: off by {share:.3g} times what roundings explain"
                )
            worst = max(worst, share)
    return worst


def _sensitivity(contestant: Contestant) -> Any:
    return "moments" if contestant.name == "moments" else "ema"


def _sample(params: Sequence[Tensor]) -> list[int]:
    """Evenly from the first to the last tensor that is not too big; if all are, the smallest."""
    small = [i for i, param in enumerate(params) if 0 < param.numel() <= MOST]
    if not small:
        return [min(range(len(params)), key=lambda i: params[i].numel())]
    places = torch.linspace(0, len(small) - 1, min(SAMPLE, len(small))).round().int().tolist()
    return [small[place] for place in places]


def _share(found: Tensor, expected: Tensor, more: float) -> float:
    """The largest difference, as a share of what is allowed; NaN if either has a NaN."""
    of_each, of_largest = RELATIVE[torch.bfloat16 if found.dtype == torch.bfloat16 else torch.float32]
    found, expected = found.double(), expected.double()
    allowed = of_each * expected.abs() + of_largest * expected.abs().max() + more
    shares = (found - expected).abs() / allowed
    return float(torch.where(found == expected, 0.0, shares).max())
