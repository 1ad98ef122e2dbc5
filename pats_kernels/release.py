"""Gradient release: steps each parameter during backward and frees its gradient."""

import inspect
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from pats_kernels.plan import is_dtensor
from pats_kernels.private import STEP_HOOKS
from pats_kernels.state import TENSOR_ID, is_distributed, parameter_names

SCALER = ("grad_scale", "found_inf")  # the attributes that a GradScaler sets on an optimizer for its step


def release_gradients(optimizer: Optimizer, *, synchronized: bool = False) -> "GradientRelease":
    """Steps each parameter in backward as soon as its gradient is complete, and frees it.

    So the gradients never exist all at once. The optimizer keeps its param groups, schedules and checkpoints,
    and the results have the same bits as with the plain step. `optimizer.step()` and `zero_grad()` stay in
    the loop; they find nothing left to do.

        optimizer = PATSAdamW(model.parameters(), lr=2e-5)
        release_gradients(optimizer)

    Nothing that needs all gradients at once works: clipping by a global norm finds no gradients and clips
    nothing, and a GradScaler is refused, because it decides too late whether to skip a step. Step hooks run
    once for each parameter. Parameters that are added or unfrozen later are stepped once by
    `optimizer.step()`, and released from then on. It ends when the optimizer is freed, so keep the optimizer
    or the handle.

    Args:
        optimizer: a `PATSAdamW`, or any optimizer that keeps its state for each parameter separately, with or
            without `PATS` attached.
        synchronized: with several processes, True says that the gradients of plain parameters are complete
            when backward has accumulated them. That is not so under DistributedDataParallel, which averages
            them afterwards. Sharded parameters (FSDP2) do not need it.

    Returns:
        The handle, with `accumulate()` and `remove()`.

    Raises:
        TypeError: not a `torch.optim.Optimizer`, or one that needs a closure (LBFGS).
        ValueError: the gradients of the optimizer, or of one of its parameters, are released already.
        RuntimeError: names a parameter that FSDP1 has flattened, or a plain parameter in one of several
            processes; or the optimizer carries a GradScaler's `grad_scale` or `found_inf`.
    """
    return GradientRelease(optimizer, synchronized)


class _Place(NamedTuple):
    """Where a parameter is in its optimizer."""

    param: Tensor
    name: str
    group: int
    slot: int  # in its group
    position: int  # among all parameters


