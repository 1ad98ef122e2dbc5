"""The statistics and tables of the replication, compared with values by hand and from simulations."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from replication import report
from replication.comparisons import clustered, detectable, difference, holm, power, spread
from replication.grid import Setting, Study, configuration, identity

SETTING = Setting("random", "cola", 1e-3)
STUDY = Study(
    "small",
    SETTING,
    {
        "adamw": ({"method": "adamw"}, {"method": "adamw", "learning_rate": 3e-3}),
        "isotropic": (
            {"method": "isotropic", "noise_scale": 1e-3},
            {"method": "isotropic", "noise_scale": 1e-2},
        ),
        "pats": ({"method": "pats", "noise_scale": 1e-3}, {"method": "pats", "noise_scale": 1e-2}),
    },
    trial_seeds=(11,),
    seeds=(1, 2, 3, 4),
)


def line(run: dict[str, Any], score: float, gini: float = 0.8, order: str | None = None) -> dict[str, Any]:
    sensitivity = {part: {"gini": gini, "half": 0.1} for part in ("all", "inner")}
    return {
        "id": identity(run),
        "run": run,
        "metrics": {"select": {"matthews": score}, "report": {"matthews": score}},
        "bigger_class": {"matthews": 0.0},
        "steps": 10,
        "parameters": 1000,
        "order": order or f"order {run['seed']}",
        "sensitivity": sensitivity,
        "seconds": {"all": 1.0},
        "machine": {"device": "cpu"},
    }


def lines(scores: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """All trials, of which each method's second is chosen, and a final run for each score."""
    made = [
        line(configuration(SETTING, trial, 11), 0.1 * place)
        for trials in STUDY.methods.values()
        for place, trial in enumerate(trials)
    ]
    for label, values in scores.items():
        for seed, value in zip(STUDY.seeds, values, strict=False):
            made.append(
                line(configuration(SETTING, STUDY.methods[label][1], seed), value, gini=0.7 + value / 10)
            )
    return {entry["id"]: entry for entry in made}


def reported(found: dict[str, dict[str, Any]], method: str, seed: int) -> dict[str, Any]:
    return next(
        one for one in found.values() if one["run"]["method"] == method and one["run"]["seed"] == seed
    )


SCORES = {
    "adamw": [0.40, 0.42, 0.38, 0.44],
    "isotropic": [0.415, 0.413, 0.401, 0.431],
    "pats": [0.45, 0.46, 0.44, 0.49],
}


def test_holm_is_worked_out_by_hand() -> None:
    """Sorted: 0.01 x 4, 0.02 x 3, 0.03 x 2, and 0.04 x 1, which is below the one before."""
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.01, 0.02, 0.03, 0.2]) == pytest.approx([0.04, 0.06, 0.06, 0.2])
    assert holm([0.5, 0.6]) == [1.0, 1.0]  # 2 x 0.5, and not below it
    assert holm([]) == []


def test_spread() -> None:
    of = spread([1.0, 2.0, 3.0, 6.0])
    assert (of.n, of.mean) == (4, 3.0)
    assert of.sd == pytest.approx(np.sqrt(14 / 3))
    assert 1.0 < of.low < 3.0 < of.high < 6.0
    assert spread([1.0, 2.0, 3.0, 6.0]) == of  # the same each time
    same = spread([2.0, 2.0])
    assert (same.sd, same.low, same.high) == (0.0, 2.0, 2.0)
    assert np.isnan(spread([2.0]).sd)


def test_bootstrap_intervals_cover() -> None:
    """Of 200 samples of 12, some 92% should contain the mean: BCa undercovers for so few. Standard error:
    2%."""
    rng = np.random.default_rng(1)
    intervals = [spread(list(rng.normal(size=12))) for _ in range(200)]
    assert 0.86 < np.mean([of.low < 0 < of.high for of in intervals]) < 0.98


