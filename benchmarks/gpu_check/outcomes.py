"""A plugin for pytest, `-p benchmarks.gpu_check.outcomes --outcomes FILE`: a line of JSON for each test.

If a run is killed, the results until then are kept.
"""

import json
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # reading the file needs no pytest
    import pytest

KEPT_ERROR = 3000  # characters of a failed test's report


def pytest_addoption(parser: "pytest.Parser") -> None:
    parser.addoption("--outcomes", type=Path, metavar="FILE")


def pytest_configure(config: "pytest.Config") -> None:
    file = config.getoption("--outcomes")
    if file is not None and "PYTEST_XDIST_WORKER" not in os.environ:  # workers report to it
        config.pluginmanager.register(_Writer(file))


class _Writer:
    def __init__(self, file: Path) -> None:
        self._file = file

    def pytest_runtest_logreport(self, report: "pytest.TestReport") -> None:
        if report.when == "call" or report.outcome != "passed":
            line = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration}
            if report.failed:
                line["error"] = report.longreprtext[-KEPT_ERROR:]
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def read(file: Path) -> dict[str, Any]:
    """How many tests passed, failed and were skipped, which failed, and the end of each failure's report.

    Raises:
        ValueError: no test ran.
    """
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    if not lines:
        raise ValueError("no test ran")
    counts = Counter(line["outcome"] for line in lines)
    errors = {line["test"]: line["error"] for line in lines if line["outcome"] == "failed"}
    numbers = {name: counts[name] for name in ("passed", "failed", "skipped")}
    return {**numbers, "failures": sorted(errors), "errors": errors}
