"""Builds tensors of all shapes and strides, steps a backend, and compares every number with the oracle.

Each step is checked from the state it really started with. So a tolerance covers the rounding of one step,
and errors do not accumulate. Rounding to a storage dtype is monotone: if a value computed in float32 is in
[lo, hi], the stored value is in [round(lo), round(hi)]. This one criterion covers every dtype, with rounding
to nearest and with the known random bits of stochastic rounding.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np
import oracle
import torch
from conftest import INTERPRETED
from oracle import Array, Hyper
from torch import Tensor

from pats_kernels import pats_step_

ROUNDOFF = {torch.float64: 2.0**-53}  # of the arithmetic, by parameter dtype; all others compute in float32
ROUNDOFF_32 = 2.0**-24
TINY = 2.0**-126  # below it float32 is subnormal, and a backend may flush to zero


class Tolerance(NamedTuple):
    """The allowed error of a backend's approximations, besides rounding.

    Attributes:
        z: absolute, of the normals. The contract allows 2e-3. The reference rounds the exact value to
            float32: at most 2^-24 * 6.8, the largest |z| there is.
        gate: absolute, of the open gate. 2^-11 is what a GPU's tanh.approx promises, relative to at most 1;
            the reference's is tanhf, right to a few 2^-24.
    """

    z: float = 2e-3
    gate: float = 1e-3


TOLERANCES = {"eager": Tolerance(z=5e-7, gate=5e-7)} | dict.fromkeys(("cpp", "triton", "cuda"), Tolerance())

Layout = Callable[[tuple[int, ...], torch.dtype], Tensor]


def _misaligned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    numel = int(np.prod(shape))
    return torch.empty(numel + 1, dtype=dtype)[1:].view(shape)


def _transposed(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape[::-1], dtype=dtype).permute(tuple(range(len(shape)))[::-1])


def _channels_last(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Strides with the second dimension innermost; unchanged for fewer than three dimensions."""
    if len(shape) < 3:
        return torch.empty(shape, dtype=dtype)
    return torch.empty((shape[0], *shape[2:], shape[1]), dtype=dtype).movedim(-1, 1)


