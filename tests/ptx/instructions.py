"""What instructions do, a function a family, by the PTX ISA.

Each takes an instruction and gives the function that executes it: `execute(frame, mask)`. A modifier that is
not named here is unknown.
"""

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ptx.memory import UNSIGNED, Fault, Lanes
from ptx.numbers import approximation, canonical, flushed, fma, to_bfloat16
from ptx.program import Instruction, Unknown, size_of

if TYPE_CHECKING:
    from ptx.machine import Decoder, Execute, Frame, Mask

Array = NDArray[Any]

DTYPES: dict[str, Any] = {
    "pred": np.bool_,
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8,
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16, "bf16": np.uint16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32,
    "bf16x2": np.uint32, "f16x2": np.uint32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64, "f32x2": np.float32,
}  # fmt: skip
WARP = 32
ALL_LANES = 0xFFFFFFFF

FAMILIES: dict[str, Callable[["Op", "Decoder"], "Execute"]] = {}


class Op:
    """An instruction taken apart: base, modifiers, and the type, which is the last of them."""

    def __init__(self, instruction: Instruction) -> None:
        self.base, *rest = instruction.opcode.replace(".shared::cta", ".shared").split(".")
        self.kind = rest[-1] if rest and rest[-1] in DTYPES else ""
        self.modifiers = rest[:-1] if self.kind else rest
        self.operands = instruction.operands

    def __contains__(self, modifier: str) -> bool:
        return modifier in self.modifiers

    def allow(self, *modifiers: str, kinds: Collection[str] | None = None) -> None:
        """Raises Unknown where there is another modifier or type."""
        unknown = [m for m in self.modifiers if m not in modifiers]
        if unknown:
            raise Unknown(f"modifier .{unknown[0]} of {self.base}")
        if kinds is not None and self.kind not in kinds:
            raise Unknown(f"{self.base} of type .{self.kind}")


def family(*names: str) -> Callable[[Any], Any]:
    def register(function: Any) -> Any:
        FAMILIES.update(dict.fromkeys(names, function))
        return function

    return register


def decode(instruction: Instruction, decoder: "Decoder") -> "Execute":
    op = Op(instruction)
    if op.base not in FAMILIES:
        raise Unknown(op.base)
    return FAMILIES[op.base](op, decoder)


def elementwise(
    decoder: "Decoder", function: Callable[..., Array], to: tuple[str, str], *sources: tuple[str, str]
) -> "Execute":
    """`function` of each lane's operands; `to` and `sources`: (operand, type)."""
    reads = [decoder.read(*source) for source in sources]
    write = decoder.write(*to)

    def execute(frame: "Frame", mask: "Mask") -> None:
        write(frame, function(*(read(frame) for read in reads)), mask)

    return execute


FLOATS = ("f16", "f32", "f64", "f32x2")
INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")
BITS = ("b16", "b32", "b64")


# ---- arithmetic


@family("add", "sub", "mul", "div", "min", "max", "fma", "mad", "rem", "addc", "subc", "madc")
def _arithmetic(op: Op, decoder: "Decoder") -> "Execute":
    if op.kind in FLOATS:
        return _floating(op, decoder)
    if "cc" in op or op.base in ("addc", "subc", "madc"):
        return _carrying(op, decoder)
    return _integer(op, decoder)


def _floating(op: Op, decoder: "Decoder") -> "Execute":
    op.allow("rn", "ftz", "full", "approx")
    to, *sources = ((operand, op.kind) for operand in op.operands)
    approximate = op.base == "div" and ("full" in op or "approx" in op)
    if ("full" in op or "approx" in op) and not approximate:
        raise Unknown(f"an approximate {op.base}")
    if op.base not in ("add", "sub", "mul", "div", "min", "max", "fma"):
        raise Unknown(f"{op.base} of type .{op.kind}")
    if approximate:
        return _approximate(op, decoder, np.divide)
    functions: dict[str, Callable[..., Array]] = {
        "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide,
        "min": np.fmin, "max": np.fmax, "fma": fma,
    }  # fmt: skip
    function = functions[op.base]
    if op.base in ("fma", "div") and "rn" not in op:
        raise Unknown(f"{op.base} without .rn")
    ftz = "ftz" in op

    def compute(*x: Array) -> Array:
        if ftz:
            x = tuple(flushed(np.atleast_1d(each)) for each in x)
        y = canonical(np.atleast_1d(function(*x)))
        return flushed(y) if ftz else y

    return elementwise(decoder, compute, to, *sources)


