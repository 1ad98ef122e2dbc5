"""PATS attached to bitsandbytes' optimizers, which load their state by themselves, on the CPU."""

import bitsandbytes as bnb
import pytest
from harness import assert_same_bits
from loops import Make, Training, by_hand, resumed

MAKERS: dict[str, Make] = {
    "AdamW": lambda params: bnb.optim.AdamW(params, lr=1e-3),
    "AdamW8bit": lambda params: bnb.optim.AdamW8bit(params, lr=1e-3),
    "Lion": lambda params: bnb.optim.Lion(params, lr=1e-4),
    "Lion8bit": lambda params: bnb.optim.Lion8bit(params, lr=1e-4),
    "SGD8bit": lambda params: bnb.optim.SGD8bit(params, lr=1e-2, momentum=0.9),
    "RMSprop8bit": lambda params: bnb.optim.RMSprop8bit(params, lr=1e-3),
    "Adagrad8bit": lambda params: bnb.optim.Adagrad8bit(params, lr=1e-2),
    "AdEMAMix": lambda params: bnb.optim.AdEMAMix(params, lr=1e-3),
}


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("name", MAKERS)
def test_is_the_loop_by_hand(name: str, closure: bool) -> None:
    run = Training(MAKERS[name], closure=closure).run()
    assert_same_bits(list(run.model.parameters()), by_hand(run))
    if name.endswith("8bit"):
        assert run.optimizer.state[run.params[0]]["state1"].dtype.itemsize == 1


@pytest.mark.parametrize("name", MAKERS)
def test_resumes_to_the_bit(name: str) -> None:
    run = Training(MAKERS[name])
    assert_same_bits(resumed(run).tensors(), run.run().tensors())
