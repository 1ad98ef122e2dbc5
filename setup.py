"""Builds the C++ extension, and the CUDA kernels where there is an nvcc for the torch that is there.

The extension keeps to torch's stable ABI and Python's limited API: one binary serves every torch from 2.10 on
and every Python from 3.10 on. Compiling takes torch's headers, not torch itself; they are looked for in the
build environment, and then where Python installs packages: pip's build isolation hides those from imports.

What could not be built is written into the package, with the reason: `pats_kernels/_build.py`. Environment
variables:

    PATS_KERNELS_REQUIRE_EXTENSION=1    fail rather than install without the extension
    PATS_KERNELS_CUDA=0                 leave the CUDA kernels out
    PATS_KERNELS_CUDA_FLOAT64=0         leave those for float64 out, nearly half of the library
    TORCH_CUDA_ARCH_LIST                for which GPUs: "9.0", "8.0;9.0+PTX", "Hopper", "All"
    MAX_JOBS                            compilers at a time
    CUDA_HOME, CXX, CXXFLAGS            as ever
"""

import os
import platform
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import LinkError

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # before setuptools 70.1
    from wheel.bdist_wheel import bdist_wheel  # type: ignore

LEAST_TORCH = (2, 10)
TARGET = f"-DTORCH_TARGET_VERSION=0x{LEAST_TORCH[0]:02x}{LEAST_TORCH[1]:02x}000000000000"
FLAGS = ["-O3", "-g0", "-std=c++17", "-Wall", "-Wextra", "-fvisibility=hidden", TARGET]

KERNEL, OPERATOR = "csrc/cpu_kernel.cpp", "csrc/cpu.cpp"
# What lets the compiler vectorize the kernel. It asks bits, not comparisons, what is NaN or infinite
# (csrc/arithmetic.h), so that minima and maxima can be one instruction each. And what it must leave alone:
# where a multiply-add is fused the source says (multiply_add), for the same bits with each instruction set.
SIMD_FLAGS = [
    "-ffp-contract=off",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffinite-math-only",
    "-fno-signed-zeros",
]
INSTRUCTION_SETS: dict[str, list[str]] = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS |= {
        # Scheduled before registers are allocated; and with AVX-512 selects instead of threaded jumps, of
        # which both sides would be computed: docs/performance.md.
        "avx2": ["-mavx2", "-mfma", "-fschedule-insns", "-fsched-pressure"],
        "avx512": [
            *(f"-mavx512{part}" for part in ("f", "dq", "bw", "vl")),
            "-mfma",
            "-mprefer-vector-width=512",
            "-fno-thread-jumps",
        ],
    }

