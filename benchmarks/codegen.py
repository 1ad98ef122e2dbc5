"""What the compiler makes of the Triton kernels, on a machine with or without a GPU.

    python -m benchmarks.codegen --bound
    python -m benchmarks.codegen [--arch sm_80|sm_90|sm_100|gfx942|gfx1100] [--cuda] [--json FILE]

Every form of the step is compiled offline for the architecture and its machine code is read: registers,
stack, spills, the widths of loads and stores, instructions an element. An instruction inside the loop over a
chunk's blocks counts once for each block, the others once for each chunk, so that the figure is what a
thread really executes on full, aligned chunks, table look-ups and the reduction of the statistics included.
With --cuda, where nvcc is, the same of the CUDA kernels (`benchmarks.nvcc`).

For AMD's architectures (gfx...) it is Triton's AMD backend that compiles, and its assembly that is read
(`benchmarks.amdgcn`): vector and scalar registers, scratch memory, spilled registers. Instructions are not
counted there: the library's sine and cosine have branches that no angle here takes.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.amdgcn import Amdgcn
from pats_kernels.backends import triton as backend
from pats_kernels.backends import triton_kernel as kernels
from pats_kernels.backends.triton import Tuning
from pats_kernels.hyperparameters import Form, Normalization, Uncertainty, Variant
from pats_kernels.plan import LaunchKey

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
AMD_ARCHITECTURES = ("gfx942", "gfx1100")  # MI300, RX 7900
PHASES = {"one pass": kernels.ONE_PASS, "averages": kernels.AVERAGES, "noise": kernels.NOISE}
FORMS = get_args(Form)
DEFAULT = Tuning()
# Of parameter and state, beside float32. Each takes seconds, so AdamW's forms have the one that matters most.
OTHER_DTYPES = {
    "pats": (
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ),
    "pats_adamw": ((torch.bfloat16, torch.bfloat16),),
    "moments_adamw": ((torch.bfloat16, torch.bfloat16),),
}
POINTERS = {
    "table": "*i64",
    "layout": "*i64",
    "chunks": "*i32",
    "partials": "*fp64",
    "starts": "*i64",
    "grad_scale": "*fp32",
    "found_inf": "*fp32",
}


@dataclass(frozen=True)
class Report:
    """One kernel's machine code. Registers, stack and spills are those of the kernel as it runs; widths, in
    bits with their counts, and instructions an element are those of its path for full, aligned chunks, whose
    own spills are beside them. For AMD's architectures: vector registers, scratch memory, and how many
    registers, scalar ones too, are spilled."""

    kernel: str
    form: str
    param_dtype: str
    state_dtype: str
    uncertainty: str
    arch: str
    registers: int
    stack_bytes: int
    spills: int
    full_path_spills: int
    load_bits: dict[int, int]
    store_bits: dict[int, int]
    instructions_per_element: float | None
    scalar_registers: int | None = None


@dataclass(frozen=True)
class Sass:
    """A kernel's instructions as (address, text), and its registers and stack."""

    instructions: list[tuple[int, str]]
    registers: int
    stack_bytes: int

    def count(self, *operations: str) -> int:
        return sum(
            bool(re.search(rf"(^|\s)({'|'.join(operations)})\b", text)) for _, text in self.instructions
        )

    def widths(self, operation: str) -> dict[int, int]:
        """How many global accesses there are of each width, in bits."""
        found = (re.search(rf"\b{operation}\.E\S*", text) for _, text in self.instructions)
        names = [match.group() for match in found if match]
        widths = (
            re.search(r"\.(U?8|U?16|64|128|256)\b", name.removeprefix(f"{operation}.E")) for name in names
        )
        counts = Counter(int(width.group(1).lstrip("U")) if width else 32 for width in widths)
        return dict(sorted(counts.items()))

    @property
    def loads(self) -> dict[int, int]:
        return self.widths("LDG")

    @property
    def stores(self) -> dict[int, int]:
        return self.widths("STG")

    @property
    def spills(self) -> int:
        """Accesses of the stack."""
        return self.count("LDL", "STL")

    def loop(self) -> int:
        """How many instructions the longest loop has: from a backward branch's target to the branch."""
        start, end = self.loop_span()
        return sum(start <= address <= end for address, _ in self.instructions)

    def loop_span(self) -> tuple[int, int]:
        """The addresses of its first and last instruction; where there is no loop, none lies between them."""
        longest = (1, 0)
        for address, text in self.instructions:
            branch = re.search(r"\bBRA\b.*0x([0-9a-f]+)\s*$", text)
            if branch and int(branch.group(1), 16) < address:
                longest = max(
                    longest, (int(branch.group(1), 16), address), key=lambda span: span[1] - span[0]
                )
        return longest


