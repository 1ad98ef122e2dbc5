"""A torch with renamed private parts: the package imports and steps as before, or an error says why not."""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from pats_kernels import PATS, PATSAdamW, parts, private, release_gradients
from pats_kernels.compiling import REASON, uncompiled

ROOT = Path(__file__).parent.parent

# Names that the package looks up during its import. torch itself needs some later, and gets them back.
AT_IMPORT = """
import sys
import torch
from torch.optim import Optimizer, optimizer

private = [
    (Optimizer, "profile_hook_step"),
    (Optimizer, "_accelerator_graph_capture_health_check"),
    (Optimizer, "_cuda_graph_capture_health_check"),
    (optimizer, "ParamsT"),
    (torch, "_foreach_copy_"),
    (torch._C, "_current_graph_task_id"),
]
hidden = {}
if sys.argv[1] == "renamed":
    hidden = {(owner, name): vars(owner)[name] for owner, name in private if name in vars(owner)}
    assert len(hidden) >= 5
for owner, name in hidden:
    delattr(owner, name)
import pats_kernels
for (owner, name), value in hidden.items():
    setattr(owner, name, value)
"""
STEPS = """
class Calling(torch.optim.SGD):
    def step(self, closure=None):
        return super().step(closure)

torch.manual_seed(0)
torch.optim.SGD([torch.zeros(1)])  # torch's own class has hooks now
params = [torch.randn(5, requires_grad=True) for _ in range(2)]
optimizers = [pats_kernels.PATSAdamW(params[:1], noise_scale=0.1), Calling(params[1:], lr=0.1)]
pats = pats_kernels.PATS(optimizers[1], noise_scale=0.1)
for _ in range(3):
    for param, optimizer in zip(params, optimizers):
        param.grad = torch.randn(5)
        optimizer.step()
print([param.tolist() for param in params], pats.state[params[1]]["step"].item())
"""


def test_names_that_the_import_asks_for() -> None:
    """The same bits after three steps, also where a step calls its parent's, which must not make six of
    them."""
    found = []
    for names in ("as they are", "renamed"):
        command = [sys.executable, "-c", AT_IMPORT + STEPS, names]
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        result = subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True
        )
        found.append(result.stdout)
    assert found[0] == found[1]
    assert found[0].endswith(" 3.0\n")


def parameter() -> Tensor:
    param = torch.ones(4, requires_grad=True)
    param.grad = torch.ones(4)
    return param


@pytest.fixture
def without_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [name for name in private._CAPTURE_CHECKS if hasattr(Optimizer, name)]
    assert found
    for name in found:
        monkeypatch.delattr(Optimizer, name)


