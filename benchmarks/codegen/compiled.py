"""Compiles the Triton kernels offline, for any architecture on any machine, and describes the results."""

from typing import Any, get_args

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.codegen.amdgcn import Amdgcn
from benchmarks.codegen.machine_code import Report, Sass, disassemble
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
# Dtypes of parameter and state besides float32. Each takes seconds to compile, so AdamW's forms have only the
# most important pair.
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


def target_of(arch: str) -> GPUTarget:
    if arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


def compile_offline(kernel: Any, constants: dict[str, Any], arch: str, options: dict[str, int]) -> Any:
    """Triton's result for one specialization of a kernel. Its `asm` maps each stage to its text or bytes.
    `constants` may set a pointer to None."""
    names = kernel.arg_names
    types = {name: "constexpr" if name in constants else POINTERS.get(name, "i32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name].startswith("*")}
    source = ASTSource(kernel, types, {(names.index(k),): v for k, v in constants.items()}, aligned)
    return triton.compile(source, target=target_of(arch), options=options)


def compile_kernel(kernel: Any, constants: dict[str, Any], arch: str, options: dict[str, int]) -> Sass:
    """The kernel's machine code for one of NVIDIA's architectures."""
    return disassemble(compile_offline(kernel, constants, arch, options).asm["cubin"])


def compile_for_amd(kernel: Any, constants: dict[str, Any], arch: str, options: dict[str, int]) -> Amdgcn:
    asm = compile_offline(kernel, constants, arch, options).asm
    return Amdgcn(asm["amdgcn"], len(asm["hsaco"]))


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
    """What the report covers: every form in float32 with all phases. In one pass also the other dtypes, and
    for PATS alone the other uncertainties."""
    chosen = [
        (launch_key(form, normalization="delayed" if phase == "one pass" else "exact"), phase)
        for form in FORMS
        for phase in PHASES
    ]
    chosen += [(launch_key(uncertainty=uncertainty), "one pass") for uncertainty in ("ucb", "none")]
    dtypes = [(form, *pair) for form in FORMS for pair in OTHER_DTYPES[form]]
    return chosen + [(launch_key(*one), "one pass") for one in dtypes]


def report(key: LaunchKey, phase: str, arch: str, tuning: Tuning = DEFAULT) -> Report:
    """Compiles the main kernel twice: as it runs, and with only the path for full chunks."""
    chunk, constants = backend.chunk_of(key, tuning), constants_of(key, phase, tuning)
    constants |= {"grad_scale": None, "found_inf": None}
    if arch in AMD_ARCHITECTURES:
        constants |= {"APPROX": False}
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
    found = compiled(kernels.statistics_kernel, constants, arch, backend.UNFUSED)
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


def compiled(kernel: Any, constants: dict[str, Any], arch: str, options: dict[str, int]) -> Any:
    """The kernel's machine code for such a GPU, of NVIDIA's or AMD's."""
    compile_ = compile_for_amd if arch in AMD_ARCHITECTURES else compile_kernel
    return compile_(kernel, constants, arch, options)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
