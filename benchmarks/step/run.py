"""Runs one contest: times the contestants, a copy and fused AdamW in turn, on the same parameters."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.common import machine, models, timing
from benchmarks.common.results import Report, adamw_bytes, gigabytes_per_second, row
from benchmarks.step import variants
from benchmarks.step.recheck import recheck
from benchmarks.step.variants import Contestant, Task, Tensors
from pats_kernels.hyperparameters import AdamWHyperparameters, Normalization

LEARNING_RATE = 1e-6  # small, so that hundreds of steps hardly change the model
COPY, ADAMW = "a copy", "fused AdamW"

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Settings:
    model: str
    device: torch.device
    dtype: torch.dtype
    optimizer: str
    variants: tuple[str, ...]
    normalization: Normalization
    backend: str
    repeats: int
    text: str
    cold: bool = True  # empty the caches before each step


def run(settings: Settings, tell: Progress) -> Report:
    """Runs the contest; `tell` is called with each stage.

    Raises:
        ValueError: an unknown model.
        RuntimeError: the fused step cannot run with this backend here.
        Wrong: after all rounds, a step of this package differs from eager's.
    """
    described = machine.prepare(settings.device)
    h = AdamWHyperparameters(normalization=settings.normalization, lr=LEARNING_RATE)
    tell(f"one backward pass of {settings.model}")
    gradients = models.gradients(settings.model, settings.text, settings.device, settings.dtype)
    task = Task(Tensors.fresh(gradients), h, settings.optimizer, settings.backend)
    adamw = variants.torch_adamw(task, fused=True)
    contestants, errors = _contestants(settings.variants, task, tell)
    steps = {c.name: c.step for c in contestants}
    copy, copied = timing.copy_step(settings.device)
    times = timing.interleave(
        {COPY: copy, ADAMW: adamw.step, **steps},
        settings.repeats,
        settings.device,
        lambda turn, name: tell(f"round {turn + 1} of {settings.repeats}: {name}"),
        settings.cold,
    )
    tell("one more step, compared with eager's")
    rechecked = {c.name: recheck(c, task) for c in contestants if c.name in variants.OURS}
    tell("memory and host time")
    peaks = {name: timing.memory(step, settings.device).peak for name, step in steps.items()}
    copy_gbps = gigabytes_per_second(copied, times[COPY].median)
    return {
        **described,
        "model": settings.model,
        "params": gradients.numel,
        "tensors": len(gradients.params),
        "repeats": settings.repeats,
        "cold_caches": settings.cold,
        "rechecked": rechecked,
        "copy_gbps": copy_gbps,
        "adamw_fused_ms": times[ADAMW].median,
        "adamw_fused_bytes_per_param": adamw_bytes(settings.dtype),
        "host_us_per_tensor": _host_us(settings.variants, task),
        "errors": errors,
        "results": [
            row(
                variant=c.name,
                backend=c.backend,
                form=c.form,
                configuration=c.configuration,
                optimizer=settings.optimizer,
                dtype=settings.dtype,
                normalization=settings.normalization,
                times=times[c.name],
                eager=times.get("eager"),
                params=gradients.numel,
                copy_gbps=copy_gbps,
                peak_extra_bytes=peaks[c.name],
            )
            for c in contestants
        ],
    }


def _host_us(names: tuple[str, ...], task: Task) -> float | None:
    """The fused step's host time, if it takes part."""
    return variants.host_us_per_tensor(len(task.tensors.params), task) if "fused" in names else None


def _contestants(
    names: tuple[str, ...], task: Task, tell: Progress
) -> tuple[list[Contestant], dict[str, str]]:
    """The contestants that can run, and why others cannot: no compiler, say, or too little memory.

    A failure of this package's own step is raised, because the benchmark is about it.
    """
    ready: list[Contestant] = []
    errors: dict[str, str] = {}
    for name in names:
        tell(f"preparing {name}")
        try:
            contestant = variants.contestant(name, task)
            contestant.step()
            ready.append(contestant)
        except Exception as error:
            if name in variants.OURS:
                raise
            errors[name] = f"{type(error).__name__}: {error}"
    return ready, errors
