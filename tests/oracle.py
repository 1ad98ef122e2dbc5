"""The contract in NumPy and float64, for tests to compare with. It shares no line with the package.

All functions work on flat arrays, one entry per element, in row-major order.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Words = NDArray[np.uint64]

LOW = np.uint64(0xFFFFFFFF)
HIGH_SHIFT = np.uint64(32)


class Hyper(NamedTuple):
    """One tensor's hyperparameters, its number in the noise's counter, and its step."""

    noise_scale: float = 1e-3
    gamma: float = 1.0
    sens_betas: tuple[float, float] = (0.85, 0.95)
    uncertainty: str = "product"
    normalization: str = "delayed"
    stochastic_rounding: bool = True
    seed: int = 0
    step: int = 1
    tensor_id: int = 0


class State(NamedTuple):
    """One tensor's weights, averages and the float32 means of the averages."""

    w: Array
    S: Array
    U: Array | None
    stats: Array


def philox(counter: Words, key: tuple[int, int], rounds: int = 7) -> Words:
    """Philox4x32 (Salmon et al., SC'11) of counters [..., 4], words in uint64."""
    x0, x1, x2, x3 = (counter[..., j].astype(np.uint64) for j in range(4))
    for r in range(rounds):
        k0 = np.uint64((key[0] + r * 0x9E3779B9) % 2**32)
        k1 = np.uint64((key[1] + r * 0xBB67AE85) % 2**32)
        left, right = np.uint64(0xD2511F53) * x0, np.uint64(0xCD9E8D57) * x2  # < 2^64: no overflow
        x0 = (right >> HIGH_SHIFT) ^ x1 ^ k0
        x1 = right & LOW
        x2 = (left >> HIGH_SHIFT) ^ x3 ^ k1
        x3 = left & LOW
    return np.stack((x0, x1, x2, x3), axis=-1)


def groups(h: Hyper, index: NDArray[np.int64], rounding: bool = False) -> tuple[Words, NDArray[np.int64]]:
    """The four words of each element's group of four, and the element's place in its group."""
    number, inverse = np.unique(index // 4, return_inverse=True)
    number = number.astype(np.uint64)
    top = np.uint64(2**31 if rounding else 0)
    fixed = [np.full_like(number, word) for word in (h.tensor_id, h.step)]
    counter = np.stack((number & LOW, (number >> HIGH_SHIFT) | top, *fixed), axis=-1)
    return philox(counter, (h.seed % 2**32, h.seed // 2**32))[inverse], index % 4


def words(h: Hyper, index: NDArray[np.int64], rounding: bool = False) -> Words:
    """x[i mod 4] of each element i."""
    four, place = groups(h, index, rounding)
    return np.take_along_axis(four, place[:, None], axis=1)[:, 0]


def normal(h: Hyper, index: NDArray[np.int64]) -> Array:
    """z of each element i."""
    four, place = groups(h, index)
    uniform = (four.astype(np.float64) + 0.5) / 2.0**32
    first = np.where(place < 2, 0, 2)[:, None]
    radius = np.sqrt(-2 * np.log(np.take_along_axis(uniform, first, axis=1)[:, 0]))
    angle = 2 * np.pi * np.take_along_axis(uniform, first + 1, axis=1)[:, 0]
    return radius * np.where(place % 2 == 0, np.cos(angle), np.sin(angle))


def round_bfloat16(x: NDArray[np.float32], random: Words | None) -> NDArray[np.float32]:
    """float32 to bfloat16, kept as float32: to nearest even, or truncated after 16 random bits are added."""
    bits = x.astype(np.float32).view(np.uint32)
    if random is None:
        added = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    else:
        added = bits + random.astype(np.uint32)
    rounded = (added & np.uint32(0xFFFF0000)).view(np.float32)
    return np.where(np.isnan(x), x, rounded).astype(np.float32)


def averages(w: Array, g: Array, S: Array, U: Array | None, h: Hyper) -> tuple[Array, Array | None]:
    """Rows 1 to 3. Elements whose gradient is not finite keep their averages."""
    s = np.abs(w * g)
    finite = np.isfinite(s)
    s = np.where(finite, s, 0)
    beta_s, beta_u = h.sens_betas
    S_new = np.where(finite, beta_s * S + (1 - beta_s) * s, S)
    if U is None:
        return S_new, None
    return S_new, np.where(finite, beta_u * U + (1 - beta_u) * np.abs(s - S_new), U)


def means(S: Array, U: Array | None) -> Array:
    """The means in sens_stats, in float32."""
    return np.array([S.mean(), 0.0 if U is None else U.mean()], dtype=np.float32).astype(np.float64)


def has_statistics(stats: Array, uncertainty: str) -> bool:
    """Whether the means that row 4 divides by are in [2^-120, 2^112]."""
    divisors = {"none": stats[:1], "ucb": stats.sum(keepdims=True), "product": stats}[uncertainty]
    return bool(np.all((divisors >= 2.0**-120) & (divisors <= 2.0**112)))


def score(S: Array, U: Array | None, stats: Array, uncertainty: str) -> Array:
    """Row 4; not finite without statistics."""
    if not has_statistics(stats, uncertainty):
        return np.full_like(S, np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        if uncertainty == "none":
            return S / stats[0]
        assert U is not None
        if uncertainty == "ucb":
            return (S + U) / (stats[0] + stats[1])
        return (S / stats[0]) * (U / stats[1])


def gate(q: Array, gamma: float) -> Array:
    """Row 5."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.isfinite(q), np.tanh(np.maximum(1 / q - gamma, 0)), 0.0)


def step(state: State, g: Array, h: Hyper) -> tuple[State, int]:
    """The step of one tensor in float64, and the number of gradient elements that are not finite."""
    finite = np.isfinite(g)
    S, U = averages(state.w, g, state.S, state.U, h)
    stats = means(S, U)
    q = score(S, U, stats if h.normalization == "exact" else state.stats, h.uncertainty)
    a = np.where(finite, gate(q, h.gamma), 0)
    w = state.w + h.noise_scale * a * normal(h, np.arange(state.w.size))
    return State(w, S, U, stats), int((~finite).sum())


# ---- AdamW (Loshchilov, Hutter, ICLR 2019), as torch.optim.AdamW documents it


class AdamW(NamedTuple):
    """One tensor's hyperparameters of AdamW, and the source of its sensitivity."""

    lr: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    maximize: bool = False
    sensitivity: str = "ema"


def moments(g: Array, m: Array, v: Array, a: AdamW) -> tuple[Array, Array]:
    g = -g if a.maximize else g
    return a.betas[0] * m + (1 - a.betas[0]) * g, a.betas[1] * v + (1 - a.betas[1]) * g**2


def corrected(m: Array, v: Array, a: AdamW, t: int) -> tuple[Array, Array]:
    """The moments without their bias towards 0."""
    return m / (1 - a.betas[0] ** t), v / (1 - a.betas[1] ** t)


def adamw(w: Array, m_hat: Array, v_hat: Array, a: AdamW) -> Array:
    return w - a.lr * a.weight_decay * w - a.lr * m_hat / (np.sqrt(v_hat) + a.eps)
