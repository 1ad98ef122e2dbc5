"""Tables and figures, from the lines alone.

PYTHONPATH=examples python -m replication.report first --tables FILE.md --figures DIR

What a study has not made yet is in the tables as missing; nothing that it made is left out.
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from replication import lines
from replication.__main__ import RESULTS
from replication.comparisons import Difference, Spread, clustered, difference, holm, spread
from replication.grid import Study, Trial, configuration, identity, quoted, setting_of
from replication.lines import Line
from replication.studies import STUDIES, select

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ALL, MEANS, WITHIN = "all runs", "means of methods", "runs less their method's mean"
SHORT = ("isotropic", "pats product", "pats relative")  # labels of the summary
AGAINST = ("adamw", "isotropic")  # labels that methods are compared with; the second only PATS
COLOURS = ("#333333", "#999999", "#D55E00", "#E69F00", "#CC79A7")
COLOURS += ("#56B4E9", "#0072B2", "#009E73", "#882255", "#999933")
MARKERS = "os^Dv<>PX*"
INK, QUIET = "#333333", "#999999"


@dataclass(frozen=True)
class Cell:
    """A study's reported runs of one method, by seed."""

    study: Study
    label: str
    trial: Trial | None  # None: not chosen yet
    runs: dict[int, Line]

    def scores(self, split: str = "report", metric: str | None = None) -> dict[int, float]:
        name = metric or quoted(self.study.setting.task)
        return {seed: line["metrics"][split][name] for seed, line in self.runs.items()}

    def concentration(self, of: str = "inner", number: str = "gini") -> dict[int, float]:
        """By seed; without runs that diverged, which have none."""
        return {
            seed: line["sensitivity"][of][number]
            for seed, line in self.runs.items()
            if line["sensitivity"] is not None
        }


def cells(study: Study, found: Mapping[str, Line]) -> list[Cell]:
    """One a method, in the study's order, whether or not there are runs.

    Raises:
        ValueError: two runs of a seed had their data in different orders, or one run was made on a CPU and
            another on a GPU, where dropout's random numbers are others: they are no pair.
    """
    chosen = study.choose(found)
    made: list[Cell] = []
    orders: dict[int, str] = {}
    devices: set[str] = set()
    for label in study.methods:
        trial, runs = chosen.get(label), {}
        for seed in study.seeds:
            line = found.get(identity(configuration(study.setting, trial, seed))) if trial else None
            if line is not None:
                runs[seed] = line
                if orders.setdefault(seed, line["order"]) != line["order"]:
                    raise ValueError(f"{study.name}, {label}, seed {seed}: data in another order")
                devices.add(line["machine"]["device"].partition(":")[0])
                if len(devices) > 1:
                    raise ValueError(f"{study.name}, {label}, seed {seed}: made on another kind of device")
        made.append(Cell(study, label, trial, runs))
    return made


@dataclass(frozen=True)
class Comparison:
    cell: Cell
    against: str
    found: Difference


def compared(of_studies: Sequence[Sequence[Cell]]) -> list[Comparison]:
    """Every method with AdamW, and every PATS with isotropic noise, wherever both have two seeds."""
    pairs = [
        (cell, other)
        for of_study in of_studies
        for cell in of_study
        for other in of_study
        if other.label in AGAINST
        and cell.label not in (other.label, AGAINST[0])
        and (other.label == AGAINST[0] or cell.label.startswith("pats"))
        and len(cell.runs.keys() & other.runs.keys()) > 1
    ]
    return [
        Comparison(cell, other.label, difference(cell.scores(), other.scores(), len(pairs)))
        for cell, other in pairs
    ]


# Tables


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lined = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lined) + "\n"


def hyperparameters(cell: Cell) -> str:
    """What the trials chose, or what was given, beside the setting's."""
    if cell.trial is None:
        return "not chosen yet"
    return _described(cell.trial)


def _described(trial: Trial) -> str:
    return _named({name: value for name, value in trial.items() if name != "method"})


def _named(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_shown(value)}" for name, value in values.items())


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def score_table(of_study: Sequence[Cell], every: Sequence[Comparison], adjusted: Sequence[float]) -> str:
    rows = []
    for cell in of_study:
        scores = list(cell.scores().values())
        planned = len(cell.study.seeds)
        row = [cell.label, hyperparameters(cell), f"{len(scores)} of {planned}", *_cells(scores)]
        for against in AGAINST:
            row += _less(cell, against, every, adjusted)
        rows.append(row)
    header = ["method", "hyperparameters", "seeds", "mean", "sd", "95% interval"]
    for against in AGAINST:
        header += [f"less {against}", "p (Holm)", "detectable"]
    return table(header, rows)


