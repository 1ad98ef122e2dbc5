"""What instructions leave of a GPU's memory speed: the counting, and the kernels' own bounds."""

import pytest
import torch

from benchmarks.codegen import bound
from benchmarks.codegen import compiled as codegen

H200 = next(gpu for gpu in bound.GPUS if gpu.name == "H200")
B200 = next(gpu for gpu in bound.GPUS if gpu.name == "B200")
LINES = [
    "LDC R1, c[0x0][0x28]",
    "FFMA R4, R5, R6, R7",  # the loop: from 0x10 to 0x40
    "@!P0 LOP3.LUT R8, R9, R10, R11, 0x96, !PT",
    "FFMA2 R4, R6, R8, R10",
    "@P0 BRA 0x10",
    "EXIT",
]


def test_executed_instructions() -> None:
    """Those of the loop as often as it turns; two operations in one instruction are one to the schedulers."""
    sass = codegen.Sass([(16 * i, line) for i, line in enumerate(LINES)], registers=9, stack_bytes=0)
    assert sass.loop_span() == (0x10, 0x40)
    counts = bound.executed(sass, blocks=4, elements=8)
    assert counts == {"LSU": 1 / 8, "FMA": 12 / 8, "ALU": 4 / 8, "other": 5 / 8, "issued": 18 / 8}
    strange = codegen.Sass([(0, "FROB R1, R2")], registers=9, stack_bytes=0)
    with pytest.raises(KeyError, match="FROB"):
        bound.executed(strange, 1, 1)


def test_the_worst_pipe_decides() -> None:
    """H200: 132 multiprocessors at 1.98 GHz are 261.36 billion clocks a second."""
    clocks = 261.36e9
    seconds, pipe = bound.seconds_of_instructions(
        H200, {"issued": 64, "ALU": 32, "MUFU": 4, "FMA": 10, "IMAD": 6}
    )
    assert (seconds * clocks, pipe) == (pytest.approx(0.5), "issue")
    seconds, pipe = bound.seconds_of_instructions(H200, {"issued": 64, "MUFU": 16})
    assert (seconds * clocks, pipe) == (pytest.approx(1.0), "MUFU")
    # 28 bytes at 4.8 TB/s are 5.83 ps; half a clock of each multiprocessor is 1.91 ps.
    times, _ = bound.ratio(H200, {"issued": 64}, 28)
    assert times == pytest.approx(28 / 4.8e12 / (0.5 / clocks))


def test_bytes() -> None:
    of = {
        key: bound.bytes_of(codegen.launch_key(*key))
        for key in [("pats",), ("pats_adamw",), ("moments_adamw",)]
    }
    assert list(of.values()) == [28, 44, 28]
    assert bound.bytes_of(codegen.launch_key("pats", torch.bfloat16, torch.bfloat16)) == 14
    assert bound.bytes_of(codegen.launch_key("pats_adamw", torch.bfloat16, torch.float32)) == 38


@pytest.mark.parametrize(
    ("gpu", "dtype", "least"),
    [
        (H200, torch.float32, 4.0),
        (H200, torch.bfloat16, 1.5),
        (B200, torch.float32, 2.5),
        (B200, torch.bfloat16, 1.0),
    ],
    ids=str,
)
def test_memory_is_the_limit(gpu: bound.Gpu, dtype: torch.dtype, least: float) -> None:
    """Of PATS in one pass: what was reached, rounded down, so that a kernel that grows shows."""
    key = codegen.launch_key("pats", dtype, dtype)
    times, _ = bound.ratio(gpu, bound.counted(key, gpu.arch), bound.bytes_of(key))
    assert times >= least
