"""State dictionaries with errors in them: refused by name without a trace, or loaded and stepped from.

A few hundred in each run of the tests; PATS_FUZZ=N has N for each kind, of other seeds.
"""

import copy
import os
from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from harness import assert_same_bits
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from pats_kernels import PATS, PATSAdamW
from pats_kernels.hyperparameters import Hyperparameters, defaults_of

LONG = os.environ.get("PATS_FUZZ")
MUTATIONS = int(LONG or 150)
SHAPES = [(2, 3), (5,), ()]
SETTINGS: dict[str, Any] = {"noise_scale": 1e-3, "gamma": 0.5, "seed": 3}


class Run(NamedTuple):
    params: list[nn.Parameter]
    optimizer: Optimizer
    pats: Any  # what keeps the state of PATS

    def steps(self, *numbers: int) -> "Run":
        for number in numbers:
            random = torch.Generator().manual_seed(number)
            for param in self.params:
                param.grad = torch.randn(param.shape, generator=random)
            self.optimizer.step()
        return self

    def everything(self) -> tuple[list[Tensor], str]:
        """All tensors, copied, and all else as text."""
        states = [self.optimizer.state, *([] if self.pats is self.optimizer else [self.pats.state])]
        tensors = [t for state in states for p in self.params for _, t in sorted(state[p].items())]
        groups = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
        text = [groups, self.pats.defaults, [[sorted(state[p]) for p in self.params] for state in states]]
        return [t.detach().clone() for t in [*self.params, *tensors]], repr(text)


def run(kind: str) -> Run:
    """Two groups, three named parameters, two steps."""
    random = torch.Generator().manual_seed(5)
    params = [nn.Parameter(torch.randn(shape, generator=random)) for shape in SHAPES]
    named = list(zip(("first", "second", "third"), params, strict=True))
    groups = [{"params": named[:2], "weight_decay": 0.1}, {"params": named[2:], "noise_scale": 1e-2}]
    if kind == "PATSAdamW":
        optimizer: Any = PATSAdamW(groups, lr=1e-2, **SETTINGS)
        return Run(params, optimizer, optimizer).steps(1, 2)
    optimizer = AdamW(groups, lr=1e-2)
    return Run(params, optimizer, PATS(optimizer, **SETTINGS)).steps(1, 2)


# By kind: what loads a dictionary, and which part of it is this package's own to check.
KINDS: dict[str, tuple[Callable[[Run], Any], Callable[[Run], dict[str, Any]]]] = {
    "PATSAdamW": (lambda r: r.optimizer.load_state_dict, lambda r: r.optimizer.state_dict()),
    "PATS": (lambda r: r.pats.load_state_dict, lambda r: r.pats.state_dict()),
    "its optimizer": (lambda r: r.optimizer.load_state_dict, lambda r: r.optimizer.state_dict()),
}


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) below a value."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    own = [(value, key) for key in keys]
    return own + [place for key in keys for place in places(value[key])]


def junk(random: Random, container: Any) -> Any:
    """Anything, but for a learning rate or weight decay that would rightly make weights infinite."""
    numbers = [-1, 0, 0.5, 1, 2, 2.5, torch.nan, torch.inf, -torch.inf, True, 1j]
    others = [None, "x", "1", b"x", [], [1, 2], (0.5, 0.5), {}, {"a": 1}, object(), int]
    large = [] if isinstance(container, dict) and "lr" in container else [2**32, 2**70]
    arrays = [np.zeros(2), np.float32(0.5), np.int64(3), torch.zeros(()), torch.ones(2), torch.zeros(0)]
    return random.choice([*numbers, *others, *large, *arrays])


