"""Measures how well sensitivity="moments" agrees with sensitivity="ema" in fine-tuning, by kind of layer.

python examples/moments_fidelity.py --model_name_or_path runs/pretrained --task_name sst2 --data_dir DIR \\
    --out fidelity.json --plot fidelity.png

The run uses PATSAdamW with moving averages. From the same gradients it also keeps averages with a longer
memory, and at some steps it computes the sensitivity from the moments. Two yardsticks: how well the averages
with longer memory agree, and how well the same averages agree in a run with another order of the data.
"""

import json
import platform
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler
from transformers import DataCollatorWithPadding, HfArgumentParser, set_seed

from pats_kernels import PATSAdamW
from pats_kernels.reference import gate, moments_sensitivity, score, update_averages_
from run_glue import Corpus, DataArguments, ModelArguments, prepare, versions

RANKED = 20_000  # most elements per tensor to rank, a random sample; all would give the same result
KINDS = {  # patterns for parameters' names; the first match counts
    "biases": r"bias$",
    "LayerNorm": r"LayerNorm",
    "word embeddings": r"word_embeddings",
    "other embeddings": r"embeddings",
    "attention query, key": r"attention\.self\.(query|key)",
    "attention value, output": r"attention",
    "feed-forward": r"(intermediate|output)\.dense",
    "pooler, classifier": r"",
}
COMPARISONS = {  # the two forms to compare, and the colour of the curve
    "moments": ("moments", "ema", "#0072B2"),
    "moments, to averages of their memory": ("moments", "long", "#56B4E9"),
    "averages of longer memory": ("long", "ema", "#E69F00"),
    "averages, other order of the data": ("other", "ema", "#999999"),
}
INK, QUIET = "#333333", "#999999"


@dataclass
class Arguments:
    """The model, the task, and the run."""

    model_name_or_path: str = field(metadata={"help": "A model to fine-tune"})
    task_name: str = field(metadata={"help": "As in run_glue.py"})
    out: str = field(metadata={"help": "JSON file for all results"})
    data_dir: str | None = field(default=None, metadata={"help": "As in run_glue.py"})
    plot: str | None = field(default=None, metadata={"help": "File for the picture"})
    max_seq_length: int = field(default=64, metadata={"help": "Tokens in a sequence"})
    batch_size: int = field(default=32, metadata={"help": "Sequences per batch"})
    steps: int = field(default=600, metadata={"help": "Steps of the run"})
    at: str = field(
        default="1,2,5,10,20,50,100,200,400,600",
        metadata={"help": "Steps to compare at, separated by commas"},
    )
    learning_rate: float = field(default=5e-4, metadata={"help": "Constant during the run"})
    adam_beta2: float = field(default=0.999, metadata={"help": "Decay rate of the second moment"})
    noise_scale: float = field(default=1e-5, metadata={"help": "noise_scale of PATSAdamW"})
    gamma: float = field(default=1.0, metadata={"help": "gamma of PATSAdamW"})
    uncertainty: str = field(default="product", metadata={"help": "uncertainty of PATSAdamW"})
    seeds: str = field(default="1,2", metadata={"help": "Seeds of the order of the data; two or more"})

    @property
    def betas(self) -> tuple[float, float]:
        return 0.9, self.adam_beta2

    @property
    def long(self) -> tuple[float, float]:
        """sens_betas with the memory of AdamW's second moment."""
        return self.adam_beta2, self.adam_beta2


class Sensitivity(NamedTuple):
    """One tensor's S and U in any form, flat: [numel]."""

    S: Tensor
    U: Tensor

    def score(self, uncertainty: str) -> Tensor:
        return score(self.S, self.U, self.S.mean(), self.U.mean(), uncertainty)

    def gate(self, gamma: float, uncertainty: str) -> Tensor:
        return gate(self.S, self.U, self.S.mean(), self.U.mean(), gamma=gamma, uncertainty=uncertainty)


Snapshot = dict[str, dict[str, Sensitivity]]  # by form ("ema", "long", "moments"), then by parameter


