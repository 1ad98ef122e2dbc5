"""Each number of each backend's steps against the oracle, over shapes, strides, dtypes and variants."""

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BACKENDS, INTERPRETED
from harness import (
    LAYOUTS,
    TOLERANCES,
    Case,
    Work,
    assert_same_bits,
    decided,
    gradients,
    prepare,
    run,
    run_checked,
    same_bits,
    step,
    values,
)
from hypothesis import given
from hypothesis import strategies as st

from pats_kernels import pats_step_
from pats_kernels.hyperparameters import Hyperparameters, hyperparameters
from pats_kernels.plan import Batch
from pats_kernels.step import Launcher

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
STATES = {  # dtypes of the averages for each parameter dtype
    torch.float32: [torch.float32, torch.bfloat16],
    torch.bfloat16: [torch.bfloat16, torch.float32],
    torch.float16: [torch.float32, torch.bfloat16],
    torch.float64: [torch.float64, torch.float32, torch.bfloat16],
}
STORAGES = [(dtype, state) for dtype, states in STATES.items() for state in states]
VARIANTS = list(product(["delayed", "exact"], ["product", "ucb", "none"]))

# Around every boundary that a kernel may have: a group of four, a vector, a chunk, and their tails.
SIZES = [1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 1023, 1024, 1025, 4095, 4096, 4097]
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "0-d": [()],
    "one element": [(1,)],
    "5000": [(5000,)],
    "3-d": [(3, 5, 7)],
    "ones": [(1, 9, 1, 4, 1)],
    "every size": [(size,) for size in SIZES],
    "mixed": [(2048,), (), (1,), (33, 65), (3,), (0,), (4096,), (2, 3, 4, 5), (1, 1)],
    "many": [(1 + i % 13,) for i in range(25 if INTERPRETED else 100)],
}


def id_of(value: Any) -> str:
    return str(value).removeprefix("torch.")


@pytest.mark.parametrize("normalization", ["delayed", "exact"])
@pytest.mark.parametrize("shapes", SHAPES)
def test_shapes(backend: str, shapes: str, normalization: str) -> None:
    run_checked(backend, Case(SHAPES[shapes], normalization=normalization))


@pytest.mark.parametrize(("normalization", "uncertainty"), VARIANTS)
@pytest.mark.parametrize(("dtype", "state_dtype"), STORAGES, ids=id_of)
def test_variants(
    backend: str, dtype: torch.dtype, state_dtype: torch.dtype, normalization: str, uncertainty: str
) -> None:
    case = Case(
        [(1500,)] if INTERPRETED else [(1500,), (9, 31), ()],
        dtype=dtype,
        state_dtype=state_dtype,
        normalization=normalization,
        uncertainty=uncertainty,
    )
    run_checked(backend, case)


@pytest.mark.parametrize(("dtype", "state_dtype"), [s for s in STORAGES if torch.bfloat16 in s], ids=id_of)
@pytest.mark.parametrize("normalization", ["delayed", "exact"])
def test_round_to_nearest(
    backend: str, dtype: torch.dtype, state_dtype: torch.dtype, normalization: str
) -> None:
    case = Case(
        [(1025,), (5, 6)],
        dtype=dtype,
        state_dtype=state_dtype,
        normalization=normalization,
        stochastic_rounding=False,
    )
    run_checked(backend, case)


LAYOUT_SHAPES: list[tuple[int, ...]] = [(64, 33), (4, 6, 5, 8), (129,), (3, 1, 4), ()]
LAYOUT_SHAPES = LAYOUT_SHAPES[: 2 if INTERPRETED else None]


@pytest.mark.parametrize("dtype", DTYPES[:2] if INTERPRETED else DTYPES, ids=id_of)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend: str, layout: str, dtype: torch.dtype) -> None:
    """Parameter and gradient in the same memory format. The noise follows the logical row-major order."""
    run_checked(backend, Case(LAYOUT_SHAPES, param=layout, grad=layout, dtype=dtype))


OTHER_LAYOUTS = [
    (param, grad, state)
    for param, grad, state in product(LAYOUTS, repeat=3)
    if len({param, grad, state}) == 3 or (param == state == "contiguous") or (param == grad == "contiguous")
]


