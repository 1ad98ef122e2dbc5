"""The machine that a benchmark runs on: its description, and settings that keep results from misleading."""

import argparse
import ctypes
import os
import platform
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypedDict

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h
# Of this package's CPU kernel, best first, with Linux's names of what each needs; csrc/cpu.cpp chooses alike.
ISAS = {
    "avx512": {"avx512f", "avx512dq", "avx512bw", "avx512vl"},
    "avx2": {"avx2", "fma"},
    "baseline": set[str](),
}
ISA_NAMES = {"avx512": "AVX-512", "avx2": "AVX2", "baseline": "baseline instructions"}
LIMIT = "PATS_KERNELS_ISA"  # the environment's: the best that may be chosen
PACKAGES = ("torch", "triton", "transformers", "numpy")


class Machine(TypedDict):
    """What one must know about the machine to interpret a result. `isa`: the instruction set of this
    package's CPU kernel, one of `ISAS`; `load_before`: how many processes wanted a core."""

    device: str
    device_name: str
    cpu: str
    isa: str
    threads: int
    date: str
    versions: dict[str, str | None]
    torch: str
    triton: str | None
    load_before: float
    kept_freed_memory: bool


def prepare(device: torch.device) -> Machine:
    """Prepares this process for a benchmark, before anything big is allocated, and describes the machine."""
    installed = versions()
    return {
        "device": device.type,
        "device_name": device_name(device),
        "cpu": cpu_name(),
        "isa": isa(),
        "threads": torch.get_num_threads(),
        "date": now(),
        "versions": installed,
        "torch": str(torch.__version__),
        "triton": installed["triton"],
        "load_before": os.getloadavg()[0],  # of the last minute
        "kept_freed_memory": keep_freed_memory(),
    }


def keep_freed_memory() -> bool:
    """Tells glibc's malloc to keep freed memory. Returns whether that worked.

    By default each big temporary gets new memory from the kernel, with a page fault for every 4 KiB. Those
    faults, not the arithmetic, would take most of the time of eager torch operations on a CPU, and a
    comparison with them would flatter every fused kernel.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    """The processor's name from Linux, or else from Python."""
    return _cpu("model name") or platform.processor() or platform.machine()


def _cpu(what: str) -> str:
    """What Linux says about the first processor, or nothing."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(what)), "")


def isas() -> list[str]:
    """The instruction sets that the CPU kernel can use here, best first."""
    flags = set(_cpu("flags").split()) if platform.machine() == "x86_64" else set[str]()
    return [name for name, needed in ISAS.items() if needed <= flags]


def isa() -> str:
    """The instruction set that the CPU kernel uses: the best one here that the environment allows."""
    limit = os.environ.get(LIMIT, "avx512")
    allowed = {"avx512": isas(), "baseline": ["baseline"]}.get(limit, [i for i in isas() if i != "avx512"])
    return allowed[0]


def isa_title(about: "Machine") -> str:
    """For a table's title: the instruction set of a measurement on a CPU."""
    return f", {ISA_NAMES[about['isa']]}" if about["device"] == "cpu" else ""


def add_isa(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--isa",
        choices=ISAS,
        help="instruction set of this package's CPU kernel; default: the best here. torch chooses its own",
    )


def choose_isa(name: str | None) -> None:
    """Sets the instruction set. Call it before the first step: the kernel reads it once in a process.

    Raises:
        ValueError: the machine has no such instructions.
    """
    if name is None:
        return
    if name not in isas():
        raise ValueError(f"this machine has no {ISA_NAMES[name]}: it has {', '.join(isas())}")
    os.environ[LIMIT] = name


def versions() -> dict[str, str | None]:
    """The versions of the packages that the results depend on; None if not installed.

    Each is the version that the imported module gives: torch's own names its CUDA, its package's may not.
    """
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    own = getattr(sys.modules.get(package), "__version__", None)
    try:
        return version(package) if own is None else str(own)
    except PackageNotFoundError:
        return None


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
