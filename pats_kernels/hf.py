"""What PATS does, in the logs of a Hugging Face Trainer."""

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

    The keys, in `trainer.state.log_history`, in the printed line, and in what reporters (TensorBoard, Weights
    & Biases, ...) and other callbacks are told:

        pats/mean_gate          mean of the gate over all elements with noise, in [0, 1]; see `gate_summary`
        pats/noisy_share        share of those elements whose gate is open, in [0, 1]
        pats/noise_scale        as it is at this step, in units of w; of groups that differ the elements' mean
        pats/noise_rms          root mean square of the noise that a step adds to those elements; units of w
        pats/noise_to_weight    that over the root mean square of the same elements' weights
        pats/nonfinite          gradient elements that were not finite since the run began or was resumed

    All but the last are left out while there is no state. Nothing is computed, and nothing waits for the
    device, at any step but those at which the Trainer logs, where it has just waited for the loss. Of sharded
    parameters all processes add up, which have to log at the same steps, as they do; of others a process
    gives what it has itself.

    The Trainer tells its callbacks in order, reporters before those of `callbacks=[...]` and `add_callback`.
    So that they all see the keys, this one moves to the front of that list as training begins.

    Args:
        pats: what is attached to the Trainer's optimizer. None: whatever is, unless it is a `PATSAdamW`.
    """

    def __init__(self, pats: PATS | None = None) -> None:
        self.pats = pats
        self._is_settled = False  # first in a Trainer's list, or warned that it is not

    def add_to(self, trainer: "Trainer") -> None:
        """Adds this callback to a Trainer, in front of its others at once."""
        callbacks = trainer.callback_handler.callbacks
        if self not in callbacks:
            trainer.add_callback(self)
        self._move_to_front(callbacks)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes its place before the reporters, or warns once where it cannot.

        Raises:
            ValueError: the Trainer trains with another optimizer than the one PATS is part of.
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
        """Adds the keys to `logs` and to its copy in the history; evaluation's logs stay as they are."""
        if logs is None or "loss" not in logs:
            return
        added = log_of(self._source(kwargs["optimizer"]))
        logs.update(added)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(added)

    def _move_to_front(self, callbacks: list[Any]) -> None:
        """In place; harmless while the list is gone through, as those behind this one stay where they are."""
        callbacks.remove(self)
        callbacks.insert(0, self)
        self._is_settled = True

    def _source(self, optimizer: Optimizer) -> PATS | PATSAdamW:
        """What keeps the state of PATS, in accelerate's wrapper."""
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
    """The list of the handler that is calling a callback; None where there is none of the known form.

    A handler gives its callbacks no way to itself or to the Trainer, in any argument, so its frame is asked.
    """
    known = getattr(trainer_callback, "CallbackHandler", ())
    while frame is not None:
        handler = frame.f_locals.get("self")
        callbacks = getattr(handler, "callbacks", None) if isinstance(handler, known) else None
        if isinstance(callbacks, list) and callback in callbacks:
            return callbacks
        frame = frame.f_back
    return None
