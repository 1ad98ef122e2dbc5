"""Runs run_glue.py on a grid of noise_scale and gamma, and draws the metric against noise_scale.

python examples/noise_sweep.py --out sweep.json --noise_scales 1e-5,1e-4,1e-3 --gammas 0,1 --seeds 1,2,3 \\
    --plot sweep.png -- --model_name_or_path DIR --task_name sst2 --data_dir DIR --max_train_samples 10000

Arguments after `--` go to run_glue.py. Runs that are already in the file are not repeated. So a second
command can widen the grid, and the same command continues a stopped one. `--` with nothing after it only
draws.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PACKAGES = ("pats_kernels", "torch", "transformers", "accelerate", "datasets")
KEY = ("method", "noise_scale", "gamma", "seed")  # what identifies a run
LOGGED = ("mean_gate", "noisy_share")
COLOURS = {"adamw": "#333333", "noise": "#D55E00", "pats": "#0072B2"}
GAMMA_COLOURS = ("#56B4E9", "#009E73", "#0072B2", "#CC79A7", "#E69F00")
INK, QUIET = "#333333", "#999999"

Run = dict[str, Any]


def grid(methods: list[str], scales: list[float], gammas: list[float], seeds: list[int]) -> Iterator[Run]:
    """All runs, seed by seed. adamw has no noise_scale, and noise no gamma: they are not repeated."""
    for seed in seeds:
        for method in methods:
            for scale in [None] if method == "adamw" else scales:
                for gamma in gammas if method == "pats" else [None]:
                    yield dict(zip(KEY, (method, scale, gamma, seed), strict=True))


def finetune(run: Run, arguments: list[str]) -> Run:
    """Runs once in this process: its metrics, and the means of PATSCallback's figures over its logs."""
    import run_glue

    given = [f"--{name}={value}" for name, value in run.items() if value is not None]
    quiet = ["--disable_tqdm=true", "--eval_strategy=no"]
    with (
        tempfile.TemporaryDirectory() as folder,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
    ):
        result = run_glue.main([*quiet, *arguments, *given, "--output_dir", folder])
    (done,) = result["runs"]
    losses = [entry["loss"] for entry in done["log_history"] if "loss" in entry]
    for name in LOGGED:
        values = [entry[f"pats/{name}"] for entry in done["log_history"] if f"pats/{name}" in entry]
        run[name] = statistics.fmean(values) if values else None
    metrics = next(iter(done["metrics"].values()))
    evaluated = next(iter(done["evaluation"].values()))
    loss = next(value for name, value in evaluated.items() if name.endswith("_loss"))
    return run | {"metrics": metrics, "eval_loss": loss, "last_train_loss": losses[-1] if losses else None}


def sweep(wanted: list[Run], arguments: list[str], file: Path, processes: int) -> list[Run]:
    """Adds the runs of `wanted` that the file lacks, and returns all. Writes the file after each run."""
    record = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"runs": []}
    runs: list[Run] = record["runs"]
    if runs and wanted and record["arguments"] != arguments:
        raise SystemExit(
            f"noise_sweep.py: {file} has runs with other arguments: {' '.join(record['arguments'])}"
        )
    known = {tuple(run[name] for name in KEY) for run in runs}
    missing = [run for run in wanted if tuple(run.values()) not in known]
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(finetune, run, arguments) for run in missing]
        for job in as_completed(jobs):
            runs.append(job.result())
            runs.sort(key=lambda run: tuple(-1 if run[name] is None else run[name] for name in KEY))
            record = {
                "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
                "arguments": arguments,
                "runs": runs,
            }
            file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            print({name: value for name, value in job.result().items() if value is not None}, flush=True)
    return runs


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; 0 for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def series(runs: list[Run], metric: str, method: str, gamma: float | None) -> dict[float | None, list[float]]:
    """The metric of every seed, by noise_scale."""
    found: dict[float | None, list[float]] = {}
    for run in sorted(runs, key=lambda run: run["noise_scale"] or 0):
        if run["method"] == method and run["gamma"] == gamma:
            found.setdefault(run["noise_scale"], []).append(run["metrics"][metric])
    return found


