"""The parts of `gpu_check` besides tests and benchmarks: `python -m benchmarks.gpu_check.parts NAME FILE`.

`build` compiles the extension in place and lists the backends that can run. `short` takes a few small steps
of every kind, for compute-sanitizer. `profile` takes one big step of each kind, for ncu. Before each step it
runs a kernel that only spins, which separates the steps in ncu's output.
"""

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import shapes, timing
from benchmarks.step import variants
from benchmarks.step.variants import Task, Tensors
from benchmarks.suite import OURS, fused_backends, label
from pats_kernels import PATSAdamW, available_backends, pats_step_, reference
from pats_kernels.hyperparameters import AdamWHyperparameters

ROOT = Path(__file__).resolve().parents[2]
SHORT_SIZES = [5000, 3, 4096, 1]
STEPS = 3
NOISE_SCALE = 1e-2
MARKER = "spin_kernel"  # the kernel of torch.cuda._sleep
METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent",
    "dram__bytes_read.sum": "dram_read",
    "dram__bytes_write.sum": "dram_written",
    "lts__t_sector_hit_rate.pct": "l2_hit_percent",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "sm_percent",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue_percent",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
    "smsp__inst_executed.sum": "instructions",
    "launch__registers_per_thread": "registers",
    "launch__grid_size": "grid",
    "launch__block_size": "threads",
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check.parts", description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument(
        "--model", default="bert-base-uncased", choices=shapes.SHAPES, help="shapes for the profile"
    )
    parser.add_argument("file", type=Path)
    options = parser.parse_args(arguments)
    result = PARTS[options.part](torch.device(options.device), options.model)
    options.file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if result.get("ok", True) else 1


def build(device: torch.device, model: str) -> dict[str, Any]:
    """Builds the extension. A new process says what can run: this one may have imported an older build."""
    done = subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, check=False)
    ask = "import json, pats_kernels as p; print(json.dumps([p.available_backends(d) for d in %r]))"
    command = [sys.executable, "-c", ask % (["cpu", device.type],)]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    cpu, found = json.loads(said.stdout)
    print("\n".join(f"{name}: {reason}" for name, reason in found.items() if reason), flush=True)
    return {"ok": done.returncode == 0 and cpu["cpp"] is None, "cpp": cpu["cpp"], "backends": found}


def short(device: torch.device, model: str) -> dict[str, Any]:
    """Steps of PATS and of PATSAdamW on each backend; those of PATS are compared with the reference."""
    compared = 0
    for backend in _backends(device):
        for dtype in (torch.float32, torch.bfloat16):
            for normalization in ("delayed", "exact"):
                compared += _short_pats(device, backend, dtype, normalization)
                for sensitivity in ("ema", "moments"):
                    _short_adamw(device, backend, dtype, normalization, sensitivity)
    timing.synchronize(device)
    return {"compared": compared, "backends": _backends(device)}


def _backends(device: torch.device) -> list[str]:
    """The fused backends; Triton on a CPU too, if it is interpreted."""
    found = fused_backends(None, device)
    return ["triton"] if available_backends(device)["triton"] is None and device.type == "cpu" else found


def _tensors(dtype: torch.dtype) -> list[Tensor]:
    """Random tensors on the CPU; the last one is transposed."""
    generator = torch.Generator().manual_seed(0)
    flat = [torch.randn(size, generator=generator).to(dtype) for size in SHORT_SIZES]
    return [*flat, torch.randn(33, 20, generator=generator).to(dtype).t()]


