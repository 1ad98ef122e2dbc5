"""Steps PATSAdamW on tensors of all shapes and strides, and compares every number with the oracle.

As in `harness`, each step is checked from the state it really started with. What is stored must lie between
the rounded lower and upper bounds that float32 arithmetic may compute for the exact value.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import harness
import numpy as np
import oracle
import torch
from harness import (
    ROUNDOFF,
    ROUNDOFF_32,
    TINY,
    TOLERANCES,
    Case,
    Gates,
    Tolerance,
    Values,
    assert_between,
    flat,
    gradients,
    stored_bounds,
)
from oracle import AdamW, Array, Hyper
from torch import Tensor, nn

from pats_kernels import PATSAdamW

CANCELLATION = {torch.float64: 2.0**-47}  # of v^ - m^^2, by parameter dtype; else float32's
CANCELLATION_32 = 2.0**-18


@dataclass
class AdamWCase(Case):
    """A `Case` in which each tensor has its own param group, with AdamW's hyperparameters.

    A value of `adamw` may be a list with one entry per tensor, as in `Case`.
    """

    adamw: dict[str, Any] = field(default_factory=dict)

    def adamw_of(self, i: int) -> AdamW:
        return AdamW(**{name: v[i] if isinstance(v, list) else v for name, v in self.adamw.items()})


class AdamWValues(NamedTuple):
    """One tensor's numbers in float64, flat. Without noise it has no sensitivities."""

    pats: Values
    m: Array
    v: Array
    step: float
    state: dict[str, torch.dtype]


NOTHING = np.zeros(0)


def optimizer_of(backend: str, case: AdamWCase) -> PATSAdamW:
    """An optimizer of the case's tensors, before the first step."""
    work = harness.prepare(case)
    groups = []
    for i, param in enumerate(work.params):
        h, a = case.hyper(i, 1), case.adamw_of(i)
        names = ("noise_scale", "gamma", "sens_betas", "uncertainty", "normalization", "seed")
        own = {name: getattr(h, name) for name in names} | a._asdict()
        groups.append({"params": [nn.Parameter(param)], **own})
    return PATSAdamW(
        groups,
        stochastic_rounding=case.stochastic_rounding,
        state_dtype=None if case.state_dtype == torch.float64 else case.state_dtype,  # float64's default
        backend=backend,
    )


def params_of(optimizer: PATSAdamW) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def values(optimizer: PATSAdamW) -> Iterator[AdamWValues]:
    for param in params_of(optimizer):
        state = optimizer.state[param]
        numbers = {key: flat(value) for key, value in state.items()}
        zeros = np.zeros(param.numel())
        pats = Values(
            flat(param),
            flat(param.grad),
            numbers.get("exp_avg_sens", NOTHING),
            numbers.get("exp_avg_unc"),
            numbers.get("sens_stats", np.zeros(2)),
        )
        m, v = numbers.get("exp_avg", zeros), numbers.get("exp_avg_sq", zeros)
        step = float(state["step"]) if "step" in state else 0.0
        yield AdamWValues(pats, m, v, step, {key: value.dtype for key, value in state.items()})


def give_gradients(optimizer: PATSAdamW, case: AdamWCase, number: int) -> None:
    for param, grad in zip(params_of(optimizer), gradients(case, number), strict=True):
        param.grad = grad


def run(backend: str, case: AdamWCase) -> PATSAdamW:
    """Takes all steps of a case, unchecked."""
    optimizer = optimizer_of(backend, case)
    for number in range(1, case.steps + 1):
        give_gradients(optimizer, case, number)
        optimizer.step()
    return optimizer


def run_checked(backend: str, case: AdamWCase) -> PATSAdamW:
    """Takes all steps of a case, each compared with the oracle."""
    optimizer = optimizer_of(backend, case)
    for number in range(1, case.steps + 1):
        give_gradients(optimizer, case, number)
        before = [
            _with_state(value, case.hyper(i, number), case.adamw_of(i))
            for i, value in enumerate(values(optimizer))
        ]
        grads = [torch.clone(param.grad) for param in params_of(optimizer)]
        optimizer.step()
        harness.assert_same_bits(grads, [param.grad for param in params_of(optimizer)])
        for i, (old, new) in enumerate(zip(before, values(optimizer), strict=True)):
            h, a = case.hyper(i, number), case.adamw_of(i)
            check_step(old, new, h, a, case.dtype, TOLERANCES[backend], f"step {number}, tensor {i}")
    return optimizer


def _with_state(value: AdamWValues, h: Hyper, a: AdamW) -> AdamWValues:
    """The state, with zeros for what does not exist yet."""
    if value.pats.S.size or h.noise_scale == 0 or a.sensitivity != "ema":
        return value
    zeros = np.zeros_like(value.pats.w)
    return value._replace(pats=value.pats._replace(S=zeros, U=None if h.uncertainty == "none" else zeros))


