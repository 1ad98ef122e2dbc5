"""PATSAdamW as an optimizer: groups, schedules, state dictionaries, scalers, copies, errors."""

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from bad_input import BAD_ADAMW_HYPERPARAMETERS, BAD_HYPERPARAMETERS, assert_names
from harness import assert_same_bits, same_bits
from test_optim import give_gradients, parameters, saved
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.testing._internal.two_tensor import TwoTensor

from pats_kernels import PATSAdamW

OPTIONS: dict[str, Any] = {"lr": 1e-2, "noise_scale": 1e-2, "seed": 3}


def optimizer_of(params: Any, **changes: Any) -> PATSAdamW:
    return PATSAdamW(params, **(OPTIONS | changes))


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


Opt = TypeVar("Opt", bound=torch.optim.Optimizer)


def steps(optimizer: Opt, *numbers: int) -> Opt:
    for number in numbers:
        give_gradients(params_of(optimizer), number)
        optimizer.step()
    return optimizer


def snapshot(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Copies of everything that a step may write."""
    states = [optimizer.state.get(param, {}) for param in params_of(optimizer)]
    written = [state[key] for state in states for key in sorted(state)]
    return [t.detach().clone() for t in params_of(optimizer) + written]


def by_name(params: list[nn.Parameter]) -> list[tuple[str, nn.Parameter]]:
    return list(zip("abcde", params, strict=True))


# Groups and schedules.


def two_groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:2], "weight_decay": 0.1}, {"params": params[2:], "weight_decay": 0.0}]


def test_groups_are_tensors_of_one_optimizer(backend: str) -> None:
    """Split into decay and no decay, as Hugging Face does: a tensor's noise follows its position."""
    one, two = parameters(), parameters()
    steps(optimizer_of(one, weight_decay=0.0, backend=backend), 1, 2, 3)
    split = optimizer_of([{"params": two[:2]}, {"params": two[2:]}], weight_decay=0.0, backend=backend)
    steps(split, 1, 2, 3)
    assert_same_bits([p.data for p in one], [p.data for p in two])


def test_schedules(backend: str) -> None:
    """lr from a scheduler, noise_scale and gamma set by hand: the same as a new optimizer at every step."""
    scheduled = optimizer_of(parameters(), backend=backend)
    scheduler = LambdaLR(scheduled, lambda epoch: 1 / (1 + epoch))
    renewed = optimizer_of(parameters(), backend=backend)
    for number in range(1, 5):
        scheduled.param_groups[0].update(noise_scale=0.1 / number, gamma=0.5 * number)
        steps(scheduled, number)
        scheduler.step()
        values = {"lr": 1e-2 / number, "noise_scale": 0.1 / number, "gamma": 0.5 * number}
        fresh = optimizer_of(params_of(renewed), **values, backend=backend)
        fresh.state.update(renewed.state)
        renewed = fresh
        steps(renewed, number)
    assert_same_bits(snapshot(scheduled), snapshot(renewed))


def test_a_tensor_lr_may_be_filled(backend: str) -> None:
    """In place, as torch's schedulers do."""
    lr = torch.tensor(1e-2)
    optimizer, plain = (
        optimizer_of(parameters(), lr=lr, backend=backend),
        optimizer_of(parameters(), backend=backend),
    )
    scheduler = LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    for number in (1, 2, 3):
        plain.param_groups[0]["lr"] = float(torch.tensor(1e-2) * 0.5 ** (number - 1))
        steps(plain, number)
        steps(optimizer, number)
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] is lr
    assert_same_bits(snapshot(optimizer), snapshot(plain))


@pytest.mark.parametrize("name", ["betas", "sens_betas"])
def test_tensor_betas_may_be_filled(backend: str, name: str) -> None:
    """A schedule that writes into the tensors works like one that replaces numbers."""
    tensors = (torch.tensor(0.5), torch.tensor(0.75))
    optimizer = optimizer_of(parameters(), **{name: tensors}, backend=backend)
    plain = optimizer_of(parameters(), **{name: (0.5, 0.75)}, backend=backend)
    for number in (1, 2, 3):
        steps(optimizer, number)
        steps(plain, number)
        assert_same_bits(snapshot(optimizer), snapshot(plain))
        tensors[0].add_(0.125)
        plain.param_groups[0][name] = (0.5 + 0.125 * number, 0.75)


