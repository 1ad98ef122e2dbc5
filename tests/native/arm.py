"""The CPU kernel on 64-bit Arm: `make arm`.

Cross-compiled, run by qemu, and compared bit for bit with AVX2 on this machine, without torch (threads.cpp).
It also counts the NEON fused multiply-adds of four floats in the machine code. Needs an x86-64 machine with
AVX2, and Debian's packages g++-aarch64-linux-gnu and qemu-user.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sanitize import BUILD, INSTRUCTION_SETS, NATIVE, ROOT, SIMD_FLAGS

ARM = "aarch64-linux-gnu-"
FOLDER = BUILD / "arm"
FLAGS = ["-O3", *SIMD_FLAGS.split()]


def compiled(compiler: str, program: str, sets: dict[str, str]) -> Path:
    """threads.cpp with the kernel for each instruction set, linked statically, as qemu has no libraries."""
    target = FOLDER / program
    objects = []
    for name, flags in sets.items():
        objects.append(str(FOLDER / f"{program}_{name}.o"))
        source = ["-c", "csrc/cpu_kernel.cpp", "-o", objects[-1]]
        run([compiler, *FLAGS, *flags.split(), f"-DPATS_CHUNK=chunk_{name}", *source])
    flags = ["-O1", "-std=c++17", f"-I{NATIVE / 'stand_in'}", "-pthread", "-static"]
    run([compiler, *flags, str(NATIVE / "threads.cpp"), *objects, "-o", str(target)])
    return target


def run(command: list[str], **environment: str) -> str:
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        here = pool.submit(compiled, "g++", "here", INSTRUCTION_SETS)
        arm = pool.submit(compiled, f"{ARM}g++", "arm", {"baseline": ""})
    expected = run([str(here.result()), "digest"], PATS_KERNELS_ISA="avx2").splitlines()
    found = run(["qemu-aarch64", str(arm.result()), "digest"]).splitlines()
    other = [line for line, own in zip(found, expected, strict=True) if line != own]
    print(f"{len(found)} combinations on Arm: {len(found) - len(other)} have AVX2's bits")
    code = run([f"{ARM}objdump", "-d", "--no-show-raw-insn", str(FOLDER / "arm_baseline.o")])

    vectors = sum("fmla\t" in line and ".4s" in line for line in code.splitlines())
    scalars = sum("fmadd\t" in line for line in code.splitlines())
    print(f"fused multiply-adds: {vectors} of four floats, {scalars} of one number")
    if other or vectors < 1000:
        sys.exit("\n".join(["not as it should be:", *other]))


if __name__ == "__main__":
    main()
