"""The reference compared with the oracle, and both with results known without them."""

from itertools import pairwise, product
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from harness import Case, Tolerance, decided, prepare, run_checked, same_bits, step, stored, values
from oracle import Hyper, State
from torch import Tensor

from pats_kernels import reference
from pats_kernels.reference import pats_update_

NORMALIZATIONS = ["delayed", "exact"]
UNCERTAINTIES = ["product", "ucb", "none"]
EAGER = Tolerance(z=5e-7, gate=5e-7)  # see harness.TOLERANCES

every_variant = pytest.mark.parametrize(
    ("normalization", "uncertainty"), list(product(NORMALIZATIONS, UNCERTAINTIES))
)


def update(w: Tensor, g: Tensor, S: Tensor, U: Tensor | None, stats: Tensor, **changes: Any) -> int:
    """`pats_update_` with the oracle's defaults."""
    return int(pats_update_(w, g, S, U, stats, **(Hyper()._asdict() | changes)))


@every_variant
@pytest.mark.parametrize(("gamma", "betas"), [(1.0, (0.85, 0.95)), (0.0, (0.5, 0.9)), (3.0, (0.99, 0.0))])
def test_float64_follows_the_oracle(
    normalization: str, uncertainty: str, gamma: float, betas: tuple[float, float]
) -> None:
    """Five steps without copying numbers from one to the other. Float64 has errors of 1e-16 per rounding. A
    gate multiplies relative errors by at most 1/q, some 1e3 where it is not flat, hence 1e-12. sens_stats are
    float32 in both: the same bits."""
    random = np.random.default_rng(1)
    state = State(0.05 * random.standard_normal(1001), np.zeros(1001), np.zeros(1001), np.zeros(2))
    if uncertainty == "none":
        state = state._replace(U=None)
    w, S = torch.from_numpy(state.w.copy()), torch.zeros(1001, dtype=torch.float64)
    U = None if state.U is None else torch.zeros_like(S)
    stats = torch.zeros(2)
    for number in range(1, 6):
        g = random.standard_normal(1001) ** 3
        h = Hyper(0.01, gamma, betas, uncertainty, normalization, True, 77, number, 3)
        state, _ = oracle.step(state, g, h)
        update(w, torch.from_numpy(g), S, U, stats, **h._asdict())
        np.testing.assert_allclose(w.numpy(), state.w, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(S.numpy(), state.S, rtol=1e-12, atol=1e-16)
        if U is not None and state.U is not None:
            np.testing.assert_allclose(U.numpy(), state.U, rtol=1e-12, atol=1e-16)
        np.testing.assert_array_equal(stats.numpy(), state.stats.astype(np.float32))


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stochastic_rounding", [True, False])
def test_storage_dtypes(
    normalization: str,
    uncertainty: str,
    dtype: torch.dtype,
    state_dtype: torch.dtype,
    stochastic_rounding: bool,
) -> None:
    case = Case(
        [(300,), (7, 11)],
        dtype=dtype,
        state_dtype=state_dtype,
        uncertainty=uncertainty,
        normalization=normalization,
        stochastic_rounding=stochastic_rounding,
    )
    run_checked("eager", case, EAGER, reference.pats_step_)


def test_bfloat16_is_held_to_the_bit() -> None:
    """The check above allows more than one bfloat16 only for few of the weights, so it does check the
    bits."""
    case = Case([(20000,)], dtype=torch.bfloat16, normalization="exact")
    work = prepare(case)
    work.grads = [torch.randn(20000).to(torch.bfloat16)]
    (old,) = values(work)
    step("eager", case, work, 1, reference.pats_step_)
    (new,) = values(work)
    # Undecided are those whose sum is within 1e-9 of a threshold; thresholds are 2^-12 of |w| ~ 0.05 apart.
    assert decided(old, new, case.hyper(0, 1), EAGER) > 0.999
    assert np.mean(old.w != new.w) > 0.5


# What follows from the formula table by hand.


def test_first_delayed_step_adds_no_noise() -> None:
    w, g = torch.randn(100), torch.randn(100)
    S, U, stats, before = torch.zeros(100), torch.zeros(100), torch.zeros(2), w.clone()
    update(w, g, S, U, stats)
    assert same_bits(w, before)
    s = (before * g).abs().double()
    # Four roundings of S, seven of U (which cancels nothing: U = 0.05 * 0.85 s), one of the means each.
    torch.testing.assert_close(S.double(), 0.15 * s, rtol=4 * 2**-24, atol=0)
    torch.testing.assert_close(U.double(), 0.05 * 0.85 * s, rtol=7 * 2**-24, atol=0)
    expected = torch.tensor([S.double().mean(), U.double().mean()])
    torch.testing.assert_close(stats, expected.float(), rtol=2**-23, atol=0)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 100.0])
