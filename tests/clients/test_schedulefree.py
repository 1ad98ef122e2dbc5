"""PATS attached to schedulefree's optimizers, which train at a point between two sequences of weights."""

from typing import Any

import pytest
import schedulefree
import torch
from harness import assert_same_bits
from loops import Make, Training, by_hand, network, resumed

from pats_kernels import PATS


def training_mode(optimizer: Any) -> Any:
    optimizer.train()  # its documentation requires this before the first step
    return optimizer


MAKERS: dict[str, Make] = {
    "AdamW": lambda params: training_mode(schedulefree.AdamWScheduleFree(params, lr=1e-3)),
    "RAdam": lambda params: training_mode(schedulefree.RAdamScheduleFree(params, lr=1e-3)),
    "SGD": lambda params: training_mode(schedulefree.SGDScheduleFree(params, lr=1e-2)),
}


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("name", MAKERS)
def test_is_the_loop_by_hand(name: str, closure: bool) -> None:
    run = Training(MAKERS[name], closure=closure).run()
    assert_same_bits(list(run.model.parameters()), by_hand(run))


@pytest.mark.parametrize("name", MAKERS)
def test_resumes_to_the_bit(name: str) -> None:
    run = Training(MAKERS[name])
    assert_same_bits(resumed(run).tensors(), run.run().tensors())


def test_its_wrapper_is_refused() -> None:
    wrapper = schedulefree.ScheduleFreeWrapper(torch.optim.AdamW(network().parameters()))
    with pytest.raises(TypeError, match=r"ScheduleFreeWrapper.*attribute 'base'"):
        PATS(wrapper)
