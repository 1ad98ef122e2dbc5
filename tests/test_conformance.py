"""PyTorch's own tests of its optimizers, applied to `PATSAdamW` and to `PATS` on torch's optimizers.

The categories are those of PyTorch's test/test_optim.py (`TestOptimRenewed`) in torch 2.7.
docs/conformance.md lists all of them, and the tests in other files that cover some. Inputs, schedulers and
errors come from the installed torch (here 2.13), from `torch.testing._internal.common_optimizers`. That
module is private, so these tests use only what PyTorch's tests have used since 2.6. Optimizers that the
installed torch lacks are left out.

The noise is large, so that missing noise would show. Its seed is fixed, so two runs that must agree do so to
the bit.
"""

import copy
import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import BACKENDS, INTERPRETED
from harness import assert_same_bits, same_bits
from test_optim import DEFAULTS, ByHand, assert_same_states
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.optim.swa_utils import SWALR
from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
    _get_optim_inputs_including_global_cliquey_kwargs,
    optim_db,
)

from pats_kernels import PATS, PATSAdamW
from pats_kernels.optim import attached_to

# Many optimizers with the same seed exist here at once, which rightly gives a warning elsewhere.
pytestmark = pytest.mark.filterwarnings("ignore:PATS")

INFOS = {info.name: info for info in optim_db}
NAMES = ("SGD", "Adam", "AdamW", "Adafactor", "RMSprop", "NAdam", "Muon", "LBFGS")
NOISE: dict[str, Any] = {"noise_scale": 1e-3, "seed": 3}


@dataclass(frozen=True)
class Kind:
    """An optimizer under test.

    Attributes:
        name: the torch optimizer whose inputs are used.
        attached: whether it is that optimizer with `PATS`, or else `PATSAdamW`.
    """

    name: str
    attached: bool = True

    def __str__(self) -> str:
        return f"PATS-{self.name}" if self.attached else "PATSAdamW"

    @property
    def info(self) -> Any:
        return INFOS[self.name]

    def inputs(self, backend: str = BACKENDS[-1]) -> list[dict[str, Any]]:
        """The constructor's arguments, with and without foreach and fused; for slow backends only the first.

        They are made anew each time, because a scheduler writes into tensors.
        """
        inputs = _get_optim_inputs_including_global_cliquey_kwargs(
            "cpu", torch.float32, self.info, skip=("differentiable",)
        )
        kwargs = [each.kwargs for each in inputs if self.attached or not each.kwargs.get("amsgrad")]
        return kwargs if backend == BACKENDS[-1] and not INTERPRETED else kwargs[:1]

    def default(self) -> dict[str, Any]:
        return self.inputs()[0]

    def make(self, params: Any, backend: str, kwargs: dict[str, Any] | None = None, **pats: Any) -> Optimizer:
        kwargs = self.default() if kwargs is None else kwargs
        pats = NOISE | {"backend": backend} | pats
        if not self.attached:
            return PATSAdamW(params, **kwargs, **pats)
        optimizer = self.torch_s(params, kwargs)
        PATS(optimizer, **pats)
        return optimizer

    def torch_s(self, params: Any, kwargs: dict[str, Any] | None = None) -> Optimizer:
        return self.info.optim_cls(params, **(self.default() if kwargs is None else copy.deepcopy(kwargs)))

    def step(self, optimizer: Optimizer, problem: "Problem") -> Tensor:
        if self.info.step_requires_closure:
            return optimizer.step(problem.closure)  # type: ignore[return-value]
        loss = problem.closure()
        optimizer.step()
        return loss


ATTACHED = [Kind(name) for name in NAMES if name in INFOS]
KINDS = [Kind("AdamW", attached=False), *ATTACHED][: 2 if INTERPRETED else None]
WITH_GROUPS = [kind for kind in KINDS if kind.info.supports_param_groups]  # not LBFGS
each_kind = pytest.mark.parametrize("kind", KINDS, ids=str)
each_kind_with_groups = pytest.mark.parametrize("kind", WITH_GROUPS, ids=str)


class Problem:
    """torch's own problem: the squares of W x + b. All parameters are matrices, because Muon takes nothing
    else."""

    def __init__(self, contiguous: bool = True) -> None:
        random = torch.Generator().manual_seed(7)

        def parameter(*shape: int) -> nn.Parameter:
            values = torch.randn(*shape, 2, generator=random, dtype=torch.float32)[..., 0]
            return nn.Parameter(values.contiguous() if contiguous else values)

        self.weight, self.bias = parameter(10, 5), parameter(10, 1)
        self.input = torch.randn(5, 1, generator=random, dtype=torch.float32)
        self.params = [self.weight, self.bias]

    def named(self, named: bool = True) -> list[Any]:
        return list(zip(("weight", "bias"), self.params, strict=True)) if named else self.params

    def closure(self) -> Tensor:
        for param in self.params:
            param.grad = None
        loss = (self.weight @ self.input + self.bias).square().sum()
        loss.backward()
        return loss

    def values(self) -> list[Tensor]:
        return [param.detach().clone() for param in self.params]

    def copy(self) -> "Problem":
        other = Problem()
        with torch.no_grad():
            for param, source in zip(other.params, self.params, strict=True):
                param.copy_(source)
        return other


