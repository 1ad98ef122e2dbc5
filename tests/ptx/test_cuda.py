"""The project's own tests of a backend, on what nvcc makes of its CUDA kernels."""

import shutil
from collections.abc import Iterator

import pytest

from ptx.collected import MODULES, of_backends
from ptx.cuda_driver import emulated

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed"),
    pytest.mark.xdist_group("cuda ptx"),  # only one of xdist's processes compiles
]


@pytest.fixture(scope="module")
def backend(arch: int) -> Iterator[str]:
    """ "cuda", on the CPU, as it is compiled for a GPU."""
    with emulated(arch):
        yield "cuda"


for _module in MODULES:
    globals().update(of_backends(_module, "cuda_ptx"))
