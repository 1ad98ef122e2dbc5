"""The tables: merged dimensions, complete chunks, alignment; kept only as long as they are valid."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from itertools import chain, pairwise, product

import numpy as np
import pytest
import torch
from harness import LAYOUTS, Case, Work, assert_same_bits, gradients, prepare, run, run_checked, step
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pats_kernels.hyperparameters import Hyperparameters
from pats_kernels.plan import BLOCK, Batch, Column, Own, Planner, chunk_table, collapse

pytestmark = pytest.mark.usefixtures("quick_gc")

# collapse()

COLLAPSED = [
    # shape, strides of each operand, (size, strides...) of the dimensions left
    ((), [(), ()], []),
    ((7,), [(1,), (1,)], []),
    ((1,), [(5,), (9,)], []),
    ((2, 3, 4), [(12, 4, 1), (12, 4, 1)], []),
    ((2, 1, 4), [(4, 99, 1), (4, 4, 1)], []),
    ((7,), [(1,), (2,)], [(7, 1, 2)]),
    ((7,), [(2,), (2,)], [(7, 2, 2)]),
    ((2, 3), [(3, 1), (1, 2)], [(2, 3, 1), (3, 1, 2)]),
    ((2, 3), [(6, 2), (6, 2)], [(6, 2, 2)]),
    ((2, 3, 4), [(12, 4, 1), (24, 8, 2)], [(24, 1, 2)]),
    ((2, 3, 4), [(12, 4, 1), (16, 4, 1)], [(2, 12, 16), (12, 1, 1)]),
    ((2, 3, 4), [(20, 4, 1), (20, 4, 1)], [(2, 20, 20), (12, 1, 1)]),
]


@pytest.mark.parametrize(("shape", "strides", "expected"), COLLAPSED)
def test_collapse(
    shape: tuple[int, ...], strides: list[tuple[int, ...]], expected: list[tuple[int, ...]]
) -> None:
    assert collapse(shape, strides) == expected


def walk(dimensions: list[tuple[int, ...]], numel: int, operand: int) -> list[int]:
    """Each element's offset, computed from its row-major index as in a kernel."""
    if not dimensions:
        return list(range(numel))
    sizes = [dimension[0] for dimension in dimensions]
    places = product(*(range(size) for size in sizes))
    return [sum(i * d[1 + operand] for i, d in zip(place, dimensions, strict=True)) for place in places]


shapes = st.lists(st.integers(1, 4), max_size=4).map(tuple)


@given(shape=shapes, layouts=st.lists(st.sampled_from(sorted(LAYOUTS)), min_size=1, max_size=4))
def test_collapse_walks_every_element_in_order(shape: tuple[int, ...], layouts: list[str]) -> None:
    strides = [LAYOUTS[layout](shape, torch.float32).stride() for layout in layouts]
    dimensions = collapse(shape, strides)
    places = list(product(*(range(size) for size in shape)))
    for operand, stride in enumerate(strides):
        expected = [sum(i * s for i, s in zip(place, stride, strict=True)) for place in places]
        assert walk(dimensions, len(places), operand) == expected
    for outer, inner in pairwise(dimensions):
        assert any(o != inner[0] * i for o, i in zip(outer[1:], inner[1:], strict=True)), "could be merged"


# chunk_table()


@given(numels=st.lists(st.integers(1, 5000), max_size=20), chunk=st.sampled_from([1, 4, 1024, 4096]))
def test_chunks_cover_every_element_once(numels: list[int], chunk: int) -> None:
    chunks, starts = chunk_table(np.array(numels, dtype=np.int64), chunk)
    covered = [np.zeros(numel, dtype=int) for numel in numels]
    for row, piece in chunks:
        assert piece * chunk < numels[row]
        covered[row][piece * chunk : (piece + 1) * chunk] += 1
    assert all((count == 1).all() for count in covered)
    assert starts[-1] == len(chunks)
    for row, (first, last) in enumerate(pairwise(starts)):
        assert chunks[first:last].tolist() == [[row, piece] for piece in range(last - first)]


def test_chunks_of_a_huge_tensor() -> None:
    """2^33 elements: sizes are 64-bit, and numbers of chunks are small."""
    chunks, starts = chunk_table(np.array([3, 2**33 + 1], dtype=np.int64), 2**20)
    assert starts.tolist() == [0, 1, 2 + 2**13]
    assert chunks[-1].tolist() == [1, 2**13]