def _integer(op: Op, decoder: "Decoder") -> "Execute":
    op.allow("lo", "hi", "wide", kinds=INTEGERS)
    bits, signed = 8 * size_of(op.kind), op.kind[0] == "s"
    wide = f"{op.kind[0]}{2 * bits}"
    narrow, double = DTYPES[op.kind], DTYPES.get(wide)
    a, b = ((operand, op.kind) for operand in op.operands[1:3])

    if op.base in ("mul", "mad") and "lo" not in op:
        if double is None:  # the product of two 64-bit numbers needs 128 bits
            raise Unknown(f"{op.base}.hi of type .{op.kind}")

        def product(x: Array, y: Array, z: Array | None = None) -> Array:
            full = x.astype(double) * y.astype(double)
            if "hi" in op:
                full = (full >> double(bits)).astype(narrow)
            return full if z is None else full + z

        kind = op.kind if "hi" in op else wide
        rest = [(op.operands[3], kind)] if op.base == "mad" else []
        return elementwise(decoder, product, (op.operands[0], kind), a, b, *rest)

    def quotient(x: Array, y: Array) -> Array:
        if (np.atleast_1d(y) == 0).any():
            raise Fault("a division of integers by 0")
        down = x // y
        return down + ((down * y != x) & ((x < 0) != (y < 0))) if signed else down

    functions: dict[str, Callable[..., Array]] = {
        "add": np.add, "sub": np.subtract, "mul": np.multiply, "min": np.minimum, "max": np.maximum,
        "mad": lambda x, y, z: x * y + z, "div": quotient, "rem": lambda x, y: x - quotient(x, y) * y,
    }  # fmt: skip
    if op.base not in functions:
        raise Unknown(op.base)
    sources = [(operand, op.kind) for operand in op.operands[1:]]
    if op.base in ("div", "rem"):
        return _only_where_active(decoder, functions[op.base], (op.operands[0], op.kind), *sources)
    return elementwise(decoder, functions[op.base], (op.operands[0], op.kind), *sources)


def _only_where_active(
    decoder: "Decoder", function: Callable[..., Array], to: tuple[str, str], *sources: tuple[str, str]
) -> "Execute":
    """For what may not be done with the garbage of other lanes."""
    reads = [decoder.read(*source) for source in sources]
    write = decoder.write(*to)

    def execute(frame: "Frame", mask: "Mask") -> None:
        values = [np.broadcast_to(read(frame), frame.machine.lanes) for read in reads]
        if mask is None:
            write(frame, function(*values), mask)
            return
        result = np.zeros(frame.machine.lanes, DTYPES[to[1]])
        result[mask] = function(*(value[mask] for value in values))
        write(frame, result, mask)

    return execute


def _carrying(op: Op, decoder: "Decoder") -> "Execute":
    """Sums with the carry bit: add.cc, addc, sub.cc, subc, mad.cc, madc, of 32 bits."""
    op.allow("cc", "lo", "hi", kinds=("u32", "s32", "b32"))
    reads = [decoder.read(operand, "u32") for operand in op.operands[1:]]
    write = decoder.write(op.operands[0], "u32")
    takes, gives, subtracts = op.base.endswith("c"), "cc" in op, op.base.startswith("sub")
    shift, low = np.uint64(32), np.uint64(ALL_LANES)
    if op.kind == "s32" and "hi" in op:
        raise Unknown(f"{op.base}.hi of type .s32")

    def execute(frame: "Frame", mask: "Mask") -> None:
        x, y, *rest = (read(frame).astype(np.uint64) for read in reads)
        if rest:
            product = x * y
            x, y = (product >> shift if "hi" in op else product & low), rest[0]
        carry = frame.carry.astype(np.uint64) if takes else np.uint64(0)
        total = x - y - carry if subtracts else x + y + carry
        if gives:
            np.copyto(frame.carry, (total >> shift) != 0, where=True if mask is None else mask)
        write(frame, (total & low).astype(np.uint32), mask)

    return execute


SIGNS = {
    "f16": 1 << 15, "bf16": 1 << 15, "f16x2": 0x80008000, "bf16x2": 0x80008000,
    "f32": 1 << 31, "f64": 1 << 63,
}  # fmt: skip


@family("neg", "abs", "not", "popc", "clz", "copysign")
def _unary(op: Op, decoder: "Decoder") -> "Execute":
    op.allow("ftz")
    kind = op.kind
    sources = [(operand, kind) for operand in op.operands[1:]]
    to = op.operands[0], kind
    if op.base in ("popc", "clz"):
        bits = 8 * size_of(kind)

        def count(x: Array) -> Array:
            raw = np.atleast_1d(x)
            if op.base == "popc":
                return np.array([int(v).bit_count() for v in raw.tolist()], np.uint32)
            return np.array([bits - int(v).bit_length() for v in raw.tolist()], np.uint32)

        return elementwise(decoder, count, (op.operands[0], "u32"), *sources)
    if op.base == "copysign":  # PTX takes the sign from the first operand
        return elementwise(decoder, lambda sign, x: np.copysign(x, sign), to, *sources)
    if op.base == "not":
        return elementwise(decoder, np.invert, to, *sources)
    if kind in SIGNS:
        # Only the sign bit changes, so a NaN keeps its other bits.
        sign = UNSIGNED[size_of(kind)](SIGNS[kind])
        change = np.bitwise_xor if op.base == "neg" else lambda x, s: x & ~s
        ftz = "ftz" in op and kind == "f32"

        def signed(x: Array) -> Array:
            x = np.atleast_1d(x)
            x = np.ascontiguousarray(flushed(x) if ftz else x)
            return change(x.view(sign.dtype), sign).view(x.dtype)

        return elementwise(decoder, signed, to, *sources)
    if kind not in ("s16", "s32", "s64"):
        raise Unknown(f"{op.base} of type .{kind}")
    return elementwise(decoder, np.negative if op.base == "neg" else np.abs, to, *sources)


