"""What `PATS` and `PATSAdamW` share: the state that they keep for each parameter, and how it is loaded."""

import math
import operator
import weakref
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from functools import cache
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from pats_kernels.backends.tables import capturing
from pats_kernels.counters import EXACT, MOST_STEPS, counter_at
from pats_kernels.hyperparameters import Hyperparameters, Variant
from pats_kernels.parts import is_flattened
from pats_kernels.plan import STATE_DTYPES, Own, averages_of, check_param, is_dtensor

State = dict[str, Tensor]
COMPLEX = (torch.complex32, torch.complex64, torch.complex128)
TENSOR_ID = "tensor_id"  # in a state_dict's entry: the position that a parameter's noise depends on


def parameter_names(param_groups: Sequence[Mapping[str, Any]]) -> dict[Tensor, str]:
    """Each parameter's name in its optimizer, or else its place in the param groups, in their order."""
    names: dict[Tensor, str] = {}
    for number, group in enumerate(param_groups):
        places = [f"param_groups[{number}]['params'][{i}]" for i in range(len(group["params"]))]
        names |= zip(group["params"], group.get("param_names", places), strict=True)
    return names


def name_finder(param_groups: Sequence[Mapping[str, Any]]) -> Callable[[Tensor], str]:
    """A function that returns a parameter's name. The names are made at its first call."""
    names: dict[Tensor, str] = {}

    def name_of(param: Tensor) -> str:
        if not names:
            names.update(parameter_names(param_groups))
        return names[param]

    return name_of


def nonfinite_counts(
    param_groups: Sequence[Mapping[str, Any]], counters: Mapping[int, Tensor]
) -> dict[str, int]:
    """The counts above zero, by parameter name; `counters` go by parameter id. Waits for the device."""
    names = parameter_names(param_groups)
    counts = {name: int(counters[id(param)]) for param, name in names.items() if id(param) in counters}
    return {name: count for name, count in counts.items() if count > 0}


class Counters(dict[int, Tensor]):
    """How many elements were not finite, by the parameter's id; hashing parameters at each step is slow.

    When a parameter is freed, its counter goes too, because another one may get its id.
    """

    __slots__ = ("__weakref__", "_column", "_column_of", "_params")

    def __init__(self) -> None:
        super().__init__()
        self._params: dict[int, weakref.ref[Tensor]] = {}
        self._forget_column()

    def _forget_column(self) -> None:
        self._column: Own[Tensor | None] = Own()
        self._column_of: tuple[list[int], list[bool]] = [], []

    def __setitem__(self, key: int, count: Tensor) -> None:
        super().__setitem__(key, count)
        self._forget_column()

    def __delitem__(self, key: int) -> None:
        super().__delitem__(key)
        self._forget_column()

    def watch(self, param: Tensor) -> None:
        """Must be called for each parameter that gets a counter."""
        key, own = id(param), weakref.ref(self)

        def forget(reference: weakref.ref[Tensor]) -> None:
            counters = own()
            if counters is not None and counters._params.get(key) is reference:
                del counters._params[key]
                if key in counters:
                    del counters[key]

        self._params[key] = weakref.ref(param, forget)

    def column(
        self, params: Sequence[Tensor], noisy: list[bool], stats: Sequence[Any], moved: bool
    ) -> Own[Tensor | None]:
        """The parameters' counters, None for those without noise. The same list while nothing changes.

        Args:
            stats: the `sens_stats` of those with noise; the counters belong on their devices.
            moved: whether some counters are on another device.
        """
        of = list(map(id, params)), noisy
        if moved or of != self._column_of:
            rows = zip(params, noisy, stats, strict=True)
            column = [counter_of(self, param, own.device) if has else None for param, has, own in rows]
            self._column, self._column_of = Own(column), of
        return self._column


def counter_of(counters: Counters, param: Tensor, device: torch.device) -> Tensor:
    """A parameter's counter of elements that were not finite, created or moved to `device` if necessary."""
    count = counters.get(id(param))
    if count is None or count.device != device:
        zero = torch.zeros((), dtype=torch.int64, device=device)
        if count is None:
            counters.watch(param)
        count = counters[id(param)] = zero if count is None else zero + count.to(device)
    return count


