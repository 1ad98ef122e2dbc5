"""Triton's own launches, compiled for a GPU that is not there, run by the interpreter.

With `Driver` active, kernel[grid](...) on tensors of the CPU goes all of Triton's way (binding,
specialization, the compiler and its options, ptxas, the cache) and ends in `ptx.machine`. `emulated` makes
the package's backend "triton" launch so.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.cache import get_cache_manager

from pats_kernels import backends
from pats_kernels.backends import triton as backend
from pats_kernels.backends.tables import DeviceTables, Tables
from pats_kernels.plan import Batch, Launch, LaunchKey, Phase
from ptx.machine import Kernel
from ptx.memory import GlobalMemory, Interval
from ptx.program import parse

SHARED_BYTES = 232448  # the most that a block may have on sm_90
WRITABLE = ("partials",)  # the only one of a kernel's own arguments that it may write


@dataclass
class Settings:
    """How launches are run.

    Attributes:
        arch: as 90 for sm_90.
        seed: approximations err by all that the ISA allows; None: not at all.
        plant: changes a kernel's PTX before it is run, given its name and text: to plant a bug.
        intervals: what kernels may touch besides their own arguments, by the address of the launch's table.
    """

    arch: int
    seed: int | None = None
    plant: Callable[[str, str], str] | None = None
    intervals: dict[int, list[Interval]] = field(default_factory=dict)


def interval(name: str, tensor: Tensor, writable: bool = True) -> Interval:
    """All bytes from the tensor's first element to its last."""
    last = 1 + sum(stride * (size - 1) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    size = last * tensor.element_size() if tensor.numel() else 0
    return Interval(name, tensor.data_ptr(), size, writable)


@lru_cache(64)
def decoded(text: str) -> Kernel:
    """Once for all tests of a process."""
    return Kernel(parse(text))


class _Utils:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_BYTES, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return None, None, 0, 0, 1024  # module, function, registers, spills, max threads


class _Launcher:
    """What Triton makes of a compiled kernel, to start it."""

    def __init__(self, settings: Settings, source: Any, metadata: Any) -> None:
        self._settings = settings
        self._shared, self._name = metadata.shared, metadata.name
        self._names, self._types = source.fn.arg_names, list(source.signature.values())
        path = get_cache_manager(metadata.hash).get_file(f"{metadata.name}.ptx")
        assert path is not None
        self._text = Path(path).read_text()

    def _kernel(self) -> Kernel:
        settings, text = self._settings, self._text
        if settings.plant is not None:
            text = settings.plant(self._name, text)
        return decoded(text)

    def __call__(self, x: int, y: int, z: int, *arguments: Any) -> None:
        assert y == z == 1
        # Stream, function, metadata, launch metadata and two hooks come before the kernel's own arguments.
        given = zip(self._names, arguments[6:], self._types, strict=True)
        passed = [(name, value, kind) for name, value, kind in given if kind != "constexpr"]
        kernel, settings = self._kernel(), self._settings
        params = b""
        intervals = kernel.constant_intervals()
        for (name, value, _), param in zip(passed, kernel.program.kernel.params, strict=False):
            if isinstance(value, Tensor):
                intervals.append(interval(name, value, name in WRITABLE))
                value = value.data_ptr()
                if name == "table":
                    intervals += settings.intervals[value]
            params += b"\0" * (param.offset - len(params))
            params += int(value).to_bytes(param.size, "little", signed=value < 0)
        last = kernel.program.kernel.params[-1]
        params += b"\0" * (last.offset + last.size - len(params))  # null pointers to scratch memory
        kernel.launch(x, params, GlobalMemory(intervals), self._shared, seed=settings.seed)


class Driver(DriverBase):
    """Without a device. Each architecture counts as one, as Triton keeps what it compiled by device."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.utils = _Utils()
        self.launcher_cls = lambda source, metadata: _Launcher(settings, source, metadata)

    @classmethod
    def is_active(cls) -> Any:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", self._settings.arch, 32)

    def get_active_torch_device(self) -> Any:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing is timed here")

    def get_current_device(self) -> int:
        return self._settings.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def intervals_of(batch: Batch) -> Iterator[Interval]:
    """What a step's kernels reach through their table."""
    written = {
        "param": batch.params,
        **batch.averages,
        "sens_stats": batch.sens_stats,
        "share": batch.shares,
        "step": batch.steps,
        "nonfinite": batch.nonfinite,
    }
    for name, column in written.items():
        for i, tensor in enumerate(column):
            if isinstance(tensor, Tensor):
                yield interval(f"{name} {i}", tensor)
    for i, grad in enumerate(batch.grads):
        yield interval(f"grad {i}", grad, writable=False)
    for hyperparameters in batch.hyperparameters:
        for name, tensor in hyperparameters.on_device.items():
            yield interval(name, tensor, writable=False)


@contextmanager
def emulated(arch: int, seed: int | None = None) -> Iterator[Settings]:
    """The backend "triton" runs on the CPU what it would launch on such a GPU."""
    settings = Settings(arch, seed)
    intervals: list[Interval] = []

    def step_(
        launch: Launch, batch: Batch, phase: Phase, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        intervals[:] = intervals_of(batch)
        backend._start(launch, phase, grad_scale, found_inf)

    def current(tables: DeviceTables, launch: Launch) -> Tables:
        """A launch may be noted and run much later: in the rehearsal of a graph."""
        found = own_current(tables, launch)
        settings.intervals[found.table.data_ptr()] = list(intervals)
        return found

    def specialization(key: LaunchKey, tuning: backend.Tuning = backend._DEFAULT) -> dict[str, Any]:
        return own(key, tuning) | backend.compiler_options(key, tuning, f"sm_{settings.arch}")

    own, own_current = backend.specialization, DeviceTables.current
    stand_in = backends.Backend(lambda device: None, step_)
    active = triton.runtime.driver._active
    triton.runtime.driver.set_active(Driver(settings))
    backends._choose.cache_clear()
    try:
        with (
            patch.dict(backends._BACKENDS, triton=stand_in),
            patch.object(backend, "specialization", specialization),
            patch.object(DeviceTables, "current", current),
            patch.object(backend, "_approximate", lambda launch: launch.key.param_dtype != torch.float64),
        ):
            yield settings
    finally:
        triton.runtime.driver._active = active
        backends._choose.cache_clear()
