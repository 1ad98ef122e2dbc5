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
    """Imports one of the package's libraries, which registers its operator. Returns None, or why it failed.

    Args:
        library: "_C" or "_CUDA".
        what: its name in the returned reason. It also selects setup.py's reason in `pats_kernels/_build.py`.
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
    """Imports one of the package's modules from this folder only, or returns None.

    Otherwise an editable installation of another source tree would supply the modules that this one lacks.
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
    """The command that builds the package again, where this one is installed."""
    source = PACKAGE.parent
    if (source / "setup.py").is_file():
        return f"build it with pip install --no-deps -e {source}"
    return "build it with pip install --no-deps --force-reinstall --no-cache-dir <the clone of pats_kernels>"


EXTENSION = "the C++ extension"
MISSING = load("_C", EXTENSION)  # why there is none, or None
if MISSING is None:

    @torch.library.register_fake("pats_kernels::step_")
    def _(*_arguments: object) -> None:
        """It updates tensors in place and returns nothing, so there is no output to describe."""

    refuse_functionalization("step_")


def unavailable(device: torch.device) -> str | None:
    if MISSING is not None:
        return MISSING
    return None if device.type == "cpu" else f"it runs on the CPU, not on {device.type}"


def step_(
    launch: Launch, batch: Batch, phase: Phase, grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """One call for all of a launch's tensors. The operator gets addresses; the batch keeps them valid."""
    key, variant = launch.key, launch.key.variant
    if "cpp" not in launch.cache:
        operator = torch.ops.pats_kernels.step_.default
        launch.cache["cpp"] = operator, torch.from_numpy(launch.table), torch.from_numpy(launch.layout)
    operator, table, layout = launch.cache["cpp"]
    operator(
        table,
        layout,
        key.param_dtype,
        key.state_dtype,
        variant.form,
        variant.uncertainty,
        phase,
        variant.stochastic_rounding,
        grad_scale,
        found_inf,
    )
