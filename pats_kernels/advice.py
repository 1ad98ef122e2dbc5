"""Warnings about settings that are valid but probably mistakes; each is given once per optimizer."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pats_kernels.hyperparameters import Hyperparameters
from pats_kernels.numbering import KEY
from pats_kernels.plan import PARAM_DTYPES, Batch
from pats_kernels.state import local

SHORTEST_NAME = 3  # an edit of "lr" is half of it, and could be anything
FEWEST_ELEMENTS = 16  # with fewer, the standard deviation says little

# docs/choosing.md: with noise of a tenth of the weights' standard deviation on all weights at every step, a
# model was no better than chance after 100 steps.
LARGE = 0.1

# A weight w with 2^e <= |w| < 2^(e+1) lies on a grid of spacing 2^e eps. A draw d changes it only if |d| is
# above half of that spacing: 2^e < 2 |d| / eps. One-sigma draws at noise_scale = rms eps / 32 change weights
# with 2^e < rms / 16, so only weights below rms / 8. Of Gaussian weights these are at most
# P(|w| < rms / 8) = 0.0995: at each step nine of ten do not change, and those that do are the smallest. (At
# rms eps / 8 at most P(|w| < rms / 2) = 0.38 would change.) For float32 the bound is 3.7e-9 rms.
SMALL = 1 / 32


class Advisor:
    """Gives an optimizer's warnings, each of them once.

    Args:
        names: the hyperparameters that its param groups may hold.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = [*names, KEY]
        self._said: set[str] = set()

    def read(self, param_groups: Iterable[Mapping[str, Any]], known: Iterable[str]) -> None:
        """Warns of keys that are almost a hyperparameter's name. `known`: the optimizer's own keys."""
        known = set(known)
        for group in param_groups:
            for pair in misspelt(group, self._names, known):
                self._say(pair[0], spelling_warning(*pair))

    def judge(self, batch: Batch, fresh: Sequence[Tensor]) -> None:
        """Warns of the noise on tensors of the batch that take their first step. Waits for their device."""
        begin = {id(param) for param in fresh}
        rows = [i for i, param in enumerate(batch.params) if id(param) in begin]
        noisy = [i for i in rows if batch.sens_stats[i] is not None]
        params = [(batch.name(i), batch.params[i]) for i in noisy]
        for i in noisy:
            if _is_always_certain(batch.hyperparameters[i]):
                self._say("certain", certain_warning(batch.name(i)))
                break
        text = noise_warning(params, [batch.hyperparameters[i] for i in noisy]) if params else None
        if text is not None:
            self._say("noise", text)

    def _say(self, what: str, text: str) -> None:
        if what not in self._said:
            self._said.add(what)
            warnings.warn(f"PATS: {text}", stacklevel=2)


def misspelt(
    group_keys: Iterable[Any], names: Iterable[str], known: Iterable[Any] = ()
) -> list[tuple[str, str]]:
    """Keys of a param group that are one edit away from a hyperparameter's name, each with that name.

    An edit inserts, deletes or replaces one letter, or swaps two neighbours. Exact `names` and `known` keys,
    those that the optimizer itself defines, are never returned.
    """
    names = list(names)
    ours = {*names, *known}
    return [
        (key, name)
        for key in group_keys
        if isinstance(key, str) and key not in ours
        for name in names
        if len(name) >= SHORTEST_NAME and _is_one_edit(key, name)
    ]


def spelling_warning(key: str, name: str) -> str:
    """The text for a pair of `misspelt`."""
    return f"param group key {key!r} is not a hyperparameter and has no effect: did you mean {name!r}?"


def certain_warning(name: str) -> str:
    """The text for a tensor that never gets any noise."""
    return (
        f'{name}: sens_betas[0] = 0 with uncertainty="product" never gives any noise: S then equals the '
        'sensitivity, so the uncertainty U is 0. Set sens_betas[0] > 0, or uncertainty="ucb" or "none"'
    )


def _is_always_certain(h: Hyperparameters) -> bool:
    return h.sens_betas[0] == 0 and h.uncertainty == "product" and h.variant.form != "moments_adamw"


def _is_one_edit(a: str, b: str) -> bool:
    if a == b:
        return False
    a, b = sorted((a, b), key=len)
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))
    if len(a) < len(b):
        return a[start:] == b[start + 1 :]
    swapped = a[:start] + a[start : start + 2][::-1] + a[start + 2 :]
    return a[start + 1 :] == b[start + 1 :] or swapped == b


