"""The CPU kernel's other instruction sets: PATS_KERNELS_ISA takes a lesser one than the machine has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_backend_with_a_lesser_instruction_set(isa: str) -> None:
    """The numbers of every variant and layout again; which function runs is decided once a process."""
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