def _cells(values: Sequence[float]) -> list[str]:
    if not values:
        return ["", "", ""]
    of = spread(values)
    return [f"{of.mean:.4f}", "" if of.n < 2 else f"{of.sd:.4f}", _interval(of)]


def _interval(of: Spread) -> str:
    return "" if of.n < 2 else f"{of.low:.4f} to {of.high:.4f}"


def _less(
    cell: Cell | None, against: str, every: Sequence[Comparison], adjusted: Sequence[float]
) -> list[str]:
    """The difference with its interval, p, and what was detectable; empty where the two were not compared."""
    for comparison, p in zip(every, adjusted, strict=True):
        if comparison.cell is cell and comparison.against == against:
            found, of = comparison.found, comparison.found.spread
            return [
                f"{of.mean:+.4f} ({of.low:+.4f} to {of.high:+.4f})",
                f"{found.p:.3f} ({p:.3f})",
                f"{found.detectable:.4f}",
            ]
    return [""] * 3


def baselines(study: Study, of_study: Sequence[Cell]) -> str:
    line = next((line for cell in of_study for line in cell.runs.values()), None)
    if line is None:
        return ""
    metric = quoted(study.setting.task)
    return (
        f"{metric}; the bigger class alone: {line['bigger_class'][metric]:.4f}; {line['steps']} steps a run, "
        f"{line['parameters'] / 1e6:.1f} M parameters.\n"
    )


def trial_table(study: Study, found: Mapping[str, Line]) -> str:
    """What the hyperparameters were chosen by: means over the trial seeds on the selection half."""
    metric = quoted(study.setting.task)
    chosen = study.choose(found)
    rows = []
    for label, trials in study.methods.items():
        for trial in trials if len(trials) > 1 else ():
            names = [identity(configuration(study.setting, trial, seed)) for seed in study.trial_seeds]
            scores = [found[name]["metrics"]["select"][metric] for name in names if name in found]
            mark = "chosen" if chosen.get(label) is trial else ""
            mean, sd, _ = _cells(scores)
            rows.append([label, _described(trial), f"{len(scores)} of {len(names)}", mean, sd, mark])
    return table(["method", "trial", "seeds", "mean", "sd", ""], rows) if rows else ""


def equal_rates(study: Study, found: Mapping[str, Line], against: str) -> list[tuple[str, str, list[float]]]:
    """Of each method and value of its own, its score less another's at the same learning rate and seed.

    On the half that selected nothing, of the trials. What a method was chosen by plays no part in it: two
    trial seeds may choose another learning rate for one method than for another, by chance. Isotropic noise
    is paired with PATS of the same noise_scale, whose energy it has.
    """
    metric, decay = quoted(study.setting.task), study.setting.weight_decay

    def scores(label: str) -> dict[tuple[str, float, float, int], float]:
        """By what it has of its own, noise_scale, learning rate and seed."""
        of: dict[tuple[str, float, float, int], float] = {}
        for trial in study.methods.get(label, ()):
            own = {k: v for k, v in trial.items() if k not in ("method", "learning_rate", "weight_decay")}
            for seed in study.trial_seeds:
                line = found.get(identity(configuration(study.setting, trial, seed)))
                if line is not None and trial.get("weight_decay", decay) == decay:
                    rate = trial.get("learning_rate", study.setting.learning_rate)
                    place = (_named(own), own.get("noise_scale", 0.0), rate, seed)
                    of[place] = line["metrics"]["report"][metric]
        return of

    noisy = against != AGAINST[0]
    base = {(scale if noisy else 0.0, *at): y for (_, scale, *at), y in scores(against).items()}
    rows: dict[tuple[str, str], list[float]] = {}
    for label in study.methods:
        for (own, scale, *at), score in scores(label).items() if label not in (against, AGAINST[0]) else ():
            key = (scale if noisy else 0.0, *at)
            if key in base:
                rows.setdefault((label, own), []).append(score - base[key])
    return [(label, own, pairs) for (label, own), pairs in rows.items()]


def rate_table(study: Study, found: Mapping[str, Line]) -> str:
    rows: dict[tuple[str, str], list[str]] = {}
    for place, against in enumerate(AGAINST):
        for label, own, pairs in equal_rates(study, found, against):
            of = spread(pairs)
            row = rows.setdefault((label, own), [label, own, str(of.n), "", "", "", ""])
            row[3 + 2 * place] = f"{of.mean:+.4f}"
            row[4 + 2 * place] = "" if of.n < 2 else f"{of.sd:.4f}"
    header = ["method", "its own", "pairs", *(name for other in AGAINST for name in (f"less {other}", "sd"))]
    return table(header, list(rows.values())) if rows else ""


