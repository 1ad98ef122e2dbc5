"""PATS and AdamW in one pass."""

import math
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pats_kernels import backends
from pats_kernels.advice import Advisor
from pats_kernels.clipping import Clipping, check_not_released, total_norm
from pats_kernels.compiling import uncompiled
from pats_kernels.gather import gather
from pats_kernels.hyperparameters import (
    AdamWHyperparameters,
    Normalization,
    Reader,
    Sensitivity,
    Uncertainty,
    defaults_of,
    hyperparameters,
    is_one_of,
)
from pats_kernels.numbering import Numbering, check_distinct
from pats_kernels.plan import Batch
from pats_kernels.private import ParamsT, check_capture
from pats_kernels.state import (
    TENSOR_ID,
    Counters,
    Limits,
    check_group,
    check_order,
    check_position,
    check_structure,
    checked_entry,
    is_distributed,
    keep_only,
    nonfinite_counts,
    parameter_names,
    saved,
)
from pats_kernels.step import Launcher

UNSUPPORTED = ("amsgrad", "differentiable")
CHECKED = (*UNSUPPORTED, "capturable")  # keys of a param group that are no hyperparameters of a kernel


class PATSAdamW(Optimizer):
    """AdamW that perturbs according to sensitivity: `PATS` and `torch.optim.AdamW` in one pass.

    It reads w and g once instead of twice: 44 bytes a float32 parameter instead of 56, and one launch for all
    param groups. Apart from the noise it behaves as `torch.optim.AdamW`: the same arithmetic, closures,
    hooks, schedulers and state. The formula, with its sources, is in `pats_kernels.reference`.

        optimizer = PATSAdamW(model.parameters(), lr=2e-5, noise_scale=1e-5)

    All hyperparameters but `backend` are read from the param groups at every step. The state lies on the
    parameters' devices, and no step waits for a device. With a GradScaler (`grad_scale`, `found_inf`), the
    gradients are unscaled in the same pass, and a step with infinities changes nothing.

    Args:
        params: parameters, named parameters or param groups, as in `torch.optim`.
        lr: learning rate, >= 0; a float, or a tensor of one element (float32 if it is on a GPU).
        betas: decay rates of the moments of the gradient, each in [0, 1).
        eps: added to the root of the second moment, >= 0.
        weight_decay: decoupled weight decay, >= 0.
        maximize: maximize the loss instead of minimizing it.
        capturable: whether `step` may be captured in a CUDA graph, after one step without. Each replay draws
            new noise, because t is counted on the device. To change lr or noise_scale between replays, make
            it a tensor on the GPU.
        sensitivity: "ema": moving averages of |w * g| and of its uncertainty. "moments": both are computed
            from AdamW's own moments in registers; the only state is two numbers a tensor, and a step moves
            28 bytes a float32 parameter.
        noise_scale: as in `PATS`.
        gamma: as in `PATS`.
        sens_betas: as in `PATS`.
        uncertainty: as in `PATS`.
        normalization: as in `PATS`.
        stochastic_rounding: as in `PATS`.
        seed: as in `PATS`.
        state_dtype: of moments and averages, float32 or bfloat16; None: the parameter's, float32 for float16.
        backend: "auto", "triton", "cuda", "cpp" or "eager"; see `available_backends`.
        amsgrad: not supported.
        differentiable: not supported.
        foreach: accepted because `torch.optim.AdamW` has it, and ignored.
        fused: the step is always fused. False makes a GradScaler unscale, and skip steps, before `step`.
            Use it where code refuses optimizers that unscale themselves, such as Lightning's gradient
            clipping under "bf16-mixed".

    Attributes:
        state: for each parameter `step` (0-d float32), `exp_avg` and `exp_avg_sq` (the parameter's shape).
            If noise_scale is above 0, also `sens_stats` (float32 [2]: mean(S), mean(U)) and, with
            sensitivity="ema", `exp_avg_sens` and `exp_avg_unc` (the parameter's shape).

    Raises:
        ValueError: a hyperparameter out of range; amsgrad or differentiable.
        TypeError: sparse, complex or integer parameters, at their first step with a gradient.
        RuntimeError: a backend asked for by name that cannot run here.
    """

    # Then GradScaler leaves unscaling and skipping to the step: `grad_scale` and `found_inf`.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        capturable: bool = False,
        sensitivity: Sensitivity = "ema",
        noise_scale: float | Tensor = 1e-5,
        gamma: float = 1.0,
        sens_betas: tuple[float, float] = (0.85, 0.95),
        uncertainty: Uncertainty = "product",
        normalization: Normalization = "delayed",
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = True,
        seed: int = 0,
        backend: str = "auto",
        amsgrad: bool = False,
        differentiable: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "capturable": capturable,
            "sensitivity": sensitivity,
            "noise_scale": noise_scale,
            "gamma": gamma,
            "sens_betas": sens_betas,
            "uncertainty": uncertainty,
            "normalization": normalization,
            "state_dtype": state_dtype,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
        }
        backends.check_name(backend)
        _values({"amsgrad": amsgrad, "differentiable": differentiable}, defaults)
        self.backend = backend
        if fused is False:
            self._step_supports_amp_scaling = False
        self._forget()
        super().__init__(params, defaults)

    def _forget(self) -> None:
        """Drops all that was derived from the old state."""
        self._launcher = Launcher(owned=True)
        self._reader = Reader(_values, AdamWHyperparameters, CHECKED)
        self._advisor = Advisor(defaults_of(AdamWHyperparameters))
        self._numbering = Numbering(len(getattr(self, "param_groups", ())))
        self._nonfinite = Counters()
        self._clipping: Clipping | None = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group, as in `torch.optim`.

        Raises:
            ValueError: names a hyperparameter out of range; the optimizer stays unchanged.
            RuntimeError: the backend cannot run on a parameter's device.
        """
        _values(param_group, self.defaults)
        super().add_param_group(param_group)
        try:
            for param in self.param_groups[-1]["params"]:
                backends.resolve(self.backend, param.device)
        except RuntimeError:
            self.param_groups.pop()
            raise
        self._numbering.groups = len(self.param_groups)
        self._advisor.read(self.param_groups[-1:], self.defaults)

    @uncompiled
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step over all parameters that have a gradient.

        Args:
            closure: evaluates the model again and returns the loss, which `step` then returns.

        Raises:
            ValueError, TypeError: names a hyperparameter, parameter, gradient or state that no kernel can
                use. Nothing has been changed.
        """
        check_capture(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale, found_inf = (getattr(self, name, None) for name in ("grad_scale", "found_inf"))
        overlap = not any(group["capturable"] for group in self.param_groups)
        batch = self._batch()
        if self._clipping is not None:
            if not self._clipping.is_of(self._grads()):
                raise RuntimeError(
                    "clip_grad_norm_ was called for other gradients than step() finds: call it after the "
                    "last backward and before step(); if you skip a step, call this optimizer's zero_grad()"
                )
            grad_scale = self._clipping.divisor(grad_scale)
        self._launcher.launch(batch, self.backend, grad_scale, found_inf, overlap=overlap)
        self._clipping = None
        return loss

    def _grads(self) -> list[Tensor]:
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        return [param.grad for param in params if param.grad is not None]

    @torch.no_grad()
    def clip_grad_norm_(
        self,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        foreach: bool | None = None,
    ) -> Tensor:
        """Makes the next step scale the gradients to a global norm of at most `max_norm`.

            loss.backward()
            optimizer.clip_grad_norm_(1.0)  # instead of torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()

        The norm is that of all of the optimizer's gradients. The gradients themselves do not change: the
        step multiplies them in its one pass, which saves reading and writing all of them once more.
        Sensitivities and moments are computed from the clipped gradients. Nothing waits for the device
        unless `error_if_nonfinite` is set. If the gradients are still scaled by a GradScaler, `max_norm`
        applies to the unscaled ones.

        Args:
            max_norm: > 0.
            norm_type: the p of the p-norm; inf for the largest absolute value.
            error_if_nonfinite: raise RuntimeError if the norm is infinite or NaN. Otherwise the elements
                become so, and the step counts them as it does without clipping.
            foreach: as in `torch.nn.utils.get_total_norm`.

        Returns:
            The norm of the gradients as they are, before clipping, 0-d; a GradScaler's scale is included.

        Raises:
            ValueError: max_norm is not a number above 0.
            RuntimeError: there are no gradients, because `release_gradients` uses them up in backward.
        """
        if not isinstance(max_norm, (int, float)) or not 0 < max_norm < math.inf:
            raise ValueError(f"Invalid max_norm: {max_norm!r} (must be a finite number > 0)")
        grads = self._grads()
        if not grads:
            check_not_released(self.param_groups)
        norm = total_norm(grads, norm_type, error_if_nonfinite, foreach)
        self._clipping = Clipping.of(grads, norm, float(max_norm)) if grads else None
        return norm

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in `torch.optim`. Also forgets the norm that `clip_grad_norm_` has computed."""
        self._clipping = None
        super().zero_grad(set_to_none)

    def _batch(self) -> Batch:
        """The parameters that have a gradient, with their state, which is allocated here the first time."""
        counted = len(self._nonfinite)
        values = self._reader.read(self.param_groups, self.defaults)
        batch, fresh = gather(self.param_groups, values, self.state, self._nonfinite)
        batch = self._numbering.numbered(batch, self.param_groups, fresh)
        if fresh:
            self._advisor.read(self.param_groups, self.defaults)
            self._advisor.judge(batch, fresh)
        if len(self._nonfinite) > counted:
            keep_only(self._nonfinite, {*self.state, *parameter_names(self.param_groups)})
        return batch

    def nonfinite_counts(self) -> dict[str, int]:
        """How many gradient elements were not finite so far, by parameter name. Waits for the device."""
        return nonfinite_counts(self.param_groups, self._nonfinite)

    def pats_summary(self) -> dict[str, float]:
        """What PATS does right now, in numbers for the logs of any loop. Waits for the device once.

            print(optimizer.pats_summary()["noise_to_weight"])

        The keys are mean_gate, noisy_share, noise_scale, noise_rms, weight_rms and nonfinite, as in
        `analysis.GateSummary`, and noise_to_weight: noise_rms / weight_rms. While there is no state,
        nonfinite is the only key. For sharded parameters the numbers are summed over all processes, so all
        of them must call it.
        """
        from pats_kernels.analysis import gate_summary  # which imports this module

        return gate_summary(self).to_dict()

    def state_dict(self) -> dict[str, Any]:
        """As in `torch.optim`; waits for the statistics of sharded parameters."""
        self._launcher.finish()
        state_dict = super().state_dict()
        params = list(chain.from_iterable(group["params"] for group in self.param_groups))
        # torch.distributed.checkpoint identifies parameters by name and loses their order.
        numbered = is_distributed()
        state: dict[Any, Any] = {}
        for i, entry in state_dict["state"].items():
            if isinstance(entry, dict):
                entry = {**saved(params[i], entry), **({TENSOR_ID: i} if numbered else {})}
            state[i] = entry  # an entry that is not a dictionary belongs to no parameter
        return {**state_dict, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned, of a PATSAdamW or of a `torch.optim.AdamW`.

        From a `torch.optim.AdamW`, the sensitivities start empty, and the param groups keep their
        hyperparameters of PATS. A checkpoint of PATSAdamW brings back its own noise_scale, gamma, seed, ...,
        as torch does with lr. To use other values, set them in the param groups after loading. Every tensor
        is copied and keeps its dtype (torch casts to the parameter's).

        Raises:
            ValueError: names the first parameter, key or hyperparameter that does not fit: the state has
                other parameters, shapes or dtypes, it has values that no step can produce, or it needs
                amsgrad. Nothing has been changed.
        """
        check_structure(state_dict)
        groups = [dict(group) for group in self.param_groups]
        loaded: dict[Any, Any] = {}

        def take_state(optimizer: Optimizer, final: dict[str, Any]) -> dict[str, Any]:
            loaded.update(self._checked(final))
            return {**final, "state": {}}

        def give_state(optimizer: Optimizer) -> None:
            self.state.update(loaded)
            for group, old in zip(self.param_groups, groups, strict=True):
                for name, value in old.items():
                    group.setdefault(name, value)

        # The last of the pre-hooks, because others may replace the dictionary; the first of the post-hooks.
        hooks = [
            self.register_load_state_dict_pre_hook(take_state),
            self.register_load_state_dict_post_hook(give_state, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _checked(self, state_dict: Mapping[str, Any]) -> dict[Any, Any]:
        """A copy of the state for these parameters and devices. Raises ValueError if it does not fit."""
        check_structure(state_dict)
        groups = state_dict["param_groups"]
        sizes, own_sizes = ([len(g["params"]) for g in gs] for gs in (groups, self.param_groups))
        if sizes != own_sizes:
            raise ValueError(
                f"the state_dict's param groups have {sizes} parameters, but the optimizer's have {own_sizes}"
            )
        merged = [{**own, **group} for group, own in zip(groups, self.param_groups, strict=True)]
        for group, own in zip(merged, self.param_groups, strict=True):
            check_group(_values(group, self.defaults), own["params"])
        check_distinct(merged)
        check_order(groups, self.param_groups)
        ids = chain.from_iterable(group["params"] for group in groups)
        params = enumerate(parameter_names(self.param_groups).items())
        places = dict(zip(ids, params, strict=True))
        state: dict[Any, Any] = {}
        limits = Limits()
        for key, entry in state_dict["state"].items():
            if key in places:
                position, (param, name) = places[key]
                if isinstance(entry, Mapping):
                    check_position(name, position, entry.get(TENSOR_ID))
                if not isinstance(entry, Mapping) or entry:
                    state[param] = checked_entry(name, param, entry, _ADAMW_STATE, _PATS_STATE, limits)
            elif isinstance(entry, Mapping):
                raise ValueError(
                    f"the state_dict has state for parameter {key!r}, which is in none of its param groups"
                )
            else:  # it belongs to no parameter: kept, as torch does
                state[key] = entry
        limits.check()
        return state

    def __getstate__(self) -> dict[str, Any]:
        self._launcher.finish()
        amp = {"_step_supports_amp_scaling": self._step_supports_amp_scaling}
        return {**super().__getstate__(), "backend": self.backend, **amp}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()


_ADAMW_STATE = ("step", "exp_avg", "exp_avg_sq")
_PATS_STATE = ("exp_avg_sens", "exp_avg_unc", "sens_stats")


def _values(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> AdamWHyperparameters:
    """A group's hyperparameters. Raises a ValueError that names what is wrong with them."""
    for name in UNSUPPORTED:
        if not is_one_of(group.get(name), (None, False)):
            raise ValueError(
                f"Invalid {name}: {group[name]!r} (must be False: PATSAdamW does not support it)"
            )
    if type(group.get("capturable", False)) is not bool:
        raise ValueError(f"Invalid capturable: {group['capturable']!r} (must be one of True, False)")
    return hyperparameters(group, defaults, AdamWHyperparameters)