CUDA_KERNEL, CUDA_OPERATOR = "csrc/cuda_kernel.cu", "csrc/cuda.cpp"
CUDA_FLAGS = ["-O3", "-std=c++17", "-fmad=false", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC"]
CUDA_PARAMETERS = {"float32": "float", "bfloat16": "Bfloat16", "float16": "Float16", "float64": "double"}
CUDA_NAMES = {"Ampere": "8.0;8.6", "Ada": "8.9", "Hopper": "9.0", "Blackwell": "10.0;12.0"}
CUDA_DEFAULT = ("8.0", "9.0", "10.0")


class Missing(Exception):
    """Why something is not built, in a sentence."""


def setting(name: str, default: str = "") -> str:
    return os.environ.get(name, "").strip() or default


class Torch(NamedTuple):
    """The torch whose headers are compiled against; it is not imported."""

    folder: Path
    version: str
    cuda: str | None  # None: a build for the CPU

    @classmethod
    def found(cls) -> "Torch":
        spec = find_spec("torch")
        folders = [Path(spec.origin).parent] if spec and spec.origin else []
        folders += [Path(folder) / "torch" for folder in installed_packages()]
        for folder in folders:
            if (folder / "version.py").is_file():
                names: dict[str, Any] = {}
                exec((folder / "version.py").read_text(), names)
                torch = cls(folder, str(names["__version__"]), names.get("cuda"))
                break
        else:
            raise Missing(
                "there was no torch where it was built: install torch first, and where another tool than pip "
                "isolates the build, tell it not to (--no-build-isolation)"
            )
        release = tuple(map(int, re.findall(r"\d+", torch.version)[:2]))
        if release < LEAST_TORCH:
            least = ".".join(map(str, LEAST_TORCH))
            raise Missing(f"torch {torch.version} is older than {least}: install that or a newer one")
        return torch


class Nvcc(NamedTuple):
    """A CUDA compiler that goes with a torch."""

    path: Path
    root: Path  # its toolkit's

    @classmethod
    def found(cls, torch: Torch) -> "Nvcc":
        if torch.cuda is None:
            raise Missing(
                f"torch was {torch.version} where it was built, which is without CUDA: install one with it"
            )
        homes = [home for name in ("CUDA_HOME", "CUDA_PATH") if (home := setting(name))]
        paths = [path for home in homes if (path := shutil.which(f"{home}/bin/nvcc"))]
        path = next(iter(paths), shutil.which("nvcc"))
        if path is None:
            major = torch.cuda.partition(".")[0]
            raise Missing(f"there was no nvcc: install CUDA {major}'s toolkit, or set CUDA_HOME to it")
        # nvcc may be a script that calls the real one.
        command = [path, "--dryrun", "-x", "cu", "-c", os.devnull]
        plan = subprocess.run(command, capture_output=True, text=True, check=False)
        top = re.search(r"TOP=(\S+)", plan.stdout + plan.stderr)
        nvcc = cls(Path(path).resolve(), Path(top.group(1)) if top else Path(path).resolve().parent.parent)
        version = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
        found = re.search(r"release (\d+)\.(\d+)", version)
        if found is None or found.group(1) != torch.cuda.partition(".")[0]:
            # The static runtime needs a driver of its own version, and torch's users have torch's.
            shown = ".".join(found.groups()) if found else "an unknown version"
            raise Missing(
                f"{path} is of CUDA {shown}, torch {torch.version} of {torch.cuda}: "
                "set CUDA_HOME to a toolkit of the same major version"
            )
        return nvcc

    def folders(self, *names: str) -> list[str]:
        return [str(folder) for name in names if (folder := self.root / name).is_dir()]

    def architectures(self) -> list[str]:
        """Flags: machine code for each in the list, PTX for those that come with "+PTX"."""
        command = [self.path, "--list-gpu-arch"]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        known = [f"{n[:-1]}.{n[-1]}" for n in re.findall(r"compute_(\d+)\b", output) if int(n) >= 80]
        wanted = [part for part in re.split("[ ;,]+", setting("TORCH_CUDA_ARCH_LIST")) if part]
        wanted = wanted or present_gpus()
        if not wanted:
            wanted = [arch for arch in CUDA_DEFAULT if arch in known]
            wanted[-1] += "+PTX"
        flags = []
        for entry in wanted:
            name, ptx = entry.removesuffix("+PTX"), entry.endswith("+PTX")
            listed = known if name == "All" else CUDA_NAMES.get(name, name).split(";")
            if unknown := [arch for arch in listed if not re.fullmatch(r"\d+\.\d[af]?", arch)]:
                raise Missing(
                    f"TORCH_CUDA_ARCH_LIST has {unknown[0]!r}; known names: All, {', '.join(CUDA_NAMES)}"
                )
            for arch in listed:
                number = arch.replace(".", "")
                codes = [f"sm_{number}"] + [f"compute_{number}"] * (ptx and arch == listed[-1])
                flags += [f"-gencode=arch=compute_{number},code={code}" for code in codes]
        return flags


def installed_packages() -> list[str]:
    """Where Python looks for packages, also where pip's build isolation keeps it from looking."""
    folders = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), *site.getsitepackages()]
    if sys.base_prefix in site.PREFIXES:  # no virtual environment, or one that sees the system's
        folders.append(site.getusersitepackages())
    return folders