def test_numbers_of_every_kind(backend: str) -> None:
    """NumPy's numbers, and sequences that are not tuples, give the bits of Python's own float64 numbers."""
    values = {"lr": 1e-2, "weight_decay": 0.3, "betas": (0.8, 0.9), "seed": 3, "gamma": 0.7}
    single = {name: np.float32(value) for name, value in values.items() if isinstance(value, float)}
    single |= {"betas": np.array(values["betas"], np.float32), "seed": np.int64(3)}
    exact = {name: value.tolist() for name, value in single.items()}
    one, two = (optimizer_of(parameters(), **kind, backend=backend) for kind in (single, exact))
    assert_same_bits(snapshot(steps(one, 1, 2, 3)), snapshot(steps(two, 1, 2, 3)))


def test_noise_may_begin_and_end(backend: str) -> None:
    """Without noise there are no sensitivities. They are allocated when noise begins, and kept when it
    ends."""
    optimizer, plain = (
        optimizer_of(parameters(), noise_scale=0.0, backend=backend),
        AdamW(parameters(), lr=1e-2),
    )
    steps(optimizer, 1, 2)
    steps(plain, 1, 2)
    for param, other in zip(params_of(optimizer), params_of(plain), strict=True):
        torch.testing.assert_close(param, other, rtol=1e-6, atol=1e-7)
        assert set(optimizer.state[param]) == {"step", "exp_avg", "exp_avg_sq"}
    optimizer.param_groups[0]["noise_scale"] = 1e-2
    steps(optimizer, 3, 4)
    kept = [optimizer.state[p]["exp_avg_sens"].clone() for p in params_of(optimizer)]
    assert all(S.gt(0).all() for S in kept)
    optimizer.param_groups[0]["noise_scale"] = 0.0
    steps(optimizer, 5)
    assert_same_bits([optimizer.state[p]["exp_avg_sens"] for p in params_of(optimizer)], kept)
    assert {float(state["step"]) for state in optimizer.state.values()} == {5.0}


def test_added_group(backend: str) -> None:
    params = parameters()
    optimizer = steps(optimizer_of(params[:3], backend=backend), 1)
    optimizer.add_param_group({"params": params[3:], "lr": 0.0, "weight_decay": 0.0, "noise_scale": 0.0})
    before = [p.detach().clone() for p in params]
    steps(optimizer, 2)
    assert_same_bits([p.data for p in params[3:]], before[3:])
    assert not any(same_bits(p.data, old) for p, old in zip(params[:3], before[:3], strict=True))


@pytest.mark.parametrize(
    "bad", [{"gamma": -1.0}, {"lr": -1.0}, {"betas": (0.9, 1.0)}, {"amsgrad": True}], ids=str
)
def test_a_bad_group_is_not_added(bad: dict[str, Any]) -> None:
    params = parameters()
    optimizer = optimizer_of(params[:3])
    with pytest.raises(ValueError, match=f"Invalid {next(iter(bad))}"):
        optimizer.add_param_group({"params": params[3:], **bad})
    assert len(optimizer.param_groups) == 1
    steps(optimizer, 1)


def test_frozen_and_unfrozen(backend: str) -> None:
    """A parameter without a gradient is not changed, and keeps its own step count."""
    params = parameters()
    optimizer = steps(optimizer_of(params, backend=backend), 1)
    give_gradients(params, 2)
    params[1].grad = None
    before = params[1].detach().clone()
    optimizer.step()
    assert_same_bits([params[1].data], [before])
    assert [float(optimizer.state[p]["step"]) for p in params] == [2, 1, 2, 2, 2]


def test_closure(backend: str) -> None:
    params = parameters()
    optimizer = optimizer_of(params, backend=backend)

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = torch.stack([p.square().sum() for p in params]).sum()
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(5)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] == pytest.approx(sum(float(p.detach().square().sum()) for p in parameters()))


def test_hooks(backend: str) -> None:
    params = parameters()
    optimizer = optimizer_of(params, backend=backend)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    steps(optimizer, 1)
    assert seen == ["before", "after"]


