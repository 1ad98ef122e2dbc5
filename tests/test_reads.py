"""What the kernels read by address: tensors that move, what their bytes mean, and interrupts."""

import copy
import gc
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from conftest import INTERPRETED
from harness import Case, Work, assert_same_bits, gradients, prepare, step
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from pats_kernels import PATS, PATSAdamW, backends
from pats_kernels.hyperparameters import AdamWHyperparameters
from pats_kernels.optim import attached_to
from pats_kernels.plan import Batch, Column, Planner
from pats_kernels.step import Launcher

# Large noise, so that it shows, and twins with the same.
pytestmark = pytest.mark.filterwarnings("ignore:PATS")
SIDE = 6


def adamw(params: list[nn.Parameter], **keywords: Any) -> Optimizer:
    return PATSAdamW([("weight", params[0]), ("other", params[1])], noise_scale=1e-2, **keywords)


def attached(params: list[nn.Parameter], **keywords: Any) -> Optimizer:
    optimizer = torch.optim.SGD([("weight", params[0]), ("other", params[1])], lr=1e-2)
    PATS(optimizer, noise_scale=1e-2, **keywords)
    return optimizer


FORMS: dict[str, Callable[..., Optimizer]] = {"PATSAdamW": adamw, "PATS": attached}


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> Callable[..., Optimizer]:
    return FORMS[request.param]


def owner_of(optimizer: Optimizer) -> Any:
    """The object that keeps the state: the optimizer, or the `PATS` attached to it."""
    return attached_to(optimizer) or optimizer


class Run:
    """An optimizer of two squares, before its third step."""

    def __init__(self, form: Callable[..., Optimizer], backend: str, **keywords: Any) -> None:
        random = torch.Generator().manual_seed(7)
        self.params = [nn.Parameter(0.1 * torch.randn(SIDE, SIDE, generator=random)) for _ in range(2)]
        self.optimizer = form(self.params, backend=backend, **keywords)
        self.owner = owner_of(self.optimizer)
        self.number = 0
        for _ in range(3):
            self.give_gradients()
            self.optimizer.step()

    @property
    def state(self) -> dict[str, Tensor]:
        return self.owner.state[self.params[0]]

    @property
    def keeper(self) -> Any:
        """The object that has the launcher."""
        return self.owner._attachment if isinstance(self.owner, PATS) else self.owner

    def give_gradients(self) -> None:
        self.number += 1
        random = torch.Generator().manual_seed(self.number)
        for param in self.params:
            param.grad = torch.randn(SIDE, SIDE, generator=random)

    def step(self, anew: bool = False) -> None:
        if anew:
            self.keeper._launcher = Launcher(owned=True)
        self.give_gradients()
        self.optimizer.step()

    def own_step(self) -> None:
        """Steps on the existing gradients, without the step of an optimizer that has PATS attached."""
        if isinstance(self.owner, PATS):
            self.owner._attachment._step(self.optimizer)
        else:
            self.optimizer.step()

    def tensors(self) -> list[Tensor]:
        kept = [t for param in self.params for _, t in sorted(self.owner.state[param].items())]
        return [*self.params, *kept, *self.owner._nonfinite.values()]


# Addresses.

Move = Callable[[Tensor], None]


def by_data(tensor: Tensor) -> None:
    tensor.data = tensor.data.clone()


