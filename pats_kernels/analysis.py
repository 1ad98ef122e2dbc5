"""How a model's sensitivities are distributed, and how much noise PATS's gate lets through.

    before = distribution(sensitivities(model, batches))
    ...  # fine-tune
    after = distribution(sensitivities(model, batches))
    plot({"before": before, "after": after}, "sensitivity.png")

`state_sensitivities` reads a run's moving averages instead; `gate_summary` says what its gates do right now.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from pats_kernels.counters import steps_of
from pats_kernels.hyperparameters import Hyperparameters, hyperparameters
from pats_kernels.optim import PATS
from pats_kernels.plan import is_dtensor
from pats_kernels.private import local_tensor
from pats_kernels.reference import arithmetic_dtype, gate, moments_sensitivity
from pats_kernels.state import parameter_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The histogram's bins: log10 of a value divided by the mean, ten bins a decade. |w g| of a trained model in
# float32 spreads over some ten decades; values beyond count in the outermost bins.
LOG_EDGES: NDArray[np.float64] = np.arange(-120, 61) / 10
FRACTIONS = (1.0, 0.1, 0.01, 0.001)  # of the mean, for `share_below`
TOP = (0.01, 0.1)  # shares of the elements, for `top_share`
CURVE_SHARES: NDArray[np.float64] = (np.arange(201) / 200) ** 2  # dense where the curve is steep
_SHARES: NDArray[np.float64] = np.union1d(CURVE_SHARES, TOP)
PIECE = 1 << 22  # elements that are worked on at once if that takes temporary memory


# Where sensitivities come from.


def sensitivities(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
) -> dict[str, Tensor]:
    """The mean over `batches` of |w * g|, with g the gradient of a batch's loss: row 1 of `reference`.

    The model runs in eval mode, so that dropout adds nothing and no batch statistics change. Afterwards every
    module has its own mode again. `p.grad` is not touched. An element that a batch's loss does not depend on
    has sensitivity 0 in that batch.

    Args:
        model: on any device; parameters that require no gradient are left out.
        batches: on the model's device; of equal size if all examples should have the same weight.
        loss: (model, batch) -> the batch's mean loss, 0-d; None: `model(**batch).loss`, as in Hugging Face
            models.

    Returns:
        By the parameter's name in `model.named_parameters()`: tensors of its shape, on its device, float32
        (float64 for float64 parameters), in units of the loss.

    Raises:
        ValueError: there is no batch, or no parameter that requires a gradient.
    """
    params = {name: param for name, param in model.named_parameters() if param.requires_grad}
    if not params:
        raise ValueError("the model has no parameter that needs a gradient")
    totals = {name: torch.zeros_like(param, dtype=arithmetic_dtype(param)) for name, param in params.items()}
    count = 0
    with _in_eval_mode(model), torch.enable_grad():
        for batch in batches:
            count += 1
            value = model(**batch).loss if loss is None else loss(model, batch)
            grads = torch.autograd.grad(value, list(params.values()), allow_unused=True)
            for (name, param), grad in zip(params.items(), grads, strict=True):
                if grad is not None:
                    dtype = totals[name].dtype
                    totals[name] += (param.detach().to(dtype) * grad.to(dtype)).abs_()
    if count == 0:
        raise ValueError("batches is empty: there is nothing to compute a gradient from")
    return {name: total.div_(count) for name, total in totals.items()}


def state_sensitivities(
    source: PATS | Optimizer, named_parameters: Iterable[tuple[str, Tensor]] = ()
) -> dict[str, Tensor]:
    """A copy of the moving average S of the sensitivity (`exp_avg_sens`) of every parameter that has one.

    S starts from 0 without bias correction: after t steps it is 1 - b_s^t times an average. Keep that in mind
    if tensors have taken different numbers of steps.

    Args:
        source: a `PATS`, or a `PATSAdamW` with sensitivity="ema" ("moments" keeps no S).
        named_parameters: of the model, for the names. A parameter that is not among them has its name in the
            optimizer's `param_names`, or else its place in the param groups.

    Returns:
        By name: tensors of the parameter's shape, on its device, float32 (float64 for float64 averages).

    Raises:
        TypeError: the optimizer keeps no sensitivity; pass the `PATS` that is attached to it.
    """
    names = parameter_names(_optimizer(source).param_groups)
    names |= {param: name for name, param in named_parameters if param in names}
    averages = {
        name: source.state[param]["exp_avg_sens"]
        for param, name in names.items()
        if "exp_avg_sens" in source.state.get(param, ())
    }
    return {name: average.to(arithmetic_dtype(average), copy=True) for name, average in averages.items()}


def _optimizer(source: PATS | Optimizer) -> Optimizer:
    if isinstance(source, PATS):
        return source.optimizer
    if "noise_scale" not in source.defaults:
        raise TypeError(f"{type(source).__name__} keeps no sensitivity: pass the PATS that is attached to it")
    return source


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Each module gets its own mode back: a model in training may have frozen parts in eval mode."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


# What the gate does.


class GateSummary(NamedTuple):
    """What PATS does at one moment. Tensors are 0-d, on the state's device; reading them waits for it.

    Elements with noise are those of all tensors that have state and whose group has a noise_scale above 0.

    Attributes:
        mean_gate: mean of a over the elements with noise, in [0, 1]; float32.
        noisy_share: share of those elements with a > 0, in [0, 1]; float32.
        numel: how many elements have noise. If 0, there is no state yet, and all but `nonfinite` are NaN.
        noise_scale: its mean over the elements with noise, in units of w; if all groups have the same value,
            exactly that; float64.
        noise_rms: root mean square of noise_scale a over the elements with noise, which is that of the noise
            that one step adds, in units of w; float64.
        weight_rms: root mean square of w over the same elements; float64.
        nonfinite: gradient elements that were not finite since the run began or was resumed: on all processes
            for sharded parameters, on this one for others; int64.
    """

    mean_gate: Tensor
    noisy_share: Tensor
    numel: int
    noise_scale: Tensor
    noise_rms: Tensor
    weight_rms: Tensor
    nonfinite: Tensor

    def to_dict(self) -> dict[str, float]:
        """The numbers by name, and noise_to_weight = noise_rms / weight_rms (NaN for weights that are all 0).

        While numel is 0, there is only `nonfinite`. Waits for the device once.
        """
        tensors = {
            "mean_gate": self.mean_gate,
            "noisy_share": self.noisy_share,
            "noise_scale": self.noise_scale,
            "noise_rms": self.noise_rms,
            "weight_rms": self.weight_rms,
            "noise_to_weight": self.noise_rms / self.weight_rms,
        }
        *values, nonfinite = torch.stack([t.double() for t in (*tensors.values(), self.nonfinite)]).tolist()
        numbers: dict[str, float] = dict(zip(tensors, values, strict=True)) if self.numel > 0 else {}
        return numbers | {"nonfinite": int(nonfinite)}


@torch.no_grad()
def gate_summary(source: PATS | Optimizer) -> GateSummary:
    """Computes from the current state the mean gate, the share of elements that get noise, and the size of
    that noise: rows 4 to 6 of `reference`.

    It covers all parameters with `sens_stats` in their state whose group has a noise_scale above 0. The means
    in q are the state's own `sens_stats`. With normalization="exact" the gates are those of the last step.
    With "delayed" that step used the means before it, so the gates differ by what one step changes in the
    means. With sensitivity="moments", S and U belong to the current weights, after AdamW's step.

    It does not wait for the device. Tensors are read in pieces, so the temporary memory does not grow with
    their size; tensors that are not contiguous are copied. For sharded parameters each process reads its own
    part, waits for the last step's means, and adds its numbers to the others', so all processes must call it.

    Args:
        source: a `PATS` or a `PATSAdamW`.

    Raises:
        TypeError: the optimizer keeps no sensitivity; pass the `PATS` that is attached to it.
    """
    groups = _optimizer(source).param_groups
    counters: dict[int, Tensor] = source._nonfinite  # type: ignore[union-attr]
    if any(is_dtensor(type(param)) for param in source.state):
        source.state_dict()  # waits for the means
    parts: list[Tensor] = []  # `_sums` of each tensor
    sharded: list[tuple[Tensor, Tensor]] = []  # a sharded parameter, and `_sums` of this process's part
    scales: list[tuple[float | Tensor, int]] = []  # of each tensor with noise: noise_scale, and numel
    for group in groups:
        values = hyperparameters(group, source.defaults)
        for param in group["params"]:
            state = source.state.get(param, {})
            noisy, count = values.noisy and "sens_stats" in state, counters.get(id(param))
            if not noisy and count is None:
                continue
            sums = _sums(_gates(param, state, group, values) if noisy else (), param.device)
            if noisy:
                scale = _in_float64(values.noise_scale, param.device)
                sums[2] *= scale**2
                scales.append((scale, param.numel()))
            if count is not None:
                sums[4] += count
            if is_dtensor(type(param)):
                sharded.append((param, sums))
            else:
                parts.append(sums)
    if sharded:
        from pats_kernels.distributed import sums_over_shards  # only where there are some

        parts += sums_over_shards(sharded)
    parts = parts or [torch.zeros(5, dtype=torch.float64)]
    device = next((part.device for part in parts if part.device.type != "cpu"), parts[0].device)
    totals = torch.stack([part.to(device, non_blocking=True) for part in parts]).sum(0)
    numel = sum(n for _, n in scales)
    mean_gate, noisy_share, noise_square, weight_square = totals[:4] / numel
    return GateSummary(
        mean_gate.float(),
        noisy_share.float(),
        numel,
        _mean_scale(scales, device),
        noise_square.sqrt(),
        weight_square.sqrt(),
        totals[4].long(),
    )


def _sums(pieces: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> Tensor:
    """Sums over pieces (w, a) of a, a > 0, a^2, w^2, then a 0 for the count of nonfinite: float64 [5]."""
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    for w, a in pieces:
        squares = [torch.linalg.vector_norm(x, dtype=torch.float64).square() for x in (a, w)]
        sums[:4] += torch.stack((a.sum(dtype=torch.float64), a.gt(0).sum(dtype=torch.float64), *squares))
    return sums


def _in_float64(value: float | Tensor, device: torch.device) -> float | Tensor:
    """A hyperparameter as a number, or as a 0-d tensor that stays on its device."""
    if isinstance(value, Tensor):
        return value.detach().to(device, torch.float64, non_blocking=True).reshape(())
    return value


def _mean_scale(scales: list[tuple[float | Tensor, int]], device: torch.device) -> Tensor:
    """The mean over elements, 0-d. Sums differences to the first, so equal values give exactly theirs."""
    if not scales:
        return torch.full((), torch.nan, dtype=torch.float64, device=device)
    numel = sum(n for _, n in scales)
    first, *others = (_in_float64(scale, device) for scale, _ in scales)
    mean = first + sum((scale - first) * n for scale, (_, n) in zip(others, scales[1:], strict=True)) / numel
    return mean if isinstance(mean, Tensor) else torch.full((), mean, dtype=torch.float64, device=device)


def _gates(
    param: Tensor, state: Mapping[str, Tensor], group: Mapping[str, Any], values: Hyperparameters
) -> Iterator[tuple[Tensor, Tensor]]:
    """A tensor's elements and their gates, piece by piece."""
    dtype = arithmetic_dtype(param)
    means = state["sens_stats"].to(dtype)
    moments = group.get("sensitivity") == "moments"
    if moments:
        corrections = [1 - beta ** steps_of(state["step"]).to(torch.float64) for beta in group["betas"]]
        operands = [param, state["exp_avg"], state["exp_avg_sq"]]
    else:
        corrections = []
        S = state["exp_avg_sens"]
        operands = [param, S, state.get("exp_avg_unc", S)]  # "none" keeps no U and reads none
    operands = [local_tensor(x) if is_dtensor(type(x)) else x for x in operands]
    for pieces in zip(*(x.reshape(-1).split(PIECE) for x in operands), strict=True):
        w, S, U = (piece.to(dtype) for piece in pieces)
        if moments:
            m_hat, v_hat = (x / correction for x, correction in zip((S, U), corrections, strict=True))
            S, U, _ = moments_sensitivity(w, m_hat, v_hat, values.uncertainty)
        yield w, gate(S, U, *means, gamma=values.gamma, uncertainty=values.uncertainty)


