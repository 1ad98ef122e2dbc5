"""`python -m benchmarks`: how much faster the fused PATS step is, on a real model's tensors and gradients."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch
from rich.console import Console

from benchmarks.common import machine, models
from benchmarks.common.progress import progress
from benchmarks.step import report, variants
from benchmarks.step.run import Settings, run
from pats_kernels import backends
from pats_kernels.hyperparameters import Normalization

REPEATS = {"cpu": 20, "cuda": 50}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    console = Console(width=None if sys.stdout.isatty() else report.WIDTH)
    with progress() as tell:
        result = run(settings(options), tell)
    report.show(result, console)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if options.plot:
        report.plot(result, options.plot)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line. Exits with the reason if this machine or this package lacks something."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--model", default="bert-base-uncased", help="name on the Hugging Face hub")
    parser.add_argument("--device", choices=REPEATS, default=device)
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="dtype of the parameters and their state"
    )
    parser.add_argument(
        "--optimizer", choices=variants.OPTIMIZERS, default="none", help="which step follows the PATS step"
    )
    parser.add_argument(
        "--variants",
        type=variant_names,
        metavar="NAMES",
        help=f"some of {','.join(variants.NAMES)}; default: all",
    )
    parser.add_argument("--normalization", choices=get_args(Normalization), default="delayed")
    parser.add_argument("--backend", choices=backends.NAMES, default="auto", help="backend of this package")
    parser.add_argument("--repeats", type=positive, help="number of timed steps of each variant")
    parser.add_argument("--threads", type=positive, help="number of torch's threads on the CPU")
    machine.add_isa(parser)
    parser.add_argument(
        "--caches", choices=("cold", "warm"), default="cold", help="state of the caches before each step"
    )
    parser.add_argument("--text", type=Path, help="text to compute gradients from; default: the README")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the results into this file")
    options = parser.parse_args(arguments)
    known = variants.names(options.optimizer)
    options.variants = options.variants or known
    try:
        for name in options.variants:
            if name not in known:
                raise ValueError(f"{name!r} needs --optimizer adamw: it is {variants.MEANINGS[name]}")
        if options.device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError(f"no GPU: torch {torch.__version__} finds no CUDA device")
        models.config(options.model)
        machine.choose_isa(options.isa)
        backends.resolve(options.backend, torch.device(options.device))
    except (RuntimeError, ValueError) as error:
        parser.error(str(error))
    return options


def settings(options: argparse.Namespace) -> Settings:
    return Settings(
        model=options.model,
        device=torch.device(options.device),
        dtype=DTYPES[options.dtype],
        optimizer=options.optimizer,
        variants=options.variants,
        normalization=options.normalization,
        backend=options.backend,
        cold=options.caches == "cold",
        repeats=options.repeats or REPEATS[options.device],
        text=options.text.read_text(encoding="utf-8") if options.text else models.default_text(),
    )


def variant_names(value: str) -> tuple[str, ...]:
    names = tuple(value.split(","))
    for name in names:
        if name not in variants.NAMES:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(variants.NAMES)}")
    return names


def positive(value: str) -> int:
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return number


if __name__ == "__main__":
    sys.exit(main())
