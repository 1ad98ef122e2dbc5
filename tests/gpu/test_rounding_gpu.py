"""Every store of the GPU's kernels against the model of stochastic rounding, bit by bit.

The same tests as on the CPU (tests/test_rounding.py), with more elements; nothing is interpreted here.
"""

import pytest
import torch
from device import BACKENDS, DEVICE, at_most, backends
from hypothesis import given
from hypothesis import strategies as st
from oracle import Hyper
from rounding import Work, check
from test_rounding import FORMS, SIZES, WRITERS, finite, patterns, work_of

LAYOUTS = ["contiguous", "misaligned", "transposed", "channels_last", "holes", "padded"]


@backends
@pytest.mark.parametrize("stochastic", [True, False], ids=["stochastic", "to nearest"])
@pytest.mark.parametrize(("store", "form"), WRITERS)
def test_every_store_is_the_model(store: str, form: str, stochastic: bool, backend: str) -> None:
    work = work_of(
        [finite(store, patterns(at_most(2000, 2_000_000))), finite(store, patterns(77, seed=1))], form
    )
    work.device = DEVICE
    work.hypers = [h._replace(stochastic_rounding=stochastic) for h in work.hypers]
    check(store, work, backend)


@backends
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("store", "form"), WRITERS)
def test_each_element_has_its_own_bits(store: str, form: str, layout: str, backend: str) -> None:
    random = torch.Generator().manual_seed(3)
    shapes = [(size,) for size in SIZES] + [(33, 20), (3, 4, 5, 6)]
    xs = [torch.randn(shape, generator=random) for shape in shapes]
    hypers = [Hyper(seed=5, step=5000 + i, tensor_id=i) for i in range(len(xs))]
    check(store, Work(xs, hypers, layout=layout, device=DEVICE, adamw=FORMS[form]), backend)


@given(
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(1, 2**32 - 1),
    tensor_id=st.integers(0, 2**32 - 1),
    numel=st.integers(1, 500),
)
def test_the_bits_are_those_of_seed_step_and_tensor(seed: int, step: int, tensor_id: int, numel: int) -> None:
    x = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
    work = Work([x], [Hyper(seed=seed, step=step, tensor_id=tensor_id)], device=DEVICE)
    for backend in BACKENDS:
        check("averages", work, backend)