def test_a_model_s_training_goes_through_autograd(backend: str) -> None:
    """A weight that backward still needs must not change unnoticed: torch must see the new version."""
    layer = nn.Linear(4, 4)
    optimizer = optimizer_of(layer.parameters(), backend=backend)
    x = torch.ones(1, 4, requires_grad=True)
    layer(x).sum().backward()
    loss = layer(x).square().sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_repr() -> None:
    text = repr(optimizer_of(parameters()))
    assert text.startswith("PATSAdamW (")
    assert "noise_scale: 0.01" in text
    assert "lr: 0.01" in text


# State dictionaries.

RUNS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "moments": (torch.float32, {"sensitivity": "moments"}),
    "exact, none": (torch.float32, {"uncertainty": "none", "normalization": "exact"}),
    "bfloat16": (torch.bfloat16, {}),
    "float32 state": (torch.bfloat16, {"state_dtype": torch.float32}),
    "bfloat16 state": (torch.float32, {"state_dtype": torch.bfloat16}),
    "float16": (torch.float16, {}),
    "float64": (torch.float64, {}),
    "tensor lr": (torch.float32, {"lr": torch.tensor(1e-2)}),
    "no noise": (torch.float32, {"noise_scale": 0.0}),
}
LOADS: dict[str, Callable[[Any], Any]] = {"saved": saved, "copied": copy.deepcopy}


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_continues_bit_for_bit(name: str, load: str) -> None:
    """Each state keeps its own dtype, where Optimizer.load_state_dict would cast it to the parameter's."""
    dtype, changes = RUNS[name]
    optimizer = steps(optimizer_of(two_groups(parameters(dtype)), **changes), 1, 2, 3)
    params = parameters(dtype)
    other = PATSAdamW(two_groups(params), lr=0.5, noise_scale=0.7, seed=99)
    with torch.no_grad():
        for param, source in zip(params, params_of(optimizer), strict=True):
            param.copy_(source)
    other.load_state_dict(LOADS[load](optimizer.state_dict()))
    assert_same_bits(snapshot(other), snapshot(optimizer))
    steps(optimizer, 4, 5)
    steps(other, 4, 5)
    assert_same_bits(snapshot(other), snapshot(optimizer))


def test_a_resumed_run_continues_on_each_backend(backend: str) -> None:
    optimizer = steps(optimizer_of(parameters(), backend=backend), 1, 2)
    other = optimizer_of([nn.Parameter(p.detach().clone()) for p in params_of(optimizer)], backend=backend)
    other.load_state_dict(saved(optimizer.state_dict()))
    assert_same_bits(snapshot(steps(other, 3)), snapshot(steps(optimizer, 3)))


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),  # no kernel supports this pair
        (torch.float64, torch.float64),
    ],
)
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_a_dictionary_of_adamw_loads(dtype: torch.dtype, kept: torch.dtype, options: dict[str, Any]) -> None:
    """Moments and counts continue, the sensitivities start empty, and PATS's hyperparameters stay."""
    adamw = steps(AdamW(two_groups(parameters(dtype)), lr=3e-3, betas=(0.8, 0.9), **options), 1, 2)
    params = [nn.Parameter(p.detach().clone()) for p in params_of(adamw)]
    optimizer = optimizer_of(two_groups(params), gamma=0.25)
    optimizer.load_state_dict(saved(adamw.state_dict()))
    for param, source in zip(params, params_of(adamw), strict=True):
        state, expected = optimizer.state[param], adamw.state[source]
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == kept
        assert_same_bits([state["exp_avg"]], [expected["exp_avg"].to(kept)])
        assert_same_bits([state["step"]], [expected["step"]])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert {(g["lr"], g["betas"], g["gamma"], g["noise_scale"]) for g in optimizer.param_groups} == {
        (3e-3, (0.8, 0.9), 0.25, 1e-2)
    }
    steps(optimizer, 3)
    state = optimizer.state[params[0]]
    assert float(state["step"]) == 3
    assert state["exp_avg_sens"].dtype == kept
    assert state["exp_avg_sens"].gt(0).any()


def test_without_noise_a_run_of_adamw_goes_on_as_it_was() -> None:
    adamw = steps(AdamW(parameters(), lr=1e-2), 1, 2)
    optimizer = optimizer_of([nn.Parameter(p.detach().clone()) for p in params_of(adamw)], noise_scale=0.0)
    optimizer.load_state_dict(adamw.state_dict())
    steps(adamw, 3, 4)
    steps(optimizer, 3, 4)
    for param, other in zip(params_of(optimizer), params_of(adamw), strict=True):
        torch.testing.assert_close(param, other, rtol=1e-6, atol=1e-7)


