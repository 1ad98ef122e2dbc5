"""PATS attached to an optimizer."""

import sys
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial, wraps
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pats_kernels import backends
from pats_kernels.advice import Advisor
from pats_kernels.attaching import attachable, have_no_masters, unwrapped
from pats_kernels.compiling import uncompiled
from pats_kernels.gather import gather
from pats_kernels.hyperparameters import (
    Hyperparameters,
    Normalization,
    Reader,
    Uncertainty,
    defaults_of,
    hyperparameters,
)
from pats_kernels.numbering import KEY, Numbering, check_distinct
from pats_kernels.private import LOAD_HOOKS, LOADED_HOOKS, SAVE_HOOKS, STEP_HOOKS, hooked_step
from pats_kernels.state import (
    TENSOR_ID,
    Counters,
    Limits,
    State,
    check_group,
    check_order,
    check_position,
    check_structure,
    checked_entry,
    is_distributed,
    keep_only,
    nonfinite_counts,
    parameter_names,
    position_of,
    saved,
)
from pats_kernels.step import Launcher

VERSION = 1  # of the state_dict
STATE_KEY = "pats"  # where an optimizer's state_dict carries PATS's
PREFIX = "pats_"  # of its state in the parameters' own entries


def _shared(name: str) -> Any:
    """An attribute that a `PATS` shares with the hooks on its optimizer."""

    def get(pats: "PATS") -> Any:
        return getattr(pats._attachment, name)

    def set_(pats: "PATS", value: Any) -> None:
        setattr(pats._attachment, name, value)

    return property(get, set_)


