"""The hyperparameters of a param group: names, defaults, ranges, errors."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache, lru_cache
from numbers import Integral, Real
from operator import is_
from typing import Any, Generic, Literal, NamedTuple, TypeVar, get_args
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

Uncertainty = Literal["product", "ucb", "none"]
Normalization = Literal["delayed", "exact"]
Sensitivity = Literal["ema", "moments"]
Form = Literal["pats", "pats_adamw", "moments_adamw"]

STATE_DTYPES = (None, torch.float32, torch.bfloat16)
LARGEST = 1e38  # for values that the kernels hold as float32
LARGEST_NOISE = 1e37  # times 6.8, the largest normal, it still fits float32
READ_ON_DEVICE = ("lr", "noise_scale")  # read by the kernel if they are tensors on its device (CUDA graphs)
PAIRS = ("betas", "sens_betas")


class Variant(NamedTuple):
    """The hyperparameters that a kernel is specialized for; the others are values in a table.

    Attributes:
        form: "pats": the PATS step alone; "pats_adamw": PATS, then AdamW's step; "moments_adamw": the same,
            with the sensitivity computed from AdamW's moments.
    """

    form: Form
    uncertainty: Uncertainty
    normalization: Normalization
    stochastic_rounding: bool


class _Referable:
    """Allows weak references to a class with `slots=True`, which has no slot for them otherwise."""

    __slots__ = ("__weakref__",)


@dataclass(frozen=True, slots=True)
class Hyperparameters(_Referable):
    """PATS's hyperparameters for one param group or one tensor; an instance that exists is valid.

    Attributes:
        noise_scale: standard deviation of the noise where the gate is open, in units of w; >= 0. 0 is a
            no-op: the tensor is skipped and no state is allocated for it. To change it between replays of a
            CUDA graph, a float32 tensor of one element on the parameters' GPU. The host does not read that
            tensor, so its range is not checked, and state is allocated even if it is 0.
        gamma: elements with q >= 1/gamma get no noise; >= 0.
        sens_betas: decay rates (b_s, b_u) of the sensitivity and its uncertainty, each in [0, 1).
        uncertainty: how S and U make q: "product", "ucb" or "none" (no U is stored).
        normalization: "delayed" (the means before this step, one pass) or "exact" (two passes).
        state_dtype: of the averages; None: the parameter's, float32 for float16.
        stochastic_rounding: whether writes to bfloat16 round stochastically.
        seed: of the noise, 0 <= seed < 2^64.

    Raises:
        ValueError: names the hyperparameter, its value and its range.
    """

    noise_scale: float | Tensor = 1e-5
    gamma: float = 1.0
    sens_betas: tuple[float, float] = (0.85, 0.95)
    uncertainty: Uncertainty = "product"
    normalization: Normalization = "delayed"
    state_dtype: torch.dtype | None = None
    stochastic_rounding: bool = True
    seed: int = 0
    variant: Variant = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _require_real_or_tensor("noise_scale", self.noise_scale, LARGEST_NOISE)
        _require_real("gamma", self.gamma)
        _require_decay_rates("sens_betas", self.sens_betas)
        _require_one_of("uncertainty", self.uncertainty, get_args(Uncertainty))
        _require_one_of("normalization", self.normalization, get_args(Normalization))
        _require_one_of("state_dtype", self.state_dtype, STATE_DTYPES)
        _require_one_of("stochastic_rounding", self.stochastic_rounding, (True, False))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**64:
            raise ValueError(f"Invalid seed: {self.seed!r} (must be an integer in [0, 2^64))")
        self._make_floats("noise_scale", "gamma", "sens_betas")
        self._set_variant("pats")

    def _make_floats(self, *names: str) -> None:
        """Turns numbers into floats: torch cannot multiply by an integer above 2^63."""
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, Tensor):
                value = tuple(map(float, value)) if isinstance(value, tuple) else float(value)
                object.__setattr__(self, name, value)

    def _set_variant(self, form: Form) -> None:
        variant = Variant(form, self.uncertainty, self.normalization, self.stochastic_rounding)
        object.__setattr__(self, "variant", variant)

    @property
    def numbers(self) -> tuple[float, ...]:
        """The values for the columns of a table's row from `Column.NOISE_SCALE` on."""
        return _pats_numbers(self)

    @property
    def noisy(self) -> bool:
        """Whether there may be noise: the host does not know the value of a tensor on the device."""
        return isinstance(self.noise_scale, Tensor) or self.noise_scale > 0

    @property
    def on_device(self) -> dict[str, Tensor]:
        """The values that the kernel reads on the device, so that the host need not wait for them."""
        return {name: value for name in READ_ON_DEVICE if isinstance(value := getattr(self, name, 0), Tensor)}


