"""PATS attached to torch's optimizers does what `pats_step_` by hand does, keeps its state, and no more."""

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from bad_input import assert_names
from conftest import INTERPRETED
from harness import assert_same_bits, same_bits
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import LambdaLR

from pats_kernels import PATS, pats_step_
from pats_kernels.optim import attached_to

Factory = Callable[[Any], Optimizer]

OPTIMIZERS: dict[str, Factory] = {
    "SGD": lambda params: SGD(params, lr=0.1, momentum=0.9),
    "Adam": lambda params: Adam(params, lr=1e-2, amsgrad=True),
    "AdamW": lambda params: AdamW(params, lr=1e-2),
    "AdamW, foreach": lambda params: AdamW(params, lr=1e-2, foreach=True),
    "AdamW, fused": lambda params: AdamW(params, lr=1e-2, fused=True),
    "RMSprop": lambda params: RMSprop(params, lr=1e-2, momentum=0.5),
    "Adagrad": lambda params: Adagrad(params, lr=1e-2),
}
SHAPES = [(5, 8), (8,), (3, 4, 2), (), (1100,)]


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    random = torch.Generator().manual_seed(11)
    return [nn.Parameter(torch.randn(shape, generator=random).to(dtype)) for shape in SHAPES]


def give_gradients(params: list[nn.Parameter], number: int, set_to_none: bool = True) -> None:
    """The gradients of step `number`, the same for every set of parameters of one dtype."""
    random = torch.Generator().manual_seed(number)
    for param in params:
        grad = torch.randn(param.shape, generator=random).to(param.dtype)
        if set_to_none or param.grad is None:
            param.grad = grad
        else:
            param.grad.copy_(grad)


@dataclass
class ByHand:
    """What PATS must do, in one call of `pats_step_` before each step of the optimizer."""

    backend: str
    defaults: dict[str, Any]
    state: dict[Tensor, dict[str, Any]] = field(default_factory=dict)

    def before_step(self, optimizer: Optimizer) -> None:
        columns: dict[str, list[Any]] = {name: [] for name in (*ARGUMENTS, "step", "tensor_ids", *PER_TENSOR)}
        tensor_id = -1
        for group in optimizer.param_groups:
            values = {name: group.get(name, self.defaults[name]) for name in PER_TENSOR}
            for param in group["params"]:
                tensor_id += 1
                if param.grad is None or values["noise_scale"] == 0:
                    continue
                state = self.state.setdefault(param, self.fresh(param, values["uncertainty"]))
                state["step"] += 1
                row = {"params": param, "grads": param.grad, "tensor_ids": tensor_id, **state, **values}
                for name, column in columns.items():
                    column.append(row[name])
        if not columns["params"]:
            return
        positional = [columns.pop(name) for name in ARGUMENTS]
        pats_step_(*positional, **columns, backend=self.backend)

    def fresh(self, param: Tensor, uncertainty: str) -> dict[str, Any]:
        default = torch.float32 if param.dtype == torch.float16 else param.dtype
        dtype = self.defaults.get("state_dtype") or default
        averages = [torch.zeros(param.shape, dtype=dtype) for _ in range(2)]
        unc = None if uncertainty == "none" else averages[1]
        return {"exp_avg_sens": averages[0], "exp_avg_unc": unc, "sens_stats": torch.zeros(2), "step": 0}

    def assert_same(self, params: list[nn.Parameter], pats: PATS, own: list[nn.Parameter]) -> None:
        """Compares parameters and state to the bit. `own` are the parameters stepped by hand, in the same
        order."""
        assert_same_bits([p.data for p in params], [p.data for p in own])
        assert len(pats.state) == len(self.state)
        for param, twin in zip(params, own, strict=True):
            if twin not in self.state:
                assert param not in pats.state
                continue
            state, expected = pats.state[param], self.state[twin]
            assert set(state) == {name for name, value in expected.items() if value is not None}
            for name in ("exp_avg_sens", "exp_avg_unc", "sens_stats"):
                assert expected[name] is None or same_bits(state[name], expected[name])
            assert float(state["step"]) == expected["step"]


ARGUMENTS = ("params", "grads", "exp_avg_sens", "exp_avg_unc", "sens_stats")
PER_TENSOR = (
    "noise_scale",
    "gamma",
    "sens_betas",
    "uncertainty",
    "normalization",
    "stochastic_rounding",
    "seed",
)
DEFAULTS: dict[str, Any] = {
    "noise_scale": 1e-2,
    "gamma": 1.0,
    "sens_betas": (0.85, 0.95),
    "uncertainty": "product",
    "normalization": "delayed",
    "stochastic_rounding": True,
    "seed": 3,
}


@dataclass
class Twins:
    """The same parameters twice: under PATS, and by hand under an optimizer without PATS."""

    backend: str
    factory: Factory = OPTIMIZERS["AdamW"]
    changes: dict[str, Any] = field(default_factory=dict)
    groups: Callable[[list[nn.Parameter]], Any] = list
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        self.params, self.own = parameters(self.dtype), parameters(self.dtype)
        self.optimizer, self.plain = (self.factory(self.groups(p)) for p in (self.params, self.own))
        self.pats = PATS(self.optimizer, **(DEFAULTS | self.changes), backend=self.backend)
        self.hand = ByHand(self.backend, DEFAULTS | self.changes)

    def step(self, number: int, without: tuple[int, ...] = ()) -> None:
        for params in (self.params, self.own):
            give_gradients(params, number)
            for i in without:
                params[i].grad = None
        before = [p.grad.clone() for p in self.params if p.grad is not None]
        self.optimizer.step()
        assert_same_bits([p.grad for p in self.params if p.grad is not None], before)
        self.hand.before_step(self.plain)
        self.plain.step()

    def steps(self, *numbers: int) -> "Twins":
        for number in numbers:
            self.step(number)
        return self

    def assert_same(self) -> None:
        self.hand.assert_same(self.params, self.pats, self.own)
        assert_same_states(self.optimizer, self.plain)


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for key in value for t in tensors_in(value[key])]
    return [t for v in value for t in tensors_in(v)] if isinstance(value, (list, tuple)) else []