def _short_pats(device: torch.device, backend: str, dtype: torch.dtype, normalization: str) -> int:
    def state() -> list[list[Tensor]]:
        params, grads = _tensors(dtype), [x.clone() for x in _tensors(dtype)]
        S, U = ([x.clone().zero_() for x in params] for _ in range(2))
        return [params, grads, S, U, [torch.zeros(2) for _ in params]]

    def take(step: Callable[..., None], tensors: list[list[Tensor]], **keywords: Any) -> None:
        ids = list(range(len(tensors[0])))
        for t in range(1, STEPS + 1):
            step(
                *tensors,
                step=t,
                tensor_ids=ids,
                noise_scale=NOISE_SCALE,
                normalization=normalization,
                **keywords,
            )

    expected = state()
    got = [[x.to(device) for x in column] for column in state()]
    take(reference.pats_step_, expected)
    take(pats_step_, got, backend=backend)
    # Errors of three steps' noise: z by 2e-3, the gate by 2^-11 of itself, times |z| of at most 6.7. For
    # bfloat16 also the last bit of a |w| < 8.
    tolerance = STEPS * NOISE_SCALE * 6e-3 + (STEPS * 2**-5 if dtype == torch.bfloat16 else 1e-6)
    for a, b in zip(got[0], expected[0], strict=True):
        torch.testing.assert_close(a.cpu().float(), b.float(), rtol=0, atol=tolerance)
    return len(expected[0])


def _short_adamw(
    device: torch.device, backend: str, dtype: torch.dtype, normalization: Any, sensitivity: Any
) -> None:
    params = [torch.nn.Parameter(x.to(device)) for x in _tensors(dtype)]
    optimizer = PATSAdamW(
        params, normalization=normalization, sensitivity=sensitivity, noise_scale=NOISE_SCALE, backend=backend
    )
    for _ in range(STEPS):
        for param in params:
            param.grad = param.detach().clone()
        optimizer.step()
    if not all(param.isfinite().all() for param in params):
        raise RuntimeError(f"PATSAdamW on {backend}: {dtype}, {normalization}, {sensitivity}: not finite")


def profile(device: torch.device, model: str) -> dict[str, Any]:
    """Takes each step once to warm up and once under the profiler; returns the steps' labels in order."""
    labels: list[str] = []
    for dtype in (torch.float32, torch.bfloat16):
        task = Task(
            Tensors.fresh(shapes.random_gradients(model, device, dtype)), AdamWHyperparameters(), shared=True
        )
        steps: dict[str, timing.Step] = {"fused AdamW": variants.torch_adamw(task, fused=True).step}
        for entry in (e._replace(backend=b) for b in _backends(device) for e in OURS):
            h = AdamWHyperparameters(normalization=entry.normalization)
            own = task._replace(h=h, optimizer=entry.optimizer, backend=entry.backend)
            if entry.variant != "attached":
                steps[label(entry)] = variants.contestant(entry.variant, own).step
        for name, step in steps.items():
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.profiler.start()
                torch.cuda._sleep(1)
                step()
                torch.cuda.synchronize()
                torch.cuda.profiler.stop()
            else:
                step()
            labels.append(f"{name} {str(dtype).removeprefix('torch.')}")
    return {"model": model, "labels": labels}


def read_profile(labels: Sequence[str], output: str) -> list[dict[str, Any]]:
    """Each kernel's figures, with the label of the step that started it.

    Args:
        labels: of the steps, in order. Before each step a kernel called `MARKER` ran.
        output: what ncu printed with --csv --page raw. Its CSV lines are those that begin with a quote; the
            second one has the units.

    Raises:
        ValueError: there is no such table, or its number of steps is another.
    """
    lines = [line for line in output.splitlines() if line.startswith('"')]
    rows = list(csv.DictReader(lines))
    if len(rows) < 2 or "Kernel Name" not in rows[0]:
        raise ValueError("ncu printed no table")
    units, found, step = rows[0], [], -1
    for row in rows[1:]:
        if MARKER in row["Kernel Name"]:
            step += 1
            continue
        if not 0 <= step < len(labels):
            raise ValueError(f"ncu saw a kernel of step {step}, but there are {len(labels)} steps")
        figures: dict[str, Any] = {"step": labels[step], "kernel": row["Kernel Name"]}
        for metric, name in METRICS.items():
            text = (row.get(metric) or "").replace(",", "")
            try:
                figures[name] = float(text)
            except ValueError:
                figures[name] = None
            if units.get(metric):
                figures[f"{name}_unit"] = units[metric]
        found.append(figures)
    if step + 1 != len(labels):
        raise ValueError(f"ncu saw {step + 1} steps, not {len(labels)}")
    return found


PARTS: dict[str, Callable[[torch.device, str], dict[str, Any]]] = {
    "build": build,
    "short": short,
    "profile": profile,
}

if __name__ == "__main__":
    sys.exit(main())
