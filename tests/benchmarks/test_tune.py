"""The tuning's command: what it says of each candidate, as far as no GPU is needed."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import INTERPRETED

from benchmarks import tune
from benchmarks.common import shapes, timing
from benchmarks.tune import CASES, Candidate
from pats_kernels.backends.triton import Tuning, _tuning

CPU = torch.device("cpu")


def test_every_candidate_differs_from_the_default_and_was_predicted() -> None:
    for case in CASES:
        found = tune.candidates(case)
        assert len({candidate.name for candidate in found}) == len(found)
        assert len({candidate.tuning for candidate in found} | {Tuning()}) == len(found) + 1
        assert all(0 < low <= high for low, high in (candidate.predicted for candidate in found))
        exact = [c for c in found if c.tuning.reversed or c.tuning.group_bytes]
        assert bool(exact) == (case.normalization == "exact")


def test_predictions_are_those_of_the_docs() -> None:
    """The table may say several candidates in a line: it has to span what was predicted of each."""
    text = (Path(__file__).parents[2] / "docs" / "performance.md").read_text()
    table = text.partition("### How the kernels are launched")[2].partition("Tuning is")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    cells = [row[2] for row in rows if len(row) == 5]
    spans = [tuple(map(float, cell.split(" - "))) for cell in cells if re.fullmatch(r"[\d.]+ - [\d.]+", cell)]
    predictions = {c.predicted for case in CASES for c in tune.candidates(case)}
    for low, high in predictions:
        assert any(a <= low and high <= b for a, b in spans), (low, high)
    ends = {x for pair in predictions for x in pair}
    assert {x for span in spans for x in span} <= ends


@pytest.mark.backend
@pytest.mark.skipif(not INTERPRETED, reason="not interpreted")
def test_a_rehearsal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default twice and each candidate that can run, in one contest; the others with their reason."""
    monkeypatch.setitem(shapes.SHAPES, "two", lambda: [(300,), (5,)])
    monkeypatch.setattr(timing, "FEWEST", 1)
    chosen = [
        Candidate("reversed", Tuning(reversed=True), (0.9, 1.0)),
        Candidate("impossible", Tuning(block=3), (1.0, 1.0)),
    ]
    seen: list[Tuning] = []
    tuned = tune.tuned

    def noted(step: Any, tuning: Tuning) -> Any:
        return tuned(lambda: (seen.append(_tuning[-1]), step()), tuning)

    monkeypatch.setattr(tune, "tuned", noted)
    exact = next(case for case in CASES if case.normalization == "exact")
    rows = tune.measure(exact, chosen, CPU, argparse.Namespace(model="two", seconds=0))
    assert [row["candidate"] for row in rows] == ["default", "default again", "reversed", "impossible"]
    assert rows[0]["against_default"] == 1.0
    assert rows[2]["against_default"] == pytest.approx(rows[2]["median_ms"] / rows[0]["median_ms"])
    assert rows[2]["p10_ms"] <= rows[2]["median_ms"] <= rows[2]["p90_ms"]
    assert "median_ms" not in rows[3]
    assert rows[3]["error"]
    assert set(seen) == {Tuning(), chosen[0].tuning, chosen[1].tuning}
    assert "impossible" in tune.line(rows[3])
    assert "predicted 0.90 - 1.00" in tune.line(rows[2])
    assert set(tune.host("two", CPU, 0)) == {"reused", "moved", "packed", "sent"}


def test_offline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One candidate of one case: what the compiler made of it is that candidate."""
    file = tmp_path / "tune.json"
    words = ["--only", "none delayed float32", "--candidates", "48 registers", "--json", str(file)]
    assert tune.main(["--offline", "sm_90", *words]) == 0
    (case,) = json.loads(file.read_text())["cases"]
    assert case["case"] == "fused none delayed float32"
    assert [row["candidate"] for row in case["candidates"]] == ["default", "48 registers"]
    assert [row["registers"] for row in case["candidates"]] == [[64], [48]]
    # How well 48 do is a matter of Triton's version.
    assert [len(row["full_path_spills"]) for row in case["candidates"]] == [1, 1]
    assert case["candidates"][0]["full_path_spills"] == [0]
    assert "48 registers" in capsys.readouterr().out


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="there it runs")
def test_it_says_why_it_cannot_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, reason in ((["--cpu"], "only under TRITON_INTERPRET=1"), ([], "there is no GPU")):
        with pytest.raises(SystemExit):
            tune.main([*flags, "--json", str(tmp_path / "none.json")])
        assert reason in capsys.readouterr().err
