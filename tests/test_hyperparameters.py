"""What a param group may hold: allowed values pass, and errors name all others with the allowed range."""

import math
from collections import UserList
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from operator import is_
from typing import Any

import numpy as np
import pytest
import torch
from bad_input import BAD_HYPERPARAMETERS, assert_names

from pats_kernels.hyperparameters import (
    AdamWHyperparameters,
    Hyperparameters,
    Reader,
    Variant,
    defaults_of,
    hyperparameters,
)

DEFAULTS = defaults_of(Hyperparameters)

GOOD = [
    ("noise_scale", 0),
    ("noise_scale", 0.0),
    ("noise_scale", 1e30),
    ("gamma", 0),
    ("gamma", 1000.0),
    ("sens_betas", (0.0, 0.0)),
    ("sens_betas", (0.999999, 0.5)),
    ("sens_betas", (0, 0)),
    ("uncertainty", "product"),
    ("uncertainty", "ucb"),
    ("uncertainty", "none"),
    ("normalization", "delayed"),
    ("normalization", "exact"),
    ("state_dtype", None),
    ("state_dtype", torch.float32),
    ("state_dtype", torch.bfloat16),
    ("stochastic_rounding", False),
    ("seed", 0),
    ("seed", 2**64 - 1),
]


def test_large_integers_are_floats() -> None:
    """torch multiplies by no integer above 2^63: an eager step once stopped half-way."""
    names = ("noise_scale", "gamma", "lr", "eps", "weight_decay")
    h = AdamWHyperparameters(**dict.fromkeys(names, 2**70))
    assert h == AdamWHyperparameters(**dict.fromkeys(names, 2.0**70))
    assert all(type(number) is float for number in (*h.numbers, *h.sens_betas, *h.betas))
    assert (torch.ones(2) * h.noise_scale).tolist() == [2.0**70] * 2


class Config:
    """A sequence by its methods only, not by its type."""

    def __init__(self, *entries: float) -> None:
        self._entries = entries

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> float:
        return self._entries[index]


def test_the_contract_s_defaults() -> None:
    assert DEFAULTS == {
        "noise_scale": 1e-5,
        "gamma": 1.0,
        "sens_betas": (0.85, 0.95),
        "uncertainty": "product",
        "normalization": "delayed",
        "state_dtype": None,
        "stochastic_rounding": True,
        "seed": 0,
    }


@pytest.mark.parametrize(("name", "value"), GOOD)
def test_good(name: str, value: Any) -> None:
    assert getattr(hyperparameters({name: value}, DEFAULTS), name) == value


@pytest.mark.parametrize(("name", "value", "limits"), BAD_HYPERPARAMETERS)
def test_bad(name: str, value: Any, limits: str) -> None:
    with pytest.raises(ValueError, match=name) as error:
        hyperparameters({name: value}, DEFAULTS)
    assert_names(error, name, repr(value), limits)


@pytest.mark.parametrize(("name", "value", "limits"), BAD_HYPERPARAMETERS)
def test_an_instance_that_exists_is_valid(name: str, value: Any, limits: str) -> None:
    with pytest.raises(ValueError, match=name):
        Hyperparameters(**{name: value})