def params_of(optimizer: Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def fixed(value: Any) -> Any:
    """A nested value with its tensors as dtype, shape and bytes, so that == compares bits."""
    if isinstance(value, Tensor):
        return value.dtype, value.shape, value.detach().reshape(-1).contiguous().view(torch.uint8).tolist()
    if isinstance(value, dict):
        return {key: fixed(entry) for key, entry in value.items()}
    return [fixed(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def nameless(state_dict: dict[str, Any]) -> dict[str, Any]:
    groups = [{k: v for k, v in g.items() if k != "param_names"} for g in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}


# Algorithms and implementations.


@pytest.mark.parametrize("noise_scale", [0.0, 1e-2])
@pytest.mark.parametrize("kind", [kind for kind in WITH_GROUPS if kind.attached], ids=str)
def test_a_step_is_that_of_pats_and_then_torch_s(backend: str, kind: Kind, noise_scale: float) -> None:
    """To the bit, with each of torch's inputs and implementations; PATS does not change which is used.

    As in torch's comparisons, nothing has a gradient in one step, and one tensor is frozen in two others.
    """
    for kwargs in kind.inputs(backend):
        ours, theirs = Problem(), Problem()
        optimizer, plain = (
            kind.make(ours.params, backend, kwargs, noise_scale=noise_scale),
            kind.torch_s(theirs.params, kwargs),
        )
        hand = ByHand(backend, DEFAULTS | {"noise_scale": noise_scale})
        for number in range(7):
            for problem in (ours, theirs):
                problem.bias.requires_grad_(number not in (3, 4))
                problem.closure()
                if number == 2:
                    problem.weight.grad = problem.bias.grad = None
            optimizer.step()
            hand.before_step(plain)
            plain.step()
        assert_same_bits(ours.values(), theirs.values())
        assert_same_states(optimizer, plain)
        assert fixed(optimizer.state_dict()["param_groups"]) == fixed(plain.state_dict()["param_groups"])
        assert optimizer.defaults == plain.defaults


def trained(kind: Kind, optimizer: Optimizer, problem: Problem, schedulers: list[Any]) -> tuple[float, float]:
    """The loss before and after some steps."""
    first = problem.closure().item()
    for _ in range(5 if INTERPRETED else 20):
        loss = kind.step(optimizer, problem)
        for scheduler in schedulers:
            scheduler.step(*([loss.item()] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
    return first, problem.closure().item()


@pytest.mark.parametrize("contiguous", [True, False])
@each_kind
def test_goes_in_the_right_direction(backend: str, kind: Kind, contiguous: bool) -> None:
    problem = silent = Problem(contiguous)
    for kwargs in kind.inputs(backend):
        problem, silent = Problem(contiguous), Problem(contiguous)
        assert problem.weight.is_contiguous() == contiguous
        first, last = trained(kind, kind.make(problem.params, backend, kwargs), problem, [])
        assert (last > first) if kwargs.get("maximize") else (last < first), kwargs
        kind.step(kind.make(silent.params, backend, kwargs, noise_scale=0.0), silent)
    assert not same_bits(problem.weight, silent.weight)


@each_kind
def test_schedulers_go_in_the_right_direction(backend: str, kind: Kind) -> None:
    """torch's combinations of schedulers, on two groups with different learning rates."""
    for makers in kind.info.scheduler_inputs[: 1 if INTERPRETED else None]:
        problem = Problem()
        groups = [{"params": [problem.weight]}, {"params": [problem.bias], "lr": 0.01}]
        optimizer = kind.make(groups if kind in WITH_GROUPS else problem.params, backend)
        first, last = trained(kind, optimizer, problem, [maker(optimizer) for maker in makers])
        assert last < first


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=12),  # fills betas too
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 0.1, step_size_up=3),  # likewise
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=4),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "SWALR": lambda o: SWALR(o, swa_lr=0.05, anneal_epochs=3),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[3]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_do_what_they_do_to_adamw(backend: str, name: str) -> None:
    """Learning rates and momenta are equal to the bit. Parameters differ only by the roundings of fusion."""
    ours, theirs = Problem(), Problem()
    optimizer = PATSAdamW(ours.params, noise_scale=0.0, backend=backend)
    plain = AdamW(theirs.params)
    schedulers = [SCHEDULERS[name](each) for each in (optimizer, plain)]
    start = plain.param_groups[0]["lr"]
    for _ in range(10):
        for each, problem in ((optimizer, ours), (plain, theirs)):
            problem.closure()
            each.step()
        for scheduler in schedulers:
            scheduler.step()
        for key in ("lr", "betas"):
            assert optimizer.param_groups[0][key] == plain.param_groups[0][key]
    assert plain.param_groups[0]["lr"] != start
    torch.testing.assert_close(ours.values(), theirs.values())


# Parameter groups and learning rates.


@each_kind_with_groups
def test_groups_are_several_optimizers(backend: str, kind: Kind) -> None:
    """To the bit, with different rates, decays and noise. `tensor_id` says which noise each tensor draws."""
    one, two = Problem(), Problem()
    still = [nn.Parameter(torch.ones(2, 2)) for _ in range(2)]

    def groups(problem: Problem, third: nn.Parameter) -> list[dict[str, Any]]:
        return [
            {"params": [problem.weight], "lr": 0.02, "weight_decay": 0.1, "noise_scale": 1e-2},
            {"params": [problem.bias], "lr": 0.03, "weight_decay": 0.0, "tensor_id": [1]},
            {"params": [third], "lr": 1e-28, "weight_decay": 0.0, "noise_scale": 0.0, "tensor_id": [2]},
        ]

    together = [kind.make(groups(one, still[0]), backend)]
    apart = [kind.make([group], backend) for group in groups(two, still[1])]
    for _ in range(6):
        for problem, optimizers, third in ((one, together, still[0]), (two, apart, still[1])):
            problem.closure()
            third.grad = torch.full_like(third, 0.3)
            for optimizer in optimizers:
                optimizer.step()
    assert_same_bits(one.values(), two.values())
    assert not any(map(same_bits, one.params, Problem().params))
    assert_same_bits([param.data for param in still], [torch.ones(2, 2)] * 2)


@each_kind
def test_a_learning_rate_may_be_a_tensor(backend: str, kind: Kind) -> None:
    """Close, not equal, because torch multiplies by a tensor elsewhere. In one group or in all."""
    ran = 0
    for kwargs in kind.inputs(backend):
        number = float(kwargs.get("lr", 1e-2))
        problems = [Problem() for _ in range(3)]
        try:
            one, two = (
                kind.make(problem.params, backend, kwargs | {"lr": lr})
                for problem, lr in zip(problems, (number, torch.tensor(number)), strict=False)
            )
        except ValueError as error:
            if "lr as a Tensor is not supported" not in str(error):
                raise
            continue
        group = [{"params": problems[2].params, "lr": torch.tensor(number)}]
        three = kind.make(group, backend, kwargs | {"lr": 1.0})
        for _ in range(5):
            for optimizer, problem in zip((one, two, three), problems, strict=True):
                kind.step(optimizer, problem)
        torch.testing.assert_close(problems[0].values(), problems[1].values())
        torch.testing.assert_close(problems[0].values(), problems[2].values())
        ran += 1
    assert ran


# Parameters and gradients of all kinds.


@each_kind
def test_without_gradients_nothing_happens(backend: str, kind: Kind) -> None:
    """The closure's value is returned, also if it computes no gradients."""
    for kwargs in kind.inputs(backend):
        params = [torch.ones(2, 3), torch.ones(2, 3)]
        optimizer = kind.make(params, backend, kwargs)
        value = torch.tensor([1.0])
        assert optimizer.step(lambda value=value: value) is value
        assert_same_bits(params, [torch.ones(2, 3)] * 2)
        assert not any("exp_avg_sens" in state for state in optimizer.state.values())


@pytest.mark.parametrize("normalization", ["delayed", "exact"])
@each_kind_with_groups
def test_zero_gradients_change_nothing(backend: str, kind: Kind, normalization: str) -> None:
    """They draw no noise either: a tensor whose sensitivities are all 0 has no statistics."""
    for kwargs in kind.inputs(backend):
        problem = Problem()
        optimizer = kind.make(
            problem.params, backend, kwargs | {"weight_decay": 0.0}, normalization=normalization
        )
        before = problem.values()
        for _ in range(3):
            for param in problem.params:
                param.grad = torch.zeros_like(param)
            optimizer.step()
        assert_same_bits(problem.values(), before)


@each_kind_with_groups
def test_dtypes_may_be_mixed(backend: str, kind: Kind) -> None:
    """Each steps as in an optimizer of its own. Integers, which have no gradient, do not change."""
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

    def parameters() -> list[nn.Parameter]:
        random = torch.Generator().manual_seed(1)
        return [nn.Parameter(torch.randn(6, 4, generator=random).to(dtype)) for dtype in dtypes]

    mixed, alone = parameters(), parameters()
    integers = torch.arange(6).reshape(2, 3)
    optimizers = [kind.make([*mixed, integers], backend)]
    optimizers += [kind.make([{"params": [p], "tensor_id": [i]}], backend) for i, p in enumerate(alone)]
    for number in range(4):
        random = torch.Generator().manual_seed(number)
        for one, two in zip(mixed, alone, strict=True):
            one.grad = torch.randn(6, 4, generator=random).to(one.dtype)
            two.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert_same_bits([p.data for p in mixed], [p.data for p in alone])
    assert not any(map(same_bits, mixed, parameters()))
    assert torch.equal(integers, torch.arange(6).reshape(2, 3))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@each_kind
def test_the_default_dtype_changes_nothing(backend: str, kind: Kind, dtype: torch.dtype) -> None:
    """Counts are always float32, where torch's are float64 with a default of float64."""
    runs = []
    for default in (torch.float32, dtype):
        with default_dtype(default):
            problem = Problem()
            optimizer = kind.make(problem.params, backend)
            for _ in range(2):
                kind.step(optimizer, problem)
            resumed = kind.make(problem.params, backend)
            resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            for _ in range(2):
                kind.step(resumed, problem)
            runs.append((resumed, problem))
    (one, first), (two, second) = runs
    assert_same_bits(first.values(), second.values())
    states = [getattr(attached_to(each), "state", each.state) for each in (one, two)]
    assert fixed(list(states[0].values())) == fixed(list(states[1].values()))
    assert all(state["step"].dtype == torch.float32 for state in states[1].values())


@pytest.mark.parametrize("kind", ATTACHED, ids=str)
def test_complex_parameters_are_refused_or_left_to_torch(kind: Kind) -> None:
    """Noise on them is refused by name. Without noise they step or are refused as in torch alone."""

    def parameters() -> list[Tensor]:
        params = [torch.ones(2, 3, dtype=torch.complex64) * (1 + 2j), torch.ones(2, 3)]
        for param in params:
            param.grad = torch.full_like(param, 0.5)
        return params

    def step(optimizer: Optimizer) -> None:
        optimizer.step((lambda: torch.ones(1)) if kind.info.step_requires_closure else None)

    params = parameters()
    optimizer = kind.make([("c", params[0]), ("r", params[1])], "eager")
    with pytest.raises(TypeError, match=r"^c: .*complex64"):
        step(optimizer)
    assert_same_bits(
        [torch.view_as_real(params[0]), params[1]],
        [torch.tensor([1.0, 2.0]).expand(2, 3, 2), torch.ones(2, 3)],
    )

    params, others = parameters(), parameters()
    optimizer, plain = kind.make(params, "eager", noise_scale=0.0), kind.torch_s(others)
    errors = []
    for each in (plain, optimizer):
        try:
            step(each)
        except RuntimeError as error:
            errors.append(str(error))
    if errors:
        assert not kind.info.supports_complex
        assert errors[0] == errors[1]
    assert_same_bits([torch.view_as_real(params[0]), params[1]], [torch.view_as_real(others[0]), others[1]])
    assert errors or not torch.equal(params[1], torch.ones(2, 3))


def test_sparse_gradients_without_noise_are_torch_s() -> None:
    """Uncoalesced, as in torch's tests, beside a group with noise, which draws the noise of its position."""
    params, others = ([nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(4, 4))] for _ in range(2))
    optimizer = SGD([{"params": params[:1], "noise_scale": 0.0}, {"params": params[1:]}], lr=0.1)
    pats = PATS(optimizer, **NOISE, normalization="exact")
    plain = SGD(others, lr=0.1)
    for number in range(3):
        for sparse, dense in (params, others):
            values = torch.tensor([[1.0, 2.0], [3.0, float(number)]])
            sparse.grad = torch.sparse_coo_tensor([[1, 1]], values, (3, 2), check_invariants=True)
            dense.grad = torch.arange(16.0).reshape(4, 4)
        optimizer.step()
        plain.step()
    assert same_bits(params[0], others[0])
    assert not same_bits(params[1], others[1])
    assert list(pats.state) == params[1:]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.name == "AdamW"], ids=str)
