"""The check that runs on a GPU, without one: every part that can be rehearsed, and what may go wrong."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import suite
from benchmarks.common import models, shapes
from benchmarks.gpu_check import check as gpu_check
from benchmarks.gpu_check import outcomes, targets
from benchmarks.gpu_check import parts as gpu_parts
from benchmarks.gpu_check import report as gpu_report
from benchmarks.gpu_check.check import Part
from pats_kernels import available_backends

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def python(name: str, *code: str, **keywords: Any) -> Part:
    """A part that is a line of Python."""
    settings: dict[str, Any] = {"read": gpu_check.read_json, "seconds": 60} | keywords
    return Part(name, (sys.executable, *code), **settings)


WRITES = "import sys; open(sys.argv[1], 'w').write('{\"done\": 1}')"


# Parts


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--out", str(tmp_path / "new")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    assert "no GPU" in done.stdout
    result = json.loads((tmp_path / "new" / gpu_check.RESULT).read_text())
    assert not result["ok"]
    assert result["device"] is None
    assert "no GPU" in result["error"]
    assert result["versions"]["torch"] == torch.__version__
    assert [verdict["met"] for verdict in result["targets"]] == [None] * len(targets.TARGETS)


def test_each_part_survives_the_failure_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        gpu_check,
        "parts",
        lambda device: [
            python("fails", "-c", "raise SystemExit('a reason')"),
            python("hangs", "-c", "import time; time.sleep(60)", seconds=0.5),
            python("writes nothing", "-c", "print('nothing')"),
            python("partly", "-c", f"{WRITES}; raise SystemExit('then it broke')"),
            python("missing", "-c", WRITES, tool="no-such-tool"),
            python("works", "-c", WRITES),
        ],
    )
    assert gpu_check.main(["--cpu", "--out", str(tmp_path)]) == 1
    result = json.loads((tmp_path / gpu_check.RESULT).read_text())
    assert {part["name"]: part["ok"] for part in result["parts"]} == {
        "fails": False,
        "hangs": False,
        "writes nothing": False,
        "partly": False,
        "missing": None,
        "works": True,
    }
    errors = {part["name"]: part["error"] for part in result["parts"]}
    assert "a reason" in errors["fails"]
    assert errors["hangs"].startswith("out of time after 0 s")
    assert "nothing" in errors["writes nothing"]
    assert "FileNotFoundError" in errors["writes nothing"]
    assert errors["missing"] == "left out: no-such-tool is not installed here"
    assert [part["result"] for part in result["parts"][-3:]] == [{"done": 1}, None, {"done": 1}]
    printed = capsys.readouterr().out
    for line in ("FAILED, exit status 1: a reason", "left out: no-such-tool", "FAILED, out of time"):
        assert line in printed
    assert printed.count("not measured") == len(targets.TARGETS)


def test_what_is_left_out_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [python("works", "-c", WRITES), python("missing", "-c", "", tool="no-such-tool")]
    monkeypatch.setattr(gpu_check, "parts", lambda device: given)
    assert gpu_check.main(["--cpu", "--out", str(tmp_path)]) == 0
    assert gpu_check.main(["--cpu", "--out", str(tmp_path), "--only", "no such part"]) == 1


def test_time_is_reserved_for_what_matters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [
        python("greedy", "-c", "", seconds=1000.0),
        python("modest", "-c", "", seconds=30.0),
        python("kept", "-c", "", seconds=100.0, reserved=90.0),
        python("last", "-c", ""),
    ]
    allowed: dict[str, float] = {}

    def run_part(part: Part, seconds: float) -> dict[str, Any]:
        allowed[part.name] = seconds
        return {"name": part.name, "ok": True, "result": None, "error": None, "seconds": 0.0}

    monkeypatch.setattr(gpu_check, "parts", lambda device: given)
    monkeypatch.setattr(gpu_check, "run_part", run_part)
    gpu_check.check("cpu", tmp_path / "result.json", seconds=200.0)
    assert allowed["greedy"] == pytest.approx(110, abs=5)  # 200 less what is kept
    assert allowed["modest"] == 30
    assert allowed["kept"] == 100


def test_a_part_that_is_left_no_time() -> None:
    late = gpu_check.run_part(python("late", "-c", WRITES), -1.0)
    assert (late["ok"], late["error"]) == (False, "not started: the other parts took all the time")


def test_the_gpus_parts() -> None:
    """In the order of their worth; what the targets need is reserved; every suite's command is valid."""
    parts = gpu_check.parts("cuda")
    names = [part.name for part in parts]
    assert names[:5] == [
        "build",
        "tests/gpu",
        "suite bert-large-uncased float32",
        "suite bert-large-uncased bfloat16",
        "suite 4000-tiny float32 foreach,fused,attached,moments",
    ]
    assert {"memcheck", "racecheck", "ncu"} < set(names)
    assert sum(part.reserved for part in parts) <= gpu_check.SECONDS / 2
    suites = [part for part in parts if part.name.startswith("suite ")]
    for part in suites:
        words = [word.replace("cuda", "cpu") for word in part.command[3:]]
        options = suite.parse([*words, "out.json"])
        assert (options.model, options.dtype) == tuple(part.name.split()[1:3])
    wanted = {(target.model, target.dtype) for target in targets.TARGETS}
    assert wanted < {tuple(part.name.split()[1:3]) for part in suites}
    for model in ("bert-base-uncased", "roberta-large", "llama-3.2-1b", "qwen2.5-7b-layer", "4000-tiny"):
        for dtype in ("float32", "bfloat16"):
            assert any(name.startswith(f"suite {model} {dtype}") for name in names)
    sanitizer = next(part for part in parts if part.name == "racecheck")
    assert sanitizer.command[:5] == ("compute-sanitizer", "--error-exitcode", "86", "--tool", "racecheck")