@pytest.mark.parametrize("normalization", ["delayed", "exact"])
@pytest.mark.parametrize(("param", "grad", "state"), OTHER_LAYOUTS[:: 13 if INTERPRETED else 2])
def test_mixed_layouts(backend: str, param: str, grad: str, state: str, normalization: str) -> None:
    """Gradients and averages whose strides differ from their parameters'."""
    case = Case([(12, 21), (2, 3, 4, 5)], param, grad, state, normalization=normalization)
    run_checked(backend, case)


def test_mixed_layouts_in_one_launch(backend: str) -> None:
    """Contiguous, misaligned and strided tensors of one dtype share a launch."""
    works = [prepare(Case([(48, 20)], param=layout)) for layout in LAYOUTS]
    work = Work(
        params=[w.params[0] for w in works],
        grads=[],
        sens=[w.sens[0] for w in works],
        unc=[w.unc[0] for w in works],
        stats=[w.stats[0] for w in works],
    )
    separate = [
        run(backend, Case([(48, 20)], param=layout, tensor_ids=[i])) for i, layout in enumerate(LAYOUTS)
    ]
    case = Case([(48, 20)] * len(works))
    for number in range(1, 1 + case.steps):
        work.grads = gradients(Case([(48, 20)]), number) * len(works)
        step(backend, case, work, number)
    # A path of its own for each tensor: the same bits as in a launch of its own.
    for i, other in enumerate(separate):
        assert_same_bits([work.params[i], work.stats[i]], [other.params[0], other.stats[0]])


def test_mixed_dtypes_in_one_call(backend: str) -> None:
    """Each combination of dtypes is its own launch. Together they give the same as apart."""
    apart = [
        run(backend, Case([(700,), (3,)], dtype=dtype, state_dtype=state, tensor_ids=[2 * i, 2 * i + 1]))
        for i, (dtype, state) in enumerate(STORAGES)
    ]
    cases = [Case([(700,), (3,)], dtype=dtype, state_dtype=state) for dtype, state in STORAGES]
    works = [prepare(case) for case in cases]
    together = Work(*([t for work in works for t in getattr(work, name)] for name in Work.__annotations__))
    case = Case([(700,), (3,)] * len(works))
    for number in range(1, 1 + case.steps):
        together.grads = [g for c in cases for g in gradients(c, number)]
        step(backend, case, together, number)
    assert_same_bits(together.params, [p for work in apart for p in work.params])
    assert_same_bits(together.sens, [s for work in apart for s in work.sens])
    assert_same_bits(together.stats, [s for work in apart for s in work.stats])


def test_hyperparameters_of_each_tensor(backend: str) -> None:
    case = Case(
        [(1000,), (33, 3), (1025,), (5,)],
        noise_scale=[1e-3, 0.5, 1e-7, 0.02],
        gamma=[1.0, 0.0, 4.0, 0.3],
        sens_betas=[(0.85, 0.95), (0.5, 0.99), (0.999, 0.1), (0.1, 0.0)],
        seed=[0, 2**64 - 1, 2**32, 7],
        tensor_ids=[5, 2**32 - 1, 0, 2**31],
    )
    run_checked(backend, case)


def test_variants_of_each_tensor(backend: str) -> None:
    """Strings too may be given per tensor, with the same numbers as one call for each."""
    normalizations, uncertainties = (list(column) for column in zip(*VARIANTS, strict=True))
    case = Case([(40,)] * len(VARIANTS), normalization=normalizations, uncertainty=uncertainties)
    work = prepare(case)
    work.params[1:] = [work.params[0].clone() for _ in VARIANTS[1:]]
    work.unc = [None if u == "none" else unc for unc, u in zip(work.unc, uncertainties, strict=True)]
    for number in range(1, 1 + case.steps):
        work.grads = gradients(Case([(40,)]), number) * len(VARIANTS)
        step(backend, case, work, number)
    for i, (normalization, uncertainty) in enumerate(VARIANTS):
        own = Case([(40,)], normalization=normalization, uncertainty=uncertainty, tensor_ids=[i])
        alone = run(backend, own)
        assert_same_bits([work.params[i], work.sens[i]], [alone.params[0], alone.sens[0]])


@pytest.mark.parametrize("first_step", [2**24 + 1, 2**31 - 1, 2**32 - 3])
def test_late_steps(backend: str, first_step: int) -> None:
    """The step's word of the counter is unsigned, and not a float32."""
    run_checked(backend, Case([(100,)], first_step=first_step))


