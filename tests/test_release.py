"""Released gradients: the same bits as the plain step, no two gradients at once, one plan per parameter."""

import copy
import gc
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint

from pats_kernels import PATS, PATSAdamW, plan, release_gradients
from pats_kernels.numbering import Numbering

pytestmark = pytest.mark.usefixtures("quick_gc")

NOISE: dict[str, Any] = {"noise_scale": 1e-2, "seed": 2**63 + 5}
STEPS = 4
WIDTH = 6


class Model(nn.Module):
    """A weight used twice, one that is frozen, one without noise, and one that is not always reached."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, WIDTH)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.scale = nn.Parameter(torch.ones(()))
        self.frozen.requires_grad_(False)

    def forward(self, tokens: Tensor, scaled: bool) -> Tensor:
        hidden = self.frozen(torch.tanh(self.inner(self.inner(self.embedding(tokens)))))
        return self.norm(hidden * self.scale if scaled else hidden) @ self.embedding.weight.T


def model_of(dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(3)
    return Model().to(dtype)


def loss_of(model: Model, number: int) -> Tensor:
    random = torch.Generator().manual_seed(number)
    tokens = torch.randint(0, 9, (4, 5), generator=random)
    logits = model(tokens, scaled=number % 2 == 0)
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())


def groups_of(model: Model) -> list[dict[str, Any]]:
    named = dict(model.named_parameters())
    first = {name: named.pop(name) for name in ("embedding.weight", "inner.weight", "frozen.weight")}
    return [
        {"params": list(first.items())},
        {"params": list(named.items()), "lr": 3e-2, "weight_decay": 0.0, "gamma": 0.5},
    ]


def attached(make: Callable[..., Optimizer], **keywords: Any) -> Callable[[Any], Optimizer]:
    def optimizer_of(groups: Any) -> Optimizer:
        optimizer = make(groups, **keywords)
        PATS(optimizer, **NOISE)
        return optimizer

    return optimizer_of


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "ema": lambda groups: PATSAdamW(groups, lr=1e-2, **NOISE),
    "moments": lambda groups: PATSAdamW(groups, lr=1e-2, sensitivity="moments", **NOISE),
    "exact": lambda groups: PATSAdamW(groups, lr=1e-2, normalization="exact", **NOISE),
    "PATS, AdamW": attached(AdamW, lr=1e-2),
    "PATS, fused AdamW": attached(AdamW, lr=1e-2, fused=True),
    "PATS, SGD": attached(SGD, lr=1e-1, momentum=0.9),
    "Adam": lambda groups: Adam(groups, lr=1e-2),
}


class Run:
    """A user's training loop, with schedules of the learning rate and the noise."""

    def __init__(
        self, make: Callable[[Any], Optimizer], released: bool, dtype: torch.dtype = torch.float32
    ) -> None:
        self.model = model_of(dtype)
        self.optimizer = make(groups_of(self.model))
        self.scheduler = LambdaLR(self.optimizer, lambda epoch: 1 / (1 + epoch))
        self.released = release_gradients(self.optimizer) if released else None
        self.number = 0

    def train(self, steps: int = STEPS) -> "Run":
        for _ in range(steps):
            loss_of(self.model, self.number).backward()
            if self.released is not None:
                assert all(param.grad is None for param in self.model.parameters())
            self.step()
        return self

    def step(self) -> None:
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.number += 1
        self.optimizer.param_groups[0]["noise_scale"] = 1e-2 / (1 + self.number)

    def state(self) -> dict[str, Any]:
        return copy.deepcopy({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()})

    def load(self, other: "Run") -> "Run":
        saved = other.state()
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(other.scheduler.state_dict())
        self.number = other.number
        return self


def assert_same(actual: Any, expected: Any, where: str = "") -> None:
    """Compares every tensor to the bit, and every number and key."""
    if isinstance(expected, Tensor):
        assert actual.dtype == expected.dtype, where
        assert torch.equal(actual, expected), where
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_same(actual[key], value, f"{where}[{key!r}]")
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), where
        for i, (own, other) in enumerate(zip(actual, expected, strict=True)):
            assert_same(own, other, f"{where}[{i}]")
    else:
        assert actual == expected, where


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:PATS. .*another optimizer draws its noise")  # the twin
@pytest.mark.filterwarnings("error")  # of schedulers that believe that no step was taken
def test_the_same_bits(kind: str, dtype: torch.dtype) -> None:
    plain, released = (Run(OPTIMIZERS[kind], release, dtype).train() for release in (False, True))
    assert_same(released.state(), plain.state())
    begin, end = model_of(dtype).state_dict(), plain.model.state_dict()
    moved = {name for name in begin if not torch.equal(begin[name], end[name])}
    assert {"embedding.weight", "inner.weight", "inner.bias", "norm.weight"} <= moved
    assert not any(name.startswith("frozen") for name in moved)