def test_tools_are_found_beside_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("2024.1", "2025.3"):
        tool = tmp_path / version / "ncu"
        tool.parent.mkdir()
        tool.write_text("#!/bin/sh\n")
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(gpu_check.TOOLS, "ncu", (str(tmp_path / "*"),))
    assert gpu_check.find_tool("ncu") == str(tmp_path / "2025.3" / "ncu")
    assert gpu_check.find_tool("no-such-tool") is None


# Rehearsals


def test_the_suite_and_its_part(tmp_path: Path) -> None:
    """Every contestant that needs no compiler, in one run, with the keys that the targets are made of."""
    part = gpu_check.suite("tiny", "bfloat16", "cpu", 120)
    part = replace(part, command=(*part.command[:-1], "--repeats", "1", "--json"))
    done = gpu_check.run_part(part, 120)
    assert done["ok"], done["error"]
    result = done["result"]
    ours = suite.fused_backends(None, CPU)[0]
    found = {
        (row["variant"], row["optimizer"], row["normalization"], row["backend"]) for row in result["results"]
    }
    assert found == {
        ("eager", "none", "delayed", "aten"),
        ("foreach", "none", "delayed", "aten"),
        ("fused", "none", "delayed", ours),
        ("fused", "none", "exact", ours),
        ("attached", "adamw", "delayed", ours),
        ("fused", "adamw", "delayed", ours),
        ("moments", "adamw", "delayed", ours),
    }
    assert not result["errors"]
    assert result["gradients"] == "random"
    assert result["params"] == sum(torch.Size(shape).numel() for shape in shapes.SHAPES["tiny"]())
    assert all(row["host_ms"] > 0 and row["captured_ms"] is None for row in result["results"])
    assert result["adamw_fused"]["wall_ms"] > 0
    on_other_tensors = {**result, "model": targets.LARGE}
    share = next(v for v in targets.verdicts([on_other_tensors]) if "bfloat16" in v["what"])
    fused = next(row for row in result["results"] if row["variant"] == "fused")
    assert share["measured"] == fused["fraction_of_copy"]


def test_a_contestant_that_cannot_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(suite.variants._CONTESTANTS, "eager", lambda task: 1 / 0)
    tensors = suite.Tensors.fresh(shapes.random_gradients("tiny", CPU, torch.float32))
    entries = suite.entries_of(["eager", "fused"], ["eager", "cuda"])
    assert [suite.label(entry) for entry in entries[:3]] == [
        "eager none delayed auto",
        "fused none delayed eager",
        "fused none exact eager",
    ]
    ready, errors = suite._prepare(entries, suite.Task(tensors, suite.AdamWHyperparameters(), shared=True))
    assert {entry.backend for entry in ready} == {"eager"}
    assert errors["eager none delayed auto"] == "ZeroDivisionError: division by zero"
    assert "backend='cuda' cannot run on cpu" in errors["fused none delayed cuda"]


def test_the_suite_refuses_what_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--model", "bert-huge"], "unknown model: bert-huge (known: bert-base-uncased,"),
        (["--variants", "fused,magic"], "unknown variants: magic (known: eager,"),
    ):
        with pytest.raises(SystemExit):
            suite.parse([*arguments, "--json", "out.json"])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["bert-base-uncased", "bert-large-uncased", "roberta-large", "llama-3.2-1b"])
