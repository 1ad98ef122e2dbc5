"""Which studies there are. A name stands for one or more of them, run in this order."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from replication.grid import Setting, Study, Trial

BATCH_SIZE = {"tiny": 32, "l6": 16, "mpnet": 16, "bert-base-uncased": 32, "roberta-large": 32}
# AdamW's, by the pilot; of the last two, which it did not have, what is usual
RATES = {"tiny": 3e-4, "l6": 1e-4, "mpnet": 5e-5, "bert-base-uncased": 2e-5, "roberta-large": 1e-5}
SCALES = (3e-4, 2e-3)  # of the noise; 1e-5, the default, changes nothing that one can measure
# Times a tensor's standard deviation, which is 0.04 to 0.1 in four of five matrices of tiny and l6.
RELATIVE_SCALES = (5e-3, 3e-2)
TRIAL_SEEDS = (101, 102)
SEEDS = tuple(range(11, 21))  # none of the pilot's, which found the learning rates


def setting(
    model: str, task: str, train_samples: int | None = None, epochs: int = 3, rate: float | None = None
) -> Setting:
    return Setting(model, task, rate or RATES[model], epochs, BATCH_SIZE[model], train_samples)


# Pilot: where plain AdamW beats the bigger class and the same architecture from random weights.


def pilot(
    of: Setting, rates: Sequence[float], seeds: Sequence[int] = (1, 2), random_weights: bool = False
) -> Study:
    methods: dict[str, tuple[Trial, ...]] = {
        f"adamw {rate:g}": ({"method": "adamw", "learning_rate": rate},) for rate in rates
    }
    of = replace(of, learning_rate=rates[0], random_weights=random_weights)
    start = "random" if random_weights else "pretrained"
    return Study(f"pilot-{_name(of)}-{of.epochs}-{start}", of, methods, trial_seeds=(), seeds=seeds)


def _name(of: Setting) -> str:
    return f"{of.model}-{of.task}-{of.train_samples or 'all'}"


# The comparison: every method with six trials. All have the same three learning rates: a method that could
# not try the rate that another chose would be compared by its rate.


def methods(rate: float) -> dict[str, tuple[Trial, ...]]:
    """By label, six trials: half, one and two times the rate that the pilot found, with two values of what
    the method has of its own, or of the weight decay where it has nothing."""
    decays = [{"weight_decay": decay} for decay in (0.01, 0.1)]
    scales = [{"noise_scale": scale} for scale in SCALES]
    relative = [{"noise_scale": scale, "noise_unit": "relative"} for scale in RELATIVE_SCALES]
    own: dict[str, tuple[str, Sequence[dict[str, Any]]]] = {
        "adamw": ("adamw", decays),
        "isotropic": ("isotropic", scales),
        "noisytune": ("noisytune", decays),
        "neftune": ("neftune", [{"neftune_alpha": alpha} for alpha in (1.0, 5.0)]),
        "sage": ("sage", [{"sage_beta": beta} for beta in (0.75, 0.85)]),
        "pats product": ("pats", scales),
        "pats ucb": ("pats", [{**scale, "uncertainty": "ucb"} for scale in scales]),
        "pats none": ("pats", [{**scale, "uncertainty": "none"} for scale in scales]),
        "pats moments": ("pats", [{**scale, "sensitivity": "moments"} for scale in scales]),
        "pats relative": ("pats", relative),
    }
    return {
        label: tuple(
            {"method": method, "learning_rate": factor * rate, **values}
            for values in each
            for factor in (1.0, 0.5, 2.0)
        )
        for label, (method, each) in own.items()
    }


def compare(
    of: Setting,
    labels: Sequence[str] = (),
    seeds: Sequence[int] = SEEDS,
    trial_seeds: Sequence[int] = TRIAL_SEEDS,
    seconds: float = 60.0,
) -> Study:
    """All methods, or those of `labels`."""
    every = methods(of.learning_rate)
    chosen = {label: every[label] for label in labels or every}
    return Study(_name(of), of, chosen, trial_seeds, seeds, seconds)


def baseline(of: Setting, rates: Sequence[float], seeds: Sequence[int] = (1, 2, 3)) -> Study:
    """The same architecture from random weights, at the learning rates that suit it best."""
    return replace(pilot(of, rates, seeds, random_weights=True), name=f"{_name(of)}-random-weights")


# Ablations: one thing at a time, each a single trial with the reported seeds.


def ablations(of: Setting, noise_scale: float, seconds: float) -> list[Study]:
    """Around PATS with this noise_scale: gamma, noise_scale over four decades, and the rest one by one."""
    pats: dict[str, Any] = {"method": "pats", "noise_scale": noise_scale}
    parts: dict[str, dict[str, tuple[Trial, ...]]] = {
        "gamma": {f"gamma {gamma:g}": ({**pats, "gamma": gamma},) for gamma in (0.0, 0.5, 1.0, 2.0, 4.0)},
        "noise-scale": {
            f"noise_scale {scale:g}": ({**pats, "noise_scale": scale},)
            for scale in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
        },
        "forms": {
            "delayed": (pats,),
            "exact": ({**pats, "normalization": "exact"},),
            "ucb": ({**pats, "uncertainty": "ucb"},),
            "none": ({**pats, "uncertainty": "none"},),
            "falls with lr": ({**pats, "noise_schedule": "lr"},),
            "no noise on embeddings": ({**pats, "no_noise": "embed"},),
        },
    }
    adamw: dict[str, tuple[Trial, ...]] = {"adamw": ({"method": "adamw"},)}
    return [
        Study(f"ablation-{part}-{_name(of)}", of, adamw | variants, (), SEEDS, seconds)
        for part, variants in parts.items()
    ]


def tiny_sst2(train_samples: int) -> Setting:
    return setting("tiny", "sst2", train_samples, rate=1e-3)


TINY_SST2 = tiny_sst2(1000)
TINY_STSB = setting("tiny", "stsb")
L6_SST2 = setting("l6", "sst2", 500)
L6_COLA = setting("l6", "cola", 2000)
MPNET_SST2 = setting("mpnet", "sst2", 250)
FEW = ("adamw", "isotropic", "pats product", "pats relative")

STUDIES: dict[str, list[Study]] = {
    "pilot": [
        pilot(setting("tiny", "sst2", 4000), (3e-4, 1e-3)),
        pilot(setting("tiny", "sst2", 4000), (1e-3,), random_weights=True),
        pilot(setting("tiny", "stsb"), (3e-4, 1e-3)),
        pilot(setting("tiny", "stsb"), (1e-3,), (1,), random_weights=True),
        pilot(setting("tiny", "cola"), (3e-4, 1e-3)),
        pilot(setting("l6", "sst2", 1000), (1e-4,), (1,)),
        pilot(setting("l6", "sst2", 1000), (1e-4,), (1,), random_weights=True),
        pilot(setting("l6", "cola", 2000), (1e-4,), (1,)),
        pilot(setting("tiny", "sst2", 1000), (3e-4,), (1, 2, 3)),
        pilot(setting("tiny", "sst2", 1000), (3e-4, 1e-3), random_weights=True),
        pilot(setting("tiny", "stsb", 1000, 5), (3e-4, 1e-4), (1, 2, 3)),
        pilot(setting("tiny", "stsb", 1000, 5), (3e-4, 1e-3), random_weights=True),
        pilot(setting("l6", "sst2", 500), (1e-4, 5e-5)),
        pilot(setting("l6", "cola", 1000), (1e-4,), (1,)),
    ],
    # Learning rates for the settings that the pilot found good, and what else might be one.
    "pilot-2": [
        pilot(setting("tiny", "sst2", 1000), (3e-4, 5e-4, 1e-3, 2e-3), (1, 2, 3)),
        pilot(setting("tiny", "sst2", 1000), (3e-3,), random_weights=True),
        pilot(setting("mpnet", "sst2", 250), (5e-5,), (1,)),
        pilot(setting("l6", "mrpc", 1000), (1e-4,), (1,)),
        pilot(setting("tiny", "stsb"), (2e-4, 5e-4)),
    ],
    # Whether RTE tells anything: l6 has seen MultiNLI, its near relative.
    "pilot-3": [
        pilot(setting("tiny", "rte"), (3e-4, 1e-3)),
        pilot(setting("l6", "rte", 1000), (1e-4, 5e-5)),
    ],
    # About four hours of one core, nearly all of them the larger model's.
    "first": [
        compare(TINY_SST2, seconds=8),
        baseline(TINY_SST2, (3e-4, 1e-3, 3e-3)),
        compare(L6_SST2, seconds=55),
        baseline(L6_SST2, (1e-4, 3e-4)),
    ],
    # Some 23 hours of one core, of which the larger models take 20: they are for a GPU.
    "full": [
        compare(TINY_STSB, seconds=42),
        baseline(TINY_STSB, (3e-4, 1e-3)),
        compare(tiny_sst2(250), seconds=4),
        compare(setting("l6", "sst2", 2000), FEW, seconds=190),
        compare(setting("l6", "mrpc", 1000), FEW, seconds=190),
        baseline(setting("l6", "mrpc", 1000), (1e-4, 3e-4)),
        compare(L6_COLA, FEW, seconds=120),
        baseline(L6_COLA, (1e-4, 3e-4)),
        compare(MPNET_SST2, FEW, seconds=300),
    ],
    # The models of the paper, which are not to be had here: their folders below --models, on a GPU.
    "paper": [
        compare(setting(model, task), seconds=120)
        for model in ("bert-base-uncased", "roberta-large")
        for task in ("cola", "rte", "mrpc", "stsb", "sst2")
    ],
    "ablations": [*ablations(TINY_SST2, 1e-3, 8), *ablations(TINY_STSB, 1e-3, 42)],
}


def select(names: Sequence[str], only: str = "") -> list[Study]:
    """The studies of these names whose own names match the regular expression `only`.

    Raises:
        ValueError: there is no such name, or no such study.
    """
    if unknown := [name for name in names if name not in STUDIES]:
        raise ValueError(f"no such study: {', '.join(unknown)} (there are {', '.join(STUDIES)})")
    found = [study for name in names for study in STUDIES[name] if re.search(only, study.name)]
    if names and not found:
        raise ValueError(f"no study's name matches {only!r}")
    return found