class GradientRelease:
    """What `release_gradients` returns: released gradients, until `remove()`."""

    def __init__(self, optimizer: Optimizer, synchronized: bool) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, but is {type(optimizer).__name__}")
        closure = inspect.signature(type(optimizer).step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise TypeError(
                f"{type(optimizer).__name__} needs a closure, which evaluates the model within the step, so "
                "its gradients cannot be released"
            )
        hooks = getattr(optimizer, STEP_HOOKS, {}).values()
        if any(isinstance(getattr(hook, "__self__", None), GradientRelease) for hook in hooks):
            raise ValueError(
                f"the gradients of this {type(optimizer).__name__} are released already: use that handle"
            )
        self.optimizer = optimizer
        self._synchronized = synchronized
        self._holding = 0  # how deeply `accumulate()` is nested
        self._stepping = False
        self._lock = threading.RLock()  # each GPU's part of a backward pass runs in a thread of its own
        self._layout: list[list[int]] = []  # ids of the groups' parameters that `_places` was made for
        self._places: dict[int, _Place] = {}  # by a parameter's id
        self._hooks: dict[int, RemovableHandle] = {}
        self._times: dict[int, int] = {}  # how often each was stepped since the last `optimizer.step()`
        self._changed: set[tuple[int, str]] = set()  # group and key that steps have changed since then
        self._refuse_scaler()
        self._find_places()
        self._attach()
        self._step_hook = optimizer.register_step_pre_hook(self._before_step)

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Backward passes in the `with` block keep their gradients. The next one outside steps on the sum."""
        self._holding += 1
        try:
            yield
        finally:
            self._holding -= 1

    def remove(self) -> None:
        """Ends the release: gradients stay until `optimizer.step()` and `zero_grad()` again."""
        self._step_hook.remove()
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()

    def _find_places(self) -> None:
        """Notes where each parameter is now. Removes the hooks of parameters that have left the optimizer."""
        groups = self.optimizer.param_groups
        layout = [list(map(id, group["params"])) for group in groups]
        if layout == self._layout:
            return
        names, places = parameter_names(groups), {}
        for number, group in enumerate(groups):
            for index, param in enumerate(group["params"]):
                places[id(param)] = _Place(param, names[param], number, index, len(places))
        for key in self._hooks.keys() - places.keys():
            self._hooks.pop(key).remove()
        self._layout, self._places = layout, places

    def _attach(self) -> None:
        """Gives a hook to each parameter that requires a gradient and has no hook yet."""
        places = self._places.items()
        new = {key: place for key, place in places if key not in self._hooks and place.param.requires_grad}
        for place in new.values():
            self._check(place)
        for key, place in new.items():
            self._hooks[key] = place.param.register_post_accumulate_grad_hook(_Hook(self))

    def _check(self, place: _Place) -> None:
        if getattr(place.param, "_fsdp_flattened", False):
            raise RuntimeError(
                f"{place.name}: FSDP1 (FullyShardedDataParallel) has flattened it, and completes gradients "
                "too late for this: use FSDP2 (fully_shard)"
            )
        self._require_complete(place)
        hooks = getattr(place.param, "_post_accumulate_grad_hooks", None) or {}
        if any(isinstance(hook, _Hook) and hook.release() is not None for hook in hooks.values()):
            raise ValueError(f"{place.name}: another optimizer releases its gradient already")

    def _require_complete(self, place: _Place) -> None:
        """Raises RuntimeError if the gradient may still lack the other processes' part."""
        if self._synchronized or is_dtensor(type(place.param)) or not is_distributed():
            return
        if (size := dist.get_world_size()) > 1:
            raise RuntimeError(
                f"{place.name}: a plain parameter in one of {size} processes: DistributedDataParallel "
                "averages gradients after backward has accumulated them, and keeps all of them in its "
                "buckets. Shard with FSDP2 (fully_shard), or pass synchronized=True if gradients are "
                "complete by then"
            )

    def _refuse_scaler(self) -> None:
        for name in SCALER:
            if getattr(self.optimizer, name, None) is not None:
                raise RuntimeError(
                    f"the optimizer carries {name} of a GradScaler, which decides whether to skip a step "
                    "after it has seen all gradients; released ones are gone by then. Use bfloat16 without "
                    "a scaler"
                )

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Runs before the loop's own step, which then steps only parameters that no hook has released."""
        if self._stepping:
            return
        times, self._times = self._times, {}
        self._changed.clear()
        self._refuse_scaler()
        self._find_places()
        for key, count in times.items():
            if (place := self._places.get(key)) is None:
                continue
            if place.param.grad is not None:
                raise RuntimeError(
                    f"{place.name}: has a gradient again after it was stepped in backward: something writes "
                    "it later, as DistributedDataParallel does, so the step was taken with an incomplete one"
                )
            if count > 1:
                raise RuntimeError(
                    f"{place.name}: was stepped {count} times in backward for one optimizer.step(). Put all "
                    "backward passes but the last in accumulate(). If there was one only: a weight that is "
                    "used several times must not be in a part checkpointed with use_reentrant=True"
                )
        self._attach()

    def _release(self, param: Tensor) -> None:
        """Steps one parameter, whose gradient is complete, and frees the gradient."""
        with self._lock:
            if self._holding:
                self._times.pop(id(param), None)
                return
            place = self._place_of(param)
            if place is None or param.grad is None:
                return
            self._require_complete(place)
            self._refuse_scaler()
            self._step(place)
            param.grad = None

    def _place_of(self, param: Tensor) -> _Place | None:
        """The parameter's place; None if it has left the optimizer."""
        for _ in range(2):
            place, groups = self._places.get(id(param)), self.optimizer.param_groups
            if place is not None and place.group < len(groups):
                params = groups[place.group]["params"]
                if place.slot < len(params) and params[place.slot] is param:
                    return place
            self._find_places()
        return None

    def _step(self, place: _Place) -> None:
        """The optimizer's step, as if it had this parameter alone."""
        optimizer, key = self.optimizer, id(place.param)
        groups = optimizer.param_groups
        group = groups[place.group]
        own = {"params": [place.param], "param_names": [place.name], TENSOR_ID: _number(group, place)}
        narrowed = {**group, **own}
        if key in self._times:  # another backward pass, in a loop without `optimizer.step()`
            self._changed.clear()
        optimizer.param_groups = [narrowed]
        self._stepping = True
        try:
            optimizer.step()
        finally:
            self._stepping = False
            optimizer.param_groups = groups
            values = {name: value for name, value in narrowed.items() if name not in own}
            changed = [name for name, value in values.items() if not _same(value, group.get(name, group))]
            group.update({name: values[name] for name in changed})
        self._times[key] = self._times.get(key, 0) + 1
        for name in changed:
            if (place.group, name) in self._changed:
                raise RuntimeError(
                    f"{type(optimizer).__name__} changes {name!r} of a param group at every step, for all "
                    "of its parameters together: they cannot be stepped one by one, so do not release them"
                )
            self._changed.add((place.group, name))


class _Hook:
    """A parameter's hook. It keeps nothing alive, because Python cannot collect a cycle through a hook."""

    def __init__(self, release: GradientRelease) -> None:
        self.release = weakref.ref(release)

    def __call__(self, param: Tensor) -> None:
        if (release := self.release()) is not None:
            release._release(param)


def _number(group: Mapping[str, Any], place: _Place) -> int:
    """The tensor_id that the parameter's noise depends on."""
    numbers = group.get(TENSOR_ID)
    if numbers is None:
        return place.position
    return numbers + place.slot if isinstance(numbers, int) else numbers[place.slot]


def _same(value: Any, other: Any) -> bool:
    return value is other or (
        not isinstance(value, Tensor) and not isinstance(other, Tensor) and value == other
    )
