"""Bad hyperparameters from the contract's table of bad input, and what the error messages must say."""

import math
from typing import Any

import pytest
import torch

BAD_HYPERPARAMETERS: list[tuple[str, Any, str]] = [
    # name, value, its range as the message gives it
    ("noise_scale", -1e-9, ">= 0"),
    ("noise_scale", math.nan, ">= 0"),
    ("noise_scale", math.inf, ">= 0"),
    ("noise_scale", "0.1", ">= 0"),
    ("noise_scale", None, ">= 0"),
    ("gamma", -1.0, ">= 0"),
    ("gamma", math.nan, ">= 0"),
    ("gamma", math.inf, ">= 0"),
    ("sens_betas", (1.0, 0.5), "[0, 1)"),
    ("sens_betas", (0.5, 1.0), "[0, 1)"),
    ("sens_betas", (-0.1, 0.5), "[0, 1)"),
    ("sens_betas", (0.5, math.nan), "[0, 1)"),
    ("sens_betas", (0.5,), "[0, 1)"),
    ("sens_betas", (0.5, 0.5, 0.5), "[0, 1)"),
    ("sens_betas", 0.5, "[0, 1)"),
    ("sens_betas", None, "[0, 1)"),
    ("uncertainty", "products", "'product', 'ucb', 'none'"),
    ("uncertainty", None, "'product', 'ucb', 'none'"),
    ("normalization", "lazy", "'delayed', 'exact'"),
    ("normalization", 1, "'delayed', 'exact'"),
    ("state_dtype", torch.float16, "torch.float32, torch.bfloat16"),
    ("state_dtype", "float32", "torch.float32, torch.bfloat16"),
    ("stochastic_rounding", "yes", "True, False"),
    ("stochastic_rounding", None, "True, False"),
    ("seed", -1, "[0, 2^64)"),
    ("seed", 2**64, "[0, 2^64)"),
    ("seed", 1.5, "[0, 2^64)"),
    ("seed", "1", "[0, 2^64)"),
]

BAD_ADAMW_HYPERPARAMETERS: list[tuple[str, Any, str]] = [
    ("lr", -1.0, ">= 0"),
    ("lr", math.nan, ">= 0"),
    ("lr", torch.tensor(-1.0), ">= 0"),
    ("lr", torch.zeros(2), "one element"),
    ("lr", "1e-3", ">= 0"),
    ("betas", (1.0, 0.9), "[0, 1)"),
    ("betas", (0.9, -0.1), "[0, 1)"),
    ("betas", (0.9,), "[0, 1)"),
    ("eps", -1e-8, ">= 0"),
    ("eps", math.inf, ">= 0"),
    ("weight_decay", -0.1, ">= 0"),
    ("maximize", 2, "True, False"),
    ("sensitivity", "gradient", "'ema', 'moments'"),
    ("amsgrad", True, "False"),
    ("differentiable", True, "False"),
]


def assert_names(error: pytest.ExceptionInfo[Exception], *parts: object) -> None:
    missing = [part for part in parts if str(part) not in str(error.value)]
    assert not missing, f"{str(error.value)!r} does not say {missing}"
