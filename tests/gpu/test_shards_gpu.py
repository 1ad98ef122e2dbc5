"""Parts of tensors on a GPU: whole rows, which take the short path, and columns, which take that for strides.

As tests/test_shards.py, whose words these are; collected as test_kernels_gpu.py is. The means are the same,
so all bits are, whatever the path.
"""

import pytest
import torch
from device import DEVICE, at_most, backends
from test_shards import FORMS, STORAGES, Box, box_of, step, tensors_of

from pats_kernels.hyperparameters import Hyperparameters
from pats_kernels.plan import Shard
from pats_kernels.reference import philox_normal

ROWS, COLUMNS = at_most(6, 300), at_most(24, 1288)
CUTS: dict[str, list[Box]] = {
    "rows": [(slice(0, 4), slice(0, COLUMNS)), (slice(4, ROWS), slice(0, COLUMNS))],
    "columns": [(slice(0, ROWS), slice(0, 8)), (slice(0, ROWS), slice(8, COLUMNS))],
    "uneven": [
        (slice(0, ROWS), slice(0, 5)),
        (slice(0, 1), slice(5, COLUMNS)),
        (slice(1, ROWS), slice(5, COLUMNS)),
    ],
}


@backends
@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["pats", "ema", "moments"])
@pytest.mark.parametrize("cut", CUTS)
def test_parts_are_what_the_whole_is(cut: str, form: str, storage: str, backend: str) -> None:
    shape = (ROWS, COLUMNS)
    stats = torch.tensor([0.9, 1.1], device=DEVICE)
    whole, parts = (tensors_of(shape, *STORAGES[storage], DEVICE) for _ in range(2))
    means = step(backend, whole, None, FORMS[form], stats)
    shares = []
    for box in CUTS[cut]:
        part = {key: value[box].clone() for key, value in parts.items()}
        shares.append(step(backend, part, box_of(shape, box), FORMS[form], stats))
        for key, value in part.items():
            parts[key][box] = value
    for key, value in whole.items():
        torch.testing.assert_close(parts[key], value, rtol=0, atol=0, msg=lambda m, k=key: f"{k}: {m}")
    torch.testing.assert_close(torch.stack(shares).sum(0), means, rtol=1e-5, atol=0)


@backends
@pytest.mark.parametrize("first", [0, 1, 2**34 - 8, 2**34 - 6, 2**36])
def test_the_noise_is_that_of_the_numbers(first: int, backend: str) -> None:
    """With no sensitivity at all the gate is open: what comes to w = 0 is the noise alone."""
    numel, scale = at_most(300, 4096 + 30), 0.5
    tensors = {
        key: torch.zeros_like(t) for key, t in tensors_of((numel,), *STORAGES["float32"], DEVICE).items()
    }
    h = Hyperparameters(noise_scale=scale, seed=2**40 + 9)
    step(backend, tensors, Shard(first, (1,), 2**63 - 1), h, torch.ones(2, device=DEVICE))
    z = philox_normal(2**40 + 9, 5, 3, numel, offset=first)
    torch.testing.assert_close(tensors["params"].cpu().double() / scale, z, rtol=0, atol=2e-3)