def by_set(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.set_(tensor.detach().clone())


def by_sharing(tensor: Tensor) -> None:
    tensor.share_memory_()


MOVES: dict[str, Move] = {"data": by_data, "set_": by_set, "share_memory_": by_sharing}


@pytest.mark.parametrize("how", MOVES)
@pytest.mark.parametrize("what", ["weight", "exp_avg_sens", "exp_avg_unc", "sens_stats", "step"])
def test_tensors_that_move(form: Callable[..., Optimizer], backend: str, what: str, how: str) -> None:
    """The same object with other memory, as in the snippet that moves an optimizer's state. The old memory is
    kept here, so that writing to it shows in the numbers for certain."""
    run, twin = Run(form, backend), Run(form, backend)
    tensor = run.params[0] if what == "weight" else run.state[what]
    old = tensor.detach().view_as(tensor)
    memory = old.clone()
    MOVES[how](tensor)
    if how == "share_memory_" and old.data_ptr() == tensor.data_ptr():  # they shared the storage, which moved
        memory = None
    for _ in range(2):
        run.step()
        twin.step()
    assert_same_bits(run.tensors(), twin.tensors())
    if memory is not None:
        assert torch.equal(old, memory)


def test_an_optimizer_that_goes_to_another_process(form: Callable[..., Optimizer], backend: str) -> None:
    """Pickled for it, its tensors move to shared memory, and the memory they leave is freed. The counts of
    elements that are not finite do not go along: nobody else is shown these tensors, so no step asks where
    they are."""
    run, twin = Run(form, backend), Run(form, backend)
    counters = list(run.owner._nonfinite.values())
    there, moves = [*map(Tensor.data_ptr, counters)], [*run.params, *run.owner.state[run.params[0]].values()]
    left = [*map(Tensor.data_ptr, moves)]
    ForkingPickler.dumps(run.optimizer)
    assert not {*left} & {*map(Tensor.data_ptr, moves)}
    assert [*map(Tensor.data_ptr, counters)] == there
    for each in (run, twin):
        each.give_gradients()
        grad = each.params[0].grad
        assert grad is not None
        grad[1, 2] = torch.nan
        each.optimizer.step()
        assert each.owner.nonfinite_counts() == {"weight": 1}
    assert_same_bits(run.tensors(), twin.tensors())


# The meaning of the bytes.


def param_transposed(run: Run) -> None:
    run.params[0].data = run.params[0].data.t()


def param_transposed_in_place(run: Run) -> None:
    with torch.no_grad():
        run.params[0].t_()


def param_strided(run: Run) -> None:
    with torch.no_grad():
        run.params[0].as_strided_((SIDE, SIDE), (1, SIDE))


def state_transposed(run: Run) -> None:
    run.state["exp_avg_sens"].t_()


def state_transposed_by_data(run: Run) -> None:
    run.state["exp_avg_unc"].data = run.state["exp_avg_unc"].data.t()


STRIDES = [
    param_transposed,
    param_transposed_in_place,
    param_strided,
    state_transposed,
    state_transposed_by_data,
]


@pytest.mark.parametrize("change", STRIDES)
def test_other_strides_at_the_same_address(
    form: Callable[..., Optimizer], backend: str, change: Callable[[Run], None]
) -> None:
    """The result is that of a twin that plans anew at every step."""
    run, twin = Run(form, backend), Run(form, backend)
    for each in (run, twin):
        change(each)
    for _ in range(2):
        run.step()
        twin.step(anew=True)
    assert_same_bits(run.tensors(), twin.tensors())


def halved(tensor: Tensor) -> None:
    tensor.resize_(SIDE, SIDE // 2)


def one_left(tensor: Tensor) -> None:
    tensor.resize_(1)


def as_integers(tensor: Tensor) -> None:
    tensor.data = tensor.data.view(torch.int32)


MEANINGS: dict[str, tuple[str, Move, str]] = {
    "resized": ("exp_avg_sens", halved, "shape"),
    "integers": ("exp_avg_unc", as_integers, "int32"),
    "integer means": ("sens_stats", as_integers, "int32"),
    "one mean": ("sens_stats", one_left, "sens_stats"),
}


@pytest.mark.parametrize("name", MEANINGS)
def test_other_meanings_at_the_same_address(form: Callable[..., Optimizer], backend: str, name: str) -> None:
    key, spoil, says = MEANINGS[name]
    run = Run(form, backend)
    spoil(run.state[key])
    run.give_gradients()
    before = [tensor.clone() for tensor in run.tensors()]
    with pytest.raises((TypeError, ValueError), match=f"weight: .*{says}"):
        run.own_step()
    assert_same_bits(run.tensors(), before)


def test_a_negative_gradient(form: Callable[..., Optimizer], backend: str) -> None:
    """As from backward through `view_as_complex`: the stored bytes are -g."""
    run, twin = Run(form, backend), Run(form, backend)
    for each in (run, twin):
        each.give_gradients()
        for param in each.params:
            value = torch.view_as_complex(torch.stack((torch.zeros_like(param), param.grad), -1)).conj()
            assert value.imag.is_neg()
            param.grad = value.imag if each is run else value.imag.resolve_neg()
    run.optimizer.step()
    twin.optimizer.step()
    assert_same_bits(run.tensors(), twin.tensors())
    assert all(param.grad is not None and param.grad.is_neg() for param in run.params)  # the user's own stays


def test_training_with_negative_gradients_descends(backend: str) -> None:
    if INTERPRETED:
        pytest.skip("the test above proves the numbers")
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(8, 2))
    optimizer = PATSAdamW([weight], lr=0.1, noise_scale=0.0, backend=backend)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (torch.view_as_complex(weight).conj().imag + 0.5).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("what", ["weight", "exp_avg_sens", "sens_stats"])
def test_negative_tensors_that_are_written(form: Callable[..., Optimizer], backend: str, what: str) -> None:
    run = Run(form, backend)
    tensor = run.params[0] if what == "weight" else run.state[what]
    tensor.data = torch.ops.aten._neg_view(tensor.data if what == "weight" else tensor.data.clone())
    with pytest.raises(ValueError, match=r"weight: the .* has torch's negative bit set"):
        run.step()


COUNTERS: dict[str, tuple[Any, str]] = {
    "int64": (torch.tensor(3), "torch.int64"),
    "float64": (torch.tensor(3.0, dtype=torch.float64), "torch.float64"),
    "a number": (3, "is 3"),
    "a float": (3.0, "is 3.0"),
    "several": (torch.full((2,), 3.0), r"\(2,\)"),
    "elsewhere": (torch.tensor(3.0, device="meta"), "meta"),
    "None": (None, "is None"),
}


@pytest.mark.parametrize("name", COUNTERS)
def test_forms_of_a_step_count(form: Callable[..., Optimizer], backend: str, name: str) -> None:
    value, says = COUNTERS[name]
    run = Run(form, backend)
    run.state["step"] = value
    run.give_gradients()
    before = [t.clone() for t in (*run.params, *run.owner.state[run.params[1]].values())]
    with pytest.raises(ValueError, match=f"weight: .*step.*{says}"):
        run.own_step()
    after = [*run.params, *run.owner.state[run.params[1]].values()]
    assert_same_bits(list(map(torch.detach, after)), before)


def test_parameters_that_share_a_step_count(form: Callable[..., Optimizer], backend: str) -> None:
    """It would be advanced once for each of them."""
    run = Run(form, backend)
    run.state["step"] = run.owner.state[run.params[1]]["step"]
    with pytest.raises(ValueError, match=r"other: overlapping memory: its step|weight: overlapping memory"):
        run.step()


# Without memory of their own.


class Wrapper(Tensor):
    """A subclass whose numbers are in another tensor, like torchao's float8 weights."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Wrapper":
        options = {"dtype": inner.dtype, "device": inner.device, "strides": inner.stride()}
        wrapper = Tensor._make_wrapper_subclass(cls, inner.shape, **options)  # type: ignore[attr-defined]
        wrapper.numbers = inner
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def unwrap(value: Any) -> Any:
            return value.numbers if isinstance(value, Wrapper) else value

        result = function(*tree_map(unwrap, args), **tree_map(unwrap, kwargs or {}))
        if function is torch.ops.aten.detach.default:
            return Wrapper(result)
        return args[0] if isinstance(args[0], Wrapper) and result is args[0].numbers else result


@pytest.mark.parametrize("what", ["weight", "gradient", "exp_avg_sens", "step"])
def test_tensors_without_memory(form: Callable[..., Optimizer], what: str, backend: str) -> None:
    """Every backend except eager's plain operations uses addresses, so it must refuse these."""
    run = Run(form, backend)
    if what == "weight":
        run.params[0] = nn.Parameter(Wrapper(run.params[0].detach()))
        run.optimizer = form(run.params, backend=backend)
        run.owner = owner_of(run.optimizer)
    elif what != "gradient":
        run.state[what] = Wrapper(run.state[what])
    run.give_gradients()
    if what == "gradient":
        assert run.params[0].grad is not None
        run.params[0].grad = Wrapper(run.params[0].grad)
    if backend == "eager":
        run.own_step()
        return
    with pytest.raises(TypeError, match=r"weight: .*Wrapper, has no memory of its own.*backend='eager' can"):
        run.own_step()


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("name", ["eager", "cpp"])
def test_fake_tensors(name: str) -> None:
    if backends.available_backends("cpu")[name] is not None:
        pytest.skip("no extension")
    with FakeTensorMode():
        params = [nn.Parameter(torch.randn(3, 3)) for _ in range(2)]
        optimizer = PATSAdamW(params, backend=name)
        for param in params:
            param.grad = torch.randn(3, 3)
        if name == "eager":
            optimizer.step()
        else:
            with pytest.raises(TypeError, match=r"param_groups\[0\].*has no memory of its own"):
                optimizer.step()


# Plans keep nothing alive.


def test_state_that_is_replaced_at_each_step(form: Callable[..., Optimizer], backend: str) -> None:
    """As in offloading: the old tensors are freed with their last reference, not later."""
    run = Run(form, backend)
    old: list[weakref.ref[Tensor]] = []
    for _ in range(4):
        for param in run.params:
            for key, value in run.owner.state[param].items():
                old.append(weakref.ref(value))
                run.owner.state[param][key] = value.clone()
                del value
        run.step()
    assert sum(reference() is not None for reference in old) == 0


def batch_of(work: Work, **more: Any) -> Batch:
    count = len(work.params)
    return Batch(
        name=lambda i: f"params[{i}]",
        params=work.params,
        grads=work.grads,
        exp_avg_sens=work.sens,
        exp_avg_unc=work.unc,
        sens_stats=work.stats,
        tensor_ids=list(range(count)),
        **{
            "steps": [torch.zeros(()) for _ in range(count)],
            "hyperparameters": [AdamWHyperparameters()] * count,
        }
        | more,
    )


def work_of(*shapes: tuple[int, ...]) -> Work:
    case = Case(list(shapes))
    work = prepare(case)
    work.grads = gradients(case, 1)
    return work


# Hyperparameters that are tensors.


@pytest.mark.parametrize("name", ["lr", "noise_scale"])
def test_hyperparameters_on_the_host_are_read_at_each_step(backend: str, name: str) -> None:
    tensor, number = torch.tensor(0.01), 0.01
    run, twin = (Run(adamw, backend), Run(adamw, backend))
    for value in (0.01, 0.02, 0.005):
        tensor.fill_(value)
        number = tensor.item()
        run.optimizer.param_groups[0][name] = tensor
        twin.optimizer.param_groups[0][name] = number
        run.step()
        twin.step()
        assert_same_bits(run.tensors(), twin.tensors())


def hyperparameter_batch(**values: Any) -> Batch:
    work = work_of((8,), (5,))
    moments = {"exp_avg": [torch.zeros(8), torch.zeros(5)], "exp_avg_sq": [torch.zeros(8), torch.zeros(5)]}
    return batch_of(work, hyperparameters=[AdamWHyperparameters(**values)] * 2, **moments)


ON_DEVICE = [("lr", Column.LR_TENSOR), ("noise_scale", Column.NOISE_SCALE_TENSOR)]


@pytest.mark.parametrize(("name", "column"), ON_DEVICE)
def test_hyperparameters_on_the_device_are_found_where_they_lie_now(name: str, column: Column) -> None:
    """On the CPU here, where `hyperparameters` would have read them."""
    tensor = torch.tensor(0.01)
    planner, batch = Planner(), hyperparameter_batch(**{name: tensor})
    (launch,) = planner.plan(batch).launches
    assert launch.table[:, column].tolist() == [tensor.data_ptr()] * 2
    old = tensor.data
    tensor.data = torch.tensor(0.01)
    assert tensor.data_ptr() != old.data_ptr()
    assert planner.plan(batch).launches[0] is launch
    assert launch.table[:, column].tolist() == [tensor.data_ptr()] * 2
    other = torch.tensor(0.01)  # an equal number, in another tensor
    batch.hyperparameters = [AdamWHyperparameters(**{name: other})] * 2
    planner.plan(batch)
    assert launch.table[:, column].tolist() == [other.data_ptr()] * 2
    batch.hyperparameters = [AdamWHyperparameters()] * 2
    planner.plan(batch)
    assert launch.table[:, column].tolist() == [0, 0]


@pytest.mark.parametrize("name", ["lr", "noise_scale"])
@pytest.mark.parametrize(
    "value",
    [torch.tensor(0.1, dtype=torch.float64), torch.ones(2), torch.ops.aten._neg_view(torch.tensor(0.1))],
    ids=["dtype", "several", "negative bit"],
)
def test_hyperparameters_on_the_device_that_no_longer_are_what_they_were(name: str, value: Tensor) -> None:
    tensor = torch.tensor(0.01)
    planner, batch = Planner(), hyperparameter_batch(**{name: tensor})
    planner.plan(batch)
    tensor.data = value
    with pytest.raises(ValueError, match=f"Invalid {name}"):
        planner.plan(batch)


def test_an_error_leaves_no_hyperparameters_of_the_refused_step() -> None:
    """After the error the earlier ones are used again, and the table must have them."""
    tensor = torch.tensor(0.01)
    planner, batch = Planner(), hyperparameter_batch(lr=0.5)
    good = batch.hyperparameters
    (launch,) = planner.plan(batch).launches
    batch.hyperparameters = [AdamWHyperparameters(gamma=2.0, lr=tensor)] * 2
    tensor.data = torch.ones(2)
    with pytest.raises(ValueError, match="Invalid lr"):
        planner.plan(batch)
    batch.hyperparameters = good
    planner.plan(batch)
    numbers = launch.table.view(np.float64)
    assert numbers[:, [Column.LR, Column.GAMMA]].tolist() == [[0.5, 1.0]] * 2
    assert launch.table[:, Column.LR_TENSOR].tolist() == [0, 0]


# Threads.


@pytest.fixture
def many_switches() -> Any:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter is one for all threads")
def test_the_functional_api_in_threads(many_switches: Any, backend: str) -> None:
    """Sixteen threads, each with tensors that come and go, give the same bits as one after another."""
    steps = 2 if INTERPRETED else 40

    def trained(number: int) -> list[Tensor]:
        written: list[Tensor] = []
        for shapes in ([(5 + number,), (3, 2)], [(4, 1 + number)]):
            case = Case(shapes, seed=number, noise_scale=1e-2)
            work = prepare(case)
            for t in range(1, 1 + steps):
                work.grads = gradients(case, t)
                step(backend, case, work, t)
            written += work.written()
        return written

    expected = [trained(number) for number in range(16)]
    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(trained, range(16)))
    for result, serial in zip(results, expected, strict=True):
        assert_same_bits(result, serial)


