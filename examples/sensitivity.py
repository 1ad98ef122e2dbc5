"""Draws how sensitive a task's loss is to the parameters of models that run_glue.py has saved.

python examples/sensitivity.py --task_name sst2 --data_dir DIR --out FILE.png \\
    --models before=DIR,AdamW=DIR,PATS=DIR

It computes the mean over batches of |w g| with `pats_kernels.analysis`, prints a table, and writes the
picture to FILE.png and the numbers to FILE.json. A model without a classifier gets the one that run_glue.py
gives it with --seed.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, HfArgumentParser, set_seed

from pats_kernels.analysis import FRACTIONS, Distribution, distribution, plot, sensitivities
from run_glue import DataArguments, ModelArguments, prepare, versions


@dataclass
class Arguments:
    """What to measure, and where."""

    task_name: str = field(metadata={"help": "As in run_glue.py"})
    models: str = field(metadata={"help": "LABEL=DIR,LABEL=DIR,...: the legend's labels and the folders"})
    out: str = field(metadata={"help": "File for the picture; the numbers go into .json beside it"})
    data_dir: str | None = field(default=None, metadata={"help": "As in run_glue.py"})
    split: str = field(
        default="train", metadata={"help": "The split to compute the loss on: train, validation, ..."}
    )
    batches: int = field(
        default=200, metadata={"help": "Largest number of batches, the same for every model"}
    )
    batch_size: int = field(
        default=32, metadata={"help": "Sequences per batch; g is the gradient of their mean loss"}
    )
    max_seq_length: int = field(default=64, metadata={"help": "Tokens; longer texts are cut"})
    seed: int = field(default=42, metadata={"help": "Seed for a missing classifier's weights"})

    @property
    def folders(self) -> dict[str, str]:
        pairs = [entry.partition("=") for entry in self.models.split(",")]
        if not all(label and folder for label, _, folder in pairs):
            raise ValueError(f"Invalid models: {self.models!r} (LABEL=DIR, separated by commas)")
        return {label: folder for label, _, folder in pairs}


def measure(folder: str, arguments: Arguments) -> Distribution:
    """The distribution of one model's sensitivities."""
    count = arguments.batches * arguments.batch_size
    corpus = prepare(
        ModelArguments(model_name_or_path=folder),
        DataArguments(
            arguments.task_name,
            arguments.data_dir,
            arguments.max_seq_length,
            max_train_samples=count,
            max_eval_samples=count,
        ),
    )
    set_seed(arguments.seed)
    loader = DataLoader(
        corpus.data[arguments.split],  # pyright: ignore[reportArgumentType]
        batch_size=arguments.batch_size,
        collate_fn=DataCollatorWithPadding(corpus.tokenizer),
    )
    return distribution(sensitivities(corpus.build(), loader))


def table(distributions: dict[str, Distribution], title: str) -> Table:
    grid = Table(title=title, title_style="bold", box=box.SIMPLE_HEAD)
    grid.add_column("model")
    for column in ("mean", "Gini", "half in", "zero", *(f"below {f:g} mean" for f in FRACTIONS[1:])):
        grid.add_column(column, justify="right")
    for label, d in distributions.items():
        of = d.overall
        shares = (of.half, of.zeros / of.numel, *of.share_below[1:])
        grid.add_row(label, f"{of.mean:.3g}", f"{of.gini:.4f}", *(f"{share:.2%}" for share in shares))
    return grid


def main(argv: Sequence[str] | None = None) -> dict[str, Distribution]:
    parser = HfArgumentParser(Arguments)  # pyright: ignore[reportArgumentType]
    (arguments,) = parser.parse_args_into_dataclasses(args=list(sys.argv[1:] if argv is None else argv))
    distributions = {label: measure(folder, arguments) for label, folder in arguments.folders.items()}
    Console().print(table(distributions, f"|w g|, {arguments.task_name}, {arguments.split}"))
    path = Path(arguments.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    plot(distributions, path)
    result: dict[str, Any] = {
        "arguments": asdict(arguments),
        "versions": versions(),
        "distributions": {label: d.to_dict() for label, d in distributions.items()},
    }
    path.with_suffix(".json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    return distributions


if __name__ == "__main__":
    main()
