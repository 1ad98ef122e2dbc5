"""PATS attached to optimizers of pytorch_optimizer, and the wrappers among them, which it refuses."""

from collections.abc import Callable
from typing import Any

import pytest
import pytorch_optimizer
import torch
from harness import assert_same_bits
from loops import Training, by_hand, network, resumed
from torch import nn
from torch.optim import AdamW, Optimizer

from pats_kernels import PATS

NAMES = [
    "ADOPT",
    "AdEMAMix",
    "AdaBelief",
    "AdaFactor",
    "AdamP",
    "Adan",
    "APOLLO",
    "CAME",
    "DAdaptAdam",
    "Fira",
    "GaLore",
    "GrokFastAdamW",
    "Lamb",
    "LaProp",
    "LARS",
    "Lion",
    "MADGRAD",
    "NovoGrad",
    "PNM",
    "Prodigy",
    "QHAdam",
    "Ranger",
    "SCION",
    "SGDP",
    "SM3",
    "SOAP",
    "ScalableShampoo",
    "ScheduleFreeAdamW",
    "SPAM",
    "StableAdamW",
    "Tiger",
    "Yogi",
]


def training(name: str, closure: bool = False) -> Training:
    torch.manual_seed(0)  # some draw projections, or begin with random numbers of their own
    return Training(getattr(pytorch_optimizer, name), closure=closure)


@pytest.mark.parametrize("name", NAMES)
def test_is_the_loop_by_hand(name: str) -> None:
    run = training(name).run()
    torch.manual_seed(0)
    assert_same_bits(list(run.model.parameters()), by_hand(run))


@pytest.mark.parametrize("name", NAMES)
def test_resumes_to_the_bit(name: str) -> None:
    whole = training(name).run()
    torch.manual_seed(0)
    assert_same_bits(resumed(training(name)).tensors(), whole.tensors())


WRAPPERS: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "Lookahead": (lambda model: pytorch_optimizer.Lookahead(AdamW(model.parameters())), "optimizer"),
    "OrthoGrad": (lambda model: pytorch_optimizer.OrthoGrad(AdamW(model.parameters())), "optimizer"),
    "PCGrad": (lambda model: pytorch_optimizer.PCGrad(AdamW(model.parameters())), "optimizer"),
    "SafeFP16Optimizer": (
        lambda model: pytorch_optimizer.SafeFP16Optimizer(AdamW(model.parameters())),
        "optimizer",
    ),
    "SAM": (lambda model: pytorch_optimizer.SAM(model.parameters(), AdamW), "base_optimizer"),
    "ScheduleFreeWrapper": (
        lambda model: pytorch_optimizer.ScheduleFreeWrapper(AdamW(model.parameters())),
        "optimizer",
    ),
    "TRAC": (lambda model: pytorch_optimizer.TRAC(AdamW(model.parameters())), "optimizer"),
    "WSAM": (lambda model: pytorch_optimizer.WSAM(model, model.parameters(), AdamW), "base_optimizer"),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_are_refused(name: str) -> None:
    make, attribute = WRAPPERS[name]
    wrapper = make(network())
    with pytest.raises((TypeError, ValueError), match=f"{name}.*attribute '{attribute}'"):
        PATS(wrapper)


@pytest.mark.parametrize("name", ["AdaBound", "Alice", "AvaGrad", "FOCUS", "MARS", "RACS"])
def test_a_gamma_that_is_another_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}, whose param groups have a 'gamma' of their own"):
        PATS(getattr(pytorch_optimizer, name)(network().parameters()))


def test_inside_a_lookahead() -> None:
    """What the error advises: the inner optimizer's steps get the noise, which the outer then averages."""
    models = [network() for _ in range(2)]
    inner: list[Optimizer] = [torch.optim.SGD(model.parameters(), lr=1e-2) for model in models]
    outer = [pytorch_optimizer.Lookahead(optimizer, k=2, alpha=0.5) for optimizer in inner]
    pats = PATS(inner[0], noise_scale=1e-2, normalization="exact")
    for _ in range(4):
        for model, optimizer in zip(models, outer, strict=True):
            model(torch.ones(1, model[0].in_features)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert {float(state["step"]) for state in pats.state.values()} == {4}
    assert not torch.equal(models[0][0].weight, models[1][0].weight)
