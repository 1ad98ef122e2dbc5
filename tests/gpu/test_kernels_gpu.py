"""The kernels on a GPU: each backend against the reference on the CPU, and against one another.

Collected only where there is a GPU (tests/conftest.py), or for a rehearsal (device.py). Here nothing is
interpreted: these tests prove the approximate instructions, the vector accesses and the real launches.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from device import BACKENDS, DEVICE, REHEARSAL, at_most, backends, needs_gpu, synchronize
from torch import Tensor

from pats_kernels import PATS, PATSAdamW, pats_step_, reference
from pats_kernels.backends import triton
from pats_kernels.hyperparameters import AdamWHyperparameters, Normalization, Sensitivity, defaults_of
from pats_kernels.philox import normals, random_words

NOISE_SCALE = 1e-2
# Tolerances of one step from the same state. S and U: five roundings (6e-8 each), not in torch's order.
# w: the contract's 2e-3 on z, and tanh.approx's 2^-11 on a gate of at most 1, times the largest |z|, 6.7.
RELATIVE = 5e-7
NOISE = NOISE_SCALE * (2e-3 + 6.7 * 2**-11)
ULP = {torch.float32: 2.0**-23, torch.float64: 2.0**-52, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}

SHAPES = [(), (1,), (3,), (5,), (1023,), (33, 65), (2, 3, 4, 5)]
SHAPES += [] if REHEARSAL else [(4096,), (4097,), (8, 4096), (100_003,)]
State = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor | None], list[Tensor]]


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    assert REHEARSAL or torch.cuda.is_available()
    yield
    synchronize()


def state(
    shapes: list[tuple[int, ...]], dtype: torch.dtype, state_dtype: torch.dtype, uncertainty: str = "product"
) -> State:
    """As it may be in the middle of a run: averages and statistics are there."""
    torch.manual_seed(0)
    params = [torch.randn(shape).to(dtype) for shape in shapes]
    grads = [torch.randn(shape).pow(3).to(dtype) for shape in shapes]
    sens = [torch.rand(shape).pow(4).to(state_dtype) for shape in shapes]
    unc: list[Tensor | None] = [torch.rand(shape).pow(4).to(state_dtype) for shape in shapes]
    unc = unc if uncertainty != "none" else [None] * len(shapes)
    stats = [torch.tensor([0.2, 0.2]) for _ in shapes]
    return params, grads, sens, unc, stats


def on_gpu(tensors: State) -> State:
    return tuple([t if t is None else t.to(DEVICE, copy=True) for t in column] for column in tensors)  # type: ignore[return-value]


def step(tensors: State, **keywords: Any) -> None:
    settings = {
        "step": 7,
        "tensor_ids": list(range(len(tensors[0]))),
        "noise_scale": NOISE_SCALE,
        "seed": 2**40 + 3,
    }
    function = pats_step_ if "backend" in keywords else reference.pats_step_
    function(*tensors, **settings | keywords)


def check(got: State, expected: State) -> None:
    """One step's results, each number within its derived tolerance."""
    for i in range(len(got[0])):
        w, S, stats = (column[i].cpu() for column in (got[0], got[2], got[4]))
        w_0, S_0, U_0, stats_0 = expected[0][i], expected[2][i], expected[3][i], expected[4][i]
        state_ulp = ULP[S.dtype] if S.dtype == torch.bfloat16 else RELATIVE
        torch.testing.assert_close(S, S_0, rtol=state_ulp, atol=1e-30, equal_nan=True)
        if U_0 is not None:
            # U averages abs(s - S). The roundings of s and S move that by up to 4 * 6e-8 of S_0 / 0.15, which
            # neither exceeds, and 1 - b_u = 0.05 of it enters U.
            U = got[3][i]
            assert U is not None
            off = (U.cpu().double() - U_0.double()).abs()
            assert (off <= state_ulp * U_0.double() + 1e-7 * S_0.double()).all()
        torch.testing.assert_close(stats, stats_0, rtol=1e-5, atol=0)
        # About once in 2^16 a bfloat16 average rounds to the other neighbour, which moves the gate by 5e-3.
        noise = NOISE + (6.7 * 5e-3 * NOISE_SCALE if S.dtype == torch.bfloat16 else 0)
        torch.testing.assert_close(w, w_0, rtol=ULP[w.dtype], atol=noise, equal_nan=True)


