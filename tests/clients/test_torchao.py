"""PATS attached to torchao's optimizers with quantized state."""

import pytest
import torch
from harness import assert_same_bits
from loops import Make, Training, by_hand, resumed
from torchao.optim import AdamW4bit, AdamW8bit, AdamWFp8, _AdamW

MAKERS: dict[str, Make] = {
    "_AdamW": lambda params: _AdamW(params),
    "AdamW8bit": lambda params: AdamW8bit(params),
    "AdamW4bit": lambda params: AdamW4bit(params),
    "AdamWFp8": lambda params: AdamWFp8(params),
}


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchao compiles each step, which takes minutes and proves nothing here."""
    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: function)


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("name", MAKERS)
def test_is_the_loop_by_hand(name: str, closure: bool) -> None:
    run = Training(MAKERS[name], closure=closure).run()
    assert_same_bits(list(run.model.parameters()), by_hand(run))


@pytest.mark.parametrize("name", MAKERS)
def test_resumes_to_the_bit(name: str) -> None:
    run = Training(MAKERS[name])
    assert_same_bits(resumed(run).tensors(), run.run().tensors())