def test_parameters_without_memory(kind: Kind) -> None:
    """On the meta device a step changes nothing and raises nothing, as in torch, except with fused=True.
    State loaded from another device moves to the parameters' device, the count too."""
    problem = Problem()
    source = kind.make(problem.params, "auto")
    kind.step(source, problem)
    params = [nn.Parameter(param.to("meta")) for param in problem.params]
    optimizer = kind.make(params, "auto")
    for loaded in (False, True):
        if loaded:
            optimizer.load_state_dict(source.state_dict())
        for param in params:
            param.grad = torch.empty_like(param)
        optimizer.step()
        states = getattr(attached_to(optimizer), "state", optimizer.state)
        assert all(value.is_meta for param in params for value in states[param].values())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.name in ("AdamW", "SGD")], ids=str)
def test_a_parameter_twice_is_refused(kind: Kind) -> None:
    """torch warns that it will become an error, and steps it twice. Its noise would be ambiguous."""
    param = nn.Parameter(torch.ones(3, 2))
    param.grad = torch.ones(3, 2)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = kind.make([param, param], "auto")
    with pytest.raises(ValueError, match="overlapping memory"):
        optimizer.step()
    assert torch.equal(param, torch.ones(3, 2))


@pytest.mark.parametrize("kind", ATTACHED, ids=str)
def test_torch_s_errors_come_through(kind: Kind) -> None:
    """Errors at construction come before PATS. Errors in a step are the same under PATS."""
    for error in kind.info.optim_error_inputs_func("cpu", torch.float32):
        if error.error_on != OptimizerErrorEnum.STEP_ERROR:
            continue
        params, kwargs = error.optimizer_error_input.params, error.optimizer_error_input.kwargs
        optimizer = kind.make(params, "eager", kwargs, noise_scale=0.0)
        with pytest.raises(error.error_type, match=error.error_regex):
            optimizer.step()


