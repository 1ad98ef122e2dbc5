"""Collects what a step works on: lists of the parameters that have a gradient, and of their state."""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from itertools import compress
from operator import itemgetter
from typing import Any

from torch import Tensor

from pats_kernels.hyperparameters import Hyperparameters
from pats_kernels.numbering import ids_of
from pats_kernels.plan import BLOCK, Batch
from pats_kernels.state import Counters, State, complete, have_moved, keys_of, name_finder

Group = Mapping[str, Any]
States = MutableMapping[Tensor, State]

# A batch's columns of state, by their key in it.
COLUMNS = {
    "exp_avg_sens": "exp_avg_sens",
    "exp_avg_unc": "exp_avg_unc",
    "sens_stats": "sens_stats",
    "step": "steps",
    "exp_avg": "exp_avg",
    "exp_avg_sq": "exp_avg_sq",
}


def gather(
    param_groups: Sequence[Group],
    values_of_groups: Sequence[Hyperparameters],
    states: States,
    counters: Counters,
) -> tuple[Batch, list[Tensor]]:
    """The batch of a step, and the parameters that take their first step in it; these get their state here.

    Everything is done for all parameters of a group at once, with `map` or a comprehension. A loop that
    calls Python functions for each parameter would take longer than the rest of the step.

    Args:
        param_groups: the optimizer's.
        values_of_groups: the hyperparameters of each group.
        states: the state of each parameter.
        counters: count the elements that are not finite.

    Raises:
        ValueError, TypeError: names a `tensor_id`, or a parameter that no kernel can update.
    """
    name_of = name_finder(param_groups)
    params: list[Tensor] = []
    fresh: list[Tensor] = []
    values_of_each: list[Hyperparameters] = []
    batch = Batch(lambda i: name_of(params[i]), params, hyperparameters=values_of_each)
    noisy: list[bool] = []
    columns: dict[str, list[Tensor | None]] = {key: getattr(batch, name) for key, name in COLUMNS.items()}
    position, moved = 0, False
    for group, values in zip(param_groups, values_of_groups, strict=True):
        ids = ids_of(group, position)
        position += len(ids)
        if not (needed := keys_of(values)):
            continue
        own = group["params"]
        grads = [grad for param in own if (grad := param.grad) is not None]
        if len(grads) < len(own):
            own, ids = _where([param.grad is not None for param in own], own, ids)
        try:
            state = _state(own, states, needed)
        except (KeyError, TypeError):  # some have no state yet
            have = [_has_state(param, values, needed, states, name_of, fresh) for param in own]
            own, grads, ids = _where(have, own, grads, ids)
            state = _state(own, states, needed)
        for key, column in state.items():
            _fill(columns[key], len(params))
            columns[key] += column
        params += own
        batch.grads += grads
        batch.tensor_ids += ids
        values_of_each += [values] * len(own)
        noisy += [values.noisy] * len(own)
        moved = moved or (values.noisy and have_moved(counters, own, states))
    for key, column in columns.items():
        if column or key == "sens_stats":
            _fill(column, len(params))
    if True in noisy:
        batch.nonfinite = counters.column(params, noisy, batch.sens_stats, moved)
    batch.kept = len(states)
    return batch, fresh


def _where(chosen: Sequence[bool], *columns: Sequence[Any]) -> list[list[Any]]:
    return [list(compress(column, chosen)) for column in columns]


def _state(params: Sequence[Tensor], states: States, needed: frozenset[str]) -> dict[str, list[Tensor]]:
    """The parameters' state, by key. Raises KeyError or TypeError if one of them lacks some of it."""
    columns: dict[str, list[Tensor]] = {key: [] for key in needed}
    for first in range(0, len(params), BLOCK):
        entries: list[Any] = list(map(states.get, params[first : first + BLOCK]))
        for key, column in columns.items():
            column += map(itemgetter(key), entries)
    return columns


def _fill(column: list[Tensor | None], length: int) -> None:
    """Appends None for each of the `length` first parameters that has no such state."""
    if len(column) < length:
        column += [None] * (length - len(column))


def _has_state(
    param: Tensor,
    values: Hyperparameters,
    needed: frozenset[str],
    states: States,
    name_of: Callable[[Tensor], str],
    fresh: list[Tensor],
) -> bool:
    """Whether a parameter has its state; if it has elements, it gets its state here."""
    state = states.get(param)
    if state is not None and needed <= state.keys():
        return True
    if param.numel() == 0:
        return False
    fresh += [] if state else [param]
    state = {} if state is None else state
    complete(state, name_of(param), param, values)
    states[param] = state
    return True