def summary_table(
    of_studies: Sequence[Sequence[Cell]], every: Sequence[Comparison], adjusted: Sequence[float]
) -> str:
    """A row a study: AdamW, and what the methods of `SHORT` differ from it by."""
    rows = []
    for of_study in of_studies:
        cells = {cell.label: cell for cell in of_study}
        base = cells.get(AGAINST[0])
        if base is None or len(base.runs) < 2 or not any(label in cells for label in SHORT):
            continue
        row = [
            base.study.setting.name,
            quoted(base.study.setting.task),
            " ± ".join(_cells(list(base.scores().values()))[:2]),
        ]
        for label in SHORT:
            row += _less(cells.get(label), AGAINST[0], every, adjusted)[:2]
        rows.append(row)
    names = [name for label in SHORT for name in (f"{label} less adamw", "p (Holm)")]
    return table(["cell", "score", "adamw", *names], rows) if rows else ""


def summary_of_rates(studies: Sequence[Study], found: Mapping[str, Line]) -> str:
    """A row a study: the methods of `SHORT` less AdamW at equal learning rates, by their own values."""
    every: dict[str, dict[tuple[str, str], float]] = {}
    for study in studies:
        for label, own, pairs in equal_rates(study, found, AGAINST[0]):
            if label in SHORT:
                every.setdefault(study.setting.name, {})[label, own] = float(np.mean(pairs))
    columns = sorted({column for row in every.values() for column in row}, key=lambda c: (c[1], c[0]))
    rows = [
        [name, *(f"{row[column]:+.4f}" if column in row else "" for column in columns)]
        for name, row in every.items()
    ]
    return table(["cell", *(f"{label}, {own}" for label, own in columns)], rows) if rows else ""


def concentration_table(of_studies: Sequence[Sequence[Cell]]) -> str:
    """Whether runs with more concentrated sensitivities score higher, three ways in each study.

    All runs together have no p-value: they mix what differs between methods with what differs between seeds.
    """
    rows: list[list[str]] = []
    tests: list[float] = []
    tested: list[list[str]] = []
    for of_study in of_studies:
        for way, points in concentration_pairs(of_study).items():
            x, y, seeds = zip(*points, strict=True) if points else ((), (), ())
            if len(x) < 4 or np.ptp(x) == 0 or np.ptp(y) == 0:
                continue
            found: Any = stats.spearmanr(x, y)
            row = [of_study[0].study.name, way, str(len(x)), f"{found.statistic:+.3f}"]
            rows.append(row)
            if way == MEANS:
                tests.append(float(found.pvalue))
                tested.append(row)
            elif way == WITHIN and len(set(seeds)) > 3:
                tests.append(clustered(x, y, seeds))
                tested.append(row)
    for row, p, q in zip(tested, tests, holm(tests), strict=True):
        row.append(f"{p:.3f} ({q:.3f})")
    rows = [row if len(row) == 5 else [*row, ""] for row in rows]
    return table(["study", "over", "n", "Spearman", "p (Holm)"], rows) if rows else ""


def concentration_pairs(of_study: Sequence[Cell]) -> dict[str, list[tuple[float, float, int]]]:
    """Gini coefficients, scores and seeds, three ways; of means the method's place is in the seed's."""
    found: dict[str, list[tuple[float, float, int]]] = {ALL: [], MEANS: [], WITHIN: []}
    for place, cell in enumerate(of_study):
        gini, scores = cell.concentration(), cell.scores()
        if not gini:
            continue
        points = [(gini[seed], scores[seed], seed) for seed in sorted(gini)]
        x, y = (float(np.mean([point[i] for point in points])) for i in (0, 1))
        found[ALL] += points
        found[MEANS].append((x, y, place))
        found[WITHIN] += [(a - x, b - y, seed) for a, b, seed in points]
    return found


def gini_table(of_study: Sequence[Cell]) -> str:
    rows = []
    for cell in of_study:
        row = [cell.label]
        for of in ("inner", "all"):
            for number in ("gini", "half"):
                row += _cells(list(cell.concentration(of, number).values()))[:2]
        rows.append(row)
    names = ("Gini, no word embeddings", "half of it in", "Gini, all", "half of it in")
    return table(["method", *(part for name in names for part in (name, "sd"))], rows)


