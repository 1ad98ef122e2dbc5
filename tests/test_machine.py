"""What users do to an optimizer, in any order. machine.py says what is compared.

Each run of the tests takes the same few hundred steps; `make fuzz` takes many more, and others each time.
"""

import sys
from collections import Counter
from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest
import torch
from conftest import FUZZ, INTERPRETED, KERNEL
from harness import LAYOUTS
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from machine import BAD, FORMS, HYPERPARAMETERS, MOVES, OF_ADAMW, SHAPES, Gradients, Lockstep

DONE: Counter[str] = Counter()

numbers = st.integers(0, 2**16)
places = st.integers(0, 63)  # modulo their number
shapes = st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3)


def action(**strategies: Any) -> Any:
    """A rule that is counted. After an action that is no step, a step may follow at once, so that there are
    enough steps."""

    def decorated(function: Callable[..., None]) -> Any:
        is_step = function.__name__.startswith("step")

        @wraps(function)
        def counted(self: Any, then: int | None, **values: Any) -> None:
            DONE[function.__name__] += 1
            function(self, **values)
            if then is not None:
                DONE["step after it"] += 1
                self.lockstep.step(Gradients(then))

        return rule(then=st.none() if is_step else st.none() | numbers, **strategies)(counted)

    return decorated


class Machine(RuleBasedStateMachine):
    forms: tuple[str, ...]
    names: tuple[str, ...]  # of hyperparameters that a param group may change
    layouts: tuple[str, ...] = tuple(LAYOUTS)
    moves: tuple[str, ...] = MOVES
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float64)
    scaled = True  # whether the optimizers obey a GradScaler

    def teardown(self) -> None:
        """Every sequence that did not fail ends with a step, which sees what the last action changed."""
        if hasattr(self, "lockstep"):
            if sys.exc_info()[0] is None:
                DONE["step at the end"] += 1
                self.lockstep.step(Gradients(0))
            self.lockstep.end()

    @initialize(data=st.data(), groups=st.lists(shapes, min_size=1, max_size=2))
    def begin(self, data: Any, groups: list[list[tuple[int, ...]]]) -> None:
        dtype = data.draw(st.sampled_from(self.dtypes))
        chosen: dict[str, Any] = {"noise_scale": 1e-2, "gamma": 0.5}
        for name in ("uncertainty", "normalization", "state_dtype", "stochastic_rounding", "sensitivity"):
            if name in self.names:
                chosen[name] = data.draw(st.sampled_from(HYPERPARAMETERS[name]))
        self.lockstep = Lockstep(data.draw(st.sampled_from(self.forms)), KERNEL, chosen)
        self.lockstep.begin(groups, dtype)

    def group(self, number: int) -> int:
        return number % len(self.lockstep.first.optimizer.param_groups)

    def gradients(self, data: Any, number: int, **more: Any) -> Gradients:
        layout = data.draw(st.sampled_from(self.layouts))
        missing = data.draw(st.frozensets(st.integers(0, 5), max_size=2))
        return Gradients(number, layout=layout, missing=missing, **more)

    # Steps: more than one rule, so that they are chosen more often.

    @action(number=numbers)
    def step(self, number: int) -> None:
        self.lockstep.step(Gradients(number))

    @action(number=numbers, data=st.data(), in_place=st.booleans())
    def step_with_some(self, number: int, data: Any, in_place: bool) -> None:
        values = data.draw(st.sampled_from(["normal", "zero", "half zero", "small"]))
        self.lockstep.step(self.gradients(data, number, values=values, in_place=in_place))

    @action(number=numbers, data=st.data())
    def step_with_closure(self, number: int, data: Any) -> None:
        self.lockstep.step(self.gradients(data, number), closure=True)

    @action(number=numbers, data=st.data())
    def step_with_poison(self, number: int, data: Any) -> None:
        self.lockstep.step(self.gradients(data, number, values="poison"))

    @precondition(lambda self: self.scaled)
    @action(number=numbers, data=st.data(), scale=st.sampled_from([0.5, 1.0, 8.0]), found=st.booleans())
    def step_with_scaler(self, number: int, data: Any, scale: float, found: bool) -> None:
        self.lockstep.step(self.gradients(data, number), scale=scale, found_inf=found)

    @action(number=numbers, times=st.integers(2, 4))
    def steps_of_alternating_sets(self, number: int, times: int) -> None:
        for i in range(times):
            self.lockstep.step(Gradients(number + i, missing=frozenset({i % 2})))

    # Changes of settings.

    @action(i=places, frozen=st.booleans())
    def freeze(self, i: int, frozen: bool) -> None:
        self.lockstep.freeze(i % self.lockstep.count, frozen)

    @action(shapes=shapes, data=st.data(), tensor_id=st.booleans())
    def add_group(self, shapes: list[tuple[int, ...]], data: Any, tensor_id: bool) -> None:
        groups = len(self.lockstep.first.optimizer.param_groups)
        if groups < 4:
            own = {} if not tensor_id else {"tensor_id": 1000 * groups}
            name = data.draw(st.sampled_from(self.names))
            own[name] = data.draw(st.sampled_from(self.values(name)))
            self.lockstep.add_group(shapes, data.draw(st.sampled_from(self.dtypes)), own)

    def values(self, name: str) -> list[Any]:
        return HYPERPARAMETERS[name]

    @action(group=places, data=st.data())
    def change(self, group: int, data: Any) -> None:
        name = data.draw(st.sampled_from(self.names))
        self.lockstep.change(self.group(group), name, data.draw(st.sampled_from(self.values(name))))

    @action(group=places, value=st.sampled_from([0.0, 1e-3, 2.0**-6]))
    def fill(self, group: int, value: float) -> None:
        self.lockstep.fill(self.group(group), value)

    @action()
    def swap_backends(self) -> None:
        self.lockstep.swap_backends(KERNEL)

    @action(i=places, with_state=st.booleans())
    def replace(self, i: int, with_state: bool) -> None:
        self.lockstep.replace(i % self.lockstep.count, with_state)

    @action(group=places)
    def reorder(self, group: int) -> None:
        self.lockstep.reorder(self.group(group))

    @action(all_=st.booleans())
    def clear(self, all_: bool) -> None:
        self.lockstep.clear(all_)

    @action(data=st.data(), reload=st.booleans())
    def cast(self, data: Any, reload: bool) -> None:
        self.lockstep.cast(data.draw(st.sampled_from(self.dtypes)), reload)

    @action(group=places, name=st.sampled_from(sorted(BAD)))
    def refuse(self, group: int, name: str) -> None:
        self.lockstep.refuse(self.group(group), name)

    @action(i=places)
    def sparse(self, i: int) -> None:
        self.lockstep.sparse(i % self.lockstep.count)

    # Actions that change nothing.

    @action(set_to_none=st.booleans())
    def zero_grad(self, set_to_none: bool) -> None:
        self.lockstep.zero_grad(set_to_none)

    @action()
    def look(self) -> None:
        self.lockstep.look()

    @action(i=places, data=st.data())
    def move(self, i: int, data: Any) -> None:
        self.lockstep.move(i % self.lockstep.count, data.draw(st.sampled_from(self.moves)))

    @action(data=st.data(), replaces=st.booleans())
    def move_state(self, data: Any, replaces: bool) -> None:
        self.lockstep.move_state(data.draw(st.sampled_from(MOVES)), replaces)

    @action(fresh=st.booleans())
    def save_and_load(self, fresh: bool) -> None:
        self.lockstep.save_and_load(fresh)

    @action(how=st.sampled_from(["deepcopy", "pickle"]))
    def copy(self, how: str) -> None:
        self.lockstep.copy(how)

    @action()
    def save(self) -> None:
        self.lockstep.save()

    @action(fresh=st.booleans())
    def restore(self, fresh: bool) -> None:
        self.lockstep.restore(fresh)


