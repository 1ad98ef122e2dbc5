"""Times and memory of steps, taken so that the contestants of one run can be compared.

Interleaved: each round runs every contestant once, so that a machine that slows down slows all of them.
Cold: before each step a buffer larger than any cache is written, so that nothing is left from the last one.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

Step = Callable[[], Any]

MEBIBYTE = 1 << 20
SCRATCH_BYTES = 256 * MEBIBYTE  # an H200's L2 is 60 MiB, a server's L3 is rarely above 256
COPY_BYTES = {"cpu": 256 * MEBIBYTE, "cuda": 1024 * MEBIBYTE}
WARMUPS = 2


class Times(NamedTuple):
    """Of many runs, in milliseconds."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, samples: list[float]) -> "Times":
        return cls(*(float(value) for value in np.percentile(samples, (50, 10, 90))))


def milliseconds(step: Step, device: torch.device) -> float:
    """How long one step takes: on a GPU between two events on its stream, else on the clock."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    start_seconds = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - start_seconds)


def interleave(
    steps: Mapping[str, Step], repeats: int, device: torch.device, tell: Callable[[int, str], None]
) -> dict[str, Times]:
    """Runs every step `repeats` times in turn, from cold caches; `tell` hears whose turn it is."""
    scratch = torch.empty(SCRATCH_BYTES, dtype=torch.uint8, device=device)
    for step in steps.values():
        for _ in range(WARMUPS):
            step()
    samples: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(repeats):
        first = turn % len(names)  # another one first each time, so that nobody keeps its predecessor
        for name in names[first:] + names[:first]:
            tell(turn, name)
            scratch.fill_(turn % 2)
            samples[name].append(milliseconds(steps[name], device))
    return {name: Times.of(taken) for name, taken in samples.items()}


def copy_step(device: torch.device) -> tuple[Step, int]:
    """A copy that no cache can hold, and how many bytes it reads and writes."""
    source = torch.ones(COPY_BYTES[device.type] // 4, device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source), 2 * source.nbytes


class Memory(NamedTuple):
    """Of one step, in bytes by torch's allocator: the most that it held beyond what it held before, and what
    of it was still held afterwards."""

    peak: int
    kept: int


def memory(step: Step, device: torch.device) -> Memory:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        after = torch.cuda.memory_allocated(device)
        return Memory(torch.cuda.max_memory_allocated(device) - before, after - before)
    held = np.cumsum([0, *_cpu_allocations(step)])
    return Memory(int(held.max()), int(held[-1]))


def _cpu_allocations(step: Step) -> list[int]:
    """Bytes allocated (> 0) and freed (< 0) during a step in order of time, as torch's profiler saw them."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _silent_stderr(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    memory = [event for event in events if event.get("name") == "[memory]"]
    return [event["args"]["Bytes"] for event in sorted(memory, key=lambda event: event["ts"])]


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Some builds of torch announce every profile there, from C++, and no setting stops them."""
    stderr = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
