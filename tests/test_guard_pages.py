"""No backend accesses memory before or after a tensor: operands begin or end at an inaccessible page.

Ordinarily more of the process's memory follows a tensor, so reading a few elements too many goes unnoticed,
and writing them damages other data. Here it ends the process. The bits are the same as in ordinary memory.
`PATS_GUARD_PAGES=1` tests all sizes and storages, which takes a few minutes.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_args

import adamw_harness
import harness
import pytest
import torch
from adamw_harness import AdamWCase
from conftest import INTERPRETED
from guarded import End, guards
from harness import Case, assert_same_bits, gradients, prepare, step
from torch import Tensor

ALL = os.environ.get("PATS_GUARD_PAGES") == "1"
VECTOR, BLOCK, CHUNK = 16, 256, 16384  # elements: AVX-512's floats; csrc/cpu_kernel.cpp's, csrc/cpu.cpp's
AROUND = [n + d for n in (2 * VECTOR, BLOCK, 2 * BLOCK, CHUNK) for d in (-1, 0, 1)]
LONG = [*range(1, 71), *AROUND, *(k * BLOCK + d for k in (3, 8, 33) for d in range(-VECTOR, VECTOR + 1, 3))]
SIZES = LONG if ALL else [*range(1, VECTOR + 2), 31, 33, 67, 255, 257, 511, 513, CHUNK - 1, CHUNK + 1]
FEW = [1, 5, 67] if INTERPRETED else [1, 2, 3, 5, 8, 67, 130]  # for slow backends
STRIDED = [(1, 1), (3, 5), (5, 3), (7, 37), (17, 16), (2, BLOCK + 1), (BLOCK + 3, 3)]
STORAGES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float64, torch.float64),
    *(
        [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float64, torch.float32)]
        * ALL
    ),
]
VARIANTS = [("product", "delayed"), ("product", "exact")]
if INTERPRETED:
    STORAGES = STORAGES[:2]
if ALL:
    VARIANTS += [(kind, normalization) for kind in ("ucb", "none") for normalization in ("delayed", "exact")]
LAYOUTS = ["contiguous", "holes"] + ["transposed"] * (not INTERPRETED)

pytestmark = pytest.mark.filterwarnings("ignore:PATS")  # large noise, so that it shows


def shapes_of(backend: str, layout: str) -> list[tuple[int, ...]]:
    slow = backend != "cpp"
    if layout == "contiguous":
        return [(size,) for size in (FEW if slow else SIZES)]
    return STRIDED[1:3] if slow else STRIDED


@pytest.mark.parametrize("end", get_args(End))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("uncertainty", "normalization"), VARIANTS)
@pytest.mark.parametrize(("dtype", "state_dtype"), STORAGES)
def test_pats(
    backend: str,
    dtype: torch.dtype,
    state_dtype: torch.dtype,
    uncertainty: str,
    normalization: str,
    layout: str,
    end: End,
) -> None:
    case = Case(
        shapes_of(backend, layout),
        *(layout, layout, layout),
        dtype=dtype,
        state_dtype=state_dtype,
        uncertainty=uncertainty,
        normalization=normalization,
        steps=2,
    )
    plain, work = harness.run(backend, case), prepare(case)
    with guards() as made:
        for column in (work.params, work.sens, work.unc, work.stats):
            column[:] = [None if t is None else made.copy(t, end) for t in column]
        for number in range(1, 1 + case.steps):
            work.grads = [made.copy(grad, end) for grad in gradients(case, number)]
            step(backend, case, work, number)
        assert_same_bits(work.written(), plain.written())


@pytest.mark.parametrize("end", get_args(End))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("sensitivity", "noise_scale"), [("ema", 1e-3), ("moments", 1e-3), ("ema", 0.0)])
@pytest.mark.parametrize("normalization", ["delayed", "exact"])
@pytest.mark.parametrize(("dtype", "state_dtype"), STORAGES)
def test_adamw(
    backend: str,
    dtype: torch.dtype,
    state_dtype: torch.dtype,
    normalization: str,
    sensitivity: str,
    noise_scale: float,
    layout: str,
    end: End,
) -> None:
    case = AdamWCase(
        shapes_of(backend, layout),
        *(layout, layout),
        dtype=dtype,
        state_dtype=state_dtype,
        normalization=normalization,
        noise_scale=noise_scale,
        steps=2,
        adamw={"sensitivity": sensitivity, "lr": 1e-3},
    )
    plain = adamw_harness.run(backend, case)
    optimizer = adamw_harness.optimizer_of(backend, case)
    params = adamw_harness.params_of(optimizer)
    with guards() as made:
        for number in range(1, 1 + case.steps):
            adamw_harness.give_gradients(optimizer, case, number)
            for param in params:
                param.data = made.copy(param.detach(), end)
                param.grad = made.copy(param.grad, end)
                optimizer.state[param] |= {  # empty before the first step, which makes it
                    key: made.copy(value, end) for key, value in optimizer.state[param].items()
                }
            optimizer._nonfinite.update({key: made.copy(t, end) for key, t in optimizer._nonfinite.items()})
            optimizer.step()

        def tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
            own = [param for group in optimizer.param_groups for param in group["params"]]
            return [*own, *(t for param in own for _, t in sorted(optimizer.state[param].items()))]

        assert_same_bits(tensors(optimizer), tensors(plain))
        optimizer.state.clear()


@pytest.mark.parametrize("end", get_args(End))
def test_a_guard_ends_the_process(end: End) -> None:
    """One element read after the copy's end, or before its beginning."""
    code = (
        "import ctypes, torch; from guarded import guards\n"
        "with guards() as made:\n"
        f"    t = made.copy(torch.ones(5), {end!r})\n"
        "    print(t.sum().item(), flush=True)\n"
        f"    ctypes.c_float.from_address(t.data_ptr() {'+ 20' if end == 'last' else '- 4'}).value\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "5.0\n"
    assert done.returncode == -signal.SIGSEGV or "SEGV" in done.stderr, done.stderr  # AddressSanitizer's
