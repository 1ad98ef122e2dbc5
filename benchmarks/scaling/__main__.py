"""The cost of a step on one of 8 to 4,096 GPUs, computed, and of its work on the host, measured.

    python -m benchmarks.scaling [--json FILE] [--plot FILE] [--experts N,...] [--no-host]

There are three kinds of figures: counted (bytes, launches, messages, tables; exact, from the planner's own
tables), measured here (the host's time), and modelled (times on GPUs, none of them measured; the assumptions
are printed with them).
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
from matplotlib import pyplot as plt
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.common import machine
from benchmarks.common.progress import progress
from benchmarks.scaling.counts import GPUS, H200, MODELS, Assumptions, Row, rows
from benchmarks.scaling.host import Host, measure, models_of
from benchmarks.step import report

EXPERTS = (1000, 10_000, 100_000)
REAL = (100, 1000, 10_000)  # numbers of tensors in the real steps
EMA = "ema, float32"


class Report(TypedDict):
    """One run. In `rows` the fields from `fits` on are modelled, the others counted. `host` is measured."""

    machine: machine.Machine
    assumptions: Assumptions
    rows: list[Row]
    host: Host | None


def counted(found: list[Row]) -> Table:
    table = _table(
        "counted: rank 0, which holds the most",
        "state and bytes moved (read and written) in float32, with AdamW's step; GB = 10^9 bytes",
    )
    for name in ("model", "layout"):
        table.add_column(name, no_wrap=True)
    for name in (
        *("GPUs", "M params", "x mean", "state GB", "moments", "moved GB", "moments", "AdamW"),
        *("kernels", "messages", "bytes", "tables MB", "slow"),
    ):
        table.add_column(name, justify="right")
    for row in found:
        state, moved = row["state_bytes"], row["moved_bytes"]
        table.add_row(
            row["model"],
            row["layout"],
            str(row["gpus"]),
            f"{row['numel'] / 1e6:.1f}",
            f"{row['balance']:.2f}",
            *(f"{value / 1e9:.3g}" for value in (state[EMA], state["moments, float32"])),
            *(f"{value / 1e9:.3g}" for value in (moved[EMA], moved["moments, float32"])),
            f"{row['adamw_moved_bytes'] / 1e9:.3g}",
            str(row["kernels"]["delayed"]),
            str(row["messages"]),
            str(row["message_bytes"]),
            f"{row['table_bytes'] / 1e6:.2g}",
            f"{row['slow_share']:.0%}",
        )
    return table


def modelled(found: list[Row]) -> Table:
    table = _table(
        "MODEL, not measured: a step's time, and its share of the training step",
        "step: PATSAdamW, float32 state; over AdamW: what PATS adds; message: overlaps with what follows",
    )
    for name in ("model", "layout"):
        table.add_column(name, no_wrap=True)
    names = ("GPUs", "training ms", "step ms", "share", "over AdamW", "moments: share", "message us", "fits")
    for name in names:
        table.add_column(name, justify="right")
    for row in found:
        table.add_row(
            row["model"],
            row["layout"],
            str(row["gpus"]),
            f"{1e3 * row['training_step_s']:.0f}",
            f"{1e3 * row['step_s']:.3g}",
            f"{row['share'][EMA]:.3%}",
            f"{row['share_over_adamw'][EMA]:.3%}",
            f"{row['share']['moments, float32']:.3%}",
            f"{1e6 * row['message_s']:.0f}",
            "yes" if row["fits"][EMA] else "no",
        )
    return table


def planned(host: Host, about: machine.Machine) -> Table:
    table = _table(
        f"measured here: rank {host['rank']} of {host['world_size']}, tensors without memory"
        f"{machine.isa_title(about)}",
        f"ms for all tensors; those of a step are the least of {host['tries']} tries",
    )
    table.add_column("tensors of", no_wrap=True)
    once, step = ("state", "layout", "plan"), ("gather", "layout", "plan", "tables")
    for name in ("tensors", *(f"first {n}" for n in once), *step, "a step", "us/tensor", "MB host", "MB GPU"):
        table.add_column(name, justify="right")
    for row in host["planned"]:
        keys = ("state_s", "first_layout_s", "first_plan_s", "gather_s", "layout_s", "plan_s", "upload_s")
        figures = cast(dict[str, Any], row)
        table.add_row(
            row["model"],
            str(row["tensors"]),
            *(f"{1e3 * figures[key]:.3g}" for key in (*keys, "step_s")),
            f"{1e6 * row['step_s'] / row['tensors']:.2f}",
            f"{row['kept_bytes'] / 1e6:.1f}",
            f"{row['table_bytes'] / 1e6:.2f}",
        )
    return table


def stepped(host: Host, about: machine.Machine) -> Table:
    table = _table(
        f"measured here: real steps on the CPU, one thread{machine.isa_title(about)}",
        f"microseconds a tensor of 64 elements, the least of {host['tries']} steps or more, taken in turn; "
        "new: with other gradient tensors than in the step before; cold: from cold caches, the median",
    )
    table.add_column("optimizer", no_wrap=True)
    for name in ("tensors", "plain", "new", "cold", "DTensor", "new", "cold"):
        table.add_column(name, justify="right")
    for row in host["stepped"]:
        figures = cast(dict[str, Any], row)
        times = [
            figures[f"{kind}{state}_us"] for kind in ("plain", "sharded") for state in ("", "_new", "_cold")
        ]
        table.add_row(row["optimizer"], str(row["tensors"]), *(f"{time:.2f}" for time in times))
    return table


def _table(title: str, caption: str) -> Table:
    return Table(title=title, caption=caption, title_style="bold", box=box.SIMPLE_HEAD)


def plot(result: Report, path: Path) -> None:
    """Plots the parts of a step on one GPU over the number of GPUs: what shrinks, and what does not."""
    figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
    shades = ("#b7d8c6", "#7fb69f", "#3d9173", "#0b4f3a")
    for model, shade in zip(MODELS, shades, strict=False):
        found = [row for row in result["rows"] if row["model"] == model.name and row["layout"] == "fsdp"]
        fitting = [row for row in found if row["fits"][EMA]]
        label = f"{model.name}: memory traffic (model)"
        axes.plot(
            [r["gpus"] for r in fitting], [1e3 * r["step_s"] for r in fitting], "o-", color=shade, label=label
        )
    largest = [row for row in result["rows"] if row["model"] == MODELS[-1].name and row["layout"] == "fsdp"]
    messages = [1e3 * row["message_s"] for row in largest]
    axes.plot(GPUS, messages, "s--", color="#c26a3d", label="message, overlapped (model)")
    for plan in result["host"]["planned"][:2] if result["host"] else []:
        axes.axhline(1e3 * plan["step_s"], color="black", linewidth=1, linestyle=":")
        place = {"xytext": (0, 4), "textcoords": "offset points", "fontsize": 8}
        axes.annotate(
            f"host, {plan['model']}: {plan['tensors']} tensors (measured)", (8, 1e3 * plan["step_s"]), **place
        )
    axes.set(xscale="log", yscale="log", xlabel="GPUs (fully sharded)", ylabel="ms a step")
    axes.set_xticks(GPUS, [str(n) for n in GPUS])
    axes.minorticks_off()
    axes.set_title("PATSAdamW, float32 state: what shrinks with the number of GPUs", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False)
    figure.savefig(path, format="png", dpi=150)
    plt.close(figure)


def show(result: Report, console: Console) -> None:
    console.print(counted(result["rows"]))
    console.print(
        "slow: elements, on all ranks, whose indices in the tensor are not consecutive in groups of four."
    )
    console.print(modelled(result["rows"]))
    on = result["assumptions"]
    console.print(
        f"Assumed: {on['hbm_bytes_per_s'] / 1e12} TB/s, all of it reached; "
        f"{on['peak_flops'] / 1e12:.0f} TFLOP/s, {on['mfu']:.0%} of it used; "
        f"{on['tokens_per_gpu']} tokens a GPU and step, 6 operations a parameter and token; "
        f"{1e6 * on['launch_s']:.0f} us a launch; "
        f"fits: weights, gradients and state in {on['gpu_bytes'] / 1e9:.0f} GB."
    )
    for names, source in on["sources"].items():
        console.print(f"{names}: {source}.", markup=False)
    host = result["host"]
    if host is not None:
        console.print(planned(host, result["machine"]))
        console.print(stepped(host, result["machine"]))
        strided = host["strided"]
        console.print(
            f"A shard {strided['shape']} of columns: {strided['columns_ns']:.2f} ns an element, one of rows "
            f"{strided['rows_ns']:.2f} (CPU, one thread).",
            markup=False,
        )
        console.print(
            f"Load before: {result['machine']['load_before']:.1f} on {torch.get_num_threads()} threads."
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the results into this PNG")
    parser.add_argument("--experts", default=",".join(map(str, EXPERTS)), metavar="N,...")
    parser.add_argument("--no-host", action="store_true", help="only counts and model, no measurements")
    options = parser.parse_args(arguments)
    counts = tuple(int(count) for count in options.experts.split(",") if count)
    console = Console(width=None if sys.stdout.isatty() else report.WIDTH + 40)
    about = machine.prepare(torch.device("cpu"))
    with progress() as tell:
        tell("counting")
        found = list(rows())
        host = None if options.no_host else measure(models_of(counts), REAL, tell)
    result: Report = {"machine": about, "assumptions": H200, "rows": found, "host": host}
    show(result, console)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        plot(result, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
