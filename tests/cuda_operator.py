"""Replaces the operator of csrc/cuda.cpp on the CPU, so that tests can run the backend "cuda" there."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from pats_kernels import backends
from pats_kernels.backends import cuda

SOURCE = Path(__file__).parent.parent / "csrc" / "cuda.cpp"
# In the order of csrc/table.h's enums.
STORAGES = ("float32", "bfloat16", "float16", "float64")
FORMS = ("pats", "pats_adamw", "moments_adamw")
UNCERTAINTIES = ("product", "ucb", "none")
PHASES = ("one_pass", "averages", "noise")


class Arguments(NamedTuple):
    """What the operator takes, in its order."""

    table: Tensor
    layout: Tensor
    chunks: Tensor
    starts: Tensor
    partials: Tensor
    param_dtype: torch.dtype
    state_dtype: torch.dtype
    form: str
    uncertainty: str
    phase: str
    stochastic_rounding: bool
    plain: bool
    grad_scale: Tensor | None
    found_inf: Tensor | None

    def enums(self) -> dict[str, int]:
        """Those that are enums in C++, as their numbers there."""
        return {
            "state": STORAGES.index(name_of(self.state_dtype)),
            "form": FORMS.index(self.form),
            "uncertainty": UNCERTAINTIES.index(self.uncertainty),
            "phase": PHASES.index(self.phase),
        }


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def schema() -> str:
    """The operator's, out of csrc/cuda.cpp."""
    definition = re.search(r"library\.def\((.*?)\);", SOURCE.read_text(), re.DOTALL)
    assert definition is not None
    return "".join(re.findall(r'"(.*?)"', definition.group(1)))


@contextmanager
def operator(
    function: Callable[[Arguments], None], step_: Callable[..., None] = cuda.step_
) -> Iterator[None]:
    """Makes `function` the operator on CPU tensors, and the backend "cuda" run there by `step_`."""

    def launch_(*arguments: Any) -> None:
        given = Arguments(*arguments)
        given.partials.fill_(torch.nan)  # no launch may rely on what an earlier one left there
        function(given)

    library = torch.library.Library("pats_kernels", "FRAGMENT")
    if cuda.MISSING is not None:
        library.define(schema())
    library.impl("launch_", launch_, "CPU")
    backends._choose.cache_clear()
    try:
        with patch.dict(backends._BACKENDS, cuda=backends.Backend(lambda device: None, step_)):
            yield
    finally:
        backends._choose.cache_clear()
        library._destroy()
