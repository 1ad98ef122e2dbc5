"""A small model and its batches, and the loops that a client's own is held against.

The truth about PATS in a client is a loop by hand, in which the noise comes from `PATS` on an SGD with a
learning rate of 0, which leaves the parameters alone otherwise, and the client's optimizer then takes its
plain step. Both do the same arithmetic in the same order: bits are equal.
"""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from pats_kernels import PATS, PATSAdamW

NOISE: dict[str, Any] = {"noise_scale": 1e-2, "gamma": 0.5, "seed": 5}
STEPS = 6
INPUTS, HIDDEN, OUTPUTS = 60, 80, 3  # the first matrix is big enough for optimizers that quantize their state

Make = Callable[[list[nn.Parameter]], Optimizer]


def network(seed: int = 1, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, OUTPUTS)).to(dtype)


def batch(step: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1000 + step)
    return torch.randn(8, INPUTS, generator=random), torch.randn(8, OUTPUTS, generator=random)


def loss_of(model: nn.Module, step: int) -> Tensor:
    inputs, targets = batch(step)
    dtype = next(model.parameters()).dtype
    return (model(inputs.to(dtype)).float() - targets).square().mean()


def noise_alone(params: list[nn.Parameter], **kwargs: Any) -> Optimizer:
    """Its step adds PATS's noise, and nothing else happens."""
    optimizer = SGD(params, lr=0.0)
    PATS(optimizer, **NOISE | kwargs)
    return optimizer


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested containers, in their order, copied; of a subclass those that it is made of."""
    if isinstance(value, Tensor):
        flatten = getattr(value, "__tensor_flatten__", None)
        if flatten is not None:
            yield from tensors([getattr(value, name) for name in flatten()[0]])
        else:
            yield value.detach().clone()
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)


@dataclass
class Training:
    """A model and an optimizer that PATS is attached to."""

    make: Make
    seed: int = 1
    closure: bool = False
    choose: Callable[[nn.Module], list[nn.Parameter]] = lambda model: list(model.parameters())
    dtype: torch.dtype = torch.float32
    model: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.model = network(self.seed, self.dtype)
        self.params = self.choose(self.model)
        self.optimizer = self.make(self.params)
        self.pats = PATS(self.optimizer, **NOISE)

    def run(self, first: int = 0, last: int = STEPS) -> "Training":
        for step in range(first, last):

            def evaluate(step: int = step) -> Tensor:
                self.optimizer.zero_grad()
                loss = loss_of(self.model, step)
                loss.backward()
                return loss

            if self.closure:
                self.optimizer.step(evaluate)
            else:
                evaluate()
                self.optimizer.step()
        return self

    def tensors(self) -> list[Tensor]:
        """Parameters, PATS's state and the optimizer's own."""
        states = [self.pats.state[param] for param in self.params]
        sorted_states = [{key: state[key] for key in sorted(state)} for state in states]
        own = [self.optimizer.state.get(param, {}) for param in self.params]
        return list(tensors([list(self.model.parameters()), sorted_states, own]))


def by_hand(training: Training) -> list[nn.Parameter]:
    """The parameters of a run without an attached PATS, perturbed before each of the optimizer's steps."""
    model = network(training.seed, training.dtype)
    params = training.choose(model)
    optimizer, noise = training.make(params), noise_alone(params)
    for step in range(STEPS):
        evaluations = 0

        def evaluate(step: int = step) -> Tensor:
            nonlocal evaluations
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            if evaluations == 0:
                noise.step()
            evaluations += 1
            return loss

        if training.closure:
            optimizer.step(evaluate)
        else:
            evaluate()
            optimizer.step()
    return list(model.parameters())


def resumed(training: Training, half: int = STEPS // 2) -> Training:
    """A run of other weights that goes on from the checkpoint of one of `training`'s kind, half-way."""
    first = Training(training.make, training.seed, training.closure, training.choose, training.dtype)
    first.run(last=half)
    saved = deepcopy((first.model.state_dict(), first.optimizer.state_dict()))
    second = Training(training.make, 2, training.closure, training.choose, training.dtype)
    second.model.load_state_dict(saved[0])
    second.optimizer.load_state_dict(saved[1])
    return second.run(first=half)


def manual_loop(model: nn.Module, optimizer: Optimizer, first: int = 0, last: int = STEPS) -> None:
    """What people write."""
    for step in range(first, last):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()


def fused(params: Any, **kwargs: Any) -> PATSAdamW:
    return PATSAdamW(params, **{"lr": 1e-3} | NOISE | kwargs)