def test_differentiable() -> None:
    """Gradients flow through an attached optimizer as without PATS; the noise is a constant."""
    start, grad = (torch.full((4, 4), value, requires_grad=True) for value in (0.5, 0.25))
    param = start.clone()
    param.grad = grad.clone()
    optimizer = SGD([param], lr=0.125, weight_decay=0.5, differentiable=True)
    PATS(optimizer, noise_scale=0.1, gamma=0.5, normalization="exact")
    optimizer.step()
    assert not torch.allclose(param, start - 0.125 * (grad + 0.5 * start), atol=1e-2)  # there was noise
    param.sum().backward()
    assert torch.equal(start.grad, torch.full((4, 4), 1 - 0.125 * 0.5))
    assert torch.equal(grad.grad, torch.full((4, 4), -0.125))
    with pytest.raises(ValueError, match="Invalid differentiable: True"):
        PATSAdamW([param], differentiable=True)


# State dictionaries.


def assert_resumes(kind: Kind, backend: str, kwargs: dict[str, Any], named: tuple[bool, bool]) -> None:
    """Asserts that a run, and one that resumes from its state, agree to the bit, in all state."""
    problem = Problem()
    optimizer = kind.make(problem.named(named[0]), backend, kwargs)
    for _ in range(3):
        kind.step(optimizer, problem)
    other = problem.copy()
    second = kind.make(other.named(named[1]), backend, kwargs, seed=9, gamma=0.1)
    state_dict = copy.deepcopy(optimizer.state_dict())
    before = fixed(state_dict)
    second.load_state_dict(state_dict)
    assert fixed(state_dict) == before
    for _ in range(3):
        kind.step(optimizer, problem)
        kind.step(second, other)
        assert_same_bits(problem.values(), other.values())
    assert fixed(nameless(optimizer.state_dict())) == fixed(nameless(second.state_dict()))
    names = ["weight", "bias"] if any(named) else None
    assert second.state_dict()["param_groups"][0].get("param_names") == names
    # Parameters that occur twice look the same in the dictionary.
    second.param_groups.extend(second.param_groups)
    twice = nameless(second.state_dict())
    assert fixed(twice["param_groups"][-1]) == fixed(nameless(optimizer.state_dict())["param_groups"][-1])
    assert fixed(twice["state"]) == fixed(optimizer.state_dict()["state"])
    assert fixed(twice.get("pats", {}).get("state")) == fixed(
        optimizer.state_dict().get("pats", {}).get("state")
    )