@family("rcp", "sqrt", "rsqrt", "sin", "cos", "lg2", "ex2", "tanh")
def _function(op: Op, decoder: "Decoder") -> "Execute":
    op.allow("approx", "rn", "ftz", kinds=("f32", "f64"))
    functions: dict[str, Callable[..., Array]] = {
        "rcp": lambda x: 1 / x, "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x), "sin": np.sin,
        "cos": np.cos, "lg2": np.log2, "ex2": np.exp2, "tanh": np.tanh,
    }  # fmt: skip
    function = functions[op.base]
    if "approx" in op:
        if op.kind == "f64":
            return _reciprocal64(op, decoder)
        return _approximate(op, decoder, function)
    if op.base not in ("rcp", "sqrt"):
        raise Unknown(f"{op.base} that is not approximate")

    def exact(x: Array) -> Array:
        x = np.atleast_1d(flushed(np.atleast_1d(x)) if "ftz" in op else x)
        y = canonical(function(x))  # correctly rounded by IEEE 754
        return flushed(y) if "ftz" in op else y

    return elementwise(decoder, exact, *((operand, op.kind) for operand in op.operands))


def _approximate(op: Op, decoder: "Decoder", function: Callable[..., Array]) -> "Execute":
    if op.kind != "f32":
        raise Unknown(f"an approximate {op.base} of type .{op.kind}")
    reads = [decoder.read(operand, op.kind) for operand in op.operands[1:]]
    write = decoder.write(op.operands[0], op.kind)
    ftz = "ftz" in op

    def execute(frame: "Frame", mask: "Mask") -> None:
        values = [np.atleast_1d(read(frame)) for read in reads]
        if ftz:
            values = [flushed(value) for value in values]
        y = canonical(approximation(op.base, function, values, frame.machine.seed))
        write(frame, flushed(y) if ftz else y, mask)

    return execute


def _reciprocal64(op: Op, decoder: "Decoder") -> "Execute":
    """rcp.approx.ftz.f64: of the upper words alone, to some 20 bits."""
    if op.base != "rcp" or "ftz" not in op:
        raise Unknown(f"{op.base}.approx of type .f64")
    upper = np.uint64(0xFFFFFFFF00000000)

    def gross(x: Array) -> Array:
        cut = (np.atleast_1d(x).view(np.uint64) & upper).view(np.float64)
        y = canonical(1 / flushed(cut))
        return flushed((y.view(np.uint64) & upper).view(np.float64))

    return elementwise(decoder, gross, *((operand, "f64") for operand in op.operands))


# ---- bits


@family("and", "or", "xor")
def _logic(op: Op, decoder: "Decoder") -> "Execute":
    op.allow(kinds=(*BITS, "pred"))
    functions = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
    return elementwise(decoder, functions[op.base], *((operand, op.kind) for operand in op.operands))


@family("shl", "shr")
def _shift(op: Op, decoder: "Decoder") -> "Execute":
    """By an amount of 32 bits; by more than there are bits, all of them leave."""
    op.allow(kinds=(*BITS, *INTEGERS))
    kind, bits = op.kind, 8 * size_of(op.kind)
    dtype = DTYPES[kind]

    def shift(x: Array, amount: Array) -> Array:
        most = np.minimum(amount, bits - 1).astype(dtype)
        if op.base == "shl":
            return np.where(amount >= bits, dtype(0), x << most)
        return x >> most if kind[0] == "s" else np.where(amount >= bits, dtype(0), x >> most)

    to, source = ((operand, kind) for operand in op.operands[:2])
    return elementwise(decoder, shift, to, source, (op.operands[2], "u32"))


@family("shf")
def _funnel_shift(op: Op, decoder: "Decoder") -> "Execute":
    op.allow("l", "r", "wrap", "clamp", kinds=("b32",))

    def shift(low: Array, high: Array, amount: Array) -> Array:
        n = amount & 31 if "wrap" in op else np.minimum(amount, 32)
        both = high.astype(np.uint64) << np.uint64(32) | low
        n = n.astype(np.uint64)
        shifted = both << n >> np.uint64(32) if "l" in op else both >> n
        return (shifted & np.uint64(0xFFFFFFFF)).astype(np.uint32)

    return elementwise(decoder, shift, *((operand, "u32") for operand in op.operands))


