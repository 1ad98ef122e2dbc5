"""The Triton backend: starts a launch's kernels over its tables on the device.

Importing Triton takes a third of a second, so it is imported only when a step or a query needs it.
"""

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pats_kernels.backends.tables import DeviceTables, narrowed
from pats_kernels.plan import Batch, Column, Launch, LaunchKey, Phase, chunk_table

_KERNELS = "pats_kernels.backends.triton_kernel"

# Most registers of a thread, by the bytes of an element: as few as full chunks need, so that many programs
# have loads under way. Measured on an H200: docs/performance.md.
MAX_REGISTERS = {
    4: {"pats": 64, "pats_adamw": 80, "moments_adamw": 80},
    2: {"pats": 80, "pats_adamw": 96, "moments_adamw": 80},
}
CHUNKS = {4: 4096, 2: 8192}  # elements in a chunk, by the bytes of an element
STATISTICS_BLOCK = 256  # partial sums in each iteration
ALIGNMENT = 16  # bytes; Triton compiles separate kernels for pointers that are multiples of it
# The source says where a multiply-add is fused, for the same bits on every path: triton_kernel.py.
UNFUSED: dict[str, int] = {"enable_fp_fusion": False}


@dataclass(frozen=True, slots=True)
class Tuning:
    """How the kernels are launched. Only `chunk` changes a result's bits, because it sets the order in which
    the statistics are summed.

    Attributes:
        chunk: elements in a chunk; 0: as in `CHUNKS`.
        block: elements in an iteration, shared by 32 num_warps threads.
        max_registers: most registers of a thread; None: as in `MAX_REGISTERS`; 0: the compiler decides.
        hints: eviction policy of loads, eviction policy of the gradient's load, cache modifier of stores.
        persistent: programs per multiprocessor, which each take one chunk after another; 0: one program per
            chunk.
        reversed: exact normalization's second phase begins where the first ended, with data that L2 still
            holds.
        group_bytes: exact normalization finishes one group of tensors after another. A group's second phase
            reads at most so many bytes, so that it finds them in L2; 0: one group.
    """

    chunk: int = 0
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
    """Steps in the `with` block use this tuning; for `benchmarks.tune`."""
    _tuning.append(tuning)
    try:
        yield
    finally:
        _tuning.pop()


def kernels() -> Any:
    """The module of the kernels, `triton_kernel`, imported at the first call.

    Raises:
        RuntimeError: the import failed; with the reason that `unavailable` returns.
    """
    module, reason = _imported()
    if module is None:
        raise RuntimeError(reason)
    return module


@cache
def _imported() -> tuple[Any, str | None]:
    """The module of the kernels, or None and the reason."""
    try:
        return importlib.import_module(_KERNELS), None
    except Exception as error:  # a Triton that does not match its Python may raise any kind
        return None, f"triton could not be imported ({error})"


def unavailable(device: torch.device) -> str | None:
    if sys.modules.get("triton") is None and find_spec("triton") is None:
        return "triton is not installed"
    if _KERNELS in sys.modules or os.environ.get("TRITON_INTERPRET"):
        # Triton itself reads the variable when it compiles or wraps a kernel, which is at the import.
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
    """One launch over all chunks and, except in the noise phase, one over all tensors."""
    device = launch.key.device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        _start(launch, phase, grad_scale, found_inf)