def test_a_group_wins_over_the_defaults() -> None:
    h = hyperparameters({"gamma": 3.0, "lr": 0.1, "params": []}, DEFAULTS | {"gamma": 2.0, "seed": 5})
    assert (h.gamma, h.seed, h.noise_scale) == (3.0, 5, 1e-5)


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("sens_betas", [0.5, 0.25], (0.5, 0.25)),  # as JSON and YAML give it
        ("sens_betas", UserList([0.5, 0.25]), (0.5, 0.25)),
        ("sens_betas", Config(0.5, 0.25), (0.5, 0.25)),  # as Hydra gives it
        ("sens_betas", np.array([0.5, 0.25], np.float32), (0.5, 0.25)),
        ("sens_betas", torch.tensor([0.5, 0.25]), (0.5, 0.25)),
        ("sens_betas", (torch.tensor(0.5), np.float32(0.25)), (0.5, 0.25)),
        ("seed", np.int64(7), 7),
        ("seed", np.uint64(2**64 - 1), 2**64 - 1),
        ("seed", torch.tensor(7), 7),
        ("noise_scale", np.float32(0.25), 0.25),
        ("noise_scale", np.array(0.25), 0.25),
        ("noise_scale", Fraction(1, 4), 0.25),
        ("noise_scale", torch.tensor(0.25), 0.25),  # as a schedule on the device may
        ("noise_scale", np.float64(0.25), 0.25),
        ("gamma", torch.tensor(2), 2),
    ],
)
def test_other_forms(name: str, given: Any, value: Any) -> None:
    got = getattr(hyperparameters({name: given}, DEFAULTS), name)
    assert got == value
    numbers = got if isinstance(got, tuple) else (got,)
    assert {type(number) for number in numbers} <= {float, int}  # arithmetic with NumPy's would be float32


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sens_betas", {0.5: 0, 0.25: 0}),
        ("sens_betas", "05"),
        ("sens_betas", torch.tensor(0.5)),
        ("sens_betas", torch.zeros(2, 2)),
        ("sens_betas", np.zeros((2, 2))),
        ("seed", np.float64(1.0)),
        ("seed", True),
        ("gamma", 10**400),
        ("gamma", 1j),
        ("gamma", Decimal(1)),
        ("gamma", torch.empty((), device="meta")),
        ("uncertainty", torch.zeros(2)),
        ("normalization", np.zeros(2)),
        ("stochastic_rounding", torch.zeros(3)),
    ],
)
def test_what_is_no_number_of_any_kind(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"Invalid {name}"):
        hyperparameters({name: value}, DEFAULTS)


def test_a_pair_of_tensors_is_followed() -> None:
    """They are read at every call: the cache is by number, not by tensor."""
    betas = (torch.tensor(0.5), torch.tensor(0.25))
    assert hyperparameters({"sens_betas": betas}, DEFAULTS).sens_betas == (0.5, 0.25)
    betas[0].fill_(0.75)
    assert hyperparameters({"sens_betas": betas}, DEFAULTS).sens_betas == (0.75, 0.25)


def test_a_changed_value_is_seen() -> None:
    """The cache is by value, so a schedule takes effect."""
    group = {"noise_scale": 1e-3}
    assert hyperparameters(group, DEFAULTS).noise_scale == 1e-3
    group["noise_scale"] = 1e-4
    assert hyperparameters(group, DEFAULTS).noise_scale == 1e-4
    group["noise_scale"] = math.nan
    with pytest.raises(ValueError, match="noise_scale"):
        hyperparameters(group, DEFAULTS)


@pytest.mark.parametrize("values", [{"stochastic_rounding": 1}, {"noise_scale": True}, {"seed": 1.0}])
def test_a_cached_equal_does_not_let_a_wrong_type_through(values: dict[str, Any]) -> None:
    """1 == True == 1.0 have the same hash. A valid one must not make the others valid."""
    hyperparameters({"seed": 1, "noise_scale": 1.0, "stochastic_rounding": True}, DEFAULTS)
    hyperparameters({"seed": 1}, DEFAULTS)
    hyperparameters({"noise_scale": 1.0}, DEFAULTS)
    (name,) = values
    if name == "stochastic_rounding":  # 1 means True everywhere
        assert hyperparameters(values, DEFAULTS).variant.stochastic_rounding == 1
    else:
        with pytest.raises(ValueError, match=name):
            hyperparameters(values, DEFAULTS)


def test_variant() -> None:
    assert Hyperparameters(uncertainty="ucb").variant == Variant("pats", "ucb", "delayed", True)


@pytest.mark.parametrize("name", ["noise_scale", "lr"])
def test_a_tensor_on_a_device_is_not_read(name: str) -> None:
    """A tensor on "meta" cannot be read at all."""
    value = torch.empty((), device="meta")
    h = hyperparameters({name: value}, kind=AdamWHyperparameters)
    assert getattr(h, name) is value
    assert h.on_device == {name: value}
    assert h.noisy
    assert h.numbers[0 if name == "noise_scale" else 6] == 0
    assert hyperparameters({name: torch.tensor(0.5)}, kind=AdamWHyperparameters).on_device == {}
    for wrong in (torch.empty(2, device="meta"), torch.empty((), dtype=torch.float64, device="meta")):
        with pytest.raises(ValueError, match=f"Invalid {name}: .*one element, and be float32"):
            hyperparameters({name: wrong}, kind=AdamWHyperparameters)