class PATS:
    """Perturbation According To Sensitivity, attached to any `torch.optim.Optimizer`.

    Before each step of the optimizer, it updates the moving average of every parameter's sensitivity
    |w * g| and adds noise to the parameters that the task does not use. The formula, with its sources, is in
    `pats_kernels.reference`.

        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, fused=True)
        PATS(optimizer)

    A param group's own `noise_scale`, `gamma`, ... wins over the value given here and is read at every
    step, so a schedule may change it. State is allocated at a parameter's first step with a gradient and
    a noise_scale above 0. It is part of `optimizer.state_dict()`. If the optimizer carries a GradScaler's
    `grad_scale` and `found_inf`, PATS unscales the gradients it reads, and a step with infinities changes
    nothing.

    Args:
        optimizer: the one to attach to. PATS reads `p.grad` as it is when `step` begins; it changes neither
            `p.grad` nor the optimizer's own state.
        noise_scale: standard deviation of the noise where the gate is open, in units of w; >= 0; 0 turns
            noise off. For CUDA graphs, a float32 tensor of one element on the parameters' GPU, which a
            schedule can fill.
        gamma: elements with q >= 1/gamma get no noise; >= 0.
        sens_betas: decay rates of the sensitivity and of its uncertainty, each in [0, 1).
        uncertainty: how S and U make q: "product" (S U), "ucb" (S + U) or "none" (S; no U is kept).
        normalization: "delayed" (divides by the means of the state before this step: one pass, no noise in
            the first step) or "exact" (by the means of the state just updated: two passes).
        state_dtype: of the averages, float32 or bfloat16; None: the parameter's, float32 for float16.
        stochastic_rounding: whether writes to bfloat16 round stochastically.
        seed: of the noise, 0 <= seed < 2^64.
        backend: "auto", "triton", "cuda", "cpp" or "eager"; see `available_backends`.

    Attributes:
        state: for each parameter its `exp_avg_sens`, `exp_avg_unc` (the parameter's shape), `sens_stats`
            (float32 [2]: mean(S), mean(U)) and `step` (0-d float32, on the parameter's device).

    Raises:
        ValueError: a hyperparameter out of range, here or in a param group; an optimizer that PATS cannot be
            attached to.
        TypeError: `optimizer` is not an optimizer. At their first step with a gradient: sparse, complex or
            integer parameters.
        RuntimeError: a backend asked for by name that cannot run here.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        noise_scale: float | Tensor = 1e-5,
        gamma: float = 1.0,
        sens_betas: tuple[float, float] = (0.85, 0.95),
        uncertainty: Uncertainty = "product",
        normalization: Normalization = "delayed",
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = True,
        seed: int = 0,
        backend: str = "auto",
    ) -> None:
        optimizer = attachable(optimizer)
        if attached_to(optimizer) is not None:
            raise ValueError(
                f"optimizer is a {type(optimizer).__name__} that has a PATS already; two would add the noise "
                "twice: call remove() on that one first"
            )
        defaults: dict[str, Any] = {
            "noise_scale": noise_scale,
            "gamma": gamma,
            "sens_betas": sens_betas,
            "uncertainty": uncertainty,
            "normalization": normalization,
            "state_dtype": state_dtype,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
        }
        hyperparameters(defaults, defaults)
        backends.check_name(backend)
        for group in optimizer.param_groups:
            hyperparameters(group, defaults)
            for param in group["params"]:
                backends.resolve(backend, param.device)

        self._hold(optimizer, _Attachment(defaults, backend, len(optimizer.param_groups)))
        self._attachment.attach(optimizer)

    def _hold(self, optimizer: Optimizer, attachment: "_Attachment") -> None:
        """Becomes the attachment's public object, unless it has one that is alive."""
        self.optimizer = optimizer
        self._attachment = attachment
        if attachment.handle is None or attachment.handle() is None:
            attachment.handle = weakref.ref(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._hold(self.optimizer, self._attachment)

    state: dict[Tensor, State] = _shared("state")
    defaults: dict[str, Any] = _shared("defaults")
    backend: str = _shared("backend")
    _nonfinite: Counters = _shared("nonfinite")

    def remove(self) -> None:
        """Detaches from the optimizer, which then steps as if PATS had never been there."""
        self._attachment.detach(self.optimizer)

    def nonfinite_counts(self) -> dict[str, int]:
        """How many gradient elements were not finite so far, by parameter name. Waits for the device."""
        return nonfinite_counts(self.optimizer.param_groups, self._nonfinite)

    def pats_summary(self) -> dict[str, float]:
        """What PATS does right now, in numbers for the logs of any loop. Waits for the device once.

            print(pats.pats_summary()["noise_to_weight"])

        The keys are mean_gate, noisy_share, noise_scale, noise_rms, weight_rms and nonfinite, as in
        `analysis.GateSummary`, and noise_to_weight: noise_rms / weight_rms. While there is no state,
        nonfinite is the only key. For sharded parameters the numbers are summed over all processes, so all
        of them must call it.
        """
        from pats_kernels.analysis import gate_summary  # which imports this module

        return gate_summary(self).to_dict()

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value!r}" for name, value in self.defaults.items())
        return f"PATS({type(self.optimizer).__name__}, {values}, backend={self.backend!r})"

    def state_dict(self) -> dict[str, Any]:
        """The hyperparameters and the state by tensor_id. Tensors are not copied, as in torch.optim."""
        return self._attachment.state_dict(self.optimizer)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned; every tensor is copied and keeps its dtype.

        The checkpoint's noise_scale, gamma, seed, ... come back with it, as lr does in torch. To use other
        values, set them after loading, in `defaults` or in the optimizer's param groups. The optimizer's own
        `load_state_dict` does the same.

        Raises:
            ValueError: names the first parameter, key or hyperparameter that does not fit: the state has
                other parameters, shapes or dtypes, or values that no step can produce. Nothing has been
                changed.
        """
        self._attachment.commit(self._attachment.checked(self.optimizer, state_dict))


class _Attachment:
    """The part of a `PATS` that the optimizer's hooks hold.

    It has no reference to the optimizer, which the hooks receive as an argument, and only a weak one to the
    `PATS`. So all of them are freed with their last references, and a copied or pickled optimizer takes its
    attachment along.
    """

    def __init__(
        self,
        defaults: dict[str, Any],
        backend: str,
        groups: int,
        state: dict[Tensor, State] | None = None,
        is_attached: bool = False,
    ) -> None:
        self.defaults = defaults
        self.backend = backend
        self.state: dict[Tensor, State] = {} if state is None else state
        self.is_attached = is_attached
        self.handle: weakref.ref[PATS] | None = None
        self.nonfinite = Counters()
        self._launcher = Launcher(owned=True)
        self._reader = Reader(hyperparameters, Hyperparameters)
        self._numbering = Numbering(groups)
        self._advisor = Advisor(defaults_of(Hyperparameters))
        self._looks_for_masters = 3  # steps: the optimizer has its state after the first that it takes
        self._loaded: dict[str, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """As for a `PATSAdamW`: what was derived from the state is not copied."""
        self._launcher.finish()
        names = ("defaults", "backend", "state", "is_attached")
        return {"groups": self._numbering.groups} | {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def pats(self, optimizer: Optimizer) -> PATS:
        """The user's `PATS` if it is still alive, else a new one."""
        pats = None if self.handle is None else self.handle()
        if pats is None:
            pats = PATS.__new__(PATS)
            pats._hold(optimizer, self)
        return pats

    def attach(self, optimizer: Optimizer) -> None:
        self.is_attached = True
        self._advisor.read(optimizer.param_groups, optimizer.defaults)
        for name, hook in self._hooks(optimizer).items():
            getattr(optimizer, name)[STATE_KEY] = hook
        for name in ("__getstate__", *dict.fromkeys(("load_state_dict", *_overridden(optimizer)))):
            setattr(optimizer, name, _Method(optimizer, name, self, vars(optimizer).get(name)))

    def detach(self, optimizer: Optimizer) -> None:
        self.is_attached = False
        for name in self._hooks(optimizer):
            hooks = getattr(optimizer, name)
            if getattr(hooks.get(STATE_KEY), "__self__", None) is self:
                del hooks[STATE_KEY]
        for name, method in self._methods(optimizer).items():
            delattr(optimizer, name)
            if method.own is not None:
                setattr(optimizer, name, method.own)

    def _hooks(self, optimizer: Optimizer) -> dict[str, Callable[..., Any]]:
        """The hooks by the optimizer's attribute that holds them.

        Their key there is a name. torch's hooks have numbers, which begin anew in each process.
        """
        hooks: dict[str, Callable[..., Any]] = {STEP_HOOKS: self.before_step}
        overridden = _overridden(optimizer)
        if "state_dict" not in overridden:
            hooks[SAVE_HOOKS] = self._join_state_dict
        if "load_state_dict" not in overridden:
            hooks[LOAD_HOOKS] = self._before_load
            hooks[LOADED_HOOKS] = self._after_load
        return hooks

    def _methods(self, optimizer: Optimizer) -> "dict[str, _Method]":
        return {
            name: value
            for name, value in vars(optimizer).items()
            if isinstance(value, _Method) and value.attachment is self
        }

    def _getstate_of(self, optimizer: Optimizer, original: Callable[..., Any]) -> Any:
        """What copies and pickles of the optimizer are made of; without this they would have no hooks."""
        state = original()
        if not isinstance(state, dict):
            warnings.warn(
                f"PATS: {type(optimizer).__name__} has a __getstate__ that returns no dictionary, so "
                "its copies and pickles have no PATS: attach one to each, and load pats.state_dict() there",
                stacklevel=2,
            )
            return state
        hooks = {name: OrderedDict({STATE_KEY: hook}) for name, hook in self._hooks(optimizer).items()}
        return hooks | self._methods(optimizer) | state

    def _state_dict_of(
        self, optimizer: Optimizer, original: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """The optimizer's own `state_dict` with the part of PATS."""
        joined = original(*args, **kwargs)
        self._join_state_dict(optimizer, joined)
        return joined

    def _load_state_dict_of(
        self,
        optimizer: Optimizer,
        original: Callable[..., Any],
        state_dict: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """The optimizer's own `load_state_dict` for its own part, and PATS's for the rest.

        If it runs hooks, PATS's pre-hook is the last, because others may replace the dictionary. PATS's
        post-hook is the first, so that the others find everything loaded.
        """
        if "load_state_dict" not in _overridden(optimizer):
            getattr(optimizer, LOAD_HOOKS).move_to_end(STATE_KEY)
            getattr(optimizer, LOADED_HOOKS).move_to_end(STATE_KEY, last=False)
            result = original(state_dict, *args, **kwargs)
            if _has_state(state_dict) and not self.state:
                warnings.warn(
                    f"PATS: a load_state_dict pre-hook of {type(optimizer).__name__} returned a "
                    f"dictionary without the state of PATS, which the given one holds under {STATE_KEY!r}: "
                    "the sensitivities begin anew. Let the hook keep that entry",
                    stacklevel=3,
                )
            return result
        result = original(self._before_load(optimizer, state_dict), *args, **kwargs)
        self._after_load(optimizer)
        return result

    @uncompiled
    def before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Takes PATS's step on the gradients that the optimizer will use: after the closure, if any."""
        if _is_part_of_a_step(optimizer):
            return None
        closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)
        if not callable(closure):
            self._step(optimizer)
            return None
        wrapped = self._stepping_after(closure, optimizer)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": wrapped}
        return (args[0], wrapped, *args[2:]), kwargs

    def _stepping_after(self, closure: Callable[..., Any], optimizer: Optimizer) -> Callable[..., Any]:
        """The closure, with PATS's step after its first evaluation. Later ones continue from there."""
        evaluated = False

        @wraps(closure)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal evaluated
            loss = _evaluate(closure, args, kwargs)
            if not evaluated:
                evaluated = True
                self._step(optimizer)
            return loss

        return wrapped

    @uncompiled
    @torch.no_grad()
    def _step(self, optimizer: Optimizer) -> None:
        if self._looks_for_masters:
            self._looks_for_masters = 0 if have_no_masters(optimizer) else self._looks_for_masters - 1
        values = self._reader.read(optimizer.param_groups, self.defaults)
        batch, fresh = gather(optimizer.param_groups, values, self.state, self.nonfinite)
        batch = self._numbering.numbered(batch, optimizer.param_groups, fresh)
        if fresh:
            self._prune(optimizer)
            self._advisor.read(optimizer.param_groups, optimizer.defaults)
            self._advisor.judge(batch, fresh)
        grad_scale, found_inf = (getattr(optimizer, name, None) for name in ("grad_scale", "found_inf"))
        self._launcher.launch(batch, self.backend, grad_scale, found_inf)

    def _prune(self, optimizer: Optimizer) -> None:
        """Forgets parameters that are in no group any longer, if the optimizer has forgotten them too."""
        if self._numbering.in_backward or self._numbering.sees_a_part(optimizer.param_groups):
            return  # with released gradients, each parameter is stepped alone
        params = parameter_names(optimizer.param_groups)
        for param in [p for p in self.state if p not in params and p not in optimizer.state]:
            del self.state[param]
        keep_only(self.nonfinite, self.state)

    def state_dict(self, optimizer: Optimizer) -> dict[str, Any]:
        self._launcher.finish()
        ids = {param: i for i, param in enumerate(parameter_names(optimizer.param_groups))}
        return {
            "version": VERSION,
            "num_params": len(ids),
            "defaults": dict(self.defaults),
            "state": {ids[p]: dict(saved(p, state)) for p, state in self.state.items() if p in ids},
        }

    def checked(self, optimizer: Optimizer, state_dict: Any) -> dict[str, Any]:
        """A copy of `state_dict` for this optimizer's parameters and devices. Raises if it does not fit."""
        if not isinstance(state_dict, Mapping) or not isinstance(state_dict.get("state"), Mapping):
            raise ValueError("not a state_dict of PATS: it has no 'state' that is a dictionary")
        version, saved_defaults = state_dict.get("version", VERSION), state_dict.get("defaults", {})
        if (number := position_of(version)) is None or number > VERSION:
            raise ValueError(
                f"state_dict version {version!r} is newer than this package's, {VERSION}: update pats_kernels"
            )
        if not isinstance(saved_defaults, Mapping):
            raise ValueError("not a state_dict of PATS: its 'defaults' is not a dictionary")
        defaults = self.defaults | dict(saved_defaults)
        hyperparameters(defaults, defaults)
        names = parameter_names(optimizer.param_groups)
        count = state_dict.get("num_params", len(names))
        if position_of(count) != len(names):
            raise ValueError(
                f"state_dict has {count!r} parameters (num_params), the optimizer has {len(names)}"
            )
        params = list(names)
        state: dict[Tensor, State] = {}
        limits = Limits()
        for key, entry in state_dict["state"].items():
            position = position_of(key)
            if position is None or not 0 <= position < len(params):
                raise ValueError(
                    f"state_dict has state for parameter {key!r}, but the optimizer has {len(params)} "
                    "parameters"
                )
            param = params[position]
            if param in state:
                raise ValueError(f"{names[param]}: the state_dict has its state twice")
            state[param] = checked_entry(names[param], param, entry, _REQUIRED, _OPTIONAL, limits)
        limits.check()
        return {"defaults": defaults, "state": state}

    def commit(self, checked: dict[str, Any]) -> None:
        self.defaults = {name: checked["defaults"][name] for name in defaults_of(Hyperparameters)}
        self.state = checked["state"]
        self._launcher = Launcher(owned=True)  # the old one keeps the old state alive
        self.nonfinite = Counters()

    def _join_state_dict(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        own = self.state_dict(optimizer)
        state_dict[STATE_KEY] = own
        if is_distributed():  # torch.distributed.checkpoint saves only groups and parameters' entries
            entries = state_dict["state"]
            state_dict["state"] = entries | {
                position: {**entries.get(position, {}), **_prefixed(entry | {TENSOR_ID: position})}
                for position, entry in own["state"].items()
            }
            groups = state_dict["param_groups"]
            state_dict["param_groups"] = [{**group, STATE_KEY: own["defaults"]} for group in groups]

    def _before_load(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Checks PATS's part before the optimizer loads its own, so that an error leaves both unchanged."""
        check_structure(state_dict)
        check_order(state_dict["param_groups"], optimizer.param_groups)
        rest, part = self._split(optimizer, state_dict)
        part = state_dict.get(STATE_KEY, part)
        if part is not None:
            loaded = self.checked(optimizer, part)
            kept: list[dict[str, Any]] = [{} for _ in rest["param_groups"]]
        else:  # the checkpoint is from a run without PATS, so its groups hold nothing of PATS
            loaded = {"defaults": self.defaults, "state": {}}
            names = (*defaults_of(Hyperparameters), KEY)
            kept = [{name: g[name] for name in names if name in g} for g in optimizer.param_groups]
        groups = [{**old, **group} for old, group in zip(kept, rest["param_groups"], strict=False)]
        for group, own in zip(groups, optimizer.param_groups, strict=False):
            check_group(hyperparameters(group, loaded["defaults"]), own["params"])
        check_distinct(groups)
        self._loaded = loaded | {"kept": kept}
        return rest

    def _split(
        self, optimizer: Optimizer, state_dict: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """The optimizer's own part, and PATS's part from the groups and from the parameters' entries."""
        groups = [dict(group) for group in state_dict["param_groups"]]
        defaults = [group.pop(STATE_KEY) for group in groups if STATE_KEY in group]
        rest: dict[Any, Any] = {}
        state: dict[int, Any] = {}
        names = list(parameter_names(optimizer.param_groups).values())
        positions = {key: i for i, key in enumerate(chain.from_iterable(group["params"] for group in groups))}
        for key, entry in state_dict["state"].items():
            if not isinstance(entry, Mapping):  # of the optimizer as a whole: MADGRAD counts its steps there
                rest[key] = entry
                continue
            own = {name.removeprefix(PREFIX): value for name, value in entry.items() if _is_prefixed(name)}
            others = {name: value for name, value in entry.items() if not _is_prefixed(name)}
            if own and key in positions and positions[key] < len(names):
                position = positions[key]
                check_position(names[position], position, own.pop(TENSOR_ID, None))
                state[position] = own
            if others or not own:
                rest[key] = others
        part = {"defaults": defaults[0], "state": state} if defaults else None
        return {**state_dict, "state": rest, "param_groups": groups}, part

    def _after_load(self, optimizer: Optimizer) -> None:
        if self._loaded is not None:
            self.commit(self._loaded)
            for group, kept in zip(optimizer.param_groups, self._loaded["kept"], strict=True):
                for name, value in kept.items():
                    group.setdefault(name, value)
            self._loaded = None


class _Method:
    """Replaces a method of one optimizer, without keeping that optimizer alive.

    Args:
        optimizer: the optimizer; in a copy, the copy.
        name: of the method.
        attachment: what the call goes to while it is attached.
        own: the attribute of this name that the optimizer itself had before, if any.
    """

    def __init__(
        self, optimizer: Optimizer, name: str, attachment: _Attachment, own: Callable[..., Any] | None
    ) -> None:
        self._optimizer = weakref.ref(optimizer)
        self.__name__ = name
        self.attachment = attachment
        self.own = own

    def __reduce__(self) -> tuple[Any, ...]:
        return _Method, (self._optimizer(), self.__name__, self.attachment, self.own)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        optimizer = self._optimizer()
        if optimizer is None:
            raise ReferenceError(f"{self.__name__} of an optimizer that is gone")
        original = self.own or partial(getattr(type(optimizer), self.__name__), optimizer)
        if not self.attachment.is_attached:
            return original(*args, **kwargs)
        name = f"_{self.__name__.strip('_')}_of"
        return getattr(self.attachment, name)(optimizer, original, *args, **kwargs)


def _evaluate(closure: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Calls a closure. A function of its own, so that `_is_part_of_a_step` recognizes it on the stack."""
    return closure(*args, **kwargs)


def _is_part_of_a_step(optimizer: Optimizer) -> bool:
    """Whether the hooks run for the `super().step()` of a step for which they have run already.

    torch runs them for both, once there has been an optimizer of the parent's class. A step taken inside a
    closure, as released gradients do in its backward, counts as a step of its own.
    """
    frame, seen, step = sys._getframe(1), False, hooked_step(optimizer)
    while frame is not None and frame.f_code is not _EVALUATE:
        if frame.f_code is step and frame.f_locals.get("self") is optimizer:
            if seen:
                return True
            seen = True
        frame = frame.f_back
    return False


_EVALUATE = _evaluate.__code__


def _overridden(optimizer: Optimizer) -> list[str]:
    """The methods that its class overrides; those may run no hooks."""
    names = ("state_dict", "load_state_dict")
    return [name for name in names if getattr(type(optimizer), name) is not getattr(Optimizer, name)]


def attached_to(optimizer: Optimizer) -> PATS | None:
    """The `PATS` that is attached to an optimizer, or None."""
    optimizer = unwrapped(optimizer)
    hook = getattr(optimizer, STEP_HOOKS, {}).get(STATE_KEY)
    attachment = getattr(hook, "__self__", None)
    return attachment.pats(optimizer) if isinstance(attachment, _Attachment) else None


def _has_state(state_dict: Any) -> bool:
    """Whether an optimizer's state_dict contains state of PATS."""
    part = state_dict.get(STATE_KEY) if isinstance(state_dict, Mapping) else None
    return isinstance(part, Mapping) and bool(part.get("state"))


def _prefixed(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{PREFIX}{name}": value for name, value in entry.items()}


def _is_prefixed(name: Any) -> bool:
    return isinstance(name, str) and name.startswith(PREFIX)


_REQUIRED = ("exp_avg_sens", "sens_stats", "step")
_OPTIONAL = ("exp_avg_unc",)  # uncertainty="none" keeps none
