"""State dictionaries with errors: refused by name without side effects, or loaded and used.

After a refusal, the next steps are those of a run that never tried to load. What is accepted is loaded into
the three runs of machine.py, which then continue in lockstep. Each run of the tests tries a few hundred;
`make fuzz` tries more, with other seeds each time.
"""

import copy
from collections import OrderedDict, UserDict
from collections.abc import Callable
from random import Random, SystemRandom
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
import torch
from conftest import FUZZ, KERNEL
from harness import assert_same_bits
from machine import Gradients, Lockstep
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

import pats_kernels.adamw
import pats_kernels.optim
from pats_kernels import PATS, PATSAdamW
from pats_kernels.hyperparameters import Hyperparameters, defaults_of

MUTATIONS = FUZZ or 60
SEED = SystemRandom().randrange(2**32) if FUZZ else 0
DTYPES = [torch.float32, torch.float32, torch.bfloat16, torch.float64]
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
                param.grad = torch.randn(param.shape, generator=random).to(param.dtype)
            self.optimizer.step()
        return self

    def everything(self) -> tuple[list[Tensor], str]:
        """Copies of all tensors, and all else as text."""
        states = [self.optimizer.state, *([] if self.pats is self.optimizer else [self.pats.state])]
        tensors = [t for state in states for p in self.params for _, t in sorted(state[p].items())]
        groups = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
        text = [groups, self.pats.defaults, [[sorted(state[p]) for p in self.params] for state in states]]
        return [t.detach().clone() for t in [*self.params, *tensors]], repr(text)


def run(form: str, dtype: torch.dtype = torch.float32) -> Run:
    """Two groups, three named parameters, two steps."""
    random = torch.Generator().manual_seed(5)
    params = [nn.Parameter(torch.randn(shape, generator=random).to(dtype)) for shape in SHAPES]
    named = list(zip(("first", "second", "third"), params, strict=True))
    groups = [{"params": named[:2], "weight_decay": 0.1}, {"params": named[2:], "noise_scale": 1e-2}]
    settings = SETTINGS | {"backend": KERNEL}
    if form == "PATSAdamW":
        optimizer: Any = PATSAdamW(groups, lr=1e-2, **settings)
        return Run(params, optimizer, optimizer).steps(1, 2)
    optimizer = AdamW(groups, lr=1e-2)
    return Run(params, optimizer, PATS(optimizer, **settings)).steps(1, 2)


def of_optimizer(run: Run) -> dict[str, Any]:
    return run.optimizer.state_dict()


def of_pats(run: Run) -> dict[str, Any]:
    return run.pats.state_dict()


def of_processes(run: Run) -> dict[str, Any]:
    """The state dictionary with several processes, for torch.distributed.checkpoint: only its entries."""
    with (
        patch.object(pats_kernels.optim, "is_distributed", lambda: True),
        patch.object(pats_kernels.adamw, "is_distributed", lambda: True),
    ):
        state_dict = run.optimizer.state_dict()
    return {key: state_dict[key] for key in ("state", "param_groups")}


def of_torch(run: Run) -> dict[str, Any]:
    """The state dictionary that AdamW would have saved."""
    state_dict = run.optimizer.state_dict()
    own = ("step", "exp_avg", "exp_avg_sq")
    names = defaults_of(Hyperparameters).keys() | {"sensitivity"}
    groups = [{k: v for k, v in group.items() if k not in names} for group in state_dict["param_groups"]]
    state = {i: {k: entry[k] for k in own} for i, entry in state_dict["state"].items()}
    return {"state": state, "param_groups": groups}


class Kind(NamedTuple):
    """A form of an optimizer, what it saves, and whether this package checks all of that itself."""

    form: str
    saves: Callable[[Run], dict[str, Any]]
    all_: bool = True

    def load(self, run: Run) -> Callable[[Any], Any]:
        return run.pats.load_state_dict if self.saves is of_pats else run.optimizer.load_state_dict


