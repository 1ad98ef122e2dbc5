"""What fine-tunes the model: AdamW alone, or with noise of one kind or another.

A method is an optimizer for `Trainer(optimizer_cls_and_kwargs=...)` and, where it needs one, a callback or a
change to the model before the first step; the Trainer itself stays as it is.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pats_kernels import PATS, PATSAdamW, param_groups
from pats_kernels.hf import PATSCallback
from sage import SAGEAdamW

NOT_GIVEN = -1.0  # a number whose default hangs on others
_PATS = (
    "noise_scale",
    "gamma",
    "sens_betas",
    "uncertainty",
    "normalization",
    "noise_unit",
    "noise_schedule",
    "no_noise",
)
FIELDS = {  # what of MethodArguments a method reads
    "adamw": (),
    "noise": ("noise_scale",),
    "isotropic": _PATS,
    "noisytune": ("noisytune_lambda",),
    "neftune": ("neftune_alpha",),
    "sage": ("sage_beta",),
    "pats": (*_PATS, "sensitivity", "state_dtype"),
}
METHODS = tuple(FIELDS)
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
    noise_unit: Literal["absolute", "relative"] = field(
        default="absolute",
        metadata={"help": "pats, isotropic: relative: noise_scale times each tensor's first std"},
    )
    noise_schedule: Literal["constant", "lr"] = field(
        default="constant",
        metadata={"help": "pats, isotropic: lr: it falls as the learning rate does"},
    )
    no_noise: str = field(
        default="",
        metadata={"help": "pats, isotropic: what gets none, separated by commas, as in param_groups: embed"},
    )
    noisytune_lambda: float = field(
        default=0.15, metadata={"help": "noisytune: the noise is uniform, this times a matrix's std wide"}
    )
    neftune_alpha: float = field(default=5.0, metadata={"help": "neftune: transformers' neftune_noise_alpha"})
    sage_beta: float = field(default=0.75, metadata={"help": "sage: decay rate of the sensitivity"})

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


def prepare_(method: str, noise: MethodArguments, training: TrainingArguments, model: nn.Module) -> None:
    """What a method changes before the Trainer is made: the weights, or an argument of the Trainer."""
    if method == "noisytune":
        noisytune_(model, noise.noisytune_lambda, training.seed)
    if method == "neftune":
        training.neftune_noise_alpha = noise.neftune_alpha


def optimizer(
    method: str, noise: MethodArguments, training: TrainingArguments, model: nn.Module
) -> OptimizerSpec:
    """The optimizer's class and arguments. Weight decay comes with the param groups."""
    common: dict[str, Any] = {
        "lr": training.learning_rate,
        "betas": (training.adam_beta1, training.adam_beta2),
        "eps": training.adam_epsilon,
    }
    if method == "sage":
        return SAGEAdamW, {**common, "sens_beta": noise.sage_beta}
    if method not in ("pats", "isotropic"):
        return AdamW, {**common, "fused": True}
    if noise.noise_unit == "relative" or noise.no_noise:
        common["params"] = groups(model, noise, training.weight_decay)
    common |= {
        "noise_scale": noise.noise_scale,
        "gamma": noise.gamma,
        "sens_betas": tuple(noise.sens_betas),
        "uncertainty": noise.uncertainty,
        "normalization": noise.normalization,
        "seed": training.seed,
    }
    if method == "isotropic":
        return IsotropicAdamW, common
    return PATSAdamW, {
        **common,
        "sensitivity": noise.sensitivity,
        "state_dtype": STATE_DTYPES[noise.state_dtype] if noise.state_dtype else None,
    }


def groups(model: nn.Module, noise: MethodArguments, weight_decay: float) -> list[dict[str, Any]]:
    """Param groups with what is to have no noise apart; for relative noise a group a tensor."""
    patterns = [pattern.strip() for pattern in noise.no_noise.split(",") if pattern.strip()]
    found = param_groups(model, weight_decay=weight_decay, noise_scale=noise.noise_scale, no_noise=patterns)
    return relative(found) if noise.noise_unit == "relative" else found


def relative(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A group a tensor: its noise_scale is the group's times the standard deviation that the tensor has now.

    A tensor that is constant, as fresh biases and LayerNorm weights are, gets no noise.
    """
    return [
        {
            **group,
            "params": [param],
            "param_names": [name],
            "noise_scale": group["noise_scale"] * float(param.detach().std(correction=0)),
        }
        for group in groups
        for param, name in zip(group["params"], group["param_names"], strict=True)
    ]


def callbacks(method: str, noise: MethodArguments, training: TrainingArguments) -> list[TrainerCallback]:
    """What a method needs beside its optimizer, and what it logs."""
    if method == "noise":
        return [NoiseCallback(noise.noise_scale, training.seed)]
    if method not in ("pats", "isotropic"):
        return []
    return [PATSCallback(), *([NoiseWithLearningRate()] if noise.noise_schedule == "lr" else [])]


class NoiseWithLearningRate(TrainerCallback):
    """Each group's noise_scale in proportion to its scheduled learning rate."""

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for group in kwargs["optimizer"].param_groups:
            # In the group, so that it rides in checkpoints; PATSAdamW's groups have noise_scale, those of an
            # optimizer to which PATS is attached need not.
            full = group.setdefault("full_noise_scale", group["noise_scale"])
            group["noise_scale"] = full * group["lr"] / group["initial_lr"]


class IsotropicAdamW(AdamW):
    """AdamW with PATS's noise made isotropic: the control for what the gate is worth.

    Before each step PATS computes the noise that it would add at these very weights. Its energy, the sum of
    squares over all elements, is kept; where it lies is not: every element gets normal noise of its group's
    noise_scale times one common factor, so that the energy of the step is the same.

    Args:
        params, lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.
        pats: as in `PATS`.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **pats: Any,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, fused=True)
        for group in self.param_groups:
            group.setdefault("noise_scale", pats.get("noise_scale", 1e-5))
        self._before: list[tuple[Tensor, Tensor, float]] = []
        # PATS attaches as a hook that runs before the step, so these two run before it and after it.
        self.register_step_pre_hook(IsotropicAdamW._remember)
        self.pats = PATS(self, **pats)
        self.register_step_pre_hook(IsotropicAdamW._spread)

    @torch.no_grad()
    def _remember(self, *unused: Any) -> None:
        self._before = [
            (param, param.detach().clone(), group["noise_scale"])
            for group in self.param_groups
            if group["noise_scale"] > 0
            for param in group["params"]
            if param.grad is not None
        ]

    @torch.no_grad()
    def _spread(self, *unused: Any) -> None:
        if not self._before:
            return
        first = self._before[0][0]
        step = int(self.state[first].get("step", 0))
        generator = torch.Generator(first.device).manual_seed((self.pats.defaults["seed"] << 32) + step)
        drawn = [
            torch.randn(old.shape, generator=generator, dtype=old.dtype, device=old.device).mul_(scale)
            for _, old, scale in self._before
        ]
        wanted = _energy(param - old for param, old, _ in self._before)
        factor = (wanted / _energy(drawn)).sqrt()
        for (param, old, _), noise in zip(self._before, drawn, strict=True):
            param.copy_(old).add_(noise.mul_(factor.to(noise.dtype)))
        self._before = []


def _energy(tensors: Iterable[Tensor]) -> Tensor:
    """The sum of squares, float64."""
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors]
    return torch.stack(norms).square().sum()


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
