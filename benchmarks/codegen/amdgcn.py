"""Reads the assembly that Triton's AMD backend generates for the kernels, for `benchmarks.codegen`."""

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

# How assembly of either generation names the width of an access: global_load_dwordx4, buffer_load_b128.
WIDTHS = {"ubyte": 8, "sbyte": 8, "byte": 8, "ushort": 16, "sshort": 16, "short": 16, "dword": 32}
WIDTHS |= {f"dwordx{count}": 32 * count for count in (2, 3, 4)}


@dataclass(frozen=True)
class Amdgcn:
    """A kernel's assembly. Its resources are read from the metadata at its end.

    Attributes:
        text: the assembly.
        code_bytes: the size of the linked code object; 0 if nothing was assembled.
    """

    text: str
    code_bytes: int

    @cached_property
    def instructions(self) -> list[str]:
        return re.findall(r"^\t([a-z]\w*\b[^\n;]*)", self.text, re.MULTILINE)

    def _resource(self, name: str) -> int:
        found = re.search(rf"^ +(?:- )?\.{name}: +(\d+)$", self.text, re.MULTILINE)
        if found is None:
            raise ValueError(f"the assembly's metadata have no {name}")
        return int(found.group(1))

    @property
    def registers(self) -> int:
        """Vector registers per thread."""
        return self._resource("vgpr_count")

    @property
    def scalar_registers(self) -> int:
        """Scalar registers per wave."""
        return self._resource("sgpr_count")

    @property
    def stack_bytes(self) -> int:
        """Scratch memory per thread."""
        return self._resource("private_segment_fixed_size")

    @property
    def spills(self) -> int:
        """Spilled registers of both kinds; a scalar one is spilled to a lane of a vector register."""
        return self._resource("vgpr_spill_count") + self._resource("sgpr_spill_count")

    def _widths(self, operation: str) -> dict[int, int]:
        pattern = rf"(?:global|buffer|flat)_{operation}_(\w+)"
        names = [match.group(1) for text in self.instructions if (match := re.match(pattern, text))]
        counts = Counter(_bits_of(name) for name in names)
        return dict(sorted(counts.items()))

    @property
    def loads(self) -> dict[int, int]:
        """The number of loads from global memory by width in bits, without scalar loads."""
        return self._widths("load")

    @property
    def stores(self) -> dict[int, int]:
        return self._widths("store")


def _bits_of(name: str) -> int:
    """The width of "dwordx4", "b128", "u16", "d16_b16", "short_d16_hi", "ushort", ..."""
    for part in name.split("_"):
        if part in WIDTHS:
            return WIDTHS[part]
        if match := re.fullmatch(r"[biu](\d+)", part):
            return int(match.group(1))
    raise ValueError(f"an access of unknown width: {name}")