def test_noise_matters_here() -> None:
    """Otherwise the comparisons above would not show which noise is drawn."""
    quiet = Run(lambda groups: PATSAdamW(groups, lr=1e-2, gamma=1e9, **NOISE), True).train()
    noisy = Run(OPTIMIZERS["ema"], True).train()
    assert not torch.allclose(quiet.model.inner.weight, noisy.model.inner.weight, atol=1e-4)


@pytest.mark.parametrize("kind", ["ema", "PATS, AdamW"])
@pytest.mark.parametrize("released", [False, True])
def test_checkpoints_go_both_ways(kind: str, released: bool) -> None:
    expected = Run(OPTIMIZERS[kind], False).train(2 * STEPS)
    resumed = Run(OPTIMIZERS[kind], not released)
    resumed.load(Run(OPTIMIZERS[kind], released).train()).train()
    assert_same(resumed.state(), expected.state())


@pytest.mark.parametrize("kind", ["ema", "PATS, AdamW", "PATS, SGD"])
def test_accumulation(kind: str) -> None:
    """Only every second loss reaches `scale`: its gradient may wait for the loop's own step."""
    plain, released = (Run(OPTIMIZERS[kind], release) for release in (False, True))
    for number in range(STEPS):
        for run in (plain, released):
            losses = [loss_of(run.model, 3 * number + i) for i in range(3)]
            if run.released is None:
                for loss in losses:
                    loss.backward()
            else:
                with run.released.accumulate():
                    for loss in losses[:-1]:
                        loss.backward()
                assert run.model.inner.weight.grad is not None
                losses[-1].backward()
                assert run.model.inner.weight.grad is None
            run.step()
    assert_same(released.state(), plain.state())


def test_what_was_accumulated_can_be_stepped_by_the_loop() -> None:
    plain, released = (Run(OPTIMIZERS["ema"], release) for release in (False, True))
    for run in (plain, released):
        run.train(1)
        if run.released is None:
            loss_of(run.model, 9).backward()
        else:
            with run.released.accumulate():
                loss_of(run.model, 9).backward()
        run.step()
    assert_same(released.state(), plain.state())


def test_remove() -> None:
    plain, released = (Run(OPTIMIZERS["PATS, AdamW"], release).train() for release in (False, True))
    assert released.released is not None
    released.released.remove()
    released.released = None
    loss_of(released.model, 99).backward()
    assert all((p.grad is not None) == p.requires_grad for p in released.model.parameters() if p.ndim)
    released.optimizer.zero_grad()
    assert_same(released.train().state(), plain.train().state())
    release_gradients(released.optimizer)


def test_groups_and_parameters_that_come_later() -> None:
    plain, released = (Run(OPTIMIZERS["ema"], release) for release in (False, True))
    added = [nn.Parameter(torch.linspace(-1, 1, WIDTH)) for _ in range(2)]
    for run, param in zip((plain, released), added, strict=True):
        run.train(1)
        run.model.frozen.requires_grad_(True)
        run.optimizer.add_param_group({"params": [("added", param)], "lr": 0.5, "initial_lr": 0.5})
        run.scheduler.base_lrs.append(0.5)
        run.scheduler.lr_lambdas.append(run.scheduler.lr_lambdas[0])
        for number in range(STEPS):
            (loss_of(run.model, number) + param.square().sum()).backward()
            late = (param, run.model.frozen.weight)
            assert all((p.grad is None) == (run is released and number > 0) for p in late)
            run.step()
    assert_same(released.state(), plain.state())
    assert torch.equal(added[0], added[1])


def test_numbers_of_its_own_keep_their_place() -> None:
    def make(groups: Any) -> Optimizer:
        return PATSAdamW([{**groups[0], "tensor_id": 40}, groups[1]], lr=1e-2, **NOISE)

    plain, released = (Run(make, release).train() for release in (False, True))
    assert_same(released.state(), plain.state())
    assert not torch.equal(
        Run(OPTIMIZERS["ema"], True).train().model.inner.weight, released.model.inner.weight
    )


def test_a_closure() -> None:
    plain, released = (Run(OPTIMIZERS["ema"], release) for release in (False, True))
    for run in (plain, released):
        for number in range(STEPS):

            def closure(run: Run = run, number: int = number) -> Tensor:
                run.optimizer.zero_grad()
                loss = loss_of(run.model, number)
                loss.backward()
                return loss

            assert math.isfinite(run.optimizer.step(closure).item())
    assert_same(released.state(), plain.state())


