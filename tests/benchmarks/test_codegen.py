"""What the compiler makes of the kernels: limits that hold without a GPU.

The H200 executes about 200 instructions an element in the time in which memory moves 28 bytes; the limits
here are what the kernels reached, with a margin of a few instructions for other compiler versions.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from expressions import expressions, unfused

from benchmarks.codegen import __main__ as command
from benchmarks.codegen import compiled as codegen
from benchmarks.codegen.amdgcn import Amdgcn
from pats_kernels.backends import triton as backend
from pats_kernels.backends import triton_kernel as kernels
from pats_kernels.backends.triton import Tuning
from pats_kernels.hyperparameters import Form, Uncertainty

# Accesses of the stack that ptxas leaves where registers are limited: in all paths, of which that of strided
# tensors hardly ever runs, and in that of full, aligned chunks. L1 holds them; they count as instructions.
TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
SPILLS = {("sm_100", "moments_adamw", "one pass"): (8, 0)}
NARROW_SPILLS = {("sm_100", "pats_adamw"): 2}  # of bfloat16 throughout, all of them outside the full path
MORE_INSTRUCTIONS: dict[str, int] = {}
if TRITON < (3, 7):
    SPILLS |= {("sm_80", "pats_adamw", "one pass"): (136, 0), ("sm_80", "pats_adamw", "noise"): (2, 0)}
    NARROW_SPILLS |= {("sm_80", "pats"): 8, ("sm_80", "pats_adamw"): 26, ("sm_80", "moments_adamw"): 26}
    NARROW_SPILLS |= {("sm_90", "pats_adamw"): 18}
    MORE_INSTRUCTIONS = {"one pass": 1, "averages": 1, "noise": 4}  # an element
if TRITON >= (3, 8):
    SPILLS |= {("sm_100", "pats_adamw", "one pass"): (13, 5)}


def keeps_all_in_registers(stack_bytes: int, spills: int) -> bool:
    """For sm_90 Triton 3.8's ptxas moves the stack pointer by 8 bytes, which no instruction then accesses."""
    return spills == 0 and stack_bytes <= (8 if TRITON >= (3, 8) else 0)


def assert_spills(found: codegen.Report, most: int, most_in_full_path: int = 0) -> None:
    assert found.full_path_spills <= most_in_full_path
    assert found.spills <= most
    assert most or keeps_all_in_registers(found.stack_bytes, found.spills)


def report(arch: str, phase: str = "one pass", **key: Any) -> codegen.Report:
    return codegen.report(codegen.launch_key(**key), phase, arch)


@pytest.mark.parametrize("arch", codegen.ARCHITECTURES)
@pytest.mark.parametrize(
    ("form", "phase", "most_instructions", "loads", "stores"),
    [  # a thread's two vectors of 4 elements
        ("pats", "one pass", 47, 8, 6),  # w, g, S, U in; w, S, U out
        ("pats", "averages", 22, 8, 4),
        ("pats", "noise", 32, 6, 2),
        ("pats_adamw", "one pass", 65, 12, 10),  # m and v beside them
        ("pats_adamw", "noise", 49, 12, 6),
        ("moments_adamw", "one pass", 67, 8, 6),  # w, g, m, v in; w, m, v out
        ("moments_adamw", "averages", 33, 8, 0),
        ("moments_adamw", "noise", 58, 8, 6),
    ],
)
def test_float32(
    arch: str, form: Form, phase: str, most_instructions: float, loads: int, stores: int
) -> None:
    found = report(arch, phase, form=form)
    assert_spills(found, *SPILLS.get((arch, form, phase), (0, 0)))
    assert found.load_bits[128] == loads
    assert found.store_bits.get(128, 0) == stores
    assert found.instructions_per_element is not None
    assert found.instructions_per_element <= most_instructions + MORE_INSTRUCTIONS.get(phase, 0)


@pytest.mark.parametrize("arch", codegen.ARCHITECTURES)
@pytest.mark.parametrize(
    ("param", "state", "most_instructions"),
    [
        (torch.bfloat16, torch.bfloat16, 63),
        (torch.bfloat16, torch.float32, 60),
        (torch.float16, torch.float32, 54),
    ],
)
def test_low_precision(arch: str, param: torch.dtype, state: torch.dtype, most_instructions: float) -> None:
    """The thread's 8 elements are one vector of each 16-bit operand, two of each 32-bit one."""
    found = report(arch, param=param, state=state)
    state_vectors = 1 if state == torch.bfloat16 else 2
    assert_spills(found, NARROW_SPILLS.get((arch, "pats"), 0) if state == torch.bfloat16 else 0)
    assert found.load_bits[128] == 2 + 2 * state_vectors
    assert found.store_bits[128] == 1 + 2 * state_vectors
    assert found.instructions_per_element is not None
    assert found.instructions_per_element <= most_instructions


