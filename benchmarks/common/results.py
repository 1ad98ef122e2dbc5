"""What a benchmark reports: the format of the JSON, and the figures computed from the measured ones."""

from typing import TypedDict

import torch

from benchmarks.common.machine import Machine
from benchmarks.common.timing import Times


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
    """One run. `errors` says why a contestant could not take part. `rechecked` says how far this package's
    contestants were off in a step after all rounds, as a share of what is allowed: see `recheck`."""

    model: str
    params: int
    tensors: int
    repeats: int
    cold_caches: bool
    rechecked: dict[str, float]
    copy_gbps: float
    adamw_fused_ms: float
    adamw_fused_bytes_per_param: int
    host_us_per_tensor: float | None
    errors: dict[str, str]
    results: list[Row]


# What a step of each form must read and write of a parameter, whoever runs it, counted in elements.
ADAMW = 4 + 3  # reads w, g, m, v; writes w, m, v
ACCESSES = {
    "pats": {
        "delayed": 4 + 3,  # reads w, g, S, U; writes w, S, U
        "exact": (4 + 2) + (3 + 1),  # reads w, g, S, U, writes S, U; the means known: reads w, S, U, writes w
    },
    "pats_adamw": {
        "delayed": 6 + 5,  # reads w, g, S, U, m, v; writes all of them but g
        "exact": (4 + 2) + (6 + 3),  # the averages as above; then reads all six, writes w, m, v
    },
    "moments_adamw": {
        "delayed": 4 + 3,  # as AdamW
        "exact": 4 + (4 + 3),  # reads w, g, m, v for the means alone, and again to go on
    },
}
ACCESSES["pats, adamw"] = {  # one after the other
    normalization: count + ADAMW for normalization, count in ACCESSES["pats"].items()
}


def adamw_bytes(dtype: torch.dtype) -> int:
    """The fewest bytes that AdamW alone moves for a parameter, with its state in the same dtype."""
    return ADAMW * dtype.itemsize


def bytes_per_param(dtype: torch.dtype, normalization: str, form: str) -> int:
    """The fewest bytes that a step of this form, a key of `ACCESSES`, moves for a parameter and its state.

    The form says how many passes the step needs, not how many are made. Steps that are separate for the user
    are "pats, adamw", however many passes torch makes; one compiled graph is "pats_adamw", even if the
    compiler makes several. More passes then show as a smaller share of the bandwidth, as they should.
    """
    return ACCESSES[form][normalization] * dtype.itemsize


def gigabytes_per_second(moved: float, milliseconds: float) -> float:
    return moved / milliseconds / 1e6


def row(
    *,
    variant: str,
    backend: str,
    form: str,
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
    """A contestant's times and the figures that follow from them."""
    moved = bytes_per_param(dtype, normalization, form)
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
