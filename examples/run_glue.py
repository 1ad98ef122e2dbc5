"""Fine-tunes a model on a task of GLUE with and without PATS, in the Trainer of transformers.

python examples/run_glue.py                                               # offline: grammar, small BERT
python examples/run_glue.py --task_name rte --model_name_or_path bert-base-uncased
python examples/run_glue.py --task_name cola --data_dir glue_data --seeds 1,2,3 --method adamw,noise,pats
python examples/run_glue.py configuration.json                            # the same arguments from a file

Besides its own arguments, it takes all of `transformers.TrainingArguments`. glue_data.py loads the data,
glue_methods.py has the methods.
"""

import json
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from datasets import Dataset, DatasetDict
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import EvalPrediction, get_last_checkpoint

import glue_data
import glue_methods
from glue_data import Task
from glue_methods import NOT_GIVEN, MethodArguments

SAMPLING_SEED = 0  # for --max_..._samples: the same samples in every run
LAST = ("true", "True")  # for --resume_from_checkpoint: each run's last checkpoint
PACKAGES = ("pats_kernels", "torch", "transformers", "accelerate", "datasets")


@dataclass
class ModelArguments:
    """A pretrained model, or the sizes of a small BERT to build."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Model on the hub or in a folder; if not given, a small BERT is built"},
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Folder for the hub's files"})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model"})
    random_weights: bool = field(
        default=False,
        metadata={"help": "Use only the model's architecture and tokenizer, with random weights"},
    )
    vocab_size: int = field(default=8000, metadata={"help": "Small BERT: largest number of tokens"})
    hidden_size: int = field(default=64, metadata={"help": "Small BERT: width"})
    num_hidden_layers: int = field(default=2, metadata={"help": "Small BERT: layers"})
    num_attention_heads: int = field(default=4, metadata={"help": "Small BERT: heads"})
    dropout: float = field(
        default=0.0, metadata={"help": "Small BERT: dropout of hidden states and attention"}
    )


@dataclass
class DataArguments:
    """The task, the source of its data, and how much of it to use."""

    task_name: str | None = field(
        default=None,
        metadata={"help": f"{', '.join(glue_data.TASKS)}; if not given, sentences from a grammar"},
    )
    data_dir: str | None = field(
        default=None,
        metadata={"help": "Folder with the task's TSV files, or its parent; if not given, the hub"},
    )
    max_seq_length: int = field(default=128, metadata={"help": "Tokens; longer texts are cut"})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on a random part of this size"}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on a random part of this size"}
    )


@dataclass
class RunArguments(TrainingArguments):
    """transformers' TrainingArguments, with defaults for a small run, and several seeds."""

    output_dir: str | None = field(
        default="runs/glue",
        metadata={"help": "Folder for results.json and for each run's model and checkpoints"},
    )
    learning_rate: float = field(
        default=NOT_GIVEN,
        metadata={"help": "If not given: 2e-5 for pretrained models, 1e-3 from scratch"},
    )
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Sequences per device and step"})
    per_device_eval_batch_size: int = field(default=128, metadata={"help": "Sequences per device and step"})
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps; below 1, a share of all steps"})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps, epoch"})
    save_strategy: str = field(default="no", metadata={"help": "When to save a checkpoint: no, steps, epoch"})
    logging_steps: float = field(default=50, metadata={"help": "Steps; below 1, a share of all steps"})
    seed: int = field(default=int(NOT_GIVEN), metadata={"help": "For a single run; otherwise see seeds"})
    threads: int | None = field(
        default=None,
        metadata={"help": "CPU threads. If not given: 1 for the small BERT, else torch's default"},
    )
    seeds: str | None = field(
        default=None,
        metadata={
            "help": "Separated by commas. If not given: --seed, or else 42 for GLUE and 1,2 for the grammar"
        },
    )

    @property
    def all_seeds(self) -> list[int]:
        try:
            return [int(seed) for seed in str(self.seeds).split(",")]
        except ValueError:
            raise ValueError(f"Invalid seeds: {self.seeds!r} (integers, separated by commas)") from None

    def of_run(self, method: str, seed: int) -> "RunArguments":
        """These arguments for one run, with its own folder."""
        return replace(self, seed=seed, output_dir=str(Path(str(self.output_dir)) / f"{method}-{seed}"))