class AdamWMachine(Machine):
    forms = ("PATSAdamW",)
    names = tuple(HYPERPARAMETERS)
    dtypes = (*Machine.dtypes, torch.float16)


class AttachedMachine(Machine):
    """PATS attached to torch's optimizers."""

    forms = tuple(form for form in FORMS if form != "PATSAdamW" and "fused" not in form)
    names = ("lr", *(name for name in HYPERPARAMETERS if name not in OF_ADAMW))
    scaled = False

    def values(self, name: str) -> list[Any]:
        return [1e-3, 1e-2] if name == "lr" else super().values(name)  # not all of them take a tensor


class FusedMachine(AttachedMachine):
    """PATS attached to torch's fused optimizers, which obey a GradScaler and assume contiguous memory."""

    forms = tuple(form for form in FORMS if "fused" in form)
    layouts = ("contiguous", "misaligned")
    moves = ("clone", "set_", "share_memory_", "contiguous", "misaligned")
    scaled = True


@pytest.mark.backend
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("machine", [AdamWMachine, AttachedMachine, FusedMachine])
def test_any_order(machine: type[Machine]) -> None:
    DONE.clear()
    examples, steps = (FUZZ, 60) if FUZZ else (2, 8) if INTERPRETED else (12, 30)
    run_state_machine_as_test(machine, settings=settings(max_examples=examples, stateful_step_count=steps))
    assert sum(count for name, count in DONE.items() if name.startswith("step")) >= examples
    if FUZZ:
        print(f"\n{machine.__name__}: {sum(DONE.values())} actions: {dict(DONE.most_common())}")