@each_kind
def test_state_dicts_are_deterministic(backend: str, kind: Kind) -> None:
    for kwargs in kind.inputs(backend):
        assert_resumes(kind, backend, kwargs, (False, False))


@pytest.mark.parametrize("named", [(True, True), (True, False), (False, True)], ids=str)
@each_kind
def test_state_dicts_with_names_and_without(backend: str, kind: Kind, named: tuple[bool, bool]) -> None:
    assert_resumes(kind, backend, kind.default(), named)


@each_kind
def test_older_state_dicts_load(kind: Kind) -> None:
    """Groups without flags that came later; for PATSAdamW without anything of PATS, like AdamW's."""
    ours = {*DEFAULTS, "sensitivity", "state_dtype", "maximize", "capturable"}
    missing = {*kind.info.not_og_supported_flags, *(() if kind.attached else ours)}
    for kwargs in kind.inputs():
        problem = Problem()
        optimizer = kind.make(problem.params, "auto", kwargs)
        for _ in range(3):
            kind.step(optimizer, problem)
        other = problem.copy()
        older = kind.make(other.params, "auto", kwargs)
        state_dict = copy.deepcopy(optimizer.state_dict())
        for group in state_dict["param_groups"]:
            for key in missing & group.keys():
                del group[key]
        older.load_state_dict(state_dict)
        changed = {key for key in missing & kwargs.keys() if kind.attached and kwargs[key]}
        kind.step(optimizer, problem)
        kind.step(older, other)
        # For missing keys torch sets its default, PATSAdamW keeps the group's value.
        if not changed:
            assert_same_bits(problem.values(), other.values())
        elif "maximize" in changed:
            assert not same_bits(problem.weight, other.weight)
        state = getattr(attached_to(older), "state", older.state)[other.weight]
        assert float(state["step"]) == 4.0