class Arguments(NamedTuple):
    model: ModelArguments
    data: DataArguments
    noise: MethodArguments
    training: RunArguments


class Corpus(NamedTuple):
    """What all runs share."""

    task: Task
    data: DatasetDict  # tokenized
    tokenizer: PreTrainedTokenizerBase
    build: Callable[[], PreTrainedModel]  # weights that are not pretrained are random and new each time

    @property
    def validation(self) -> list[str]:
        """The splits to evaluate on."""
        return [str(split) for split in self.data if split != "train"]


def parse(argv: Sequence[str]) -> Arguments:
    """Arguments from the command line, or from the one JSON file that it names."""
    parser = HfArgumentParser(Arguments.__annotations__.values())  # pyright: ignore[reportArgumentType]
    if len(argv) == 1 and argv[0].endswith(".json"):
        parsed = parser.parse_json_file(json_file=argv[0])
    else:
        parsed = parser.parse_args_into_dataclasses(args=list(argv))
    arguments = Arguments(*parsed)
    fill_in(arguments)
    several = len(arguments.training.all_seeds) * len(arguments.noise.methods) > 1
    if several and arguments.training.resume_from_checkpoint not in (None, *LAST):
        raise ValueError(
            "--resume_from_checkpoint PATH is for one run; for several, `true` finds the last of each"
        )
    return arguments


def fill_in(arguments: Arguments) -> None:
    """Sets the arguments whose defaults depend on the task and on whether the model is pretrained."""
    training = arguments.training
    pretrained = arguments.model.model_name_or_path is not None
    if training.learning_rate == NOT_GIVEN:
        training.learning_rate = 2e-5 if pretrained else 1e-3
    if arguments.noise.noise_scale == NOT_GIVEN:
        arguments.noise.noise_scale = 1e-5 if pretrained else 1e-3
    if training.seeds is None:
        without = 42 if arguments.data.task_name else "1,2"
        training.seeds = str(without if training.seed == NOT_GIVEN else training.seed)
    if training.threads is None and not pretrained:
        training.threads = 1  # so small a model gains nothing from a second thread


# Model and data


def prepare(model: ModelArguments, data: DataArguments) -> Corpus:
    """Loads the data and the tokenizer, tokenizes, and returns how to build the model."""
    task, texts = glue_data.load(data.task_name, data.data_dir, model.cache_dir)
    for split, rows in texts.items():
        count = data.max_train_samples if split == "train" else data.max_eval_samples
        if count is not None and count < len(rows):
            texts[split] = rows.shuffle(seed=SAMPLING_SEED).select(range(count))
    return tokenized(task, texts, model, data)


def tokenized(task: Task, texts: DatasetDict, model: ModelArguments, data: DataArguments) -> Corpus:
    """A corpus of these splits. Of `data` only `max_seq_length` is used."""
    if model.model_name_or_path is None:
        tokenizer = train_tokenizer(task, texts["train"], model.vocab_size)
        build = small_bert(model, data, task, tokenizer)
    else:
        options = {"cache_dir": model.cache_dir, "revision": model.model_revision}
        tokenizer = AutoTokenizer.from_pretrained(model.model_name_or_path, **options)
        build = pretrained(model.model_name_or_path, task, options, model.random_weights)

    def tokenize(rows: dict[str, list[Any]]) -> dict[str, Any]:
        texts, pairs = (*(rows[name] for name in task.texts), None)[:2]
        return dict(tokenizer(texts, pairs, truncation=True, max_length=data.max_seq_length))

    unused = set(texts["train"].column_names) - {"label"}
    return Corpus(task, texts.map(tokenize, batched=True, remove_columns=sorted(unused)), tokenizer, build)


