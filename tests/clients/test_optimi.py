"""PATS attached to optimi's optimizers; its gradient release."""

import optimi
import pytest
import torch
from harness import assert_same_bits
from loops import NOISE, STEPS, Make, Training, by_hand, loss_of, network, resumed, tensors

from pats_kernels import PATS

MAKERS: dict[str, Make] = {
    "Adam": lambda params: optimi.Adam(params, lr=1e-3),
    "AdamW": lambda params: optimi.AdamW(params, lr=1e-3),
    "Adan": lambda params: optimi.Adan(params, lr=1e-3),
    "Lion": lambda params: optimi.Lion(params, lr=1e-4),
    "RAdam": lambda params: optimi.RAdam(params, lr=1e-3),
    "Ranger": lambda params: optimi.Ranger(params, lr=1e-3),
    "SGD": lambda params: optimi.SGD(params, lr=1e-2, momentum=0.9),
    "StableAdamW": lambda params: optimi.StableAdamW(params, lr=1e-3, triton=False),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # with Kahan summation


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MAKERS)
def test_is_the_loop_by_hand(name: str, dtype: str, closure: bool) -> None:
    run = Training(MAKERS[name], closure=closure, dtype=DTYPES[dtype]).run()
    assert_same_bits(list(run.model.parameters()), by_hand(run))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MAKERS)
def test_resumes_to_the_bit(name: str, dtype: str) -> None:
    run = Training(MAKERS[name], dtype=DTYPES[dtype])
    assert_same_bits(resumed(run).tensors(), run.run().tensors())


def test_gradient_release() -> None:
    """optimi steps each parameter in the backward pass, when its gradient is there and the others' are not:
    PATS then does the same, with the same bits."""
    plain = Training(lambda params: optimi.AdamW(params, lr=1e-3)).run()
    model = network()
    optimizer = optimi.AdamW(model.parameters(), lr=1e-3, gradient_release=True)
    pats = PATS(optimizer, **NOISE)
    optimi.prepare_for_gradient_release(model, optimizer)
    for step in range(STEPS):
        loss_of(model, step).backward()
        assert all(param.grad is None for param in model.parameters())
        optimizer.step()  # the loop calls it, but nothing is left to do
    assert_same_bits(list(model.parameters()), list(plain.model.parameters()))
    for one, other in zip(model.parameters(), plain.params, strict=True):
        assert_same_bits(list(tensors(pats.state[one])), list(tensors(plain.pats.state[other])))