def adamw_table(found: Mapping[str, Line]) -> str:
    """Every AdamW run there is, by setting and learning rate: what a pilot has to say."""
    groups: dict[tuple[str, float], list[Line]] = {}
    for line in found.values():
        if line["run"]["method"] == "adamw":
            setting = setting_of(line["run"])
            groups.setdefault((f"{setting.name}, {setting.epochs} epochs", setting.learning_rate), []).append(
                line
            )
    rows = []
    for (name, rate), of_group in sorted(groups.items()):
        metric = quoted(of_group[0]["run"]["task"])
        scores = [line["metrics"]["report"][metric] for line in of_group]
        seconds = [line["seconds"]["cpu"] for line in of_group]
        bigger = of_group[0]["bigger_class"][metric]
        row = [name, metric, f"{rate:g}", str(len(scores)), *_cells(scores)[:2], f"{bigger:.4f}"]
        rows.append([*row, f"{np.mean(seconds):.0f}"])
    return table(["setting", "score", "lr", "seeds", "mean", "sd", "bigger class", "CPU s a run"], rows)


def tables(studies: Sequence[Study], found: Mapping[str, Line]) -> str:
    """All of it, as Markdown."""
    of_studies = [cells(study, found) for study in studies]
    every = compared(of_studies)
    adjusted = holm([comparison.found.p for comparison in every])
    parts = [
        f"{len(every)} comparisons in all; p is the paired t-test's, in brackets as Holm corrects it for all "
        "of them; detectable is the smallest true difference that these seeds would show with a power of 0.8 "
        "at 0.05 divided by the number of comparisons.\n"
    ]
    if summary := summary_table(of_studies, every, adjusted):
        parts += [f"### All cells\n\n{summary}"]
    if rates := summary_of_rates(studies, found):
        parts += [f"The trials at equal learning rates, means over rates and seeds, report half:\n\n{rates}"]
    for study, of_study in zip(studies, of_studies, strict=True):
        parts += [f"### {study.name}: {study.setting.name}\n", baselines(study, of_study)]
        parts += [score_table(of_study, every, adjusted)]
        trials = trial_table(study, found)
        parts += [f"Trials, on the selection half:\n\n{trials}"] if trials else []
        rates = rate_table(study, found)
        parts += [f"At equal learning rates, trials on the report half:\n\n{rates}"] if rates else []
        parts += [f"Concentration of |w g| after training:\n\n{gini_table(of_study)}"]
    related = concentration_table(of_studies)
    parts += [f"### Concentration and score\n\n{related}"] if related else []
    return "\n".join(part for part in parts if part)


# Figures


def appearances(labels: Iterable[str]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each label: the same in all of a figure's panels."""
    names = list(dict.fromkeys(labels))
    return {name: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(names)}


def draw_differences(of_studies: Sequence[Sequence[Cell]], path: Path) -> None:
    """Each method less AdamW, with its 95% interval; a panel a study."""
    shown = [of_study for of_study in of_studies if any(c.label == AGAINST[0] and c.runs for c in of_study)]
    if not shown:
        return
    looks = appearances(cell.label for of_study in shown for cell in of_study)
    figure, panels = _panels(len(shown), 3.1, 1.0 + 0.2 * max(len(of_study) for of_study in shown))
    for axes, of_study in zip(panels, shown, strict=True):
        base = next(cell for cell in of_study if cell.label == AGAINST[0]).scores()
        others = [cell for cell in of_study if cell.label != AGAINST[0]]
        for row, cell in enumerate(others):
            if len(base.keys() & cell.runs.keys()) > 1:
                of = difference(cell.scores(), base).spread
                axes.errorbar(
                    of.mean, row, xerr=[[of.mean - of.low], [of.high - of.mean]], marker="o", markersize=4,
                    color=looks[cell.label][0], capsize=2, linewidth=1.4,
                )  # fmt: skip
        axes.axvline(0, color=QUIET, linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(others)), [cell.label for cell in others])
        axes.set_ylim(len(others) - 0.5, -0.5)
        setting = of_study[0].study.setting
        _dress(axes, setting.name, f"{quoted(setting.task)} less AdamW's")
    limits = [axes.get_xlim() for axes in panels]
    for axes in panels:  # what is far on one is far on all
        axes.set_xlim(min(low for low, _ in limits), max(high for _, high in limits))
    figure.savefig(path, dpi=130)