@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("named", [False, True])
@each_kind
def test_saved_with_weights_only(kind: Kind, named: bool, state_dtype: torch.dtype | None) -> None:
    for kwargs in kind.inputs():
        problem = Problem()
        optimizer = kind.make(problem.named(named), "auto", kwargs, state_dtype=state_dtype)
        for _ in range(3):
            kind.step(optimizer, problem)
        state_dict = optimizer.state_dict()
        file = io.BytesIO()
        torch.save(state_dict, file)
        file.seek(0)
        assert fixed(torch.load(file, weights_only=True)) == fixed(state_dict)


@each_kind
def test_counts_that_are_no_tensors_load(kind: Kind) -> None:
    """In the optimizer's entries and in PATS's. The run continues as it was."""
    for kwargs in kind.inputs():
        problem = Problem()
        optimizer = kind.make(problem.params, "auto", kwargs)
        for _ in range(3):
            kind.step(optimizer, problem)
        other = problem.copy()
        loaded = kind.make(other.params, "auto", kwargs)
        state_dict = copy.deepcopy(optimizer.state_dict())
        entries = [*state_dict["state"].values(), *state_dict.get("pats", {}).get("state", {}).values()]
        counted = [entry for entry in entries if isinstance(entry.get("step"), Tensor)]
        assert counted
        for entry in counted:
            entry["step"] = entry["step"].item()
        loaded.load_state_dict(state_dict)
        for _ in range(2):
            kind.step(optimizer, problem)
            kind.step(loaded, other)
        assert_same_bits(problem.values(), other.values())


@each_kind
def test_state_is_not_empty(backend: str, kind: Kind) -> None:
    """After a step every parameter has state of PATS, and none of the optimizer's entries is empty."""
    for kwargs in kind.inputs(backend):
        problem = Problem()
        optimizer = kind.make(problem.params, backend, kwargs)
        kind.step(optimizer, problem)
        assert all(len(state) > 0 for state in optimizer.state.values())
        states = getattr(attached_to(optimizer), "state", optimizer.state)
        assert {*states} == {*problem.params}
        assert all("exp_avg_sens" in state for state in states.values())


def test_dictionaries_of_adam_and_adamw() -> None:
    """PATSAdamW decouples its decay, as AdamW does, whatever Adam's dictionary says. AdamW can load
    PATSAdamW's."""
    problem = Problem()
    adam = Adam(problem.params, weight_decay=0.1)
    for _ in range(2):
        problem.closure()
        adam.step()
    problems = [problem.copy(), problem.copy()]
    ours, theirs = PATSAdamW(problems[0].params, noise_scale=0.0), AdamW(problems[1].params)
    for optimizer, each in zip((ours, theirs), problems, strict=True):
        optimizer.load_state_dict(copy.deepcopy(adam.state_dict()))
        each.closure()
        optimizer.step()
    torch.testing.assert_close(problems[0].values(), problems[1].values())
    assert ours.param_groups[0]["weight_decay"] == 0.1

    back = problems[0].copy()
    adamw = AdamW(back.params)
    adamw.load_state_dict(copy.deepcopy(ours.state_dict()))
    for optimizer, each in ((ours, problems[0]), (adamw, back)):
        each.closure()
        optimizer.step()
    torch.testing.assert_close(problems[0].values(), back.values())
    assert float(adamw.state[back.weight]["step"]) == 4.0


# Hooks.