def test_loading_copies() -> None:
    optimizer = steps(optimizer_of(parameters()), 1)
    state_dict = optimizer.state_dict()
    other = optimizer_of(parameters())
    other.load_state_dict(state_dict)
    before = [t.clone() for state in state_dict["state"].values() for t in state.values()]
    steps(other, 2)
    assert_same_bits([t for state in state_dict["state"].values() for t in state.values()], before)


def test_state_that_is_no_parameter_s() -> None:
    """It is copied as it is, as in torch."""
    optimizer = steps(optimizer_of(parameters()), 1)
    optimizer.state["global_step"] = 7  # type: ignore[index]
    other = optimizer_of(parameters())
    other.load_state_dict(saved(optimizer.state_dict()))
    assert other.state["global_step"] == 7  # type: ignore[index]
    assert len(other.state) == 6


@pytest.mark.parametrize("value", [None, [], 3])
def test_what_is_no_state_dict(value: Any) -> None:
    with pytest.raises(ValueError, match="state_dict"):
        optimizer_of(parameters()).load_state_dict(value)


def test_a_step_count_as_torch_once_had_it() -> None:
    """A Python int: the noise and the bias corrections continue from it."""
    optimizer, other = (steps(optimizer_of(parameters()), 1, 2) for _ in range(2))
    state_dict = saved(optimizer.state_dict())
    for entry in state_dict["state"].values():
        entry["step"] = int(entry["step"])
    other.load_state_dict(state_dict)
    assert_same_bits(snapshot(steps(other, 3, 4)), snapshot(steps(optimizer, 3, 4)))


def test_hooks_of_loading() -> None:
    """A hook of the user's may replace the dictionary, and a hook after loading sees the loaded state."""
    source, optimizer = steps(optimizer_of(parameters()), 1, 2), optimizer_of(parameters())
    seen: list[float] = []
    optimizer.register_load_state_dict_pre_hook(lambda _, state_dict: source.state_dict())
    optimizer.register_load_state_dict_post_hook(
        lambda loaded: seen.append(float(loaded.state[params_of(loaded)[0]]["step"]))
    )
    optimizer.load_state_dict(optimizer_of(parameters()).state_dict())
    assert seen == [2.0]


Edit = Callable[[dict[str, Any]], Any]


def edited(key: int, name: str, value: Any) -> Edit:
    return lambda sd: sd["state"][key].__setitem__(name, value)


def in_group(**values: Any) -> Edit:
    return lambda sd: sd["param_groups"][0].update(values)


