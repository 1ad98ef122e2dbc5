"""Bytes a parameter: what each optimizer keeps, and what its steps hold besides.

    python -m benchmarks.memory [--model NAME] [--device cpu|cuda] [--json FILE]

The tensors are a model's, their numbers random. Measured by torch's own account of its allocations: what
the first steps leave behind is state, what a step holds for a while is temporary.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import machine, models, report, timing
from benchmarks.results import ACCESSES, dtype_name
from pats_kernels import PATS, PATSAdamW
from pats_kernels.hyperparameters import Sensitivity

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NOISE_SCALE = 1e-5
SETTLED = 3  # steps; from then on nothing more is allocated that stays

Step = Callable[[], object]


class Row(TypedDict):
    """One optimizer. Bytes are of all tensors together and measured, but for `moved_bytes`: the least that
    its step must read and write, None where torch makes many passes. `state_dtype`: of AdamW's moments."""

    optimizer: str
    dtype: str
    state_dtype: str
    state_bytes: int
    first_step_temporary_bytes: int
    temporary_bytes: int
    moved_bytes: int | None


class Report(machine.Machine):
    """One run. `param_bytes` are of the parameters alone; gradients are as many."""

    model: str
    params: int
    tensors: int
    results: list[Row]


@dataclass(frozen=True)
class Contestant:
    """An optimizer over a model's parameters. `passes`: those it makes over memory, each a key of `ACCESSES`
    with the dtype of its state; none where torch makes many."""

    name: str
    make: Callable[[list[nn.Parameter]], Step]
    state_dtype: torch.dtype
    passes: tuple[tuple[str, torch.dtype], ...] = ()


MOMENTS = "moments_adamw"  # moves what AdamW moves


def contestants(dtype: torch.dtype) -> Iterator[Contestant]:
    """All that have parameters of `dtype`; torch's AdamW keeps its moments in the parameters' dtype."""
    single, half = torch.float32, torch.bfloat16
    own, other = (half, single) if dtype == half else (single, half)  # PATS's default comes first
    yield Contestant("AdamW", lambda ps: torch.optim.AdamW(ps, foreach=False).step, dtype)
    yield Contestant("AdamW(foreach=True)", lambda ps: torch.optim.AdamW(ps, foreach=True).step, dtype)
    adamw = (MOMENTS, dtype)
    yield Contestant("AdamW(fused=True)", lambda ps: torch.optim.AdamW(ps, fused=True).step, dtype, (adamw,))
    yield Contestant("AdamW(fused=True) + PATS", _attached, dtype, (("pats", own), adamw))
    for state in (own, other):
        yield Contestant("PATSAdamW", _one_pass("ema", state), state, (("pats_adamw", state),))
        name = 'PATSAdamW(sensitivity="moments")'
        yield Contestant(name, _one_pass("moments", state), state, ((MOMENTS, state),))


def _attached(params: list[nn.Parameter]) -> Step:
    optimizer = torch.optim.AdamW(params, fused=True)
    PATS(optimizer, noise_scale=NOISE_SCALE)
    return optimizer.step


def _one_pass(sensitivity: Sensitivity, state_dtype: torch.dtype) -> Callable[[list[nn.Parameter]], Step]:
    def make(params: list[nn.Parameter]) -> Step:
        return PATSAdamW(
            params, noise_scale=NOISE_SCALE, sensitivity=sensitivity, state_dtype=state_dtype
        ).step

    return make


OWN_ACCESSES = 3  # of a pass: w and g are read and w is written, in their own dtype; the rest is state


def moved_bytes(contestant: Contestant, dtype: torch.dtype) -> int:
    """The least that all passes move for a parameter."""
    return sum(
        OWN_ACCESSES * dtype.itemsize + (ACCESSES[form]["delayed"] - OWN_ACCESSES) * state.itemsize
        for form, state in contestant.passes
    )


def measure(
    contestant: Contestant, shapes: list[torch.Size], dtype: torch.dtype, device: torch.device
) -> Row:
    params = [nn.Parameter(torch.randn(shape, device=device).to(dtype)) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    step = contestant.make(params)
    first = timing.memory(step, device)
    state = first.kept + sum(timing.memory(step, device).kept for _ in range(SETTLED - 1))
    moved = moved_bytes(contestant, dtype) * sum(map(Tensor.numel, params))
    return {
        "optimizer": contestant.name,
        "dtype": dtype_name(dtype),
        "state_dtype": dtype_name(contestant.state_dtype),
        "state_bytes": state,
        "first_step_temporary_bytes": first.peak - first.kept,
        "temporary_bytes": timing.memory(step, device).peak,
        "moved_bytes": moved if contestant.passes else None,
    }


def run(model: str, device: torch.device, tell: Callable[[str], None] = lambda doing: None) -> Report:
    about = machine.prepare(device)
    with torch.device("meta"):
        shapes = [param.shape for param in models.build(model, "meta").parameters()]
    rows: list[Row] = []
    for dtype in DTYPES:
        for contestant in contestants(dtype):
            tell(f"{contestant.name}, {dtype_name(dtype)}")
            rows.append(measure(contestant, shapes, dtype, device))
    numel = sum(shape.numel() for shape in shapes)
    return {**about, "model": model, "params": numel, "tensors": len(shapes), "results": rows}


def table(result: Report) -> Table:
    numel = result["params"]
    caption = f"{numel / 1e6:.1f} M parameters in {result['tensors']} tensors; bytes a parameter"
    grid = Table(
        title=f"memory of {result['model']}", caption=caption, title_style="bold", box=box.SIMPLE_HEAD
    )
    for column in ("parameters", "optimizer", "state in"):
        grid.add_column(column, no_wrap=True)
    for column in ("state", "temporary, first step", "temporary", "with w and g, at most", "moved a step"):
        grid.add_column(column, justify="right")
    for row in result["results"]:
        held = 2 * getattr(torch, row["dtype"]).itemsize * numel + row["state_bytes"]
        moved = row["moved_bytes"]
        columns = (
            row["state_bytes"],
            row["first_step_temporary_bytes"],
            row["temporary_bytes"],
            held + max(row["first_step_temporary_bytes"], row["temporary_bytes"]),
        )
        grid.add_row(
            row["dtype"],
            row["optimizer"].replace("[", r"\["),
            row["state_dtype"],
            *(f"{value / numel:.2f}" for value in columns),
            "" if moved is None else f"{moved / numel:.0f}",
        )
    return grid


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="bert-base-uncased", help="its name on the Hugging Face hub")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    try:
        models.config(options.model)
    except ValueError as error:
        parser.error(str(error))
    console = Console(width=None if sys.stdout.isatty() else report.WIDTH)
    with console.status("", refresh_per_second=2) as status:
        result = run(options.model, torch.device(options.device), lambda doing: status.update(f"{doing} ..."))
    console.print(table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
