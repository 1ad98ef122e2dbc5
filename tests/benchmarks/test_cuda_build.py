"""What nvcc makes of the CUDA kernels: limits that hold without a GPU, wherever there is nvcc.

The limits on instructions are what the kernels reached, with a margin of a few for other versions of nvcc.
"""

import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from expressions import expressions, unfused

from benchmarks.codegen import compiled as codegen
from benchmarks.codegen import nvcc
from benchmarks.codegen.machine_code import Sass
from pats_kernels.backends import triton

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc"),
    pytest.mark.xdist_group("nvcc"),  # compiled in one of xdist's processes
]

ARCH = "sm_90"
Compiled = dict[nvcc.Kernel, Sass]


@pytest.fixture(scope="module")
def units() -> dict[tuple[str, bool], Compiled]:
    """float32's and bfloat16's kernels: as they run, and with the path for full chunks alone."""
    keys = [(param, only_full) for param in ("float32", "bfloat16") for only_full in (False, True)]
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda key: nvcc.compiled(key[0], ARCH, key[1]), keys)
    return dict(zip(keys, found, strict=True))


def test_every_combination_is_there(units: dict[tuple[str, bool], Compiled]) -> None:
    """For each dtype of the averages: eight steps of a form, common and not; AdamW alone, twice; strided."""
    for param in ("float32", "bfloat16"):
        kernels = list(units[param, False])
        assert len(kernels) == 1 + 2 * (2 * 8 + 2 + 1)
        assert sum(kernel.common for kernel in kernels) == 2 * 8
        assert {kernel.param for kernel in kernels if kernel.name != "statistics_kernel"} == {param}


# Of bfloat16 throughout, in one pass: what a block more to a multiprocessor costs. Measured, it gains more.
# The first number is of the kernels as they run, the second of the path for full chunks.
SPILLS = {"pats_adamw": (32, 12), "moments_adamw": (8, 0)}


def test_hardly_any_stack_or_spills(units: dict[tuple[str, bool], Compiled]) -> None:
    for (_, only_full), unit in units.items():
        for kernel, sass in unit.items():
            narrow = kernel.param == kernel.state == "bfloat16" and kernel.common
            allowed = (
                SPILLS.get(kernel.form or "", (0, 0)) if narrow and kernel.phase == "one pass" else (0, 0)
            )
            assert sass.count("LDL", "STL") <= allowed[only_full], kernel
            assert sass.stack_bytes <= 4 * allowed[only_full], kernel


@pytest.mark.parametrize(
    ("param", "form", "most"),
    [("float32", "pats", 64), ("float32", "adamw", 80), ("bfloat16", "pats", 80), ("bfloat16", "adamw", 96)],
)
def test_registers(units: dict[tuple[str, bool], Compiled], param: str, form: str, most: int) -> None:
    """As many blocks to a multiprocessor as csrc/cuda_kernel.cu, residents, means there to be."""
    for kernel, sass in units[param, False].items():
        if kernel.common and kernel.state == param and (kernel.form == "pats") == (form == "pats"):
            assert sass.registers <= most, kernel


@pytest.mark.parametrize(
    ("param", "form", "phase", "most_instructions", "loads", "stores"),
    [  # a thread's vector of each operand; fewer bits are the row's and the partial sums
        ("float32", "pats", "one pass", 58, 4, 3),
        ("float32", "pats", "averages", 32, 4, 2),
        ("float32", "pats", "noise", 43, 3, 2),
        ("float32", "pats_adamw", "one pass", 79, 6, 5),
        ("float32", "pats_adamw", "noise", 67, 6, 4),
        ("float32", "moments_adamw", "one pass", 80, 4, 3),
        ("float32", "moments_adamw", "averages", 48, 4, 0),
        ("float32", "moments_adamw", "noise", 74, 4, 3),
        ("bfloat16", "pats", "one pass", 77, 4, 3),
        ("bfloat16", "pats_adamw", "one pass", 117, 6, 5),
        ("bfloat16", "moments_adamw", "one pass", 108, 4, 3),
    ],
)
def test_the_path_for_full_chunks(
    units: dict[tuple[str, bool], Compiled],
    param: str,
    form: str,
    phase: str,
    most_instructions: float,
    loads: int,
    stores: int,
) -> None:
    kernel = nvcc.Kernel("update_kernel", param, param, form, phase, common=True)
    found = nvcc.report(kernel, units[param, False][kernel], units[param, True][kernel], ARCH)
    assert found.load_bits[128] == loads
    assert found.store_bits.get(128, 0) == stores
    assert 16 not in found.load_bits | found.store_bits
    assert found.instructions_per_element is not None
    assert found.instructions_per_element <= most_instructions


def test_multiply_adds_are_fused_where_the_source_says_so() -> None:
    """ptxas finds nothing to contract, and what averages S and U is instruction by instruction what Triton's
    kernel does with a GradScaler (which CUDA's has always: its scale is 1 without)."""
    found = nvcc.ptx("float32", ARCH)
    assert all(unfused(text) == [] for text in found.values())
    kernel = nvcc.Kernel("update_kernel", "float32", "float32", "pats", "averages", common=True)
    key = codegen.launch_key(normalization="exact")
    constants = codegen.constants_of(key, "averages") | {"ONLY_FULL": False}
    options = triton.compiler_options(key)
    compiled = codegen.compile_offline(triton.kernels().pats_kernel, constants, ARCH, options)
    triton_s = {text.replace("div.rn.f32(0f3F800000, x)", "x") for text in expressions(compiled.asm["ptx"])}
    # What is not finite stays as it was: Triton chooses before it takes the difference, nvcc after.
    triton_s = {re.sub(r"(fma[^|]*) \| x\)", r"\1)", text) for text in triton_s}
    averages = {text for text in expressions(found[kernel]) if text.startswith(("fma", "sub"))}
    assert len(averages) == 3  # S, the difference, U
    assert averages <= triton_s


def test_tails_are_read_as_wide_as_they_can(units: dict[tuple[str, bool], Compiled]) -> None:
    """The other path has the vector accesses once more, beside those of single elements."""
    kernel = nvcc.Kernel("update_kernel", "float32", "float32", "pats", "one pass", common=True)
    whole, full = units["float32", False][kernel], units["float32", True][kernel]
    assert whole.widths("LDG")[128] == 2 * full.widths("LDG")[128]
    assert whole.widths("STG")[128] == 2 * full.widths("STG")[128]
