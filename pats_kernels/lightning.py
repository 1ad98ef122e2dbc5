"""Logs what PATS does in a Lightning Trainer: `lightning.pytorch` or `pytorch_lightning`."""

import sys
from importlib import import_module
from typing import Any

from pats_kernels.logs import log_of, name_of, pats_of

PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def _callback_class() -> Any:
    """The base class of callbacks, from the package in use, or else from the first that is installed."""
    for name in sorted(PACKAGES, key=lambda name: name not in sys.modules):
        try:
            return import_module(name).Callback
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):  # the package is there, but broken
                raise
    raise ModuleNotFoundError("pats_kernels.lightning needs lightning or pytorch_lightning", name="lightning")


_Callback: Any = _callback_class()


class PATSCallback(_Callback):
    """Logs what PATS does at every `log_every_n_steps` of a Lightning `Trainer`.

        trainer = Trainer(callbacks=[PATSCallback()], ...)
        trainer.fit(model)  # its configure_optimizers makes a PATSAdamW, or attaches a PATS

    The keys go to all of the Trainer's loggers. They are those of `pats_kernels.hf.PATSCallback`:
    pats/mean_gate, pats/noisy_share, pats/noise_scale, pats/noise_rms, pats/noise_to_weight (these five only
    once there is state) and pats/nonfinite. With several optimizers with PATS, the first has the plain keys,
    and the others have a number appended, as in `LearningRateMonitor`: pats/mean_gate-1, pats/mean_gate-2.

    No other step computes anything or waits for the device. For sharded parameters the numbers are summed
    over all processes; for other parameters each process logs its own numbers.

    Args:
        prog_bar: whether the progress bar shows them too.
    """

    def __init__(self, prog_bar: bool = True) -> None:
        self.prog_bar = prog_bar

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Raises ValueError if none of the optimizers uses PATS."""
        if all(pats_of(optimizer) is None for optimizer in trainer.optimizers):
            names = ", ".join(map(name_of, trainer.optimizers))
            raise ValueError(
                f"PATSCallback: the Trainer's optimizers are {names or 'none'}, "
                "and no PATS is attached to any of them"
            )

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        """Logs the keys if the Trainer is about to write its step's logs."""
        if not _is_due(trainer, pl_module):
            return
        sources = [source for optimizer in trainer.optimizers if (source := pats_of(optimizer)) is not None]
        for number, source in enumerate(sources):
            suffix = f"-{number}" if number else ""
            logs = {f"{name}{suffix}": value for name, value in log_of(source).items()}
            pl_module.log_dict(logs, prog_bar=self.prog_bar, logger=True, on_step=True, on_epoch=False)


def _is_due(trainer: Any, pl_module: Any) -> bool:
    """Whether the Trainer writes logs after this batch, as its logger connector decides."""
    if pl_module.automatic_optimization and trainer.fit_loop._should_accumulate():
        return False
    return bool(trainer._logger_connector.should_update_logs or trainer.fast_dev_run)
