"""`python -m benchmarks.gpu_check --out DIR`: tests and times the GPU kernels in a plain checkout.

It runs on a machine with a GPU on which this package is not installed. Every part (the build, the GPU tests,
compute-sanitizer, one benchmark after another, ncu) runs in a process of its own with a time limit, so a
failure does not affect the other parts. All together take at most ten minutes. Parts whose tools are not
installed are left out and named. Writes DIR/gpu_check.json and prints a summary, with the targets last.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import machine
from benchmarks.gpu_check import outcomes, targets
from benchmarks.gpu_check import parts as gpu_parts

ROOT = Path(__file__).resolve().parents[2]
RESULT = "gpu_check.json"
SECONDS = 570.0  # for all parts together
KEPT_OUTPUT = 4000  # characters of a failed part's output
TEST_PROCESSES = 12  # each compiles kernels; more would take too much of the GPU's memory
FEW_KERNELS = "foreach,fused,attached,moments"  # eager starts 80,000: as slow as all others together
TOOLS = {  # where to look, besides the PATH
    "compute-sanitizer": ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer"),
    "ncu": ("/usr/local/cuda/bin", "/opt/nvidia/nsight-compute/*"),
}
REHEARSAL = {"TRITON_INTERPRET": "1", "PATS_GPU_REHEARSAL": "1", "OMP_NUM_THREADS": "1"}
COMPILED = REHEARSAL | {"TRITON_INTERPRET": ""}  # for tests/gpu: compiled kernels, run by tests/ptx

Result = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Part:
    """A command, and how to read its result.

    Attributes:
        name: the part's name.
        command: the command; it gets the path of its result file as an additional last argument.
        read: makes the result from the file at that path and the command's output. Raises OSError, ValueError
            or KeyError if there is no result.
        seconds: its time limit.
        reserved: seconds that the parts before must leave it.
        tool: the program, the command's first word, if it may not be installed.
        environment: added to this process's own.
    """

    name: str
    command: tuple[str, ...]
    read: Callable[[Path, str], Result]
    seconds: float
    reserved: float = 0.0
    tool: str | None = None
    environment: dict[str, str] = field(default_factory=dict)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    device = "cpu" if options.cpu else "cuda"
    result = check(device, options.out / RESULT, options.only, options.seconds)
    print(summary(result), flush=True)
    return 0 if result["ok"] else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--cpu", action="store_true", help="rehearse on the CPU, with interpreted kernels")
    parser.add_argument(
        "--only", default="", metavar="REGEX", help="run only parts whose name contains a match"
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time limit for all parts together")
    return parser.parse_args(arguments)


def check(device: str, path: Path, only: str = "", seconds: float = SECONDS) -> Result:
    """Runs all parts and returns the whole result; without a GPU, an error instead of the parts.

    The result is written to `path` after every part, so that an interrupted run keeps what it has.
    """
    start = time.monotonic()
    missing = device == "cuda" and not torch.cuda.is_available()
    result: Result = {
        "ok": False,
        "seconds": 0.0,
        "date": machine.now(),
        "rehearsal": device == "cpu",
        "device": None if missing else machine.device_name(torch.device(device)),
        "driver": driver(),
        "versions": machine.versions() | {"cuda": torch.version.cuda},
        "commit": commit(),
        "error": f"no GPU: torch {torch.__version__} finds no CUDA device" if missing else None,
        "parts": [],
        "targets": targets.verdicts([]),
    }
    save(result, path)
    chosen = [] if missing else [part for part in parts(device) if re.search(only, part.name)]
    for i, part in enumerate(chosen):
        left = seconds - (time.monotonic() - start)
        print(f"{part.name} ({left:.0f} s left)", file=sys.stderr, flush=True)
        allowed = left - sum(later.reserved for later in chosen[i + 1 :])
        result["parts"].append(run_part(part, min(part.seconds, allowed)))
        result["seconds"] = time.monotonic() - start
        result["targets"] = targets.verdicts(runs(result))
        save(result, path)
    result["ok"] = bool(chosen) and all(part["ok"] is not False for part in result["parts"])
    save(result, path)
    return result


def save(result: Result, path: Path) -> None:
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def runs(result: Result) -> list[Result]:
    """The suite's runs, including those that were cut short."""
    return [part["result"] for part in result["parts"] if part["result"] and "copy_gbps" in part["result"]]


def driver() -> str | None:
    """The GPU and its driver as nvidia-smi names them; None without nvidia-smi."""
    return said("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")


def commit() -> str | None:
    return said("git", "describe", "--always", "--dirty")


