"""Shows a run: a table on the screen, and two charts in a PNG."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.common import machine
from benchmarks.common.results import Report, Row, gigabytes_per_second
from benchmarks.step import variants

FUSED, OURS, COMPETITOR, YARDSTICK = "#0b6e4f", "#7fb69f", "#9db4c0", "#d8d8d8"
ADAMW = "AdamW (fused)"
BAR = 0.62  # a bar's height, where 1 leaves no gap
QUIET = 1.0  # the load includes this process
WIDTH = 120  # columns, if there is no terminal


def show(report: Report, console: Console) -> None:
    """Prints the table, the figures to compare it with, and what could not run."""
    console.print(_table(report))
    gbps = _adamw_gbps(report)
    console.print(
        f"{ADAMW}: {_ms(report['adamw_fused_ms'])} ms, {gbps:.1f} GB/s, "
        f"{gbps / report['copy_gbps']:.0%} of a copy. "
        f"A large copy: {report['copy_gbps']:.1f} GB/s, read and written."
    )
    if report["device"] == "cpu":
        console.print(
            "On a CPU a copy also reads what it overwrites; a step in place does not, so it may pass 100%."
        )
    if report["rechecked"]:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in report["rechecked"].items())
        console.print(
            f"One more step after all rounds agrees with eager, within rounding ({shares} of the limit)."
        )
    if report["host_us_per_tensor"] is not None:
        console.print(f"Host time of the fused step: {report['host_us_per_tensor']:.2f} us per tensor.")
    for row in report["results"]:
        if row["configuration"] is not None:
            console.print(f"{row['variant']}: the fastest here was {row['configuration']!r}.")
        if row["optimizer"] == "adamw" and row["variant"] in variants.MEANINGS:
            console.print(f"{row['variant']}: {variants.MEANINGS[row['variant']]}.", markup=False)
    if report["kept_freed_memory"] and report["device"] == "cpu":
        console.print("malloc keeps freed memory for all contestants; else eager torch is much slower.")
    if report["load_before"] > QUIET:
        busy = f"The machine was busy before the first step (load {report['load_before']:.1f})"
        console.print(f"{busy}: on shared cores threads wait for each other, and the times mean little.")
    for variant, error in report["errors"].items():
        console.print(f"{variant} could not run: {error}", style="red", markup=False)


def _table(report: Report) -> Table:
    table = Table(title=_title(report), title_style="bold", caption=_caption(report), box=box.SIMPLE_HEAD)
    table.add_column("variant", no_wrap=True)
    attached = _median_of(report, "attached")
    relative = ("x AdamW", "x attached") if attached is not None else ("x AdamW",)
    for column in ("ms", "p10 - p90", "ns/param", "GB/s", "of a copy", "speedup", *relative, "extra MB"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in report["results"]:
        speedup = row["speedup_vs_eager"]
        table.add_row(
            _label(row),
            _ms(row["median_ms"]),
            f"{_ms(row['p10_ms'])} - {_ms(row['p90_ms'])}",
            f"{row['ns_per_param']:.3g}",
            f"{row['gbps']:.1f}",
            f"{row['fraction_of_copy']:.0%}",
            f"{speedup:.1f}" if speedup is not None else "",
            *(
                f"{row['median_ms'] / ms:.2f}"
                for ms in (report["adamw_fused_ms"], attached)
                if ms is not None
            ),
            f"{row['peak_extra_bytes'] / 1e6:.1f}",
            style="bold green" if row["variant"] == "fused" else None,
        )
    return table


def plot(report: Report, path: Path) -> None:
    """Writes the charts: the time of a step, and its share of the memory bandwidth."""
    names = [_label(row) for row in report["results"]] + [ADAMW]
    colors = [_color(row) for row in report["results"]] + [YARDSTICK]
    size = (11, 1.7 + 0.5 * len(names))
    figure, (times, shares) = plt.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
    figure.suptitle(_title(report), fontweight="bold")
    _plot_times(times, report, names, colors)
    _plot_shares(shares, report, names, colors)
    times.invert_yaxis()  # the first contestant on top, in both charts
    figure.supxlabel(_caption(report), fontsize=8, color="gray")
    figure.savefig(path, format="png", dpi=150)
    plt.close(figure)


def _plot_times(axes: Axes, report: Report, names: list[str], colors: list[str]) -> None:
    rows = report["results"]
    medians = [row["median_ms"] for row in rows] + [report["adamw_fused_ms"]]
    ends = [max(row["median_ms"], row["p90_ms"]) for row in rows] + [report["adamw_fused_ms"]]
    speedups = [row["speedup_vs_eager"] for row in rows] + [None]
    axes.barh(names, medians, BAR, color=colors)
    for position, row in enumerate(rows):
        axes.hlines(position, row["p10_ms"], row["p90_ms"], color="black", linewidth=1.2)
    for position, (median, end, speedup) in enumerate(zip(medians, ends, speedups, strict=True)):
        _annotate(axes, position, end, f"{_ms(median)} ms" + (f"  ({speedup:.1f}x)" if speedup else ""))
    axes.set_xlim(0, 1.35 * max(ends))
    _finish(axes, "Time of a step (and speedup over eager)", "ms: median, line from p10 to p90")


def _plot_shares(axes: Axes, report: Report, names: list[str], colors: list[str]) -> None:
    adamw = _adamw_gbps(report) / report["copy_gbps"]
    shares = [100 * row["fraction_of_copy"] for row in report["results"]] + [100 * adamw]
    axes.barh(names, shares, BAR, color=colors)
    for position, share in enumerate(shares):
        _annotate(axes, position, share, f"{share:.1f}%")
    axes.axvline(100, color="black", linewidth=1, linestyle=":", zorder=0)
    axes.set_xlim(0, 1.2 * max(100.0, *shares))
    label = f"% of a large copy's {report['copy_gbps']:.0f} GB/s: bytes that a step must move, per second"
    _finish(axes, "Share of the memory bandwidth", label)


def _annotate(axes: Axes, position: int, end: float, text: str) -> None:
    """Writes a bar's figure just after its end."""
    place = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "fontsize": 9}
    axes.annotate(text, (end, position), **place)


def _finish(axes: Axes, title: str, label: str) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(label, fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _title(report: Report) -> str:
    first = report["results"][0] if report["results"] else None
    what = f", {first['dtype']}, {first['normalization']} normalization" if first else ""
    followed = ", AdamW included" if first and first["optimizer"] == "adamw" else ""
    millions = report["params"] / 1e6
    what += followed + machine.isa_title(report)
    return f"PATS step: {report['model']}, {millions:.4g} M parameters{what}"


def _caption(report: Report) -> str:
    threads = f", {report['threads']} threads" if report["device"] == "cpu" else ""
    caches = "cold" if report["cold_caches"] else "warm"
    rounds = f"median of {report['repeats']} interleaved rounds from {caches} caches"
    return f"{report['device_name']}{threads}, torch {report['torch']}, {rounds}"


def _label(row: Row) -> str:
    return f"{row['variant']} ({row['backend']})"


def _color(row: Row) -> str:
    if row["variant"] == "fused":
        return FUSED
    return OURS if row["variant"] in variants.OURS else COMPETITOR


def _median_of(report: Report, variant: str) -> float | None:
    """A contestant's median time; None if it did not take part."""
    return next((row["median_ms"] for row in report["results"] if row["variant"] == variant), None)


def _adamw_gbps(report: Report) -> float:
    moved = report["adamw_fused_bytes_per_param"] * report["params"]
    return gigabytes_per_second(moved, report["adamw_fused_ms"])


def _ms(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
