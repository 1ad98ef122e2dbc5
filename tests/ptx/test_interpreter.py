"""The interpreter of PTX itself: what instructions give, against arithmetic that rounds nothing, and what
programs may not do."""

import struct
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ptx.machine import Kernel
from ptx.memory import Fault, GlobalMemory, Interval
from ptx.numbers import ERRORS
from ptx.program import Unknown, parse

Array = NDArray[Any]
WARP = 32
HEADER = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 memory[];
.visible .entry kernel(.param .u64 kernel_param_0, .param .u64 kernel_param_1)
.reqntid {threads}
{{
    .reg .pred %p<9>;
    .reg .b16 %rs<9>;
    .reg .b32 %r<40>;
    .reg .b64 %rd<40>;
    ld.param.b64 %rd1, [kernel_param_0];
    ld.param.b64 %rd2, [kernel_param_1];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    mov.u32 %r3, %laneid;
    mad.lo.s32 %r4, %r2, {threads}, %r1;
    mad.wide.u32 %rd3, %r4, 32, %rd1;
    mad.wide.u32 %rd4, %r4, 32, %rd2;
{body}
    ret;
}}
"""
# %rd3 and %rd4 point to the thread's 32 bytes of the input and of the output.


def run(
    body: str,
    inputs: Array | None = None,
    threads: int = WARP,
    blocks: int = 1,
    seed: int | None = None,
    shared: int = 1024,
) -> Array:
    """The output, [threads of all blocks, 32] bytes, of `body` for such inputs."""
    count = threads * blocks
    given = np.zeros((count, 32), np.uint8)
    if inputs is not None:
        raw = np.ascontiguousarray(inputs).reshape(count, -1).view(np.uint8)
        given[:, : raw.shape[1]] = raw
    output = np.zeros((count, 32), np.uint8)
    kernel = Kernel(parse(HEADER.format(threads=threads, body=body)))
    memory = GlobalMemory(
        [
            Interval("input", given.ctypes.data, given.nbytes, writable=False),
            Interval("output", output.ctypes.data, output.nbytes),
        ]
    )
    params = struct.pack("QQ", given.ctypes.data, output.ctypes.data)
    kernel.launch(blocks, params, memory, shared, seed=seed)
    return output


def calculated(instruction: str, dtype: Any, *operands: list[int] | list[float], kind: str = "b32") -> Array:
    """`instruction` with %d, %a, %b, %c in the place of registers, for as many as 32 operands."""
    size = {"b16": 2, "b32": 4, "b64": 8}[kind]
    unsigned = {2: np.uint16, 4: np.uint32, 8: np.uint64}[size]
    table = np.zeros((WARP, 32 // size), unsigned)
    for i, values in enumerate(operands):
        table[: len(values), i] = np.array(values, unsigned)
    prefix = {"b16": "%rs", "b32": "%r2", "b64": "%rd2"}[kind]
    names = {"%d": f"{prefix}8", "%a": f"{prefix}5", "%b": f"{prefix}6", "%c": f"{prefix}7"}
    loads = "".join(
        f"ld.global.{kind} {names[r]}, [%rd3+{i * size}];" for i, r in enumerate(("%a", "%b", "%c"))
    )
    wide = np.dtype(dtype).itemsize
    result = {2: "%rs8", 4: "%r28", 8: "%rd28"}[wide]
    for name, register in names.items():
        instruction = instruction.replace(name, result if name == "%d" else register)
    found = run(f"{loads} {instruction} st.global.b{8 * wide} [%rd4], {result};", table)
    return found[: len(operands[0])].copy().view(dtype)[:, 0]


# ---- integers, against Python's, which are unbounded

words = st.integers(0, 2**32 - 1) | st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**32 - 1])
some_words = st.lists(st.tuples(words, words, words), min_size=1, max_size=WARP)


def signed(x: int, bits: int = 32) -> int:
    return x - (1 << bits) if x >> bits - 1 else x


def truncated_quotient(a: int, b: int) -> int:
    q = abs(a) // abs(b)
    return q if (a < 0) == (b < 0) else -q


INTEGER: dict[str, Callable[[int, int, int], int]] = {
    "add.s32 %d, %a, %b;": lambda a, b, c: a + b,
    "sub.s32 %d, %a, %b;": lambda a, b, c: a - b,
    "mul.lo.s32 %d, %a, %b;": lambda a, b, c: a * b,
    "mul.hi.u32 %d, %a, %b;": lambda a, b, c: a * b >> 32,
    "mul.hi.s32 %d, %a, %b;": lambda a, b, c: signed(a) * signed(b) >> 32,
    "mad.lo.s32 %d, %a, %b, %c;": lambda a, b, c: a * b + c,
    "min.u32 %d, %a, %b;": lambda a, b, c: min(a, b),
    "min.s32 %d, %a, %b;": lambda a, b, c: min(signed(a), signed(b)),
    "max.s32 %d, %a, %b;": lambda a, b, c: max(signed(a), signed(b)),
    "and.b32 %d, %a, %b;": lambda a, b, c: a & b,
    "or.b32 %d, %a, %b;": lambda a, b, c: a | b,
    "xor.b32 %d, %a, %b;": lambda a, b, c: a ^ b,
    "not.b32 %d, %a;": lambda a, b, c: ~a,
    "neg.s32 %d, %a;": lambda a, b, c: -signed(a),
    "popc.b32 %d, %a;": lambda a, b, c: bin(a).count("1"),
    "clz.b32 %d, %a;": lambda a, b, c: 32 - len(bin(a)[2:].lstrip("0")),
    "shl.b32 %d, %a, %b;": lambda a, b, c: a << min(b, 32),
    "shr.u32 %d, %a, %b;": lambda a, b, c: a >> min(b, 32),
    "shr.s32 %d, %a, %b;": lambda a, b, c: signed(a) >> min(b, 31),
    "bfe.u32 %d, %a, 5, 11;": lambda a, b, c: a >> 5 & 0x7FF,
    "bfe.s32 %d, %a, 28, 9;": lambda a, b, c: signed(a) >> 28,
    "bfe.s32 %d, %a, 5, 11;": lambda a, b, c: signed(a >> 5 & 0x7FF, 11),
    "shf.l.wrap.b32 %d, %a, %b, %c;": lambda a, b, c: (b << 32 | a) << (c & 31) >> 32,
    "shf.r.wrap.b32 %d, %a, %b, %c;": lambda a, b, c: (b << 32 | a) >> (c & 31),
    "prmt.b32 %d, %a, %b, 0x7632;": lambda a, b, c: b & 0xFFFF0000 | a >> 16,
    "prmt.b32 %d, %a, %b, 4180;": lambda a, b, c: (a & 0xFFFF) << 16 | b & 0xFFFF,
    "prmt.b32 %d, %a, %b, 0x8888;": lambda a, b, c: 0xFFFFFFFF if a & 0x80 else 0,
    "selp.b32 %d, 7, 9, %p1;": lambda a, b, c: 7 if signed(a) < signed(b) else 9,
    "cvt.s32.s16 %d, %rs1;": lambda a, b, c: signed(a & 0xFFFF, 16),
    "cvt.u32.u16 %d, %rs1;": lambda a, b, c: a & 0xFFFF,
    "mov.b32 %d, {%rs1, %rs2};": lambda a, b, c: (b & 0xFFFF) << 16 | a & 0xFFFF,
}


@pytest.mark.parametrize("instruction", INTEGER)
@given(some_words)
def test_integers(instruction: str, operands: list[tuple[int, int, int]]) -> None:
    a, b, c = (list(column) for column in zip(*operands, strict=True))
    if "shl" in instruction or "shr" in instruction:
        b = [x % 40 for x in b]  # amounts past all bits, too
    before = "setp.lt.s32 %p1, %a, %b; mov.b32 {%rs1, _}, %a; mov.b32 {%rs2, _}, %b; "
    found = calculated(before + instruction, np.uint32, a, b, c)
    expected = [INTEGER[instruction](*x) & 2**32 - 1 for x in zip(a, b, c, strict=True)]
    assert found.tolist() == expected


@given(some_words)
def test_products_of_twice_the_width(operands: list[tuple[int, int, int]]) -> None:
    a, b, _ = (list(column) for column in zip(*operands, strict=True))
    unsigned = calculated("mul.wide.u32 %d, %a, %b;", np.uint64, a, b)
    assert unsigned.tolist() == [x * y for x, y in zip(a, b, strict=True)]
    with_sign = calculated("mul.wide.s32 %d, %a, %b;", np.int64, a, b)
    assert with_sign.tolist() == [signed(x) * signed(y) for x, y in zip(a, b, strict=True)]


@given(some_words)
def test_divisions(operands: list[tuple[int, int, int]]) -> None:
    a, b, _ = (list(column) for column in zip(*operands, strict=True))
    b = [x or 1 for x in b]
    # The lanes that are left over divide by 0: an instruction that they do not take part in.
    found = calculated("setp.ne.s32 %p1, %b, 0; mov.b32 %d, 0; @%p1 div.u32 %d, %a, %b;", np.uint32, a, b)
    assert found.tolist() == [x // y for x, y in zip(a, b, strict=True)]
    found = calculated("setp.ne.s32 %p1, %b, 0; mov.b32 %d, 0; @%p1 rem.s32 %d, %a, %b;", np.int32, a, b)
    pairs = [(signed(x), signed(y)) for x, y in zip(a, b, strict=True)]
    assert found.tolist() == [signed((x - truncated_quotient(x, y) * y) & 2**32 - 1) for x, y in pairs]
    with pytest.raises(Fault, match="division of integers by 0"):
        calculated("div.u32 %d, %a, 0;", np.uint32, a, b)


@given(some_words)
def test_carries(operands: list[tuple[int, int, int]]) -> None:
    """Sums and differences of 64 bits, in halves: (a, b) + (b, c) and (a, b) - (b, c)."""
    a, b, c = (list(column) for column in zip(*operands, strict=True))
    add = "add.cc.u32 %r10, %a, %b; addc.u32 %r11, %b, %c; mov.b64 %d, {%r10, %r11};"
    subtract = "sub.cc.u32 %r10, %a, %b; subc.u32 %r11, %b, %c; mov.b64 %d, {%r10, %r11};"
    multiply = "mad.lo.cc.u32 %r10, %a, %b, %c; madc.hi.u32 %r11, %a, %b, 0; mov.b64 %d, {%r10, %r11};"
    of_64 = 2**64 - 1
    rows = list(zip(a, b, c, strict=True))
    pairs = [(x | y << 32, y | z << 32) for x, y, z in rows]
    assert calculated(add, np.uint64, a, b, c).tolist() == [p + q & of_64 for p, q in pairs]
    assert calculated(subtract, np.uint64, a, b, c).tolist() == [p - q & of_64 for p, q in pairs]
    assert calculated(multiply, np.uint64, a, b, c).tolist() == [x * y + z & of_64 for x, y, z in rows]


# ---- floating point, against fractions rounded once


def rounded(x: Fraction, bits: int) -> float:
    """To the nearest float32 or float64, ties to even, no matter how many bits x has."""
    precision, least = (24, -149) if bits == 32 else (53, -1074)
    if x == 0:
        return 0.0
    exponent = max(_floor_log2(abs(x)) - precision + 1, least)
    scaled = x / Fraction(2) ** exponent
    down = scaled.numerator // scaled.denominator
    rest = scaled - down
    up = rest > Fraction(1, 2) or (rest == Fraction(1, 2) and down % 2 == 1)
    value = Fraction(down + up) * Fraction(2) ** exponent
    limit = Fraction(2) ** (128 if bits == 32 else 1024)
    return float(value) if abs(value) < limit else float("inf") * (1 if value > 0 else -1)


def _floor_log2(x: Fraction) -> int:
    n = x.numerator.bit_length() - x.denominator.bit_length()
    return n if Fraction(2) ** n <= x else n - 1


singles = st.floats(width=32, allow_nan=False, allow_infinity=False)
doubles = st.floats(min_value=-1e100, max_value=1e100).map(lambda x: x if abs(x) > 1e-100 else 0.0)


def bits32(values: list[float]) -> list[int]:
    return np.array(values, np.float32).view(np.uint32).tolist()


def bits64(values: list[float]) -> list[int]:
    return np.array(values, np.float64).view(np.uint64).tolist()


@given(st.lists(st.tuples(singles, singles, singles), min_size=1, max_size=WARP))
def test_fused_multiply_add(operands: list[tuple[float, float, float]]) -> None:
    a, b, c = (list(column) for column in zip(*operands, strict=True))
    found = calculated("fma.rn.f32 %d, %a, %b, %c;", np.float32, bits32(a), bits32(b), bits32(c))
    expected = [rounded(Fraction(x) * Fraction(y) + Fraction(z), 32) for x, y, z in operands]
    assert found.tolist() == expected


def test_fused_multiply_add_where_two_roundings_are_wrong() -> None:
    """(1 + 2^-12)^2 - 2^-60 is just below a tie of float32, which float64 rounds it to."""
    a, c = [1 + 2.0**-12], [2.0**-60, -(2.0**-60), 0.0]
    found = calculated("fma.rn.f32 %d, %a, %b, %c;", np.float32, bits32(a * 3), bits32(a * 3), bits32(c))
    exact = [Fraction(a[0]) ** 2 + Fraction(x) for x in c]
    assert found.tolist() == [rounded(x, 32) for x in exact]
    assert found[0] > found[1] == found[2]  # the tie itself rounds to even, which is below


@given(st.lists(st.tuples(doubles, doubles, doubles), min_size=1, max_size=WARP))
def test_fused_multiply_add_of_float64(operands: list[tuple[float, float, float]]) -> None:
    a, b, c = (list(column) for column in zip(*operands, strict=True))
    columns = [bits64(x) for x in (a, b, c)]
    found = calculated("fma.rn.f64 %d, %a, %b, %c;", np.float64, *columns, kind="b64")
    expected = [rounded(Fraction(x) * Fraction(y) + Fraction(z), 64) for x, y, z in operands]
    assert found.tolist() == expected


@given(st.lists(st.tuples(singles, singles), min_size=1, max_size=WARP))
def test_single_roundings(operands: list[tuple[float, float]]) -> None:
    a, b = (list(column) for column in zip(*operands, strict=True))
    for name, function in {
        "add": lambda x, y: x + y,
        "sub": lambda x, y: x - y,
        "mul": lambda x, y: x * y,
    }.items():
        found = calculated(f"{name}.f32 %d, %a, %b;", np.float32, bits32(a), bits32(b))
        assert found.tolist() == [rounded(function(Fraction(x), Fraction(y)), 32) for x, y in operands]


NAN, INF, TINY = float("nan"), float("inf"), 2.0**-130


@pytest.mark.parametrize(
    ("instruction", "a", "b", "expected"),
    [
        ("add.f32 %d, %a, %b;", INF, -INF, 0x7FFFFFFF),  # the GPU's one NaN pattern
        ("mul.f32 %d, %a, %b;", 0.0, INF, 0x7FFFFFFF),
        ("add.f32 %d, %a, %b;", NAN, 1.0, 0x7FFFFFFF),
        ("max.f32 %d, %a, %b;", NAN, 1.0, 0x3F800000),
        ("neg.f32 %d, %a;", NAN, 0.0, 0xFFC00000),  # only the sign bit changes
        ("abs.f32 %d, %a;", -0.0, 0.0, 0),
        ("add.f32 %d, %a, %b;", TINY, 0.0, 0x00080000),
        ("add.ftz.f32 %d, %a, %b;", TINY, 0.0, 0),
        ("mul.ftz.f32 %d, %a, %b;", 2.0**-100, -(2.0**-30), 0x80000000),
        ("rcp.approx.ftz.f32 %d, %a;", TINY, 0.0, 0x7F800000),
        ("sqrt.approx.ftz.f32 %d, %a;", TINY, 0.0, 0),
        ("lg2.approx.ftz.f32 %d, %a;", 0.0, 0.0, 0xFF800000),
        ("lg2.approx.ftz.f32 %d, %a;", -1.0, 0.0, 0x7FFFFFFF),
        ("tanh.approx.f32 %d, %a;", -INF, 0.0, 0xBF800000),
        ("cvt.rzi.s32.f32 %d, %a;", 3e9, 0.0, 0x7FFFFFFF),
        ("cvt.rzi.s32.f32 %d, %a;", -3e9, 0.0, 0x80000000),
        ("cvt.rzi.s32.f32 %d, %a;", NAN, 0.0, 0),
        ("cvt.rzi.s32.f32 %d, %a;", -2.75, 0.0, 0xFFFFFFFE),
        ("cvt.rni.f32.f32 %d, %a;", 2.5, 0.0, 0x40000000),
        ("cvt.rn.bf16x2.f32 %d, %a, %b;", 1.0, -2.0, 0x3F80C000),  # the first operand is the upper half
        ("cvt.rn.f16x2.f32 %d, %a, %b;", 1.0, 1e9, 0x3C007C00),
    ],
)
def test_where_numbers_end(instruction: str, a: float, b: float, expected: int) -> None:
    assert calculated(instruction, np.uint32, bits32([a]), bits32([b])).tolist() == [expected]


@pytest.mark.parametrize(
    ("comparison", "true_for"),  # a digit each for a < b, a == b, a > b, and a NaN
    [
        ("lt", "1000"), ("le", "1100"), ("eq", "0100"), ("ne", "1010"), ("ge", "0110"), ("gt", "0010"),
        ("ltu", "1001"), ("leu", "1101"), ("equ", "0101"), ("neu", "1011"), ("geu", "0111"), ("gtu", "0011"),
        ("num", "1110"), ("nan", "0001"),
    ],
)  # fmt: skip
def test_comparisons(comparison: str, true_for: str) -> None:
    a, b = bits32([1.0, 2.0, 3.0, NAN]), bits32([2.0, 2.0, 2.0, 2.0])
    program = f"setp.{comparison}.f32 %p1, %a, %b; selp.b32 %d, 1, 0, %p1;"
    assert "".join(map(str, calculated(program, np.uint32, a, b).tolist())) == true_for


@given(st.lists(singles, min_size=1, max_size=WARP))
def test_bfloat16(values: list[float]) -> None:
    found = calculated("cvt.rn.bf16.f32 %d, %a;", np.uint16, bits32(values))
    expected = torch.tensor(values, dtype=torch.float32).to(torch.bfloat16).view(torch.int16)
    assert found.tolist() == [int(x) & 0xFFFF for x in expected]


def test_two_at_a_time() -> None:
    """f32x2: both halves of a register of 64 bits."""
    pairs = np.array([[1.5, -2.0], [3.0, 0.25]], np.float32).view(np.uint64)[:, 0].tolist()
    found = calculated("fma.rn.f32x2 %d, %a, %b, %a;", np.uint64, pairs[:1], pairs[1:], kind="b64")
    assert found.view(np.float32).tolist() == [1.5 * 3.0 + 1.5, -2.0 * 0.25 - 2.0]


FUNCTIONS: dict[str, tuple[Callable[[Array], Array], tuple[float, float]]] = {
    "rcp": (lambda x: 1 / x, (0.1, 100)),
    "sqrt": (np.sqrt, (0.1, 100)),
    "sin": (np.sin, (-np.pi, np.pi)),
    "cos": (np.cos, (-np.pi, np.pi)),
    "lg2": (np.log2, (0.001, 1)),
    "ex2": (np.exp2, (-10, 10)),
    "tanh": (np.tanh, (-5, 5)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_approximations_err_by_what_they_may(name: str) -> None:
    """Exact to a rounding without a seed; with one, off by the whole error, to both sides."""
    function, (low, high) = FUNCTIONS[name]
    x = np.linspace(low, high, WARP, dtype=np.float32)
    ftz = "" if name == "tanh" else ".ftz"
    body = f"ld.global.b32 %r5, [%rd3]; {name}.approx{ftz}.f32 %r6, %r5; st.global.b32 [%rd4], %r6;"
    exact = function(x.astype(np.float64))
    right = run(body, x)[:, :4].copy().view(np.float32)[:, 0]
    ulp = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
    assert (np.abs(right - exact) <= ulp / 2).all()
    kind, size = ERRORS[name]
    allowed = {
        "ulp": size * ulp,
        "of": size * np.abs(exact),
        "absolute": np.full(WARP, size),
        "lg2": size * np.where(x > 0.5, 1, np.abs(exact)),
    }[kind]
    ulp = np.spacing((np.abs(exact) + allowed).astype(np.float32)).astype(np.float64)
    wrong = run(body, x, seed=1)[:, :4].copy().view(np.float32)[:, 0] - exact
    assert (np.abs(wrong) <= allowed + ulp).all()
    assert (np.abs(wrong) >= allowed - ulp).all()
    assert (wrong > 0).any()
    assert (wrong < 0).any()


# ---- threads


def lanes(output: Array, dtype: Any = np.uint32) -> list[Any]:
    return output[:, : np.dtype(dtype).itemsize].copy().view(dtype)[:, 0].tolist()


def test_threads_part_and_meet() -> None:
    """A loop of as many turns as the lane's number, in which odd lanes add 1 and even ones 3."""
    body = """
    mov.b32 %r5, 0;
    mov.b32 %r6, 0;
    LOOP:
    setp.ge.u32 %p1, %r6, %r3;
    @%p1 bra DONE;
    and.b32 %r7, %r3, 1;
    setp.eq.b32 %p2, %r7, 0;
    @%p2 bra EVEN;
    add.s32 %r5, %r5, 1;
    bra.uni NEXT;
    EVEN: add.s32 %r5, %r5, 3;
    NEXT: add.s32 %r6, %r6, 1;
    bra LOOP;
    DONE: st.global.b32 [%rd4], %r5;
    """
    assert lanes(run(body)) == [i * (1 if i % 2 else 3) for i in range(WARP)]


