"""The contract's tolerances, where every approximate instruction errs by all that the PTX ISA allows it."""

from typing import Any

import adamw_harness
import harness
import pytest
import torch
from adamw_harness import AdamWCase
from harness import Case

from ptx import triton_driver

SEEDS = (1, 2, 3)
FLOAT32, BFLOAT16 = {}, {"dtype": torch.bfloat16}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "settings",
    [
        FLOAT32,
        BFLOAT16,
        {"uncertainty": "ucb"},
        {"uncertainty": "none", "gamma": 0.3},
        {"normalization": "exact"},
        {"gamma": 0.0},  # every gate is open
        {"noise_scale": 1.0},
    ],
    ids=str,
)
def test_pats(settings: dict[str, Any], seed: int) -> None:
    """z within 2e-3 and the gate within 1e-3 (tanh.approx alone may err by 2^-11, some 5e-4)."""
    with triton_driver.emulated(90, seed):
        harness.run_checked("triton", Case(shapes=[(8192,), (1003,)], **settings))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("sensitivity", ["ema", "moments"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adamw(dtype: torch.dtype, sensitivity: Any, seed: int) -> None:
    with triton_driver.emulated(90, seed):
        adamw_harness.run_checked(
            "triton",
            AdamWCase(shapes=[(8192,), (1003,)], dtype=dtype, adamw={"sensitivity": sensitivity, "lr": 1e-3}),
        )


def test_the_errors_show() -> None:
    """With another seed other weights: the approximations are really off."""
    weights = []
    for seed in (None, 1, 2):
        with triton_driver.emulated(90, seed):
            weights.append(harness.run("triton", Case()).params[0])
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])