@family("bfe")
def _bit_field(op: Op, decoder: "Decoder") -> "Execute":
    op.allow(kinds=("u32", "s32"))

    def extract(x: Array, position: Array, length: Array) -> Array:
        position, length = (position & 0xFF).astype(np.int64), (length & 0xFF).astype(np.int64)
        field = x.astype(np.int64) >> np.minimum(position, 32)  # an s32 is sign-extended
        if op.kind == "u32":
            return (field & (np.int64(1) << np.minimum(length, 32)) - 1).astype(np.uint32)
        unused = 64 - np.minimum(length, 32)
        return np.where(length == 0, 0, field << unused >> unused).astype(np.int32)

    (to, source), (position, length) = op.operands[:2], op.operands[2:]
    return elementwise(decoder, extract, (to, op.kind), (source, op.kind), (position, "u32"), (length, "u32"))


@family("prmt")
def _permute(op: Op, decoder: "Decoder") -> "Execute":
    """Of eight bytes, any four; a selector's fourth bit asks for copies of the sign."""
    op.allow(kinds=("b32",))

    def permute(a: Array, b: Array, selectors: Array) -> Array:
        both = b.astype(np.uint64) << np.uint64(32) | a
        result = np.zeros((), np.uint64)
        for i in range(4):
            selector = selectors.astype(np.uint64) >> np.uint64(4 * i)
            byte = both >> ((selector & np.uint64(7)) << np.uint64(3)) & np.uint64(255)
            sign = (byte >> np.uint64(7)) * np.uint64(255)
            byte = np.where(selector & np.uint64(8), sign, byte)
            result = result | byte << np.uint64(8 * i)
        return result.astype(np.uint32)

    return elementwise(decoder, permute, *((operand, "b32") for operand in op.operands))


# ---- moves, choices, comparisons


@family("mov")
def _move(op: Op, decoder: "Decoder") -> "Execute":
    op.allow()
    to, source = op.operands
    if to.startswith("{"):
        return _unpack(op, decoder)
    if source.startswith("{"):
        return _pack(op, decoder)
    return elementwise(decoder, lambda x: x, (to, op.kind), (source, op.kind))


def _parts(operand: str) -> list[str]:
    return [part.strip() for part in operand.strip("{} ").split(",")]


def _unpack(op: Op, decoder: "Decoder") -> "Execute":
    names = _parts(op.operands[0])
    bits = 8 * size_of(op.kind) // len(names)
    read = decoder.read(op.operands[1], op.kind)
    writes = [decoder.write(name, f"b{bits}") for name in names]

    def execute(frame: "Frame", mask: "Mask") -> None:
        value = np.array(read(frame))  # a copy: a write may overwrite the register it was read from
        for i, write in enumerate(writes):
            write(frame, (value >> value.dtype.type(bits * i)).astype(DTYPES[f"b{bits}"]), mask)

    return execute


def _pack(op: Op, decoder: "Decoder") -> "Execute":
    names = _parts(op.operands[1])
    bits = 8 * size_of(op.kind) // len(names)
    dtype = DTYPES[op.kind]

    def pack(*parts: Array) -> Array:
        value = dtype(0)
        for i, part in enumerate(parts):
            value = value | part.astype(dtype) << dtype(bits * i)
        return value

    return elementwise(decoder, pack, (op.operands[0], op.kind), *((name, f"b{bits}") for name in names))


@family("cvta")
def _convert_address(op: Op, decoder: "Decoder") -> "Execute":
    """Between a state space's addresses and generic ones; those of global memory are the same."""
    from ptx.machine import LOCAL_WINDOW, SHARED_WINDOW

    op.allow("to", "global", "shared", "local", kinds=("u64",))
    window = np.uint64(LOCAL_WINDOW if "local" in op else SHARED_WINDOW if "shared" in op else 0)
    change = (lambda x: x & ~window) if "to" in op else (lambda x: x | window)
    return elementwise(decoder, change, *((operand, "u64") for operand in op.operands))


@family("selp")
def _select(op: Op, decoder: "Decoder") -> "Execute":
    op.allow()
    to, *values = ((operand, op.kind) for operand in op.operands[:3])
    return elementwise(decoder, lambda a, b, p: np.where(p, a, b), to, *values, (op.operands[3], "pred"))


COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


@family("setp")
def _compare(op: Op, decoder: "Decoder") -> "Execute":
    how, *modifiers = op.modifiers
    combine = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
    joins = [combine[m] for m in modifiers if m in combine]
    unknown = [m for m in modifiers if m not in combine and m != "ftz"]
    if unknown:
        raise Unknown(f"modifier .{unknown[0]} of setp")
    compare = _comparison(how, op.kind, "ftz" in modifiers)
    reads = [decoder.read(operand, op.kind) for operand in op.operands[1:3]]
    third = decoder.read(op.operands[3], "pred") if joins else None
    writes = [decoder.write(name, "pred") for name in op.operands[0].split("|")]

    def execute(frame: "Frame", mask: "Mask") -> None:
        result = compare(*(read(frame) for read in reads))
        for write, value in zip(writes, (result, ~result), strict=False):
            write(frame, value if third is None else joins[0](value, third(frame)), mask)

    return execute