def check_step(
    old: AdamWValues,
    new: AdamWValues,
    h: Hyper,
    a: AdamW,
    dtype: torch.dtype,
    tolerance: Tolerance,
    where: str,
) -> None:
    """Raises AssertionError if `new` is not the result of one step from `old`. Skips empty tensors."""
    if old.pats.w.size == 0:
        assert not new.state
        return
    assert new.step == old.step + 1 == h.step
    u = ROUNDOFF.get(dtype, ROUNDOFF_32)
    low_bits, high_bits = harness.random_halves(h, old.pats.w.size)
    g, finite = old.pats.g, np.isfinite(old.pats.g)
    with np.errstate(invalid="ignore", over="ignore"):
        m, v = oracle.moments(g, old.m, old.v, a)
    # Errors: (1 - b_1) (g - m) 3 u of the larger of both, the sum 1 u; v, with all terms >= 0, 5 u.
    error_m, error_v = 4 * u * np.maximum(np.abs(old.m), np.abs(g)) + TINY, 5 * u * v + TINY
    for key, got, value, error in (("exp_avg", new.m, m, error_m), ("exp_avg_sq", new.v, v, error_v)):
        bits = None if high_bits is None else high_bits[finite]
        bounds = stored_bounds(value[finite], error[finite], new.state[key], bits)
        assert_between(got[finite], *bounds, f"{where}: {key}")
        assert not np.isfinite(got[~finite]).any(), f"{where}: {key} of a gradient that is not finite"

    noisy_w, error = old.pats.w, np.zeros_like(old.pats.w)
    if h.noise_scale > 0:
        if a.sensitivity == "ema":
            harness.check_averages(old.pats, new.pats, h, new.state["exp_avg_sens"], high_bits, u, where)
            gates = harness.gates_of_averages(old.pats, new.pats, h, u)
        else:
            hats = oracle.corrected(m, v, a, h.step)
            error_m_hat = error_m / (1 - a.betas[0] ** h.step)
            gates = gates_of_moments(old.pats, new.pats, *hats, error_m_hat, h, dtype, where)
        noisy_w, error = harness.noised(old.pats, h, tolerance, u, gates)
    with np.errstate(invalid="ignore"):
        m_hat, v_hat = oracle.corrected(m, v, a, h.step)
        w = oracle.adamw(noisy_w, m_hat, v_hat, a)
        # torch rounds the factor 1 - lr wd, then the product, then the sum. The update, a dozen operations,
        # has less than 16 roundings, and inherits the error of m. 1 - b^t cancels: here too it is in float64.
        slopes = a.lr / (np.sqrt(v_hat) + a.eps)
        corrections = [1 - beta**h.step for beta in a.betas]
        roundings = 16 * u + sum(4 * ROUNDOFF[torch.float64] / correction for correction in corrections)
        error += 2 * u * np.abs(noisy_w) + u * np.abs(w) + TINY
        error += slopes * (roundings * np.abs(m_hat) + error_m / corrections[0])
    bits = None if low_bits is None else low_bits[finite]
    low, high = stored_bounds(w[finite], error[finite], dtype, bits)
    assert_between(new.pats.w[finite], low, high, f"{where}: w")
    assert not np.isfinite(new.pats.w[~finite]).any(), f"{where}: w of a gradient that is not finite"


def gates_of_moments(
    old: Values,
    new: Values,
    m_hat: Array,
    v_hat: Array,
    error_m_hat: Array,
    h: Hyper,
    dtype: torch.dtype,
    where: str,
) -> Gates:
    """The gates of S = abs(w) sqrt(v^) and U = abs(w) sqrt(max(v^ - m^^2, 0)). Checks the means too.

    S is right to 10 roundings. v^ - m^^2 cancels. Its error bound is a share of v^: some 20 roundings of each
    of the two, and the 2^-19 that a kernel subtracts so that roundings do not count where the difference is
    0. The error of m comes on top.
    """
    u = ROUNDOFF.get(dtype, ROUNDOFF_32)
    finite = np.isfinite(old.g)
    m_hat, v_hat, error_m_hat = (np.where(finite, x, 0) for x in (m_hat, v_hat, error_m_hat))
    S = np.abs(old.w) * np.sqrt(v_hat)
    slack = CANCELLATION.get(dtype, CANCELLATION_32) * v_hat + (2 * np.abs(m_hat) + error_m_hat) * error_m_hat
    lows, mids, highs = (
        (
            (1 + sign * 10 * u) * S,
            np.abs(old.w) * np.sqrt(np.maximum(v_hat - m_hat**2 + sign * slack, 0)),
        )
        for sign in (-1, 0, 1)
    )
    has_unc = h.uncertainty != "none"
    least, most = (
        np.array([S.mean(), U.mean() if has_unc else 0.0]) * (1 + sign * 32 * u)
        for sign, (S, U) in ((-1, lows), (1, highs))
    )
    single = 2 * ROUNDOFF_32  # the means are float32 also for float64
    assert_between(new.stats, least * (1 - single) - TINY, most * (1 + single) + TINY, f"{where}: sens_stats")

    used = new.stats if h.normalization == "exact" else old.stats
    sensitive, exact, insensitive = (
        harness.gate_bounds(S, U if has_unc else None, used, h, u) for S, U in (highs, mids, lows)
    )
    low, middle, high = (np.where(finite, a, 0) for a in (sensitive[0], exact[1], insensitive[2]))
    return low, middle, high