KINDS = {
    "PATSAdamW": Kind("PATSAdamW", of_optimizer),
    "PATSAdamW of processes": Kind("PATSAdamW", of_processes),
    "AdamW's, by PATSAdamW": Kind("PATSAdamW", of_torch),
    "PATS": Kind("AdamW", of_pats),
    "its optimizer": Kind("AdamW", of_optimizer, all_=False),
    "its optimizer of processes": Kind("AdamW", of_processes, all_=False),
}


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) below a value."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    own = [(value, key) for key in keys]
    return own + [place for key in keys for place in places(value[key])]


def wrapped(random: Random, value: Any) -> Any:
    """The same one level deeper, or in a container of another kind."""
    forms: list[Callable[[Any], Any]] = [
        lambda v: [v],
        lambda v: (v,),
        lambda v: {"params": v},
        lambda v: {0: v},
    ]
    if isinstance(value, dict):
        forms += [OrderedDict, UserDict, list, lambda v: list(v.items())] * 2
    if isinstance(value, list):
        forms += [tuple, set, lambda v: dict(enumerate(v)), lambda v: v * 2] * 2
    try:
        return random.choice(forms)(value)
    except TypeError:  # a set of unhashable objects
        return [value]


def junk(random: Random, container: Any) -> Any:
    """Anything, except a learning rate or weight decay that would rightly make weights infinite."""
    numbers = [-1, 0, 0.5, 1, 2, 2.5, torch.nan, torch.inf, -torch.inf, True, 1j]
    others = [None, "x", "1", b"x", [], [1, 2], (0.5, 0.5), {}, {"a": 1}, ..., int]
    large = [] if isinstance(container, dict) and "lr" in container else [2**32, 2**70]
    arrays = [np.zeros(2), np.float32(0.5), np.int64(3), torch.zeros(()), torch.ones(2), torch.zeros(0)]
    return random.choice([*numbers, *others, *large, *arrays])


def changed(random: Random, tensor: Tensor) -> Any:
    """A tensor with another dtype, shape, layout or device, or with another value somewhere."""
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
        lambda: tensor.float().numpy(),
        lambda: torch.zeros_like(tensor),
    ]
    values = [torch.nan, torch.inf, -torch.inf, -1.0, -1e-40, 0.0, 1e-40, 1e30, 0.5, 2.0**24 + 1, 2.0**32]

    def poked() -> Tensor:
        one = tensor.detach().clone()
        if one.numel() > 0 and one.layout is torch.strided:
            one.reshape(-1)[random.randrange(one.numel())] = random.choice(values)
        return one

    return random.choice([*forms, *[poked] * len(forms)])()


def mutate(random: Random, kind: Kind, state_dict: dict[str, Any]) -> None:
    """Makes one to three errors anywhere in what this package checks."""
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        part: Any = state_dict
        if not kind.all_:  # torch checks the rest
            groups, entries = state_dict["param_groups"], state_dict["state"]
            part = random.choice([*groups, *entries.values(), *[state_dict.get("pats", groups)] * 4])
            if isinstance(part, list):
                part = random.choice(part)
            if isinstance(part, dict) and part is not state_dict.get("pats"):
                mutate_own(random, part)
                continue
        found = places(part)
        if not found:
            continue
        container, key = random.choice(found)
        value = container[key]
        action = random.choice(ACTIONS)
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
        elif action == "wrap":
            container[key] = wrapped(random, value)
        elif action == "change" and isinstance(value, Tensor):
            container[key] = changed(random, value)
        else:
            container[key] = junk(random, container)


ACTIONS = ["junk", "junk", "change", "change", "change", "delete", "rename", "swap", "add", "wrap"]