@dataclass(frozen=True, slots=True)
class AdamWHyperparameters(Hyperparameters):
    """The hyperparameters of `PATSAdamW`: those of PATS and those of `torch.optim.AdamW`.

    Attributes:
        lr: learning rate, >= 0; or a float32 tensor of one element on the parameters' GPU. The host does not
            read that tensor, so its range is not checked.
        betas: decay rates of AdamW's moments, each in [0, 1).
        eps: added to the root of the second moment, >= 0.
        weight_decay: decoupled, >= 0.
        maximize: maximize the loss instead of minimizing it.
        sensitivity: "ema" (a moving average of |w * g|) or "moments" (computed from AdamW's moments).
    """

    lr: float | Tensor = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    maximize: bool = False
    sensitivity: Sensitivity = "ema"

    def __post_init__(self) -> None:
        Hyperparameters.__post_init__(self)
        _require_real_or_tensor("lr", self.lr)
        _require_decay_rates("betas", self.betas)
        _require_real("eps", self.eps)
        _require_real("weight_decay", self.weight_decay)
        _require_one_of("maximize", self.maximize, (True, False))
        _require_one_of("sensitivity", self.sensitivity, get_args(Sensitivity))
        self._make_floats("lr", "betas", "eps", "weight_decay")
        self._set_variant("pats_adamw" if self.sensitivity == "ema" else "moments_adamw")

    @property
    def numbers(self) -> tuple[float, ...]:
        lr = _number(self.lr)
        decay = 1 - lr * self.weight_decay
        beta1, beta2 = self.betas
        logs = (math.log(beta) if beta > 0 else -math.inf for beta in self.betas)
        sign = -1.0 if self.maximize else 1.0
        adamw = (lr, self.weight_decay, decay, self.eps, 1 - beta1, beta2, 1 - beta2, *logs, sign)
        return _pats_numbers(self) + adamw


def _pats_numbers(h: Hyperparameters) -> tuple[float, ...]:
    b_s, b_u = h.sens_betas
    return (_number(h.noise_scale), h.gamma, b_s, 1 - b_s, b_u, 1 - b_u)


def _number(value: float | Tensor) -> float:
    """The table's entry for a value: 0 if it is a tensor on the device, which the kernel reads itself."""
    return 0.0 if isinstance(value, Tensor) else value


H = TypeVar("H", bound=Hyperparameters)


@cache
def defaults_of(kind: type[Hyperparameters]) -> Mapping[str, Any]:
    """The names of the hyperparameters, as in a param group, with their default values."""
    return {field.name: field.default for field in fields(kind) if field.init}


def _found(
    group: Mapping[str, Any], defaults: Mapping[str, Any], own: Iterable[tuple[str, Any]]
) -> list[Any]:
    """A group's values, in the order of `own`, the items of `defaults_of`."""
    return [group.get(name, defaults.get(name, default)) for name, default in own]


# A schedule may change a group's values at any time, so they are read and checked at every step.
# While they stay the same, this cache makes that a lookup.
@lru_cache(maxsize=1024, typed=True)
def _cached(kind: type[H], *values: Any) -> H:
    return kind(*values)


# Those with tensors, which a cache would keep alive. Here they live as long as a plan or a step holds them.
_held: "WeakValueDictionary[tuple[Any, ...], Any]" = WeakValueDictionary()


def _of_tensors(kind: type[H], values: Sequence[Any]) -> H:
    """Looks up by the tensors' ids. An entry keeps its tensors alive, so no other tensor has their ids."""
    key = (kind, *((Tensor, id(v)) if isinstance(v, Tensor) else (type(v), v) for v in values))
    found = _held.get(key)
    if found is None:
        found = _held[key] = kind(*values)
    return found


def hyperparameters(
    values: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
    kind: type[H] = Hyperparameters,
) -> H:
    """The checked hyperparameters of a mapping, such as a param group; its other keys are ignored.

    A key that `values` lacks is taken from `defaults`, or else from `kind`.

    Raises:
        ValueError: names the hyperparameter, its value and its range.
    """
    own = defaults_of(kind)
    chosen = list(map(_plain, own, _found(values, defaults or {}, own.items())))
    try:
        if any(isinstance(value, Tensor) for value in chosen):
            return _of_tensors(kind, chosen)
        return _cached(kind, *chosen)
    except TypeError:  # not hashable, so not valid either: the check raises an error that names it
        return kind(*chosen)


