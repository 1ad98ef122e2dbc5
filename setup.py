"""Builds the C++ extension where torch and a compiler are at hand; without them the package installs too.

Build with `pip install --no-build-isolation`: the extension belongs to the torch that is installed.
"""

import platform
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from setuptools import setup

KERNEL = "csrc/cpu_kernel.cpp"
# What lets the compiler vectorize the kernel. It asks bits, not comparisons, what is NaN or infinite
# (csrc/arithmetic.h), so that minima and maxima can be one instruction each.
SIMD_FLAGS = [
    "-O3",
    "-g0",
    "-std=c++17",
    "-Wall",
    "-Wextra",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffinite-math-only",
    "-fno-signed-zeros",
]
INSTRUCTION_SETS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS |= {
        "avx2": ["-mavx2", "-mfma"],
        "avx512": [f"-mavx512{part}" for part in ("f", "dq", "bw", "vl")]
        + ["-mfma", "-mprefer-vector-width=512"],
    }


def setup_with_extension() -> None:
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class BuildKernels(BuildExtension):
        """Compiles the kernel once for each instruction set. A failure leaves a package without extension."""

        def build_extension(self, ext: Any) -> None:
            with ThreadPoolExecutor() as pool:  # half a minute each
                for objects in pool.map(self.compile_kernel, INSTRUCTION_SETS):
                    ext.extra_objects += objects
            super().build_extension(ext)

        def compile_kernel(self, name: str) -> list[str]:
            return self.compiler.compile(
                [KERNEL],
                output_dir=str(Path(self.build_temp) / name),
                macros=[("PATS_CHUNK", f"chunk_{name}")],
                extra_postargs=[*SIMD_FLAGS, *INSTRUCTION_SETS[name]],
            )

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                warnings.warn(f"pats_kernels is installed without its C++ extension: {error}", stacklevel=1)

    headers = sorted(map(str, Path("csrc").glob("*.h")))
    extension = CppExtension(
        "pats_kernels._C",
        ["csrc/cpu.cpp"],
        depends=[*headers, KERNEL],
        extra_compile_args=["-O3", "-g0", "-fopenmp"],  # without OpenMP at::parallel_for is a plain loop
        extra_link_args=["-fopenmp"],
    )
    # Without ninja: with it, torch compiles all of an extension's sources with the same flags.
    setup(ext_modules=[extension], cmdclass={"build_ext": BuildKernels.with_options(use_ninja=False)})


if find_spec("torch") is not None:
    setup_with_extension()
else:
    warnings.warn("no torch: install with --no-build-isolation for the C++ extension", stacklevel=1)
    setup()
