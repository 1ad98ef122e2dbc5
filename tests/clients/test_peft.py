"""LoRA by PEFT: when the noise comes, in whom, and that it is saved, merged and resumed as without PATS."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from harness import assert_same_bits
from loops import NOISE, STEPS, fused, loss_of, manual_loop, network, noise_alone, tensors
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.optim import AdamW

from pats_kernels import PATS

KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "DoRA": {"use_dora": True},
}
ZERO_B = ["LoRA", "rsLoRA", "DoRA"]  # lora_B starts at 0; PiSSA's does not


class Base(nn.Module):
    """The network with names that PEFT can point at."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.net = network(seed)
        self.config = {"model_type": "custom"}

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)


def lora(kind: str, seed: int = 3) -> Any:
    """The same base every time, adapters by `seed`."""
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"], **KINDS[kind])
    return get_peft_model(Base(1), config)


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


def optimizer_of(how: str, model: nn.Module, **kwargs: Any) -> tuple[Any, Any]:
    params = [param for param in model.parameters() if param.requires_grad]
    if how == "fused":
        optimizer = fused(params, **kwargs)
        return optimizer, optimizer
    optimizer = AdamW(params, lr=1e-3)
    return optimizer, PATS(optimizer, **NOISE | kwargs)


def everything(model: nn.Module, optimizer: Any, pats: Any) -> list[Tensor]:
    params = list(adapters(model).values())
    states = [dict(sorted(s.state[p].items())) for s in (optimizer, pats) for p in params]
    return list(tensors([list(model.parameters()), states]))


@pytest.mark.parametrize("normalization", ["delayed", "exact"])
@pytest.mark.parametrize("kind", KINDS)
def test_when_the_noise_comes(kind: str, normalization: str) -> None:
    """Where lora_B is 0, |w * g| is 0 in the whole first step: of lora_B since w is, of lora_A since g is. So
    their means are there one step later than others': noise comes in step 3, with exact means in step 2."""
    model = lora(kind)
    params = list(adapters(model).values())
    optimizer, noise = AdamW(params, lr=1e-3), noise_alone(params, normalization=normalization)
    sizes: list[dict[str, float]] = []
    for step in range(4):
        loss_of(model, step).backward()
        before = deepcopy(adapters(model))
        noise.step()
        sizes.append({n: float((p - before[n]).detach().abs().max()) for n, p in adapters(model).items()})
        optimizer.step()
        optimizer.zero_grad()
    usual = {"delayed": 2, "exact": 1}[normalization]
    for step, of_step in enumerate(sizes, start=1):
        for name, size in of_step.items():
            late = kind in ZERO_B and "magnitude" not in name
            assert (size > 0) == (step >= usual + late), (step, name)


@pytest.mark.parametrize("how", ["fused", "attached"])
@pytest.mark.parametrize("kind", KINDS)
def test_resumes_to_the_bit(kind: str, how: str, tmp_path: Path) -> None:
    """PEFT's own checkpoint of the adapter, beside the optimizer's; the base stays as it was."""
    whole = lora(kind)
    base = deepcopy([p for p in whole.parameters() if not p.requires_grad])
    optimizer, pats = optimizer_of(how, whole)
    manual_loop(whole, optimizer, last=STEPS // 2)
    whole.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    manual_loop(whole, optimizer, first=STEPS // 2)
    assert_same_bits([p.data for p in base], [p.data for p in whole.parameters() if not p.requires_grad])
    assert set(pats.state) == set(adapters(whole).values())

    model = lora(kind, seed=4)
    peft.set_peft_model_state_dict(model, peft.utils.load_peft_weights(str(tmp_path)))
    other, resumed = optimizer_of(how, model)
    other.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    manual_loop(model, other, first=STEPS // 2)
    assert_same_bits(everything(model, other, resumed), everything(whole, optimizer, pats))


@pytest.mark.parametrize("how", ["fused", "attached"])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_merged(kind: str, how: str, tmp_path: Path) -> None:
    """The noise is in the adapter, so it is in what is saved and in the merged weights."""
    model = lora(kind)
    manual_loop(model, optimizer_of(how, model)[0])
    model.eval()
    inputs = torch.randn(5, model.base_model.model.net[0].in_features)
    expected = model(inputs)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Base(1), tmp_path)
    torch.testing.assert_close(loaded(inputs), expected)
    merged = model.merge_and_unload()
    # Merging adds the product of the adapters to the weights, which is one more rounding.
    torch.testing.assert_close(merged(inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", ["fused", "attached"])
def test_is_the_loop_by_hand(how: str) -> None:
    """A PEFT model is a model: PATS sees the adapters alone, numbered among themselves."""
    model, other = lora("LoRA"), lora("LoRA")
    optimizer, pats = optimizer_of(how, model)
    manual_loop(model, optimizer)
    params = list(adapters(other).values())
    plain: Any = AdamW(params, lr=1e-3) if how == "attached" else fused(params, noise_scale=0.0)
    noise = noise_alone(params)
    for step in range(STEPS):
        loss_of(other, step).backward()
        noise.step()
        plain.step()
        plain.zero_grad()
    assert_same_bits([p.data for p in adapters(model).values()], [p.data for p in params])
    assert {float(state["step"]) for state in pats.state.values()} == {STEPS}