# Plans.


def batch(work: Work, tensor_ids: list[int] | None = None, h: Hyperparameters | None = None) -> Batch:
    return Batch(
        name=lambda i: f"params[{i}]",
        params=work.params,
        grads=work.grads,
        exp_avg_sens=work.sens,
        exp_avg_unc=work.unc,
        sens_stats=work.stats,
        steps=[1] * len(work.params),
        tensor_ids=tensor_ids or list(range(len(work.params))),
        hyperparameters=[h or Hyperparameters()] * len(work.params),
    )


def work_of(case: Case) -> Work:
    work = prepare(case)
    work.grads = gradients(case, 1)
    return work


ALIGNMENT = [
    # case, whether a kernel may use 128-bit accesses
    (Case([(64,)]), True),
    (Case([()]), True),
    (Case([(3, 5)]), True),
    (Case([(8, 8)], "transposed", "transposed", "transposed"), False),
    (Case([(64,)], param="misaligned"), False),
    (Case([(64,)], grad="misaligned"), False),
    (Case([(64,)], state="misaligned"), False),
    (Case([(64,)], param="holes"), False),
    (Case([(4, 16)], param="padded"), False),
    (Case([(64,)], grad="misaligned", uncertainty="none"), False),
    (Case([(64,)], uncertainty="none"), True),
]


@pytest.mark.parametrize(("case", "aligned"), ALIGNMENT)
def test_alignment(case: Case, aligned: bool) -> None:
    h = Hyperparameters(uncertainty=case.uncertainty)  # type: ignore[arg-type]
    (work,) = Planner().plan(batch(work_of(case), h=h)).launches
    assert work.table[:, Column.VECTOR].tolist() == [int(aligned)]


def test_alignment_follows_the_gradient() -> None:
    """The gradient moves at every step, and with it the widest allowed access."""
    planner, work = Planner(), work_of(Case([(64,)]))
    for layout in ("contiguous", "misaligned", "contiguous"):
        work.grads = gradients(Case([(64,)], grad=layout), 1)
        (launch,) = planner.plan(batch(work)).launches
        assert launch.table[0, Column.VECTOR] == (layout == "contiguous")
        assert launch.table[0, Column.GRAD] == work.grads[0].data_ptr()


def test_table() -> None:
    """Every column, compared with the tensors that it describes."""
    work = work_of(Case([(6,), (4, 5)], param="transposed"))
    h = Hyperparameters(noise_scale=0.1, gamma=2.5, sens_betas=(0.25, 0.75), seed=2**64 - 2)
    (launch,) = Planner().plan(batch(work, [9, 2**32 - 1], h)).launches
    table, real = launch.table, launch.table.view(np.float64)
    assert launch.index == [0, 1]
    for i in range(2):
        row = table[i]
        tensors = (work.params[i], work.grads[i], work.sens[i], work.unc[i], work.stats[i])
        columns = (Column.PARAM, Column.GRAD, Column.SENS, Column.UNC, Column.STATS)
        assert [int(row[c]) for c in columns] == [t.data_ptr() for t in tensors if t is not None]
        assert real[i, Column.NOISE_SCALE : Column.LR].tolist() == [0.1, 2.5, 0.25, 0.75, 0.75, 0.25]
        assert int(row[Column.SEED]) % 2**64 == 2**64 - 2
    assert table[:, Column.NUMEL].tolist() == [6, 20]
    assert table[:, Column.NDIM].tolist() == [0, 2]
    assert table[:, Column.TENSOR_ID].tolist() == [9, 2**32 - 1]
    assert table[:, Column.STEP].tolist() == [1, 1]
    assert launch.layout.tolist() == [[4, 1, 5, 1, 1, 1, 1, 5], [5, 4, 1, 4, 4, 4, 4, 1]]


