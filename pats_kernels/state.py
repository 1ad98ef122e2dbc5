"""What `PATS` and `PATSAdamW` share: the state they keep for a parameter, and how it is loaded."""

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
TENSOR_ID = "tensor_id"  # in a state_dict's entry: the position on which a parameter's noise depends


def parameter_names(param_groups: Sequence[Mapping[str, Any]]) -> dict[Tensor, str]:
    """Each parameter's name as its optimizer has it, else its place in the param groups, in their order."""
    names: dict[Tensor, str] = {}
    for number, group in enumerate(param_groups):
        places = [f"param_groups[{number}]['params'][{i}]" for i in range(len(group["params"]))]
        names |= zip(group["params"], group.get("param_names", places), strict=True)
    return names


def name_finder(param_groups: Sequence[Mapping[str, Any]]) -> Callable[[Tensor], str]:
    """Gives parameters' names, which it makes when it is first asked for one."""
    names: dict[Tensor, str] = {}

    def name_of(param: Tensor) -> str:
        if not names:
            names.update(parameter_names(param_groups))
        return names[param]

    return name_of


def nonfinite_counts(
    param_groups: Sequence[Mapping[str, Any]], counters: Mapping[int, Tensor]
) -> dict[str, int]:
    """What the counters, by their parameter's id, have counted, without zeros. Waits for the device."""
    names = parameter_names(param_groups)
    counts = {name: int(counters[id(param)]) for param, name in names.items() if id(param) in counters}
    return {name: count for name, count in counts.items() if count > 0}


class Counters(dict[int, Tensor]):
    """How many elements were not finite, by their parameter's id: its hash would be slow at each step.

    A parameter that is gone takes its counter along, as the next one may get its id.
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
        """To be called with each parameter that is given a counter."""
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
        """The parameters' counters, None for those without noise: the same list as long as nothing changes.

        Args:
            stats: what those with noise have on the device where their counters have to be.
            moved: some are elsewhere.
        """
        of = list(map(id, params)), noisy
        if moved or of != self._column_of:
            rows = zip(params, noisy, stats, strict=True)
            column = [counter_of(self, param, own.device) if has else None for param, has, own in rows]
            self._column, self._column_of = Own(column), of
        return self._column


def counter_of(counters: Counters, param: Tensor, device: torch.device) -> Tensor:
    """A parameter's counter of elements that were not finite, made anew or moved where it has to be."""
    count = counters.get(id(param))
    if count is None or count.device != device:
        zero = torch.zeros((), dtype=torch.int64, device=device)
        if count is None:
            counters.watch(param)
        count = counters[id(param)] = zero if count is None else zero + count.to(device)
    return count


def have_moved(counters: Mapping[int, Tensor], params: Sequence[Tensor], state: Mapping[Tensor, Any]) -> bool:
    """Whether a group's counters are not where its state is. Looks at the first that has both."""
    for param in params:
        count = counters.get(id(param))
        if count is not None and "step" in (entry := state.get(param, {})):
            step = entry["step"]  # what is no tensor is named where the step's tensors are checked
            return isinstance(step, Tensor) and count.device != step.device
    return False


def keep_only(counters: Counters, params: Collection[Tensor]) -> None:
    """Drops the counters of all other parameters."""
    kept = set(map(id, params))
    for key in counters.keys() - kept:
        del counters[key]


def keys_of(values: Hyperparameters) -> frozenset[str]:
    """What a parameter with these hyperparameters keeps: of PATS alone nothing where there is no noise."""
    return _keys_of(values.variant, values.noisy)


@cache
def _keys_of(variant: Variant, noisy: bool) -> frozenset[str]:
    steps = ("step",) if noisy or variant.form != "pats" else ()
    return frozenset((*steps, *averages_of(variant, noisy), *(("sens_stats",) if noisy else ())))


def complete(state: State, name: str, param: Tensor, values: Hyperparameters) -> None:
    """Allocates what `state` lacks of `keys_of(values)`, all zero; what it has decides the averages' dtype.

    Raises:
        TypeError, ValueError: naming the parameter, where no kernel could update it.
        RuntimeError: while a CUDA graph is being captured, as every replay would set the state to zero.
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
    """What a state_dict holds of a parameter's state.

    Of FSDP1's parts not their means, which `FSDP.optim_state_dict` could not gather, as they are neither one
    number nor of the part's shape: `checked_entry` computes them anew.
    """
    return {key: state[key] for key in state if key != "sens_stats"} if is_flattened(param) else state


def is_distributed() -> bool:
    """Whether this is one of several processes."""
    return dist.is_available() and dist.is_initialized()


def check_structure(state_dict: Any) -> None:
    """Raises ValueError, naming what is missing, where a state_dict is not built as those of torch.optim."""
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
    """Raises ValueError where a hyperparameter lies on another device than a param group's parameters."""
    for name, value in values.on_device.items():
        other = next((param.device for param in params if param.device != value.device), None)
        if other is not None:
            raise ValueError(
                f"device mismatch: {name} is on {value.device} in the state_dict, its parameters on {other}"
            )


