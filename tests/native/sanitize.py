"""The extension under sanitizers: `make sanitize`.

    python tests/native/sanitize.py [address] [threads] [guards]

address: builds the extension with AddressSanitizer and UndefinedBehaviorSanitizer in build/sanitize and runs
the tests that step with it, on two threads and with every instruction set. A step that reads beyond a tensor
on purpose shows that it would be seen. threads: ThreadSanitizer over csrc/cpu.cpp and cpu_kernel.cpp without
torch (threads.cpp). guards: tests/test_guard_pages.py over all sizes and storages, with the extension that is
installed. What is wrong ends with a report and a status that is not 0. Linux, GCC.
"""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from program import BUILD, INSTRUCTION_SETS, ROOT, built, run

CHECKS = "address,undefined,float-cast-overflow"
ADDRESS_FLAGS = f"-fsanitize={CHECKS} -fno-sanitize-recover={CHECKS.removeprefix('address,')} "
ADDRESS_FLAGS += "-fno-omit-frame-pointer"
THREAD_FLAGS = "-fsanitize=thread -g1 -O1"

TESTS = ["backends", "operator", "adamw", "reads", "plan", "rounding", "shards", "step", "noise"]
TESTS += ["optim", "adamw_optim", "release", "reference", "fork", "guard_pages"]
OF_EACH_SET = "cpp and (variants or layouts or round_to_nearest or shapes or every_store)"
PYTEST = ["-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
BEYOND = """
import torch
from pats_kernels import _C
from pats_kernels.plan import Column
assert "build/sanitize" in _C.__file__, _C.__file__
print("loaded", _C.__file__, flush=True)
param, grad, sens, stats = torch.ones(100), torch.ones(100), torch.ones(100), torch.ones(2)
table = torch.zeros((1, len(Column)), dtype=torch.int64)
for column, tensor in zip((0, 1, 2, 6, 7), (param, grad, sens, stats, stats)):
    table[0, column] = tensor.data_ptr()
table[0, Column.NUMEL] = table[0, Column.WHOLE] = {numel}
table[0, Column.STEP] = 1
dtypes, variant = (torch.float32, torch.float32), ("pats", "none", "one_pass", True)
layout = torch.zeros((0, 8), dtype=torch.int64)
torch.ops.pats_kernels.step_(table, layout, *dtypes, *variant, None, None)
print("done")
"""


def library(name: str) -> str:
    found = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def run_tests(place: Path, names: Sequence[str], environment: Mapping[str, str], *options: str) -> None:
    """Runs tests with the package in `place`, and from there: in ROOT Python would find the source first."""
    tests = [str(ROOT / "tests" / f"test_{name}.py") for name in names]
    rootdir = [f"--rootdir={ROOT}", "-c", str(ROOT / "pyproject.toml")]
    path = os.pathsep.join(map(str, (place / "lib", ROOT)))  # ROOT for benchmarks, which tests import
    run([sys.executable, *PYTEST, *rootdir, *options, *tests], {**environment, "PYTHONPATH": path}, place)


def address() -> None:
    place = BUILD / "sanitize"
    flags = {"CFLAGS": ADDRESS_FLAGS, "CXXFLAGS": ADDRESS_FLAGS, "LDFLAGS": f"-fsanitize={CHECKS}"}
    folders = [f"--build-lib={place / 'lib'}", f"--build-temp={place / 'temp'}"]
    run([sys.executable, "setup.py", "-q", "build", *folders], flags)
    # Preloaded, the sanitizers see all memory that torch allocates. Python keeps much until it ends, so leaks
    # are not looked for. The guard pages' tests see a process end by a signal.
    preloaded = [library(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so")]
    environment = {
        "LD_PRELOAD": " ".join(preloaded),
        "ASAN_OPTIONS": "detect_leaks=0:handle_segv=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(place / "lib"),
        "OMP_NUM_THREADS": "2",
    }
    for numel, expected in ((100, "done"), (101, "heap-buffer-overflow")):
        command = [sys.executable, "-c", BEYOND.format(numel=numel)]
        done = subprocess.run(
            command, cwd=place, env=os.environ | environment, capture_output=True, text=True, check=False
        )
        if expected not in done.stdout + done.stderr:
            sys.exit(
                f"a step over {numel} of 100 elements did not give {expected}:\n{done.stdout}{done.stderr}"
            )
    run_tests(place, TESTS, environment, "-k", "not eager")
    for name in list(INSTRUCTION_SETS)[:-1]:
        lesser = environment | {"PATS_KERNELS_ISA": name}
        run_tests(place, ("backends", "rounding"), lesser, "-k", OF_EACH_SET)


def threads() -> None:
    flags = THREAD_FLAGS.split()
    program = str(built(BUILD / "threads" / "threads", flags=flags, link=[*flags, "-Wall", "-Wextra"]))
    run([program])
    raced = subprocess.run([program, "race"], capture_output=True, text=True, check=False)
    if "data race" not in raced.stderr:
        sys.exit(f"the race on purpose was not seen:\n{raced.stderr}")
    print("a race on purpose is seen")


def guards() -> None:
    run([sys.executable, *PYTEST, "tests/test_guard_pages.py"], {"PATS_GUARD_PAGES": "1"})


def main(names: list[str]) -> None:
    parts = {"address": address, "threads": threads, "guards": guards}
    for name in names or parts:
        parts[name]()


if __name__ == "__main__":
    main(sys.argv[1:])