@pytest.mark.parametrize("arch", codegen.ARCHITECTURES)
@pytest.mark.parametrize(
    ("form", "most_instructions", "loads", "stores"),
    [("pats_adamw", 88, 6, 5), ("moments_adamw", 83, 4, 3)],
)
def test_bfloat16_with_adamw(
    arch: str, form: Form, most_instructions: float, loads: int, stores: int
) -> None:
    """The thread's 8 elements are one vector of each operand, and none is accessed otherwise."""
    found = report(arch, form=form, param=torch.bfloat16, state=torch.bfloat16)
    assert_spills(found, NARROW_SPILLS.get((arch, form), 0))
    assert found.load_bits[128] == loads
    assert found.store_bits[128] == stores
    assert 16 not in found.load_bits | found.store_bits
    assert found.instructions_per_element is not None
    assert found.instructions_per_element <= most_instructions


@pytest.mark.parametrize("uncertainty", ["ucb", "none"])
def test_other_uncertainties_cost_no_more(uncertainty: Uncertainty) -> None:
    product, other = report("sm_90"), report("sm_90", uncertainty=uncertainty)
    assert keeps_all_in_registers(other.stack_bytes, other.spills)
    assert other.instructions_per_element is not None
    assert product.instructions_per_element is not None
    assert other.instructions_per_element <= product.instructions_per_element


@pytest.mark.parametrize("arch", codegen.ARCHITECTURES)
def test_with_a_grad_scaler(arch: str) -> None:
    """Its two pointers, which are None otherwise, cost neither stack nor spills."""
    key = codegen.launch_key()
    constants = codegen.constants_of(key, "one pass")
    options = backend.compiler_options(key)
    sass = codegen.compile_kernel(kernels.pats_kernel, constants | {"ONLY_FULL": False}, arch, options)
    assert keeps_all_in_registers(sass.stack_bytes, sass.count("LDL", "STL"))
    statistics = {"first": None, "BLOCK": backend.STATISTICS_BLOCK}
    assert (
        codegen.compile_kernel(kernels.statistics_kernel, statistics, arch, {"num_warps": 4}).stack_bytes == 0
    )


def test_tuning_reaches_the_machine_code() -> None:
    """Evict-first, evict-last and streaming accesses of every operand; a persistent grid costs no spills."""
    key = codegen.launch_key(normalization="exact")
    hints = ("evict_last", "evict_first", ".cs")
    tuning = Tuning(hints=hints, persistent=8, reversed=True, group_bytes=1)
    options = backend.compiler_options(key, tuning)
    found = {}
    for phase in ("averages", "noise"):
        constants = codegen.constants_of(key, phase, tuning) | {"grad_scale": None, "found_inf": None}
        constants |= {"ONLY_FULL": True}
        sass = codegen.compile_kernel(kernels.pats_kernel, constants, "sm_90", options)
        assert keeps_all_in_registers(sass.stack_bytes, sass.count("LDL", "STL"))
        accesses = [text.split()[0] for _, text in sass.instructions]
        found[phase] = {name: accesses.count(name) for name in accesses if name.endswith(".128")}
    assert found == {
        "averages": {"LDG.E.EL.128": 6, "LDG.E.EF.128": 2, "STG.E.EF.128": 4},
        "noise": {"LDG.E.EL.128": 6, "STG.E.EF.128": 2},
    }


# Where multiplications and additions are one operation, and where not.


def ptx(arch: str, phase: str = "one pass", scaler: bool = False, **constants: Any) -> str:
    key = codegen.launch_key(
        **{name: constants.pop(name) for name in ("form", "param", "state") if name in constants}
    )
    chosen = codegen.constants_of(key, phase) | {"ONLY_FULL": False} | constants
    chosen |= {} if scaler else {"grad_scale": None, "found_inf": None}
    options = backend.compiler_options(key)
    return codegen.compile_offline(kernels.pats_kernel, chosen, arch, options).asm["ptx"]