@backends
@pytest.mark.parametrize("normalization", ["delayed", "exact"])
@pytest.mark.parametrize("uncertainty", ["product", "ucb", "none"])
@pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_against_the_reference(
    dtype: torch.dtype, state_dtype: torch.dtype, uncertainty: str, normalization: str, backend: str
) -> None:
    expected = state(SHAPES, dtype, state_dtype, uncertainty)
    got = on_gpu(expected)
    step(got, uncertainty=uncertainty, normalization=normalization, backend=backend)
    step(expected, uncertainty=uncertainty, normalization=normalization)
    check(got, expected)


@backends
def test_strides(backend: str) -> None:
    """Misaligned, transposed, channels_last, with holes; gradients of other strides; all in one launch."""

    def views(source: Tensor) -> list[Tensor]:
        return [
            source[1:4097].view(64, 64),
            source[:4096].view(64, 64).t(),
            source[:4096].view(2, 4, 8, 64).to(memory_format=torch.channels_last),
            source[:8192].view(64, 128)[:, ::2],
        ]

    torch.manual_seed(0)
    params = views(torch.randn(10000))
    grads = [torch.randn(p.shape) for p in params]
    sens, unc = ([torch.rand(p.shape).pow(4) for p in params] for _ in range(2))
    expected: State = (
        [p.clone() for p in params],
        grads,
        sens,
        list(unc),
        [torch.full((2,), 0.2) for _ in params],
    )
    got = on_gpu((params, grads, sens, list(unc), expected[4]))
    for i, param in enumerate(params):  # `to` keeps only dense strides: make the view with holes anew
        got[0][i] = torch.empty_strided(param.shape, param.stride(), device=DEVICE).copy_(param)
    step(got, backend=backend)
    step(expected)
    check(got, expected)


@needs_gpu
@pytest.mark.skipif("triton" not in BACKENDS, reason="there is no Triton")
def test_the_approximate_form_is_the_portable_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """PTX's instructions against the lines that the interpreter proves on machines without a GPU."""
    results = []
    for approximate in (True, False):
        monkeypatch.setattr(triton, "_approximate", lambda launch, value=approximate: value)
        tensors = on_gpu(state([(1 << 20,)], torch.float32, torch.float32))
        step(tensors, backend="triton")
        results.append(tensors)
    approximate, portable = results
    for column in (2, 3, 4):
        torch.testing.assert_close(approximate[column], portable[column], rtol=0, atol=0)
    w, w_0 = approximate[0][0], portable[0][0]
    assert (w - w_0).abs().max() <= NOISE + 2**-21  # 2^-21: an ulp of |w| < 8


def open_gate(numel: int, dtype: torch.dtype = torch.float32) -> State:
    """w = 0, so that s = 0; all of S is in the last element: elsewhere the gate is exactly 1, and w is z."""
    zeros = torch.zeros(numel, dtype=dtype, device=DEVICE)
    S = zeros.clone()
    S[-1] = 1
    return [zeros.clone()], [zeros.clone()], [S], [S.clone()], [torch.tensor([1.0, 1.0], device=DEVICE)]


@backends
def test_normals(backend: str) -> None:
    """Every normal within the contract's 2e-3 of the exact one, over 2^24 elements."""
    numel = at_most(2000, 1 << 24)
    tensors = open_gate(numel)
    step(tensors, noise_scale=1.0, backend=backend)
    words = random_words(2**40 + 3, 7, 0, numel, device=DEVICE)
    error = (tensors[0][0].double() - normals(words).flatten())[:-1].abs().max().item()
    assert error <= 2e-3


@backends
def test_two_runs_give_the_same_bits(backend: str) -> None:
    results = []
    for _ in range(2):
        tensors = on_gpu(state([(at_most(601, 5_000_001),), (77,)], torch.bfloat16, torch.bfloat16))
        for t in range(1, 6):
            step(tensors, step=t, backend=backend)
        results.append(tensors)
    for column, other in zip(*results, strict=True):
        torch.testing.assert_close(column, other, rtol=0, atol=0)


@backends
def test_nonfinite_gradients(backend: str) -> None:
    expected = state([(at_most(2000, 50_000),)], torch.float32, torch.float32)
    for k, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        expected[1][0][k::1000] = value
    for normalization in ("delayed", "exact"):
        got, host = (
            on_gpu(expected),
            tuple([t.clone() for t in column if t is not None] for column in expected),
        )
        step(got, normalization=normalization, backend=backend)
        step(host, normalization=normalization)  # type: ignore[arg-type]
        check(got, host)  # type: ignore[arg-type]