def assert_same_states(one: Optimizer, other: Optimizer) -> None:
    """The optimizers' own state: the same keys, the same bits."""
    first, second = (list(o.state.values()) for o in (one, other))
    assert [list(entry) for entry in first] == [list(entry) for entry in second]
    assert_same_bits(tensors_in(first), tensors_in(second))


def snapshot(optimizer: Optimizer, pats: PATS) -> list[Tensor]:
    params = [p.data for group in optimizer.param_groups for p in group["params"]]
    states = [*optimizer.state.values(), *pats.state.values()]
    return [t.clone() for t in params + tensors_in(states)]


# PATS is pats_step_ before each step.


@pytest.mark.parametrize("name", ["SGD", "AdamW, fused"] if INTERPRETED else OPTIMIZERS)
def test_is_pats_step_by_hand(backend: str, name: str) -> None:
    twins = Twins(backend, OPTIMIZERS[name]).steps(1, 2, 3, 4)
    twins.assert_same()
    untouched = parameters()
    plain = OPTIMIZERS[name](untouched)
    for number in (1, 2, 3, 4):
        give_gradients(untouched, number)
        plain.step()
    assert not torch.equal(twins.params[0], untouched[0])  # there was noise to get right


VARIANTS: list[dict[str, Any]] = [
    {"normalization": "exact"},
    {"uncertainty": "ucb"},
    {"uncertainty": "none"},
    {"uncertainty": "none", "normalization": "exact"},
    {"gamma": 0.25, "sens_betas": (0.5, 0.75), "seed": 2**64 - 1},
    {"state_dtype": torch.bfloat16},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_variants(backend: str, changes: dict[str, Any]) -> None:
    Twins(backend, changes=changes).steps(1, 2, 3).assert_same()


@pytest.mark.parametrize(
    "changes", [{}, {"state_dtype": torch.float32}, {"stochastic_rounding": False}], ids=str
)
def test_bfloat16(backend: str, changes: dict[str, Any]) -> None:
    Twins(backend, changes=changes, dtype=torch.bfloat16).steps(1, 2, 3).assert_same()


STATE_DTYPES = [
    (torch.float32, None, torch.float32),
    (torch.bfloat16, None, torch.bfloat16),
    (torch.float16, None, torch.float32),
    (torch.float64, None, torch.float64),
    (torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.float16, torch.bfloat16, torch.bfloat16),
]


@pytest.mark.parametrize(("dtype", "chosen", "expected"), STATE_DTYPES)
def test_state_dtype(dtype: torch.dtype, chosen: torch.dtype | None, expected: torch.dtype) -> None:
    """By the parameter's dtype, or as chosen. The means and the count are always float32."""
    params = parameters(dtype)
    pats = PATS(SGD(params, lr=0.1), state_dtype=chosen)
    give_gradients(params, 1)
    pats.optimizer.step()
    for param in params:
        state = pats.state[param]
        assert set(state) == {"exp_avg_sens", "exp_avg_unc", "sens_stats", "step"}
        assert state["exp_avg_sens"].dtype == state["exp_avg_unc"].dtype == expected
        assert state["exp_avg_sens"].shape == param.shape
        assert (state["sens_stats"].dtype, state["sens_stats"].shape) == (torch.float32, (2,))
        assert float(state["step"]) == 1.0


def two_groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    """The usual split: biases and norms without weight decay; here also with different hyperparameters."""
    decay = [p for p in params if p.ndim >= 2]
    rest = [p for p in params if p.ndim < 2]
    own = {"noise_scale": 1e-1, "gamma": 0.5, "sens_betas": (0.5, 0.9), "uncertainty": "ucb", "seed": 12}
    return [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0, **own}]


def test_groups_with_their_own_hyperparameters(backend: str) -> None:
    twins = Twins(backend, groups=two_groups).steps(1, 2, 3)
    twins.assert_same()
    alike = Twins(backend, groups=lambda p: [{"params": g["params"]} for g in two_groups(p)]).steps(1, 2, 3)
    assert not torch.equal(twins.params[1], alike.params[1])


def test_a_schedule_changes_hyperparameters(backend: str) -> None:
    """They are read at every step, in one group and not in the other, also down to 0 and back."""
    twins = Twins(backend, groups=two_groups)
    for number, scale in enumerate([1e-1, 1e-2, 0.0, 0.0, 1e-3, 1e-2], start=1):
        for optimizer in (twins.optimizer, twins.plain):
            optimizer.param_groups[1]["noise_scale"] = scale
            optimizer.param_groups[0]["gamma"] = 1 / number
            optimizer.param_groups[0]["normalization"] = "exact" if number > 3 else "delayed"
        twins.step(number)
    twins.assert_same()
    assert {float(state["step"]) for state in twins.pats.state.values()} == {4.0, 6.0}


