"""Expressions that PTX computes in floating point, to compare the arithmetic of a kernel's paths.

An expression is a tree of instructions. Its leaves are values that are loaded, converted from integers or
carried around a loop. All leaves look the same ("x"), because register numbers and the order of loads differ
between paths.
"""

import re
from typing import NamedTuple

# The instructions that round. Moves, selections, comparisons and conversions do not.
ARITHMETIC = {"add", "sub", "mul", "fma", "mad", "div", "rcp", "sqrt"}
ARITHMETIC |= {"lg2", "ex2", "sin", "cos", "tanh", "max", "min"}
LEAF = "x"
_INSTRUCTION = re.compile(r"^(?:@!?%p\d+\s+)?([a-z][\w.:]*)\s+(.+)$")


class Instruction(NamedTuple):
    name: str
    to: str
    operands: tuple[str, ...]

    @property
    def kind(self) -> str:
        return self.name.partition(".")[0]

    @property
    def is_float(self) -> bool:
        return re.search(r"\.f(32|64|32x2)\b", self.name) is not None


def instructions(ptx: str) -> list[Instruction]:
    """All instructions that write one register. Those of inline assembly, in braces, come one by one."""
    found = []
    for line in re.sub(r"//.*", "", ptx).splitlines():
        for part in line.strip().strip("{}").split(";"):
            if match := _INSTRUCTION.match(part.strip()):
                to, *operands = (operand.strip() for operand in match.group(2).split(","))
                if to.startswith("%"):
                    found.append(Instruction(match.group(1), to, tuple(operands)))
    return found


def unfused(ptx: str) -> list[Instruction]:
    """Additions and multiplications that ptxas may fuse, because they have no explicit rounding (".rn")."""
    kinds = ("add", "sub", "mul", "mad")
    return [i for i in instructions(ptx) if i.is_float and i.kind in kinds and ".rn" not in i.name]


def expressions(ptx: str) -> set[str]:
    """The expressions of all instructions that compute, except additions: the sums over elements are
    additions, and their number of terms per thread depends on the path.

    A selection is the set of its alternatives, without zeros, which come from masks and closed gates. A
    normal (radius times sine or cosine) has an expression itself but is a leaf in others, because some paths
    pass it from thread to thread.
    """
    writes: dict[str, list[Instruction]] = {}
    for instruction in instructions(ptx):
        writes.setdefault(instruction.to, []).append(instruction)
    known: dict[str, frozenset[str]] = {}

    def of(operand: str) -> frozenset[str]:
        """The possible expressions of a register or a number."""
        if not operand.startswith("%"):
            return frozenset() if re.fullmatch(r"0|0x0+|0f0+", operand) else frozenset({operand})
        if operand not in known:
            known[operand] = frozenset({LEAF})  # what a loop carries
            defined = writes.get(operand, [])
            if len(defined) == 1:
                known[operand] = frozenset(LEAF if is_normal(e) else e for e in of_instruction(defined[0]))
        return known[operand]

    def of_instruction(instruction: Instruction) -> frozenset[str]:
        kind, operands = instruction.kind, instruction.operands
        if kind == "selp":
            return of(operands[0]) | of(operands[1])
        if kind == "mov" and len(operands) == 1 and not operands[0].startswith("{"):
            return of(operands[0]) or frozenset({LEAF})  # the zero of a masked load
        if not instruction.is_float or kind not in ARITHMETIC | {"neg", "abs"}:
            return frozenset({LEAF})
        if kind == "neg":  # a negation may come before or after a selection
            return frozenset(map(negative, of(operands[0])))
        if kind == "mul":  # a selection's sine and cosine, each multiplied by the same
            first, second = operands  # pyright: ignore[reportAssignmentType]
            for one, other in ((first, second), (second, first)):
                if len(of(one)) == 2 and all(re.match("cos|sin", e) for e in of(one)):
                    return frozenset(joined(instruction, [frozenset({e}), of(other)]) for e in of(one))
        return frozenset({joined(instruction, [of(operand) for operand in operands])})

    return {
        expression
        for defined in writes.values()
        for instruction in defined
        if instruction.is_float and instruction.kind in ARITHMETIC - {"add"}
        for expression in of_instruction(instruction)
    }


def joined(instruction: Instruction, operands: list[frozenset[str]]) -> str:
    texts = [" | ".join(sorted(operand)) or "0" for operand in operands]
    if instruction.kind in ("mul", "add", "fma"):  # the first two are interchangeable
        texts[:2] = sorted(texts[:2])
    return f"{instruction.name}({', '.join(texts)})"


def negative(expression: str) -> str:
    if match := re.fullmatch(r"0f([0-9A-F]{8})", expression):
        return f"0f{int(match.group(1), 16) ^ 0x80000000:08X}"
    return f"neg({expression})"


def is_normal(expression: str) -> bool:
    return re.match(r"mul[.\w]*\((cos|sin)\.", expression) is not None
