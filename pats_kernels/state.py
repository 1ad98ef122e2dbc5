"""What `PATS` and `PATSAdamW` share: the state they keep for a parameter, and how it is loaded."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from pats_kernels.backends.tables import capturing
from pats_kernels.hyperparameters import Hyperparameters
from pats_kernels.parts import is_flattened
from pats_kernels.plan import STATE_DTYPES, averages_of, check_param, is_dtensor

State = dict[str, Tensor]
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


def keys_of(values: Hyperparameters) -> frozenset[str]:
    """What a parameter with these hyperparameters keeps."""
    stats = ["sens_stats"] if values.noisy else []
    return frozenset({"step", *averages_of(values.variant, values.noisy), *stats})


def complete(state: State, name: str, param: Tensor, values: Hyperparameters) -> None:
    """Allocates what `state` lacks of `keys_of(values)`, all zero; what it has decides the averages' dtype.

    Raises:
        TypeError, ValueError: naming the parameter, where no kernel could update it.
        RuntimeError: while a CUDA graph is being captured, as every replay would set the state to zero.
    """
    check_param(name, local(name, param))
    if capturing(param.device):
        raise RuntimeError(
            f"{name}: a CUDA graph is being captured before it has its state: take a step first"
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


def check_order(saved: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError where the param groups of a state_dict hold known parameters in another order.

    A parameter's position decides what noise it gets. Other names (of a wrapped model, say) prove nothing.
    """
    saved_names, own_names = (
        [n for group in gs for n in group.get("param_names", ())] for gs in (saved, own)
    )
    known = set(own_names)
    for position, (theirs, ours) in enumerate(zip(saved_names, own_names, strict=False)):
        if theirs != ours and theirs in known:
            raise ValueError(f"{ours}: another order: parameter {position} of the state_dict is {theirs}")


def check_position(name: str, position: int, saved: Any) -> None:
    """Raises ValueError where the state of a parameter, found by its name, comes from another position."""
    if saved is not None and int(saved) != position:
        raise ValueError(
            f"{name}: another order: parameter {int(saved)} of the state_dict is the optimizer's {position}"
        )


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


def checked_entry(
    name: str, param: Tensor, entry: Mapping[str, Any], required: Sequence[str], optional: Sequence[str]
) -> State:
    """A copy of one parameter's state on its device, or a ValueError that names what does not fit.

    Every average keeps its dtype, but for those that no kernel keeps (float16, or float64 of another
    parameter than float64): they become float32. Other keys than those asked for are left out. Means that
    are missing, as `saved` leaves them out, are those of the averages.
    """
    copied: State = {}
    for key in sorted((*required, *optional)):
        if key not in entry:
            if key == "sens_stats" and "exp_avg_sens" in copied and not is_dtensor(type(param)):
                averages = (copied["exp_avg_sens"], copied.get("exp_avg_unc"))
                means = [
                    0.0 if a is None or a.numel() == 0 else a.mean(dtype=torch.float64) for a in averages
                ]
                copied[key] = torch.tensor(means, dtype=torch.float32, device=param.device)
                continue
            if key in optional:
                continue
            raise ValueError(f"{name}: the state_dict has no {key}")
        value = torch.as_tensor(entry[key])
        shape = {"step": (), "sens_stats": (2,)}.get(key, tuple(param.shape))
        if tuple(value.shape) != shape and (key != "step" or value.numel() != 1):
            raise ValueError(
                f"{name}: shape mismatch: {key} is {tuple(value.shape)} in the state_dict, "
                f"{shape} is expected"
            )
        if not value.dtype.is_floating_point and key != "step":
            raise ValueError(f"{name}: {key} is {value.dtype} in the state_dict, which is not a float")
        if key.startswith("exp_avg"):
            value = laid_out_as(value, name, param)
        keeps = key.startswith("exp_avg") and value.dtype in STATE_DTYPES
        keeps &= value.dtype != torch.float64 or param.dtype == torch.float64
        dtype = value.dtype if keeps else torch.float32
        copied[key] = value.to(param.device, dtype, copy=True)
        if key == "step":
            copied[key] = copied[key].reshape(())
    return copied