def _holes(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Strides for every second column, with two unused columns at the end of each row."""
    if not shape:
        return _misaligned(shape, dtype)
    return torch.empty((*shape[:-1], 2 * shape[-1] + 2), dtype=dtype)[..., 1:-1:2]


def _padded(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Strides of contiguous, aligned rows, with a gap after each."""
    if not shape:
        return torch.empty(shape, dtype=dtype)
    return torch.empty((*shape[:-1], shape[-1] + 16), dtype=dtype)[..., : shape[-1]]


LAYOUTS: dict[str, Layout] = {
    "contiguous": lambda shape, dtype: torch.empty(shape, dtype=dtype),
    "misaligned": _misaligned,
    "transposed": _transposed,
    "channels_last": _channels_last,
    "holes": _holes,
    "padded": _padded,
}


@dataclass
class Case:
    """The tensors and settings of a test. A hyperparameter is one value, or a list with one per tensor."""

    shapes: list[tuple[int, ...]] = field(default_factory=lambda: [(5000,)])
    param: str = "contiguous"
    grad: str = "contiguous"
    state: str | None = None  # None: as PATS allocates it
    dtype: torch.dtype = torch.float32
    state_dtype: torch.dtype | None = None
    noise_scale: Any = 1e-3
    gamma: Any = 1.0
    sens_betas: Any = (0.85, 0.95)
    uncertainty: Any = "product"
    normalization: Any = "delayed"
    stochastic_rounding: bool = True
    seed: Any = 20240607
    tensor_ids: list[int] | None = None
    first_step: int = 1
    steps: int = 2 if INTERPRETED else 3  # delayed normalization adds noise from the second step on
    poison: tuple[float, ...] = ()  # values put into some gradient elements

    def hyper(self, i: int, step: int) -> Hyper:
        columns = {f.name: getattr(self, f.name) for f in fields(self) if f.name in Hyper._fields}
        own = {name: value[i] if isinstance(value, list) else value for name, value in columns.items()}
        return Hyper(**own, step=step, tensor_id=self.ids()[i])

    def ids(self) -> list[int]:
        return self.tensor_ids if self.tensor_ids is not None else list(range(len(self.shapes)))


@dataclass
class Work:
    """The tensors of a case, as `pats_step_` takes them."""

    params: list[Tensor]
    grads: list[Tensor]
    sens: list[Tensor]
    unc: list[Tensor | None]
    stats: list[Tensor]

    def tensors(self) -> list[Tensor]:
        return [*self.params, *self.grads, *self.sens, *(u for u in self.unc if u is not None), *self.stats]

    def written(self) -> list[Tensor]:
        return [*self.params, *self.sens, *(u for u in self.unc if u is not None), *self.stats]


def filled(layout: str, shape: tuple[int, ...], dtype: torch.dtype, values: Tensor) -> Tensor:
    """`values` in the layout's memory. The holes are NaN, which shows if a backend reads or averages them."""
    tensor = LAYOUTS[layout](shape, dtype)
    torch.empty(0, dtype=dtype).set_(tensor.untyped_storage()).fill_(torch.nan)
    return tensor.copy_(values)


def gradients(case: Case, step: int) -> list[Tensor]:
    """Cubed normals. Sensitivities span many orders of magnitude, so gates are open, closed and between."""
    random = torch.Generator().manual_seed(step)
    grads = []
    for shape in case.shapes:
        values = torch.randn(shape, generator=random, dtype=torch.float64).pow(3)
        for k, poison in enumerate(case.poison):
            values.view(-1)[k::97] = poison
        grads.append(filled(case.grad, shape, case.dtype, values))
    return grads


def prepare(case: Case) -> Work:
    random = torch.Generator().manual_seed(0)
    normals = [torch.randn(shape, generator=random, dtype=torch.float64) for shape in case.shapes]
    params = [filled(case.param, tuple(z.shape), case.dtype, 0.05 * z) for z in normals]
    dtype = case.state_dtype or (torch.float32 if case.dtype == torch.float16 else case.dtype)

    def zeros(param: Tensor) -> Tensor:
        if case.state is None:
            return torch.zeros_like(param, dtype=dtype)
        return filled(case.state, tuple(param.shape), dtype, torch.zeros(()))

    sens = [zeros(param) for param in params]
    unc = [None if case.uncertainty == "none" else zeros(param) for param in params]
    return Work(params, [], sens, unc, [torch.zeros(2) for _ in params])


def step(
    backend: str, case: Case, work: Work, number: int, function: Callable[..., None] = pats_step_
) -> None:
    """Takes step `number` of the case with `pats_step_`, or with `reference.pats_step_`."""
    function(
        work.params,
        work.grads,
        work.sens,
        work.unc,
        work.stats,
        step=number,
        tensor_ids=case.ids(),
        seed=case.seed,
        noise_scale=case.noise_scale,
        gamma=case.gamma,
        sens_betas=case.sens_betas,
        uncertainty=case.uncertainty,
        normalization=case.normalization,
        stochastic_rounding=case.stochastic_rounding,
        backend=backend,
    )


def run(backend: str, case: Case) -> Work:
    """Takes all steps of a case, unchecked."""
    work = prepare(case)
    for number in range(case.first_step, case.first_step + case.steps):
        work.grads = gradients(case, number)
        step(backend, case, work, number)
    return work


def run_checked(
    backend: str, case: Case, tolerance: Tolerance | None = None, function: Callable[..., None] = pats_step_
) -> Work:
    """Takes all steps of a case, each compared with the oracle."""
    tolerance = tolerance or TOLERANCES[backend]
    work = prepare(case)
    for number in range(case.first_step, case.first_step + case.steps):
        work.grads = gradients(case, number)
        before = list(values(work))
        gaps = [gap.clone() for gap in holes(work)]
        step(backend, case, work, number, function)
        for i, (old, new) in enumerate(zip(before, values(work), strict=True)):
            dtypes = (case.dtype, work.sens[i].dtype)
            check_step(old, new, case.hyper(i, number), dtypes, tolerance, f"step {number}, tensor {i}")
        assert_same_bits(gaps, list(holes(work)))
    return work


class Values(NamedTuple):
    """One tensor's numbers in float64, flat, in row-major order."""

    w: Array
    g: Array
    S: Array
    U: Array | None
    stats: Array


def flat(tensor: Tensor) -> Array:
    return tensor.detach().to(torch.float64).contiguous().view(-1).numpy().copy()


def values(work: Work) -> Iterator[Values]:
    for w, g, S, U, stats in zip(work.params, work.grads, work.sens, work.unc, work.stats, strict=True):
        yield Values(flat(w), flat(g), flat(S), None if U is None else flat(U), flat(stats))


def holes(work: Work) -> Iterator[Tensor]:
    """All memory between the elements of the written tensors, and all memory of the gradients."""
    for tensor in work.written():
        storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
        own = torch.zeros(storage.numel(), dtype=torch.bool)
        own.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
        yield storage[~own]
    yield from work.grads


def stored(value: Array, dtype: torch.dtype, random: oracle.Words | None) -> Array:
    """A result in float32 (float64 for float64 parameters), rounded to its storage dtype."""
    if dtype == torch.float64:
        return value
    with np.errstate(over="ignore"):
        single = value.astype(np.float32)
        if dtype == torch.float16:
            single = single.astype(np.float16)
        elif dtype == torch.bfloat16:
            single = oracle.round_bfloat16(single, random)
    return single.astype(np.float64)


def assert_between(got: Array, low: Array, high: Array, what: str) -> None:
    outside = ~((low <= got) & (got <= high))
    if outside.any():
        i = int(np.flatnonzero(outside)[0])
        raise AssertionError(
            f"{what}: {outside.sum()} of {got.size} elements; the first, {i}, is {got[i]!r}, "
            f"not in [{low[i]!r}, {high[i]!r}]"
        )


def check_step(
    old: Values,
    new: Values,
    h: Hyper,
    dtypes: tuple[torch.dtype, torch.dtype],
    tolerance: Tolerance,
    where: str,
) -> None:
    """Raises AssertionError if `new` is not the result of one step from `old`. Skips empty tensors."""
    if old.w.size == 0:
        np.testing.assert_array_equal(new.stats, old.stats)
        return
    param_dtype, state_dtype = dtypes
    u = ROUNDOFF.get(param_dtype, ROUNDOFF_32)
    low_bits, high_bits = random_halves(h, old.w.size)
    check_averages(old, new, h, state_dtype, high_bits, u, where)
    value, error = noised(old, h, tolerance, u, gates_of_averages(old, new, h, u))
    assert_between(new.w, *stored_bounds(value, error, param_dtype, low_bits), f"{where}: w")


def check_averages(
    old: Values,
    new: Values,
    h: Hyper,
    dtype: torch.dtype,
    random: oracle.Words | None,
    u: float,
    where: str,
) -> None:
    finite = np.isfinite(old.g)
    S, U = oracle.averages(old.w, old.g, old.S, old.U, h)
    error_S, error_U = averages_error(old, S, h, u)
    low, high = stored_bounds(S, np.where(finite, error_S, 0), dtype, random)
    assert_between(new.S, np.maximum(low, 0), high, f"{where}: S")
    if U is not None and new.U is not None:
        low, high = stored_bounds(U, np.where(finite, error_U, 0), dtype, random)
        assert_between(new.U, np.maximum(low, 0), high, f"{where}: U")
    check_stats(new, f"{where}: sens_stats")


def random_halves(h: Hyper, numel: int) -> tuple[oracle.Words | None, oracle.Words | None]:
    """For each element, the 16 random bits that round w, and those that round S and U."""
    if not h.stochastic_rounding:
        return None, None
    bits = oracle.words(h, np.arange(numel), rounding=True)
    return bits & np.uint64(0xFFFF), bits >> np.uint64(16)


def stored_bounds(
    value: Array, error: Array, dtype: torch.dtype, random: oracle.Words | None
) -> tuple[Array, Array]:
    return stored(value - error, dtype, random), stored(value + error, dtype, random)


Gates = tuple[Array, Array, Array]  # lower bound, value, upper bound


def gates_of_averages(old: Values, new: Values, h: Hyper, u: float) -> Gates:
    used = new.stats if h.normalization == "exact" else old.stats
    low, exact, high = (np.where(np.isfinite(old.g), a, 0) for a in gate_bounds(new.S, new.U, used, h, u))
    return low, exact, high


def noised(old: Values, h: Hyper, tolerance: Tolerance, u: float, gates: Gates) -> tuple[Array, Array]:
    """The weight with its gated noise, and its error bound.

    tolerance.z off in z; tolerance.gate and `gate_bounds` in the gate; five roundings in the product
    noise_scale * a * z (float32's noise_scale is one of them); one in the sum. Where the gate is closed, the
    weight must not change by a bit.
    """
    low, exact, high = gates
    z = oracle.normal(h, np.arange(old.w.size))
    moved = h.noise_scale * exact * z
    gate_error = np.maximum(high - exact, exact - low) + tolerance.gate
    error = h.noise_scale * (tolerance.z * high + gate_error * np.abs(z))
    error += 5 * u * np.abs(moved) + u * np.abs(old.w + moved) + TINY
    return old.w + moved, np.where(high > 0, error, 0)


def averages_error(old: Values, S: Array, h: Hyper, u: float) -> tuple[Array, Array]:
    """The rounding error of S and U, both as in the contract and as b S + (1 - b) s.

    With m = max(s, S): s is rounded once, the difference once, 1 - b once, the product once and the sum
    once, so S + (1 - b)(s - S) is off by at most u (4 (1 - b) m + m), and b S + (1 - b) s, where 1 - b
    inherits the error u b of b, by u (3 b m + 3 (1 - b) m + m); both are at most 5 u m.
    U has the same form in d = abs(s - S), plus the error of d: 5 u m from S and u s from s.
    """
    with np.errstate(invalid="ignore"):
        s = np.abs(old.w * old.g)
        m = np.maximum(s, old.S)
        d = np.maximum(np.abs(s - S), 0 if old.U is None else old.U)
        return 5 * u * m + TINY, 5 * u * d + (1 - h.sens_betas[1]) * 6 * u * m + TINY


def check_stats(new: Values, what: str) -> None:
    """The means of what is stored, to 16 roundings.

    The terms are >= 0, so d successive additions have a relative error of at most d u, and typically of about
    sqrt(d / 3) u / 2. Chunks and vector lanes leave d below 512 in the tensors here: 7 u.
    """
    expected = oracle.means(new.S, new.U)
    slack = 16 * ROUNDOFF_32 * expected + TINY
    assert_between(new.stats, expected - slack, expected + slack, what)


def gate_bounds(S: Array, U: Array | None, stats: Array, h: Hyper, u: float) -> Gates:
    """The gate with its lower and upper bound: 1/q is right to 16 roundings, and so is gamma."""
    q = oracle.score(S, U, stats, h.uncertainty)
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = 1 / q
        slack = 16 * u * (np.where(np.isinf(inverse), 0, inverse) + h.gamma)
        opens = [np.tanh(np.maximum(inverse - h.gamma + sign * slack, 0)) for sign in (-1, 0, 1)]
    low, exact, high = (np.where(np.isfinite(q), a, 0.0) for a in opens)
    return low, exact, high


def decided(old: Values, new: Values, h: Hyper, tolerance: Tolerance) -> float:
    """The share of bfloat16 weights for which `check_step` allows only one value."""
    value, error = noised(old, h, tolerance, ROUNDOFF_32, gates_of_averages(old, new, h, ROUNDOFF_32))
    low, high = stored_bounds(value, error, torch.bfloat16, random_halves(h, old.w.size)[0])
    return float(np.mean(low == high))


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    flat = (torch.empty(t.numel(), dtype=t.dtype).copy_(t.detach().reshape(-1)) for t in (a, b))
    return torch.equal(*(t.view(torch.uint8) for t in flat))


def assert_same_bits(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b)
    different = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if not same_bits(x, y)]
    assert not different, f"tensors {different} of {len(a)} differ in their bits"
