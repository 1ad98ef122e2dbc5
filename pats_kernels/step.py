"""The functional API, and `Launcher`, which turns every batch of tensors into launches."""

import _signal  # pyright: ignore[reportMissingImports]
import signal
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pats_kernels import backends
from pats_kernels.compiling import uncompiled
from pats_kernels.hyperparameters import Hyperparameters, defaults_of, hyperparameters
from pats_kernels.plan import Batch, Launch, Phase, Planner, check, is_dtensor
from pats_kernels.reference import betas_per_tensor, per_tensor

PHASES: tuple[dict[str, Phase], ...] = (
    {"delayed": "one_pass", "exact": "averages"},
    {"exact": "noise"},
)


class Launcher:
    """Turns batches into launches, and keeps what the next step can reuse.

    Args:
        owned: see `Planner`.
    """

    def __init__(self, owned: bool = False) -> None:
        self._planner = Planner(owned)
        self._statistics: Any = None  # of sharded parameters: a `distributed.Statistics`, once there are some

    def launch(
        self,
        batch: Batch,
        backend: str,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        *,
        overlap: bool = True,
    ) -> None:
        """Updates a batch in place: one plan, one launch for each device and combination of dtypes.

        `grad_scale` and `found_inf` are a GradScaler's one-element tensors: the gradients are divided by the
        first, and if the second is not 0 nothing changes. The host reads neither. With `overlap`, the new
        means of sharded tensors may still be on their way when this returns. An interrupt waits until all is
        launched, because between the phases the state is not valid.

        Raises:
            TypeError, ValueError: names the first tensor that no kernel can update, and says why.
            RuntimeError: a backend that cannot run here.
        """
        if not batch.params:
            return
        params = batch.params  # as autograd knows them
        if any(map(is_dtensor, {*map(type, batch.params), *map(type, batch.grads)})):
            batch = self._shared().localized(batch)
        elif self._statistics is not None:
            self.finish()
        plan = self._planner.plan(batch)
        chosen = {backends.choose(backend, launch.key.device) for launch in plan.launches}
        if "eager" in chosen:
            if backend == backends.AUTO and backends.native.MISSING is not None:
                backends.warn_of_eager(params)
            check(batch)  # a kernel may ignore a wrong shape, but torch's operations would stop halfway
        if chosen != {"eager"} and plan.without_memory is not None:
            raise TypeError(f"{plan.without_memory}, so no kernel can find it; backend='eager' can")
        work = [(launch, backends.resolve(backend, launch.key.device)) for launch in plan.launches]
        with _Uninterrupted():
            self._run(batch, work, grad_scale, found_inf, overlap)
            torch.autograd.graph.increment_version(params)

    def _run(
        self,
        batch: Batch,
        work: list[tuple[Launch, backends.Step]],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        overlap: bool,
    ) -> None:
        for phases in PHASES:
            for launch, step_ in work:
                if phase := phases.get(launch.key.variant.normalization):
                    device = launch.key.device
                    step_(launch, batch, phase, _on(device, grad_scale), _on(device, found_inf))
            if self._statistics is not None and phases is PHASES[0]:
                self._statistics.start(found_inf)
                if not overlap or any(launch.key.variant.normalization == "exact" for launch, _ in work):
                    self.finish()

    def finish(self) -> None:
        """Waits until the statistics of all steps so far include all shards."""
        if self._statistics is not None:
            self._statistics.finish()

    def _shared(self) -> Any:
        if self._statistics is None:
            from pats_kernels.distributed import Statistics  # takes half a second, so only if it is needed

            self._statistics = Statistics()
        return self._statistics


class _OfThread(threading.local):
    """One launcher for each thread, because every step writes into a plan's tables."""

    def __init__(self) -> None:
        self.launcher = Launcher()


_of_thread = _OfThread()


class _Uninterrupted:
    """Delays signals whose handlers may raise, such as Ctrl-C's, until the `with` block ends.

    Python runs signal handlers only in the main thread, between two instructions, so other threads need no
    delay. If a handler raises while the handlers are being exchanged, some of the delaying handlers stay in
    place; they pass every signal on. (`signal` would turn numbers and handlers into enums and back, which
    takes longer than all the rest.)
    """

    _signals = (int(signal.SIGINT), int(signal.SIGTERM))

    def __enter__(self) -> None:
        self._active = False
        self._handlers: dict[int, Any] = {}
        self._pending: list[tuple[int, Any]] = []
        if threading.current_thread() is threading.main_thread():
            for number in self._signals:
                if callable(handler := _signal.getsignal(number)):
                    self._handlers[number] = handler
                    _signal.signal(number, self._handle)
        self._active = True

    def __exit__(self, *_error: object) -> None:
        self._active = False
        for number, handler in self._handlers.items():
            _signal.signal(number, handler)
        self._deliver()

    def _handle(self, number: int, frame: Any) -> None:
        self._pending.append((number, frame))
        if not self._active:
            self._deliver()

    def _deliver(self) -> None:
        while self._pending:
            number, frame = self._pending.pop(0)
            try:
                self._handlers[number](number, frame)
            finally:  # one that raises does not take the others with it
                self._deliver()


