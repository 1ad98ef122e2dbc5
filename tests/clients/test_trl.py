"""TRL's SFT and DPO trainers with a tiny model and a tokenizer made here, offline."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from harness import assert_same_bits
from loops import NOISE, tensors
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from pats_kernels import PATS, PATSAdamW
from pats_kernels.hf import PATSCallback

STEPS = 4
WORDS = [f"w{i}" for i in range(40)]


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", "<eos>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>"
    )


def model(seed: int = 1) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS) + 3, pad_token_id=0, eos_token_id=2, **sizes))


def sentence(i: int) -> str:
    return " ".join(WORDS[(i * 7 + j * 3) % len(WORDS)] for j in range(6))


DATA = {
    "SFT": Dataset.from_dict({"text": [sentence(i) for i in range(16)]}),
    "DPO": Dataset.from_dict(
        {
            "prompt": [sentence(i) for i in range(16)],
            "chosen": [" " + sentence(i + 1) for i in range(16)],
            "rejected": [" " + sentence(i + 5) for i in range(16)],
        }
    ),
}
TRAINERS: dict[str, tuple[Any, Any]] = {"SFT": (SFTTrainer, SFTConfig), "DPO": (DPOTrainer, DPOConfig)}


def trained(
    what: str, how: str, folder: Path, seed: int = 1, resume: Path | None = None
) -> tuple[Any, list[Tensor]]:
    trainer_class, config_class = TRAINERS[what]
    arguments = config_class(
        output_dir=str(folder),
        max_steps=STEPS,
        save_steps=STEPS // 2,
        logging_steps=1,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        max_length=32,
    )
    policy = model(seed)
    own: dict[str, Any] = {"ref_model": model(seed=1)} if what == "DPO" else {}
    if how == "fused" and what == "SFT":
        own["optimizer_cls_and_kwargs"] = (PATSAdamW, {"lr": 1e-3} | NOISE)
    elif how == "fused":  # DPOTrainer takes only an optimizer that is already made
        own["optimizers"] = (PATSAdamW(policy.named_parameters(), lr=1e-3, **NOISE), None)
    trainer = trainer_class(
        model=policy, args=arguments, train_dataset=DATA[what], processing_class=tokenizer(), **own
    )
    optimizer = trainer.create_optimizer()
    pats = optimizer if how == "fused" else PATS(optimizer, **NOISE)
    PATSCallback(None if how == "fused" else pats).add_to(trainer)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    params = [param for group in trainer.optimizer.param_groups for param in group["params"]]
    states = [dict(sorted(s.state[p].items())) for s in (trainer.optimizer, pats) for p in params]
    assert {float(state["step"]) for state in pats.state.values()} == {STEPS}
    return trainer, list(tensors([params, states]))


@pytest.mark.parametrize("how", ["fused", "attached"])
@pytest.mark.parametrize("what", TRAINERS)
def test_trains_and_resumes_to_the_bit(what: str, how: str, tmp_path: Path) -> None:
    trainer, whole = trained(what, how, tmp_path)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == STEPS
    assert all(0 < entry["pats/mean_gate"] < 1 for entry in logs[1:])
    checkpoint = tmp_path / f"checkpoint-{STEPS // 2}"
    _, resumed = trained(what, how, tmp_path / "resumed", seed=2, resume=checkpoint)
    assert_same_bits(resumed, whole)
