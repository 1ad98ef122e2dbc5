"""`python -m benchmarks.suite --model NAME --json FILE`: all contestants on the same tensors, in one run.

`python -m benchmarks` answers one question. This suite answers all of them at once, so that both sides of
each ratio (PATS and AdamW, exact and delayed, one pass and two) come from the same run. The tensors have a
model's shapes and random values; `--gradients real` runs a backward pass instead. On a GPU every contestant
is timed on the device, on the host, from idle to idle, and as the replay of a CUDA graph.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.common import machine, shapes, timing
from benchmarks.common.results import adamw_bytes, gigabytes_per_second, row
from benchmarks.common.timing import Measured, Step, Times
from benchmarks.step import variants
from benchmarks.step.variants import Contestant, Task, Tensors
from pats_kernels import backends
from pats_kernels.hyperparameters import AdamWHyperparameters, Normalization

COPY, ADAMW = "copy", "adamw_fused"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LEARNING_RATE = 1e-6
REPEATS = {"cpu": 3, "cuda": 40}
SECONDS = 6.0  # for each of the two contests
BASELINES = ("eager", "foreach", "compile")


class Entry(NamedTuple):
    """A contestant, by the fields that identify its row of the result."""

    variant: str
    optimizer: str = "none"
    normalization: Normalization = "delayed"
    backend: str = "auto"


OURS = (
    Entry("fused"),
    Entry("fused", normalization="exact"),
    Entry("attached", "adamw"),
    Entry("fused", "adamw"),
    Entry("moments", "adamw"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    device = torch.device(options.device)
    run(options, device, tell=lambda doing: print(doing, file=sys.stderr, flush=True))
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suite", description=__doc__)
    parser.add_argument("--model", default="bert-base-uncased", help=f"one of {', '.join(shapes.SHAPES)}")
    parser.add_argument("--device", choices=REPEATS, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="dtype of the parameters and their state"
    )
    parser.add_argument("--gradients", choices=("random", "real"), default="random")
    parser.add_argument(
        "--variants",
        default="eager,foreach,fused,attached,moments",
        help="separated by commas; compile takes minutes",
    )
    parser.add_argument(
        "--backends",
        help="this package's backends, separated by commas; default: all fused ones that can run",
    )
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="rough duration of each contest")
    machine.add_isa(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", required=True)
    options = parser.parse_args(arguments)
    try:
        machine.choose_isa(options.isa)
    except ValueError as error:
        parser.error(str(error))
    unknown = set(options.variants.split(",")) - set(variants.NAMES)
    if unknown:
        parser.error(f"unknown variants: {', '.join(sorted(unknown))} (known: {', '.join(variants.NAMES)})")
    if options.gradients == "random" and options.model not in shapes.SHAPES:
        parser.error(f"unknown model: {options.model} (known: {', '.join(shapes.SHAPES)})")
    return options


def run(options: argparse.Namespace, device: torch.device, tell: Any = print) -> dict[str, Any]:
    """Runs the contests. Writes the file after each, so that a failed capture loses no result."""
    described = machine.prepare(device)
    tensors, origin = _tensors(options, device)
    values = AdamWHyperparameters(lr=LEARNING_RATE)
    task = Task(tensors, values, shared=True)
    entries = entries_of(options.variants.split(","), fused_backends(options.backends, device))
    tell(f"preparing {len(entries)} contestants")
    contestants, errors = _prepare(entries, task)
    copy, copied = timing.copy_step(device)
    adamw = variants.torch_adamw(task, fused=True)
    steps = {COPY: copy, ADAMW: adamw.step}
    steps |= {label(entry): contestant.step for entry, contestant in contestants.items()}
    repeats = options.repeats or REPEATS[device.type]
    tell("the contest")
    times = timing.contest(steps, repeats, device, lambda *_: None, options.seconds)
    peaks = {name: timing.memory(step, device).peak for name, step in steps.items() if name != COPY}
    numel = sum(param.numel() for param in tensors.params)
    result: dict[str, Any] = {
        **described,
        "model": options.model,
        "gradients": origin,
        "params": numel,
        "tensors": len(tensors.params),
        "repeats": repeats,
        "seconds": options.seconds,
        "copy_gbps": gigabytes_per_second(copied, times[COPY].device.median),
        "adamw_fused_ms": times[ADAMW].device.median,
        "adamw_fused_bytes_per_param": adamw_bytes(tensors.params[0].dtype),
        "adamw_fused": _figures(times[ADAMW], None),
        "errors": errors,
        "capture_errors": {},
        "results": [],
    }

    def save(captured: dict[str, Times]) -> None:
        result["adamw_fused"] = _figures(times[ADAMW], captured.get(ADAMW))
        result["results"] = [
            _row(entry, made, tensors, times, captured.get(label(entry)), peaks[label(entry)], result)
            for entry, made in contestants.items()
        ]
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    save({})
    if device.type == "cuda":
        tell("captured")
        replays, result["capture_errors"] = _captured(steps)
        replayed = timing.contest(replays, repeats, device, lambda *_: None, options.seconds)
        save({name: measured.device for name, measured in replayed.items()})
    return result


def _tensors(options: argparse.Namespace, device: torch.device) -> tuple[Tensors, str]:
    """The tensors, and a description of their gradients."""
    dtype = DTYPES[options.dtype]
    if options.gradients == "random":
        return Tensors.fresh(shapes.random_gradients(options.model, device, dtype)), "random"
    from benchmarks.common import models  # the only import here that needs transformers

    found = models.gradients(options.model, models.default_text(), device, dtype)
    return Tensors.fresh(found), "of one backward pass"


def fused_backends(asked: str | None, device: torch.device) -> list[str]:
    """This package's kernels that can run on the device, or those asked for."""
    if asked:
        return asked.split(",")
    can = backends.available_backends(device)
    found = [name for name in ("triton", "cuda", "cpp") if can[name] is None]
    return found or ["eager"]