def have_moved(counters: Mapping[int, Tensor], params: Sequence[Tensor], state: Mapping[Tensor, Any]) -> bool:
    """Whether a group's counters are on another device than its state. Looks at the first with both."""
    for param in params:
        count = counters.get(id(param))
        if count is not None and "step" in (entry := state.get(param, {})):
            step = entry["step"]  # the check of the step's tensors names it if it is not a tensor
            return isinstance(step, Tensor) and count.device != step.device
    return False


def keep_only(counters: Counters, params: Collection[Tensor]) -> None:
    """Deletes the counters of all other parameters."""
    kept = set(map(id, params))
    for key in counters.keys() - kept:
        del counters[key]


def keys_of(values: Hyperparameters) -> frozenset[str]:
    """The state that a parameter keeps with these hyperparameters; with PATS alone none without noise."""
    return _keys_of(values.variant, values.noisy)


@cache
def _keys_of(variant: Variant, noisy: bool) -> frozenset[str]:
    steps = ("step",) if noisy or variant.form != "pats" else ()
    return frozenset((*steps, *averages_of(variant, noisy), *(("sens_stats",) if noisy else ())))


def complete(state: State, name: str, param: Tensor, values: Hyperparameters) -> None:
    """Adds to `state` what it lacks of `keys_of(values)`, all zero. Averages it has decide the others' dtype.

    Raises:
        TypeError, ValueError: names the parameter if no kernel can update it.
        RuntimeError: a CUDA graph is being captured: every replay would set the state to zero.
    """
    check_param(name, local(name, param))
    if capturing(param.device):
        raise RuntimeError(
            f"{name}: a CUDA graph is being captured before it has its state: take a step before the capture"
        )
    present = [state[key] for key in ("exp_avg", "exp_avg_sens") if key in state]
    default = torch.float32 if param.dtype == torch.float16 else param.dtype
    dtype = present[0].dtype if present else values.state_dtype or default
    for key in sorted(keys_of(values) - state.keys()):
        if key == "step":
            state[key] = torch.zeros((), dtype=torch.float32, device=param.device)
        elif key == "sens_stats":
            state[key] = torch.zeros(2, dtype=torch.float32, device=param.device)
        else:
            state[key] = torch.zeros_like(param, dtype=dtype)


def saved(param: Tensor, state: State) -> State:
    """The part of a parameter's state that a state_dict holds.

    For FSDP1's parts it leaves out `sens_stats`: `FSDP.optim_state_dict` cannot gather them, because they are
    neither a single number nor of the part's shape. `checked_entry` computes them again.
    """
    return {key: state[key] for key in state if key != "sens_stats"} if is_flattened(param) else state


def is_distributed() -> bool:
    """Whether this is one of several processes."""
    return dist.is_available() and dist.is_initialized()


def check_structure(state_dict: Any) -> None:
    """Raises a ValueError that names what is missing if a state_dict lacks the structure of torch.optim's."""
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"the state_dict is {_shown(state_dict)}, not a dictionary")
    groups = state_dict.get("param_groups")
    if not isinstance(groups, (list, tuple)):
        raise ValueError(f"the state_dict's 'param_groups' is {_shown(groups)}, not a list")
    if not isinstance(state_dict.get("state"), Mapping):
        raise ValueError(f"the state_dict's 'state' is {_shown(state_dict.get('state'))}, not a dictionary")
    for number, group in enumerate(groups):
        where = f"the state_dict's param_groups[{number}]"
        if not isinstance(group, Mapping):
            raise ValueError(f"{where} is {_shown(group)}, not a dictionary")
        params = group.get("params")
        if not isinstance(params, (list, tuple)):
            raise ValueError(f"{where}['params'] is {_shown(params)}, not a list")


def check_group(values: Hyperparameters, params: Sequence[Tensor]) -> None:
    """Raises ValueError if a hyperparameter is on another device than its param group's parameters."""
    for name, value in values.on_device.items():
        other = next((param.device for param in params if param.device != value.device), None)
        if other is not None:
            raise ValueError(
                f"device mismatch: {name} is on {value.device} in the state_dict, its parameters on {other}"
            )


