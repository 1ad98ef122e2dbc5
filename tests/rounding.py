"""Puts any float32 into each of the stores that a step writes, to check its rounding to the bit.

Hyperparameters are chosen so that the value before rounding is known exactly: products with 1, 1/2 and 2, and
sums with 0. The value that a kernel rounds is `Store.value(x)`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import oracle
import torch
from harness import filled, flat
from numpy.typing import NDArray
from oracle import Hyper
from torch import Tensor, nn

from pats_kernels import PATSAdamW, pats_step_

Singles = NDArray[np.float32]
LOW, HIGH = np.uint64(0), np.uint64(16)  # the first bits of a random word that round w, and the state


def on(device: str, tensor: Tensor) -> Tensor:
    """The tensor on another device, with its offset and strides; `Tensor.to` would close the holes."""
    storage = tensor.untyped_storage().to(device=torch.device(device))
    there = torch.empty(0, dtype=tensor.dtype, device=device)
    return there.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


@dataclass
class Work:
    """What to write: tensor i of `xs` with `hypers[i]`; `layout`s as in `harness`."""

    xs: list[Tensor]
    hypers: list[Hyper]
    dtype: torch.dtype = torch.bfloat16
    layout: str = "contiguous"
    device: str = "cpu"
    adamw: dict[str, Any] = field(default_factory=dict)  # PATSAdamW's form, for the stores of PATSAdamW

    def tensors(self, values: Sequence[Tensor | float], dtype: torch.dtype) -> list[Tensor]:
        made = [
            filled(self.layout, tuple(x.shape), dtype, torch.as_tensor(v))
            for x, v in zip(self.xs, values, strict=True)
        ]
        return [on(self.device, tensor) for tensor in made]

    def same(self, value: float, dtype: torch.dtype) -> list[Tensor]:
        return self.tensors([value] * len(self.xs), dtype)

    def hyper(self, name: str) -> list[Any]:
        return [getattr(h, name) for h in self.hypers]


def averages(work: Work, backend: str) -> list[list[Tensor]]:
    """s = 2 abs(x): S = 0 / 2 + s / 2, U = 0 * 0 + 1 * abs(s - S)."""
    params, grads = work.same(2.0, torch.float32), work.tensors(work.xs, torch.float32)
    sens, unc = work.same(0.0, work.dtype), work.same(0.0, work.dtype)
    pats_step_(
        params,
        grads,
        sens,
        unc,  # pyright: ignore[reportArgumentType]
        [torch.zeros(2, device=work.device) for _ in params],
        sens_betas=(0.5, 0.0),
        backend=backend,
        **{name: work.hyper(name) for name in ("seed", "step", "stochastic_rounding")},
        tensor_ids=work.hyper("tensor_id"),
    )
    return [sens, unc]


def _adamw(
    work: Work, params: list[Tensor], grads: list[Tensor], states: dict[str, list[Tensor]], **keywords: Any
) -> PATSAdamW:
    """A step from given states. A work's hypers may vary only the seed, the step and the rounding here.
    Tensor ids are the positions."""
    leaves = [nn.Parameter(param, requires_grad=False) for param in params]
    groups = [
        {"params": [leaf], "seed": h.seed, "stochastic_rounding": h.stochastic_rounding}
        for leaf, h in zip(leaves, work.hypers, strict=True)
    ]
    optimizer = PATSAdamW(groups, weight_decay=0.0, **keywords | work.adamw)
    for i, (leaf, grad) in enumerate(zip(leaves, grads, strict=True)):
        leaf.grad = grad
        step = torch.tensor(work.hypers[i].step - 1.0, device=work.device)
        optimizer.state[leaf] = {"step": step} | {key: tensors[i] for key, tensors in states.items()}
    optimizer.step()
    return optimizer


def moments(work: Work, backend: str) -> list[list[Tensor]]:
    """m = 0 + 1 (x - 0), v = 0 * 0 + 1 x x."""
    states = {"exp_avg": work.same(0.0, work.dtype), "exp_avg_sq": work.same(0.0, work.dtype)}
    params, grads = work.same(1.0, torch.float32), work.tensors(work.xs, torch.float32)
    keywords = {"lr": 0.0, "betas": (0.0, 0.0), "state_dtype": work.dtype}
    _adamw(work, params, grads, states, backend=backend, **keywords)
    return list(states.values())


def weights(work: Work, backend: str) -> list[list[Tensor]]:
    """m = x + (0 - x) / 2, and w = 0 - 2 m / (sqrt(0) + 1); after this many steps 1 - b_1^t is 1."""
    assert all(h.step > 1000 for h in work.hypers)
    states = {"exp_avg": work.tensors(work.xs, torch.float32), "exp_avg_sq": work.same(0.0, torch.float32)}
    params, grads = work.same(0.0, work.dtype), work.same(0.0, work.dtype)
    keywords = {"lr": 2.0, "eps": 1.0, "betas": (0.5, 0.5), "state_dtype": torch.float32}
    optimizer = _adamw(work, params, grads, states, backend=backend, **keywords)
    return [[param for group in optimizer.param_groups for param in group["params"]]]


@dataclass(frozen=True)
class Store:
    """One place that a step writes: how to write it, what is rounded there, and with which bits."""

    write: Callable[[Work, str], list[list[Tensor]]]
    values: tuple[Callable[[Singles], Singles], ...]
    half: np.uint64


def _plus_zero(x: Singles) -> Singles:
    return x + np.float32(0)


STORES = {
    "averages": Store(averages, (np.abs, np.abs), HIGH),
    "moments": Store(moments, (_plus_zero, np.square), HIGH),
    "weights": Store(weights, (lambda x: np.float32(0) - x,), LOW),
}


def random_bits(h: Hyper, numel: int, half: np.uint64) -> oracle.Words | None:
    """The 16 random bits of each element; None if it rounds to nearest."""
    if not h.stochastic_rounding:
        return None
    words = oracle.words(h, np.arange(numel), rounding=True)
    return (words >> half) & np.uint64(0xFFFF)


def stored(values: Singles, dtype: torch.dtype, bits: oracle.Words | None) -> Singles:
    """The values rounded to the storage dtype; float16 always to nearest."""
    if dtype == torch.float16:
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    return oracle.round_bfloat16(values, bits) if dtype == torch.bfloat16 else values


def assert_bits(got: Tensor, expected: Singles, what: str) -> None:
    """Compares to the bit; any NaN equals any NaN."""
    found = flat(got.cpu()).astype(np.float32)
    same = (found.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(found) & np.isnan(expected))
    if not same.all():
        i = int(np.flatnonzero(~same)[0])
        raise AssertionError(
            f"{what}: {(~same).sum()} of {same.size} elements; the first, {i}, is {found[i]!r} "
            f"instead of {expected[i]!r}"
        )


def check(store: str, work: Work, backend: str, of: Callable[[Hyper], Hyper] = lambda h: h) -> None:
    """Raises AssertionError if a store does not hold its value, rounded with the bits of `of(h)`."""
    chosen = STORES[store]
    with np.errstate(over="ignore", invalid="ignore"):
        for value, tensors in zip(chosen.values, chosen.write(work, backend), strict=True):
            for i, (x, h, got) in enumerate(zip(work.xs, work.hypers, tensors, strict=True)):
                exact = value(x.reshape(-1).numpy())
                bits = random_bits(of(h), x.numel(), chosen.half)
                assert_bits(got, stored(exact, work.dtype, bits), f"{store}, tensor {i}")
