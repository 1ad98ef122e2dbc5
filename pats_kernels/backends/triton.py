"""The Triton backend: starts a launch's kernels over its tables on the device.

Triton takes a third of a second to import: that waits until a step, or a question that needs it, asks for it.
"""

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pats_kernels.backends.tables import DeviceTables, narrowed
from pats_kernels.plan import Batch, Column, Launch, LaunchKey, Phase, chunk_table

_KERNELS = "pats_kernels.backends.triton_kernel"

# Float32 fits in these without spills, on sm_80 to sm_100: 8 programs to a multiprocessor instead of 7, or 6.
MAX_REGISTERS = {"pats": 64, "pats_adamw": 80, "moments_adamw": 80}
STATISTICS_BLOCK = 256  # partial sums an iteration
# Where a multiply-add is fused the source says so, for the same bits on every path: triton_kernel.py.
UNFUSED: dict[str, int] = {"enable_fp_fusion": False}


@dataclass(frozen=True, slots=True)
class Tuning:
    """How the kernels are launched; nothing in it changes a result's bits, but for `chunk`, which sets the
    order in which the statistics are summed.

    Attributes:
        chunk: elements a program, or a program's turn.
        block: elements an iteration; 32 num_warps threads share them.
        max_registers: of a thread, at most; None: `MAX_REGISTERS` for float32, else 0: as the compiler likes.
        hints: eviction policy of loads, eviction policy of the gradient's, cache modifier of stores.
        persistent: programs to a multiprocessor, each of which takes chunk after chunk; 0: one a chunk.
        reversed: exact normalization's second phase begins where the first ended, with what L2 still holds.
        group_bytes: exact normalization finishes tensor after tensor, in groups whose second phase reads at
            most so many bytes, so that it finds them in L2; 0: all in one group.
    """

    chunk: int = 4096
    block: int = 1024
    num_warps: int = 4
    max_registers: int | None = None
    hints: tuple[str, str, str] = ("", "", "")
    persistent: int = 0
    reversed: bool = False
    group_bytes: int = 0


_DEFAULT = Tuning()
_tuning = [_DEFAULT]


@contextmanager
def tuned(tuning: Tuning) -> Iterator[None]:
    """Steps inside are launched so, for `benchmarks.tune`."""
    _tuning.append(tuning)
    try:
        yield
    finally:
        _tuning.pop()


def kernels() -> Any:
    """The module of the kernels, `triton_kernel`, imported at the first call.

    Raises:
        RuntimeError: it could not be, in the words of `unavailable`.
    """
    module, reason = _imported()
    if module is None:
        raise RuntimeError(reason)
    return module


@cache
def _imported() -> tuple[Any, str | None]:
    """The module of the kernels, or None and why there is none."""
    try:
        return importlib.import_module(_KERNELS), None
    except Exception as error:  # of any kind, from a Triton that does not fit its Python
        return None, f"triton could not be imported ({error})"


def unavailable(device: torch.device) -> str | None:
    if sys.modules.get("triton") is None and find_spec("triton") is None:
        return "triton is not installed"
    if _KERNELS in sys.modules or os.environ.get("TRITON_INTERPRET"):
        # Triton decides by its own reading of the variable, as it compiles or wraps a kernel: at the import.
        module, reason = _imported()
        if module is None:
            return reason
        if module.INTERPRETED:
            return None if device.type == "cpu" else "under TRITON_INTERPRET=1 it runs on the CPU"
    if device.type != "cuda":
        return "its kernels run on GPUs, and on the CPU only under TRITON_INTERPRET=1"
    return _imported()[1] if torch.cuda.is_available() else "there is no GPU"


