"""A shard of a tensor gets the same noise, rounding and statistics as in a step on the whole tensor.

The tests use what `distributed` makes of a sharded parameter, without other processes: a batch whose tensors
are boxes of whole tensors. Every backend is compared with its own step on the whole, and with the contract.
"""

from typing import Any

import pytest
import torch
from conftest import INTERPRETED
from harness import assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pats_kernels.hyperparameters import AdamWHyperparameters, Hyperparameters
from pats_kernels.plan import Batch, Column, Planner, Shard, are_groups_whole, averages_of, whole_shard
from pats_kernels.reference import philox_normal
from pats_kernels.step import Launcher

Box = tuple[slice, ...]
STEP, TENSOR_ID, SEED = 5, 3, 2**40 + 9
COLUMNS = ("params", "grads", "exp_avg_sens", "exp_avg_unc", "exp_avg", "exp_avg_sq")


def tensors_of(
    shape: tuple[int, ...], dtype: torch.dtype, state: torch.dtype, device: str = "cpu"
) -> dict[str, Tensor]:
    """A tensor in the middle of training; all its elements have different numbers."""
    random = torch.Generator().manual_seed(7)
    drawn = {key: torch.randn(shape, generator=random, dtype=torch.float64) for key in COLUMNS}
    dtypes = {"params": dtype, "grads": dtype}
    return {
        key: (value if key in ("params", "grads", "exp_avg") else value.square()).to(
            device, dtypes.get(key, state)
        )
        for key, value in drawn.items()
    }


def step(
    backend: str,
    tensors: dict[str, Tensor],
    shard: Shard | None,
    h: Hyperparameters,
    stats: Tensor,
    grad_scale: Tensor | None = None,
) -> Tensor:
    """Takes one step in place; returns the shard's part of the new means."""
    keys = ["params", "grads", *averages_of(h.variant)]
    columns: dict[str, Any] = {key: [tensors[key]] for key in keys}
    missing: dict[str, Any] = {key: [None] for key in ("exp_avg_sens", "exp_avg_unc") if key not in keys}
    share = torch.full((2,), torch.nan, device=stats.device)
    batch = Batch(
        name=lambda i: f"params[{i}]",
        **columns | missing,
        sens_stats=[stats.clone()],
        steps=[STEP],
        tensor_ids=[TENSOR_ID],
        hyperparameters=[h],
        shards=[shard],
        shares=[share] if shard is not None else [],
    )
    Launcher().launch(batch, backend, grad_scale)
    return share if shard is not None else batch.sens_stats[0]  # type: ignore[return-value]


def box_of(whole: tuple[int, ...], box: Box) -> Shard:
    strides = whole_shard(whole).strides
    offset = sum(part.start * stride for part, stride in zip(box, strides, strict=True))
    return Shard(offset, strides, whole_shard(whole).numel)


@st.composite
def partitions(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """A shape, and boxes that make up all of it: cut once along some of the dimensions."""
    shape = tuple(draw(st.lists(st.integers(1, 13), min_size=1, max_size=3)))
    if draw(st.booleans()):
        shape = (
            *shape[:-1],
            draw(st.sampled_from([256, 516, 1030])),
        )  # more than a block, whole groups or not
    boxes: list[Box] = [()]
    for size in shape:
        cut = draw(st.integers(0, size))
        if draw(st.booleans()):
            cut -= cut % 4
        boxes = [(*box, part) for box in boxes for part in (slice(0, cut), slice(cut, size))]
    return shape, [box for box in boxes if all(part.stop > part.start for part in box)]


FORMS: dict[str, Hyperparameters] = {
    "pats": Hyperparameters(noise_scale=0.3, seed=SEED),
    "exact": Hyperparameters(noise_scale=0.3, seed=SEED, normalization="exact"),
    "ema": AdamWHyperparameters(noise_scale=0.3, seed=SEED),
    "moments": AdamWHyperparameters(noise_scale=0.3, seed=SEED, sensitivity="moments"),
}
# Under the interpreter, which is slow, only what paths depend on: one or two groups per vector, and AdamW.
FORMS_HERE = ["pats", "ema"] if INTERPRETED else ["pats", "ema", "moments"]
STORAGES_HERE = ["float32", "bfloat16"] if INTERPRETED else ["float32", "bfloat16", "mixed", "float64"]
STORAGES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "mixed": (torch.bfloat16, torch.float32),
    "float64": (torch.float64, torch.float64),
}


