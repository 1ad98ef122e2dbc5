"""Makes one run: a configuration in, a line out."""

import hashlib
import math
import platform
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from datasets import DatasetDict, disable_progress_bars
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging

import glue_data
from glue_data import Task
from pats_kernels.analysis import Summary, distribution, sensitivities
from replication.grid import Configuration, Setting, identity, method_arguments, setting_of
from replication.lines import Line
from run_glue import Corpus, DataArguments, ModelArguments, evaluate, tokenized, trainer_of, versions

HALVES_SEED = 0  # of the split of the development data: the same in all runs
SAMPLING_SEED = 0  # of the part of the training set
SENSITIVITY = (32, 32)  # batches and sentences of the training set that sensitivities are measured on
LOGS = 10  # a run; noise is measured as often
GATES = ("mean_gate", "noisy_share", "noise_rms", "noise_to_weight")


class Places(NamedTuple):
    """Where things are on this machine. No part of a configuration."""

    models: str
    data: str


def splits(name: str, folder: str, train_samples: int | None) -> tuple[Task, DatasetDict]:
    """The training set, what hyperparameters are selected on ("select") and what is reported on ("report").

    The development data are cut into random halves for the two; where the task has a labelled test set, that
    is reported on and all development data select.
    """
    task, data = glue_data.load(name, folder)
    train = data["train"]
    if train_samples is not None and train_samples < len(train):
        train = train.shuffle(seed=SAMPLING_SEED).select(range(train_samples))
    development = data[next(iter(task.validation))].shuffle(seed=HALVES_SEED)
    test = glue_data.labelled_test(task, Path(folder))
    half = len(development) // 2
    select = development if test is not None else development.select(range(half))
    report = test if test is not None else development.select(range(half, len(development)))
    return task, DatasetDict({"train": train, "select": select, "report": report})


@lru_cache(maxsize=2)
def corpus_of(setting: Setting, places: Places) -> Corpus:
    task, data = splits(setting.task, places.data, setting.train_samples)
    model = ModelArguments(
        model_name_or_path=str(Path(places.models) / setting.model), random_weights=setting.random_weights
    )
    return tokenized(task, data, model, DataArguments(max_seq_length=setting.max_seq_length))


class SameOrder(TrainerCallback):
    """Sets torch's generator as each epoch begins, before its order is drawn.

    Methods that draw from it, as NEFTune does, would otherwise see other orders from the second epoch on.
    """

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        torch.manual_seed((args.seed << 16) + round(state.epoch or 0))


