"""Targets for the GPU kernels; each is a ratio of two results of one run of `benchmarks.suite`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

LARGE, TINY = "bert-large-uncased", "4000-tiny"
Run = dict[str, Any]  # a suite's result


@dataclass(frozen=True, slots=True)
class Target:
    """A ratio that should be at least or at most a limit, in runs with this model and dtype."""

    what: str
    model: str
    dtype: str
    at_least: bool
    limit: float
    measure: Callable[[Run], float | None]

    @property
    def wanted(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.limit:.2f}"

    def verdict(self, runs: Sequence[Run]) -> dict[str, Any]:
        """The ratio in the first run that has both of its sides; None if no run has."""
        own = [run for run in runs if run["model"] == self.model and dtype_of(run) == self.dtype]
        found = next((value for value in map(self.measure, own) if value is not None), None)
        met = None
        if found is not None:
            met = found >= self.limit if self.at_least else found <= self.limit
        return {"what": self.what, "target": self.wanted, "measured": found, "met": met}


def verdicts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    return [target.verdict(runs) for target in TARGETS]


def dtype_of(run: Run) -> str | None:
    return next((row["dtype"] for row in run["results"]), None)


def best(
    run: Run, variant: str, optimizer: str = "none", normalization: str = "delayed"
) -> dict[str, Any] | None:
    """The contestant's row; for this package, that of its fastest backend."""
    key = (variant, optimizer, normalization)
    rows = [row for row in run["results"] if key == tuple(row[name] for name in _KEY)]
    return min(rows, key=lambda row: row["median_ms"], default=None)


_KEY = ("variant", "optimizer", "normalization")


def _ratio(a: dict[str, Any] | None, b: dict[str, Any] | None, figure: str = "median_ms") -> float | None:
    if a is None or b is None or a.get(figure) is None or not b.get(figure):
        return None
    return a[figure] / b[figure]


def _share(run: Run) -> float | None:
    row = best(run, "fused")
    return row["fraction_of_copy"] if row else None


def _adamw(run: Run) -> dict[str, Any]:
    return {"median_ms": run["adamw_fused_ms"], **run.get("adamw_fused", {})}


def _against_adamw(*key: str, figure: str = "median_ms") -> Callable[[Run], float | None]:
    return lambda run: _ratio(best(run, *key), _adamw(run), figure)


def _faster_than(variant: str) -> Callable[[Run], float | None]:
    return lambda run: _ratio(best(run, variant), best(run, "fused"))


def _one_pass(run: Run) -> float | None:
    return _ratio(best(run, "fused", "adamw"), best(run, "attached", "adamw"))


def _exact(run: Run) -> float | None:
    return _ratio(best(run, "fused", normalization="exact"), best(run, "fused"))


TARGETS = (
    Target("PATS, BERT-large: share of a copy's bandwidth", LARGE, "float32", True, 0.92, _share),
    Target("PATS / fused AdamW", LARGE, "float32", False, 1.00, _against_adamw("fused")),
    Target("PATS: times faster than torch.compile", LARGE, "float32", True, 1.3, _faster_than("compile")),
    Target("PATS: times faster than foreach", LARGE, "float32", True, 4.0, _faster_than("foreach")),
    Target("PATS: times faster than eager", LARGE, "float32", True, 10.0, _faster_than("eager")),
    Target("PATSAdamW / (fused AdamW + PATS)", LARGE, "float32", False, 0.80, _one_pass),
    Target(
        "PATSAdamW, moments / fused AdamW", LARGE, "float32", False, 1.05, _against_adamw("moments", "adamw")
    ),
    Target("PATS, bfloat16: share of a copy's bandwidth", LARGE, "bfloat16", True, 0.88, _share),
    Target("PATS, exact / delayed", LARGE, "float32", False, 1.35, _exact),
    Target(
        "PATS, 4,000 tiny tensors, uncaptured / fused AdamW (idle to idle)",
        TINY,
        "float32",
        False,
        1.00,
        _against_adamw("fused", figure="wall_ms"),
    ),
)
