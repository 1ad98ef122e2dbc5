"""PATS attached to an optimizer."""

from collections.abc import Callable, Mapping
from functools import wraps
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pats_kernels import backends
from pats_kernels.advice import Advisor
from pats_kernels.attaching import attachable, have_no_masters, unwrapped
from pats_kernels.compiling import uncompiled
from pats_kernels.hyperparameters import (
    Hyperparameters,
    Normalization,
    Uncertainty,
    defaults_of,
    hyperparameters,
)
from pats_kernels.numbering import Numbering, ids_of
from pats_kernels.plan import Batch
from pats_kernels.state import (
    TENSOR_ID,
    State,
    check_order,
    check_position,
    checked_entry,
    complete,
    is_distributed,
    keys_of,
    name_finder,
    nonfinite_counts,
    parameter_names,
    saved,
)
from pats_kernels.step import Launcher

VERSION = 1  # of the state_dict
STATE_KEY = "pats"  # where an optimizer's state_dict carries PATS's
PREFIX = "pats_"  # of its state in the parameters' own entries


class PATS:
    """Perturbation According To Sensitivity, attached to any `torch.optim.Optimizer`.

    Before each of the optimizer's steps, updates the moving average of every parameter's sensitivity
    |w * g| and adds noise to the parameters the task does not use. The formula, with its sources, is in
    `pats_kernels.reference`.

        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, fused=True)
        PATS(optimizer)

    A param group's own `noise_scale`, `gamma`, ... wins over the value given here and is read at every
    step, so a schedule may change it. State is allocated at a parameter's first step with a gradient and
    a noise_scale above 0. It rides in `optimizer.state_dict()`. Where the optimizer carries a GradScaler's
    `grad_scale` and `found_inf`, gradients are unscaled and a step with infinities changes nothing.

    Args:
        optimizer: its `p.grad` is read as it stands when `step` begins; neither it nor the optimizer's own
            state is changed.
        noise_scale: standard deviation of the noise where the gate is open, in units of w; >= 0, 0: off. For
            CUDA graphs, a float32 tensor of one element on the parameters' GPU, which a schedule fills.
        gamma: elements with q >= 1/gamma get no noise; >= 0.
        sens_betas: decay rates of the sensitivity and of its uncertainty, each in [0, 1).
        uncertainty: how S and U make q: "product" (S U), "ucb" (S + U) or "none" (S; no U is kept).
        normalization: "delayed" (means of the state before this step: one pass, no noise in the first
            step) or "exact" (means of the state just updated: two passes).
        state_dtype: of the averages, float32 or bfloat16; None: the parameter's, float32 for float16.
        stochastic_rounding: whether writes to bfloat16 round stochastically.
        seed: of the noise, 0 <= seed < 2^64.
        backend: "auto", "triton", "cuda", "cpp" or "eager"; see `available_backends`.

    Attributes:
        state: for each parameter its `exp_avg_sens`, `exp_avg_unc` (the parameter's shape), `sens_stats`
            (float32 [2]: mean(S), mean(U)) and `step` (0-d float32, on the parameter's device).

    Raises:
        ValueError: a hyperparameter out of range, here or in a param group.
        TypeError: `optimizer` is not one; sparse, complex or integer parameters.
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
                f"optimizer is a {type(optimizer).__name__} that has a PATS already, and two add it twice: "
                "remove() that one first"
            )
        self.optimizer = optimizer
        self.backend = backend
        self.defaults: dict[str, Any] = {
            "noise_scale": noise_scale,
            "gamma": gamma,
            "sens_betas": sens_betas,
            "uncertainty": uncertainty,
            "normalization": normalization,
            "state_dtype": state_dtype,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
        }
        hyperparameters(self.defaults, self.defaults)
        backends.check_name(backend)
        for group in optimizer.param_groups:
            hyperparameters(group, self.defaults)
            for param in group["params"]:
                backends.resolve(backend, param.device)

        self.state: dict[Tensor, State] = {}
        self._nonfinite: dict[int, Tensor] = {}  # by id: a tensor's hash is slow, and `state` keeps it alive
        self._launcher = Launcher(owned=True)
        self._numbering = Numbering(len(optimizer.param_groups), in_cycle=True)
        self._advisor = Advisor(defaults_of(Hyperparameters))
        self._advisor.read(optimizer.param_groups, optimizer.defaults)
        self._looks_for_masters = 3  # steps: the optimizer has its state after the first that it takes
        self._loaded: dict[str, Any] | None = None
        self._hooks = [optimizer.register_step_pre_hook(self._before_step)]
        self._replaced: list[str] = []
        for name, replacement in (
            ("state_dict", self._state_dict_of),
            ("load_state_dict", self._load_state_dict_of),
        ):
            if getattr(type(optimizer), name) is not getattr(Optimizer, name):  # its own may run no hooks
                setattr(optimizer, name, replacement(getattr(optimizer, name)))
                self._replaced.append(name)
        if "state_dict" not in self._replaced:
            self._hooks.append(optimizer.register_state_dict_post_hook(self._join_state_dict))
        if "load_state_dict" not in self._replaced:
            self._hooks.append(optimizer.register_load_state_dict_pre_hook(self._before_load))
            self._hooks.append(optimizer.register_load_state_dict_post_hook(self._after_load))

    def remove(self) -> None:
        """Detaches from the optimizer, which then steps as if PATS had never been there."""
        for hook in self._hooks:
            hook.remove()
        for name in self._replaced:
            delattr(self.optimizer, name)
        self._hooks.clear()
        self._replaced.clear()

    def nonfinite_counts(self) -> dict[str, int]:
        """How many gradient elements were not finite so far, by parameter. Waits for the device."""
        return nonfinite_counts(self.optimizer.param_groups, self._nonfinite)

    def pats_summary(self) -> dict[str, float]:
        """What PATS does right now, in numbers for any loop's logs. Waits for the device, once.

            print(pats.pats_summary()["noise_to_weight"])

        The keys are mean_gate, noisy_share, noise_scale, noise_rms, weight_rms and nonfinite, as in
        `analysis.GateSummary`, and noise_to_weight: noise_rms / weight_rms. While there is no state there is
        nonfinite alone. Of sharded parameters all processes add up, and so have to call it.
        """
        from pats_kernels.analysis import gate_summary  # which imports this module

        return gate_summary(self).to_dict()

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value!r}" for name, value in self.defaults.items())
        return f"PATS({type(self.optimizer).__name__}, {values}, backend={self.backend!r})"

    @uncompiled
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Steps on the gradients that the optimizer will step on: a closure has yet to compute them."""
        closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)
        if not callable(closure):
            self._step()
            return None
        wrapped = self._stepping_after(closure)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": wrapped}
        return (args[0], wrapped, *args[2:]), kwargs

    def _stepping_after(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        """The closure, with PATS's step after its first evaluation: later ones search from there."""
        evaluated = False

        @wraps(closure)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal evaluated
            loss = closure(*args, **kwargs)
            if not evaluated:
                evaluated = True
                self._step()
            return loss

        return wrapped

    @uncompiled
    @torch.no_grad()
    def _step(self) -> None:
        optimizer = self.optimizer
        if self._looks_for_masters:
            self._looks_for_masters = 0 if have_no_masters(optimizer) else self._looks_for_masters - 1
        rows: list[tuple[Any, ...]] = []
        fresh: list[Tensor] = []
        name_of = name_finder(optimizer.param_groups)
        position = 0
        for group in optimizer.param_groups:
            values = hyperparameters(group, self.defaults)
            needed = keys_of(values)
            has_unc = "exp_avg_unc" in needed
            ids = ids_of(group, position)
            position += len(ids)
            for param, tensor_id in zip(group["params"], ids, strict=True):
                grad = param.grad
                if grad is None or not values.noisy:
                    continue
                state = self.state.get(param)
                if state is None or not needed <= state.keys():
                    if param.numel() == 0:
                        continue
                    fresh += [param] if state is None else []
                    state = self._complete(name_of(param), param, values)
                sens, stats, step = state["exp_avg_sens"], state["sens_stats"], state["step"]
                unc = state["exp_avg_unc"] if has_unc else None
                count = self._nonfinite[id(param)]
                rows.append((param, grad, sens, unc, stats, step, count, tensor_id, values))
        columns = map(list, zip(*rows, strict=True))
        batch = Batch(lambda i: name_of(rows[i][0]), *columns, kept=len(self.state))
        batch = self._numbering.numbered(batch, optimizer.param_groups, fresh)
        if fresh:
            self._advisor.read(optimizer.param_groups, optimizer.defaults)
            self._advisor.judge(batch, fresh)
        grad_scale, found_inf = (getattr(optimizer, name, None) for name in ("grad_scale", "found_inf"))
        self._launcher.launch(batch, self.backend, grad_scale, found_inf)

    def _complete(self, name: str, param: Tensor, values: Hyperparameters) -> State:
        state = self.state.get(param, {})
        complete(state, name, param, values)
        self._nonfinite.setdefault(id(param), torch.zeros((), dtype=torch.int64, device=param.device))
        self.state[param] = state
        return state

    def state_dict(self) -> dict[str, Any]:
        """The hyperparameters and, by tensor_id, the state; tensors are the live ones, as in torch.optim."""
        self._launcher.finish()
        ids = {param: i for i, param in enumerate(parameter_names(self.optimizer.param_groups))}
        return {
            "version": VERSION,
            "num_params": len(ids),
            "defaults": dict(self.defaults),
            "state": {ids[p]: dict(saved(p, state)) for p, state in self.state.items() if p in ids},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores what `state_dict` gave; every tensor is copied and keeps its dtype.

        The checkpoint's noise_scale, gamma, seed, ... come back with it, as lr does in torch: set them after
        loading, in `defaults` or in the optimizer's param groups, if they are to be others. Loading by the
        optimizer's own `load_state_dict` does the same.

        Raises:
            ValueError: the state is of other parameters or shapes, naming the first; nothing was changed.
        """
        self._commit(self._checked(state_dict))

    def _checked(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of `state_dict` for this optimizer's parameters and devices, or the error why it is none."""
        if not isinstance(state_dict, Mapping) or "state" not in state_dict:
            raise ValueError("not a state_dict of PATS: it has no 'state'")
        if state_dict.get("version", VERSION) > VERSION:
            raise ValueError(
                f"state_dict version {state_dict['version']} is newer than this package's, {VERSION}"
            )
        defaults = self.defaults | dict(state_dict.get("defaults", {}))
        hyperparameters(defaults, defaults)
        names = parameter_names(self.optimizer.param_groups)
        count = state_dict.get("num_params", len(names))
        if count != len(names):
            raise ValueError(f"state_dict has {count} parameters, the optimizer {len(names)}")
        params = list(names)
        state: dict[Tensor, State] = {}
        for key, entry in state_dict["state"].items():
            if not 0 <= int(key) < len(params):
                raise ValueError(f"state_dict has state of parameter {key}, the optimizer has {len(params)}")
            param = params[int(key)]
            state[param] = checked_entry(names[param], param, entry, _REQUIRED, _OPTIONAL)
        return {"defaults": defaults, "state": state}

    def _commit(self, checked: dict[str, Any]) -> None:
        self.defaults = {name: checked["defaults"][name] for name in defaults_of(Hyperparameters)}
        self.state = checked["state"]
        self._launcher = Launcher(owned=True)  # the old one keeps the old state alive
        self._nonfinite = {
            id(param): torch.zeros((), dtype=torch.int64, device=param.device) for param in self.state
        }

    def _state_dict_of(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """The optimizer's own `state_dict`, and PATS's part."""

        @wraps(original)
        def state_dict(*args: Any, **kwargs: Any) -> Any:
            joined = original(*args, **kwargs)
            self._join_state_dict(self.optimizer, joined)
            return joined

        return state_dict

    def _load_state_dict_of(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """The optimizer's own `load_state_dict` of what is its own, and PATS's of the rest."""

        @wraps(original)
        def load_state_dict(state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            rest = self._before_load(self.optimizer, state_dict)
            result = original(rest, *args, **kwargs)
            self._after_load(self.optimizer)
            return result

        return load_state_dict

    def _join_state_dict(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        own = self.state_dict()
        state_dict[STATE_KEY] = own
        if is_distributed():  # torch.distributed.checkpoint takes but groups and parameters' entries along
            entries = state_dict["state"]
            state_dict["state"] = entries | {
                position: {**entries.get(position, {}), **_prefixed(entry | {TENSOR_ID: position})}
                for position, entry in own["state"].items()
            }
            groups = state_dict["param_groups"]
            state_dict["param_groups"] = [{**group, STATE_KEY: own["defaults"]} for group in groups]

    def _before_load(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Checks PATS's part before the optimizer loads its own: an error leaves both as they were."""
        check_order(state_dict["param_groups"], optimizer.param_groups)
        rest, part = self._split(state_dict)
        part = state_dict.get(STATE_KEY, part)
        empty = {"defaults": self.defaults, "state": {}}  # the checkpoint is of a run without PATS
        self._loaded = self._checked(part) if part is not None else empty
        return rest

    def _split(self, state_dict: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """What is the optimizer's own, and what the groups and the parameters' entries hold of PATS's."""
        groups = [dict(group) for group in state_dict["param_groups"]]
        defaults = [group.pop(STATE_KEY) for group in groups if STATE_KEY in group]
        rest: dict[Any, Any] = {}
        state: dict[int, Any] = {}
        names = list(parameter_names(self.optimizer.param_groups).values())
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
            self._commit(self._loaded)
            self._loaded = None


def attached_to(optimizer: Optimizer) -> PATS | None:
    """The `PATS` that is attached to an optimizer, or None."""
    hooks = getattr(unwrapped(optimizer), "_optimizer_step_pre_hooks", {})
    owners = (getattr(hook, "__self__", None) for hook in hooks.values())
    return next((owner for owner in owners if isinstance(owner, PATS)), None)


def _prefixed(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{PREFIX}{name}": value for name, value in entry.items()}


def _is_prefixed(name: Any) -> bool:
    return isinstance(name, str) and name.startswith(PREFIX)


_REQUIRED = ("exp_avg_sens", "sens_stats", "step")
_OPTIONAL = ("exp_avg_unc",)  # uncertainty="none" keeps none
