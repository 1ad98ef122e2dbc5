"""Every tuning of a launch gives the same bits."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from conftest import INTERPRETED
from torch import Tensor

from pats_kernels import pats_step_
from pats_kernels.backends import triton as backend
from pats_kernels.backends.triton import Tuning
from pats_kernels.hyperparameters import Hyperparameters, Normalization
from pats_kernels.plan import Batch, Planner

SIZES = [600, 3, 1100, 512, 130]
SMALL = Tuning(chunk=512, block=256)
GROUPS = 12 * 610  # bytes of w, S and U: the first two tensors, then one big one, then two
CASES: list[tuple[Normalization, Tuning]] = [
    ("delayed", replace(SMALL, persistent=3)),  # programs, for 8 chunks
    ("delayed", replace(SMALL, hints=("evict_last", "evict_first", ".cs"))),
    ("exact", replace(SMALL, reversed=True)),
    ("exact", replace(SMALL, group_bytes=GROUPS)),
    ("exact", replace(SMALL, group_bytes=GROUPS, persistent=2, reversed=True)),
]


@cache
def after_a_step(tuning: Tuning, normalization: Normalization) -> list[list[Tensor]]:
    random = torch.Generator().manual_seed(0)
    params, grads, S, U = ([torch.randn(size, generator=random) for size in SIZES] for _ in range(4))
    state = [[x.abs() for x in column] for column in (S, U)]
    stats = [torch.full((2,), 0.8) for _ in SIZES]
    with backend.tuned(tuning):
        pats_step_(
            params,
            grads,
            *state,
            stats,
            step=1,
            tensor_ids=range(len(SIZES)),
            noise_scale=1e-2,
            normalization=normalization,
            backend="triton",
        )
    return [params, *state, stats]


@pytest.mark.backend
@pytest.mark.skipif(not INTERPRETED, reason="not interpreted")
@pytest.mark.parametrize(("normalization", "tuning"), CASES)
def test_the_same_bits(normalization: Normalization, tuning: Tuning) -> None:
    expected, got = after_a_step(SMALL, normalization), after_a_step(tuning, normalization)
    for column, other in zip(expected, got, strict=True):
        torch.testing.assert_close(other, column, rtol=0, atol=0)


def groups(normalization: Normalization, tuning: Tuning) -> list[tuple[int, ...]]:
    values = Hyperparameters(normalization=normalization)
    columns = [[torch.rand(size) for size in SIZES] for _ in range(4)]
    count = len(SIZES)
    stats, steps = [torch.zeros(2) for _ in SIZES], [torch.zeros(()) for _ in SIZES]
    batch = Batch(str, *columns, stats, steps, [], list(range(count)), [values] * count)
    return list(backend._groups(Planner().plan(batch).launches[0], tuning))


def test_groups_hold_what_is_asked_for() -> None:
    """A tensor is never cut, and one that is too large is alone."""
    grouped = replace(SMALL, group_bytes=GROUPS)
    assert groups("exact", grouped) == [(0, 2, 0, 3), (2, 3, 3, 6), (3, 4, 6, 7), (4, 5, 7, 8)]
    grouped = replace(SMALL, group_bytes=GROUPS + 12 * 40)
    assert groups("exact", grouped) == [(0, 2, 0, 3), (2, 3, 3, 6), (3, 5, 6, 8)]
    assert groups("delayed", grouped) == groups("exact", SMALL) == [(0, 5, 0, 8)]


def test_the_default_comes_back() -> None:
    def step() -> None:
        with backend.tuned(SMALL):
            assert backend._tuning[-1] is SMALL
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        step()
    assert backend._tuning == [Tuning()]
