"""Continues training a masked language model in float32 and in bfloat16, with both ways of rounding.

python examples/low_precision.py --model_name_or_path runs/pretrained --text BOOKS... --heldout_text BOOK \\
    --out low-precision.json --plot low-precision.png

bfloat16 is rounded stochastically and to nearest. All runs of a seed see the same batches with the same masks
and draw the same noise. The model computes in its parameters' dtype; the held-out loss is computed in float32
from the stored weights.
"""

import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import BertTokenizer, DataCollatorForLanguageModeling, HfArgumentParser, set_seed

from pats_kernels import PATSAdamW
from pretrain import BertForMaskedLM, read, sequences
from run_glue import versions

INK, QUIET = "#333333", "#999999"


class Storage(NamedTuple):
    """How a run stores its parameters and state."""

    param_dtype: torch.dtype
    state_dtype: torch.dtype
    stochastic_rounding: bool
    colour: str
    width: float  # of its line; the thinnest is drawn last, so that coinciding curves stay visible

    @property
    def line(self) -> str:
        return "-" if self.stochastic_rounding else "--"


BASELINE = "float32"
STORAGES = {  # the dtype of the parameters; also of the state, unless the name says otherwise
    BASELINE: Storage(torch.float32, torch.float32, True, INK, 5.5),
    "bfloat16, stochastic": Storage(torch.bfloat16, torch.bfloat16, True, "#0072B2", 3.0),
    "bfloat16, to nearest": Storage(torch.bfloat16, torch.bfloat16, False, "#D55E00", 3.0),
    "float32 state, stochastic": Storage(torch.bfloat16, torch.float32, True, "#56B4E9", 1.2),
    "float32 state, to nearest": Storage(torch.bfloat16, torch.float32, False, "#E69F00", 1.2),
}


@dataclass
class Arguments:
    """The model, the text, and the runs."""

    model_name_or_path: str = field(metadata={"help": "Folder that pretrain.py saved"})
    text: list[str] = field(metadata={"help": "Files to train on"})
    heldout_text: list[str] = field(metadata={"help": "Files to compute the loss on"})
    out: str = field(metadata={"help": "JSON file for all runs"})
    plot: str | None = field(default=None, metadata={"help": "File for the picture"})
    max_characters: int | None = field(default=None, metadata={"help": "Characters to use, from the start"})
    heldout_sequences: int = field(default=512, metadata={"help": "Largest number of held-out sequences"})
    learning_rates: str = field(default="5e-5", metadata={"help": "One or more, separated by commas"})
    noise_scale: float = field(default=1e-5, metadata={"help": "noise_scale of PATSAdamW"})
    steps: int = field(default=1000, metadata={"help": "Steps of each run; the learning rate is constant"})
    evaluations: int = field(default=20, metadata={"help": "Number of evaluations in each run"})
    batch_size: int = field(default=32, metadata={"help": "Sequences per batch"})
    max_seq_length: int = field(default=64, metadata={"help": "Tokens in a sequence"})
    seeds: str = field(
        default="1,2,3", metadata={"help": "Seeds of batches, masks and noise, separated by commas"}
    )


class Corpus(NamedTuple):
    """What all runs share: training sequences, and held-out batches with their masks."""

    train: Any
    heldout: list[dict[str, Tensor]]
    collate: DataCollatorForLanguageModeling


def prepare(arguments: Arguments) -> Corpus:
    tokenizer = BertTokenizer.from_pretrained(arguments.model_name_or_path)
    length = arguments.max_seq_length
    train = sequences(read(arguments.text, arguments.max_characters), tokenizer, length)
    held = sequences(read(arguments.heldout_text), tokenizer, length)
    held = held.select(range(min(arguments.heldout_sequences, len(held))))
    collate = DataCollatorForLanguageModeling(tokenizer, seed=0)
    loader = DataLoader(held, batch_size=arguments.batch_size, collate_fn=collate)  # pyright: ignore
    return Corpus(train, [dict(batch) for batch in loader], collate)


