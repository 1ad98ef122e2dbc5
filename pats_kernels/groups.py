"""Param groups by name: what gets noise, and what decays."""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from pats_kernels.hyperparameters import AdamWHyperparameters, hyperparameters

NO_NOISE = ("bias", "norm", "embed")
NO_WEIGHT_DECAY = ("bias", "norm")

Patterns = str | Sequence[str]


class _Place(NamedTuple):
    """One of the places in a model at which a parameter is found: a tied one has several."""

    name: str
    owner: str  # class of the module that holds it


def param_groups(
    model: nn.Module,
    *,
    weight_decay: float,
    noise_scale: float | Tensor,
    no_noise: Patterns = NO_NOISE,
    no_weight_decay: Patterns = NO_WEIGHT_DECAY,
) -> list[dict[str, Any]]:
    """Param groups for `PATSAdamW`, or for any optimizer to which `PATS` is attached.

        PATSAdamW(param_groups(model, weight_decay=0.01, noise_scale=1e-5), lr=2e-5)

    Patterns are given as PEFT's `target_modules` are. One string is a regular expression that the whole name
    of a parameter must match. Of a sequence, each entry takes the parameters

    - whose name has it as a part, cut at dots: it ends the parameter's name, or that of a module around it
      ("classifier", "layer.0", "layer.0.attention.self.query.weight"), and
    - for which it is contained, whatever the case, in the parameter's own name, in the name of the module
      that holds it, or in that module's class: "norm" takes `ln_1.weight` of a `LayerNorm`, "embed" takes
      `wte.weight` of an `nn.Embedding`. Names and classes of modules further out do not count here: not
      everything in an `embedding_model` is an embedding.

    Tied parameters go by all their names.

    Args:
        model: its parameters that require a gradient are grouped.
        weight_decay: >= 0, of the groups that decay; the others have 0.0.
        noise_scale: >= 0, of the groups with noise; the others have 0.0, and so no state of PATS.
        no_noise: what gets no noise.
        no_weight_decay: what does not decay.

    Returns:
        At most four groups, none empty: with decay and noise, with noise, with decay, with neither. Each has
        "params" and their "param_names", in the model's order, each parameter once, "weight_decay" and
        "noise_scale". The noise of a parameter depends on its position: a run is to be resumed with the
        same patterns.

    Raises:
        ValueError: a value out of range; an entry that matches no parameter, frozen ones included (but for
            the defaults' own entries: not every model has a bias); not a regular expression.
        TypeError: `model` is no module, patterns are no strings.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but is {type(model).__name__}")
    values = {"weight_decay": weight_decay, "noise_scale": noise_scale}
    hyperparameters(values, kind=AdamWHyperparameters)
    places = _places(model)
    quiet = _matched("no_noise", no_noise, places)
    still = _matched("no_weight_decay", no_weight_decay, places)

    groups: list[dict[str, Any]] = []
    for noisy in (True, False):
        for decays in (True, False):
            params = [
                param
                for param in places
                if param.requires_grad and (param not in quiet) == noisy and (param not in still) == decays
            ]
            if params:
                groups.append(
                    {
                        "params": params,
                        "param_names": [places[param][0].name for param in params],
                        "weight_decay": weight_decay if decays else 0.0,
                        "noise_scale": noise_scale if noisy else 0.0,
                    }
                )
    return groups


def _places(model: nn.Module) -> dict[Tensor, list[_Place]]:
    """Where each parameter is found, first as `named_parameters` calls it, in that order."""
    places: dict[Tensor, list[_Place]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for key, param in module.named_parameters(path, recurse=False, remove_duplicate=False):
            places.setdefault(param, []).append(_Place(key, type(module).__name__))
    return places


def _matched(argument: str, patterns: Patterns, places: dict[Tensor, list[_Place]]) -> set[Tensor]:
    """The parameters that match a pattern. Raises if a pattern given by the user matches none."""
    matched: set[Tensor] = set()
    for entry, matches in _matchers(argument, patterns):
        found = {param for param, those in places.items() if any(map(matches, those))}
        if not found and entry not in NO_NOISE + NO_WEIGHT_DECAY:
            raise ValueError(f"{argument}: {entry!r} matches no parameter{_hint(patterns)}")
        matched |= found
    return matched


def _matchers(argument: str, patterns: Patterns) -> Iterator[tuple[str, Callable[[_Place], bool]]]:
    if isinstance(patterns, str):
        try:
            expression = re.compile(patterns)
        except re.error as error:
            raise ValueError(f"{argument}: {patterns!r} is not a regular expression: {error}") from None
        yield patterns, lambda place: expression.fullmatch(place.name) is not None
        return
    for entry in patterns:
        if not isinstance(entry, str):
            raise TypeError(f"{argument}: its entries must be strings, but one is {entry!r}")
        if not entry:
            raise ValueError(f"{argument}: an empty string would match everything")
        yield entry, lambda place, entry=entry: _takes(entry, place)


def _takes(entry: str, place: _Place) -> bool:
    if f".{entry}." in f".{place.name}.":
        return True
    return any(entry.lower() in part.lower() for part in (*place.name.split(".")[-2:], place.owner))


def _hint(patterns: Patterns) -> str:
    if not isinstance(patterns, str):
        return ""
    return f" (one string is a regular expression for whole names; for parts of names: ({patterns!r},))"
