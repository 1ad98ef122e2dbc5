"""What the compiler makes of the kernels: limits that hold without a GPU.

The H200 executes about 200 instructions an element in the time in which memory moves 28 bytes; the limits
here are what the kernels reached, with a margin of a few instructions for other compiler versions.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from benchmarks import codegen
from pats_kernels.backends import triton as backend
from pats_kernels.backends import triton_kernel as kernels
from pats_kernels.backends.triton import Tuning
from pats_kernels.hyperparameters import Form, Uncertainty

# Accesses of the stack that ptxas leaves where registers are limited: in all paths, of which that of strided
# tensors hardly ever runs, and in that of full, aligned chunks. L1 holds them; they count as instructions.
TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
SPILLS = {("sm_100", "moments_adamw", "one pass"): (8, 0)}
MORE_INSTRUCTIONS: dict[str, int] = {}
if TRITON < (3, 7):
    SPILLS |= {("sm_80", "pats_adamw", "one pass"): (132, 0), ("sm_80", "pats_adamw", "noise"): (2, 0)}
    MORE_INSTRUCTIONS = {"averages": 1, "noise": 4}  # an element
if TRITON >= (3, 8):
    SPILLS |= {("sm_100", "pats_adamw", "one pass"): (13, 5)}


def keeps_all_in_registers(stack_bytes: int, spills: int) -> bool:
    """For sm_90 Triton 3.8's ptxas moves the stack pointer by 8 bytes, which no instruction then accesses."""
    return spills == 0 and stack_bytes <= (8 if TRITON >= (3, 8) else 0)


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
    most_spills, most_in_full_path = SPILLS.get((arch, form, phase), (0, 0))
    assert found.full_path_spills <= most_in_full_path
    assert found.spills <= most_spills
    assert most_spills or keeps_all_in_registers(found.stack_bytes, found.spills)
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
    assert keeps_all_in_registers(found.stack_bytes, found.spills)
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
    assert found.full_path_spills == 0
    if (arch, form) == ("sm_100", "pats_adamw"):
        assert found.spills <= 2  # in the paths of tails and strided tensors
    else:
        assert keeps_all_in_registers(found.stack_bytes, found.spills)
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


@pytest.mark.parametrize("arch", codegen.ARCHITECTURES)
def test_statistics_kernel(arch: str) -> None:
    found = codegen.statistics_report(arch)
    assert keeps_all_in_registers(found.stack_bytes, found.spills)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every combination that is to be reported, on the screen and in the file."""
    file = tmp_path / "codegen.json"
    codegen.main(["--arch", "sm_90", "--json", str(file)])
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
