"""Philox4x32-7 in torch integer operations: the bits that every backend must reproduce.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11. A counter of
four 32-bit words and a key of two words give four random words. There is no state, so any backend, thread or
shard can draw the noise of any element independently.
"""

import math

import torch
from torch import Tensor

ROUNDS = 7  # the fewest that pass BigCrush (SC'11, table 2)
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # golden ratio, sqrt(3) - 1
MASK32 = 0xFFFFFFFF
ROUNDING_BIT = 0x80000000  # set in the counter's second word, it selects the stream that rounds

Word = Tensor | int


def _mulhilo(a: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """The high and low words of a 32 x 32 bit product. int64 may wrap; the masks remove its sign."""
    product = a * multiplier
    return (product >> 32) & MASK32, product & MASK32


def philox4x32(
    counter: tuple[Word, Word, Word, Word], key: tuple[int, int], rounds: int = ROUNDS
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words for each counter.

    Args:
        counter: four words, each an int or an int64 tensor with values in [0, 2^32); they broadcast.
        key: two 32-bit words.
        rounds: 7 is this package's generator; most libraries use 10.

    Returns:
        Four int64 tensors with values in [0, 2^32).
    """
    device = next((word.device for word in counter if isinstance(word, Tensor)), None)
    c0, c1, c2, c3 = (torch.as_tensor(word, dtype=torch.int64, device=device) for word in counter)
    k0, k1 = key
    for _ in range(rounds):
        hi0, lo0 = _mulhilo(c0, MULTIPLIERS[0])
        hi1, lo1 = _mulhilo(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + WEYL[0]) & MASK32, (k1 + WEYL[1]) & MASK32
    return c0, c1, c2, c3


def random_words(
    seed: int,
    step: Word,
    tensor_id: int,
    numel: int,
    offset: int = 0,
    *,
    rounding: bool = False,
    device: torch.device | str | None = None,
) -> Tensor:
    """The words for the groups of four elements that cover elements `offset` to `offset + numel`.

    Args:
        seed: the key, 0 <= seed < 2^64.
        step: the tensor's step count t; an int64 tensor is used as it is, without a sync.
        tensor_id: the tensor's position among the optimizer's parameters.
        numel: number of elements.
        offset: the first element's row-major index in the unsharded tensor.
        rounding: True selects the second stream, whose bits are for stochastic rounding.

    Returns:
        int64, [groups, 4]: row j holds x0..x3 for element 4 (offset // 4 + j) and the three after it.
    """
    first, last = offset // 4, (offset + numel + 3) // 4
    groups = torch.arange(first, last, dtype=torch.int64, device=device)
    return words_of_groups(seed, step, tensor_id, groups, rounding=rounding)


def words_of_groups(
    seed: int, step: Word, tensor_id: int, groups: Tensor, *, rounding: bool = False
) -> Tensor:
    """The words for any groups (int64): their shape with a last dimension of 4 added."""
    high = (groups >> 32) | (ROUNDING_BIT if rounding else 0)
    words = philox4x32((groups & MASK32, high, tensor_id, step), (seed & MASK32, seed >> 32))
    return torch.stack(torch.broadcast_tensors(*words), dim=-1)


def normals(words: Tensor) -> Tensor:
    """Box-Muller in float64: random words [..., 4] to standard normals [..., 4]."""
    uniform = (words.to(torch.float64) + 0.5) * 2.0**-32
    radius = torch.sqrt(-2.0 * torch.log(uniform[..., 0::2]))
    angle = 2.0 * math.pi * uniform[..., 1::2]
    return torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), -1).flatten(-2)