BAD_STATE_DICTS: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "m of another shape": (edited(1, "exp_avg", torch.zeros(9)), ("b:", "exp_avg", "(9,)", "(8,)")),
    "v of another shape": (edited(0, "exp_avg_sq", torch.zeros(40)), ("a:", "exp_avg_sq", "(40,)", "(5, 8)")),
    "S of another shape": (edited(2, "exp_avg_sens", torch.zeros(3)), ("c:", "exp_avg_sens", "(3,)")),
    "means of another shape": (edited(2, "sens_stats", torch.zeros(3)), ("c:", "sens_stats", "(3,)")),
    "a step of another shape": (edited(3, "step", torch.zeros(2)), ("d:", "step", "(2,)")),
    "an integer moment": (edited(0, "exp_avg", torch.zeros(5, 8, dtype=torch.int8)), ("a:", "int8")),
    "mixed dtypes": (
        edited(1, "exp_avg_sq", torch.zeros(8).bfloat16()),
        ("b:", "exp_avg_sq", "bfloat16", "float32"),
    ),
    "sparse m": (edited(1, "exp_avg", torch.zeros(8).to_sparse()), ("b:", "exp_avg", "sparse")),
    "negative v": (edited(1, "exp_avg_sq", -torch.eye(8)[2]), ("b:", "exp_avg_sq", "-1.0", ">= 0")),
    "negative S": (edited(1, "exp_avg_sens", -torch.eye(8)[2]), ("b:", "exp_avg_sens", "-1.0", ">= 0")),
    "U not a number": (edited(1, "exp_avg_unc", torch.eye(8)[0].log().log()), ("b:", "exp_avg_unc", "nan")),
    "a negative step": (edited(3, "step", -1), ("d:", "step", "-1")),
    "a broken step": (edited(3, "step", torch.tensor(1.5)), ("d:", "step", "1.5")),
    "a step not a number": (edited(3, "step", torch.tensor(torch.nan)), ("d:", "step", "nan")),
    "no entry": (lambda sd: sd["state"].update({2: None}), ("c:", "None")),
    "another position": (edited(2, "tensor_id", 1), ("c:", "another order", "1")),
    "a position that is none": (edited(2, "tensor_id", "first"), ("c:", "tensor_id")),
    "no groups": (lambda sd: sd.update(param_groups=None), ("param_groups", "None")),
    "a group that is none": (lambda sd: sd["param_groups"].append(None), ("param_groups[1]", "None")),
    "no parameters": (in_group(params=None), ("param_groups[0]", "params")),
    "a parameter twice": (in_group(params=[0, 1, 1, 3, 4]), ("parameter 1 twice",)),
    "no state": (lambda sd: sd.update(state=None), ("state", "None")),
    "names": (in_group(param_names=["a"]), ("param_groups[0]", "param_names")),
    "tensor_id": (in_group(tensor_id=[0, 1, 2, 3, 3]), ("tensor_id", "[4]", "3")),
    "lr on another device": (in_group(lr=torch.zeros((), device="meta")), ("lr", "meta", "cpu")),
    "capturable": (in_group(capturable="no"), ("capturable", "'no'")),
    "amsgrad of many": (in_group(amsgrad=torch.ones(2)), ("amsgrad",)),
    "no v": (lambda sd: sd["state"][4].pop("exp_avg_sq"), ("e:", "exp_avg_sq")),
    "no step": (lambda sd: sd["state"][0].pop("step"), ("a:", "step")),
    "another parameter": (lambda sd: sd["state"].update({7: sd["state"][0]}), ("7",)),
    "fewer parameters": (lambda sd: sd["param_groups"][0]["params"].pop(), ("[4]", "[5]")),
    "more groups": (
        lambda sd: sd["param_groups"].append(dict(sd["param_groups"][0], params=[])),
        ("[5, 0]",),
    ),
    "amsgrad": (in_group(amsgrad=True), ("amsgrad", "True")),
    "a bad lr": (in_group(lr=-1.0), ("lr", "-1.0")),
    "a bad gamma": (in_group(gamma=float("nan")), ("gamma", "nan")),
}