def snapshots(seed: int, corpus: Corpus, arguments: Arguments) -> Iterator[tuple[int, Snapshot]]:
    """Trains; at each of the steps `arguments.at`, yields the step and every form's sensitivities."""
    set_seed(0)  # the classifier's weights are the same for all seeds
    model = corpus.build()
    named = dict(model.named_parameters())
    optimizer = PATSAdamW(
        named.items(),
        lr=arguments.learning_rate,
        betas=arguments.betas,
        noise_scale=arguments.noise_scale,
        gamma=arguments.gamma,
        uncertainty=arguments.uncertainty,  # pyright: ignore[reportArgumentType]
    )
    long = {name: Sensitivity(torch.zeros_like(p), torch.zeros_like(p)) for name, p in named.items()}
    before: dict[str, Tensor] = {}
    data: Any = corpus.data["train"]
    order = torch.Generator().manual_seed(seed)
    sampler = RandomSampler(data, True, arguments.steps * arguments.batch_size, generator=order)
    collate = DataCollatorWithPadding(corpus.tokenizer)
    loader = DataLoader(data, arguments.batch_size, sampler=sampler, collate_fn=collate)
    wanted = {int(text) for text in arguments.at.split(",")}
    for step, batch in enumerate(loader, start=1):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        grads = {name: param.grad for name, param in named.items() if param.grad is not None}
        with torch.no_grad():
            for name, grad in grads.items():
                update_averages_(named[name], grad, *long[name], arguments.long, None)
            if step in wanted:
                before = {name: named[name].clone() for name in grads}
        optimizer.step()
        if step in wanted:
            taken: Snapshot = {"ema": {}, "long": {}, "moments": {}}
            for name in grads:
                state = optimizer.state[named[name]]
                taken["ema"][name] = Sensitivity(*(state[key].flatten().clone() for key in _AVERAGES))
                taken["long"][name] = Sensitivity(*(average.flatten().clone() for average in long[name]))
                taken["moments"][name] = of_moments(before[name], state, arguments)
            yield step, taken


_AVERAGES = ("exp_avg_sens", "exp_avg_unc")


def of_moments(w: Tensor, state: dict[str, Tensor], arguments: Arguments) -> Sensitivity:
    """S and U of sensitivity="moments", from the weights before the step and the moments after it."""
    corrections = [1 - beta ** float(state["step"]) for beta in arguments.betas]
    m, v = (state[key] / c for key, c in zip(("exp_avg", "exp_avg_sq"), corrections, strict=True))
    S, U, _ = moments_sensitivity(w, m, v, arguments.uncertainty)
    return Sensitivity(S.flatten(), U.flatten())


def agreement(a: Sensitivity, b: Sensitivity, gamma: float, uncertainty: str) -> dict[str, float]:
    """Compares two sensitivities of one tensor, over the elements that have had a gradient in both.

    Returns:
        numel: the number of these elements.
        rank: Spearman's correlation of the scores q; NaN if one of them is constant.
        overlap: among the elements with noise in either form, the share with noise in both (Jaccard).
        by_chance: the overlap that two independent sets of these sizes would have.
        kappa: Cohen's kappa: the agreement beyond chance, at most 1; NaN if all or no elements have noise.
        gate_a, gate_b: the mean gates.
        gate_difference: the mean absolute difference of the gates.
    """
    live = (a.S > 0) & (b.S > 0)
    q_a, q_b = a.score(uncertainty)[live], b.score(uncertainty)[live]
    g_a, g_b = a.gate(gamma, uncertainty)[live], b.gate(gamma, uncertainty)[live]
    count = len(q_a)
    if count < 2:
        return {"numel": count}
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:RANKED]
    ranked = [q[chosen].numpy() for q in (q_a, q_b)]
    constant = any(np.ptp(q) == 0 for q in ranked)
    rank = float("nan") if constant else float(spearmanr(*ranked).statistic)  # pyright: ignore
    noisy_a, noisy_b = g_a > 0, g_b > 0
    p_a, p_b = (float(noisy.double().mean()) for noisy in (noisy_a, noisy_b))
    both, same = float((noisy_a & noisy_b).double().mean()), float((noisy_a == noisy_b).double().mean())
    expected = p_a * p_b + (1 - p_a) * (1 - p_b)
    either, either_by_chance = p_a + p_b - both, p_a + p_b - p_a * p_b
    return {
        "numel": count,
        "rank": rank,
        "overlap": both / either if either else float("nan"),
        "by_chance": p_a * p_b / either_by_chance if either_by_chance else float("nan"),
        "kappa": (same - expected) / (1 - expected) if expected < 1 else float("nan"),
        "gate_a": float(g_a.double().mean()),
        "gate_b": float(g_b.double().mean()),
        "gate_difference": float((g_a - g_b).double().abs().mean()),
    }


def kind_of(name: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, name))


