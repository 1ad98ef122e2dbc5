"""Fused kernels for PATS: noise where a fine-tuned model is not sensitive, in one pass over memory."""

from pats_kernels import reference
from pats_kernels.adamw import PATSAdamW
from pats_kernels.backends import available_backends
from pats_kernels.groups import param_groups
from pats_kernels.optim import PATS
from pats_kernels.release import release_gradients
from pats_kernels.step import pats_step_
from pats_kernels.version import __version__

__all__ = [
    "PATS",
    "PATSAdamW",
    "__version__",
    "available_backends",
    "param_groups",
    "pats_step_",
    "reference",
    "release_gradients",
]