def test_noise_scale_of_zero_is_the_optimizer_alone(backend: str) -> None:
    params, plain = parameters(), parameters()
    optimizer, other = OPTIMIZERS["AdamW"](params), OPTIMIZERS["AdamW"](plain)
    pats = PATS(optimizer, noise_scale=0, backend=backend)
    for number in (1, 2, 3):
        for each in (params, plain):
            give_gradients(each, number)
        optimizer.step()
        other.step()
    assert_same_bits([p.data for p in params], [p.data for p in plain])
    assert_same_states(optimizer, other)
    assert pats.state == {}
    assert pats.state_dict()["state"] == {}
    assert pats.nonfinite_counts() == {}


def test_added_group(backend: str) -> None:
    twins = Twins(backend).steps(1, 2)
    for params, optimizer in ((twins.params, twins.optimizer), (twins.own, twins.plain)):
        new = [nn.Parameter(torch.full((6, 7), 0.5)), nn.Parameter(torch.full((3,), 0.5))]
        params += new
        optimizer.add_param_group({"params": new, "noise_scale": 0.25})
    twins.steps(3, 4, 5).assert_same()
    assert float(twins.pats.state[twins.params[-1]]["step"]) == 3.0


def test_frozen_and_unfrozen(backend: str) -> None:
    """Without a gradient a tensor's step count does not change. The others keep their tensor_ids."""
    twins = Twins(backend)
    for number, without in enumerate([(), (1, 4), (0, 1, 2, 3, 4), (1,), (0,), ()], start=1):
        twins.step(number, without)
    twins.assert_same()
    assert [float(twins.pats.state[p]["step"]) for p in twins.params] == [4.0, 3.0, 5.0, 5.0, 4.0]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(backend: str, set_to_none: bool) -> None:
    """Gradients in new and in the same memory, through backward passes and optimizer.zero_grad."""
    twins = Twins(backend)
    for number in range(1, 5):
        targets = torch.randn(len(SHAPES), generator=torch.Generator().manual_seed(number))
        for params, optimizer in ((twins.params, twins.optimizer), (twins.own, twins.plain)):
            optimizer.zero_grad(set_to_none=set_to_none)
            losses = [(p * t).sin().sum() for p, t in zip(params, targets, strict=True)]
            torch.stack(losses).sum().backward()
        twins.optimizer.step()
        twins.hand.before_step(twins.plain)
        twins.plain.step()
    twins.assert_same()


def test_attached_to() -> None:
    """PATS is found from the optimizer, among other hooks, as long as it is attached."""
    optimizer = SGD([torch.ones(1, requires_grad=True)], lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: None)
    assert attached_to(optimizer) is None
    pats = PATS(optimizer)
    assert attached_to(optimizer) is pats
    pats.remove()
    assert attached_to(optimizer) is None


def test_remove() -> None:
    twins = Twins("eager").steps(1, 2)
    twins.pats.remove()
    state = tensors_in(list(twins.pats.state.values()))
    before = [t.clone() for t in state]
    for params in (twins.params, twins.own):
        give_gradients(params, 3)
    twins.optimizer.step()
    twins.plain.step()
    assert_same_bits([p.data for p in twins.params], [p.data for p in twins.own])
    assert_same_bits(state, before)
    assert "pats" not in twins.optimizer.state_dict()
    twins.pats.remove()  # once more does nothing


def test_lr_scheduler(backend: str) -> None:
    """It wraps optimizer.step. PATS runs once in each step, and the schedule takes effect."""
    twins = Twins(backend)
    schedulers = [LambdaLR(o, lambda epoch: 0.5**epoch) for o in (twins.optimizer, twins.plain)]
    for number in range(1, 4):
        twins.step(number)
        for scheduler in schedulers:
            scheduler.step()
    twins.assert_same()
    assert twins.optimizer.param_groups[0]["lr"] == 1e-2 / 8
    assert {float(state["step"]) for state in twins.pats.state.values()} == {3.0}


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("zeroed_before", [False, True])
def test_closure(backend: str, by_name: bool, zeroed_before: bool) -> None:
    """PATS sees the gradient that the closure computes. The optimizer steps on it after the noise."""
    twins = Twins(backend)
    for number in range(1, 5):
        calls: list[int] = []

        def closure(params: list[nn.Parameter], calls: list[int] = calls, number: int = number) -> Tensor:
            calls.append(number)
            give_gradients(params, number)
            return torch.tensor(float(number))

        def own(closure: Callable[..., Tensor] = closure) -> Tensor:
            loss = closure(twins.own)
            twins.hand.before_step(twins.plain)
            return loss

        if zeroed_before:
            twins.optimizer.zero_grad()
        arguments = {"closure": lambda closure=closure: closure(twins.params)}
        loss = twins.optimizer.step(**arguments) if by_name else twins.optimizer.step(*arguments.values())
        assert calls == [number]
        assert float(loss) == number
        twins.plain.step(own)
    twins.assert_same()
    assert {float(state["step"]) for state in twins.pats.state.values()} == {4.0}


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs_is_perturbed_once_a_step_and_resumes(backend: str, line_search: str | None) -> None:
    """The noise comes after the first of a step's many evaluations; the others search from there."""

    def made(weights: Tensor) -> tuple[nn.Parameter, Optimizer, PATS]:
        param = nn.Parameter(weights.clone())
        optimizer = torch.optim.LBFGS([param], lr=0.1, max_iter=5, line_search_fn=line_search)
        return param, optimizer, PATS(optimizer, noise_scale=1e-3, seed=5, backend=backend)

    target = torch.linspace(-1, 1, 40)

    def stepped(param: nn.Parameter, optimizer: Optimizer) -> None:
        evaluations = 0

        def closure() -> Tensor:
            nonlocal evaluations
            evaluations += 1
            optimizer.zero_grad()
            loss = (param - target).pow(4).sum() + param.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        assert evaluations > 1

    start = torch.randn(40, generator=torch.Generator().manual_seed(1))
    param, optimizer, pats = made(start)
    for _ in range(2):
        stepped(param, optimizer)
    saved, weights = copy.deepcopy(optimizer.state_dict()), param.detach().clone()
    for _ in range(3):
        stepped(param, optimizer)
    assert float(pats.state[param]["step"]) == 5.0

    other, resumed, again = made(weights)
    resumed.load_state_dict(saved)
    for _ in range(3):
        stepped(other, resumed)
    assert torch.equal(param, other)
    assert same_bits(pats.state[param]["exp_avg_sens"], again.state[other]["exp_avg_sens"])
    plain = nn.Parameter(start.clone())
    without = torch.optim.LBFGS([plain], lr=0.1, max_iter=5, line_search_fn=line_search)
    for _ in range(5):
        stepped(plain, without)
    assert 1e-5 < (plain - param).abs().max() < 1e-1


