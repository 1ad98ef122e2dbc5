"""Avalanche test: if one bit of seed, step, tensor or element changes, each bit of the words changes with
probability 1/2."""

from typing import TypedDict

import numpy as np
import torch
from scipy import stats

from pats_kernels.philox import philox4x32

# The counter's four words and the key's two. The second word also has the bit that asks for rounding bits.
WORDS = ("element, low", "element, high and rounding", "tensor", "step", "seed, low", "seed, high")


class Avalanche(TypedDict):
    """`cells`: the number of pairs of an input bit and one of the 128 output bits. `p`: p-value of the worst
    cell's deviation, times `cells`. `p_of_each_word`: p-value of the share of output bits that change when
    a bit of this word changes."""

    trials: int
    cells: int
    least_share: float
    greatest_share: float
    p: float
    share_of_each_word: dict[str, float]
    p_of_each_word: dict[str, float]


def measure(trials: int, seed: int) -> Avalanche:
    """Flips each of the 192 bits of random counters and keys in turn."""
    random = np.random.default_rng(seed)
    inputs = [torch.from_numpy(random.integers(0, 2**32, trials, dtype=np.int64)) for _ in WORDS]
    before = _words(inputs)
    shares: list[list[float]] = []
    for which in range(len(WORDS)):
        for bit in range(32):
            flipped = [value ^ (1 << bit) if i == which else value for i, value in enumerate(inputs)]
            changed = before ^ _words(flipped)
            shares.append([((changed >> b) & 1).double().mean(dim=1).tolist() for b in range(32)])  # type: ignore[arg-type]
    cells = np.array(shares).reshape(len(WORDS), 32, -1)
    counts = np.rint(cells * trials).astype(np.int64)
    worst = int(np.abs(counts - trials / 2).max() + trials / 2)
    p = 2 * stats.binom.sf(worst - 1, trials, 0.5) * cells.size
    of_words = {name: counts[i].sum() for i, name in enumerate(WORDS)}
    total = trials * cells[0].size
    return {
        "trials": trials,
        "cells": cells.size,
        "least_share": float(cells.min()),
        "greatest_share": float(cells.max()),
        "p": float(min(1.0, p)),
        "share_of_each_word": {name: float(count / total) for name, count in of_words.items()},
        "p_of_each_word": {
            name: float(2 * stats.norm.sf(abs(count - total / 2) / (total / 4) ** 0.5))
            for name, count in of_words.items()
        },
    }


def _words(inputs: list[torch.Tensor]) -> torch.Tensor:
    """The words, [4, trials]. The key's words are tensors here, which philox4x32 handles like numbers."""
    c0, c1, c2, c3, k0, k1 = inputs
    return torch.stack(philox4x32((c0, c1, c2, c3), (k0, k1)))  # type: ignore[arg-type]
