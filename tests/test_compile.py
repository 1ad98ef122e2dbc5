"""torch.compile around a step: the same bits as without it, no graph of the step, no recompilation."""

import copy
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from harness import assert_same_bits
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from pats_kernels import PATS, PATSAdamW, pats_step_
from pats_kernels.compiling import REASON

STEPS = 4
Run = tuple[nn.Module, Optimizer]
counters: Any = torch._dynamo.utils.counters

OPTIMIZERS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "PATSAdamW": (PATSAdamW, {}),
    "moments": (PATSAdamW, {"sensitivity": "moments", "normalization": "exact"}),
    "AdamW and PATS": (AdamW, {"fused": True}),  # torch's other forms round differently when compiled
    "SGD and PATS": (SGD, {"momentum": 0.9, "foreach": True}),  # torch 2.10 compiles others to other bits
}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def made(kind: str, backend: str = "auto") -> Run:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))
    settings: dict[str, Any] = {"noise_scale": 1e-2, "seed": 3, "backend": backend}
    cls, options = OPTIMIZERS[kind]
    if cls is PATSAdamW:
        return model, PATSAdamW(model.parameters(), lr=1e-2, **options, **settings)
    optimizer = cls(model.parameters(), lr=1e-2, **options)
    PATS(optimizer, **settings)
    return model, optimizer


def batches(count: int = STEPS) -> list[Tensor]:
    random = torch.Generator().manual_seed(1)
    return [torch.randn(5, 6, generator=random) for _ in range(count)]


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def train_step(model: nn.Module, optimizer: Optimizer, batch: Tensor) -> None:
    loss_of(model, batch).backward()
    optimizer.step()
    optimizer.zero_grad()


def weights(run: Run) -> list[Tensor]:
    return [param.detach() for param in run[0].parameters()]


def trained(run: Run, step: Callable[..., Any] = train_step, count: int = STEPS) -> list[Tensor]:
    before = copy.deepcopy(weights(run))
    for batch in batches(count):
        step(*run, batch)
    assert not any(torch.equal(old, new) for old, new in zip(before, weights(run), strict=True))
    return weights(run)


def with_step(step: Callable[[], Any]) -> Callable[..., None]:
    """A training step that differs from others only in its optimizer."""

    def training(model: nn.Module, optimizer: Optimizer, batch: Tensor) -> None:
        loss_of(model, batch).backward()
        step()
        optimizer.zero_grad()

    return training


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_compiled_step(kind: str, compiler: str, backend: str) -> None:
    """aot_eager replaces what is written by copies, as inductor does."""
    run = made(kind, backend)
    compiled = torch.compile(run[1].step, backend=compiler)
    assert_same_bits(trained(made(kind, backend)), trained(run, with_step(compiled)))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", ["PATSAdamW", "SGD and PATS"])
def test_a_compiled_training_step(kind: str, compiler: str, backend: str) -> None:
    """Forward, backward, step and zero_grad in one compiled function."""
    run = made(kind, backend)
    assert_same_bits(trained(made(kind, backend)), trained(run, torch.compile(train_step, backend=compiler)))


@pytest.mark.parametrize("kind", ["PATSAdamW", "AdamW and PATS"])
def test_inductor(kind: str) -> None:
    """A whole training step, compared with one in which only the model is compiled, because inductor's
    forward differs, and its SGD would too."""
    plain, run = made(kind), made(kind)
    compiled_loss = torch.compile(loss_of)

    def model_alone(model: nn.Module, optimizer: Optimizer, batch: Tensor) -> None:
        compiled_loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    assert_same_bits(trained(plain, model_alone), trained(run, torch.compile(train_step)))


def test_state_and_schedule(backend: str) -> None:
    """A group's values are read at every step, compiled or not. The state is the same."""
    plain, run = made("PATSAdamW", backend), made("PATSAdamW", backend)
    compiled = torch.compile(run[1].step, backend="aot_eager")
    for number, batch in enumerate(batches(), 1):
        for model, optimizer in (plain, run):
            optimizer.param_groups[0].update(lr=1e-2 / number, noise_scale=1e-2 * number)
            loss_of(model, batch).backward()
        plain[1].step()
        compiled()
        for _, optimizer in (plain, run):
            optimizer.zero_grad()
    states = [
        [optimizer.state[p][key] for p in model.parameters() for key in sorted(optimizer.state[p])]
        for model, optimizer in (plain, run)
    ]
    assert_same_bits(weights(plain) + states[0], weights(run) + states[1])


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_no_warning_and_no_recompilation(kind: str) -> None:
    """Nothing is compiled after the second step. (The first allocates state.)"""
    run = made(kind)
    compiled = torch.compile(train_step, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Of torch itself, at the import of what it compiles its own optimizers with.
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        # Of the other tests' optimizers, which torch.compile has left in cycles.
        warnings.filterwarnings("ignore", "PATS: .*another optimizer draws its noise", UserWarning)
        trained(run, compiled, count=2)
        frames = counters["frames"]["total"]
        assert frames > 0
        trained(run, compiled, count=6)
    assert counters["frames"]["total"] == frames
    assert not counters["recompiles"]


@pytest.mark.parametrize("kind", ["PATSAdamW", "SGD and PATS"])
def test_a_full_graph_says_why_not(kind: str) -> None:
    model, optimizer = made(kind)
    loss_of(model, batches()[0]).backward()
    before = copy.deepcopy(weights((model, optimizer)))
    with pytest.raises(Exception, match="writes through addresses") as error:
        torch.compile(optimizer.step, fullgraph=True, backend="eager")()
    assert REASON in str(error.value)
    assert_same_bits(before, weights((model, optimizer)))


def test_the_functional_step(backend: str) -> None:
    """pats_step_ in the middle of a compiled function: what comes before and after it is compiled."""

    def function(w: Tensor, g: Tensor, S: Tensor, U: Tensor, stats: Tensor) -> Tensor:
        g = g * 2 + 1
        pats_step_([w], [g], [S], [U], [stats], step=2, tensor_ids=[0], noise_scale=0.1, backend=backend)
        return w * 3

    def arguments() -> list[Tensor]:
        random = torch.Generator().manual_seed(0)
        return [torch.rand(50, generator=random) for _ in range(4)] + [torch.ones(2)]

    plain, compiled = arguments(), arguments()
    result = function(*plain)
    assert_same_bits([result], [torch.compile(function, backend="aot_eager")(*compiled)])
    assert_same_bits(plain, compiled)
    assert not torch.equal(plain[0], arguments()[0])


def test_a_closure_may_be_compiled() -> None:
    plain, run = made("PATSAdamW"), made("PATSAdamW")

    def closure_step(compiled: bool) -> Callable[..., None]:
        function = torch.compile(loss_of, backend="aot_eager") if compiled else loss_of

        def training(model: nn.Module, optimizer: Optimizer, batch: Tensor) -> None:
            def closure() -> float:
                optimizer.zero_grad()
                loss = function(model, batch)
                loss.backward()
                return loss.item()

            step: Any = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
            assert step(closure) > 0

        return training

    assert_same_bits(trained(plain, closure_step(False)), trained(run, closure_step(True)))


def test_importing_imports_no_compiler() -> None:
    """torch._dynamo takes a second to import. As in torch, that waits until there is an optimizer."""
    code = "import sys, pats_kernels; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
