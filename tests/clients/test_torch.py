"""PATS attached to each of torch's own optimizers, stepped with and without a closure."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import assert_same_bits
from loops import NOISE, STEPS, Make, Training, by_hand, network, resumed
from torch import nn
from torch.optim import Optimizer

from pats_kernels import PATS

MAKERS: dict[str, Make] = {
    "Adadelta": lambda params: torch.optim.Adadelta(params),
    "Adafactor": lambda params: torch.optim.Adafactor(params),
    "Adagrad": lambda params: torch.optim.Adagrad(params),
    "Adam": lambda params: torch.optim.Adam(params, amsgrad=True),
    "AdamW": lambda params: torch.optim.AdamW(params),
    "AdamW, fused": lambda params: torch.optim.AdamW(params, fused=True),
    "Adamax": lambda params: torch.optim.Adamax(params),
    "ASGD": lambda params: torch.optim.ASGD(params),
    "LBFGS": lambda params: torch.optim.LBFGS(params, max_iter=3),
    "LBFGS, line search": lambda params: torch.optim.LBFGS(params, line_search_fn="strong_wolfe"),
    "Muon": lambda params: torch.optim.Muon(params),
    "NAdam": lambda params: torch.optim.NAdam(params),
    "RAdam": lambda params: torch.optim.RAdam(params),
    "RMSprop": lambda params: torch.optim.RMSprop(params),
    "Rprop": lambda params: torch.optim.Rprop(params),
    "SGD": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9),
}
OTHERS = {"Optimizer", "SparseAdam"}  # the base class; an optimizer for sparse gradients only


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [param for param in model.parameters() if param.ndim == 2]


def training(name: str, closure: bool) -> Training:
    choose: dict[str, Callable[[nn.Module], Any]] = {"choose": matrices} if name == "Muon" else {}
    return Training(MAKERS[name], closure=closure, **choose)  # type: ignore[arg-type]


def test_none_is_forgotten() -> None:
    classes = {name for name, value in vars(torch.optim).items() if isinstance(value, type)}
    own = {name for name in classes if issubclass(getattr(torch.optim, name), Optimizer)}
    assert own - OTHERS == {name.split(",")[0] for name in MAKERS}


CASES = [(name, closure) for name in MAKERS for closure in (False, True) if closure or "LBFGS" not in name]


@pytest.mark.parametrize(("name", "closure"), CASES)
def test_is_the_loop_by_hand(name: str, closure: bool) -> None:
    run = training(name, closure).run()
    assert_same_bits(list(run.model.parameters()), by_hand(run))
    assert {float(state["step"]) for state in run.pats.state.values()} == {STEPS}


@pytest.mark.parametrize(("name", "closure"), CASES)
def test_resumes_to_the_bit(name: str, closure: bool) -> None:
    run = training(name, closure)
    assert_same_bits(resumed(run).tensors(), run.run().tensors())


def test_a_closure_that_is_evaluated_again_and_again() -> None:
    """One PATS step an optimizer step, whose noise is there before the second evaluation."""
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)
    pats = PATS(optimizer, **NOISE | {"normalization": "exact"})
    weights: list[torch.Tensor] = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(1, model[0].in_features)).square().sum()
        loss.backward()
        weights.append(model[0].weight.detach().clone())
        return loss

    start = model[0].weight.detach().clone()
    optimizer.step(closure)
    assert len(weights) > 2
    assert torch.equal(weights[0], start)
    assert {float(state["step"]) for state in pats.state.values()} == {1}