def test_q_of_zero_opens_the_gate_fully(gamma: float) -> None:
    """a = 1 exactly: the noise is noise_scale z, rounded once for z and once for the product."""
    w, S, U = torch.zeros(64), torch.zeros(64), torch.ones(64)
    update(w, torch.ones(64), S, U, torch.ones(2), gamma=gamma, noise_scale=0.5, step=4, tensor_id=9)
    z = reference.philox_normal(0, 4, 9, 64)
    torch.testing.assert_close(w.double(), 0.5 * z, rtol=2**-23, atol=0)


@every_variant
@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_no_statistics_no_noise(normalization: str, uncertainty: str, gamma: float) -> None:
    """A tensor whose sensitivities are all zero has a mean of 0."""
    w, S = torch.randn(50), torch.zeros(50)
    U, before = None if uncertainty == "none" else torch.zeros(50), w.clone()
    stats = torch.zeros(2)
    h = {"normalization": normalization, "uncertainty": uncertainty, "gamma": gamma}
    update(w, torch.zeros(50), S, U, stats, **h)
    assert same_bits(w, before)
    assert not stats.any()


def gate_of(S: float, U: float | None, stats: tuple[float, float], **changes: Any) -> float:
    """The gate of one element that stays constant: s = S keeps S, and betas near 1 keep U."""
    w, g = torch.tensor([1.0], dtype=torch.float64), torch.tensor([S], dtype=torch.float64)
    unc = None if U is None else torch.tensor([U], dtype=torch.float64)
    h = {"sens_betas": (0.5, 1 - 2**-53), "noise_scale": 1.0} | changes
    sens = g.clone()
    update(w, g, sens, unc, torch.tensor(stats), **h)
    return float((w - 1) / reference.philox_normal(0, 1, 0, 1))


CLOSED_FORMS = [
    # S, U, means, changes, 1/q - gamma
    (1.0, 1.0, (1.0, 1.0), {}, 0.0),
    (0.5, 1.0, (1.0, 1.0), {}, 1.0),
    (0.5, 0.5, (1.0, 1.0), {}, 3.0),
    (0.5, 0.5, (1.0, 2.0), {}, 7.0),
    (1.0, 1.0, (1.0, 1.0), {"gamma": 0.5}, 0.5),
    (2.0, 1.0, (1.0, 1.0), {"gamma": 0.0}, 0.5),
    (2.0, 1.0, (1.0, 1.0), {"gamma": 0.25}, 0.25),
    (2.0, 1.0, (1.0, 1.0), {"gamma": 0.5}, 0.0),
    (0.5, 0.0, (1.0, 1.0), {}, np.inf),
    (0.5, 0.25, (1.0, 1.0), {"uncertainty": "ucb"}, 2 / 0.75 - 1),
    (0.5, 0.0, (1.0, 1.0), {"uncertainty": "ucb"}, 3.0),
    (2.0, 1.0, (1.0, 1.0), {"uncertainty": "ucb"}, 0.0),
    (0.5, None, (1.0, 0.0), {"uncertainty": "none"}, 1.0),
    (0.75, None, (3.0, 0.0), {"uncertainty": "none", "gamma": 2.0}, 2.0),
    (3.0, None, (1.0, 0.0), {"uncertainty": "none"}, 0.0),
]


@pytest.mark.parametrize(("S", "U", "stats", "changes", "x"), CLOSED_FORMS)
def test_gates_by_hand(
    S: float, U: float | None, stats: tuple[float, float], changes: dict[str, Any], x: float
) -> None:
    """1e-13: w + a z - w loses what is below 2^-53 of w = 1, and |z| is 0.9 here."""
    assert gate_of(S, U, stats, **changes) == pytest.approx(np.tanh(x), abs=1e-13)


