"""Extreme numbers: vanishing statistics, the loss's scale, closed gates, roots of subnormal numbers.

On every backend, each number is compared with the oracle or a closed form.
"""

import warnings
from itertools import product
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from adamw_harness import AdamWCase, optimizer_of, params_of
from conftest import INTERPRETED, KERNEL
from harness import TOLERANCES, Case, Work, assert_same_bits, check_step, prepare, same_bits, step, values
from torch import Tensor, nn

from pats_kernels import PATS, PATSAdamW, counters, reference

VARIANTS = list(product(["delayed", "exact"], ["product", "ucb", "none"]))
STORAGES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float64, torch.float64),
    (torch.float64, torch.float32),
]
LEAST, MOST = 2.0**-120, 2.0**112

every_variant = pytest.mark.parametrize(("normalization", "uncertainty"), VARIANTS)


def in_the_middle(case: Case, S: float, U: float) -> Work:
    """A case's tensors as after some steps; all elements of a tensor have the same averages."""
    work = prepare(case)
    for i, (sens, unc, stats) in enumerate(zip(work.sens, work.unc, work.stats, strict=True)):
        sens.fill_(S)
        if unc is not None:
            unc.fill_(U)
        means = (sens, torch.zeros(1) if unc is None else unc)
        work.stats[i] = stats.copy_(torch.stack([x.double().mean() for x in means]))
    return work


def checked_step(backend: str, case: Case, work: Work, number: int) -> None:
    before = list(values(work))
    step(backend, case, work, number)
    for i, (old, new) in enumerate(zip(before, values(work), strict=True)):
        dtypes = (case.dtype, work.sens[i].dtype)
        check_step(old, new, case.hyper(i, number), dtypes, TOLERANCES[backend], f"step {number}, tensor {i}")


# Statistics that die out.


@pytest.mark.parametrize(("dtype", "state_dtype"), STORAGES)
@every_variant
def test_no_noise_once_the_statistics_are_gone(
    backend: str, dtype: torch.dtype, state_dtype: torch.dtype, normalization: str, uncertainty: str
) -> None:
    """Zero gradients: 0.85 times 3 spacings of float32's subnormals rounds to 3 of them, forever.

    Such a tensor must be treated like one that never had gradients; it once got full noise. When gradients
    return, it behaves like any other after its first step.
    """
    case = Case(
        [(300,)],
        dtype=dtype,
        state_dtype=state_dtype,
        noise_scale=0.5,
        normalization=normalization,
        uncertainty=uncertainty,
    )
    work = in_the_middle(case, 2.0**-130, 2.0**-131)
    before = work.params[0].clone()
    for number in range(1, 3):
        work.grads = [torch.zeros(300, dtype=dtype)]
        checked_step(backend, case, work, number)
    assert same_bits(work.params[0], before)
    for number in range(3, 5):
        work.grads = [torch.randn(300, generator=torch.Generator().manual_seed(number)).to(dtype)]
        checked_step(backend, case, work, number)
    assert (work.params[0] != before).float().mean() > 0.3


@pytest.mark.parametrize("stochastic_rounding", [True] if INTERPRETED else [True, False])
@pytest.mark.parametrize(("dtype", "state_dtype"), STORAGES[:1] if INTERPRETED else STORAGES)
def test_a_layer_that_is_never_used(
    backend: str, dtype: torch.dtype, state_dtype: torch.dtype, stochastic_rounding: bool
) -> None:
    """One real gradient, then zeros: noise for some hundred steps, and from then on none."""
    case = Case(
        [(64,)],
        dtype=dtype,
        state_dtype=state_dtype,
        noise_scale=0.5,
        sens_betas=(0.85, 0.85),
        stochastic_rounding=stochastic_rounding,
    )
    work = prepare(case)
    work.grads = [torch.randn(64, generator=torch.Generator().manual_seed(1)).to(dtype)]
    moved = []
    for number in range(1, 761):
        before = work.params[0].clone()
        step(backend, case, work, number)
        moved.append(not same_bits(work.params[0], before))
        if number == 1:
            work.grads = [torch.zeros(64, dtype=dtype)]
    # Rounded to nearest, a bfloat16 average stops at once, far above the end of float32's range.
    if dtype == torch.bfloat16 and not stochastic_rounding:
        return
    assert all(moved[1:300])
    assert not any(moved[600:])


