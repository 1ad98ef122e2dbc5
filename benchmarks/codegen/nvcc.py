"""Compiles the CUDA kernels (csrc/cuda_kernel.cu) with nvcc and reads their machine code."""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from benchmarks.codegen.machine_code import Report, Sass, cuobjdump, instructions_of
from pats_kernels.backends.cuda import CHUNK

SOURCE = Path(__file__).parents[2] / "csrc" / "cuda_kernel.cu"
PARAMETERS = {"float32": "float", "bfloat16": "Bfloat16", "float16": "Float16", "float64": "double"}
FLAGS = ["-O3", "-std=c++17", "-fmad=false", "--expt-relaxed-constexpr"]  # setup.py's
STRICT = ["-Werror", "all-warnings"]
THREADS = 128
# In the order of csrc/table.h's enums.
FORMS = ("pats", "pats_adamw", "moments_adamw", "adamw")
PHASES = ("one pass", "averages", "noise")
DTYPES = {"float": "float32", "pats::Bfloat16": "bfloat16", "pats::Float16": "float16", "double": "float64"}


class Kernel(NamedTuple):
    """One instantiation. `common`: for the usual settings, with a separate path for full chunks."""

    name: str
    param: str = ""
    state: str = ""
    form: str = ""
    phase: str = ""
    common: bool = False


def compiled(param: str, arch: str, only_full: bool = False) -> dict[Kernel, Sass]:
    """The kernels for one dtype of the parameters; `only_full` compiles only that path of the common ones."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = f"{folder}/kernels.cubin"
        names = [
            f"-DPATS_PARAM={PARAMETERS[param]}",
            "-DPATS_LAUNCH=launch_it",
            f"-DPATS_ONLY_FULL={only_full:d}",
        ]
        command = ["nvcc", *FLAGS, *STRICT, f"-arch={arch}", "-cubin", *names, str(SOURCE), "-o", cubin]
        subprocess.run(command, check=True)
        code, usage = (cuobjdump(option, cubin) for option in ("-sass", "-res-usage"))
    resources = {
        name: (int(registers), int(stack))
        for name, registers, stack in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage)
    }
    functions = (part.split("\n", 1) for part in code.split("Function : ")[1:])
    return {
        kernel_of(name.strip()): Sass(instructions_of(text), *resources[name.strip()])
        for name, text in functions
    }


def ptx(param: str, arch: str) -> dict[Kernel, str]:
    """The same kernels' PTX, before ptxas compiles it."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "kernels.ptx"
        names = [f"-DPATS_PARAM={PARAMETERS[param]}", "-DPATS_LAUNCH=launch_it"]
        command = ["nvcc", *FLAGS, f"-arch={arch}", "-ptx", *names, str(SOURCE), "-o", str(target)]
        subprocess.run(command, check=True)
        parts = re.split(r"\.entry (\w+)\(", target.read_text())
    return {kernel_of(name): text for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def kernel_of(symbol: str) -> Kernel:
    readable = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout
    match = re.search(r"(\w+)<(.*)>\(", readable)
    assert match is not None, readable
    name, arguments = match.group(1), match.group(2).split(", ")
    param, state = (DTYPES.get(argument, "") for argument in (*arguments, "")[:2])
    if name != "update_kernel":
        return Kernel(name, param, state)
    form, phase = (int(argument[-1]) for argument in arguments[2:4])
    return Kernel(name, param, state, FORMS[form], PHASES[phase], arguments[4] == "true")


def reports(arch: str, params: tuple[str, ...] = ("float32", "bfloat16")) -> Iterator[Report]:
    """Reports on the common kernels.

    Instructions per element are an upper bound: what only a block's first thread does (a chunk's constants)
    is counted for all warps of the block.
    """
    jobs = [(param, arch, only_full) for param in params for only_full in (False, True)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda job: compiled(*job), jobs))
    for whole, full in zip(found[::2], found[1::2], strict=True):
        for kernel, sass in whole.items():
            if kernel.common:
                yield report(kernel, sass, full[kernel], arch)


def report(kernel: Kernel, whole: Sass, full: Sass, arch: str) -> Report:
    vector = 8 if "16" in kernel.param + kernel.state else 4
    loop, blocks = full.loop(), CHUNK // (THREADS * vector)
    executed = len(full.instructions) - loop + loop * blocks
    return Report(
        kernel=f"CUDA, {kernel.phase}",
        form=kernel.form,
        param_dtype=kernel.param,
        state_dtype=kernel.state,
        uncertainty="product",
        arch=arch,
        registers=whole.registers,
        stack_bytes=whole.stack_bytes,
        spills=whole.count("LDL", "STL"),
        full_path_spills=full.count("LDL", "STL"),
        load_bits=full.widths("LDG"),
        store_bits=full.widths("STG"),
        instructions_per_element=round(executed * THREADS / CHUNK, 1),
    )
