"""Input that the functional API and `PATS` must refuse or skip: the contract's table, row by row."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from bad_input import BAD_HYPERPARAMETERS, assert_names
from harness import Case, assert_same_bits, gradients, prepare, same_bits
from torch import Tensor, nn

import pats_kernels
from pats_kernels import PATS, available_backends, pats_step_, reference

Lists = dict[str, Any]


def arguments(backend: str = "eager") -> Lists:
    """Three tensors before their fourth step; a test spoils the second."""
    case = Case([(6,), (3, 4), (5,)])
    work = prepare(case)
    lists = {
        "params": work.params,
        "grads": gradients(case, 1),
        "exp_avg_sens": work.sens,
        "exp_avg_unc": work.unc,
        "sens_stats": work.stats,
        "tensor_ids": [0, 1, 2],
    }
    for number in range(1, 4):
        pats_step_(**lists, step=number, backend=backend)
    return lists | {"step": 4, "backend": backend}


def tensors_of(lists: Lists) -> Iterator[Tensor]:
    for value in lists.values():
        if isinstance(value, list):
            yield from (t for t in value if isinstance(t, Tensor))


def bits(tensor: Tensor) -> Tensor:
    """A copy of everything to compare. What is not dense and on the CPU cannot have changed."""
    if tensor.layout is not torch.strided or tensor.device.type == "meta":
        return torch.zeros(0)
    return tensor.detach().contiguous().clone()


def refused(lists: Lists, error: type[Exception], *parts: object) -> None:
    """The call raises, the message has all of `parts`, and no tensor changes by a bit."""
    before = [bits(t) for t in tensors_of(lists)]
    with pytest.raises(error) as raised:
        pats_step_(**lists)
    assert type(raised.value) is error
    assert_names(raised, *parts)
    assert_same_bits([bits(t) for t in tensors_of(lists)], before)


def test_signature_is_the_reference_s() -> None:
    ours, theirs = (inspect.signature(f) for f in (pats_step_, reference.pats_step_))
    assert ours == theirs
    keywords = "step tensor_ids seed noise_scale gamma sens_betas uncertainty normalization"
    contract = f"params grads exp_avg_sens exp_avg_unc sens_stats {keywords} stochastic_rounding backend"
    assert list(ours.parameters) == contract.split()
    kinds = [parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in ours.parameters.values()]
    assert kinds == [False] * 5 + [True] * 10


def test_public_names() -> None:
    names = {"PATS", "pats_step_", "available_backends", "reference"}
    assert names <= set(pats_kernels.__all__)
    assert all(hasattr(pats_kernels, name) for name in pats_kernels.__all__)


# Row 1: hyperparameters.

FUNCTIONAL = [row for row in BAD_HYPERPARAMETERS if row[0] != "state_dtype"]


# Numbers that are not two are no pair, so they are read as one value per tensor: see OTHER_VALUES.
ONE_VALUE = [row for row in FUNCTIONAL if not (isinstance(row[1], tuple) and len(row[1]) != 2)]


@pytest.mark.parametrize(("name", "value", "limits"), ONE_VALUE)
def test_hyperparameters(name: str, value: Any, limits: str) -> None:
    refused(arguments() | {name: value}, ValueError, name, repr(value), limits)


@pytest.mark.parametrize(("name", "value", "limits"), FUNCTIONAL)
def test_the_last_tensor_s_hyperparameters(name: str, value: Any, limits: str) -> None:
    good = inspect.signature(pats_step_).parameters[name].default
    refused(arguments() | {name: [good, good, value]}, ValueError, name, repr(value), limits)


OTHER_VALUES = [
    ("step", 0, "[1, 2^32)"),
    ("step", -1, "[1, 2^32)"),
    ("step", 2**32, "[1, 2^32)"),
    ("step", [1, 2, 0], "0"),
    ("tensor_ids", [0, 1, -1], "-1"),
    ("tensor_ids", [0, 1, 2**32], "4294967296"),
    ("backend", "cudnn", "'triton', 'cuda', 'cpp', 'eager'"),
    ("tensor_ids", [0, 1], "2 values for 3"),
    ("step", [1, 2], "2 values for 3"),
    ("gamma", [1.0, 2.0], "2 values for 3"),
    ("noise_scale", [1.0] * 4, "4 values for 3"),
    ("sens_betas", [(0.5, 0.5)] * 2, "2 values for 3"),
    ("sens_betas", (0.5,), "1 values for 3"),
    ("sens_betas", (0.5, 0.5, 0.5), "[0, 1)"),
    ("uncertainty", ["ucb"] * 2, "2 values for 3"),
    ("seed", [1], "1 values for 3"),
]


@pytest.mark.parametrize(("name", "value", "says"), OTHER_VALUES)
def test_other_values(name: str, value: Any, says: str) -> None:
    refused(arguments() | {name: value}, ValueError, name, says)


@pytest.mark.parametrize("name", ["grads", "exp_avg_sens", "exp_avg_unc", "sens_stats"])
def test_lists_of_different_lengths(name: str) -> None:
    lists = arguments()
    lists[name] = lists[name][:2]
    refused(lists, ValueError, name, "2", "3")


def test_two_numbers_are_one_pair_of_betas() -> None:
    """A list, as from JSON or YAML, is not a list of one value per tensor."""
    tuple_, list_ = arguments(), arguments()
    pats_step_(**tuple_, sens_betas=(0.5, 0.25))
    pats_step_(**list_, sens_betas=[0.5, 0.25])
    assert_same_bits(list(tensors_of(tuple_)), list(tensors_of(list_)))


@pytest.mark.parametrize("name", sorted({row[0] for row in FUNCTIONAL}))
def test_one_value_per_tensor_of_no_tensors(name: str) -> None:
    """With all parameters frozen, a caller's columns are as empty as its lists."""
    pats_step_([], [], [], [], [], **({"step": 1, "tensor_ids": [], "backend": "eager"} | {name: []}))