def target_of(arch: str) -> GPUTarget:
    if arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


def compile_offline(kernel: Any, constants: dict[str, Any], arch: str, options: dict[str, int]) -> Any:
    """Triton's own result for one specialization of a kernel, its `asm` a dict from stage to text or bytes.
    `constants` may set a pointer to None."""
    names = kernel.arg_names
    types = {name: "constexpr" if name in constants else POINTERS.get(name, "i32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name].startswith("*")}
    source = ASTSource(kernel, types, {(names.index(k),): v for k, v in constants.items()}, aligned)
    return triton.compile(source, target=target_of(arch), options=options)


def compile_kernel(kernel: Any, constants: dict[str, Any], arch: str, options: dict[str, int]) -> Sass:
    """The same as machine code, for one of NVIDIA's architectures."""
    return disassemble(compile_offline(kernel, constants, arch, options).asm["cubin"])


def compile_for_amd(kernel: Any, constants: dict[str, Any], arch: str, options: dict[str, int]) -> Amdgcn:
    asm = compile_offline(kernel, constants, arch, options).asm
    return Amdgcn(asm["amdgcn"], len(asm["hsaco"]))


def disassemble(cubin: bytes) -> Sass:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        code, usage = (cuobjdump(option, file.name) for option in ("-sass", "-res-usage"))
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()  # type: ignore[union-attr]
    return Sass(instructions_of(code), int(registers), int(stack))


def instructions_of(code: str) -> list[tuple[int, str]]:
    """Out of what cuobjdump prints, without those that only fill up."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(\S.*?);", code)
    return [(int(address, 16), text.strip()) for address, text in found if not text.startswith("NOP")]


def cuobjdump(option: str, path: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    result = subprocess.run([str(tool), option, path], capture_output=True, text=True, check=True)
    return result.stdout + result.stderr


def launch_key(
    form: Form = "pats",
    param: torch.dtype = torch.float32,
    state: torch.dtype = torch.float32,
    uncertainty: Uncertainty = "product",
    normalization: Normalization = "delayed",
) -> LaunchKey:
    variant = Variant(form, uncertainty, normalization, stochastic_rounding=True)
    return LaunchKey(torch.device("cuda"), param, state, variant)


def combinations() -> list[tuple[LaunchKey, str]]:
    """What is reported: every form in float32 with all phases, and in one pass the other dtypes and the
    uncertainties of PATS alone."""
    chosen = [
        (launch_key(form, normalization="delayed" if phase == "one pass" else "exact"), phase)
        for form in FORMS
        for phase in PHASES
    ]
    chosen += [(launch_key(uncertainty=uncertainty), "one pass") for uncertainty in ("ucb", "none")]
    dtypes = [(form, *pair) for form in FORMS for pair in OTHER_DTYPES[form]]
    return chosen + [(launch_key(*one), "one pass") for one in dtypes]


def report(key: LaunchKey, phase: str, arch: str, tuning: Tuning = DEFAULT) -> Report:
    """Compiles the main kernel twice: as it runs, and with the path for full chunks alone."""
    chunk, constants = backend.chunk_of(key, tuning), constants_of(key, phase, tuning)
    constants |= {"grad_scale": None, "found_inf": None}
    if arch in AMD_ARCHITECTURES:
        constants |= {"APPROX": False}
        compiled = compile_for_amd
    else:
        compiled = compile_kernel
    options = backend.compiler_options(key, tuning, arch)
    whole, full = (
        compiled(kernels.pats_kernel, constants | {"ONLY_FULL": only}, arch, options)
        for only in (False, True)
    )
    instructions = None
    if isinstance(full, Sass) and not tuning.persistent:  # else the longest loop is the one over chunks
        loop, blocks = full.loop(), chunk // tuning.block
        executed = len(full.instructions) - loop + loop * blocks
        instructions = round(executed * 32 * tuning.num_warps / chunk, 1)
    return Report(
        kernel=f"pats_kernel, {phase}",
        form=key.variant.form,
        param_dtype=_name(key.param_dtype),
        state_dtype=_name(key.state_dtype),
        uncertainty=key.variant.uncertainty,
        arch=arch,
        registers=whole.registers,
        stack_bytes=whole.stack_bytes,
        spills=whole.spills,
        full_path_spills=full.spills,
        load_bits=full.loads,
        store_bits=full.stores,
        instructions_per_element=instructions,
        scalar_registers=getattr(whole, "scalar_registers", None),
    )


def constants_of(key: LaunchKey, phase: str, tuning: Tuning = DEFAULT) -> dict[str, Any]:
    """The main kernel's compile-time arguments in this phase, as the backend sets them on a new GPU."""
    backwards = tuning.reversed and phase == "noise"
    ranges = tuning.persistent or backwards or (tuning.group_bytes and phase != "one pass")
    absent = {} if ranges else {"first": None, "last": None, "num_chunks": None}
    approximate = key.param_dtype != torch.float64
    phases = {"PHASE": PHASES[phase], "REVERSED": backwards, "APPROX": approximate}
    return backend.specialization(key, tuning) | phases | absent


def statistics_report(arch: str) -> Report:
    constants = {"found_inf": None, "first": None, "BLOCK": backend.STATISTICS_BLOCK}
    found: Any = None
    if arch in AMD_ARCHITECTURES:
        found = compile_for_amd(kernels.statistics_kernel, constants, arch, backend.UNFUSED)
    else:
        found = compile_kernel(kernels.statistics_kernel, constants, arch, backend.UNFUSED)
    return Report(
        kernel="statistics_kernel",
        form="any",
        param_dtype="any",
        state_dtype="any",
        uncertainty="any",
        arch=arch,
        registers=found.registers,
        stack_bytes=found.stack_bytes,
        spills=found.spills,
        full_path_spills=found.spills,
        load_bits=found.loads,
        store_bits=found.stores,
        instructions_per_element=None,  # it reads partial sums, not elements
        scalar_registers=getattr(found, "scalar_registers", None),
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def print_table(reports: list[Report]) -> None:
    table = Table(title=f"Triton {triton.__version__}, {reports[0].arch}")
    for column in ("kernel", "form", "param", "state", "uncertainty"):
        table.add_column(column)
    for column in ("registers", "stack", "spills", "loads", "stores", "SASS / element"):
        table.add_column(column, justify="right")
    for r in reports:
        accesses = (
            " ".join(f"{count}x{bits}" for bits, count in widths.items())
            for widths in (r.load_bits, r.store_bits)
        )
        instructions = "" if r.instructions_per_element is None else f"{r.instructions_per_element:.1f}"
        registers = f"{r.registers}" + ("" if r.scalar_registers is None else f" + {r.scalar_registers}")
        numbers = (registers, str(r.stack_bytes), str(r.spills), *accesses, instructions)
        table.add_row(r.kernel, r.form, r.param_dtype, r.state_dtype, r.uncertainty, *numbers)
    Console(width=170).print(table)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.codegen", description="What the compiler makes of the kernels."
    )
    parser.add_argument("--arch", choices=ARCHITECTURES + AMD_ARCHITECTURES, default="sm_90")
    parser.add_argument("--cuda", action="store_true", help="the CUDA kernels too, by nvcc")
    parser.add_argument("--bound", action="store_true", help="what instructions leave of GPUs' memory speed")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    if options.cuda and options.arch in AMD_ARCHITECTURES:
        parser.error(f"nvcc does not compile for {options.arch}")
    if options.bound:
        from benchmarks.bound import print_bound

        return print_bound()
    reports = [report(key, phase, options.arch) for key, phase in combinations()]
    reports.append(statistics_report(options.arch))
    if options.cuda:
        from benchmarks import nvcc

        reports += nvcc.reports(options.arch)
    print_table(reports)
    if options.json:
        versions = {"triton": triton.__version__, "torch": torch.__version__}
        content = {"arch": options.arch, **versions, "kernels": [asdict(r) for r in reports]}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