def _comparison(how: str, kind: str, ftz: bool) -> Callable[[Array, Array], Array]:
    """Ordered ones are false where an operand is NaN; those with a "u" after them are true there."""
    floating = kind in ("f32", "f64")
    if how in ("num", "nan") and floating:
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (how == "nan")
    unordered = floating and how[-1] == "u" and how[:-1] in COMPARISONS
    name = how[:-1] if unordered else how
    if name not in COMPARISONS or (kind[0] == "b" and name not in ("eq", "ne")):
        raise Unknown(f"setp.{how} of type .{kind}")
    function = COMPARISONS[name]

    def compare(a: Array, b: Array) -> Array:
        if ftz:
            a, b = flushed(np.atleast_1d(a)), flushed(np.atleast_1d(b))
        result = function(a, b)
        if not floating:
            return result
        nan = np.isnan(a) | np.isnan(b)
        return result | nan if unordered else result & ~nan

    return compare


# ---- conversions


@family("cvt")
def _convert(op: Op, decoder: "Decoder") -> "Execute":
    source = op.kind
    to, *modifiers = reversed(op.modifiers)
    unknown = [m for m in modifiers if m not in ("rn", "rzi", "rni", "ftz", "rz", "rs")]
    if to not in DTYPES or unknown:
        raise Unknown(f"cvt.{'.'.join(op.modifiers)}.{source}")
    operands = [(operand, source) for operand in op.operands[1:]]
    if to in ("bf16x2", "f16x2"):
        return _convert_pair(op, decoder, to, modifiers, operands)
    function = _conversion(to, source, modifiers)
    target = _register_kind(decoder, op.operands[0], to)
    origin = _register_kind(decoder, op.operands[1], source)
    read, write = decoder.read(op.operands[1], origin), decoder.write(op.operands[0], target)

    def execute(frame: "Frame", mask: "Mask") -> None:
        x = (
            np.atleast_1d(read(frame)).astype(UNSIGNED_OF[origin], copy=False)
            if origin != source
            else read(frame)
        )
        if origin != source:  # the register is wider than the type: take its low bits
            x = x.astype(UNSIGNED[size_of(source)]).view(DTYPES[source])
        y = function(np.atleast_1d(x))
        if target != to:  # the target register is wider: extend with the sign or zeros
            y = y.astype(DTYPES[f"{to[0]}{8 * size_of(target)}"]).view(DTYPES[target])
        write(frame, y, mask)

    return execute


UNSIGNED_OF = {kind: UNSIGNED[size_of(kind)] for kind in DTYPES if kind not in ("pred", "f32x2")}


def _register_kind(decoder: "Decoder", operand: str, kind: str) -> str:
    """The type, or, of integers in a wider register, that of the register."""
    declared = decoder.function.registers.get(operand)
    if declared is None or size_of(declared) == size_of(kind):
        return kind
    if size_of(declared) < size_of(kind) or kind[0] == "f":
        raise Unknown(f"register {operand} of type .{declared} as .{kind}")
    return f"b{8 * size_of(declared)}"


def _convert_pair(
    op: Op, decoder: "Decoder", to: str, modifiers: list[str], operands: list[tuple[str, str]]
) -> "Execute":
    """Two float32 into a word: the first operand into its upper half."""
    if op.kind != "f32" or modifiers not in (["rn"], ["rs"]) or (modifiers == ["rs"] and to != "bf16x2"):
        raise Unknown(f"cvt.{'.'.join(op.modifiers)}.{op.kind}")

    def half(x: Array) -> Array:
        if to == "bf16x2":
            return to_bfloat16(np.atleast_1d(x))
        return canonical(np.atleast_1d(x).astype(np.float16)).view(np.uint16)

    if modifiers == ["rs"]:
        raise Unknown("cvt.rs: how its random bits are laid out is not known here")
    return elementwise(
        decoder,
        lambda high, low: half(high).astype(np.uint32) << np.uint32(16) | half(low),
        (op.operands[0], "b32"),
        *operands,
    )


