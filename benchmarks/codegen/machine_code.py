"""Parses a disassembler's output, and defines the report on a kernel."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton


@dataclass(frozen=True)
class Report:
    """One kernel's machine code.

    Registers, stack and spills are those of the whole kernel. Access widths (in bits, with counts),
    `full_path_spills` and instructions per element are those of the path for full, aligned chunks. For AMD's
    architectures, registers are vector registers, the stack is scratch memory, and spills count registers of
    both kinds."""

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
        """The number of global accesses by width in bits."""
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
        """The number of instructions that access the stack."""
        return self.count("LDL", "STL")

    def loop(self) -> int:
        """The number of instructions in the longest loop: from a backward branch's target to the branch."""
        start, end = self.loop_span()
        return sum(start <= address <= end for address, _ in self.instructions)

    def loop_span(self) -> tuple[int, int]:
        """The addresses of the loop's first and last instruction; without a loop, an empty range."""
        longest = (1, 0)
        for address, text in self.instructions:
            branch = re.search(r"\bBRA\b.*0x([0-9a-f]+)\s*$", text)
            if branch and int(branch.group(1), 16) < address:
                longest = max(
                    longest, (int(branch.group(1), 16), address), key=lambda span: span[1] - span[0]
                )
        return longest


def disassemble(cubin: bytes) -> Sass:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        code, usage = (cuobjdump(option, file.name) for option in ("-sass", "-res-usage"))
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()  # type: ignore[union-attr]
    return Sass(instructions_of(code), int(registers), int(stack))


def instructions_of(code: str) -> list[tuple[int, str]]:
    """The instructions in cuobjdump's output, without padding (NOP)."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(\S.*?);", code)
    return [(int(address, 16), text.strip()) for address, text in found if not text.startswith("NOP")]


def cuobjdump(option: str, path: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    result = subprocess.run([str(tool), option, path], capture_output=True, text=True, check=True)
    return result.stdout + result.stderr
