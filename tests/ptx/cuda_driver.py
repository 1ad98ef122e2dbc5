"""The launches of csrc/cuda.cpp on the CPU: csrc/cuda_kernel.cu as nvcc compiles it, run by the interpreter.

`emulated` makes the package's backend "cuda" launch so. Which kernels a launch starts is decided as in
`launch_as` of csrc/cuda_kernel.cu; tests/cuda_emulation runs that function itself.
"""

import ctypes
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from cuda_operator import STORAGES, Arguments, name_of, operator
from torch import Tensor

from benchmarks.codegen import nvcc
from pats_kernels.backends import cuda
from pats_kernels.plan import Batch, Launch, Phase
from ptx.machine import Kernel
from ptx.memory import GlobalMemory, Interval
from ptx.program import kernels, parse
from ptx.triton_driver import interval, intervals_of


class CudaLaunch(ctypes.Structure):
    """That of csrc/cuda_kernel.h."""

    _fields_ = (
        ("state", ctypes.c_int),
        ("form", ctypes.c_int),
        ("uncertainty", ctypes.c_int),
        ("phase", ctypes.c_int),
        ("stochastic_rounding", ctypes.c_bool),
        ("strided", ctypes.c_bool),
        ("plain", ctypes.c_bool),
        *((name, ctypes.c_uint64) for name in ("table", "layout", "chunks", "starts", "partials")),
        ("num_chunks", ctypes.c_int64),
        ("num_tensors", ctypes.c_int64),
        ("grad_scale", ctypes.c_uint64),
        ("found_inf", ctypes.c_uint64),
    )


@cache
def compiled(dtype: str, arch: int) -> str:
    """The PTX of all kernels for parameters of such a dtype."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernels.ptx"
        names = [f"-DPATS_PARAM={nvcc.PARAMETERS[dtype]}", "-DPATS_LAUNCH=launch_it"]
        command = ["nvcc", *nvcc.FLAGS, f"-arch=sm_{arch}", "-ptx", "-lineinfo", *names, str(nvcc.SOURCE)]
        subprocess.run([*command, "-o", str(file)], check=True, capture_output=True)
        return file.read_text()


def short_names(text: str) -> dict[str, str]:
    """The kernels of a module by what they are, as "update_kernel<float, float, 0, 1, true>"."""
    symbols = kernels(text)
    readable = subprocess.run(
        ["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    found = {}
    for symbol, name in zip(symbols, readable, strict=True):
        match = re.search(r"(\w+<.*>)\(", name)
        assert match is not None, name
        found[re.sub(r"\(pats::\w+\)|pats::", "", match.group(1))] = symbol
    return found


@dataclass
class Settings:
    """How launches are run: see `ptx.triton_driver.Settings`."""

    arch: int
    seed: int | None = None
    intervals: list[Interval] = field(default_factory=list)
    modules: dict[str, dict[str, str]] = field(default_factory=dict)
    kernels: dict[str, Kernel] = field(default_factory=dict)

    def kernel(self, dtype: str, name: str) -> Kernel:
        text = compiled(dtype, self.arch)
        if dtype not in self.modules:
            self.modules[dtype] = short_names(text)
        if name not in self.kernels:
            self.kernels[name] = Kernel(parse(text, self.modules[dtype][name]))
        return self.kernels[name]


def started(launch: CudaLaunch, param: str) -> Iterator[tuple[str, int]]:
    """The kernels that `launch_as` starts, each with its number of blocks."""
    p = nvcc.PARAMETERS[param]
    s = nvcc.PARAMETERS[STORAGES[launch.state]] if STORAGES[launch.state] != "float16" else "float"
    rounds = "bfloat16" in (param, STORAGES[launch.state])
    common = launch.uncertainty == 0 and (launch.stochastic_rounding or not rounds)
    form = 0 if launch.form == 1 and launch.phase == 1 else launch.form
    flag = "true" if common else "false"
    yield f"update_kernel<{p}, {s}, {form}, {launch.phase}, {flag}>", launch.num_chunks
    if launch.strided:
        yield f"strided_kernel<{p}, {s}>", launch.num_chunks
    if launch.plain and launch.phase != 1:
        yield f"update_kernel<{p}, {s}, 3, {launch.phase}, false>", launch.num_chunks
    if launch.phase != 2:
        yield f"statistics_kernel<{'double' if p == 'double' else 'float'}>", launch.num_tensors


def launch_(settings: Settings, arguments: Arguments) -> None:
    """The operator of csrc/cuda.cpp."""
    names = ("table", "layout", "chunks", "starts", "partials", "grad_scale", "found_inf")
    tensors = {name: getattr(arguments, name) for name in names}
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    launch = CudaLaunch(
        **arguments.enums(),
        stochastic_rounding=arguments.stochastic_rounding,
        strided=len(arguments.layout) > 0,
        plain=arguments.plain,
        num_chunks=len(arguments.chunks),
        num_tensors=len(arguments.table),
        **{name: tensor.data_ptr() for name, tensor in given.items()},
    )
    own = [interval(name, tensor, name == "partials") for name, tensor in given.items()]
    param = name_of(arguments.param_dtype)
    for name, blocks in started(launch, param):
        kernel = settings.kernel(param, name)
        memory = GlobalMemory([*settings.intervals, *own, *kernel.constant_intervals()])
        if blocks:
            kernel.launch(blocks, bytes(launch), memory, seed=settings.seed)


@contextmanager
def emulated(arch: int, seed: int | None = None) -> Iterator[Settings]:
    """The backend "cuda" runs on the CPU what it would launch on such a GPU."""
    settings = Settings(arch, seed)

    def step_(
        launch: Launch, batch: Batch, phase: Phase, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        settings.intervals = list(intervals_of(batch))
        cuda.step_(launch, batch, phase, grad_scale, found_inf)

    with operator(lambda arguments: launch_(settings, arguments), step_):
        yield settings