def test_nonfinite_counts(backend: str) -> None:
    named = dict(zip("abcde", parameters(), strict=True))
    params = list(named.values())
    optimizer = SGD(named.items(), lr=0.0)
    pats = PATS(optimizer, backend=backend)
    assert pats.nonfinite_counts() == {}
    for number in (1, 2):
        give_gradients(params, number)
        params[1].grad[2:5] = torch.nan
        params[4].grad[:7] = torch.inf
        params[4].grad[-1] = -torch.inf
        optimizer.step()
        assert pats.nonfinite_counts() == {"b": 3 * number, "e": 8 * number}
    assert all(t.isfinite().all() for t in tensors_in(list(pats.state.values())))


def test_repr() -> None:
    text = repr(PATS(SGD(parameters(), lr=0.1), noise_scale=0.125, seed=77))
    assert_parts = ["PATS(SGD", "noise_scale=0.125", "seed=77", "backend='auto'"]
    assert all(part in text for part in assert_parts)


# The state dict.


def saved(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state after saving to a file and loading, as in a checkpoint."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resumed(twins: Twins, through_optimizer: bool, load: Callable[[dict[str, Any]], Any]) -> Twins:
    """New objects, PATS with other defaults, resumed from the checkpoint of the first twin."""
    other = Twins(twins.backend, twins.factory, twins.changes, twins.groups, twins.dtype)
    other.pats.remove()
    other.pats = PATS(other.optimizer, noise_scale=0.5, seed=99, backend=twins.backend)
    with torch.no_grad():
        for param, source in zip(other.params, twins.params, strict=True):
            param.copy_(source)
    if through_optimizer:
        other.optimizer.load_state_dict(load(twins.optimizer.state_dict()))
    else:
        own = load({k: v for k, v in twins.optimizer.state_dict().items() if k != "pats"})
        other.optimizer.load_state_dict(own)
        other.pats.load_state_dict(load(twins.pats.state_dict()))
    return other


LOADS = {"saved": saved, "copied": copy.deepcopy}
RESUMED: dict[str, dict[str, Any]] = {
    "float32": {},
    "fused": {"factory": OPTIMIZERS["AdamW, fused"]},
    "groups": {"groups": two_groups},
    "bfloat16": {"dtype": torch.bfloat16},
    "float32 averages": {"dtype": torch.bfloat16, "changes": {"state_dtype": torch.float32}},
    "bfloat16 averages": {"changes": {"state_dtype": torch.bfloat16}},
    "float16": {"dtype": torch.float16},
    "float64": {"dtype": torch.float64},
    "none": {"changes": {"uncertainty": "none", "normalization": "exact"}},
}


@pytest.mark.parametrize("through_optimizer", [True, False])
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_continues_bit_for_bit(name: str, load: str, through_optimizer: bool) -> None:
    """The checkpoint has everything: noise, averages and their dtypes, means, counts and hyperparameters."""
    twins = Twins("auto", **RESUMED[name]).steps(1, 2, 3)
    other = resumed(twins, through_optimizer, LOADS[load])
    assert other.pats.defaults == twins.pats.defaults
    for number in (4, 5, 6):
        for each in (twins, other):
            give_gradients(each.params, number)
            each.optimizer.step()
    assert_same_bits([p.data for p in other.params], [p.data for p in twins.params])
    for param, source in zip(other.params, twins.params, strict=True):
        entry, expected = other.pats.state[param], twins.pats.state[source]
        assert set(entry) == set(expected)
        assert_same_bits([entry[key] for key in expected], list(expected.values()))


def test_a_resumed_run_continues_on_each_backend(backend: str) -> None:
    twins = Twins(backend).steps(1, 2)
    other = resumed(twins, True, saved)
    for each in (twins, other):
        give_gradients(each.params, 3)
        each.optimizer.step()
    assert_same_bits([p.data for p in other.params], [p.data for p in twins.params])


def test_float32_averages_survive_the_optimizer_s_cast() -> None:
    """Optimizer.load_state_dict casts state to the parameter's dtype, but not PATS's."""
    params = parameters(torch.bfloat16)
    optimizer = AdamW(params)
    pats = PATS(optimizer, state_dtype=torch.float32)
    give_gradients(params, 1)
    optimizer.step()
    before = [state["exp_avg_sens"].clone() for state in pats.state.values()]
    assert any(not torch.equal(S, S.to(torch.bfloat16).float()) for S in before)
    optimizer.load_state_dict(saved(optimizer.state_dict()))
    assert_same_bits([state["exp_avg_sens"] for state in pats.state.values()], before)


def test_loading_copies() -> None:
    """The checkpoint's tensors and the live ones share no memory, so one checkpoint can start two runs."""
    twins, other = Twins("auto").steps(1, 2), Twins("auto")
    state_dict = twins.pats.state_dict()
    before = [t.clone() for t in tensors_in(state_dict["state"])]
    other.pats.load_state_dict(state_dict)
    give_gradients(other.params, 3)
    other.optimizer.step()
    assert_same_bits(tensors_in(state_dict["state"]), before)
    assert not same_bits(other.pats.state[other.params[0]]["exp_avg_sens"], before[0])


def test_state_dict_is_that_of_torch() -> None:
    """By the parameter's number, with live tensors, and without parameters that have no state."""
    twins = Twins("auto")
    twins.step(1, without=(0, 3))
    state_dict = twins.pats.state_dict()
    assert sorted(state_dict["state"]) == [1, 2, 4]
    assert state_dict["state"][4]["exp_avg_sens"] is twins.pats.state[twins.params[4]]["exp_avg_sens"]
    joined = twins.optimizer.state_dict()
    assert sorted(joined) == ["param_groups", "pats", "state"]
    assert "exp_avg_sens" not in joined["state"][1]


def test_a_checkpoint_without_pats_loads() -> None:
    """A plain AdamW's: its moments are loaded, the sensitivity starts empty, the hyperparameters stay."""
    plain_params = parameters()
    plain = AdamW(plain_params, lr=1e-2)
    give_gradients(plain_params, 1)
    plain.step()
    twins = Twins("auto").steps(1, 2)
    defaults = dict(twins.pats.defaults)
    twins.optimizer.load_state_dict(saved(plain.state_dict()))
    assert_same_states(twins.optimizer, plain)
    assert twins.pats.state == {}
    assert twins.pats.defaults == defaults
    twins.steps(3)
    assert {float(state["step"]) for state in twins.pats.state.values()} == {1.0}


def test_a_checkpoint_with_pats_loads_without() -> None:
    twins = Twins("auto").steps(1, 2)
    plain = AdamW(parameters(), lr=1e-2)
    plain.load_state_dict(saved(twins.optimizer.state_dict()))
    assert_same_states(plain, twins.optimizer)


def older(state_dict: dict[str, Any]) -> dict[str, Any]:
    """As saved by an old version: without version, number of parameters and defaults."""
    return {"state": state_dict["state"]}


def test_an_older_state_dict_loads() -> None:
    twins = Twins("auto").steps(1, 2)
    before = snapshot(twins.optimizer, twins.pats)
    twins.pats.load_state_dict(older(saved(twins.pats.state_dict())))
    assert_same_bits(snapshot(twins.optimizer, twins.pats), before)


Edit = Callable[[dict[str, Any]], Any]


def edited(key: int, name: str, value: Any) -> Edit:
    return lambda sd: sd["state"][key].__setitem__(name, value)


BAD_STATE_DICTS: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "S of another shape": (
        edited(1, "exp_avg_sens", torch.zeros(9)),
        ("b:", "exp_avg_sens", "(9,)", "(8,)"),
    ),
    "U of another shape": (
        edited(0, "exp_avg_unc", torch.zeros(40)),
        ("a:", "exp_avg_unc", "(40,)", "(5, 8)"),
    ),
    "means of another shape": (edited(2, "sens_stats", torch.zeros(3)), ("c:", "sens_stats", "(3,)")),
    "two of another shape": (
        lambda sd: [sd["state"][i].update(exp_avg_sens=torch.zeros(9)) for i in (2, 4)],
        ("c:", "exp_avg_sens"),
    ),
    "no S": (lambda sd: sd["state"][3].pop("exp_avg_sens"), ("d:", "exp_avg_sens")),
    "S of another dtype than U": (
        edited(1, "exp_avg_sens", torch.zeros(8, dtype=torch.bfloat16)),
        ("b:", "exp_avg_sens", "bfloat16", "exp_avg_unc", "float32"),
    ),
    "sparse S": (edited(1, "exp_avg_sens", torch.zeros(8).to_sparse()), ("b:", "exp_avg_sens", "sparse")),
    "integer U": (edited(1, "exp_avg_unc", torch.zeros(8, dtype=torch.int8)), ("b:", "exp_avg_unc", "int8")),
    "complex U": (
        edited(1, "exp_avg_unc", torch.zeros(8, dtype=torch.cfloat)),
        ("b:", "exp_avg_unc", "complex64"),
    ),
    "S that is None": (edited(1, "exp_avg_sens", None), ("b:", "exp_avg_sens", "None")),
    "S that is text": (edited(1, "exp_avg_sens", "zeros"), ("b:", "exp_avg_sens", "str")),
    "S without values": (
        edited(1, "exp_avg_sens", torch.zeros(8, device="meta")),
        ("b:", "exp_avg_sens", "meta"),
    ),
    "negative S": (edited(1, "exp_avg_sens", -torch.eye(8)[3]), ("b:", "exp_avg_sens", "-1.0", ">= 0")),
    "negative U": (
        edited(2, "exp_avg_unc", torch.full((3, 4, 2), -1e-30)),
        ("c:", "exp_avg_unc", "-1", ">= 0"),
    ),
    "S not a number": (edited(1, "exp_avg_sens", torch.eye(8)[0].log().log()), ("b:", "exp_avg_sens", "nan")),
    "infinite U": (edited(1, "exp_avg_unc", 1 / torch.eye(8)[0]), ("b:", "exp_avg_unc", "inf")),
    "negative means": (edited(4, "sens_stats", torch.tensor([1.0, -1.0])), ("e:", "sens_stats", "-1.0")),
    "means not a number": (
        edited(4, "sens_stats", torch.tensor([torch.nan, 1])),
        ("e:", "sens_stats", "nan"),
    ),
    "a count not a number": (edited(3, "step", torch.tensor(torch.nan)), ("d:", "step", "nan")),
    "an infinite count": (edited(3, "step", torch.tensor(torch.inf)), ("d:", "step", "inf")),
    "a negative count": (edited(3, "step", -1), ("d:", "step", "-1", "[0, 889192447]")),
    "a broken count": (edited(3, "step", 2.5), ("d:", "step", "2.5", "whole")),
    "a count too large": (edited(3, "step", 889192448), ("d:", "step", "889192448", "[0, 889192447]")),
    "a count too large for an integer": (edited(3, "step", 2**70), ("d:", "step")),
    "a complex count": (edited(3, "step", 1j), ("d:", "step", "complex")),
    "a count that is true": (edited(3, "step", True), ("d:", "step", "bool")),
    "no entry": (lambda sd: sd["state"].update({2: None}), ("c:", "None")),
    "an entry that is a list": (lambda sd: sd["state"].update({2: [1]}), ("c:", "list")),
    "one parameter twice": (lambda sd: sd["state"].update({"2": sd["state"][2]}), ("c:", "twice")),
    "a key that is no number": (lambda sd: sd["state"].update({"w": sd["state"][2]}), ("'w'", "5")),
    "defaults that are none": (lambda sd: sd.update(defaults=None), ("defaults",)),
    "a version that is none": (lambda sd: sd.update(version=None), ("version", "None")),
    "a number of parameters that is none": (lambda sd: sd.update(num_params=None), ("num_params", "None")),
    "a state that is a list": (lambda sd: sd.update(state=[]), ("state",)),
    "no count": (lambda sd: sd["state"][3].pop("step"), ("d:", "step")),
    "more parameters": (lambda sd: sd.update(num_params=6), ("6", "5")),
    "an unknown parameter": (lambda sd: sd["state"].update({7: sd["state"][0]}), ("7", "5")),
    "no state": (lambda sd: sd.pop("state"), ("state",)),
    "a newer version": (lambda sd: sd.update(version=1000), ("1000",)),
    "a bad default": (lambda sd: sd["defaults"].update(gamma=-2.0), ("gamma", "-2.0")),
}