class _Judged(NamedTuple):
    name: str
    dtype: torch.dtype
    nearest: bool
    noise_scale: float
    deviation: float
    mean: float

    @property
    def spread(self) -> float:
        """The standard deviation; 0 for nearly constant weights, such as those of a normalization."""
        return self.deviation if self.deviation > abs(self.mean) / 10 else 0.0

    @property
    def rms(self) -> float:
        return (self.deviation**2 + self.mean**2) ** 0.5

    @property
    def share(self) -> float:
        """noise_scale as a share of the spread."""
        return self.noise_scale / self.spread if self.spread > 0 else 0.0

    @property
    def lost(self) -> float:
        """The least noise that rounding does not lose, divided by noise_scale; above 1: it is lost."""
        return self.rms * torch.finfo(self.dtype).eps * SMALL / self.noise_scale


def noise_warning(params: Sequence[tuple[str, Tensor]], values: Sequence[Hyperparameters]) -> str | None:
    """Says why a parameter's noise_scale is probably a mistake: it is above a tenth of the weights' standard
    deviation, or so small that rounding to nearest loses it. One text, about the worst parameter, or None.

    Waits once for each device, for any number of parameters. Ignored are tensors with fewer than 16
    elements, tensors that no kernel can update (on the meta device, for example), and a noise_scale that is
    a tensor. Noise on nearly constant weights never counts as too large. Of a sharded parameter, this
    process's shard is judged.

    Args:
        params: names and parameters, of any dtype and strides.
        values: the hyperparameters of each.

    Raises:
        ValueError: names a sharded parameter whose placement is not supported.
    """
    chosen: list[tuple[str, Tensor, Hyperparameters]] = []
    for (name, param), h in zip(params, values, strict=True):
        if not isinstance(h.noise_scale, Tensor) and h.noise_scale > 0:
            held = local(name, param.detach())
            if held.numel() >= FEWEST_ELEMENTS and _has_numbers(held):
                chosen.append((name, held, h))
    statistics = _statistics([held for _, held, _ in chosen])
    judged = [
        _Judged(name, held.dtype, _rounds_to_nearest(held, h), float(h.noise_scale), deviation, mean)
        for (name, held, h), (deviation, mean) in zip(chosen, statistics, strict=True)
    ]
    large = [j for j in judged if j.share > LARGE]
    if large:
        return _large_text(max(large, key=lambda j: j.share), len(large))
    small = [j for j in judged if j.nearest and j.lost > 1]
    return _small_text(max(small, key=lambda j: j.lost), len(small)) if small else None


def _has_numbers(tensor: Tensor) -> bool:
    strided = tensor.layout is torch.strided and not tensor.is_meta and tensor.dtype in PARAM_DTYPES
    return strided and tensor.data_ptr() != 0


def _rounds_to_nearest(tensor: Tensor, h: Hyperparameters) -> bool:
    return tensor.dtype != torch.bfloat16 or not h.stochastic_rounding


def _statistics(tensors: Sequence[Tensor]) -> list[tuple[float, float]]:
    """Each tensor's standard deviation and mean, read from each device all at once."""
    by_device: dict[torch.device, list[int]] = {}
    for i, tensor in enumerate(tensors):
        by_device.setdefault(tensor.device, []).append(i)
    found: dict[int, tuple[float, float]] = {}
    for indices in by_device.values():
        both = [statistic.float() for i in indices for statistic in torch.std_mean(tensors[i], correction=0)]
        numbers = torch.stack(both).tolist()
        found |= zip(indices, zip(numbers[::2], numbers[1::2], strict=True), strict=True)
    return [found[i] for i in range(len(tensors))]


def _large_text(worst: _Judged, count: int) -> str:
    return (
        f"{worst.name}: noise_scale={worst.noise_scale:g} is {worst.share:.2g} of its weights' standard "
        f"deviation, {worst.spread:.2g}, and every step adds new noise{_more(count)}: at a tenth, a hundred "
        "steps can erase all that a model has learned. Start with sqrt(steps) * noise_scale between a "
        "hundredth and a tenth of the standard deviation (docs/choosing.md), or set noise_scale=0 in its "
        "param group"
    )


def _small_text(worst: _Judged, count: int) -> str:
    dtype = str(worst.dtype).removeprefix("torch.")
    remedies = {torch.bfloat16: "keep stochastic_rounding=True, ", torch.float16: "keep it in float32, "}
    remedy = remedies.get(worst.dtype, "")
    return (
        f"{worst.name}: noise_scale={worst.noise_scale:g} is lost in rounding{_more(count)}: its weights, "
        f"with a root mean square of {worst.rms:.2g}, are {dtype} and rounded to nearest, so nearly all of "
        f"them do not change. To fix this, {remedy}set noise_scale above "
        f"{worst.noise_scale * worst.lost:.1e}, or set it to 0 in its param group"
    )


def _more(count: int) -> str:
    return f" (the same for {count - 1} more)" if count > 1 else ""
