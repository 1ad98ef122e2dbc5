"""The CPU kernel on 64-bit Arm: `make arm`.

Cross-compiled, run by qemu, and compared bit for bit with AVX2 on this machine, without torch (threads.cpp).
It also counts the NEON fused multiply-adds of four floats in the machine code. Needs an x86-64 machine with
AVX2, and Debian's packages g++-aarch64-linux-gnu and qemu-user.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from program import BUILD, INSTRUCTION_SETS, built

ARM = "aarch64-linux-gnu-"
FOLDER = BUILD / "arm"
LINK = ["-O1", "-static"]  # static: qemu has no Arm libraries


def said(command: list[str], **environment: str) -> str:
    return subprocess.run(
        command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True
    ).stdout


def main() -> None:
    with ThreadPoolExecutor(2) as pool:
        here = pool.submit(built, FOLDER / "here", INSTRUCTION_SETS, ["-O3"], LINK)
        arm = pool.submit(built, FOLDER / "arm", {"baseline": ""}, ["-O3"], LINK, f"{ARM}g++")
    expected = said([str(here.result()), "digest"], PATS_KERNELS_ISA="avx2").splitlines()
    found = said(["qemu-aarch64", str(arm.result()), "digest"]).splitlines()
    other = [line for line, own in zip(found, expected, strict=True) if line != own]
    print(f"{len(found)} combinations on Arm: {len(found) - len(other)} have AVX2's bits")
    code = said([f"{ARM}objdump", "-d", "--no-show-raw-insn", str(FOLDER / "arm_baseline.o")])
    vectors = sum("fmla\t" in line and ".4s" in line for line in code.splitlines())
    scalars = sum("fmadd\t" in line for line in code.splitlines())
    print(f"fused multiply-adds: {vectors} of four floats, {scalars} of one number")
    if other or vectors < 1000:
        sys.exit("\n".join(["not as it should be:", *other]))


if __name__ == "__main__":
    main()