def draw_concentration(of_studies: Sequence[Sequence[Cell]], path: Path) -> None:
    """A point a run: its score against the Gini coefficient of its sensitivities; a panel a study."""
    shown = [
        of_study
        for of_study in of_studies
        if any(cell.concentration() and cell.label == AGAINST[0] for cell in of_study)
    ]
    if not shown:
        return
    looks = appearances(cell.label for of_study in shown for cell in of_study)
    figure, panels = _panels(len(shown), 3.4, 3.3)
    for axes, of_study in zip(panels, shown, strict=True):
        for cell in of_study:
            gini, scores = cell.concentration(), cell.scores()
            colour, marker = looks[cell.label]
            axes.scatter(
                list(gini.values()), [scores[seed] for seed in gini], s=14, alpha=0.75, linewidths=0,
                color=colour, marker=marker, label=cell.label,
            )  # fmt: skip
        setting = of_study[0].study.setting
        _dress(axes, setting.name, "Gini coefficient of |w g|, word embeddings left out")
        axes.set_ylabel(quoted(setting.task), fontsize=8, color=INK)
    _legend(figure, panels)
    figure.savefig(path, dpi=130)


def draw_noise(studies: Sequence[Study], found: Mapping[str, Line], path: Path) -> None:
    """The trials' means and standard deviations over their seeds, against noise_scale; a panel a study."""
    shown = [
        study for study in studies if any("noise_scale" in t for ts in study.methods.values() for t in ts)
    ]
    if not shown:
        return
    looks = appearances(label for study in shown for label in study.methods)
    figure, panels = _panels(len(shown), 3.4, 3.0)
    for axes, study in zip(panels, shown, strict=True):
        metric = quoted(study.setting.task)
        for label, trials in study.methods.items():
            points = []
            for trial in trials:
                seeds = (*study.trial_seeds, *(study.seeds if len(trials) == 1 else ()))
                names = [identity(configuration(study.setting, trial, seed)) for seed in seeds]
                scores = [found[name]["metrics"]["select"][metric] for name in names if name in found]
                if scores and "noise_scale" in trial:
                    points.append((trial["noise_scale"], np.mean(scores), np.std(scores)))
            if len(points) > 1:
                x, mean, sd = zip(*points, strict=True)
                axes.errorbar(
                    x, mean, sd, color=looks[label][0], marker="o", markersize=3, capsize=2,
                    linewidth=1.2, label=label,
                )  # fmt: skip
        axes.set_xscale("log")
        _dress(axes, study.setting.name, "noise_scale")
        axes.set_ylabel(f"{metric}, selection half", fontsize=8, color=INK)
    _legend(figure, panels)
    figure.savefig(path, dpi=130)


def _panels(count: int, width: float, height: float) -> tuple["Figure", list["Axes"]]:
    """So many of this size in inches, up to four in a row."""
    from matplotlib.figure import Figure

    columns = min(count, 4)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns + 0.6, height * rows + 0.6), layout="constrained")
    every = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in every[count:]:
        axes.set_axis_off()
    return figure, every[:count]


def _legend(figure: "Figure", panels: Sequence["Axes"]) -> None:
    """One for all panels, of the one that shows most."""
    handles, labels = max((axes.get_legend_handles_labels() for axes in panels), key=lambda of: len(of[1]))
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=8)


def _dress(axes: "Axes", title: str, below: str) -> None:
    axes.set_title(title, loc="left", fontsize=9, color=INK)
    axes.set_xlabel(below, fontsize=8, color=INK)
    axes.grid(color=QUIET, alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(QUIET)
    axes.tick_params(colors=INK, labelsize=8)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m replication.report", description=__doc__)
    parser.add_argument("study", nargs="*", help=f"one or more of {', '.join(STUDIES)}")
    parser.add_argument("--only", metavar="REGEX", default="", help="the studies whose names match")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="where the lines are (default: %(default)s)"
    )
    parser.add_argument("--adamw", action="store_true", help="print every AdamW run there is, in one table")
    parser.add_argument("--tables", type=Path, help="a file for the Markdown; else it is printed")
    parser.add_argument("--figures", type=Path, help="a folder for the figures")
    options = parser.parse_args(argv)
    try:
        studies = select(options.study, options.only)
    except ValueError as error:
        parser.error(str(error))
    found = lines.read(options.out)
    if options.adamw:
        print(adamw_table(found))
        return
    text = tables(studies, found)
    if options.tables:
        options.tables.write_text(text, encoding="utf-8")
    else:
        print(text)
    if options.figures:
        options.figures.mkdir(parents=True, exist_ok=True)
        of_studies = [cells(study, found) for study in studies]
        draw_differences(of_studies, options.figures / "replication-differences.png")
        draw_concentration(of_studies, options.figures / "replication-concentration.png")
        draw_noise(studies, found, options.figures / "replication-noise-scale.png")


if __name__ == "__main__":
    main()
