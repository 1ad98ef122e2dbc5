"""The compiled extension (csrc/) on the CPU: `torch.ops.pats_kernels.step_`, over the plan's tables."""

import importlib
from pathlib import Path

import torch
from torch import Tensor

from pats_kernels.compiling import refuse_functionalization
from pats_kernels.plan import Batch, Launch, Phase

PACKAGE = Path(__file__).parent.parent


def load(library: str, what: str) -> str | None:
    """Imports one of the package's libraries, which registers its operator. Returns why it cannot, or None.

    Args:
        library: "_C" or "_CUDA".
        what: its name in the reason, and in `pats_kernels/_build.py`, where setup.py left its own reasons.
    """
    try:
        importlib.import_module(f"pats_kernels.{library}")
    except ModuleNotFoundError:
        return _not_built(what)
    except ImportError as error:
        return (
            f"{what} is there, but torch {torch.__version__} cannot load it ({error}): it needs torch 2.10 "
            f"or newer. Install that, or build it again: {BUILD}"
        )
    return None


BUILD = "pip install --no-build-isolation --no-deps --force-reinstall --no-cache-dir <pats_kernels>"


def _not_built(what: str) -> str:
    try:
        build = importlib.import_module("pats_kernels._build")
    except ModuleNotFoundError:
        return (
            f"{what} was never built in {PACKAGE}, which is a source tree: run "
            f"pip install --no-build-isolation -e {PACKAGE.parent}, or start Python elsewhere to import the "
            "package that is installed"
        )
    reason = build.EXTENSION if what == EXTENSION else build.CUDA
    return f"{what} was not built: {reason or f'its library is gone; build it again: {BUILD}'}"


EXTENSION = "the C++ extension"
MISSING = load("_C", EXTENSION)  # why there is none, or None
if MISSING is None:

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
    """One call for all of a launch's tensors, which the batch keeps alive: the operator is told addresses."""
    key, variant = launch.key, launch.key.variant
    torch.ops.pats_kernels.step_(
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
