"""What PATS can be attached to, what it refuses by name, and how its state is loaded."""

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from harness import same_bits
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from pats_kernels import PATS, PATSAdamW
from pats_kernels.optim import attached_to

pytestmark = pytest.mark.usefixtures("quick_gc")

SETTINGS: dict[str, Any] = {"noise_scale": 1e-2, "gamma": 0.5, "seed": 3}


class Hookless(AdamW):
    """Like bitsandbytes' optimizers: its own code saves and loads the state, and runs no hooks."""

    def state_dict(self) -> dict[str, Any]:
        params = [param for group in self.param_groups for param in group["params"]]
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        return {
            "state": {i: dict(self.state[p]) for i, p in enumerate(params) if p in self.state},
            "param_groups": [group | {"params": list(range(len(params)))} for group in groups],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        params = [param for group in self.param_groups for param in group["params"]]
        for i, entry in state_dict["state"].items():
            if entry["exp_avg"].shape != params[i].shape:
                raise ValueError("another shape")
            self.state[params[i]] = copy.deepcopy(entry)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({k: v for k, v in saved.items() if k != "params"})


class OnlyLoads(AdamW):
    """Replaces the dictionary, and leaves the rest, hooks included, to torch."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(dict(state_dict))


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    random = torch.Generator().manual_seed(2)
    return [nn.Parameter(torch.randn(shape, generator=random).to(dtype)) for shape in ((6, 7), (5,))]


def steps(params: list[nn.Parameter], optimizer: Any, *numbers: int) -> None:
    for number in numbers:
        random = torch.Generator().manual_seed(number)
        for param in params:
            param.grad = torch.randn(param.shape, generator=random).to(param.dtype)
        optimizer.step()


@pytest.mark.parametrize("kind", [AdamW, Hookless, OnlyLoads])
def test_a_run_resumes_whatever_loads_the_optimizer(kind: type[AdamW]) -> None:
    params = parameters()
    optimizer = kind(params, lr=1e-2)
    pats = PATS(optimizer, **SETTINGS)
    steps(params, optimizer, 1, 2, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    middle = [param.detach().clone() for param in params]
    steps(params, optimizer, 4, 5, 6)

    resumed = [nn.Parameter(weights) for weights in middle]
    other = kind(resumed, lr=1.0)
    own = PATS(other, noise_scale=1.0)  # what is loaded replaces it
    other.load_state_dict(saved)
    steps(resumed, other, 4, 5, 6)
    for param, twin in zip(params, resumed, strict=True):
        assert torch.equal(param, twin)
        for key in ("exp_avg_sens", "exp_avg_unc", "sens_stats", "step"):
            assert same_bits(pats.state[param][key], own.state[twin][key])


def test_a_checkpoint_that_the_optimizer_s_own_version_refuses() -> None:
    params = parameters()
    optimizer = Hookless(params)
    pats = PATS(optimizer, **SETTINGS)
    steps(params, optimizer, 1)
    bad = copy.deepcopy(optimizer.state_dict())
    bad["state"][0]["exp_avg"] = torch.zeros(3)
    before = {key: value.clone() for key, value in pats.state[params[0]].items()}
    with pytest.raises(ValueError, match="another shape"):
        optimizer.load_state_dict(bad)
    assert all(torch.equal(pats.state[params[0]][key], value) for key, value in before.items())
    bad = copy.deepcopy(optimizer.state_dict())
    bad["pats"]["state"][0]["exp_avg_sens"] = torch.zeros(3)
    moments = optimizer.state[params[0]]["exp_avg"]
    with pytest.raises(ValueError, match=r"shape mismatch: exp_avg_sens"):
        optimizer.load_state_dict(bad)
    assert optimizer.state[params[0]]["exp_avg"] is moments


def test_remove_gives_the_optimizer_its_own_methods_back() -> None:
    params = parameters()
    optimizer = Hookless(params)
    pats = PATS(optimizer, **SETTINGS)
    steps(params, optimizer, 1)
    pats.remove()
    assert not {"state_dict", "load_state_dict"} & vars(optimizer).keys()
    assert "pats" not in optimizer.state_dict()
    assert attached_to(optimizer) is None
    again = PATS(optimizer, **SETTINGS | {"seed": 4})
    steps(params, optimizer, 2)
    assert attached_to(optimizer) is again
    assert float(again.state[params[0]]["step"]) == 1.0
    assert float(pats.state[params[0]]["step"]) == 1.0


def test_twice_is_refused() -> None:
    optimizer = SGD(parameters(), lr=0.1)
    first = PATS(optimizer)
    with pytest.raises(ValueError, match="SGD that has a PATS already"):
        PATS(optimizer)
    assert attached_to(optimizer) is first
    assert len(optimizer._optimizer_step_pre_hooks) == 1


def test_beside_patsadamw_is_refused() -> None:
    class Mine(PATSAdamW):
        pass

    for kind in (PATSAdamW, Mine):
        with pytest.raises(ValueError, match=f"is a {kind.__name__}, which adds the noise itself"):
            PATS(kind(parameters()))


def test_accelerate_s_wrapper_is_taken_off() -> None:
    params, plain = parameters(), parameters()
    wrapped = Accelerator(cpu=True).prepare(AdamW(params))
    pats = PATS(wrapped, **SETTINGS)
    assert pats.optimizer is wrapped.optimizer
    assert attached_to(wrapped) is pats
    with pytest.raises(ValueError, match="has a PATS already"):
        PATS(wrapped.optimizer)
    optimizer = AdamW(plain)
    PATS(optimizer, **SETTINGS)
    steps(params, wrapped, 1, 2)
    steps(plain, optimizer, 1, 2)
    assert all(map(torch.equal, params, plain))


class Lookahead:
    """As in most repositories: not a torch.optim.Optimizer, and its step calls one."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups


class SAM(Optimizer):
    """Sharpness-aware minimization as in most repositories: it restores the old weights and so undoes the
    noise."""

    def __init__(self, params: Any, base: type[Optimizer], **kwargs: Any) -> None:
        super().__init__(params, kwargs)
        self.base_optimizer = base(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups

    def first_step(self) -> None: ...

    def second_step(self) -> None: ...


class Uninitialized(Optimizer):
    def __init__(self, inner: Optimizer) -> None:
        self.inner = inner


@pytest.mark.parametrize(
    ("wrapper", "error", "attribute"),
    [
        (lambda params: Lookahead(SGD(params, lr=0.1)), TypeError, "'optimizer'"),
        (lambda params: SAM(params, SGD, lr=0.1), ValueError, "'base_optimizer'"),
        (lambda params: Uninitialized(SGD(params, lr=0.1)), TypeError, "'inner'"),
    ],
)
def test_wrappers_are_refused_and_what_they_wrap_is_named(wrapper: Any, error: Any, attribute: str) -> None:
    with pytest.raises(error, match=f"attach PATS to the optimizer that steps, its attribute {attribute}"):
        PATS(wrapper(parameters()))


class WithGamma(SGD):
    """AdaBound and MARS have a `gamma` that is not a gate's."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.defaults["gamma"] = 0.025
        self.param_groups[0]["gamma"] = 0.025


def test_a_key_with_two_meanings_is_refused() -> None:
    with pytest.raises(ValueError, match="WithGamma, whose param groups have a 'gamma' of their own"):
        PATS(WithGamma(parameters()))
    groups = [{"params": parameters(), "gamma": 0.025}]  # this one was meant for PATS
    PATS(SGD(groups, lr=0.1))


class Counting(SGD):
    """MADGRAD keeps a count beside the parameters' state."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1, momentum=0.9)
        self.state["k"] = torch.zeros(1)  # type: ignore[index]

    def step(self, closure: Any = None) -> Any:
        self.state["k"] += 1  # type: ignore[index]
        return super().step(closure)


def test_state_of_the_optimizer_as_a_whole() -> None:
    params, other = parameters(), parameters()
    optimizer, resumed = Counting(params), Counting(other)
    for one in (optimizer, resumed):
        PATS(one, **SETTINGS)
    steps(params, optimizer, 1, 2)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.state["k"] == 2  # type: ignore[index]
    with torch.no_grad():
        for p, q in zip(params, other, strict=True):
            q.copy_(p)
    steps(params, optimizer, 3)
    steps(other, resumed, 3)
    assert all(map(same_bits, params, other))


class WithMasters(SGD):
    """Keeps float32 copies of its parameters, in its state or in a list in each group."""

    in_state = True

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        params = [param for group in self.param_groups for param in group["params"]]
        if not hasattr(self, "masters"):
            self.masters: list[list[Tensor]] = [[param.float().clone() for param in params]]
            if self.in_state:
                for param, master in zip(params, self.masters[0], strict=True):
                    self.state[param]["master"] = master
                self.lists, self.masters = tuple(self.masters[0]), []
        for param, master in zip(params, self.lists if self.in_state else self.masters[0], strict=True):
            master -= 0.1 * param.grad.float()
            param.copy_(master)


@pytest.mark.parametrize("in_state", [True, False])
def test_float32_copies_are_refused_before_they_undo_any_noise(in_state: bool) -> None:
    params = parameters(torch.bfloat16)
    optimizer = WithMasters(params)
    optimizer.in_state = in_state
    PATS(optimizer, **SETTINGS)
    steps(params, optimizer, 1)  # whose noise is 0: there are no means yet
    before = [param.detach().clone() for param in params]
    with pytest.raises(
        ValueError, match=r"param_groups\[0\]\['params'\]\[0\]: WithMasters keeps a float32 copy"
    ):
        steps(params, optimizer, 2)
    assert all(map(torch.equal, params, before))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_other_float32_state_is_no_copy(momentum: float) -> None:
    params = parameters(torch.bfloat16)
    optimizer = SGD(params, lr=0.1, momentum=momentum)
    optimizer.lists = [[torch.ones(param.shape) for param in params]]  # type: ignore[attr-defined]
    for param in params:
        optimizer.state[param]["extra"] = torch.zeros(param.shape)
    pats = PATS(optimizer, **SETTINGS)
    steps(params, optimizer, 1, 2, 3, 4)
    assert float(pats.state[params[0]]["step"]) == 4.0


def test_removed_from_a_dead_optimizer() -> None:
    """After PATS has been removed, nothing in this module keeps the optimizer alive."""
    optimizer = SGD(parameters(), lr=0.1)
    alive = weakref.ref(optimizer)
    pats = PATS(optimizer)
    pats.remove()
    del optimizer, pats
    gc.collect()
    assert alive() is None