def train_tokenizer(task: Task, rows: Dataset, vocab_size: int) -> PreTrainedTokenizerBase:
    """BERT's WordPiece, trained on these texts."""
    texts = [text for name in task.texts for text in rows[name]]
    untrained = BertTokenizer()
    # The trainer numbers the pieces in the order of a hash table, which differs in each run, and breaks ties
    # by these numbers. If the pieces are given in advance, numbers and vocabulary are always the same.
    normalize = untrained.backend_tokenizer.normalizer.normalize_str
    pieces = sorted({f"##{character}" for text in texts for character in normalize(text)})
    trained = untrained.train_new_from_iterator(
        texts, vocab_size, new_special_tokens=pieces, show_progress=False
    )
    return BertTokenizer(vocab=trained.get_vocab())


def number_of_outputs(task: Task) -> dict[str, Any]:
    """One output per label; for regression one output and the squared error."""
    problem = "single_label_classification" if task.labels else "regression"
    return {"num_labels": len(task.labels) or 1, "problem_type": problem}


class BertSizes(Protocol):
    """Arguments with the sizes of the BERT to build."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    dropout: float


def bert_config(
    sizes: BertSizes, tokenizer: PreTrainedTokenizerBase, max_seq_length: int, **more: Any
) -> BertConfig:
    return BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes.hidden_size,
        num_hidden_layers=sizes.num_hidden_layers,
        num_attention_heads=sizes.num_attention_heads,
        intermediate_size=4 * sizes.hidden_size,
        max_position_embeddings=max_seq_length,
        pad_token_id=tokenizer.get_vocab()[str(tokenizer.pad_token)],
        hidden_dropout_prob=sizes.dropout,
        attention_probs_dropout_prob=sizes.dropout,
        # BERT's 0.02 is for a width of 768. With it a narrow model hardly learns for hundreds of steps.
        initializer_range=sizes.hidden_size**-0.5,
        **more,
    )


def small_bert(
    model: ModelArguments, data: DataArguments, task: Task, tokenizer: PreTrainedTokenizerBase
) -> Callable[[], PreTrainedModel]:
    config = bert_config(model, tokenizer, data.max_seq_length, **number_of_outputs(task))
    return lambda: BertForSequenceClassification(config)


def pretrained(
    name: str, task: Task, options: dict[str, Any], random_weights: bool = False
) -> Callable[[], PreTrainedModel]:
    config = AutoConfig.from_pretrained(name, **options, **number_of_outputs(task))
    if random_weights:
        return lambda: AutoModelForSequenceClassification.from_config(config)
    return lambda: AutoModelForSequenceClassification.from_pretrained(name, config=config, **options)


# Runs


def trainer_of(
    method: str, noise: MethodArguments, training: TrainingArguments, corpus: Corpus, **more: Any
) -> Trainer:
    """The stock Trainer with a new model, for one method and seed. `more` goes to the Trainer."""
    set_seed(training.seed)
    model = corpus.build()
    glue_methods.prepare_(method, noise, training, model)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        return corpus.task.score(prediction.label_ids, prediction.predictions)  # pyright: ignore

    return Trainer(
        model,
        training,
        train_dataset=corpus.data["train"],
        eval_dataset=corpus.data[corpus.validation[0]],
        processing_class=corpus.tokenizer,
        compute_metrics=compute_metrics,
        optimizer_cls_and_kwargs=glue_methods.optimizer(method, noise, training, model),
        callbacks=glue_methods.callbacks(method, noise, training) + more.pop("callbacks", []),
        **more,
    )


def run(method: str, noise: MethodArguments, training: RunArguments, corpus: Corpus) -> dict[str, Any]:
    """One method with one seed: trains, evaluates, saves the model, and returns the results."""
    trainer = trainer_of(method, noise, training, corpus)
    trained = trainer.train(resume_from_checkpoint=checkpoint(training))
    evaluated = evaluate(trainer, corpus)
    trainer.save_model()
    return {
        "method": method,
        "seed": training.seed,
        "metrics": {
            split: {name: values[f"{split}_{name}"] for name in corpus.task.metrics}
            for split, values in evaluated.items()
        },
        "train": trained.metrics,
        "evaluation": evaluated,
        "parameters": sum(param.numel() for param in cast(nn.Module, trainer.model).parameters()),
        "log_history": trainer.state.log_history,
    }


def evaluate(trainer: Trainer, corpus: Corpus) -> dict[str, dict[str, float]]:
    """For each split: metrics, loss and time, with the split's name as a prefix."""
    return {
        split: trainer.evaluate(cast(Any, corpus.data[split]), metric_key_prefix=split)
        for split in corpus.validation
    }