def check_order(saved: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError if the param groups of a state_dict hold known parameters in another order, or one
    of them twice.

    A parameter's position decides which noise it gets. Names that the optimizer does not have, such as those
    of a wrapped model, prove nothing.
    """
    for number, group in enumerate(saved):
        names, count = group.get("param_names", ()), len(group["params"])
        strings = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
        if not strings or ("param_names" in group and len(names) != count):
            raise ValueError(
                f"the state_dict's param_groups[{number}]['param_names'] is not a list of {count} names"
            )
    keys = [key for group in saved for key in group["params"]]
    if not all(isinstance(key, Hashable) for key in keys):
        raise ValueError("the state_dict's param_groups hold a parameter that cannot be a dictionary key")
    if [len(g["params"]) for g in saved] == [len(g["params"]) for g in own] and len({*keys}) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the state_dict's param_groups hold parameter {twice!r} twice")
    saved_names, own_names = (
        [n for group in gs for n in group.get("param_names", ())] for gs in (saved, own)
    )
    known = set(own_names)
    for position, (theirs, ours) in enumerate(zip(saved_names, own_names, strict=False)):
        if theirs != ours and theirs in known:
            raise ValueError(
                f"{ours}: another order: parameter {position} of the state_dict is {theirs}. Give the "
                "optimizer its parameters in the saved order"
            )


def check_position(name: str, position: int, saved: Any) -> None:
    """Raises ValueError if the state of a parameter, found by its name, comes from another position."""
    if saved is None:
        return
    number = position_of(saved)
    if number is None:
        raise ValueError(f"{name}: {TENSOR_ID} is {_shown(saved)} in the state_dict, not a number")
    if number != position:
        raise ValueError(
            f"{name}: another order: it was parameter {number} in the state_dict, but is the optimizer's "
            f"{position}. Give the optimizer its parameters in the saved order"
        )


def position_of(key: Any) -> int | None:
    """The number of a parameter, even if it has become a string or a tensor; None if it is not a number."""
    try:
        return int(key) if isinstance(key, str) else operator.index(key)
    except (TypeError, ValueError, RuntimeError):
        return None


def local(name: str, param: Tensor) -> Tensor:
    """The part of a parameter that this process holds.

    Raises:
        ValueError: names the parameter and a placement that is not supported.
    """
    if not is_dtensor(type(param)):
        return param
    from pats_kernels import distributed  # takes half a second, so only if it is needed

    distributed.layout_of(name, cast(Any, param))
    return distributed.local(param)


def laid_out_as(value: Tensor, name: str, param: Tensor) -> Tensor:
    """Splits a tensor that has a parameter's whole shape as the parameter is split."""
    if not is_dtensor(type(param)) and not is_dtensor(type(value)):
        return value
    from pats_kernels import distributed

    return distributed.laid_out_as(value, name, param)


class Limits:
    """Checks the range of a state_dict's values. All at the end, so that each device is waited for once."""

    def __init__(self) -> None:
        self._found: dict[torch.device, list[tuple[str, str, Tensor]]] = {}

    def add(self, name: str, key: str, low: Tensor, high: Tensor) -> None:
        """Adds the smallest and the largest value of `key` of the parameter `name`."""
        if type(low) is Tensor and not low.is_meta:  # others have no values to check
            pair = torch.stack((low.detach().double(), high.detach().double()))
            self._found.setdefault(low.device, []).append((name, key, pair))

    def check(self) -> None:
        """Raises a ValueError that names parameter and key if a value is one that no step can produce."""
        for found in self._found.values():
            pairs = torch.stack([pair for _, _, pair in found]).tolist()
            for (name, key, _), (low, high) in zip(found, pairs, strict=True):
                if key == "step":
                    fits = 0 <= low <= MOST_STEPS and low % 1 == 0
                    limits = f"a whole number in [0, {MOST_STEPS}]"
                elif key == "exp_avg_sq":  # infinite or NaN after a gradient that was not finite
                    fits, limits = not low < 0, ">= 0"
                elif key == "sens_stats":  # infinite if a sum overflows float32: then there are no statistics
                    fits, limits = low >= 0 and high >= 0, ">= 0"
                else:
                    fits, limits = low >= 0 and high < math.inf, "finite and >= 0"
                if not fits:
                    value = high if low >= 0 and key != "step" else low
                    raise ValueError(f"{name}: {key} is {value} in the state_dict (must be {limits})")


def checked_entry(
    name: str, param: Tensor, entry: Any, required: Sequence[str], optional: Sequence[str], limits: Limits
) -> State:
    """A copy of one parameter's state on its device. Raises a ValueError that names what does not fit.

    An average keeps its dtype if a kernel supports it. Otherwise (float16; float64 of a parameter that is not
    float64) it becomes float32. Other keys than `required` and `optional` are left out. Missing `sens_stats`,
    which `saved` may leave out, are computed from the averages. Values on the device go to `limits`.
    """
    if not isinstance(entry, Mapping):
        raise ValueError(f"{name}: its state in the state_dict is {_shown(entry)}, not a dictionary")
    copied: State = {}
    for key in sorted((*required, *optional)):
        if key in entry:
            copied[key] = _checked_value(name, param, key, entry[key], limits)
        elif key == "sens_stats" and "exp_avg_sens" in copied and not is_dtensor(type(param)):
            copied[key] = _means(copied, param)
        elif key not in optional:
            raise ValueError(f"{name}: the state_dict has no {key}")
    averages = [key for key in copied if key.startswith("exp_avg")]
    for key in averages:
        if copied[key].dtype != copied[averages[0]].dtype:
            raise ValueError(
                f"{name}: dtype mismatch: {averages[0]} is {copied[averages[0]].dtype} in the state_dict, "
                f"{key} {copied[key].dtype}: a parameter's averages must have one dtype"
            )
    for key in copied.keys() - {"step", "exp_avg"}:
        held = local(name, copied[key])
        if held.numel() > 0:
            limits.add(name, key, *held.aminmax())
    return copied


def _checked_value(name: str, param: Tensor, key: str, value: Any, limits: Limits) -> Tensor:
    """A copy of one of a state_dict's values, in the form in which the state keeps it."""
    if not isinstance(value, Tensor):
        try:
            double = torch.float64 if isinstance(value, float) else None  # not the default, float32
            value = torch.as_tensor(value, dtype=double, device="cpu")
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise ValueError(f"{name}: {key} is {_shown(value)} in the state_dict, not a tensor") from None
    value = value.detach()
    if value.layout is not torch.strided or value.is_nested or value.is_quantized:
        kind = value.layout if value.layout is not torch.strided else value.dtype
        raise ValueError(f"{name}: {key} is {kind} in the state_dict, not a dense tensor")
    shape = {"step": (), "sens_stats": (2,)}.get(key, tuple(param.shape))
    if tuple(value.shape) != shape and (key != "step" or value.numel() != 1):
        raise ValueError(
            f"{name}: shape mismatch: {key} is {tuple(value.shape)} in the state_dict, but must be {shape}"
        )
    if not value.dtype.is_floating_point and (key != "step" or value.dtype in (torch.bool, *COMPLEX)):
        raise ValueError(
            f"{name}: {key} is {value.dtype} in the state_dict, which is not a floating-point dtype"
        )
    if value.is_meta and not param.is_meta:
        raise ValueError(f"{name}: {key} is on the meta device in the state_dict, where it has no values")
    if key.startswith("exp_avg"):
        value = laid_out_as(value, name, param)
    keeps = key.startswith("exp_avg") and value.dtype in STATE_DTYPES
    keeps &= value.dtype != torch.float64 or param.dtype == torch.float64
    if key == "step":
        value = _checked_count(name, value.to(param.device).reshape(()), limits)
    copied = value.to(param.device, value.dtype if keeps else torch.float32, copy=True)
    if type(copied) not in (Tensor, type(param.detach())) and not is_dtensor(type(copied)):
        raise ValueError(f"{name}: {key} is a {type(copied).__name__} in the state_dict, not a plain tensor")
    return copied


def _checked_count(name: str, value: Tensor, limits: Limits) -> Tensor:
    """A step count in the form in which the state keeps it. float32 is that form, others a plain number."""
    if value.dtype != torch.float32:
        limits.add(name, "step", value.double(), value.double())
        return value if value.is_meta else counter_at(value)
    is_whole = (value >= EXACT) & value.isfinite()
    count = torch.where(is_whole, EXACT, value.double())  # every float32 from there on is a count
    limits.add(name, "step", count, count)
    return value


def _means(state: State, param: Tensor) -> Tensor:
    """The means of the averages, as in `sens_stats`."""
    zero = torch.zeros((), dtype=torch.float64, device=param.device)
    averages = (state["exp_avg_sens"], state.get("exp_avg_unc"))
    means = [zero if a is None or a.numel() == 0 else a.mean(dtype=torch.float64) for a in averages]
    return torch.stack(means).to(torch.float32)


def _shown(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
