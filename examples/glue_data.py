"""The tasks of GLUE: from the hub, from local TSV files, or, in miniature, from a grammar.

For every source, `load` returns the same: a `datasets.DatasetDict` with the hub's column names (the task's
texts and `label`) and its splits, `train` and one or two `validation...`.
"""

import csv
import gzip
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, load_dataset
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

import grammar

HUB = "nyu-mll/glue"
GRAMMAR = "grammar"  # the name of the corpus generated here
GRAMMAR_SEED = 0  # fixed, so that runs with any seed are evaluated on the same sentences
GRAMMAR_SENTENCES = (12000, 1000)  # for training, for evaluation

logger = logging.getLogger(__name__)


# Metrics, by their names in results: functions of labels and predictions


def _pearson(labels: np.ndarray, predictions: np.ndarray) -> float:
    return _correlation(pearsonr, labels, predictions)


def _spearman(labels: np.ndarray, predictions: np.ndarray) -> float:
    return _correlation(spearmanr, labels, predictions)


def _correlation(of: Callable[..., Any], labels: np.ndarray, predictions: np.ndarray) -> float:
    if not np.isfinite(predictions).all() or np.ptp(predictions) == 0:
        return 0.0  # undefined; the model has diverged, or learned nothing
    return float(of(labels, predictions).statistic)


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy_score,
    "f1": f1_score,
    "matthews": matthews_corrcoef,
    "pearson": _pearson,
    "spearman": _spearman,
}