def test_groups_stay_the_same_objects_and_hooks_may_change_them() -> None:
    run = Run(OPTIMIZERS["PATS, AdamW"], True)
    list_, groups = run.optimizer.param_groups, list(run.optimizer.param_groups)

    def halve(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"], group["seen"] = 1e-3 / (1 + run.number), True

    run.optimizer.register_step_pre_hook(halve)
    run.train(2)
    assert run.optimizer.param_groups is list_
    assert all(own is other for own, other in zip(list_, groups, strict=True))
    assert all(group["seen"] for group in groups)
    assert [len(group["params"]) for group in groups] == [3, 5]
    assert "tensor_id" not in groups[0]


def test_an_error_leaves_the_groups_as_they_were() -> None:
    run = Run(OPTIMIZERS["ema"], True)
    groups = run.optimizer.param_groups
    groups[1]["gamma"] = -1.0
    with pytest.raises(ValueError, match="gamma"):
        loss_of(run.model, 0).backward()
    assert run.optimizer.param_groups is groups
    assert [len(group["params"]) for group in groups] == [3, 5]


def test_errors_name_the_parameter() -> None:
    run = Run(OPTIMIZERS["ema"], True).train(1)
    run.optimizer.state[run.model.inner.weight]["exp_avg"] = torch.zeros(2)
    with pytest.raises(ValueError, match=r"inner\.weight: shape mismatch"):
        loss_of(run.model, 0).backward()


# Lifetimes.


@contextmanager
def most_gradients(params: list[nn.Parameter]) -> Iterator[list[int]]:
    """The number of gradients that exist, whenever one more has been accumulated."""
    counts: list[int] = []
    hooks = [
        param.register_post_accumulate_grad_hook(
            lambda _: counts.append(sum(other.grad is not None for other in params))
        )
        for param in params
        if param.requires_grad
    ]
    yield counts
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("released", [False, True])
def test_gradients_never_coexist(released: bool) -> None:
    model = model_of()
    params = list(model.parameters())
    with most_gradients(params) as counts:  # before the release, so that it counts first
        optimizer = OPTIMIZERS["ema"](groups_of(model))
        if released:
            release_gradients(optimizer)
        loss_of(model, 0).backward()
    reached = sum(param.requires_grad for param in params)
    assert counts == ([1] * reached if released else list(range(1, reached + 1)))


@pytest.mark.parametrize("kind", ["ema", "PATS, AdamW"])
def test_a_plan_for_each_parameter_is_made_once(kind: str) -> None:
    """With twenty parameters, far more than the plans that are kept of one set."""
    made: list[int] = []
    make = plan._planned

    def counted(batch: plan.Batch) -> plan.Plan:
        made.append(len(batch.params))
        return make(batch)

    params = [nn.Parameter(torch.ones(n)) for n in range(1, 21)]
    optimizer = OPTIMIZERS[kind]([{"params": params}])
    with patch.object(plan, "_planned", counted):
        for released in (True, False):
            handle = release_gradients(optimizer) if released else None
            for _ in range(3):
                torch.stack([(p * p).sum() for p in params]).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            if handle is not None:
                handle.remove()
    assert made == [1] * 20 + [20]


@pytest.mark.parametrize("kind", ["ema", "PATS, fused AdamW"])
def test_a_tensor_s_step_does_not_look_at_the_others(kind: str) -> None:
    """Each is numbered in its first step, and once more when all have a state. Before, every step walked
    over the whole model: 137 us instead of 68 with 200 tensors, 270 instead of 72 with 800."""
    params = [nn.Parameter(torch.randn(3)) for _ in range(30)]
    optimizer = OPTIMIZERS[kind](params)
    release_gradients(optimizer)
    settled = []
    for _ in range(4):
        with patch.object(Numbering, "_settle", autospec=True, side_effect=Numbering._settle) as settle:
            torch.stack(params).sum().backward()
            optimizer.step()
        settled.append(settle.call_count)
    assert settled[0] == len(params)
    assert settled[2:] == [0, 0]


def test_nothing_is_kept_alive() -> None:
    """Python does not collect a tensor's hooks, so no hook may refer back to the tensor."""
    run = Run(OPTIMIZERS["PATS, AdamW"], True).train(1)
    references = [weakref.ref(run.model.inner.weight), weakref.ref(run.optimizer)]
    model = run.model
    del run
    gc.collect()
    assert [reference() is None for reference in references] == [False, True]
    loss_of(model, 0).backward()  # the optimizer is gone, and with it the release
    assert model.inner.weight.grad is not None
    release_gradients(OPTIMIZERS["ema"](groups_of(model)))
    del model
    gc.collect()
    assert references[0]() is None


# Refusals.


def test_needs_an_optimizer() -> None:
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer, but is Model"):
        release_gradients(model_of())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="LBFGS needs a closure"):
        release_gradients(torch.optim.LBFGS(model_of().parameters()))