@pytest.mark.parametrize("name", BAD_STATE_DICTS)
def test_bad_state_dicts(name: str) -> None:
    """They are refused by name, and nothing changes: the run continues as if nothing had been loaded."""
    edit, parts = BAD_STATE_DICTS[name]
    optimizer, untouched = (steps(optimizer_of(by_name(parameters())), 1, 2) for _ in range(2))
    state_dict = saved(optimizer.state_dict())
    edit(state_dict)
    groups = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
    with pytest.raises(ValueError, match=re.escape(parts[0])) as error:
        optimizer.load_state_dict(state_dict)
    assert_names(error, *parts)
    assert groups == [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    assert_same_bits(snapshot(optimizer), snapshot(untouched))
    assert_same_bits(snapshot(steps(optimizer, 3)), snapshot(steps(untouched, 3)))


def test_moments_that_are_not_finite_go_on() -> None:
    """A gradient that is not finite leaves such moments, as in torch's AdamW. They can be saved and
    loaded."""
    optimizer = optimizer_of(by_name(parameters()))
    for number in (1, 2):
        give_gradients(params_of(optimizer), number)
        grad = params_of(optimizer)[1].grad
        assert grad is not None
        grad[:2] = torch.tensor([torch.nan, -torch.inf])
        optimizer.step()
    other = optimizer_of(by_name([nn.Parameter(p.detach().clone()) for p in params_of(optimizer)]))
    other.load_state_dict(saved(optimizer.state_dict()))
    assert_same_bits(snapshot(steps(other, 3)), snapshot(steps(optimizer, 3)))


@pytest.mark.parametrize("name", RUNS)
def test_copies_and_pickles(name: str) -> None:
    """A copy with its parameters continues with the same bits, and the original does not change."""
    dtype, changes = RUNS[name]
    optimizer = steps(optimizer_of(by_name(parameters(dtype)), **changes, backend="eager"), 1, 2)
    expected = [t.clone() for t in snapshot(optimizer)]
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert_same_bits(snapshot(copied), expected)
        assert copied.backend == "eager"
        assert repr(copied) == repr(optimizer)
        steps(copied, 3)
        assert_same_bits(snapshot(optimizer), expected)
    assert_same_bits(snapshot(steps(optimizer, 3)), snapshot(copied))


# GradScaler.


def scaled_run(backend: str, scale: float | None, unscale: bool, inf_at: int | None = None) -> PATSAdamW:
    """A run with gradients times the scale; in one step one of them is infinite."""
    optimizer = optimizer_of(parameters(), backend=backend)
    scaler = torch.amp.GradScaler(
        "cpu", init_scale=scale or 1.0, enabled=scale is not None, growth_interval=99
    )
    for number in range(1, 5):
        give_gradients(params_of(optimizer), number)
        for param in params_of(optimizer):
            param.grad *= scaler.get_scale()
        if number == inf_at:
            params_of(optimizer)[4].grad[3] = torch.inf
        scaler.scale(torch.ones(()))  # like a loss; initializes the scaler
        before = snapshot(optimizer)
        if unscale and scale is not None:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if number == inf_at and optimizer.state and number > 1:
            assert_same_bits(snapshot(optimizer), before)
            assert optimizer.nonfinite_counts() == {}
    return optimizer


@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(backend: str, unscale: bool) -> None:
    """A scale that is a power of two, unscaled once, gives the bits of the run without a scaler."""
    plain, scaled = scaled_run(backend, None, unscale), scaled_run(backend, 2.0**10, unscale)
    assert_same_bits(snapshot(scaled), snapshot(plain))


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("inf_at", [1, 3])
def test_grad_scaler_skips_a_step(backend: str, unscale: bool, inf_at: int) -> None:
    """With an infinity nothing changes, not even the count. The next steps continue from there."""
    optimizer = scaled_run(backend, 2.0**10, unscale, inf_at)
    expected = optimizer_of(parameters(), backend=backend)
    steps(expected, *(number for number in range(1, 5) if number != inf_at))
    assert_same_bits(snapshot(optimizer), snapshot(expected))
    assert {float(state["step"]) for state in optimizer.state.values()} == {3.0}


# Bad input.


def assert_refused(optimizer: PATSAdamW, error: type[Exception], *parts: str) -> None:
    before = snapshot(optimizer)
    with pytest.raises(error) as raised:
        optimizer.step()
    assert_names(raised, *parts)
    after = snapshot(optimizer)
    assert_same_bits(after[: len(before)], before)


@pytest.mark.parametrize(("name", "value", "range_"), BAD_HYPERPARAMETERS + BAD_ADAMW_HYPERPARAMETERS)
@pytest.mark.parametrize("where", ["constructor", "group", "schedule"])
def test_bad_hyperparameters(where: str, name: str, value: Any, range_: str) -> None:
    params = parameters()
    shown = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if where == "schedule":
        optimizer = optimizer_of(params)
        steps(optimizer, 1)
        optimizer.param_groups[0][name] = value
        give_gradients(params, 2)
        assert_refused(optimizer, ValueError, name, str(shown), range_)
        return
    groups = params if where == "constructor" else [{"params": params, name: value}]
    changes = {name: value} if where == "constructor" else {}
    with pytest.raises(ValueError, match=f"Invalid {name}") as error:
        optimizer_of(groups, **changes)
    assert_names(error, shown, range_)


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="Invalid backend: 'cuda11'"):
        optimizer_of(parameters(), backend="cuda11")


def test_backend_that_cannot_run_here() -> None:
    with pytest.raises(RuntimeError, match=r"backend='cuda' cannot run on cpu.*these can.*'eager'"):
        optimizer_of(parameters(), backend="cuda")


def test_sparse_gradient(backend: str) -> None:
    params = parameters()
    optimizer = optimizer_of(by_name(params), backend=backend)
    give_gradients(params, 1)
    params[1].grad = torch.ones(8).to_sparse()
    assert_refused(optimizer, TypeError, "b", "sparse")


