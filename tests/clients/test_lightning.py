"""Lightning: automatic optimization, which steps with a closure, and manual; mixed precision; checkpoints."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from harness import assert_same_bits
from lightning.pytorch.callbacks import ModelCheckpoint
from loops import NOISE, STEPS, batch, fused, manual_loop, network, tensors
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pats_kernels import PATS, PATSAdamW

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's hints: workers, loggers, logging intervals


class Module(L.LightningModule):
    """The network, with PATSAdamW or with PATS attached to AdamW; `manual`: steps by its own hand."""

    def __init__(self, kind: str, seed: int = 1, manual: bool = False, **kwargs: Any) -> None:
        super().__init__()
        self.model, self.kind, self.kwargs = network(seed), kind, kwargs
        self.automatic_optimization = not manual
        self.pats: Any = None

    def training_step(self, _: Tensor) -> Tensor:
        inputs, targets = batch(self.global_step)  # not the loader's: Lightning resumes an epoch at its start
        loss = (self.model(inputs).float() - targets).square().mean()
        if not self.automatic_optimization:
            optimizer: Any = self.optimizers()
            self.manual_backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        return loss

    def configure_optimizers(self) -> Any:
        optimizer, self.pats = optimizer_of(self.kind, self.model, **self.kwargs)
        return optimizer

    def tensors(self) -> list[Tensor]:
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        return everything(self.model, optimizer, self.pats)


def optimizer_of(kind: str, model: nn.Module, **kwargs: Any) -> tuple[Any, Any]:
    if kind == "fused":
        optimizer = fused(model.parameters(), **kwargs)
        return optimizer, optimizer
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return optimizer, PATS(optimizer, **NOISE | kwargs)


def everything(model: nn.Module, optimizer: Any, pats: Any) -> list[Tensor]:
    states = [
        dict(sorted(state[p].items())) for state in (optimizer.state, pats.state) for p in model.parameters()
    ]
    return list(tensors([list(model.parameters()), states]))


def fit(module: Module, folder: Path, resume: str | None = None, **kwargs: Any) -> Module:
    trainer = L.Trainer(
        **{
            "max_steps": STEPS,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": folder,
            "callbacks": [ModelCheckpoint(folder, "half", every_n_train_steps=STEPS // 2, save_top_k=1)],
        }
        | kwargs
    )
    trainer.fit(module, DataLoader(range(STEPS), batch_size=None), ckpt_path=resume, weights_only=False)
    return module


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("kind", ["fused", "attached"])
def test_is_the_loop_by_hand(kind: str, manual: bool, tmp_path: Path) -> None:
    module = fit(Module(kind, manual=manual), tmp_path)
    model = network()
    optimizer, pats = optimizer_of(kind, model)
    manual_loop(model, optimizer)
    assert_same_bits(module.tensors(), everything(model, optimizer, pats))
    assert {float(state["step"]) for state in module.pats.state.values()} == {STEPS}


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("kind", ["fused", "attached"])
def test_resumes_to_the_bit(kind: str, manual: bool, tmp_path: Path) -> None:
    fit(Module(kind, manual=manual), tmp_path, max_steps=STEPS // 2)
    resumed = fit(Module(kind, seed=2, manual=manual), tmp_path, str(tmp_path / "half.ckpt"))
    whole = fit(Module(kind, manual=manual), tmp_path / "whole")
    assert_same_bits(resumed.tensors(), whole.tensors())


@pytest.mark.parametrize("kind", ["fused", "attached"])
def test_bfloat16_with_clipping(kind: str, tmp_path: Path) -> None:
    """Lightning clips only what leaves unscaling to the scaler, which `fused=False` says."""
    clip = 0.05  # the gradients' norm is above it
    module = Module(kind, **{"fused": False} if kind == "fused" else {})
    fit(module, tmp_path, precision="bf16-mixed", gradient_clip_val=clip)
    model = network()
    optimizer, pats = optimizer_of(kind, model)
    for step in range(STEPS):
        inputs, targets = batch(step)
        with torch.autocast("cpu", torch.bfloat16):
            loss = (model(inputs).float() - targets).square().mean()
        loss.backward()
        assert nn.utils.clip_grad_norm_(model.parameters(), clip) > clip
        optimizer.step()
        optimizer.zero_grad()
    assert_same_bits(module.tensors(), everything(model, optimizer, pats))


def test_what_refuses_to_be_clipped(tmp_path: Path) -> None:
    """Lightning's own words for torch's fused AdamW too."""
    for make in (lambda p: torch.optim.AdamW(p, fused=True), lambda p: PATSAdamW(p)):
        module = Module("fused")
        module.configure_optimizers = lambda make=make, module=module: make(module.model.parameters())
        with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
            fit(module, tmp_path, precision="bf16-mixed", gradient_clip_val=0.05)
