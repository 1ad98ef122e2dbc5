"""What a run is, what a study asks for, and which runs that makes.

A run is a flat dictionary, its configuration: all that its result depends on and nothing else, every default
written out. Runs with the same configuration are the same run, whichever study asks for it.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from glue_data import TASKS
from glue_methods import FIELDS, NOT_GIVEN, MethodArguments

VERSION = 1  # of what a configuration means: another one makes all runs new
Configuration = dict[str, Any]
Trial = Mapping[str, Any]  # a method and its hyperparameters, of which some may be the setting's too: TUNED

TUNED = ("learning_rate", "weight_decay")  # of a setting: a trial may have its own

# What is quoted of a task. Of MRPC not F1, as GLUE does: for the bigger class alone it is 0.80.
QUOTED = {"mrpc": "accuracy", "stsb": "spearman"}


def quoted(task: str) -> str:
    """The metric that selects hyperparameters and is compared between methods."""
    return QUOTED.get(task, TASKS[task].metrics[0])


@dataclass(frozen=True)
class Setting:
    """What all methods of a study share.

    Attributes:
        model: a folder of --models.
        task: as glue_data.py calls it.
        learning_rate, weight_decay: unless a trial has its own. Linear warm-up over a tenth of the steps,
            then linear to 0.
        train_samples: how many of the training set, the same ones in each run; None: all.
        random_weights: the model's architecture from fresh weights: a baseline.
    """

    model: str
    task: str
    learning_rate: float
    epochs: int = 3
    batch_size: int = 16
    train_samples: int | None = None
    weight_decay: float = 0.01
    max_seq_length: int = 128
    random_weights: bool = False

    @property
    def name(self) -> str:
        size = "" if self.train_samples is None else f" ({self.train_samples})"
        return f"{self.model}{' from random weights' if self.random_weights else ''}, {self.task}{size}"


@dataclass(frozen=True)
class Study:
    """Methods compared in one setting.

    Each method has a label and its trials. Where there are several, each is run with every one of
    `trial_seeds`, and the one with the best mean on the selection half of the development data goes on, the
    first of equals. What goes on is run with every one of `seeds`.

    Attributes:
        seconds: what a run is expected to take on one core, for the plan, as long as none has been made.
    """

    name: str
    setting: Setting
    methods: Mapping[str, Sequence[Trial]]
    trial_seeds: Sequence[int]
    seeds: Sequence[int]
    seconds: float = 60.0

    def __post_init__(self) -> None:
        if set(self.trial_seeds) & set(self.seeds):
            raise ValueError(f"{self.name}: seeds that select must not be among those that are reported")
        for trials in self.methods.values():
            for trial in trials:
                configuration(self.setting, trial, 0)  # says what is wrong with it

    def trials(self) -> Iterator[Configuration]:
        """The runs that select, seed by seed, so that whoever stops early has something of every method."""
        for seed in self.trial_seeds:
            for trials in self.methods.values():
                if len(trials) > 1:
                    yield from (configuration(self.setting, trial, seed) for trial in trials)

    def trial_count(self) -> int:
        return len(list(self.trials()))

    def final_count(self) -> int:
        return len(self.methods) * len(self.seeds)

    def finals(self, chosen: Mapping[str, Trial]) -> Iterator[Configuration]:
        """The runs that are reported, seed by seed, of the methods whose hyperparameters are chosen."""
        for seed in self.seeds:
            yield from (configuration(self.setting, trial, seed) for trial in chosen.values())

    def choose(self, lines: Mapping[str, Mapping[str, Any]]) -> dict[str, Trial]:
        """Each method's trial that goes on; methods whose trials are not all there are left out.

        Args:
            lines: results by `identity`.
        """
        chosen: dict[str, Trial] = {}
        metric = quoted(self.setting.task)
        for label, trials in self.methods.items():
            if len(trials) == 1:
                chosen[label] = trials[0]
                continue
            names = [
                [identity(configuration(self.setting, trial, seed)) for seed in self.trial_seeds]
                for trial in trials
            ]
            if all(name in lines for of_trial in names for name in of_trial):
                means = [
                    sum(lines[name]["metrics"]["select"][metric] for name in of_trial) / len(of_trial)
                    for of_trial in names
                ]
                chosen[label] = trials[means.index(max(means))]
        return chosen


def configuration(setting: Setting, trial: Trial, seed: int) -> Configuration:
    """A run.

    Raises:
        ValueError: no such method, a hyperparameter that it does not read, no noise_scale where it needs one.
    """
    given = dict(trial)
    method = given.pop("method")
    if method not in FIELDS:
        raise ValueError(f"Unknown method: {method!r} (known: {', '.join(FIELDS)})")
    own = {name: given.pop(name) for name in TUNED if name in given}
    for name in given:
        if name not in FIELDS[method]:
            raise ValueError(f"{method} does not read {name} (but {', '.join(FIELDS[method]) or 'nothing'})")
    arguments = MethodArguments(method=method, **given)
    hyperparameters = {name: getattr(arguments, name) for name in FIELDS[method]}
    if hyperparameters.get("noise_scale") == NOT_GIVEN:
        raise ValueError(f"{method}: noise_scale is not given")
    shared = asdict(setting) | own
    return {"version": VERSION, **shared, "method": method, **hyperparameters, "seed": seed}


def identity(run: Configuration) -> str:
    """Twelve hexadecimal digits that stand for a configuration."""
    text = json.dumps(run, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def setting_of(run: Configuration) -> Setting:
    """With the trial's own values of TUNED."""
    return Setting(**{field.name: run[field.name] for field in fields(Setting)})


def is_of(run: Configuration, setting: Setting) -> bool:
    """Whether it is a run in this setting, whatever the trial."""
    return replace(setting_of(run), **{name: getattr(setting, name) for name in TUNED}) == setting


def method_arguments(run: Configuration) -> MethodArguments:
    given = {name: run[name] for name in FIELDS[run["method"]]}
    return MethodArguments(method=run["method"], **given)
