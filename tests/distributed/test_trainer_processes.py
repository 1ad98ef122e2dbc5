"""The stock Trainer, and Accelerate alone, on two processes: DDP and FSDP2 are one process, and resume.

Accelerate makes FSDP into DDP where there is no accelerator: `real_fsdp` takes that back, and nothing else.
Tolerances: gradients of float32 are summed in another order, and AdamW divides them by their own size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from processes import Pool
from small_model import gather, loss_of, small_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from pats_kernels import PATS, PATSAdamW
from pats_kernels.hf import PATSCallback
from pats_kernels.replicas import check_replicas

STEPS, BATCH, ACCUMULATE = 4, 4, 2  # BATCH: of all processes together
NOISE: dict[str, Any] = {"noise_scale": 1e-2, "gamma": 0.5, "seed": 5}
KINDS = ["PATSAdamW", "PATS"]
HOWS = ["ddp", "fsdp"]
FSDP: dict[str, Any] = {
    "fsdp": True,
    "fsdp_config": {
        "version": 2,
        "transformer_layer_cls_to_wrap": ["BertLayer"],
        "reshard_after_forward": True,
        "cpu_ram_efficient_loading": False,
        "state_dict_type": "SHARDED_STATE_DICT",
    },
}


@contextmanager
def real_fsdp() -> Iterator[None]:
    """Accelerate as where there are GPUs: it asks for the plugin there only."""
    original = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = self.distributed_type

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    with patch.object(AcceleratorState, "__init__", init):
        yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def bert(seed: int) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 90, "hidden_size": 20, "intermediate_size": 36, "max_position_embeddings": 12}
    rates = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    model = BertForSequenceClassification(
        BertConfig(**sizes, **rates, num_hidden_layers=2, num_attention_heads=2)
    )
    for name, param in model.named_parameters():
        if name.endswith("key.bias"):  # its gradient is 0 but for rounding, which would decide its steps
            param.requires_grad_(False)
    return model


def summed_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any) -> Tensor:
    """The mean over all processes and accumulated batches, which BERT's own loss is not."""
    return nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


def examples() -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(0)
    return [
        {"input_ids": torch.randint(0, 90, (12,), generator=random), "labels": torch.tensor(i % 2)}
        for i in range(STEPS * BATCH * ACCUMULATE)
    ]


def trained(
    kind: str, folder: str, seed: int, resume: str | None = None, **arguments: Any
) -> tuple[dict[str, Tensor], Trainer, Any]:
    """All tensors, whole, after training; the Trainer, and what keeps the state of PATS."""
    processes = dist.get_world_size() if dist.is_initialized() else 1
    own: dict[str, Any] = {}
    if kind == "PATSAdamW":
        own["optimizer_cls_and_kwargs"] = (PATSAdamW, {"lr": 1e-3, **NOISE})
    trainer = Trainer(
        bert(seed),
        TrainingArguments(
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=BATCH // processes,
            gradient_accumulation_steps=ACCUMULATE,
            learning_rate=1e-3,
            max_grad_norm=0.05,  # the gradients' norm is above it
            warmup_steps=2,
            weight_decay=0.1,
            save_steps=STEPS // 2,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            **arguments,
        ),
        train_dataset=examples(),
        compute_loss_func=summed_loss,
        **own,
    )
    keeper: Any = None
    if kind == "PATS":
        keeper = PATS(trainer.create_optimizer(), **NOISE)
    PATSCallback(keeper).add_to(trainer)
    trainer.train(resume_from_checkpoint=resume)
    optimizer: Any = trainer.optimizer
    optimizer = getattr(optimizer, "optimizer", optimizer)
    keeper = keeper or optimizer
    keeper.state_dict()  # waits for the means
    states = [optimizer.state] if keeper is optimizer else [optimizer.state, keeper.state]
    return gather(trainer.model, *states), trainer, keeper


