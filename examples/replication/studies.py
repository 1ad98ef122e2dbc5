"""Which studies there are. A name stands for one or more of them, run in this order."""

from collections.abc import Sequence
from dataclasses import replace

from replication.grid import Setting, Study, Trial

# Pilot: where plain AdamW beats the bigger class and the same architecture from random weights.


def pilot(
    setting: Setting, rates: Sequence[float], seeds: Sequence[int] = (1, 2), random_weights: bool = False
) -> Study:
    methods: dict[str, tuple[Trial, ...]] = {
        f"adamw {rate:g}": ({"method": "adamw", "learning_rate": rate},) for rate in rates
    }
    setting = replace(setting, learning_rate=rates[0], random_weights=random_weights)
    samples = setting.train_samples or "all"
    start = "random" if random_weights else "pretrained"
    name = f"pilot-{setting.model}-{setting.task}-{samples}-{setting.epochs}-{setting.batch_size}-{start}"
    return Study(name, setting, methods, trial_seeds=(), seeds=seeds)


def small(model: str, task: str, train_samples: int | None = None, epochs: int = 3) -> Setting:
    batch_size = 32 if model == "tiny" else 16
    return Setting(model, task, 1e-3, epochs, batch_size, train_samples)


STUDIES: dict[str, list[Study]] = {
    "pilot": [
        pilot(small("tiny", "sst2", 4000), (3e-4, 1e-3)),
        pilot(small("tiny", "sst2", 4000), (1e-3,), random_weights=True),
        pilot(small("tiny", "stsb"), (3e-4, 1e-3)),
        pilot(small("tiny", "stsb"), (1e-3,), (1,), random_weights=True),
        pilot(small("tiny", "cola"), (3e-4, 1e-3)),
        pilot(small("tiny", "cola"), (1e-3,), (1,), random_weights=True),
        pilot(small("l6", "sst2", 1000), (1e-4,), (1,)),
        pilot(small("l6", "sst2", 1000), (1e-4,), (1,), random_weights=True),
        pilot(small("l6", "cola", 2000), (1e-4,), (1,)),
    ],
    "pilot-2": [
        pilot(small("tiny", "sst2", 1000), (3e-4,), (1, 2, 3)),
        pilot(small("tiny", "sst2", 1000), (3e-4, 1e-3), (1, 2), random_weights=True),
        pilot(small("tiny", "stsb", 1000, 5), (3e-4, 1e-4), (1, 2, 3)),
        pilot(small("tiny", "stsb", 1000, 5), (3e-4, 1e-3), (1, 2), random_weights=True),
        pilot(small("l6", "sst2", 500), (1e-4, 5e-5), (1, 2)),
        pilot(small("l6", "cola", 1000), (1e-4,), (1, 2)),
        pilot(small("l6", "sst2", 500), (1e-4, 3e-4), (1,), random_weights=True),
        pilot(small("l6", "mrpc", 500), (1e-4,), (1, 2)),
    ],
}
