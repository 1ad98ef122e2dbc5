"""PATSAdamW's numbers, compared with the oracle, with torch's AdamW, and with PATS attached to it."""

from dataclasses import replace
from typing import Any

import adamw_harness
import harness
import numpy as np
import pytest
import torch
from adamw_harness import AdamWCase, optimizer_of, params_of, run, run_checked
from conftest import INTERPRETED
from harness import LAYOUTS, assert_same_bits
from hypothesis import given
from hypothesis import strategies as st
from test_backends import SHAPES, STORAGES, VARIANTS, id_of
from torch import Tensor, nn
from torch.testing._internal.common_optimizers import optim_error_inputs_func_adam, optim_inputs_func_adamw

from pats_kernels import PATS, PATSAdamW
from pats_kernels.hyperparameters import AdamWHyperparameters, Hyperparameters
from pats_kernels.plan import Batch
from pats_kernels.step import Launcher

SENSITIVITIES = ["ema", "moments"]
FEW = 5 if INTERPRETED else 20
SOME_STORAGES = STORAGES[::2] if INTERPRETED else STORAGES  # `test_anything` mixes all of them


def of(sensitivity: str, **more: Any) -> dict[str, Any]:
    return {"sensitivity": sensitivity, "lr": 1e-3, **more}


# Against the oracle.


@pytest.mark.parametrize("sensitivity", SENSITIVITIES)
@pytest.mark.parametrize("shapes", SHAPES)
def test_shapes(backend: str, shapes: str, sensitivity: str) -> None:
    run_checked(backend, AdamWCase(SHAPES[shapes], adamw=of(sensitivity)))


@pytest.mark.parametrize("sensitivity", SENSITIVITIES)
@pytest.mark.parametrize(("normalization", "uncertainty"), VARIANTS)
@pytest.mark.parametrize(("dtype", "state_dtype"), SOME_STORAGES, ids=id_of)
def test_variants(
    backend: str,
    dtype: torch.dtype,
    state_dtype: torch.dtype,
    normalization: str,
    uncertainty: str,
    sensitivity: str,
) -> None:
    case = AdamWCase(
        [(1500,), (3, 7)],
        dtype=dtype,
        state_dtype=state_dtype,
        normalization=normalization,
        uncertainty=uncertainty,
        adamw=of(sensitivity),
    )
    run_checked(backend, case)


@pytest.mark.parametrize("sensitivity", SENSITIVITIES)
@pytest.mark.parametrize(("dtype", "state_dtype"), SOME_STORAGES, ids=id_of)
def test_round_to_nearest(
    backend: str, dtype: torch.dtype, state_dtype: torch.dtype, sensitivity: str
) -> None:
    case = AdamWCase([(300,)], dtype=dtype, state_dtype=state_dtype, adamw=of(sensitivity))
    run_checked(backend, replace(case, stochastic_rounding=False))


@pytest.mark.parametrize("grad", ["transposed", "holes"] if INTERPRETED else LAYOUTS)
@pytest.mark.parametrize("param", LAYOUTS)
def test_layouts(backend: str, param: str, grad: str) -> None:
    case = AdamWCase([(4, 6, 5), (40,)], param=param, grad=grad, normalization="exact")
    run_checked(backend, case)


ADAMW: list[dict[str, Any]] = [
    {"lr": 0.0},
    {"lr": 0.5},
    {"betas": (0.0, 0.0)},
    {"betas": (0.0, 0.999999)},
    {"betas": (0.99, 0.5)},
    {"eps": 1.0},
    {"weight_decay": 0.0},
    {"weight_decay": 1.0, "lr": 0.1},
    {"maximize": True},
]


@pytest.mark.parametrize("sensitivity", SENSITIVITIES)
@pytest.mark.parametrize("adamw", ADAMW, ids=str)
def test_hyperparameters_of_adamw(backend: str, adamw: dict[str, Any], sensitivity: str) -> None:
    run_checked(backend, AdamWCase([(700,)], adamw=of(sensitivity) | adamw))


