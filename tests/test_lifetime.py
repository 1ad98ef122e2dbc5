"""Lifetimes: objects are freed with their last reference, and copies are complete."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from harness import assert_same_bits
from test_attaching import SETTINGS, Hookless, parameters, steps
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from pats_kernels import PATS, PATSAdamW
from pats_kernels.optim import attached_to
from pats_kernels.state import Counters, counter_of, have_moved, keep_only

pytestmark = pytest.mark.usefixtures("quick_gc")


def attached(kind: Callable[..., Optimizer]) -> Callable[..., Optimizer]:
    def make(params: Any) -> Optimizer:
        optimizer = kind(params, lr=1e-2)
        PATS(optimizer, **SETTINGS)
        return optimizer

    return make


MAKERS: dict[str, Callable[..., Optimizer]] = {
    "PATSAdamW": lambda params: PATSAdamW(params, lr=1e-2, **SETTINGS),
    "AdamW": attached(AdamW),
    "SGD": attached(SGD),
    "Hookless": attached(Hookless),
}


def state_of(optimizer: Optimizer) -> Any:
    """The mapping in which PATS keeps its state."""
    return optimizer.state if isinstance(optimizer, PATSAdamW) else attached_to(optimizer).state  # type: ignore[union-attr]


def params_of(optimizer: Optimizer) -> list[nn.Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"]]


@pytest.fixture
def no_collector() -> Iterator[None]:
    AdamW(parameters())  # in torch, a failed import's frames keep a process's first optimizer alive
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def use(_optimizer: Optimizer) -> None: ...


def use_state_dict(optimizer: Optimizer) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(params_of(optimizer), optimizer, 3)


def use_bad_state_dict(optimizer: Optimizer) -> None:
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["param_groups"][0]["gamma"] = -1.0
    try:
        optimizer.load_state_dict(state_dict)
    except ValueError:
        pass
    else:
        raise AssertionError("loaded")


def use_closure(optimizer: Optimizer) -> None:
    params = params_of(optimizer)

    def closure() -> Tensor:
        for param in params:
            param.grad = torch.ones_like(param)
        return torch.tensor(1.0)

    optimizer.step(closure)  # type: ignore[arg-type]
    optimizer.step(closure=closure)  # type: ignore[arg-type]


def use_copies(optimizer: Optimizer) -> None:
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        steps(params_of(copied), copied, 3)


def use_scheduler(optimizer: Optimizer) -> None:
    scheduler = LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    steps(params_of(optimizer), optimizer, 3)
    scheduler.step()


def use_without(optimizer: Optimizer) -> None:
    if (pats := attached_to(optimizer)) is not None:
        pats.remove()
    steps(params_of(optimizer), optimizer, 3)


USES = [use, use_state_dict, use_bad_state_dict, use_closure, use_copies, use_scheduler, use_without]


@pytest.mark.filterwarnings("ignore:PATS")
@pytest.mark.parametrize("used", USES)
@pytest.mark.parametrize("kind", MAKERS)
def test_all_is_freed_with_its_last_reference(
    no_collector: None, kind: str, used: Callable[[Optimizer], None]
) -> None:
    params = parameters()
    optimizer = MAKERS[kind](params)
    steps(params, optimizer, 1, 2)
    tensors = [
        t for states in (optimizer.state, state_of(optimizer)) for s in states.values() for t in s.values()
    ]
    used(optimizer)
    tensors += [t for s in optimizer.state.values() for t in s.values()]
    alive = [
        weakref.ref(t) for t in [*params, *tensors, optimizer] if not isinstance(t, (int, float, type(None)))
    ]
    del params, tensors, optimizer
    assert not [reference() for reference in alive if reference() is not None]


@pytest.mark.filterwarnings("ignore:PATS")
def test_only_the_optimizer_is_kept(no_collector: None) -> None:
    """PATS(optimizer) may be a statement: nobody keeps its result, and the steps have noise all the same."""
    params, others = parameters(), parameters()
    optimizer, other = AdamW(params), AdamW(others)
    PATS(optimizer, **SETTINGS)
    pats = PATS(other, **SETTINGS)
    steps(params, optimizer, 1, 2, 3)
    steps(others, other, 1, 2, 3)
    assert_same_bits([p.data for p in params], [p.data for p in others])
    found = attached_to(optimizer)
    assert found is not None
    assert found is attached_to(optimizer)
    assert found.optimizer is optimizer
    assert float(found.state[params[0]]["step"]) == 3.0
    assert attached_to(other) is pats
    found.remove()
    assert attached_to(optimizer) is None


def test_only_pats_is_kept(no_collector: None) -> None:
    params = parameters()
    pats = PATS(AdamW(params), **SETTINGS)
    steps(params, pats.optimizer, 1, 2)
    assert float(pats.state[params[0]]["step"]) == 2.0
    alive = weakref.ref(pats.optimizer)
    del pats
    assert alive() is None


def test_what_a_user_sets_on_pats_is_followed() -> None:
    params = parameters()
    pats = PATS(AdamW(params), **SETTINGS)
    pats.backend = "eager"
    pats.defaults = pats.defaults | {"noise_scale": 0.0}
    steps(params, pats.optimizer, 1)
    assert pats.state == {}
    assert "backend='eager'" in repr(attached_to(pats.optimizer))


# Copies.

COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "old pickle": lambda value: pickle.loads(pickle.dumps(value, protocol=1)),
    "copy of a copy": lambda value: copy.deepcopy(pickle.loads(pickle.dumps(value))),
}


@pytest.mark.filterwarnings("ignore:PATS")
@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("kind", [*MAKERS, "bfloat16"])
def test_a_copy_continues_bit_for_bit(kind: str, copied: str) -> None:
    """Copied with the model, which has its parameters. The original can continue from what the copy saves."""
    params = parameters(torch.bfloat16 if kind == "bfloat16" else torch.float32)
    optimizer = MAKERS.get(kind, MAKERS["AdamW"])(params)
    steps(params, optimizer, 1, 2)
    others, other = COPIES[copied]((params, optimizer))
    before = [p.detach().clone() for p in params]
    assert all(map(lambda a, b: a is b, params_of(other), others))
    assert list(state_of(other)) == others
    steps(others, other, 3, 4)
    assert_same_bits([p.data for p in params], before)
    steps(params, optimizer, 3, 4)
    assert_same_bits([p.data for p in params], [p.data for p in others])
    for param, twin in zip(params, others, strict=True):
        assert_same_bits(list(state_of(optimizer)[param].values()), list(state_of(other)[twin].values()))

    optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
    steps(params, optimizer, 5)
    steps(others, other, 5)
    assert_same_bits([p.data for p in params], [p.data for p in others])


@pytest.mark.parametrize("copied", COPIES)
def test_a_copied_pats_is_that_of_its_optimizer(copied: str) -> None:
    params = parameters()
    optimizer = AdamW(params)
    pats = PATS(optimizer, **SETTINGS)
    steps(params, optimizer, 1, 2)
    for first, second in ((optimizer, pats), (pats, optimizer)):
        pair = COPIES[copied]((first, second))
        other, own = sorted(pair, key=lambda entry: isinstance(entry, PATS))
        assert own.optimizer is other
        assert attached_to(other) is own
        own.remove()
        assert attached_to(other) is None
        assert attached_to(optimizer) is pats


@pytest.mark.parametrize("copied", COPIES)
def test_copies_of_what_is_removed_have_none(copied: str) -> None:
    for kind in ("AdamW", "Hookless"):
        optimizer = MAKERS[kind](parameters())
        attached_to(optimizer).remove()  # type: ignore[union-attr]
        other = COPIES[copied](optimizer)
        assert attached_to(other) is None
        assert not {"__getstate__", "state_dict", "load_state_dict"} & vars(other).keys()


def test_copies_leave_other_hooks_where_they_are() -> None:
    """As torch's copies do. Hooks that the copy gets later do not replace PATS's."""
    optimizer = AdamW(parameters())
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("original"))
    PATS(optimizer, **SETTINGS)
    other = copy.deepcopy(optimizer)
    for _ in range(3):
        other.register_step_pre_hook(lambda *_: seen.append("copy"))
    steps(params_of(other), other, 1)
    assert seen == ["copy"] * 3
    assert attached_to(other) is not None


class WithoutDictionary(SGD):
    def __getstate__(self) -> Any:
        return None, {"defaults": self.defaults, "state": self.state, "param_groups": self.param_groups}

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state[1] if isinstance(state, tuple) else state)


def test_a_copy_that_cannot_have_it_says_so() -> None:
    optimizer = WithoutDictionary(parameters(), lr=0.1)
    PATS(optimizer, **SETTINGS)
    with pytest.warns(UserWarning, match="WithoutDictionary has a __getstate__ that returns no dictionary"):
        other = copy.deepcopy(optimizer)
    assert attached_to(other) is None


# Parameters that come and go.

PLANS = 8  # that a planner keeps, with their tensors' references


@pytest.mark.filterwarnings("ignore:PATS")
@pytest.mark.parametrize("kind", MAKERS)
def test_replaced_parameters_are_forgotten(no_collector: None, kind: str) -> None:
    """As when a model's points are split and pruned: the optimizer's state is moved to the new ones, or made
    anew."""
    optimizer = MAKERS[kind](parameters())
    gone: list[weakref.ref[Any]] = []
    for number in range(30):
        steps(params_of(optimizer), optimizer, number)
        kept, replaced = params_of(optimizer)
        gone.append(weakref.ref(replaced))
        optimizer.state.pop(replaced, None)
        optimizer.param_groups[0]["params"] = [kept, nn.Parameter(replaced.detach().clone())]
        del replaced
    steps(params_of(optimizer), optimizer, 30)
    assert list(state_of(optimizer)) == params_of(optimizer)
    counters = (optimizer if isinstance(optimizer, PATSAdamW) else attached_to(optimizer))._nonfinite  # type: ignore[union-attr]
    assert set(counters) == set(map(id, params_of(optimizer)))
    assert sum(reference() is not None for reference in gone) < PLANS
    assert float(state_of(optimizer)[params_of(optimizer)[0]]["step"]) == 31.0


@pytest.mark.filterwarnings("ignore:PATS")
def test_cleared_state_begins_anew() -> None:
    optimizer = MAKERS["PATSAdamW"](parameters())
    assert isinstance(optimizer, PATSAdamW)
    for _ in range(30):
        steps(params_of(optimizer), optimizer, 1)
        optimizer.state.clear()
    assert set(optimizer._nonfinite) == set(map(id, params_of(optimizer)))


@pytest.mark.filterwarnings("ignore:PATS")
def test_parameters_that_may_come_back_are_remembered() -> None:
    """Parameters out of their group whose state the optimizer still has, or shown to it a few at a time."""
    params = parameters()
    optimizer = AdamW(params)
    pats = PATS(optimizer, **SETTINGS)
    steps(params, optimizer, 1, 2)
    optimizer.param_groups[0]["params"] = [params[0], new := nn.Parameter(torch.ones(3))]
    steps([params[0], new], optimizer, 3)
    assert float(pats.state[params[1]]["step"]) == 2.0

    sgd = SGD([{"params": [param]} for param in params], lr=0.1)  # without state of its own
    pats = PATS(sgd, **SETTINGS)
    groups = sgd.param_groups
    for number in (1, 2):
        for group in groups:
            sgd.param_groups = [group]
            steps(group["params"], sgd, number)
    assert [float(pats.state[param]["step"]) for param in params] == [2.0, 2.0]


def test_a_counter_goes_with_its_parameter(no_collector: None) -> None:
    """Counters are kept by id. Once, the next parameter with the same id had the other's count."""
    optimizer = PATSAdamW(parameters(), **SETTINGS)
    first, second = params_of(optimizer)
    for param in (first, second):
        param.grad = torch.full_like(param, torch.nan)
    optimizer.step()
    key = id(first)
    assert sum(optimizer.nonfinite_counts().values()) == 42 + 5
    optimizer.state.pop(first)
    optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.ones(6, 7))
    assert key in optimizer._nonfinite
    del first, second, param
    assert key not in optimizer._nonfinite
    assert sum(optimizer.nonfinite_counts().values()) == 5

    counters, device = Counters(), torch.device("cpu")  # an id that comes back gets a new counter
    param = nn.Parameter(torch.ones(1))
    old = counter_of(counters, param, device)
    keep_only(counters, [])
    assert counter_of(counters, param, device) is not old
    del param
    assert not counters


def test_counters_are_where_the_state_is() -> None:
    """After a model and its state have moved, the count is not lost. "meta" is the other device."""
    params = parameters()
    counters = Counters()
    state = {params[1]: {"step": torch.zeros(())}}
    count = counter_of(counters, params[1], torch.device("cpu"))
    count += 3
    assert not have_moved(counters, params, state)
    assert counter_of(counters, params[1], torch.device("cpu")) is count
    state[params[1]]["step"] = torch.zeros((), device="meta")
    assert have_moved(counters, params, state)
    assert counter_of(counters, params[1], torch.device("meta")).is_meta
    assert not have_moved(counters, params, state)
    counters[id(params[1])] = torch.tensor(4, device="meta")
    keep_only(counters, [params[0]])
    assert not counters