def test_the_rule_is_the_oracle_s() -> None:
    assert (reference.LEAST_MEAN, reference.MOST_MEAN) == (LEAST, MOST)


@pytest.mark.parametrize("mean", [LEAST * (1 - 2.0**-24), LEAST, MOST, MOST * (1 + 2.0**-23), np.inf])
@pytest.mark.parametrize("uncertainty", ["product", "ucb", "none"])
def test_where_statistics_begin_and_end(backend: str, uncertainty: str, mean: float) -> None:
    """From the least to the greatest valid mean the gates follow the formula. Beyond, they are closed."""
    case = Case([(500,)], noise_scale=0.5, uncertainty=uncertainty, sens_betas=(0.99, 0.99))
    work = prepare(case)
    spread = torch.linspace(0.02, 4, 500)
    bounded = min(mean, MOST)
    work.sens[0].copy_(spread.double() * bounded)
    work.stats[0][0] = mean
    unc = work.unc[0]
    if unc is not None:
        unc.copy_((spread.flip(0).double() if uncertainty == "product" else 0 * spread) * bounded)
        work.stats[0][1] = mean if uncertainty == "product" else 0.0
    work.grads = [torch.zeros(500)]
    before = work.params[0].clone()
    checked_step(backend, case, work, 1)
    if LEAST <= mean <= MOST:
        assert 0.05 < (work.params[0] != before).float().mean() < 1
    else:
        assert same_bits(work.params[0], before)


@pytest.mark.parametrize(
    ("level", "gamma"),
    [
        (level, gamma)
        for level in (2.0**-119, 1e-8, 2.0**100)
        for gamma in (0.0, 1e-3, 50.0, 1e4, 1e30)
        # A GPU treats subnormals as 0, which opens the gate as well.
        if level * 0.2 / max(gamma, 1) >= 2.0**-126
    ],
)
@pytest.mark.parametrize("uncertainty", ["ucb", "none"])
def test_any_gamma_at_any_level(backend: str, gamma: float, level: float, uncertainty: str) -> None:
    """Sensitivities of 0, of a fifth of where the gate opens, and of five times that."""
    case = Case([(300,)], noise_scale=0.5, gamma=gamma, uncertainty=uncertainty, sens_betas=(0.99, 0.99))
    work = prepare(case)
    opens = level / max(gamma, 1)
    work.sens[0].copy_(torch.tensor([0.0, 0.2 * opens, 5 * opens], dtype=torch.float64).repeat(100))
    work.stats[0][0] = level
    work.grads = [torch.zeros(300)]
    before = work.params[0].clone()
    checked_step(backend, case, work, 1)
    moved = (work.params[0] != before).view(100, 3).float().mean(0)
    assert moved[:2].tolist() == [1, 1]
    assert moved[2] == (0 if gamma >= 1 else 1)


def test_moments_of_a_layer_that_is_never_used(backend: str) -> None:
    """0.999 times 500 spacings rounds to 500: v stops there, and does not count as a sensitivity."""
    case = AdamWCase(
        [(200,)], noise_scale=0.5, normalization="exact", adamw={"sensitivity": "moments", "lr": 0.0}
    )
    optimizer = optimizer_of(backend, case)
    (param,) = params_of(optimizer)
    param.grad = torch.zeros(200)
    optimizer.step()
    optimizer.state[param]["exp_avg_sq"].fill_(500 * 2.0**-149)
    before = param.detach().clone()
    optimizer.step()
    assert optimizer.state[param]["exp_avg_sq"].eq(500 * 2.0**-149).all()
    assert same_bits(param.detach(), before)
    param.grad = torch.randn(200, generator=torch.Generator().manual_seed(2))
    for _ in range(2):
        optimizer.step()
    assert (param.detach() != before).float().mean() > 0.3


# The loss's scale.