def test_a_difference_is_of_pairs() -> None:
    """By hand: differences 0.05, 0.04, 0.06, 0.05 have mean 0.05 and sd 0.00816; t = 12.25, 3 degrees."""
    a, b = (dict(enumerate(SCORES[name])) for name in ("pats", "adamw"))
    b[9] = 1.0  # a seed that only one of them has counts for nothing
    found = difference(a, b)
    assert (found.spread.n, found.spread.mean) == (4, pytest.approx(0.05))
    assert found.spread.sd == pytest.approx(np.sqrt(2e-4 / 3))
    t = 0.05 / (np.sqrt(2e-4 / 3) / 2)
    assert found.p == pytest.approx(2 * stats.t.sf(t, 3), rel=1e-9)
    assert found.wilcoxon == pytest.approx(0.125)  # 2 / 2^4: the least that four seeds can give
    assert difference(a, b, comparisons=10).detectable > found.detectable
    assert difference(a, a).p == 1.0
    with pytest.raises(ValueError, match="1 seeds in common"):
        difference({1: 0.5}, {1: 0.4, 2: 0.3})


def test_the_smallest_detectable_effect() -> None:
    """Cohen's tables have 34 pairs for an effect of half a standard deviation at 0.05 with a power of 0.8."""
    assert power(0.5, 1.0, 33) < 0.8 < power(0.5, 1.0, 34)
    assert detectable(2.0, 34) == pytest.approx(1.0, rel=0.02)
    rng = np.random.default_rng(0)
    effect = detectable(1.0, 10, 0.01)
    pvalues = stats.ttest_1samp(rng.normal(effect, 1.0, size=(4000, 10)), 0, axis=1).pvalue  # pyright: ignore
    assert np.mean(pvalues < 0.01) == pytest.approx(0.8, abs=0.025)  # 4 standard errors of 4,000 draws


def test_tables_drop_nothing() -> None:
    """A method with fewer seeds, and one that is not chosen yet, have rows too."""
    scores = {**SCORES, "pats": SCORES["pats"][:3]}
    found = lines(scores)
    text = report.tables([STUDY], found)
    of_study = text[text.index("### small") :]
    rows = [
        [part.strip() for part in row.split("|")[1:-1]] for row in of_study.split("\n") if row.startswith("|")
    ]
    adamw, isotropic, pats = rows[2:5]
    assert adamw[:5] == [
        "adamw",
        "learning_rate 0.003",
        "4 of 4",
        "0.4100",
        f"{np.std(SCORES['adamw'], ddof=1):.4f}",
    ]
    assert adamw[6:] == [""] * 6
    assert isotropic[2] == "4 of 4"
    assert isotropic[6].startswith("+0.0050 (")
    assert isotropic[9:] == [""] * 3
    assert pats[:4] == ["pats", "noise_scale 0.01", "3 of 4", "0.4500"]
    assert pats[6].startswith("+0.0500 (")
    assert pats[9].startswith("+0.0403 (")
    assert "3 comparisons in all" in text

    empty = report.tables([STUDY], {})
    assert empty.count("not chosen yet | 0 of 4") == 3


def test_all_of_adamws_runs_are_in_one_table() -> None:
    """The trials' seed 11 at both learning rates, and the four seeds at the chosen one."""
    found = lines(SCORES)
    for one in found.values():
        one["seconds"]["cpu"] = 7.0
    rows = [
        [part.strip() for part in row.split("|")[1:-1]] for row in report.adamw_table(found).split("\n")[2:-1]
    ]
    mean = np.mean([*SCORES["adamw"], 0.1])  # 0.1 is the trial's
    assert [row[1:5] for row in rows] == [
        ["matthews", "0.001", "1", "0.0000"],
        ["matthews", "0.003", "5", f"{mean:.4f}"],
    ]
    assert [row[-2:] for row in rows] == [["0.0000", "7"]] * 2


def test_p_values_are_corrected_for_all_comparisons() -> None:
    found = lines(SCORES)
    every = report.compared([report.cells(STUDY, found)])
    assert [(c.cell.label, c.against) for c in every] == [
        ("isotropic", "adamw"),
        ("pats", "adamw"),
        ("pats", "isotropic"),
    ]
    adjusted = holm([c.found.p for c in every])
    text = report.tables([STUDY], found)
    for comparison, corrected in zip(every, adjusted, strict=True):
        assert f"{comparison.found.p:.3f} ({corrected:.3f})" in text


