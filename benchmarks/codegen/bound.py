"""An upper bound on the share of its memory's speed that a GPU can reach, from the kernels' instructions.

    python -m benchmarks.codegen --bound

It reads the machine code of the path for full chunks, counts an instruction inside the loop once for each
block, and assigns the instructions to the pipes of a multiprocessor. Each pipe executes only so many
instructions per clock, and the schedulers issue only so many; the slowest of these gives a least time per
element. The bytes at full memory speed give another one. It assumes the boost clock, no waiting, and the
whole bandwidth of the data sheet. So it is a bound, not a prediction: a kernel that can reach the memory's
speed by this bound may still be slower, but a kernel that cannot is never faster than its bound.

Sources: instructions a clock from the CUDA C++ Programming Guide, "Throughput of Native Arithmetic
Instructions"; multiprocessors, clocks and bandwidths from NVIDIA's data sheets.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.codegen import compiled as codegen
from benchmarks.codegen.machine_code import Sass
from pats_kernels.backends import triton as backend
from pats_kernels.hyperparameters import Form
from pats_kernels.plan import LaunchKey


@dataclass(frozen=True)
class Gpu:
    """`arch`: the architecture to compile for. `fp32`: float32 operations per clock and multiprocessor."""

    name: str
    arch: str
    multiprocessors: int
    gigahertz: float
    terabytes: float  # per second
    fp32: int


GPUS = (
    Gpu("A100 80 GB", "sm_80", 108, 1.41, 2.04, 64),
    Gpu("H100 SXM", "sm_90", 132, 1.98, 3.35, 128),
    Gpu("H200", "sm_90", 132, 1.98, 4.8, 128),
    Gpu("B200", "sm_100", 148, 1.97, 8.0, 128),
    Gpu("L4", "sm_89", 58, 2.04, 0.30, 128),
    Gpu("RTX 4090", "sm_89", 128, 2.52, 1.01, 128),
)
ISSUED = 128  # per clock: four schedulers, each for a warp of 32 threads
RATES = {"ALU": 64, "IMAD": 64, "MUFU": 16, "LSU": 32, "uniform": 64, "other": 32}

# Which pipe executes which instructions, by the first part of their names in SASS.
PIPES = {
    "FMA": "FFMA FMUL FADD FFMA2 FMUL2 FADD2 HFMA2",
    "IMAD": "IMAD",
    "ALU": "LOP3 IADD3 IADD VIADD SHF LEA SEL FSEL FSETP FSET ISETP PLOP3 PRMT FMNMX IMNMX VIMNMX IABS I2FP "
    "MOV P2R R2P VOTE SGXT BMSK F2FP",
    "MUFU": "MUFU I2F F2I F2F I2I POPC FLO FRND",
    "LSU": "LDG STG LDS STS LDL STL LD ST LDC LDSM STSM SHFL REDUX",
    "uniform": "ULDC LDCU USHF ULEA UIMAD UIADD3 UIADD ULOP3 UPLOP3 UMOV UISETP USEL UPRMT USGXT UFLO UIMNMX "
    "UVIADD UVIMNMX UBMSK UPOPC",
    "other": "S2UR S2R R2UR CS2R BAR BRA EXIT CALL RET BSSY BSYNC BREAK BMOV WARPSYNC DEPBAR DADD DMUL DFMA "
    "DSETP",
}
PIPE_OF = {name: pipe for pipe, names in PIPES.items() for name in names.split()}


def executed(sass: Sass, blocks: int, elements: float) -> dict[str, float]:
    """Instructions per element, by pipe. An instruction with two operations (FFMA2) counts twice for its
    pipe, and once in "issued", which counts what the schedulers issue. `elements`: a thread's, in all blocks.

    Raises:
        KeyError: an instruction that is not in `PIPES`.
    """
    start, end = sass.loop_span()
    counts: dict[str, float] = defaultdict(float)
    for address, text in sass.instructions:
        words = text.split()
        name = (words[1] if words[0].startswith("@") else words[0]).split(".")[0]
        times = (blocks if start <= address <= end else 1) / elements
        counts[PIPE_OF[name]] += times * (2 if name in ("FFMA2", "FMUL2", "FADD2") else 1)
        counts["issued"] += times
    return counts


def seconds_of_instructions(gpu: Gpu, counts: dict[str, float]) -> tuple[float, str]:
    """The least time for an element, and the pipe that needs it."""
    # Integer multiplications use one half of the float32 pipes.
    demands = {
        "issue": counts["issued"] / ISSUED,
        "FMA": (counts.get("FMA", 0) + counts.get("IMAD", 0)) / gpu.fp32,
    }
    demands |= {pipe: counts.get(pipe, 0) / rate for pipe, rate in RATES.items()}
    worst = max(demands, key=lambda pipe: demands[pipe])
    return demands[worst] / (gpu.multiprocessors * gpu.gigahertz * 1e9), worst


def ratio(gpu: Gpu, counts: dict[str, float], bytes_moved: int) -> tuple[float, str]:
    """Memory's time divided by the instructions' time, and the slowest pipe. A ratio below 1 is the share of
    memory's speed that the instructions allow."""
    of_instructions, pipe = seconds_of_instructions(gpu, counts)
    return bytes_moved / (gpu.terabytes * 1e12) / of_instructions, pipe


def bytes_of(key: LaunchKey) -> int:
    """Bytes moved per element in one pass."""
    averages, moments = (
        (2 if key.variant.form != "moments_adamw" else 0),
        (2 if key.variant.form != "pats" else 0),
    )
    return 3 * key.param_dtype.itemsize + 2 * (averages + moments) * key.state_dtype.itemsize


KEYS: list[tuple[Form, torch.dtype]] = [
    (form, dtype) for form in codegen.FORMS for dtype in (torch.float32, torch.bfloat16)
]


def counted(key: LaunchKey, arch: str) -> dict[str, float]:
    constants = codegen.constants_of(key, "one pass") | {"grad_scale": None, "found_inf": None}
    sass = codegen.compile_kernel(
        codegen.kernels.pats_kernel,
        constants | {"ONLY_FULL": True},
        arch,
        backend.compiler_options(key, arch=arch),
    )
    chunk, tuning = backend.chunk_of(key), codegen.DEFAULT
    return executed(sass, chunk // tuning.block, chunk / (32 * tuning.num_warps))


def table() -> Table:
    result = Table(title="Memory's time / instructions' time; below 1 the instructions are the limit")
    result.add_column("one pass")
    result.add_column("bytes", justify="right")
    for gpu in GPUS:
        result.add_column(f"{gpu.name}, {gpu.terabytes} TB/s", justify="right")
    for form, dtype in KEYS:
        key = codegen.launch_key(form, dtype, dtype)
        counts = {arch: counted(key, arch) for arch in dict.fromkeys(gpu.arch for gpu in GPUS)}
        found = (ratio(gpu, counts[gpu.arch], bytes_of(key)) for gpu in GPUS)
        cells = [f"{times:.1f}" if times >= 1 else f"{times:.2f} ({pipe})" for times, pipe in found]
        result.add_row(f"{form}, {str(dtype).removeprefix('torch.')}", str(bytes_of(key)), *cells)
    return result


def print_bound() -> None:
    Console(width=150).print(table())