@needs_gpu
@backends
def test_more_elements_than_32_bits_count(backend: str) -> None:
    """2^31 + 4099 elements: the last ones get their own noise, and the statistics are those of all."""
    numel = 2**31 + 4099
    tensors = open_gate(numel, torch.bfloat16)
    step(tensors, noise_scale=1.0, stochastic_rounding=False, backend=backend)
    first = numel - 5000
    z = reference.philox_normal(2**40 + 3, 7, 0, 4999, first - first % 4)
    got = tensors[0][0][first - first % 4 :][:4999].cpu().double()
    torch.testing.assert_close(got, z, rtol=2**-8, atol=2.1e-3)
    assert tensors[4][0][0].item() == pytest.approx(0.85 / numel, rel=2e-2)  # bfloat16 holds 0.85 to 2^-8


# Parameters, optimizer, and what keeps PATS's state.
Run = tuple[list[Tensor], torch.optim.Optimizer, PATS | PATSAdamW]
Make = Callable[[int, int, str], Run]


def parameters(count: int, size: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(size, device=DEVICE)) for _ in range(count)]


def attached(count: int, size: int, backend: str) -> Run:
    params = parameters(count, size)
    optimizer = torch.optim.AdamW(params, lr=0.0, weight_decay=0.0, fused=True)  # moves nothing
    return params, optimizer, PATS(optimizer, noise_scale=NOISE_SCALE, backend=backend)


def one_pass(count: int, size: int, backend: str, sensitivity: Sensitivity = "ema", **keywords: Any) -> Run:
    params = parameters(count, size)
    settings = {"lr": 0.0, "weight_decay": 0.0, "noise_scale": NOISE_SCALE, "sensitivity": sensitivity}
    settings["backend"] = backend
    optimizer = PATSAdamW(params, **settings | keywords)
    return params, optimizer, optimizer


def moments(count: int, size: int, backend: str) -> Run:
    return one_pass(count, size, backend, "moments")


MAKERS = pytest.mark.parametrize("make", [attached, one_pass, moments])


@MAKERS
@needs_gpu
@backends
def test_4000_tiny_tensors_without_sync_or_allocation(make: Make, backend: str) -> None:
    """After the first step: no synchronization, no new memory of the allocator's, though gradients move."""
    params, optimizer, pats = make(4000, 7, backend)
    for t in range(4):
        for param in params:
            param.grad = torch.randn_like(param)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.set_sync_debug_mode("error" if t > 0 else "default")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if t > 0:
            assert torch.cuda.memory_allocated() == before
    assert all(pats.state[param]["step"].item() == 4 for param in params)


@MAKERS
@needs_gpu
@backends
def test_streams(make: Make, backend: str) -> None:
    """Steps on two streams, each waiting for the other, give the bits of steps on one."""
    results = []
    for streams in ([torch.cuda.current_stream()] * 2, [torch.cuda.Stream(), torch.cuda.Stream()]):
        params, optimizer, _ = make(20, 100_000, backend)
        torch.cuda.synchronize()
        for t in range(6):
            stream = streams[t % 2]
            stream.wait_stream(streams[(t + 1) % 2])
            with torch.cuda.stream(stream):
                generator = torch.Generator(DEVICE).manual_seed(t)
                for param in params:
                    param.grad = torch.randn(param.shape, device=DEVICE, generator=generator)
                optimizer.step()
            torch.cuda.synchronize()
        results.append([param.detach().clone() for param in params])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@MAKERS
@backends
def test_grad_scaler(make: Make, backend: str) -> None:
    """found_inf leaves every bit as it was, step included; grad_scale divides once."""
    runs = [make(3, at_most(500, 5000), backend) for _ in range(2)]
    for (params, optimizer, pats), scale in zip(runs, (1024.0, 1.0), strict=True):
        generator = torch.Generator(DEVICE).manual_seed(1)
        for _ in range(3):
            for param in params:
                param.grad = scale * torch.randn(param.shape, device=DEVICE, generator=generator)
            optimizer.grad_scale = torch.tensor(scale, device=DEVICE)  # type: ignore[attr-defined]
            optimizer.found_inf = torch.tensor(0.0, device=DEVICE)  # type: ignore[attr-defined]
            optimizer.step()
        before = [t.clone() for p in params for t in (p.detach(), *pats.state[p].values())]
        optimizer.found_inf = torch.tensor(1.0, device=DEVICE)  # type: ignore[attr-defined]
        optimizer.step()
        after = [t for p in params for t in (p.detach(), *pats.state[p].values())]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    for a, b in zip(runs[0][0], runs[1][0], strict=True):
        assert torch.equal(a, b)


# PATSAdamW

