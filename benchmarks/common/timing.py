"""Measures time and memory of steps, so that the contestants of one run can be compared.

Interleaved: each round runs every contestant once, so a machine that slows down slows all of them.
Cold: before each step a buffer larger than any cache is written, so nothing of the last step is left in one.
"""

import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

Step = Callable[[], Any]

MEBIBYTE = 1 << 20
SCRATCH_BYTES = 256 * MEBIBYTE  # an H200's L2 is 60 MiB, a server's L3 is rarely above 256
COPY_BYTES = {"cpu": 256 * MEBIBYTE, "cuda": 1024 * MEBIBYTE}
WARMUPS = 2
FEWEST = 5  # rounds of a contest, however long they take
LEAD, MOST_LEAD = 0.2, 30.0  # milliseconds


class Times(NamedTuple):
    """Times of many runs, in milliseconds."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, samples: list[float]) -> "Times":
        return cls(*(float(value) for value in np.percentile(samples, (50, 10, 90))))


class Measured(NamedTuple):
    """Times of one contestant on a GPU: of the device, for a step queued while it was busy; of the host,
    until the call returns; and from an idle device to an idle device. On a CPU all three are the same."""

    device: Times
    host: Times
    wall: Times


def milliseconds(step: Step, device: torch.device, lead: float = 0.0) -> float:
    """The time of one step: on a GPU between two events on its stream, else by the clock.

    Before the step, the GPU is kept busy for `lead` milliseconds. If the host queues the step in that time,
    the host's time does not count; nor does it in training, where the backward pass keeps the GPU busy.
    """
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if lead > 0:
            _keep_waiting(device, lead)
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    start_seconds = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - start_seconds)


def from_idle(step: Step, device: torch.device) -> tuple[float, float]:
    """Milliseconds until a step's call returns, and until its work is done, on an idle device."""
    synchronize(device)
    start = time.perf_counter()
    step()
    returned = time.perf_counter()
    synchronize(device)
    return 1e3 * (returned - start), 1e3 * (time.perf_counter() - start)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _keep_waiting(device: torch.device, duration: float) -> None:
    torch.cuda._sleep(int(duration * _cycles(device)))


@cache
def _cycles(device: torch.device) -> float:
    """Cycles of the GPU's clock in a millisecond, after the GPU has been busy for a short time."""
    taken = [milliseconds(lambda: torch.cuda._sleep(10_000_000), device) for _ in range(2)]
    return 10_000_000 / taken[-1]


def contest(
    steps: Mapping[str, Step],
    repeats: int,
    device: torch.device,
    tell: Callable[[int, str], None],
    seconds: float = math.inf,
    cold: bool = True,
) -> dict[str, Measured]:
    """Runs every step `repeats` times in turn and calls `tell` with the one whose turn it is. With `cold`,
    each step starts with cold caches; otherwise with what the previous step has left in them.

    After `seconds` no new round begins, if there were at least `FEWEST`.
    """
    scratch = torch.empty(SCRATCH_BYTES if cold else 0, dtype=torch.uint8, device=device)
    leads: dict[str, float] = {}
    for name, step in steps.items():
        for _ in range(WARMUPS):
            leads[name] = min(MOST_LEAD, LEAD + 1.5 * from_idle(step, device)[0])
    samples: dict[str, list[tuple[float, float, float]]] = {name: [] for name in steps}
    names = list(steps)
    start = time.monotonic()
    for turn in range(repeats):
        if turn >= FEWEST and time.monotonic() - start > seconds:
            break
        first = turn % len(names)  # another one first each time, so that nobody keeps its predecessor
        for name in names[first:] + names[:first]:
            tell(turn, name)
            scratch.fill_(turn % 2)
            taken = milliseconds(steps[name], device, leads[name])
            host, wall = taken, taken
            if device.type == "cuda":
                scratch.fill_(turn % 2)
                host, wall = from_idle(steps[name], device)
            samples[name].append((taken, host, wall))
    columns = {name: [list(column) for column in zip(*rows, strict=True)] for name, rows in samples.items()}
    return {name: Measured(*map(Times.of, column)) for name, column in columns.items()}


def interleave(
    steps: Mapping[str, Step],
    repeats: int,
    device: torch.device,
    tell: Callable[[int, str], None],
    cold: bool = True,
) -> dict[str, Times]:
    """A contest's times on the device."""
    measured = contest(steps, repeats, device, tell, cold=cold)
    return {name: own.device for name, own in measured.items()}


def capture(step: Step) -> Step:
    """Captures the step as a CUDA graph and returns its replay. First runs the step on the capturing stream.

    Raises:
        RuntimeError: torch or CUDA cannot capture it.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph.replay


def copy_step(device: torch.device) -> tuple[Step, int]:
    """A copy too large for any cache, and the number of bytes that it reads and writes."""
    source = torch.ones(COPY_BYTES[device.type] // 4, device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source), 2 * source.nbytes


class Memory(NamedTuple):
    """Memory of one step, in bytes by torch's allocator: the peak above what was held before, and what of
    that was still held afterwards."""

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
    """Silences stderr: some builds of torch announce every profile, from C++, and no setting stops it."""
    stderr = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