@pytest.mark.parametrize(("normalization", "uncertainty"), VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES[:2] if INTERPRETED else DTYPES, ids=id_of)
def test_nonfinite_gradients(backend: str, dtype: torch.dtype, normalization: str, uncertainty: str) -> None:
    """Their elements keep every bit of w, S and U. The others are right, and so are the means."""
    case = Case(
        [(1500,)],
        dtype=dtype,
        normalization=normalization,
        uncertainty=uncertainty,
        poison=(np.nan, np.inf, -np.inf),
    )
    work = run_checked(backend, case)
    assert all(t.isfinite().all() for t in work.written())


def test_nonfinite_gradients_everywhere(backend: str) -> None:
    """Only the reduced means can move, and they are of the same S."""
    case = Case([(1030,), ()], normalization="exact")
    work = run(backend, case)
    before = [t.clone() for t in work.written()]
    work.grads = [torch.full_like(p, torch.nan) for p in work.params]
    step(backend, case, work, 4)
    assert_same_bits(work.written(), before)


def test_a_sensitivity_that_overflows_never_enters(backend: str) -> None:
    """w and g are finite, |w g| is not. An infinity must never get into S."""
    case = Case([(64,)])
    work = run(backend, case)
    work.params[0][::5] = 1e30
    before = [t.clone() for t in work.written()]
    work.grads = [torch.full((64,), 1e30)]
    work.grads[0][1::5] = 1.0
    step(backend, case, work, 4)
    for new, old in zip(work.written()[:3], before, strict=False):
        assert new.isfinite().all()
        assert same_bits(new[::5].clone(), old[::5].clone())
    assert work.stats[0].isfinite().all()
    assert (work.sens[0] != before[1])[1::5].all()


@pytest.mark.parametrize("uncertainty", ["product", "ucb", "none"])
@pytest.mark.parametrize("normalization", ["delayed", "exact"])
@pytest.mark.parametrize("power", [-60, 40] if INTERPRETED else [-60, -16, 16, 40])
def test_loss_scale_changes_nothing(backend: str, normalization: str, uncertainty: str, power: int) -> None:
    """Every factor of q is a ratio within one tensor, so a power of two cancels to the last bit.

    At 2^-60 the product S * U is subnormal: a kernel that forms it before normalizing fails here.
    """
    case = Case([(1200,)], normalization=normalization, uncertainty=uncertainty)
    plain, scaled = prepare(case), prepare(case)
    for number in range(1, 4):
        # Gradients of similar size, so that none of them leaves float32's range.
        grads = [g.sign() * (0.5 + g.abs().clamp(max=4)) for g in gradients(case, number)]
        for work, scale in ((plain, 1.0), (scaled, 2.0**power)):
            work.grads = [g * scale for g in grads]
            step(backend, case, work, number)
    assert not same_bits(plain.params[0], prepare(case).params[0])
    assert_same_bits(plain.params, scaled.params)
    assert_same_bits([s * 2.0**power for s in plain.sens], scaled.sens)


def test_bfloat16_is_held_to_the_bit(backend: str) -> None:
    """The harness's criterion allows only one bfloat16 for at least nine in ten weights, so it checks bits.

    An element is undecided if a threshold lies in its error bound, which is 2 * 3e-3 noise_scale = 6e-6 wide.
    Thresholds are 2^-12 = 2.4e-4 apart at |w| = 0.05, so that is one in forty, and more for smaller weights.
    """
    case = Case([(5000,)], dtype=torch.bfloat16, normalization="exact")
    work = prepare(case)
    work.grads = gradients(case, 1)
    (old,) = values(work)
    step(backend, case, work, 1)
    (new,) = values(work)
    assert decided(old, new, case.hyper(0, 1), TOLERANCES[backend]) > 0.9
    assert np.mean(old.w != new.w) > 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=id_of)
def test_offsets_beyond_31_bits(backend: str, dtype: torch.dtype) -> None:
    """Strides are 64-bit: three elements, 2^31 apart in reserved memory that is never touched."""
    whole = torch.empty(2**32 + 1, dtype=dtype)
    param = whole[:: 2**31]
    param.copy_(torch.tensor([1.0, -2.0, 3.0]))
    case = Case([(3,)], dtype=dtype, normalization="exact", noise_scale=0.5)
    near = prepare(case)
    near.params = [param.clone()]
    far = replace(prepare(case), params=[param])
    for work in (near, far):
        work.grads = gradients(case, 1)
        step(backend, case, work, 1)
    assert same_bits(near.params[0], far.params[0].contiguous())
    assert not torch.equal(near.params[0], torch.tensor([1.0, -2.0, 3.0], dtype=dtype))


