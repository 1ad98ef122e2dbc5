"""The machine that a benchmark runs on: what it is, and what keeps it from misleading."""

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
PACKAGES = ("torch", "triton", "transformers", "numpy")


class Machine(TypedDict):
    """What a result would mean nothing without. `load_before`: how many processes wanted a core."""

    device: str
    device_name: str
    cpu: str
    threads: int
    date: str
    versions: dict[str, str | None]
    torch: str
    triton: str | None
    load_before: float
    kept_freed_memory: bool


def prepare(device: torch.device) -> Machine:
    """Readies this process for a benchmark, before anything big is allocated, and describes the machine."""
    installed = versions()
    return {
        "device": device.type,
        "device_name": device_name(device),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "date": now(),
        "versions": installed,
        "torch": str(torch.__version__),
        "triton": installed["triton"],
        "load_before": os.getloadavg()[0],  # of the last minute
        "kept_freed_memory": keep_freed_memory(),
    }


def keep_freed_memory() -> bool:
    """Tells glibc's malloc to keep freed memory; says whether it could.

    By default a big temporary is fetched from the kernel afresh each time and pays a page fault for every
    4 KiB. Those faults, not the arithmetic, would be most of the time of eager torch operations on a CPU,
    and a contest against them would flatter every fused kernel.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    """The processor's name as Linux knows it, else as Python does."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def versions() -> dict[str, str | None]:
    """The versions of what the results depend on; None for what is not installed.

    Each is the one that what is imported gives: torch's own says of which CUDA it is, its package's need not.
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