class Counted:
    """A `Reader` of `AdamWHyperparameters`, and the groups that it has checked."""

    def __init__(self) -> None:
        self.checked: list[Mapping[str, Any]] = []
        self._reader = Reader(self._check, AdamWHyperparameters, ["amsgrad"])

    def _check(self, group: Mapping[str, Any], defaults: Mapping[str, Any]) -> AdamWHyperparameters:
        if group.get("amsgrad"):
            raise ValueError("Invalid amsgrad")
        self.checked.append(group)
        return hyperparameters(group, defaults, AdamWHyperparameters)

    def read(self, *groups: dict[str, Any], **defaults: Any) -> list[AdamWHyperparameters]:
        self.checked.clear()
        found = self._reader.read(groups, ADAMW_DEFAULTS | defaults)
        assert found == [hyperparameters(g, ADAMW_DEFAULTS | defaults, AdamWHyperparameters) for g in groups]
        return found


ADAMW_DEFAULTS = dict(defaults_of(AdamWHyperparameters))
OTHERS = {
    "noise_scale": 2e-3,
    "gamma": 2.0,
    "sens_betas": (0.5, 0.25),
    "uncertainty": "ucb",
    "normalization": "exact",
    "state_dtype": torch.bfloat16,
    "stochastic_rounding": False,
    "seed": 2**40,
    "lr": 2e-3,
    "betas": (0.5, 0.25),
    "eps": 1e-3,
    "weight_decay": 0.5,
    "maximize": True,
    "sensitivity": "moments",
}


def test_a_reader_checks_only_what_has_changed() -> None:
    reader = Counted()
    groups: list[dict[str, Any]] = [{"lr": 1e-3, "betas": (0.5, 0.5)}, {"lr": 2e-3}]
    first = reader.read(*groups)
    assert reader.checked == groups
    assert all(map(is_, reader.read(*groups), first))
    assert reader.checked == []
    groups[1]["lr"] = 3e-3
    assert reader.read(*groups)[0] is first[0]
    assert reader.checked == groups[1:]
    assert reader.read(*groups[1:]) == [hyperparameters(groups[1], ADAMW_DEFAULTS, AdamWHyperparameters)]
    assert reader.checked == groups[1:]  # at another position


@pytest.mark.parametrize("place", ["group", "defaults"])
@pytest.mark.parametrize("name", OTHERS)
def test_a_reader_sees_every_change(name: str, place: str) -> None:
    assert OTHERS.keys() == ADAMW_DEFAULTS.keys()
    reader, group, defaults = Counted(), {}, {}
    before = reader.read(group, **defaults)
    (group if place == "group" else defaults)[name] = OTHERS[name]
    assert reader.read(group, **defaults) != before
    (group if place == "group" else defaults)[name] = [object()]
    with pytest.raises(ValueError, match=f"Invalid {name}"):
        reader.read(group, **defaults)


def test_a_reader_sees_changes_inside_of_objects() -> None:
    """A list, an array and a tensor stay the same object when their values change."""
    betas, lr, noise_scale = [0.5, 0.25], torch.tensor(1e-3), np.array(1e-4)
    reader, group = Counted(), {"betas": betas, "lr": lr, "noise_scale": noise_scale}
    reader.read(group)
    betas[0] = 0.75
    assert reader.read(group)[0].betas == (0.75, 0.25)
    lr.fill_(0.5)
    assert reader.read(group)[0].lr == 0.5
    noise_scale[...] = 0.25
    assert reader.read(group)[0].noise_scale == 0.25


def test_a_reader_sees_changes_of_what_is_no_hyperparameter() -> None:
    reader, group = Counted(), {"lr": 1e-3}
    reader.read(group)
    group["amsgrad"] = True
    with pytest.raises(ValueError, match="Invalid amsgrad"):
        reader.read(group)
