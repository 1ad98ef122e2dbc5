"""Distributions of sensitivities, compared with brute force and closed forms; gates, with the oracle."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pats_kernels import PATS, PATSAdamW, analysis, hyperparameters
from pats_kernels.analysis import (
    COLOURS,
    CURVE_SHARES,
    FRACTIONS,
    LOG_EDGES,
    TOP,
    Distribution,
    Summary,
    distribution,
    gate_summary,
    plot,
    sensitivities,
    state_sensitivities,
)

Array = NDArray[np.float64]


def of(values: Any, dtype: torch.dtype = torch.float32) -> Distribution:
    return distribution({"w": torch.as_tensor(values).to(dtype)})


# Distributions against brute force.


def brute_gini(x: Array) -> float:
    """Gini's own definition: the mean difference over all ordered pairs, divided by twice the mean."""
    return float(np.abs(x[:, None] - x[None, :]).mean() / (2 * x.mean()))


def brute_held(x: Array, share: float) -> float:
    """The share of the total that the top `share` of the elements hold, one element after another."""
    left, held = share * len(x), 0.0
    for value in sorted(x, reverse=True):
        held += min(left, 1.0) * value
        left = max(left - 1.0, 0.0)
    return held / x.sum()


def brute_half(x: Array) -> float:
    """The number of elements that hold half of the total, the last one in part."""
    missing, taken = x.sum() / 2, 0.0
    for value in sorted(x, reverse=True):
        if value >= missing:
            return (taken + missing / value) / len(x)
        missing -= value
        taken += 1
    raise AssertionError("unreachable")


def brute_summary(x: Array) -> Summary:
    positive = x[x > 0]
    logs = np.clip(np.log10(positive / x.mean()), LOG_EDGES[0], LOG_EDGES[-1])
    return Summary(
        numel=len(x),
        zeros=int((x == 0).sum()),
        mean=float(x.mean()),
        histogram=tuple(np.histogram(logs, LOG_EDGES)[0].tolist()),
        share_below=tuple(float((x < fraction * x.mean()).mean()) for fraction in FRACTIONS),
        gini=brute_gini(x),
        top_share=tuple(brute_held(x, share) for share in TOP),
        half=brute_half(x),
    )


def assert_close(got: Summary, expected: Summary) -> None:
    for name in ("numel", "zeros", "histogram", "share_below"):
        assert getattr(got, name) == getattr(expected, name), name
    for name in ("mean", "gini", "top_share", "half"):  # sums of doubles in another order
        np.testing.assert_allclose(getattr(got, name), getattr(expected, name), rtol=1e-9, atol=1e-12)


# Log-normal, of very different widths and lengths; with zeros and ties; more than one piece of the sums.
SAMPLES: dict[str, Callable[[np.random.Generator], Array]] = {
    "one": lambda r: np.array([3.0]),
    "two": lambda r: np.array([1.0, 3.0]),
    "narrow": lambda r: np.exp(0.1 * r.standard_normal(1000)),
    "wide": lambda r: np.exp(6.0 * r.standard_normal(1703)),
    "zeros": lambda r: np.where(r.random(999) < 0.4, 0.0, r.exponential(size=999)),
    "ties": lambda r: r.integers(0, 5, 500).astype(float),
    "tiny": lambda r: 1e-30 * r.exponential(size=100),
}


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_against_brute_force(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analysis, "PIECE", 64)
    tensor = torch.from_numpy(SAMPLES[name](np.random.default_rng(5))).to(dtype)
    x = tensor.double().numpy()
    d = of(tensor, dtype)
    assert_close(d.overall, brute_summary(x))
    np.testing.assert_allclose(d.curve, [brute_held(x, share) for share in CURVE_SHARES], rtol=1e-9)


@given(
    x=st_numpy.arrays(
        np.float32,
        st.integers(1, 60),
        elements=st.one_of(st.just(0.0), st.floats(2.0**-60, 2.0**60, width=32)),
    )
)
def test_against_brute_force_on_anything(x: NDArray[np.float32]) -> None:
    """Not compared bin by bin: for a value on an edge, log10 and a product of doubles may disagree."""
    wide = x.astype(np.float64)
    if not x.any():
        return
    got, expected = of(torch.from_numpy(x)).overall, brute_summary(wide)
    assert sum(got.histogram) + got.zeros == got.numel
    assert abs(got.half - expected.half) < 1e-9
    assert abs(got.gini - expected.gini) < 1e-9
    np.testing.assert_allclose(got.top_share, expected.top_share, rtol=1e-9)


