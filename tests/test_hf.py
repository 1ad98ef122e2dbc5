"""A stock Hugging Face Trainer with PATS: resumes to the bit, accumulates gradients, logs PATS's figures."""

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from harness import assert_same_bits
from oracle import Hyper
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    get_linear_schedule_with_warmup,
)

from pats_kernels import PATS, PATSAdamW, hf
from pats_kernels.hf import PATSCallback

SETTINGS: dict[str, Any] = {"noise_scale": 1e-2, "gamma": 0.5, "seed": 5}
STEPS, BATCH = 6, 4
LEARNING_RATE = 1e-3
CLIP = 0.05  # the gradients' norm is above it
NAMES = ("mean_gate", "noisy_share", "noise_scale", "noise_rms", "noise_to_weight", "nonfinite")
KEYS = {f"pats/{name}" for name in NAMES}


def examples() -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(0)
    return [
        {"input_ids": torch.randint(0, 90, (12,), generator=random), "labels": torch.tensor(i % 2)}
        for i in range(6 * BATCH)
    ]


def model(seed: int = 1, dropout: float = 0.1) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 12}
    rates = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), dropout)
    return BertForSequenceClassification(
        BertConfig(**sizes, **rates, num_hidden_layers=2, num_attention_heads=2)
    )


@dataclass
class Run:
    """A Trainer and its PATS, which is attached to its optimizer or, if `fused`, is the optimizer."""

    folder: Path
    bert: BertForSequenceClassification = field(default_factory=model)
    arguments: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    trainer_arguments: dict[str, Any] = field(default_factory=dict)
    fused: bool = False

    def __post_init__(self) -> None:
        defaults: dict[str, Any] = {
            "output_dir": str(self.folder),
            "max_steps": STEPS,
            "per_device_train_batch_size": BATCH,
            "learning_rate": LEARNING_RATE,
            "warmup_steps": 2,
            "weight_decay": 0.1,
            "max_grad_norm": CLIP,
            "save_steps": STEPS // 2,
            "logging_steps": 2,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
        }
        settings, own = SETTINGS | self.settings, {}
        if self.fused:
            own["optimizer_cls_and_kwargs"] = (PATSAdamW, {"lr": LEARNING_RATE} | settings)
        self.trainer = Trainer(
            self.bert,
            TrainingArguments(**(defaults | self.arguments)),
            train_dataset=examples(),
            **self.trainer_arguments,
            **own,
        )
        optimizer: Any = self.trainer.create_optimizer()
        self.pats = optimizer if self.fused else PATS(optimizer, **settings)

    @property
    def callback(self) -> PATSCallback:
        return PATSCallback(None if self.fused else self.pats)

    def train(self, resume: Path | None = None) -> "Run":
        self.trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return self

    @property
    def groups(self) -> list[dict[str, Any]]:
        optimizer: Any = self.trainer.optimizer
        return optimizer.param_groups

    def params(self) -> list[nn.Parameter]:
        return [param for group in self.groups for param in group["params"]]

    def tensors(self) -> list[Tensor]:
        """All that a checkpoint must restore: parameters, the optimizer's state and PATS's."""
        optimizer: Any = self.trainer.optimizer
        both = (optimizer.state,) if self.fused else (optimizer.state, self.pats.state)
        states = [state[param] for state in both for param in self.params()]
        return [p.data for p in self.params()] + [state[key] for state in states for key in sorted(state)]


def logs(run: Run) -> list[dict[str, Any]]:
    return [entry for entry in run.trainer.state.log_history if "loss" in entry]


# Resuming.

KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # arguments of the Trainer, of PATS
    "float32": ({}, {}),
    "exact": ({}, {"normalization": "exact", "uncertainty": "ucb"}),
    "bfloat16 averages": ({}, {"state_dtype": torch.bfloat16}),
    "autocast": ({"bf16": True}, {}),
    "accumulation": ({"gradient_accumulation_steps": 2}, {"uncertainty": "none"}),
}