@pytest.mark.parametrize("storage", STORAGES_HERE)
@pytest.mark.parametrize("form", FORMS_HERE)
@given(partition=partitions(), copies=st.booleans())
@settings(max_examples=3 if INTERPRETED else 40)
def test_parts_are_what_the_whole_is(
    backend: str, form: str, storage: str, partition: tuple[tuple[int, ...], list[Box]], copies: bool
) -> None:
    shape, boxes = partition
    stats = torch.tensor([0.9, 1.1])
    whole = tensors_of(shape, *STORAGES[storage])
    parts = tensors_of(shape, *STORAGES[storage])
    means = step(backend, whole, None, FORMS[form], stats)
    shares = []
    for box in boxes:
        # Views keep the strides of the whole, which no shard does: one more case.
        part = {key: value[box].clone() if copies else value[box] for key, value in parts.items()}
        shares.append(step(backend, part, box_of(shape, box), FORMS[form], stats))
        for key, value in part.items():
            parts[key][box] = value
    for key, value in whole.items():
        if backend != "eager":
            assert_same_bits([parts[key]], [value])
        else:  # torch computes full vectors differently from the rest
            torch.testing.assert_close(
                parts[key], value, rtol=2e-6, atol=2e-6, msg=lambda m, k=key: f"{k}: {m}"
            )
    # Of at most 13 * 13 * 1030 terms, each of a size of the mean's, added in float32 within a block.
    torch.testing.assert_close(torch.stack(shares).sum(0), means, rtol=1e-5, atol=0)


FIRSTS = [0, 1, 4, 2**33 - 6, 2**34 - 8, 2**34 - 6, 2**34 + 4, 2**36, 2**63 - 8192]


@pytest.mark.parametrize("first", FIRSTS[1::2] if INTERPRETED else FIRSTS)
@pytest.mark.parametrize("dtype", [torch.float32] if INTERPRETED else [torch.float32, torch.float64])
def test_the_noise_is_that_of_the_numbers(backend: str, first: int, dtype: torch.dtype) -> None:
    """Without any sensitivity the gate is open: w = 0 becomes the noise itself."""
    numel, scale = 1024 + 30 if INTERPRETED else 4096 + 30, 0.5
    tensors = {key: torch.zeros(numel, dtype=dtype) for key in COLUMNS}
    h = Hyperparameters(noise_scale=scale, seed=SEED)
    step(backend, tensors, Shard(first, (1,), 2**63 - 1), h, torch.ones(2))
    z = philox_normal(SEED, STEP, TENSOR_ID, numel, offset=first)
    torch.testing.assert_close(tensors["params"].double() / scale, z, rtol=0, atol=2e-3)


@pytest.mark.parametrize("form", FORMS)
def test_a_share_that_is_not_counted(backend: str, form: str) -> None:
    tensors = tensors_of((40,), torch.float32, torch.float32)
    share = step(backend, tensors, Shard(0, (1,), 160, counts=False), FORMS[form], torch.ones(2))
    assert share.tolist() == [0, 0]


@pytest.mark.parametrize("form", FORMS)
def test_an_empty_shard_has_an_empty_share(backend: str, form: str) -> None:
    tensors = tensors_of((0, 5), torch.float32, torch.float32)
    share = step(backend, tensors, Shard(0, (5, 1), 20), FORMS[form], torch.ones(2))
    assert share.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("shape", "box", "in_groups"),
    [
        ((8, 12), (slice(2, 6), slice(0, 12)), True),  # rows, from a multiple of 4
        ((9, 11), (slice(4, 8), slice(0, 11)), True),
        ((9, 11), (slice(1, 8), slice(0, 11)), False),
        ((8, 12), (slice(0, 8), slice(4, 8)), False),  # columns
        ((1, 12), (slice(0, 1), slice(4, 8)), True),
    ],
)
def test_what_takes_the_short_path(shape: tuple[int, ...], box: Box, in_groups: bool) -> None:
    part = torch.empty(shape)[box].clone()
    batch = Batch(
        str,
        [part],
        [part.clone()],
        [part.clone()],
        [part.clone()],
        [torch.zeros(2)],
        [1],
        [],
        [0],
        [Hyperparameters()],
        shards=[box_of(shape, box)],
    )
    (launch,) = Planner().plan(batch).launches
    assert (launch.table[0, Column.NDIM] == 0) == in_groups
    assert launch.table[0, Column.OFFSET] == batch.shards[0].offset  # type: ignore[union-attr]
    assert launch.table[0, Column.WHOLE] == torch.empty(shape).numel()


@pytest.mark.parametrize(
    ("offset", "numel", "expected"),
    [(0, 2**40, True), (2, 8, False), (2**34 - 8, 8, True), (2**34 - 8, 12, False), (2**34, 2**40, True)],
)
def test_groups_that_a_chunk_can_count(offset: int, numel: int, expected: bool) -> None:
    assert are_groups_whole(offset, numel) == expected
