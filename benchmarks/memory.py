"""Bytes per parameter: what each optimizer keeps, and what its steps need temporarily.

    python -m benchmarks.memory [--model NAME] [--device cpu|cuda] [--json FILE]

The tensors have a model's shapes and random values. The figures come from torch's own record of its
allocations: what remains after the first steps is state, what exists only during a step is temporary. Then
the model is trained (forward, backward and step), also with released gradients (`release_gradients`), to
measure the peak.
"""

import argparse
import gc
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.common import machine, models, timing
from benchmarks.common.progress import progress
from benchmarks.common.results import ACCESSES, dtype_name
from benchmarks.step import report
from pats_kernels import PATS, PATSAdamW, release_gradients
from pats_kernels.hyperparameters import Sensitivity

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NOISE_SCALE = 1e-5
SETTLED = 3  # steps; later ones allocate nothing that stays
SEQUENCES = (1, 2, 4, 8)  # in a training batch, each of `models.SEQUENCE` tokens
TRAINED_DTYPES = (torch.float32, torch.bfloat16)


class Row(TypedDict):
    """One optimizer. Bytes are for all tensors together. They are measured, except `moved_bytes`: the least
    that a step must read and write; None if torch makes many passes. `state_dtype`: of AdamW's moments."""

    optimizer: str
    dtype: str
    state_dtype: str
    state_bytes: int
    first_step_temporary_bytes: int
    temporary_bytes: int
    moved_bytes: int | None


class Training(TypedDict):
    """One optimizer in training. `peak_bytes`: measured peak of forward, backward and step, beyond parameters
    and state. `released_peak_bytes`: the same with gradients released."""

    optimizer: str
    dtype: str
    sequences: int
    tokens: int
    peak_bytes: int
    released_peak_bytes: int


class Report(machine.Machine):
    """One run."""

    model: str
    params: int
    tensors: int
    results: list[Row]
    training: list[Training]


@dataclass(frozen=True)
class Contestant:
    """An optimizer of a model's parameters. `passes`: its passes over memory, each a key of `ACCESSES` with
    the dtype of its state; empty if torch makes many passes."""

    name: str
    make: Callable[[list[nn.Parameter]], Optimizer]
    state_dtype: torch.dtype
    passes: tuple[tuple[str, torch.dtype], ...] = ()


MOMENTS = "moments_adamw"  # moves as many bytes as AdamW


def contestants(dtype: torch.dtype) -> Iterator[Contestant]:
    """All optimizers for parameters of `dtype`. torch's AdamW keeps its moments in the parameters' dtype."""
    single, half = torch.float32, torch.bfloat16
    own, other = (half, single) if dtype == half else (single, half)  # PATS's default comes first
    yield Contestant("AdamW", lambda ps: torch.optim.AdamW(ps, foreach=False), dtype)
    yield Contestant("AdamW(foreach=True)", lambda ps: torch.optim.AdamW(ps, foreach=True), dtype)
    adamw = (MOMENTS, dtype)
    yield Contestant("AdamW(fused=True)", lambda ps: torch.optim.AdamW(ps, fused=True), dtype, (adamw,))
    yield Contestant("AdamW(fused=True) + PATS", _attached, dtype, (("pats", own), adamw))
    for state in (own, other):
        yield Contestant("PATSAdamW", _one_pass("ema", state), state, (("pats_adamw", state),))
        name = 'PATSAdamW(sensitivity="moments")'
        yield Contestant(name, _one_pass("moments", state), state, ((MOMENTS, state),))


def _attached(params: list[nn.Parameter]) -> Optimizer:
    optimizer = torch.optim.AdamW(params, fused=True)
    PATS(optimizer, noise_scale=NOISE_SCALE)
    return optimizer


def _one_pass(
    sensitivity: Sensitivity, state_dtype: torch.dtype
) -> Callable[[list[nn.Parameter]], Optimizer]:
    def make(params: list[nn.Parameter]) -> Optimizer:
        return PATSAdamW(params, noise_scale=NOISE_SCALE, sensitivity=sensitivity, state_dtype=state_dtype)

    return make


