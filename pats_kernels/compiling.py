"""torch.compile: a step runs as it is, between what is compiled before and after it."""

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

# A kernel finds its tensors by addresses in a table. A compiled graph keeps no addresses: it works on copies
# of what a schema says is written, and writes those back over what the kernel has done.
REASON = (
    "a step of pats_kernels writes through addresses, which no compiled graph keeps; it runs between the "
    "graphs, so fullgraph=True cannot hold it: leave optimizer.step() out of the compiled function, or "
    "fullgraph out"
)


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """`torch.compiler.disable` with `REASON`, without its import of torch._dynamo, which takes a second.

    torch.optim's own way: the import waits until the function is first called, and by then there mostly is an
    optimizer, whose construction needs it anyway.
    """
    disable: Any = getattr(torch, "_disable_dynamo", torch.compiler.disable)
    call = disable(function)
    call._torchdynamo_disable = True
    call._torchdynamo_disable_msg = REASON
    return call


def refuse_functionalization(operator: str) -> None:
    """Lets torch.ops.pats_kernels.<operator> raise where its arguments are to be exchanged for copies.

    Without this it would, inside a compiled graph, change nothing and say nothing.
    """

    def refuse(*_arguments: object, **_keywords: object) -> None:
        raise RuntimeError(
            f"torch.ops.pats_kernels.{operator} writes through the addresses in its table, and would be "
            "given copies here: call it from a function under torch.compiler.disable, as a step does"
        )

    _library.impl(operator, refuse, "Functionalize")


_library = torch.library.Library("pats_kernels", "IMPL")
