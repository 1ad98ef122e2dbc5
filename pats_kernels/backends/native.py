"""The compiled extension (csrc/) on the CPU: `torch.ops.pats_kernels.step_`, over the plan's tables."""

import importlib
from collections.abc import Sequence

import torch
from torch import Tensor

from pats_kernels.compiling import refuse_functionalization
from pats_kernels.plan import Batch, Launch, Phase, are_counters

MISSING: str | None = None  # why there is no extension
try:
    importlib.import_module("pats_kernels._C")  # registers the operator
except ImportError as error:
    MISSING = f"the C++ extension could not be loaded ({error}); reinstall with a C++17 compiler at hand"
else:

    @torch.library.register_fake("pats_kernels::step_")
    def _(*_arguments: object) -> None:
        """Updates its arguments in place and returns nothing: there is no output to describe."""

    refuse_functionalization("step_")


def unavailable(device: torch.device) -> str | None:
    if MISSING is not None:
        return MISSING
    return None if device.type == "cpu" else f"it runs on the CPU, not on {device.type}"


def step_(
    launch: Launch, batch: Batch, phase: Phase, grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """One call for all of a launch's tensors."""
    key, variant = launch.key, launch.key.variant
    written: list[Sequence[Tensor | None]] = [batch.params, *batch.averages.values()]
    written += [batch.sens_stats, batch.shares, batch.nonfinite]
    written += [batch.steps] if are_counters(batch.steps) else []
    torch.ops.pats_kernels.step_(
        [tensor for column in written for tensor in launch.of(column)],
        launch.of(batch.grads),
        torch.from_numpy(launch.table),
        torch.from_numpy(launch.layout),
        key.param_dtype,
        key.state_dtype,
        variant.form,
        variant.uncertainty,
        phase,
        variant.stochastic_rounding,
        grad_scale,
        found_inf,
    )