def test_shapes_are_the_models(name: str) -> None:
    model = models.build(name, "meta")
    expected = sorted(tuple(param.shape) for param in model.parameters())
    assert sorted(shapes.SHAPES[name]()) == expected


def test_the_layer_is_a_models_layer() -> None:
    model = models.build("Qwen/Qwen2.5-7B-2-layers", "meta")
    layer = sorted(tuple(p.shape) for name, p in model.named_parameters() if ".layers.1." in name)
    assert sorted(shapes.SHAPES["qwen2.5-7b-layer"]()) == layer


def test_random_gradients_are_the_same_every_time() -> None:
    first, second = (shapes.random_gradients("tiny", CPU, torch.bfloat16) for _ in range(2))
    assert all(a.equal(b) for a, b in zip(first.grads, second.grads, strict=True))
    assert len({float(grad.flatten()[0]) for grad in first.grads}) > 20
    assert len(shapes.SHAPES["4000-tiny"]()) == 4000
    with pytest.raises(ValueError, match=r"Unknown shapes: 'bert-huge' \(known: bert-base"):
        shapes.random_gradients("bert-huge", CPU, torch.float32)


def test_short_steps_are_held_against_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    found = gpu_parts.short(CPU, "tiny")
    assert found["compared"] == 5 * 2 * 2 * len(found["backends"])
    step = gpu_parts.pats_step_

    def wrong(*tensors: Any, **keywords: Any) -> None:
        step(*tensors, **keywords)
        tensors[0][0][7] += 0.5

    monkeypatch.setattr(gpu_parts, "pats_step_", wrong)
    with pytest.raises(AssertionError, match="not close"):
        gpu_parts.short(CPU, "tiny")