F32, BF16 = torch.float32, torch.bfloat16
SAME_ARITHMETIC: list[tuple[Form, torch.dtype, torch.dtype, str]] = [
    ("pats", F32, F32, "one pass"),
    ("pats", F32, F32, "averages"),
    ("pats", F32, F32, "noise"),
    ("pats", BF16, BF16, "one pass"),
    ("pats", BF16, F32, "one pass"),
    ("pats", torch.float16, F32, "one pass"),
    ("pats_adamw", F32, F32, "one pass"),
    ("pats_adamw", F32, F32, "noise"),
    ("moments_adamw", F32, F32, "one pass"),
    ("moments_adamw", F32, F32, "averages"),
    ("moments_adamw", BF16, BF16, "noise"),
]


@pytest.mark.parametrize(("form", "param", "state", "phase"), SAME_ARITHMETIC)
def test_all_paths_have_the_same_arithmetic(
    form: Form, param: torch.dtype, state: torch.dtype, phase: str
) -> None:
    """Full chunks, tails and strides, with a GradScaler and without: every instruction's expression is one of
    the path for full chunks, or of AdamW alone. And nothing is left for ptxas to contract."""
    which: dict[str, Any] = {"form": form, "param": param, "state": state}
    whole = ptx("sm_90", phase, **which)
    full = expressions(ptx("sm_90", phase, ONLY_FULL=True, **which))
    alone = set()
    if form != "pats" and phase != "averages":
        plain = {"FORM": kernels.ADAMW, "UNCERTAINTY": kernels.NONE, "ONLY_FULL": True}
        alone = expressions(ptx("sm_90", phase, **which, **plain))
    assert len(full) >= 5
    assert any(expression.startswith("fma") for expression in full)
    assert expressions(whole) == full | alone
    assert unfused(whole) == []

    # Of a scale of 1 the reciprocal is 1, and what it multiplies stays.
    scaled = expressions(ptx("sm_90", phase, scaler=True, **which))
    unscaled = {re.sub(r"mul\.rn\.f32\(div\.rn\.f32\(0f3F800000, x\), x\)", "x", text) for text in scaled}
    assert unscaled - {"x", "div.rn.f32(0f3F800000, x)"} == full | alone
    assert (unscaled != scaled) == (phase != "noise" or form != "pats")


@pytest.mark.parametrize("arch", codegen.ARCHITECTURES)
def test_fused_multiply_adds_are_the_source_s(arch: str) -> None:
    """An element's average S, U, gate and noise are one each, a pair of normals' uniform and angle two; a
    thread has 8 elements of a full block, 2 of a tail's, which draws for 4, and 1 of a strided one's."""
    for only_full, expected in ((True, 8 * 4 + 8), (False, (8 + 2 + 1) * 4 + 8 + 4 + 2)):
        text = ptx(arch, ONLY_FULL=only_full)
        assert len(re.findall(r"\bfma\.rn\.f32\s", text)) + 2 * text.count("fma.rn.f32x2") == expected
        assert unfused(text) == []


def test_arithmetic_that_differs_is_seen() -> None:
    """The test above, on code that the compiler may contract as it likes, and on sums that are not fused."""
    key = codegen.launch_key()
    constants = codegen.constants_of(key, "one pass") | {"ONLY_FULL": True}
    options = backend.compiler_options(key) | {"enable_fp_fusion": True}
    free = codegen.compile_offline(kernels.pats_kernel, constants, "sm_90", options).asm["ptx"]
    assert unfused(free)
    fused = "\tfma.rn.f32 \t%r3, %r1, %r2, %r0;\n\tsqrt.rn.f32 \t%r4, %r3;"
    apart = "\tmul.rn.f32 \t%r5, %r1, %r2;\n\tadd.rn.f32 \t%r3, %r5, %r0;\n\tsqrt.rn.f32 \t%r4, %r3;"
    assert expressions(fused) == {"fma.rn.f32(x, x, x)", "sqrt.rn.f32(fma.rn.f32(x, x, x))"}
    assert expressions(apart) == {"mul.rn.f32(x, x)", "sqrt.rn.f32(add.rn.f32(mul.rn.f32(x, x), x))"}


# AMD's architectures: compiled for, never run on.


@pytest.mark.parametrize("arch", codegen.AMD_ARCHITECTURES)
@pytest.mark.parametrize("form", codegen.FORMS)
def test_amd(arch: str, form: Form) -> None:
    """float32 keeps all in vector registers and is read and written 16 bytes at a time: of a full chunk's
    block a thread of gfx942's waves of 64 has 4 elements, of gfx1100's of 32 it has 8."""
    found = report(arch, form=form)
    vectors = 1 if arch == "gfx942" else 2
    reads, writes = {"pats": (4, 3), "pats_adamw": (6, 5), "moments_adamw": (4, 3)}[form]
    assert found.load_bits == {128: reads * vectors}
    assert found.store_bits[128] == writes * vectors
    assert found.stack_bytes == 0
    assert found.full_path_spills == 0
    assert found.spills <= 8  # of scalar registers, in the other paths
    assert found.registers <= 168  # three waves to a SIMD of gfx942's 512
    assert found.scalar_registers is not None