def summary(runs: list[Run]) -> str:
    """A line for each cell of the grid."""
    metrics = list(runs[0]["metrics"])
    lines = ["method  noise_scale  gamma  seeds  " + "  ".join(f"{metric:>17}" for metric in metrics)]
    lines[0] += "  mean_gate  noisy_share"
    for place in dict.fromkeys(tuple(run[name] for name in KEY[:3]) for run in runs):
        here = [run for run in runs if tuple(run[name] for name in KEY[:3]) == place]
        shown = ["" if value is None else f"{value:g}" for value in place[1:]]
        line = f"{place[0]:<6}  {shown[0]:>11}  {shown[1]:>5}  {len(here):>5}"
        for metric in metrics:
            mean, std = spread([run["metrics"][metric] for run in here])
            line += f"  {mean:>8.4f} ± {std:.4f}"
        for name, width in zip(LOGGED, (9, 11), strict=True):
            values = [run[name] for run in here if run[name] is not None]
            line += f"  {statistics.fmean(values):>{width}.4f}" if values else ""
        lines.append(line)
    return "\n".join(lines)


def plot(runs: list[Run], path: Path) -> None:
    """Left: PATS (with gamma 1, if there is one) and the same noise everywhere. Right: PATS by gamma."""
    from matplotlib.figure import Figure

    metric = next(iter(runs[0]["metrics"]))
    gammas = sorted({run["gamma"] for run in runs if run["method"] == "pats"})
    shown = 1.0 if 1.0 in gammas else next(iter(gammas), 1.0)
    figure = Figure(figsize=(10, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes in (left, right):
        for scores in series(runs, metric, "adamw", None).values():
            mean, std = spread(scores)
            axes.axhline(mean, color=COLOURS["adamw"], linewidth=1, linestyle="--", label="AdamW")
            axes.axhspan(mean - std, mean + std, color=COLOURS["adamw"], alpha=0.08, linewidth=0)
    _draw(left, series(runs, metric, "noise", None), "the same noise everywhere", COLOURS["noise"], "s")
    _draw(left, series(runs, metric, "pats", shown), f"PATS, gamma {shown:g}", COLOURS["pats"], "o")
    for place, gamma in enumerate(gammas):
        colour, nudge = GAMMA_COLOURS[place % len(GAMMA_COLOURS)], 1.06 ** (place - (len(gammas) - 1) / 2)
        _draw(
            right, series(runs, metric, "pats", gamma), f"gamma {gamma:g}", colour, "osD^v"[place % 5], nudge
        )
    left.set_title(f"{metric} after fine-tuning", loc="left", fontsize=10, color=INK)
    right.set_title("PATS, by gamma", loc="left", fontsize=10, color=INK)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xlabel("noise_scale", fontsize=9, color=INK)
        axes.grid(axis="y", color=QUIET, alpha=0.25, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(QUIET)
        axes.tick_params(colors=INK, labelsize=8)
        axes.legend(frameon=False, fontsize=8, loc="lower left", labelcolor=INK)
    figure.savefig(path, dpi=150)


def _draw(
    axes: "Axes",
    found: dict[float | None, list[float]],
    label: str,
    colour: str,
    marker: str,
    nudge: float = 1.0,
) -> None:
    x = [(scale or 0.0) * nudge for scale in found]  # shifted, so that error bars do not overlap
    means, stds = zip(*map(spread, found.values()), strict=True) if found else ((), ())
    axes.errorbar(
        x, means, stds, label=label, color=colour, marker=marker, markersize=4, linewidth=1.3, capsize=2
    )


def main(argv: Sequence[str] | None = None) -> list[Run]:
    given = list(sys.argv[1:] if argv is None else argv)
    own, arguments = (
        (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    )
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file for all runs")
    parser.add_argument("--plot", type=Path, help="file for the picture")
    parser.add_argument("--methods", default="adamw,noise,pats")
    parser.add_argument("--noise_scales", default="1e-6,1e-5,1e-4,1e-3,1e-2")
    parser.add_argument("--gammas", default="1")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument(
        "--processes", type=int, default=1, help="number of runs at the same time, with one thread each"
    )
    options = parser.parse_args(own)
    methods = [name.strip() for name in options.methods.split(",")]
    scales, gammas = ([float(x) for x in text.split(",")] for text in (options.noise_scales, options.gammas))
    seeds = [int(seed) for seed in options.seeds.split(",")]
    wanted = list(grid(methods, scales, gammas, seeds)) if arguments else []
    runs = sweep(wanted, arguments, options.out, options.processes)
    print(summary(runs))
    if options.plot:
        plot(runs, options.plot)
    return runs


if __name__ == "__main__":
    main()