def said(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


# ---- the parts


def parts(device: str) -> list[Part]:
    """All parts, the most important first: correctness, then what the targets need, then the rest."""
    if device == "cpu":
        return rehearsal()
    own = (sys.executable, "-m", "benchmarks.gpu_check.parts")
    sanitized = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # cached blocks would hide accesses beyond a tensor
    sanitizer = ("compute-sanitizer", "--error-exitcode", "86", "--tool")
    metrics = ",".join(gpu_parts.METRICS)
    ncu = ("ncu", "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw")
    return [
        Part("build", (*own, "build"), read_json, 150),
        tests(min(TEST_PROCESSES, os.cpu_count() or 1), {"OMP_NUM_THREADS": "1"}, 200),
        suite("bert-large-uncased", "float32", device, 60, reserved=40),
        suite("bert-large-uncased", "bfloat16", device, 60, reserved=40),
        suite("4000-tiny", "float32", device, 60, FEW_KERNELS, reserved=40),
        *(
            Part(tool, (*sanitizer, tool, *own, "short"), read_sanitizer, 60, 0, sanitizer[0], sanitized)
            for tool in ("memcheck", "racecheck")
        ),
        suite("bert-large-uncased", "float32", device, 240, "compile,fused", reserved=140),
        Part("ncu", (*ncu, "--metrics", metrics, *own, "profile"), read_ncu, 60, 25, "ncu"),
        *(
            suite(model, dtype, device, 45)
            for model in ("bert-base-uncased", "llama-3.2-1b", "qwen2.5-7b-layer", "roberta-large")
            for dtype in ("float32", "bfloat16")
        ),
        suite("4000-tiny", "bfloat16", device, 45, FEW_KERNELS),
        suite("bert-base-uncased", "float32", device, 60, "compile,fused"),
    ]


def rehearsal() -> list[Part]:
    """The parts for a machine without a GPU: as much of each as can run there."""
    own = (sys.executable, "-m", "benchmarks.gpu_check.parts", "--device", "cpu", "--model", "tiny")
    sanitizer = ("compute-sanitizer", "--error-exitcode", "86", "--tool", "memcheck")
    return [
        Part("build", (*own, "build"), read_json, 300),
        tests(1, COMPILED, 600),
        suite("tiny", "float32", "cpu", 60),
        suite("tiny", "bfloat16", "cpu", 60),
        Part("short", (*own, "short"), read_json, 60, environment=REHEARSAL),
        Part("memcheck", (*sanitizer, *own, "short"), read_sanitizer, 60, tool="compute-sanitizer"),
        Part("ncu", ("ncu", "--csv", "--page", "raw", *own, "profile"), read_ncu, 60, tool="ncu"),
        suite("tiny", "float32", "cpu", 240, "compile,fused"),
    ]


def tests(processes: int, environment: dict[str, str], seconds: float) -> Part:
    """tests/gpu, in several processes if pytest-xdist is installed: most of the time is spent compiling."""
    several = ("-n", str(processes)) if processes > 1 and find_spec("xdist") else ()
    flags = ("-q", "-p", "benchmarks.gpu_check.outcomes", "-p", "no:cacheprovider", *several)
    command = (sys.executable, "-m", "pytest", *flags, "tests/gpu", "--outcomes")
    return Part("tests/gpu", command, read_outcomes, seconds, environment=environment)


def suite(
    model: str, dtype: str, device: str, seconds: float, variants: str = "", reserved: float = 0.0
) -> Part:
    chosen = ("--variants", variants) if variants else ()
    flags = ("--model", model, "--dtype", dtype, "--device", device, *chosen, "--json")
    name = " ".join(filter(None, ("suite", model, dtype, variants)))
    return Part(name, (sys.executable, "-m", "benchmarks.suite", *flags), read_json, seconds, reserved)


def read_json(path: Path, output: str) -> Result:
    return json.loads(path.read_text(encoding="utf-8"))


def read_outcomes(path: Path, output: str) -> Result:
    return outcomes.read(path)


def read_sanitizer(path: Path, output: str) -> Result:
    """compute-sanitizer's summary, which it prints only for a program that ran to its end."""
    ends = [line.strip("= ") for line in output.splitlines() if "SUMMARY:" in line]
    if not ends:
        raise ValueError("compute-sanitizer printed no summary")
    return {"summary": ends[-1], **read_json(path, output)}


def read_ncu(path: Path, output: str) -> Result:
    return {"kernels": gpu_parts.read_profile(read_json(path, output)["labels"], output)}


# ---- running them


def run_part(part: Part, seconds: float) -> Result:
    """The part's result; if it failed, the end of its output; if it was left out, the reason."""
    outcome: Result = {"name": part.name, "command": " ".join(part.command), "ok": None, "seconds": 0.0}
    command = part.command
    if part.tool is not None:
        found = find_tool(part.tool)
        if found is None:
            return {**outcome, "result": None, "error": f"left out: {part.tool} is not installed here"}
        command = (found, *command[1:])
    if seconds <= 0:
        return {
            **outcome,
            "ok": False,
            "result": None,
            "error": "not started: the other parts took all the time",
        }
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        left = Path(folder) / "result"
        code, output = run_limited([*command, str(left)], seconds, part.environment)
        try:
            result = part.read(left, output)
        except (OSError, ValueError, KeyError) as error:
            result, output = None, f"{output}\n{type(error).__name__}: {error}" if code == 0 else output
    ok = code == 0 and result is not None
    reason = f"out of time after {seconds:.0f} s" if code is None else f"exit status {code}"
    outcome |= {"ok": ok, "seconds": time.monotonic() - start, "result": result}
    return outcome | {"error": None if ok else f"{reason}\n{output[-KEPT_OUTPUT:]}"}


def find_tool(name: str) -> str | None:
    folders = [str(folder) for place in TOOLS.get(name, ()) for folder in _folders(place)]
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *folders]))