def named_run() -> tuple[list[nn.Parameter], AdamW, PATS]:
    params = parameters()
    optimizer = AdamW(zip("abcde", params, strict=True))
    pats = PATS(optimizer, **DEFAULTS)
    for number in (1, 2):
        give_gradients(params, number)
        optimizer.step()
    return params, optimizer, pats


@pytest.mark.parametrize("through_optimizer", [True, False])
@pytest.mark.parametrize("name", BAD_STATE_DICTS)
def test_bad_state_dicts(name: str, through_optimizer: bool) -> None:
    """They are refused by name. PATS and its optimizer do not change, and the run continues as if nothing was
    loaded."""
    edit, parts = BAD_STATE_DICTS[name]
    params, optimizer, pats = named_run()
    twin_params, twin, _ = named_run()
    before, defaults = snapshot(optimizer, pats), dict(pats.defaults)
    state_dict = saved(optimizer.state_dict())
    for group in state_dict["param_groups"]:
        group["lr"] = 5.0
    edit(state_dict["pats"])
    load, loaded = optimizer.load_state_dict, state_dict
    if not through_optimizer:
        load, loaded = pats.load_state_dict, state_dict["pats"]
    with pytest.raises(ValueError) as error:  # noqa: PT011  (assert_names)
        load(loaded)
    assert_names(error, *parts)
    assert_same_bits(snapshot(optimizer, pats), before)
    assert pats.defaults == defaults
    assert optimizer.param_groups[0]["lr"] == 1e-3
    for each, stepped in ((params, optimizer), (twin_params, twin)):
        give_gradients(each, 3)
        stepped.step()
    assert_same_bits([p.data for p in params], [p.data for p in twin_params])