LONG = at_most(5, 300)  # steps
LR = 1e-2
SIZE = at_most(500, 10_000)
ADAMW_KEYS = ("exp_avg_sens", "exp_avg_unc", "sens_stats", "exp_avg", "exp_avg_sq")


@backends
@pytest.mark.parametrize("normalization", ["delayed", "exact"])
@pytest.mark.parametrize("uncertainty", ["product", "ucb", "none"])
@pytest.mark.parametrize("sensitivity", ["ema", "moments"])
@pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_adamw_against_the_reference(
    dtype: torch.dtype,
    state_dtype: torch.dtype,
    sensitivity: Sensitivity,
    uncertainty: Any,
    normalization: Normalization,
    backend: str,
) -> None:
    """One step from the same state, as it may be in the middle of a run."""
    params, grads, sens, unc, stats = state(SHAPES, dtype, state_dtype, uncertainty)
    m = [(0.3 * torch.randn(shape)).to(state_dtype) for shape in SHAPES]
    v = [(0.002 + 0.02 * torch.rand(shape)).to(state_dtype) for shape in SHAPES]
    ema = sensitivity == "ema"
    absent: list[Tensor | None] = [None] * len(SHAPES)
    columns = (sens if ema else absent, unc if ema else absent, stats, m, v)

    on_device = [torch.nn.Parameter(param.to(DEVICE, copy=True)) for param in params]
    optimizer = PATSAdamW(
        on_device,
        lr=LR,
        noise_scale=NOISE_SCALE,
        sensitivity=sensitivity,
        uncertainty=uncertainty,
        normalization=normalization,
        backend=backend,
    )
    entries = {}
    for i, row in enumerate(zip(*columns, strict=True)):
        kept = {key: x for key, x in zip(ADAMW_KEYS, row, strict=True) if x is not None}
        entries[i] = {"step": torch.tensor(6.0)} | kept
    optimizer.load_state_dict({**optimizer.state_dict(), "state": entries})
    for param, grad in zip(on_device, grads, strict=True):
        param.grad = grad.to(DEVICE)
    optimizer.step()

    for i, param in enumerate(on_device):
        S, U, means, m_i, v_i = columns[0][i], columns[1][i], stats[i], m[i], v[i]
        before, m_before = params[i].clone(), m_i.double()
        names = defaults_of(AdamWHyperparameters).keys() - {"sensitivity", "state_dtype"}
        settings = {name: optimizer.defaults[name] for name in names} | {"step": 7, "tensor_id": i}
        reference.pats_adamw_update_(params[i], grads[i], m_i, v_i, S, U, means, **settings)
        got = {key: optimizer.state[param].get(key) for key in ADAMW_KEYS}
        stored = ULP[state_dtype] if state_dtype == torch.bfloat16 else RELATIVE
        roundings = 3e-7 * (m_before.abs() + grads[i].double().abs())
        assert_within(got["exp_avg"], m_i, stored, roundings)
        assert_within(got["exp_avg_sq"], v_i, stored, 0)
        if S is not None:
            assert_within(got["exp_avg_sens"], S, stored, 1e-30)
        if U is not None and S is not None:
            assert_within(got["exp_avg_unc"], U, stored, 1e-7 * S.double())
        assert_within(got["sens_stats"], means, 1e-5, 0)
        # As in `check`. AdamW's change is also off by approximate roots and reciprocals, 2^-22 each.
        noise = NOISE + (6.7 * 5e-3 * NOISE_SCALE if state_dtype == torch.bfloat16 else 0)
        change = (params[i].double() - before.double()).abs()
        assert_within(param, params[i], ULP[dtype], noise + 1e-5 * change)


def assert_within(got: Tensor | None, expected: Tensor, rtol: float, atol: Tensor | float) -> None:
    assert got is not None
    off = (got.detach().cpu().double() - expected.double()).abs()
    assert (off <= rtol * expected.double().abs() + atol).all()


def steps_with_gradients(run: Run, count: int) -> list[Tensor]:
    """The parameters after as many steps, each with gradients of its own."""
    params, optimizer, _ = run
    generator = torch.Generator(DEVICE).manual_seed(1)
    for _ in range(count):
        for param in params:
            param.grad = torch.randn(param.shape, device=DEVICE, generator=generator)
        optimizer.step()
    return params


@backends
def test_one_pass_is_two(backend: str) -> None:
    """PATSAdamW is PATS attached to AdamW: the noise is the same, its approximations in both."""
    params = parameters(3, SIZE)
    optimizer = torch.optim.AdamW(params, lr=LR, fused=True)
    two = params, optimizer, PATS(optimizer, noise_scale=NOISE_SCALE, backend=backend)
    one = one_pass(3, SIZE, backend, lr=LR, weight_decay=1e-2)
    for a, b in zip(steps_with_gradients(one, 4), steps_with_gradients(two, 4), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-5)


