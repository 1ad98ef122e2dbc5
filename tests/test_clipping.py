"""`PATSAdamW.clip_grad_norm_`, compared with torch's, which multiplies the gradients."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pats_kernels import PATSAdamW, release_gradients

MAX_NORMS = [1e-3, 1.0, 1e6]  # norms are around 20: clips much, some, nothing


def params_of(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    random = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=random).to(dtype)) for shape in [(20, 16), (300,), ()]]


def give_grads(params: list[nn.Parameter], number: int, factor: float = 1.0) -> None:
    random = torch.Generator().manual_seed(number)
    for param in params:
        param.grad = (torch.randn(param.shape, generator=random) * factor).to(param.dtype)


def tensors(optimizer: PATSAdamW) -> list[Tensor]:
    params = optimizer.param_groups[0]["params"]
    return [
        x.detach() for p in params for x in (p, *(v for k, v in optimizer.state[p].items() if k != "step"))
    ]


@pytest.mark.parametrize("max_norm", MAX_NORMS)
@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
@pytest.mark.parametrize("options", [{}, {"sensitivity": "moments"}, {"normalization": "exact"}], ids=str)
def test_a_step_is_that_of_clipped_gradients(
    backend: str, options: dict[str, Any], norm_type: float, max_norm: float
) -> None:
    """torch multiplies g by a rounded coefficient and rounds the product. Here g is multiplied by the
    reciprocal of the coefficient's reciprocal. The difference is a few roundings of 2^-24 of g. The moments'
    quotient and the averages inherit them, and so does the noise, at most 2e-3, through the gate's slope,
    times 1/q. Without clipping the bits are the same."""
    pair: list[tuple[list[Tensor], Tensor]] = []
    for clip in (True, False):
        params = params_of()
        optimizer = PATSAdamW(params, lr=1e-2, noise_scale=2e-3, seed=3, backend=backend, **options)
        expected = torch.zeros(())
        for number in range(3):
            give_grads(params, number)
            if clip:
                expected = optimizer.clip_grad_norm_(max_norm, norm_type)
                kept = [param.grad for param in params]
            else:
                expected = nn.utils.clip_grad_norm_(params, max_norm, norm_type)
                kept = []
            optimizer.step()
            assert all(grad is param.grad for grad, param in zip(kept, params, strict=False))
            optimizer.zero_grad()
        pair.append((tensors(optimizer), expected))
    (ours, norm), (theirs, torch_norm) = pair
    assert torch.equal(norm, torch_norm)
    for a, b in zip(ours, theirs, strict=True):
        if max_norm == MAX_NORMS[-1]:
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("unscale", [True, False])
@pytest.mark.parametrize("factor", [1.0, float("inf")])
def test_with_a_grad_scaler(backend: str, factor: float, unscale: bool) -> None:
    """max_norm refers to the unscaled gradients, whether they are unscaled already or the step does it.

    A step that the scaler skips changes nothing, and its norm is not used for the next step.
    """
    params, reference = params_of(), params_of()
    ours = PATSAdamW(params, lr=1e-2, noise_scale=0.0, backend=backend)
    theirs = PATSAdamW(reference, lr=1e-2, noise_scale=0.0, backend=backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))
    give_grads(params, 1, 1024.0 * factor)
    if unscale:
        scaler.unscale_(ours)
    ours.clip_grad_norm_(1.0)
    scaler.step(ours)
    scaler.update()
    if factor == 1.0:
        give_grads(reference, 1)
        nn.utils.clip_grad_norm_(reference, 1.0)
        theirs.step()
    ours.zero_grad()
    give_grads(params, 2)
    give_grads(reference, 2)
    ours.step()
    theirs.step()
    for a, b in zip(tensors(ours), tensors(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_another_gradient_than_the_norm_s_is_refused() -> None:
    """As after another backward, or after a step that was not taken. Nothing changes."""
    params = params_of()
    optimizer = PATSAdamW(params, noise_scale=0.0)
    give_grads(params, 1)
    optimizer.clip_grad_norm_(1.0)
    grad = params[0].grad
    assert grad is not None
    grad.add_(1)
    before = [param.detach().clone() for param in params]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="clip_grad_norm_ was called for other gradients"):
            optimizer.step()
        give_grads(params, 2)  # new tensors are other gradients too
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    optimizer.clip_grad_norm_(1.0)
    optimizer.step()
    optimizer.step()  # a norm is for one step only: this one is not clipped


def test_gradients_are_not_kept_alive_for_a_step_that_does_not_come() -> None:
    params = params_of()
    optimizer = PATSAdamW(params, noise_scale=0.0)
    give_grads(params, 1)
    optimizer.clip_grad_norm_(1.0)
    grads = [weakref.ref(param.grad) for param in params if param.grad is not None]
    for param in params:
        param.grad = None
    assert all(ref() is None for ref in grads)


@pytest.mark.parametrize("max_norm", [0, -1.0, float("nan"), float("inf"), "1", None])
def test_bad_norms(max_norm: Any) -> None:
    with pytest.raises(ValueError, match="Invalid max_norm"):
        PATSAdamW(params_of()).clip_grad_norm_(max_norm)


def test_no_gradients_and_nonfinite_ones() -> None:
    params = params_of()
    optimizer = PATSAdamW(params, noise_scale=0.0)
    assert optimizer.clip_grad_norm_(1.0) == 0
    optimizer.step()
    give_grads(params, 1, float("nan"))
    with pytest.raises(RuntimeError, match="non-finite"):
        optimizer.clip_grad_norm_(1.0, error_if_nonfinite=True)
    assert optimizer.clip_grad_norm_(1.0).isnan()


def test_released_gradients_are_refused() -> None:
    model = nn.Linear(3, 2)
    optimizer = PATSAdamW(model.parameters(), noise_scale=0.0)
    release_gradients(optimizer)
    model(torch.ones(1, 3)).sum().backward()
    with pytest.raises(RuntimeError, match="release_gradients"):
        optimizer.clip_grad_norm_(1.0)


def test_behind_accelerate_s_wrapper() -> None:
    """As in docs/trainer.md: at the end of an accumulation, on the wrapped optimizer."""
    accelerate = pytest.importorskip("accelerate")
    # A Trainer of another test may have left its precision in the environment, and in Accelerate's state.
    accelerate.state.AcceleratorState._reset_state()
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="no", gradient_accumulation_steps=2)
    torch.manual_seed(1)
    models = [nn.Linear(4, 3), nn.Linear(4, 3)]
    models[1].load_state_dict(models[0].state_dict())
    inputs = torch.randn(4, 2, 4, generator=torch.Generator().manual_seed(1))
    # A large eps: m / sqrt(v) of a gradient near 0 is all rounding.
    options = {"lr": 0.1, "eps": 1.0, "noise_scale": 0.0}
    model, optimizer = accelerator.prepare(models[0], PATSAdamW(models[0].parameters(), **options))
    for batch in inputs:
        with accelerator.accumulate(model):
            accelerator.backward(100 * model(batch).square().mean())
            if accelerator.sync_gradients:
                optimizer.optimizer.clip_grad_norm_(0.5)
            optimizer.step()
            optimizer.zero_grad()
    plain = PATSAdamW(models[1].parameters(), **options)
    for pair in inputs.split(2):
        torch.stack([50 * models[1](batch).square().mean() for batch in pair]).sum().backward()
        nn.utils.clip_grad_norm_(models[1].parameters(), 0.5)
        plain.step()
        plain.zero_grad()
    torch.testing.assert_close(models[0].weight, models[1].weight, rtol=1e-6, atol=1e-7)