@pytest.mark.usefixtures("without_checks")
def test_a_capture_without_capturable(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused in torch's words, also if torch's own check has another name."""
    param = parameter()
    optimizer = PATSAdamW([param])
    optimizer.step()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    before = param.detach().clone()
    with pytest.raises(RuntimeError, match=r"graph capture of step\(\) for an instance of PATSAdamW"):
        optimizer.step()
    assert torch.equal(param, before)
    private.check_capture(PATSAdamW([param], capturable=True))


class Calling(SGD):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def test_a_parents_step_is_part_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if torch's wrapper of `step` cannot be asked for."""
    SGD([parameter()])  # the parent's class has hooks of its own now
    param = parameter()
    optimizer = Calling([param], lr=0.1)
    assert private.hooked_step(optimizer) is private._HOOKED_STEP is not None
    monkeypatch.setattr(private, "_HOOKED_STEP", None)
    assert private.hooked_step(optimizer) is not None
    pats = PATS(optimizer)
    optimizer.step()
    assert pats.state[param]["step"] == 1


@pytest.mark.parametrize("constant", ["STEP_HOOKS", "SAVE_HOOKS", "LOAD_HOOKS", "LOADED_HOOKS"])
def test_hooks_under_another_name(constant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PATS names the missing one and is not attached. What needs no hooks of PATS's still works."""
    monkeypatch.setattr(private, constant, "_hooks_of_another_torch")
    param = parameter()
    optimizer = SGD([param], lr=0.1)
    before = set(vars(optimizer))
    with pytest.raises(RuntimeError, match=r"does not keep an optimizer's hooks in _hooks_of_another_torch,"):
        PATS(optimizer)
    assert set(vars(optimizer)) == before
    optimizer = PATSAdamW([param])
    optimizer.load_state_dict(optimizer.state_dict())
    release_gradients(optimizer)
    (param * 2).sum().backward()
    assert optimizer.state[param]["step"] == 1


def test_an_optimizer_that_was_never_initialized() -> None:
    """It has no hooks either, but must not be mistaken for another torch."""
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer"):
        PATS(SGD.__new__(SGD))


def test_in_a_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[bool] = []
    param = parameter()
    param.register_post_accumulate_grad_hook(lambda _: found.append(private.in_backward()))

    def backward() -> list[bool]:
        found.clear()
        param.sum().backward()
        return [private.in_backward(), *found]

    assert backward() == [False, True]
    monkeypatch.delattr(torch._C, "_current_graph_task_id")
    assert backward() == [False, False]


@pytest.mark.parametrize("at_once", [True, False])
def test_copies(at_once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    targets, sources = ([torch.full((2,), float(i + first)) for i in range(3)] for first in (0, 5))
    if not at_once:
        monkeypatch.delattr(torch, "_foreach_copy_")
    private.copy_each_(targets, sources)
    assert all(map(torch.equal, targets, sources))


def test_a_step_is_kept_out_of_compiled_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's documented decorator, if the one that saves its import is missing."""
    importlib.import_module("torch._dynamo")  # which needs the name itself, as it is imported
    with monkeypatch.context() as patch:
        patch.delattr(torch, "_disable_dynamo")
        is_compiling = uncompiled(torch.compiler.is_compiling)
    assert is_compiling._torchdynamo_disable_msg == REASON  # type: ignore[attr-defined]
    assert torch.compile(lambda: torch.compiler.is_compiling(), backend="eager")() is True
    assert torch.compile(lambda: is_compiling(), backend="eager")() is False


def kinds_of_tensors() -> list[Tensor]:
    """A parameter, its gradient, state and a counter."""
    return [nn.Parameter(torch.ones(3, 3)), torch.ones(3, 3), torch.ones(3, 3), torch.ones(())]


# Changes of the third tensor: each reads the same bytes, or others, in another way.
OTHER_KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "strides": Tensor.t,
    "shape": Tensor.flatten,
    "size": lambda t: t[:2],
    "dtype": lambda t: t.view(torch.int32),
    "width": Tensor.double,
    "sign": torch._neg_view,  # type: ignore[attr-defined]
    "layout": Tensor.to_sparse,
    "device": lambda t: t.to("meta"),
    "class": nn.Parameter,
}


@pytest.fixture(params=["guards", "one by one"])
def guards(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """With torch's comparison, and with its replacement if that is missing."""
    if request.param == "one by one":
        monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")  # type: ignore[attr-defined]
    private._guards_tell_apart.cache_clear()
    yield request.param == "guards"
    monkeypatch.undo()
    private._guards_tell_apart.cache_clear()


@pytest.mark.parametrize("change", OTHER_KINDS)
def test_other_kinds_are_told_apart(guards: bool, change: str) -> None:
    kinds, others = private.Kinds(kinds_of_tensors()), kinds_of_tensors()
    assert (kinds._guard is not None) == guards
    assert kinds.are_of(others)
    others[2] = OTHER_KINDS[change](others[2])
    assert not kinds.are_of(others)
    assert not kinds.are_of(others[:2])


@pytest.mark.usefixtures("guards")
def test_gaps() -> None:
    """None stands for state that a tensor does not keep."""
    one, other = torch.ones(2), torch.ones(3)
    kinds = private.Kinds([one, None, other])
    assert kinds.are_of([torch.ones(2), None, torch.ones(3)])
    for wrong in ([None, one, other], [one, other, None], [one, None, one], [one, None, None], [one, other]):
        assert not kinds.are_of(wrong)
    assert not private.Kinds([one, one]).are_of([one, None])


def test_a_tensor_may_be_there_twice(guards: bool) -> None:
    """For example as the gradient of two parameters, which torch's comparison would never accept."""
    shared = torch.ones(2)
    kinds = private.Kinds([shared, shared])
    assert kinds.are_of([shared, shared])
    assert kinds.are_of([torch.ones(2), torch.ones(2)])
    assert not kinds.are_of([shared, torch.ones(3)])


def test_guards_that_let_everything_pass_are_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a torch where they mean something else."""
    careless = SimpleNamespace(check=lambda *_: True)
    monkeypatch.setattr(torch._C._dynamo.guards, "TensorGuards", lambda *_, **__: careless)  # type: ignore[attr-defined]
    private._guards_tell_apart.cache_clear()
    kinds = private.Kinds([torch.ones(2)])
    assert kinds._guard is None
    assert not kinds.are_of([torch.ones(3)])
    monkeypatch.undo()
    private._guards_tell_apart.cache_clear()
    assert private._guards_tell_apart(), "this torch's are not trusted: steps are slower, and nobody says so"


def test_the_same_kinds_are_kept_once() -> None:
    found = private.AllKinds()
    first = found.of([torch.ones(3), torch.ones(4)])
    assert found.of([torch.zeros(3), torch.zeros(4)]) is first
    other = found.of([torch.ones(4), torch.ones(3)])
    assert other is not first
    assert found.of([torch.zeros(3), torch.zeros(4)]) is first


def test_local_tensor() -> None:
    held = torch.ones(2)
    assert private.local_tensor(SimpleNamespace(_local_tensor=held, to_local=lambda: None)) is held
    assert private.local_tensor(SimpleNamespace(to_local=lambda: held)) is held
    known, unknown = SimpleNamespace(_local_tensor=held), SimpleNamespace(to_local=lambda: held)
    for tensors in ([known, known], [known, unknown]):
        assert all(tensor is held for tensor in private.local_tensors(tensors))


def test_what_says_how_tensors_are_split_is_never_the_same_where_it_is_unknown() -> None:
    spec = object()
    assert private.split_specs([SimpleNamespace(_spec=spec)]) == [spec]
    unknown = [SimpleNamespace()]
    assert private.split_specs(unknown) != private.split_specs(unknown)


class Everything:
    """A store like torch 2.14's FakeStore: it has every key, with nothing in it."""

    def check(self, keys: list[str]) -> bool:
        return True

    def get(self, key: str) -> bytes:
        return b""


def test_a_store_that_stores_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts as no store: no other process would get a message, and all would wait forever."""
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", Everything)
    assert parts._exchange() is None


def test_a_store_that_is_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.distributed.distributed_c10d, "_get_default_store")
    with pytest.warns(UserWarning, match="PATS cannot compare what the processes hold"):
        assert parts._exchange() is None


class Unknown:
    """One of FSDP1's handles, or a ZeroRedundancyOptimizer, with attributes of other names."""


@pytest.mark.parametrize(
    ("module", "name", "places"),
    [
        ("torch.distributed.fsdp._flat_param", "FlatParamHandle", parts.flat_places),
        (
            "torch.distributed.optim.zero_redundancy_optimizer",
            "ZeroRedundancyOptimizer",
            parts.zero_positions,
        ),
    ],
)
def test_places_of_which_nothing_is_known(
    module: str, name: str, places: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the module did not exist. Another warning says what is lost."""
    monkeypatch.setattr(parts.dist, "is_initialized", lambda: True)
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{name: Unknown}))
    given: list[Any] = []
    alive = Unknown()
    alive.optim = SimpleNamespace(param_groups=given)  # type: ignore[attr-defined]
    assert parts._alive(Unknown) == [alive]
    assert places(given) == {}