def checkpoint(training: RunArguments) -> str | None:
    """The checkpoint to resume from: the given path, or for "true" this run's last one, if there is one."""
    given = training.resume_from_checkpoint
    if given not in LAST:
        return given
    folder = str(training.output_dir)
    return get_last_checkpoint(folder) if Path(folder).is_dir() else None


# Results


def summarize(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """For each method, split and metric: all seeds' values, their mean and sample standard deviation."""
    summary: dict[str, Any] = {}
    for method in dict.fromkeys(run["method"] for run in runs):
        of_method = [run["metrics"] for run in runs if run["method"] == method]
        summary[method] = {
            split: {metric: _spread([metrics[split][metric] for metrics in of_method]) for metric in first}
            for split, first in of_method[0].items()
        }
    return summary


def _spread(values: list[float]) -> dict[str, Any]:
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": std, "values": values}


def results(arguments: Arguments, corpus: Corpus, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "task": arguments.data.task_name or glue_data.GRAMMAR,
        "arguments": {
            "model": asdict(arguments.model),
            "data": asdict(arguments.data),
            "method": asdict(arguments.noise),
            "training": arguments.training.to_sanitized_dict(),
        },
        "versions": {"python": platform.python_version()} | versions(),
        "samples": {split: len(rows) for split, rows in corpus.data.items()},
        "parameters": runs[0]["parameters"],
        "summary": summarize(runs),
        "runs": list(runs),
    }


def versions() -> dict[str, str]:
    """The versions that results depend on. `torch.__version__` names the CUDA; its package's may not."""
    return {name: version(name) for name in PACKAGES} | {"torch": str(torch.__version__)}


def table(result: dict[str, Any]) -> Table:
    """A row per method: each metric's mean and spread over the seeds, and the mean time of a run."""
    samples = ", ".join(f"{split} {count}" for split, count in result["samples"].items())
    seeds = list(dict.fromkeys(run["seed"] for run in result["runs"]))
    title = f"{result['task']} ({samples}), {result['parameters'] / 1e6:.1f} M parameters, seeds {seeds}"
    grid = Table(title=title, title_style="bold", box=box.SIMPLE_HEAD)
    first = next(iter(result["summary"].values()))
    columns = [(split, metric) for split, metrics in first.items() for metric in metrics]
    grid.add_column("method")
    for split, metric in columns:
        name = metric if len(first) == 1 else f"{metric}, {split.removeprefix('validation_')}"
        grid.add_column(name, justify="right")
    grid.add_column("train s", justify="right")
    for method, metrics in result["summary"].items():
        cells = [_cell(metrics[split][metric]) for split, metric in columns]
        seconds = [run["train"]["train_runtime"] for run in result["runs"] if run["method"] == method]
        grid.add_row(method, *cells, f"{statistics.fmean(seconds):.1f}")
    return grid


def _cell(spread: dict[str, Any]) -> str:
    mean = f"{spread['mean']:.4f}"
    return mean if spread["std"] is None else f"{mean} ± {spread['std']:.4f}"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    try:
        arguments = parse(sys.argv[1:] if argv is None else argv)
        corpus = prepare(arguments.model, arguments.data)
    except (ValueError, OSError) as error:  # wrong arguments; later errors keep their traceback
        raise SystemExit(f"run_glue.py: {error}") from error
    if arguments.training.threads is not None:
        torch.set_num_threads(arguments.training.threads)
    runs: list[dict[str, Any]] = []
    result: dict[str, Any] = {}
    file = Path(str(arguments.training.output_dir)) / "results.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    for seed in arguments.training.all_seeds:
        for method in arguments.noise.methods:
            runs.append(run(method, arguments.noise, arguments.training.of_run(method, seed), corpus))
            # Written after each run, so that an interrupted command keeps its results.
            result = results(arguments, corpus, runs)
            file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    console = Console()
    console.print(table(result))
    console.print(f"All results: {file}")
    return result


if __name__ == "__main__":
    main()
