"""Builds the C++ extension where torch and a compiler are at hand; without them the package installs too.

With nvcc and a CUDA build of torch the extension has the CUDA kernels: for TORCH_CUDA_ARCH_LIST, or else for
the GPUs that are there, or else for sm_80, sm_90 and sm_100. Where that fails, it is built without them.

Build with `pip install --no-build-isolation`: the extension belongs to the torch that is installed.
"""

import os
import platform
import re
import shutil
import subprocess
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from setuptools import setup

KERNEL = "csrc/cpu_kernel.cpp"
CUDA_KERNEL, CUDA_OPERATOR = "csrc/cuda_kernel.cu", "csrc/cuda.cpp"
CUDA_PARAMETERS = {"float32": "float", "bfloat16": "Bfloat16", "float16": "Float16", "float64": "double"}
CUDA_FLAGS = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC"]
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


def find_nvcc() -> Path | None:
    """nvcc, if there is one and torch is one that it can build for."""
    import torch

    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    found = next((path for home in homes if (path := shutil.which(f"{home}/bin/nvcc"))), shutil.which("nvcc"))
    return Path(found).resolve() if found and torch.version.cuda is not None else None


def cuda_folders(nvcc: Path, *names: str) -> list[str]:
    """Those of the toolkit's folders that there are. nvcc itself may be a script that calls the real one."""
    command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull]
    plan = subprocess.run(command, capture_output=True, text=True, check=True)
    top = re.search(r"TOP=(\S+)", plan.stdout + plan.stderr)
    root = Path(top.group(1)) if top else nvcc.parent.parent
    return [str(folder) for name in names if (folder := root / name).is_dir()]


def architecture_flags(nvcc: Path) -> list[str]:
    """For which GPUs: machine code for each in the list, PTX for those that come with "+PTX"."""
    import torch

    wanted = re.split("[ ;]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    if wanted == [""] and torch.cuda.is_available():
        devices = range(torch.cuda.device_count())
        wanted = sorted({"{}.{}".format(*torch.cuda.get_device_capability(device)) for device in devices})
    elif wanted == [""]:
        known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
        wanted = [
            arch for arch in ("8.0", "9.0", "10.0") if f"compute_{arch.replace('.', '')}" in known.split()
        ]
        wanted[-1] += "+PTX"
    flags = []
    for arch in wanted:
        number = arch.removesuffix("+PTX").replace(".", "")
        codes = [f"sm_{number}"] + [f"compute_{number}"] * arch.endswith("+PTX")
        flags += [f"-gencode=arch=compute_{number},code={code}" for code in codes]
    return flags


def setup_with_extension() -> None:
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class BuildKernels(BuildExtension):
        """Compiles the kernels, once for each instruction set or dtype. A failure leaves a package without
        extension, one of CUDA alone an extension without CUDA."""

        def build_extension(self, ext: Any) -> None:
            nvcc = find_nvcc()
            with ThreadPoolExecutor() as pool:  # half a minute each
                kernels = [pool.submit(self.compile_kernel, name) for name in INSTRUCTION_SETS]
                cuda = (
                    [pool.submit(self.compile_cuda, nvcc, dtype) for dtype in CUDA_PARAMETERS] if nvcc else []
                )
                for kernel in kernels:
                    ext.extra_objects += kernel.result()
            if nvcc:
                without = list(ext.extra_objects), list(ext.extra_link_args)
                try:
                    ext.extra_objects += [kernel.result() for kernel in cuda]
                    ext.extra_objects += self.compile_operator(nvcc, ext)
                    # The static runtime, as nvcc itself links it: it need not be the one that torch has.
                    ext.extra_link_args += [
                        f"-L{directory}" for directory in cuda_folders(nvcc, "lib64", "lib")
                    ]
                    ext.extra_link_args += ["-lcudart_static", "-lrt", "-ldl", "-lc10_cuda"]
                    return super().build_extension(ext)
                except Exception as error:
                    warnings.warn(f"pats_kernels is built without CUDA: {error}", stacklevel=1)
                    ext.extra_objects, ext.extra_link_args = without
            super().build_extension(ext)

        def compile_cuda(self, nvcc: Path, dtype: str) -> str:
            target = Path(self.build_temp) / f"cuda_{dtype}.o"
            target.parent.mkdir(parents=True, exist_ok=True)
            names = [f"-DPATS_PARAM={CUDA_PARAMETERS[dtype]}", f"-DPATS_LAUNCH=launch_{dtype}"]
            flags = [*CUDA_FLAGS, *architecture_flags(nvcc), *names]
            subprocess.run([nvcc, *flags, "-c", CUDA_KERNEL, "-o", target], check=True)
            return str(target)

        def compile_operator(self, nvcc: Path, ext: Any) -> list[str]:
            return self.compiler.compile(
                [CUDA_OPERATOR],
                output_dir=self.build_temp,
                include_dirs=[*ext.include_dirs, *cuda_folders(nvcc, "include")],
                extra_postargs=ext.extra_compile_args,
            )

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
        depends=[*headers, KERNEL, CUDA_KERNEL, CUDA_OPERATOR],
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
