"""The compiled extension (csrc/) on the CPU: `torch.ops.pats_kernels.step_`, over the plan's tables."""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType

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
        if _module(library) is None:
            return _not_built(what)
    except ImportError as error:
        return (
            f"{what} is there, but torch {torch.__version__} cannot load it ({error}): it needs torch 2.10 "
            f"or newer. Install that, or {_again()}"
        )
    return None


def _module(name: str) -> ModuleType | None:
    """Imports one of the package's modules from this very folder, or returns None.

    An editable installation of another tree would offer its own modules for those that this one lacks.
    """
    spec = PathFinder.find_spec(f"pats_kernels.{name}", [str(PACKAGE)])
    if spec is None or spec.loader is None:
        return None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[spec.name] = module
    return module


def _not_built(what: str) -> str:
    build = _module("_build")
    if build is None:
        return (
            f"{what} was never built in {PACKAGE}, which is a source tree: {_again()}, or start Python "
            "elsewhere to import the package that is installed"
        )
    reason = build.EXTENSION if what == EXTENSION else build.CUDA
    return f"{what} was not built: {reason}. Then {_again()}" if reason else f"{what} is gone: {_again()}"


def _again() -> str:
    """What builds the package anew, there where this one lies."""
    source = PACKAGE.parent
    if (source / "setup.py").is_file():
        return f"build it with pip install --no-deps -e {source}"
    return "build it with pip install --no-deps --force-reinstall --no-cache-dir <the clone of pats_kernels>"


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