@pytest.mark.parametrize("arch", codegen.AMD_ARCHITECTURES[:1])
def test_every_kernel_compiles_for_amd(arch: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All forms, phases and dtypes, down to a linked code object; no 16 bits are accessed by themselves. On
    one architecture, as each takes half a minute; the tests above compile the main kernels for both."""
    file = tmp_path / "codegen.json"
    command.main(["--arch", arch, "--json", str(file)])
    found = json.loads(file.read_text())["kernels"]
    assert len(found) == 3 * 3 + 2 + 5 + 2 + 1
    assert all(kernel["registers"] > 0 and kernel["scalar_registers"] > 0 for kernel in found)
    assert all("16" not in kernel["load_bits"] | kernel["store_bits"] for kernel in found)
    assert all(k["stack_bytes"] == 0 for k in found if k["param_dtype"] != "float64")
    assert capsys.readouterr().out.count("pats_kernel") == 18


def test_amd_s_assembly_is_read_right() -> None:
    lines = [
        "\tglobal_load_dwordx4 v[0:3], v[4:5], off",
        "\tbuffer_load_b128 v[0:3], v4, s[0:3], 0 offen",
        "\tglobal_load_d16_b16 v0, v[4:5], off ; a comment",
        "\tbuffer_load_ushort v0, v4, s[0:3], 0 offen",
        "\ts_load_dwordx2 s[0:1], s[2:3], 0x0",
        "\tglobal_store_short_d16_hi v[4:5], v0, off",
        "    .private_segment_fixed_size: 16",
        "    .sgpr_count:     87",
        "    .sgpr_spill_count: 5",
        "    .vgpr_count:     68",
        "    .vgpr_spill_count: 2",
    ]
    read = Amdgcn("\n".join(lines), code_bytes=1)
    assert read.loads == {16: 2, 128: 2}
    assert read.stores == {16: 1}
    assert (read.registers, read.scalar_registers, read.stack_bytes, read.spills) == (68, 87, 16, 7)
    with pytest.raises(ValueError, match="no vgpr_count"):
        _ = Amdgcn("", code_bytes=1).registers


@pytest.mark.parametrize("arch", codegen.ARCHITECTURES)
def test_statistics_kernel(arch: str) -> None:
    found = codegen.statistics_report(arch)
    assert keeps_all_in_registers(found.stack_bytes, found.spills)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every combination that is to be reported, on the screen and in the file."""
    file = tmp_path / "codegen.json"
    command.main(["--arch", "sm_90", "--json", str(file)])
    content = json.loads(file.read_text())
    names = ("kernel", "form", "param_dtype", "state_dtype", "uncertainty")
    found = {tuple(kernel[name] for name in names) for kernel in content["kernels"]}
    assert len(found) == len(content["kernels"]) == 3 * 3 + 2 + 5 + 2 + 1
    for form in codegen.FORMS:
        phases = {kernel for kernel, *rest in found if rest == [form, "float32", "float32", "product"]}
        assert phases == {f"pats_kernel, {phase}" for phase in ("one pass", "averages", "noise")}
    assert capsys.readouterr().out.count("pats_kernel") == 18
    assert content["arch"] == "sm_90"


def test_sass_is_read_right() -> None:
    """The parser itself, on lines as cuobjdump prints them."""
    lines = [
        "LDG.E.128 R4, desc[UR4][R2.64]",
        "LDG.E R8, desc[UR4][R2.64+0x10]",
        "@!P0 LDG.E.U16 R9, desc[UR4][R2.64]",
        "STL [R1], R4",
        "@P0 STG.E.64 desc[UR4][R2.64], R4",
        "BRA.U !UP0, 0x10",
        "EXIT",
    ]
    sass = codegen.Sass([(16 * i, line) for i, line in enumerate(lines)], registers=10, stack_bytes=8)
    assert sass.widths("LDG") == {16: 1, 32: 1, 128: 1}
    assert sass.widths("STG") == {64: 1}
    assert sass.count("LDL", "STL") == 1
    assert sass.loop() == 5  # from address 0x10 to the branch at 0x50
