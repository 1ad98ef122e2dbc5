"""What PATS does in the logs of Lightning's Trainer, of both packages that have one."""

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader

from pats_kernels import PATS, PATSAdamW

PACKAGES = ["lightning.pytorch", "pytorch_lightning"]
NAMES = ["mean_gate", "noisy_share", "noise_scale", "noise_rms", "noise_to_weight", "nonfinite"]
KEYS = [f"pats/{name}" for name in NAMES]
NOISE: dict[str, Any] = {"noise_scale": 1e-2, "gamma": 0.5, "seed": 3}
BATCHES = 8

pytest.importorskip("lightning.pytorch")
lightning_logs = pytest.importorskip("pats_kernels.lightning")


@pytest.fixture(params=PACKAGES)
def pl(request: pytest.FixtureRequest) -> Any:
    return pytest.importorskip(request.param)


def network(pl: Any, kinds: list[str], manual: bool) -> Any:
    """A LightningModule with an optimizer of each kind, and what each step of it ought to log."""

    class Network(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(4)
            self.parts = nn.ModuleList(nn.Linear(6, 6) for _ in kinds)
            self.automatic_optimization = not manual
            self.keepers: list[Any] = []
            self.expected: list[list[dict[str, float]]] = []

        def configure_optimizers(self) -> list[Optimizer]:
            return [self.optimizer(kind, part) for kind, part in zip(kinds, self.parts, strict=True)]

        def optimizer(self, kind: str, part: nn.Module) -> Optimizer:
            if kind == "fused":
                self.keepers.append(PATSAdamW(part.parameters(), 1e-2, **NOISE))
                return self.keepers[-1]
            optimizer = SGD(part.parameters(), 1e-2)
            if kind == "attached":
                self.keepers.append(PATS(optimizer, **NOISE))
            return optimizer

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            loss = torch.stack([(part(batch) - 1).square().mean() for part in self.parts]).sum()
            if manual:
                optimizers = self.optimizers()
                self.manual_backward(loss)
                for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
                    optimizer.step()
                    optimizer.zero_grad()
            return loss

        def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
            self.expected.append([Summary.of(keeper) for keeper in self.keepers])

    return Network()


class Summary:
    """Calls of `pats_summary`, the tests' own apart."""

    calls = 0

    @staticmethod
    def of(keeper: Any) -> dict[str, float]:
        before = Summary.calls
        summary = keeper.pats_summary()
        Summary.calls = before
        return summary


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    Summary.calls = 0

    def count(real: Any) -> Any:
        def method(keeper: Any) -> dict[str, float]:
            Summary.calls += 1
            return real(keeper)

        return method

    for kind in (PATS, PATSAdamW):
        monkeypatch.setattr(kind, "pats_summary", count(kind.pats_summary))


def fit(
    pl: Any,
    folder: Path,
    kinds: list[str],
    manual: bool = False,
    callback: Any = None,
    **arguments: Any,
) -> tuple[Any, Any, list[tuple[int, dict[str, float]]]]:
    """The Trainer, the module, and what a logger was given of PATS, with the Trainer's step."""
    written: list[tuple[int, dict[str, float]]] = []
    base = importlib.import_module(f"{pl.__name__}.loggers").Logger

    class Recorder(base):
        name, version = "recorder", 0

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            own = {key: value for key, value in metrics.items() if key.startswith("pats/")}
            if own:
                assert step is not None
                written.append((step, own))

    module = network(pl, kinds, manual)
    trainer = pl.Trainer(
        **{
            "max_epochs": 1,
            "log_every_n_steps": 3,
            "logger": Recorder(),
            "callbacks": [callback or lightning_logs.PATSCallback()],
            "accelerator": "cpu",
            "default_root_dir": folder,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **arguments,
        }
    )
    random = torch.Generator().manual_seed(5)
    data = torch.randn(BATCHES * 4, 6, generator=random)
    trainer.fit(module, DataLoader(data, batch_size=4))  # type: ignore[arg-type]
    return trainer, module, written


def with_keys(summary: dict[str, float], suffix: str = "") -> dict[str, float]:
    return {f"pats/{name}{suffix}": summary[name] for name in NAMES}


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("kind", ["fused", "attached"])
def test_logs(pl: Any, kind: str, manual: bool, tmp_path: Path) -> None:
    """The numbers as the step left them, to every logger, at log_every_n_steps and at no other step."""
    trainer, module, written = fit(pl, tmp_path, [kind], manual)
    assert [step for step, _ in written] == [2, 5]
    for step, logs in written:  # Lightning keeps them in float32
        assert logs == pytest.approx(with_keys(module.expected[step][0]), rel=1e-6)
        assert 0.01 < logs["pats/mean_gate"] < logs["pats/noisy_share"] < 0.99
    assert Summary.calls == 2
    assert set(KEYS) <= trainer.logged_metrics.keys()


def test_accumulation(pl: Any, tmp_path: Path) -> None:
    """Of 8 batches two make a step: the third step's logs come after the sixth batch."""
    _, module, written = fit(pl, tmp_path, ["fused"], accumulate_grad_batches=2)
    assert [step for step, _ in written] == [2]
    assert written[0][1] == pytest.approx(with_keys(module.expected[5][0]), rel=1e-6)
    assert Summary.calls == 1


def test_several_optimizers(pl: Any, tmp_path: Path) -> None:
    """Numbers behind the keys of the second and third that have PATS; the one that has not is passed over."""
    _, module, written = fit(pl, tmp_path, ["attached", "plain", "fused", "attached"], manual=True)
    assert [step for step, _ in written] == [2, 5]
    for step, logs in written:
        summaries = module.expected[step]
        expected = with_keys(summaries[0]) | with_keys(summaries[1], "-1") | with_keys(summaries[2], "-2")
        assert logs == pytest.approx(expected, rel=1e-6)
        assert len({summary["mean_gate"] for summary in summaries}) == 3


@pytest.mark.parametrize("prog_bar", [True, False])
def test_progress_bar(pl: Any, prog_bar: bool, tmp_path: Path) -> None:
    callback = lightning_logs.PATSCallback(prog_bar=prog_bar)
    trainer, _, written = fit(pl, tmp_path, ["fused"], callback=callback)
    assert len(written) == 2
    assert (set(KEYS) & trainer.progress_bar_metrics.keys()) == (set(KEYS) if prog_bar else set())


def test_no_logs_no_cost(pl: Any, tmp_path: Path) -> None:
    fit(pl, tmp_path, ["fused"], log_every_n_steps=BATCHES + 1)
    assert Summary.calls == 0


def test_an_optimizer_without_pats(pl: Any, tmp_path: Path) -> None:
    """Said as training begins."""
    message = r"PATSCallback: the Trainer's optimizers are SGD, SGD, and no PATS is attached to any of them"
    with pytest.raises(ValueError, match=message):
        fit(pl, tmp_path, ["plain", "plain"], manual=True)


@pytest.mark.parametrize("package", PACKAGES)
def test_takes_the_package_that_is_in_use(package: str) -> None:
    """And pats_kernels alone imports neither."""
    pytest.importorskip(package)
    program = (
        "import sys, pats_kernels\n"
        "assert not {'lightning', 'pytorch_lightning'} & sys.modules.keys()\n"
        f"import {package} as pl\n"
        "from pats_kernels.lightning import PATSCallback\n"
        "assert issubclass(PATSCallback, pl.Callback)\n"
        "pl.Trainer(callbacks=PATSCallback(), logger=False, accelerator='cpu', enable_checkpointing=False)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