def _start(launch: Launch, phase: Phase, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    tuning, module = _tuning[-1], kernels()
    place = "triton", tuning
    work: _Work | None = launch.cache.get(place)
    if work is None:
        work = launch.cache[place] = _Work.of(launch, tuning)
    tables, groups, small_eps = work.tables.current(launch), work.groups, _small_eps(launch)
    num_chunks, grouped = len(tables.chunks), len(groups) > 1

    def run(phase: Phase, group: _Group) -> None:
        backwards = tuning.reversed and phase == "noise"
        part = grouped or tuning.persistent or backwards
        count = group.last_chunk - group.first_chunk
        programs = min(count, tuning.persistent * _multiprocessors(launch.key.device)) or count
        pointers = {"table": tables.table, "partials": tables.partials, "found_inf": found_inf}
        if count > 0:  # there are no chunks if all shards are empty
            work.start(
                module.pats_kernel,
                phase,
                programs,
                {**pointers, "layout": tables.layout, "chunks": tables.chunks, "grad_scale": grad_scale},
                {
                    "first": group.first_chunk if part else None,
                    "last": group.last_chunk if part else None,
                    "num_chunks": num_chunks if part else None,
                    "REVERSED": backwards,
                    "SMALL_EPS": small_eps,
                },
                work.constants[phase],
                work.options,
            )
        if phase != "noise":
            work.start(
                module.statistics_kernel,
                phase,
                group.last_row - group.first_row,
                {**pointers, "starts": tables.starts},
                {"num_chunks": num_chunks, "first": group.first_row if grouped else None},
                {"BLOCK": STATISTICS_BLOCK},
                UNFUSED if work.options else {},
            )

    if not grouped:
        run(phase, groups[0])
    elif phase == "averages":  # and the next phase at once
        for group in groups:
            run("averages", group)
            run("noise", group)


class _Group(NamedTuple):
    """Tensors that go through all phases before the next group begins, and their chunks."""

    first_row: int
    last_row: int
    first_chunk: int
    last_chunk: int


@dataclass(slots=True)
class _Work:
    """What a launch keeps and starts.

    Attributes:
        constants: of `pats_kernel`, by phase.
        options: the compiler's.
        compiled: kernels, by everything that Triton specializes them for.
    """

    tables: DeviceTables
    groups: list[_Group]
    constants: dict[Phase, dict[str, Any]]
    options: dict[str, int]
    compiled: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, launch: Launch, tuning: Tuning) -> "_Work":
        key, module = launch.key, kernels()
        phases: dict[Phase, Any] = {
            "one_pass": module.ONE_PASS,
            "averages": module.AVERAGES,
            "noise": module.NOISE,
        }
        common = specialization(key, tuning) | {"APPROX": _approximate(launch)}
        on_gpu = key.device.type == "cuda"
        return cls(
            DeviceTables(launch, chunk_of(key, tuning), narrowed),
            _groups(launch, tuning),
            {phase: {"PHASE": value, **common} for phase, value in phases.items()},
            compiler_options(key, tuning, _architecture(key.device)) if on_gpu else {},
        )

    def start(
        self,
        kernel: Any,
        phase: Phase,
        programs: int,
        pointers: dict[str, Tensor | None],
        numbers: dict[str, int | bool | None],
        constants: dict[str, Any],
        options: dict[str, Any],
    ) -> None:
        """kernel[(programs,)](...); from the second time on it calls the compiled kernel directly.

        Triton binds, specializes and looks up the kernel for each launch, which is most of the host's time in
        a step of few tensors. `constants` and `options` are the same for a kernel and phase of a launch.
        """
        seen = [x if x is None else (x.dtype, x.data_ptr() % ALIGNMENT) for x in pointers.values()]
        key = (id(kernel), phase, *seen, *numbers.values())
        arguments = {**constants, **pointers, **numbers}
        if key in self.compiled:
            compiled, names = self.compiled[key]
            compiled[(programs, 1, 1)](*map(arguments.get, names))  # the constants' places are not read
            return
        compiled = kernel[(programs,)](**arguments, **options)
        if compiled is not None:  # under the interpreter nothing is compiled
            self.compiled[key] = compiled, kernel.arg_names


def _groups(launch: Launch, tuning: Tuning) -> list[_Group]:
    """All tensors in one group, or the groups of `Tuning.group_bytes`; a bigger tensor is a group by itself.

    Shards are always one group, because the other processes' shares arrive between the phases.
    """
    numels = launch.table[:, Column.NUMEL]
    starts = chunk_table(numels, chunk_of(launch.key, tuning))[1].tolist()
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


def chunk_of(key: LaunchKey, tuning: Tuning = _DEFAULT) -> int:
    """Elements in a chunk of such a launch."""
    return tuning.chunk or CHUNKS.get(_width(key), CHUNKS[4])


def _width(key: LaunchKey) -> int:
    """Bytes of an element of both parameters and averages; 0 if they differ."""
    param, state = key.param_dtype.itemsize, key.state_dtype.itemsize
    return param if param == state else 0


def specialization(key: LaunchKey, tuning: Tuning = _DEFAULT) -> dict[str, Any]:
    """The kernel's compile-time arguments for such a launch, without those that depend on the device, and
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
        "CHUNK": chunk_of(key, tuning),
        "BLOCK": tuning.block,
        "HINTS": tuning.hints,
        "PERSISTENT": tuning.persistent > 0,
    }


def compiler_options(key: LaunchKey, tuning: Tuning = _DEFAULT, arch: str = "sm_90") -> dict[str, int]:
    """The compiler's options for such a GPU; on AMD's there is no limit on registers."""
    limit = tuning.max_registers
    if limit is None:
        # On Blackwell 16 bits spill with the limits that are fastest on an H200. Not measured there.
        unlimited = _width(key) == 2 and arch.startswith("sm_1")
        limit = 0 if unlimited else MAX_REGISTERS.get(_width(key), {}).get(key.variant.form, 0)
    limits = {"maxnreg": limit} if limit and arch.startswith("sm_") else {}
    return UNFUSED | {"num_warps": tuning.num_warps} | limits


@cache
def _architecture(device: torch.device) -> str:
    """The device's architecture, such as "sm_90", or AMD's "gfx942"."""
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def _small_eps(launch: Launch) -> bool:
    """Whether some tensor's eps is so small that sqrt.approx matters: it takes subnormal numbers for 0."""
    if launch.key.variant.form == "pats" or launch.key.param_dtype == torch.float64:
        return False
    return bool(launch.table.view(np.float64)[:, Column.EPS].min() < 2.0**-40)


def _approximate(launch: Launch) -> bool:
    """Whether PTX's approximate instructions exist (tanh.approx since sm_75) and are exact enough."""
    if launch.key.device.type != "cuda" or torch.version.hip is not None:
        return False
    capable = torch.cuda.get_device_capability(launch.key.device) >= (7, 5)
    return capable and launch.key.param_dtype != torch.float64
