"""DeepSpeed through the Trainer. Arguments: the stage, fused or attached, a folder, what to resume."""

import os
import sys
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from pats_kernels import PATS, PATSAdamW
from pats_kernels.hf import PATSCallback

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

STEPS = 4
NOISE: dict[str, Any] = {"noise_scale": 1e-3, "seed": 1}

stage, how, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
resume = sys.argv[4] if len(sys.argv) > 4 else None

torch.manual_seed(2 if resume else 1)
config = BertConfig(
    vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
)
tokens = torch.randint(5, 100, (64, 16), generator=torch.Generator().manual_seed(0))
data = Dataset.from_dict({"input_ids": tokens.tolist(), "labels": (tokens[:, 0] < 50).long().tolist()})
arguments = TrainingArguments(
    folder,
    max_steps=STEPS,
    save_steps=STEPS // 2,
    logging_steps=1,
    learning_rate=1e-3,
    seed=1,
    use_cpu=True,
    report_to=[],
    disable_tqdm=True,
    deepspeed={
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    },
)


class AdamWWithPATS(torch.optim.AdamW):
    """The Trainer makes its optimizer as training begins, and drops one that was there before."""

    def __init__(self, params: Any, **kwargs: Any) -> None:
        super().__init__(params, **kwargs)
        self.pats = PATS(self, **NOISE)


model = BertForSequenceClassification(config)
make = (PATSAdamW, {"lr": 1e-3} | NOISE) if how == "fused" else (AdamWWithPATS, {"lr": 1e-3})
trainer = Trainer(
    model, arguments, train_dataset=data, optimizer_cls_and_kwargs=make, callbacks=[PATSCallback()]
)
trainer.train(resume_from_checkpoint=resume)
assert "pats/nonfinite" in [entry for entry in trainer.state.log_history if "loss" in entry][-1]

pats: Any = trainer.optimizer
while hasattr(pats, "optimizer"):  # Accelerate's wrapper, and DeepSpeed's
    pats = pats.optimizer
pats = getattr(pats, "pats", pats)
state = [entry[key] for entry in pats.state.values() for key in sorted(entry)]
whole = [*trainer.accelerator.get_state_dict(trainer.deepspeed).values()] if stage < 3 else []
result = {"state": state, "model": whole, "steps": [int(entry["step"]) for entry in pats.state.values()]}
torch.save(result, f"{folder}/result-{dist.get_rank()}.pt")
dist.barrier()
os._exit(0)  # at a normal exit gloo's threads sometimes abort the process