def batches(corpus: Corpus, arguments: Arguments, seed: int) -> Any:
    """`arguments.steps` batches, always the same for a seed."""
    order = torch.Generator().manual_seed(seed)
    collate = DataCollatorForLanguageModeling(corpus.collate.tokenizer, seed=seed)
    count = arguments.steps * arguments.batch_size
    sampler = torch.utils.data.RandomSampler(corpus.train, True, count, generator=order)
    return DataLoader(corpus.train, arguments.batch_size, sampler=sampler, collate_fn=collate)


@torch.no_grad()
def heldout_loss(model: BertForMaskedLM, corpus: Corpus, scratch: BertForMaskedLM) -> float:
    """The held-out loss in float32 arithmetic, computed by `scratch` with a copy of the stored weights."""
    scratch.load_state_dict(model.state_dict())
    losses = [scratch(**batch).loss.item() for batch in corpus.heldout]
    return fmean(losses)


def trained(
    storage: Storage, lr: float, seed: int, corpus: Corpus, arguments: Arguments
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """One run: its record, and its sensitivities at the end."""
    set_seed(seed)
    model = BertForMaskedLM.from_pretrained(arguments.model_name_or_path, dtype=storage.param_dtype)
    scratch = BertForMaskedLM.from_pretrained(arguments.model_name_or_path)
    start = {name: param.detach().float().clone() for name, param in model.named_parameters()}
    optimizer = PATSAdamW(
        model.named_parameters(),
        lr=lr,
        noise_scale=arguments.noise_scale,
        state_dtype=storage.state_dtype,
        stochastic_rounding=storage.stochastic_rounding,
        seed=seed,
    )
    every = max(arguments.steps // arguments.evaluations, 1)
    at, losses = [0], [heldout_loss(model, corpus, scratch)]
    for step, batch in enumerate(batches(corpus, arguments, seed), start=1):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % every == 0 or step == arguments.steps:
            at.append(step)
            losses.append(heldout_loss(model, corpus, scratch))
    params = dict(model.named_parameters())
    moved = [params[name].detach().float() - old for name, old in start.items()]
    record = {
        "steps": at,
        "heldout_loss": losses,
        "distance": sum(float(change.square().sum()) for change in moved) ** 0.5,
        "moved_share": sum(int((change != 0).sum()) for change in moved) / sum(map(Tensor.numel, moved)),
    }
    return record, {name: optimizer.state[param]["exp_avg_sens"].float() for name, param in params.items()}


def likeness(sens: dict[str, Tensor], baseline: dict[str, Tensor]) -> dict[str, float]:
    """Compares two runs' sensitivities: the ratio of their sums, and the correlation of their logarithms."""
    a, b = (torch.cat([sens[name].flatten() for name in baseline]) for sens in (sens, baseline))
    both = (a > 0) & (b > 0)
    logs = torch.stack((a[both], b[both])).double().log()
    return {
        "sens_ratio": float(a.double().sum() / b.double().sum()),
        "sens_correlation": float(torch.corrcoef(logs)[0, 1]),
    }


def study(arguments: Arguments, corpus: Corpus) -> list[dict[str, Any]]:
    """Runs every storage with every learning rate and seed; saves after each run."""
    runs: list[dict[str, Any]] = []
    for lr in [float(text) for text in arguments.learning_rates.split(",")]:
        for seed in [int(text) for text in arguments.seeds.split(",")]:
            baseline: dict[str, Tensor] = {}
            for name, storage in STORAGES.items():
                record, sens = trained(storage, lr, seed, corpus, arguments)
                baseline = baseline or sens
                runs.append({"storage": name, "lr": lr, "seed": seed} | record | likeness(sens, baseline))
                save(runs, arguments)
                print(
                    {key: value for key, value in runs[-1].items() if not isinstance(value, list)}
                    | {"heldout_loss": record["heldout_loss"][-1]},
                    flush=True,
                )
    return runs


def save(runs: list[dict[str, Any]], arguments: Arguments) -> None:
    record = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()} | versions(),
        "arguments": asdict(arguments),
        "runs": runs,
    }
    Path(arguments.out).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def of(runs: Sequence[dict[str, Any]], storage: str, lr: float) -> list[dict[str, Any]]:
    return [run for run in runs if run["storage"] == storage and run["lr"] == lr]


