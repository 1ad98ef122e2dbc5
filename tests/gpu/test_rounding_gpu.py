"""Every store of the GPU's kernels against the model of stochastic rounding, bit by bit.

The same tests as on the CPU (tests/test_rounding.py), with more elements; nothing is interpreted here.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import Hyper
from rounding import Work, check
from test_rounding import FORMS, SIZES, WRITERS, finite, patterns, work_of

from pats_kernels import available_backends

DEVICE = "cuda"
BACKENDS = [name for name in ("triton", "cuda") if available_backends(DEVICE)[name] is None]
LAYOUTS = ["contiguous", "misaligned", "transposed", "channels_last", "holes", "padded"]


@pytest.fixture(params=BACKENDS, scope="session")
def kernels(request: pytest.FixtureRequest) -> str:
    """The name of each backend that there is on this machine."""
    return request.param


@pytest.mark.parametrize("stochastic", [True, False], ids=["stochastic", "to nearest"])
@pytest.mark.parametrize(("store", "form"), WRITERS)
def test_every_store_is_the_model(kernels: str, store: str, form: str, stochastic: bool) -> None:
    work = work_of([finite(store, patterns(2_000_000)), finite(store, patterns(77, seed=1))], form)
    work.device = DEVICE
    work.hypers = [h._replace(stochastic_rounding=stochastic) for h in work.hypers]
    check(store, work, kernels)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("store", "form"), WRITERS)
def test_each_element_has_its_own_bits(kernels: str, store: str, form: str, layout: str) -> None:
    random = torch.Generator().manual_seed(3)
    shapes = [(size,) for size in SIZES] + [(33, 20), (3, 4, 5, 6)]
    xs = [torch.randn(shape, generator=random) for shape in shapes]
    hypers = [Hyper(seed=5, step=5000 + i, tensor_id=i) for i in range(len(xs))]
    check(store, Work(xs, hypers, layout=layout, device=DEVICE, adamw=FORMS[form]), kernels)


@given(
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(1, 2**32 - 1),
    tensor_id=st.integers(0, 2**32 - 1),
    numel=st.integers(1, 500),
)
def test_the_bits_are_those_of_seed_step_and_tensor(
    kernels: str, seed: int, step: int, tensor_id: int, numel: int
) -> None:
    x = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
    work = Work([x], [Hyper(seed=seed, step=step, tensor_id=tensor_id)], device=DEVICE)
    check("averages", work, kernels)
