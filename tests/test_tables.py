"""A launch's tables on the device: what is uploaded when, and what a captured graph reads."""

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pats_kernels import PATSAdamW
from pats_kernels.backends import tables
from pats_kernels.backends.tables import DeviceTables
from pats_kernels.hyperparameters import Hyperparameters
from pats_kernels.plan import Batch, Column, Launch, Planner

pytestmark = pytest.mark.usefixtures("quick_gc")

CHUNK = 4


@pytest.fixture
def graph(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A switch: from now on, or no longer, everything happens as if a graph were being captured."""
    monkeypatch.setattr(tables, "_captured", [])
    monkeypatch.setattr(tables, "_constants", [])
    capturing = {"now": False}
    monkeypatch.setattr(tables, "capturing", lambda device: capturing["now"])
    return capturing.__setitem__


def launch_of(sizes: tuple[int, ...] = (9, 4)) -> tuple[Launch, Batch, Planner]:
    values = Hyperparameters()
    params, grads, sens, unc = ([torch.rand(size) for size in sizes] for _ in range(4))
    stats, steps = ([torch.zeros(2) for _ in sizes], [torch.zeros(()) for _ in sizes])
    ids = list(range(len(sizes)))
    batch = Batch(str, params, grads, sens, unc, stats, steps, [], ids, [values] * len(sizes))
    planner = Planner()
    return planner.plan(batch).launches[0], batch, planner


def pack(launch: Launch, packed: np.ndarray) -> None:
    np.copyto(packed, launch.table)


def holds(table: Tensor, launch: Launch) -> bool:
    return np.array_equal(table.numpy(), launch.table)


def test_what_a_kernel_is_given() -> None:
    launch, _, _ = launch_of()
    given = DeviceTables(launch, CHUNK, pack).current(launch)
    assert holds(given.table, launch)
    assert given.chunks.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0]]
    assert given.starts.tolist() == [0, 3, 4]
    assert given.partials.shape == (3, 4)
    assert given.partials.dtype == torch.float64


def test_rows_travel_only_where_something_changed() -> None:
    launch, batch, planner = launch_of()
    packed: list[np.ndarray] = []

    def counted(launch: Launch, table: np.ndarray) -> None:
        pack(launch, table)
        packed.append(table)

    kept = DeviceTables(launch, CHUNK, counted)
    first = kept.current(launch)
    planner.plan(batch)
    assert kept.current(launch).table is first.table
    assert len(packed) == 1
    batch.grads = [grad.clone() for grad in batch.grads]
    planner.plan(batch)
    again = kept.current(launch)
    assert again.table is first.table
    assert len(packed) == 2
    assert again.table[:, Column.GRAD].tolist() == [grad.data_ptr() for grad in batch.grads]


def test_a_graph_copies_from_memory_of_its_own(graph: Any) -> None:
    launch, batch, planner = launch_of()
    kept = DeviceTables(launch, CHUNK, pack)
    eager = kept.current(launch)
    captured: list[tables.Tables] = []
    for _ in range(2):  # the second without a step in between
        batch.grads = [grad.clone() for grad in batch.grads]
        planner.plan(batch)
        graph("now", True)
        captured.append(kept.current(launch))
        assert holds(captured[-1].table, launch)
        graph("now", False)
    sources = tables._captured
    assert len(sources) == 2
    memory = [eager.table, eager.partials, *(t for c in captured for t in (c.table, c.partials)), *sources]
    assert len({t.data_ptr() for t in memory}) == len(memory)
    for given in captured:  # what depends only on the sizes is not uploaded again
        assert given.chunks is eager.chunks
        assert given.starts is eager.starts
        assert given.layout is eager.layout

    # Later steps, with other gradients, do not change what the graphs copy from.
    before = [source.clone() for source in sources]
    batch.grads = [grad.clone() for grad in batch.grads]
    planner.plan(batch)
    assert holds(kept.current(launch).table, launch)
    for source, old, given in zip(sources, before, captured, strict=True):
        assert torch.equal(source, old)
        assert torch.equal(given.table, old)


def test_a_graph_outlives_the_plan_that_it_was_captured_with(graph: Any) -> None:
    """A planner forgets plans, but a replay still reads what they have uploaded."""
    launch, _, _ = launch_of()
    kept = DeviceTables(launch, CHUNK, pack)
    kept.current(launch)
    graph("now", True)
    given = kept.current(launch)
    references = [weakref.ref(tensor) for tensor in (given.layout, given.chunks, given.starts)]
    del kept, given, launch
    gc.collect()
    assert all(reference() is not None for reference in references)


def test_a_capture_before_the_first_step(graph: Any) -> None:
    launch, _, _ = launch_of()
    graph("now", True)
    with pytest.raises(RuntimeError, match="no step has seen yet"):
        DeviceTables(launch, CHUNK, pack)


def test_no_state_is_made_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = PATSAdamW([("weight", param)])
    monkeypatch.setattr("pats_kernels.state.capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="weight: a CUDA graph is being captured before it has its state"):
        optimizer.step()
    assert not optimizer.state[param]