OWN_ACCESSES = 3  # per pass: read w and g, write w, in their own dtype; the rest is state


def moved_bytes(contestant: Contestant, dtype: torch.dtype) -> int:
    """The least bytes that all passes together move per parameter."""
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
    step = contestant.make(params).step
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


def trained(dtype: torch.dtype) -> Iterator[Contestant]:
    """The contestants with PATS whose state has the parameters' dtype."""
    return (c for c in contestants(dtype) if "PATS" in c.name and c.state_dtype == dtype)


def train(
    contestant: Contestant, name: str, dtype: torch.dtype, sequences: int, device: torch.device
) -> Training:
    """The peaks of a training step that begins and ends without gradients."""
    peaks: list[int] = []
    for released in (False, True):
        model: Any = models.build(name, device)
        model.to(dtype).train()
        optimizer = contestant.make(list(model.parameters()))
        if released:
            release_gradients(optimizer)
        vocabulary = model.config.vocab_size
        tokens = torch.randint(vocabulary, (sequences, models.SEQUENCE), device=device)

        def step(model: Any = model, optimizer: Optimizer = optimizer, tokens: Tensor = tokens) -> None:
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        for _ in range(SETTLED - 1):
            step()
        peaks.append(timing.memory(step, device).peak)
        del model, optimizer, step
        gc.collect()  # the hooks that release gradients and transformers' models are in reference cycles
    return {
        "optimizer": contestant.name,
        "dtype": dtype_name(dtype),
        "sequences": sequences,
        "tokens": models.SEQUENCE,
        "peak_bytes": peaks[0],
        "released_peak_bytes": peaks[1],
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
    trainings: list[Training] = []
    for dtype in TRAINED_DTYPES:
        for contestant in trained(dtype):
            for sequences in SEQUENCES:
                tell(f"{contestant.name}, {dtype_name(dtype)}, {sequences} sequences")
                trainings.append(train(contestant, model, dtype, sequences, device))
    numel = sum(shape.numel() for shape in shapes)
    about_model = {"model": model, "params": numel, "tensors": len(shapes)}
    return cast(Report, {**about, **about_model, "results": rows, "training": trainings})


def table(result: Report) -> Table:
    numel = result["params"]
    caption = f"{numel / 1e6:.1f} M parameters in {result['tensors']} tensors; bytes a parameter"
    grid = Table(
        title=f"memory of {result['model']}{machine.isa_title(result)}",
        caption=caption,
        title_style="bold",
        box=box.SIMPLE_HEAD,
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


def training_table(result: Report) -> Table:
    caption = (
        f"peak MB of forward, backward and step; sequences of {models.SEQUENCE} tokens. beyond: without "
        "parameters and state; in all: with them"
    )
    grid = Table(
        title=f"training {result['model']}", caption=caption, title_style="bold", box=box.SIMPLE_HEAD
    )
    for column in ("parameters", "optimizer"):
        grid.add_column(column, no_wrap=True)
    for column in ("sequences", "beyond", "released", "saved", "in all", "released"):
        grid.add_column(column, justify="right")
    state = {(row["optimizer"], row["dtype"], row["state_dtype"]): row for row in result["results"]}
    for row in result["training"]:
        peaks = row["peak_bytes"], row["released_peak_bytes"]
        held = getattr(torch, row["dtype"]).itemsize * result["params"]
        held += state[row["optimizer"], row["dtype"], row["dtype"]]["state_bytes"]
        columns = (*peaks, peaks[0] - peaks[1], *(held + peak for peak in peaks))
        grid.add_row(
            row["dtype"],
            row["optimizer"].replace("[", r"\["),
            str(row["sequences"]),
            *(f"{value / 1e6:.0f}" for value in columns),
        )
    return grid


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="bert-base-uncased", help="name on the Hugging Face hub")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    options = parser.parse_args(arguments)
    try:
        models.config(options.model)
    except ValueError as error:
        parser.error(str(error))
    console = Console(width=None if sys.stdout.isatty() else report.WIDTH)
    with progress() as tell:
        result = run(options.model, torch.device(options.device), tell)
    console.print(table(result), training_table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