def _folders(place: str) -> list[Path]:
    """A folder, or all that match the star at its end, the newest first."""
    path = Path(place)
    return sorted(path.parent.glob(path.name), reverse=True)


def run_limited(
    command: list[str], seconds: float, environment: dict[str, str] | None = None
) -> tuple[int | None, str]:
    """Exit status and output. The status is None if it ran out of time and was killed with its children."""
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | (environment or {}),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
        output.seek(0)
        return code, output.read()


# ---- the summary


def summary(result: Result) -> str:
    """Each part's outcome, then the targets: last, because readers see the end of a log."""
    if result["error"]:
        return f"gpu_check: {result['error']}"
    rows = [(part["name"], f"{part['seconds']:.0f} s", outcome_of(part)) for part in result["parts"]]
    title = f"gpu_check: {result['device']}, {result['date']}, {result['seconds']:.0f} s in all"
    lines = [title, *aligned(rows), "", *kernel_lines(result), target_title(result)]
    return "\n".join([*lines, *aligned(target_rows(result))])


def outcome_of(part: Result) -> str:
    if part["error"]:
        lines = part["error"].strip().splitlines()
        reason = lines[0] if len(lines) == 1 else f"{lines[0]}: {lines[-1]}"
        return reason if part["ok"] is None else f"FAILED, {reason}"
    return described(part["result"])


def described(result: Result) -> str:
    """A part's result in one line."""
    if "results" in result:
        times = [
            f"{' '.join(filter(None, (row['variant'], *differing(row), row['backend'])))} "
            f"{row['median_ms']:.3g} ms ({row['fraction_of_copy']:.0%})"
            for row in result["results"]
        ]
        missing = [f"no {name}" for name in result["errors"]]
        return ", ".join([*times, *missing, f"AdamW {result['adamw_fused_ms']:.3g} ms"])
    if "kernels" in result:
        return f"{len(result['kernels'])} kernels"
    if "passed" in result:
        return ", ".join(f"{result[name]} {name}" for name in ("passed", "failed", "skipped"))
    if "backends" in result and isinstance(result["backends"], dict):
        return "can run: " + ", ".join(name for name, reason in result["backends"].items() if reason is None)
    return str(result.get("summary", "done"))


def differing(row: Result) -> list[str]:
    """The values of a row that differ from the defaults."""
    usual = {"optimizer": "none", "normalization": "delayed"}
    return [row[name] for name in usual if row[name] != usual[name]]


def kernel_lines(result: Result) -> list[str]:
    """ncu's figures, if there are any."""
    results = [part["result"] for part in result["parts"] if part["name"] == "ncu" and part["result"]]
    names = ["dram_percent", "l2_hit_percent", "occupancy_percent", "issue_percent", "registers"]
    rows = [["step", "kernel", *names]]
    for kernel in (kernel for found in results for kernel in found["kernels"]):
        figures = ["" if kernel[name] is None else f"{kernel[name]:.0f}" for name in names]
        rows.append([kernel["step"], kernel["kernel"][:24], *figures])
    return [*aligned(rows), ""] if results else []


def target_title(result: Result) -> str:
    elsewhere = "H200" not in str(result["device"])
    return "Targets for an H200" + (f", on another device: {result['device']}" if elsewhere else "")


def target_rows(result: Result) -> list[tuple[str, ...]]:
    rows = [("what", "target", "measured", "met")]
    for verdict in result["targets"]:
        measured, met = verdict["measured"], verdict["met"]
        answer = "not measured" if met is None else "yes" if met else "NO"
        rows.append(
            (verdict["what"], verdict["target"], "" if measured is None else f"{measured:.3f}", answer)
        )
    return rows


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with columns as wide as their widest entry; the last column is not padded."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1] if rows else []
    return ["  ".join([*(f"{x:<{w}}" for x, w in zip(row, widths, strict=False)), row[-1]]) for row in rows]
