"""Digests of the results of a backend's steps. `python tests/digests.py BACKEND` prints them as JSON.

It needs its own process, because the instruction set is chosen once per process.
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from pats_kernels import PATSAdamW, pats_step_

SHAPES = [(4096 + 700,), (37, 29), (3,)]  # many blocks and a tail, another shape, less than a group
STORAGES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float64, torch.float64),
]


def digest(tensors: list[Tensor]) -> str:
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def drawn(dtype: torch.dtype, step: int, strided: bool = False) -> list[Tensor]:
    """Cubed normals, which span many magnitudes. `strided`: every second element of a longer tensor."""
    random = torch.Generator().manual_seed(step)
    values = [torch.randn(shape, generator=random, dtype=torch.float64).pow(3) for shape in SHAPES]
    if not strided:
        return [value.to(dtype) for value in values]
    return [torch.empty(*v.shape, 2, dtype=dtype)[..., 1].copy_(v) for v in values]


def pats(
    backend: str, dtype: torch.dtype, state: torch.dtype, strided: bool, **keywords: Any
) -> list[Tensor]:
    params = drawn(dtype, 0, strided)
    sens = [torch.zeros_like(p, dtype=state) for p in params]
    unc = [None if keywords["uncertainty"] == "none" else torch.zeros_like(s) for s in sens]
    stats = [torch.zeros(2) for _ in params]
    for step in range(1, 4):
        settings = {"step": step, "tensor_ids": list(range(len(params))), "noise_scale": 1e-2, **keywords}
        pats_step_(params, drawn(dtype, step), sens, unc, stats, backend=backend, **settings)
    return [*params, *sens, *(u for u in unc if u is not None), *stats]


def adamw(backend: str, dtype: torch.dtype, strided: bool, **keywords: Any) -> list[Tensor]:
    params = [nn.Parameter(p) for p in drawn(dtype, 0, strided)]
    optimizer = PATSAdamW(params, lr=1e-2, noise_scale=1e-2, backend=backend, **keywords)
    for step in range(1, 4):
        for param, grad in zip(params, drawn(dtype, step), strict=True):
            param.grad = grad
        optimizer.step()
    return [*params, *(t for p in params for t in optimizer.state[p].values())]


def digests(backend: str) -> Iterator[tuple[str, str]]:
    for (dtype, state), strided in product(STORAGES, (False, True)):
        name = f"{dtype}{', strided' if strided else ''}"
        for normalization, uncertainty in product(("delayed", "exact"), ("product", "ucb", "none")):
            variant = {"normalization": normalization, "uncertainty": uncertainty}
            yield f"pats, {name}, {variant}", digest(pats(backend, dtype, state, strided, **variant))
            for sensitivity in ("ema", "moments"):
                left = adamw(backend, dtype, strided, sensitivity=sensitivity, **variant)
                yield f"{sensitivity}, {name}, {variant}", digest(left)


if __name__ == "__main__":
    print(json.dumps(dict(digests(sys.argv[1]))))
