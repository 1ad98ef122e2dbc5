"""The CPU kernel with other instruction sets: PATS_KERNELS_ISA asks for a lesser one than the machine's."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pats_kernels

TESTS = Path(__file__).parent


def digests(isa: str) -> dict[str, str]:
    # The package under test, wherever else Python would look first.
    places = [str(Path(pats_kernels.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    settings = {"PATS_KERNELS_ISA": isa, "PYTHONWARNINGS": "ignore", "PYTHONPATH": os.pathsep.join(places)}
    command = [sys.executable, str(TESTS / "digests.py"), "cpp"]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="there is but one instruction set")
def test_vectors_of_any_width_give_the_same_bits() -> None:
    """AVX2, and AVX-512 if the machine has it: weights, averages, moments and means of every variant. The
    baseline has no fused multiply-add, so its numbers are rounded once more and differ: bits are compared."""
    widest, avx2, baseline = (digests(isa) for isa in ("avx512", "avx2", "baseline"))
    assert len(widest) == 4 * 2 * 2 * 3 * 3
    assert widest == avx2
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert sum(widest[name] != baseline[name] for name in widest) > len(widest) / 2
    for found in (widest, baseline):
        for name in found:
            assert found[name] == found[name.replace(", strided", "")], name


@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_backend_with_a_lesser_instruction_set(isa: str) -> None:
    """Every variant and layout, in another process, because a process chooses its function once."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(TESTS / "test_backends.py"),
        str(TESTS / "test_rounding.py"),
    ]
    chosen = ["-k", "cpp and (variants or layouts or round_to_nearest or shapes or every_store)"]
    result = subprocess.run(
        [*command, *chosen], env=os.environ | {"PATS_KERNELS_ISA": isa}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout
