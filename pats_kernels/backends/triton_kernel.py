"""The Triton kernels: every tensor of a launch in one grid, one pass over memory.

A program works on one chunk: it looks up its tensor's row in the table, then walks the chunk in blocks.
Full blocks of aligned, contiguous tensors are read and written 16 bytes at a time without masks; tails and
misaligned tensors with masks; strided tensors through offsets worked out from the layout table. The formula
is in `_averages`, `_gate`, `_moments`, `_moments_sensitivity` and `_adamw`, where APPROX chooses PTX's
approximate instructions; without it the same lines run under Triton's interpreter and on devices that have
no PTX.

A multiplication and an addition are one operation where the source says `tl.fma`, and nowhere else: the
kernels are compiled with `enable_fp_fusion=False`, so that every path of every specialization gives the same
bits. The interpreter's `tl.fma` rounds twice, in all paths alike.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from pats_kernels.philox import MULTIPLIERS, ROUNDING_BIT, ROUNDS, WEYL
from pats_kernels.plan import OPERANDS, Column

COLUMNS = tl.constexpr(len(Column))
C_PARAM = tl.constexpr(int(Column.PARAM))
C_GRAD = tl.constexpr(int(Column.GRAD))
C_SENS = tl.constexpr(int(Column.SENS))
C_UNC = tl.constexpr(int(Column.UNC))
C_EXP_AVG = tl.constexpr(int(Column.EXP_AVG))
C_EXP_AVG_SQ = tl.constexpr(int(Column.EXP_AVG_SQ))
C_STATS = tl.constexpr(int(Column.STATS))
C_SHARE = tl.constexpr(int(Column.SHARE))
C_STEP_COUNT = tl.constexpr(int(Column.STEP_COUNT))
C_NONFINITE = tl.constexpr(int(Column.NONFINITE))
C_LR_TENSOR = tl.constexpr(int(Column.LR_TENSOR))
C_NOISE_SCALE_TENSOR = tl.constexpr(int(Column.NOISE_SCALE_TENSOR))
C_NUMEL = tl.constexpr(int(Column.NUMEL))
C_WHOLE = tl.constexpr(int(Column.WHOLE))
C_OFFSET = tl.constexpr(int(Column.OFFSET))
C_NDIM = tl.constexpr(int(Column.NDIM))
C_LAYOUT = tl.constexpr(int(Column.LAYOUT))
C_VECTOR = tl.constexpr(int(Column.VECTOR))
C_TENSOR_ID = tl.constexpr(int(Column.TENSOR_ID))
C_STEP = tl.constexpr(int(Column.STEP))
C_SEED = tl.constexpr(int(Column.SEED))
C_NOISE_SCALE = tl.constexpr(int(Column.NOISE_SCALE))
C_GAMMA = tl.constexpr(int(Column.GAMMA))
C_SENS_BETA = tl.constexpr(int(Column.SENS_BETA))
C_SENS_RATE = tl.constexpr(int(Column.SENS_RATE))
C_UNC_BETA = tl.constexpr(int(Column.UNC_BETA))
C_UNC_RATE = tl.constexpr(int(Column.UNC_RATE))
C_LR = tl.constexpr(int(Column.LR))
C_WEIGHT_DECAY = tl.constexpr(int(Column.WEIGHT_DECAY))
C_DECAY = tl.constexpr(int(Column.DECAY))
C_EPS = tl.constexpr(int(Column.EPS))
C_RATE1 = tl.constexpr(int(Column.RATE1))
C_BETA2 = tl.constexpr(int(Column.BETA2))
C_RATE2 = tl.constexpr(int(Column.RATE2))
C_LOG_BETA1 = tl.constexpr(int(Column.LOG_BETA1))
C_LOG_BETA2 = tl.constexpr(int(Column.LOG_BETA2))
C_GRAD_SIGN = tl.constexpr(int(Column.GRAD_SIGN))
LAYOUT_COLUMNS = tl.constexpr(1 + OPERANDS + 1)

PHILOX_ROUNDS = tl.constexpr(ROUNDS)
MULTIPLIER_0, MULTIPLIER_1 = tl.constexpr(MULTIPLIERS[0]), tl.constexpr(MULTIPLIERS[1])
WIDE_0, WIDE_1 = (
    tl.constexpr(f"{{ .reg .b64 p; mul.wide.u32 p, $2, {m}; mov.b64 {{$1, $0}}, p; }}") for m in MULTIPLIERS
)
WEYL_0, WEYL_1 = tl.constexpr(WEYL[0]), tl.constexpr(WEYL[1])
ROUNDING = tl.constexpr(ROUNDING_BIT)

# What kernels are specialized for.
PATS, PATS_ADAMW, MOMENTS_ADAMW, ADAMW = (tl.constexpr(i) for i in range(4))  # the forms: csrc/table.h
PRODUCT, UCB, NONE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
ONE_PASS, AVERAGES, NOISE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # the phases: csrc/table.h
FULL, MASKED, STRIDED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


# ---- functions of one number: PTX's approximation, or what every device and the interpreter have


@triton.jit
def _ptx(INSTRUCTION: tl.constexpr, x):
    return tl.inline_asm_elementwise(INSTRUCTION + " $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def _minus_log2(x, APPROX: tl.constexpr):
    """Of x in (0, 1]: never below 0, where by lg2.approx's documented error it might be as x nears 1."""
    if APPROX:
        instructions: tl.constexpr = "lg2.approx.ftz.f32 $0, $1; abs.f32 $0, $0;"
        return tl.inline_asm_elementwise(instructions, "=f,f", [x], tl.float32, True, 1)
    else:
        return -tl.log2(x)


@triton.jit
def _sqrt(x, APPROX: tl.constexpr):
    return _ptx("sqrt.approx.ftz.f32", x) if APPROX else tl.sqrt(x)


@triton.jit
def _cos(x, APPROX: tl.constexpr):
    return _ptx("cos.approx.ftz.f32", x) if APPROX else tl.cos(x)


@triton.jit
def _sin(x, APPROX: tl.constexpr):
    return _ptx("sin.approx.ftz.f32", x) if APPROX else tl.sin(x)


@triton.jit
def _reciprocal(x, APPROX: tl.constexpr):
    return _ptx("rcp.approx.ftz.f32", x) if APPROX else 1.0 / x


@triton.jit
def _exact_reciprocal(x):
    return tl.div_rn(1.0, x) if x.dtype == tl.float32 else 1.0 / x


@triton.jit
def _tanh(x, APPROX: tl.constexpr):
    """tanh(x), infinity included. A NaN, a gate without statistics, stays: tl.minimum would make it 20."""
    if APPROX:
        return _ptx("tanh.approx.f32", x)
    return 1.0 - 2.0 / (tl.exp(2.0 * tl.where(x > 20.0, 20.0, x)) + 1.0)


@triton.jit
def _is_statistic(mean):
    """reference.py, LEAST_MEAN: the means in which float32 can tell who is below."""
    return (mean >= 2.0**-120) & (mean <= 2.0**112)


@triton.jit
def _multiply_add(x, FACTOR: tl.constexpr, ADDEND: tl.constexpr):
    """x FACTOR + ADDEND, rounded once. To tl.fma Python's numbers are float32, beside float64 too."""
    return tl.fma(x, tl.full((), FACTOR, x.dtype), tl.full((), ADDEND, x.dtype))


@triton.jit
def _negative(x):
    """The sign of an instruction's operand; Triton's own -x is 0 - x, which is an instruction by itself."""
    return x * -1.0


# ---- random numbers


@triton.jit
def _mulhilo(a, MULTIPLIER: tl.constexpr, INSTRUCTION: tl.constexpr, APPROX: tl.constexpr):
    """One widening multiply: its high and its low word. Left to itself, LLVM takes some of them apart."""
    if APPROX:
        return tl.inline_asm_elementwise(INSTRUCTION, "=r,=r,r", [a], (tl.uint32, tl.uint32), True, 1)
    else:
        product = a.to(tl.uint64) * MULTIPLIER
        return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def _philox(group_low, group_high, tensor_id, step, seed, APPROX: tl.constexpr):
    """Four words for each group of four elements; what is the same for all groups stays a scalar."""
    c0, c1, c2, c3 = group_low, group_high, tensor_id, step
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(PHILOX_ROUNDS):
        hi0, lo0 = _mulhilo(c0, MULTIPLIER_0, WIDE_0, APPROX)
        hi1, lo1 = _mulhilo(c2, MULTIPLIER_1, WIDE_1, APPROX)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0 = k0 + tl.full((), WEYL_0, tl.uint32)
        k1 = k1 + tl.full((), WEYL_1, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _sum_groups(x, BLOCK: tl.constexpr):
    """Sums of four neighbours, which one thread holds: fewer accumulators, more threads at a time."""
    return tl.sum(tl.reshape(x, (BLOCK // 4, 4)), axis=1)


@triton.jit
def _box_muller(x0, x1, FLOAT: tl.constexpr, APPROX: tl.constexpr):
    uniform = _multiply_add(x0.to(FLOAT), 2.3283064365386963e-10, 1.1641532182693481e-10)
    # Signed, so that the angle is in [-pi, pi), where sin.approx and cos.approx are at their best.
    signed = x1.to(tl.int32, bitcast=True).to(FLOAT)
    angle = _multiply_add(signed, 1.4629180792671596e-09, 7.314590396335798e-10)
    radius = _sqrt(1.3862943611198906 * _minus_log2(uniform, APPROX), APPROX)
    return radius * _cos(angle, APPROX), radius * _sin(angle, APPROX)


@triton.jit
def _draw_group(
    group_low,
    group_high,
    tensor_id,
    step,
    seed,
    NORMAL: tl.constexpr,
    FLOAT: tl.constexpr,
    APPROX: tl.constexpr,
):
    """The four words or normals of each group, [groups, 2, 2] in the order of its elements."""
    x0, x1, x2, x3 = _philox(group_low, group_high, tensor_id, step, seed, APPROX)
    if NORMAL:
        x0, x1 = _box_muller(x0, x1, FLOAT, APPROX)
        x2, x3 = _box_muller(x2, x3, FLOAT, APPROX)
    return tl.join(tl.join(x0, x2), tl.join(x1, x3))


@triton.jit
def _draw(
    low,
    high,
    tensor_id,
    step,
    seed,
    NORMAL: tl.constexpr,
    FLOAT: tl.constexpr,
    APPROX: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The random words or normals of the BLOCK elements whose first group is (low, high).

    A thread draws for the VECTOR neighbours, one group or two, that it reads in one access: nothing moves
    between threads. A chunk does not cross a multiple of 2^34, so the high word is the same for all of it.
    """
    lanes = tl.arange(0, BLOCK // VECTOR).to(tl.uint32)
    if VECTOR == 4:
        x = _draw_group(low + lanes, high, tensor_id, step, seed, NORMAL, FLOAT, APPROX)
    else:
        first = _draw_group(low + 2 * lanes, high, tensor_id, step, seed, NORMAL, FLOAT, APPROX)
        second = _draw_group(low + 2 * lanes + 1, high, tensor_id, step, seed, NORMAL, FLOAT, APPROX)
        x = tl.permute(tl.join(first, second), (0, 3, 1, 2))
    return tl.reshape(x, (BLOCK,))


@triton.jit
def _draw_each(
    number,
    top_bit,
    tensor_id,
    step,
    seed,
    NORMAL: tl.constexpr,
    FLOAT: tl.constexpr,
    APPROX: tl.constexpr,
):
    """The same for elements that are not numbered one after another: each draws its group's and keeps one."""
    group = number >> 2
    high = (group >> 32).to(tl.uint32) | top_bit
    x0, x1, x2, x3 = _philox(group.to(tl.uint32), high, tensor_id, step, seed, APPROX)
    second, odd = (number & 2) != 0, (number & 1) != 0
    x0, x1 = tl.where(second, x2, x0), tl.where(second, x3, x1)
    if NORMAL:
        x0, x1 = _box_muller(x0, x1, FLOAT, APPROX)
    return tl.where(odd, x1, x0)


@triton.jit
def _to_float(x, FLOAT: tl.constexpr, APPROX: tl.constexpr):
    """A stored number in the arithmetic's type: two of bfloat16 straight out of the word that holds them."""
    if APPROX and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=&f,=f,r", [x], tl.float32, True, 2
        )
    elif x.dtype == tl.bfloat16:  # the interpreter's conversion is wrong where it is subnormal
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True).to(FLOAT)
    else:
        return x.to(FLOAT)


@triton.jit
def _round(x, random, STORAGE: tl.constexpr, STOCHASTIC: tl.constexpr, is_number=None):
    """`x` as STORAGE: to bfloat16 stochastically (16 random bits are added, then it is truncated) or to
    nearest. Adding could make a number of a NaN: where there may be one, `is_number` keeps it as it is."""
    if STORAGE == tl.bfloat16:
        # The conversion would do to round to nearest, but for Triton's interpreter, which truncates.
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = bits + (random & 0xFFFF if STOCHASTIC else 0x7FFF + ((bits >> 16) & 1))
        if is_number is not None:
            rounded = tl.where(is_number, rounded, bits)
        return (rounded >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(STORAGE)


# ---- the step


@triton.jit
def _number(entry, COLUMN: tl.constexpr, FLOAT: tl.constexpr):
    """A hyperparameter: a column of FLOAT, which the host has narrowed where that is float32."""
    return tl.load((entry + COLUMN).to(tl.pointer_type(FLOAT)))


@triton.jit
def _from_tensor(entry, COLUMN: tl.constexpr, number):
    """The same where it lies in a tensor on the device, else `number`."""
    address = tl.load(entry + COLUMN)
    if address != 0:
        number = tl.load(address.to(tl.pointer_type(tl.float32))).to(number.dtype)
    return number


@triton.jit
def _offsets(entry, layout, index):
    """Where the elements at row-major `index` lie in the operands, and their numbers in the unsharded tensor:
    innermost dimension first."""
    ndim = tl.load(entry + C_NDIM).to(tl.int32)
    last = layout + (tl.load(entry + C_LAYOUT) + ndim - 1) * LAYOUT_COLUMNS
    w_at, g_at, s_at, u_at, m_at, v_at = index * 0, index * 0, index * 0, index * 0, index * 0, index * 0
    number = index * 0 + tl.load(entry + C_OFFSET)
    is_narrow = tl.load(entry + C_NUMEL) <= 0x7FFFFFFF
    for i in range(ndim):
        dimension = last - i * LAYOUT_COLUMNS
        size = tl.load(dimension)
        if is_narrow:  # a division of 64 bits takes four times as many instructions
            rest = (index.to(tl.uint32) // size.to(tl.uint32)).to(tl.int64)
        else:
            rest = index // size
        position = index - rest * size
        w_at += position * tl.load(dimension + 1)
        g_at += position * tl.load(dimension + 2)
        s_at += position * tl.load(dimension + 3)
        u_at += position * tl.load(dimension + 4)
        m_at += position * tl.load(dimension + 5)
        v_at += position * tl.load(dimension + 6)
        number += position * tl.load(dimension + 7)
        index = rest
    return w_at, g_at, s_at, u_at, m_at, v_at, number


@triton.jit
def _is_finite(s):
    """Of s >= 0; compared with infinity, it would take the compiler two instructions."""
    return s <= (1.7976931348623157e308 if s.dtype == tl.float64 else 3.4028234663852886e38)


@triton.jit
def _averages(w, g, S, U, sens_beta, unc_beta, sens_rate, unc_rate, UNCERTAINTY: tl.constexpr):
    """Rows 1 to 3 of the table, in the form in which b = 0 gives S = s to the last bit.

    A sensitivity that is not finite leaves both averages as they were.
    """
    s = tl.abs(w * g)
    finite = _is_finite(s)
    S = tl.where(finite, tl.fma(sens_rate, s, sens_beta * S), S)
    if UNCERTAINTY != NONE:
        U = tl.where(finite, tl.fma(unc_beta, U, unc_rate * tl.abs(s - S)), U)
    return S, U, finite


@triton.jit
def _gate(S, U, sens_factor, mean, gamma, UNCERTAINTY: tl.constexpr, APPROX: tl.constexpr):
    """Rows 4 and 5. q here is mean times as big, which saves the product: the mean is a factor of 1/q. Not
    above 0 where the gate is closed."""
    if UNCERTAINTY == PRODUCT:
        q = (S * sens_factor) * U
    elif UNCERTAINTY == UCB:
        q = S + U
    else:
        q = S
    return _tanh(tl.fma(_reciprocal(q, APPROX), mean, _negative(gamma)), APPROX)


@triton.jit
def _steps_of(counter):
    """`pats_kernels.counters`: how a float32 counts steps past 2^24."""
    beyond = counter.to(tl.int32, bitcast=True).to(tl.int64) - 0x4B800000
    return tl.where(beyond > 0, 2**24 + beyond, counter.to(tl.int64))


@triton.jit
def _advanced(counter):
    following = (counter.to(tl.int32, bitcast=True) + 1).to(tl.float32, bitcast=True)
    return tl.where(counter < 2**24, counter + 1, following)


@triton.jit
def _bias_correction(entry, LOG_BETA: tl.constexpr, step, FLOAT: tl.constexpr):
    """1 - beta^t, to a few roundings: where t log(beta) is small, by the series of the exponential;
    in float64 by Kahan's (1 - e) y / log(e), which an e that is a few roundings off beta^t does not harm."""
    y = step.to(FLOAT) * _number(entry, LOG_BETA, FLOAT)
    power = tl.exp(y)
    if FLOAT == tl.float32:
        near = _multiply_add(y, 1 / 8, 1.0)
        for i in tl.static_range(6):
            near = _multiply_add(y * near, 1 / (7 - i), 1.0)
    else:
        differs = (y > -0.5) & (power < 1)
        near = tl.where(differs, (power - 1) / tl.log(tl.where(differs, power, 0.5)), 1.0)
    return tl.where(y > -0.5, -y * near, 1 - power)


@triton.jit
def _moments(g, m, v, sign, rate1, beta2, rate2):
    """Row 7."""
    return tl.fma(rate1, tl.fma(sign, g, _negative(m)), m), tl.fma(beta2, v, rate2 * (g * g))


@triton.jit
def _moments_sensitivity(
    w, m, v, least_v, root_factor, m_factor, UNCERTAINTY: tl.constexpr, APPROX: tl.constexpr
):
    """Rows 1 to 3 with sensitivity="moments": sqrt(v^) = root_factor sqrt(v), and v^ - m^^2 is root_factor^2
    (v - (m_factor m)^2). m_factor is a few roundings too large, so that it is not above 0 where it is 0. A v
    below least_v counts as 0."""
    scale, scaled_m = tl.abs(w) * root_factor, m_factor * m
    S = scale * _sqrt(v, APPROX)
    finite = _is_finite(S)
    counts = finite & (v >= least_v)
    U = S
    if UNCERTAINTY != NONE:
        variance = tl.fma(_negative(scaled_m), scaled_m, v)
        U = tl.where(counts, scale * _sqrt(tl.maximum(variance, 0.0), APPROX), 0.0)
    return tl.where(counts, S, 0.0), U, finite


@triton.jit
def _adamw(w, m, v, decay, slope, intercept, APPROX: tl.constexpr):
    """Row 8, for moments without their bias corrections; lr is in the line's slope and intercept."""
    return tl.fma(_negative(m), _reciprocal(tl.fma(slope, _sqrt(v, APPROX), intercept), APPROX), decay * w)


class _Kind(NamedTuple):
    """The kernel's compile-time arguments, except for those that a tensor without noise changes."""

    PARAM: tl.dtype
    STATE: tl.dtype
    PHASE: int
    STOCHASTIC: bool
    APPROX: bool
    SMALL_EPS: bool
    HINTS: tuple[str, str, str]
    CHUNK: int
    BLOCK: int
    ONLY_FULL: bool


@triton.constexpr_function
def _kind(*arguments):
    return _Kind(*arguments)


@triton.jit
def _opaque(x, BLOCK: tl.constexpr, APPROX: tl.constexpr):
    """A loop's counter, which the compiler does not recognize as one: it would advance six pointers of 64
    bits beside it, where each address is but this number away from its own base."""
    if APPROX:
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], tl.int32, True, 1)
    return tl.multiple_of(x, BLOCK)


@triton.jit
def _load(at, mask, EVICTION: tl.constexpr):
    if mask is None:
        return tl.load(at, eviction_policy=EVICTION)
    else:
        return tl.load(at, mask=mask, other=0.0, eviction_policy=EVICTION)


@triton.jit
def _chunk(
    entry,
    layout,
    grad_scale,
    start,
    length,
    PATH: tl.constexpr,
    FORM: tl.constexpr,
    UNCERTAINTY: tl.constexpr,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
):
    """Updates elements [start, start + length). Returns their sums of S and U, and how many sensitivities
    were not finite."""
    PARAM: tl.constexpr = KIND.PARAM
    STATE: tl.constexpr = KIND.STATE
    PHASE: tl.constexpr = KIND.PHASE
    STOCHASTIC: tl.constexpr = KIND.STOCHASTIC
    APPROX: tl.constexpr = KIND.APPROX
    SMALL_EPS: tl.constexpr = KIND.SMALL_EPS
    HINTS: tl.constexpr = KIND.HINTS
    LOADS: tl.constexpr = HINTS[0]  # by name: Triton 3.6 takes an entry for a string of Python's
    GRAD_LOADS: tl.constexpr = HINTS[1]
    STORES: tl.constexpr = HINTS[2]
    FLOAT: tl.constexpr = tl.float64 if PARAM == tl.float64 else tl.float32
    ROUNDS: tl.constexpr = STOCHASTIC and (PARAM == tl.bfloat16 or STATE == tl.bfloat16)
    VECTOR: tl.constexpr = 8 if PARAM.primitive_bitwidth == 16 or STATE.primitive_bitwidth == 16 else 4
    # What this phase of this form does: csrc/cpu_kernel.cpp, Does.
    READS_AVERAGES: tl.constexpr = FORM == PATS or FORM == PATS_ADAMW
    AVERAGING: tl.constexpr = READS_AVERAGES and PHASE != NOISE
    MOMENTS: tl.constexpr = FORM == MOMENTS_ADAMW or (FORM != PATS and PHASE != AVERAGES)
    NOISY: tl.constexpr = FORM != ADAMW and PHASE != AVERAGES
    STEPS: tl.constexpr = FORM != PATS and PHASE != AVERAGES
    SUMS: tl.constexpr = FORM != ADAMW and PHASE != NOISE

    param = tl.load(entry + C_PARAM).to(tl.pointer_type(PARAM))
    grad = tl.load(entry + C_GRAD).to(tl.pointer_type(PARAM))
    sens = tl.load(entry + C_SENS).to(tl.pointer_type(STATE))
    unc = tl.load(entry + C_UNC).to(tl.pointer_type(STATE))
    exp_avg = tl.load(entry + C_EXP_AVG).to(tl.pointer_type(STATE))
    exp_avg_sq = tl.load(entry + C_EXP_AVG_SQ).to(tl.pointer_type(STATE))
    if PATH == FULL:
        param, grad = tl.multiple_of(param, 16), tl.multiple_of(grad, 16)
        sens, unc = tl.multiple_of(sens, 16), tl.multiple_of(unc, 16)
        exp_avg, exp_avg_sq = tl.multiple_of(exp_avg, 16), tl.multiple_of(exp_avg_sq, 16)

    seed, tensor_id = tl.load(entry + C_SEED), tl.load(entry + C_TENSOR_ID).to(tl.uint32)
    step = tl.load(entry + C_STEP)
    counter = tl.load(entry + C_STEP_COUNT)
    if counter != 0:
        step = _steps_of(tl.load(counter.to(tl.pointer_type(tl.float32))))
        if PHASE != NOISE:  # before which the counter has been advanced
            step += 1

    if FORM != ADAMW:
        sens_beta, sens_rate = _number(entry, C_SENS_BETA, FLOAT), _number(entry, C_SENS_RATE, FLOAT)
        unc_beta, unc_rate = _number(entry, C_UNC_BETA, FLOAT), _number(entry, C_UNC_RATE, FLOAT)
        gamma, noise_scale = _number(entry, C_GAMMA, FLOAT), _number(entry, C_NOISE_SCALE, FLOAT)
        stats = tl.load(entry + C_STATS).to(tl.pointer_type(tl.float32))
        sens_mean, unc_mean = tl.load(stats).to(FLOAT), tl.load(stats + 1).to(FLOAT)
        if UNCERTAINTY == UCB:
            sens_mean += unc_mean
        if UNCERTAINTY != PRODUCT:
            unc_mean = sens_mean
        # 64 times q: rcp.approx takes what is subnormal for 0. Of the least mean this is still a float.
        sens_factor, mean = 64 / sens_mean, unc_mean
        if UNCERTAINTY == PRODUCT:
            mean *= 64
        noise_scale = _from_tensor(entry, C_NOISE_SCALE_TENSOR, noise_scale)
        # Without statistics all gates are closed.
        gamma = tl.where(_is_statistic(sens_mean) & _is_statistic(unc_mean), gamma, float("inf"))
    if MOMENTS:
        sign, beta2 = _number(entry, C_GRAD_SIGN, FLOAT), _number(entry, C_BETA2, FLOAT)
        rate1, rate2 = _number(entry, C_RATE1, FLOAT), _number(entry, C_RATE2, FLOAT)
        correction1 = _bias_correction(entry, C_LOG_BETA1, step, FLOAT)
        correction2 = _bias_correction(entry, C_LOG_BETA2, step, FLOAT)
        root2 = tl.sqrt(correction2)
        # sqrt.approx takes a subnormal v for 0: where eps does not hide that, it gets root_scale^2 v.
        eps, root_scale = _number(entry, C_EPS, FLOAT), 1.0
        if SMALL_EPS:
            root_scale = tl.where(eps < 2.0**-40, 4096.0, 1.0)
        root_factor = 1 / (root2 * root_scale)
        m_factor = (1 + (2.0**-49 if FLOAT == tl.float64 else 2.0**-20)) * root2 * root_scale / correction1
        least_v = 2.0**-110 * correction2 * (root_scale * root_scale)
        lr, decay = _number(entry, C_LR, FLOAT), _number(entry, C_DECAY, FLOAT)
        if tl.load(entry + C_LR_TENSOR) != 0:
            lr = _from_tensor(entry, C_LR_TENSOR, lr)
            decay = 1 - lr * _number(entry, C_WEIGHT_DECAY, FLOAT)
        # lr m^ / (sqrt(v^) + eps) = m / (slope sqrt(v) + intercept); for lr = 0 the line is at infinity.
        step_size = lr * root2 / correction1
        stands = step_size < 1e-37
        slope = tl.where(stands, 0.0, 1 / (step_size * root_scale))
        intercept = tl.where(stands, float("inf"), eps * root2 / step_size)
    step = step.to(tl.uint32)
    if grad_scale is not None and (AVERAGING or MOMENTS):
        # Of 1 it is 1, to the last bit, and of a power of two exact.
        unscale = _exact_reciprocal(tl.load(grad_scale).to(FLOAT))

    lanes = tl.arange(0, BLOCK)
    sum_s, sum_u = tl.zeros((BLOCK // 4,), FLOAT), tl.zeros((BLOCK // 4,), FLOAT)
    nonfinite = tl.zeros((BLOCK // 4,), tl.int32)
    group = (tl.load(entry + C_OFFSET) + start) // 4
    group_low, group_high = group.to(tl.uint32), (group >> 32).to(tl.uint32)
    if PATH != STRIDED:
        param, grad, sens, unc = param + start, grad + start, sens + start, unc + start
        exp_avg, exp_avg_sq = exp_avg + start, exp_avg_sq + start
    for block in tl.range(0, length, BLOCK, loop_unroll_factor=1):
        first = _opaque(block, BLOCK, APPROX)
        at = first + lanes
        mask = None if PATH == FULL else at < length
        low = group_low + (first.to(tl.uint32) >> 2)
        w_at, g_at, s_at, u_at, m_at, v_at = at, at, at, at, at, at
        if PATH == STRIDED:
            w_at, g_at, s_at, u_at, m_at, v_at, number = _offsets(entry, layout, start + at)
        w_at, g_at, s_at, u_at = param + w_at, grad + g_at, sens + s_at, unc + u_at
        m_at, v_at = exp_avg + m_at, exp_avg_sq + v_at

        random = 0
        if ROUNDS:
            if PATH == STRIDED:
                random = _draw_each(number, ROUNDING, tensor_id, step, seed, False, FLOAT, APPROX)
            else:
                high = group_high | ROUNDING
                random = _draw(low, high, tensor_id, step, seed, False, FLOAT, APPROX, VECTOR, BLOCK)

        w = _to_float(_load(w_at, mask, LOADS), FLOAT, APPROX)
        if AVERAGING or MOMENTS:
            g = _to_float(_load(g_at, mask, GRAD_LOADS), FLOAT, APPROX)
            if grad_scale is not None:
                g *= unscale
        if MOMENTS:
            m = _to_float(_load(m_at, mask, LOADS), FLOAT, APPROX)
            v = _to_float(_load(v_at, mask, LOADS), FLOAT, APPROX)
            m, v = _moments(g, m, v, sign, rate1, beta2, rate2)
            scaled_v = v * (root_scale * root_scale) if SMALL_EPS else v

        if READS_AVERAGES:
            S = _to_float(_load(s_at, mask, LOADS), FLOAT, APPROX)
            U = S
            if UNCERTAINTY != NONE:
                U = _to_float(_load(u_at, mask, LOADS), FLOAT, APPROX)
            if AVERAGING:
                S, U, finite = _averages(w, g, S, U, sens_beta, unc_beta, sens_rate, unc_rate, UNCERTAINTY)
                S_stored = _round(S, random >> 16, STATE, STOCHASTIC)
                S = _to_float(S_stored, FLOAT, APPROX)
                if PHASE == AVERAGES:
                    S_stored = tl.where(finite, S_stored, _marked(S_stored))
                tl.store(s_at, S_stored, mask=mask, cache_modifier=STORES)
                if UNCERTAINTY != NONE:
                    U_stored = _round(U, random >> 16, STATE, STOCHASTIC)
                    U = _to_float(U_stored, FLOAT, APPROX)
                    tl.store(u_at, U_stored, mask=mask, cache_modifier=STORES)
            else:
                # The phase before marked, by the sign of S, the elements that get no noise.
                finite = S.to(tl.int64 if FLOAT == tl.float64 else tl.int32, bitcast=True) >= 0
                S = tl.abs(S)
                tl.store(s_at, S.to(STATE), mask=(finite == 0) if mask is None else mask & (finite == 0))
        elif FORM == MOMENTS_ADAMW:
            S, U, finite = _moments_sensitivity(
                w, m, scaled_v, least_v, root_factor, m_factor, UNCERTAINTY, APPROX
            )

        if SUMS:
            sum_s += _sum_groups(S, BLOCK)
            if UNCERTAINTY != NONE:
                sum_u += _sum_groups(U, BLOCK)
            nonfinite += _sum_groups(tl.where(finite, 0, 1), BLOCK)

        if NOISY:
            if PATH == STRIDED:
                z = _draw_each(number, 0, tensor_id, step, seed, True, FLOAT, APPROX)
            else:
                z = _draw(low, group_high, tensor_id, step, seed, True, FLOAT, APPROX, VECTOR, BLOCK)
            a = tl.where(finite, _gate(S, U, sens_factor, mean, gamma, UNCERTAINTY, APPROX), 0.0)
            # Chosen, not added: an infinite noise times 0 is NaN.
            w = tl.where(a > 0, tl.fma(noise_scale, a * z, w), w)
            if FORM == PATS:
                tl.store(w_at, _round(w, random, PARAM, STOCHASTIC), mask=mask, cache_modifier=STORES)
        if STEPS:
            w = _adamw(w, m, scaled_v, decay, slope, intercept, APPROX)
            is_number = (m == m) & (v == v)
            tl.store(w_at, _round(w, random, PARAM, STOCHASTIC, w == w), mask=mask, cache_modifier=STORES)
            tl.store(
                m_at,
                _round(m, random >> 16, STATE, STOCHASTIC, is_number),
                mask=mask,
                cache_modifier=STORES,
            )
            tl.store(
                v_at,
                _round(v, random >> 16, STATE, STOCHASTIC, is_number),
                mask=mask,
                cache_modifier=STORES,
            )

    return tl.sum(sum_s), tl.sum(sum_u), tl.sum(nonfinite)


@triton.jit
def _marked(S):
    """The same with its sign set, zero too."""
    if S.dtype == tl.bfloat16:
        return (S.to(tl.uint16, bitcast=True) | 0x8000).to(tl.bfloat16, bitcast=True)
    elif S.dtype == tl.float32:
        return (S.to(tl.uint32, bitcast=True) | 0x80000000).to(tl.float32, bitcast=True)
    else:
        return (S.to(tl.uint64, bitcast=True) | 0x8000000000000000).to(tl.float64, bitcast=True)


@triton.jit
def _path(
    entry,
    layout,
    grad_scale,
    start,
    left,
    FORM: tl.constexpr,
    UNCERTAINTY: tl.constexpr,
    KIND: tl.constexpr,
):
    """`_chunk` for the `left` elements from `start`, by the shortest path that their tensor allows."""
    CHUNK: tl.constexpr = KIND.CHUNK
    BLOCK: tl.constexpr = KIND.BLOCK
    if KIND.ONLY_FULL or ((left == CHUNK) & (tl.load(entry + C_VECTOR) != 0)):
        sum_s, sum_u, nonfinite = _chunk(
            entry, layout, grad_scale, start, CHUNK, FULL, FORM, UNCERTAINTY, BLOCK, KIND
        )
    elif tl.load(entry + C_NDIM) == 0:
        sum_s, sum_u, nonfinite = _chunk(
            entry, layout, grad_scale, start, left, MASKED, FORM, UNCERTAINTY, BLOCK // 4, KIND
        )
    else:
        sum_s, sum_u, nonfinite = _chunk(
            entry, layout, grad_scale, start, left, STRIDED, FORM, UNCERTAINTY, BLOCK // 8, KIND
        )
    return sum_s, sum_u, nonfinite


@triton.jit
def _program(
    table,
    layout,
    chunks,
    partials,
    grad_scale,
    chunk,
    num_chunks,
    FORM: tl.constexpr,
    UNCERTAINTY: tl.constexpr,
    KIND: tl.constexpr,
):
    """One chunk's work. A tensor without statistics gets AdamW's step alone."""
    PHASE: tl.constexpr = KIND.PHASE
    CHUNK: tl.constexpr = KIND.CHUNK
    entry = table + tl.load(chunks + 2 * chunk).to(tl.int64) * COLUMNS
    start = tl.load(chunks + 2 * chunk + 1).to(tl.int64) * CHUNK
    left = tl.minimum(tl.load(entry + C_NUMEL) - start, CHUNK).to(tl.int32)
    if KIND.ONLY_FULL or FORM == PATS or tl.load(entry + C_STATS) != 0:
        sum_s, sum_u, nonfinite = _path(entry, layout, grad_scale, start, left, FORM, UNCERTAINTY, KIND)
        if PHASE != NOISE:
            tl.store(partials + chunk, sum_s.to(tl.float64))
            tl.store(partials + num_chunks + chunk, sum_u.to(tl.float64))
            tl.store(partials + 2 * num_chunks + chunk, nonfinite.to(tl.float64))
    elif PHASE != AVERAGES:
        _path(entry, layout, grad_scale, start, left, ADAMW, NONE, KIND)


@triton.jit
def pats_kernel(
    table,
    layout,
    chunks,
    partials,
    grad_scale,
    found_inf,
    first,
    last,
    num_chunks,
    PARAM: tl.constexpr,
    STATE: tl.constexpr,
    FORM: tl.constexpr,
    UNCERTAINTY: tl.constexpr,
    PHASE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    APPROX: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    SMALL_EPS: tl.constexpr = False,
    HINTS: tl.constexpr = ("", "", ""),
    PERSISTENT: tl.constexpr = False,
    REVERSED: tl.constexpr = False,
    ONLY_FULL: tl.constexpr = False,
):
    """One program a chunk; with PERSISTENT a fixed number of programs, and each takes every n-th chunk.

    Args:
        table, layout: int64, see `pats_kernels.plan.Column` and `Launch`.
        chunks: int32 [chunks, 2], the table's row and the number of the piece.
        partials: float64 [3, chunks], a chunk's sums of S and U and its count of what was not finite.
        grad_scale, found_inf: a GradScaler's float32 [1], or None.
        first, last, num_chunks: the chunks that this launch works on, and how many there are in all; None:
            one program for each there is, first to last.
        SMALL_EPS: whether some tensor's eps does not hide that sqrt.approx takes what is subnormal for 0.
        HINTS, PERSISTENT, REVERSED: see `pats_kernels.backends.triton.Tuning`.
        ONLY_FULL: leaves all but one path out, to study the compiler's work on the one that counts.
    """
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    KIND: tl.constexpr = _kind(
        PARAM, STATE, PHASE, STOCHASTIC, APPROX, SMALL_EPS, HINTS, CHUNK, BLOCK, ONLY_FULL
    )
    pid = tl.program_id(0)
    if PERSISTENT:
        for i in range(first + pid, last, tl.num_programs(0)):
            chunk = first + last - 1 - i if REVERSED else i
            _program(table, layout, chunks, partials, grad_scale, chunk, num_chunks, FORM, UNCERTAINTY, KIND)
    else:
        if num_chunks is None:
            chunk, total = pid, tl.num_programs(0)
        else:
            chunk, total = last - 1 - pid if REVERSED else first + pid, num_chunks
        _program(table, layout, chunks, partials, grad_scale, chunk, total, FORM, UNCERTAINTY, KIND)


@triton.jit
def statistics_kernel(table, starts, partials, num_chunks, found_inf, first, BLOCK: tl.constexpr):
    """One program for each tensor: adds its chunks' partial sums in a fixed order, and advances its step.

    Of a shard it writes the share in the means, to which other processes' are still to be added.

    Args:
        starts: int64 [tensors + 1], where each tensor's chunks start in `partials`.
        first: the table's row of the first program's tensor; None: the table's first.
    """
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    row = tl.program_id(0)
    if first is not None:
        row += first
    entry = table + row.to(tl.int64) * COLUMNS
    start, end = tl.load(starts + row), tl.load(starts + row + 1)
    sum_s, sum_u = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    count = tl.zeros((BLOCK,), tl.float64)
    for i in range(start, end, BLOCK):
        lanes = i + tl.arange(0, BLOCK)
        mask = lanes < end
        sum_s += tl.load(partials + lanes, mask=mask, other=0.0)
        sum_u += tl.load(partials + num_chunks + lanes, mask=mask, other=0.0)
        count += tl.load(partials + 2 * num_chunks + lanes, mask=mask, other=0.0)

    whole = tl.load(entry + C_WHOLE)
    share = tl.load(entry + C_SHARE)
    if share != 0:
        means = share.to(tl.pointer_type(tl.float32))
        divisor = tl.where(whole == 0, float("inf"), whole.to(tl.float64))
        tl.store(means, (tl.sum(sum_s) / divisor).to(tl.float32))
        tl.store(means + 1, (tl.sum(sum_u) / divisor).to(tl.float32))
    nonfinite = tl.load(entry + C_NONFINITE).to(tl.pointer_type(tl.int64))
    counter = tl.load(entry + C_STEP_COUNT).to(tl.pointer_type(tl.float32))
    total, steps = tl.zeros((), tl.int64), tl.zeros((), tl.float32)
    if nonfinite.to(tl.int64) != 0:
        total = tl.load(nonfinite) + tl.sum(count).to(tl.int64)
    if counter.to(tl.int64) != 0:
        steps = tl.load(counter)
    tl.debug_barrier()  # all threads have read what one of them now writes
    if nonfinite.to(tl.int64) != 0:
        tl.store(nonfinite, total)
    if counter.to(tl.int64) != 0:
        tl.store(counter, _advanced(steps))


INTERPRETED = not isinstance(pats_kernel, triton.JITFunction)  # TRITON_INTERPRET as this was imported