BAD_GROUPS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "noise_scale": ({"noise_scale": -1}, ("noise_scale", "-1", ">= 0")),
    "betas": ({"sens_betas": [0.5, 1.5]}, ("sens_betas", "1.5", "[0, 1)")),
    "tensor_id": ({"tensor_id": -1}, ("tensor_id", "-1")),
    "one tensor_id for two": ({"tensor_id": [0, 1, 2, 2, 4]}, ("tensor_id", "[3]", "2")),
    "another device": ({"noise_scale": torch.zeros((), device="meta")}, ("noise_scale", "meta", "cpu")),
    "names": ({"param_names": None}, ("param_groups[0]", "param_names")),
    "fewer names": ({"param_names": ["a"]}, ("param_groups[0]", "param_names", "5")),
    "parameters": ({"params": None}, ("param_groups[0]", "params", "None")),
    "a parameter twice": ({"params": [0, 1, 1, 3, 4]}, ("parameter 1 twice",)),
    "a parameter that is a list": ({"params": [0, 1, [2], 3, 4]}, ("cannot be a dictionary key",)),
}


@pytest.mark.parametrize("name", BAD_GROUPS)
def test_bad_groups_in_a_state_dict(name: str) -> None:
    values, parts = BAD_GROUPS[name]
    _, optimizer, pats = named_run()
    before = snapshot(optimizer, pats)
    state_dict = saved(optimizer.state_dict())
    state_dict["param_groups"][0] |= {"lr": 5.0, **values}
    with pytest.raises(ValueError) as error:  # noqa: PT011  (assert_names)
        optimizer.load_state_dict(state_dict)
    assert_names(error, *parts)
    assert_same_bits(snapshot(optimizer, pats), before)
    assert optimizer.param_groups[0]["lr"] == 1e-3


