"""Param groups by name: which parameters get noise, and which get weight decay."""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from pats_kernels.hyperparameters import AdamWHyperparameters, hyperparameters

NO_NOISE = ("bias", "norm", "embed")
NO_WEIGHT_DECAY = ("bias", "norm")

Patterns = str | Sequence[str]


class _Place(NamedTuple):
    """One of the places of a parameter in a model; a tied parameter has several."""

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
    """Makes param groups for `PATSAdamW`, or for any optimizer that `PATS` is attached to.

        PATSAdamW(param_groups(model, weight_decay=0.01, noise_scale=1e-5), lr=2e-5)

    Patterns work as PEFT's `target_modules` do. A single string is a regular expression that must match the
    whole name of a parameter. In a sequence, each entry selects the parameters

    - whose name contains it as one or more whole parts between dots ("classifier", "layer.0",
      "layer.0.attention.self.query.weight"), and
    - for which it is contained, in upper or lower case, in the parameter's own name, in the name of the
      module that holds it, or in that module's class: "norm" selects `ln_1.weight` of a `LayerNorm`, "embed"
      selects `wte.weight` of an `nn.Embedding`. Names and classes of modules further out do not count here:
      not everything in an `embedding_model` is an embedding.

    A tied parameter is selected if any of its names is.

    Args:
        model: its parameters that require a gradient are grouped.
        weight_decay: >= 0, for the groups with weight decay; the others have 0.0.
        noise_scale: >= 0, for the groups with noise; the others have 0.0, and so no state of PATS.
        no_noise: patterns of the parameters that get no noise.
        no_weight_decay: patterns of the parameters that get no weight decay.

    Returns:
        At most four groups, none empty: with decay and noise, with noise, with decay, with neither. Each has
        "params" and their "param_names", in the model's order, each parameter once, "weight_decay" and
        "noise_scale". The noise of a parameter depends on its position, so resume a run with the same
        patterns.

    Raises:
        ValueError: a value out of range; an entry that matches no parameter, not even a frozen one (except
            the default entries, because not every model has a bias); an invalid regular expression.
        TypeError: `model` is not a module; a pattern is not a string.
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
    """Each parameter's places, in the order of `named_parameters`; the first has the name given there."""
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
    return f" (one string is a regular expression for whole names; for parts of names pass ({patterns!r},))"