def test_launches() -> None:
    """One for each combination of dtypes and variant, in the order of their first tensors."""
    works = [work_of(Case([(4,), (5,)], dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)]
    mixed = Work(*(a + b for a, b in zip(*(vars(w).values() for w in works), strict=True)))
    plan = Planner().plan(batch(mixed))
    assert [launch.index for launch in plan.launches] == [[0, 1], [2, 3]]
    assert [launch.key.param_dtype for launch in plan.launches] == [torch.float32, torch.bfloat16]


def test_interleaved_tensors_have_no_memory_in_common() -> None:
    """Two views, each in the holes of the other, are allowed. Two views of the same elements are not."""
    work, memory = work_of(Case([(8,)])), torch.zeros(16)
    work.params, work.sens = [memory[::2]], [memory[1::2]]
    assert len(Planner().plan(batch(work)).launches) == 1
    work.sens = [memory[::2]]
    with pytest.raises(ValueError, match="overlapping memory"):
        Planner().plan(batch(work))


# Reuse.


def moved_gradients(work: Work) -> None:
    work.grads = [g.clone() for g in work.grads]


def nothing(work: Work) -> None:
    pass


def other_param(work: Work) -> None:
    work.params[0] = work.params[0].clone()


def other_state(work: Work) -> None:
    work.sens[0] = work.sens[0].clone()


def other_uncertainty(work: Work) -> None:
    work.unc[1] = torch.zeros_like(work.params[1])


def other_stats(work: Work) -> None:
    work.stats[0] = torch.zeros(2)


def other_param_strides(work: Work) -> None:
    work.params[0] = work.params[0].as_strided((6, 6), (1, 6))


def other_shape(work: Work) -> None:
    work.params[0], work.grads[0] = work.params[0].view(36), work.grads[0].view(36)
    work.sens[0] = work.sens[0].view(36)
    work.unc[0] = work.unc[0].view(36) if work.unc[0] is not None else None


def other_gradient_strides(work: Work) -> None:
    work.grads[0] = work.grads[0].t().contiguous().t()


def one_less(work: Work) -> None:
    for column in (work.params, work.grads, work.sens, work.unc, work.stats):
        column.pop()


CHANGES: list[tuple[Callable[[Work], None], bool]] = [
    (nothing, True),
    (moved_gradients, True),
    (other_param, False),
    (other_state, False),
    (other_uncertainty, False),
    (other_stats, False),
    (other_param_strides, False),
    (other_shape, False),
    (other_gradient_strides, False),
    (one_less, False),
]


@pytest.mark.parametrize(("change", "kept"), CHANGES)
def test_a_plan_is_kept_while_it_is_true(change: Callable[[Work], None], kept: bool) -> None:
    planner, work = Planner(), work_of(Case([(6, 6), (5,)]))
    plan = planner.plan(batch(work))
    change(work)
    again = planner.plan(batch(work))
    assert (again is plan) == kept
    (launch,) = again.launches
    for column, tensors in ((Column.PARAM, work.params), (Column.GRAD, work.grads), (Column.SENS, work.sens)):
        assert launch.table[:, column].tolist() == [t.data_ptr() for t in tensors]


def test_hyperparameters_and_steps_are_written_anew() -> None:
    planner, work = Planner(), work_of(Case([(6,)]))
    first = planner.plan(batch(work))
    assert first.launches[0].table.view(np.float64)[0, Column.GAMMA] == 1.0
    other = batch(work, h=Hyperparameters(gamma=4.0, seed=9))
    other.steps = [31]
    second = planner.plan(other)
    assert second is first
    row = second.launches[0].table[0]
    assert row.view(np.float64)[Column.GAMMA] == 4.0
    assert (row[Column.SEED], row[Column.STEP]) == (9, 31)


def test_a_variant_is_part_of_the_plan() -> None:
    planner, work = Planner(), work_of(Case([(6,)]))
    first = planner.plan(batch(work))
    second = planner.plan(batch(work, h=Hyperparameters(normalization="exact")))
    assert second is not first
    assert second.launches[0].key.variant.normalization == "exact"


def test_alternating_sets_are_all_kept() -> None:
    """Layers that are frozen and unfrozen in turn: a dozen sets of them cost no more than one."""
    planner, work = Planner(), work_of(Case([(n,) for n in range(1, 13)]))
    sets = [[i for i in range(12) if i != frozen] for frozen in range(12)]
    plans = [planner.plan(part(work, chosen, 12)) for chosen in sets]
    for _ in range(2):
        for chosen, plan in zip(sets, plans, strict=True):
            assert planner.plan(part(work, chosen, 12)) is plan
    assert len({id(plan) for plan in plans}) == 12


def test_the_share_of_the_sets_that_fits_is_kept() -> None:
    """Three sets in turn with room for two: not all three are planned again each time."""
    planner, works = Planner(capacity=2, spare=0), [work_of(Case([(5,)])) for _ in range(3)]
    seen = [planner.plan(batch(work)) for work in works]
    hits = 0
    for _ in range(40):
        for work in works:
            plan = planner.plan(batch(work))
            hits += any(plan is other for other in seen)
            seen.append(plan)
            assert sum(map(len, planner._plans.values())) <= 2
    assert 20 < hits < 100


@pytest.mark.parametrize("spare", [0, 2**14])
def test_plans_take_no_more_than_there_is_room_for(spare: int) -> None:
    planner = Planner(capacity=2, spare=spare)
    for n in range(1, 200):
        planner.plan(batch(work_of(Case([(n % 50,), (5,)]))))
        plans = list(chain.from_iterable(planner._plans.values()))
        rows, size = sum(plan.rows for plan in plans), sum(plan.bytes for plan in plans)
        assert (planner._rows, planner._bytes) == (rows, size)
        assert rows <= 4 or size <= spare


def part(work: Work, index: list[int], kept: int) -> Batch:
    """A batch of some of the tensors, with the caller's `kept`."""
    all_ = batch(work)
    columns = ("params", "grads", "exp_avg_sens", "exp_avg_unc", "sens_stats", "steps", "tensor_ids")
    own = {name: [getattr(all_, name)[i] for i in index] for name in columns}
    return Batch(all_.name, **own, hyperparameters=[Hyperparameters()] * len(index), kept=kept)


def test_each_tensor_stepped_alone_keeps_its_plan() -> None:
    """More tensors than there is room for plans of one set, beside a plan of all of them."""
    count = 20
    planner, work = Planner(capacity=2, spare=0), work_of(Case([(n,) for n in range(1, 1 + count)]))
    together = planner.plan(batch(work))
    plans = [planner.plan(part(work, [i], count)) for i in range(count)]
    for i in (*range(count), *reversed(range(count))):
        assert planner.plan(part(work, [i], count)) is plans[i]
    assert planner.plan(batch(work)) is together


def test_no_plan_keeps_tensors_alive_that_come_and_go() -> None:
    """Nor does an owner's plan: parameters that are replaced again and again go with their last reference."""
    planner = Planner(owned=True)
    references: list[weakref.ref[Tensor]] = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(30):
            work = work_of(Case([(5,), (6,), (7,)]))
            counters = [torch.zeros(()) for _ in work.params]
            planner.plan(replace(batch(work), steps=counters))
            references += map(weakref.ref, [*work.tensors(), *counters])
            del work, counters
        assert not any(reference() is not None for reference in references)
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["params", "grads", "sens", "unc", "stats"])
def test_a_kept_plan_does_not_hide_a_wrong_dtype(name: str) -> None:
    """The same address with a dtype that kernels do not support: refused as in the first step."""
    planner, work = Planner(), work_of(Case([(8,)]))
    planner.plan(batch(work))
    column = getattr(work, name)
    column[0] = column[0].view(torch.int32)
    with pytest.raises((TypeError, ValueError), match=r"params\[0\]"):
        planner.plan(batch(work))


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_a_kept_plan_does_not_hide_a_sparse_gradient(layout: str) -> None:
    """Not even of a 0-d tensor, whose strides are those of a dense one."""
    planner, work = Planner(), work_of(Case([(3, 5), ()], layout, layout))
    planner.plan(batch(work))
    work.grads[1] = work.grads[1].to_sparse()
    with pytest.raises(TypeError, match=r"params\[1\]: PATS does not support sparse"):
        planner.plan(batch(work))