def rates(runs: Sequence[dict[str, Any]]) -> list[float]:
    return sorted({run["lr"] for run in runs})


def gaps(runs: Sequence[dict[str, Any]], storage: str, lr: float) -> list[float]:
    """For each seed, the last loss minus that of float32 with the same seed."""
    last = {run["seed"]: run["heldout_loss"][-1] for run in of(runs, BASELINE, lr)}
    return [run["heldout_loss"][-1] - last[run["seed"]] for run in of(runs, storage, lr)]


def spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def table(runs: Sequence[dict[str, Any]]) -> Table:
    grid = Table(title="held-out loss", title_style="bold", box=box.SIMPLE_HEAD)
    columns = ("before", "after", "above float32", "distance", "moved", "sum of S", "correlation of log S")
    for column in ("lr", "storage"):
        grid.add_column(column)
    for column in columns:
        grid.add_column(column, justify="right")
    for lr in rates(runs):
        for name in STORAGES:
            chosen = of(runs, name, lr)
            if not chosen:
                continue
            means = [fmean(run[key] for run in chosen) for key in ("distance", "moved_share")]
            like = [fmean(run[key] for run in chosen) for key in ("sens_ratio", "sens_correlation")]
            grid.add_row(
                f"{lr:g}",
                name,
                spread([run["heldout_loss"][0] for run in chosen]),
                spread([run["heldout_loss"][-1] for run in chosen]),
                spread(gaps(runs, name, lr)),
                f"{means[0]:.3f}",
                f"{means[1]:.2%}",
                f"{like[0]:.4f}",
                f"{like[1]:.4f}",
            )
    return grid


def plot(runs: Sequence[dict[str, Any]], path: str) -> None:
    """A panel per learning rate: each storage's mean over the seeds, and the range of float32's seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(rates(runs)), 3.9), layout="constrained")
    grid = figure.subplots(1, len(rates(runs)), squeeze=False)
    for axes, lr in zip(grid[0], rates(runs), strict=True):
        for name, storage in STORAGES.items():
            curves = [run["heldout_loss"] for run in of(runs, name, lr)]
            if not curves:
                continue
            steps = of(runs, name, lr)[0]["steps"]
            means = [fmean(losses) for losses in zip(*curves, strict=True)]
            if name == BASELINE:
                low, high = ([pick(losses) for losses in zip(*curves, strict=True)] for pick in (min, max))
                axes.fill_between(steps, low, high, color=QUIET, alpha=0.3, linewidth=0)
            style = {"color": storage.colour, "linewidth": storage.width}
            axes.plot(steps, means, storage.line, label=name, **style)
        axes.set_title(f"held-out loss, lr {lr:g}", loc="left", fontsize=10, color=INK)
        axes.set_xlabel("step", fontsize=9, color=INK)
        axes.grid(axis="y", color=QUIET, alpha=0.25, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(QUIET)
        axes.tick_params(colors=INK, labelsize=8)
    grid[0][0].legend(frameon=False, fontsize=8, labelcolor=INK)
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = HfArgumentParser(Arguments)  # pyright: ignore[reportArgumentType]
    (arguments,) = parser.parse_args_into_dataclasses(args=list(sys.argv[1:] if argv is None else argv))
    Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
    runs = study(arguments, prepare(arguments))
    Console(width=None if sys.stdout.isatty() else 120).print(table(runs))
    if arguments.plot:
        plot(runs, arguments.plot)
    return runs


if __name__ == "__main__":
    main()