# Determinism.


@pytest.mark.parametrize(("normalization", "uncertainty"), VARIANTS[:: 5 if INTERPRETED else 1])
def test_two_runs_give_the_same_bits(backend: str, normalization: str, uncertainty: str) -> None:
    case = Case(
        [(1100 if INTERPRETED else 5000,), (17, 31), ()],
        param="holes",
        normalization=normalization,
        uncertainty=uncertainty,
        dtype=torch.bfloat16,
    )
    first, second = run(backend, case), run(backend, case)
    assert_same_bits(first.written(), second.written())


@pytest.mark.parametrize("threaded", [name for name in BACKENDS if name != "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=id_of)
@pytest.mark.parametrize("normalization", ["delayed", "exact"])
def test_threads_give_the_same_bits(
    threaded: str, normalization: str, dtype: torch.dtype, threads: None
) -> None:
    """Chunks and the order of sums are fixed. eager's sums are float64, and equal once rounded to float32."""
    case = Case([(3_000_017,), (999,)], dtype=dtype, normalization=normalization, steps=2)
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(run(threaded, case))
    one, two = results
    assert_same_bits(one.sens, two.sens)
    assert_same_bits([u for u in one.unc if u is not None], [u for u in two.unc if u is not None])
    assert_same_bits(one.stats, two.stats)
    assert_same_bits(one.params, two.params)


def test_big_tensor(backend: str) -> None:
    """Many chunks, an incomplete last one, and more than one thread's work."""
    run_checked(backend, Case([(20_011 if INTERPRETED else 300_007,), (5,)], steps=2))


# What only an optimizer asks of a backend: counters, counts and a GradScaler's tensors.


def batch_of(case: Case, work: Work, counters: list[torch.Tensor], counts: list[torch.Tensor]) -> Batch:
    names = {name: getattr(case, name) for name in Hyperparameters.__slots__ if hasattr(case, name)}
    names.pop("state_dtype")
    defaults = {
        name: Hyperparameters.__dataclass_fields__[name].default for name in Hyperparameters.__slots__
    }
    h = hyperparameters(names, defaults)
    return Batch(
        name=str,
        params=work.params,
        grads=work.grads,
        exp_avg_sens=work.sens,
        exp_avg_unc=work.unc,
        sens_stats=work.stats,
        steps=counters,
        nonfinite=counts,
        tensor_ids=case.ids(),
        hyperparameters=[h] * len(work.params),
    )


def launched(
    backend: str, case: Case, scale: float | None, infinite: float | None
) -> tuple[Work, list[torch.Tensor], list[torch.Tensor]]:
    """Steps with counters that begin at 0, and with gradients times `scale`."""
    work, launcher = prepare(case), Launcher()
    counters = [torch.zeros(()) for _ in work.params]
    counts = [torch.zeros((), dtype=torch.int64) for _ in work.params]
    for number in range(1, 1 + case.steps):
        work.grads = [g * (scale or 1) for g in gradients(case, number)]
        grads = [g.clone() for g in work.grads]
        grad_scale = None if scale is None else torch.tensor(scale)
        found_inf = None if infinite is None else torch.tensor([infinite])
        launcher.launch(batch_of(case, work, counters, counts), backend, grad_scale, found_inf)
        assert_same_bits(work.grads, grads)
    return work, counters, counts


SCALER_CASES = {
    "float32": Case([(1100,), (4, 5)]),
    "exact": Case([(1100,), (4, 5)], normalization="exact"),
    "bfloat16": Case([(1100,), (4, 5)], dtype=torch.bfloat16),
    "float16": Case([(1100,), (4, 5)], dtype=torch.float16),
    "strided": Case([(60, 7), (4, 5)], param="holes", grad="transposed"),
    "poisoned": Case([(1100,), (4, 5)], poison=(np.nan, np.inf)),
}


@pytest.mark.parametrize("name", SCALER_CASES)
def test_counters(backend: str, name: str) -> None:
    """A counter of the steps works like t and is advanced. Non-finite elements are counted."""
    case = SCALER_CASES[name]
    work, counters, counts = launched(backend, case, None, None)
    assert_same_bits(work.written(), run(backend, case).written())
    assert [float(count) for count in counters] == [case.steps] * 2
    bad = [case.steps * int((~g.isfinite()).sum()) for g in gradients(case, 1)]
    assert [int(count) for count in counts] == bad
    assert (sum(bad) > 0) == bool(case.poison)


@pytest.mark.parametrize("infinite", [None, 0.0])
@pytest.mark.parametrize("name", SCALER_CASES)
def test_grad_scale(backend: str, name: str, infinite: float | None) -> None:
    """Gradients times a power of two, divided by it again, give the same bits. (float16's range ends at
    2^16.)"""
    case = SCALER_CASES[name]
    scale = 2.0**3 if case.dtype == torch.float16 else 2.0**12
    plain, _, plain_counts = launched(backend, case, None, None)
    scaled, counters, counts = launched(backend, case, scale, infinite)
    assert_same_bits(plain.written(), scaled.written())
    assert_same_bits(plain_counts, counts)
    assert [float(count) for count in counters] == [case.steps] * 2


@pytest.mark.parametrize("scale", [None, 2.0**3])
@pytest.mark.parametrize("name", SCALER_CASES)
def test_found_inf_changes_nothing(backend: str, name: str, scale: float | None) -> None:
    """No weight, average, mean, counter or count changes: some steps are taken, then one is skipped."""
    case, launcher = SCALER_CASES[name], Launcher()
    work, counters, counts = launched(backend, case, scale, 0.0)
    before = [t.clone() for t in [*work.written(), *counters, *counts]]
    grad_scale = None if scale is None else torch.tensor(scale)
    batch = batch_of(case, work, counters, counts)
    launcher.launch(batch, backend, grad_scale, torch.tensor([1.0]))
    assert_same_bits([*work.written(), *counters, *counts], before)


# Random combinations.


@st.composite
def cases(draw: st.DrawFn) -> Case:
    dtype, state_dtype = draw(st.sampled_from(STORAGES))
    side = st.integers(0, 20 if INTERPRETED else 40)
    shape = st.lists(side, max_size=3).map(lambda s: tuple(s[:2] + [min(n, 6) for n in s[2:]]))
    shapes = draw(st.lists(shape, min_size=1, max_size=4))
    word = st.integers(0, 2**32 - 1)
    beta = st.floats(0.01, 0.999)

    def each(strategy: st.SearchStrategy[Any]) -> list[Any]:
        return draw(st.lists(strategy, min_size=len(shapes), max_size=len(shapes)))

    return Case(
        shapes,
        draw(st.sampled_from(sorted(LAYOUTS))),
        draw(st.sampled_from(sorted(LAYOUTS))),
        draw(st.sampled_from([None, *sorted(LAYOUTS)])),
        dtype,
        state_dtype,
        noise_scale=each(st.floats(1e-6, 1.0)),
        gamma=each(st.floats(0, 5)),
        sens_betas=each(st.tuples(beta, beta)),
        uncertainty=draw(st.sampled_from(["product", "ucb", "none"])),
        normalization=draw(st.sampled_from(["delayed", "exact"])),
        stochastic_rounding=draw(st.booleans()),
        seed=each(st.integers(0, 2**64 - 1)),
        tensor_ids=each(word),
        first_step=draw(st.integers(1, 2**32 - 4)),
        steps=2,
        poison=tuple(draw(st.lists(st.sampled_from([np.nan, np.inf, -np.inf]), max_size=2))),
    )


@given(case=cases())
def test_anything(backend: str, case: Case) -> None:
    run_checked(backend, case)


def test_auto_is_one_of_them() -> None:
    """On a CPU "auto" is cpp if built, else eager, and never the interpreter."""
    case = Case([(100,), (3, 4)])
    assert_same_bits(run("auto", case).written(), run(expected_auto(), case).written())


def expected_auto() -> str:
    from pats_kernels import available_backends

    reasons = available_backends("cpu")
    assert reasons["eager"] is None
    return "cpp" if reasons["cpp"] is None else "eager"


def test_functional_form_has_no_hidden_state(backend: str) -> None:
    """The same call on copies gives the same bits, whatever was stepped in between."""
    case = Case([(64,), (7,)], normalization="exact")
    works = [prepare(case) for _ in range(2)]
    for work in works:
        work.grads = gradients(case, 1)
        step(backend, case, work, 1)
        run(backend, Case([(64,), (9,)]))
    assert_same_bits(works[0].written(), works[1].written())


def test_no_tensors(backend: str) -> None:
    pats_step_([], [], [], [], [], step=1, tensor_ids=[], backend=backend)
