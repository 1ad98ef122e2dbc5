"""PATS attached to an optimizer."""

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pats_kernels import backends
from pats_kernels.hyperparameters import (
    Hyperparameters,
    Normalization,
    Uncertainty,
    defaults_of,
    hyperparameters,
)
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
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, but is {type(optimizer).__name__}")
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
        self._loaded: dict[str, Any] | None = None
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_state_dict_post_hook(self._join_state_dict),
            optimizer.register_load_state_dict_pre_hook(self._before_load),
            optimizer.register_load_state_dict_post_hook(self._after_load),
        ]

    def remove(self) -> None:
        """Detaches from the optimizer, which then steps as if PATS had never been there."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def nonfinite_counts(self) -> dict[str, int]:
        """How many gradient elements were not finite so far, by parameter. Waits for the device."""
        return nonfinite_counts(self.optimizer.param_groups, self._nonfinite)

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value!r}" for name, value in self.defaults.items())
        return f"PATS({type(self.optimizer).__name__}, {values}, backend={self.backend!r})"

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        rows: list[tuple[Any, ...]] = []
        name_of = name_finder(optimizer.param_groups)
        position = -1
        for group in optimizer.param_groups:
            values = hyperparameters(group, self.defaults)
            needed = keys_of(values)
            has_unc = "exp_avg_unc" in needed
            first = group.get("tensor_id")
            for i, param in enumerate(group["params"]):
                position += 1
                tensor_id = position if first is None else first + i
                grad = param.grad
                if grad is None or not values.noisy:
                    continue
                state = self.state.get(param)
                if state is None or not needed <= state.keys():
                    if param.numel() == 0:
                        continue
                    state = self._complete(name_of(param), param, values)
                sens, stats, step = state["exp_avg_sens"], state["sens_stats"], state["step"]
                unc = state["exp_avg_unc"] if has_unc else None
                count = self._nonfinite[id(param)]
                rows.append((param, grad, sens, unc, stats, step, count, tensor_id, values))
        columns = map(list, zip(*rows, strict=True))
        batch = Batch(lambda i: name_of(rows[i][0]), *columns, kept=len(self.state))
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
            "state": {ids[param]: dict(state) for param, state in self.state.items() if param in ids},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores what `state_dict` gave; every tensor is copied and keeps its dtype.

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


def _prefixed(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{PREFIX}{name}": value for name, value in entry.items()}


def _is_prefixed(name: Any) -> bool:
    return isinstance(name, str) and name.startswith(PREFIX)


_REQUIRED = ("exp_avg_sens", "sens_stats", "step")
_OPTIONAL = ("exp_avg_unc",)  # uncertainty="none" keeps none
