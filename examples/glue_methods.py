"""What fine-tunes the model: AdamW alone, or with noise of one kind or another.

A method is an optimizer for `Trainer(optimizer_cls_and_kwargs=...)` and, where it needs one, a callback or a
change to the model before the first step; the Trainer itself stays as it is.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.optim import AdamW
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pats_kernels import PATSAdamW
from pats_kernels.hf import PATSCallback

NOT_GIVEN = -1.0  # a number whose default hangs on others
METHODS = ("adamw", "noise", "noisytune", "pats")
STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OptimizerSpec = tuple[Any, dict[str, Any]]  # what Trainer's optimizer_cls_and_kwargs takes


@dataclass
class MethodArguments:
    """What is compared, and the noise of each."""

    method: str = field(
        default="adamw,pats", metadata={"help": f"One or more, separated by commas: {', '.join(METHODS)}"}
    )
    noise_scale: float = field(
        default=NOT_GIVEN,
        metadata={
            "help": "pats: standard deviation at an open gate; noise: everywhere. If not given: 1e-5 "
            "pretrained, 1e-3 from scratch"
        },
    )
    gamma: float = field(default=1.0, metadata={"help": "pats: no noise where q >= 1/gamma"})
    sens_betas: list[float] = field(
        default_factory=lambda: [0.85, 0.95],
        metadata={"help": "pats: decay rates of the sensitivity and of its uncertainty"},
    )
    uncertainty: Literal["product", "ucb", "none"] = field(
        default="product", metadata={"help": "pats: how both make q"}
    )
    normalization: Literal["delayed", "exact"] = field(
        default="delayed", metadata={"help": "pats: by the means before this step, or by those after it"}
    )
    sensitivity: Literal["ema", "moments"] = field(
        default="ema", metadata={"help": "pats: from its own averages, or from AdamW's moments"}
    )
    state_dtype: Literal["float32", "bfloat16"] | None = field(
        default=None, metadata={"help": "pats: of the averages; the parameter's if not given"}
    )
    noisytune_lambda: float = field(
        default=0.15, metadata={"help": "noisytune: the noise is uniform, this times a matrix's std wide"}
    )

    @property
    def methods(self) -> list[str]:
        return [name.strip() for name in self.method.split(",")]

    def __post_init__(self) -> None:
        for name in self.methods:
            if name not in METHODS:
                raise ValueError(f"Unknown method: {name!r} (known: {', '.join(METHODS)})")
        for name in ("noise_scale", "noisytune_lambda"):
            if getattr(self, name) < 0 and getattr(self, name) != NOT_GIVEN:
                raise ValueError(f"Invalid {name}: {getattr(self, name)} (must be >= 0)")


def optimizer(method: str, noise: MethodArguments, training: TrainingArguments) -> OptimizerSpec:
    """The optimizer's class and arguments. Weight decay comes with the Trainer's param groups."""
    common = {
        "lr": training.learning_rate,
        "betas": (training.adam_beta1, training.adam_beta2),
        "eps": training.adam_epsilon,
    }
    if method != "pats":
        return AdamW, {**common, "fused": True}
    return PATSAdamW, {
        **common,
        "noise_scale": noise.noise_scale,
        "gamma": noise.gamma,
        "sens_betas": tuple(noise.sens_betas),
        "uncertainty": noise.uncertainty,
        "normalization": noise.normalization,
        "sensitivity": noise.sensitivity,
        "state_dtype": STATE_DTYPES[noise.state_dtype] if noise.state_dtype else None,
        "seed": training.seed,
    }


def callbacks(method: str, noise: MethodArguments, training: TrainingArguments) -> list[TrainerCallback]:
    """What a method needs beside its optimizer, and what it logs."""
    if method == "noise":
        return [NoiseCallback(noise.noise_scale, training.seed)]
    return [PATSCallback()] if method == "pats" else []


class NoiseCallback(TrainerCallback):
    """The control: Gaussian noise of one scale on every trained parameter before each step.

    A function of the seed and the step, so that a resumed run continues as it would have.
    """

    def __init__(self, noise_scale: float, seed: int) -> None:
        self.noise_scale, self.seed = noise_scale, seed

    @torch.no_grad()
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        params = [param for param in cast(nn.Module, kwargs["model"]).parameters() if param.requires_grad]
        generator = torch.Generator(params[0].device).manual_seed((self.seed << 32) + state.global_step)
        for param in params:
            z = torch.randn(param.shape, generator=generator, dtype=param.dtype, device=param.device)
            param.add_(z, alpha=self.noise_scale)


@torch.no_grad()
def noisytune_(model: nn.Module, width: float, seed: int) -> None:
    """NoisyTune (Wu et al., ACL 2022): once, before fine-tuning, uniform noise by each matrix's spread."""
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        if param.numel() > 1:  # the standard deviation of one number is not defined
            uniform = torch.rand(param.shape, generator=generator).to(param) - 0.5
            param.add_(uniform * (width * param.std()))