def test_exact_means_are_of_the_state_just_updated() -> None:
    """Two elements with s = 1 and 3: means 2, q = 1/2 and 3/2, gates tanh(1) and 0."""
    w = torch.tensor([1.0, 1.0], dtype=torch.float64)
    g, S = torch.tensor([1.0, 3.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    h = {"normalization": "exact", "uncertainty": "none", "sens_betas": (0.0, 0.0), "noise_scale": 1.0}
    stats = torch.tensor([1e9, 1e9])  # of the state before, which is not used
    update(w, g, S, None, stats, **h)
    z = reference.philox_normal(0, 1, 0, 2)
    torch.testing.assert_close(w, 1 + torch.stack((np.tanh(1) * z[0], 0 * z[1])), rtol=0, atol=1e-15)
    assert stats.tolist() == [2.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_beta_of_zero_remembers_nothing(dtype: torch.dtype) -> None:
    """With b_s = 0 row 2 says S = s. So s - S = 0, U = 0, and a tensor without statistics gets no noise.

    If S + (s - S) were rounded, U would be rounding errors, and their pattern would decide who gets noise.
    """
    random = torch.Generator().manual_seed(2)
    w = torch.randn(1000, generator=random, dtype=dtype)
    S, U, stats, before = torch.zeros_like(w), torch.zeros_like(w), torch.zeros(2), w.clone()
    for number in range(1, 4):
        g = torch.randn(1000, generator=random, dtype=dtype)
        update(w, g, S, U, stats, sens_betas=(0.0, 0.95), step=number)
        assert same_bits(S, (before * g).abs())
        assert not U.any()
    assert same_bits(w, before)


@every_variant
@pytest.mark.parametrize("power", [-60, -16, 16, 40])
def test_loss_scale_changes_nothing(normalization: str, uncertainty: str, power: int) -> None:
    """A power of two passes through every product unrounded: weights are equal to the bit, S is scaled to the
    bit."""
    case = Case([(2000,)], normalization=normalization, uncertainty=uncertainty)
    works = [prepare(case), prepare(case)]
    for number in range(1, 5):
        g = torch.randn(2000, generator=torch.Generator().manual_seed(number))
        for work, scale in zip(works, (1.0, 2.0**power), strict=True):
            work.grads = [g * scale]
            step("eager", case, work, number, reference.pats_step_)
    assert not same_bits(works[0].params[0], prepare(case).params[0])
    assert same_bits(works[0].params[0], works[1].params[0])
    assert same_bits(works[0].sens[0] * 2.0**power, works[1].sens[0])
    assert same_bits(works[0].stats[0] * 2.0**power, works[1].stats[0])


@every_variant
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nonfinite_gradients(normalization: str, uncertainty: str, value: float) -> None:
    """They are counted, and their elements keep w, S and U. The others are as if these did not exist."""
    random = torch.Generator().manual_seed(5)
    w, g = (torch.randn(400, generator=random) for _ in range(2))
    S, U = (torch.rand(400, generator=random) for _ in range(2))
    unc = None if uncertainty == "none" else U.clone()
    bad = torch.zeros(400, dtype=torch.bool)
    bad[::7] = True
    g[bad] = value
    before = [w.clone(), S.clone(), U.clone()]
    stats = torch.tensor([S.mean(), U.mean()])
    count = update(w, g, S, unc, stats, normalization=normalization, uncertainty=uncertainty, noise_scale=0.1)
    assert count == int(bad.sum()) == 58
    after = [w, S] if unc is None else [w, S, unc]
    for new, old in zip(after, before, strict=False):
        assert same_bits(new[bad], old[bad])
        assert new.isfinite().all()
    assert stats.isfinite().all()
    assert (before[1] != S)[~bad].all()
    assert (w != before[0])[~bad].float().mean() > 0.3


def test_a_sensitivity_that_overflows_is_not_finite() -> None:
    w, g = torch.tensor([1e30, 1.0]), torch.tensor([1e30, 1.0])
    S, U, stats = torch.ones(2), torch.ones(2), torch.ones(2)
    assert update(w, g, S, U, stats) == 1
    assert w[0] == torch.tensor(1e30)
    assert S.tolist() == [1.0, 1.0]


def test_per_tensor_values() -> None:
    assert reference.per_tensor(1.0, 3) == [1.0, 1.0, 1.0]
    assert reference.per_tensor([1.0, 2.0], 2) == [1.0, 2.0]
    assert reference.per_tensor("exact", 2) == ["exact", "exact"]
    assert reference.betas_per_tensor((0.1, 0.2), 2) == [(0.1, 0.2), (0.1, 0.2)]
    assert reference.betas_per_tensor([(0.1, 0.2), (0.3, 0.4)], 2) == [(0.1, 0.2), (0.3, 0.4)]


def test_stored_is_monotone() -> None:
    """The harness's criterion depends on it."""
    x = np.sort(np.random.default_rng(3).standard_normal(4096) * 1e-2)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for bits in (None, np.full(4096, 12345, dtype=np.uint64)):
            assert all(a <= b for a, b in pairwise(stored(x, dtype, bits)))
