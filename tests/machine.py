"""The actions of test_machine.py: what users do to an optimizer, done to three runs in lockstep.

The first run uses a backend's kernels. The second uses them too, but forgets its plans before each step. The
third uses plain PyTorch operations. After each action all three have the same bits.

After a step the first and the second must have the same bits: a kept plan is as good as a new one. The first
and the third are each compared with the oracle, from the state before the step, within `harness.TOLERANCES`.
So they differ by no more than a backend's approximations and the rounding of one step, in every dtype and
with stochastic rounding too. Then the third gets the numbers of the first, so that differences do not
accumulate and tolerances need not grow with the length of a run.
"""

import copy
import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar
from unittest.mock import patch

import adamw_harness
import harness
import numpy as np
import oracle
import torch
from adamw_harness import AdamWValues
from harness import LAYOUTS, TOLERANCES, Values, filled, flat, same_bits
from oracle import Hyper
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, Optimizer, RMSprop

from pats_kernels import PATS, PATSAdamW
from pats_kernels.optim import _Attachment, attached_to
from pats_kernels.step import Launcher

SHAPES: list[tuple[int, ...]] = [(4, 4), (3, 5), (7,), (), (64,), (0,), (2, 3, 2, 2), (1,)]

Settings = dict[str, Any]
Make = Callable[..., Optimizer]


def attached(make: Make) -> Make:
    def made(groups: list[dict[str, Any]], **settings: Any) -> Optimizer:
        optimizer = make(groups)
        PATS(optimizer, **settings)
        return optimizer

    return made


# torch's fused SGD cannot start the momentum of one parameter later than another's: no momentum here.
FORMS: dict[str, Make] = {
    "PATSAdamW": lambda groups, **settings: PATSAdamW(groups, lr=1e-2, **settings),
    "SGD": attached(lambda groups: SGD(groups, lr=1e-2, momentum=0.9, weight_decay=1e-2)),
    "AdamW": attached(lambda groups: AdamW(groups, lr=1e-2)),
    "AdamW, foreach": attached(lambda groups: AdamW(groups, lr=1e-2, foreach=True)),
    "AdamW, fused": attached(lambda groups: AdamW(groups, lr=1e-2, fused=True)),
    "SGD, fused": attached(lambda groups: SGD(groups, lr=1e-2, fused=True)),
    "Adam": attached(lambda groups: Adam(groups, lr=1e-2, amsgrad=True)),
    "RMSprop": attached(lambda groups: RMSprop(groups, lr=1e-3, momentum=0.5)),
    "NAdam": attached(lambda groups: NAdam(groups, lr=1e-3)),
    "Adagrad": attached(lambda groups: Adagrad(groups, lr=1e-2)),
}
if torch.__version__ < (2, 13):  # 2.10's Adagrad cannot step parameters added later, 2.13's can
    del FORMS["Adagrad"]

HYPERPARAMETERS: dict[str, list[Any]] = {
    "lr": [0.0, 1e-3, 1e-2, torch.tensor(5e-3)],
    "betas": [(0.9, 0.999), (0.0, 0.5), [0.5, 0.9], (torch.tensor(0.75), torch.tensor(0.875))],
    "eps": [1e-8, 1e-3, torch.tensor(1e-6)],
    "weight_decay": [0, 0.1, torch.tensor(0.05)],
    "maximize": [True, False],
    "sensitivity": ["ema", "moments"],
    "noise_scale": [0, 1e-3, 1e-2, torch.tensor(2e-2)],
    "gamma": [0, 0.5, 1.0, 4, torch.tensor(0.25)],
    "sens_betas": [(0.85, 0.95), (0, 0), [0.5, 0.9], (torch.tensor(0.25), 0.5)],
    "uncertainty": ["product", "ucb", "none"],
    "normalization": ["delayed", "exact"],
    "state_dtype": [None, torch.float32, torch.bfloat16],
    "stochastic_rounding": [True, False],
    "seed": [0, 3, 2**64 - 1, torch.tensor(7)],
}
KNOWN = {*Hyper._fields, *oracle.AdamW._fields}
OF_ADAMW = ("lr", "betas", "eps", "weight_decay", "maximize", "sensitivity")
BAD: dict[str, Any] = {
    "noise_scale": torch.nan,
    "gamma": -1.0,
    "sens_betas": (1.0, 0.5),
    "uncertainty": "exact",
    "normalization": None,
    "seed": -1,
    "tensor_id": "0",
}
MOVES = ("clone", "set_", "share_memory_", "t", *LAYOUTS)


