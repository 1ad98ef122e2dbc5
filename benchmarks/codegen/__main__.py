"""Compiles the Triton kernels and reports on their machine code, on a machine with or without a GPU.

    python -m benchmarks.codegen --bound
    python -m benchmarks.codegen [--arch sm_80|sm_90|sm_100|gfx942|gfx1100] [--cuda] [--json FILE]

Every form of the step is compiled offline for the architecture. The report has registers, stack, spills, the
widths of loads and stores, and instructions per element. An instruction inside the loop over a chunk's blocks
counts once for each block, the others once for each chunk. So the figure is what a thread executes on full,
aligned chunks, including table look-ups and the reduction of the statistics. With --cuda, if nvcc is
installed, the same for the CUDA kernels (`nvcc.py`).

For AMD's architectures (gfx...) Triton's AMD backend compiles, and the report is read from its assembly
(`amdgcn.py`): vector and scalar registers, scratch memory, spilled registers. Instructions are not counted
there, because the library's sine and cosine have branches that no angle here takes.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
import triton
from rich.console import Console
from rich.table import Table

from benchmarks.codegen import bound, compiled, nvcc
from benchmarks.codegen.machine_code import Report


def print_table(reports: list[Report]) -> None:
    table = Table(title=f"Triton {triton.__version__}, {reports[0].arch}")
    for column in ("kernel", "form", "param", "state", "uncertainty"):
        table.add_column(column)
    for column in ("registers", "stack", "spills", "loads", "stores", "SASS / element"):
        table.add_column(column, justify="right")
    for r in reports:
        accesses = (
            " ".join(f"{count}x{bits}" for bits, count in widths.items())
            for widths in (r.load_bits, r.store_bits)
        )
        instructions = "" if r.instructions_per_element is None else f"{r.instructions_per_element:.1f}"
        registers = f"{r.registers}" + ("" if r.scalar_registers is None else f" + {r.scalar_registers}")
        numbers = (registers, str(r.stack_bytes), str(r.spills), *accesses, instructions)
        table.add_row(r.kernel, r.form, r.param_dtype, r.state_dtype, r.uncertainty, *numbers)
    Console(width=170).print(table)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.codegen", description="Reports on the kernels' machine code."
    )
    parser.add_argument(
        "--arch", choices=compiled.ARCHITECTURES + compiled.AMD_ARCHITECTURES, default="sm_90"
    )
    parser.add_argument("--cuda", action="store_true", help="also the CUDA kernels, with nvcc")
    parser.add_argument("--bound", action="store_true", help="share of memory speed that instructions allow")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    options = parser.parse_args(arguments)
    if options.cuda and options.arch in compiled.AMD_ARCHITECTURES:
        parser.error(f"nvcc does not compile for {options.arch}")
    if options.bound:
        return bound.print_bound()
    reports = [compiled.report(key, phase, options.arch) for key, phase in compiled.combinations()]
    reports.append(compiled.statistics_report(options.arch))
    if options.cuda:
        reports += nvcc.reports(options.arch)
    print_table(reports)
    if options.json:
        versions = {"triton": triton.__version__, "torch": torch.__version__}
        content = {"arch": options.arch, **versions, "kernels": [asdict(r) for r in reports]}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