@pytest.mark.parametrize("key", ["state", "param_groups"])
@pytest.mark.parametrize("value", [None, 3, [None]])
def test_a_state_dict_of_another_form(key: str, value: Any) -> None:
    _, optimizer, pats = named_run()
    before = snapshot(optimizer, pats)
    with pytest.raises(ValueError, match=key):
        optimizer.load_state_dict(saved(optimizer.state_dict()) | {key: value})
    assert_same_bits(snapshot(optimizer, pats), before)


def test_the_groups_own_values_outlive_a_checkpoint_without_pats() -> None:
    """Like the defaults, although torch's load_state_dict replaces the groups by the checkpoint's."""
    plain = AdamW(two_groups(parameters()))
    for group in plain.param_groups:
        for name in DEFAULTS:
            group.pop(name, None)
    twins = Twins("auto", groups=two_groups)
    own = {name: twins.optimizer.param_groups[1][name] for name in ("noise_scale", "gamma", "seed")}
    twins.optimizer.load_state_dict(saved(plain.state_dict()))
    assert {name: twins.optimizer.param_groups[1][name] for name in own} == own
    assert "noise_scale" not in twins.optimizer.param_groups[0]
    for group, other in zip(twins.optimizer.param_groups, twins.plain.param_groups, strict=True):
        other |= {name: value for name, value in group.items() if name != "params"}
    twins.steps(1, 2, 3).assert_same()


def test_state_that_is_no_parameter_s() -> None:
    """Some optimizers keep a count of steps, or a configuration, beside the parameters' state."""
    _, optimizer, pats = named_run()
    optimizer.state["global_step"] = 7  # type: ignore[index]
    optimizer.state["config"] = [1, 2]  # type: ignore[index]
    state_dict = saved(optimizer.state_dict())
    _, other, own = named_run()
    other.load_state_dict(state_dict)
    assert other.state["global_step"] == 7  # type: ignore[index]
    assert other.state["config"] == [1, 2]  # type: ignore[index]
    del optimizer.state["global_step"], optimizer.state["config"]  # type: ignore[arg-type]
    del other.state["global_step"], other.state["config"]  # type: ignore[arg-type]
    assert_same_bits(snapshot(other, own), snapshot(optimizer, pats))


@pytest.mark.parametrize(
    "count",
    [2, 2.0, torch.tensor(2), torch.tensor([2.0]), torch.tensor(2, dtype=torch.bfloat16), 2**24]
    + [torch.tensor(2, dtype=dtype) for dtype in (torch.uint8, torch.int32, torch.float64, torch.float16)],
    ids=str,
)
def test_a_count_of_any_kind_is_loaded_as_float32(count: Any) -> None:
    params, _, pats = named_run()
    state_dict = saved(pats.state_dict())
    state_dict["state"][1]["step"] = count
    pats.load_state_dict(state_dict)
    step = pats.state[params[1]]["step"]
    assert (step.dtype, step.shape) == (torch.float32, ())
    assert float(step) == float(count)


def test_missing_means_are_those_of_the_averages() -> None:
    params, _, pats = named_run()
    state_dict = saved(pats.state_dict())
    del state_dict["state"][4]["sens_stats"]
    pats.load_state_dict(state_dict)
    state = pats.state[params[4]]
    expected = torch.stack([state[key].double().mean() for key in ("exp_avg_sens", "exp_avg_unc")]).float()
    assert torch.equal(state["sens_stats"], expected)


def test_loading_under_another_default_device() -> None:
    """The parameters' device counts, as in torch. Tensors with a graph are loaded without it."""
    params, _, pats = named_run()
    before = snapshot(pats.optimizer, pats)
    state_dict = saved(pats.state_dict())
    state_dict["state"][1]["exp_avg_sens"].requires_grad_()
    state_dict["state"][1]["step"] = 2
    with torch.device("meta"):
        pats.load_state_dict(state_dict)
    assert_same_bits(snapshot(pats.optimizer, pats), before)
    assert not pats.state[params[1]]["exp_avg_sens"].requires_grad


def test_a_dict_that_the_optimizer_refuses() -> None:
    """Then PATS takes nothing from it either, now or at the next load."""
    _, optimizer, pats = named_run()
    before = snapshot(optimizer, pats)
    state_dict = saved(optimizer.state_dict())
    state_dict["param_groups"] *= 2
    state_dict["pats"]["defaults"]["gamma"] = 9.0
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict(state_dict)
    assert_same_bits(snapshot(optimizer, pats), before)
    assert pats.defaults["gamma"] == 1.0


