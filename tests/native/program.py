"""threads.cpp with the CPU kernel for several instruction sets, without torch, for arm.py and sanitize.py."""

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NATIVE, BUILD = ROOT / "tests" / "native", ROOT / "build"
SIMD_FLAGS = "-std=c++17 -Wall -Wextra -ffp-contract=off -fopenmp-simd -fno-math-errno -fno-trapping-math "
SIMD_FLAGS += "-ffinite-math-only -fno-signed-zeros"  # as in setup.py
INSTRUCTION_SETS = {"baseline": ""}
if platform.machine() == "x86_64":
    INSTRUCTION_SETS |= {
        "avx2": "-mavx2 -mfma",
        "avx512": "-mavx512f -mavx512dq -mavx512bw -mavx512vl -mfma -mprefer-vector-width=512",
    }


def built(
    target: Path,
    sets: Mapping[str, str] = INSTRUCTION_SETS,
    flags: Sequence[str] = (),
    link: Sequence[str] = (),
    compiler: str = "g++",
) -> Path:
    """Compiles and links `target`; the kernel's objects lie beside it as TARGET_SET.o.

    Args:
        sets: the instruction sets' compiler flags, by name.
        flags: of the kernel, beside SIMD_FLAGS.
        link: flags of threads.cpp and of the linker.
    """
    target.parent.mkdir(parents=True, exist_ok=True)

    def compile_(name: str) -> str:
        kernel = target.with_name(f"{target.name}_{name}.o")
        of_set = [*flags, *SIMD_FLAGS.split(), *sets[name].split(), f"-DPATS_CHUNK=chunk_{name}"]
        run([compiler, *of_set, "-c", "csrc/cpu_kernel.cpp", "-o", str(kernel)])
        return str(kernel)

    with ThreadPoolExecutor(2) as pool:
        kernels = list(pool.map(compile_, sets))
    include = ["-std=c++17", f"-I{NATIVE / 'stand_in'}", "-pthread"]
    run([compiler, *link, *include, str(NATIVE / "threads.cpp"), *kernels, "-o", str(target)])
    return target


def run(command: list[str], environment: Mapping[str, str] | None = None, folder: Path = ROOT) -> None:
    print("+", " ".join(command), flush=True)
    subprocess.run(command, cwd=folder, env=os.environ | dict(environment or {}), check=True)