def full_and_resumed(
    folder: Path,
    arguments: dict[str, Any],
    settings: dict[str, Any],
    prepare: Callable[[BertForSequenceClassification], Any] = lambda bert: bert,
    edit: Callable[[Path], None] = lambda checkpoint: None,
    fused: bool = False,
) -> tuple[Run, Run]:
    """A run of STEPS steps, and one that starts with other weights and resumes from its checkpoint
    half-way."""
    full = Run(folder / "full", prepare(model()), arguments, settings, fused=fused).train()
    checkpoint = folder / f"checkpoint-{STEPS // 2}"
    shutil.copytree(folder / "full" / checkpoint.name, checkpoint)
    edit(checkpoint)
    resumed = Run(folder / "resumed", prepare(model(seed=2)), arguments, settings, fused=fused)
    return full, resumed.train(checkpoint)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_resumes_to_the_bit(kind: str, fused: bool, tmp_path: Path) -> None:
    """With dropout, a schedule and clipping: parameters, both states, the last loss and norm."""
    full, resumed = full_and_resumed(tmp_path, *KINDS[kind], fused=fused)
    assert_same_bits(full.tensors(), resumed.tensors())
    assert {float(state["step"]) for state in resumed.pats.state.values()} == {STEPS}
    last = {key: logs(full)[-1][key] for key in ("loss", "grad_norm", "learning_rate")}
    assert last.items() <= logs(resumed)[-1].items()
    assert all(entry["grad_norm"] > CLIP for entry in logs(full))  # so clipping had an effect


@pytest.mark.parametrize("fused", [False, True])
def test_resumes_to_the_bit_in_bfloat16(fused: bool, tmp_path: Path) -> None:
    """bfloat16 parameters: stochastic rounding continues where it stopped."""
    full, resumed = full_and_resumed(tmp_path, {}, {}, lambda bert: bert.to(torch.bfloat16), fused=fused)
    assert_same_bits(full.tensors(), resumed.tensors())
    assert full.params()[0].dtype == torch.bfloat16


def test_resuming_needs_the_state(tmp_path: Path) -> None:
    """Shows that the tests above can fail: without PATS's part of the checkpoint the result differs."""

    def without_pats(checkpoint: Path) -> None:
        state_dict = torch.load(checkpoint / "optimizer.pt", weights_only=True)
        assert set(state_dict.pop("pats")) == {"version", "num_params", "defaults", "state"}
        torch.save(state_dict, checkpoint / "optimizer.pt")

    full, resumed = full_and_resumed(tmp_path, {}, {}, edit=without_pats)
    pairs = list(zip(full.params(), resumed.params(), strict=True))
    assert not any(torch.equal(a, b) for a, b in pairs if a.numel() > 100)