def test_what_is_no_state_dict() -> None:
    _, _, pats = named_run()
    for bad in (None, [], 3):
        with pytest.raises(ValueError, match="state_dict"):
            pats.load_state_dict(bad)  # type: ignore[arg-type]


# GradScaler.


def scaled_run(backend: str, scale: float | None, unscale: bool, inf_at: int | None = None) -> Twins:
    """Fused AdamW, which unscales by itself, with gradients times the scale. One is infinite in one step."""
    run = Twins(backend, OPTIMIZERS["AdamW, fused"])
    scaler = torch.amp.GradScaler(
        "cpu", init_scale=scale or 1.0, enabled=scale is not None, growth_interval=99
    )
    for number in range(1, 6):
        give_gradients(run.params, number)
        for param in run.params:
            param.grad *= scaler.get_scale()
        if number == inf_at:
            run.params[4].grad[3] = torch.inf
        scaler.scale(torch.ones(()))  # like a loss; initializes the scaler
        before = snapshot(run.optimizer, run.pats)
        if unscale and scale is not None:
            scaler.unscale_(run.optimizer)
        scaler.step(run.optimizer)
        scaler.update()
        if number == inf_at:
            assert_same_bits(snapshot(run.optimizer, run.pats), before)
            assert run.pats.nonfinite_counts() == {}
    return run


@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(backend: str, unscale: bool) -> None:
    """A scale that is a power of two, unscaled once, gives the bits of the run without a scaler."""
    plain, scaled = scaled_run(backend, None, unscale), scaled_run(backend, 2.0**10, unscale)
    assert_same_bits(snapshot(scaled.optimizer, scaled.pats), snapshot(plain.optimizer, plain.pats))
    assert {float(state["step"]) for state in scaled.pats.state.values()} == {5.0}


@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler_skips_a_step(backend: str, unscale: bool) -> None:
    """With an infinity nothing changes, not even the count. The next steps continue from there."""
    run = scaled_run(backend, 2.0**10, unscale, inf_at=3)
    expected = Twins(backend, OPTIMIZERS["AdamW, fused"])
    for number in (1, 2, 4, 5):
        give_gradients(expected.params, number)
        expected.optimizer.step()
    assert_same_bits(snapshot(run.optimizer, run.pats), snapshot(expected.optimizer, expected.pats))
    assert {float(state["step"]) for state in run.pats.state.values()} == {4.0}


def test_grad_scaler_skips_the_first_step(backend: str) -> None:
    """State may be allocated then. It is all zeros and has no effect."""
    run = Twins(backend, OPTIMIZERS["AdamW, fused"])
    before = [p.detach().clone() for p in run.params]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    give_gradients(run.params, 1)
    run.params[0].grad[0] = torch.nan
    scaler.scale(torch.ones(()))
    scaler.step(run.optimizer)
    assert_same_bits([p.data for p in run.params], before)
    assert not any(t.any() for t in tensors_in(list(run.pats.state.values())))


def test_grad_scaler_with_an_optimizer_that_skips_itself(backend: str) -> None:
    """SGD without `fused` knows no scale: the scaler unscales first, and does not call it after an
    infinity."""
    run, plain = Twins(backend, OPTIMIZERS["SGD"]), Twins(backend, OPTIMIZERS["SGD"])
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=99)
    for number in range(1, 4):
        give_gradients(run.params, number)
        for param in run.params:
            param.grad *= scaler.get_scale()
        if number == 2:
            run.params[0].grad[0] = torch.inf
        scaler.scale(torch.ones(()))
        scaler.step(run.optimizer)
        scaler.update()
        if number != 2:
            give_gradients(plain.params, number)
            plain.optimizer.step()
    assert_same_bits(snapshot(run.optimizer, run.pats), snapshot(plain.optimizer, plain.pats))


def test_uncertainty_may_change_on_the_way(backend: str) -> None:
    """From "none", which keeps no U, to "product": U starts at zero, as if it had always existed."""
    w = torch.ones(100, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=0.0)
    pats = PATS(optimizer, uncertainty="none", backend=backend)
    w.grad = torch.linspace(0.1, 1, 100)
    optimizer.step()
    assert "exp_avg_unc" not in pats.state[w]
    S = pats.state[w]["exp_avg_sens"].clone()
    optimizer.param_groups[0]["uncertainty"] = "product"
    optimizer.step()
    s = w.detach() * w.grad  # the first step adds no noise, so w is still 1
    expected = 0.05 * (s - (0.85 * S + 0.15 * s)).abs()
    torch.testing.assert_close(pats.state[w]["exp_avg_unc"], expected, rtol=1e-5, atol=1e-8)


def test_means_beyond_float32_load(backend: str) -> None:
    """A kernel's sum of elements may overflow float32 although their mean does not. Both count as no
    statistics."""
    params = [torch.full((50,), 1e19, requires_grad=True) for _ in range(2)]
    optimizers = [SGD([param], lr=0.0) for param in params]
    pats, other = (PATS(optimizer, noise_scale=1e17, gamma=0.0, backend=backend) for optimizer in optimizers)

    def step(i: int) -> None:
        params[i].grad = torch.full((50,), 3e19)
        optimizers[i].step()

    for _ in range(3):
        step(0)
    assert pats.state[params[0]]["sens_stats"].min() > 2.0**112
    other.load_state_dict(copy.deepcopy(pats.state_dict()))
    step(0)
    step(1)
    assert torch.equal(params[0], params[1])  # bit for bit: without statistics there is no noise
    for key, value in pats.state[params[0]].items():
        assert torch.equal(other.state[params[1]][key], value), key
