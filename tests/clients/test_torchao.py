"""PATS attached to torchao's optimizers with quantized state; weights that are or will be quantized."""

from typing import Any

import pytest
import torch
from harness import assert_same_bits
from loops import (
    NOISE,
    STEPS,
    Make,
    Training,
    by_hand,
    fused,
    loss_of,
    manual_loop,
    network,
    noise_alone,
    resumed,
)
from torch import nn
from torch.optim import SGD
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from torchao.float8.fsdp_utils import WeightWithDynamicFloat8CastTensor
from torchao.optim import AdamW4bit, AdamW8bit, AdamWFp8, _AdamW
from torchao.prototype.quantized_training import int8_weight_only_quantized_training
from torchao.quantization import quantize_
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

from pats_kernels import PATS, PATSAdamW

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


def float8(model: nn.Sequential) -> None:
    convert_to_float8_training(model[:2], config=Float8LinearConfig(emulate=True))


def fake_int8(model: nn.Sequential) -> None:
    weights = IntxFakeQuantizeConfig(torch.int8, group_size=20)
    quantize_(model, QATConfig(weight_config=weights, step="prepare"))


@pytest.mark.parametrize("convert", [float8, fake_int8])
def test_weights_in_full_precision_behind_quantized_ones(convert: Any) -> None:
    """The parameters are plain float32 tensors, of which forward makes others: noise as everywhere."""
    models = [network() for _ in range(2)]
    for model in models:
        convert(model)
    optimizer = SGD(models[0].parameters(), lr=1e-2)
    noise, plain = noise_alone(list(models[1].parameters())), SGD(models[1].parameters(), lr=1e-2)
    PATS(optimizer, **NOISE)
    manual_loop(models[0], optimizer)
    for step in range(STEPS):
        loss_of(models[1], step).backward()
        noise.step()
        plain.step()
        plain.zero_grad()
    assert_same_bits(list(models[0].parameters()), list(models[1].parameters()))


@pytest.mark.parametrize("how", ["fused", "attached"])
def test_quantized_weights_are_refused(how: str) -> None:
    model = network()
    quantize_(model, int8_weight_only_quantized_training())
    optimizer = fused(model.named_parameters()) if how == "fused" else SGD(model.named_parameters(), lr=1e-2)
    if how == "attached":
        PATS(optimizer, **NOISE)
    loss_of(model, 0).backward()
    with pytest.raises(TypeError, match=r"0\.weight: the parameter, a Int8\w+, has no memory of its own"):
        optimizer.step()


@pytest.mark.parametrize("backend", ["cpp", "eager"])
def test_float8_weights_have_no_memory_of_their_own(backend: str) -> None:
    """A kernel would read what lies at address 0. Eager operations ask the subclass."""
    config = Float8LinearConfig(enable_fsdp_float8_all_gather=True, emulate=True)
    model = convert_to_float8_training(nn.Sequential(nn.Linear(16, 16)), config=config)
    weight = model[0].weight
    assert isinstance(weight, WeightWithDynamicFloat8CastTensor)
    weight.grad = torch.ones(16, 16)
    optimizer = PATSAdamW(model.named_parameters(), backend=backend)
    if backend == "eager":
        optimizer.step()
    else:
        with pytest.raises(TypeError, match=r"0\.weight: .*has no memory of its own"):
            optimizer.step()