def test_a_kept_plan_does_not_hide_a_wrong_shape_of_the_statistics() -> None:
    planner, work = Planner(), work_of(Case([(8,)]))
    planner.plan(batch(work))
    own = work.stats[0]
    work.stats[0] = torch.zeros(4)[::2]
    with pytest.raises(
        ValueError, match=r"must be contiguous .* but is .* of shape \(2,\) and stride \(2,\)"
    ):
        planner.plan(batch(work))
    work.stats[0] = own[:1]
    with pytest.raises(ValueError, match="sens_stats"):
        planner.plan(batch(work))


SAME_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "strides": Tensor.t,
    "shape": lambda t: t[:3],
    "dtype": lambda t: t.view(torch.int32),
    "sign": torch._neg_view,  # type: ignore[attr-defined]
}


@pytest.mark.parametrize("name", ["params", "grads", "sens", "unc"])
@pytest.mark.parametrize("change", SAME_PLACE)
def test_a_kept_plan_does_not_hide_the_same_object_s_other_view(change: str, name: str) -> None:
    """`tensor.data = ...` with the same memory changes neither object nor address. In the second block."""
    planner, work = Planner(), work_of(Case([(6, 6)] * (BLOCK + 2)))
    plan = planner.plan(batch(work))
    tensor = getattr(work, name)[BLOCK]
    before = tensor.data_ptr()
    tensor.data = SAME_PLACE[change](tensor.data)
    assert tensor.data_ptr() == before
    if change == "strides":
        assert planner.plan(batch(work)) is not plan
    elif (change, name) == ("sign", "grads"):
        (launch,) = planner.plan(batch(work)).launches
        assert launch.table[BLOCK, Column.GRAD] != before, "the kernel would read -g"
    else:
        with pytest.raises((TypeError, ValueError), match=rf"params\[{BLOCK}\]"):
            planner.plan(batch(work))


