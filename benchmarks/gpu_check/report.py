"""`python -m benchmarks.gpu_report FILE [--plot FILE.png]`: the README's tables and picture from a gpu_check.

FILE is the result of `python -m benchmarks.gpu_check`. Prints Markdown; draws only what was measured.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_check import check as gpu_check
from benchmarks.gpu_check import targets

LABELS = {
    ("eager", "none", "delayed"): "eager (a loop of torch operations)",
    ("foreach", "none", "delayed"): "foreach",
    ("compile", "none", "delayed"): "torch.compile, its fastest form",
    ("fused", "none", "delayed"): "**PATS**",
    ("fused", "none", "exact"): "PATS, exact normalization",
    ("attached", "adamw", "delayed"): "fused AdamW + `PATS`, two passes",
    ("fused", "adamw", "delayed"): "**`PATSAdamW`**",
    ("moments", "adamw", "delayed"): '`PATSAdamW(sensitivity="moments")`',
}
MEMORY_BOUND = 10_000  # elements per tensor; above, memory limits a step
SHARE_COLORS = {"float32": "#0b6e4f", "bfloat16": "#7fb69f"}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_report", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    options = parser.parse_args(arguments)
    result = json.loads(options.file.read_text(encoding="utf-8"))
    runs = gpu_check.runs(result)
    if not runs:
        parser.error(f"{options.file} holds no run of the suite: {result['error'] or 'none finished'}")
    print(markdown(result, runs))
    if options.plot:
        plot(result, runs, options.plot)
    return 0


def markdown(result: dict[str, Any], runs: Sequence[targets.Run]) -> str:
    """A line on the machine, the targets, and a table for each run."""
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in ("torch", "triton"))
    lines = [f"{result['device']}, driver {driver_version(result)}, {versions}, {result['date'][:10]}.", ""]
    if result["rehearsal"]:
        lines = ["**A rehearsal on a CPU: no figure here is a GPU's.**", "", *lines]
    lines += table(("what", "target", "measured", "met"), gpu_check.target_rows(result)[1:])
    for run in runs:
        lines += ["", title(run), "", *run_table(run, "CPU" if result["rehearsal"] else "GPU")]
    return "\n".join(lines)


def driver_version(result: dict[str, Any]) -> str:
    """The driver's version: the second field of nvidia-smi's answer."""
    fields = (result["driver"] or "").split(", ")
    return fields[1] if len(fields) > 1 else "unknown"


def title(run: targets.Run) -> str:
    size = f"{run['params'] / 1e6:.4g} M parameters in {run['tensors']} tensors"
    return (
        f"{run['model']}, {size}, {targets.dtype_of(run)}, gradients {run['gradients']}; "
        f"a copy moves {run['copy_gbps']:.0f} GB/s:"
    )


def run_table(run: targets.Run, device: str) -> list[str]:
    header = ("step", f"{device} ms", "p10 - p90", "as a graph", "host ms", "of a copy", "x fused AdamW")
    rows = [(label(row), *figures(row, run["adamw_fused_ms"])) for row in run["results"]]
    adamw = run["adamw_fused"]
    moved = run["adamw_fused_bytes_per_param"] * run["params"]
    share = moved / run["adamw_fused_ms"] / 1e6 / run["copy_gbps"]
    ends = (ms(adamw["captured_ms"]), ms(adamw["host_ms"]), f"{share:.0%}", "1")
    rows.append(("`torch.optim.AdamW(fused=True)` alone", ms(run["adamw_fused_ms"]), "", *ends))
    return table(header, rows)


def label(row: dict[str, Any]) -> str:
    key = (row["variant"], row["optimizer"], row["normalization"])
    known = LABELS.get(key, " ".join(key))
    return known if row["backend"] in ("aten", "inductor") else f"{known} ({row['backend']})"


def figures(row: dict[str, Any], adamw: float) -> tuple[str, ...]:
    spread = f"{ms(row['p10_ms'])} - {ms(row['p90_ms'])}"
    times = (ms(row["median_ms"]), spread, ms(row["captured_ms"]), ms(row["host_ms"]))
    return (*times, f"{row['fraction_of_copy']:.0%}", f"{row['median_ms'] / adamw:.2f}")


def ms(value: float | None) -> str:
    """Three significant digits; empty if not measured."""
    return "" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def plot(result: dict[str, Any], runs: Sequence[targets.Run], path: Path) -> None:
    """Left: the share of a copy's bandwidth that PATS reaches, by model. Right: everyone on the first one."""
    import matplotlib  # only the plot needs it

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (shares, times) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    figure.suptitle(f"PATS on {result['device']}", fontweight="bold")
    firsts = {(run["model"], targets.dtype_of(run)): run for run in reversed(runs)}
    found = [(run, row) for run in runs if run in firsts.values() and (row := targets.best(run, "fused"))]
    # If tensors are so small that memory is not the limit, its share says nothing.
    rows = [(run, row) for run, row in found if run["params"] > run["tensors"] * MEMORY_BOUND] or found
    names = [f"{run['model']}, {row['dtype']}" for run, row in rows]
    colors = [SHARE_COLORS.get(row["dtype"], "gray") for _, row in rows]
    bars = shares.barh(names, [100 * row["fraction_of_copy"] for _, row in rows], color=colors)
    shares.bar_label(bars, fmt="%.0f%%", label_type="center", color="white", fontweight="bold")
    shares.axvline(100, color="black", linewidth=1, linestyle=":")
    shares.set_xlabel("% of a large copy's bandwidth")

    run = runs[0]
    shown = [(label(row).replace("**", "").replace("`", ""), row["median_ms"]) for row in run["results"]]
    shown.append(("AdamW (fused) alone", run["adamw_fused_ms"]))
    bars = times.barh([name for name, _ in shown], [value for _, value in shown], color="#9db4c0")
    times.bar_label(bars, [ms(value) for _, value in shown], padding=4)
    times.set_xlabel(f"ms a step: {run['model']}, {targets.dtype_of(run)}")
    times.margins(x=0.15)
    for axes in (shares, times):
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    note = "a rehearsal on a CPU" if result["rehearsal"] else f"torch {result['versions']['torch']}"
    figure.supxlabel(f"{note}, {result['date'][:10]}", fontsize=8, color="gray")
    figure.savefig(path, format="png", dpi=150)
    plt.close(figure)