class LessNoise(TrainerCallback):
    """The way docs/trainer.md changes noise_scale when resuming from a checkpoint."""

    def on_train_begin(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
        for group in optimizer.param_groups:
            group["noise_scale"] = 1e-4


@pytest.mark.parametrize("fused", [False, True])
def test_a_checkpoint_brings_back_its_hyperparameters(fused: bool, tmp_path: Path) -> None:
    """They replace the script's. What is set after loading stays."""
    Run(tmp_path / "full", fused=fused).train()
    for changed in (False, True):
        run = Run(
            tmp_path / f"resumed{changed}",
            settings={"noise_scale": 1.0, "gamma": 2.0, "seed": 6},
            trainer_arguments={"callbacks": [LessNoise(), PATSCallback()] if changed else [PATSCallback()]},
            fused=fused,
        ).train(tmp_path / "full" / f"checkpoint-{STEPS // 2}")
        used = run.pats.defaults | run.groups[0]
        assert {name: used[name] for name in ("gamma", "seed")} == {"gamma": 0.5, "seed": 5}
        assert logs(run)[-1]["pats/noise_scale"] == (1e-4 if changed else SETTINGS["noise_scale"])


def test_autocast(tmp_path: Path) -> None:
    """bf16=True: matrix products are in bfloat16, parameters and averages stay in float32."""
    seen: set[torch.dtype] = set()
    run = Run(tmp_path, arguments={"bf16": True, "save_strategy": "no"})
    pooler: Any = run.bert.bert.pooler
    pooler.dense.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    before = [p.detach().clone() for p in run.params()]
    run.train()
    assert seen == {torch.bfloat16}
    assert all(p.dtype == run.pats.state[p]["exp_avg_sens"].dtype == torch.float32 for p in run.params())
    assert not any(torch.equal(p, old) for p, old in zip(run.params(), before, strict=True))
    plain = Run(tmp_path, arguments={"save_strategy": "no"}).train()
    # bfloat16 has 8 bits; the loss is about ln 2.
    assert [e["loss"] for e in logs(run)] == pytest.approx([e["loss"] for e in logs(plain)], abs=0.03)


# Gradient accumulation.


def summed_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any) -> Tensor:
    return nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_is_the_loop_by_hand(accumulate: int, fused: bool, tmp_path: Path) -> None:
    """PATS steps once per step of the optimizer, over epochs, with clipping and a schedule."""
    batches: list[dict[str, Tensor]] = []

    def collate(items: list[Any]) -> dict[str, Tensor]:
        batches.append(default_data_collator(items))
        return batches[-1]

    arguments = {"gradient_accumulation_steps": accumulate, "save_strategy": "no"}
    hooks = {"data_collator": collate, "compute_loss_func": summed_loss}
    run = Run(tmp_path, model(dropout=0), arguments, trainer_arguments=hooks, fused=fused).train()

    bert = model(dropout=0).train()
    params = list(bert.parameters())
    groups = [
        {"params": [p for p in params if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in params if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer: Any = (
        PATSAdamW(groups, LEARNING_RATE, **SETTINGS) if fused else AdamW(groups, LEARNING_RATE, fused=True)
    )
    schedule = get_linear_schedule_with_warmup(optimizer, 2, STEPS)
    pats = optimizer if fused else PATS(optimizer, **SETTINGS)
    for step in range(STEPS):
        for batch in batches[step * accumulate : (step + 1) * accumulate]:
            logits = bert(input_ids=batch["input_ids"]).logits
            loss = nn.functional.cross_entropy(logits, batch["labels"], reduction="sum")
            (loss / (BATCH * accumulate)).backward()
        nn.utils.clip_grad_norm_(params, CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    own = [p for group in groups for p in group["params"]]
    states = [state[p] for state in ((pats.state,) if fused else (optimizer.state, pats.state)) for p in own]
    expected = [p.data for p in own] + [state[key] for state in states for key in sorted(state)]
    assert_same_bits(run.tensors(), expected)
    assert {float(state["step"]) for state in run.pats.state.values()} == {STEPS}


# Groups.


@pytest.mark.parametrize("fused", [False, True])
def test_both_groups_get_their_noise(fused: bool, tmp_path: Path) -> None:
    """With a learning rate of 0 only the noise moves parameters, in the groups with and without decay."""
    arguments = {"learning_rate": 0.0, "max_steps": 1, "save_strategy": "no"}
    settings: dict[str, Any] = {"normalization": "exact"} | ({"lr": 0.0} if fused else {})
    run = Run(tmp_path, arguments=arguments, settings=settings, fused=fused)
    before = [p.detach().double().numpy().ravel() for p in run.params()]
    run.train()
    assert [group["weight_decay"] for group in run.groups] == [0.1, 0.0]
    for group in run.groups:
        assert 0.01 < np.concatenate([gates(run.pats, param) for param in group["params"]]).mean() < 0.99
    for tensor_id, (param, old) in enumerate(zip(run.params(), before, strict=True)):
        a = gates(run.pats, param)
        z = oracle.normal(Hyper(seed=SETTINGS["seed"], tensor_id=tensor_id), np.arange(param.numel()))
        expected = SETTINGS["noise_scale"] * a * z
        got = param.detach().double().numpy().ravel() - old
        # The fast normals are off by up to 2e-3, tanh by 1e-3 of a z below 6; a weight of 1 rounds by 6e-8.
        np.testing.assert_allclose(got, expected, atol=SETTINGS["noise_scale"] * 8e-3 + 1e-7)


def gates(pats: Any, param: Tensor) -> oracle.Array:
    state = {name: t.double().numpy().ravel() for name, t in pats.state[param].items()}
    q = oracle.score(state["exp_avg_sens"], state["exp_avg_unc"], state["sens_stats"], "product")
    return oracle.gate(q, SETTINGS["gamma"])


# Logs.


class Witness(TrainerCallback):
    """Records what a callback is told, and at each step what the callback under test should report."""

    def __init__(self, pats: Any = None) -> None:
        self.pats = pats
        self.told: list[dict[str, Any]] = []
        self.expected: dict[int, dict[str, float]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.pats is not None:
            a, w = (
                np.concatenate([of(param) for param in self.pats.state])
                for of in (lambda p: gates(self.pats, p), lambda p: p.detach().double().numpy().ravel())
            )
            noise_rms = SETTINGS["noise_scale"] * np.sqrt((a**2).mean())
            numbers = (
                a.mean(),
                (a > 0).mean(),
                SETTINGS["noise_scale"],
                noise_rms,
                noise_rms / np.sqrt((w**2).mean()),
                0,
            )
            self.expected[state.global_step] = dict(zip(NAMES, map(float, numbers), strict=True))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.told.append(dict(logs))


@pytest.mark.parametrize("fused", [False, True])
def test_logs(fused: bool, tmp_path: Path) -> None:
    """The figures at the moment when the Trainer logs, in its history and in its checkpoint."""
    run = Run(tmp_path, fused=fused)
    run.callback.add_to(run.trainer)
    witness = Witness(run.pats)
    run.trainer.add_callback(witness)
    run.train()
    assert [entry["step"] for entry in logs(run)] == [2, 4, 6]
    for entry in logs(run):
        expected = witness.expected[entry["step"]]
        assert {name: entry[f"pats/{name}"] for name in NAMES} == pytest.approx(expected, rel=1e-5)
        assert entry["pats/noise_scale"] == SETTINGS["noise_scale"]
        assert 0.01 < expected["mean_gate"] < expected["noisy_share"] < 0.99
    saved = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    assert [entry for entry in saved if "loss" in entry] == logs(run)
    assert not any(KEYS & set(entry) for entry in run.trainer.state.log_history if "loss" not in entry)


def seen_by(early: Witness, run: Run) -> list[dict[str, Any]]:
    """Trains. Returns what an early witness was told of PATS in each training log; a late witness is told
    all."""
    late = Witness()
    run.trainer.callback_handler.callbacks.append(late)
    run.train()
    seen = [
        [{key: entry[key] for key in KEYS & set(entry)} for entry in witness.told if "loss" in entry]
        for witness in (early, late)
    ]
    assert seen[1] == in_history(run)
    return seen[0]


def in_history(run: Run) -> list[dict[str, Any]]:
    assert len(logs(run)) == STEPS // 2
    return [{key: entry[key] for key in KEYS} for entry in logs(run)]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("way", ["instance", "class", "add_callback", "add_callback of a class", "add_to"])
def test_who_is_told(way: str, fused: bool, tmp_path: Path) -> None:
    """However it was added, a reporter before it in the Trainer's list is told.

    An attached PATS is found from its optimizer.
    """
    early = Witness()
    given: dict[str, list[Any]] = {"instance": [PATSCallback()], "class": [PATSCallback]}
    callbacks = {"callbacks": [early, *given.get(way, [])]}
    run = Run(tmp_path, arguments={"save_strategy": "no"}, trainer_arguments=callbacks, fused=fused)
    if way == "add_to":
        PATSCallback().add_to(run.trainer)
    elif way not in given:
        run.trainer.add_callback(PATSCallback() if way == "add_callback" else PATSCallback)
    order = [type(callback) for callback in run.trainer.callback_handler.callbacks]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="PATSCallback")
        assert seen_by(early, run) == in_history(run)
    after = run.trainer.callback_handler.callbacks
    assert type(after[0]) is PATSCallback
    order.remove(PATSCallback)
    assert [type(callback) for callback in after[1:-1]] == order  # the others are unchanged


def test_everybody_is_told_that_training_begins(tmp_path: Path) -> None:
    """Once each, though the list changes during the iteration."""
    begun: list[int] = []

    class Begun(TrainerCallback):
        def __init__(self, number: int) -> None:
            self.number = number

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            begun.append(self.number)

    callbacks = [Begun(0), Begun(1), PATSCallback(), Begun(2), Begun(3)]
    run = Run(tmp_path, arguments={"save_strategy": "no"}, trainer_arguments={"callbacks": callbacks})
    run.train()
    assert begun == [0, 1, 2, 3]


def test_in_a_wrapper_and_again(tmp_path: Path) -> None:
    """A subclass in between does not hide the handler. Training again changes nothing."""

    class Own(PATSCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            super().on_train_begin(*args, **kwargs)

    early, own = Witness(), Own()
    run = Run(tmp_path, arguments={"save_strategy": "no"}, trainer_arguments={"callbacks": [early, own]})
    assert seen_by(early, run) == in_history(run)
    run.train()
    assert run.trainer.callback_handler.callbacks.count(own) == 1
    assert run.trainer.callback_handler.callbacks[0] is own


def test_another_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without such a handler, a warning says so once, and only later callbacks are told of PATS."""
    monkeypatch.delattr(hf.trainer_callback, "CallbackHandler")
    early = Witness()
    run = Run(
        tmp_path,
        arguments={"save_strategy": "no"},
        trainer_arguments={"callbacks": [early, PATSCallback()]},
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert seen_by(early, run) == [{}] * 3
        run.train()
    said = [str(warning.message) for warning in caught if "PATSCallback" in str(warning.message)]
    assert [text.endswith("call PATSCallback().add_to(trainer) before training") for text in said] == [True]

    early = Witness()
    run = Run(tmp_path, arguments={"save_strategy": "no"}, trainer_arguments={"callbacks": [early]})
    PATSCallback().add_to(run.trainer)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="PATSCallback")
        assert seen_by(early, run) == in_history(run)


def test_computes_only_where_the_trainer_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at other steps, and not for the logs of an evaluation."""
    calls: list[int] = []
    real = PATS.pats_summary

    def counted(pats: PATS) -> dict[str, float]:
        calls.append(run.trainer.state.global_step)
        return real(pats)

    monkeypatch.setattr(PATS, "pats_summary", counted)
    arguments = {"eval_strategy": "steps", "eval_steps": 3, "logging_steps": 4, "save_strategy": "no"}
    run = Run(tmp_path, arguments=arguments, trainer_arguments={"eval_dataset": examples()[:4]})
    PATSCallback(run.pats).add_to(run.trainer)
    run.train()
    assert calls == [4]
    assert [entry["step"] for entry in run.trainer.state.log_history if "eval_loss" in entry] == [3, 6]
    assert [entry["step"] for entry in run.trainer.state.log_history if KEYS & set(entry)] == [4]


class Poison(TrainerCallback):
    """Makes three elements of one gradient not finite in the second step, after the Trainer's clipping, whose
    norm would spread them to all."""

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if state.global_step == 1:
            model.bert.pooler.dense.bias.grad[[3, 7, 20]] = torch.tensor([torch.nan, torch.inf, -torch.inf])


@pytest.mark.parametrize("fused", [False, True])
def test_logs_what_was_not_finite(fused: bool, tmp_path: Path) -> None:
    arguments = {"max_steps": 2, "logging_steps": 1, "save_strategy": "no"}
    run = Run(tmp_path, arguments=arguments, trainer_arguments={"callbacks": [Poison()]}, fused=fused)
    run.callback.add_to(run.trainer)
    run.train()
    assert [entry["pats/nonfinite"] for entry in logs(run)] == [0, 3]


def test_logs_without_noise(tmp_path: Path) -> None:
    """Without state there is no gate to report."""
    run = Run(tmp_path, arguments={"save_strategy": "no"}, settings={"noise_scale": 0.0})
    PATSCallback(run.pats).add_to(run.trainer)
    run.train()
    assert all(KEYS & set(entry) == {"pats/nonfinite"} for entry in logs(run))


def test_the_wrong_optimizer(tmp_path: Path) -> None:
    """The error comes when training begins, not at the first log."""
    other = PATS(torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1))
    for pats, reason in (
        (None, "no PATS is attached to it"),
        (other, "pats is attached to another optimizer"),
    ):
        run = Run(tmp_path, arguments={"save_strategy": "no"})
        if pats is None:
            run.pats.remove()
        PATSCallback(pats).add_to(run.trainer)
        with pytest.raises(ValueError, match=f"the Trainer's optimizer is AdamW, and {reason}"):
            run.train()
        assert run.pats.state == {}
