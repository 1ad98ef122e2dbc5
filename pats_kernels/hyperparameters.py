"""What a param group may say about PATS: names, defaults, ranges, errors."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, Literal, NamedTuple, get_args

import torch

Uncertainty = Literal["product", "ucb", "none"]
Normalization = Literal["delayed", "exact"]

STATE_DTYPES = (None, torch.float32, torch.bfloat16)


class Variant(NamedTuple):
    """What a kernel is specialized for; the rest are values in a table."""

    uncertainty: Uncertainty
    normalization: Normalization
    stochastic_rounding: bool


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """PATS's hyperparameters for one param group or one tensor; an instance that exists is valid.

    Attributes:
        noise_scale: standard deviation of the noise where the gate is open, in units of w; >= 0. 0 is a
            no-op: the tensor is skipped and no state is allocated for it.
        gamma: elements with q >= 1/gamma get no noise; >= 0.
        sens_betas: decay rates (b_s, b_u) of the sensitivity and its uncertainty, each in [0, 1).
        uncertainty: how S and U make q: "product", "ucb" or "none" (no U is stored).
        normalization: "delayed" (the means before this step, one pass) or "exact" (two passes).
        state_dtype: of the averages; None: the parameter's, float32 for float16.
        stochastic_rounding: whether writes to bfloat16 round stochastically.
        seed: of the noise, 0 <= seed < 2^64.

    Raises:
        ValueError: naming the hyperparameter, its value and its range.
    """

    noise_scale: float = 1e-5
    gamma: float = 1.0
    sens_betas: tuple[float, float] = (0.85, 0.95)
    uncertainty: Uncertainty = "product"
    normalization: Normalization = "delayed"
    state_dtype: torch.dtype | None = None
    stochastic_rounding: bool = True
    seed: int = 0
    variant: Variant = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _require_real("noise_scale", self.noise_scale)
        _require_real("gamma", self.gamma)
        betas = self.sens_betas
        if not (isinstance(betas, tuple) and len(betas) == 2 and all(_in_range(b, 0, 1) for b in betas)):
            raise ValueError(f"Invalid sens_betas: {betas!r} (must be a pair, each in [0, 1))")
        _require_one_of("uncertainty", self.uncertainty, get_args(Uncertainty))
        _require_one_of("normalization", self.normalization, get_args(Normalization))
        _require_one_of("state_dtype", self.state_dtype, STATE_DTYPES)
        _require_one_of("stochastic_rounding", self.stochastic_rounding, (True, False))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**64:
            raise ValueError(f"Invalid seed: {self.seed!r} (must be an integer in [0, 2^64))")
        variant = Variant(self.uncertainty, self.normalization, self.stochastic_rounding)
        object.__setattr__(self, "variant", variant)


NAMES = tuple(field.name for field in fields(Hyperparameters) if field.init)

# A schedule may change a group's values at every step, so they are read and checked at every step;
# the cache makes that a lookup while they stay the same.
_cached = lru_cache(maxsize=1024, typed=True)(Hyperparameters)


def hyperparameters(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> Hyperparameters:
    """The valid hyperparameters of a mapping, a param group say, that may also hold other things.

    Raises:
        ValueError: naming the hyperparameter, its value and its range.
    """
    chosen: list[Any] = [values.get(name, defaults[name]) for name in NAMES]
    chosen = [value.item() if isinstance(value, torch.Tensor) else value for value in chosen]
    betas = NAMES.index("sens_betas")
    if isinstance(chosen[betas], list):  # as JSON and YAML give it
        chosen[betas] = tuple(chosen[betas])
    try:
        return _cached(*chosen)
    except TypeError:  # not hashable, so not valid either: let the check name it
        return Hyperparameters(*chosen)


def _in_range(value: Any, low: float, high: float) -> bool:
    """low <= value < high for a real number; False for NaN and for anything else."""
    try:
        return low <= float(value) < high and not isinstance(value, (str, bool))
    except (TypeError, ValueError):
        return False


def _require_real(name: str, value: Any) -> None:
    if not _in_range(value, 0, math.inf):
        raise ValueError(f"Invalid {name}: {value!r} (must be a finite number >= 0)")


def _require_one_of(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if not any(value is choice or value == choice for choice in choices):
        raise ValueError(f"Invalid {name}: {value!r} (must be one of {', '.join(map(repr, choices))})")