# Rows 2 to 4: kinds, mismatches, overlaps. The second tensor is (3, 4).

Spoil = Callable[[Tensor], Tensor | None]

SPOILED: dict[str, tuple[str, Spoil, type[Exception], tuple[str, ...]]] = {
    # list, the change of its second tensor, the error, its text besides params[1]
    "sparse parameter": ("params", Tensor.to_sparse, TypeError, ("sparse", "parameter")),
    "sparse gradient": ("grads", Tensor.to_sparse, TypeError, ("sparse", "gradient")),
    "complex parameter": ("params", lambda t: t.to(torch.complex64), TypeError, ("complex64", "parameter")),
    "complex gradient": ("grads", lambda t: t.to(torch.complex64), TypeError, ("complex64", "gradient")),
    "integer parameter": ("params", lambda t: t.to(torch.int32), TypeError, ("int32", "parameter")),
    "integer gradient": ("grads", lambda t: t.to(torch.int64), TypeError, ("int64", "gradient")),
    "bool gradient": ("grads", lambda t: t > 0, TypeError, ("bool", "gradient")),
    "float8 parameter": ("params", lambda t: t.to(torch.float8_e4m3fn), TypeError, ("float8_e4m3fn",)),
    "gradient's shape": ("grads", lambda t: t[:2], ValueError, ("(3, 4)", "(2, 4)", "gradient")),
    "gradient transposed": ("grads", Tensor.t, ValueError, ("(3, 4)", "(4, 3)", "gradient")),
    "gradient's dtype": ("grads", Tensor.double, ValueError, ("float32", "float64", "gradient")),
    "gradient's device": ("grads", lambda t: t.to("meta"), ValueError, ("cpu", "meta", "gradient")),
    "S's shape": ("exp_avg_sens", lambda t: t[:, :2], ValueError, ("(3, 4)", "(3, 2)", "exp_avg_sens")),
    "S flat": ("exp_avg_sens", Tensor.flatten, ValueError, ("(3, 4)", "(12,)", "exp_avg_sens")),
    "S's dtype": ("exp_avg_sens", Tensor.half, ValueError, ("float32", "float16", "exp_avg_sens")),
    "S wider": ("exp_avg_sens", Tensor.double, ValueError, ("float32", "float64", "exp_avg_sens")),
    "S's device": ("exp_avg_sens", lambda t: t.to("meta"), ValueError, ("cpu", "meta", "exp_avg_sens")),
    "U's shape": ("exp_avg_unc", lambda t: t[:1], ValueError, ("(3, 4)", "(1, 4)", "exp_avg_unc")),
    "U's dtype": ("exp_avg_unc", Tensor.bfloat16, ValueError, ("bfloat16", "float32", "exp_avg_unc")),
    "U's device": ("exp_avg_unc", lambda t: t.to("meta"), ValueError, ("cpu", "meta", "exp_avg_unc")),
    "U missing": ("exp_avg_unc", lambda t: None, ValueError, ("product", "exp_avg_unc", "None")),
    "means' shape": ("sens_stats", lambda t: torch.zeros(3), ValueError, ("(2,)", "(3,)", "sens_stats")),
    "means' dtype": ("sens_stats", Tensor.double, ValueError, ("float32", "float64", "sens_stats")),
    "means' device": ("sens_stats", lambda t: t.to("meta"), ValueError, ("cpu", "meta", "sens_stats")),
    "expanded parameter": ("params", lambda t: t[:1].expand(3, 4), ValueError, ("overlapping memory",)),
    "expanded gradient": ("grads", lambda t: t[:, :1].expand(3, 4), ValueError, ("overlapping memory",)),
    "expanded S": ("exp_avg_sens", lambda t: t[:1].expand(3, 4), ValueError, ("overlapping memory",)),
    "expanded U": ("exp_avg_unc", lambda t: t[:1].expand(3, 4), ValueError, ("overlapping memory",)),
    "sliding parameter": (
        "params",
        lambda t: t.flatten().as_strided((3, 4), (2, 1)),
        ValueError,
        ("overlapping memory",),
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_tensors(name: str) -> None:
    column, spoil, error, parts = SPOILED[name]
    lists = arguments()
    lists[column][1] = spoil(lists[column][1])
    refused(lists, error, "params[1]", *parts)


SHARED = [
    # one list's second tensor becomes another list's first, second or third
    ("params", "params", 0),
    ("exp_avg_sens", "params", 1),
    ("exp_avg_unc", "params", 1),
    ("exp_avg_unc", "exp_avg_sens", 1),
    ("exp_avg_sens", "exp_avg_sens", 2),
    ("sens_stats", "sens_stats", 0),
]


@pytest.mark.parametrize(("column", "other", "i"), SHARED)
def test_memory_that_two_tensors_share(column: str, other: str, i: int) -> None:
    """They have the same shape, so nothing else is wrong."""
    lists = arguments()
    for name in ("params", "grads", "exp_avg_sens", "exp_avg_unc"):
        lists[name] = [torch.ones(6) for _ in range(3)]
    lists[column][1] = lists[other][i]
    refused(lists, ValueError, "params[", "overlapping memory")


def test_uncertainty_none_keeps_none() -> None:
    refused(arguments() | {"uncertainty": "none"}, ValueError, "params[0]", "exp_avg_unc", "'none'")


# Rows 7, 11: skipped; a backend that cannot run.


@pytest.mark.parametrize("how", ["empty", "no gradient", "noise_scale=0"])
def test_skipped(backend: str, how: str) -> None:
    """Nothing raises, nothing in it changes, and its neighbours are stepped as usual."""
    lists, whole = arguments(backend), arguments(backend)
    scales = [1e-5, 1e-5, 1e-5]
    if how == "empty":
        for name in ("params", "grads", "exp_avg_sens", "exp_avg_unc"):
            lists[name][1] = torch.zeros(0, 4)
    elif how == "no gradient":
        lists["grads"][1] = None
    else:
        scales[1] = 0
    columns = ("params", "exp_avg_sens", "exp_avg_unc", "sens_stats")
    before = [lists[name][1].clone() for name in columns]
    pats_step_(**lists, noise_scale=scales)
    pats_step_(**whole)
    assert_same_bits([lists[name][1] for name in columns], before)
    for i in (0, 2):
        assert_same_bits([lists[name][i] for name in columns], [whole[name][i] for name in columns])


@pytest.mark.parametrize("name", ["cuda", "triton", "cpp"])
def test_a_backend_that_cannot_run(name: str) -> None:
    """The error has available_backends' reason, and what can run. A backend that can run here steps."""
    reason = available_backends("cpu")[name]
    lists = arguments() | {"backend": name}
    if reason is None:
        pats_step_(**lists)
    else:
        refused(lists, RuntimeError, repr(name), reason, "'eager'")
        with pytest.raises(RuntimeError) as error:
            PATS(torch.optim.SGD([torch.zeros(2, requires_grad=True)]), backend=name)
        assert_names(error, repr(name), reason, "'eager'")


def test_available_backends() -> None:
    reasons = available_backends()
    assert list(reasons) == ["auto", "triton", "cuda", "cpp", "eager"]
    assert reasons["auto"] is None
    assert reasons["eager"] is None
    assert reasons["cuda"]
    assert all(reason is None or (isinstance(reason, str) and reason) for reason in reasons.values())
    assert available_backends("cpu") == available_backends(torch.device("cpu")) == reasons


def test_no_gradient_is_recorded(backend: str) -> None:
    """Parameters that require gradients are updated in place, and autograd notices the change."""
    lists = arguments(backend)
    lists["params"] = [p.requires_grad_() for p in lists["params"]]
    versions = [p._version for p in lists["params"]]
    assert pats_step_(**lists) is None
    assert all(p.is_leaf and p.grad_fn is None for p in lists["params"])
    assert all(p._version > v for p, v in zip(lists["params"], versions, strict=True))


# The same table for PATS.


def attached(**values: Any) -> tuple[nn.Linear, torch.optim.AdamW, PATS]:
    """A model before its third step."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.named_parameters())
    pats = PATS(optimizer, noise_scale=0.01, backend="eager", **values)
    for _ in range(3):
        give_gradients(model)
        optimizer.step()
    return model, optimizer, pats


def give_gradients(model: nn.Module) -> None:
    for param in model.parameters():
        param.grad = torch.randn(param.shape, dtype=param.dtype)


def all_tensors(optimizer: torch.optim.Optimizer, pats: PATS) -> list[Tensor]:
    found = [p for group in optimizer.param_groups for p in group["params"]]
    found += [p.grad for p in found if p.grad is not None]
    for states in (optimizer.state, pats.state):
        found += [t for entry in states.values() for t in entry.values() if isinstance(t, Tensor)]
    return found


def step_refused(
    optimizer: torch.optim.Optimizer, pats: PATS, error: type[Exception], *parts: object
) -> None:
    """The step raises and changes nothing. State that it has allocated is still all zeros."""
    tensors = all_tensors(optimizer, pats)
    before = [bits(t) for t in tensors]
    with pytest.raises(error) as raised:
        optimizer.step()
    assert_names(raised, *parts)
    assert_same_bits([bits(t) for t in tensors], before)
    known = {id(t) for t in tensors}
    assert not any(t.any() for t in all_tensors(optimizer, pats) if id(t) not in known)


@pytest.mark.parametrize(("name", "value", "limits"), [*BAD_HYPERPARAMETERS, ("backend", "cudnn", "'cpp'")])
def test_pats_hyperparameters(name: str, value: Any, limits: str) -> None:
    optimizer = torch.optim.SGD([torch.zeros(2, requires_grad=True)])
    with pytest.raises(ValueError, match=name) as error:
        PATS(optimizer, **{name: value})
    assert_names(error, name, repr(value), limits)
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize(("name", "value", "limits"), BAD_HYPERPARAMETERS)
def test_pats_hyperparameters_of_a_group(name: str, value: Any, limits: str) -> None:
    """Detected when PATS is attached, or later, when a schedule or a new group sets them."""
    early = torch.optim.SGD([{"params": [torch.zeros(2, requires_grad=True)], name: value}])
    with pytest.raises(ValueError, match=name) as error:
        PATS(early)
    assert_names(error, name, repr(value), limits)

    model, optimizer, pats = attached()
    give_gradients(model)
    optimizer.param_groups[0][name] = value
    step_refused(optimizer, pats, ValueError, name, repr(value), limits)
    del optimizer.param_groups[0][name]
    optimizer.add_param_group({"params": [("new", torch.zeros(2, requires_grad=True))], name: value})
    step_refused(optimizer, pats, ValueError, name, repr(value), limits)


@pytest.mark.parametrize("optimizer", [None, nn.Linear(1, 1), [torch.zeros(1)]])
def test_pats_wants_an_optimizer(optimizer: Any) -> None:
    with pytest.raises(TypeError, match="optimizer"):
        PATS(optimizer)


def sparse_gradient(model: nn.Linear, pats: PATS) -> None:
    model.weight.grad = torch.randn(3, 4).to_sparse()


def moved_parameter(model: nn.Linear, pats: PATS) -> None:
    model.weight.data = torch.randn(5, 4)
    model.weight.grad = torch.randn(5, 4)


def moved_state(model: nn.Linear, pats: PATS) -> None:
    state = pats.state[model.bias]
    state["exp_avg_sens"] = state["exp_avg_sens"].to("meta")


def expanded_parameter(model: nn.Linear, pats: PATS) -> None:
    model.weight.data = torch.randn(3, 1).expand(3, 4)


def expanded_gradient(model: nn.Linear, pats: PATS) -> None:
    model.weight.grad = torch.randn(1, 4).expand(3, 4)


def complex_parameter(model: nn.Linear, pats: PATS) -> None:
    model.weight.data = torch.randn(3, 4, dtype=torch.complex64)
    model.weight.grad = torch.randn(3, 4, dtype=torch.complex64)


PATS_SPOILED = [
    (sparse_gradient, TypeError, ("weight", "sparse", "gradient")),
    (moved_parameter, ValueError, ("weight", "exp_avg_sens", "(5, 4)", "(3, 4)")),
    (moved_state, ValueError, ("bias", "exp_avg_sens", "meta", "cpu")),
    (expanded_parameter, ValueError, ("weight", "overlapping memory")),
    (expanded_gradient, ValueError, ("weight", "overlapping memory")),
    (complex_parameter, TypeError, ("weight", "complex64", "parameter")),
]


@pytest.mark.parametrize(("spoil", "error", "parts"), PATS_SPOILED)
def test_pats_tensors(
    spoil: Callable[[nn.Linear, PATS], None], error: type[Exception], parts: tuple[str, ...]
) -> None:
    model, optimizer, pats = attached()
    give_gradients(model)
    spoil(model, pats)
    step_refused(optimizer, pats, error, *parts)


NEW = {
    "complex": torch.zeros(2, dtype=torch.complex64),
    "expanded": torch.zeros(1).expand(3),
    "float8": torch.zeros(2).to(torch.float8_e5m2),
}


@pytest.mark.parametrize("kind", NEW)
def test_pats_new_parameters(kind: str) -> None:
    """Parameters of an unsupported kind, without state yet, are refused before the others are changed."""
    model, optimizer, pats = attached()
    give_gradients(model)
    new = NEW[kind].detach().requires_grad_()
    new.grad = NEW[kind].detach()
    error = ValueError if kind == "expanded" else TypeError
    optimizer.add_param_group({"params": [("odd", new)]})
    step_refused(optimizer, pats, error, "odd")


def test_pats_integer_parameter() -> None:
    model, optimizer, pats = attached()
    give_gradients(model)
    whole = torch.zeros(2, dtype=torch.int64)
    whole.grad = torch.zeros(2, dtype=torch.int64)
    optimizer.add_param_group({"params": [("whole", whole)]})
    step_refused(optimizer, pats, TypeError, "whole", "int64")


def test_pats_names_parameters_without_names() -> None:
    first, second = (torch.ones(3, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [torch.ones(1)]}, {"params": [first, second]}])
    pats = PATS(optimizer)
    first.grad, second.grad = torch.ones(3), torch.ones(3).to_sparse()
    step_refused(optimizer, pats, TypeError, "param_groups[1]['params'][1]")


def test_pats_skips(backend: str) -> None:
    """Empty tensors, no gradient, frozen: nothing raises, and they get no state."""
    empty, none, frozen = (
        torch.zeros(0, 3, requires_grad=True),
        torch.ones(2, requires_grad=True),
        torch.ones(2),
    )
    moved = torch.ones(2, requires_grad=True)
    empty.grad, moved.grad = torch.zeros(0, 3), torch.ones(2)
    optimizer = torch.optim.SGD([empty, none, frozen, moved], lr=0.0)
    pats = PATS(optimizer, noise_scale=0.1, normalization="exact", uncertainty="none", backend=backend)
    optimizer.step()
    assert list(pats.state) == [moved]
    assert same_bits(none, torch.ones(2))
    assert same_bits(frozen, torch.ones(2))
