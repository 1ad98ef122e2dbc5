"""Tests the noise's randomness: batteries of tests on its words, the backends' normals, shared rounding bits.

    python -m benchmarks.statistics [--samples N] [--batteries NAME,...] [--read FOLDER] [--json FILE]
                                    [--rounding-steps N] [--flags=FLAG,...]

Seeds are fixed, so each run gives the same bits. `--read` reads the batteries' reports from a folder instead
of running the batteries. `--flags` are for the compiler, if it does not find TestU01 by itself.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypedDict

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import machine
from benchmarks.statistics import avalanche, batteries, normals, rounding
from pats_kernels import available_backends

SEED = 20261126
SAMPLES, CHUNK = 10**8, 2**22
SLOW = 2**20  # samples from Triton's interpreter
RUNS = {  # for each battery: streams, and orders of the words' bits
    "SmallCrush": (batteries.STREAMS, ("plain", "reversed")),
    "Crush": (("training",), ("plain",)),
    "dieharder": (("training",), ("plain",)),
}
LEVEL = 1e-3  # for the whole family of p-values, corrected for their number (Bonferroni)


class Report(machine.Machine):
    """One run. `family`: the number of p-values. `p`: the least of them times their number."""

    seed: int
    batteries: list[batteries.Battery]
    normals: list[normals.Normals]
    avalanche: avalanche.Avalanche
    rounding: list[rounding.Cost]
    family: int
    p: float


class Values(TypedDict):
    name: str
    p: float


def family(report: Report) -> Iterator[Values]:
    """All p-values. Those of a battery and of the avalanche are corrected for their own number of tests."""
    for battery in report["batteries"]:
        name = " ".join((battery["battery"], battery["stream"], battery["order"]))
        yield {"name": name, "p": battery["p"]}
        yield {"name": f"{name}: uniformity", "p": battery["uniformity"]}
    for found in report["normals"]:
        for finding in found["findings"]:
            yield {"name": f"{found['backend']}: {finding['test']}", "p": finding["p"]}
    yield {"name": "avalanche, worst cell", "p": report["avalanche"]["p"]}
    for name, p in report["avalanche"]["p_of_each_word"].items():
        yield {"name": f"avalanche, {name}", "p": p}


def measured_normals(samples: int, console: Console) -> Iterator[normals.Normals]:
    """Each backend that runs here: all samples in at least two steps, each of at most `CHUNK`."""
    for backend, reason in available_backends("cpu").items():
        if backend == "auto" or reason is not None:
            continue
        interpreted = backend == "triton"  # on a CPU
        count = min(samples, SLOW) if interpreted else samples
        chunk = min(CHUNK, max(2, count // (4 if interpreted else 2)))
        console.print(f"normals: {backend}, {count}")
        yield normals.measure(backend, chunk, -(-count // chunk), SEED)


def run_batteries(names: Sequence[str], flags: list[str], folder: Path, console: Console) -> None:
    programs = batteries.compile_(folder, flags)
    for name in names:
        for stream in RUNS[name][0]:
            for order in RUNS[name][1]:
                console.print(f"{name}: {stream}, {order}")
                if batteries.run(name, stream, order, programs, folder, 1) is None:
                    console.print(f"{name} is not installed: left out")


def show(report: Report, console: Console) -> None:
    table = Table(
        "battery", "stream", "order", "p-values", "least", "greatest", "p", "uniformity", "verdicts"
    )
    for b in report["batteries"]:
        verdicts = ", ".join(f"{n} {name}" for name, n in b["verdicts"].items())
        numbers = (f"{b[key]:.3g}" for key in ("least", "greatest", "p", "uniformity"))
        name = b["battery"] + ("" if b["complete"] else " (unfinished)")
        table.add_row(name, b["stream"], b["order"], str(b["tests"]), *numbers, verdicts)
    console.print(table)
    for found in report["normals"]:
        title = (
            f"{found['backend']}: {found['samples']} samples, largest |z| {found['largest']:.4f} of at most "
        )
        table = Table("test", "seen", "expected", "p", title=title + f"{found['largest_possible']:.4f}")
        for f in found["findings"]:
            table.add_row(f["test"], f"{f['seen']:.7g}", f"{f['expected']:.7g}", f"{f['p']:.3g}")
        console.print(table)
    for title, value in [("avalanche", report["avalanche"]), *((r["bits"], r) for r in report["rounding"])]:
        table = Table(title, "")
        for key, entry in value.items():
            table.add_row(key, f"{entry:.5g}" if isinstance(entry, float) else str(entry))
        console.print(table)
    console.print(f"{report['family']} p-values; the least times their number: {report['p']:.3g}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if the least corrected p-value is below `LEVEL`, else 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.statistics")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--trials", type=int, default=2**16, help="number of trials of the avalanche test")
    parser.add_argument("--rounding-steps", type=int, default=2000)
    parser.add_argument("--rounding-elements", type=int, default=2**13)
    parser.add_argument("--batteries", default=",".join(RUNS), help="names, separated by commas; empty: none")
    parser.add_argument("--read", type=Path, help="folder with the batteries' reports")
    parser.add_argument("--flags", default="", help="flags for the compiler, separated by commas")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    names = [name for name in options.batteries.split(",") if name]
    if unknown := set(names) - RUNS.keys():
        parser.error(f"Unknown batteries: {sorted(unknown)} (known: {', '.join(RUNS)})")

    console = Console(width=int(os.environ.get("COLUMNS", "140")))
    described = machine.prepare(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.read or Path(temporary)
        if options.read is None and names:
            run_batteries(names, [flag for flag in options.flags.split(",") if flag], folder, console)
        found = [batteries.read(file) for file in sorted(folder.glob("*-*-*.txt"))]
    report: Report = {
        **described,
        "seed": SEED,
        "batteries": found,
        "normals": list(measured_normals(options.samples, console)),
        "avalanche": avalanche.measure(options.trials, SEED),
        "rounding": rounding.measure(options.rounding_elements, options.rounding_steps, SEED),
        "family": 0,
        "p": 1.0,
    }
    values = [value["p"] for value in family(report)]
    report["family"], report["p"] = len(values), min(1.0, len(values) * min(values))
    show(report, console)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(report["p"] < LEVEL)


if __name__ == "__main__":
    sys.exit(main())
