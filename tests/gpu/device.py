"""Where the tests of this folder run: on a GPU, or in a rehearsal on the CPU.

A rehearsal, PATS_GPU_REHEARSAL=1 pytest tests/gpu, runs them on the CPU with the machine code that Triton
compiles for an H100 (tests/ptx), at sizes that its interpreter can bear, and with a CUDA graph that notes
what the backend would have launched. What only a GPU has is skipped then: docs/machine-code.md lists it.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from pats_kernels import available_backends
from pats_kernels.backends import tables, triton

REHEARSAL = os.environ.get("PATS_GPU_REHEARSAL") == "1"
DEVICE = "cpu" if REHEARSAL else "cuda"
BACKENDS = (
    ["triton"]
    if REHEARSAL
    else [name for name in ("triton", "cuda") if available_backends(DEVICE)[name] is None]
)

needs_gpu = pytest.mark.skipif(REHEARSAL, reason="there is no GPU: a rehearsal")
backends = pytest.mark.parametrize("backend", BACKENDS)


def at_most(rehearsed: int, size: int) -> int:
    """A size, or in a rehearsal another."""
    return rehearsed if REHEARSAL else size


def synchronize() -> None:
    if not REHEARSAL:
        torch.cuda.synchronize()


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    """To the last bit."""
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


class Graph:
    """A captured function: `torch.cuda.CUDAGraph`, or in a rehearsal its launches, to be run again."""

    def __init__(self, function: Callable[[], Any], pool: Any = None) -> None:
        self._work: list[Callable[[], Any]] = []
        self.pool: Any = None
        if REHEARSAL:
            with self._recorded():
                function()
            return
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, pool=pool):
            function()
        self._work, self.pool = [graph.replay], graph.pool()

    def replay(self) -> None:
        for work in self._work:
            work()

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        """Nothing runs: kernels and uploads are noted, and the tables believe in a capture."""
        kernels = triton.kernels()
        names = ("pats_kernel", "statistics_kernel")
        recorders = {name: _Recorder(getattr(kernels, name), self._work) for name in names}

        def upload(kept: Any, launch: Any, staging: Any, given: Any) -> None:
            kept._pack(launch, staging.numpy())
            self._work.append(lambda: given.table.copy_(staging))

        with (
            patch.multiple(kernels, **recorders),
            patch.object(tables, "capturing", lambda device: True),
            patch.object(tables.DeviceTables, "_upload", upload),
        ):
            yield


class _Recorder:
    """Stands for a kernel: kernel[grid](...) is noted."""

    def __init__(self, kernel: Any, work: list[Callable[[], Any]]) -> None:
        self._kernel = kernel
        self._work = work

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def note(*arguments: Any, **keywords: Any) -> None:
            self._work.append(lambda: self._kernel[grid](*arguments, **keywords))

        return note


class Stream:
    """A stream of its own; in a rehearsal there is but one."""

    def __init__(self) -> None:
        self._stream = None if REHEARSAL else torch.cuda.Stream()

    def wait(self, other: "Stream | None") -> None:
        """For `other`, or the current one."""
        if self._stream is not None:
            self._stream.wait_stream(
                torch.cuda.current_stream() if other is None or other._stream is None else other._stream
            )

    def current(self) -> Any:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