def test_complex_parameter(backend: str) -> None:
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.complex64))]
    optimizer = optimizer_of(list(zip("ab", params, strict=True)), backend=backend)
    for param in params:
        param.grad = torch.ones_like(param)
    assert_refused(optimizer, TypeError, "b", "complex64")


@pytest.mark.parametrize(
    ("key", "value", "parts"),
    [
        ("exp_avg", torch.zeros(9), ("shape", "(8,)", "(9,)")),
        ("exp_avg_sq", torch.zeros(8, dtype=torch.bfloat16), ("dtype", "bfloat16", "float32")),
        ("exp_avg_sens", torch.zeros(8, dtype=torch.float16), ("dtype", "float16")),
        ("sens_stats", torch.zeros(3), ("sens_stats", "(3,)")),
        ("exp_avg", torch.zeros(1).expand(8), ("overlapping",)),
        ("exp_avg", torch.zeros(8, device="meta"), ("device", "meta", "cpu")),
    ],
)
def test_bad_state(backend: str, key: str, value: Tensor, parts: tuple[str, ...]) -> None:
    params = parameters()
    optimizer = steps(optimizer_of(by_name(params), backend=backend), 1)
    optimizer.state[params[1]][key] = value
    before = [p.detach().clone() for p in params]
    give_gradients(params, 2)
    with pytest.raises(ValueError, match=r"^b: ") as error:
        optimizer.step()
    assert_names(error, key, *parts)
    assert_same_bits([p.data for p in params], before)


def test_shared_memory(backend: str) -> None:
    params = parameters()
    optimizer = steps(optimizer_of(by_name(params), backend=backend), 1)
    optimizer.state[params[1]]["exp_avg_sq"] = optimizer.state[params[1]]["exp_avg"]
    give_gradients(params, 2)
    assert_refused(optimizer, ValueError, "b:", "overlapping memory", "exp_avg", "exp_avg_sq")


def test_empty_frozen_and_foreign_parameters(backend: str) -> None:
    """They are skipped silently as long as they have no gradient."""
    params = [
        nn.Parameter(torch.ones(4)),
        nn.Parameter(torch.ones(0, 3)),
        nn.Parameter(torch.ones(3), requires_grad=False),
        nn.Parameter(torch.ones(3, dtype=torch.int32), requires_grad=False),
    ]
    optimizer = optimizer_of(params, backend=backend)
    optimizer.step()
    assert not optimizer.state
    params[0].grad, params[1].grad = torch.ones(4), torch.ones(0, 3)
    optimizer.step()
    assert float(optimizer.state[params[0]]["step"]) == 1
    assert not optimizer.state[params[1]]


def test_fused_false_leaves_unscaling_to_the_scaler() -> None:
    """As in torch's AdamW without fused=True: clients that clip look at this flag, and refuse if it is
    set."""
    param = nn.Parameter(torch.ones(4))
    assert PATSAdamW([param])._step_supports_amp_scaling
    assert PATSAdamW([param], fused=True)._step_supports_amp_scaling
    plain = PATSAdamW([param], lr=0.1, fused=False)
    for optimizer in (plain, copy.deepcopy(plain), pickle.loads(pickle.dumps(plain))):
        assert not optimizer._step_supports_amp_scaling

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale((param * torch.tensor([1.0, 2.0, torch.inf, 3.0])).sum()).backward()
    scaler.step(plain)  # skipped by the scaler, which has found the infinity itself
    assert not plain.state
    scaler.update()
    param.grad = None
    scaler.scale((param * torch.tensor([1.0, 2.0, 4.0, 3.0])).sum()).backward()
    scaler.step(plain)
    own = nn.Parameter(torch.ones(4))
    own.grad = torch.tensor([1.0, 2.0, 4.0, 3.0])
    PATSAdamW([own], lr=0.1).step()
    assert torch.equal(param, own)


def test_a_tensor_made_of_others_is_refused() -> None:
    """It has no memory of its own, so a kernel would write to address 0."""
    two = TwoTensor(torch.ones(3), torch.ones(3))
    param = nn.Parameter(two)
    param.grad = torch.ones(3)
    with pytest.raises(TypeError, match=r"named: the parameter, a \w+, has no memory of its own"):
        PATSAdamW([("named", param)]).step()
