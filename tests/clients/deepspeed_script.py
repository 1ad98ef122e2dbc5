"""A script as people write it for DeepSpeed, which test_deepspeed.py runs on two processes.

It trains with a learning rate of 0, so that all that a step changes is the noise, and saves half-way or
resumes.
"""

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pats_kernels import PATS, PATSAdamW

# DeepSpeed compiles a shared-memory operator for CPUs when it starts. Without that it uses plain gloo.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

WIDTH, STEPS = 64, 6


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))


def optimizer_of(kind: str, model: nn.Module, noise: list[Tensor]) -> tuple[Any, Any]:
    """The optimizer, and who has PATS's state; each step appends to `noise` what it adds to each tensor."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    settings: dict[str, Any] = {"noise_scale": 1e-2, "gamma": 0.5, "seed": 3}
    fused = kind == "fused"
    optimizer: Any = PATSAdamW(groups, lr=0.0, **settings) if fused else torch.optim.AdamW(groups, lr=0.0)
    before: list[Tensor] = []

    def params() -> list[Tensor]:
        return [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]

    optimizer.register_step_pre_hook(lambda *_: before.extend(params()))
    pats = optimizer if fused else PATS(optimizer, **settings)
    optimizer.register_step_post_hook(
        lambda *_: noise.extend((after - before.pop(0)).flatten() for after in params())
    )
    return optimizer, pats


def batch(step: int, rank: int) -> Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(10 * step + rank))


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value.detach().clone()]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for item in items for tensor in tensors(item)]


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    folder, stage = Path(sys.argv[1]).parent, settings["stage"]
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,  # allows optimizers that are not in DeepSpeed's list
        "zero_force_ds_cpu_optimizer": False,  # the same for offloading
        **settings.get("config", {}),
    }
    bfloat16 = config.get("bf16", {}).get("enabled", False)
    half = STEPS // 2
    model, noise = network(2 if settings["resume"] else 1), []
    optimizer, pats = optimizer_of(settings["kind"], model, noise)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        noise.clear()  # with bfloat16 and stage 0, `initialize` takes a step with gradients of 0
        rank = dist.get_rank()
        if settings["resume"]:
            engine.load_checkpoint(str(folder), tag="half")
        of_steps: list[list[Tensor]] = []
        for step in range(half if settings["resume"] else 0, STEPS):
            inputs = batch(step, rank).to(torch.bfloat16 if bfloat16 else torch.float32)
            engine.backward(engine(inputs).float().square().mean())
            engine.step()
            of_steps.append(list(noise))
            noise.clear()
            if step == half - 1 and not settings["resume"]:
                engine.save_checkpoint(str(folder), tag="half")
    state = engine.optimizer.state_dict() if stage else [optimizer.state_dict(), list(model.parameters())]
    told = [str(w.message) for w in caught if str(w.message).startswith("PATS")]
    steps = [int(entry["step"]) for entry in pats.state.values()]
    result = {"tensors": tensors(state), "noise": of_steps, "warnings": told, "steps": steps}
    name = "resumed" if settings["resume"] else "whole"
    torch.save(result, folder / f"{name}-{rank}.pt")
    dist.barrier()
    os._exit(0)  # at a normal exit gloo's threads sometimes abort the process


if __name__ == "__main__":
    main()
