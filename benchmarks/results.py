"""What a benchmark reports: the JSON's shape, and the figures that follow from the measured ones."""

from typing import TypedDict

import torch

from benchmarks.machine import Machine
from benchmarks.timing import Times


class Row(TypedDict):
    """One contestant."""

    variant: str
    backend: str
    optimizer: str
    dtype: str
    state_dtype: str
    normalization: str
    median_ms: float
    p10_ms: float
    p90_ms: float
    ns_per_param: float
    bytes_per_param: int
    gbps: float
    fraction_of_copy: float
    speedup_vs_eager: float | None
    peak_extra_bytes: int
    configuration: str | None


class Report(Machine):
    """One run; `errors` says why a contestant could not take part."""

    model: str
    params: int
    tensors: int
    repeats: int
    copy_gbps: float
    adamw_fused_ms: float
    adamw_fused_bytes_per_param: int
    host_us_per_tensor: float | None
    errors: dict[str, str]
    results: list[Row]


def adamw_bytes(dtype: torch.dtype) -> int:
    """The least that AdamW moves for a parameter: reads w, g, m, v and writes w, m, v."""
    return 7 * dtype.itemsize


def bytes_per_param(dtype: torch.dtype, normalization: str, optimizer: str) -> int:
    """The least that a step moves for a parameter with its state in the same dtype, whoever runs it.

    delayed: reads w, g, S, U and writes w, S, U. exact: reads w, g, S, U and writes S, U, then, the means
    known, reads w, S, U and writes w.
    """
    accesses = {"delayed": 7, "exact": 10}[normalization]
    return accesses * dtype.itemsize + (adamw_bytes(dtype) if optimizer == "adamw" else 0)


def gigabytes_per_second(moved: float, milliseconds: float) -> float:
    return moved / milliseconds / 1e6


def row(
    *,
    variant: str,
    backend: str,
    configuration: str | None,
    optimizer: str,
    dtype: torch.dtype,
    normalization: str,
    times: Times,
    eager: Times | None,
    params: int,
    copy_gbps: float,
    peak_extra_bytes: int,
) -> Row:
    """A contestant's times with what follows from them."""
    moved = bytes_per_param(dtype, normalization, optimizer)
    gbps = gigabytes_per_second(moved * params, times.median)
    return {
        "variant": variant,
        "backend": backend,
        "optimizer": optimizer,
        "dtype": dtype_name(dtype),
        "state_dtype": dtype_name(dtype),
        "normalization": normalization,
        "median_ms": times.median,
        "p10_ms": times.p10,
        "p90_ms": times.p90,
        "ns_per_param": 1e6 * times.median / params,
        "bytes_per_param": moved,
        "gbps": gbps,
        "fraction_of_copy": gbps / copy_gbps,
        "speedup_vs_eager": eager.median / times.median if eager else None,
        "peak_extra_bytes": peak_extra_bytes,
        "configuration": configuration,
    }


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