def scaled_runs(backend: str, case: Case, scale: float) -> tuple[Work, Work]:
    """Three steps with gradients of similar size, and the same with all gradients times `scale`."""
    works = prepare(case), prepare(case)
    for work in works:
        work.params[0].copy_(0.02 * (1.5 + torch.rand(600, generator=torch.Generator().manual_seed(3))))
    for number in range(1, 4):
        random = torch.Generator().manual_seed(number)
        grads = torch.randn(600, generator=random).sign() * torch.empty(600).uniform_(
            0.5, 4, generator=random
        )
        for work, factor in zip(works, (1.0, scale), strict=True):
            work.grads = [(grads.double() * factor).to(case.dtype)]
            step(backend, case, work, number)
    assert not same_bits(works[0].params[0], prepare(case).params[0])
    return works


@every_variant
@pytest.mark.parametrize("power", [-108, -100, 60, 100, 112])
def test_a_power_of_two_changes_nothing(
    backend: str, normalization: str, uncertainty: str, power: int
) -> None:
    """Weights are equal to the last bit, from where U, here a thirtieth of w g, is 2^-120, to where w g is
    2^108."""
    case = Case([(600,)], normalization=normalization, uncertainty=uncertainty)
    plain, scaled = scaled_runs(backend, case, 2.0**power)
    assert_same_bits(plain.params, scaled.params)
    assert_same_bits([s.double() * 2.0**power for s in plain.sens], [s.double() for s in scaled.sens])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_a_loss_of_any_scale(backend: str, scale: float, dtype: torch.dtype) -> None:
    """Gates inherit some 16 roundings of 2^-24, times 1/q. No noise is larger than noise_scale |z| < 7e-3."""
    case = Case([(600,)], dtype=dtype, state_dtype=torch.float32, normalization="exact")
    plain, scaled = scaled_runs(backend, case, scale)
    off = (plain.params[0].double() - scaled.params[0].double()).abs()
    spacing = 2.0**-8 if dtype == torch.bfloat16 else 0  # the gradients' own; once more w's, rounded apart
    assert off.max() <= 1e-3 * (1e-3 + 20 * spacing) + 0.1 * spacing


# Edges of the formula itself.


@pytest.mark.parametrize("uncertainty", ["product", "none"])
@pytest.mark.parametrize("gamma", [0.9, 1.0])
def test_a_tensor_of_one_element(backend: str, gamma: float, uncertainty: str) -> None:
    """Its mean is itself, so q = 1 with exact normalization: gamma = 1 means never any noise, 0.9 always."""
    case = Case(
        [(), (1,), (1, 1)], gamma=gamma, uncertainty=uncertainty, normalization="exact", noise_scale=0.5
    )
    work = prepare(case)
    before = [p.clone() for p in work.params]
    for number in range(1, 4):
        random = torch.Generator().manual_seed(number)
        work.grads = [torch.randn(p.shape, generator=random) for p in work.params]
        checked_step(backend, case, work, number)
    if gamma == 1.0 and uncertainty == "none":
        # A rounding of 1/mean may leave q a few 2^-24 below 1, and so a gate of some 1e-7.
        for new, old in zip(work.params, before, strict=True):
            assert (new - old).abs() <= 3 * 0.5 * 6.8 * 16 * 2.0**-24