class Reader(Generic[H]):
    """Reads the hyperparameters of an optimizer's param groups at every step.

    It checks those of a group only if one of the objects there is another than at the last step, or is of a
    kind that may change its value, such as a list or a tensor.

    Args:
        checked: returns a group's hyperparameters, given the group and the defaults. Raises a ValueError that
            names what is wrong with them.
        kind: the class of what it returns.
        others: further keys of a group that it looks at.
    """

    def __init__(
        self,
        checked: Callable[[Mapping[str, Any], Mapping[str, Any]], H],
        kind: type[H],
        others: Sequence[str] = (),
    ) -> None:
        self._checked = checked
        self._own = tuple(defaults_of(kind).items())
        self._others = others
        self._known: dict[int, tuple[list[Any], H]] = {}  # by the group's position

    def read(self, param_groups: Sequence[Mapping[str, Any]], defaults: Mapping[str, Any]) -> list[H]:
        """The hyperparameters of each group. A key that a group lacks is taken from `defaults`.

        Raises:
            ValueError: names the hyperparameter, its value and its range.
        """
        return [self._read(position, group, defaults) for position, group in enumerate(param_groups)]

    def _read(self, position: int, group: Mapping[str, Any], defaults: Mapping[str, Any]) -> H:
        found = _found(group, defaults, self._own)
        found += map(group.get, self._others)
        known = self._known.get(position)
        if known is None or not all(map(is_, found, known[0])):
            known = found, self._checked(group, defaults)
            if all(map(_is_plain, found)):
                self._known[position] = known
        return known[1]


def _is_plain(value: Any) -> bool:
    """Whether it is of a kind that `_plain` leaves as it is, and never changes its value."""
    kind = type(value)
    return kind in _PLAIN or (kind is tuple and _PLAIN.issuperset(map(type, value)))


def _plain(name: str, value: Any) -> Any:
    """Turns any kind of number into Python's and any sequence of numbers into a tuple, so that equal values
    compare equal.

    A tensor is read at every call, unless it is on a GPU and the kernel can read it there.
    """
    if _is_plain(value):
        return value
    if isinstance(value, (Tensor, np.ndarray)) and math.prod(value.shape) == 1 and name not in PAIRS:
        device = value.device.type if isinstance(value, Tensor) else "cpu"
        stays = device == "meta" or (name in READ_ON_DEVICE and device != "cpu")
        return value if stays else value.item()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, (list, tuple)) or (name in PAIRS and _is_sequence(value)):
        return tuple(_plain("", entry) for entry in value)
    return value


def _is_sequence(value: Any) -> bool:
    """Whether it has entries by position, even if its class is not registered as a `Sequence`."""
    has_entries = (
        hasattr(value, "__len__") and hasattr(value, "__getitem__") and getattr(value, "ndim", 1) == 1
    )
    return has_entries and not isinstance(value, (Mapping, str))


def _in_range(value: Any, low: float, high: float) -> bool:
    """low <= value < high for a real number; False for NaN and for all other kinds of values."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and low <= float(value) < high
    except (TypeError, ValueError, OverflowError):
        return False


def _require_real(name: str, value: Any, most: float = LARGEST) -> None:
    if not _in_range(value, 0, most):
        raise ValueError(f"Invalid {name}: {value!r} (must be a finite number >= 0 and below {most:.0e})")


def _require_real_or_tensor(name: str, value: Any, most: float = LARGEST) -> None:
    if not isinstance(value, Tensor):
        _require_real(name, value, most)
    elif value.numel() != 1 or value.dtype != torch.float32:
        raise ValueError(
            f"Invalid {name}: {value!r} (a tensor must have one element, and be float32 on a GPU)"
        )


def _require_decay_rates(name: str, betas: Any) -> None:
    if not (isinstance(betas, tuple) and len(betas) == 2 and all(_in_range(b, 0, 1) for b in betas)):
        raise ValueError(f"Invalid {name}: {betas!r} (must be a pair of numbers, each in [0, 1))")


def _require_one_of(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if not is_one_of(value, choices):
        raise ValueError(f"Invalid {name}: {value!r} (must be one of {', '.join(map(repr, choices))})")


def is_one_of(value: Any, choices: tuple[Any, ...]) -> bool:
    """Whether a value is one of the choices. False if it cannot be compared, such as an array."""
    try:
        return any(value is choice or bool(value == choice) for choice in choices)
    except (TypeError, ValueError, RuntimeError):
        return False


_PLAIN = frozenset({float, int, bool, str, type(None), torch.dtype})
