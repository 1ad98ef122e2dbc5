"""`python -m benchmarks.statistics`: its streams are the kernels' words, and each of its tests fails where it
should. The noise's own small tests are in test_noise.py."""

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from benchmarks.statistics import __main__ as command
from benchmarks.statistics import avalanche, batteries, normals, rounding
from pats_kernels.philox import philox4x32, random_words

CHUNK, CHUNKS = 2**15, 4
FAR = 1e-6  # a p-value that a fixed seed gives by accident once in a million times


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return batteries.compile_(tmp_path_factory.mktemp("words"), [])["words"]


def stream(program: Path, name: str, count: int, seed: int = 1) -> list[int]:
    done = subprocess.run([program, name, str(seed), str(4 * count)], capture_output=True, check=True)
    return np.frombuffer(done.stdout, dtype=np.uint32).tolist()


def test_streams_are_the_kernels_words(words: Path) -> None:
    def flat(*tensors: Tensor) -> list[int]:
        return torch.cat(tensors).flatten().tolist()

    assert stream(words, "noise", 1024) == flat(random_words(1, 1, 0, 1024))
    assert stream(words, "rounding", 1024) == flat(random_words(1, 1, 0, 1024, rounding=True))
    assert stream(words, "steps", 8) == flat(random_words(1, 1, 0, 4), random_words(1, 2, 0, 4))
    assert stream(words, "tensors", 8) == flat(random_words(1, 1, 0, 4), random_words(1, 1, 1, 4))
    big = 2**64 - 1
    assert stream(words, "seeds", 8, big) == flat(random_words(big, 1, 0, 4), random_words(0, 1, 0, 4))
    # A block of 256 elements at a time, its noise first; the second tensor has 64 elements.
    first = [flat(random_words(1, 1, 0, 4096, rounding=rounds)) for rounds in (False, True)]
    expected = [word for i in range(0, 4096, 256) for half in first for word in half[i : i + 256]]
    expected += flat(random_words(1, 1, 1, 64), random_words(1, 1, 1, 64, rounding=True))
    assert stream(words, "training", len(expected)) == expected
    of_a_step = 2 * 4 * (4 * 1024 + 2 * 4096 + 64 + 9 * 16)
    assert stream(words, "training", of_a_step + 4)[-4:] == flat(random_words(1, 2, 0, 4))


def findings(monkeypatch: pytest.MonkeyPatch, spoil: Any) -> dict[str, float]:
    """p-values of perfect normals that were spoilt."""
    random = np.random.default_rng(5)

    def draw(backend: str, numel: int, *, step: int, tensor_ids: tuple[int, ...], **_: Any) -> list[Tensor]:
        made = spoil([random.standard_normal(numel) for _ in tensor_ids])
        return [torch.from_numpy(z.astype(np.float32)) for z in made]

    monkeypatch.setattr(normals, "draw", draw)
    found = normals.measure("none", CHUNK, CHUNKS, 1)
    assert found["samples"] == CHUNK * CHUNKS
    return {finding["test"]: finding["p"] for finding in found["findings"]}


def test_perfect_normals_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    found = findings(monkeypatch, lambda made: made)
    assert len(found) * min(found.values()) > 1e-2


SPOILT = {
    "moment 1": lambda made: [z + 0.02 for z in made],
    "moment 2": lambda made: [z * 1.02 for z in made],
    "moment 3": lambda made: [z + 0.02 * (z**2 - 1) for z in made],
    "moment 4": lambda made: [z + 0.02 * z**3 for z in made],
    "above 3.0": lambda made: [np.minimum(z, 3) for z in made],
    "below -4.0": lambda made: [np.where(z < -2.5, -4.1, z) for z in made],
    "Anderson-Darling, A^2": lambda made: [np.where(np.abs(z) < 0.3, 0.5 * z, z) for z in made],
    "correlation of z, elements 1 apart": lambda made: [(z + 0.1 * np.roll(z, 1)) / 1.005 for z in made],
    "correlation of z^2, elements 2 apart": lambda made: [
        np.sign(z) * np.abs(np.repeat(z[::4], 4)) for z in made
    ],
    "correlation of z, next tensor": lambda made: [made[0], (made[1] + 0.1 * made[0]) / 1.005],
}


