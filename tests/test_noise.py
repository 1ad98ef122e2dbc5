"""The noise of every backend: right at every element, normal, and independent of all its neighbours.

With w = g = S = 0 and a mean of 1, q = 0 and the gate is exactly 1, so one step with noise_scale = 1 writes z
to w. The seeds are fixed, so a statistical test that passes once always passes. The bounds are those that a
true normal exceeds once in a million draws (five standard deviations).
"""

from functools import lru_cache

import numpy as np
import oracle
import pytest
import torch
from conftest import INTERPRETED
from harness import TOLERANCES
from oracle import Array, Hyper
from scipy import stats
from torch import Tensor

from pats_kernels import pats_step_, reference

SAMPLE = 2**16 if INTERPRETED else 2**20  # the interpreter takes a second for 2^16
SIGMAS = 5.0


def draw(
    backend: str, sizes: list[int], tensor_ids: list[int], seed: int = 1, step: int = 1, scale: float = 1.0
) -> list[Tensor]:
    """The noise of some tensors, as the backend adds it."""
    params, grads, sens = ([torch.zeros(size) for size in sizes] for _ in range(3))
    means = [torch.tensor([1.0, 0.0]) for _ in sizes]
    pats_step_(
        params,
        grads,
        sens,
        [None] * len(sizes),
        means,
        step=step,
        tensor_ids=tensor_ids,
        seed=seed,
        noise_scale=scale,
        uncertainty="none",
        backend=backend,
    )
    return params


@lru_cache(maxsize=4)
def sample(source: str, seed: int = 1, step: int = 1, tensor_id: int = 0) -> Array:
    if source == "reference":
        return reference.philox_normal(seed, step, tensor_id, SAMPLE).numpy()
    return draw(source, [SAMPLE], [tensor_id], seed, step)[0].double().numpy()


def check_distribution(z: Array) -> None:
    """Kolmogorov-Smirnov, and the first four moments, whose variances are 1, 2, 6 and 24 over n."""
    n = len(z)
    assert stats.kstest(z, "norm").pvalue > 1e-3
    assert abs(z.mean()) < SIGMAS * np.sqrt(1 / n)
    assert abs(z.var() - 1) < SIGMAS * np.sqrt(2 / n)
    assert abs(stats.skew(z)) < SIGMAS * np.sqrt(6 / n)
    assert abs(stats.kurtosis(z)) < SIGMAS * np.sqrt(24 / n)
    # Beyond 4 sigma: Poisson with mean and variance n p.
    expected = n * 2 * stats.norm.sf(4)
    assert abs(np.sum(np.abs(z) > 4) - expected) < SIGMAS * np.sqrt(expected) + 1


def check_independence(a: Array, b: Array) -> None:
    """Correlations of z and of z^2, each with variance 1/n, and the uniforms' joint distribution on a 16 x 16
    grid."""
    n = len(a)
    assert abs(np.corrcoef(a, b)[0, 1]) < SIGMAS / np.sqrt(n)
    assert abs(np.corrcoef(a**2, b**2)[0, 1]) < SIGMAS / np.sqrt(n)
    cells = [np.minimum((stats.norm.cdf(x) * 16).astype(int), 15) for x in (a, b)]
    counts = np.bincount(16 * cells[0] + cells[1], minlength=256)
    assert stats.chisquare(counts).pvalue > 1e-4


def test_reference_is_normal() -> None:
    check_distribution(sample("reference"))


def test_is_normal(backend: str) -> None:
    check_distribution(sample(backend))


def test_each_of_four_is_normal(backend: str) -> None:
    """The four outputs take four paths through a kernel."""
    z = sample(backend)
    for j in range(4):
        check_distribution(z[j::4])


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 8, 16, 32, 64, 1024, 4096])
def test_neighbours_are_independent(backend: str, lag: int) -> None:
    z = sample(backend)
    check_independence(z[:-lag], z[lag:])


@pytest.mark.parametrize("pair", [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)])
def test_the_four_of_a_group_are_independent(backend: str, pair: tuple[int, int]) -> None:
    z = sample(backend)
    check_independence(z[pair[0] :: 4], z[pair[1] :: 4])


OTHERS = {
    "step": {"step": 2},
    "tensor": {"tensor_id": 1},
    "seed": {"seed": 2},
    "seed, high word": {"seed": 1 + 2**32},
}


@pytest.mark.parametrize("other", OTHERS)
def test_streams_are_independent(backend: str, other: str) -> None:
    check_independence(sample(backend), sample(backend, **OTHERS[other]))


@pytest.mark.parametrize(
    "h",
    [
        Hyper(seed=1),
        Hyper(seed=2**64 - 1, step=2**32 - 1, tensor_id=2**32 - 1),
        Hyper(seed=2**63, step=2**31, tensor_id=2**31),
    ],
    ids=["small", "all ones", "top bits"],
)
def test_every_normal_is_right(backend: str, h: Hyper) -> None:
    """Within the contract's 2e-3 at each of 2^20 elements. Wrong words would be off by 1."""
    (got,) = draw(backend, [SAMPLE], [h.tensor_id], h.seed, h.step)
    exact = oracle.normal(h, np.arange(SAMPLE))
    assert np.abs(got.double().numpy() - exact).max() <= TOLERANCES[backend].z


def extreme_tensors(count: int) -> tuple[list[int], Array]:
    """Ids of the tensors whose first group has the most extreme words of 2^21, and their exact normals.

    For each word these are the nearest to 0 and to 2^32 (for a radius, the largest and the smallest r) and,
    for an angle, also the nearest to quarter turns, where sine or cosine cross zero.
    """
    ids = np.arange(2**21, dtype=np.uint64)
    zeros = np.zeros_like(ids)
    words = oracle.philox(np.stack((zeros, zeros, ids, zeros + np.uint64(1)), axis=-1), (1, 0)).astype(
        np.int64
    )
    chosen = []
    for word in range(4):
        for target in (0, 2**30, 2**31, 3 * 2**30, 2**32):
            chosen.append(np.argpartition(np.abs(words[:, word] - target), count)[:count])
    unique = [int(i) for i in np.unique(np.concatenate(chosen))]
    exact = [oracle.normal(Hyper(seed=1, tensor_id=i), np.arange(4)) for i in unique]
    return unique, np.concatenate(exact)


def test_extreme_normals_are_right(backend: str) -> None:
    """The ends of the range, where approximations of log, sqrt and sine are worst, all in one launch."""
    ids, exact = extreme_tensors(1 if INTERPRETED else 8)
    got = torch.cat(draw(backend, [4] * len(ids), ids)).double().numpy()
    assert np.abs(exact).max() > 5  # P(|z| > 5) = 5.7e-7: the search has found the far tail
    assert np.isfinite(got).all()
    assert np.abs(got - exact).max() <= TOLERANCES[backend].z


def test_noise_scale_is_its_standard_deviation(backend: str) -> None:
    """A factor of 2^-17, about the default, gives the same normals to the bit, because a power of two rounds
    nothing.

    A kernel may fold noise_scale into a coefficient, if that rounds nothing either.
    """
    plain, small = (draw(backend, [4099], [7], scale=scale)[0] for scale in (1.0, 2.0**-17))
    assert torch.equal(plain * 2.0**-17, small)