def test_once_an_optimizer_and_a_parameter() -> None:
    run = Run(OPTIMIZERS["ema"], True)
    with pytest.raises(ValueError, match="of this PATSAdamW are released already"):
        release_gradients(run.optimizer)
    other = SGD([("one", nn.Parameter(torch.ones(1))), ("two", run.model.inner.weight)], lr=1.0)
    with pytest.raises(ValueError, match="two: another optimizer releases"):
        release_gradients(other)
    assert not other._optimizer_step_pre_hooks


@pytest.mark.parametrize("kind", ["ema", "PATS, SGD"])
def test_a_scaler_is_refused(kind: str) -> None:
    run = Run(OPTIMIZERS[kind], True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(loss_of(run.model, 0)).backward()
    # PATSAdamW unscales by itself and is told of the scaler; of others torch asserts that they had gradients.
    error = RuntimeError if kind == "ema" else AssertionError
    with pytest.raises(error, match=r"GradScaler|No inf checks"):
        scaler.step(run.optimizer)


def test_a_scaler_that_is_there_already_is_refused() -> None:
    optimizer = OPTIMIZERS["ema"](groups_of(model_of()))
    optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="found_inf of a GradScaler"):
        release_gradients(optimizer)


def test_flattened_parameters_are_refused() -> None:
    param = nn.Parameter(torch.ones(3))
    param._fsdp_flattened = True  # type: ignore[attr-defined]
    optimizer = PATSAdamW([("flat", param)])
    with pytest.raises(RuntimeError, match="flat: FSDP1"):
        release_gradients(optimizer)
    assert not param._post_accumulate_grad_hooks


def test_two_backward_passes_are_not_taken_for_one_step() -> None:
    run = Run(OPTIMIZERS["ema"], True)
    for number in range(2):
        loss_of(run.model, number).backward()
    with pytest.raises(RuntimeError, match=r"was stepped 2 times in backward .* accumulate\(\)"):
        run.optimizer.step()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_parts(reentrant: bool) -> None:
    """Parts that are recomputed in backward; if reentrant, in a backward pass of their own."""
    plain, released = (Run(OPTIMIZERS["ema"], release) for release in (False, True))
    for run in (plain, released):
        tokens = torch.arange(9)
        for _ in range(STEPS):
            hidden = run.model.embedding(tokens)
            for part in (run.model.inner, run.model.norm):
                hidden = checkpoint(part, hidden, use_reentrant=reentrant)
            hidden.square().mean().backward()
            run.step()
    assert_same(released.state(), plain.state())


def test_a_weight_in_two_reentrant_parts_is_found_out() -> None:
    """Its gradient comes in two backward passes, and neither knows of the other."""
    run = Run(OPTIMIZERS["ema"], True)
    hidden = run.model.embedding(torch.arange(9))
    for _ in range(2):
        hidden = checkpoint(run.model.inner, hidden, use_reentrant=True)
    hidden.square().mean().backward()
    with pytest.raises(RuntimeError, match=r"inner\.\w+: was stepped 2 times .* use_reentrant"):
        run.optimizer.step()


def test_a_loop_without_step() -> None:
    """Its backward passes look like those of an accumulation, so each counts as a step."""
    plain, released = (Run(OPTIMIZERS["ema"], release) for release in (False, True))
    for number in range(STEPS):
        loss_of(released.model, number).backward()
        loss_of(plain.model, number).backward()
        plain.optimizer.step()
        plain.optimizer.zero_grad()
    assert_same(released.state(), plain.state())


def test_a_gradient_that_comes_later_is_seen() -> None:
    run = Run(OPTIMIZERS["ema"], True)
    loss_of(run.model, 0).backward()
    run.model.inner.bias.grad = torch.zeros(WIDTH)  # as DDP does
    with pytest.raises(RuntimeError, match=r"inner\.bias: has a gradient again"):
        run.optimizer.step()


class Counting(SGD):
    """Keeps a number for a whole group, as some third-party optimizers do."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
        super().step()


def test_state_of_a_whole_group_is_refused() -> None:
    run = Run(lambda groups: Counting(groups, lr=0.1), True)
    with pytest.raises(RuntimeError, match="Counting changes 'k' of a param group"):
        loss_of(run.model, 0).backward()