@pytest.mark.parametrize("normalization", ["delayed", "exact"])
def test_without_memory_there_is_no_uncertainty(backend: str, normalization: str) -> None:
    """sens_betas=(0, b): S is s to the last bit, so U and its mean are 0, and no element ever gets noise."""
    case = Case([(700,)], sens_betas=(0.0, 0.95), normalization=normalization, noise_scale=0.5)
    work = prepare(case)
    before = work.params[0].clone()
    for number in range(1, 4):
        work.grads = [torch.randn(700, generator=torch.Generator().manual_seed(number))]
        step(backend, case, work, number)
        assert same_bits(work.sens[0], (before * work.grads[0]).abs())
    assert work.unc[0] is not None
    assert not work.unc[0].any()
    assert same_bits(work.params[0], before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_of_one_gradient_know_no_uncertainty(backend: str, dtype: torch.dtype) -> None:
    """Then v^ is m^^2, even for betas close to 1, where beta^t's rounding is large compared with 1 -
    beta^t."""
    betas = [1 - digit * 10.0**-place for place in range(1, 6) for digit in range(1, 10)]
    params = [nn.Parameter(torch.ones(8, dtype=dtype)) for _ in betas]
    groups = [{"params": [p], "betas": (beta, beta)} for p, beta in zip(params, betas, strict=True)]
    optimizer = PATSAdamW(groups, sensitivity="moments", normalization="exact", backend=backend)
    for param in params:
        param.grad = torch.linspace(0.1, 0.9, 8, dtype=dtype)
    optimizer.step()
    S, U = torch.stack([optimizer.state[param]["sens_stats"] for param in params]).unbind(1)
    assert U.tolist() == [0.0] * len(betas)
    torch.testing.assert_close(S, torch.full_like(S, 0.5), rtol=1e-5, atol=0)  # a dozen roundings of float32


@pytest.mark.backend
def test_bias_corrections_do_not_cancel() -> None:
    """1 - beta^t for a beta close to 1: with a constant gradient each of AdamW's steps is lr."""
    param = nn.Parameter(torch.zeros(8, dtype=torch.float64))
    settings: dict[str, Any] = {"betas": (1 - 1e-6, 1 - 1e-6), "eps": 0.0, "weight_decay": 0.0}
    optimizer = PATSAdamW([param], lr=1.0, noise_scale=0.0, backend=KERNEL, **settings)
    for _ in range(7):
        param.grad = torch.ones_like(param)
        optimizer.step()
    # A dozen roundings a step; of beta^t's own, 2^-54, 1 - beta^t would be off by 1e-11.
    torch.testing.assert_close(param.detach(), torch.full_like(param, -7), rtol=1e-14, atol=0)


@every_variant
def test_a_constant_gradient(backend: str, normalization: str, uncertainty: str) -> None:
    """s stays, S approaches it and U goes to 0: still a valid ratio, until S = s to the last bit. No step is
    wrong."""
    case = Case(
        [(300,)],
        noise_scale=1e-30,
        normalization=normalization,
        uncertainty=uncertainty,
        sens_betas=(0.3, 0.3),
    )
    work = prepare(case)
    work.grads = [torch.randn(300, generator=torch.Generator().manual_seed(1))]
    for number in range(1, 12 if INTERPRETED else 100):
        checked_step(backend, case, work, number)
        assert all(t.isfinite().all() for t in work.tensors())


@every_variant
@pytest.mark.parametrize("what", ["weights", "gradients"])
def test_all_zeros(backend: str, normalization: str, uncertainty: str, what: str) -> None:
    """Such a tensor has no statistics, whichever factor is zero, so it gets no noise."""
    case = Case([(300,)], noise_scale=0.5, normalization=normalization, uncertainty=uncertainty)
    work = prepare(case)
    work.grads = [torch.randn(300, generator=torch.Generator().manual_seed(1))]
    (work.params if what == "weights" else work.grads)[0].zero_()
    before = work.params[0].clone()
    for number in range(1, 4):
        step(backend, case, work, number)
    assert same_bits(work.params[0], before)
    assert not any(t.any() for t in work.written()[1:])


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_subnormal_weights_and_gradients(
    backend: str, dtype: torch.dtype, normalization: str, uncertainty: str
) -> None:
    """Subnormal weights, subnormal gradients, and both, beside ordinary ones. Then a tensor with nothing
    else."""
    case = Case([(400,), (400,)], dtype=dtype, normalization=normalization, uncertainty=uncertainty)
    least = torch.finfo(dtype).smallest_normal
    work = prepare(case)
    work.params[0][::2] *= least
    work.params[1].mul_(least)
    for number in range(1, 4):
        random = torch.Generator().manual_seed(number)
        work.grads = [torch.randn(400, generator=random).to(dtype) for _ in work.params]
        work.grads[0][::3] *= least
        work.grads[1].mul_(least)
        checked_step(backend, case, work, number)


# Closed gates.


@pytest.mark.parametrize("noise_scale", [1e30, 9.9e36])
@pytest.mark.parametrize("normalization", ["delayed", "exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_closed_gate_moves_nothing(
    backend: str, dtype: torch.dtype, normalization: str, noise_scale: float
) -> None:
    """However large the noise. A negative zero keeps its sign."""
    case = Case([(400,)], dtype=dtype, normalization=normalization, noise_scale=noise_scale)
    work = in_the_middle(case, 1.0, 1.0)
    work.sens[0].fill_(4.0)
    work.sens[0][::2] = 1e-3
    work.params[0][1::4] = -0.0
    closed = torch.arange(400) % 2 == 1
    before = work.params[0].clone()
    work.grads = [torch.zeros(400, dtype=dtype)]
    step(backend, case, work, 1)
    assert same_bits(work.params[0][closed], before[closed])
    assert (work.params[0] != before)[~closed].all()


@pytest.mark.parametrize("sensitivity", ["ema", "moments"])
def test_a_closed_gate_with_adamw(backend: str, sensitivity: str) -> None:
    """The same if AdamW's step follows: with lr = 0, closed gates leave the weights as they are."""
    random = torch.Generator().manual_seed(4)
    param = nn.Parameter(torch.randn(400, generator=random))
    options: dict[str, Any] = {
        "lr": 0.0,
        "noise_scale": 9.9e36,
        "gamma": 1e9,
        "sensitivity": sensitivity,
        "uncertainty": "none",
    }
    optimizer = PATSAdamW([param], backend=backend, **options)
    before = param.detach().clone()
    for _ in range(3):
        param.grad = torch.randn(400, generator=random)
        optimizer.step()
    assert same_bits(param.detach(), before)


# AdamW's root of what is subnormal.


@pytest.mark.parametrize("noise_scale", [0.0, 1e-30])
@pytest.mark.parametrize("sensitivity", ["ema", "moments"])
@pytest.mark.parametrize("gradient", [3e-22, 1e-19, 1e-10, 1.0, 1e15])
def test_adamw_without_eps(backend: str, gradient: float, sensitivity: str, noise_scale: float) -> None:
    """m^ / sqrt(v^) is the gradient's sign, however small the gradient: for 1e-19 v is subnormal.

    For 3e-22 v is one of the last subnormals, right to a few percent.
    """
    g = gradient * torch.tensor([1.0, -1.0]).repeat(32)
    param = nn.Parameter(torch.full((64,), 0.5))
    options: dict[str, Any] = {"lr": 1e-2, "eps": 0, "weight_decay": 0.0, "betas": (0.9, 0.99)}
    optimizer = PATSAdamW(
        [param], noise_scale=noise_scale, sensitivity=sensitivity, backend=backend, **options
    )
    for _ in range(2):
        param.grad = g.clone()
        optimizer.step()
    expected = (0.5 - 2e-2 * g.sign()).double()
    relative = 0.2 if gradient < 1e-20 else 1e-3 if gradient < 1e-15 else 1e-5
    torch.testing.assert_close(param.detach().double(), expected, rtol=0, atol=2e-2 * relative + 1e-7)


def test_the_normals_where_the_radius_nears_zero() -> None:
    """The oracle's own normals: a uniform within 2^-24 of 1 is 1 in float32 and gives a radius of 0, not a
    NaN."""
    words: Tensor = torch.tensor([[2**32 - 1, 2**31, 2**32 - 2**8, 5]])
    z = reference.normals(words)
    assert z.isfinite().all()
    uniform = (np.array([2**32 - 1, 2**32 - 2**8], dtype=np.float64) + 0.5) / 2.0**32
    radius = np.sqrt(-2 * np.log(uniform))
    np.testing.assert_allclose(np.hypot(z[0, ::2].numpy(), z[0, 1::2].numpy()), radius, rtol=1e-7)
    assert oracle.normal(oracle.Hyper(), np.arange(4)).shape == (4,)


# The counter of steps.


def test_a_float32_counts_on() -> None:
    """Up to 2^24 the count is the number itself. Then each step is the next float32, also after the spacing
    doubles."""
    steps = torch.tensor([0, 1, 2, 2**24 - 1, 2**24, 2**24 + 1, 2**25, 2**26 + 3, counters.MOST_STEPS])
    counter = counters.counter_at(steps)
    assert counter.dtype == torch.float32
    assert counter.tolist()[:5] == steps.tolist()[:5]
    assert counter.isfinite().all()
    assert torch.equal(counters.steps_of(counter), steps)
    assert torch.equal(counters.advanced(counter[:-1]), counters.counter_at(steps[:-1] + 1))
    assert counters.advanced(counter[-1:]).isinf().all()  # nothing is left


@pytest.mark.parametrize("normalization", ["delayed", "exact"])
@pytest.mark.parametrize("first", [2**24 - 2, 2**24, 2**24 + 2**23 - 2, 2**28 + 3])
def test_steps_past_what_a_float32_holds(backend: str, first: int, normalization: str) -> None:
    """An optimizer's steps equal those of `pats_step_`, which gets the step numbers, to the last bit."""
    case = Case([(300,)], noise_scale=0.5, normalization=normalization, first_step=first)
    work = prepare(case)
    param = nn.Parameter(work.params[0].clone())
    sgd = torch.optim.SGD([param], lr=0.0)
    pats = PATS(sgd, noise_scale=0.5, normalization=normalization, seed=case.seed, backend=backend)
    noises = []
    for number in range(first, first + 4):
        work.grads = [torch.randn(300, generator=torch.Generator().manual_seed(number % 1000))]
        param.grad = work.grads[0].clone()
        if number == first + 1:  # the first step made the state
            pats.state[param]["step"].copy_(counters.counter_at(torch.tensor(first)))
        before = param.detach().clone()
        if number > first:
            step(backend, case, work, number)
            sgd.step()
            noises.append(param.detach() - before)
        else:
            sgd.step()
            work.params[0].copy_(param.detach())
            for column, key in (
                (work.sens, "exp_avg_sens"),
                (work.unc, "exp_avg_unc"),
                (work.stats, "sens_stats"),
            ):
                assert column[0] is not None
                column[0].copy_(pats.state[param][key])
        assert same_bits(param.detach(), work.params[0])
    assert int(counters.steps_of(pats.state[param]["step"])) == first + 3
    correlation = torch.corrcoef(torch.stack(noises)).triu(1).abs().max()
    assert correlation < 0.3  # of 300 normals 0.06; the same noise again would be 1


@pytest.mark.parametrize("value", [2**24 + 1, float(2**24 + 1), torch.tensor(2**25 + 2)])
def test_large_counts_of_other_kinds_are_loaded(value: Any) -> None:
    param = nn.Parameter(torch.ones(8))
    optimizer = PATSAdamW([param])
    param.grad = torch.ones(8)
    optimizer.step()
    state_dict = optimizer.state_dict()
    state_dict["state"][0]["step"] = value
    optimizer.load_state_dict(state_dict)
    assert int(counters.steps_of(optimizer.state[param]["step"])) == int(value)
    reloaded = PATSAdamW([param])
    reloaded.load_state_dict(optimizer.state_dict())
    assert torch.equal(reloaded.state[param]["step"], optimizer.state[param]["step"])


# Hyperparameters that a float32 cannot hold, and those that never give noise.


@pytest.mark.parametrize(
    ("name", "value"), [("noise_scale", 1e37), ("gamma", 1e39), ("lr", 1e39), ("eps", 1e300)]
)
def test_numbers_that_no_kernel_could_hold(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"Invalid {name}: .*below"):
        PATSAdamW([nn.Parameter(torch.ones(2))], **{name: value})


def test_a_warning_where_nobody_is_ever_uncertain() -> None:
    param = nn.Parameter(torch.randn(64))
    for options, expected in (({}, 1), ({"uncertainty": "ucb"}, 0), ({"sensitivity": "moments"}, 0)):
        optimizer = PATSAdamW([param], sens_betas=(0.0, 0.9), **options)
        param.grad = torch.randn(64)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
            optimizer.step()
        assert sum("never gives any noise" in str(w.message) for w in caught) == expected
