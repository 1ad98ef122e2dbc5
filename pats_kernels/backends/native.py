"""The compiled extension (csrc/) on the CPU: `torch.ops.pats_kernels.step_`, over the plan's tables."""

import importlib

import torch
from torch import Tensor

from pats_kernels.compiling import refuse_functionalization
from pats_kernels.plan import Batch, Launch, Phase

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
    """One call for all of a launch's tensors.

    The dispatcher is told of the parameters and the gradients alone. They stand for the state, whose tensors
    are plain ones that the batch keeps alive: to hand over all of them takes longer than to plan the step.
    """
    key, variant = launch.key, launch.key.variant
    torch.ops.pats_kernels.step_(
        launch.of(batch.params),
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