def stopped_and_resumed(how: str, kind: str, folder: str) -> list[Any]:
    """A run, one of other weights that takes up its checkpoint half-way, and what the Trainer logged."""
    arguments = FSDP if how == "fsdp" else {}
    with real_fsdp():
        full, trainer, keeper = trained(kind, f"{folder}/full", 1, **arguments)
        model: Any = trainer.model
        sharded = [isinstance(param, DTensor) for param in model.parameters()]
        assert all(sharded) if how == "fsdp" else not any(sharded)
        assert isinstance(trainer.model_wrapped, DistributedDataParallel) == (how == "ddp")
        check_replicas(keeper)
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    with real_fsdp():
        checkpoint = f"{folder}/full/checkpoint-{STEPS // 2}"
        resumed, _, keeper = trained(kind, f"{folder}/resumed", 2, checkpoint, **arguments)
        check_replicas(keeper)
    return [full, resumed, logs]


def assert_close(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(
            tensor, expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", HOWS)
def test_trainer(pool: Pool, tmp_path: Path, how: str, kind: str) -> None:
    """With accumulation, clipping, a schedule and groups by weight decay; checkpoints are the Trainer's."""
    expected, trainer, _ = trained(kind, str(tmp_path / "one"), 1)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    for full, resumed, other in pool(2, stopped_and_resumed, how, kind, str(tmp_path)):
        assert_close(full, expected)
        for name in full:
            assert torch.equal(resumed[name], full[name]), name
        for entry, own in zip(other, logs, strict=True):
            for key in ("loss", "grad_norm", "pats/mean_gate", "pats/noisy_share"):
                assert entry[key] == pytest.approx(own[key], rel=1e-3), key


# Accelerate alone.


def loop(how: str, kind: str, folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Steps of a plain loop, and those after `save_state` once more from `load_state`."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="size_based_wrap",
        min_num_params=20,
        cpu_ram_efficient_loading=False,
        state_dict_type="SHARDED_STATE_DICT",
    )
    results: list[dict[str, Tensor]] = []
    for resume in (False, True):
        with real_fsdp():
            accelerator = Accelerator(cpu=True, fsdp_plugin=plugin if how == "fsdp" else None)
            model: Any = small_model()
            if kind == "PATSAdamW":
                optimizer: Any = PATSAdamW(model.parameters(), 1e-2, **NOISE)
                keeper: Any = optimizer
            else:
                optimizer = AdamW(model.parameters(), 1e-2)
                keeper = PATS(optimizer, **NOISE)
            model, optimizer = accelerator.prepare(model, optimizer)
            if resume:
                accelerator.load_state(f"{folder}/state")
            for step in range(2 if resume else 0, STEPS):
                if step == 2 and not resume:
                    accelerator.save_state(f"{folder}/state")
                accelerator.backward(loss_of(model, step, dist.get_rank(), dist.get_world_size()))
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
            keeper.state_dict()
            check_replicas(keeper)
            states = [optimizer.optimizer.state] if kind == "PATSAdamW" else [optimizer.state, keeper.state]
            results.append(gather(accelerator.unwrap_model(model), *states))
    return results[0], results[1]


def loop_by_hand(kind: str) -> dict[str, Tensor]:
    model = small_model()
    if kind == "PATSAdamW":
        optimizer: Any = PATSAdamW(model.parameters(), 1e-2, **NOISE)
        states = [optimizer.state]
    else:
        optimizer = AdamW(model.parameters(), 1e-2)
        states = [optimizer.state, PATS(optimizer, **NOISE).state]
    for step in range(STEPS):
        loss_of(model, step).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    return gather(model, *states)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", HOWS)
def test_accelerate(pool: Pool, tmp_path: Path, how: str, kind: str) -> None:
    expected = loop_by_hand(kind)
    for full, resumed in pool(2, loop, how, kind, str(tmp_path)):
        assert_close(full, expected)
        for name in full:
            assert torch.equal(resumed[name], full[name]), name
