"""The project's own tests of a backend, on the machine code that its Triton kernels compile to."""

from collections.abc import Iterator

import pytest

from ptx.collected import MODULES, of_backends
from ptx.triton_driver import emulated


@pytest.fixture(scope="module")
def backend(arch: int) -> Iterator[str]:
    """ "triton", on the CPU, as it is compiled for a GPU."""
    with emulated(arch):
        yield "triton"


for _module in MODULES:
    globals().update(of_backends(_module, "triton_ptx"))