def test_runs_with_other_data_are_no_pair() -> None:
    found = lines(SCORES)
    one = reported(found, "pats", 2)
    one["order"] = "another"
    with pytest.raises(ValueError, match="small, pats, seed 2: data in another order"):
        report.cells(STUDY, found)


def test_runs_of_a_cpu_and_a_gpu_are_no_pair() -> None:
    found = lines(SCORES)
    for seed in STUDY.seeds:
        for method in SCORES:
            reported(found, method, seed)["machine"] = {"device": "cuda:0"}
    assert len(report.cells(STUDY, found)) == len(SCORES)  # all on a GPU
    reported(found, "pats", 2)["machine"] = {"device": "cpu"}
    with pytest.raises(ValueError, match="small, pats, seed 2: made on another kind of device"):
        report.cells(STUDY, found)


def test_concentration_and_score() -> None:
    """Here the Gini coefficient follows the score, so every correlation is 1, except for ties from
    rounding."""
    of_study = report.cells(STUDY, lines(SCORES))
    pairs = report.concentration_pairs(of_study)
    assert [len(points) for points in pairs.values()] == [12, 3, 12]
    for points in pairs.values():
        x, y, _ = zip(*points, strict=True)
        found: Any = stats.spearmanr(np.round(x, 9), np.round(y, 9))
        assert found.statistic == pytest.approx(1)
    assert sum(x for x, _, _ in pairs["runs less their method's mean"]) == pytest.approx(0)
    rows = report.concentration_table([of_study]).splitlines()[2:]
    assert len(rows) == 2  # three means are too few
    # Differences of equal scores are equal but for rounding, which ranks them.
    assert [float(row.split(" | ")[3]) for row in rows] == pytest.approx([1, 1], abs=0.01)
    assert rows[0].endswith(" |  |")  # all runs: no test


def test_a_clustered_correlation() -> None:
    """Ten methods with almost no difference are one run ten times: 8 points, not 80.

    For independent x and y the naive p is below 0.05 far more often than in 5% of cases. Here it is not: of
    100 cases 5 are expected, and more than 12 occur in less than 0.2% of all tries.
    """
    rng = np.random.default_rng(0)
    naive = permuted = 0
    for _ in range(100):
        x, y = (np.repeat(rng.normal(size=8), 10) + rng.normal(scale=1e-3, size=80) for _ in range(2))
        seeds = np.repeat(np.arange(8), 10)
        naive += stats.spearmanr(x, y).pvalue < 0.05  # pyright: ignore
        permuted += clustered(list(x), list(y), list(seeds), permutations=199) < 0.05
    assert naive > 40
    assert permuted <= 12
    # Points that agree seed by seed: of 8! orders only this one is as good.
    x = np.repeat(np.arange(8.0), 2)
    assert clustered(list(x), list(x**3), list(np.repeat(np.arange(8), 2)), 499) == 1 / 500
    # One cluster a point: the plain permutation test, whose p is near scipy's own.
    x, y = rng.normal(size=(2, 12))
    plain = stats.spearmanr(x, y).pvalue  # pyright: ignore
    # Standard error of 2,000 permutations: 0.011 at most; the t approximation is off by as much.
    assert clustered(list(x), list(y), list(range(12)), 1999) == pytest.approx(plain, abs=0.05)  # pyright: ignore