def test_a_gradient_that_two_parameters_share_is_planned_once() -> None:
    planner, work = Planner(), work_of(Case([(6,), (6,)]))
    work.grads[1] = work.grads[0]
    plan = planner.plan(batch(work))
    assert planner.plan(batch(work)) is plan
    assert plan.launches[0].table[:, Column.GRAD].tolist() == [work.grads[0].data_ptr()] * 2


def test_a_column_that_is_nobody_else_s_is_looked_at_when_it_is_another() -> None:
    """While it is the same list it is not checked again; the caller promises not to change it."""
    planner, work = Planner(), work_of(Case([(6,), (7,)]))
    counted = replace(batch(work), nonfinite=Own(torch.zeros((), dtype=torch.int64) for _ in work.params))
    plan = planner.plan(counted)
    assert planner.plan(replace(counted, nonfinite=Own(counted.nonfinite))) is plan
    others = Own(torch.zeros((), dtype=torch.int64) for _ in work.params)
    other = planner.plan(replace(counted, nonfinite=others))
    assert other is not plan
    assert other.launches[0].table[:, Column.NONFINITE].tolist() == [count.data_ptr() for count in others]
    alive = weakref.ref(others[0])
    del others
    assert alive() is None


# Lifetimes.


def test_plans_keep_nothing_alive() -> None:
    planner, work = Planner(), work_of(Case([(6,), (7, 3)]))
    planner.plan(batch(work))
    references = [weakref.ref(t) for t in work.tensors()]
    del work
    gc.collect()
    assert len(references) == 10
    assert not any(reference() is not None for reference in references)


def test_a_step_keeps_nothing_alive(backend: str) -> None:
    work = work_of(Case([(6,), (7, 3)]))
    step(backend, Case([(6,), (7, 3)]), work, 1)
    references = [weakref.ref(t) for t in work.tensors()]
    del work
    gc.collect()
    assert not any(reference() is not None for reference in references)


@pytest.mark.parametrize("layout", ["contiguous", "holes"])
def test_gradients_that_are_freed_and_come_back_elsewhere(backend: str, layout: str) -> None:
    """Between steps something else takes their memory. A stale address would read that."""
    case = Case([(640,), (33, 5)], grad=layout)
    expected = run(backend, case)
    work, squatters = prepare(case), []
    for number in range(1, 1 + case.steps):
        work.grads = gradients(case, number)
        step(backend, case, work, number)
        sizes = [g.untyped_storage().nbytes() // 4 for g in work.grads]
        work.grads = []
        gc.collect()
        squatters += [torch.ones(size) for size in sizes]
    assert all(bool((t == 1).all()) for t in squatters)
    assert_same_bits(work.written(), expected.written())


def test_tensors_that_come_and_go_at_the_same_addresses(backend: str) -> None:
    """New tensors with other shapes, strides and dtypes at old addresses: no old plan is used."""
    cases = [
        Case([(24,), (6,)]),
        Case([(6,), (24,)]),
        Case([(4, 6), (6,)], "transposed"),
        Case([(6, 4), (6,)], "transposed"),
        Case([(48,), (12,)], dtype=torch.bfloat16),
        Case([(24,), (6,)], uncertainty="none"),
        Case([(24,), (6,)], normalization="exact", tensor_ids=[4, 2]),
    ]
    for _ in range(2):
        for case in cases:
            run_checked(backend, case)
            gc.collect()