@dataclass(frozen=True)
class Task:
    """A task and the format of its files."""

    texts: tuple[str, ...]  # one or two columns, by their names on the hub
    metrics: tuple[str, ...]  # the first is the main one
    labels: tuple[str, ...] = ("0", "1")  # as in the files, in the hub's order; none: regression
    folder: str = ""  # in GLUE's archive
    columns: dict[str, str] = field(default_factory=dict)  # the file's name for a column, where it differs
    header: tuple[str, ...] | None = None  # the columns of files without a header
    validation: dict[str, str] = field(default_factory=lambda: {"validation": "dev"})  # split: file
    labelled_test: str = ""  # the original benchmark's file with the test labels, which GLUE's test.tsv lacks
    test_header: tuple[str, ...] | None = None  # the columns of that file, which has no header

    @property
    def files(self) -> dict[str, str]:
        return {"train": "train", **self.validation}

    def score(self, labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
        """All metrics of the task, computed from the model's raw outputs."""
        answers = predictions.argmax(axis=-1) if self.labels else predictions.reshape(-1)
        return {name: float(METRICS[name](labels, answers)) for name in self.metrics}


ENTAILMENT = ("entailment", "not_entailment")
PAIR = ("sentence1", "sentence2")
TASKS: dict[str, Task] = {
    "cola": Task(
        ("sentence",), ("matthews", "accuracy"), folder="CoLA", header=("source", "label", "mark", "sentence")
    ),
    "sst2": Task(("sentence",), ("accuracy",), folder="SST-2"),
    "mrpc": Task(
        PAIR,
        ("f1", "accuracy"),
        folder="MRPC",
        columns={"sentence1": "#1 String", "sentence2": "#2 String", "label": "Quality"},
        labelled_test="msr_paraphrase_test.txt",
    ),
    "stsb": Task(
        PAIR,
        ("pearson", "spearman"),
        (),
        folder="STS-B",
        columns={"label": "score"},
        labelled_test="sts-test.csv",
        test_header=("genre", "filename", "year", "id", "score", "sentence1", "sentence2"),
    ),
    "qqp": Task(
        ("question1", "question2"), ("f1", "accuracy"), folder="QQP", columns={"label": "is_duplicate"}
    ),
    "mnli": Task(
        ("premise", "hypothesis"),
        ("accuracy",),
        ("entailment", "neutral", "contradiction"),
        folder="MNLI",
        columns={"premise": "sentence1", "hypothesis": "sentence2", "label": "gold_label"},
        validation={"validation_matched": "dev_matched", "validation_mismatched": "dev_mismatched"},
    ),
    "qnli": Task(("question", "sentence"), ("accuracy",), ENTAILMENT, folder="QNLI"),
    "rte": Task(PAIR, ("accuracy",), ENTAILMENT, folder="RTE"),
    "wnli": Task(PAIR, ("accuracy",), folder="WNLI"),
}
GRAMMAR_TASK = Task(("sentence",), ("matthews", "accuracy"))


def load(name: str | None, folder: str | None, cache_dir: str | None = None) -> tuple[Task, DatasetDict]:
    """The task and its data, from `folder` if given, else from the hub. Without a name, the grammar's task.

    Raises:
        ValueError: an unknown task, a folder without a task name, or a file that does not fit the task.
        FileNotFoundError: the task's files are not in the folder; the message says where it looked.
        ConnectionError: the hub cannot be reached.
    """
    if name is None or name == GRAMMAR:
        if folder is not None:
            raise ValueError(f"--data_dir {folder} needs a --task_name: one of {', '.join(TASKS)}")
        return GRAMMAR_TASK, generated()
    if name not in TASKS:
        raise ValueError(f"Unknown task: {name!r} (known: {', '.join(TASKS)})")
    task = TASKS[name]
    return task, from_hub(name, task, cache_dir) if folder is None else from_folder(name, task, Path(folder))


def generated(seed: int = GRAMMAR_SEED, counts: tuple[int, int] = GRAMMAR_SENTENCES) -> DatasetDict:
    """The grammar's sentences, with label 1 for acceptable, 0 for unacceptable."""
    return DatasetDict(
        {
            split: Dataset.from_dict(dict(zip(("sentence", "label"), zip(*rows, strict=True), strict=True)))
            for split, rows in zip(("train", "validation"), grammar.sentences(seed, counts), strict=True)
        }
    )


def from_hub(name: str, task: Task, cache_dir: str | None = None) -> DatasetDict:
    """The task from the Hugging Face hub, or from its cache."""
    try:
        data = load_dataset(HUB, name, cache_dir=cache_dir)
    except OSError as error:
        raise ConnectionError(
            f"{HUB}, {name}, could not be loaded from the hub: {error}. --data_dir reads local files."
        ) from error
    return DatasetDict({split: data[split] for split in task.files})


def from_folder(name: str, task: Task, folder: Path) -> DatasetDict:
    """The task's TSV files (plain or .gz) in `folder`, or in the subfolder with GLUE's name for the task."""
    places = [folder / task.folder, folder]
    for place in places:
        paths = {split: _file(place, stem) for split, stem in task.files.items()}
        found = {split: path for split, path in paths.items() if path is not None}
        if len(found) == len(paths):
            return DatasetDict({split: _dataset(path, task) for split, path in found.items()})
    files = ", ".join(f"{stem}.tsv[.gz]" for stem in task.files.values())
    where = " nor ".join(str(place) for place in places)
    raise FileNotFoundError(f"{name}: not all of {files} found in {where}")


def labelled_test(task: Task, folder: Path) -> Dataset | None:
    """The test set with labels, if the original benchmark published them and `folder` has its file.

    GLUE's test.tsv has no labels. The original files of MRPC and STS-B (plain or .gz) have them.
    """
    if not task.labelled_test:
        return None
    names = (task.labelled_test, f"{task.labelled_test}.gz")
    places = (place / name for place in (folder / task.folder, folder) for name in names)
    path = next((place for place in places if place.is_file()), None)
    return None if path is None else _dataset(path, replace(task, header=task.test_header))


def _file(folder: Path, stem: str) -> Path | None:
    paths = (folder / f"{stem}{ending}" for ending in (".tsv", ".tsv.gz"))
    return next((path for path in paths if path.is_file()), None)


def _dataset(path: Path, task: Task) -> Dataset:
    """A file's rows with the hub's column names. Rows with missing fields (QQP has some) are left out."""
    names = {column: task.columns.get(column, column) for column in (*task.texts, "label")}
    columns: dict[str, list[Any]] = {column: [] for column in names}
    dropped = 0
    for line, row in _rows(path, task):
        values: dict[str, Any] = {column: row.get(name) for column, name in names.items()}
        if not all(values.values()):
            dropped += 1
            continue
        values["label"] = _label(values["label"], task, f"{path}:{line}")
        for column, value in values.items():
            columns[column].append(value)
    if not columns["label"]:
        raise ValueError(f"{path}: no rows")
    if dropped:
        logger.warning("%s: %d rows with fields missing were left out", path, dropped)
    return Dataset.from_dict(columns)


def _rows(path: Path, task: Task) -> Iterator[tuple[int, dict[str, str | None]]]:
    """Line numbers and rows. Quotes are ordinary characters in GLUE's files; some begin with a BOM."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, fieldnames=task.header, delimiter="\t", quoting=csv.QUOTE_NONE)
        header = reader.fieldnames or ()
        for column in (*task.texts, "label"):
            if (name := task.columns.get(column, column)) not in header:
                raise ValueError(f"{path}: no column {name!r} (it has {', '.join(map(repr, header))})")
        for row in reader:
            yield reader.line_num, row


def _label(value: str, task: Task, place: str) -> int | float:
    try:
        return task.labels.index(value) if task.labels else float(value)
    except ValueError:
        expected = f"one of {', '.join(task.labels)}" if task.labels else "a number"
        raise ValueError(f"{place}: label {value!r} is not {expected}") from None