# Numbers.


@dataclass(frozen=True)
class Summary:
    """How n sensitivities are distributed. In an empty or all-zero tensor all count as equal: Gini 0.

    Attributes:
        numel: n.
        zeros: how many are exactly 0; they are in no bin of the histogram.
        mean: in units of the loss.
        histogram: counts of log10(value / mean) in the bins [LOG_EDGES[i], LOG_EDGES[i + 1]); the outermost
            bins include values beyond them.
        share_below: for each f in FRACTIONS the share of elements below f * mean, zeros included.
        gini: Gini coefficient, in [0, 1 - 1/n]: sum over i of (2 i - n - 1) x_i / (n^2 mean) of ascending
            x_1 ... x_n (Dixon et al., Ecology 68, 1987, as corrected in 69, 1988; Damgaard and Weiner 2000).
        top_share: for each p in TOP the share of the total that the most sensitive p n elements hold.
        half: the smallest share of the elements that holds half of the total.
    """

    numel: int
    zeros: int
    mean: float
    histogram: tuple[int, ...]
    share_below: tuple[float, ...]
    gini: float
    top_share: tuple[float, ...]
    half: float


@dataclass(frozen=True)
class Distribution:
    """The distribution of a model's sensitivities in compact form: a few hundred numbers a tensor.

    Attributes:
        overall: summary of all elements of all tensors together.
        curve: for each p in CURVE_SHARES the share of the total that the most sensitive p n elements hold.
            This is the Lorenz curve seen from the other end: it rises from 0 to 1, in a straight line if all
            are equal. Between whole numbers of elements it is linear. `top_share` and `half` are read from
            the same exact curve.
        tensors: summary of each tensor by itself.
    """

    overall: Summary
    curve: tuple[float, ...]
    tensors: dict[str, Summary]

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts, tuples and numbers, for `json.dump`; `from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Distribution":
        """Restores what `to_dict` returned, also after writing it to JSON and reading it back."""
        tensors = {name: _summary_from(entry) for name, entry in values["tensors"].items()}
        return cls(_summary_from(values["overall"]), tuple(values["curve"]), tensors)


def _summary_from(values: Mapping[str, Any]) -> Summary:
    arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return Summary(**arguments)


def distribution(sensitivities: Mapping[str, Tensor]) -> Distribution:
    """Summarizes how sensitivities are distributed, for each tensor and for all together.

    The results are exact: computed from the sorted values, not from the histogram, with float64 sums. It runs
    on the CPU, with one copy of all values. The 109.5 M of BERT-base took 12 s, and 0.6 GB besides the input,
    on one core of an AMD EPYC (Zen 4).

    Args:
        sensitivities: by name; any real floating dtype, shape (0-d and empty too) and device.

    Raises:
        ValueError: names the first tensor with a value below 0 or not finite.
    """
    numels = {name: tensor.numel() for name, tensor in sensitivities.items()}
    wide = any(tensor.dtype == torch.float64 for tensor in sensitivities.values())
    values = np.empty(sum(numels.values()), dtype=np.float64 if wide else np.float32)
    tensors: dict[str, Summary] = {}
    start = 0
    for name, tensor in sensitivities.items():
        part = values[start : start + numels[name]]
        torch.from_numpy(part).copy_(tensor.detach().reshape(-1))
        part.sort()
        if part.size and not (part[0] >= 0 and np.isfinite(part[-1])):  # NaN is sorted to the end
            raise ValueError(f"{name}: a sensitivity is negative or not finite")
        tensors[name] = _summarize(part)[0]
        start += part.size
    values.sort()
    overall, curve = _summarize(values)
    return Distribution(overall, curve, tensors)


def _summarize(x: NDArray[Any]) -> tuple[Summary, tuple[float, ...]]:
    """The summary of ascending values >= 0, and their concentration curve at CURVE_SHARES."""
    n = x.size
    total, held, half = _concentration(x)
    mean = total / max(n, 1)
    zeros = int(np.searchsorted(x, 0, side="right"))
    inner = np.maximum(_count_below(x, mean * 10.0 ** LOG_EDGES[1:-1]), zeros)
    summary = Summary(
        numel=n,
        zeros=zeros,
        mean=mean,
        histogram=tuple(np.diff([zeros, *inner, n]).tolist()),
        share_below=tuple((_count_below(x, mean * np.array(FRACTIONS)) / max(n, 1)).tolist()),
        gini=_gini(x, total),
        top_share=tuple(np.interp(TOP, _SHARES, held).tolist()),
        half=half,
    )
    return summary, tuple(np.interp(CURVE_SHARES, _SHARES, held).tolist())


def _count_below(x: NDArray[Any], limits: NDArray[np.float64]) -> NDArray[np.int64]:
    """How many of the ascending `x` are below each limit. Exact: limits are rounded up to x's dtype."""
    with np.errstate(over="ignore"):  # to infinity, which is right
        rounded = limits.astype(x.dtype)
    rounded = np.where(rounded < limits, np.nextafter(rounded, np.array(np.inf, x.dtype)), rounded)
    return np.searchsorted(x, rounded, side="left")


def _concentration(x: NDArray[Any]) -> tuple[float, NDArray[np.float64], float]:
    """Of ascending values: their sum, the part of it that the top _SHARES hold, the share that holds half."""
    n = x.size
    tops = _SHARES * n
    whole = np.floor(tops).astype(np.int64)  # elements wholly in the top
    sums = np.cumsum([x[n - b : n - a].sum(dtype=np.float64) for a, b in pairwise([0, *whole])])
    total = float(sums[-1])
    if total == 0:
        return 0.0, _SHARES, 0.5
    held = sums + (tops - whole) * x[np.maximum(n - 1 - whole, 0)]

    reached = int(np.searchsorted(held, total / 2))  # the crossing lies between this share and the one before
    start, stop = int(whole[reached - 1]), min(int(whole[reached]) + 1, n)
    within = np.cumsum(x[n - stop : n - start][::-1], dtype=np.float64)
    crossing = np.interp(total / 2 - sums[reached - 1], [0, *within], np.arange(start, stop + 1))
    return total, held / total, float(crossing / n)


def _gini(x: NDArray[Any], total: float) -> float:
    n = x.size
    if total == 0:
        return 0.0
    weighted = 0.0
    for start in range(0, n, PIECE):
        piece = x[start : start + PIECE].astype(np.float64)
        rank = np.arange(start + 1, start + 1 + piece.size)
        weighted += float(np.dot(2.0 * rank - n - 1, piece))
    return max(weighted / (n * total), 0.0)


# The picture.

# Okabe and Ito: also for colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "os^Dv<"
INK, QUIET = "#333333", "#999999"


def plot(distributions: Mapping[str, Distribution], path: str | Path | None = None) -> "Figure":
    """Draws several distributions into one figure: histograms, concentration, each tensor's Gini coefficient.

    Tensors whose names differ only in a number, such as the layer's, share a row. A tensor that is all zeros
    has no point.

    Args:
        distributions: by their label in the legend, such as {"before": ..., "AdamW": ..., "PATS": ...}.
        path: file to write the figure to; the suffix decides the format. None: no file.

    Returns:
        The matplotlib figure. pyplot does not know it, so there is nothing to close.

    Raises:
        ValueError: there is no distribution, or more than there are colours.
    """
    from matplotlib.figure import Figure

    if not 0 < len(distributions) <= len(COLOURS):
        raise ValueError(f"plot draws 1 to {len(COLOURS)} distributions, but was given {len(distributions)}")
    rows = _rows(distributions)
    figure = Figure(figsize=(11, max(6.0, 1.2 + 0.19 * len(rows))), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1, 1.15))
    histogram, concentration, strip = (figure.add_subplot(grid[at]) for at in ((0, 0), (1, 0), (slice(2), 1)))
    _draw_histograms(histogram, distributions)
    _draw_concentration(concentration, distributions)
    _draw_tensors(strip, distributions, rows)
    for axes in (histogram, concentration, strip):
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(QUIET)
        axes.tick_params(colors=INK, labelsize=8)
    if path is not None:
        figure.savefig(path, dpi=200)
    return figure


def _draw_histograms(axes: "Axes", distributions: Mapping[str, Distribution]) -> None:
    used: list[float] = []
    for (label, d), colour in zip(distributions.items(), COLOURS, strict=False):
        share = np.array(d.overall.histogram) / max(d.overall.numel, 1)
        if d.overall.zeros:
            label += f" ({d.overall.zeros / d.overall.numel:.1%} are zero)"
        axes.stairs(share, LOG_EDGES, color=colour, linewidth=1.4, label=label)
        axes.stairs(share, LOG_EDGES, color=colour, fill=True, alpha=0.08)
        used += LOG_EDGES[:-1][share > 1e-5].tolist()
    if used:
        axes.set_xlim(min(used) - 0.2, max(used) + 0.3)
    axes.axvline(0, color=QUIET, linewidth=0.8, linestyle=":")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(lambda value, _: f"$10^{{{value:g}}}$")
    axes.set_xlabel("sensitivity / mean", fontsize=9, color=INK)
    axes.set_title("Share of the parameters, in tenths of a decade", loc="left", fontsize=10, color=INK)
    axes.legend(frameon=False, fontsize=8, loc="upper left", labelcolor=INK)


def _draw_concentration(axes: "Axes", distributions: Mapping[str, Distribution]) -> None:
    for (label, d), colour in zip(distributions.items(), COLOURS, strict=False):
        text = f"{label}: half in {d.overall.half:.2%}, Gini {d.overall.gini:.3f}"
        axes.plot(CURVE_SHARES, d.curve, color=colour, linewidth=1.4, label=text)
    axes.plot((0, 1), (0, 1), color=QUIET, linewidth=0.8, linestyle=":")
    axes.set(xlim=(0, 1), ylim=(0, 1.01))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel("most sensitive share of the parameters", fontsize=9, color=INK)
    axes.set_title("Share of all sensitivity they hold", loc="left", fontsize=10, color=INK)
    axes.legend(frameon=False, fontsize=8, loc="lower right", labelcolor=INK)


def _draw_tensors(
    axes: "Axes", distributions: Mapping[str, Distribution], rows: dict[str, list[str]]
) -> None:
    offsets = np.linspace(-0.22, 0.22, len(distributions)) if len(distributions) > 1 else [0.0]
    for place, (label, d) in enumerate(distributions.items()):
        points = [
            (d.tensors[name].gini, row + offsets[place])
            for row, names in enumerate(rows.values())
            for name in names
            if name in d.tensors and d.tensors[name].mean > 0
        ]
        x, y = zip(*points, strict=True) if points else ((), ())
        axes.scatter(
            x, y, s=9, alpha=0.6, linewidths=0, color=COLOURS[place], marker=MARKERS[place], label=label
        )
    axes.set_yticks(range(len(rows)), labels=list(rows))
    axes.set(xlim=(0, 1.01), ylim=(len(rows) - 0.4, -0.6))
    axes.grid(axis="y", color=QUIET, alpha=0.25, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("Gini coefficient: 0, all equal; 1, one element has it all", fontsize=9, color=INK)
    axes.set_title("Within each tensor", loc="left", fontsize=10, color=INK)


def _rows(distributions: Mapping[str, Distribution]) -> dict[str, list[str]]:
    """Label -> names of the tensors in its row; on top those most unequal in the first distribution."""
    kinds: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for d in distributions.values() for name in d.tensors):
        kinds.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", name), []).append(name)
    first = next(iter(distributions.values())).tensors

    def typical(kind: str) -> float:
        return float(np.median([first[name].gini if name in first else 0.0 for name in kinds[kind]]))

    short = Counter(kind.rpartition("*.")[2] for kind in kinds)
    rows: dict[str, list[str]] = {}
    for kind in sorted(kinds, key=typical, reverse=True):
        label = kind.rpartition("*.")[2]
        rows[label if short[label] == 1 else kind] = kinds[kind]
    return rows