@pytest.mark.parametrize("test", SPOILT)
def test_spoilt_normals_fail(monkeypatch: pytest.MonkeyPatch, test: str) -> None:
    assert findings(monkeypatch, SPOILT[test])[test] < FAR


def test_noise_of_one_seed_at_every_step_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = [np.random.default_rng(i).standard_normal(CHUNK) for i in range(2)]
    assert findings(monkeypatch, lambda _: fixed)["correlation of z, next step"] < FAR


@pytest.mark.parametrize(("square", "p"), [(1.933, 0.10), (2.492, 0.05), (3.070, 0.025), (3.857, 0.01)])
def test_anderson_darling_s_table(square: float, p: float) -> None:
    """Stephens's critical values (1974), which are right to 3% of the p-value."""
    assert 1 - normals.anderson_darling_cdf(square) == pytest.approx(p, rel=0.03)


def test_anderson_darling_s_distribution() -> None:
    """Of true normals p-values are uniform, to four deviations of a binomial share."""
    random = np.random.default_rng(2)
    values = [normals.anderson_darling(random.standard_normal(500))[1] for _ in range(400)]
    for limit in (0.1, 0.5):
        share = np.mean(np.array(values) < limit)
        assert abs(share - limit) < 4 * (limit * (1 - limit) / len(values)) ** 0.5


def test_anderson_darling_of_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the definition, for a sample that is worked on in several pieces."""
    z = np.sort(np.random.default_rng(0).standard_normal(100))
    u = stats.norm.cdf(z)
    i = np.arange(1, 101)
    square = -100 - np.mean((2 * i - 1) * (np.log(u) + np.log(1 - u[::-1])))
    monkeypatch.setattr(normals, "PIECE", 7)
    assert normals.anderson_darling(z[::-1].copy())[0] == pytest.approx(square, rel=1e-12)


def test_avalanche(monkeypatch: pytest.MonkeyPatch) -> None:
    found = avalanche.measure(512, 1)
    assert min(found["p"], *found["p_of_each_word"].values()) > 1e-3
    monkeypatch.setattr(avalanche, "philox4x32", lambda counter, key: philox4x32(counter, key, 4))
    assert avalanche.measure(512, 1)["p"] < FAR


def test_rounding_s_cost() -> None:
    """Shared bits are seen in the errors' correlation, bits of its own are not those of the other."""
    shared, independent = rounding.measure(512, rounding.SETTLING + 200, 1)
    assert shared["bits"] == "shared"
    assert shared["sens_unc_error_correlation"] > 0.2 + independent["sens_unc_error_correlation"]
    for cost in (shared, independent):
        # Rounding moves an average by at most a spacing, 2^-7, some 20 steps long.
        assert abs(cost["gate_bias"]) < 2.0**-7
        assert 0 < cost["gate_deviation"] < 0.1


def test_reports_are_read(tmp_path: Path) -> None:
    dieharder = tmp_path / "dieharder-training-plain.txt"
    dieharder.write_text(
        "   diehard_birthdays|   0|       100|     100|0.95843180|  PASSED  \n"
        "    rgb_permutations|   2|    100000|     100|0.00000001|  FAILED  \n"
    )
    found = batteries.read(dieharder)
    assert (found["battery"], found["stream"], found["tests"], found["complete"]) == (
        *("dieharder", "training", 2),
        False,
    )
    assert found["verdicts"] == {"PASSED": 1, "FAILED": 1}
    assert found["p"] == pytest.approx(4e-8)
    crush = tmp_path / "Crush-steps-reversed.txt"
    crush.write_text("All tests were passed\nP 0 0.25 Gap, r = 0\nP 1 0.9999999999 MaxOft AD\n")
    found = batteries.read(crush)
    assert (found["order"], found["complete"]) == ("reversed", True)
    assert found["values"] == [("Gap, r = 0", 0.25), ("MaxOft AD", 0.9999999999)]
    assert found["p"] == pytest.approx(4e-8, rel=0.02)  # as dieharder's, and no less


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--samples", "20000", "--trials", "64", "--rounding-steps", "420", "--rounding-elements", "64"]
    file = tmp_path / "out.json"
    assert command.main([*small, "--batteries", "", "--read", str(tmp_path), "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert report["family"] == len(list(command.family(report)))
    assert 0 < report["p"] <= 1
    assert "correlation of z, next step" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main(["--batteries", "SmallCrash"])