@pytest.mark.parametrize("sensitivity", SENSITIVITIES)
@pytest.mark.parametrize("normalization", ["delayed", "exact"])
def test_groups_of_all_kinds_share_a_launch(backend: str, normalization: str, sensitivity: str) -> None:
    """Groups with and without decay and noise, with different learning rates: one launch, correct numbers."""
    case = AdamWCase(
        [(500,), (30, 4), (7,), (5000,)],
        noise_scale=[1e-3, 0.0, 1e-2, 0.0],
        gamma=[1.0, 1.0, 0.5, 1.0],
        seed=[1, 2, 3, 4],
        normalization=normalization,
        adamw=of(sensitivity, weight_decay=[0.0, 0.1, 0.2, 0.0], maximize=[False, True, True, False])
        | {"lr": [1e-3, 1e-2, 1e-4, 2e-3]},
    )
    optimizer = run_checked(backend, case)
    ((plan, *_),) = optimizer._launcher._planner._plans.values()
    assert [launch.index for launch in plan.launches] == [[0, 1, 2, 3]]
    kept = [set(optimizer.state[param]) for param in params_of(optimizer)]
    adamw, sens = {"step", "exp_avg", "exp_avg_sq"}, {"exp_avg_sens", "exp_avg_unc"}
    noisy = adamw | {"sens_stats"} | (sens if sensitivity == "ema" else set())
    assert kept == [noisy, adamw, noisy, adamw]


