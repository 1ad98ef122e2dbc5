"""Accelerate by itself: PATS attached before and after `prepare`, PATSAdamW prepared, checkpoints."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from harness import assert_same_bits
from loops import NOISE, STEPS, fused, loss_of, manual_loop, network, tensors
from torch import Tensor, nn
from torch.optim import AdamW

from pats_kernels import PATS


@pytest.fixture(autouse=True)
def fresh() -> None:
    """Accelerate keeps its state in classes."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()


def attached_first(accelerator: Accelerator, model: nn.Module) -> tuple[Any, Any, Any]:
    optimizer = AdamW(model.parameters(), lr=1e-3)
    pats = PATS(optimizer, **NOISE)
    return *accelerator.prepare(model, optimizer), pats


def attached_last(accelerator: Accelerator, model: nn.Module) -> tuple[Any, Any, Any]:
    model, optimizer = accelerator.prepare(model, AdamW(model.parameters(), lr=1e-3))
    return model, optimizer, PATS(optimizer, **NOISE)


def adamw(accelerator: Accelerator, model: nn.Module) -> tuple[Any, Any, Any]:
    model, optimizer = accelerator.prepare(model, fused(model.parameters()))
    return model, optimizer, optimizer


WAYS: dict[str, Callable[[Accelerator, nn.Module], tuple[Any, Any, Any]]] = {
    "PATS, then prepare": attached_first,
    "prepare, then PATS": attached_last,
    "PATSAdamW": adamw,
}


def everything(model: nn.Module, optimizer: Any, pats: Any) -> list[Tensor]:
    states = [dict(sorted(s.state[p].items())) for s in (optimizer, pats) for p in model.parameters()]
    return list(tensors([list(model.parameters()), states]))


def train(way: str, seed: int = 1, accumulate: int = 1) -> Any:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model, optimizer, pats = WAYS[way](accelerator, network(seed))

    def run(first: int, last: int) -> None:
        for step in range(first, last):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, step))
                optimizer.step()
                optimizer.zero_grad()

    return accelerator, run, lambda: everything(model, optimizer, pats)


def by_hand(way: str, accumulate: int = 1) -> list[Tensor]:
    model = network()
    optimizer: Any = fused(model.parameters()) if way == "PATSAdamW" else AdamW(model.parameters(), lr=1e-3)
    pats = optimizer if way == "PATSAdamW" else PATS(optimizer, **NOISE)
    if accumulate == 1:
        manual_loop(model, optimizer)
    else:
        for step in range(STEPS):
            (loss_of(model, step) / accumulate).backward()
            if (step + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
    return everything(model, optimizer, pats)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("way", WAYS)
def test_is_the_loop_by_hand(way: str, accumulate: int) -> None:
    _, run, result = train(way, accumulate=accumulate)
    run(0, STEPS)
    assert_same_bits(result(), by_hand(way, accumulate))


@pytest.mark.parametrize("way", WAYS)
def test_resumes_to_the_bit(way: str, tmp_path: Path) -> None:
    accelerator, run, whole = train(way)
    run(0, STEPS // 2)
    accelerator.save_state(str(tmp_path))
    run(STEPS // 2, STEPS)
    accelerator, run, resumed = train(way, seed=2)
    accelerator.load_state(str(tmp_path))
    run(STEPS // 2, STEPS)
    assert_same_bits(resumed(), whole())


@pytest.mark.parametrize("way", WAYS)
def test_bfloat16(way: str) -> None:
    """Autocast: parameters and averages stay float32, and PATS steps."""
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model, optimizer, pats = WAYS[way](accelerator, network())
    manual_loop(model, optimizer)
    assert {state["exp_avg_sens"].dtype for state in pats.state.values()} == {torch.float32}
    assert {float(state["step"]) for state in pats.state.values()} == {STEPS}