def present_gpus() -> list[str]:
    """The architectures of this machine's GPUs, as the driver tells them."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    return sorted({line.strip() for line in said.splitlines() if re.fullmatch(r"\d+\.\d", line.strip())})


class BuildKernels(build_ext):
    """Compiles the kernels, once for each instruction set or dtype. Writes down what it could not build."""

    def run(self) -> None:
        self.reasons: dict[str, str | None] = {"EXTENSION": None, "CUDA": None}
        self.force = True  # the objects are new: other flags, another torch
        wanted = list(self.extensions)
        super().run()
        # Libraries of an earlier build: a wheel takes all that lies in the build folder, and Python what
        # lies in the tree.
        for ext in wanted:
            if ext not in self.extensions:
                Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
                (Path(self.build_lib) / self.get_ext_filename(ext.name)).unlink(missing_ok=True)
        self.write_down()

    def build_extensions(self) -> None:
        cpu, cuda = self.extensions
        try:
            torch = Torch.found()
            with ThreadPoolExecutor(int(setting("MAX_JOBS", str(os.cpu_count() or 1)))) as pool:
                self.compile_all(torch, pool)
            self.link(cpu)
        except Missing as reason:
            self.extensions = []
            self.reasons["EXTENSION"] = self.reasons["CUDA"] = str(reason)
            if setting("PATS_KERNELS_REQUIRE_EXTENSION") == "1":
                raise SystemExit(f"pats_kernels: the C++ extension cannot be built: {reason}") from None
            print(f"pats_kernels: WITHOUT its C++ extension: {reason}", file=sys.stderr, flush=True)
            return
        try:
            if self.reasons["CUDA"] is None:
                self.link(cuda)
        except Missing as reason:
            self.reasons["CUDA"] = str(reason)
        if self.reasons["CUDA"] is not None:
            self.extensions = [cpu]

    def link(self, ext: Extension) -> None:
        try:
            self.build_extension(ext)
        except LinkError as error:
            raise Missing(f"it could not be linked ({error}): see what the build printed") from None

    def compile_all(self, torch: Torch, pool: ThreadPoolExecutor) -> None:
        """Gives each extension its objects."""
        cpu, cuda = self.extensions
        python = [sysconfig.get_path(name) for name in ("include", "platinclude")]
        for ext in self.extensions:
            ext.include_dirs = [str(torch.folder / "include"), *python]
            ext.library_dirs = [str(torch.folder / "lib")]
        work = [
            pool.submit(self.compile, KERNEL, name, [*SIMD_FLAGS, *flags])
            for name, flags in INSTRUCTION_SETS.items()
        ]
        work.append(pool.submit(self.compile, OPERATOR, "operator", [], cpu.include_dirs))
        try:
            self.compile_cuda(torch, cuda, pool)
        except Missing as reason:
            self.reasons["CUDA"] = str(reason)
        cpu.extra_objects = [job.result() for job in work]
        cpu.libraries = ["torch_cpu"]

    def compile_cuda(self, torch: Torch, ext: Extension, pool: ThreadPoolExecutor) -> None:
        if setting("PATS_KERNELS_CUDA", "1") == "0":
            raise Missing("it was left out by PATS_KERNELS_CUDA=0: leave that unset")
        nvcc = Nvcc.found(torch)
        parameters, flags = dict(CUDA_PARAMETERS), ["-DUSE_CUDA"]
        if setting("PATS_KERNELS_CUDA_FLOAT64", "1") == "0":
            del parameters["float64"]
            flags.append("-DPATS_NO_FLOAT64")
        architectures = nvcc.architectures()
        work = [pool.submit(self.compile_for_gpus, nvcc, dtype, architectures) for dtype in parameters]
        includes = [*ext.include_dirs, *nvcc.folders("include")]
        work.append(pool.submit(self.compile, CUDA_OPERATOR, "operator", flags, includes))
        ext.extra_objects = [job.result() for job in work]
        ext.library_dirs += nvcc.folders("lib64", "lib")
        # The static runtime, as nvcc itself links it: it need not be the one that torch has.
        ext.libraries = ["cudart_static", "rt", "dl", "torch_cpu", "torch_cuda"]

    def compile(self, source: str, name: str, flags: list[str], includes: list[str] | None = None) -> str:
        """One object file: `name` sets those apart that come of one source."""
        target = Path(self.build_temp) / f"{Path(source).stem}_{name}.o"
        target.parent.mkdir(parents=True, exist_ok=True)
        compiler = self.compiler.compiler_so_cxx  # type: ignore[attr-defined]
        # Without Python's own flags, which are for C.
        command = [compiler[0], "-fPIC", *FLAGS, *flags, f"-DPATS_CHUNK=chunk_{name}"]
        command += setting("CXXFLAGS").split()
        command += [part for directory in includes or [] for part in ("-isystem", directory)]
        call([*command, "-c", source, "-o", str(target)])
        return str(target)

    def compile_for_gpus(self, nvcc: Nvcc, dtype: str, architectures: list[str]) -> str:
        target = Path(self.build_temp) / f"cuda_{dtype}.o"
        target.parent.mkdir(parents=True, exist_ok=True)
        names = [f"-DPATS_PARAM={CUDA_PARAMETERS[dtype]}", f"-DPATS_LAUNCH=launch_{dtype}"]
        call([str(nvcc.path), *CUDA_FLAGS, *architectures, *names, "-c", CUDA_KERNEL, "-o", str(target)])
        return str(target)

    def write_down(self) -> None:
        folder = Path(self.get_ext_fullpath("pats_kernels._build")).parent  # the package's, built or in place
        folder.mkdir(parents=True, exist_ok=True)
        lines = [f"{name}: str | None = {reason!r}\n" for name, reason in self.reasons.items()]
        text = '"""Written by setup.py: why the extension and its CUDA kernels are not there, or None."""\n\n'
        (folder / "_build.py").write_text(text + "".join(lines))

    def get_outputs(self) -> list[str]:
        written = str(Path(self.get_ext_fullpath("pats_kernels._build")).parent / "_build.py")
        return [*super().get_outputs(), *([] if self.inplace else [written])]


def call(command: list[str]) -> None:
    """Runs a compiler. Raises Missing with its last words."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise Missing(
            f"the compiler {command[0]!r} cannot be run ({error.strerror}): install one with C++17"
        ) from None
    sys.stderr.write(done.stderr)
    if done.returncode:
        words = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        said = words[0].strip() if words else f"exit status {done.returncode}, and not a word"
        source = command[command.index("-c") + 1]
        raise Missing(f"the compiler {command[0]!r} could not compile {source}: {said}")


class Wheel(bdist_wheel):  # type: ignore[reportGeneralTypeIssues]
    """One wheel for all Pythons from 3.10 on, with the extension and without."""

    def finalize_options(self) -> None:
        self.py_limited_api = "cp310"
        super().finalize_options()

    def get_tag(self) -> tuple[str, str, str]:
        if not self.get_finalized_command("build_ext").extensions:
            return "py3", "none", "any"  # nothing in it is this machine's
        return super().get_tag()


headers = sorted(map(str, Path("csrc").glob("*.h")))
setup(
    ext_modules=[
        Extension(
            "pats_kernels._C", [], depends=[*headers, KERNEL, OPERATOR], language="c++", py_limited_api=True
        ),
        Extension(
            "pats_kernels._CUDA",
            [],
            depends=[*headers, CUDA_KERNEL, CUDA_OPERATOR],
            language="c++",
            py_limited_api=True,
        ),
    ],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
)