def step_(
    launch: Launch, batch: Batch, phase: Phase, grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """One launch over all chunks and, but for the noise phase, one over all tensors."""
    device = launch.key.device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        _start(launch, phase, grad_scale, found_inf)


def _start(launch: Launch, phase: Phase, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    tuning, module = _tuning[-1], kernels()
    place = "triton", tuning
    if place not in launch.cache:
        launch.cache[place] = _Work(DeviceTables(launch, tuning.chunk, narrowed), _groups(launch, tuning))
    tables, groups = launch.cache[place].tables.current(launch), launch.cache[place].groups
    constants = specialization(launch.key, tuning)
    constants |= {"APPROX": _approximate(launch), "SMALL_EPS": _small_eps(launch)}
    options = {}
    if launch.key.device.type == "cuda":
        options = compiler_options(launch.key, tuning, "hip" if torch.version.hip else "cuda")
    num_chunks, grouped = len(tables.chunks), len(groups) > 1
    phases = {"one_pass": module.ONE_PASS, "averages": module.AVERAGES, "noise": module.NOISE}

    def run(phase: Phase, group: _Group) -> None:
        backwards = tuning.reversed and phase == "noise"
        part = grouped or tuning.persistent or backwards
        count = group.last_chunk - group.first_chunk
        programs = min(count, tuning.persistent * _multiprocessors(launch.key.device)) or count
        if count > 0:  # there are none where all shards are empty
            module.pats_kernel[(programs,)](
                tables.table,
                tables.layout,
                tables.chunks,
                tables.partials,
                grad_scale,
                found_inf,
                *((group.first_chunk, group.last_chunk, num_chunks) if part else (None, None, None)),
                PHASE=phases[phase],
                REVERSED=backwards,
                **constants,
                **options,
            )
        if phase != "noise":
            first = group.first_row if grouped else None
            module.statistics_kernel[(group.last_row - group.first_row,)](
                tables.table,
                tables.starts,
                tables.partials,
                num_chunks,
                found_inf,
                first,
                BLOCK=STATISTICS_BLOCK,
                **UNFUSED if options else {},
            )

    if not grouped:
        run(phase, groups[0])
    elif phase == "averages":  # and at once what would be the next phase
        for group in groups:
            run("averages", group)
            run("noise", group)


class _Group(NamedTuple):
    """Tensors that go through all phases before the next group's begin, and their chunks."""

    first_row: int
    last_row: int
    first_chunk: int
    last_chunk: int


@dataclass(slots=True)
class _Work:
    tables: DeviceTables
    groups: list[_Group]


def _groups(launch: Launch, tuning: Tuning) -> list[_Group]:
    """All tensors in one group, or what `Tuning.group_bytes` asks for; a bigger tensor is one by itself.

    Where there are shards other processes' shares come between the phases: they are one group.
    """
    numels = launch.table[:, Column.NUMEL]
    starts = chunk_table(numels, tuning.chunk)[1].tolist()
    bounds = [0]
    sharded = (launch.table[:, Column.SHARE] != launch.table[:, Column.STATS]).any()
    if tuning.group_bytes and launch.key.variant.normalization == "exact" and not sharded:
        read = numels * (launch.key.param_dtype.itemsize + 2 * launch.key.state_dtype.itemsize)
        held = 0
        for row, size in enumerate(read.tolist()):
            if held and held + size > tuning.group_bytes:
                bounds.append(row)
                held = 0
            held += size
    bounds.append(len(numels))
    return [_Group(a, b, starts[a], starts[b]) for a, b in pairwise(bounds)]


@cache
def _multiprocessors(device: torch.device) -> int:
    on_gpu = device.type == "cuda"
    return torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 1


def specialization(key: LaunchKey, tuning: Tuning = _DEFAULT) -> dict[str, Any]:
    """The kernel's compile-time arguments for such a launch, but for those that depend on the device, and
    for an ordinary eps."""
    module = kernels()
    dtypes = {
        torch.float32: module.tl.float32,
        torch.bfloat16: module.tl.bfloat16,
        torch.float16: module.tl.float16,
        torch.float64: module.tl.float64,
    }
    forms = {
        "pats": module.PATS,
        "pats_adamw": module.PATS_ADAMW,
        "moments_adamw": module.MOMENTS_ADAMW,
    }
    uncertainties = {"product": module.PRODUCT, "ucb": module.UCB, "none": module.NONE}
    return {
        "PARAM": dtypes[key.param_dtype],
        "STATE": dtypes[key.state_dtype],
        "FORM": forms[key.variant.form],
        "UNCERTAINTY": uncertainties[key.variant.uncertainty],
        "STOCHASTIC": key.variant.stochastic_rounding,
        "SMALL_EPS": False,
        "CHUNK": tuning.chunk,
        "BLOCK": tuning.block,
        "HINTS": tuning.hints,
        "PERSISTENT": tuning.persistent > 0,
    }


def compiler_options(
    key: LaunchKey, tuning: Tuning = _DEFAULT, vendor: Literal["cuda", "hip"] = "cuda"
) -> dict[str, int]:
    """What the compiler is told for NVIDIA's devices, or AMD's, where it has no limit of registers."""
    limit = tuning.max_registers
    if limit is None:
        float32 = key.param_dtype == key.state_dtype == torch.float32
        limit = MAX_REGISTERS[key.variant.form] if float32 else 0
    limits = {"maxnreg": limit} if limit and vendor == "cuda" else {}
    return UNFUSED | {"num_warps": tuning.num_warps} | limits


def _small_eps(launch: Launch) -> bool:
    """Whether some tensor's eps does not hide that the root of what is subnormal is 0 to sqrt.approx."""
    if launch.key.variant.form == "pats" or launch.key.param_dtype == torch.float64:
        return False
    return bool(launch.table.view(np.float64)[:, Column.EPS].min() < 2.0**-40)


def _approximate(launch: Launch) -> bool:
    """Whether PTX's approximate instructions are there (tanh.approx came with sm_75) and exact enough."""
    if launch.key.device.type != "cuda" or torch.version.hip is not None:
        return False
    capable = torch.cuda.get_device_capability(launch.key.device) >= (7, 5)
    return capable and launch.key.param_dtype != torch.float64
