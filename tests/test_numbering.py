"""No two elements of a model draw the same noise: tensor numbers given by the user, made, or warned about."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from pats_kernels import PATS, PATSAdamW, parts
from pats_kernels.logs import pats_of
from pats_kernels.numbering import BITS
from pats_kernels.reference import philox_normal

SEED = 2**40 + 7  # no other test's
SIZE = 4000
# Every gate is open, and AdamW itself moves nothing: what a step changes is noise.
SETTINGS: dict[str, Any] = {"noise_scale": 1e-2, "gamma": 0.0, "normalization": "exact", "seed": SEED}
STILL: dict[str, Any] = {"lr": 0.0, "weight_decay": 0.0}

Maker = Callable[[Any], Any]
MAKERS: dict[str, Maker] = {
    "PATSAdamW": lambda groups: PATSAdamW(groups, **STILL, **SETTINGS),
    "moments": lambda groups: PATSAdamW(
        groups, sensitivity="moments", uncertainty="none", **STILL, **SETTINGS
    ),
    "PATS": lambda groups: attached(groups),
}


def attached(groups: Any) -> AdamW:
    optimizer = AdamW(groups, **STILL)
    PATS(optimizer, **SETTINGS)
    return optimizer


def parameters(*sizes: int, seed: int = 0) -> list[nn.Parameter]:
    random = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(size, generator=random)) for size in sizes]


def give_gradients(params: list[nn.Parameter], number: int = 1) -> None:
    random = torch.Generator().manual_seed(number)
    for param in params:
        param.grad = torch.randn(param.shape, generator=random)


def signs(after: list[nn.Parameter], before: list[Tensor]) -> list[Tensor]:
    return [(a.detach() - b).sign() for a, b in zip(after, before, strict=True)]


def agreement(one: Tensor, other: Tensor) -> float:
    """The share of elements with the same sign in both: 0.5 if they are independent."""
    size = min(len(one), len(other))
    return (one[:size] == other[:size]).double().mean().item()


# 4,000 independent signs agree in half of the elements, with a standard deviation of 0.0079: here 5 of them.
INDEPENDENT = pytest.approx(0.5, abs=0.04)


def drawn(step: int, tensor_id: int, size: int = SIZE) -> Tensor:
    return philox_normal(SEED, step, tensor_id, size).sign().float()


@contextmanager
def silence() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# What a group says.


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("ids", [[4, 5, 6], [9, 2, 2**32 - 1]])
def test_a_group_s_own_numbers(kind: str, ids: list[int]) -> None:
    params = parameters(SIZE, SIZE, SIZE)
    before = [p.detach().clone() for p in params]
    consecutive = ids == list(range(ids[0], ids[0] + 3))
    optimizer = MAKERS[kind]([{"params": params, "tensor_id": ids[0] if consecutive else ids}])
    give_gradients(params)
    optimizer.step()
    for moved, tensor_id in zip(signs(params, before), ids, strict=True):
        assert agreement(moved, drawn(1, tensor_id)) > 0.99  # all but those whose z rounds to nothing


@pytest.mark.parametrize("kind", MAKERS)
def test_groups_without_numbers_go_by_position(kind: str) -> None:
    params = parameters(SIZE, SIZE, SIZE)
    before = [p.detach().clone() for p in params]
    groups = [{"params": params[:1]}, {"params": params[1:2], "tensor_id": 70}, {"params": params[2:]}]
    optimizer = MAKERS[kind](groups)
    give_gradients(params)
    optimizer.step()
    for moved, tensor_id in zip(signs(params, before), [0, 70, 2], strict=True):
        assert agreement(moved, drawn(1, tensor_id)) > 0.99


@pytest.mark.parametrize("kind", MAKERS)
def test_an_optimizer_a_parameter_with_numbers_is_one_optimizer(kind: str) -> None:
    """To the bit and without a warning, whether the optimizers step in a loop or in backward."""
    for in_backward in (False, True):
        params, plain = parameters(30, 1, 500), parameters(30, 1, 500)
        together = MAKERS[kind](plain)
        with silence():
            each = [MAKERS[kind]([{"params": [p], "tensor_id": i}]) for i, p in enumerate(params)]
            for number in (1, 2, 3):
                step_each(params, each, number, in_backward)
        del each
        for number in (1, 2, 3):
            give_gradients(plain, number)
            together.step()
        assert all(map(torch.equal, params, plain))


def step_each(params: list[nn.Parameter], optimizers: list[Any], number: int, in_backward: bool) -> None:
    """A step with one optimizer per parameter, as soon as its gradient exists or after all of them do."""

    def step(param: Tensor, optimizer: Any) -> None:
        optimizer.step()
        optimizer.zero_grad()

    wanted = [torch.empty_like(p) for p in params]
    random = torch.Generator().manual_seed(number)
    for grad in wanted:
        grad.copy_(torch.randn(grad.shape, generator=random))
    hooks = []
    if in_backward:
        hooks = [
            p.register_post_accumulate_grad_hook(lambda param, o=o: step(param, o))
            for p, o in zip(params, optimizers, strict=True)
        ]
    sum((p * g).sum() for p, g in zip(params, wanted, strict=True)).backward()  # type: ignore[union-attr]
    for hook in hooks:
        hook.remove()
    if not in_backward:
        for param, optimizer in zip(params, optimizers, strict=True):
            step(param, optimizer)


@pytest.mark.parametrize("wrong", [-1, 2**32, 1.5, "a", [1], [1, 2, 3], [0, -1], [0, 2**32], 2**32 - 1])
@pytest.mark.parametrize("kind", MAKERS)
def test_invalid_numbers(kind: str, wrong: Any) -> None:
    params = parameters(5, 5)
    optimizer = MAKERS[kind]([{"params": params, "tensor_id": wrong}])
    give_gradients(params)
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=r"Invalid tensor_id: "):
        optimizer.step()
    assert all(map(torch.equal, params, before))


@pytest.mark.parametrize("kind", MAKERS)
def test_numbers_that_two_tensors_have(kind: str) -> None:
    params = parameters(5, 5, 5)
    groups: list[dict[str, Any]] = [{"params": params[:2]}, {"params": params[2:], "tensor_id": 1}]
    optimizer = MAKERS[kind](groups)
    give_gradients(params)
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=r"param_groups\[1\]\['params'\]\[0\] has 1, as another parameter"):
        optimizer.step()
    assert all(map(torch.equal, params, before))
    optimizer.param_groups[1]["seed"] = SEED + 1  # then it is other noise
    optimizer.step()


# Optimizers whose numbers start from 0 again.


@pytest.mark.parametrize("kind", MAKERS)
def test_an_optimizer_a_parameter_in_backward(kind: str) -> None:
    """The recipe without numbers: different noise for each parameter, one warning, the same in another
    run."""

    def run() -> tuple[list[nn.Parameter], list[Any], list[str]]:
        params = parameters(SIZE, SIZE, SIZE, SIZE)
        optimizers = [MAKERS[kind]([p]) for p in params]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for number in (1, 2):
                step_each(params, optimizers, number, in_backward=True)
        return params, optimizers, [str(w.message) for w in caught]

    params, optimizers, messages = run()
    assert len(messages) == 1
    assert "steps within a backward pass" in messages[0]
    before = [p.detach().clone() for p in params]
    step_each(params, optimizers, 3, in_backward=True)
    moved = signs(params, before)
    for i in range(4):
        for j in range(i):
            assert agreement(moved[i], moved[j]) == INDEPENDENT
    del optimizers
    again, others, _ = run()
    step_each(again, others, 3, in_backward=True)
    assert all(map(torch.equal, params, again))


@pytest.mark.parametrize("kind", MAKERS)
def test_two_live_optimizers_with_one_seed(kind: str) -> None:
    params = parameters(SIZE, 30, 20)
    one, two = MAKERS[kind](params[:1]), MAKERS[kind](params[1:])
    give_gradients(params)
    with silence():
        one.step()
    with pytest.warns(UserWarning, match="another optimizer draws its noise with seed") as caught:
        two.step()
    assert len(caught) == 1
    with silence():  # once
        for number in (2, 3):
            give_gradients(params, number)
            one.step()
            two.step()
    third = MAKERS[kind](parameters(7))
    give_gradients(third.param_groups[0]["params"])
    with silence():  # they share what has been said
        third.step()


@pytest.mark.parametrize("kind", MAKERS)
def test_optimizers_that_share_nothing(kind: str) -> None:
    """With another seed, other numbers, or after the first is gone, without waiting for the garbage
    collector."""
    params = parameters(10, 10, 10, 10, 10)
    own = {"seed": SEED + 10 + list(MAKERS).index(kind)}  # no other test's, whose optimizers may be alive
    groups: list[dict[str, Any]] = [own, {"seed": SEED + 20}, own | {"tensor_id": 8}]
    give_gradients(params)
    with silence():
        held = [MAKERS[kind]([{"params": [p], **group}]) for p, group in zip(params, groups, strict=False)]
        assert [optimizer.step() for optimizer in held] == [None] * 3
        held.clear()
        for param in params[3:]:
            MAKERS[kind]([{"params": [param], **own}]).step()


@pytest.mark.parametrize("kind", MAKERS)
def test_a_new_optimizer_at_each_stage(kind: str) -> None:
    """It would draw the noise of the stage before. With its own seed, or a loaded state, it does not."""
    params = parameters(50)
    first = MAKERS[kind](params)
    give_gradients(params)
    first.step()
    saved = copy.deepcopy(first.state_dict())
    del first
    with pytest.warns(UserWarning, match="Give each stage of training its own seed") as caught:
        MAKERS[kind](params).step()
    assert len(caught) == 1
    with silence():
        MAKERS[kind]([{"params": params, "seed": SEED + 1}]).step()
        resumed = MAKERS[kind](params)
        resumed.load_state_dict(saved)
        resumed.step()


# An optimizer that gets a few of its tensors at a time, as in DeepSpeed's ZeRO.


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("emptied", [False, True])
def test_tensors_that_take_turns(kind: str, emptied: bool) -> None:
    """ZeRO stages 1 and 2 show one group at a time, stage 3 empties the others. Each tensor has its own
    noise."""

    def run(resume: Any = None) -> tuple[list[nn.Parameter], Any, list[Tensor]]:
        params = parameters(SIZE, SIZE, SIZE)
        optimizer = MAKERS[kind]([{"params": [p]} for p in params])
        start, numbers = (params, (1, 2, 3)) if resume is None else (resume[0], (3,))
        with torch.no_grad():
            for param, weights in zip(params, start, strict=True):
                param.copy_(weights)
        if resume is not None:
            optimizer.load_state_dict(resume[1])
        moved: list[Tensor] = []
        for number in numbers:
            give_gradients(params, number)
            moved = []
            for i, param in enumerate(params):
                before = param.detach().clone()
                turn(optimizer, i, emptied)
                moved.append((param.detach() - before).sign())
            if number == 2:
                saved.append(([p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict())))
        return params, optimizer, moved

    saved: list[Any] = []
    with pytest.warns(UserWarning, match="given a few of its tensors at a time") as caught:
        params, optimizer, moved = run()
    assert len([w for w in caught if "at a time" in str(w.message)]) == 1
    for i in range(3):
        for j in range(i):
            assert agreement(moved[i], moved[j]) == INDEPENDENT
    del optimizer
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resumed, _, _ = run(saved[0])
    assert all(map(torch.equal, params, resumed))


def turn(optimizer: Any, i: int, emptied: bool) -> None:
    groups = optimizer.param_groups
    if emptied:
        held = [group["params"] for group in groups]
        for j, group in enumerate(groups):
            group["params"] = held[j] if j == i else []
        optimizer.step()
        for group, params in zip(groups, held, strict=True):
            group["params"] = params
    else:
        optimizer.param_groups = [groups[i]]
        optimizer.step()
        optimizer.param_groups = groups


def test_replaced_parameters_keep_the_number_of_their_place() -> None:
    """Model surgery while the old tensor still exists: these are not tensors that take turns."""
    params = parameters(SIZE)
    optimizer = SGD(params, lr=0.0)
    PATS(optimizer, **SETTINGS)
    with silence():
        for step in (1, 2):
            give_gradients(params, step)
            optimizer.step()
        (new,) = parameters(SIZE, seed=1)
        optimizer.param_groups[0]["params"][0] = new
        give_gradients([new])
        before = [new.detach().clone()]
        optimizer.step()
    assert agreement(signs([new], before)[0], drawn(1, 0)) > 0.99


@pytest.mark.parametrize("added", ["group", "parameter"])
@pytest.mark.parametrize("kind", MAKERS)
def test_a_new_tensor_whose_state_is_loaded(kind: str, added: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is compared with the tensors of other processes too, although its t is not 1."""
    monkeypatch.setattr(parts, "streams", lambda params: ([1] * len(params), False))  # only rank 1 has them
    number = 1 ^ 2 ** (BITS - 1)  # position 1, of a part that rank 1 holds
    trained, params = parameters(SIZE, SIZE, seed=2), parameters(SIZE, SIZE, seed=2)
    optimizers = [MAKERS[kind]([{"params": each[:1]}]) for each in (trained, params)]

    def add(optimizer: torch.optim.Optimizer, param: Tensor) -> None:
        if added == "group":
            optimizer.add_param_group({"params": [param]})
        else:
            optimizer.param_groups[0]["params"].append(param)

    add(optimizers[0], trained[1])
    for optimizer, each in zip(optimizers, (trained, params), strict=True):
        give_gradients(each)
        optimizer.step()
    add(optimizers[1], params[1])
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    before = [p.detach().clone() for p in params]
    optimizers[1].step()
    assert agreement(signs(params, before)[1], drawn(2, number)) > 0.99


@pytest.mark.parametrize("kind", MAKERS)
def test_a_tensor_that_takes_the_place_and_the_state_of_another(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "streams", lambda params: ([1] * len(params), False))
    params = parameters(SIZE, SIZE, seed=2)
    optimizer = MAKERS[kind](params)
    give_gradients(params)
    optimizer.step()
    new = nn.Parameter(params[1].detach().clone())
    pats = pats_of(optimizer)
    assert pats is not None
    for states in (optimizer.state, pats.state):
        if params[1] in states:
            states[new] = states.pop(params[1])
    optimizer.param_groups[0]["params"][1] = new
    give_gradients([params[0], new])
    before = [new.detach().clone()]
    optimizer.step()
    assert agreement(signs([new], before)[0], drawn(2, 1 ^ 2 ** (BITS - 1))) > 0.99
