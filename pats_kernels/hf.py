"""Logs what PATS does in a Hugging Face Trainer."""

import sys
import warnings
from types import FrameType
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, trainer_callback

from pats_kernels.adamw import PATSAdamW
from pats_kernels.logs import layers, log_of, name_of, pats_of
from pats_kernels.optim import PATS

if TYPE_CHECKING:
    from transformers import Trainer


class PATSCallback(TrainerCallback):
    """Adds what PATS does to each training log of a `transformers.Trainer`.

        trainer = Trainer(model, args, train_dataset=dataset, callbacks=[PATSCallback()], ...)
        trainer.train()

    The keys appear in `trainer.state.log_history`, in the printed line, and in the logs that reporters
    (TensorBoard, Weights & Biases, ...) and other callbacks receive:

        pats/mean_gate          mean of the gate over all elements with noise, in [0, 1]; see `gate_summary`
        pats/noisy_share        share of those elements whose gate is open, in [0, 1]
        pats/noise_scale        its value at this step, units of w; if groups differ, the mean over elements
        pats/noise_rms          root mean square of the noise that a step adds to those elements; units of w
        pats/noise_to_weight    noise_rms divided by the root mean square of the same elements' weights
        pats/nonfinite          gradient elements that were not finite since the run began or was resumed

    While there is no state, only the last is logged. Values are computed only at the steps at which the
    Trainer logs; it has just waited for the loss then, and no other step waits for the device. For sharded
    parameters the numbers are summed over all processes, which log at the same steps; for other parameters
    each process logs its own numbers.

    The Trainer calls its callbacks in order, reporters before those of `callbacks=[...]` and `add_callback`.
    So that all of them see the keys, this callback moves to the front of the list when training begins.

    Args:
        pats: the `PATS` attached to the Trainer's optimizer. None: finds it, or the `PATSAdamW`, by itself.
    """

    def __init__(self, pats: PATS | None = None) -> None:
        self.pats = pats
        self._is_settled = False  # first in a Trainer's list, or has warned that it is not

    def add_to(self, trainer: "Trainer") -> None:
        """Adds this callback to a Trainer, in front of its other callbacks."""
        callbacks = trainer.callback_handler.callbacks
        if self not in callbacks:
            trainer.add_callback(self)
        self._move_to_front(callbacks)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Moves in front of the reporters, or warns once if it cannot.

        Raises:
            ValueError: the Trainer uses another optimizer than the one PATS is part of.
        """
        self._source(kwargs["optimizer"])
        callbacks = _callbacks_with(self, sys._getframe().f_back)
        if callbacks is not None:
            self._move_to_front(callbacks)
        elif not self._is_settled:
            self._is_settled = True
            warnings.warn(
                "PATSCallback: cannot find the Trainer's list of callbacks in this version of "
                "transformers, so reporters may not see the keys of PATS: call "
                "PATSCallback().add_to(trainer) before training",
                stacklevel=2,
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds the keys to `logs` and to its copy in the history; logs of an evaluation stay unchanged."""
        if logs is None or "loss" not in logs:
            return
        added = log_of(self._source(kwargs["optimizer"]))
        logs.update(added)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(added)

    def _move_to_front(self, callbacks: list[Any]) -> None:
        """In place. Safe while the list is iterated, because the callbacks behind this one do not move."""
        callbacks.remove(self)
        callbacks.insert(0, self)
        self._is_settled = True

    def _source(self, optimizer: Optimizer) -> PATS | PATSAdamW:
        """The `PATS` or `PATSAdamW` that keeps the state, found inside accelerate's wrapper."""
        if self.pats is None:
            source, reason = pats_of(optimizer), "no PATS is attached to it"
        else:
            own = self.pats.optimizer
            source = self.pats if any(layer is own for layer in layers(optimizer)) else None
            reason = "pats is attached to another optimizer"
        if source is None:
            raise ValueError(f"PATSCallback: the Trainer's optimizer is {name_of(optimizer)}, and {reason}")
        return source


def _callbacks_with(callback: TrainerCallback, frame: FrameType | None) -> list[Any] | None:
    """The list of the handler that is calling a callback; None if no handler of the known form is found.

    No argument of a callback leads to the handler or to the Trainer, so this searches the calling frames.
    """
    known = getattr(trainer_callback, "CallbackHandler", ())
    while frame is not None:
        handler = frame.f_locals.get("self")
        callbacks = getattr(handler, "callbacks", None) if isinstance(handler, known) else None
        if isinstance(callbacks, list) and callback in callbacks:
            return callbacks
        frame = frame.f_back
    return None
