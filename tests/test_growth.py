"""Memory in long runs must not grow.

Changing sets of frozen parameters, schedules and gradients that come and go make new plans, hyperparameters
and tables again and again. What is kept of them is limited, and the first part of a run reaches the limit.
"""

import gc
import tracemalloc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FUZZ, KERNEL
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from pats_kernels import PATS, PATSAdamW
from pats_kernels.hyperparameters import AdamWHyperparameters, _cached, hyperparameters

pytestmark = pytest.mark.usefixtures("quick_gc")

WARM_UP, STEPS = 700, 10_000 if FUZZ else 1_500
LAYERS = 5  # so 31 sets of layers that are not frozen
PAGE = 4096


def attached(make: Callable[..., Optimizer]) -> Callable[..., Optimizer]:
    def made(groups: list[dict[str, Any]]) -> Optimizer:
        optimizer = make(groups, lr=1e-3)
        PATS(optimizer, noise_scale=1e-3, backend=KERNEL)
        return optimizer

    return made


MAKERS: dict[str, Callable[..., Optimizer]] = {
    "PATSAdamW": lambda groups: PATSAdamW(groups, lr=1e-3, noise_scale=1e-3, backend=KERNEL),
    "PATS": attached(AdamW),
}


def schedule(optimizer: Optimizer, number: int, as_tensor: bool) -> None:
    """Sets new values in each step; tensors are new objects in each step."""
    for place, group in enumerate(optimizer.param_groups):
        for name, value in (("lr", 1e-3), ("noise_scale", 1e-4)):
            value /= 1 + number + place / 2
            is_tensor = as_tensor and (name != "lr" or isinstance(optimizer, PATSAdamW))
            group[name] = torch.tensor(value) if is_tensor else value


def steps(model: nn.ModuleList, optimizer: Optimizer, numbers: range, as_tensor: bool) -> None:
    x = torch.ones(2, 4)
    for number in numbers:
        chosen = 1 + number % (2**LAYERS - 1)
        for i, layer in enumerate(model):
            layer.requires_grad_(bool(chosen >> i & 1))
        y = x
        for layer in model:
            y = layer(y)
        y.square().mean().backward()
        schedule(optimizer, number, as_tensor)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def tensors_alive() -> int:
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())  # `isinstance` wakes proxies


def resident() -> int:
    """Resident memory of this process in bytes, where Linux reports it."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


@pytest.mark.filterwarnings("ignore:PATS")
@pytest.mark.parametrize("as_tensor", [False, True], ids=["numbers", "tensors"])
@pytest.mark.parametrize("kind", MAKERS)
def test_a_long_run_does_not_grow(kind: str, as_tensor: bool) -> None:
    """Not one tensor more, and less than 64 KiB of Python's memory, as dictionaries grow and shrink a little.
    One step's hyperparameters, 200 bytes per group, would add up to 300 KiB even in the shortest run here.

    What is kept of hyperparameters (the last 1024) and of plans is full after the warm-up steps, each of
    which has new ones for two groups. Resident memory, which includes C++'s, grows in an allocator's
    portions: less than 4 MiB. One leaked table per step, 10 rows of 37 numbers, would be 30 MiB in 10,000
    steps.
    """
    _cached.cache_clear()
    model = nn.ModuleList(nn.Linear(4, 4) for _ in range(LAYERS))
    halves = [list(model[:2].parameters()), list(model[2:].parameters())]
    optimizer = MAKERS[kind]([{"params": half} for half in halves])
    tracemalloc.start()
    try:
        steps(model, optimizer, range(WARM_UP), as_tensor)
        gc.collect()
        tensors, traced, held = tensors_alive(), tracemalloc.get_traced_memory()[0], resident()
        steps(model, optimizer, range(WARM_UP, STEPS), as_tensor)
        gc.collect()
        assert tensors_alive() <= tensors
        assert tracemalloc.get_traced_memory()[0] - traced < 2**16
        assert resident() - held < 2**22
    finally:
        tracemalloc.stop()


def test_no_cache_keeps_a_tensor_alive() -> None:
    """Not even one that stays on its device: "meta" stands for a device where reading makes the host wait."""
    tensor = torch.empty((), device="meta")
    values = hyperparameters({"lr": tensor}, kind=AdamWHyperparameters)
    assert values.lr is tensor
    assert hyperparameters({"lr": tensor}, kind=AdamWHyperparameters) is values  # as long as a plan has them
    other = hyperparameters({"lr": torch.empty((), device="meta")}, kind=AdamWHyperparameters)
    assert other is not values
    alive = weakref.ref(tensor)
    del tensor, values
    assert alive() is None
