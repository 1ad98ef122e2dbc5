"""`python -m benchmarks.tune --json FILE`: finds the best way to launch the Triton kernels on this GPU.

Every candidate differs from the default as its name says, and has a prediction that was written down before
anything was measured (docs/performance.md has the reasons). All candidates of a case run in one interleaved
contest. `--offline sm_90` only compiles, on any machine, and reports registers, spills and instructions per
element. `TRITON_INTERPRET=1 python -m benchmarks.tune --cpu --model tiny` rehearses; its times mean nothing.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import machine, shapes, timing
from benchmarks.common.timing import Step
from benchmarks.step import variants
from benchmarks.step.variants import Task, Tensors
from pats_kernels.backends import triton as backend
from pats_kernels.backends.triton import Tuning
from pats_kernels.hyperparameters import AdamWHyperparameters, Form, Normalization

DEFAULT = "default"
REPEATS = {"cpu": 1, "cuda": 60}
SECONDS = 8.0  # for a case's contest, after compiling
MIB = 1 << 20
# The figures reported for a compiled kernel. All its spills may be in paths that hardly ever run.
OFFLINE = ("registers", "spills", "full_path_spills", "stack_bytes")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A way to launch. `predicted`: the range predicted for its time, as a share of the default's."""

    name: str
    tuning: Tuning
    predicted: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Case:
    """A step to tune: PATS alone, or PATSAdamW with either sensitivity."""

    variant: str
    optimizer: str
    normalization: Normalization
    dtype: torch.dtype

    @property
    def name(self) -> str:
        words = (self.variant, self.optimizer, self.normalization, str(self.dtype).removeprefix("torch."))
        return " ".join(words)