def test_tensors_and_all_together() -> None:
    """Each tensor is relative to its own mean; overall is as for one tensor of all, whatever shapes and
    dtypes."""
    r = np.random.default_rng(6)
    parts = {"a": r.exponential(size=300), "b": 100 * r.exponential(size=50), "c": np.array([0.5])}
    tensors = {
        "a": torch.from_numpy(parts["a"]).view(15, 20).t(),
        "b": torch.from_numpy(parts["b"]).view(5, 5, 2),
        "c": torch.tensor(0.5, dtype=torch.bfloat16),
    }
    d = distribution(tensors)
    assert list(d.tensors) == ["a", "b", "c"]
    for name, part in parts.items():
        assert_close(d.tensors[name], brute_summary(part))
    assert_close(d.overall, brute_summary(np.concatenate(list(parts.values()))))


def test_the_input_stays_as_it_is() -> None:
    tensor = torch.tensor([3.0, 1.0, 2.0])
    of(tensor)
    assert tensor.tolist() == [3.0, 1.0, 2.0]


# Closed forms.


def test_all_equal() -> None:
    """0.1 is not a binary fraction, but the mean of 10^5 of it must be exactly 0.1."""
    d = of(torch.full((100_000,), 0.1))
    assert d.overall.mean == np.float32(0.1)
    assert d.overall.gini == pytest.approx(0, abs=1e-12)
    assert d.overall.share_below == (0, 0, 0, 0)
    assert d.overall.top_share == pytest.approx(TOP)
    assert d.overall.half == pytest.approx(0.5)
    assert d.curve == pytest.approx(CURVE_SHARES)


@pytest.mark.parametrize("n", [2, 10, 1000])
def test_one_has_it_all(n: int) -> None:
    d = of(torch.eye(n)[0])
    assert d.overall.gini == pytest.approx(1 - 1 / n)
    assert d.overall.zeros == n - 1
    assert d.overall.half == pytest.approx(0.5 / n)
    assert d.overall.top_share == pytest.approx([min(1, share * n) for share in TOP])
    assert d.overall.share_below == pytest.approx([1 - 1 / n] * 4)


def test_exponential() -> None:
    """The Gini coefficient is 1/2. The top p hold p (1 - ln p), half where that is 1/2. 1 - e^-f are below
    f."""
    n = 1_000_000
    quantiles = -np.log((np.arange(n) + 0.5) / n)
    d = of(torch.from_numpy(quantiles), torch.float32).overall
    assert d.mean == pytest.approx(1, abs=1e-5)
    assert d.gini == pytest.approx(0.5, abs=1e-5)
    assert d.top_share == pytest.approx([p * (1 - np.log(p)) for p in TOP], abs=1e-5)
    assert d.half * (1 - np.log(d.half)) == pytest.approx(0.5, abs=1e-5)
    assert d.share_below == pytest.approx([1 - np.exp(-f) for f in FRACTIONS], abs=1e-5)


def test_pareto() -> None:
    """With index k the Gini coefficient is 1 / (2k - 1), and the top p hold p^(1 - 1/k)."""
    n, k = 1_000_000, 3.0
    quantiles = ((np.arange(n) + 0.5) / n) ** (-1 / k)
    d = of(torch.from_numpy(quantiles), torch.float64)
    assert d.overall.gini == pytest.approx(1 / (2 * k - 1), abs=1e-4)
    assert d.curve == pytest.approx(CURVE_SHARES ** (1 - 1 / k), abs=1e-3)
    assert d.overall.half == pytest.approx(0.5 ** (k / (k - 1)), abs=1e-4)


def test_sums_are_wider_than_float32() -> None:
    """A float32 sum stops after 2^24 ones: the mean of 2^25 would be 1/2."""
    d = of(torch.ones(2**25)).overall
    assert d.mean == 1.0
    assert d.gini == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    "values", [torch.zeros(0), torch.zeros(3, 4), torch.zeros(())], ids=["empty", "0s", "0"]
)
def test_nothing_to_distribute(values: Tensor) -> None:
    d = of(values)
    n = values.numel()
    assert d.overall == d.tensors["w"] == Summary(n, n, 0.0, (0,) * 180, (0.0,) * 4, 0.0, TOP, 0.5)
    assert d.curve == pytest.approx(CURVE_SHARES)
    assert distribution({}).overall.numel == 0