def test_the_build_asks_what_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a build that is not run; another process finds what is there."""
    run = subprocess.run
    built: list[Any] = []

    def fake(command: list[str], **keywords: Any) -> Any:
        if "setup.py" not in command:
            return run(command, **keywords)
        built.append(command)
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(gpu_parts.subprocess, "run", fake)
    found = gpu_parts.build(CPU, "tiny")
    assert built == [[sys.executable, "setup.py", "build_ext", "--inplace"]]
    assert not found["ok"]  # its exit status was 3
    assert found["backends"] == available_backends("cpu")


def test_outcomes_are_kept_of_a_run_that_dies(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import os, pytest\n"
        "def test_passes(): pass\n"
        "def test_fails(): assert False\n"
        "@pytest.mark.skip(reason='no')\n"
        "def test_skipped(): pass\n"
        "def test_dies(): os._exit(7)\n"
        "def test_never(): pass\n"
    )
    file = tmp_path / "outcomes"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "benchmarks.gpu_check.outcomes",
        "-p",
        "no:cacheprovider",
    ]
    command += ["-c", str(tmp_path / "none.ini"), str(tmp_path), "--outcomes", str(file)]
    (tmp_path / "none.ini").write_text("[pytest]\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
    died = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False)
    assert died.returncode == 7
    found = outcomes.read(file)
    assert {name: found[name] for name in ("passed", "failed", "skipped")} == {
        "passed": 1,
        "failed": 1,
        "skipped": 1,
    }
    assert [name.rpartition("::")[2] for name in found["failures"]] == ["test_fails"]
    assert "assert False" in found["errors"][found["failures"][0]]
    file.write_text("")
    with pytest.raises(ValueError, match="no test ran"):
        outcomes.read(file)


# What the tools print


def test_the_sanitizers_summary(tmp_path: Path) -> None:
    file = tmp_path / "result"
    file.write_text('{"compared": 3}')
    output = "========= COMPUTE-SANITIZER\nanything\n========= ERROR SUMMARY: 0 errors\n"
    assert gpu_check.read_sanitizer(file, output) == {"summary": "ERROR SUMMARY: 0 errors", "compared": 3}
    with pytest.raises(ValueError, match="no summary"):
        gpu_check.read_sanitizer(file, "anything")
    with pytest.raises(FileNotFoundError):  # the program did not come to its end
        gpu_check.read_sanitizer(tmp_path / "none", output)


NCU = """==PROF== Connected to process 1
"ID","Kernel Name","gpu__time_duration.sum","launch__registers_per_thread","dram__bytes_read.sum"
"","","us","register/thread","Mbyte"
"0","at::cuda::spin_kernel(long)","1.0","16","0"
"1","pats_kernel","1,234.5","64","2.5"
"2","statistics_kernel","3","32","n/a"
"3","at::cuda::spin_kernel(long)","1.0","16","0"
"4","pats_kernel","7","60","1"
==PROF== Disconnected
"""


def test_ncus_table() -> None:
    first, second, third = gpu_parts.read_profile(["a", "b"], NCU)
    assert [(k["step"], k["kernel"]) for k in (first, second, third)] == [
        ("a", "pats_kernel"),
        ("a", "statistics_kernel"),
        ("b", "pats_kernel"),
    ]
    assert (first["time"], first["time_unit"], first["registers"]) == (1234.5, "us", 64)
    assert second["dram_read"] is None
    assert first["occupancy_percent"] is None  # not in this table
    for labels in (["a"], ["a", "b", "c"]):
        with pytest.raises(ValueError, match="ncu saw"):
            gpu_parts.read_profile(labels, NCU)
    with pytest.raises(ValueError, match="no table"):
        gpu_parts.read_profile(["a"], "==ERROR== no permission")


def test_ncus_figures_are_shown() -> None:
    kernels = gpu_parts.read_profile(["a", "b"], NCU)
    shown = gpu_check.kernel_lines({"parts": [{"name": "ncu", "result": {"kernels": kernels}}]})
    assert [line.split()[:2] for line in shown[:2]] == [["step", "kernel"], ["a", "pats_kernel"]]
    assert shown[1].split()[-1] == "64"


# Targets, from figures that nobody measured


def row(variant: str, ms: float, backend: str = "triton", **keywords: Any) -> dict[str, Any]:
    fixed = {"optimizer": "none", "normalization": "delayed", "dtype": "float32", "configuration": None}
    measured = {"median_ms": ms, "p10_ms": ms, "p90_ms": ms, "fraction_of_copy": 1.0 / ms}
    others = {"host_ms": 2 * ms, "wall_ms": 3 * ms, "captured_ms": None, "backend": backend}
    return {"variant": variant, **fixed, **measured, **others, **keywords}


def run_of(model: str, rows: list[dict[str, Any]], **keywords: Any) -> dict[str, Any]:
    adamw = {"host_ms": 2.0, "wall_ms": 12.0, "captured_ms": 1.5}
    fixed = {"params": 10, "tensors": 1, "gradients": "invented", "copy_gbps": 1e-3, "errors": {}}
    fixed |= {"adamw_fused_ms": 4.0, "adamw_fused_bytes_per_param": 28, "adamw_fused": adamw}
    return {"model": model, "results": rows, **fixed, **keywords}


LARGE_ROWS = [
    row("eager", 30.0, "aten"),
    row("foreach", 15.0, "aten"),
    row("fused", 2.0),
    row("fused", 2.5, "cuda"),
    row("fused", 2.8, "cuda", normalization="exact"),
    row("fused", 3.1, normalization="exact"),
    row("attached", 8.0, optimizer="adamw"),
    row("fused", 6.0, optimizer="adamw"),
    row("moments", 4.4, optimizer="adamw"),
]
COMPILED_ROWS = [row("compile", 2.0, "inductor"), row("fused", 1.6)]
RUNS = [
    run_of(targets.LARGE, LARGE_ROWS),
    run_of(targets.LARGE, [row("fused", 1.25, dtype="bfloat16")]),
    run_of(targets.TINY, [row("fused", 3.0)]),
    run_of(targets.LARGE, COMPILED_ROWS),
    run_of("bert-base-uncased", [row("fused", 0.1)]),  # of which there are no targets
]
EXPECTED = {  # measured, met
    "PATS, BERT-large: share of a copy's bandwidth": (0.5, False),
    "PATS / fused AdamW": (0.5, True),
    "PATS: times faster than torch.compile": (1.25, False),
    "PATS: times faster than foreach": (7.5, True),
    "PATS: times faster than eager": (15.0, True),
    "PATSAdamW / (fused AdamW + PATS)": (0.75, True),
    "PATSAdamW, moments / fused AdamW": (1.1, False),
    "PATS, bfloat16: share of a copy's bandwidth": (0.8, False),
    "PATS, exact / delayed": (1.4, False),
    "PATS, 4,000 tiny tensors, uncaptured / fused AdamW (idle to idle)": (0.75, True),
}


def test_every_target_is_a_ratio_within_one_run() -> None:
    found = {v["what"]: (v["measured"], v["met"]) for v in targets.verdicts(RUNS)}
    assert found.keys() == EXPECTED.keys()
    for what, (measured, met) in EXPECTED.items():
        assert found[what] == (pytest.approx(measured), met), what
    assert {v["what"] for v in targets.verdicts(RUNS) if v["target"].startswith("<=")} == {
        what for what in EXPECTED if "/" in what
    }


@pytest.mark.parametrize(
    ("missing", "owed"),
    [
        (lambda r: r["variant"] == "compile", ["torch.compile"]),
        (lambda r: r["variant"] == "foreach", ["foreach"]),
        (lambda r: r["variant"] == "attached", ["PATSAdamW / (fused"]),
        (lambda r: r["normalization"] == "exact", ["exact / delayed"]),
        (lambda r: r["dtype"] == "bfloat16", ["bfloat16: share"]),
        (lambda r: r["optimizer"] == "adamw", ["PATSAdamW / (fused", "moments"]),
    ],
)
def test_what_misses_a_side_is_owed(missing: Callable[[dict[str, Any]], bool], owed: list[str]) -> None:
    """And neither side is ever taken from another run: that of torch.compile has a PATS of its own."""
    left = [{**run, "results": [r for r in run["results"] if not missing(r)]} for run in RUNS]
    verdicts = targets.verdicts(left)
    unmet = [v["what"] for v in verdicts if v["measured"] is None]
    assert len(unmet) == len(owed)
    assert all(v["met"] is None for v in verdicts if v["measured"] is None)
    assert all(any(word in what for what in unmet) for word in owed)


def test_without_any_run_all_is_owed() -> None:
    assert [v["met"] for v in targets.verdicts([])] == [None] * len(EXPECTED)


# The report


@pytest.fixture
def checked(tmp_path: Path) -> Path:
    """A result of a device that does not exist."""
    result = {
        "ok": True,
        "seconds": 1.0,
        "date": "1999-01-01T00:00:00+00:00",
        "rehearsal": False,
        "device": "No Such GPU",
        "driver": "No Such GPU, 000.00, 1 MiB",
        "versions": {"torch": "0.0", "triton": "0.0"},
        "error": None,
        "parts": [
            {"name": "suite", "ok": True, "seconds": 1.0, "error": None, "result": run} for run in RUNS
        ],
        "targets": targets.verdicts(RUNS),
    }
    file = tmp_path / gpu_check.RESULT
    file.write_text(json.dumps(result))
    return file


def test_the_report_has_every_figure(checked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = checked.with_suffix(".png")
    assert gpu_report.main([str(checked), "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[0] == "No Such GPU, driver 000.00, torch 0.0, triton 0.0, 1999-01-01."
    assert "| PATS, exact / delayed | <= 1.35 | 1.400 | NO |" in lines
    assert "| **PATS** (cuda) | 2.5 | 2.5 - 2.5 |  | 5 | 40% | 0.62 |" in lines
    assert "| eager (a loop of torch operations) | 30 | 30 - 30 |  | 60 | 3% | 7.50 |" in lines
    # 28 bytes of 10 parameters in 4 ms are 7e-5 GB/s, of a copy's 1e-3.
    assert "| `torch.optim.AdamW(fused=True)` alone | 4 |  | 1.5 | 2 | 7% | 1 |" in lines
    assert sum(line.startswith("| step ") for line in lines) == len(RUNS)
    assert "rehearsal" not in printed
    assert picture.read_bytes().startswith(PNG_SIGNATURE)


def test_the_report_says_what_is_not_a_gpus(checked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = json.loads(checked.read_text()) | {"rehearsal": True}
    checked.write_text(json.dumps(result))
    gpu_report.main([str(checked)])
    printed = capsys.readouterr().out
    assert printed.startswith("**A rehearsal on a CPU: no figure here is a GPU's.**")
    assert "GPU ms" not in printed
    checked.write_text(json.dumps(result | {"parts": [], "error": "no GPU: none"}))
    with pytest.raises(SystemExit):
        gpu_report.main([str(checked)])
    assert "holds no run of the suite: no GPU: none" in capsys.readouterr().err


def test_the_summary_ends_with_the_targets(checked: Path) -> None:
    lines = gpu_check.summary(json.loads(checked.read_text())).splitlines()
    assert lines[-len(EXPECTED) - 2] == "Targets for an H200, on another device: No Such GPU"
    assert lines[-1].split()[-2:] == ["0.750", "yes"]
    assert any("fused exact cuda 2.8 ms (36%)" in line for line in lines)