@pytest.mark.parametrize("sensitivity", SENSITIVITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=id_of)
@pytest.mark.parametrize("normalization", ["delayed", "exact"])
def test_nonfinite_gradients(backend: str, dtype: torch.dtype, normalization: str, sensitivity: str) -> None:
    """They spoil only their own elements, as in torch's AdamW, and never enter S and U."""
    poison = (torch.nan, torch.inf, -torch.inf)
    case = AdamWCase(
        [(300,), (1500,)],
        dtype=dtype,
        poison=poison,
        normalization=normalization,
        adamw=of(sensitivity),
        steps=1,
    )
    optimizer = run_checked(backend, case)
    poisoned = [len(poison) * (size // 97) + min(size % 97, 3) for size in (300, 1500)]
    assert list(optimizer.nonfinite_counts().values()) == poisoned
    finite = torch.randn(300).to(dtype)
    params_of(optimizer)[0].grad = finite
    before = [value.isfinite() for value in optimizer.state[params_of(optimizer)[0]].values()]
    optimizer.step()
    after = [value.isfinite() for value in optimizer.state[params_of(optimizer)[0]].values()]
    assert_same_bits(before, after)


@st.composite
def cases(draw: st.DrawFn) -> AdamWCase:
    shape = st.lists(st.integers(0, 9), max_size=4).map(tuple)
    shapes = draw(st.lists(shape, min_size=1, max_size=4))
    dtype, state_dtype = draw(st.sampled_from(STORAGES))
    normalization, uncertainty = draw(st.sampled_from(VARIANTS))
    rates = st.floats(0, 0.999)
    return AdamWCase(
        shapes,
        param=draw(st.sampled_from(list(LAYOUTS))),
        grad=draw(st.sampled_from(list(LAYOUTS))),
        dtype=dtype,
        state_dtype=state_dtype,
        noise_scale=[draw(st.sampled_from([0.0, 1e-5, 1e-2])) for _ in shapes],
        gamma=draw(st.floats(0, 3)),
        sens_betas=(draw(rates), draw(rates)),
        uncertainty=uncertainty,
        normalization=normalization,
        stochastic_rounding=draw(st.booleans()),
        seed=draw(st.integers(0, 2**64 - 1)),
        adamw={
            "lr": draw(st.floats(0, 0.1)),
            "betas": (draw(rates), draw(rates)),
            "eps": draw(st.sampled_from([1e-8, 1e-3])),
            "weight_decay": draw(st.floats(0, 1)),
            "maximize": [draw(st.booleans()) for _ in shapes],
            "sensitivity": draw(st.sampled_from(SENSITIVITIES)),
        },
    )


@given(case=cases())
def test_anything(backend: str, case: AdamWCase) -> None:
    run_checked(backend, case)


@pytest.mark.parametrize("sensitivity", SENSITIVITIES)
@pytest.mark.parametrize("normalization", ["delayed", "exact"])
def test_threads_give_the_same_bits(
    backend: str, threads: None, normalization: str, sensitivity: str
) -> None:
    sizes = [(9000 if INTERPRETED else 70_000,), (9,)]
    case = AdamWCase(sizes, normalization=normalization, adamw=of(sensitivity), steps=2)
    written = []
    for count in (1, 2):
        torch.set_num_threads(count)
        optimizer = run(backend, case)
        states = [value for state in optimizer.state.values() for value in state.values()]
        written.append([param.detach() for param in params_of(optimizer)] + states)
    assert_same_bits(*written)


def test_a_learning_rate_on_the_device(backend: str) -> None:
    """The kernels read it on the device. If it is on the CPU, as here, PATSAdamW itself reads it on the
    host."""

    def step(lr: float | Tensor) -> Tensor:
        torch.manual_seed(3)
        param, grad = torch.randn(100), torch.randn(100)
        h = AdamWHyperparameters(lr=lr, weight_decay=0.5, noise_scale=0.0)
        averages = [torch.rand(100), torch.rand(100)]
        batch = Batch(
            str, [param], [grad], [None], [None], [None], [3], [], [0], [h], *([a] for a in averages)
        )
        Launcher().launch(batch, backend)
        return param

    exact = step(0.25)  # exact in float32, so both ways have the same number
    assert_same_bits([step(torch.tensor(0.25))], [exact])
    assert_same_bits([step(torch.tensor([0.25]))], [exact])
    assert not harness.same_bits(step(0.5), exact)


@pytest.mark.parametrize("kind", [Hyperparameters, AdamWHyperparameters])
def test_a_noise_scale_on_the_device(backend: str, kind: type[Hyperparameters]) -> None:
    def step(noise_scale: float | Tensor) -> Tensor:
        torch.manual_seed(3)
        param, grad, *averages = (torch.rand(100) for _ in range(6))
        h = kind(noise_scale=noise_scale)
        states = [[average] for average in averages]
        moments = states[2:] if kind is AdamWHyperparameters else []
        stats = torch.tensor([0.5, 0.5])
        batch = Batch(str, [param], [grad], *states[:2], [stats], [3], [], [0], [h], *moments)
        Launcher().launch(batch, backend)
        return param

    exact = step(0.25)
    assert_same_bits([step(torch.tensor(0.25))], [exact])
    assert_same_bits([step(torch.tensor([0.25]))], [exact])
    assert not harness.same_bits(step(torch.tensor(0.5)), exact)
    assert_same_bits([step(torch.tensor(0.0))], [step(torch.zeros(1))])


# Against torch.


def twins(dtype: torch.dtype = torch.float32) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    random = torch.Generator().manual_seed(5)
    shapes = [(50, 7), (5000,), (), (4, 3, 2)]
    values = [torch.randn(shape, generator=random, dtype=torch.float64).to(dtype) for shape in shapes]
    first, second = ([nn.Parameter(value.clone()) for value in values] for _ in range(2))
    return first, second


def give_same_gradients(params: list[nn.Parameter], others: list[nn.Parameter], number: int) -> None:
    random = torch.Generator().manual_seed(number)
    for a, b in zip(params, others, strict=True):
        a.grad = torch.randn(a.shape, generator=random, dtype=torch.float64).to(a.dtype)
        b.grad = a.grad.clone()


def assert_close(
    params: list[nn.Parameter], others: list[nn.Parameter], steps: int, lr: float, inexact: float = 0.0
) -> None:
    """Equal within the roundings that fusion may change: per step two of the weight, and 16 of an update,
    which is at most some ten times lr for normal gradients."""
    u = max(torch.finfo(params[0].dtype).eps / 2, inexact)
    for a, b in zip(params, others, strict=True):
        allowed = steps * (2 * u * (b.detach().abs() + 1) + 16 * u * 10 * lr)
        assert ((a - b).abs() <= allowed).all(), (a - b).abs().max()


INPUTS = [
    input
    for device in ("cpu", "cuda", "mps")  # capturable, say, needs a GPU in torch, but works everywhere here
    for input in optim_inputs_func_adamw(device, torch.float32)
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=id_of)
@pytest.mark.parametrize("number", range(len(INPUTS)), ids=[input.desc.replace(" ", "-") for input in INPUTS])
def test_torch_s_own_table_of_inputs(backend: str, number: int, dtype: torch.dtype) -> None:
    kwargs = INPUTS[number].kwargs
    params, others = twins(dtype)
    if kwargs.get("amsgrad"):
        with pytest.raises(ValueError, match="Invalid amsgrad: True"):
            PATSAdamW(params, **kwargs)
        return
    optimizer = PATSAdamW(params, **kwargs, noise_scale=0.0, backend=backend)
    plain = {name: value for name, value in kwargs.items() if name != "capturable"}  # which needs a GPU there
    if "betas" in plain:
        plain["betas"] = tuple(float(beta) for beta in plain["betas"])
    other = torch.optim.AdamW(others, **plain)
    for step in range(FEW):
        give_same_gradients(params, others, step)
        optimizer.step()
        other.step()
    # torch computes 1 - lr weight_decay in the dtype of a tensor lr, float32, also for float64 parameters.
    inexact = 1e-7 if isinstance(kwargs.get("lr"), Tensor) else 0.0
    assert_close(params, others, FEW, float(kwargs.get("lr", 1e-3)), inexact)
    for a, b in zip(params, others, strict=True):
        assert float(optimizer.state[a]["step"]) == float(other.state[b]["step"])
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(optimizer.state[a][key], other.state[b][key])


def test_the_table_was_not_empty() -> None:
    assert sum(not input.kwargs.get("amsgrad") for input in INPUTS) >= 8


ERRORS = optim_error_inputs_func_adam("cpu", torch.float32)


@pytest.mark.parametrize("number", range(len(ERRORS)), ids=[e.optimizer_error_input.desc for e in ERRORS])
def test_torch_s_own_table_of_bad_inputs(number: int) -> None:
    """What torch refuses at construction is refused with the same error, unless it is only about foreach."""
    error = ERRORS[number]
    params, kwargs = error.optimizer_error_input.params, error.optimizer_error_input.kwargs
    params = [nn.Parameter(torch.zeros(3))] if params is None else params
    if "foreach" in error.error_regex or "both floats or both Tensors" in error.error_regex:
        PATSAdamW(params, **kwargs)
    elif issubclass(error.error_type, Warning):
        with pytest.warns(error.error_type, match=error.error_regex):
            PATSAdamW(params, **kwargs)
    else:
        with pytest.raises(error.error_type):
            PATSAdamW(params, **kwargs)


@pytest.mark.parametrize(("normalization", "uncertainty"), VARIANTS[:: 5 if INTERPRETED else 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=id_of)
def test_it_is_pats_attached_to_adamw(
    backend: str, dtype: torch.dtype, normalization: str, uncertainty: str
) -> None:
    """Both add the same noise to the same elements, so they differ only by roundings.

    The noise is large, a hundredth of a weight, so that missing noise would show. Roundings of S and U move
    gates near 1/gamma a little, hence a further tolerance of 1e-4 of noise_scale.
    """
    params, others = twins(dtype)
    pats: dict[str, Any] = {"noise_scale": 1e-2, "normalization": normalization, "uncertainty": uncertainty}
    optimizer = PATSAdamW(params, lr=1e-3, **pats, seed=9, backend=backend)
    other = torch.optim.AdamW(others, lr=1e-3)
    attached = PATS(other, **pats, seed=9, backend=backend)
    for step in range(FEW):
        give_same_gradients(params, others, step)
        optimizer.step()
        other.step()
    for a, b in zip(params, others, strict=True):
        torch.testing.assert_close(a, b, rtol=FEW * 1e-6, atol=FEW * 1e-6)
        for key in ("exp_avg_sens", "sens_stats"):
            torch.testing.assert_close(optimizer.state[a][key], attached.state[b][key], rtol=1e-4, atol=1e-7)


def test_bfloat16_moments_do_not_stand_still(backend: str) -> None:
    """v with b_2 = 0.999 moves by less than half a spacing per step. Rounded stochastically it arrives all
    the same: after t steps with g = 1 it is 1 - b_2^t, here to 4 standard errors of the mean of 4096
    elements."""
    params = [nn.Parameter(torch.zeros(4096, dtype=torch.bfloat16))]
    optimizer = PATSAdamW(params, lr=0.0, backend=backend)
    steps = 20 if INTERPRETED else 300
    params[0].grad = torch.ones_like(params[0])
    for _ in range(steps):
        optimizer.step()
    v = optimizer.state[params[0]]["exp_avg_sq"].float()
    standard_error = float(v.std()) / 64
    assert standard_error > 0
    assert abs(float(v.mean()) - (1 - 0.999**steps)) < 4 * standard_error


def test_what_the_harness_checks_can_fail(backend: str) -> None:
    """The oracle detects a wrong moment, sensitivity, weight and step: each is changed by a few roundings."""
    case = AdamWCase([(64,)], steps=1)
    optimizer = optimizer_of(backend, case)
    (param,) = params_of(optimizer)
    for key in ("exp_avg", "exp_avg_sq", "exp_avg_sens", "exp_avg_unc", "sens_stats", "step", "w"):
        adamw_harness.give_gradients(optimizer, case, 1)
        optimizer.state.clear()
        (old,) = adamw_harness.values(optimizer)
        old = adamw_harness._with_state(old, case.hyper(0, 1), case.adamw_of(0))
        optimizer.step()
        wrong = param.data if key == "w" else optimizer.state[param][key]
        wrong.add_(wrong.abs().max() * 2.0**-20)
        (new,) = adamw_harness.values(optimizer)
        arguments = (case.hyper(0, 1), case.adamw_of(0), torch.float32, harness.TOLERANCES[backend], key)
        with pytest.raises(AssertionError):
            adamw_harness.check_step(old, new, *arguments)
    assert np.isfinite(old.pats.w).all()