CASES = (
    Case("fused", "none", "delayed", torch.float32),
    Case("fused", "none", "delayed", torch.bfloat16),
    Case("fused", "none", "exact", torch.float32),
    Case("fused", "adamw", "delayed", torch.float32),
    Case("moments", "adamw", "delayed", torch.float32),
    Case("moments", "adamw", "delayed", torch.bfloat16),
    Case("fused", "adamw", "delayed", torch.bfloat16),
)
COMMON = (
    Candidate("chunk 2048", Tuning(chunk=2048), (1.00, 1.04)),
    Candidate("chunk 8192", Tuning(chunk=8192), (0.97, 1.00)),
    Candidate("chunk 16384", Tuning(chunk=16384), (0.97, 1.02)),
    Candidate("4 elements a thread", Tuning(block=512), (1.00, 1.05)),
    Candidate("16 elements a thread", Tuning(block=2048), (1.05, 1.40)),
    Candidate("2 warps", Tuning(block=512, num_warps=2), (0.96, 1.02)),
    Candidate("8 warps", Tuning(block=2048, num_warps=8), (1.00, 1.05)),
    Candidate("registers as the compiler likes", Tuning(max_registers=0), (0.99, 1.03)),
    Candidate("48 registers", Tuning(max_registers=48), (0.96, 1.05)),
    Candidate("gradient evict-first", Tuning(hints=("", "evict_first", "")), (0.99, 1.00)),
    Candidate("all loads evict-first", Tuning(hints=("evict_first", "evict_first", "")), (0.98, 1.00)),
    Candidate("streaming stores", Tuning(hints=("", "", ".cs")), (0.98, 1.01)),
    Candidate("all streaming", Tuning(hints=("evict_first", "evict_first", ".cs")), (0.97, 1.00)),
    Candidate("persistent, 4", Tuning(persistent=4), (1.00, 1.10)),
    Candidate("persistent, 8", Tuning(persistent=8), (0.97, 1.03)),
    Candidate("persistent, 16", Tuning(persistent=16), (0.98, 1.03)),
)
# For cases without a default limit on registers. AdamW in bfloat16 then uses 126 per thread, so only 16 warps
# fit a multiprocessor.
UNLIMITED = (
    Candidate("64 registers", Tuning(max_registers=64), (0.95, 1.30)),
    Candidate("80 registers", Tuning(max_registers=80), (0.92, 1.10)),
    Candidate("96 registers", Tuning(max_registers=96), (0.93, 1.03)),
    Candidate("112 registers", Tuning(max_registers=112), (0.96, 1.02)),
    Candidate("80 registers, chunk 8192", Tuning(max_registers=80, chunk=8192), (0.90, 1.10)),
    Candidate("96 registers, chunk 8192", Tuning(max_registers=96, chunk=8192), (0.90, 1.02)),
    Candidate("4 elements a thread, chunk 8192", Tuning(block=512, chunk=8192), (0.92, 1.05)),
    Candidate("2 warps, 80 registers", Tuning(block=512, num_warps=2, max_registers=80), (0.96, 1.02)),
    Candidate("2 warps, 96 registers", Tuning(block=512, num_warps=2, max_registers=96), (0.96, 1.05)),
    Candidate("1 warp, 80 registers", Tuning(block=256, num_warps=1, max_registers=80), (0.97, 1.05)),
)
EXACT = (
    Candidate("reversed", Tuning(reversed=True), (0.97, 1.00)),
    Candidate(
        "reversed, gradient evict-first", Tuning(reversed=True, hints=("", "evict_first", "")), (0.97, 1.0)
    ),
    Candidate("groups of 16 MiB", Tuning(group_bytes=16 * MIB), (0.90, 1.20)),
    Candidate("groups of 32 MiB", Tuning(group_bytes=32 * MIB), (0.85, 1.05)),
    Candidate("groups of 64 MiB", Tuning(group_bytes=64 * MIB), (0.90, 1.05)),
    Candidate(
        "groups of 32 MiB, reversed, gradient evict-first",
        Tuning(group_bytes=32 * MIB, reversed=True, hints=("", "evict_first", "")),
        (0.80, 1.00),
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.add_argument("--model", default="bert-large-uncased", choices=shapes.SHAPES)
    parser.add_argument("--cpu", action="store_true", help="rehearse under Triton's interpreter")
    parser.add_argument("--offline", metavar="ARCH", help="only compile the candidates for this architecture")
    parser.add_argument("--only", default="", metavar="REGEX", help="run only cases whose name matches")
    parser.add_argument(
        "--candidates", default="", metavar="REGEX", help="run only candidates whose name matches"
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="rough duration of each case")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    options = parser.parse_args(arguments)
    device = torch.device("cpu" if options.cpu else "cuda")
    reason = None if options.offline else backend.unavailable(device)
    if reason is not None:
        parser.error(f"the Triton kernels cannot run on {device}: {reason}")
    result: dict[str, Any] = {"rehearsal": options.cpu, "model": options.model, "cases": []}
    result |= {"arch": options.offline} if options.offline else dict(machine.prepare(device))
    for case in (case for case in CASES if re.search(options.only, case.name)):
        chosen = [c for c in candidates(case) if re.search(options.candidates, c.name)]
        rows = (
            offline(case, chosen, options.offline)
            if options.offline
            else measure(case, chosen, device, options)
        )
        result["cases"].append({"case": case.name, "candidates": rows})
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print("\n".join([case.name, *map(line, rows)]), flush=True)
    if not options.offline:
        result["host"] = host(options.model, device, options.seconds)
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"host: {result['host']}", flush=True)
    return 0


def candidates(case: Case) -> list[Candidate]:
    found = [*COMMON, *(EXACT if case.normalization == "exact" else ())]
    if case.dtype == torch.float32:
        return found
    limits = ("registers as the compiler likes", "48 registers")  # the default here, and far too few
    return [c for c in [*found, *UNLIMITED] if c.name not in limits]


def measure(
    case: Case, chosen: Sequence[Candidate], device: torch.device, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Medians and spread of the default, twice, and of each candidate, in one contest.

    The two times of the default show how far apart two measurements of the same step may be.
    """
    tensors = Tensors.fresh(shapes.random_gradients(options.model, device, case.dtype))
    h = AdamWHyperparameters(normalization=case.normalization, lr=1e-6)
    task = Task(tensors, h, case.optimizer, "triton", shared=True)
    every = [
        Candidate(DEFAULT, Tuning(), (1.0, 1.0)),
        Candidate("default again", Tuning(), (1.0, 1.0)),
        *chosen,
    ]
    steps: dict[str, Step] = {}
    errors: dict[str, str] = {}
    for candidate in every:
        try:
            step = tuned(variants.contestant(case.variant, task).step, candidate.tuning)
            step()
            timing.synchronize(device)
            steps[candidate.name] = step
        except Exception as error:  # for example too many registers for so many threads
            errors[candidate.name] = f"{type(error).__name__}: {str(error).strip()[:300]}"
    times = timing.contest(steps, REPEATS[device.type], device, lambda *_: None, options.seconds)
    rows = []
    for candidate in every:
        row: dict[str, Any] = {"candidate": candidate.name, "tuning": asdict(candidate.tuning)}
        row |= {"predicted": candidate.predicted, "error": errors.get(candidate.name)}
        if candidate.name in times:
            taken = times[candidate.name].device
            row |= {"median_ms": taken.median, "p10_ms": taken.p10, "p90_ms": taken.p90}
            row["against_default"] = taken.median / times[DEFAULT].device.median
        rows.append(row)
    return rows


def tuned(step: Step, tuning: Tuning) -> Step:
    def run() -> None:
        with backend.tuned(tuning):
            step()

    return run


def offline(case: Case, chosen: Sequence[Candidate], arch: str) -> list[dict[str, Any]]:
    """What the compiler makes of the default and of each candidate, phase by phase."""
    from benchmarks.codegen import compiled as codegen  # needs Triton and rich, which a measurement does not

    form: Form = "pats" if case.optimizer == "none" else "pats_adamw"
    form = "moments_adamw" if case.variant == "moments" else form
    key = codegen.launch_key(form, case.dtype, case.dtype, normalization=case.normalization)
    phases = ("averages", "noise") if case.normalization == "exact" else ("one pass",)
    rows = []
    for candidate in [Candidate(DEFAULT, Tuning(), (1.0, 1.0)), *chosen]:
        reports = [codegen.report(key, phase, arch, candidate.tuning) for phase in phases]
        row: dict[str, Any] = {"candidate": candidate.name, "tuning": asdict(candidate.tuning)}
        row |= {name: [getattr(r, name) for r in reports] for name in OFFLINE}
        row["instructions_per_element"] = [r.instructions_per_element for r in reports]
        rows.append(row | {"predicted": candidate.predicted, "error": None})
    return rows


def host(model: str, device: torch.device, seconds: float) -> dict[str, float]:
    """The host's milliseconds for a step of PATS: with the same gradient tensors, where the table is reused,
    and with others, where it is packed and sent. Also for packing alone and sending alone."""
    gradients = shapes.random_gradients(model, device, torch.float32)
    others = [grad.clone() for grad in gradients.grads]
    made = variants.contestant(
        "fused", Task(Tensors.fresh(gradients), AdamWHyperparameters(), backend="triton")
    )
    places = [gradients.grads, others]

    def moved() -> None:
        places.reverse()
        for param, grad in zip(gradients.params, places[0], strict=True):
            param.grad = grad
        made.step()

    packed, send = uploading(gradients.params)
    steps: dict[str, Step] = {"reused": made.step, "moved": moved, "packed": packed, "sent": send}
    times = timing.contest(steps, REPEATS[device.type], device, lambda *_: None, seconds)
    return {name: times[name].host.median for name in steps}


def uploading(params: list[Tensor]) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Two functions: one packs a table with a row per tensor, one sends it from pinned memory."""
    import numpy as np

    from pats_kernels.plan import Column

    device = params[0].device
    table = np.zeros((len(params), len(Column)), dtype=np.int64)
    pinned = torch.empty(table.shape, dtype=torch.int64, pin_memory=device.type == "cuda")
    there = torch.empty(table.shape, dtype=torch.int64, device=device)
    return lambda: np.copyto(pinned.numpy(), table), lambda: there.copy_(pinned, non_blocking=True)


def line(row: dict[str, Any]) -> str:
    """A candidate's line of the printed output."""
    low, high = row["predicted"]
    if row.get("error"):
        return f"  {row['candidate']:<50} {row['error'].splitlines()[0][:80]}"
    if "median_ms" in row:
        spread = f"{row['p10_ms']:.4g} - {row['p90_ms']:.4g}"
        figures = f"{row['median_ms']:.4g} ms ({spread}), {row['against_default']:.3f} of the default"
        return f"  {row['candidate']:<50} {figures}; predicted {low:.2f} - {high:.2f}"
    figures = ", ".join(f"{name} {row[name]}" for name in ("registers", "spills", "instructions_per_element"))
    return f"  {row['candidate']:<50} {figures}"


if __name__ == "__main__":
    sys.exit(main())
