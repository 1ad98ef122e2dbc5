"""Floating point as the GPU has it, in NumPy.

Sums, products and conversions of IEEE 754 are NumPy's. What is not: results that are NaN have the GPU's one
pattern, `.ftz` flushes subnormal numbers, a fused multiply-add rounds once, and approximations may be made
to err by what the PTX ISA allows them.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

SMALLEST_NORMAL = {np.dtype(np.float32): np.float32(2.0**-126), np.dtype(np.float64): np.float64(2.0**-1022)}
CANONICAL_NAN = {
    np.dtype(np.float16): np.uint16(0x7FFF).view(np.float16),
    np.dtype(np.float32): np.uint32(0x7FFFFFFF).view(np.float32),
    np.dtype(np.float64): np.uint64(0xFFF8000000000000).view(np.float64),
}

# The errors that the ISA (9.7.3 and 9.7.4) allows: a part "of" the result, in "ulp" of it, or "absolute".
# lg2: 2^-22 absolute where its argument is in (0.5, 2), elsewhere 2^-22 of the result.
ERRORS: dict[str, tuple[str, float]] = {
    "rcp": ("ulp", 1),
    "sqrt": ("of", 2.0**-23),
    "rsqrt": ("of", 2.0**-22.9),
    "sin": ("absolute", 2.0**-20.5),  # in [-2 pi, 2 pi]
    "cos": ("absolute", 2.0**-20.5),
    "lg2": ("lg2", 2.0**-22),
    "ex2": ("ulp", 2),
    "tanh": ("of", 2.0**-11),
    "div": ("ulp", 2),
}


def canonical(x: Array) -> Array:
    """With the GPU's NaN in place of any other: in place."""
    nan = np.isnan(x)
    if nan.any():
        x[nan] = CANONICAL_NAN[x.dtype]
    return x


def flushed(x: Array) -> Array:
    """Subnormal numbers as zeros of their sign."""
    return np.where(np.abs(x) < SMALLEST_NORMAL[x.dtype], np.copysign(x.dtype.type(0), x), x)


def fma(a: Array, b: Array, c: Array) -> Array:
    """a b + c, rounded once."""
    return _fma64(a, b, c) if np.result_type(a, b, c) == np.float64 else _fma32(a, b, c)


def _fma32(a: Array, b: Array, c: Array) -> Array:
    """In float64 the product is exact. The sum's rounding there followed by that to float32 could only differ
    from one rounding where the float64 sum lies half way between two float32: there its error decides."""
    product, c = a.astype(np.float64) * b, np.asarray(c, np.float64)
    total = product + c
    result = total.astype(np.float32)
    doubtful = (total.view(np.uint64) & np.uint64(0x1FFFFFFF)) == np.uint64(0x10000000)
    doubtful |= np.abs(total) < 2.0**-126  # subnormal in float32, which has fewer bits there
    if doubtful.any():
        p, q, s = (np.broadcast_to(x, total.shape)[doubtful] for x in (product, c, total))
        result[doubtful] = _to_odd(s, _sum_error(p, q, s)).astype(np.float32)
    return result


def _sum_error(a: Array, b: Array, total: Array) -> Array:
    """a + b - total, exactly (Knuth)."""
    virtual = total - a
    return (a - (total - virtual)) + (b - virtual)


def _to_odd(total: Array, error: Array) -> Array:
    """total + error with a last bit that tells whether anything was lost (Boldo and Melquiond)."""
    bits = total.view(np.int64)
    inexact = (error != 0) & np.isfinite(total) & (bits & 1 == 0)
    up = (error > 0) == (total > 0)
    return np.where(inexact, bits + np.where(up, 1, -1), bits).view(np.float64)


def _product_error(a: Array, b: Array, product: Array) -> Array:
    """a b - product, exactly where nothing overflows (Veltkamp, Dekker)."""

    def halves(x: Array) -> tuple[Array, Array]:
        scaled = x * 134217729.0  # 2^27 + 1
        high = scaled - (scaled - x)
        return high, x - high

    (ah, al), (bh, bl) = halves(a), halves(b)
    return ((ah * bh - product) + ah * bl + al * bh) + al * bl


def _fma64(a: Array, b: Array, c: Array) -> Array:
    """Boldo and Melquiond, Emulation of FMA and correctly rounded sums (2008). Where the product or the sum
    leaves the range in which that is exact, or is nothing, the plain expression: it is then as exact."""
    a, b, c = np.broadcast_arrays(*(np.asarray(x, np.float64) for x in (a, b, c)))
    high = a * b
    plain = high + c
    low = _product_error(a, b, high)
    t = c + low
    t_error = _sum_error(c, low, t)
    v = high + t
    v_error = _sum_error(high, t, v)
    z = t_error + v_error
    z = _to_odd(z, _sum_error(t_error, v_error, z))
    exact = v + z
    magnitude = np.abs(high)
    inside = (magnitude > 2.0**-900) & (magnitude < 2.0**990) & (np.maximum(np.abs(a), np.abs(b)) < 2.0**990)
    return np.where(inside & (np.abs(c) < 2.0**1000), exact, plain)


def approximation(
    name: str, function: Callable[..., Array], arguments: list[Array], seed: int | None
) -> Array:
    """function(*arguments) to the nearest float32, or, with a seed, off by all that the ISA allows, up or
    down as arguments and seed decide: the same for the same, as on a GPU."""
    y = function(*(x.astype(np.float64) for x in arguments))
    if seed is not None:
        kind, size = ERRORS[name]
        sign = _signs(arguments, seed)
        if kind == "of":
            y = y * (1 + sign * size)
        elif kind == "absolute":
            y = y + sign * size
        elif kind == "lg2":
            near = (arguments[0] > 0.5) & (arguments[0] < 2)
            y = y + sign * size * np.where(near, 1, np.abs(y))
        else:
            nearest = y.astype(np.float32)
            distance = np.abs(np.spacing(nearest)).astype(np.float64) * size
            y = np.where(np.isfinite(nearest) & (nearest != 0), y + sign * distance, y)
    return np.asarray(y, np.float32)


def _signs(arguments: list[Array], seed: int) -> Array:
    """-1 or 1, a hash of the arguments' bits."""
    mixed = np.uint32(seed * 0x9E3779B9 & 0xFFFFFFFF)
    for x in arguments:
        mixed = (np.ascontiguousarray(x).view(np.uint32) ^ mixed) * np.uint32(0x85EBCA6B)
        mixed = (mixed ^ mixed >> np.uint32(13)) * np.uint32(0xC2B2AE35)
        mixed = mixed ^ mixed >> np.uint32(16)
    return np.where(mixed & 1, 1.0, -1.0)


def to_bfloat16(x: Array) -> Array:
    """float32 to the nearest bfloat16, as its bits."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits.astype(np.uint64) + np.uint64(0x7FFF) + ((bits >> 16) & 1)) >> np.uint64(16)
    return np.where(np.isnan(x), np.uint64(0x7FFF), rounded).astype(np.uint16)