def test_a_mean_between_two_floats() -> None:
    """It rounds to 1 in float32, but both ones are below it."""
    assert of(torch.tensor([1.0, 1.0 + 2.0**-23, 1.0])).overall.share_below[0] == pytest.approx(2 / 3)


def test_what_the_histogram_cannot_hold_is_in_its_last_bins() -> None:
    x = torch.tensor([1e-30, 1e-20, *[1.0] * 10_000_000, 1e14])
    histogram = of(x, torch.float64).overall.histogram  # its mean is 1e7
    assert (histogram[0], histogram[-1], sum(histogram)) == (2, 1, len(x))


def test_histograms_of_a_scaled_loss_are_the_same() -> None:
    x = torch.from_numpy(np.random.default_rng(7).lognormal(0, 3, 1000)).float()
    assert of(x).overall.histogram == of(x * 2.0**-40).overall.histogram
    assert of(x).overall.gini == pytest.approx(of(x * 2.0**-40).overall.gini, rel=1e-12)


@pytest.mark.parametrize("bad", [-1e-3, torch.nan, torch.inf, -torch.inf])
def test_what_is_no_sensitivity(bad: float) -> None:
    with pytest.raises(ValueError, match=r"^second: a sensitivity is negative or not finite"):
        distribution({"first": torch.ones(3), "second": torch.tensor([1.0, bad, 2.0])})


def test_json() -> None:
    d = distribution({"a": torch.rand(100), "b": torch.zeros(())})
    assert Distribution.from_dict(json.loads(json.dumps(d.to_dict()))) == d


# Sensitivities of a model.


class Linear(nn.Module):
    """y = w x + b, with dropout, a frozen weight, and one that is not used, as in real models."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
        self.b = nn.Parameter(torch.tensor(3.0))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(2))
        self.dropout = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(3, affine=False)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        prediction = self.dropout(x) @ self.w + self.b + 0 * self.norm(x).sum()
        return Output(((prediction - y) ** 2).mean())


@dataclass
class Output:
    loss: Tensor


def batches() -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(8)
    return [
        {"x": torch.randn(4, 3, generator=random), "y": torch.randn(4, generator=random)} for _ in range(3)
    ]


def by_hand() -> tuple[Array, float]:
    """d/dw of mean (w x + b - y)^2 is 2 mean (error x), d/db is 2 mean error."""
    w, b = np.array([1.0, -2.0, 0.5]), 3.0
    sens_w, sens_b = [], []
    for batch in batches():
        x, y = batch["x"].double().numpy(), batch["y"].double().numpy()
        error = x @ w + b - y
        sens_w.append(np.abs(w * 2 * (error[:, None] * x).mean(axis=0)))
        sens_b.append(abs(b * 2 * error.mean()))
    return np.mean(sens_w, axis=0), float(np.mean(sens_b))


def test_sensitivities_of_a_linear_model() -> None:
    model = Linear()
    s = sensitivities(model, iter(batches()))
    w, b = by_hand()
    assert list(s) == ["w", "b", "unused"]
    np.testing.assert_allclose(s["w"], w, rtol=1e-5)
    np.testing.assert_allclose(s["b"], b, rtol=1e-5)
    assert s["unused"].tolist() == [0, 0]


def test_sensitivities_with_a_loss_of_ones_own() -> None:
    """Twice the loss gives twice the sensitivity, also under no_grad."""
    model = Linear().double()
    data = [{name: t.double() for name, t in batch.items()} for batch in batches()]
    with torch.no_grad():
        s = sensitivities(model, data, loss=lambda m, batch: 2 * m(**batch).loss)
    assert s["w"].dtype == torch.float64
    np.testing.assert_allclose(s["w"], 2 * by_hand()[0], rtol=1e-7)


@pytest.mark.parametrize("fails", [False, True])
def test_sensitivities_leave_nothing_behind(fails: bool) -> None:
    model = Linear().train()
    model.norm.eval()  # a part with its own mode, like a frozen part
    model.w.grad = torch.full((3,), 7.0)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    random = torch.get_rng_state()
    data = batches()
    if fails:
        data[1]["x"] = torch.ones(4, 2)
        with pytest.raises(RuntimeError):
            sensitivities(model, data)
    else:
        sensitivities(model, data)
    assert (model.training, model.dropout.training, model.norm.training) == (True, True, False)
    assert model.w.grad.tolist() == [7, 7, 7]
    assert model.b.grad is None
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_sensitivities_of_nothing() -> None:
    with pytest.raises(ValueError, match="batches is empty"):
        sensitivities(Linear(), [])
    with pytest.raises(ValueError, match="no parameter that needs a gradient"):
        sensitivities(Linear().requires_grad_(False), batches())


# The state of a run.

SHAPES = [(40, 30), (17,), (), (3, 5, 2), (4,)]
QUIET = 4  # the tensor in a group without noise


def make_pats(backend: str, fused: bool = False, **changes: Any) -> tuple[Any, Any, list[nn.Parameter]]:
    """PATS or PATSAdamW, its optimizer (for PATSAdamW, itself), and the parameters."""
    random = torch.Generator().manual_seed(9)
    params = [nn.Parameter(torch.randn(shape, generator=random)) for shape in SHAPES]
    params[0].data = params[0].data.t().contiguous().t()
    groups = [
        {"params": params[:2]},
        {"params": params[2:QUIET], "gamma": 0.25, "uncertainty": "ucb"},
        {"params": params[QUIET:], "noise_scale": 0.0},
    ]
    settings = {"noise_scale": 1e-2, "backend": backend} | changes
    if fused:
        optimizer = PATSAdamW(groups, lr=0.1, **settings)
        return optimizer, optimizer, params
    optimizer = torch.optim.SGD(groups, lr=0.1)
    return PATS(optimizer, **settings), optimizer, params


def take_steps(optimizer: Any, params: list[nn.Parameter], count: int) -> None:
    random = torch.Generator().manual_seed(10)
    for _ in range(count):
        for param in params:
            param.grad = torch.randn(param.shape, generator=random) ** 3
        optimizer.step()


def expected_gates(source: Any, group: dict[str, Any], param: Tensor) -> Array:
    """Rows 4 and 5 in the oracle's float64, from the state."""
    values = source.defaults | group
    state = {name: t.double().numpy().ravel() for name, t in source.state[param].items()}
    S, U = state.get("exp_avg_sens"), state.get("exp_avg_unc")
    if values.get("sensitivity") == "moments":
        w, t = param.detach().double().numpy().ravel(), state["step"]
        m, v = (
            state[key] / (1 - b**t) for key, b in zip(("exp_avg", "exp_avg_sq"), values["betas"], strict=True)
        )
        S, U = np.abs(w) * np.sqrt(v), np.abs(w) * np.sqrt(np.maximum(v - m**2, 0))
    return oracle.gate(oracle.score(S, U, state["sens_stats"], values["uncertainty"]), values["gamma"])


