"""Tests the normals that a backend really adds: their distribution, their tails, and their correlations.

With w = g = S = 0 and a mean of 1 the gate is exactly 1, so one step with noise_scale 1 writes z to w.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import integrate, special, stats
from torch import Tensor

from pats_kernels import pats_step_

Array = NDArray[np.float64]

LARGEST = math.sqrt(2 * 33 * math.log(2))  # largest |z|: the least uniform number is 2^-33
PIECE = 2**22  # elements computed in float64 at once
TAILS = (3.0, 4.0, 5.0, 5.5)
LAGS = (1, 2, 3, 4, 5, 8, 16, 64, 256, 4096, 16384)
MOMENTS = range(1, 9)


class Finding(TypedDict):
    """One test: the value seen, a perfect source's value on average, and the two-sided p-value."""

    test: str
    seen: float
    expected: float
    p: float


class Normals(TypedDict):
    """A backend's normals."""

    backend: str
    samples: int
    largest: float
    largest_possible: float
    findings: list[Finding]


def draw(backend: str, numel: int, *, seed: int, step: int, tensor_ids: Sequence[int]) -> list[Tensor]:
    """The noise of tensors of `numel` elements, float32, as the backend adds it."""
    params, grads, sens = ([torch.zeros(numel) for _ in tensor_ids] for _ in range(3))
    means = [torch.tensor([1.0, 0.0]) for _ in tensor_ids]
    unc = [None] * len(params)
    ids = list(tensor_ids)
    pats_step_(
        *(params, grads, sens, unc, means),
        step=step,
        tensor_ids=ids,
        seed=seed,
        noise_scale=1.0,
        uncertainty="none",
        backend=backend,
    )
    return params


def anderson_darling(z: NDArray[np.floating]) -> tuple[float, float]:
    """A^2 against N(0, 1), with no estimated parameters, and its p-value. Sorts `z` in place."""
    z.sort()
    n, total = len(z), 0.0
    for start in range(0, n, PIECE):
        part = z[start : start + PIECE].astype(np.float64)
        rank = np.arange(start + 1, start + 1 + len(part), dtype=np.float64)
        total += float((2 * rank - 1) @ special.log_ndtr(part))
        total += float((2 * (n - rank) + 1) @ special.log_ndtr(-part))
    square = -n - total / n
    return square, 1 - anderson_darling_cdf(square)


def anderson_darling_cdf(x: float) -> float:
    """The asymptotic distribution of A^2: the series of Anderson and Darling (1954)."""
    total = 0.0
    for j in range(20):
        t = (4 * j + 1) ** 2 * math.pi**2 / (8 * x)
        value, _ = integrate.quad(_integrand, 0, math.inf, args=(x, t))
        total += float(special.binom(-0.5, j)) * (4 * j + 1) * math.exp(-t) * value
    return math.sqrt(2 * math.pi) / x * total


def _integrand(w: float, x: float, t: float) -> float:
    return math.exp(x / (8 * (w * w + 1)) - w * w * t)


def by_score(test: str, seen: float, expected: float, deviation: float) -> Finding:
    """The finding for a value that is normally distributed about `expected`."""
    return {
        "test": test,
        "seen": seen,
        "expected": expected,
        "p": float(2 * stats.norm.sf(abs(seen - expected) / deviation)),
    }


def by_count(test: str, seen: int, expected: float) -> Finding:
    """The finding for a Poisson count; p is twice the smaller tail, at most 1."""
    tails = (stats.poisson.cdf(seen, expected), stats.poisson.sf(seen - 1, expected))
    return {"test": test, "seen": float(seen), "expected": expected, "p": float(min(1.0, 2 * min(tails)))}


@dataclass
class _Products:
    """Correlations of z, and of z^2, between places, from sums of products."""

    sums: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, a: Array, b: Array) -> None:
        for kind, x, y in ((f"z, {name}", a, b), (f"z^2, {name}", (a**2 - 1) / 2**0.5, (b**2 - 1) / 2**0.5)):
            entry = self.sums.setdefault(kind, [0.0, 0.0])
            entry[0] += float(x @ y)
            entry[1] += len(x)

    def findings(self) -> Iterator[Finding]:
        """The factors have mean 0 and variance 1, so each product has too if they are independent."""
        for name, (total, count) in self.sums.items():
            yield by_score(f"correlation of {name}", total / count, 0.0, count**-0.5)


def measure(backend: str, chunk: int, chunks: int, seed: int) -> Normals:
    """`chunks` steps of two tensors of `chunk` elements; the second is only compared with the first."""
    powers, tails = np.zeros(len(MOMENTS)), np.zeros(2 * len(TAILS), dtype=np.int64)
    largest, products = 0.0, _Products()
    before: Array | None = None
    kept = np.empty(chunk * chunks, dtype=np.float32)
    for step in range(1, chunks + 1):
        z, other = (t.double().numpy() for t in draw(backend, chunk, seed=seed, step=step, tensor_ids=(0, 1)))
        power = np.ones_like(z)
        for k in MOMENTS:
            power *= z
            powers[k - 1] += power.sum()
        for i, limit in enumerate(TAILS):
            tails[2 * i] += np.count_nonzero(z > limit)
            tails[2 * i + 1] += np.count_nonzero(z < -limit)
        largest = max(largest, float(np.abs(z).max()))
        kept[(step - 1) * chunk : step * chunk] = z
        for lag in (lag for lag in LAGS if lag < chunk):
            products.add(f"elements {lag} apart", z[:-lag], z[lag:])
        products.add("next tensor", z, other)
        if before is not None:
            products.add("next step", before, z)
        before = z
    n = chunk * chunks
    findings: list[Finding] = []
    for k in MOMENTS:
        mean, square = (_normal_moment(j) for j in (k, 2 * k))
        findings.append(
            by_score(f"moment {k}", float(powers[k - 1]) / n, mean, math.sqrt((square - mean**2) / n))
        )
    for i, limit in enumerate(TAILS):
        for sign, count in (("above", tails[2 * i]), ("below -", tails[2 * i + 1])):
            name = f"{sign} {limit}" if sign == "above" else f"{sign}{limit}"
            findings.append(by_count(name, int(count), n * float(stats.norm.sf(limit))))
    square, p = anderson_darling(kept)
    # The mean of A^2 is 1 for samples of any size.
    findings.append({"test": "Anderson-Darling, A^2", "seen": square, "expected": 1.0, "p": p})
    findings += products.findings()
    return {
        "backend": backend,
        "samples": n,
        "largest": largest,
        "largest_possible": LARGEST,
        "findings": findings,
    }


def _normal_moment(k: int) -> float:
    return 0.0 if k % 2 else float(special.factorial2(k - 1))