def by_kind(agreements: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Means over the tensors of each kind, and over all, weighted by the number of compared elements."""
    groups: dict[str, list[dict[str, float]]] = {"all": list(agreements.values())}
    for name, found in agreements.items():
        groups.setdefault(kind_of(name), []).append(found)
    return {kind: _mean(groups[kind]) for kind in ("all", *KINDS) if kind in groups}


def _mean(found: list[dict[str, float]]) -> dict[str, float]:
    mean: dict[str, float] = {"numel": sum(entry["numel"] for entry in found)}
    for key in dict.fromkeys(key for entry in found for key in entry if key != "numel"):
        known = [(entry[key], entry["numel"]) for entry in found if not np.isnan(entry.get(key, np.nan))]
        if known:
            values, weights = zip(*known, strict=True)
            mean[key] = round(float(np.average(values, weights=weights)), 4)
    return mean


def study(arguments: Arguments) -> list[dict[str, Any]]:
    """An entry for each seed, step and comparison, with its agreement by kind of layer."""
    data = DataArguments(arguments.task_name, arguments.data_dir, arguments.max_seq_length)
    corpus = prepare(ModelArguments(model_name_or_path=arguments.model_name_or_path), data)
    seeds = [int(text) for text in arguments.seeds.split(",")]
    if len(seeds) < 2:
        raise ValueError(f"Invalid seeds: {arguments.seeds!r} (two or more, to compare runs)")
    others: dict[
        int, dict[str, Sensitivity]
    ] = {}  # of the seed before (for the first seed: the last), by step
    entries: list[dict[str, Any]] = []
    for seed in (seeds[-1], *seeds):
        first = not others
        for step, taken in snapshots(seed, corpus, arguments):
            if not first:
                forms: Snapshot = taken | {"other": others[step]}
                for comparison, (a, b, _) in COMPARISONS.items():
                    found = {
                        name: agreement(
                            forms[a][name], forms[b][name], arguments.gamma, arguments.uncertainty
                        )
                        for name in forms[b]
                    }
                    entries.append(
                        {"seed": seed, "step": step, "comparison": comparison, "kinds": by_kind(found)}
                    )
                print(seed, step, entries[-len(COMPARISONS)]["kinds"]["all"], flush=True)
            others[step] = taken["ema"]
    return entries


def means(entries: Sequence[dict[str, Any]], comparison: str, kind: str, key: str) -> dict[int, float]:
    """One figure's mean over the seeds, by step."""
    found: dict[int, list[float]] = {}
    for entry in entries:
        value = entry["kinds"].get(kind, {}).get(key)
        if entry["comparison"] == comparison and value is not None:
            found.setdefault(entry["step"], []).append(value)
    return {step: fmean(values) for step, values in sorted(found.items())}


def table(entries: Sequence[dict[str, Any]]) -> Table:
    """The last step's figures, by kind of layer and comparison."""
    last = max(entry["step"] for entry in entries)
    columns = ("rank", "overlap", "by_chance", "kappa", "gate_a", "gate_b", "gate_difference")
    grid = Table(title=f"after {last} steps", title_style="bold", box=box.SIMPLE_HEAD)
    for column in ("layers", "comparison"):
        grid.add_column(column)
    for column in columns:
        grid.add_column(column.replace("_", " "), justify="right")
    for kind in entries[0]["kinds"]:
        for comparison in COMPARISONS:
            values = [means(entries, comparison, kind, column).get(last) for column in columns]
            cells = ["" if value is None else f"{value:.3f}" for value in values]
            grid.add_row(kind if comparison == next(iter(COMPARISONS)) else "", comparison, *cells)
    return grid


SHOWN = {"rank": "rank correlation of q", "kappa": "noisy sets: Cohen's kappa"}


def plot(entries: Sequence[dict[str, Any]], path: str) -> None:
    """Two panels for each kind of layer, one above the other; five kinds in a row."""
    from matplotlib.figure import Figure

    kinds, columns = list(entries[0]["kinds"]), 5
    rows = -(-len(kinds) // columns)
    figure = Figure(figsize=(2.1 * columns, 4.1 * rows), layout="constrained")
    grid = figure.subplots(2 * rows, columns, sharex=True, sharey=True, squeeze=False)
    for i in range(rows * columns):
        for row, (key, title) in enumerate(SHOWN.items(), start=2 * (i // columns)):
            axes = grid[row][i % columns]
            if i >= len(kinds):
                axes.set_axis_off()
                continue
            for comparison, (_, _, colour) in COMPARISONS.items():
                line = means(entries, comparison, kinds[i], key)
                width = 2.2 if comparison == "moments" else 1.2
                axes.plot(list(line), list(line.values()), color=colour, linewidth=width, label=comparison)
            axes.set_xscale("log")
            axes.set_ylim(-0.05, 1.02)
            axes.axhline(0, color=QUIET, linewidth=0.6)
            axes.grid(axis="y", color=QUIET, alpha=0.25, linewidth=0.5)
            axes.spines[["top", "right"]].set_visible(False)
            axes.spines[["left", "bottom"]].set_color(QUIET)
            axes.tick_params(colors=INK, labelsize=8)
            if row % 2 == 0:
                axes.set_title(kinds[i], loc="left", fontsize=9, color=INK)
            if i % columns == 0:
                axes.set_ylabel(title, fontsize=8, color=INK)
            if row == 2 * rows - 1:
                axes.set_xlabel("step", fontsize=9, color=INK)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = HfArgumentParser(Arguments)  # pyright: ignore[reportArgumentType]
    (arguments,) = parser.parse_args_into_dataclasses(args=list(sys.argv[1:] if argv is None else argv))
    entries = study(arguments)
    record = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()} | versions(),
        "arguments": asdict(arguments),
        "entries": entries,
    }
    Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
    Path(arguments.out).write_text(json.dumps(record) + "\n", encoding="utf-8")
    Console(width=None if sys.stdout.isatty() else 160).print(table(entries))
    if arguments.plot:
        plot(entries, arguments.plot)
    return entries


if __name__ == "__main__":
    main()