def _conversion(to: str, source: str, modifiers: list[str]) -> Callable[[Array], Array]:
    dtype = DTYPES[to]
    from_float, to_float = source in ("f16", "f32", "f64"), to in ("f16", "f32", "f64")
    if source == "bf16" and to == "f32":
        return lambda x: (x.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if to == "bf16" and source == "f32" and modifiers == ["rn"]:
        return to_bfloat16
    if "bf16" in (to, source):
        raise Unknown(f"cvt.{to}.{source}")
    if from_float and to_float:
        if "rni" in modifiers and to == source:
            return lambda x: canonical(np.rint(x))
        if size_of(to) < size_of(source) and "rn" not in modifiers:
            raise Unknown(f"cvt.{to}.{source} without .rn")
        ftz = "ftz" in modifiers and "f32" in (to, source)

        def between(x: Array) -> Array:
            x = flushed(x) if ftz and source == "f32" else x
            y = canonical(x.astype(dtype))
            return flushed(y) if ftz and to == "f32" else y

        return between
    if from_float:
        if "rzi" not in modifiers and "rni" not in modifiers:
            raise Unknown(f"cvt.{to}.{source} without .rzi or .rni")
        return _to_integer(to, np.trunc if "rzi" in modifiers else np.rint)
    if to_float:
        if "rn" not in modifiers:
            raise Unknown(f"cvt.{to}.{source} without .rn")
        return lambda x: x.astype(dtype)
    return lambda x: x.astype(dtype)  # integers: extended with the source's sign, or cut off


def _to_integer(to: str, rounded: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """Saturated; NaN becomes 0, of 64 bits the sign bit alone."""
    info = np.iinfo(DTYPES[to])
    nan = 0 if info.bits < 64 else 1 << 63

    def convert(x: Array) -> Array:
        y = rounded(x.astype(np.float64))
        high, low = y >= 2.0 ** (info.bits - (info.min < 0)), y < float(info.min)
        inside = np.where(high | low | np.isnan(y), 0, y).astype(DTYPES[to])
        bits = np.select([high, low], [DTYPES[to](info.max), DTYPES[to](info.min)], inside)
        return np.where(np.isnan(y), np.array(nan, np.uint64).astype(DTYPES[to]), bits)

    return convert


# ---- memory


@family("ld")
def _load(op: Op, decoder: "Decoder") -> "Execute":
    op.allow("global", "shared", "local", "param", "nc", "v2", "v4", *CACHE_HINTS)
    width = size_of(op.kind)
    names = _parts(op.operands[0])
    raw = f"b{8 * width}"
    writes = [_wide_write(decoder, name, op.kind) for name in names]
    _check_vector(op, names)
    if "param" in op:
        return _load_param(op, decoder, writes, width)
    address = decoder.address(op.operands[1])
    access = _accessor(op)

    def execute(frame: "Frame", mask: "Mask") -> None:
        lanes = np.arange(frame.machine.lanes) if mask is None else np.flatnonzero(mask)
        at = _each(address(frame), lanes, frame.machine.lanes, len(names), width)
        found = access(frame, at, width, lanes, None)
        assert found is not None
        for i, write in enumerate(writes):
            whole = np.zeros(frame.machine.lanes, DTYPES[raw])
            whole[lanes] = found[:, i]
            write(frame, whole, mask)

    return execute


CACHE_HINTS = (
    "ca", "cg", "cs", "cv", "lu", "wb", "wt", "L1::evict_first", "L1::evict_last", "L1::no_allocate",
    "L2::cache_hint", "relaxed", "weak",
)  # fmt: skip


def _check_vector(op: Op, names: list[str]) -> None:
    wanted = 2 if "v2" in op else 4 if "v4" in op else 1
    if len(names) != wanted:
        raise Unknown(f"{len(names)} registers of {op.base}.{'.'.join(op.modifiers)}")


def _wide_write(decoder: "Decoder", name: str, kind: str) -> Callable[["Frame", Array, "Mask"], None]:
    """Into a register that may be wider than what is loaded: with its sign, or zeros."""
    declared = decoder.function.registers.get(name)
    if name == "_" or declared is None or size_of(declared) == size_of(kind):
        return decoder.write(name, f"b{8 * size_of(kind)}")
    register = f"b{8 * size_of(declared)}"
    write = decoder.write(name, register)
    wide = DTYPES[("s" if kind[0] == "s" else "u") + register[1:]]

    def put(frame: "Frame", value: Array, mask: "Mask") -> None:
        write(frame, value.view(DTYPES[kind]).astype(wide).view(DTYPES[register]), mask)

    return put


def _wide_read(decoder: "Decoder", name: str, kind: str) -> Callable[["Frame"], Array]:
    """Out of a register that may be wider than what is stored: its low bits."""
    declared = decoder.function.registers.get(name)
    if declared is None or size_of(declared) == size_of(kind):
        return decoder.read(name, f"b{8 * size_of(kind)}")
    read = decoder.read(name, f"b{8 * size_of(declared)}")
    return lambda frame: read(frame).astype(UNSIGNED[size_of(kind)])


def _each(address: Array, lanes: Array, count: int, vector: int, width: int) -> Array:
    """The addresses of all elements of a vector, [lanes, vector]; the vector has to be aligned as a whole."""
    start = np.broadcast_to(address, count)[lanes]
    if (start % (vector * width)).any():
        raise Fault(f"an access of {vector * width} bytes at an address that is no multiple of it")
    return start[:, None] + np.arange(vector) * width


def _accessor(op: Op) -> Callable[..., Array | None]:
    """Loads where `value` is None, else stores: (frame, addresses, width, lanes, value)."""
    for space, function in (("global", _global), ("shared", _shared), ("local", _local)):
        if space in op:
            return function
    return _generic


def _global(frame: "Frame", at: Array, width: int, lanes: Array, value: Array | None) -> Array | None:
    machine = frame.machine
    at = at.astype(np.uint64)
    if value is None:
        return machine.memory.load(at, width, machine.who(lanes))
    machine.memory.store(at, value, width, machine.who(lanes))
    return None


def _shared(frame: "Frame", at: Array, width: int, lanes: Array, value: Array | None) -> Array | None:
    machine = frame.machine
    who: Lanes = machine.who(lanes)
    if value is None:
        return machine.shared.load(at, width, who, machine.row[lanes])
    machine.shared.store(at, value, width, who, machine.row[lanes])
    return None


def _local(frame: "Frame", at: Array, width: int, lanes: Array, value: Array | None) -> Array | None:
    memory = frame.machine.local
    if value is None:
        return np.stack([memory.load(at[:, i], width, lanes) for i in range(at.shape[1])], 1)
    for i in range(at.shape[1]):
        memory.store(at[:, i], value[:, i], width, lanes)
    return None


def _generic(frame: "Frame", at: Array, width: int, lanes: Array, value: Array | None) -> Array | None:
    """By the window that each address lies in."""
    from ptx.machine import LOCAL_WINDOW, SHARED_WINDOW

    result = None if value is not None else np.zeros(at.shape, UNSIGNED[width])
    local, shared = at[:, 0] >= LOCAL_WINDOW, at[:, 0] >= SHARED_WINDOW
    for which, access, window in (
        (local, _local, LOCAL_WINDOW),
        (shared & ~local, _shared, SHARED_WINDOW),
        (~shared, _global, 0),
    ):
        if which.any():
            part = access(
                frame, at[which] - window, width, lanes[which], None if value is None else value[which]
            )
            if result is not None:
                result[which] = part
    return result


@family("st")
def _store(op: Op, decoder: "Decoder") -> "Execute":
    op.allow("global", "shared", "local", "param", "v2", "v4", *CACHE_HINTS)
    width = size_of(op.kind)
    names = _parts(op.operands[1])
    reads = [_wide_read(decoder, name, op.kind) for name in names]
    _check_vector(op, names)
    if "param" in op:
        return _store_param(op, reads, width)
    address = decoder.address(op.operands[0])
    access = _accessor(op)

    def execute(frame: "Frame", mask: "Mask") -> None:
        count = frame.machine.lanes
        lanes = np.arange(count) if mask is None else np.flatnonzero(mask)
        at = _each(address(frame), lanes, count, len(names), width)
        value = np.stack([np.broadcast_to(read(frame), count)[lanes] for read in reads], 1)
        access(frame, at, width, lanes, value)

    return execute


def _param_place(operand: str) -> tuple[str, int]:
    name, _, offset = operand.strip("[] ").partition("+")
    return name.strip(), int(offset or 0)


def _load_param(op: Op, decoder: "Decoder", writes: list[Any], width: int) -> "Execute":
    name, offset = _param_place(op.operands[1])
    end = offset + width * len(writes)

    def execute(frame: "Frame", mask: "Mask") -> None:
        found = frame.params.get(name)
        if found is None or end > found.shape[1]:
            raise Fault(f"a read of parameter {name} at {offset}: there is none")
        for i, write in enumerate(writes):
            start = offset + i * width
            value = np.ascontiguousarray(found[:, start : start + width]).view(UNSIGNED[width])[:, 0]
            write(frame, value, mask)

    return execute


def _store_param(op: Op, reads: list[Any], width: int) -> "Execute":
    name, offset = _param_place(op.operands[0])

    def execute(frame: "Frame", mask: "Mask") -> None:
        where = frame.param(name, offset + width * len(reads))
        if offset + width * len(reads) > where.shape[1]:  # a structure that is stored in parts
            grown = np.zeros((frame.machine.lanes, offset + width * len(reads)), np.uint8)
            grown[:, : where.shape[1]] = where
            frame.params[name] = where = grown
        lanes = slice(None) if mask is None else mask
        for i, read in enumerate(reads):
            value = np.ascontiguousarray(np.broadcast_to(read(frame), frame.machine.lanes))
            start = offset + i * width
            where[lanes, start : start + width] = value.view(np.uint8).reshape(-1, width)[lanes]

    return execute


@family("ldmatrix", "stmatrix")
def _matrix(op: Op, decoder: "Decoder") -> "Execute":
    """8 x 8 matrices of 16 bits. Thread 8 i + r of a warp gives the address of matrix i's row r; thread t has
    the elements 2 (t % 4) and the next of row t / 4 or, transposed, of column t / 4."""
    op.allow("sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", kinds=("b16",))
    load = op.base == "ldmatrix"
    registers, address_operand = op.operands if load else reversed(op.operands)
    names = _parts(registers)
    if f"x{len(names)}" not in op:
        raise Unknown(f"{len(names)} registers of {op.base}")
    address = decoder.address(address_operand)
    access = [(decoder.write if load else decoder.read)(name, "b32") for name in names]
    lane = np.arange(WARP)

    def execute(frame: "Frame", mask: "Mask") -> None:
        machine = frame.machine
        lanes = _whole_warps(frame, mask)
        rows = np.broadcast_to(address(frame), machine.lanes)[lanes].reshape(-1, WARP)
        if (rows[:, : 8 * len(names)] % 16).any():
            raise Fault(f"{op.base}: a row that is not aligned to 16 bytes")
        for i, each in enumerate(access):
            if "trans" in op:
                first = rows[:, 8 * i + 2 * (lane % 4)], rows[:, 8 * i + 2 * (lane % 4) + 1]
                at = np.stack([row + 2 * (lane // 4) for row in first], -1)
                width = 2
            else:
                at = (rows[:, 8 * i + lane // 4] + 4 * (lane % 4))[..., None]
                width = 4
            at = at.reshape(len(lanes), -1)
            if load:
                found = _shared(frame, at, width, lanes, None)
                assert found is not None
                word = np.ascontiguousarray(found).view(np.uint32)[:, 0]
                whole = np.zeros(machine.lanes, np.uint32)
                whole[lanes] = word
                each(frame, whole, mask)
            else:
                word = np.ascontiguousarray(each(frame)[lanes])
                _shared(frame, at, width, lanes, word[:, None].view(UNSIGNED[width]))

    return execute


def _whole_warps(frame: "Frame", mask: "Mask") -> Array:
    """The active lanes, of warps that are here as a whole."""
    if mask is None:
        return np.arange(frame.machine.lanes)
    warps = mask.reshape(-1, WARP)
    if (warps.any(1) != warps.all(1)).any():
        raise Fault("only a part of a warp is here")
    return np.flatnonzero(mask)


# ---- between threads


@family("bar", "barrier")
def _barrier(op: Op, decoder: "Decoder") -> "Execute":
    op.allow("sync", "cta", "aligned")
    if op.operands not in (("0",), ("0;",)):
        raise Unknown(f"barrier {', '.join(op.operands)}")
    return lambda frame, mask: frame.machine.barrier(mask)


def _members(frame: "Frame", mask: "Mask", named: Array) -> Array:
    """Which lanes take part, [warps, 32]: those that are active, and each of them names just these."""
    active = np.ones(frame.machine.lanes, bool) if mask is None else mask
    active = active.reshape(-1, WARP)
    named = np.broadcast_to(named, frame.machine.lanes).reshape(-1, WARP).astype(np.int64)
    bits = (active.astype(np.int64) << np.arange(WARP)).sum(1)
    if (active & (named != bits[:, None])).any():
        raise Fault("a shuffle or reduction names lanes that are not here, or leaves some out")
    return active


@family("shfl")
def _shuffle(op: Op, decoder: "Decoder") -> "Execute":
    op.allow("sync", "up", "down", "bfly", "idx", kinds=("b32",))
    value, distance, clamp, members = (decoder.read(operand, "u32") for operand in op.operands[1:])
    names = op.operands[0].split("|")
    write = decoder.write(names[0], "b32")
    write_valid = decoder.write(names[1], "pred") if len(names) > 1 else None
    lane = np.arange(WARP)

    def execute(frame: "Frame", mask: "Mask") -> None:
        count = frame.machine.lanes
        active = _members(frame, mask, members(frame))
        x, b, c = (
            np.broadcast_to(read(frame), count).reshape(-1, WARP).astype(np.int64)
            for read in (value, distance, clamp)
        )
        b, segment, bound = b & 31, c >> 8 & 31, c & 31
        last, first = (lane & segment) | (bound & ~segment), lane & segment
        if "up" in op:
            source = lane - b
            valid = source >= last
        else:
            source = {
                "down": lambda: lane + b,
                "bfly": lambda: lane ^ b,
                "idx": lambda: first | (b & ~segment),
            }[next(m for m in op.modifiers if m in ("down", "bfly", "idx"))]()
            valid = source <= last
        source = np.where(valid, source, lane)
        if not np.take_along_axis(active, source, 1)[active].all():
            raise Fault("a shuffle reads a lane that is not here")
        result = np.take_along_axis(x, source, 1).astype(np.uint32).reshape(-1)
        write(frame, result, mask)
        if write_valid is not None:
            write_valid(frame, valid.reshape(-1), mask)

    return execute


@family("redux")
def _reduce(op: Op, decoder: "Decoder") -> "Execute":
    op.allow("sync", "add", kinds=("s32", "u32"))
    value, members = decoder.read(op.operands[1], op.kind), decoder.read(op.operands[2], "u32")
    write = decoder.write(op.operands[0], op.kind)

    def execute(frame: "Frame", mask: "Mask") -> None:
        count = frame.machine.lanes
        active = _members(frame, mask, members(frame))
        x = np.broadcast_to(value(frame), count).reshape(-1, WARP).astype(np.int64)
        total = np.where(active, x, 0).sum(1)
        write(frame, np.repeat(total, WARP).astype(DTYPES[op.kind]), mask)

    return execute
