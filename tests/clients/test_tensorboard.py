"""What PATS does, read back from TensorBoard's own event files: the Trainer's and Lightning's."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from pats_kernels import PATS, PATSAdamW
from pats_kernels.hf import PATSCallback

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

NAMES = ["mean_gate", "noisy_share", "noise_scale", "noise_rms", "noise_to_weight", "nonfinite"]
SETTINGS: dict[str, Any] = {"noise_scale": 1e-2, "gamma": 0.5}


class Model(nn.Module):
    """As the Trainer wants it: a batch by name in, the loss out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.linear(x) - 1).square().mean()}


def data() -> Tensor:
    return torch.randn(32, 6, generator=torch.Generator().manual_seed(2))


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value), of all event files below a folder."""
    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(folder.rglob("events.out.tfevents.*")):
        events = accumulator.EventAccumulator(str(file))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, []).extend((event.step, event.value) for event in events.Scalars(tag))
    return found


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("way", ["instance", "class", "add_callback", "add_to"])
def test_trainer(way: str, fused: bool, tmp_path: Path) -> None:
    """Whatever way the callback is given, TensorBoard has all of the Trainer's history."""
    given: dict[str, list[Any]] = {"instance": [PATSCallback()], "class": [PATSCallback]}
    own: dict[str, Any] = {"optimizer_cls_and_kwargs": (PATSAdamW, {"lr": 1e-2} | SETTINGS)} if fused else {}
    trainer = Trainer(
        Model(),
        TrainingArguments(
            str(tmp_path),
            max_steps=6,
            per_device_train_batch_size=4,
            logging_steps=2,
            save_strategy="no",
            report_to=["tensorboard"],
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=[{"x": x} for x in data()],  # type: ignore[arg-type]
        callbacks=given.get(way),
        **own,
    )
    if not fused:
        PATS(trainer.create_optimizer(), **SETTINGS)
    if way == "add_callback":
        trainer.add_callback(PATSCallback())
    elif way == "add_to":
        PATSCallback().add_to(trainer)
    trainer.train()

    found = scalars(tmp_path)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    for name in NAMES:
        written = found[f"train/pats/{name}"]
        assert [step for step, _ in written] == [2, 4, 6]
        # Event files hold float32.
        assert [v for _, v in written] == pytest.approx([e[f"pats/{name}"] for e in history], rel=1e-6)
    assert all(0.01 < value < 0.99 for _, value in found["train/pats/mean_gate"])


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_lightning(package: str, tmp_path: Path) -> None:
    pl = pytest.importorskip(package)
    callback = importlib.import_module("pats_kernels.lightning").PATSCallback

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model()

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return self.model(batch)["loss"]

        def configure_optimizers(self) -> PATSAdamW:
            return PATSAdamW(self.parameters(), lr=1e-2, **SETTINGS)

    module = Module()
    trainer = pl.Trainer(
        max_epochs=1,
        log_every_n_steps=4,
        logger=importlib.import_module(f"{package}.loggers").TensorBoardLogger(tmp_path),
        callbacks=[callback()],
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(data(), batch_size=4))  # type: ignore[arg-type]
    found = scalars(tmp_path)
    last = trainer.optimizers[0].pats_summary()
    for name in NAMES:
        (first_step, _), (step, value) = found[f"pats/{name}"]
        assert (first_step, step) == (3, 7)
        assert value == pytest.approx(last[name], rel=1e-6)