def _on(device: torch.device, value: Tensor | None) -> Tensor | None:
    return value if value is None else value.to(device, torch.float32, non_blocking=True)


@uncompiled
@torch.no_grad()
def pats_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avg_sens: Sequence[Tensor],
    exp_avg_unc: Sequence[Tensor | None],
    sens_stats: Sequence[Tensor],
    *,
    step: int | Sequence[int],
    tensor_ids: Sequence[int],
    seed: int | Sequence[int] = 0,
    noise_scale: float | Sequence[float] = 1e-5,
    gamma: float | Sequence[float] = 1.0,
    sens_betas: tuple[float, float] | Sequence[tuple[float, float]] = (0.85, 0.95),
    uncertainty: str | Sequence[str] = "product",
    normalization: str | Sequence[str] = "delayed",
    stochastic_rounding: bool | Sequence[bool] = True,
    backend: str = "auto",
) -> None:
    """One PATS step over lists of tensors, in place. The formula is in `pats_kernels.reference`.

    Tensors that are empty, have no gradient (None) or a noise_scale of 0 are skipped. All errors are raised
    before any tensor changes.

    Args:
        params: float32, bfloat16, float16 or float64, of any shape and strides, on any devices.
        grads: the loss gradients at `params`, unscaled and clipped: same shapes, dtypes, devices.
        exp_avg_sens: S, >= 0, of the parameters' shapes; float32 or bfloat16, or float64 for float64.
        exp_avg_unc: U, likewise; a list of None if uncertainty is "none".
        sens_stats: mean(S) and mean(U), float32 of shape [2]; zeros before the first step.
        step: t = 1, 2, ..., the number of this step. This and all further arguments but `tensor_ids` and
            `backend` are one value, or a list of one per tensor.
        tensor_ids: each tensor's position among all the optimizer's parameters, in [0, 2^32); a list.
        seed: as in `PATS`.
        noise_scale: as in `PATS`.
        gamma: as in `PATS`.
        sens_betas: as in `PATS`.
        uncertainty: as in `PATS`.
        normalization: as in `PATS`.
        stochastic_rounding: as in `PATS`.
        backend: "auto", "triton", "cuda", "cpp" or "eager".

    Raises:
        ValueError: a hyperparameter out of range; shapes, dtypes or devices that do not match;
            overlapping memory; lists of different lengths.
        TypeError: sparse, complex or integer tensors.
        RuntimeError: a backend that cannot run here.
    """
    backends.check_name(backend)
    count = len(params)
    columns = {
        "step": per_tensor(step, count),
        "tensor_ids": list(tensor_ids),
        "seed": per_tensor(seed, count),
        "noise_scale": per_tensor(noise_scale, count),
        "gamma": per_tensor(gamma, count),
        "sens_betas": betas_per_tensor(sens_betas, count),
        "uncertainty": per_tensor(uncertainty, count),
        "normalization": per_tensor(normalization, count),
        "stochastic_rounding": per_tensor(stochastic_rounding, count),
        "grads": grads,
        "exp_avg_sens": exp_avg_sens,
        "exp_avg_unc": exp_avg_unc,
        "sens_stats": sens_stats,
    }
    for name, column in columns.items():
        if len(column) != count:
            raise ValueError(f"Invalid {name}: {len(column)} values for {count} params")

    own = {name: columns[name] for name in _NAMES & columns.keys()}
    chosen: list[int] = []
    values: list[Hyperparameters] = []
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        h = hyperparameters({name: column[i] for name, column in own.items()})
        t = columns["step"][i]
        if not 1 <= t < 2**32:
            raise ValueError(f"Invalid step: {t!r} (must be in [1, 2^32))")
        if not 0 <= tensor_ids[i] < 2**32:
            raise ValueError(f"Invalid tensor_ids[{i}]: {tensor_ids[i]!r} (must be in [0, 2^32))")
        if grad is not None and param.numel() > 0 and h.noisy:
            chosen.append(i)
            values.append(h)
    batch = Batch(
        name=lambda i: f"params[{chosen[i]}]",
        params=[params[i] for i in chosen],
        grads=[grad for i in chosen if (grad := grads[i]) is not None],
        exp_avg_sens=[exp_avg_sens[i] for i in chosen],
        exp_avg_unc=[exp_avg_unc[i] for i in chosen],
        sens_stats=[sens_stats[i] for i in chosen],
        steps=[int(columns["step"][i]) for i in chosen],
        tensor_ids=[tensor_ids[i] for i in chosen],
        hyperparameters=values,
    )
    _of_thread.launcher.launch(batch, backend, overlap=False)


_NAMES = defaults_of(Hyperparameters).keys()