@each_kind
def test_state_dict_hooks(kind: Kind) -> None:
    """A hook before, one after, and both. The one after sees what PATS has added, and may remove it."""

    def before(optimizer: Optimizer) -> None:
        optimizer.state["test"] = 1  # type: ignore[index]

    def after(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        ran = state_dict["state"].pop("test", None) == 1
        return {**state_dict, "ran": ran, "has": sorted(state_dict)}

    keys = ["param_groups", "pats", "state"] if kind.attached else ["param_groups", "state"]
    optimizer = kind.make(Problem().params, "auto")
    optimizer.register_state_dict_post_hook(after)
    state_dict = optimizer.state_dict()
    assert (state_dict["ran"], state_dict["has"]) == (False, keys)
    optimizer.register_state_dict_pre_hook(before)
    assert optimizer.state_dict()["ran"]
    assert "test" not in optimizer.state_dict()["state"]
    only = kind.make(Problem().params, "auto")
    only.register_state_dict_pre_hook(before)
    assert only.state_dict()["state"]["test"] == 1


@each_kind
def test_load_state_dict_hooks(kind: Kind) -> None:
    """A hook that changes the dictionary and one that returns another, in either order, and one after
    both."""

    def changes(_: Optimizer, state_dict: dict[str, Any]) -> None:
        state_dict["param_groups"][0]["lr"] = 0.002

    def exchanges(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        other = copy.deepcopy(state_dict)
        other["param_groups"][0]["lr"] = 0.003
        return other

    def after(optimizer: Optimizer) -> None:
        seen.append(optimizer.param_groups[0]["lr"])

    seen: list[float] = []
    optimizer = kind.make(Problem().params, "auto", kind.default() | {"lr": 0.004})
    optimizer.register_load_state_dict_post_hook(after)
    optimizer.load_state_dict(optimizer.state_dict())
    first = optimizer.register_load_state_dict_pre_hook(changes)
    optimizer.load_state_dict(optimizer.state_dict())
    handle = optimizer.register_load_state_dict_pre_hook(exchanges, prepend=True)
    optimizer.load_state_dict(optimizer.state_dict())  # whose lr `changes` sets last
    handle.remove()
    optimizer.register_load_state_dict_pre_hook(exchanges)
    optimizer.load_state_dict(optimizer.state_dict())
    first.remove()
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [0.004, 0.002, 0.002, 0.003, 0.003]


@pytest.mark.parametrize("early", [False, True])
@each_kind
def test_a_hook_may_load_another_dictionary(kind: Kind, early: bool) -> None:
    """All of it, also PATS's part, whether the hooks were registered before PATS or later."""
    problem, other = Problem(), Problem()
    source = kind.make(problem.params, "auto")
    for _ in range(2):
        kind.step(source, problem)
    empty = kind.make(Problem().params, "auto").state_dict()
    optimizer = kind.make(other.params, "auto")
    pats = attached_to(optimizer)
    seen: list[float] = []

    def after(loaded: Optimizer) -> None:
        state = getattr(attached_to(loaded), "state", loaded.state)
        seen.extend(float(state[param]["step"]) for param in other.params)

    if early and pats is not None:
        pats.remove()
    optimizer.register_load_state_dict_pre_hook(lambda _, state_dict: copy.deepcopy(source.state_dict()))
    optimizer.register_load_state_dict_post_hook(after)
    if early and pats is not None:
        PATS(optimizer, **NOISE)
    optimizer.load_state_dict(empty)
    assert seen == [2.0, 2.0]


@each_kind
def test_a_hook_may_match_parameters_by_name(kind: Kind) -> None:
    """The example in torch's documentation: parameters in another order are refused until a hook reorders
    their state. The hook knows nothing of an attached PATS, so PATS starts anew, and says so."""
    problem, other = Problem(), Problem()
    source = kind.make(problem.named(), "auto")
    for _ in range(2):
        kind.step(source, problem)
    optimizer = kind.make(other.named()[::-1], "auto")
    state_dict = copy.deepcopy(source.state_dict())
    with pytest.raises(ValueError, match="another order"):
        optimizer.load_state_dict(state_dict)

    def adapt(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        adapted = copy.deepcopy(optimizer.state_dict())
        names = state_dict["param_groups"][0]["param_names"]
        for position, name in enumerate(adapted["param_groups"][0]["param_names"]):
            if (entry := state_dict["state"].get(names.index(name))) is not None:
                adapted["state"][position] = entry
        return adapted

    optimizer.register_load_state_dict_pre_hook(adapt)
    if kind.attached:
        with pytest.warns(UserWarning, match="sensitivities begin anew"):
            optimizer.load_state_dict(state_dict)
        pats = attached_to(optimizer)
        assert pats is not None
        assert not pats.state
    else:
        optimizer.load_state_dict(state_dict)
    for one, two in zip(problem.params, other.params, strict=True):
        if one in source.state and kind in WITH_GROUPS:
            assert fixed(optimizer.state[two]) == fixed(source.state[one])
    kind.step(optimizer, other)


@each_kind
def test_step_hooks(kind: Kind) -> None:
    """Hooks for all optimizers run first and last, once per step. When they are removed, PATS stays."""
    problem = Problem()
    optimizer, other = kind.make(problem.params, "auto"), SGD(Problem().params)
    seen: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        return lambda *_: seen.append(name)

    handles = [
        register_optimizer_step_pre_hook(hook("all before")),
        register_optimizer_step_post_hook(hook("all after")),
        *(each.register_step_pre_hook(hook("before")) for each in (optimizer, other)),
        *(each.register_step_post_hook(hook("after")) for each in (optimizer, other)),
    ]
    try:
        order = ["all before", "before", "after", "all after"]
        kind.step(optimizer, problem)
        assert seen == order
        other.step()
        kind.step(optimizer, problem)
        assert seen == order * 3
    finally:
        for handle in handles:
            handle.remove()
    kind.step(optimizer, problem)
    assert seen == order * 3
    state = getattr(attached_to(optimizer), "state", optimizer.state)[problem.weight]
    assert float(state["step"]) == 3.0


def test_a_hook_from_before_pats_may_change_gradients() -> None:
    """Hooks run in the order of registration, so PATS steps on the changed gradients."""
    runs = []
    for clipped in (False, True):
        problem = Problem()
        optimizer = SGD(problem.params, lr=0.1)
        if clipped:
            optimizer.register_step_pre_hook(lambda o, *_: nn.utils.clip_grad_value_(params_of(o), 0.5))
        PATS(optimizer, **NOISE, normalization="exact")
        for _ in range(2):
            problem.closure()
            if not clipped:
                nn.utils.clip_grad_value_(problem.params, 0.5)
            optimizer.step()
        runs.append(problem.values())
    assert_same_bits(*runs)


# Objects.


@each_kind
def test_printed(kind: Kind) -> None:
    """PATSAdamW shows all its settings. An attached PATS does not change the optimizer's text."""
    for kwargs in kind.inputs():
        optimizer = kind.make(Problem().params, "auto", kwargs)
        text = repr(optimizer)
        if kind.attached:
            assert text == repr(kind.torch_s(Problem().params, kwargs))
        else:
            assert all(f"{key}: {value}" in text for key, value in optimizer.defaults.items())


@each_kind
def test_copies_have_all_public_attributes(kind: Kind) -> None:
    """tests/test_lifetime.py and tests/test_adamw_optim.py compare their numbers."""

    def public(optimizer: Optimizer) -> set[str]:
        return {name for name in vars(optimizer) if not name.startswith("_")}

    for kwargs in kind.inputs():
        problem = Problem()
        optimizer = kind.make(problem.params, "auto", kwargs)
        optimizer.extra = "kept"  # type: ignore[attr-defined]
        for _ in range(3):
            kind.step(optimizer, problem)
        copied = copy.deepcopy(optimizer)
        assert public(copied) == public(optimizer) - {"extra"}  # as torch's own drop it
        assert (attached_to(copied) is None) == (not kind.attached)


@pytest.mark.parametrize("tolerance", [math.inf, -math.inf])
def test_lbfgs_returns_what_its_closure_gives(tolerance: float) -> None:
    """Of the same type, whether it stops at the first evaluation or continues."""
    params = [torch.randn(10, 5), torch.randn(10)]
    optimizer = torch.optim.LBFGS(params, tolerance_grad=tolerance)
    PATS(optimizer, **NOISE)
    assert torch.equal(optimizer.step(lambda: torch.tensor([10.0])), torch.tensor([10.0]))


class Decorated(AdamW):
    """Does something before and after its parent's step."""

    def __init__(self, params: Any, warmup: int, **kwargs: Any) -> None:
        super().__init__(params, **kwargs)
        self.warmup = warmup

    def step(self, closure: Any = None) -> Any:
        self.warmup -= 1
        return super().step(closure)


class DecoratedPATSAdamW(PATSAdamW):
    def __init__(self, params: Any, warmup: int, **kwargs: Any) -> None:
        super().__init__(params, **kwargs)
        self.warmup = warmup

    def step(self, closure: Any = None) -> Any:
        self.warmup -= 1
        return super().step(closure)


@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize("attached", [False, True])
def test_subclasses_step_once(backend: str, attached: bool, with_closure: bool) -> None:
    """A step that calls its parent's step is one step, also for PATS, though torch runs hooks for both
    classes once there has been an optimizer of each. The bits are those of the parent alone."""
    one, two = Problem(), Problem()
    if attached:
        plain, optimizer = AdamW(one.params, lr=0.01), Decorated(two.params, 5, lr=0.01)
        for each in (plain, optimizer):
            PATS(each, **NOISE, backend=backend)
    else:
        plain = PATSAdamW(one.params, **NOISE, lr=0.01, backend=backend)
        optimizer = DecoratedPATSAdamW(two.params, 5, **NOISE, lr=0.01, backend=backend)
    ran: list[int] = []
    optimizer.register_step_pre_hook(lambda *_: ran.append(1))
    for each, problem in ((plain, one), (optimizer, two)):
        for _ in range(3):
            if not with_closure:
                problem.closure()
            each.step(problem.closure if with_closure else None)
    assert_same_bits(one.values(), two.values())
    assert optimizer.warmup == 2
    assert len(ran) == 6  # torch's hooks do run twice
    copied = copy.deepcopy(optimizer)
    assert type(copied) is type(optimizer)
    states = [getattr(attached_to(each), "state", each.state) for each in (plain, optimizer)]
    assert fixed(list(states[0].values())) == fixed(list(states[1].values()))


def test_a_failed_step_does_not_count_as_one_within() -> None:
    """The next step draws its noise."""
    problem = Problem()
    optimizer = Decorated(problem.params, 5, lr=0.01)
    pats = PATS(optimizer, **NOISE)
    for number in range(3):

        def closure(number: int = number) -> Tensor:
            loss = problem.closure()
            if number == 1:
                raise OverflowError
            return loss

        try:
            optimizer.step(closure)
        except OverflowError:
            assert number == 1
    assert float(pats.state[problem.weight]["step"]) == 2.0