def mutate_own(random: Random, part: dict[str, Any]) -> None:
    """Makes errors in PATS's part of its optimizer's data: keys of a param group, or of a parameter's
    entry."""
    if "params" in part:
        names = [*defaults_of(Hyperparameters), "tensor_id", "param_names", *["pats"] * 4]
    else:
        names = [*(name for name in part if str(name).startswith("pats_")), "pats_step", "pats_tensor_id"]
    name = random.choice(names)
    value = part.get(name)
    if isinstance(value, dict) and value and random.random() < 0.7:
        part, name = value, random.choice(list(value))
        value = part[name]
    if isinstance(value, Tensor) and random.random() < 0.7:
        part[name] = changed(random, value)
    elif value is not None and random.random() < 0.3:
        part[name] = wrapped(random, value)
    elif value is not None and random.random() < 0.2:
        del part[name]
    else:
        part[name] = junk(random, part)


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


def in_lockstep(form: str, runs: list[Run]) -> Lockstep:
    lockstep = Lockstep(form, KERNEL, SETTINGS)
    for own, loaded in zip(lockstep.runs, runs, strict=True):
        own.model, own.optimizer = nn.ParameterList(loaded.params), loaded.optimizer
    return lockstep


def is_ordinary(lockstep: Lockstep) -> bool:
    """Whether float32 neither overflows nor underflows, and still counts each step; the oracle models
    neither."""
    tensors = {name: tensor for name, tensor in lockstep.first.tensors().items() if " own " not in name}
    if any(bool((t != 0).logical_and((t.abs() < 1e-12) | ~(t.abs() < 1e12)).any()) for t in tensors.values()):
        return False
    return all(float(t) < 2**24 - 4 for name, t in tensors.items() if name.endswith(" step"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KINDS)
def test_mutated_state_dicts(name: str) -> None:
    kind = KINDS[name]
    outcomes = [0, 0]
    clean: dict[torch.dtype, Any] = {}
    for dtype in DTYPES:
        before, after = run(kind.form, dtype).everything(), run(kind.form, dtype).steps(3, 4, 5).everything()
        clean[dtype] = copy.deepcopy(kind.saves(run(kind.form, dtype))), before, after
    for number in range(MUTATIONS):
        random = Random(f"{name}, {number}, {SEED}")
        dtype = random.choice(DTYPES)
        saved, before, after = clean[dtype]
        state_dict, victim = copy.deepcopy(saved), run(kind.form, dtype)
        mutate(random, kind, state_dict)
        where = f"{name}, mutation {number} of seed {SEED}"
        refused = refusal(kind.load(victim), copy.deepcopy(state_dict))
        outcomes[refused is None] += 1
        if refused is not None:
            assert isinstance(refused, (ValueError, TypeError)), f"{where}: {refused!r}"
            assert any(part in str(refused) for part in NAMED), f"{where}: {refused!r}"
            assert_same(victim, before, where)
            assert_same(victim.steps(3, 4, 5), after, where)
            continue
        others = [run(kind.form, dtype) for _ in range(2)]
        for other in others:
            kind.load(other)(copy.deepcopy(state_dict))  # torch's own counts of steps are not copied
        others[1].pats.backend = "eager"
        # As torch's AdamW, which has such moments after a gradient that is not finite.
        finite = all(bool(t.isfinite().all()) for t in moments(victim))
        try:
            go_on(in_lockstep(kind.form, [victim, *others]))
        except Exception as error:
            raise AssertionError(f"{where}: {error!r} at a step after it was loaded") from error
        assert not finite or all(bool(t.isfinite().all()) for t in victim.everything()[0]), where
    assert min(outcomes) > MUTATIONS / 20, f"{outcomes} refused and loaded: the mutations prove little"
    if FUZZ:
        print(f"\n{name}: {outcomes} state dictionaries refused and loaded, of seed {SEED}")


def go_on(lockstep: Lockstep) -> None:
    try:
        lockstep.assert_alike("loaded")
        for number in (3, 4, 5):
            lockstep.bounded = is_ordinary(lockstep)
            lockstep.step(Gradients(number))
    finally:
        lockstep.end()
