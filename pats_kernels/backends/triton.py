"""The Triton backend: starts a launch's kernels over its tables on the device."""

import importlib
import os
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from pats_kernels.backends.tables import DeviceTables, narrowed
from pats_kernels.plan import Batch, Launch, LaunchKey, Phase

kernels: Any = None
_MISSING: str | None = None
try:
    kernels = importlib.import_module("pats_kernels.backends.triton_kernel")
except ImportError as error:
    _MISSING = f"triton could not be imported ({error})"
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # which Triton, too, reads at import

CHUNK = 4096  # elements a program
BLOCK = 1024  # elements an iteration: 8 a thread
NUM_WARPS = 4
# Float32 fits in these without spills, on sm_80 to sm_100: 8 programs to a multiprocessor instead of 7, or 6.
MAX_REGISTERS = {"pats": 64, "pats_adamw": 80, "moments_adamw": 80}
STATISTICS_BLOCK = 256  # partial sums an iteration


def unavailable(device: torch.device) -> str | None:
    if _MISSING is not None:
        return _MISSING
    if _INTERPRETED:
        return None if device.type == "cpu" else "under TRITON_INTERPRET=1 it runs on the CPU"
    if device.type != "cuda":
        return "its kernels run on GPUs, and on the CPU only under TRITON_INTERPRET=1"
    return None if torch.cuda.is_available() else "there is no GPU"


def step_(
    launch: Launch, batch: Batch, phase: Phase, grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """One launch over all chunks and, but for the noise phase, one over all tensors."""
    device = launch.key.device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        _start(launch, phase, grad_scale, found_inf)


def _start(launch: Launch, phase: Phase, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    if "triton" not in launch.cache:
        launch.cache["triton"] = DeviceTables(launch, CHUNK, narrowed)
    tables = launch.cache["triton"].current(launch)
    num_chunks, num_tensors = len(tables.chunks), len(launch.table)
    constants = specialization(launch.key) | {"APPROX": _approximate(launch)}
    if launch.key.device.type == "cuda" and torch.version.hip is None:
        constants |= compiler_options(launch.key)

    phases = {"one_pass": kernels.ONE_PASS, "averages": kernels.AVERAGES, "noise": kernels.NOISE}
    if num_chunks > 0:  # there are none where all shards are empty
        kernels.pats_kernel[(num_chunks,)](
            tables.table,
            tables.layout,
            tables.chunks,
            tables.partials,
            grad_scale,
            found_inf,
            PHASE=phases[phase],
            **constants,
        )
    if phase != "noise":
        kernels.statistics_kernel[(num_tensors,)](
            tables.table, tables.starts, tables.partials, num_chunks, found_inf, BLOCK=STATISTICS_BLOCK
        )


def specialization(key: LaunchKey) -> dict[str, Any]:
    """The kernel's compile-time arguments for such a launch, but for those that depend on the device."""
    dtypes = {
        torch.float32: kernels.tl.float32,
        torch.bfloat16: kernels.tl.bfloat16,
        torch.float16: kernels.tl.float16,
        torch.float64: kernels.tl.float64,
    }
    forms = {
        "pats": kernels.PATS,
        "pats_adamw": kernels.PATS_ADAMW,
        "moments_adamw": kernels.MOMENTS_ADAMW,
    }
    uncertainties = {"product": kernels.PRODUCT, "ucb": kernels.UCB, "none": kernels.NONE}
    return {
        "PARAM": dtypes[key.param_dtype],
        "STATE": dtypes[key.state_dtype],
        "FORM": forms[key.variant.form],
        "UNCERTAINTY": uncertainties[key.variant.uncertainty],
        "STOCHASTIC": key.variant.stochastic_rounding,
        "CHUNK": CHUNK,
        "BLOCK": BLOCK,
    }


def compiler_options(key: LaunchKey) -> dict[str, int]:
    """What the compiler is told for NVIDIA's devices."""
    float32 = key.param_dtype == key.state_dtype == torch.float32
    return {"num_warps": NUM_WARPS} | ({"maxnreg": MAX_REGISTERS[key.variant.form]} if float32 else {})


def _approximate(launch: Launch) -> bool:
    """Whether PTX's approximate instructions are there (tanh.approx came with sm_75) and exact enough."""
    if launch.key.device.type != "cuda" or torch.version.hip is not None:
        return False
    capable = torch.cuda.get_device_capability(launch.key.device) >= (7, 5)
    return capable and launch.key.param_dtype != torch.float64