@backends
def test_adamw_without_noise_is_torchs(backend: str) -> None:
    params = parameters(3, SIZE)
    torchs = params, torch.optim.AdamW(params, lr=LR, fused=True), PATS(torch.optim.SGD(params))
    ours = one_pass(3, SIZE, backend, lr=LR, weight_decay=1e-2, noise_scale=0.0)
    for a, b in zip(steps_with_gradients(ours, 4), steps_with_gradients(torchs, 4), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@needs_gpu
@backends
def test_a_learning_rate_on_the_gpu(backend: str) -> None:
    """Is read there, and gives what the number gives, to the roundings of lr and of 1 - lr weight_decay."""
    runs = [
        one_pass(3, SIZE, backend, lr=lr, weight_decay=1e-2) for lr in (LR, torch.tensor(LR, device=DEVICE))
    ]
    for a, b in zip(*(steps_with_gradients(run, 4) for run in runs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@needs_gpu
@pytest.mark.skipif(len(BACKENDS) < 2, reason="there is but one backend")
@pytest.mark.parametrize("normalization", ["delayed", "exact"])
def test_backends_against_one_another(normalization: Normalization) -> None:
    """A long run. The step feeds back: near zero a weight's last bits decide its gate. The reference beside
    itself, with 2e-3 of noise_scale more or less in each step, ends 2e-4 away in the middle of all elements
    and 0.016 or more in one of a thousand. Other noise would be sqrt(LONG) noise_scale = 0.17 away."""
    runs = []
    for backend in BACKENDS:
        tensors = on_gpu(state(SHAPES, torch.float32, torch.float32))
        for t in range(1, LONG + 1):
            step(tensors, step=t, normalization=normalization, backend=backend)
        runs.append(torch.cat([w.flatten() for w in tensors[0]]))
    off = (runs[0] - runs[1]).abs()
    assert off.median() <= LONG**0.5 * NOISE
    assert (off <= LONG * NOISE).float().mean() >= 0.99


@backends
@pytest.mark.parametrize("normalization", ["delayed", "exact"])
def test_long_runs(normalization: Normalization, backend: str) -> None:
    """Each step's draws are its own. g is 0 and the gate open, so that w is the sum of all steps' normals,
    off by as many times the contract's 2e-3, and a rounding each of a |w| < 2."""
    numel = 400
    tensors = open_gate(numel)
    total = torch.zeros(numel, dtype=torch.float64)
    for t in range(1, LONG + 1):
        for average in (*tensors[2], *tensors[3]):
            assert average is not None
            average[-1] = 1  # else the means would decay to 0, which closes the gate
        step(tensors, step=t, noise_scale=NOISE_SCALE, normalization=normalization, backend=backend)
        total += NOISE_SCALE * reference.philox_normal(2**40 + 3, t, 0, numel)
    off = (tensors[0][0].cpu().double() - total)[:-1].abs().max().item()
    assert off <= LONG * (NOISE_SCALE * 2e-3 + 2**-24)


@needs_gpu
@pytest.mark.skipif(len(BACKENDS) < 2, reason="there is but one backend")
@pytest.mark.parametrize("normalization", ["delayed", "exact"])
@pytest.mark.parametrize("uncertainty", ["product", "ucb", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_backends_agree(dtype: torch.dtype, uncertainty: Any, normalization: Normalization) -> None:
    """The same random words and formula: S and U to the bit, w to twice what the contract allows of
    the noise; what is rounded stochastically, by the same bits, comes to a neighbour at most."""
    state_dtype = torch.float32 if dtype == torch.float16 else dtype
    found = []
    for backend in BACKENDS:
        tensors = on_gpu(state(SHAPES, dtype, state_dtype, uncertainty))
        step(tensors, uncertainty=uncertainty, normalization=normalization, backend=backend)
        found.append(tensors)
    for other in found[1:]:
        for column, (ours, theirs) in enumerate(zip(found[0], other, strict=True)):
            for a, b in zip(ours, theirs, strict=True):
                if a is not None and b is not None:
                    rtol = max(RELATIVE, ULP[a.dtype]) if column == 0 else 0 if column < 4 else 1e-5
                    noise = 2 * NOISE + (6.7 * 5e-3 * NOISE_SCALE if a.dtype == torch.bfloat16 else 0)
                    atol = noise if column == 0 else 0
                    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
