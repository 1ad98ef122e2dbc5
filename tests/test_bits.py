"""Within one backend, all paths give the same bits. docs/bits.md lists the paths and their tests.

With the same means, a tensor gets the same bits if it is contiguous and aligned (a kernel's path for full
chunks, then the path for tails), misaligned (only the path for tails), strided or sharded, with a GradScaler
or without. test_isa.py tests instruction sets, test_backends.py threads, test_shards.py other shards, and
test_codegen.py what the compiled GPU kernels compute on each path.
"""

from typing import Any

import pytest
import torch
from conftest import INTERPRETED, KERNEL, NO_EXTENSION
from harness import LAYOUTS, assert_same_bits, filled
from test_shards import COLUMNS, SEED, box_of, step, tensors_of
from torch import Tensor

from pats_kernels.hyperparameters import AdamWHyperparameters, Hyperparameters

pytestmark = [
    pytest.mark.backend,
    pytest.mark.skipif(NO_EXTENSION, reason="eager PyTorch makes no such promise"),
]

NUMEL = 4096 + 332  # a chunk of the GPU kernels and a tail; blocks of the CPU's and a tail
STATS = torch.tensor([0.9, 1.1])
FORMS: dict[str, Hyperparameters] = {
    "pats": Hyperparameters(noise_scale=0.3, seed=SEED),
    "pats, ucb": Hyperparameters(noise_scale=0.3, seed=SEED, uncertainty="ucb"),
    "pats, none": Hyperparameters(noise_scale=0.3, seed=SEED, uncertainty="none"),
    "ema": AdamWHyperparameters(noise_scale=0.3, seed=SEED, lr=1e-2),
    "moments": AdamWHyperparameters(noise_scale=0.3, seed=SEED, lr=1e-2, sensitivity="moments"),
}
STORAGES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "mixed": (torch.bfloat16, torch.float32),
    "float16": (torch.float16, torch.float32),
    "float64": (torch.float64, torch.float64),
}


def of(tensors: dict[str, Tensor]) -> list[Tensor]:
    return [tensors[key].contiguous() for key in COLUMNS]


# Under the interpreter, which is slow, only what its paths depend on.
FORMS_HERE = ["pats", "ema", "moments"] if INTERPRETED else list(FORMS)
STORAGES_HERE = ["float32", "bfloat16"] if INTERPRETED else list(STORAGES)


@pytest.fixture(scope="module", params=[(form, kind) for form in FORMS_HERE for kind in STORAGES_HERE])
def stepped(request: pytest.FixtureRequest) -> tuple[Hyperparameters, tuple[Any, Any], list[Tensor]]:
    """A form, its storage dtypes, and the result of a step on a contiguous tensor."""
    form, storage = request.param
    whole = tensors_of((NUMEL,), *STORAGES[storage])
    before = of({key: value.clone() for key, value in whole.items()})
    step(KERNEL, whole, None, FORMS[form], STATS)
    assert any((a != b).any() for a, b in zip(before, of(whole), strict=True))
    return FORMS[form], STORAGES[storage], of(whole)


@pytest.mark.parametrize("layout", ["misaligned", "holes"])
def test_layouts(stepped: Any, layout: str) -> None:
    h, storage, expected = stepped
    tensors = tensors_of((NUMEL,), *storage)
    assert layout in LAYOUTS
    placed = {key: filled(layout, (NUMEL,), value.dtype, value) for key, value in tensors.items()}
    step(KERNEL, placed, None, h, STATS)
    assert_same_bits(of(placed), expected)


def test_shards(stepped: Any) -> None:
    """Cut at a multiple of four, where groups stay whole, and between two multiples."""
    h, storage, expected = stepped
    for cut in (2048, 1023):
        tensors = tensors_of((NUMEL,), *storage)
        for box in ((slice(0, cut),), (slice(cut, NUMEL),)):
            part = {key: value[box].clone() for key, value in tensors.items()}
            step(KERNEL, part, box_of((NUMEL,), box), h, STATS)
            for key, value in part.items():
                tensors[key][box] = value
        assert_same_bits(of(tensors), expected)


@pytest.mark.parametrize("layout", ["contiguous", "holes"])
@pytest.mark.parametrize("scale", [1.0, 2.0**3])
def test_grad_scalers(stepped: Any, scale: float, layout: str) -> None:
    """A scale of 1, as in a step without loss scaling, and one whose reciprocal is exact."""
    h, storage, expected = stepped
    tensors = tensors_of((NUMEL,), *storage)
    tensors["grads"] *= scale
    placed = {key: filled(layout, (NUMEL,), value.dtype, value) for key, value in tensors.items()}
    step(KERNEL, placed, None, h, STATS, torch.tensor(scale))
    placed["grads"] /= scale
    assert_same_bits(of(placed), expected)


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_averages_of_one_pass_and_of_two(storage: str) -> None:
    """The normalization decides which means divide, and does not change S and U."""
    one, two = (tensors_of((NUMEL,), *STORAGES[storage]) for _ in range(2))
    step(KERNEL, one, None, Hyperparameters(noise_scale=0.3, seed=SEED), STATS)
    exact = Hyperparameters(noise_scale=0.3, seed=SEED, normalization="exact")
    step(KERNEL, two, None, exact, STATS)
    for key in ("exp_avg_sens", "exp_avg_unc"):
        assert_same_bits([one[key]], [two[key]])
    assert (one["params"] != two["params"]).any()


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_adamw_and_pats_share_their_averages(storage: str) -> None:
    """PATSAdamW's S and U are those of PATS attached to AdamW. In float32 the noise is the same too."""
    alone, together = (tensors_of((NUMEL,), *STORAGES[storage]) for _ in range(2))
    step(KERNEL, alone, None, Hyperparameters(noise_scale=0.3, seed=SEED), STATS)
    adamw = AdamWHyperparameters(noise_scale=0.3, seed=SEED, lr=0.0, weight_decay=0.0)
    step(KERNEL, together, None, adamw, STATS)
    keys = ["exp_avg_sens", "exp_avg_unc", "params"]
    assert_same_bits([alone[key] for key in keys], [together[key] for key in keys])


@pytest.mark.skipif(INTERPRETED, reason="its chunks' paths add in orders of their own")
def test_means_on_the_cpu_are_those_of_any_layout(stepped: Any) -> None:
    """Blocks are gathered before they are summed, so here even the means are the same."""
    h, storage, _ = stepped
    found = []
    for layout in ("contiguous", "holes"):
        tensors = tensors_of((NUMEL,), *storage)
        placed = {key: filled(layout, (NUMEL,), value.dtype, value) for key, value in tensors.items()}
        found.append(step(KERNEL, placed, None, h, STATS))
    assert_same_bits(found[:1], found[1:])
