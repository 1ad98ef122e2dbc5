"""Keeps a step out of torch.compile: it runs uncompiled, between the graphs before and after it."""

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

# A kernel finds its tensors by addresses in a table. A compiled graph does not keep addresses: it copies what
# an operator's schema says is written, and writes the copies back over the kernel's results.
REASON = (
    "a step of pats_kernels writes through addresses, which a compiled graph does not keep. It runs between "
    "graphs, so it cannot be part of one with fullgraph=True: call optimizer.step() outside the compiled "
    "function, or drop fullgraph=True"
)


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """`torch.compiler.disable` with `REASON`, without its import of torch._dynamo, which takes a second.

    torch.optim does the same: the import waits for the first call. By then an optimizer has usually been
    constructed, which needs that import anyway.
    """
    disable: Any = getattr(torch, "_disable_dynamo", torch.compiler.disable)
    call = disable(function)
    call._torchdynamo_disable = True
    call._torchdynamo_disable_msg = REASON
    return call


def refuse_functionalization(operator: str) -> None:
    """Makes torch.ops.pats_kernels.<operator> raise where a compiled graph passes copies of its arguments.

    Without this, a step inside a compiled graph would silently change nothing.
    """

    def refuse(*_arguments: object, **_keywords: object) -> None:
        raise RuntimeError(
            f"torch.ops.pats_kernels.{operator} writes through the addresses in its table, but would be "
            "given copies here: call it from a function under torch.compiler.disable, as a step does"
        )

    _library.impl(operator, refuse, "Functionalize")


_library = torch.library.Library("pats_kernels", "IMPL")