class Recording(DataCollatorWithPadding):
    """The Trainer's own collator, which also keeps a digest of the batches in their order."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer)
        self.digest = hashlib.sha256()

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().__call__(features)
        self.digest.update(np.ascontiguousarray(cast(Tensor, batch["input_ids"]).numpy()).tobytes())
        return batch


def finetune(run: Configuration, places: Places, threads: int | None = None) -> Line:
    """Trains, evaluates both halves, measures sensitivities, and returns the line.

    Args:
        run: a configuration.
        places: where models and data are.
        threads: of torch; None: as they are.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    quiet()
    started, cpu = time.perf_counter(), time.process_time()
    corpus = corpus_of(setting_of(run), places)
    collator = Recording(corpus.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        training = training_arguments(run, folder)
        trainer = trainer_of(
            run["method"],
            method_arguments(run),
            training,
            corpus,
            data_collator=collator,
            callbacks=[SameOrder()],
        )
        trainer.remove_callback(PrinterCallback)
        prepared = time.perf_counter()
        trained = trainer.train()
        order = collator.digest.hexdigest()[:12]
        trained_at = time.perf_counter()
        evaluated = evaluate(trainer, corpus)
    evaluated_at = time.perf_counter()
    losses = {split: evaluated[split][f"{split}_loss"] for split in corpus.validation}
    model = cast(nn.Module, trainer.model)
    measured = concentration(model, corpus, collator)
    return {
        "id": identity(run),
        "run": run,
        "metrics": {
            split: {name: evaluated[split][f"{split}_{name}"] for name in corpus.task.metrics}
            for split in corpus.validation
        },
        "bigger_class": bigger_class(corpus),
        "loss": {name: _finite(value) for name, value in losses.items()},
        "train_loss": _finite(trained.training_loss),
        "steps": trained.global_step,
        "order": order,
        "noise": noise(trainer),
        "sensitivity": measured,
        "seconds": {
            "train": round(trained_at - prepared, 2),
            "evaluate": round(evaluated_at - trained_at, 2),
            "all": round(time.perf_counter() - started, 2),
            "cpu": round(time.process_time() - cpu, 2),
        },
        "parameters": sum(param.numel() for param in model.parameters()),
        "machine": {
            "device": str(training.device),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            **versions(),
        },
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def quiet() -> None:
    """No progress bars, and no report of a new classifier's weights in each run."""
    disable_progress_bars()
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def training_arguments(run: Configuration, folder: str) -> TrainingArguments:
    return TrainingArguments(
        folder,
        seed=run["seed"],
        learning_rate=run["learning_rate"],
        num_train_epochs=run["epochs"],
        per_device_train_batch_size=run["batch_size"],
        per_device_eval_batch_size=64,
        weight_decay=run["weight_decay"],
        warmup_steps=0.1,  # below 1: a share of all steps
        lr_scheduler_type="linear",
        train_sampling_strategy="group_by_length",
        logging_steps=1 / LOGS,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def bigger_class(corpus: Corpus) -> dict[str, float]:
    """What always saying the training set's commonest label gets; of regression, its mean."""
    labels = np.array(corpus.data["train"]["label"])
    answers = np.array(corpus.data["report"]["label"])
    if not corpus.task.labels:
        return corpus.task.score(answers, np.full((len(answers), 1), labels.mean()))
    outputs = np.tile(np.bincount(labels, minlength=len(corpus.task.labels)), (len(answers), 1))
    return corpus.task.score(answers, outputs)


def noise(trainer: Trainer) -> dict[str, float]:
    """The means over the logs of what PATSCallback reports; empty where there is no PATS."""
    found: dict[str, float] = {}
    for name in GATES:
        values = [entry[f"pats/{name}"] for entry in trainer.state.log_history if f"pats/{name}" in entry]
        if values and np.isfinite(values).all():
            found[name] = float(f"{np.mean(values):.6g}")
    return found


def concentration(model: nn.Module, corpus: Corpus, collator: DataCollatorWithPadding) -> Line | None:
    """How |w g| is distributed over the model's parameters, and over those that are no word embeddings.

    Words that the sentences lack have sensitivity 0, so embeddings say more of the text than of the model.
    None where the run diverged.
    """
    batches, size = SENSITIVITY
    rows = corpus.data["train"].select(range(min(batches * size, len(corpus.data["train"]))))
    loader = DataLoader(cast(Any, rows), batch_size=size, collate_fn=collator)
    device = next(model.parameters()).device
    found = sensitivities(model, _moved(loader, device))
    if not all(torch.isfinite(tensor).all() for tensor in found.values()):
        return None
    inner = {name: tensor for name, tensor in found.items() if "word_embeddings" not in name}
    return {
        "all": _numbers(distribution(found).overall),
        "inner": _numbers(distribution(inner).overall),
    }


def _moved(loader: DataLoader[Any], device: torch.device) -> Iterator[dict[str, Tensor]]:
    for batch in loader:
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def _numbers(summary: Summary) -> dict[str, float]:
    numbers = {
        "gini": summary.gini,
        "half": summary.half,
        "top_1": summary.top_share[0],
        "top_10": summary.top_share[1],
        "zeros": summary.zeros / max(summary.numel, 1),
        "mean": summary.mean,
    }
    return {name: float(f"{value:.6g}") for name, value in numbers.items()}


def _finite(value: float) -> float | None:
    """JSON has no NaN: null says that the run diverged."""
    return round(value, 6) if math.isfinite(value) else None