class Gradients(NamedTuple):
    """The gradients of a step: the number that determines them, their layout, which are missing, ..."""

    number: int
    values: str = "normal"  # or "zero", "half zero", "small", "poison"
    layout: str = "contiguous"
    missing: frozenset[int] = frozenset()
    in_place: bool = False


@dataclass
class Run:
    """A model, its optimizer, and which of the three runs it is."""

    form: str
    settings: Settings
    backend: str
    forgets: bool = False
    model: nn.ParameterList = field(default_factory=nn.ParameterList)
    optimizer: Any = None

    @property
    def owner(self) -> Any:
        """The object that keeps the state: the optimizer, or the `PATS` attached to it."""
        return self.optimizer if self.form == "PATSAdamW" else attached_to(self.optimizer)

    @property
    def params(self) -> list[nn.Parameter]:
        return [param for group in self.optimizer.param_groups for param in group["params"]]

    def begin(self, groups: list[list[nn.Parameter]]) -> None:
        self.model = nn.ParameterList(param for group in groups for param in group)
        self.make([{"params": group} for group in groups])

    def make(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer = FORMS[self.form](groups, backend=self.backend, **self.settings)

    def forget(self) -> None:
        keeper = self.owner._attachment if isinstance(self.owner, PATS) else self.owner
        keeper._launcher = Launcher(owned=True)

    def state_of(self, param: Tensor) -> dict[str, Tensor]:
        """A parameter's state, without adding an entry, as the optimizer's defaultdict would."""
        return self.owner.state.get(param, {})

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the parameters in the groups, by name."""
        named: dict[str, Tensor] = {}
        for i, param in enumerate(self.params):
            own = self.optimizer.state.get(param, {})
            named[f"{i} weight"] = param.detach()
            named |= {f"{i} {key}": value for key, value in self.state_of(param).items()}
            named |= {f"{i} own {key}": t for key, t in own.items() if isinstance(t, Tensor)}
        return named

    def copies(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.tensors().items()}

    def text(self) -> str:
        """The param groups and defaults, without tensors. torch adds "differentiable" to copies: left out."""
        dictionaries = [*self.optimizer.param_groups, self.owner.defaults]
        items = [sorted(d.items(), key=lambda item: str(item[0])) for d in dictionaries]
        return repr([[item for item in own if item[0] not in ("params", "differentiable")] for own in items])

    def give(self, gradients: Gradients) -> None:
        for i, param in enumerate(self.params):
            if i in gradients.missing or not param.requires_grad:
                param.grad = None
                continue
            random = torch.Generator().manual_seed(100 * gradients.number + i)
            values = torch.randn(param.shape, generator=random, dtype=torch.float64).pow(3)
            if gradients.values == "zero":
                values.zero_()
            elif gradients.values == "half zero":
                values.view(-1)[::2] = 0
            elif gradients.values == "small":
                values *= 2.0**-12
            elif gradients.values == "poison":
                values.view(-1)[::5] = (torch.nan, torch.inf, -torch.inf)[gradients.number % 3]
            if gradients.in_place and param.grad is not None:
                param.grad.copy_(values)
            else:
                param.grad = filled(gradients.layout, tuple(param.shape), param.dtype, values)

    def places(self) -> Iterator[tuple[nn.Parameter, Hyper, oracle.AdamW, bool]]:
        """Each parameter, its hyperparameters (not read by the package's code), and whether it steps."""
        position = 0
        for group in self.optimizer.param_groups:
            values = {k: plain(v) for k, v in (self.owner.defaults | group).items() if k in KNOWN}
            count, ids = len(group["params"]), group.get("tensor_id")
            first = position if ids is None else ids
            position += count
            numbers = range(first, first + count) if isinstance(first, int) else first
            for number, param in zip(numbers, group["params"], strict=True):
                state = self.state_of(param)
                t = int(state["step"]) + 1 if "step" in state else 1
                own = {k: values[k] for k in Hyper._fields if k in values}
                hyper = Hyper(**own | {"step": t, "tensor_id": number})
                adamw = oracle.AdamW(**{k: values[k] for k in oracle.AdamW._fields if k in values})
                steps = param.grad is not None and param.numel() > 0
                steps &= self.form == "PATSAdamW" or hyper.noise_scale > 0
                yield param, hyper, adamw, steps

    def numbers(self, i: int, h: Hyper, grad: Tensor | None, scale: float) -> AdamWValues:
        """One parameter's numbers in the harness's form, with zeros for state that does not exist yet."""
        param = self.params[i]
        state = self.state_of(param)
        zeros = np.zeros(param.numel())
        read = {key: flat(value) for key, value in state.items()}
        unc = None if h.uncertainty == "none" else read.get("exp_avg_unc", zeros)
        g = zeros if grad is None else flat(grad) / scale
        sens, stats = read.get("exp_avg_sens", zeros), read.get("sens_stats", np.zeros(2))
        m, v = read.get("exp_avg", zeros), read.get("exp_avg_sq", zeros)
        step = float(state["step"]) if state else 0.0
        dtypes = {key: value.dtype for key, value in state.items()}
        return AdamWValues(Values(flat(param), g, sens, unc, stats), m, v, step, dtypes)


def plain(value: Any) -> Any:
    """The number, or tuple of numbers, for any value that a param group may have."""
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        numbers = value.tolist()
        return tuple(numbers) if isinstance(numbers, list) and len(numbers) != 1 else value.item()
    return tuple(map(plain, value)) if isinstance(value, (list, tuple)) else value


Error = TypeVar("Error", bound=Exception)


def raised(kind: type[Error], function: Callable[[], Any]) -> Error | None:
    try:
        function()
    except kind as error:
        return error
    return None


def needed(run: Run, h: Hyper, a: oracle.AdamW) -> set[str]:
    """The names of the state that a step may write."""
    keys = {"step", *(("exp_avg", "exp_avg_sq") if run.form == "PATSAdamW" else ())}
    if h.noise_scale > 0:
        keys.add("sens_stats")
        if run.form != "PATSAdamW" or a.sensitivity == "ema":
            keys |= {"exp_avg_sens"} | ({"exp_avg_unc"} if h.uncertainty != "none" else set())
    return keys


class Difference(AssertionError):
    pass


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], where: str) -> None:
    """Compares to the bit. State that is new must be zero: it was made for a step that was then refused."""
    for name in expected:
        if name not in found or not same_bits(found[name], expected[name]):
            raise Difference(f"{where}: {name} is {found.get(name)}, not {expected[name]}")
    for name in found.keys() - expected.keys():
        assert not found[name].any(), f"{where}: {name} is new, and {found[name]}"