def entries_of(names: Sequence[str], ours: Sequence[str]) -> list[Entry]:
    """The baselines first, then every form of this package's step on each backend."""
    baselines = [Entry(name) for name in BASELINES if name in names]
    chosen = [entry for entry in OURS if entry.variant in names]
    return baselines + [entry._replace(backend=backend) for backend in ours for entry in chosen]


def label(entry: Entry) -> str:
    return " ".join(entry)


def _prepare(entries: Sequence[Entry], task: Task) -> tuple[dict[Entry, Contestant], dict[str, str]]:
    """The contestants that can run, each after a first step, and why the others cannot."""
    ready: dict[Entry, Contestant] = {}
    errors: dict[str, str] = {}
    for entry in entries:
        h = AdamWHyperparameters(lr=LEARNING_RATE, normalization=entry.normalization)
        try:
            own = task._replace(h=h, optimizer=entry.optimizer, backend=entry.backend)
            made = variants.contestant(entry.variant, own)
            made.step()
            timing.synchronize(task.tensors.device)
            ready[entry] = made
        except Exception as error:
            errors[label(entry)] = _said(error)
    return ready, errors


def _captured(steps: dict[str, Step]) -> tuple[dict[str, Step], dict[str, str]]:
    """Replays of all that can be captured. Ours come first, because after a failure others may fail too."""
    replays: dict[str, Step] = {COPY: steps[COPY]}
    errors: dict[str, str] = {}
    for name in sorted(steps.keys() - {COPY}, key=lambda name: name.partition(" ")[0] in BASELINES):
        try:
            torch.cuda.empty_cache()
            replay = timing.capture(steps[name])
            replay()
            torch.cuda.synchronize()
            replays[name] = replay
        except Exception as error:
            errors[name] = _said(error)
    return replays, errors


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:500]}"


def _figures(measured: Measured, captured: Times | None) -> dict[str, float | None]:
    """The other times in milliseconds; a row's median_ms is the device's."""
    return {
        "host_ms": measured.host.median,
        "wall_ms": measured.wall.median,
        "captured_ms": captured.median if captured else None,
        "captured_p10_ms": captured.p10 if captured else None,
        "captured_p90_ms": captured.p90 if captured else None,
    }


def _row(
    entry: Entry,
    made: Contestant,
    tensors: Tensors,
    times: dict[str, Measured],
    captured: Times | None,
    peak: int,
    result: dict[str, Any],
) -> dict[str, Any]:
    eager = times.get(label(Entry("eager")))
    figures = row(
        variant=entry.variant,
        backend=made.backend,
        form=made.form,
        configuration=made.configuration,
        optimizer=entry.optimizer,
        dtype=tensors.params[0].dtype,
        normalization=entry.normalization,
        times=times[label(entry)].device,
        eager=eager.device if eager and entry.optimizer == "none" else None,
        params=result["params"],
        copy_gbps=result["copy_gbps"],
        peak_extra_bytes=peak,
    )
    return {**figures, **_figures(times[label(entry)], captured)}


if __name__ == "__main__":
    sys.exit(main())