def test_shuffles() -> None:
    values = np.arange(WARP, dtype=np.uint32) * 10
    load, store = "ld.global.b32 %r5, [%rd3]; ", " st.global.b32 [%rd4], %r6;"
    shuffled = {
        "bfly.b32 %r6, %r5, 5, 31": [10 * (i ^ 5) for i in range(WARP)],
        "down.b32 %r6, %r5, 3, 31": [10 * (i + 3 if i + 3 < 32 else i) for i in range(WARP)],
        "up.b32 %r6, %r5, 3, 0": [10 * (i - 3 if i >= 3 else i) for i in range(WARP)],
        "idx.b32 %r6, %r5, 9, 31": [90] * WARP,
        # 0x1807: within groups of 8 lanes.
        "down.b32 %r6, %r5, 4, 0x1807": [10 * (i + 4 if i % 8 < 4 else i) for i in range(WARP)],
    }
    for shuffle, expected in shuffled.items():
        assert lanes(run(f"{load} shfl.sync.{shuffle}, -1; {store}", values)) == expected
    valid = "shfl.sync.down.b32 %r6|%p1, %r5, 3, 31, -1; selp.b32 %r6, 1, 0, %p1;"
    assert lanes(run(load + valid + store, values)) == [1] * 29 + [0] * 3
    total = "redux.sync.add.s32 %r6, %r5, 0xffffffff;"
    assert lanes(run(load + total + store, values)) == [10 * sum(range(WARP))] * WARP


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_matrices(trans: str) -> None:
    """stmatrix and ldmatrix by the ISA's picture: thread t holds elements 2 (t % 4) and the next of row
    t / 4, or of the transposed matrix's."""
    values = np.arange(2 * WARP, dtype=np.uint16).reshape(WARP, 2)
    body = f"""
    ld.global.b32 %r5, [%rd3];
    mov.b32 %r8, memory;
    and.b32 %r6, %r3, 7;
    mad.lo.s32 %r7, %r6, 16, %r8;
    stmatrix.sync.aligned.m8n8.x1{trans}.shared.b16 [%r7], {{%r5}};
    bar.sync 0;
    shl.b32 %r9, %r3, 2;
    add.s32 %r9, %r9, %r8;
    ld.shared.b32 %r10, [%r9];
    ldmatrix.sync.aligned.m8n8.x1{trans}.shared.b16 {{%r11}}, [%r7];
    st.global.v2.b32 [%rd4], {{%r10, %r11}};
    """
    output = run(body, values)
    matrix = np.zeros((8, 8), np.uint16)
    for t in range(WARP):
        for h in range(2):
            place = (t // 4, 2 * (t % 4) + h)
            matrix[place if not trans else place[::-1]] = values[t, h]
    assert (output[:, :4].copy().view(np.uint16).reshape(8, 8) == matrix).all()
    assert (output[:, 4:8].copy().view(np.uint16) == values).all()


def test_calls() -> None:
    """A function with a parameter, a result and memory of its own, to which a generic address points."""
    function = """
    .func (.param .b32 func_retval0) twice(.param .b64 twice_param_0)
    {
        .local .align 8 .b8 depot1[8];
        .reg .b32 %r<3>;
        .reg .b64 %rd<3>;
        ld.param.b64 %rd1, [twice_param_0];
        ld.b32 %r1, [%rd1];
        add.s32 %r1, %r1, %r1;
        st.local.b32 [depot1+4], %r1;
        ld.local.b32 %r2, [depot1+4];
        st.param.b32 [func_retval0], %r2;
        ret;
    }
    """
    body = """
    .local .align 4 .b8 depot0[4];
    mov.b64 %rd5, depot0;
    cvta.local.u64 %rd6, %rd5;
    st.local.b32 [%rd5], %r3;
    setp.gt.u32 %p1, %r3, 9;
    mov.b32 %r5, 0;
    @%p1 bra CALL;
    bra.uni DONE;
    CALL:
    { .param .b64 param0; .param .b32 retval0;
    st.param.b64 [param0], %rd6;
    call.uni (retval0), twice, (param0);
    ld.param.b32 %r5, [retval0]; }
    DONE: st.global.b32 [%rd4], %r5;
    """
    output = np.zeros((WARP, 32), np.uint8)
    kernel = Kernel(parse(function + HEADER.format(threads=WARP, body=body)))
    memory = GlobalMemory([Interval("output", output.ctypes.data, output.nbytes)])
    kernel.launch(1, struct.pack("QQ", 0, output.ctypes.data), memory, 64)
    assert lanes(output) == [2 * i if i > 9 else 0 for i in range(WARP)]


# ---- what no program may do

BARRIER = "bar.sync 0;"
INTO_SHARED = "shl.b32 %r5, %r1, 2; mov.b32 %r6, memory; add.s32 %r6, %r6, %r5; st.shared.b32 [%r6], %r1; "
OF_THE_NEXT = "xor.b32 %r7, %r5, 128; mov.b32 %r8, memory; add.s32 %r8, %r8, %r7; ld.shared.b32 %r9, [%r8];"
STORE = "st.global.b32 [%rd4], %r9;"


def test_a_barrier_orders_shared_memory() -> None:
    output = run(INTO_SHARED + BARRIER + OF_THE_NEXT + STORE, threads=64)
    assert lanes(output) == [i ^ 32 for i in range(64)]
    with pytest.raises(Fault, match=r"race in shared memory|nobody has written"):
        run(INTO_SHARED + OF_THE_NEXT + STORE, threads=64)


def test_a_barrier_orders_reads_before_writes() -> None:
    again = "add.s32 %r1, %r1, 1; st.shared.b32 [%r6], %r1;"
    run(INTO_SHARED + BARRIER + OF_THE_NEXT + BARRIER + again, threads=64)
    with pytest.raises(Fault, match="race in shared memory: a write"):
        run(INTO_SHARED + BARRIER + OF_THE_NEXT + again, threads=64)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.shared.b32 %r5, [memory+16];", "shared memory that nobody has written"),
        ("st.shared.b32 [memory+1024], %r1;", "shared memory out of bounds"),
        ("st.shared.b32 [memory], %r1;", "race in shared memory: a write"),
        ("st.shared.b32 [memory+2], 5;", "4 bytes"),
        ("ld.global.b32 %r5, [%rd3+2];", "a multiple|no multiple"),
        ("ld.global.v4.b32 {%r5, %r6, %r7, %r8}, [%rd3+8];", "16 bytes at an address that is no multiple"),
        ("st.global.b32 [%rd3], %r1;", "a write to input, which is only to be read"),
        ("ld.global.b32 %r5, [%rd2+1024];", "a read of 4 bytes out of bounds: 4 bytes after the end"),
        ("add.s64 %rd5, %rd4, 16; st.global.v4.b32 [%rd5+16], {%r1, %r1, %r1, %r1};", "out of bounds"),
        ("mov.b64 %rd5, 4096; ld.global.b32 %r5, [%rd5];", "out of bounds"),
        ("st.global.b32 [%rd2], %r1;", "a race: write of output, byte 0"),
        (
            "setp.eq.b32 %p1, %r1, 0; @%p1 st.global.b32 [%rd2+32], %r1; ld.global.b32 %r5, [%rd4];",
            "a race: read",
        ),
        ("ld.global.b32 %r5, [%rd2]; st.global.b32 [%rd4], %r1;", "a race: write"),
        ("setp.lt.u32 %p1, %r1, 5; @%p1 bar.sync 0;", "a barrier that only a part of a block reaches"),
        ("setp.lt.u32 %p1, %r1, 5; @%p1 shfl.sync.idx.b32 %r5, %r1, 0, 31, -1;", "names lanes that are not"),
        ("setp.lt.u32 %p1, %r1, 5; @%p1 shfl.sync.idx.b32 %r5, %r1, 9, 31, 31;", "a lane that is not here"),
        ("mov.b64 %rd5, 0x200000000000064; ld.b32 %r5, [%rd5];", "local memory out of bounds"),
    ],
)
def test_faults(body: str, message: str) -> None:
    with pytest.raises(Fault, match=message):
        run(body)