@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter is one for all threads")
def test_optimizers_in_threads(many_switches: Any, form: Callable[..., Optimizer], backend: str) -> None:
    def trained(number: int) -> list[Tensor]:
        run = Run(form, backend, seed=number, normalization="exact")
        for _ in range(1 if INTERPRETED else 10):
            run.step()
        return run.tensors()

    expected = [trained(100 + number) for number in range(8)]
    gc.collect()
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(trained, range(100, 108)))
    for result, serial in zip(results, expected, strict=True):
        assert_same_bits(result, serial)


# Interrupts.


@contextmanager
def signals(number: int) -> Iterator[None]:
    """A context in which a signal comes before and after each phase of a backend."""
    original = backends.resolve

    def resolve(name: str, device: torch.device) -> Any:
        step_ = original(name, device)

        def interrupted(*arguments: Any) -> None:
            signal.raise_signal(number)
            step_(*arguments)
            signal.raise_signal(number)

        return interrupted

    with patch.object(backends, "resolve", resolve):
        yield


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises, as in a terminal. Background processes of a shell ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("normalization", ["exact", "delayed"])
def test_an_interrupt_in_a_step(form: Callable[..., Optimizer], backend: str, normalization: str) -> None:
    """It raises when the step is complete. The state continues, and equals that of a run without it."""
    keywords = {"normalization": normalization}
    run, twin = (Run(form, backend, **keywords) for _ in range(2))
    run.give_gradients()
    handler = signal.getsignal(signal.SIGINT)
    with signals(signal.SIGINT), pytest.raises(KeyboardInterrupt):
        run.own_step()
    assert signal.getsignal(signal.SIGINT) is handler
    twin.give_gradients()
    twin.own_step()
    assert_same_bits(run.tensors(), twin.tensors())


def test_a_handler_of_the_user_s(backend: str) -> None:
    """A scheduler's SIGTERM, whose handler saves and exits, runs at the end of the step, once for each
    signal."""
    run = Run(adamw, backend, normalization="exact")
    seen: list[float] = []

    def save(number: int, frame: Any) -> None:
        seen.append(float(run.state["step"]))
        if len(seen) == 1:
            raise SystemExit

    before = signal.signal(signal.SIGTERM, save)
    try:
        with signals(signal.SIGTERM), pytest.raises(SystemExit):
            run.step()
        assert signal.getsignal(signal.SIGTERM) is save
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [4.0] * 4


@pytest.mark.usefixtures("interruptible")
def test_a_step_in_another_thread_leaves_the_handlers_alone(backend: str) -> None:
    run = Run(adamw, backend)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            run.step()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_copy_plans_for_itself(backend: str) -> None:
    """Its tensors are others, at other addresses."""
    run = Run(adamw, backend)
    twin = copy.deepcopy(run)
    for each in (run, twin):
        each.owner = owner_of(each.optimizer)
        each.step()
    kept = [[*r.params, *(t for p in r.params for t in r.owner.state[p].values())] for r in (run, twin)]
    assert_same_bits(*kept)