def check_order(saved: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError where the param groups of a state_dict hold known parameters in another order, or
    do not tell them apart.

    A parameter's position decides what noise it gets. Other names (of a wrapped model, say) prove nothing.
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
    """Raises ValueError where the state of a parameter, found by its name, comes from another position."""
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
    """The number of a parameter, which may have become a string or a tensor on its way; None: it is none."""
    try:
        return int(key) if isinstance(key, str) else operator.index(key)
    except (TypeError, ValueError, RuntimeError):
        return None


def local(name: str, param: Tensor) -> Tensor:
    """What this process holds of a parameter.

    Raises:
        ValueError: naming it and a placement that no step could work with.
    """
    if not is_dtensor(type(param)):
        return param
    from pats_kernels import distributed  # half a second, which only they wait who need it

    distributed.layout_of(name, cast(Any, param))
    return distributed.local(param)


def laid_out_as(value: Tensor, name: str, param: Tensor) -> Tensor:
    """A tensor of a parameter's whole shape, split as the parameter is."""
    if not is_dtensor(type(param)) and not is_dtensor(type(value)):
        return value
    from pats_kernels import distributed

    return distributed.laid_out_as(value, name, param)


class Limits:
    """What the values of a state_dict have to keep to. They are looked at together, so that each device is
    waited for once."""

    def __init__(self) -> None:
        self._found: dict[torch.device, list[tuple[str, str, Tensor]]] = {}

    def add(self, name: str, key: str, low: Tensor, high: Tensor) -> None:
        """Two numbers of `key` of the parameter `name`: the least and the largest."""
        if type(low) is Tensor and not low.is_meta:  # others have no values to look at
            pair = torch.stack((low.detach().double(), high.detach().double()))
            self._found.setdefault(low.device, []).append((name, key, pair))

    def check(self) -> None:
        """Raises ValueError, naming parameter and key, where a value is one that no step could have left."""
        for found in self._found.values():
            pairs = torch.stack([pair for _, _, pair in found]).tolist()
            for (name, key, _), (low, high) in zip(found, pairs, strict=True):
                if key == "step":
                    fits = 0 <= low <= MOST_STEPS and low % 1 == 0
                    limits = f"a whole number in [0, {MOST_STEPS}]"
                elif key == "exp_avg_sq":  # a gradient that is not finite has made these infinite, or NaN
                    fits, limits = not low < 0, ">= 0"
                elif key == "sens_stats":  # infinite where some elements' sum leaves float32: no statistics
                    fits, limits = low >= 0 and high >= 0, ">= 0"
                else:
                    fits, limits = low >= 0 and high < math.inf, "finite and >= 0"
                if not fits:
                    value = high if low >= 0 and key != "step" else low
                    raise ValueError(f"{name}: {key} is {value} in the state_dict (must be {limits})")


def checked_entry(
    name: str, param: Tensor, entry: Any, required: Sequence[str], optional: Sequence[str], limits: Limits
) -> State:
    """A copy of one parameter's state on its device, or a ValueError that names what does not fit.

    Every average keeps its dtype, but for those that no kernel keeps (float16, or float64 of another
    parameter than float64): they become float32. Other keys than those asked for are left out. Means that
    are missing, as `saved` leaves them out, are those of the averages. What only the device knows is left to
    `limits`.
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
    """A copy of one of a state_dict's values as the state keeps it."""
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
    """A step count as the state keeps it; float32 is how it has been kept, anything else a plain number."""
    if value.dtype != torch.float32:
        limits.add(name, "step", value.double(), value.double())
        return value if value.is_meta else counter_at(value)
    is_whole = (value >= EXACT) & value.isfinite()
    count = torch.where(is_whole, EXACT, value.double())  # every float32 from there on is a count
    limits.add(name, "step", count, count)
    return value


def _means(state: State, param: Tensor) -> Tensor:
    """The means of the averages, as `sens_stats` has them."""
    zero = torch.zeros((), dtype=torch.float64, device=param.device)
    averages = (state["exp_avg_sens"], state.get("exp_avg_unc"))
    means = [zero if a is None or a.numel() == 0 else a.mean(dtype=torch.float64) for a in averages]
    return torch.stack(means).to(torch.float32)


def _shown(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