def assert_summary(source: Any, groups: list[dict[str, Any]]) -> None:
    gates = [
        expected_gates(source, g, p)
        for g in groups
        for p in g["params"]
        if "sens_stats" in source.state.get(p, ())
    ]
    a = np.concatenate(gates)
    summary = gate_summary(source)
    assert summary.numel == a.size
    assert (summary.mean_gate.shape, summary.mean_gate.dtype) == ((), torch.float32)
    assert (summary.noisy_share.shape, summary.noisy_share.dtype) == ((), torch.float32)
    np.testing.assert_allclose(summary.mean_gate, a.mean(), rtol=1e-5)
    np.testing.assert_allclose(summary.noisy_share, (a > 0).mean(), rtol=1e-6)
    assert 0.01 < (a > 0).mean() < 0.99  # gates of both kinds, so errors can show


VARIANTS: list[dict[str, Any]] = [
    {},
    {"normalization": "exact"},
    {"uncertainty": "none"},
    {"uncertainty": "ucb", "gamma": 0.5},
    {"state_dtype": torch.bfloat16},
    {"fused": True},
    {"fused": True, "normalization": "exact", "uncertainty": "none"},
    {"fused": True, "sensitivity": "moments"},
    {"fused": True, "sensitivity": "moments", "uncertainty": "none", "state_dtype": torch.bfloat16},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_gate_summary(backend: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Computed in pieces, with different hyperparameters per group, a transposed tensor, and one without
    noise."""
    monkeypatch.setattr(analysis, "PIECE", 100)
    pats, optimizer, params = make_pats(backend, **changes)
    take_steps(optimizer, params, 3)
    assert sum(p.numel() for p in params[:QUIET]) == gate_summary(pats).numel
    assert_summary(pats, optimizer.param_groups)


@pytest.mark.parametrize("changes", [{}, {"fused": True}, {"fused": True, "sensitivity": "moments"}], ids=str)
def test_gate_summary_is_the_gate_of_the_exact_step(changes: dict[str, Any]) -> None:
    """With normalization="exact" and lr 0, the elements that moved are those with an open gate."""
    pats, optimizer, params = make_pats("eager", normalization="exact", **changes)
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.0
    take_steps(optimizer, params, 2)
    before = [p.detach().clone() for p in params[:QUIET]]
    take_steps(optimizer, params, 1)
    moved = sum(int((p != old).sum()) for p, old in zip(params, before, strict=False))
    summary = gate_summary(pats)
    # An open gate near 0 may move nothing that float32 can hold.
    assert 0 <= round(float(summary.noisy_share) * summary.numel) - moved <= 3


def test_gate_summary_without_state() -> None:
    summary = gate_summary(make_pats("eager")[0])
    assert summary.numel == 0
    assert summary.nonfinite == 0
    assert all(
        value.isnan() for name, value in summary._asdict().items() if name not in ("numel", "nonfinite")
    )


def test_an_optimizer_that_keeps_no_sensitivity() -> None:
    """For example the optimizer that PATS is attached to, given in place of the PATS."""
    _, optimizer, params = make_pats("eager")
    take_steps(optimizer, params, 1)
    for function in (gate_summary, state_sensitivities):
        with pytest.raises(
            TypeError, match=r"^SGD keeps no sensitivity: pass the PATS that is attached to it"
        ):
            function(optimizer)


def test_gate_summary_of_tensors_without_statistics() -> None:
    """Their gates are closed, and their elements count."""
    pats, optimizer, params = make_pats("eager")
    for param in params[:2]:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert [float(value) for value in gate_summary(pats)[:3]] == [0, 0, 40 * 30 + 17]
    assert pats.pats_summary()["noise_rms"] == 0


def test_gate_summary_follows_a_schedule() -> None:
    """A group whose noise was turned off no longer counts, though its state is still there."""
    pats, optimizer, params = make_pats("eager")
    take_steps(optimizer, params, 2)
    optimizer.param_groups[0]["noise_scale"] = 0.0
    assert gate_summary(pats).numel == params[2].numel() + params[3].numel()


# All of it, in numbers.

SUMMARY = [
    "mean_gate",
    "noisy_share",
    "noise_scale",
    "noise_rms",
    "weight_rms",
    "noise_to_weight",
    "nonfinite",
]


def poison(optimizer: Any, params: list[nn.Parameter]) -> int:
    """Takes a step with gradient elements that are not finite; returns how many of them PATS sees."""
    for param in params:
        param.grad = torch.ones_like(param)
    bad = [torch.nan, torch.inf, -torch.inf]
    params[0].grad[3, 5:8] = torch.tensor(bad)
    params[2].grad[()] = torch.nan
    params[QUIET].grad[0] = torch.nan  # in the group without noise: PATS does not look at it
    optimizer.step()
    return 4


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_pats_summary(backend: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared element by element in float64; each group has its own noise_scale."""
    monkeypatch.setattr(analysis, "PIECE", 100)
    pats, optimizer, params = make_pats(backend, **changes)
    optimizer.param_groups[1]["noise_scale"] = 0.7
    take_steps(optimizer, params, 3)
    noise, weights, scales, gates = [], [], [], []
    for group in optimizer.param_groups[:2]:
        for param in group["params"]:
            a = expected_gates(pats, group, param)
            scale = (pats.defaults | group)["noise_scale"]
            gates.append(a)
            noise.append(scale * a)
            weights.append(param.detach().double().numpy().ravel())
            scales.append(np.full(a.size, scale))
    got = pats.pats_summary()
    assert list(got) == SUMMARY
    noise_rms, weight_rms = (np.sqrt((np.concatenate(x) ** 2).mean()) for x in (noise, weights))
    # Gates are float32; all that is summed is float64.
    assert got["mean_gate"] == pytest.approx(np.concatenate(gates).mean(), rel=1e-5)
    assert got["noisy_share"] == pytest.approx((np.concatenate(gates) > 0).mean(), rel=1e-6)
    assert got["noise_scale"] == pytest.approx(np.concatenate(scales).mean(), rel=1e-12)
    assert got["noise_rms"] == pytest.approx(noise_rms, rel=1e-5)
    assert got["weight_rms"] == pytest.approx(weight_rms, rel=1e-12)
    assert got["noise_to_weight"] == pytest.approx(noise_rms / weight_rms, rel=1e-5)
    assert got["nonfinite"] == 0


@pytest.mark.parametrize("changes", [{}, {"fused": True}], ids=str)
def test_pats_summary_counts_what_was_not_finite(backend: str, changes: dict[str, Any]) -> None:
    """It counts all that ever were, also in a group whose noise was turned off since."""
    pats, optimizer, params = make_pats(backend, **changes)
    count = poison(optimizer, params)
    assert pats.pats_summary()["nonfinite"] == sum(pats.nonfinite_counts().values()) == count
    optimizer.param_groups[0]["noise_scale"] = optimizer.param_groups[1]["noise_scale"] = 0.0
    assert pats.pats_summary() == {"nonfinite": count}
    assert gate_summary(pats).numel == 0


def test_pats_summary_is_what_a_step_adds() -> None:
    """Its root mean square over the elements with noise is that of w's change in an exact step with lr 0."""
    random = torch.Generator().manual_seed(3)
    param = nn.Parameter(torch.randn(200_000, generator=random, dtype=torch.float64))
    optimizer = PATSAdamW([param], lr=0.0, weight_decay=0.0, noise_scale=1e-3, normalization="exact")
    before = param.detach()
    for _ in range(2):
        param.grad = torch.randn(param.shape, generator=random, dtype=torch.float64) ** 3
        before = param.detach().clone()
        optimizer.step()
    moved = (param.detach() - before).square().mean().sqrt()
    # Over n normals a root mean square has a relative standard deviation of at most sqrt(3 / (2 n)): 0.3%.
    assert optimizer.pats_summary()["noise_rms"] == pytest.approx(float(moved), rel=0.015)


@pytest.mark.parametrize("fused", [False, True])
def test_pats_summary_without_state(fused: bool) -> None:
    assert make_pats("eager", fused)[0].pats_summary() == {"nonfinite": 0}


def test_pats_summary_gives_a_noise_scale_that_all_share_to_the_last_bit() -> None:
    """1e-5 / 3 would not survive an average of doubles weighted by sizes."""
    pats, optimizer, params = make_pats("eager", noise_scale=1e-5 / 3)
    take_steps(optimizer, params, 1)
    assert pats.pats_summary()["noise_scale"] == 1e-5 / 3


@pytest.mark.parametrize("together", [False, True])
def test_pats_summary_with_a_noise_scale_on_the_device(
    together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, the host does not read the tensor."""
    pats, optimizer, params = make_pats("eager", noise_scale=1e-2)
    take_steps(optimizer, params, 3)
    second = 0.01 if together else 0.25
    optimizer.param_groups[1]["noise_scale"] = second
    expected = pats.pats_summary()
    for group, scale in zip(optimizer.param_groups, (0.01, second), strict=False):
        group["noise_scale"] = torch.tensor([scale])
    plain = hyperparameters._plain
    monkeypatch.setattr(hyperparameters, "_plain", lambda n, v: v if n == "noise_scale" else plain(n, v))
    with Waits() as waits:
        got = pats.pats_summary()
    assert waits.count == 0
    for name, value in got.items():  # float32's 0.01 is off by 2e-8
        assert value == pytest.approx(expected[name], rel=1e-7), name
    if together:
        assert got["noise_scale"] == torch.tensor(0.01).item()


class Waits(TorchDispatchMode):
    """Counts operations that read a number on the host, except `tolist`."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("changes", [{}, {"fused": True, "sensitivity": "moments"}], ids=str)
def test_pats_summary_waits_once(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pats, optimizer, params = make_pats("eager", **changes)
    poison(optimizer, params)
    take_steps(optimizer, params, 1)
    lists: list[Tensor] = []
    real = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: lists.append(tensor) or real(tensor))
    with Waits() as waits:
        gate_summary(pats)
        assert (waits.count, len(lists)) == (0, 0)
        pats.pats_summary()
    assert (waits.count, len(lists)) == (0, 1)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_state_sensitivities(state_dtype: torch.dtype, fused: bool) -> None:
    """Copies of the averages, by the model's names, or else by position; none for tensors without any."""
    pats, optimizer, params = make_pats("eager", fused, state_dtype=state_dtype)
    take_steps(optimizer, params, 3)
    s = state_sensitivities(pats, [("first", params[0]), ("fourth", params[3]), ("other", torch.ones(3))])
    assert list(s) == ["first", "param_groups[0]['params'][1]", "param_groups[1]['params'][0]", "fourth"]
    for average, param in zip(s.values(), params, strict=False):
        assert average.dtype == torch.float32
        assert torch.equal(average, pats.state[param]["exp_avg_sens"].float())
    kept = s["first"].clone()
    take_steps(optimizer, params, 1)
    assert torch.equal(s["first"], kept)


def test_state_sensitivities_by_the_optimizers_names() -> None:
    model = Linear()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    pats = PATS(optimizer)
    for batch in batches()[:1]:
        model(**batch).loss.backward()
    optimizer.step()
    s = state_sensitivities(pats)
    assert list(s) == ["w", "b"]
    expected = 0.15 * (Linear().w * model.w.grad).abs()
    torch.testing.assert_close(s["w"], expected.detach(), rtol=1e-5, atol=0)


# The picture.


def some_distributions() -> dict[str, Distribution]:
    """Two layers with three kinds of tensors, another kind with the same last name, and a tensor of zeros."""
    random = torch.Generator().manual_seed(12)
    names = [f"encoder.{i}.{kind}" for i in (0, 1, 10) for kind in ("q.weight", "q.bias", "out.weight")]
    names += ["decoder.0.q.weight", "head", "pos"]
    result: dict[str, Distribution] = {}
    for label, width in (("before", 1.0), ("AdamW", 2.0), ("PATS", 0.5)):
        tensors = {name: (width * torch.randn(50, generator=random)).exp() for name in names}
        result[label] = distribution(tensors | {"pos": torch.zeros(50)})
    return result


def test_plot_draws_the_numbers(tmp_path: Path) -> None:
    distributions = some_distributions()
    figure = plot(distributions, tmp_path / "figure.png")
    assert matplotlib.image.imread(tmp_path / "figure.png").std() > 0.01
    histogram, concentration, strip = figure.axes
    for place, (label, d) in enumerate(distributions.items()):
        steps: Any = histogram.patches[2 * place]
        np.testing.assert_array_equal(
            steps.get_data().values, np.array(d.overall.histogram) / d.overall.numel
        )
        curve = concentration.lines[place]
        np.testing.assert_array_equal(curve.get_xydata(), np.stack((CURVE_SHARES, d.curve), axis=1))
        assert curve.get_color() == COLOURS[place]
        points = np.asarray(strip.collections[place].get_offsets())
        ginis = [summary.gini for name, summary in d.tensors.items() if name != "pos"]
        np.testing.assert_allclose(np.sort(points[:, 0]), np.sort(ginis))
        assert strip.collections[place].get_label() == label
    legend: Any = histogram.get_legend()
    text = [t.get_text() for t in legend.get_texts()]
    assert text[0] == f"before ({50 / 600:.1%} are zero)"


def test_plot_has_a_row_for_each_kind_of_tensor() -> None:
    """One row for all layers, with a short name if unique, sorted by the median in the first model."""
    distributions = some_distributions()
    strip = plot(distributions).axes[2]
    labels = [t.get_text() for t in strip.get_yticklabels()]
    assert sorted(labels) == [
        "decoder.*.q.weight",
        "encoder.*.q.weight",
        "head",
        "out.weight",
        "pos",
        "q.bias",
    ]
    before = distributions["before"].tensors
    at = labels.index("q.bias")
    points = np.asarray(strip.collections[0].get_offsets())
    in_row = points[np.round(points[:, 1]) == at, 0]
    np.testing.assert_allclose(
        np.sort(in_row), np.sort([before[f"encoder.{i}.q.bias"].gini for i in (0, 1, 10)])
    )
    medians = [np.median(points[np.round(points[:, 1]) == row, 0]) for row in range(len(labels) - 1)]
    assert medians == sorted(medians, reverse=True)
    assert labels[-1] == "pos"


def test_plot_takes_what_it_can_draw() -> None:
    d = of(torch.zeros(3))
    assert len(plot({"nothing": d}).axes) == 3
    for count in (0, len(COLOURS) + 1):
        with pytest.raises(ValueError, match=f"1 to 6 distributions, but was given {count}"):
            plot({str(i): d for i in range(count)})


def test_matplotlib_is_imported_to_draw_only() -> None:
    code = "import sys, pats_kernels, pats_kernels.analysis; print('matplotlib' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
