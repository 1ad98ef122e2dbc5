"""What PATS does, in the logs of a Hugging Face Trainer."""

from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pats_kernels.analysis import gate_summary
from pats_kernels.optim import PATS

if TYPE_CHECKING:
    from transformers import Trainer


class PATSCallback(TrainerCallback):
    """Adds what PATS does to each training log of a `transformers.Trainer`.

        trainer = Trainer(model, args, train_dataset=dataset)
        PATSCallback(PATS(trainer.create_optimizer())).add_to(trainer)
        trainer.train()

    The keys, in `trainer.state.log_history` and in what the callbacks after this one are told:

        pats/mean_gate      mean of the gate over all elements with noise, in [0, 1]; see `gate_summary`
        pats/noisy_share    share of those elements whose gate is open, in [0, 1]
        pats/nonfinite      gradient elements that were not finite since the run began or was resumed

    The first two are left out while there is no state. Nothing is computed, and nothing waits for the device,
    at any step but those at which the Trainer logs, where it has just waited for the loss. The gates
    are those of all processes, which have to log at the same steps, as they do; pats/nonfinite is this one's.

    The Trainer tells its callbacks in order, and the reporters (TensorBoard, Weights & Biases, ...) come
    before those of `callbacks=[...]` and `add_callback`: there a reporter has written its line before this
    one adds to it, and only the history and the printed line have the new keys. `add_to` puts this one first.

    Args:
        pats: what is attached to the Trainer's optimizer. None: the optimizer is a `PATSAdamW`.
    """

    def __init__(self, pats: PATS | None = None) -> None:
        self.pats = pats

    def add_to(self, trainer: "Trainer") -> None:
        """Adds this callback to a Trainer, in front of its others, so that the reporters see its keys."""
        trainer.add_callback(self)
        callbacks = trainer.callback_handler.callbacks
        callbacks.remove(self)
        callbacks.insert(0, self)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raises ValueError where the Trainer trains with another optimizer than the one PATS is part of."""
        self._source(kwargs["optimizer"])

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
        added = self._logs(kwargs["optimizer"])
        logs.update(added)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(added)

    def _logs(self, optimizer: Optimizer) -> dict[str, float]:
        source = self._source(optimizer)
        summary = gate_summary(source)
        logs: dict[str, float] = {}
        if summary.numel > 0:
            both = torch.stack((summary.mean_gate, summary.noisy_share)).tolist()
            logs = dict(zip(("pats/mean_gate", "pats/noisy_share"), both, strict=True))
        return logs | {"pats/nonfinite": sum(source.nonfinite_counts().values())}

    def _source(self, optimizer: Optimizer) -> Any:
        """The PATS, or the optimizer that is one, once accelerate's wrapper is off."""
        while isinstance(wrapped := getattr(optimizer, "optimizer", None), Optimizer):
            optimizer = wrapped
        if self.pats is not None and self.pats.optimizer is optimizer:
            return self.pats
        if self.pats is None and hasattr(optimizer, "nonfinite_counts"):
            return optimizer
        attached = "is attached to another optimizer" if self.pats is not None else "was not given"
        raise ValueError(
            f"PATSCallback: the Trainer's optimizer is {type(optimizer).__name__}, and pats {attached}"
        )
