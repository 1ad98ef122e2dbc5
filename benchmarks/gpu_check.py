"""`python -m benchmarks.gpu_check --out DIR`: proves and times the GPU kernels in a plain checkout.

For a machine with a GPU and nothing of ours installed. Every part, the GPU tests first and then one
benchmark after another, runs in a process of its own with a time limit, so that each survives the failure
of another; all together stay within ten minutes. Leaves DIR/gpu_check.json and prints a summary.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks import machine, report, variants

ROOT = Path(__file__).resolve().parent.parent
RESULT = "gpu_check.json"
SECONDS = 570.0  # for all parts together
TEST_SECONDS = 180.0
BENCHMARK_SECONDS = 120.0
COMPILE_SECONDS = 240.0
KEPT_OUTPUT = 4000  # characters of a failed part's output
DTYPES = ("float32", "bfloat16")
MODELS = {"cuda": ("bert-base-uncased", "bert-large-uncased"), "cpu": ("tiny",)}


@dataclass(frozen=True, slots=True)
class Part:
    """A command, and how to read the file that it leaves at the path it is given as its last argument."""

    name: str
    command: tuple[str, ...]
    read: Callable[[Path], dict[str, Any]]
    seconds: float


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    result = check("cpu" if options.cpu else "cuda", options.out / RESULT)
    show(result, Console(width=None if sys.stdout.isatty() else report.WIDTH, highlight=False))
    return 0 if result["ok"] else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--cpu", action="store_true", help="rehearse on the CPU with a tiny model")
    return parser.parse_args(arguments)


def check(device: str, path: Path) -> dict[str, Any]:
    """The whole result; where there is no GPU, the reason instead of the parts.

    It is written to `path` after every part, so that whoever is cut short keeps what there is.
    """
    start = time.monotonic()
    missing = device == "cuda" and not torch.cuda.is_available()
    result: dict[str, Any] = {
        "ok": False,
        "seconds": 0.0,
        "date": machine.now(),
        "device": None if missing else machine.device_name(torch.device(device)),
        "driver": driver(),
        "versions": machine.versions() | {"cuda": torch.version.cuda},
        "error": f"no GPU: torch {torch.__version__} finds no CUDA device" if missing else None,
        "parts": [],
    }
    save(result, path)
    for part in [] if missing else parts(device):
        left = SECONDS - (time.monotonic() - start)
        print(f"{part.name} ({left:.0f} s left)", file=sys.stderr, flush=True)
        result["parts"].append(run_part(part, min(part.seconds, left)))
        result["seconds"] = time.monotonic() - start
        save(result, path)
    result["ok"] = not missing and all(part["ok"] for part in result["parts"])
    save(result, path)
    return result


def save(result: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def driver() -> str | None:
    """The GPU and its driver as nvidia-smi names them; None where there is none."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def parts(device: str) -> list[Part]:
    """What is to be run; what compiles comes last, as it may take all the time that is left."""
    pytest = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu", "--junitxml")
    benchmarks = [
        benchmark(model, device, dtype, optimizer, quick(optimizer), BENCHMARK_SECONDS)
        for optimizer in variants.OPTIMIZERS
        for model in MODELS[device]
        for dtype in DTYPES
    ]
    compiled = [
        benchmark(MODELS[device][0], device, dtype, "none", variants.names("none"), COMPILE_SECONDS)
        for dtype in DTYPES
    ]
    return [Part("tests/gpu", pytest, read_junit, TEST_SECONDS), *benchmarks, *compiled]


def quick(optimizer: str) -> list[str]:
    """The contestants that need not be compiled for minutes."""
    return [name for name in variants.names(optimizer) if name != "compile"]


def benchmark(
    model: str, device: str, dtype: str, optimizer: str, contestants: Sequence[str], seconds: float
) -> Part:
    flags = {
        "--model": model,
        "--device": device,
        "--dtype": dtype,
        "--optimizer": optimizer,
        "--variants": ",".join(contestants),
    }
    words = (word for flag in flags.items() for word in flag)
    command = (sys.executable, "-m", "benchmarks", *words, "--json")
    return Part(f"{model} {dtype} {optimizer}", command, read_json, seconds)


def run_part(part: Part, seconds: float) -> dict[str, Any]:
    """The part's result, or the end of what it said when it failed."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        left = Path(folder) / "result"
        code, output = run_limited([*part.command, str(left)], seconds)
        try:
            result = part.read(left)
        except (OSError, ValueError, ElementTree.ParseError):
            result = None
    ok = code == 0 and result is not None
    reason = "out of time" if code is None else f"exit status {code}"
    return {
        "name": part.name,
        "command": " ".join(part.command),
        "ok": ok,
        "seconds": time.monotonic() - start,
        "result": result,
        "error": None if ok else f"{reason}\n{output[-KEPT_OUTPUT:]}",
    }


def run_limited(command: list[str], seconds: float) -> tuple[int | None, str]:
    """Exit status (None: it ran out of time and was killed with its children) and output."""
    if seconds <= 0:
        return None, "not started: the other parts took all the time"
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
        output.seek(0)
        return code, output.read()


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def read_junit(path: Path) -> dict[str, int]:
    """How many tests there were, and how many of them did not pass."""
    suites = list(ElementTree.parse(path).getroot().iter("testsuite"))
    counted = ("tests", "failures", "errors", "skipped")
    return {name: sum(int(suite.get(name, 0)) for suite in suites) for name in counted}


def show(result: dict[str, Any], console: Console) -> None:
    """Prints each part's outcome; last of all, so that whoever sees only the end of a log sees it."""
    if result["error"]:
        console.print(f"gpu_check: {result['error']}", style="bold red", markup=False)
        return
    table = Table(title=f"gpu_check: {result['device']}", caption=f"{result['seconds']:.0f} s in all")
    for column in ("part", "outcome", "s"):
        table.add_column(column)
    for part in result["parts"]:
        outcome = escape(summary(part["result"]) if part["ok"] else part["error"].strip().splitlines()[-1])
        table.add_row(part["name"], outcome, f"{part['seconds']:.0f}", style=None if part["ok"] else "red")
    console.print(table)


def summary(result: dict[str, Any]) -> str:
    """A part's result in a line."""
    if "results" not in result:
        return ", ".join(f"{count} {name}" for name, count in result.items())
    times = [
        f"{row['variant']} {row['median_ms']:.3g} ms ({row['fraction_of_copy']:.0%} of copy)"
        for row in result["results"]
    ]
    missing = [f"no {variant}" for variant in result["errors"]]
    return ", ".join([*times, *missing, f"AdamW {result['adamw_fused_ms']:.3g} ms"])


if __name__ == "__main__":
    sys.exit(main())