def test_methods_are_compared_at_equal_rates() -> None:
    """Trials with the same rate and seed, on the half that selected nothing. A rate that AdamW lacks has no
    pair."""
    rates = (1e-3, 2e-3, 4e-3)
    noisy = [{"noise_scale": scale, "learning_rate": lr} for scale in (1e-3, 1e-2) for lr in rates]
    adamw = [
        {"method": "adamw", "learning_rate": lr, "weight_decay": wd} for wd in (0.01, 0.1) for lr in rates[:2]
    ]
    methods = {
        "adamw": adamw,
        "isotropic": [{"method": "isotropic", **own} for own in noisy[:5]],
        "pats": [{"method": "pats", **own} for own in noisy],
    }
    study = replace(STUDY, methods=methods, trial_seeds=(11, 12))
    found = {}
    for trial in study.trials():
        score = 100 * trial["learning_rate"] + 0.01 * trial["seed"] + (trial["weight_decay"] == 0.1)
        factor = {"adamw": 0, "isotropic": -2, "pats": 3}[trial["method"]]
        made = line(trial, score + factor * trial.get("noise_scale", 0.0))
        found[made["id"]] = made
    expected = {
        "adamw": {
            ("isotropic", "noise_scale 0.001"): [-0.002] * 4,
            ("isotropic", "noise_scale 0.01"): [-0.02] * 4,
            ("pats", "noise_scale 0.001"): [0.003] * 4,
            ("pats", "noise_scale 0.01"): [0.03] * 4,
        },
        # Of the same noise_scale; the last rate of isotropic noise was not run.
        "isotropic": {
            ("pats", "noise_scale 0.001"): [0.005] * 6,
            ("pats", "noise_scale 0.01"): [0.05] * 4,
        },
    }
    for against, rows in expected.items():
        got = {(label, own): pairs for label, own, pairs in report.equal_rates(study, found, against)}
        assert got.keys() == rows.keys()
        for row, pairs in rows.items():
            assert got[row] == pytest.approx(pairs)
    assert "| pats | noise_scale 0.01 | 4 | +0.0300 | 0.0000 | +0.0500 | 0.0000 |" in report.rate_table(
        study, found
    )
    assert report.rate_table(study, {}) == ""


def test_the_summary_has_a_row_a_cell() -> None:
    """The mean differences of `test_a_difference_is_of_pairs`, under the right headings."""
    study = replace(STUDY, methods={**STUDY.methods, "pats product": STUDY.methods["pats"]})
    text = report.tables([study], lines(SCORES))
    (row,) = [line for line in text.splitlines() if line.startswith("| random, cola | matthews |")][:1]
    head = next(line for line in text.splitlines() if line.startswith("| cell | score |"))
    columns = dict(zip(head.split(" | "), row.split(" | "), strict=True))
    assert columns["adamw"] == "0.4100 ± 0.0258"
    assert columns["pats product less adamw"].startswith("+0.0500 (")
    assert columns["isotropic less adamw"].startswith("+0.0050 (")


def test_a_run_that_diverged_has_a_score_and_no_concentration() -> None:
    found = lines(SCORES)
    one = reported(found, "pats", 2)
    one["sensitivity"] = None
    cell = report.cells(STUDY, found)[2]
    assert len(cell.scores()) == 4
    assert list(cell.concentration()) == [1, 3, 4]
    assert "4 of 4" in report.score_table([cell], [], [])


def test_a_method_looks_the_same_in_every_panel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a study with three methods and one with two of them, the points' colours are the labels'."""
    found = lines(SCORES)
    few = replace(STUDY, methods={label: STUDY.methods[label] for label in ("adamw", "pats")})
    drawn: list[Any] = []
    own = report._panels
    monkeypatch.setattr(report, "_panels", lambda *args: drawn.append(own(*args)) or drawn[-1])
    report.draw_concentration([report.cells(study, found) for study in (STUDY, few)], tmp_path / "a.png")
    panels = [
        {points.get_label(): tuple(points.get_facecolor()[0][:3]) for points in axes.collections}
        for axes in drawn[0][1]
    ]
    assert list(panels[0]) == ["adamw", "isotropic", "pats"]
    assert panels[1] == {label: panels[0][label] for label in ("adamw", "pats")}
    assert len(set(report.appearances(map(str, range(10))).values())) == 10  # as many as there are methods


def test_figures_are_drawn(tmp_path: Path) -> None:
    found = lines(SCORES)
    of_studies = [report.cells(STUDY, found)]
    report.draw_differences(of_studies, tmp_path / "a.png")
    report.draw_concentration(of_studies, tmp_path / "b.png")
    report.draw_noise([STUDY], found, tmp_path / "c.png")
    for name in "abc":
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    report.draw_differences([report.cells(STUDY, {})], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
