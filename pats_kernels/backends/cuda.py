"""The CUDA backend: the extension's kernels (csrc/cuda_kernel.cu) over a launch's tables on the device."""

from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from pats_kernels.backends import native
from pats_kernels.backends.tables import DeviceTables, narrowed
from pats_kernels.compiling import refuse_functionalization
from pats_kernels.plan import Batch, Column, Launch, Phase

CHUNK = 4096  # elements for each block, as in csrc/cuda_kernel.h


# Why there are no CUDA kernels, or None. Only a CUDA build of torch can load their library.
MISSING = (
    native.load("_CUDA", "the library of CUDA kernels")
    if torch.version.cuda is not None
    else f"torch {torch.__version__} is a build without CUDA"
)


if MISSING is None:

    @torch.library.register_fake("pats_kernels::launch_")
    def _(*_arguments: object) -> None:
        """It updates the tensors in its tables and returns nothing, so there is no output to describe."""

    refuse_functionalization("launch_")


def unavailable(device: torch.device) -> str | None:
    if MISSING is not None:
        return MISSING
    if device.type != "cuda":
        return f"it runs on GPUs, not on {device.type}"
    return None if torch.cuda.is_available() else "there is no GPU"


def step_(
    launch: Launch, batch: Batch, phase: Phase, grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """One call, which starts the phase's kernels on the current stream."""
    device = launch.key.device
    with (
        torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    ):  # on the CPU: emulated, in tests
        _start(launch, phase, grad_scale, found_inf)


def _start(launch: Launch, phase: Phase, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    if "cuda" not in launch.cache:
        plain = bool(np.any(launch.table[:, Column.STATS] == 0))
        launch.cache["cuda"] = DeviceTables(launch, CHUNK, narrowed), plain
    tables, plain = launch.cache["cuda"]
    key, variant = launch.key, launch.key.variant
    torch.ops.pats_kernels.launch_(
        *tables.current(launch),
        key.param_dtype,
        key.state_dtype,
        variant.form,
        variant.uncertainty,
        phase,
        variant.stochastic_rounding,
        plain,
        grad_scale,
        found_inf,
    )