def changed(random: Random, tensor: Tensor) -> Any:
    """A tensor of another dtype, shape, layout or device, or with another value somewhere."""
    dtypes = [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.cfloat]
    forms: list[Callable[[], Any]] = [
        lambda: tensor.to(random.choice(dtypes)),
        lambda: tensor.flatten(),
        lambda: tensor.unsqueeze(random.choice([0, -1])),
        lambda: tensor.new_zeros(()).expand(tensor.shape),
        lambda: tensor.to_sparse(),
        lambda: tensor.to("meta"),
        lambda: tensor.mT if tensor.dim() > 1 else tensor.tolist(),
        lambda: tensor.clone().requires_grad_(),
        lambda: tensor.numpy(),
        lambda: torch.zeros_like(tensor),
    ]
    values = [torch.nan, torch.inf, -torch.inf, -1.0, -1e-40, 0.0, 1e-40, 1e30, 0.5, 2.0**24 + 1, 2.0**32]

    def poked() -> Tensor:
        one = tensor.clone()
        if one.numel() > 0 and one.layout is torch.strided:
            one.reshape(-1)[random.randrange(one.numel())] = random.choice(values)
        return one

    return random.choice([*forms, *[poked] * len(forms)])()


def mutate(random: Random, kind: str, state_dict: dict[str, Any]) -> None:
    """One to three errors, anywhere in what this package checks."""
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        if kind == "its optimizer":  # the rest is torch's own to check
            part = random.choice([state_dict["pats"], *state_dict["param_groups"]])
            if not isinstance(part, dict) or "lr" in part:
                names = [*defaults_of(Hyperparameters), "tensor_id", "param_names"]
                if isinstance(part, dict):
                    part[random.choice(names)] = junk(random, part)
                continue
        else:
            part = state_dict
        found = places(part)
        if not found:
            continue
        container, key = random.choice(found)
        value = container[key]
        action = random.choice(
            ["junk", "junk", "change", "change", "change", "delete", "rename", "swap", "add"]
        )
        if action == "delete":
            del container[key]
        elif action == "rename" and isinstance(container, dict):
            new = random.choice([str(key), 0, 1, 7, -1, None, "exp_avg", "step", "noise_scale"])
            container[new] = container.pop(key)
        elif action == "swap":
            other, its = random.choice(found)
            container[key], other[its] = other[its], value
        elif action == "add" and isinstance(container, dict):
            names = ["noise_scale", "betas", "amsgrad", "capturable", "tensor_id", "sens_stats", 0, 2, 9]
            container[random.choice(names)] = junk(random, container)
        elif action == "change" and isinstance(value, Tensor):
            container[key] = changed(random, value)
        else:
            container[key] = junk(random, container)


def moments(loaded: Run) -> list[Tensor]:
    return [e[k] for e in loaded.optimizer.state.values() if isinstance(e, dict) for k in e if k in MOMENTS]


MOMENTS = ("exp_avg", "exp_avg_sq")
NAMED = ("first", "second", "third", "state", "param", "defaults", "version", "Invalid", "pats")


def refusal(function: Callable[..., Any], *args: Any) -> Exception | None:
    try:
        function(*args)
    except Exception as error:
        return error
    return None


def assert_same(found: Run, expected: tuple[list[Tensor], str], where: str) -> None:
    tensors, text = found.everything()
    assert_same_bits(tensors, expected[0])
    assert text == expected[1], where


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_mutated_state_dicts(kind: str) -> None:
    load, part = KINDS[kind]
    before, after = run(kind).everything(), run(kind).steps(3, 4, 5).everything()
    clean = copy.deepcopy(part(run(kind)))
    outcomes = [0, 0]
    for number in range(MUTATIONS):
        random = Random(f"{kind}, {number}, {'long' if LONG else ''}")
        state_dict, victim = copy.deepcopy(clean), run(kind)
        mutate(random, kind, state_dict)
        where = f"{kind}, mutation {number}"
        refused = refusal(load(victim), state_dict)
        outcomes[refused is None] += 1
        if refused is not None:
            assert isinstance(refused, (ValueError, TypeError)), f"{where}: {refused!r}"
            assert any(name in str(refused) for name in NAMED), f"{where}: {refused!r}"
            assert_same(victim, before, where)
            assert_same(victim.steps(3, 4, 5), after, where)
            continue
        # As torch's AdamW, which has such moments after a gradient that is not finite.
        finite = all(bool(t.isfinite().all()) for t in moments(victim))
        refused = refusal(victim.steps, 3, 4, 5)
        assert refused is None, f"{where}: {refused!r} at a step after it was loaded"
        assert not finite or all(bool(t.isfinite().all()) for t in victim.everything()[0]), where
    assert min(outcomes) > MUTATIONS / 20, f"{outcomes} refused and loaded: the mutations prove little"