class Lockstep:
    """The three runs, and the actions of users."""

    def __init__(self, form: str, kernel: str, settings: Settings) -> None:
        self.form = form
        self.runs = [
            Run(form, settings, kernel),
            Run(form, settings, kernel, forgets=True),
            Run(form, settings, "eager"),
        ]
        self.saved: tuple[Any, list[bytes], dict[str, Tensor], str] | None = None
        self.number = 0  # of parameters made so far
        self.bounded = True  # whether steps are compared with the oracle, or else only finiteness
        self._reference: dict[str, Tensor] = {}
        self._before: list[tuple[Any, ...]] = []
        self._scale, self._skipped, self._seen = 1.0, False, False
        self._original: Any = _Attachment._step
        self._patch = patch.object(_Attachment, "_step", self._observed())
        self._patch.start()

    def end(self) -> None:
        self._patch.stop()

    # Parameters.

    def begin(self, shapes: Sequence[Sequence[tuple[int, ...]]], dtype: torch.dtype) -> None:
        first = self.number
        for run in self.runs:
            self.number = first
            run.begin([self.parameters(group, dtype) for group in shapes])
        self.assert_alike("begin")

    def parameters(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[nn.Parameter]:
        params = []
        for shape in shapes:
            random = torch.Generator().manual_seed(self.number)
            params.append(nn.Parameter(0.1 * torch.randn(shape, generator=random).to(dtype)))
            self.number += 1
        return params

    @property
    def first(self) -> Run:
        return self.runs[0]

    @property
    def count(self) -> int:
        return len(self.first.params)

    def each(self, action: Callable[[Run], Any], where: str, keeps: bool = True) -> None:
        """Does something to all runs. `keeps`: parameters and PATS's state must not change."""
        before, text = self.first.copies(), self.first.text()
        for run in self.runs:
            action(run)
        self.assert_alike(where)
        if keeps:
            kept = {name: t for name, t in before.items() if " own " not in name}
            found = {name: t for name, t in self.first.tensors().items() if " own " not in name}
            assert_same(found, kept, where)
            assert self.first.text() == text, where

    def assert_alike(self, where: str) -> None:
        """Checks that all runs have the same bits and the same hyperparameters."""
        expected, text = self.first.tensors(), self.first.text()
        counts = self.first.owner.nonfinite_counts()
        for number, run in enumerate(self.runs[1:], start=1):
            found = run.tensors()
            assert found.keys() == expected.keys(), f"{where}: run {number}"
            assert_same(found, expected, f"{where}: run {number}")
            assert run.text() == text, f"{where}: run {number}"
            assert run.owner.nonfinite_counts() == counts, f"{where}: run {number}"

    # Steps.

    def step(
        self, gradients: Gradients, closure: bool = False, scale: float = 1.0, found_inf: bool | None = None
    ) -> None:
        """Takes a step. `scale` and `found_inf` are a GradScaler's; found_inf None: without GradScaler."""
        refused: list[str] = []
        for run in self.runs:
            run.give(gradients)
            if scale != 1.0:
                for param in run.params:
                    if param.grad is not None:
                        param.grad.mul_(scale)
            self._scale, self._skipped = scale, bool(found_inf)
            self._before = self._read(run)
            before = run.copies()
            if run.forgets:
                run.forget()
            if found_inf is not None:
                run.optimizer.grad_scale = torch.tensor(scale)
                run.optimizer.found_inf = torch.tensor(float(found_inf))
            self._seen = False
            error = raised(ValueError, partial(self._take, run, closure))
            assert self._seen or error is not None, "an optimizer stepped without PATS"
            if error is not None:
                if "dtype mismatch" not in str(error) or not self._has_wide_state(run):
                    raise error
                assert_same(run.tensors(), before, "a step that was refused")
                refused.append(str(error))
            if found_inf is not None:
                del run.optimizer.grad_scale, run.optimizer.found_inf
        assert len(refused) in (0, 3), refused
        assert len(set(refused)) <= 1, refused
        self.assert_alike("step")
        if gradients.values == "poison":
            self.heal()

    def _take(self, run: Run, closure: bool) -> None:
        if closure:
            kept = [param.grad for param in run.params]

            def evaluate() -> Tensor:
                for param, grad in zip(run.params, kept, strict=True):
                    param.grad = grad
                return torch.tensor(3.0)

            run.optimizer.zero_grad()
            assert float(run.optimizer.step(evaluate)) == 3.0
        else:
            run.optimizer.step()
        if self.form == "PATSAdamW":
            self._after(run)

    def _has_wide_state(self, run: Run) -> bool:
        """Whether a model was cast but its float64 state was not. No kernel supports this pair."""
        return any(
            value.dtype == torch.float64 and param.dtype != torch.float64
            for param in run.params
            for value in run.state_of(param).values()
        )

    def _observed(self) -> Callable[..., None]:
        """PATS's step, checked before its optimizer's step, also within a closure."""

        def step(attachment: _Attachment, optimizer: Optimizer) -> None:
            self._original(attachment, optimizer)
            self._after(next(run for run in self.runs if run.optimizer is optimizer))

        return step

    def _read(self, run: Run) -> list[tuple[Any, ...]]:
        """For each parameter, its numbers and copies of all its tensors, before a step."""
        return [
            (
                run.numbers(i, h, param.grad, self._scale),
                None if param.grad is None else param.grad.clone(),
                {"weight": param.detach().clone(), **{k: v.clone() for k, v in run.state_of(param).items()}},
                (h, a, steps),
            )
            for i, (param, h, a, steps) in enumerate(run.places())
        ]

    def _after(self, run: Run) -> None:
        self._seen = True
        if run.forgets:
            own = {name: t for name, t in run.tensors().items() if name in self._reference}
            return assert_same(own, self._reference, "planned anew, against planned before")
        tolerance = TOLERANCES.get(run.owner.backend, TOLERANCES["cpp"])
        for i, (old, grad, bits, (h, a, steps)) in enumerate(self._before):
            param = run.params[i]
            where = f"parameter {i}, {run.owner.backend}, {h}, {a}"
            state = run.state_of(param)
            found = {"weight": param.detach(), **state}
            if not steps or self._skipped:
                assert_same(found, bits, where)
                continue
            still = bits.keys() - needed(run, h, a) - {"weight"}
            assert_same({k: found[k] for k in still}, {k: bits[k] for k in still}, where)
            if not self.bounded:
                continue
            new = run.numbers(i, h, grad, self._scale)
            assert new.step == old.step + 1, where
            if self.form == "PATSAdamW":
                adamw_harness.check_step(old, new, h, a, param.dtype, tolerance, where)
            else:
                dtypes = (param.dtype, state["exp_avg_sens"].dtype)
                harness.check_step(old.pats, new.pats, h, dtypes, tolerance, where)
        if run is self.first:
            self._reference = {name: t for name, t in run.copies().items() if " own " not in name}
            return None
        for name, tensor in run.tensors().items():
            if name in self._reference:
                expected = self._reference[name]
                assert torch.equal(tensor.isfinite(), expected.isfinite()), f"{name}: {tensor}, {expected}"
                tensor.copy_(expected)
        return None

    def heal(self) -> None:
        """Sets weights that are not finite to 0, as a user may after a bad gradient."""
        for run in self.runs:
            for tensor in run.tensors().values():
                if tensor.is_floating_point():
                    tensor.nan_to_num_(0.0, 0.0, 0.0)

    # Refusals.

    def refuse(self, group: int, name: str) -> None:
        """An invalid hyperparameter: the step raises and changes nothing."""

        def spoiled(run: Run) -> None:
            run.give(Gradients(0))
            own = run.optimizer.param_groups[group]
            before = dict(own)
            own[name] = BAD[name]
            error = raised(ValueError, run.optimizer.step)
            assert name in str(error)
            del own[name]
            own.update(before)

        self.each(spoiled, "refused")

    def sparse(self, i: int) -> None:
        """A sparse gradient among dense ones."""

        def spoiled(run: Run) -> None:
            run.give(Gradients(0))
            if not list(run.places())[i][-1]:
                return
            param = run.params[i]
            param.grad = torch.zeros_like(param).contiguous().to_sparse()
            assert "sparse" in str(raised(TypeError, run.optimizer.step))
            param.grad = None

        self.each(spoiled, "sparse gradient")

    # Changes of settings.

    def freeze(self, i: int, frozen: bool) -> None:
        self.each(lambda run: run.params[i].requires_grad_(not frozen), "freeze", keeps=False)

    def add_group(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, own: dict[str, Any]) -> None:
        first = self.number

        def add(run: Run) -> None:
            self.number = first
            params = self.parameters(shapes, dtype)
            run.model.extend(params)
            run.optimizer.add_param_group({"params": params, **copy.deepcopy(own)})

        self.each(add, "add_group", keeps=False)

    def change(self, group: int, name: str, value: Any) -> None:
        def change(run: Run) -> None:
            run.optimizer.param_groups[group][name] = copy.deepcopy(value)  # it may be written to

        self.each(change, "change", keeps=False)

    def fill(self, group: int, value: float) -> None:
        """A schedule that writes into tensors."""

        def fill(run: Run) -> None:
            for name in ("lr", "noise_scale", "gamma", "weight_decay"):
                if isinstance(tensor := run.optimizer.param_groups[group].get(name), Tensor):
                    tensor.fill_(value)

        self.each(fill, "fill", keeps=False)

    def swap_backends(self, kernel: str) -> None:
        """The first two runs change between their backend and the third's."""

        def swap(run: Run) -> None:
            run.owner.backend = run.backend = kernel if run.owner.backend == "eager" else "eager"

        self.each(swap, "swap_backends")

    def replace(self, i: int, with_state: bool) -> None:
        """Replaces a parameter, as when parts of a model are pruned or grown."""

        def replace(run: Run) -> None:
            old = run.params[i]
            new = nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad)
            for group in run.optimizer.param_groups:
                group["params"] = [new if param is old else param for param in group["params"]]
            run.model = nn.ParameterList(new if param is old else param for param in run.model)
            states = [run.optimizer.state, *([] if run.form == "PATSAdamW" else [run.owner.state])]
            for state in states:
                entry = state.pop(old, None)
                if with_state and entry is not None:
                    state[new] = entry

        self.each(replace, "replace", keeps=with_state)

    def reorder(self, group: int) -> None:
        """Changes the parameters' positions, and so their noise, but not their state."""

        def reorder(run: Run) -> None:
            run.optimizer.param_groups[group]["params"].reverse()

        self.each(reorder, "reorder", keeps=False)

    def clear(self, all_: bool) -> None:
        def clear(run: Run) -> None:
            run.optimizer.state.clear()
            if all_:
                run.owner.state.clear()

        self.each(clear, "clear", keeps=False)

    def cast(self, dtype: torch.dtype, reload: bool) -> None:
        """Casts the model. torch's optimizers continue only with a state that they have cast on loading."""

        def cast(run: Run) -> None:
            run.model.to(dtype)
            if reload or run.form != "PATSAdamW":
                run.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))

        self.each(cast, "cast", keeps=False)

    # Actions that change nothing.

    def zero_grad(self, set_to_none: bool) -> None:
        self.each(lambda run: run.optimizer.zero_grad(set_to_none=set_to_none), "zero_grad")

    def look(self) -> None:
        """Calls everything that only reads."""

        def look(run: Run) -> None:
            run.optimizer.state_dict()
            run.owner.state_dict()
            run.owner.pats_summary()
            repr(run.owner)

        self.each(look, "look")

    def move(self, i: int, how: str) -> None:
        """Moves a parameter's memory. "t" is another matrix if it is square."""
        keeps = how != "t"
        self.each(lambda run: moved(run.params[i], how), "move", keeps=keeps)

    def move_state(self, how: str, replaces: bool) -> None:
        """Moves the state as common snippets do: `state[k] = v.to(...)` or `v.data = ...`."""

        def move(run: Run) -> None:
            for param in run.params:
                state = run.state_of(param)
                for key, value in state.items():
                    if replaces:
                        state[key] = value = value.clone()
                    if how != "t":
                        whole = value.shape == param.shape and key.startswith("exp_avg")
                        moved(value, how if whole or how not in LAYOUTS else "clone")

        self.each(move, "move_state")

    def save_and_load(self, fresh: bool) -> None:
        def load(run: Run) -> None:
            buffer = io.BytesIO()
            torch.save(run.optimizer.state_dict(), buffer)
            buffer.seek(0)
            state_dict = torch.load(buffer, weights_only=True)
            if fresh:
                groups = [{"params": group["params"]} for group in run.optimizer.param_groups]
                run.make(groups)
            run.optimizer.load_state_dict(state_dict)

        self.each(load, "save_and_load", keeps=not self._has_wide_state(self.first))

    def copy(self, how: str) -> None:
        def copied(run: Run) -> None:
            pair = run.model, run.optimizer
            new = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
            run.model, run.optimizer = new

        self.each(copied, "copy")

    def structure(self) -> Any:
        return [[tuple(p.shape) for p in group["params"]] for group in self.first.optimizer.param_groups]

    def save(self) -> None:
        if self._has_wide_state(self.first):
            return
        files = []
        for run in self.runs:
            buffer = io.BytesIO()
            weights = [param.detach() for param in run.params]
            torch.save((weights, run.optimizer.state_dict()), buffer)
            files.append(buffer.getvalue())
        kept = {name: t for name, t in self.first.copies().items() if " own " not in name}
        self.saved = self.structure(), files, kept, self.first.text()

    def restore(self, fresh: bool) -> None:
        """Restores what was saved, in the current optimizer or in a new one."""
        if self.saved is None or self.saved[0] != self.structure():
            return
        _, files, kept, text = self.saved
        contents = dict(zip(map(id, self.runs), files, strict=True))

        def restore(run: Run) -> None:
            weights, state_dict = torch.load(io.BytesIO(contents[id(run)]), weights_only=True)
            for param, weight in zip(run.params, weights, strict=True):
                param.grad = None
                param.data = weight
            if fresh:
                run.make([{"params": group["params"]} for group in run.optimizer.param_groups])
            run.optimizer.load_state_dict(state_dict)

        self.each(restore, "restore", keeps=False)
        found = {name: t for name, t in self.first.tensors().items() if " own " not in name}
        assert found.keys() == kept.keys()
        assert_same(found, kept, "restore")
        assert self.first.text() == text


def moved(tensor: Tensor, how: str) -> None:
    """The same tensor object with other memory, or another view of its memory."""
    if how == "share_memory_":
        tensor.share_memory_()
    elif how == "set_":
        with torch.no_grad():
            tensor.set_(tensor.detach().clone())
    elif how == "clone":
        tensor.data = tensor.data.clone()
    elif how == "t":
        if tensor.dim() == 2 and tensor.shape[0] == tensor.shape[1]:
            tensor.data = tensor.data.t()
    else:
        tensor.data = filled(how, tuple(tensor.shape), tensor.dtype, tensor.data)