def test_blocks_race_too() -> None:
    """A barrier is one block's: what two blocks touch, neither may write."""
    one_cell = "setp.eq.b32 %p1, %r1, 0; @%p1 st.global.b32 [%rd2], %r2;"
    run(one_cell, blocks=1)
    with pytest.raises(Fault, match="a race: write of output"):
        run(one_cell + BARRIER, blocks=2)
    with pytest.raises(Fault, match="a race: write of output"):
        run(one_cell + BARRIER, blocks=40)  # more than run at a time


def test_the_same_cell_in_turn() -> None:
    """A thread may do with its own cell what it likes, another one after a barrier."""
    own = "st.global.b32 [%rd4], %r1; ld.global.b32 %r5, [%rd4]; st.global.b32 [%rd4], %r5;"
    run(own, threads=64, blocks=3)
    neighbour = "xor.b32 %r6, %r1, 1; mad.wide.u32 %rd5, %r6, 32, %rd2;"
    body = f"st.global.b32 [%rd4], %r1; {BARRIER} {neighbour} ld.global.b32 %r5, [%rd5]; {BARRIER} " + STORE
    run(body.replace("%r9", "%r5"), threads=64)


def test_what_is_not_known_is_an_error() -> None:
    """With its name, its line and the line of source that it comes from."""
    file = '.file 1 "/somewhere/kernel.py"\n'
    for body, message in {
        "vote.sync.any.pred %p1, %p2, -1;": "vote",
        "add.rz.f32 %r5, %r6, %r7;": r"modifier \.rz of add",
        "add.s32 %r5, %r6, %r99;": "register %r99|operand %r99",
        "add.f32 %rd5, %rd5, %rd5;": r"register %rd5 of type \.b64 as \.f32",
        "cvt.rn.tf32.f32 %r5, %r6;": "cvt",
        "bar.sync 1;": "barrier 1",
        ".weird 5;": "weird",
    }.items():
        text = file + HEADER.format(threads=WARP, body=".loc 1 77 3\n" + body)
        with pytest.raises(Unknown, match=message):
            Kernel(parse(text))
    with pytest.raises(Unknown, match=r"line 23, from kernel.py:77"):
        Kernel(
            parse(file + HEADER.format(threads=WARP, body=".loc 1 77 3\nvote.sync.any.pred %p1, %p2, -1;"))
        )


def test_what_is_counted() -> None:
    """Instructions by how many threads came to them, and those that none did."""
    body = (
        "setp.ge.u32 %p1, %r3, 8; @%p1 bra DONE; add.f32 %r5, %r5, %r5; bra.uni DONE; mul.f32 %r5, %r5, %r5;"
    )
    text = HEADER.format(threads=WARP, body=body + " DONE: st.global.b32 [%rd4], %r1;")
    kernel = Kernel(parse(text))
    output = np.zeros((3 * WARP, 32), np.uint8)
    memory = GlobalMemory([Interval("output", output.ctypes.data, output.nbytes)])
    kernel.launch(3, struct.pack("QQ", 0, output.ctypes.data), memory)
    counted = kernel.instructions_executed()
    assert counted["add.f32"] == 3 * 8
    assert counted["st.global.b32"] == 3 * WARP
    assert counted["mul.f32"] == 0
    assert [i.opcode for i in kernel.never_executed()] == ["mul.f32"]
